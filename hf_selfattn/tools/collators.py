"""Rows of a data set to the tensors of a batch."""

from dataclasses import dataclass

import numpy as np
import torch

MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


def _mix(state):
    """The finaliser of SplitMix64 (Steele et al. 2014): a bijection of 64-bit words that passes BigCrush."""
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


def hashed_uniforms(*keys):
    """Numbers in [0, 1), a function of integer keys (broadcastable arrays) and of nothing else."""
    state = np.zeros(np.broadcast_shapes(*[np.shape(key) for key in keys]), dtype=np.uint64)
    with np.errstate(over="ignore"):
        for key in keys:
            state = _mix((state ^ np.asarray(key).astype(np.uint64)) + MULTIPLIER)
    return (state >> np.uint64(11)).astype(np.float64) * 2.0**-53


def pad_rows(rows, value, multiple=1, dtype=np.int64):
    """(B, N) array of rows of unequal length, filled up to the right; N is a multiple of `multiple`."""
    longest = max(len(row) for row in rows)
    padded = np.full((len(rows), -(-longest // multiple) * multiple), value, dtype=dtype)
    for target, row in zip(padded, rows, strict=True):
        target[: len(row)] = row
    return padded


@dataclass
class MaskingCollator:
    """Rows with `input_ids`, `example_id` and `epoch` to a batch for masked language modelling.

    In each row round(mlm_probability * tokens) tokens (rounded up or down at random, so that the mean is exact) become
    labels; of these 80 % are replaced by [MASK], 10 % by a random token, 10 % stay (Devlin et al. 2019, section 3.1).
    Special tokens are never chosen. The choice is a function of (seed, epoch, example_id, position): it does not
    depend on the batch, the number of workers or processes, or on any random state, and is the same in each
    evaluation, where the epoch is always 0.
    """

    tokenizer: object
    mlm_probability: float = 0.15
    seed: int = 0
    pad_to_multiple_of: int = 8

    def __post_init__(self):
        if not 0 < self.mlm_probability <= 1:
            raise ValueError(f"mlm_probability is above 0 and at most 1, got {self.mlm_probability}.")
        vocabulary = np.array(sorted(self.tokenizer.get_vocab().values()))
        self.special = np.zeros(vocabulary.max() + 1, dtype=bool)
        self.special[self.tokenizer.all_special_ids] = True
        self.ordinary = vocabulary[~self.special[vocabulary]]

    def __call__(self, rows):
        ids = pad_rows([row["input_ids"] for row in rows], self.tokenizer.pad_token_id, self.pad_to_multiple_of)
        lengths = np.array([len(row["input_ids"]) for row in rows])
        real = np.arange(ids.shape[1]) < lengths[:, None]
        masked, labels = self.mask(
            ids, real, np.array([row["example_id"] for row in rows]), np.array([row["epoch"] for row in rows])
        )
        return {
            "input_ids": torch.from_numpy(masked),
            "attention_mask": torch.from_numpy(real.astype(np.int64)),
            "labels": torch.from_numpy(labels),
        }

    def mask(self, ids, real, example_ids, epochs):
        """(ids after masking, labels), both (B, N); labels are -100 where nothing is asked."""
        position = np.arange(ids.shape[1])
        keys = (self.seed, epochs[:, None], example_ids[:, None])
        maskable = real & ~self.special[ids]
        order = np.where(maskable, hashed_uniforms(*keys, position, 0), np.inf)
        rank = order.argsort(1).argsort(1)
        wanted = self.mlm_probability * maskable.sum(1, keepdims=True) + hashed_uniforms(*keys, -1, 1)
        chosen = maskable & (rank < np.floor(wanted))
        action = hashed_uniforms(*keys, position, 2)
        random = self.ordinary[(hashed_uniforms(*keys, position, 3) * len(self.ordinary)).astype(np.int64)]
        masked = np.where(chosen & (action < 0.8), self.tokenizer.mask_token_id, ids)
        masked = np.where(chosen & (action >= 0.8) & (action < 0.9), random, masked)
        return masked, np.where(chosen, ids, -100)


@dataclass
class PaddingCollator:
    """Rows to a padded batch: `input_ids`, `token_type_ids` where the tokenizer makes them, and the labels.

    A value that is a list is padded like the token ids (with -100), a list of lists is a row of choices and gets a
    dimension of its own; `columns` are copied as one number a row.
    """

    tokenizer: object
    columns: tuple = ("labels",)
    label_dtype: torch.dtype = torch.int64
    pad_to_multiple_of: int = 8

    def __call__(self, rows):
        choices = len(rows[0]["input_ids"]) if isinstance(rows[0]["input_ids"][0], (list, np.ndarray)) else None
        batch = {}
        for name, fill in (("input_ids", self.tokenizer.pad_token_id), ("token_type_ids", 0)):
            if name in rows[0]:
                sequences = [s for row in rows for s in (row[name] if choices else [row[name]])]
                padded = torch.from_numpy(pad_rows(sequences, fill, self.pad_to_multiple_of))
                batch[name] = padded.unflatten(0, (len(rows), choices)) if choices else padded
                if name == "input_ids":
                    lengths = torch.tensor([len(sequence) for sequence in sequences])
                    real = (torch.arange(padded.shape[1]) < lengths[:, None]).long()
                    batch["attention_mask"] = real.unflatten(0, (len(rows), choices)) if choices else real
        for name in self.columns:
            if name in rows[0]:
                batch[name] = self.labels([row[name] for row in rows], batch["input_ids"].shape[-1])
        return batch

    def labels(self, values, length):
        if self.label_dtype == torch.int64 and isinstance(values[0], (list, np.ndarray)):
            padded = np.full((len(values), length), -100, dtype=np.int64)
            for target, row in zip(padded, values, strict=True):
                target[: len(row)] = row
            return torch.from_numpy(padded)
        return torch.tensor(values, dtype=self.label_dtype)
