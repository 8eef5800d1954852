"""Trainings of train/pretrain.py whose numbers are kept: command lines, what they learned, files of results."""

import hashlib
import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

from hf_selfattn.tools.fast_defaults import accelerator_available, bf16_in_hardware

VOCABULARY = 8192  # of the comparisons' tokenizers
SCORES = ("loss", "accuracy", "bits_per_byte", "masked_tokens", "unigram_loss")


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


def make_tokenizer(options: dict, data: Path) -> float | None:
    """Trains the tokenizer that runs name, where it is not there; the seconds that it took, None where not known."""
    folder = Path(options["tokenizer_name"])
    kept = folder / "seconds.json"
    if not (folder / "tokenizer.json").exists():
        files = [each.replace("DATA", str(data)) for each in options["train_file"]]
        command = [sys.executable, "train/train_tokenizer.py", "--train_file", *files, "--text_column"]
        command += [options["text_column"], "--vocab_size", str(VOCABULARY), "--output_dir", str(folder)]
        before = time.perf_counter()
        subprocess.run(command, env={**os.environ, "PYTHONPATH": "."}, check=True)
        kept.write_text(json.dumps({"seconds": round(time.perf_counter() - before, 1)}), encoding="utf-8")
    return json.loads(kept.read_text(encoding="utf-8"))["seconds"] if kept.exists() else None


def shortened_hash(content: bytes) -> str:
    """The beginning of its SHA-256."""
    return hashlib.sha256(content).hexdigest()[:16]


def inputs_of(options: dict, data: Path) -> dict[str, str]:
    """What the texts and the tokenizer's entries are, by the beginnings of their SHA-256."""

    files = [*options["train_file"], *options.get("validation_file", [])]
    tokenizer = json.loads(Path(options["tokenizer_name"], "tokenizer.json").read_text(encoding="utf-8"))
    entries = json.dumps(sorted(tokenizer["model"]["vocab"].items()))
    texts = {file: shortened_hash(Path(file.replace("DATA", str(data))).read_bytes()) for file in files}
    return {**texts, "tokenizer's entries": shortened_hash(entries.encode())}


def start(command: list[str], threads: int) -> float:
    """Seconds that the command took. Raises RuntimeError with the end of what it printed where it failed."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": "."}
    before = time.perf_counter()
    finished = subprocess.run(command, env=environment, capture_output=True, text=True)
    if finished.returncode:
        raise RuntimeError(f"{shlex.join(command)} failed:\n{finished.stderr[-3000:]}")
    return time.perf_counter() - before


def numbers_of(folder: Path) -> tuple[dict, list[dict]]:
    """(scores, tokens, minutes, steps, precision, commit, versions; the log of the training) of a finished run."""
    scores, record, state = (
        json.loads((folder / name).read_text(encoding="utf-8"))
        for name in ("all_results.json", "run.json", "trainer_state.json")
    )
    log = [entry for entry in state["log_history"] if "loss" in entry]
    numbers = {
        **{name: scores[f"eval_{name}"] for name in SCORES},
        "tokens": scores["train_tokens_used"],
        "minutes": scores["train_minutes"],
        "steps": state["global_step"],
        "precision": next((name for name in ("bf16", "fp16") if record["training_arguments"][name]), "fp32"),
        "commit": record.get("commit"),
        "versions": record.get("versions"),
    }
    return numbers, log


def read_results(path: Path) -> list[dict]:
    """Those of a file of JSON lines; none where it is not there. Raises ValueError where a line is no result."""
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines() if path.exists() else [], 1):
        try:
            found.append(json.loads(line))
        except ValueError as error:
            raise ValueError(
                f"{path}, line {number}, is no result ({error}): its writing was cut short. Delete the line, or pass "
                "another --output."
            ) from error
    return found


def precision_here() -> str:
    """In which pretrain.py trains here where nothing is said: what `precision` of its results will be."""
    return "bf16" if bf16_in_hardware(not accelerator_available())[0] else "fp32"


def append_result(path: Path, result: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(result) + "\n")


def differing(some: dict, others: dict) -> str:
    """The options that two runs differ in, with their values; empty where there are none."""
    names = [name for name in {**some, **others} if some.get(name) != others.get(name)]
    return ", ".join(f"{name}: {some.get(name)} against {others.get(name)}" for name in names)


def made_with(result: dict) -> dict:
    """All that decides about a result beside row, model and seed."""
    beside = {"default": result["default"]["options"]} if "default" in result else {}
    return {"threads": result["threads"], **result["options"], **result["inputs"], **beside}


def check_same_texts(path: Path, results: list[dict]) -> None:
    """Raises ValueError where one file or tokenizer was another in two results: losses on two texts do not compare."""
    first = {}
    for result in results:
        for name, of_text in result["inputs"].items():
            run = result.get("row") or result["model"]
            earlier, known = first.setdefault(name, (run, of_text))
            if known != of_text:
                raise ValueError(
                    f"{path}: {name} is another one for {run!r} than for {earlier!r} ({of_text} against {known}). "
                    "Keep the results of each text in a file of its own (--output)."
                )


def is_done(what: str, found: list[dict], now: dict) -> bool:
    """Whether one of the results `found` stands for a run that would be made with `now`.

    Raises:
        ValueError: one of them was made with something else.
    """
    for result in found:
        if differ := differing(made_with(result), now):
            raise ValueError(
                f"The result of {what} was made with other options or texts than it would be now: {differ}. Remove "
                "its line, or pass another --output."
            )
    return bool(found)
