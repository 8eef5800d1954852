"""What a checkpoint knows of the run that wrote it, and what a resumed run with other settings makes of it.

A setting that only the coming steps feel may change, and one line says what changes. What would give another meaning
to the weights or to the place in the data is refused.
"""

import contextlib
import dataclasses
import hashlib
import json
import re
from pathlib import Path
from typing import NamedTuple

import transformers
from transformers.utils import logging

from .run_record import versions
from .schedules import CEILING

logger = logging.get_logger(__name__)

RECORD = "resume.json"
WITHOUT_EFFECT = re.compile(
    "output_dir|overwrite_|logging_|log_|report_to|run_name|project|trackio_|disable_tqdm|eval_|per_device_eval_|"
    "prediction_loss|include_|batch_eval_|save_|hub_|push_to_|enable_jit|metric_for|greater_is|load_best|ignore_data_|"
    "restore_callback|resume_from|debug|skip_memory|do_|local_rank|use_cpu|torch_empty|divergence_|remove_unused|"
    "ddp_timeout|dry_run|assumed_|dataloader_(?!drop_last)"
)
"""Arguments that change no weight, at the beginning of their names."""
TOLD_ELSEWHERE = ("per_device_train_batch_size", "gradient_accumulation_steps", "seed", "data_seed", "max_steps",
                  "num_train_epochs", "train_sampling_strategy")  # fmt: skip
SCHEDULE = ("max_steps", "max_tokens", "max_minutes", "warmup_steps", "decay_steps", "decay_type", "lr_scheduler_type",
            "lr_scheduler_kwargs")  # fmt: skip
CONFIG_WITHOUT_EFFECT = ("_name_or_path", "transformers_version", "architectures", "auto_map", "dtype", "torch_dtype",
                         "use_cache", "id2label", "label2id", "problem_type")  # fmt: skip


class Place(NamedTuple):
    """Where a run stands in data that have a length: `rows` of this epoch were read, by all processes together."""

    step: int
    epoch: int
    rows: int


def _plain(value):
    """As it comes back from JSON."""
    return json.loads(json.dumps(value, default=str))


def _collator(collator):
    if not dataclasses.is_dataclass(collator):
        return type(collator).__name__
    fields = {field.name: getattr(collator, field.name) for field in dataclasses.fields(collator)}
    plain = {name: value for name, value in fields.items() if isinstance(value, (bool, int, float, str, type(None)))}
    nested = {name: _collator(value) for name, value in fields.items() if dataclasses.is_dataclass(value)}
    return {"kind": type(collator).__name__, **plain, **nested}


def _vocabulary(tokenizer):
    if tokenizer is None or not hasattr(tokenizer, "get_vocab"):
        return None
    vocabulary = json.dumps(sorted(tokenizer.get_vocab().items()))
    return {"tokens": len(tokenizer), "sha256": hashlib.sha256(vocabulary.encode()).hexdigest()}


def describe_run(arguments, *, max_steps, steps_per_epoch, rows_per_step, dataset, sampler, collator, tokenizer):
    """What decides about the coming steps, beside the model's configuration: plain numbers and names."""
    return _plain({
        "arguments": {name: value for name, value in arguments.to_dict().items() if not WITHOUT_EFFECT.match(name)},
        "max_steps": max_steps,
        "steps_per_epoch": steps_per_epoch,
        "rows_per_step": rows_per_step,
        "processes": arguments.world_size,
        "data_workers": max(1, arguments.dataloader_num_workers),
        "data": {"kind": type(dataset).__name__, "rows": len(dataset) if hasattr(dataset, "__len__") else None,
                 "row_length": getattr(dataset, "row_length", None),
                 "fingerprint": getattr(dataset, "fingerprint", None)},
        "order": {"kind": type(sampler).__name__,
                  "seed": arguments.seed if arguments.data_seed is None else arguments.data_seed,
                  "by_length": getattr(sampler, "group", None) is not None},
        "collator": _collator(collator),
        "tokenizer": _vocabulary(tokenizer),
        "versions": versions(),
    })  # fmt: skip


def write_record(folder, settings, place, loss_guard):
    record = {"settings": settings, "place": place and place._asdict(), "loss_guard": loss_guard}
    Path(folder, RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def read_record(folder):
    """The record of a checkpoint; None, and a warning, for one that another Trainer made."""
    path = Path(folder, RECORD)
    if not path.is_file():
        logger.warning(
            f"{str(folder)!r} has no {RECORD} (made by the stock Trainer or an earlier version): whether settings and "
            "data are those it was made with cannot be checked."
        )
        return None
    record = json.loads(path.read_text(encoding="utf-8"))
    return {**record, "place": record["place"] and Place(**record["place"])}


def check_model(folder, config, tokenizer):
    """Refuse a checkpoint of another model; rates of dropout may differ.

    Raises:
        ValueError: with the options that differ.
    """
    if (Path(folder) / "config.json").is_file() and config is not None:
        saved, now = (_plain(c.to_dict()) for c in (type(config).from_pretrained(folder), config))
        different = [name for name in sorted({*saved, *now} - {*CONFIG_WITHOUT_EFFECT})
                     if saved.get(name) != now.get(name)]  # fmt: skip
        rates = [name for name in different if "drop" in name]
        others = [name for name in different if name not in rates]
        if others:
            raise ValueError(
                f"A run is resumed with the model it was begun with; {str(folder)!r} has "
                + ", ".join(f"{name} {saved.get(name)!r} (here {now.get(name)!r})" for name in others)
                + ". Resume with these options, or start a new run."
            )
        for name in rates:
            logger.info(f"resumed with another {name}: {saved.get(name)} -> {now.get(name)}, from this step on")
    record = Path(folder) / RECORD
    then = json.loads(record.read_text(encoding="utf-8"))["settings"]["tokenizer"] if record.is_file() else None
    now = _vocabulary(tokenizer)
    if then and now and then != now:
        raise ValueError(
            f"A run is resumed with the tokenizer it was begun with; that of {str(folder)!r} has {then['tokens']:,} "
            f"tokens, and this one is another, of {now['tokens']:,}. Pass --tokenizer_name {folder}, or start anew."
        )


def _pairs(then, now, prefix=""):
    """(name, value then, value now) wherever two records differ; missing values are None."""
    for name in sorted({*then, *now}):
        before, after = then.get(name), now.get(name)
        if isinstance(before, dict) and isinstance(after, dict):
            yield from _pairs(before, after, f"{prefix}{name}.")
        elif before != after:
            yield f"{prefix}{name}", before, after


def _told(pairs):
    return ", ".join(f"{name.removeprefix('arguments.')} {before!r} -> {after!r}" for name, before, after in pairs)


def schedule_changes(then, now):
    """(name, value then, value now) of what decides about the learning rate of a step, beside its height."""

    def schedule(settings):
        steps = settings["max_steps"]
        found = {name: settings["arguments"].get(name) for name in SCHEDULE}
        return found | {"max_steps": None if steps == CEILING else steps}

    return list(_pairs(schedule(then), schedule(now)))


def compare_settings(then, now, place, *, is_stream, keeps_place, bounded_by_steps):
    """One line for each thing that goes on differently.

    Args:
        then, now: of `describe_run`.
        place: where the run stands, or None.
        is_stream: whether the data have a cursor of their own, which checks itself.
        keeps_place: whether the run stands within an epoch and goes on from there (not with --ignore_data_skip).
        bounded_by_steps: whether --max_steps says when the run ends.

    Raises:
        ValueError: where the place in the data, or the optimizer's state, would be meaningless.
    """
    lines = []
    place = place or Place(0, 0, 0)
    same_split = ["rows_per_step", "processes", "arguments.per_device_train_batch_size",
                  "arguments.gradient_accumulation_steps"]  # fmt: skip
    pairs = list(_pairs(then, now))
    changed = {name: (before, after) for name, before, after in pairs}

    optimizers = [pair for pair in pairs if pair[0] in ("arguments.optim", "arguments.optimizer")]
    if optimizers:
        raise ValueError(
            f"The state of one optimizer means nothing to another: {_told(optimizers)}. Resume with the old one, or "
            "start a new run from the checkpoint's weights with --model_name_or_path."
        )
    data = [pair for pair in pairs if pair[0].startswith(("data.", "order."))]
    if data and not is_stream:
        if keeps_place:
            raise ValueError(
                f"The checkpoint stands {place.rows} rows into an epoch of other data, or of another order: "
                f"{_told(data)}. Resume with the same data, --seed, --packing, --max_seq_length and "
                "--train_sampling_strategy; or go on with these data from their first row with --ignore_data_skip; or "
                "start a new run from the checkpoint's weights with --model_name_or_path."
            )
        lines.append(f"other data, or another order ({_told(data)}): read from their first row on")
    if "steps_per_epoch" in changed and not bounded_by_steps and not is_stream:
        before, after = changed["steps_per_epoch"]
        why = _told(pair for pair in pairs if pair[0] in (*same_split, "data.rows"))
        raise ValueError(
            f"With --num_train_epochs the number of steps follows from the rows in a step, and an epoch would now "
            f"have {after} steps instead of {before} ({why}). Keep batch size * accumulation * processes at "
            f"{then['rows_per_step']}, or say with --max_steps where the run ends (it stands at step {place.step} of "
            f"{then['max_steps']})."
        )
    split = [pair for pair in pairs if pair[0] in same_split[1:]]
    if "rows_per_step" in changed:
        line = (
            f"{then['rows_per_step']} -> {now['rows_per_step']} rows a step ({_told(split)}): other steps from here on"
        )
        if now["order"]["by_length"] and keeps_place and not is_stream:
            line += "; rows of like length stand together differently, so some of this epoch come twice or not at all"
        lines.append(line)
    elif split:
        lines.append(f"{_told(split)}: {now['rows_per_step']} rows a step as before, so all is the same up to "
                     "rounding and to what dropout draws")  # fmt: skip
    schedule = schedule_changes(then, now)
    if schedule:
        lines.append(f"{_told(schedule)}: the schedule goes on at this step in its new form")
    if "collator" in {name.split(".")[0] for name in changed}:
        told = _told(pair for pair in pairs if pair[0].startswith("collator"))
        lines.append(f"{told}: batches are made in the new way from here on")
    library = [pair for pair in pairs if pair[0].startswith("versions.")]
    if library:
        lines.append(f"{_told(library)}: equal bit for bit with the same versions only")
    for name, before, after in pairs:
        option = name.removeprefix("arguments.")
        known = option != name and option.split(".")[0] not in (*TOLD_ELSEWHERE, *SCHEDULE)
        if known:
            lines.append(f"{option} {before!r} -> {after!r}: from this step on")
    return lines


@contextlib.contextmanager
def refusing_old_versions():
    """Says what is wrong where a stock Trainer before 5.23 asks torch for a device named cpu:0.

    Raises:
        RuntimeError: with the way out.
    """
    try:
        yield
    except RuntimeError as error:
        if "tagged with cpu:" not in str(error):
            raise
        raise RuntimeError(
            f"transformers {transformers.__version__} does not load an optimizer's state in several processes on a "
            "CPU. Use transformers 5.23 or newer, or resume in one process."
        ) from error


def follow_arguments(optimizer, scheduler, asked, rescheduled):
    """Give the optimizer the rates that were asked for, which loading its state has replaced by the old ones.

    Args:
        asked: the optimizer's groups before loading, without their parameters.
        rescheduled: whether the schedule is another one, too.
    """
    moved = rescheduled
    for group, wanted in zip(optimizer.param_groups, asked, strict=True):
        moved = moved or group.get("initial_lr") != wanted.get("initial_lr")
        for name, value in wanted.items():
            if name not in ("lr", "initial_lr") and group.get(name) != value:
                group[name] = value
    if not moved:
        return
    for number, (group, wanted) in enumerate(zip(optimizer.param_groups, asked, strict=True)):
        before, base = group["initial_lr"], wanted["initial_lr"]
        group["initial_lr"] = scheduler.base_lrs[number] = base
        functions = getattr(scheduler, "lr_lambdas", None)
        group["lr"] = base * functions[number](scheduler.last_epoch) if functions else group["lr"] * base / before
    scheduler._last_lr = [group["lr"] for group in optimizer.param_groups]
