"""Texts to token ids, and long ones to windows."""

import itertools
import math

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from transformers.utils import logging

from .convert_families import position_offset

logger = logging.get_logger(__name__)

LONG_TEXTS = ("split", "truncate", "refuse")


def positions_of(config):
    """How many tokens, special ones included, the model has positions for; None: its config sets no limit.

    (Models of RoBERTa's kind have rows in their table of positions that no token uses. XLNet says -1 for no limit.)
    """
    rows = getattr(config, "max_position_embeddings", None)
    return None if rows is None or rows < 1 else rows - position_offset(config)


def window_length(max_seq_length, tokenizer, config):
    """The number of tokens in a row, special tokens included: what is asked for, within the model's positions."""
    positions = positions_of(config)
    if max_seq_length is None:
        limits = [limit for limit in (positions, tokenizer.model_max_length) if limit is not None]
        return min([*limits, 512])
    if positions is not None and max_seq_length > positions:
        raise ValueError(
            f"--max_seq_length {max_seq_length} is longer than the model's {positions} positions "
            f"(max_position_embeddings={config.max_position_embeddings}). Pass --max_seq_length {positions} or less, "
            f"or a model with more positions."
        )
    return max_seq_length


def check_choice(long_texts, possible=LONG_TEXTS):
    if long_texts not in possible:
        raise ValueError(f"--long_texts is one of {', '.join(possible)} here, got {long_texts!r}.")


def too_long(length, limit, where):
    return ValueError(
        f"{where} has {length} tokens, more than the {limit} that a row holds, and --long_texts is refuse. "
        f"Pass --long_texts split (windows) or truncate, or a larger --max_seq_length."
    )


class Frame:
    """The special tokens round one text or two, as a tokenizer writes them, for texts that are token ids already.

    Args:
        token_types: whether rows also tell their texts apart by `token_type_ids`.
    """

    def __init__(self, tokenizer, token_types=False):
        letter = tokenizer("a", add_special_tokens=False)["input_ids"]
        one, two = tokenizer("a"), tokenizer("a", "a", return_token_type_ids=True)
        whole, pair, width = one["input_ids"], two["input_ids"], len(letter)
        first = next(i for i in range(len(whole)) if whole[i : i + width] == letter)
        second = next(i for i in range(first + width, len(pair)) if pair[i : i + width] == letter)
        self.before, self.after = whole[:first], whole[first + width :]
        self.between, self.end = pair[first + width : second], pair[second + width :]
        self.second_type = two["token_type_ids"][second]
        self.token_types = token_types

    def room(self, max_seq_length, texts=1):
        """How many tokens of the texts themselves a row holds."""
        special = len(self.before) + len(self.after if texts == 1 else self.between + self.end)
        if max_seq_length <= special:
            raise ValueError(
                f"--max_seq_length counts the {special} special tokens of a row, got {max_seq_length}. Raise it."
            )
        return max_seq_length - special

    def row(self, first, second=None):
        """The columns `input_ids` and `length` (and `token_type_ids`) of one row, from lists of ids."""
        if second is None:
            ids, split = [*self.before, *first, *self.after], None
        else:
            split = len(self.before) + len(first) + len(self.between)
            ids = [*self.before, *first, *self.between, *second, *self.end]
        row = {"input_ids": ids, "length": len(ids)}
        if self.token_types:
            split = len(ids) if split is None else split
            row["token_type_ids"] = [0] * split + [self.second_type] * (len(ids) - split)
        return row

    def start_of_second(self, first):
        return len(self.before) + len(first) + len(self.between)


def uses_token_types(tokenizer, config):
    return "token_type_ids" in tokenizer.model_input_names and getattr(config, "type_vocab_size", 2) > 1


def cut_into_windows(ids, size, long_texts="split", where="A text", full=False):
    """`ids` in pieces of at most `size`, nearly equally long; together they are `ids`, in order.

    Args:
        long_texts: what is done with more than `size` ids: `split`, `truncate` (the first `size` are kept), `refuse`.
        where: how an error names the text.
        full: pieces of `size` instead, and the rest: what shares rows with others leaves less of them empty.
    """
    if len(ids) <= size:
        return [ids]
    if long_texts == "refuse":
        raise too_long(len(ids), size, where)
    if long_texts == "truncate":
        return [ids[:size]]
    count = math.ceil(len(ids) / size)
    bounds = [min(i * size, len(ids)) if full else len(ids) * i // count for i in range(count + 1)]
    return [ids[start:stop] for start, stop in itertools.pairwise(bounds)]


def report_long(count, total, limit, long_texts):
    """Long texts are never cut in silence."""
    if count:
        done = {"split": "each is cut into windows", "truncate": "their ends are dropped"}[long_texts]
        logger.warning(
            f"{count:,} of {total:,} texts have more than {limit} tokens: {done} (--long_texts {long_texts})."
        )


def as_rows(dataset, column, tokenizer, max_seq_length, long_texts="split", desc="Tokenising", full=False):
    """A Dataset of `input_ids` and `length`: one document, or one window of it, a row, special tokens included.

    Documents are never joined, so none sees another. Empty texts give no row. `long_texts` and `full`: as in
    `cut_into_windows`.
    """
    check_choice(long_texts)
    frame = Frame(tokenizer)
    room = frame.room(max_seq_length)

    def cut(texts, indices):
        texts = [(index, text) for index, text in zip(indices, texts, strict=True) if text and not text.isspace()]
        encoded = tokenizer([text for _, text in texts], add_special_tokens=False, verbose=False) if texts else {}
        made = {"input_ids": [], "length": [], "texts_too_long": []}
        for (index, _), ids in zip(texts, encoded.get("input_ids", []), strict=True):
            windows = cut_into_windows(ids, room, long_texts, f"Row {index}, column {column!r},", full)
            for number, window in enumerate(windows):
                row = frame.row(window)
                made["input_ids"].append(row["input_ids"])
                made["length"].append(row["length"])
                made["texts_too_long"].append(number == 0 and len(ids) > room)
        return made

    rows = dataset.map(
        cut,
        batched=True,
        with_indices=True,
        input_columns=[column],
        remove_columns=dataset.column_names,
        desc=desc,
    )
    if len(rows) == 0:
        raise ValueError(
            f"The data set is empty: none of its {len(dataset)} rows has text in column {column!r}. "
            f"Check the file, or pass another --text_column."
        )
    report_long(sum(rows["texts_too_long"][:]), len(dataset), max_seq_length, long_texts)
    return rows.remove_columns("texts_too_long")


def check_token_ids(rows, vocab_size, column="input_ids"):
    """Refuse ids that the model has no embedding for; they would end in an index error, or worse, on the device."""
    for batch in rows.with_format("arrow").iter(10_000):
        chunk = batch[column].combine_chunks()
        while pa.types.is_list(chunk.type) or pa.types.is_large_list(chunk.type):
            chunk = pc.list_flatten(chunk)
        if len(chunk) == 0:
            continue
        bounds = pc.min_max(chunk)
        smallest, largest = bounds["min"].as_py(), bounds["max"].as_py()
        if smallest < 0 or largest >= vocab_size:
            wrong = smallest if smallest < 0 else largest
            raise ValueError(
                f"Token ids are from 0 to {vocab_size - 1} (the model's vocab_size - 1), found {wrong} in column "
                f"{column!r}. Use the tokenizer that belongs to the model."
            )


def token_counts(rows, vocab_size, column="input_ids"):
    """(vocab_size,) int64: how often each id occurs."""
    counts = np.zeros(vocab_size, dtype=np.int64)
    for batch in rows.with_format("arrow").iter(10_000):
        counts += np.bincount(pc.list_flatten(batch[column]).to_numpy(zero_copy_only=False), minlength=vocab_size)
    return counts
