"""Every class of the config's auto_map, at the door by which transformers finds the files that travel with a model."""

from .encoder import SelfAttnModel, SelfAttnPreTrainedModel
from .heads_text import (
    SelfAttnForMaskedLM,
    SelfAttnForMultipleChoice,
    SelfAttnForQuestionAnswering,
    SelfAttnForSequenceClassification,
    SelfAttnForTokenClassification,
)
from .kernels_stock import stock_attention  # noqa: F401  registers the kernel for other people's models

_AUTO_CLASSES = {
    SelfAttnModel: "AutoModel",
    SelfAttnForMaskedLM: "AutoModelForMaskedLM",
    SelfAttnForSequenceClassification: "AutoModelForSequenceClassification",
    SelfAttnForTokenClassification: "AutoModelForTokenClassification",
    SelfAttnForQuestionAnswering: "AutoModelForQuestionAnswering",
    SelfAttnForMultipleChoice: "AutoModelForMultipleChoice",
}

for _cls, _auto_class in _AUTO_CLASSES.items():
    # save_pretrained copies the file that a class names as its module, and what that file imports.
    _cls.__module__ = __name__
    _cls.register_for_auto_class(_auto_class)

__all__ = ["SelfAttnPreTrainedModel", *(cls.__name__ for cls in _AUTO_CLASSES)]
