"""The Trainer of the scripts: the stock one, with a loss that is checked and batches of like length."""

import json
import logging as python_logging
import math
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import Trainer, TrainingArguments
from transformers.utils import logging

from .checkpoints import checkpoint_to_resume
from .fast_defaults import accelerator_available, bf16_in_hardware, keep_memory, optimizer_line
from .loss_guard import LossGuard
from .resuming import (
    Place,
    check_model,
    compare_settings,
    describe_run,
    follow_arguments,
    read_record,
    refusing_old_versions,
    schedule_changes,
    write_record,
)
from .rows import EpochSampler, Rows
from .safe_checkpoints import (
    begin_checkpoint,
    checkpoint_folders,
    delete_old_checkpoints,
    finish_checkpoint,
    newest_whole_checkpoint,
    step_of,
    withdraw_checkpoint,
)
from .sharing import HubPushes

logger = logging.get_logger(__name__)


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
    resume_from_checkpoint: str | None = field(
        default=None,
        metadata={"help": "Go on with a run: the folder of a checkpoint; `last`: the newest whole one in output_dir; "
                          "`auto`: the same, or a new run where there is none."},
    )  # fmt: skip
    overwrite_output_dir: bool = field(
        default=False,
        metadata={"help": "Delete the checkpoints of an earlier run in output_dir (when resuming: the later ones)."},
    )
    divergence_deviations: float = field(
        default=6.0,
        metadata={"help": "Stop where the loss stays this many standard deviations above its running mean (and above "
                          "1.5 times it); 0: only where it is no number."},
    )  # fmt: skip
    divergence_patience: int = field(default=10, metadata={"help": "For so many optimizer steps in a row."})

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
    for remark in filter(None, (*arguments.remarks, keep_memory())):
        logger.info(remark)


class CheckedTrainer(HubPushes, Trainer):
    """The stock Trainer with batches of `EpochSampler`, which may be killed at any moment and stops where it diverges.

    A checkpoint is whole or not taken (`safe_checkpoints`), older ones are deleted after the next is whole, and a run
    resumed from one ends as if it had never stopped (`resuming` says what of its settings may change).

    A stream, an iterable training data set with `restore(cursors)`, gives in each batch a `cursor`: numbers that say
    where the data worker `cursor["worker"]` stands after it. `restore` gets the newest of each worker, by its number.

    Args:
        eval_collator: the collator of evaluation and prediction, where it is another than `data_collator`.
    """

    def __init__(self, *args, eval_collator=None, **kwargs):
        super().__init__(*args, **kwargs)
        self.eval_collator = eval_collator
        self.loss_guard = LossGuard(
            getattr(self.args, "divergence_deviations", LossGuard.deviations),
            getattr(self.args, "divergence_patience", LossGuard.patience),
        )
        self._loss_of_step = 0.0
        self._cursors, self._random_state_of = {}, None
        self._resume_from = self._record = self._settings = None
        if getattr(self.args, "compile_layers", False):
            if not hasattr(self.model, "compile_layers"):
                raise ValueError(
                    f"--compile_layers is for models of type 'selfattn', got {self.model.config.model_type!r}. Use "
                    "--torch_compile, which compiles any model as a whole."
                )
            self.model.compile_layers()

    @property
    def _is_stream(self):
        return hasattr(self.train_dataset, "restore")

    def _get_dataloader(self, dataset, description, *args, **kwargs):
        if kwargs.get("is_training"):
            if self._is_stream and self.accelerator.dataloader_config.dispatch_batches is None:
                self.accelerator.dataloader_config.dispatch_batches = False  # each process reads its own part
            loader = super()._get_dataloader(dataset, description, *args, **kwargs)
            return dataset.keep_whole(loader) if hasattr(dataset, "keep_whole") else loader
        if self.eval_collator is None:
            return super()._get_dataloader(dataset, description, *args, **kwargs)
        training_collator, self.data_collator = self.data_collator, self.eval_collator
        try:
            return super()._get_dataloader(dataset, description, *args, **kwargs)
        finally:
            self.data_collator = training_collator

    def evaluation_loop(self, *args, **kwargs):
        """Leaves the random state as it was: a data loader draws from it, so dropout would depend on evaluations."""
        with torch.random.fork_rng(devices=[]):
            return super().evaluation_loop(*args, **kwargs)

    def train(self, resume_from_checkpoint=None, *args, **kwargs):
        if resume_from_checkpoint is True:
            resume_from_checkpoint = checkpoint_to_resume("last", self.args.output_dir)
        self._resume_from = resume_from_checkpoint or None
        self._record = read_record(self._resume_from) if self._resume_from else None
        self._cursors, self._random_state_of, self._loss_of_step = {}, None, 0.0
        self.loss_guard = LossGuard(self.loss_guard.deviations, self.loss_guard.patience)
        return super().train(self._resume_from, *args, **kwargs)

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        for cursor in [batch.pop("cursor") for batch in batches if "cursor" in batch]:
            self._cursors[cursor["worker"]] = cursor
        if self._random_state_of:  # here, since a data loader draws from it when it begins
            self._load_rng_state(self._random_state_of)
            self._random_state_of = None
        return batches, num_items

    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._loss_of_step = self._loss_of_step + loss
        if self.accelerator.sync_gradients:  # all processes, before any of them changes its weights
            mean = self.accelerator.gather(self._loss_of_step.float().reshape(1)).mean().item()
            self._loss_of_step = 0.0
            trouble = self.loss_guard.see(mean)
            if trouble:
                self._stop(trouble)
        return loss

    def _get_grad_norm(self, model, grad_norm=None):
        """Of each step, before its weights change. (In fp16 the scaler leaves such a step out, and goes on.)"""
        norm = super()._get_grad_norm(model, grad_norm)
        if norm is not None and not self.args.fp16 and not math.isfinite(norm):
            self._stop(f"The gradient norm is {float(norm)}, with a loss of {self.loss_guard.loss:.4g},")
        return norm

    def _stop(self, trouble):
        """Checkpoints since the loss began to rise are withdrawn, so that `last` is a good one."""
        folder, step = Path(self.args.output_dir), self.state.global_step + 1
        suspicious = self.loss_guard.suspicious
        began = step - suspicious + 1
        # The first high loss is that of the weights before it: an older checkpoint is better, where there is one.
        last = newest_whole_checkpoint(folder, before_step=began - 1) if suspicious > 1 else None
        last = last or newest_whole_checkpoint(folder, before_step=began)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            for path in checkpoint_folders(folder):
                if (step_of(last) if last else began - 1) < step_of(path) < step:
                    withdraw_checkpoint(path)
        kept = f"The last good checkpoint is {last}; " if last else "There is no checkpoint yet (--save_steps); "
        raise FloatingPointError(
            f"{trouble} at step {step} (epoch {self.state.epoch or 0:.2f}), so training stops before the weights take "
            f"it in. {kept}lower --learning_rate, raise --warmup_steps, or look at the data of that step."
        )

    def _save_checkpoint(self, model, trial):
        folder = Path(self._get_output_dir(trial), f"checkpoint-{self.state.global_step}")
        if self.args.should_save:
            begin_checkpoint(folder)
        self.accelerator.wait_for_everyone()
        # The stock rotation deletes before the new checkpoint is whole.
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit
        if self._is_stream:
            cursors = json.dumps(list(self._cursors.values()))
            (folder / f"stream-{self.args.process_index}.json").write_text(cursors + "\n", encoding="utf-8")
        if self.args.should_save:
            torch.save(self.args, folder / "training_args.bin")  # with its limit
            write_record(folder, self._settings, self._place(), self.loss_guard.state())
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            finish_checkpoint(folder)
            if not self.loss_guard.suspicious:
                delete_old_checkpoints(folder.parent, limit, self.state.best_model_checkpoint)

    def _place(self):
        """`state.epoch` counts batches: those of this epoch times the rows that all processes read in one."""
        if self._is_stream or self._batches_per_epoch is None:
            return None
        epoch, batches = divmod(round(self.state.epoch * self._batches_per_epoch), self._batches_per_epoch)
        return Place(self.state.global_step, epoch, batches * self.args.train_batch_size * self.args.world_size)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        check_model(resume_from_checkpoint, getattr(self.model, "config", None), self.processing_class)
        super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint):
        asked = [{name: value for name, value in group.items() if name != "params"}
                 for group in self.optimizer.param_groups]  # fmt: skip
        with refusing_old_versions():
            super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            rescheduled = bool(self._record and schedule_changes(self._record["settings"], self._settings))
            follow_arguments(self.optimizer, self.lr_scheduler, asked, rescheduled)

    def set_initial_training_values(self, args, dataloader):
        epochs, steps_per_epoch, *others, batches_per_epoch, max_steps = super().set_initial_training_values(
            args, dataloader
        )
        self._batches_per_epoch = None if self._is_stream else batches_per_epoch
        place = self._record["place"] if self._record else None
        if place and args.max_steps > 0:
            # What is left may need more epochs than as many steps from the beginning.
            done = place.rows // others[2]
            epochs = max(epochs, place.epoch - -(done + max_steps - place.step) // steps_per_epoch)
        return epochs, steps_per_epoch, *others, batches_per_epoch, max_steps

    def _init_training_state(self, max_steps, steps_per_epoch, num_epochs, resume_from_checkpoint, trial):
        """(epochs that are done, batches of the next one that are done)"""
        epochs, batches = super()._init_training_state(
            max_steps, steps_per_epoch, num_epochs, resume_from_checkpoint, trial
        )
        arguments = self.args
        rows_per_batch = arguments.train_batch_size * arguments.world_size
        self._settings = describe_run(
            arguments,
            max_steps=max_steps,
            steps_per_epoch=None if self._is_stream else steps_per_epoch,
            rows_per_step=rows_per_batch * arguments.gradient_accumulation_steps,
            dataset=self.train_dataset,
            sampler=None if self._is_stream else self._get_train_sampler(),
            collator=self.data_collator,
            tokenizer=self.processing_class,
        )
        if resume_from_checkpoint is None:
            return epochs, batches
        # The stock Trainer keeps those of the checkpoint, whatever was asked for.
        self.state.compute_steps(arguments, max_steps)
        self.state.train_batch_size = self._train_batch_size
        if self._record is not None:
            epochs, batches = self._go_on(epochs, batches, rows_per_batch)
        elif self._is_stream:
            raise ValueError(
                f"{str(resume_from_checkpoint)!r} does not say where its stream stands. Start a new run from its "
                "weights with --model_name_or_path."
            )
        if self.is_finished(max_steps):
            logger.info(f"resumed: at step {self.state.global_step} nothing is left to train")
            return num_epochs, 0
        return epochs, batches

    def is_finished(self, max_steps):
        """Whether the checkpoint is the last of its run; the stock Trainer would train one step more."""
        return self.state.global_step >= max_steps

    def _go_on(self, epochs, batches, rows_per_batch):
        arguments, then, place = self.args, self._record["settings"], self._record["place"]
        keeps_place = place is not None and place.rows > 0 and not arguments.ignore_data_skip
        lines = compare_settings(then, self._settings, place, is_stream=self._is_stream, keeps_place=keeps_place,
                                 bounded_by_steps=arguments.max_steps > 0)  # fmt: skip
        for line in lines:
            logger.info(f"resumed: {line}")
        if not lines:  # else the loss may have another level
            self.loss_guard.restore(self._record["loss_guard"])
        if self._is_stream:
            self._restore_stream(then)
            return 0, 0
        if place is None:
            return epochs, batches
        batches = place.rows // rows_per_batch if keeps_place else 0
        batches -= batches % arguments.gradient_accumulation_steps
        if keeps_place and batches * rows_per_batch != place.rows:
            again = place.rows - batches * rows_per_batch
            logger.info(f"resumed: the {place.rows} rows read of epoch {place.epoch} are no whole number of steps, so "
                        f"the last {again} come twice")  # fmt: skip
        return place.epoch, batches

    def _restore_stream(self, then):
        files = sorted(Path(self._resume_from).glob("stream-*.json"))
        cursors = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in files}
        now = self._settings
        if (then["processes"], then["data_workers"]) == (now["processes"], now["data_workers"]):
            own = cursors[f"stream-{self.args.process_index}"]
            self.train_dataset.restore({cursor["worker"]: cursor for cursor in own})
            self._cursors = {cursor["worker"]: cursor for cursor in own}
            self._random_state_of = self._resume_from
        else:
            self.train_dataset.restore_elsewhere([cursor for own in cursors.values() for cursor in own])

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
