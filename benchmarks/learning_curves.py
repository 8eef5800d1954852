"""Draws how ours and the stock models learned in ten minutes: docs/ten_minutes_en.png from the results.

    python benchmarks/learning_curves.py
    python benchmarks/learning_curves.py --language zh --results runs/ten_minutes.jsonl

The loss in training (of the tokens asked for, some of which are not replaced by [MASK]) against tokens and against
minutes; a thin line for each seed.
"""

import argparse
from pathlib import Path

import matplotlib
from ten_minutes import RESULTS
from trainings import read_results

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.lines import Line2D

SMOOTHED = 5  # entries of the log that a point is the mean of


def points(result: dict, column: str) -> tuple[list[float], list[float]]:
    """(values of the column, mean losses) of a training."""
    columns, rows = result["curve"]["columns"], result["curve"]["rows"]
    parts = [rows[first : first + SMOOTHED] for first in range(0, len(rows), SMOOTHED)]
    place, loss = columns.index(column), columns.index("loss")
    return [part[-1][place] for part in parts], [sum(row[loss] for row in part) / len(part) for part in parts]


def draw(found: list[dict]) -> plt.Figure:
    """Both panels, a color and a label for each model."""
    colors = dict(zip(dict.fromkeys(result["model"] for result in found), plt.cm.tab10.colors, strict=False))
    figure, panels = plt.subplots(1, 2, figsize=(11, 4.2), sharey=True)
    for panel, (column, unit, title) in zip(
        panels, (("tokens", 1e6, "million tokens"), ("minutes", 1, "minutes")), strict=True
    ):
        for result in found:
            x, y = points(result, column)
            panel.plot([value / unit for value in x], y, color=colors[result["model"]], linewidth=1)
        panel.set(xlabel=title)
        panel.grid(True, alpha=0.2)
    panels[0].set(ylabel="loss in training, nats")
    panels[0].legend(handles=[Line2D([], [], color=color, label=model) for model, color in colors.items()])
    figure.tight_layout()
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--language", default="en")
    parser.add_argument("--minutes", type=float, default=10, help="of the trainings that are drawn")
    parser.add_argument("--precision", help="of these trainings; to be said where the results have several")
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    asked = (arguments.language, arguments.minutes)
    found = [result for result in read_results(arguments.results) if (result["language"], result["budget"]) == asked]
    if not found:
        parser.error(
            f"{arguments.results} has nothing for --language {arguments.language} --minutes {arguments.minutes:g}. "
            "Run benchmarks/ten_minutes.py first."
        )
    there = sorted({result["precision"] for result in found})
    if arguments.precision is None and len(there) > 1:
        parser.error(f"the trainings are of several machines: pass --precision, one of {', '.join(there)}.")
    if arguments.precision not in (None, *there):
        parser.error(f"the trainings are in {', '.join(there)}, not in --precision {arguments.precision}.")
    found = [result for result in found if arguments.precision in (None, result["precision"])]
    length = "ten" if arguments.minutes == 10 else f"{arguments.minutes:g}"
    picture = Path(f"docs/{length}_minutes_{arguments.language}.png")
    draw(found).savefig(picture, dpi=120)
    print(f"written: {picture}")


if __name__ == "__main__":
    main()
