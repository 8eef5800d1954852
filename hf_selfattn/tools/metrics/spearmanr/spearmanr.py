"""Spearman's correlation of ranks of predictions and references; NaN where one of them is constant."""

import datasets
import evaluate
from scipy.stats import spearmanr


class Spearman(evaluate.Metric):
    """{'spearmanr': from -1 to 1}"""

    def _info(self):
        return evaluate.MetricInfo(
            description=__doc__,
            citation="",
            inputs_description="predictions and references: one number a row.",
            features=datasets.Features(
                {"predictions": datasets.Value("float64"), "references": datasets.Value("float64")}
            ),
        )

    def _compute(self, predictions, references):
        return {"spearmanr": float(spearmanr(references, predictions).statistic)}
