"""What each choice is worth: short pretraining runs that differ from the default in one thing.

    python benchmarks/ablations.py --data ../shared/data --group positions --seeds 0
    python benchmarks/ablations.py --data ../shared/data --row "positions: ALiBi" --seeds 0 1 2
    python benchmarks/ablations.py --data ../shared/data --row "positions: ALiBi" --equal_time

benchmarks/ablations.yaml has the rows. Each is one run of train/pretrain.py on one thread, which this prints before it
starts it; --data is a folder with the data sets that the rows name. All train on the default's number of tokens, or,
with --equal_time, on as many as the row has time for: its speed, the median in its runs at equal tokens, over the
default's. Results are appended to benchmarks/results/ablations.jsonl as they come, and what stands there is not run
again, so that a table may grow over days. `benchmarks/tables.py` makes the tables of docs/recipes.md from it. The
tokenizer that the rows name is trained on their text first, where it is not there.
"""

import argparse
import json
import os
import resource
import shlex
import statistics
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
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


def command_of(options: dict, data: Path, seed: int, output: str) -> list[str]:
    """The command line of a run."""
    variant = ["benchmarks/ablation_variants.py", options["variant"]] if "variant" in options else []
    command = [sys.executable, *variant, "train/pretrain.py", "--seed", str(seed), "--output_dir", output]
    for name, value in options.items():
        if name == "variant":
            continue
        if name == "config":
            written = ", ".join(f"{key}={json.dumps(each)}" for key, each in value.items())
            command += ["--config_overrides", written]
        else:
            values = [str(each).replace("DATA", str(data)) for each in (value if isinstance(value, list) else [value])]
            command += [f"--{name}", *values]
    return command


def read_results(path: Path = RESULTS) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def relative_speed(results: list[dict], row: str, tokens: int) -> float:
    """Tokens a second over the default's, in runs at that many tokens."""
    alike = [result for result in results if (result["equal"], result["budget"]) == ("tokens", tokens)]
    speeds = {name: [result["tokens_per_second"] for result in alike if result["row"] == name]
              for name in (row, "default")}  # fmt: skip
    if not all(speeds.values()):
        raise ValueError(f"Equal time needs the speeds of {row!r} and of the default. Run both at equal tokens first.")
    return statistics.median(speeds[row]) / statistics.median(speeds["default"])


def make_tokenizer(options: dict, data: Path) -> None:
    """Trains the tokenizer that runs name, where it is not there."""
    if not Path(options["tokenizer_name"]).is_dir():
        files = [each.replace("DATA", str(data)) for each in options["train_file"]]
        command = [sys.executable, "train/train_tokenizer.py", "--train_file", *files, "--text_column"]
        command += [options["text_column"], "--vocab_size", "8192", "--output_dir", options["tokenizer_name"]]
        subprocess.run(command, env={**os.environ, "PYTHONPATH": "."}, check=True)


def curve_of(log: list[dict], points: int = 40) -> list[list]:
    """[tokens so far, loss in training] at that many places, each the mean of the log entries since the last."""
    entries = [(entry["tokens"], entry["loss"]) for entry in log if "loss" in entry]
    size = max(1, -(-len(entries) // points))
    parts = [entries[first : first + size] for first in range(0, len(entries), size)]
    return [[part[-1][0], round(sum(loss for _, loss in part) / len(part), 4)] for part in parts]


def run(row: str, seed: int, options: dict, data: Path, threads: int) -> dict:
    """The numbers of one training."""
    with tempfile.TemporaryDirectory() as folder:
        command = command_of(options, data, seed, folder)
        print(f"\n{row}, seed {seed}: {shlex.join(command[1:])}", flush=True)
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": "."}
        finished = subprocess.run(command, env=environment, capture_output=True, text=True)
        if finished.returncode:
            print(f"{row}, seed {seed} failed:\n{finished.stderr[-3000:]}", flush=True)
            return {}
        scores = json.loads((Path(folder) / "all_results.json").read_text(encoding="utf-8"))
        record = json.loads((Path(folder) / "run.json").read_text(encoding="utf-8"))
        state = json.loads((Path(folder) / "trainer_state.json").read_text(encoding="utf-8"))
    names = ("loss", "accuracy", "bits_per_byte", "masked_tokens")
    return {
        "row": row,
        "seed": seed,
        "options": options,
        **{name: scores[f"eval_{name}"] for name in names},
        "tokens_per_second": statistics.median(e["tokens_per_second"] for e in state["log_history"] if "loss" in e),
        "curve": curve_of(state["log_history"]),
        "load": os.getloadavg()[0],
        "commit": record.get("commit"),
        "versions": record.get("versions"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the data sets")
    parser.add_argument("--row", nargs="+", default=[], help='rows, as "group: row"; without --group too: all')
    parser.add_argument("--group", nargs="+", default=[], help="all rows of these groups")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--max_tokens", type=int, help="instead of the default's")
    parser.add_argument("--equal_time", action="store_true", help="tokens by the speed that was measured")
    parser.add_argument("--workers", type=int, default=1, help="runs at the same time, each on --threads")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rows", type=Path, default=ROWS, help="another file of rows")
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    default, rows = read_rows(arguments.rows)
    if unknown := [row for row in arguments.row if row not in rows]:
        parser.error(f"no such row: {unknown[0]!r}. There are {', '.join(rows)}.")
    wanted = [row for row in rows if row in arguments.row or row.split(":")[0] in arguments.group]
    wanted = wanted or list(rows)
    if arguments.max_tokens:
        default["max_tokens"] = arguments.max_tokens
    make_tokenizer(default, arguments.data)
    found, writing, tokens = read_results(arguments.output), threading.Lock(), default["max_tokens"]
    finished = {(result["row"], result["seed"], result["equal"], result["budget"]) for result in found}
    equal = "time" if arguments.equal_time else "tokens"

    def work(task):
        row, seed = task
        options = options_of(default, rows[row])
        if (row, seed, equal, tokens) in finished:
            return
        if arguments.equal_time:
            options["max_tokens"] = round(tokens * relative_speed(found, row, tokens))
        result = run(row, seed, options, arguments.data, arguments.threads)
        if result:
            result = {**result, "equal": equal, "budget": tokens}
            with writing, arguments.output.open("a", encoding="utf-8") as file:
                file.write(json.dumps(result) + "\n")
            print(f"{row}, seed {seed}: {result['loss']:.3f} nats, {result['accuracy']:.1%}", flush=True)

    with ThreadPoolExecutor(arguments.workers) as pool:
        list(pool.map(work, [(row, seed) for seed in arguments.seeds for row in wanted]))
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    print(f"{(spent.ru_utime + spent.ru_stime) / 60:.1f} minutes of processor time")


if __name__ == "__main__":
    main()
