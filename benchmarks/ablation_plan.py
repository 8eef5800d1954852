"""Which runs of ablations.py there are, which of them are done, and how long each may take."""

import json
import statistics
from pathlib import Path

import yaml

ROWS = Path("benchmarks/ablations.yaml")
RESULTS = Path("benchmarks/results/ablations.jsonl")
BUSY = 3.0  # load above which a run's speed says nothing: more stood beside it than a second run


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


def pace(results: list[dict]) -> tuple[float, float] | None:
    """(seconds before the first step, tokens a second from then on): medians, of runs that have both, not `BUSY`."""
    measured = [
        (each["seconds_before"], each["tokens_per_second"])
        for each in results
        if "seconds_before" in each and each.get("load", 0) <= BUSY
    ]
    if not measured:
        return None
    before, speeds = zip(*measured, strict=True)
    return statistics.median(before), statistics.median(speeds)


def tokens_in_time(found: list[dict], row: str, tokens: int) -> int:
    """What the row trains on in the seconds that the default needs for `tokens`."""
    alike = [result for result in found if (result["equal"], result["budget"]) == ("tokens", tokens)]
    paces = [pace([result for result in alike if result["row"] == name]) for name in (row, "default")]
    if None in paces:
        raise ValueError(
            f"Equal time needs the pace of {row!r} and of the default at {tokens:,} tokens. Run both at equal tokens "
            f"first; results without `seconds_before`, or at a load above {BUSY:g}, do not count: remove their lines."
        )
    (before, speed), (before_default, speed_of_default) = paces
    return round((before_default + tokens / speed_of_default - before) * speed)


def plan(
    rows: dict, default: dict, seeds: list[int], found: list[dict], equal: str, threads: int = 1
) -> list[tuple[str, int, dict]]:
    """(row, seed, options) of the runs that are not among the results `found`.

    Raises:
        ValueError: a result has other options than the row; equal time needs a pace that is not there.
    """
    runs, tokens = [], default["max_tokens"]
    for seed in seeds:
        for row, changes in rows.items():
            options, asked = options_of(default, changes), (row, seed, equal, tokens)
            done = [each for each in found if (each["row"], each["seed"], each["equal"], each["budget"]) == asked]
            for result in done:
                # The budget is the same; at equal time, max_tokens follows the speed that was measured.
                stored = {"threads": result["threads"], **result["options"], "max_tokens": tokens}
                if differ := differing(stored, {"threads": threads, **options}):
                    raise ValueError(
                        f"The result of {row!r}, seed {seed}, at {tokens:,} tokens (equal {equal}) has other options "
                        f"than the row has now: {differ}. Remove its line, or pass another --output."
                    )
            if not done:
                timed = {"max_tokens": tokens_in_time(found, row, tokens)} if equal == "time" else {}
                runs.append((row, seed, {**options, **timed}))
    return runs
