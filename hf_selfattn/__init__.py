"""hf_selfattn: an encoder whose self-attention you choose by configuration, at home in transformers.

Importing it registers `model_type` "selfattn" with the Auto classes.
"""

import transformers

from . import modeling_selfattn
from .configuration_selfattn import AUTO_MAP, SelfAttnConfig
from .kernels import KERNELS, unsupported_reasons
from .modeling_selfattn import (
    SelfAttnForMaskedLM,
    SelfAttnForMultipleChoice,
    SelfAttnForQuestionAnswering,
    SelfAttnForSequenceClassification,
    SelfAttnForTokenClassification,
    SelfAttnModel,
    SelfAttnPreTrainedModel,
)
from .packing import Tokens
from .patterns import PATTERNS, Pattern, register_pattern
from .positions import POSITIONS, register_position
from .scores import SCORES, Scoring, register_score

__version__ = "0.1.0"

transformers.AutoConfig.register(SelfAttnConfig.model_type, SelfAttnConfig, exist_ok=True)
for _auto_class, _path in AUTO_MAP.items():
    if _auto_class != "AutoConfig":
        _cls = getattr(modeling_selfattn, _path.split(".")[-1])
        getattr(transformers, _auto_class).register(SelfAttnConfig, _cls, exist_ok=True)

__all__ = [
    "AUTO_MAP",
    "KERNELS",
    "PATTERNS",
    "POSITIONS",
    "SCORES",
    "Pattern",
    "Scoring",
    "SelfAttnConfig",
    "SelfAttnForMaskedLM",
    "SelfAttnForMultipleChoice",
    "SelfAttnForQuestionAnswering",
    "SelfAttnForSequenceClassification",
    "SelfAttnForTokenClassification",
    "SelfAttnModel",
    "SelfAttnPreTrainedModel",
    "Tokens",
    "register_pattern",
    "register_position",
    "register_score",
    "unsupported_reasons",
]
