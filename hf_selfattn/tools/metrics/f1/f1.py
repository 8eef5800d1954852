"""F1 of classes (`average`: binary, macro, micro, weighted), or of label sets with `config_name="multilabel"`."""

import datasets
import evaluate
from sklearn.metrics import f1_score


class F1(evaluate.Metric):
    """{'f1': from 0 to 1}; a class that is neither predicted nor there counts as 0 in a macro mean."""

    def _info(self):
        number = datasets.Value("int64")
        kind = datasets.List(number) if self.config_name == "multilabel" else number
        return evaluate.MetricInfo(
            description=__doc__,
            citation="",
            inputs_description="predictions and references: one label id a row; multilabel: a 0 or 1 for each label.",
            features=datasets.Features({"predictions": kind, "references": kind}),
        )

    def _compute(self, predictions, references, average="macro", labels=None, pos_label=1):
        score = f1_score(references, predictions, average=average, labels=labels, pos_label=pos_label, zero_division=0)
        return {"f1": float(score)}
