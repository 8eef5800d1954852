"""Rows of a data set to the tensors of a batch."""

from dataclasses import KW_ONLY, dataclass

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


def is_list(value):
    return isinstance(value, (list, tuple)) or getattr(value, "ndim", 0) > 0


def lengths_of(rows):
    """(B,) tokens of each row."""
    return np.array([len(row["input_ids"]) for row in rows])


def joined(rows, name):
    """(T,) int64: the values of a column with one value a token, row after row."""
    for row in rows:
        if len(row[name]) != len(row["input_ids"]):
            raise ValueError(
                f"Column {name!r} has one value for each token, got {len(row[name])} values in a row of "
                f"{len(row['input_ids'])} tokens. Use -100 where a token has no label."
            )
    return np.concatenate([np.asarray(row[name], dtype=np.int64) for row in rows])


def padded(columns, lengths, multiple=1):
    """Columns with one value a token, and `attention_mask`, as (B, N) tensors, filled up to the right.

    Args:
        columns: name -> (the values (T,), what stands at padding).
        lengths: (B,) tokens of each row, T in all.
        multiple: N is a multiple of it.
    """
    real = np.arange(-(-lengths.max() // multiple) * multiple) < lengths[:, None]
    batch = {}
    for name, (values, fill) in columns.items():
        grid = np.full(real.shape, fill, dtype=np.int64)
        grid[real] = values
        batch[name] = torch.from_numpy(grid)
    return {**batch, "attention_mask": torch.from_numpy(real.astype(np.int64))}


def check_replaced(mask_replace_prob, random_replace_prob):
    """Refuse shares of the chosen tokens that are below 0, or more than all together."""
    if min(mask_replace_prob, random_replace_prob) < 0 or mask_replace_prob + random_replace_prob > 1 + 1e-9:
        raise ValueError(
            f"mask_replace_prob and random_replace_prob are shares of the tokens that are asked for, 0 or more and 1 "
            f"at most together, got {mask_replace_prob} and {random_replace_prob}. Lower one of them."
        )


@dataclass
class MaskingCollator:
    """Rows with `input_ids`, `example_id` and `epoch` to a batch for masked language modelling.

    In each row round(mlm_probability * tokens) tokens (rounded up or down at random, so that the mean is exact) become
    labels; of these a share of mask_replace_prob is replaced by [MASK], one of random_replace_prob by a random token,
    and the rest stays (80, 10 and 10 %: Devlin et al. 2019, section 3.1). Special tokens are never chosen. The choice
    is a function of (seed, epoch, example_id, position): it does not depend on the batch, the number of workers or
    processes, or on any random state, and is the same in each evaluation, where the epoch is always 0, and in rows
    that hold several documents (`PackingCollator`). A row may bring an `mlm_probability` of its own
    (`masking_rates.RatedRows`).

    Raises:
        ValueError: for a share that is none.
    """

    tokenizer: object
    mlm_probability: float = 0.15
    seed: int = 0
    pad_to_multiple_of: int = 8
    _: KW_ONLY
    mask_replace_prob: float = 0.8
    random_replace_prob: float = 0.1

    def __post_init__(self):
        if not 0 < self.mlm_probability <= 1:
            raise ValueError(f"mlm_probability is above 0 and at most 1, got {self.mlm_probability}.")
        check_replaced(self.mask_replace_prob, self.random_replace_prob)
        vocabulary = np.array(sorted(self.tokenizer.get_vocab().values()))
        self.special = np.zeros(vocabulary.max() + 1, dtype=bool)
        self.special[self.tokenizer.all_special_ids] = True
        self.ordinary = vocabulary[~self.special[vocabulary]]

    def __call__(self, rows):
        of_tokens, _ = self.flat(rows)
        return padded(of_tokens, lengths_of(rows), self.pad_to_multiple_of)

    def flat(self, rows):
        """({column: (one value a token, fill at padding)}, {}): what stands in a batch, before it has a shape."""
        if "example_id" not in rows[0]:
            raise ValueError(
                "A mask is a function of `example_id` and `epoch`, and the rows have only "
                f"{', '.join(rows[0])}. Wrap the data set in hf_selfattn.tools.training.Rows."
            )
        example_ids, epochs = (np.array([row[name] for row in rows]) for name in ("example_id", "epoch"))
        rates = np.array([row.get("mlm_probability", self.mlm_probability) for row in rows])
        masked, labels = self.mask(joined(rows, "input_ids"), lengths_of(rows), example_ids, epochs, rates)
        return {"input_ids": (masked, self.tokenizer.pad_token_id), "labels": (labels, -100)}, {}

    def mask(self, ids, lengths, example_ids, epochs, rates):
        """(ids after masking, labels), both (T,); labels are -100 where nothing is asked.

        Args:
            ids: (T,) token ids, row after row.
            lengths, example_ids, epochs, rates: (B,), one value a row.
        """
        row = np.repeat(np.arange(len(lengths)), lengths)
        position = np.arange(len(ids)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        keys = (self.seed, epochs[row], example_ids[row], position)
        maskable = ~self.special[ids]
        rank = np.empty(len(ids), dtype=np.int64)  # of a token among the maskable ones of its row
        rank[np.lexsort((np.where(maskable, hashed_uniforms(*keys, 0), np.inf), row))] = position
        wanted = rates * np.bincount(row, maskable, len(lengths))
        wanted = np.floor(wanted + hashed_uniforms(self.seed, epochs, example_ids, -1, 1))
        chosen = maskable & (rank < wanted[row])
        action = hashed_uniforms(*keys, 2)
        random = self.ordinary[(hashed_uniforms(*keys, 3) * len(self.ordinary)).astype(np.int64)]
        by_mask, by_random = self.mask_replace_prob, self.mask_replace_prob + self.random_replace_prob
        masked = np.where(chosen & (action < by_mask), self.tokenizer.mask_token_id, ids)
        masked = np.where(chosen & (action >= by_mask) & (action < by_random), random, masked)
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
        choices = len(rows[0]["input_ids"]) if is_list(rows[0]["input_ids"][0]) else None
        if choices is None:
            of_tokens, of_rows = self.flat(rows)
            return {**padded(of_tokens, lengths_of(rows), self.pad_to_multiple_of), **of_rows}
        names = [name for name in ("input_ids", "token_type_ids") if name in rows[0]]
        each = [{name: row[name][choice] for name in names} for row in rows for choice in range(choices)]
        batch = padded(self.flat(each)[0], lengths_of(each), self.pad_to_multiple_of)
        batch = {name: values.unflatten(0, (len(rows), choices)) for name, values in batch.items()}
        return {**batch, **self.values_of_rows(rows)}

    def flat(self, rows):
        """({column: (one value a token, fill at padding)}, {column: a tensor with one entry a row})."""
        columns = {"input_ids": (joined(rows, "input_ids"), self.tokenizer.pad_token_id)}
        if "token_type_ids" in rows[0]:
            columns["token_type_ids"] = (joined(rows, "token_type_ids"), 0)
        if "labels" in rows[0] and self.is_of_tokens(rows[0]["labels"]):
            columns["labels"] = (joined(rows, "labels"), -100)
        return columns, self.values_of_rows(rows)

    def values_of_rows(self, rows):
        names = [name for name in self.columns if name in rows[0] and not self.is_of_tokens(rows[0][name])]
        return {name: torch.tensor([row[name] for row in rows], dtype=self.label_dtype) for name in names}

    def is_of_tokens(self, value):
        return self.label_dtype == torch.int64 and is_list(value)
