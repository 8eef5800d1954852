"""What ten minutes on two processor cores give: our recipe and stock encoders of its size, same text, same clock.

    python benchmarks/ten_minutes.py --data ../shared/data --seeds 0 1 2
    python benchmarks/ten_minutes.py --data ../shared/data --language zh
    python benchmarks/ten_minutes.py --data ../shared/data --minutes 1 --output runs/try.jsonl       # a trial

For each seed the models of benchmarks/ten_minutes.yaml train one after another, each a run of train/pretrain.py;
nothing else should run on the machine. Ours is train/recipes/cpu-10-minutes.yaml; the stock models have the learning
rate and the batch that are best of those that were tried (the rows "stock models" of ablations.py, and
docs/results.md), the recipe's masking rate, logits at masked places alone, and full rows. The tokenizer, and a first
start of each model, in which torch compiles, come before the clock; `tokenizer_seconds` (null: not known) and
`before_clock` have their seconds. Models are kept in runs/ten-minutes for train/evaluate_models.py, and results are
appended to benchmarks/results/ten_minutes.jsonl; what stands there with the same options is not run again.
"""

import argparse
import json
import os
import shlex
import subprocess
import time
from pathlib import Path

import yaml
from ablation_plan import differing, options_of, read_results
from ablations import command_of, make_tokenizer

MODELS = Path("benchmarks/ten_minutes.yaml")
RESULTS = Path("benchmarks/results/ten_minutes.jsonl")
KEPT = ("loss", "tokens", "minutes", "tokens_per_second")


def start(command: list[str], threads: int) -> float:
    """Seconds that the command took."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": "."}
    before = time.perf_counter()
    finished = subprocess.run(command, env=environment, capture_output=True, text=True)
    if finished.returncode:
        raise RuntimeError(f"{shlex.join(command)} failed:\n{finished.stderr[-3000:]}")
    return time.perf_counter() - before


def run(name: str, options: dict, seed: int, arguments: argparse.Namespace) -> dict:
    """The numbers of one training."""
    folder = Path("runs/ten-minutes", f"{arguments.language}-{name}-{seed}")
    few = {"max_minutes": None, "max_steps": 3, "max_train_samples": 2000, "max_eval_samples": 50}
    trial = options_of(options, few)
    before_clock = start(command_of(trial, arguments.data, seed, f"{folder}-trial"), arguments.threads)
    command = command_of(options_of(options, {"max_minutes": arguments.minutes}), arguments.data, seed, str(folder))
    load = os.getloadavg()[0]
    print(f"\n{name}, seed {seed}: {shlex.join(command[1:])}", flush=True)
    start(command, arguments.threads)
    scores, record, state = (
        json.loads((folder / name).read_text(encoding="utf-8"))
        for name in ("all_results.json", "run.json", "trainer_state.json")
    )
    curve = [[entry[key] for key in KEPT] for entry in state["log_history"] if "loss" in entry]
    return {
        "language": arguments.language,
        "model": name,
        "seed": seed,
        "minutes": arguments.minutes,
        "threads": arguments.threads,
        "options": options,
        **{key: scores[f"eval_{key}"] for key in ("loss", "accuracy", "bits_per_byte", "masked_tokens")},
        "tokens": curve[-1][1],
        "steps": state["global_step"],
        "curve": {"columns": KEPT, "rows": curve},
        "before_clock": before_clock,
        "load": load,
        "commit": record.get("commit"),
        "versions": record.get("versions"),
    }


def is_done(name: str, options: dict, seed: int, arguments: argparse.Namespace, found: list[dict]) -> bool:
    """Whether this training is among the results. Raises ValueError where one with other options is."""
    asked = (arguments.language, name, seed, arguments.minutes)
    done = [each for each in found if (each["language"], each["model"], each["seed"], each["minutes"]) == asked]
    for each in done:
        stored = {"threads": each["threads"], **each["options"]}
        if differ := differing(stored, {"threads": arguments.threads, **options}):
            raise ValueError(
                f"The result of {name!r}, {arguments.language}, seed {seed}, {arguments.minutes:g} minutes, has other "
                f"options than the model has now: {differ}. Remove its line, or pass another --output."
            )
    return bool(done)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the data sets")
    parser.add_argument("--language", default="en", help="a key of `languages` in benchmarks/ten_minutes.yaml")
    parser.add_argument("--models", nargs="+", help="without it, all")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    written = yaml.safe_load(MODELS.read_text(encoding="utf-8"))
    for what, given in (("language", [arguments.language]), ("model", arguments.models or [])):
        if unknown := [each for each in given if each not in written[f"{what}s"]]:
            parser.error(f"no such {what}: {unknown[0]!r}. There are {', '.join(written[f'{what}s'])}.")
    text = written["languages"][arguments.language]
    recipe = yaml.safe_load(Path(written["recipe"]).read_text(encoding="utf-8"))
    kept = {key: recipe[key] for key in ("mlm_probability", "max_seq_length") if key in recipe}
    found, runs = read_results(arguments.output), []
    for seed in arguments.seeds:
        for name in arguments.models or written["models"]:
            of_model = written["models"][name]
            common = recipe if of_model.get("recipe") else {**written["stock"], **kept}
            options = options_of({**common, **text, **written["all"]}, {**of_model, "recipe": None})
            if is_done(name, options, seed, arguments, found):
                print(f"{name}, seed {seed}: stands in {arguments.output}. Pass another --output to run it again.")
            else:
                runs.append((name, options, seed))
    tokenizer_seconds = make_tokenizer(text, arguments.data)
    for name, options, seed in runs:
        result = {**run(name, options, seed, arguments), "tokenizer_seconds": tokenizer_seconds}
        with arguments.output.open("a", encoding="utf-8") as file:
            file.write(json.dumps(result) + "\n")
        told = f"{result['loss']:.3f} nats, {result['accuracy']:.1%}, {result['tokens']:,} tokens"
        print(f"{name}, seed {seed}: {told}", flush=True)


if __name__ == "__main__":
    main()
