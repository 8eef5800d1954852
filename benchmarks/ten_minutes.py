"""What ten minutes on two processor cores give: our recipe and stock encoders of its size, same text, same clock.

    python benchmarks/ten_minutes.py --data path/to/data --seeds 0 1 2
    python benchmarks/ten_minutes.py --data path/to/data --language zh
    python benchmarks/ten_minutes.py --data path/to/data --minutes 1 --output runs/try.jsonl       # a trial

For each seed the models of benchmarks/ten_minutes.yaml train one after another, each a run of train/pretrain.py;
nothing else should run on the machine. The text comes without the articles that hold text of what the models are
evaluated on (clean_texts.py). Ours is train/recipes/cpu-10-minutes.yaml, but with 8,192 words, as all; the stock
models have the learning rate and the batch that are best of those that were tried (the rows "stock models" of
ablations.py, in docs/results.md), the recipe's masking rate, logits at masked places alone, and full rows. The
tokenizer, and a first start of each model, in which torch compiles, come before the clock; `tokenizer_seconds` (null:
not known) and `before_clock` have their seconds. Models are kept in runs/ten-minutes for train/evaluate_models.py,
and results are appended to benchmarks/results/ten_minutes.jsonl; what stands there with the same options and in this
machine's precision (bf16 or fp32) is not run again.
"""

import argparse
import os
import shlex
from pathlib import Path

import yaml
from clean_texts import clean, is_clean
from trainings import (
    append_result,
    check_same_texts,
    command_of,
    inputs_of,
    is_done,
    make_tokenizer,
    numbers_of,
    options_of,
    precision_here,
    read_results,
    start,
)

MODELS = Path("benchmarks/ten_minutes.yaml")
RESULTS = Path("benchmarks/results/ten_minutes.jsonl")
KEPT = ("loss", "tokens", "minutes", "tokens_per_second")


def options_of_model(written: dict, name: str, language: str) -> dict:
    """Options of train/pretrain.py for a model of benchmarks/ten_minutes.yaml (`written`)."""
    recipe = yaml.safe_load(Path(written["recipe"]).read_text(encoding="utf-8"))
    of_model = written["models"][name]
    of_model = {**written["models"].get(of_model.get("like"), {}), **of_model}
    kept = {key: recipe[key] for key in ("mlm_probability", "max_seq_length") if key in recipe}
    common = recipe if of_model.get("recipe") else {**written["stock"], **kept}
    shared = {**common, **written["languages"][language], **written["all"]}
    return options_of(shared, {**of_model, "recipe": None, "like": None})


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
    numbers, log = numbers_of(folder)
    rows = [[entry[key] for key in KEPT] for entry in log]
    return {
        "language": arguments.language,
        "model": name,
        "seed": seed,
        "threads": arguments.threads,
        "options": options,
        **numbers,
        "budget": arguments.minutes,
        "curve": {"columns": KEPT, "rows": rows},
        "before_clock": before_clock,
        "load": load,
    }


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
    precision, runs = precision_here(), []
    stands = [result for result in read_results(arguments.output) if result["language"] == arguments.language]
    if not is_clean(arguments.data, arguments.language):
        if (tokenizer := Path(text["tokenizer_name"])).exists():
            parser.error(f"{tokenizer} was learned from another text than --data gives now. Delete it, or rename it.")
        clean(arguments.data, arguments.language)
    tokenizer_seconds = make_tokenizer(text, arguments.data)
    inputs = inputs_of(text, arguments.data)
    check_same_texts(arguments.output, [*stands, {"model": "what is to be run", "inputs": inputs}])
    found = [result for result in stands if result["precision"] == precision]
    for seed in arguments.seeds:
        for name in arguments.models or written["models"]:
            options = options_of_model(written, name, arguments.language)
            asked = (arguments.language, name, seed, arguments.minutes)
            keys = ("language", "model", "seed", "budget")
            done = [each for each in found if tuple(each[key] for key in keys) == asked]
            now = {"threads": arguments.threads, **options, **inputs}
            if is_done(f"{name!r}, {arguments.language}, seed {seed}, {arguments.minutes:g} minutes,", done, now):
                print(f"{name}, seed {seed}: stands in {arguments.output}. Pass another --output to run it again.")
            else:
                runs.append((name, options, seed))
    for name, options, seed in runs:
        result = run(name, options, seed, arguments)
        append_result(arguments.output, {**result, "inputs": inputs, "tokenizer_seconds": tokenizer_seconds})
        told = f"{result['loss']:.3f} nats, {result['accuracy']:.1%}, {result['tokens']:,} tokens"
        print(f"{name}, seed {seed}: {told}", flush=True)


if __name__ == "__main__":
    main()
