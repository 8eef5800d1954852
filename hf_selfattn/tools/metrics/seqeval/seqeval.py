"""Precision, recall and F1 of entities, each right only as a whole (seqeval; the CoNLL-2000 rules)."""

import datasets
import evaluate
import seqeval.metrics as scores


class Seqeval(evaluate.Metric):
    """{'precision', 'recall', 'f1': over entities, 'accuracy': over words}"""

    def _info(self):
        tags = datasets.List(datasets.Value("string"))
        return evaluate.MetricInfo(
            description=__doc__,
            citation="",
            inputs_description="predictions and references: for each text the tags of its words, as B-PER, I-PER, O.",
            features=datasets.Features({"predictions": tags, "references": tags}),
        )

    def _compute(self, predictions, references):
        pair = (references, predictions)
        return {
            "precision": float(scores.precision_score(*pair, zero_division=0)),
            "recall": float(scores.recall_score(*pair, zero_division=0)),
            "f1": float(scores.f1_score(*pair, zero_division=0)),
            "accuracy": float(scores.accuracy_score(*pair)),
        }
