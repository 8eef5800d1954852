"""Batches for the speed benchmarks: the same documents for every model, laid out as each model reads them best.

    even      32 rows of 128 tokens, no padding: 4,096 tokens
    real128   64 documents of at most 128 tokens, about 4,096 tokens
    real512   16 documents of at most 512 tokens, about 4,096 tokens

Lengths of documents are log-normal (median 0.45 of the longest, sigma 0.6), cut at 8 and at the longest: their mean is
about half of the longest, and about one in ten is of the greatest length. 30 % of the tokens, each with the same
chance, have labels.
"""

import math
from typing import NamedTuple

import torch

VOCABULARY = 8192
MASKED = 0.3
IGNORED = -100
LONGEST = {"even": 128, "real128": 128, "real512": 512}
DOCUMENTS = {"even": 32, "real128": 64, "real512": 16}


class Batch(NamedTuple):
    """One batch in one layout, R rows of N slots.

    Attributes:
        ids: (R, N) token ids, 0 at padding.
        labels: (R, N), -100 where there is nothing to predict.
        real: (R, N) bool, False at padding; None: no padding.
        positions: (R, N) places within documents; None: they count from 0 in each row.
        blocks: (R, 1, N, N) bool, who sees whom; None: all that is real.
        boundaries: (documents + 1,) where documents begin in the one row; None: a row is a document.
        labelled: (M,) the slots with a label, counted through all rows.
        lengths: of the documents.
    """

    ids: torch.Tensor
    labels: torch.Tensor
    real: torch.Tensor | None
    positions: torch.Tensor | None
    blocks: torch.Tensor | None
    boundaries: torch.Tensor | None
    labelled: torch.Tensor
    lengths: list[int]


def draw_documents(setting: str, seed: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(ids, labels) of each document."""
    random = torch.Generator().manual_seed(seed)
    longest, count = LONGEST[setting], DOCUMENTS[setting]
    lengths = torch.full((count,), longest)
    if setting != "even":
        drawn = torch.empty(count).log_normal_(math.log(0.45 * longest), 0.6, generator=random)
        lengths = drawn.round().long().clamp(8, longest)
    documents = []
    for length in lengths.tolist():
        ids = torch.randint(5, VOCABULARY, (length,), generator=random)
        labels = ids.masked_fill(torch.rand(length, generator=random) >= MASKED, IGNORED)
        documents.append((ids.masked_fill(labels != IGNORED, 4), labels))
    return documents


def lay_out(documents: list, rows: str, longest: int, num_rows: int | None = None) -> Batch:
    """The documents as a batch.

    Args:
        rows: "padded" (a row is a document), "packed" (rows of whole documents, first fit, and a mask of blocks) or
            "documents" (one row of all documents).
        longest: the length of a packed row; padded rows are as long as the batch's longest document, made a multiple
            of 8.
        num_rows: rows where they are packed, at least as many as are needed; None: as many.
    """
    lengths = [len(words) for words, _ in documents]
    if rows == "documents":
        bins, longest = [documents], sum(lengths)
    elif rows == "packed":
        bins = _first_fit(documents, longest)
    else:
        bins, longest = [[document] for document in documents], -(-max(lengths) // 8) * 8
    bins = bins + [[]] * ((num_rows or len(bins)) - len(bins))
    shape = (len(bins), longest)
    ids, labels = torch.zeros(shape, dtype=torch.long), torch.full(shape, IGNORED)
    number, positions = torch.full(shape, -1), torch.zeros(shape, dtype=torch.long)
    for row, content in enumerate(bins):
        start = 0
        for i, (words, targets) in enumerate(content):
            place = slice(start, start + len(words))
            ids[row, place], labels[row, place], number[row, place] = words, targets, i
            positions[row, place] = torch.arange(len(words))
            start += len(words)
    blocks = (number[:, None, :, None] == number[:, None, None, :]) if rows == "packed" else None
    return Batch(
        ids,
        labels,
        real=None if rows != "padded" or bool((number >= 0).all()) else number >= 0,
        positions=None if rows == "padded" else positions,
        blocks=blocks,
        boundaries=torch.tensor([0, *lengths]).cumsum(0) if rows == "documents" else None,
        labelled=(labels.flatten() != IGNORED).nonzero().flatten(),
        lengths=lengths,
    )


def make_batches(setting: str, rows: str, count: int = 4) -> list[Batch]:
    """`count` batches of different documents; packed rows are as many in each, so that shapes stay the same."""
    drawn = [draw_documents(setting, seed) for seed in range(count)]
    num_rows = max(len(_first_fit(d, LONGEST[setting])) for d in drawn) if rows == "packed" else None
    return [lay_out(documents, rows, LONGEST[setting], num_rows) for documents in drawn]


def describe(setting: str, batches: list[Batch]) -> dict:
    """What the result's file says of the data."""
    return {
        "setting": setting,
        "rows": [tuple(batch.ids.shape) for batch in batches],
        "real_tokens": [sum(batch.lengths) for batch in batches],
        "labelled_tokens": [len(batch.labelled) for batch in batches],
        "lengths": [batch.lengths for batch in batches] if setting != "even" else None,
    }


def _first_fit(documents: list, longest: int) -> list[list]:
    """Whole documents in rows of at most `longest` tokens, the longest documents first."""
    bins, room = [], []
    for document in sorted(documents, key=lambda d: -len(d[0])):
        length = len(document[0])
        place = next((i for i, free in enumerate(room) if free >= length), None)
        if place is None:
            place = len(bins)
            bins.append([])
            room.append(longest)
        bins[place].append(document)
        room[place] -= length
    return bins
