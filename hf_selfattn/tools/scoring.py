"""The metrics in `metrics/`, which `evaluate` loads from this package without a network."""

import functools
from pathlib import Path

import evaluate

FOLDER = Path(__file__).parent / "metrics"


@functools.cache
def load_metric(name, config_name=None):
    """An `evaluate.Metric`; the same as `evaluate.load` of the folder `metrics/<name>`."""
    return evaluate.load(str(FOLDER / name), config_name=config_name, keep_in_memory=True)


def score(name, predictions, references, config_name=None, **kwargs):
    return load_metric(name, config_name).compute(predictions=predictions, references=references, **kwargs)
