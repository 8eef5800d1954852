"""What each choice is worth: short pretraining runs that differ from the default in one thing.

    python benchmarks/ablations.py --data path/to/data --group positions --seeds 0
    python benchmarks/ablations.py --data path/to/data --row "positions: ALiBi" --seeds 0 1 2
    python benchmarks/ablations.py --data path/to/data --row "positions: ALiBi" --equal_time

benchmarks/ablations.yaml has the rows. Each is one run of train/pretrain.py on one thread, which this prints before it
starts it; --data is a folder with the data sets that the rows name. All train on the default's number of tokens. With
--equal_time a row and the default train side by side, each on its own --threads, for the same minutes, so that both
have the same machine at the same hour; torch compiles before. Results are appended to
benchmarks/results/ablations.jsonl as they come, and what stands there is not run again, so that a table may grow over
days; with other options than the row has now it is refused. `benchmarks/tables.py` makes the tables of docs/recipes.md
from it. The tokenizer that the rows name is trained on their text first, where it is not there.
"""

import argparse
import functools
import os
import resource
import shlex
import sys
import tempfile
import traceback
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from ablation_plan import RESULTS, ROWS, plan, read_rows
from trainings import (
    append_result,
    check_same_texts,
    command_of,
    inputs_of,
    make_tokenizer,
    numbers_of,
    options_of,
    precision_here,
    read_results,
    start,
)

MINUTES = 5  # of --equal_time


def curve_of(log: list[dict], points: int = 40) -> list[list]:
    """[tokens so far, loss in training] at that many places, each the mean of the log entries since the last."""
    entries = [(entry["tokens"], entry["loss"]) for entry in log]
    size = max(1, -(-len(entries) // points))
    parts = [entries[first : first + size] for first in range(0, len(entries), size)]
    return [[part[-1][0], round(sum(loss for _, loss in part) / len(part), 4)] for part in parts]


def run(row: str, seed: int, options: dict, data: Path, threads: int) -> dict:
    """The numbers of one training."""
    with tempfile.TemporaryDirectory() as folder:
        command = command_of(options, data, seed, folder)
        print(f"\n{row}, seed {seed}: {shlex.join(command[1:])}", flush=True)
        start(command, threads)
        numbers, log = numbers_of(Path(folder))
    about = {"row": row, "seed": seed, "options": options, "threads": threads}
    return {**about, **numbers, "curve": curve_of(log), "load": os.getloadavg()[0]}


def run_beside_the_default(row: str, seed: int, options: dict, default: dict, data: Path, threads: int) -> dict:
    """The numbers of a row, with those of the default (`default`: its options) that trained at the same time."""
    sides, few = ((row, options), ("default", default)), {"max_train_samples": 2000, "max_eval_samples": 50}
    for name, each in sides:
        trial = options_of(each, {**few, "max_minutes": None, "max_steps": 3})
        run(name, seed, trial, data, threads)
    with ThreadPoolExecutor(len(sides)) as pool:
        found, beside = pool.map(lambda side: run(side[0], seed, side[1], data, threads), sides)
    return {**found, "default": {key: value for key, value in beside.items() if key not in ("row", "seed")}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the data sets")
    parser.add_argument("--row", nargs="+", default=[], help='as "group: row"; all where --group is not given either')
    parser.add_argument("--group", nargs="+", default=[], help="all rows of these groups")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument("--max_tokens", type=int, help="instead of the default's")
    minutes = f"minutes, beside the default, instead of tokens (without a number: {MINUTES:g})"
    budget.add_argument("--equal_time", type=float, nargs="?", const=MINUTES, metavar="MINUTES", help=minutes)
    parser.add_argument("--workers", type=int, default=1, help="runs at the same time, each on --threads")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rows", type=Path, default=ROWS, help="another file of rows")
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    default, rows = read_rows(arguments.rows)
    if unknown := [row for row in arguments.row if row not in rows]:
        parser.error(f"no such row: {unknown[0]!r}. There are {', '.join(rows)}.")
    groups = list(dict.fromkeys(row.split(":")[0] for row in rows))
    if unknown := [group for group in arguments.group if group not in groups]:
        parser.error(f"no such group: {unknown[0]!r}. There are {', '.join(groups)}.")
    if arguments.row or arguments.group:
        rows = {row: changes for row, changes in rows.items()
                if row in arguments.row or row.split(":")[0] in arguments.group}  # fmt: skip
    if arguments.max_tokens:
        default["max_tokens"] = arguments.max_tokens
    minutes, failed, precision = arguments.equal_time, [], precision_here()
    if minutes is not None and minutes <= 0:
        parser.error(f"--equal_time is a number of minutes above 0, got {minutes:g}.")
    stands = read_results(arguments.output)
    if minutes and arguments.workers > 1:
        parser.error("--equal_time trains a row and the default side by side already: leave --workers out.")
    make_tokenizer(default, arguments.data)
    inputs = inputs_of(default, arguments.data)
    check_same_texts(arguments.output, [*stands, {"row": "what is to be run", "inputs": inputs}])
    found = [result for result in stands if result["precision"] == precision]
    runs = plan(rows, default, arguments.seeds, found, inputs, minutes, arguments.threads)
    if done := len(rows) * len(arguments.seeds) - len(runs):
        print(f"{done} of the runs stand in {arguments.output}. Pass another --output to run them again.")
    shared = {"data": arguments.data, "threads": arguments.threads}
    equal, budget, train = "tokens", default["max_tokens"], functools.partial(run, **shared)
    if minutes:
        beside = options_of(default, {"max_tokens": None, "max_minutes": minutes})
        equal, budget, train = "time", minutes, functools.partial(run_beside_the_default, default=beside, **shared)
    with ThreadPoolExecutor(arguments.workers) as pool:
        started = {pool.submit(train, *each): each[:2] for each in runs}
        try:
            for future in as_completed(started):
                row, seed = started[future]
                if error := future.exception():
                    failed.append(f"{row!r}, seed {seed}")
                    print(f"{failed[-1]} failed: {''.join(traceback.format_exception_only(error))}", flush=True)
                    continue
                result = {**future.result(), "inputs": inputs, "equal": equal, "budget": budget}
                append_result(arguments.output, result)
                print(f"{row}, seed {seed}: {result['loss']:.3f} nats, {result['accuracy']:.1%}", flush=True)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)  # else all that wait would be run, and lost
            raise
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    print(f"{(spent.ru_utime + spent.ru_stime) / 60:.1f} minutes of processor time")
    if failed:
        sys.exit(f"failed: {'; '.join(failed)}")


if __name__ == "__main__":
    main()
