"""Examine a checkpoint, or a recipe before it is run: does everything fit together?

    python -m hf_selfattn.tools.doctor runs/quickstart
    python -m hf_selfattn.tools.doctor google-bert/bert-base-uncased --quick
    python -m hf_selfattn.tools.doctor runs/mine-classifier --data train.jsonl --validation_data dev.jsonl
    python -m hf_selfattn.tools.doctor train/recipes/quickstart.yaml --json findings.json

Tokenizer, config, positions, special tokens, saved code, buffers, labels and data are compared with each other; the
model is tried on small batches (is anything masked attended to?) and a copy of it trained for some steps. Findings are
printed, worst first, each with its remedy. Any encoder of transformers, and decoders where the question makes sense.

Exit status: 0, 1 where an error was found, 2 where there was nothing to examine.
"""

import argparse
import json
import sys
import time
import traceback
import warnings
from dataclasses import replace
from pathlib import Path

import datasets
from transformers.utils import logging

from . import doctor_attention as attention
from . import doctor_data as data
from . import doctor_files as files
from . import doctor_recipes as recipes
from . import doctor_tokenizer as tokenizer
from . import doctor_training as training
from . import doctor_weights as weights
from .doctor_examination import SEVERITIES, Check, Examination, Finding, first_line
from .doctor_opening import add_data, open_checkpoint
from .doctor_recipes import open_recipe
from .run_record import versions

NEEDS = {
    "label_column": "labels",
    "loading": "checkpoint",
    "of_head": "loss",
    "judges_tokens": "answer for each token",
}
"""What a check needs, in words, where the attribute's name is no word."""

WORKS = ("weights", "buffers", "forward")
"""Checks whose errors show in whatever the model answers."""

TRAINS = {"needs": ("model", "of_head"), "after": (*WORKS, "tying", "repeatable", "gradients"), "trains": True}

CHECKS = (
    Check("format", files.check_format, ("folder",)),
    Check("private", files.check_private, ("folder",)),
    Check("code", files.check_code, ("folder", "config")),
    Check("portable", tokenizer.check_portable, ("folder", "tokenizer")),
    Check("vocabulary", tokenizer.check_vocabulary, ("tokenizer",)),
    Check("special tokens", tokenizer.check_special_tokens, ("tokenizer",)),
    Check("frame", tokenizer.check_frame, ("tokenizer",)),
    Check("texts survive", tokenizer.check_texts_survive, ("tokenizer",)),
    Check("length", tokenizer.check_length, ("tokenizer",)),
    Check("label names", data.check_label_names, ("config",)),
    Check("labels", data.check_labels, ("data", "label_column")),
    Check("texts", data.check_texts, ("data",)),
    Check("overlap", data.check_overlap, ("data",)),
    Check("contradictions", data.check_contradictions, ("data",)),
    Check("truncation", data.check_truncation, ("data", "tokenizer")),
    Check("names of weights", weights.check_names, ("loading",)),
    Check("weights", weights.check_values, ("model",)),
    Check("tying", weights.check_tying, ("model",)),
    Check("dtype", weights.check_dtype, ("loading",)),
    Check("buffers", weights.check_buffers, ("model",)),
    Check("forward", attention.check_forward, ("model",), WORKS[:-1]),
    Check("inputs", tokenizer.check_inputs, ("tokenizer", "model"), ("forward",)),
    Check("repeatable", attention.check_repeatable, ("model",), WORKS),
    Check("padding", attention.check_padding, ("model",), (*WORKS, "repeatable")),
    Check("empty row", attention.check_empty_row, ("model",), (*WORKS, "padding")),
    Check("direction", attention.check_direction, ("model", "judges_tokens"), (*WORKS, "repeatable")),
    Check("order", attention.check_order, ("model",), (*WORKS, "repeatable")),
    Check("documents", attention.check_documents, ("model", "judges_tokens"), (*WORKS, "repeatable", "padding")),
    Check("kernel", attention.check_kernel, ("model",), (*WORKS, "repeatable", "padding", "direction")),
    Check("saving", weights.check_saving, ("model", "folder"), (*WORKS, "code", "repeatable")),
    Check("batch", recipes.check_batch, ("recipe", "model"), WORKS),
    Check("steps", recipes.check_steps, ("recipe",)),
    Check("learning rate", recipes.check_learning_rate, ("recipe",)),
    Check("memory", recipes.check_memory, ("recipe", "config")),
    Check("initial loss", training.check_initial_loss, **TRAINS | {"after": WORKS}),
    Check("gradients", training.check_gradients, **TRAINS | {"after": (*WORKS, "tying", "repeatable")}),
    Check("no labels", training.check_no_labels, **TRAINS),
    Check("accumulation", training.check_accumulation, **TRAINS),
    Check("overfitting", training.check_overfitting, **TRAINS),
)
"""In the order in which they run; what reads files comes before what runs the model."""


def _run(check, examination):
    """The Findings of one check, and its outcome in words. What fails in a check is a finding, too."""
    missing = [name for name in check.needs if not getattr(examination, name)]
    if missing:
        return [], f"left out: no {NEEDS.get(missing[0], missing[0])}"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = [replace(finding, check=check.name) for finding in check.find(examination)]
    except Exception as failure:
        place = traceback.extract_tb(failure.__traceback__)[-1]
        found = [
            Finding(
                "warning",
                check.name,
                f"This could not be checked: {first_line(failure)} ({Path(place.filename).name}, line {place.lineno})",
                "See whether the model can take such a batch; if it can, report this with its config.json.",
            )
        ]
    return found, ", ".join(finding.severity for finding in found) or "ok"


def diagnose(examination: Examination, quick=False, tell=lambda check, outcome, seconds: None) -> list[Finding]:
    """All findings about what was opened, worst first.

    Args:
        quick: whether checks that train are left out.
        tell: called after each check with its name, what came out, and how long it took.
    """
    findings = list(examination.troubles)
    for check in CHECKS:
        started = time.perf_counter()
        bad = {finding.check for finding in findings if finding.severity == "error"} & set(check.after)
        if check.trains and quick:
            outcome = "left out: --quick"
        elif bad:
            outcome = f"left out: the error in '{sorted(bad)[0]}' would show here too"
        else:
            found, outcome = _run(check, examination)
            findings += found
        tell(check.name, outcome, time.perf_counter() - started)
    return sorted(findings, key=lambda finding: SEVERITIES.index(finding.severity))


def examine(
    name,
    *,
    data=None,
    validation_data=None,
    text_columns=None,
    label_column=None,
    quick=False,
    trust_remote_code=False,
    attn_implementation=None,
    scripts=None,
    tell=None,
) -> list[Finding]:
    """Opens and examines.

    Args:
        name: the folder of a checkpoint, a name on the Hub, or a recipe (.yaml).
        data, validation_data: files or names of data sets that a checkpoint goes with.
        text_columns, label_column: in them; found where clear.
        quick: whether checks that train are left out.
        trust_remote_code: whether to run code that comes with a checkpoint.
        attn_implementation: the kernel of a checkpoint's model; None: its default.
        scripts: the folder with pretrain.py and finetune.py, for recipes; None: that of this checkout.
        tell: as in `diagnose`.

    Returns:
        Findings, worst first; none for what is healthy.

    Raises:
        OSError, ValueError: nothing can be examined: no such folder, name or recipe, a model that is no encoder or
            decoder of token ids, or options or data that do not fit.
    """
    of_data = {
        "data": data,
        "validation_data": validation_data,
        "text_columns": text_columns,
        "label_column": label_column,
    }
    given = [option for option, value in of_data.items() if value is not None]
    if str(name).endswith((".yaml", ".yml")):
        given += ["attn_implementation"] * (attn_implementation is not None)
        if given:
            raise ValueError(f"A recipe says itself what its {given[0]} is, got --{given[0]} too. Write it there.")
        examination = open_recipe(name, scripts)
    else:
        if given and data is None:
            raise ValueError(f"--{given[0]} goes with --data, the training data, which is not given. Add it.")
        examination = open_checkpoint(name, trust_remote_code=trust_remote_code, kernel=attn_implementation)
        if data is not None:
            add_data(examination, data, validation_data, text_columns, label_column)
    return diagnose(examination, quick, **({} if tell is None else {"tell": tell}))


def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="python -m hf_selfattn.tools.doctor",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", metavar="CHECKPOINT_OR_RECIPE", help="a folder, a name on the Hub, or a .yaml recipe")
    parser.add_argument("--data", help="the training data of a checkpoint: a file, a folder, or a name on the Hub")
    parser.add_argument("--validation_data", help="its validation data")
    parser.add_argument("--text_columns", nargs="+", help="the columns with text")
    parser.add_argument("--label_column", help="the column with labels")
    parser.add_argument("--quick", action="store_true", help="leave out what trains a copy of the model")
    parser.add_argument("--trust_remote_code", action="store_true", help="run code that comes with a checkpoint")
    parser.add_argument("--attn_implementation", help="the attention kernel of a checkpoint's model")
    parser.add_argument("--scripts", help="the folder with pretrain.py and finetune.py, for recipes")
    parser.add_argument("--json", metavar="FILE", help="write the findings there, too")
    options = vars(parser.parse_args(argv))
    path, outcomes = options.pop("json"), {}

    def tell(check, outcome, seconds):
        outcomes[check] = outcome
        print(f"{check:18} {outcome} ({seconds:.1f} s)", file=sys.stderr, flush=True)

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    datasets.disable_progress_bars()
    try:
        findings = examine(**options, tell=tell)
    except (OSError, ValueError) as refusal:
        print(f"{options['name']} cannot be examined: {refusal}", file=sys.stderr)
        return 2
    if path is not None:
        told = {
            "name": options["name"],
            "versions": versions(),
            "checks": outcomes,
            "findings": list(map(vars, findings)),
        }
        Path(path).write_text(json.dumps(told, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    counts = {severity: sum(finding.severity == severity for finding in findings) for severity in SEVERITIES}
    summary = ", ".join(f"{count} {severity}{'s' * (count > 1)}" for severity, count in counts.items() if count)
    print(*(f"{finding}\n" for finding in findings), f"{options['name']}: {summary or 'nothing found'}", sep="\n")
    return int(counts["error"] > 0)


if __name__ == "__main__":
    sys.exit(main())
