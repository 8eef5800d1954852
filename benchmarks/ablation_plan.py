"""Which runs of ablations.py there are, and which of them are done."""

import json
from pathlib import Path

import yaml

ROWS = Path("benchmarks/ablations.yaml")
RESULTS = Path("benchmarks/results/ablations.jsonl")


def read_rows(path: Path = ROWS) -> tuple[dict, dict[str, dict]]:
    """(the options of the default, {"group: row": what that row changes})."""
    written = yaml.safe_load(path.read_text(encoding="utf-8"))
    rows = {"default": {}}
    for group, changes in written["groups"].items():
        rows |= {f"{group}: {row}": options for row, options in changes.items()}
    return written["default"], rows


def options_of(default: dict, changes: dict) -> dict:
    """The default's options with the changes; `config`, the model's, is changed key by key (None: left out)."""
    config = {**default.get("config", {}), **changes.get("config", {})}
    merged = {
        **default,
        **changes,
        "config": {key: value for key, value in config.items() if value is not None} or None,
    }
    return {key: value for key, value in merged.items() if value is not None}


def read_results(path: Path = RESULTS) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def differing(some: dict, others: dict) -> str:
    """The options that two runs differ in, with their values; empty where there are none."""
    names = [name for name in {**some, **others} if some.get(name) != others.get(name)]
    return ", ".join(f"{name}: {some.get(name)} against {others.get(name)}" for name in names)


def plan(
    rows: dict, default: dict, seeds: list[int], found: list[dict], minutes: float | None = None, threads: int = 1
) -> list[tuple[str, int, dict]]:
    """(row, seed, options) of the runs that are not among the results `found`.

    Args:
        minutes: of training for each run; None: as many tokens as the default has.

    Raises:
        ValueError: a result has other options than the row.
    """
    equal, budget = ("time", minutes) if minutes else ("tokens", default["max_tokens"])
    default, runs = options_of(default, {"max_tokens": None, "max_minutes": minutes} if minutes else {}), []
    for seed in seeds:
        for row, changes in rows.items():
            options, asked = options_of(default, changes), (row, seed, equal, budget)
            done = [each for each in found if tuple(each[key] for key in ("row", "seed", "equal", "budget")) == asked]
            for result in done:
                stored = {"threads": result["threads"], **result["options"]}
                if differ := differing(stored, {"threads": threads, **options}):
                    raise ValueError(
                        f"The result of {row!r}, seed {seed}, has other options than the row has now: {differ}. "
                        "Remove its line, or pass another --output."
                    )
            if not done:
                runs.append((row, seed, options))
    return runs
