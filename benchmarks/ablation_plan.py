"""Which runs of ablations.py there are, which of them are done, and how long each may take."""

import json
import statistics
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


def seconds_of(side: dict, tokens: int) -> float:
    """What that many tokens take, with the seconds before the first step."""
    return side["seconds_before"] + tokens / side["tokens_per_second"]


def relative_speed(pairs: list[dict], tokens: int) -> float | None:
    """How much sooner than the default a row is through with that many tokens, the median of its paces."""
    ratios = [seconds_of(pair["default"], tokens) / seconds_of(pair, tokens) for pair in pairs]
    return statistics.median(ratios) if ratios else None


def tokens_in_time(found: list[dict], row: str, tokens: int) -> int:
    """What the row trains on in the seconds that the default needs for `tokens`, the median of its paces."""
    if row == "default":
        return tokens
    pairs = [result for result in found if (result["row"], result["equal"]) == (row, "pace")]
    if not pairs:
        raise ValueError(f"Equal time needs the pace of {row!r} beside the default's. Run it with --pace first.")
    seconds = [(seconds_of(pair["default"], tokens) - pair["seconds_before"], pair) for pair in pairs]
    return round(statistics.median(left * pair["tokens_per_second"] for left, pair in seconds))


def plan(
    rows: dict, default: dict, seeds: list[int], found: list[dict], equal: str, threads: int = 1
) -> list[tuple[str, int, dict]]:
    """(row, seed, options) of the runs that are not among the results `found`.

    Args:
        equal: what the rows share, "tokens" or "time"; "pace": nothing, their speed is measured.

    Raises:
        ValueError: a result has other options than the row; equal time needs a pace that is not there.
    """
    runs, tokens = [], default["max_tokens"]
    for seed in seeds:
        for row, changes in rows.items():
            options, asked = options_of(default, changes), (row, seed, equal, tokens)
            done = [each for each in found if tuple(each[key] for key in ("row", "seed", "equal", "budget")) == asked]
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
