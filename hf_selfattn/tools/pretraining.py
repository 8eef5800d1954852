"""The Trainer of pretraining: optimizers, budgets, a masking rate that falls, and a log that tells more."""

import logging
import math
from dataclasses import dataclass, field

import torch
from transformers import ProgressCallback, TrainingArguments
from transformers.trainer_utils import SchedulerType

from .collators import check_replaced
from .masking_rates import RatedRows, RatedSampler
from .optimizers import muon_factory, without_biases
from .plan import peak_of_training
from .progress import BudgetProgressCallback, Progress
from .schedules import CEILING, DECAY_TYPES, budget_of, check_schedule, make_scheduler
from .training import CheckedTrainer, ScriptArguments

logger = logging.getLogger(__name__)


@dataclass
class PretrainingArguments:
    """The texts and the masking."""

    text_column: str | None = field(default=None, metadata={"help": "The column with the text; found where clear."})
    max_seq_length: int | None = field(
        default=None, metadata={"help": "Tokens in a row, special ones included; the model's positions, at most 512."}
    )
    long_texts: str = field(
        default="split", metadata={"help": "What is done with longer texts: split (into windows), truncate or refuse."}
    )
    packing: bool | None = field(
        default=None,
        metadata={"help": "Whether training rows are filled with documents; without it: yes, for models that keep "
                          "documents apart."},
    )  # fmt: skip
    mlm_probability: float = field(default=0.3, metadata={"help": "Share of tokens asked for in training."})
    mlm_probability_end: float | None = field(
        default=None, metadata={"help": "What it falls to while the learning rate decays; without it, it stays."}
    )
    mask_replace_prob: float = field(
        default=0.8, metadata={"help": "Share of the tokens asked for in training that [MASK] replaces."}
    )
    random_replace_prob: float = field(
        default=0.1, metadata={"help": "Share of them that a random token replaces; the rest stays as it is."}
    )
    unigram_bias: bool = field(
        default=False,
        metadata={"help": "A new model's output bias begins at the logarithm of each token's share of the data."},
    )
    neighbour_vectors: float = field(
        default=0.0,
        metadata={"help": "A new model's token vectors begin as factors of which tokens stand side by side in the "
                          "data (its first 30 million tokens), with entries of this root mean square; 0: at random."},
    )  # fmt: skip
    eval_mlm_probability: float = field(
        default=0.15, metadata={"help": "Share of tokens that evaluation masks and asks for."}
    )
    eval_masks_seed: int = field(
        default=0, metadata={"help": "Draws them, whatever --seed is: models of several seeds answer the same."}
    )
    num_shown: int = field(default=4, metadata={"help": "Masked sentences shown after training."})

    def __post_init__(self):
        check_replaced(self.mask_replace_prob, self.random_replace_prob)
        if not 0 <= self.neighbour_vectors < math.inf:
            raise ValueError(
                f"--neighbour_vectors is the root mean square of the token vectors' entries, or 0 for random vectors, "
                f"got {self.neighbour_vectors}. Give a number such as 0.08."
            )


def check_first_values(arguments, model_arguments, source):
    """Raises ValueError where new weights shall begin with what the text says, and that is not possible."""
    name = model_arguments.model_name_or_path
    options = (("unigram_bias", "output bias", "false"), ("neighbour_vectors", "token vectors", "0"))
    for option, of_what, off in options:
        if getattr(arguments, option) and name is not None:
            raise ValueError(
                f"--{option} gives a new model its first {of_what}, got --model_name_or_path {name}, which is "
                f"trained. Leave one of them out, or give --{option} {off}."
            )
    if arguments.neighbour_vectors and source.streaming:
        raise ValueError(
            "--neighbour_vectors counts which tokens stand side by side before the training begins, and --streaming "
            "reads no text before. Leave one of them out, or give --neighbour_vectors 0."
        )


def warn_of_learning_rate(training, model_arguments):
    """Logs a warning where a new model is trained with the learning rate that transformers has for trained ones."""
    default = TrainingArguments.__dataclass_fields__["learning_rate"].default
    if model_arguments.model_name_or_path is None and training.learning_rate == default:
        logger.warning(
            f"--learning_rate is {default:g}, transformers' default, which suits trained models; a new one learns "
            "little with it. Begin with --learning_rate 1e-3 for a small model, 1e-4 for a large one."
        )


@dataclass
class PretrainingScriptArguments(ScriptArguments):
    """ScriptArguments with what pretraining needs beside them."""

    optimizer: str = field(
        default="adamw",
        metadata={"help": "adamw (or what --optim says), or muon: Muon for the weights of the encoder's linear "
                          "layers, AdamW for all else.", "choices": ["adamw", "muon"]},
    )  # fmt: skip
    muon_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of Muon's part; without it --learning_rate."}
    )
    muon_adjust_lr: str = field(
        default="match_rms_adamw",
        metadata={"help": "How it follows a matrix's shape: match_rms_adamw (updates as large as AdamW's, so that "
                          "both can share a learning rate) or original (sqrt(max(1, rows / columns)); about 0.02).",
                  "choices": ["match_rms_adamw", "original"]},
    )  # fmt: skip
    muon_momentum: float = field(default=0.95, metadata={"help": "Muon's momentum."})
    muon_nesterov: bool = field(default=True, metadata={"help": "Whether that is Nesterov's."})
    muon_ns_steps: int = field(default=5, metadata={"help": "Newton-Schulz iterations of an update."})
    decay_steps: float | None = field(
        default=None,
        metadata={"help": "Of warmup_stable_decay: the steps in which the learning rate falls, or, below 1, the share "
                          "of the training. (--warmup_steps is read in the same way.)"},
    )  # fmt: skip
    decay_type: str = field(
        default="1-sqrt", metadata={"help": "The form of that decay.", "choices": list(DECAY_TYPES)}
    )
    max_tokens: int | None = field(
        default=None,
        metadata={"help": "Train on that many tokens (real ones, special tokens included) instead of --max_steps."},
    )
    max_minutes: float | None = field(
        default=None,
        metadata={"help": "Train for that many minutes (evaluation and saving not counted) instead of --max_steps."},
    )
    dry_run: bool = field(
        default=False,
        metadata={"help": "Print what the training will cost and stop; nothing is read, trained or written."},
    )
    assumed_num_devices: int | None = field(
        default=None, metadata={"help": "For --dry_run: devices; without it those of this start."}
    )
    assumed_tokens_per_second: float | None = field(
        default=None, metadata={"help": "For --dry_run: real tokens a second, of all devices together."}
    )
    assumed_device: str | None = field(
        default=None, metadata={"help": "For --dry_run: a GPU with a known peak, as H100; without it the one here."}
    )
    assumed_mfu: float = field(
        default=0.4, metadata={"help": "For --dry_run: the share of the peak that is reached (model FLOPs)."}
    )

    def __post_init__(self):
        super().__post_init__()
        self.lr_scheduler_type = SchedulerType(self.lr_scheduler_type)
        unit, _ = budget_of(self)
        check_schedule(self, unit)
        if unit != "steps":
            self.max_steps = CEILING
        if self.optimizer == "muon":
            default = TrainingArguments.__dataclass_fields__["optim"].default
            other = getattr(self.optim, "value", self.optim)
            if other != default:
                raise ValueError(
                    f"--optimizer muon brings its own AdamW for what is no matrix, got --optim {other} too. Leave one "
                    "of them out."
                )
            self.remarks = [remark for remark in self.remarks if not remark.startswith("optimizer:")]
            self.remarks.append(
                "optimizer: muon for the weights of the encoder's linear layers, fused AdamW for all else"
            )
        else:
            self._refuse_changed("--optimizer muon", "muon_learning_rate", "muon_adjust_lr", "muon_momentum",
                                 "muon_nesterov", "muon_ns_steps")  # fmt: skip
        if not self.dry_run:
            self._refuse_changed("--dry_run", "assumed_num_devices", "assumed_tokens_per_second", "assumed_device",
                                 "assumed_mfu")  # fmt: skip

    def _refuse_changed(self, option, *names):
        for name in names:
            if getattr(self, name) != type(self).__dataclass_fields__[name].default:
                raise ValueError(
                    f"--{name} {getattr(self, name)} has no effect without {option}. Add that, or leave it out."
                )


class PretrainingTrainer(CheckedTrainer):
    """CheckedTrainer with the optimizers, schedules and budgets of PretrainingScriptArguments and a fuller log.

    Args:
        flops_per_token: function that gives those of a training step (`plan.flops_per_token`), for the log's `mfu`;
            called where the devices' peak is known. None: it is left out.
        seconds_before: that count as training (`Progress`).
    """

    def __init__(self, *args, flops_per_token=None, seconds_before=0.0, **kwargs):
        arguments = kwargs["args"]
        if arguments.optimizer == "muon":
            muon = {
                "momentum": arguments.muon_momentum,
                "nesterov": arguments.muon_nesterov,
                "ns_steps": arguments.muon_ns_steps,
                "adjust_lr_fn": arguments.muon_adjust_lr,
            }
            options = {
                "decay_names": self.get_decay_parameter_names,
                "lr": arguments.learning_rate,
                "muon_lr": self._muon_learning_rate(arguments),
                "weight_decay": arguments.weight_decay,
                "betas": (arguments.adam_beta1, arguments.adam_beta2),
                "eps": arguments.adam_epsilon,
                "muon": muon,
            }
            kwargs["optimizer_cls_and_kwargs"] = (muon_factory, options)
        super().__init__(*args, **kwargs)
        self.peak_flops = peak_of_training(arguments) if flops_per_token else None
        self.flops_per_token = flops_per_token() if self.peak_flops else None
        replicas = self.get_tp_size() * self.get_cp_size() * self.get_sp_size()
        self.add_callback(Progress(*budget_of(arguments), replicas, seconds_before))
        if self.progress.unit != "steps" and self.pop_callback(ProgressCallback):
            self.add_callback(BudgetProgressCallback(lambda: self.progress.share()))

    @property
    def progress(self):
        """The Progress of this training. (The Trainer may put a restored one in the place of the first.)"""
        return next(callback for callback in self.callback_handler.callbacks if isinstance(callback, Progress))

    @staticmethod
    def _muon_learning_rate(arguments):
        return arguments.learning_rate if arguments.muon_learning_rate is None else arguments.muon_learning_rate

    def get_decay_parameter_names(self, model):
        return without_biases(model, super().get_decay_parameter_names(model))

    def create_scheduler(self, num_training_steps, optimizer=None):
        self.progress.restore(self.state)
        if self.lr_scheduler is None:
            share = None if self.progress.unit == "steps" else lambda: self.progress.share()
            optimizer = self.optimizer if optimizer is None else optimizer
            self.lr_scheduler = make_scheduler(self.args, optimizer, num_training_steps, share)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def is_finished(self, max_steps):
        """Also where a budget is used up."""
        if self.progress.unit == "steps":
            return super().is_finished(max_steps)
        self.progress.restore(self.state)
        return self.progress.share() >= 1

    def _load_optimizer_and_scheduler(self, checkpoint):
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and self.progress.unit != "steps":
            # The same numbers, bit for bit, unless the budget is another one.
            scheduler = self.lr_scheduler
            rates = [base * shape(None) for base, shape in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)]
            for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
                group["lr"] = rate
            scheduler._last_lr = rates

    def _get_train_sampler(self, train_dataset=None):
        sampler = super()._get_train_sampler(train_dataset)
        rows = self.train_dataset if train_dataset is None else train_dataset
        return RatedSampler(sampler, rows, self.args) if isinstance(rows, RatedRows) else sampler

    def training_step(self, model, inputs, num_items_in_batch=None):
        self.progress.count(inputs)
        return super().training_step(model, inputs, num_items_in_batch)

    def _will_log(self):
        """Whether this is the last micro-batch of a step whose numbers will be logged."""
        step, arguments = self.state.global_step + 1, self.args
        logged = arguments.logging_strategy == "steps" and step % self.state.logging_steps == 0
        logged = logged or (arguments.logging_first_step and step == 1)
        return logged and self.accelerator.sync_gradients and not arguments.torch_compile

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """As in the Trainer; in a step that is logged, the right predictions of masked tokens are counted too.

        In training our model keeps no logits, so those of the masked tokens are made once more, from what entered the
        output layer: one product more, and no second forward.
        """
        if not (self.model.training and "labels" in inputs and self._will_log()):
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        labels, kept = inputs["labels"], []
        head = getattr(self.model, "prediction_head", None)
        hook = None if head is None else head.register_forward_hook(lambda *call: kept.append(call[2].detach()))
        try:
            loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        finally:
            if hook is not None:
                hook.remove()
        asked = labels[labels != -100]
        with torch.no_grad(), self.accelerator.autocast():
            logits = outputs.get("logits")
            parts = None if logits is None or logits.shape[:-1] != labels.shape else [logits[labels != -100]]
            if parts is None and kept and kept[0].shape[:-1] == asked.shape:
                parts = (self.model.lm_head(part) for part in kept[0].split(4096))
            if parts is not None:
                found = torch.cat([part.argmax(-1) for part in parts])
                self.progress.count_correct((found == asked).sum(), len(asked))
        return (loss, outputs) if return_outputs else loss

    def log(self, logs, start_time=None):
        if "loss" in logs:
            logs.update(self.progress.interval(self.state, self.flops_per_token, self.peak_flops))
            if self.args.muon_learning_rate is not None and self.args.learning_rate:
                ratio = self.args.muon_learning_rate / self.args.learning_rate
                logs["muon_learning_rate"] = logs["learning_rate"] * ratio
        if "train_samples_per_second" in logs and self.progress.unit != "steps":
            # The Trainer's own is made of the number of steps that a budget has in its place.
            steps = self.state.global_step - self.progress.first_step
            samples = steps * self.get_total_train_batch_size(self.args)
            logs["train_samples_per_second"] = round(samples / logs["train_runtime"], 3)
        super().log(logs, start_time)
