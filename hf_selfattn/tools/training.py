"""The Trainer of the scripts: the stock one, with a loss that is checked and batches of like length."""

import contextlib
import importlib.metadata
import json
import logging as python_logging
import platform
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import logging

from .fast_defaults import accelerator_available, bf16_in_hardware, optimizer_line

logger = logging.get_logger(__name__)

LIBRARIES = ("torch", "transformers", "tokenizers", "datasets", "accelerate", "evaluate", "numpy", "hf-selfattn")


@dataclass
class ScriptArguments(TrainingArguments):
    """TrainingArguments with the defaults of these scripts."""

    do_train: bool = field(default=True, metadata={"help": "Whether to train."})
    do_eval: bool = field(default=True, metadata={"help": "Stays on: the report is made from the evaluation."})
    per_device_train_batch_size: int = field(default=32, metadata={"help": "Rows in a batch of one device."})
    per_device_eval_batch_size: int = field(default=32, metadata={"help": "The same in evaluation."})
    bf16: bool | None = field(
        default=None,
        metadata={"help": "Mixed precision in bf16; without it: where the hardware multiplies bf16."},
    )
    compile_layers: bool = field(
        default=False,
        metadata={"help": "Compile each layer of a selfattn model: faster steps after half a minute of compiling."},
    )
    include_num_input_tokens_seen: str = field(
        default="no",
        metadata={"help": "Count and log the tokens read.", "choices": ["no", "all", "non_padding"]},
    )
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Whether NaN losses are left out of the log."}
    )
    train_sampling_strategy: str = field(
        default="group_by_length",
        metadata={"help": "Which examples make a batch: those of like length, or any.",
                  "choices": ["group_by_length", "random"]},
    )  # fmt: skip
    remove_unused_columns: bool = field(default=False, metadata={"help": "Not used: the collators pick the columns."})
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Delete the checkpoints of an earlier run in output_dir."}
    )

    def __post_init__(self):
        self.remarks = []  # what was decided here; said once logging is set up
        if self.bf16 is None and self.fp16:
            self.bf16 = False
        if self.bf16 is None:
            self.bf16, why = bf16_in_hardware(on_cpu=self.use_cpu or not accelerator_available())
        else:
            why = "as asked"
        precision = "bf16 mixed" if self.bf16 else "fp16 mixed" if self.fp16 else "fp32"
        self.remarks.append(f"precision: {precision} ({why})")
        if self.bf16 and not accelerator_available() and not self.use_cpu:
            self.use_cpu = True
            self.remarks.append("There is no accelerator: bf16 runs on the CPU (use_cpu is set).")
        self.dataloader_pin_memory = self.dataloader_pin_memory and accelerator_available()
        if self.remove_unused_columns:
            raise ValueError(
                "--remove_unused_columns must stay off: the collators need the columns and pick their own."
            )
        if not self.do_eval:
            raise ValueError(
                "--do_eval must stay on: the report is made from it. Lower --max_eval_samples to save time."
            )
        super().__post_init__()
        self.remarks.append(optimizer_line(self))


def start_logging(arguments):
    """Messages of this package go to stderr, from the first process alone (errors from each)."""
    python_logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
    level = python_logging.INFO if arguments.should_log else python_logging.ERROR
    python_logging.getLogger("hf_selfattn").setLevel(level)
    for remark in arguments.remarks:
        logger.info(remark)


def prepare_output_dir(arguments, resume_from):
    """Refuse to mix two runs: checkpoints are told apart by step alone, and the newest would be the wrong one."""
    folder = Path(arguments.output_dir)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--output_dir {str(folder)!r} is a file. Pass a folder.")
    if resume_from is None and arguments.do_train and folder.is_dir() and get_last_checkpoint(folder):
        if not arguments.overwrite_output_dir:
            raise ValueError(
                f"--output_dir {str(folder)!r} holds checkpoints of an earlier run. Go on with it by "
                f"--resume_from_checkpoint last, delete them by --overwrite_output_dir, or pass another folder."
            )
        if arguments.should_save:
            for checkpoint in folder.glob("checkpoint-*"):
                shutil.rmtree(checkpoint)
    if resume_from is None and arguments.should_save:
        (folder / "all_results.json").unlink(
            missing_ok=True
        )  # the Trainer would add to the numbers of the earlier run
    folder.mkdir(parents=True, exist_ok=True)


class Rows(torch.utils.data.Dataset):
    """What a model reads of a datasets.Dataset, with the number of each row and its epoch.

    The epoch travels with the index, (epoch, index), so that data workers and prefetched batches agree about it; a
    plain index is epoch 0. accelerate calls `set_epoch` at the beginning of each.
    """

    are_alike = False  # whether rows are of one length, so that nothing is gained by grouping them
    COLUMNS = ("input_ids", "token_type_ids", "labels", "start_positions", "end_positions")

    def __init__(self, rows):
        self.rows = rows.select_columns([name for name in self.COLUMNS if name in rows.column_names])
        self.epoch = 0
        self.lengths = np.asarray(rows.with_format("numpy")["length"][:]) if "length" in rows.column_names else None

    def __len__(self):
        return len(self.rows)

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __getitems__(self, indices):
        pairs = [index if isinstance(index, tuple) else (0, index) for index in indices]
        columns = self.rows[[index for _, index in pairs]]
        rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        return [{**row, "example_id": index, "epoch": epoch} for row, (epoch, index) in zip(rows, pairs, strict=True)]

    def __getitem__(self, index):
        return self.__getitems__([index])[0]


class EpochSampler(torch.utils.data.Sampler):
    """(epoch, index) pairs in an order that is a function of (seed, epoch), rows of like length beside each other.

    The stock length sampler draws from torch's global state, which dropout moves differently in each process: from
    the second epoch on, processes would disagree about the order, and a resumed run about all of it.

    Args:
        group: rows that should be alike, in all processes' batches of one optimizer step; None: any order.
    """

    POOL = 50  # groups that are sorted together: a wider pool wastes less padding and mixes less

    def __init__(self, rows, seed, group=None):
        self.rows, self.seed, self.group = rows, seed, group

    def __len__(self):
        return len(self.rows)

    def __iter__(self):
        epoch = self.rows.epoch
        generator = np.random.default_rng((self.seed, epoch))
        order = generator.permutation(len(self.rows))
        if self.group is not None:
            pool = self.POOL * self.group
            parts = [order[start : start + pool] for start in range(0, len(order), pool)]
            order = np.concatenate([part[np.argsort(self.rows.lengths[part], kind="stable")] for part in parts])
            whole = len(order) - len(order) % self.group
            groups = generator.permutation(order[:whole].reshape(-1, self.group))
            order = np.concatenate([groups.reshape(-1), order[whole:]])
        return iter([(epoch, int(index)) for index in order])


class CheckedTrainer(Trainer):
    """The stock Trainer, which stops at a loss that is not a number, and whose batches are those of `EpochSampler`.

    Args:
        eval_collator: the collator of evaluation and prediction, where it is another than `data_collator`.
    """

    def __init__(self, *args, eval_collator=None, **kwargs):
        super().__init__(*args, **kwargs)
        self.eval_collator = eval_collator
        if getattr(self.args, "compile_layers", False):
            if not hasattr(self.model, "compile_layers"):
                raise ValueError(
                    f"--compile_layers is for models of type 'selfattn', got {self.model.config.model_type!r}. Use "
                    "--torch_compile, which compiles any model as a whole."
                )
            self.model.compile_layers()

    def _get_dataloader(self, dataset, description, *args, **kwargs):
        if self.eval_collator is None or kwargs.get("is_training"):
            return super()._get_dataloader(dataset, description, *args, **kwargs)
        training_collator, self.data_collator = self.data_collator, self.eval_collator
        try:
            return super()._get_dataloader(dataset, description, *args, **kwargs)
        finally:
            self.data_collator = training_collator

    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = super().training_step(model, inputs, num_items_in_batch)
        if not torch.isfinite(loss).all():
            folder = Path(self.args.output_dir)
            last = get_last_checkpoint(folder) if folder.is_dir() else None
            raise FloatingPointError(
                f"The loss is {loss.item()} at step {self.state.global_step + 1} (epoch {self.state.epoch or 0:.2f}), "
                f"so training stops before the weights take it in. "
                + (f"The last good checkpoint is {last}; " if last else "There is no checkpoint yet (--save_steps); ")
                + "lower --learning_rate, raise --warmup_steps, or look at the data of that step."
            )
        return loss

    def _get_train_sampler(self, train_dataset=None):
        rows = self.train_dataset if train_dataset is None else train_dataset
        if not isinstance(rows, Rows):
            return super()._get_train_sampler(train_dataset)
        arguments = self.args
        seed = arguments.seed if arguments.data_seed is None else arguments.data_seed
        by_length = arguments.train_sampling_strategy == "group_by_length" and rows.lengths is not None
        by_length = by_length and not rows.are_alike
        step = arguments.train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size
        return EpochSampler(rows, seed, step if by_length else None)

    def _get_eval_sampler(self, eval_dataset):
        """In order: the stock one shuffles by length, and predictions would no longer line up with the examples."""
        return torch.utils.data.SequentialSampler(eval_dataset)


def git_commit():
    """The commit of this code, with `-dirty` where files differ from it; None where it does not stand in git."""
    code = Path(__file__)
    tracked = ["git", "ls-files", "--error-unmatch", code.name]
    describe = ["git", "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    try:
        subprocess.run(tracked, cwd=code.parent, capture_output=True, check=True)
        return subprocess.run(describe, cwd=code.parent, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def versions():
    """Of Python and of the libraries that decide about a result."""
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _without_token(argv):
    """The command line with what follows --hub_token hidden."""
    shown, hide = [], False
    for word in argv:
        name, is_pair, _ = word.partition("=")
        is_token = name.startswith("--") and name.endswith("token")
        shown.append("…" if hide else f"{name}=…" if is_token and is_pair else word)
        hide = is_token and not is_pair
    return shown


def write_run_record(arguments, data):
    """`run.json` beside the result: command, seed, versions, commit, machine and the size of the data."""
    record = {
        "command": shlex.join(_without_token(sys.argv)),
        "seed": arguments.seed,
        "versions": versions(),
        "commit": git_commit(),
        "machine": {"processor": platform.processor() or platform.machine(), "threads": torch.get_num_threads(),
                    "processes": arguments.world_size, "device": str(arguments.device)},
        "data": data,
        "training_arguments": arguments.to_dict(),
    }  # fmt: skip
    path = Path(arguments.output_dir, "run.json")
    path.write_text(json.dumps(record, indent=2, ensure_ascii=False, default=str) + "\n", encoding="utf-8")
