"""The loss of a masked language model on a fixed text with fixed masks, by tokens and by words.

*By tokens*, the usual number: a text is cut into windows of tokens, and 15 % of the tokens of each are masked, always
by the mask token. Nats a token compare models with one tokenizer; another one cuts the text into other pieces.

*By words*, for any two models: which words are masked is decided before any tokenizer sees the text.

- A word is what stands between blanks, in pieces of 64 characters where it is longer. In scripts without blanks each
  character is one.
- A window is as many whole words as fit into `window_bytes` bytes of UTF-8, so all models read the same windows.
- A word is masked if a hash of (seed, document, number of the word in it) says so. All its tokens are masked together,
  beside the other masked words of its window.
- Its log-probability is the sum over its tokens, from left to right: the first is asked for as it is, each later one
  with those before it shown. That is the chain rule, so a word costs what it costs whatever its number of pieces (the
  number of mask tokens tells how many there are).
- Bits per byte are the sum over all masked words, divided by ln 2 and by their bytes without blanks.

Where a token joins a masked word with its neighbour (some tokenizers of Chinese do), all of the token is masked, and
the bytes of the neighbour count too: `neighbouring_bytes`. As long as these are 0, exactly the same text is masked for
every tokenizer. Masked words that a token joins count as one. A tokenizer that loses text makes its model's task
easier: `unknown_tokens` counts masked tokens that are the unknown token, `lost_words` words without any token, which
do not count; a lost case shows nowhere.
"""

import math
import re

import numpy as np
from datasets import Dataset

from .collators import MaskingCollator, hashed_uniforms
from .evaluation import answers, longest_row, questions_by_length
from .task_tokens import UNSPACED
from .tokenizer import bytes_of_tokens
from .windows import as_rows

WORD = re.compile(rf"{UNSPACED.pattern}|(?:(?!{UNSPACED.pattern})\S){{1,64}}")


def check_fast(tokenizer):
    if not tokenizer.is_fast:
        raise ValueError(
            f"The bytes of a token are known to fast tokenizers alone, and {type(tokenizer).__name__} is none. "
            "Convert it to a tokenizer.json."
        )


def _means(log_probabilities, right, size):
    loss = -float(log_probabilities.sum())
    return {
        "loss": loss / len(right),
        "accuracy": float(right.mean()),
        "bits_per_byte": loss / math.log(2) / max(size, 1),
        "bytes": int(size),
    }


def masked_token_metrics(
    model, tokenizer, texts, max_seq_length=128, mlm_probability=0.15, seed=0, progress="masked tokens", **how
):
    """Loss (nats a token), accuracy and bits per byte of 15 % of the tokens, each replaced by the mask token.

    The number with which pretrain.py evaluates the same texts where --max_seq_length, --eval_mlm_probability and
    --eval_masks_seed say the same.

    Args:
        model, tokenizer: of `open_masked_lm`.
        texts: list of documents.
        max_seq_length: tokens of a window, special tokens included.
        how: for `answers`.

    Raises:
        ValueError: no text, no token is masked, windows longer than the model's positions, a slow tokenizer.
    """
    check_fast(tokenizer)
    check_length(tokenizer, model.config, max_seq_length)
    windows = as_rows(Dataset.from_dict({"text": texts}), "text", tokenizer, max_seq_length)["input_ids"][:]
    collator = MaskingCollator(tokenizer, mlm_probability, seed, mask_replace_prob=1.0, random_replace_prob=0.0)
    lengths, number = np.array([len(ids) for ids in windows]), np.arange(len(windows))
    rates = np.full(len(windows), mlm_probability)
    ids = np.concatenate([np.asarray(ids, dtype=np.int64) for ids in windows])
    masked, labels = collator.mask(ids, lengths, number, np.zeros_like(number), rates)
    starts = np.cumsum(lengths) - lengths
    place = np.flatnonzero(labels != -100)
    if len(place) == 0:
        raise ValueError("No token of the text is masked, so there is nothing to measure. Evaluate on more text.")
    row = np.searchsorted(starts, place, side="right") - 1
    questions = questions_by_length(np.split(masked, starts[1:]), row, place - starts[row], labels[place])
    result = answers(model, questions, progress=progress, **how)
    size = bytes_of_tokens(tokenizer, len(collator.special))[labels[place]].sum()
    return {**_means(*result, size), "tokens": len(place), "windows": len(windows)}


def check_length(tokenizer, config, max_seq_length, name="The model"):
    """Refuse windows of `masked_token_metrics` that a model cannot read (ValueError)."""
    limit = longest_row(tokenizer, config)
    if max_seq_length > limit:
        raise ValueError(
            f"{name} reads rows of at most {limit} tokens, got --max_seq_length {max_seq_length}. Pass {limit} or "
            "less for all models that are compared."
        )


def check_readable(tokenizer, config, texts, max_seq_length, window_bytes, name):
    """Refuse what a model cannot be measured on, before any model is (ValueError): see the checks."""
    check_fast(tokenizer)
    check_length(tokenizer, config, max_seq_length, name)
    check_windows(tokenizer, config, texts, window_bytes, name)


def words_in_windows(text, window_bytes):
    """[(number of its first word, [(start, stop) of each word])] of the windows of a text, in characters of it."""
    windows, begin = [], 0
    for number, word in enumerate(match.span() for match in WORD.finditer(text)):
        if windows and _size(text[begin : word[1]]) <= window_bytes:
            windows[-1][1].append(word)
        else:
            begin = word[0]
            windows.append((number, [word]))
    return windows


def check_windows(tokenizer, config, texts, window_bytes, name="The model"):
    """Refuse windows of `masked_word_metrics` that a model cannot read: before any model is measured.

    Raises:
        ValueError: the longest window has more tokens than the model's positions.
    """
    limit = longest_row(tokenizer, config)
    pieces = [
        (text or "")[words[0][0] : words[-1][1]]
        for text in texts
        for _, words in words_in_windows(text or "", window_bytes)
    ]
    longest = max((len(ids) for ids in tokenizer(pieces, verbose=False)["input_ids"]), default=0) if pieces else 0
    if longest > limit:
        raise ValueError(
            f"{name} reads rows of at most {limit} tokens, and the longest window of {window_bytes} bytes has "
            f"{longest}. Pass --window_bytes {window_bytes * limit // longest} or less, the same for all models."
        )


def _word_of_each_token(offsets, piece, words):
    """(which of the masked `words` each token is the first to touch, or -1; all masked words that tokens touch; the
    places of other characters that are in such tokens).

    Args:
        offsets: (start, stop) of each token in `piece`; empty for special tokens.
        words: (start, stop) of the masked words in it.
    """
    owner = np.full(len(piece), -1)
    for number, (start, stop) in enumerate(words):
        owner[start:stop] = number
    found, touched, others = np.full(len(offsets), -1), set(), set()
    for token, (start, stop) in enumerate(offsets):
        numbers = [number for number in owner[start:stop].tolist() if number >= 0]
        if numbers:
            found[token] = numbers[0]
            touched.update(numbers)
            others.update(i for i in range(start, stop) if owner[i] < 0 and not piece[i].isspace())
    return found, touched, others


def _size(characters):
    return len("".join(characters).encode("utf-8", "replace"))


class _WordQuestions:
    """Rows and questions of masked words, and counts of what is asked for."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.rows, self.row, self.place, self.target, self.word = [], [], [], [], []
        self.counts = dict.fromkeys(("words", "bytes", "neighbouring_bytes", "unknown_tokens", "lost_words"), 0)

    def add(self, piece, words):
        """The masked `words`, (start, stop) in characters, of a window's text."""
        encoded = self.tokenizer(piece, return_offsets_mapping=True, verbose=False)
        ids, counts = encoded["input_ids"], self.counts
        of_token, touched, others = _word_of_each_token(encoded["offset_mapping"], piece, words)
        tokens = [np.flatnonzero(of_token == number).tolist() for number in range(len(words))]
        counts["lost_words"] += len(words) - len(touched)
        counts["neighbouring_bytes"] += _size(piece[i] for i in others)
        counts["bytes"] += _size(piece[i] for i in others) + _size(piece[slice(*words[i])] for i in touched)
        counts["unknown_tokens"] += sum(ids[i] == self.tokenizer.unk_token_id for of_word in tokens for i in of_word)
        masked = [self.tokenizer.mask_token_id if number >= 0 else i for i, number in zip(ids, of_token, strict=True)]
        first_row = len(self.rows)
        self.rows.append(masked)
        for of_word in filter(None, tokens):
            for shown, token in enumerate(of_word):
                if shown:
                    row = list(masked)
                    for before in of_word[:shown]:
                        row[before] = ids[before]
                    self.rows.append(row)
                self.row.append(len(self.rows) - 1 if shown else first_row)
                self.place.append(token)
                self.target.append(ids[token])
                self.word.append(counts["words"])
            counts["words"] += 1


def masked_word_metrics(
    model, tokenizer, texts, window_bytes=384, mlm_probability=0.15, seed=0, progress="masked words", **how
):
    """Loss (nats a word), accuracy (all tokens of a word right) and bits per byte of 15 % of the words of each text.

    The same words in the same windows for every model and tokenizer; see the top of this file.

    Args:
        model, tokenizer: of `open_masked_lm`.
        texts: list of documents.
        window_bytes: bytes of UTF-8 in a window.
        how: for `answers`.

    Raises:
        ValueError: no word is masked, a window has more tokens than the model's positions, a slow tokenizer.
    """
    check_fast(tokenizer)
    if window_bytes < 1 or not 0 < mlm_probability <= 1:
        raise ValueError(
            f"Windows have at least 1 byte and the masked share is above 0 and at most 1, got window_bytes "
            f"{window_bytes} and mlm_probability {mlm_probability}."
        )
    check_windows(tokenizer, model.config, texts, window_bytes)
    asked, windows = _WordQuestions(tokenizer), 0
    for document, text in enumerate(texts):
        for first, words in words_in_windows(text or "", window_bytes):
            chosen = hashed_uniforms(seed, document, np.arange(first, first + len(words))) < mlm_probability
            if not chosen.any():
                continue
            windows, begin = windows + 1, words[0][0]
            piece = text[begin : words[-1][1]]
            asked.add(piece, [(a - begin, b - begin) for (a, b), x in zip(words, chosen, strict=True) if x])
    if not asked.row:
        raise ValueError("No word of the text is masked, so there is nothing to measure. Evaluate on more text.")
    log_probabilities, right = answers(
        model, questions_by_length(asked.rows, asked.row, asked.place, asked.target), progress=progress, **how
    )
    count = asked.counts["words"]
    of_words = np.bincount(asked.word, log_probabilities, count)
    right_words = np.bincount(asked.word, ~right, count) == 0
    counts = {**asked.counts, "tokens": len(asked.row), "windows": windows}
    return {**_means(of_words, right_words, counts["bytes"]), **counts}
