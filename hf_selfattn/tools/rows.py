"""Rows of token ids, and the order in which an epoch reads them."""

import functools
import hashlib
import json

import numpy as np
import torch


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

    @functools.cached_property
    def fingerprint(self):
        """Of the number of rows, of their lengths, and of some of them whole."""
        digest = hashlib.sha256(b"" if self.lengths is None else np.asarray(self.lengths, dtype=np.int64).tobytes())
        chosen = np.unique(np.linspace(0, len(self) - 1, 16).astype(int)).tolist() if len(self) else []
        digest.update(json.dumps([len(self), *self.__getitems__(chosen)], default=str).encode())
        return digest.hexdigest()[:16]

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
