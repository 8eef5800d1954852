"""The metrics in `metrics/`, which `evaluate` loads from this package without a network."""

import functools
from pathlib import Path

import evaluate

from .recipes import nearest

FOLDER = Path(__file__).parent / "metrics"

METRICS = {
    "text-classification": (("accuracy", "f1", "matthews_correlation"), ("accuracy", "f1_micro", "f1_macro")),
    "text-regression": (("pearsonr", "spearmanr"),),
    "token-classification": (("accuracy", "f1"), ("accuracy", "f1", "precision", "recall")),
    "question-answering": (("f1", "exact_match"),),
    "multiple-choice": (("accuracy",),),
}
"""Of each kind of task those of which more is better, the usual one first; then the same where a text has several
labels, or labels of words make chunks (B-, I-)."""


@functools.cache
def load_metric(name, config_name=None):
    """An `evaluate.Metric`; the same as `evaluate.load` of the folder `metrics/<name>`."""
    return evaluate.load(str(FOLDER / name), config_name=config_name, keep_in_memory=True)


def score(name, predictions, references, config_name=None, **kwargs):
    return load_metric(name, config_name).compute(predictions=predictions, references=references, **kwargs)


def check_metric(metric, known, what):
    if metric not in known:
        raise ValueError(
            f"The suite reports a metric of which more is better, for {what} one of {', '.join(known)}; its "
            f"metric_for_best_model is {metric!r}.{nearest(metric, known)} Name one of these, or leave it out."
        )
