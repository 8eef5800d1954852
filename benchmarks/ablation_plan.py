"""Which runs of ablations.py there are, and which of them are done."""

from pathlib import Path

import yaml
from trainings import is_done, options_of

ROWS = Path("benchmarks/ablations.yaml")
RESULTS = Path("benchmarks/results/ablations.jsonl")


def read_rows(path: Path = ROWS) -> tuple[dict, dict[str, dict]]:
    """(the options of the default, {"group: row": what that row changes})."""
    written = yaml.safe_load(path.read_text(encoding="utf-8"))
    rows = {"default": {}}
    for group, changes in written["groups"].items():
        rows |= {f"{group}: {row}": options for row, options in changes.items()}
    return written["default"], rows


def plan(
    rows: dict, default: dict, seeds: list[int], found: list[dict], inputs: dict, minutes: float | None, threads: int
) -> list[tuple[str, int, dict]]:
    """(row, seed, options) of the runs that are not among the results `found`.

    Args:
        inputs: of `trainings.inputs_of`.
        minutes: of training for each run; None: as many tokens as the default has.

    Raises:
        ValueError: a result was made with something else than the row has now.
    """
    equal, budget = ("time", minutes) if minutes else ("tokens", default["max_tokens"])
    default, runs = options_of(default, {"max_tokens": None, "max_minutes": minutes} if minutes else {}), []
    for seed in seeds:
        for row, changes in rows.items():
            options, asked = options_of(default, changes), (row, seed, equal, budget)
            done = [each for each in found if tuple(each[key] for key in ("row", "seed", "equal", "budget")) == asked]
            now = {"threads": threads, **options, **inputs, **({"default": default} if minutes else {})}
            if not is_done(f"{row!r}, seed {seed},", done, now):
                runs.append((row, seed, options))
    return runs
