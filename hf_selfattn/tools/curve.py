"""The training curve as a picture."""

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def points(history, name):
    """(steps, values) of one quantity in a Trainer's `state.log_history`."""
    found = [(entry["step"], entry[name]) for entry in history if name in entry]
    return [step for step, _ in found], [value for _, value in found]


def draw_training_curve(history, path, metric="eval_accuracy", baseline=None, baseline_name="unigram"):
    """Loss (training and evaluation) and `metric` over the optimizer steps, as a PNG.

    Args:
        history: a Trainer's `state.log_history`.
        baseline: {quantity: value} of horizontal lines, for `eval_loss` and for `metric`.
        baseline_name: what these lines are called.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    left.plot(*points(history, "loss"), label="training")
    for axes, name, label in ((left, "eval_loss", "evaluation"), (right, metric, "evaluation")):
        axes.plot(*points(history, name), marker="o", markersize=3, color="tab:orange", label=label)
        if baseline and name in baseline:
            axes.axhline(baseline[name], color="tab:gray", linestyle="--", label=baseline_name)
        axes.set_xlabel("optimizer steps")
        axes.grid(alpha=0.3)
    left.set_ylabel("loss (nats)")
    right.set_ylabel(metric.removeprefix("eval_").replace("_", " "))
    for axes in (left, right):
        if axes.get_legend_handles_labels()[0]:
            axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)
