"""Documents packed into rows of one size: nothing is computed on padding, and no document sees another.

row_length=8, documents a (3 tokens), b (5), c (2), d (4):     d d d d a a a .     b b b b b c c .
"""

from bisect import bisect_left, insort
from dataclasses import dataclass

import numpy as np
import torch
from transformers.utils import logging

from .collators import is_list, lengths_of
from .training import Rows

logger = logging.get_logger(__name__)


def best_fit(lengths, row_length):
    """Which documents stand together in a row: the longest first, each where it leaves the least room.

    The same for the same lengths, and at most 11/9 of the fewest rows possible, plus 4 (Johnson 1974). A row that took
    a document takes all others of that length that it has room for, so whole groups of rows are filled at once.

    Args:
        lengths: (documents,) tokens of each.
        row_length: tokens that a row holds.

    Returns:
        (order, bounds): row i holds the documents order[bounds[i] : bounds[i + 1]], each exactly once.

    Raises:
        ValueError: for a document without a token, or longer than a row.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    if len(lengths) and not 1 <= lengths.min() <= lengths.max() <= row_length:
        wrong = int(np.flatnonzero((lengths < 1) | (lengths > row_length))[0])
        raise ValueError(
            f"A document of a row has 1 to {row_length} tokens (row_length), document {wrong} has {lengths[wrong]}. "
            f"Cut long documents into windows (hf_selfattn.tools.windows.as_rows), or pass a larger row_length."
        )
    by_length = np.argsort(-lengths, kind="stable")
    row_of = np.empty(len(lengths), dtype=np.int64)
    rows = 0
    rooms, with_room = [], {}  # the rooms there are, in rising order, and the rows that have each, as lists of arrays

    def put_back(numbers, room):
        if len(numbers) and room:
            if room not in with_room:
                insort(rooms, room)
            with_room.setdefault(room, []).append(numbers)

    values, counts = np.unique(-lengths, return_counts=True)
    stops = np.cumsum(counts)
    for length, place, stop in zip((-values).tolist(), (stops - counts).tolist(), stops.tolist(), strict=True):
        while place < stop:
            smallest = bisect_left(rooms, length)
            if smallest == len(rooms):
                room, fit = row_length, row_length // length
                numbers = np.arange(rows, rows - (place - stop) // fit)
                rows += len(numbers)
            else:
                room = rooms[smallest]
                fit, numbers = room // length, with_room[room].pop()
                if not with_room[room]:
                    del rooms[smallest], with_room[room]
            used = min(len(numbers), -((place - stop) // fit))
            taken = min(stop - place, used * fit)
            row_of[by_length[place : place + taken]] = np.repeat(numbers[:used], fit)[:taken]
            put_back(numbers[used:], room)
            put_back(numbers[: used - 1], room - fit * length)
            put_back(numbers[used - 1 : used], room - (taken - fit * (used - 1)) * length)
            place += taken
    return np.argsort(row_of, kind="stable"), np.concatenate([[0], np.cumsum(np.bincount(row_of, minlength=rows))])


def choose_packing(asked, config, training, *reasons):
    """Whether training rows are packed: as asked, and where nothing was asked wherever it is possible.

    Args:
        asked: True, False, or None.
        config: of the model.
        training: TrainingArguments.
        reasons: further ones why it is not possible.

    Raises:
        ValueError: if it was asked for and is not possible.
    """
    reasons = list(reasons)
    if config.model_type != "selfattn":
        reasons.append(f"a {config.model_type} model lets the documents of a row see each other")
    if training.n_gpu > 1:
        reasons.append(f"DataParallel on {training.n_gpu} GPUs cuts batches apart (`accelerate launch` does not)")
    if training.accelerator_config.dispatch_batches:
        reasons.append("dispatch_batches cuts batches apart")
    if asked and reasons:
        raise ValueError(f"--packing true is not possible: {'; '.join(reasons)}. Use --packing false.")
    if asked is None and reasons:
        logger.info(f"rows are padded, one document each: {'; '.join(reasons)}")
    return not reasons if asked is None else asked


class PackedRows(Rows):
    """A data set whose item is a row of `row_length` tokens: a list of documents, for a `PackingCollator`.

    What stands together is decided once and is the same in each epoch; the order of the rows is the sampler's matter,
    and a document keeps its number and so its masks. Documents of like length are mixed before they are packed, so
    that neighbours in the data do not end up as neighbours in a row.

    Args:
        documents: Rows, with `lengths`.
        row_length: tokens that a row holds.
        seed: of the mixing.
    """

    are_alike = True

    def __init__(self, documents, row_length, seed=0):
        if documents.lengths is None:
            raise ValueError("Packing needs the documents' lengths, and there is no column 'length'. Add one.")
        self.documents, self.row_length, self.epoch = documents, row_length, 0
        mixed = np.random.default_rng(seed).permutation(len(documents))
        order, self.bounds = best_fit(documents.lengths[mixed], row_length)
        self.order = mixed[order]
        self.lengths = np.add.reduceat(documents.lengths[self.order], self.bounds[:-1])
        logger.info(
            f"{len(documents):,} documents are packed into {len(self):,} rows of {row_length} tokens, "
            f"{self.lengths.sum() / (len(self) * row_length):.1%} full; alone in rows they would be "
            f"{documents.lengths.mean() / row_length:.1%} full."
        )

    def __len__(self):
        return len(self.bounds) - 1

    def __getitems__(self, indices):
        pairs = [index if isinstance(index, tuple) else (0, index) for index in indices]
        rows = [[(epoch, int(document)) for document in self.order[self.bounds[index] : self.bounds[index + 1]]]
                for epoch, index in pairs]  # fmt: skip
        documents = iter(self.documents.__getitems__([document for row in rows for document in row]))
        return [[next(documents) for _ in row] for row in rows]


@dataclass
class PackingCollator:
    """Documents to rows, in the form that transformers' flash attention made common.

    `input_ids`, `labels` and other columns with one value a token are (R, L): L is that of the fullest row, rounded up
    to a multiple of `pad_to_multiple_of`, and row_length at most. `position_ids` restart at each document.
    `cu_seq_lens_q` and `cu_seq_lens_k`, (segments + 1,) int32, are the documents' boundaries in the batch read row by
    row; what is left of a row is a segment of its own, and the only place where `attention_mask` (R, L) is 0.
    `max_length_q` and `max_length_k` are the length of the longest segment. Columns with one value a document,
    (documents, …), follow the order in which the documents stand, row by row. A document's tokens, the masked ones
    too, are what `collator` gives for it alone.

    The boundaries belong to the whole batch: what cuts batches along their first dimension (torch.nn.DataParallel,
    accelerate's `dispatch_batches`) cannot be used with it.

    Args:
        collator: MaskingCollator or PaddingCollator, for what a document's tokens and labels are.
        row_length: tokens that a row holds.
    """

    collator: object
    row_length: int
    pad_to_multiple_of: int = 8

    def __call__(self, items):
        """A batch of documents, packed here, or of rows of `PackedRows`, which stay as they are."""
        if isinstance(items[0], list):
            documents = [document for row in items for document in row]
            bounds = np.cumsum([0, *map(len, items)])
        else:
            order, bounds = best_fit(lengths_of(items), self.row_length)
            documents = [items[number] for number in order]
        if is_list(documents[0]["input_ids"][0]):
            raise ValueError(
                "A document is one list of token ids, got a list of lists (multiple choice). Pad these, do not pack."
            )
        lengths = lengths_of(documents)
        used = np.add.reduceat(lengths, bounds[:-1])
        if used.max() > self.row_length:
            raise ValueError(
                f"A row holds {self.row_length} tokens (row_length), got a row of {used.max()}. "
                f"Give PackedRows and PackingCollator the same row_length."
            )
        length = min(-(-int(used.max()) // self.pad_to_multiple_of) * self.pad_to_multiple_of, self.row_length)
        rows, row = len(used), np.repeat(np.arange(len(used)), np.diff(bounds))
        before = np.cumsum(lengths) - lengths  # tokens before each document, without what is left of rows
        starts = row * length + before - before[bounds[:-1]][row]
        place = np.repeat(starts - before, lengths) + np.arange(lengths.sum())

        of_tokens, batch = self.collator.flat(documents)
        for name, (values, fill) in {**of_tokens, "attention_mask": (1, 0)}.items():
            layout = np.full(rows * length, fill, dtype=np.int64)
            layout[place] = values
            batch[name] = torch.from_numpy(layout.reshape(rows, length))
        boundaries = np.union1d(np.append(starts, rows * length), np.arange(rows) * length + used)
        segments = np.diff(boundaries)
        positions = np.arange(rows * length) - np.repeat(boundaries[:-1], segments)
        batch["position_ids"] = torch.from_numpy(positions.reshape(rows, length))
        for side in ("q", "k"):
            batch[f"cu_seq_lens_{side}"] = torch.from_numpy(boundaries.astype(np.int32))
            batch[f"max_length_{side}"] = int(segments.max())
        return batch
