"""A masking rate that falls while the learning rate decays.

What is masked is decided where a row is read, by data workers that are ahead of the training. So the rate travels with
the index, (epoch, index, rate): the sampler knows in which step each row will be used.
"""

import math

import numpy as np
import torch

from .schedules import WSD, decay_share
from .training import Rows


def check_rate_end(rate_end, arguments, streaming=False):
    """Refuse a falling rate where the progress of a row's step is not known when the row is read."""
    if rate_end is None:
        return
    if not 0 < rate_end <= 1:
        raise ValueError(f"--mlm_probability_end is above 0 and at most 1, got {rate_end}.")
    if arguments.lr_scheduler_type != WSD:
        raise ValueError(
            f"--mlm_probability_end {rate_end} is reached in the learning rate's decay, and --lr_scheduler_type "
            f"{arguments.lr_scheduler_type.value} has none of its own. Use --lr_scheduler_type {WSD.value}, or leave "
            "it out."
        )
    if arguments.max_minutes is not None:
        raise ValueError(
            f"--mlm_probability_end {rate_end} needs to know how far the training will be when a row is used, and "
            "minutes are known when they have passed. Use --max_tokens or --max_steps, or leave it out."
        )
    if streaming:
        raise ValueError(
            f"--mlm_probability_end {rate_end} needs to know in which step a row is used, and a stream is read by "
            "data workers that do not. Use --streaming false, or leave it out."
        )
    config = arguments.accelerator_config
    if config.split_batches or config.dispatch_batches:
        raise ValueError(
            f"--mlm_probability_end {rate_end} needs to know in which step a row is used, and split_batches and "
            "dispatch_batches hand rows out in another way. Leave them out of --accelerator_config."
        )


def masking_rate(start, end, share, decay):
    """The rate at a share of the training: `start`, and in the last `decay` of it on a line to `end`."""
    fallen = np.clip((np.asarray(share) - (1 - decay)) / decay, 0, 1) if decay else np.zeros_like(share, dtype=float)
    return start + (end - start) * fallen


class RatedRows(Rows):
    """Rows of another data set with the masking rate (`mlm_probability`) of the step in which each is used."""

    def __init__(self, rows, start, end):
        self.inner, self.start, self.end = rows, start, end
        self.lengths, self.are_alike, self.epoch = rows.lengths, rows.are_alike, 0
        self.row_length = getattr(rows, "row_length", None)

    def __len__(self):
        return len(self.inner)

    def __getitems__(self, indices):
        items = self.inner.__getitems__([index[:2] if isinstance(index, tuple) else index for index in indices])
        for index, item in zip(indices, items, strict=True):
            if isinstance(index, tuple) and len(index) > 2:
                for row in item if isinstance(item, list) else [item]:
                    row["mlm_probability"] = index[2]
        return items


class RatedSampler(torch.utils.data.Sampler):
    """The order of another sampler, each (epoch, index) with the masking rate of its step.

    A step's progress is counted in steps, or, with `max_tokens`, in the tokens of the rows before it. (What accelerate
    repeats from the beginning of an epoch, to fill up the last batch of several processes, keeps the rate that it
    had there, and its tokens are not counted.)

    Args:
        sampler: of (epoch, index) pairs; its length is that of an epoch.
        rows: RatedRows.
        arguments: TrainingArguments with `max_tokens`.
    """

    def __init__(self, sampler, rows, arguments):
        self.sampler, self.rows, self.arguments = sampler, rows, arguments
        self.group = getattr(sampler, "group", None)

    def __len__(self):
        return len(self.sampler)

    def __iter__(self):
        pairs, arguments, rows = list(self.sampler), self.arguments, self.rows
        epoch, of_step = pairs[0][0], arguments.train_batch_size * arguments.world_size
        batches = len(pairs) / of_step
        batches = math.floor(batches) if arguments.dataloader_drop_last else math.ceil(batches)
        step = np.arange(len(pairs)) // (of_step * arguments.gradient_accumulation_steps)
        if arguments.max_tokens is not None:
            before = np.concatenate([[0], np.cumsum(rows.lengths[[index for _, index in pairs]])])
            tokens = epoch * before[-1] + before[step * of_step * arguments.gradient_accumulation_steps]
            share, decay = tokens / arguments.max_tokens, decay_share(arguments, None)
        else:
            of_epoch = max(1, math.ceil(batches / arguments.gradient_accumulation_steps))
            steps = (
                arguments.max_steps if arguments.max_steps > 0 else math.ceil(arguments.num_train_epochs * of_epoch)
            )
            share, decay = (epoch * of_epoch + step) / steps, decay_share(arguments, steps)
        rates = masking_rate(rows.start, rows.end, share, decay)
        return iter([(*pair, rate) for pair, rate in zip(pairs, rates.tolist(), strict=True)])
