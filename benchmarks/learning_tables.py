"""The tables of docs/recipes.md and docs/results.md: what models learned."""

import json
import statistics
from pathlib import Path

from ablations import RESULTS, read_results, read_rows
from ten_minutes import RESULTS as TEN_MINUTES

from hf_selfattn.tools.evaluation_results import blimp_table, suite_table


def spread(values: list[float]) -> str:
    """The mean, and half of the distance between the lowest and the highest where there are several."""
    half = (max(values) - min(values)) / 2
    return f"{statistics.mean(values):.3f}" + (f" ± {half:.3f}" if len(values) > 1 else "")


def difference(results: list[dict], reference: list[dict]) -> float:
    """Of the mean losses, over the seeds that both have."""
    losses, others = ({result["seed"]: result["loss"] for result in found} for found in (results, reference))
    seeds = sorted(losses.keys() & others.keys())
    return statistics.mean(losses[seed] - others[seed] for seed in seeds)


def ablations(budget: int, path: Path = RESULTS) -> str:
    """Every row that was run at this budget, against the default, at equal tokens and at equal time."""
    found = [result for result in read_results(path) if result["budget"] == budget]
    rows: dict[str, dict[str, list]] = {name: {"tokens": [], "time": []} for name in read_rows()[1]}
    for result in found:
        rows[result["row"]][result["equal"]].append(result)
    reference = rows["default"]["tokens"]
    speed = statistics.median(result["tokens_per_second"] for result in reference)
    lines = [
        "| | nats | against the default | accuracy | seeds | speed | at equal time |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name, kinds in rows.items():
        results = kinds["tokens"]
        if not results:
            continue
        less = "" if name == "default" else f"{difference(results, reference):+.3f}"
        timed = f"{difference(kinds['time'], reference):+.3f}" if kinds["time"] else ""
        accuracy = statistics.mean(result["accuracy"] for result in results)
        speed_of_row = statistics.median(result["tokens_per_second"] for result in results) / speed
        cells = [spread([result["loss"] for result in results]), less, f"{accuracy:.1%}", str(len(results))]
        lines.append("| " + " | ".join([name, *cells, f"{speed_of_row:.2f}", timed]) + " |")
    return "\n".join(lines)


def ten_minutes(language: str, path: Path = TEN_MINUTES) -> str:
    """Ours and the stock models after the same minutes."""
    found = [result for result in read_results(path) if (result["language"], result["minutes"]) == (language, 10)]
    lines = ["| | nats | accuracy | bits per byte | tokens, millions | seeds |", "|---|---:|---:|---:|---:|---:|"]
    for name in dict.fromkeys(result["model"] for result in found):
        results = [result for result in found if result["model"] == name]
        accuracy, bits = (statistics.mean(result[key] for result in results) for key in ("accuracy", "bits_per_byte"))
        tokens = statistics.mean(result["tokens"] for result in results) / 1e6
        losses = spread([result["loss"] for result in results])
        name = f"**{name}**" if name == "ours" else name
        lines.append(f"| {name} | {losses} | {accuracy:.1%} | {bits:.3f} | {tokens:.1f} | {len(results)} |")
    return "\n".join(lines)


def blimp(language: str) -> str:
    return blimp_table(_evaluation(f"blimp_{language}")["models"])


def suite(language: str) -> str:
    return suite_table(_evaluation(f"suite_{language}")["suite"])


def _evaluation(name: str) -> dict:
    """What train/evaluate_models.py wrote to `evaluation.json`, kept with the results."""
    return json.loads(RESULTS.with_name(f"{name}.json").read_text(encoding="utf-8"))
