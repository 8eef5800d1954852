"""Learning rates over a training whose length is a number of steps, of tokens or of minutes."""

import math

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_scheduler
from transformers.trainer_utils import SchedulerType

WSD = SchedulerType.WARMUP_STABLE_DECAY
DECAY_TYPES = ("1-sqrt", "linear", "cosine")
BY_SHARE = (
    SchedulerType.LINEAR,
    SchedulerType.COSINE,
    SchedulerType.COSINE_WITH_RESTARTS,
    SchedulerType.POLYNOMIAL,
    SchedulerType.CONSTANT,
    SchedulerType.CONSTANT_WITH_WARMUP,
    SchedulerType.COSINE_WITH_MIN_LR,
    WSD,
)
"""Schedules that are a function of the share of the training that is done, and of nothing else."""

CEILING = 10**9
"""The number of steps that the Trainer is told where a budget of tokens or minutes ends the training."""

PARTS = 10**9  # of a budget; the stock schedules count in steps, and a part is their step


def budget_of(arguments):
    """(unit, limit): how long a training lasts, in "tokens", "minutes" or "steps" (limit None: as the Trainer says).

    Raises:
        ValueError: if more than one length is given, or one that is none.
    """
    given = {
        "--max_tokens": arguments.max_tokens,
        "--max_minutes": arguments.max_minutes,
        "--max_steps": arguments.max_steps if 0 < arguments.max_steps != CEILING else None,
    }
    given = {name: value for name, value in given.items() if value is not None}
    budgets = [name for name in given if name != "--max_steps"]
    if budgets and arguments.num_train_epochs != type(arguments).__dataclass_fields__["num_train_epochs"].default:
        given["--num_train_epochs"] = arguments.num_train_epochs
    if budgets and len(given) > 1:
        said = " and ".join(f"{name} {value}" for name, value in given.items())
        raise ValueError(f"A training has one length, got {said}. Leave out all but one.")
    for name in budgets:
        if not 0 < given[name] < math.inf:
            raise ValueError(f"{name} must be above 0, got {given[name]}.")
    return (budgets[0].removeprefix("--max_"), given[budgets[0]]) if budgets else ("steps", None)


def check_schedule(arguments, unit):
    """Refuse a schedule that is not said in full, or that cannot be followed over a budget.

    Args:
        arguments: TrainingArguments with `decay_steps` and `decay_type`.
        unit: as in `budget_of`.
    """
    kind, kwargs = arguments.lr_scheduler_type, arguments.lr_scheduler_kwargs or {}
    if kind != WSD and arguments.decay_steps is not None:
        raise ValueError(
            f"--decay_steps {arguments.decay_steps} has no effect with --lr_scheduler_type {kind.value}. Use "
            f"--lr_scheduler_type {WSD.value}, or leave it out."
        )
    if kind == WSD and arguments.decay_steps is None:
        raise ValueError(
            f"--lr_scheduler_type {WSD.value} needs the length of the decay, got none. Pass --decay_steps, a number "
            "of steps or, below 1, a share of the training."
        )
    if kind == WSD and {"num_decay_steps", "decay_type"} & set(kwargs):
        raise ValueError(
            f"The decay is given once, by --decay_steps and --decay_type, got --lr_scheduler_kwargs {kwargs} too. "
            "Leave num_decay_steps and decay_type out of it."
        )
    if arguments.decay_steps is not None and arguments.decay_steps < 0:
        raise ValueError(f"--decay_steps must be 0 or more, got {arguments.decay_steps}.")
    shares = [value for value in (arguments.warmup_steps, arguments.decay_steps) if value and value < 1]
    if sum(shares) > 1:
        raise ValueError(
            f"--warmup_steps {arguments.warmup_steps} and --decay_steps {arguments.decay_steps} are shares of one "
            f"training and make more than 1. Lower one of them."
        )
    if unit == "steps":
        if arguments.max_steps == 0:
            raise ValueError("--max_steps is at least 1, got 0. To evaluate alone, pass --do_train false.")
        if arguments.max_steps > 0:
            _check_room(arguments, arguments.max_steps)
        return
    budget = f"--max_{unit}"
    if kind not in BY_SHARE:
        able = ", ".join(other.value for other in BY_SHARE)
        raise ValueError(
            f"With {budget} the learning rate follows the share of the budget that is used, and --lr_scheduler_type "
            f"{kind.value} does not. Use {able}, or --max_steps."
        )
    for name, value in (("--warmup_steps", arguments.warmup_steps), ("--decay_steps", arguments.decay_steps)):
        if value and value >= 1:
            raise ValueError(
                f"With {budget} the number of steps is not known, so {name} is a share of the budget, below 1; got "
                f"{value}. Write for example 0.05, or use --max_steps."
            )
    if arguments.logging_steps < 1:
        raise ValueError(
            f"With {budget} the number of steps is not known, so --logging_steps counts steps; got "
            f"{arguments.logging_steps}. (--eval_steps and --save_steps may be shares of the budget.)"
        )


def steps_of(value, num_training_steps):
    """The steps that a number means: steps from 1 up, below that a share of all, as in the Trainer's warmup_steps."""
    return int(value) if value >= 1 else math.ceil(num_training_steps * value)


def decay_share(arguments, num_training_steps):
    """The share of the training (of `num_training_steps`, where the decay counts steps) in which the rate falls."""
    decay = arguments.decay_steps
    return decay if decay < 1 else decay / num_training_steps


def _check_room(arguments, num_training_steps):
    if arguments.lr_scheduler_type != WSD:
        return
    warmup, decay = (steps_of(x, num_training_steps) for x in (arguments.warmup_steps, arguments.decay_steps))
    if warmup + decay > num_training_steps:
        raise ValueError(
            f"A training of {num_training_steps} steps has no room for {warmup} of warm-up (--warmup_steps) and "
            f"{decay} of decay (--decay_steps). Lower one of them."
        )


def _stock(arguments, optimizer, num_training_steps):
    """transformers' own schedule; --decay_steps and --decay_type become the arguments that it takes for them."""
    kwargs = dict(arguments.lr_scheduler_kwargs or {})
    warmup = steps_of(arguments.warmup_steps, num_training_steps)
    if arguments.lr_scheduler_type == WSD:
        decay = steps_of(arguments.decay_steps, num_training_steps)
        kwargs |= {"num_decay_steps": decay, "decay_type": arguments.decay_type}
        _check_room(arguments, num_training_steps)
    return get_scheduler(arguments.lr_scheduler_type, optimizer, warmup, num_training_steps, kwargs)


def make_scheduler(arguments, optimizer, num_training_steps, share=None):
    """The learning rate scheduler: transformers' own, over the steps or over the share of a budget.

    Args:
        num_training_steps: of the training; not used with `share`.
        share: function that gives the share of the budget that is used, from 0 to 1; None: steps are counted.
    """
    if share is None:
        return _stock(arguments, optimizer, num_training_steps)
    shape = _stock(arguments, torch.optim.SGD([torch.zeros(1)], lr=1.0), PARTS).lr_lambdas[0]
    return LambdaLR(optimizer, lambda _: shape(min(share(), 1.0) * PARTS))
