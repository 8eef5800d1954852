"""Extractive question answering: the windows of a context, the spans in them, and `answer`.

transformers 5 has no question-answering pipeline; `answer` does what it did. Fine-tuning cuts and judges its windows
by the same functions.
"""

import contextlib
import itertools
import operator

import numpy as np
import torch

from .collators import PaddingCollator
from .windows import Frame, positions_of, uses_token_types, window_length


@torch.no_grad()
def answer(
    model,
    tokenizer,
    question,
    context,
    *,
    top_k=None,
    max_length=None,
    stride=None,
    max_answer_tokens=30,
    allow_no_answer=False,
    batch_size=16,
):
    """The part of `context` that answers `question`.

    A context that does not fit beside its question is read in overlapping windows, whose spans compete. The `score` is
    a probability: a softmax of start logit + end logit over all spans of at most `max_answer_tokens` tokens of this
    context, each once (and over "no answer", where that is allowed).

    Args:
        model: SelfAttnForQuestionAnswering, or another model of transformers with `start_logits` and `end_logits`. It
            is run in evaluation mode and left in the mode it was in.
        tokenizer: its tokenizer, a fast one.
        question, context: a text each, or a list each, of the same length.
        top_k: how many answers to a question; None: the best one, not in a list.
        max_length: tokens of a window, special ones included; None: the model's positions, at most 512.
        stride: tokens that two neighbouring windows share; None: 64, at most half of what the question leaves. An
            answer of more tokens may lie across two windows and be seen whole by neither.
        max_answer_tokens: tokens of the longest answer.
        allow_no_answer: whether "no answer" competes, for models that were trained on questions without one.
        batch_size: windows that are computed at once.

    Returns:
        `{"answer", "start", "end", "score"}`, where `context[start:end]` is the answer, without blanks at its ends; no
        answer is `""` from 0 to 0. With `top_k` a list of these, the best first, no two with the same characters
        (fewer than `top_k` where there are no more). For lists of questions, a list of that.

    Raises:
        TypeError: a slow tokenizer, a model without start and end logits, texts that are no texts.
        ValueError: an empty text, lists of unlike length, a question that leaves no room for the context, a tokenizer
            without a pad token, numbers that are not whole or out of range, rows without the three separators that
            stock Longformer looks for.
    """
    count = 1 if top_k is None else _whole("top_k", top_k)
    max_answer_tokens, batch_size = _whole("max_answer_tokens", max_answer_tokens), _whole("batch_size", batch_size)
    stride = None if stride is None else _whole("stride", stride, least=0)
    _check_tokenizer(tokenizer)
    max_length = _checked_length(max_length, tokenizer, model.config)
    single = isinstance(question, str)
    questions, contexts = _texts(question, context)
    rows = _rows(tokenizer, model.config, questions, contexts, max_length, stride)
    answers = []
    with _evaluating(model):
        windows = _with_logits(model, PaddingCollator(tokenizer, pad_to_multiple_of=1), rows, batch_size)
        for index, group in itertools.groupby(windows, key=lambda window: window[0]["example"]):
            answers.append(best_answers(contexts[index], list(group), max_answer_tokens, allow_no_answer, count))
    if top_k is None:
        answers = [best for [best] in answers]
    return answers[0] if single else answers


def window_starts(length, room, stride):
    """Where windows of `room` tokens begin, each sharing `stride` with the one before; the last ends the text."""
    if length <= room:
        return [0]
    return [*range(0, length - room, room - stride), length - room]


def context_windows(frame, question, ids, offsets, room, stride):
    """The question beside each window of the context, as rows.

    Args:
        frame: the Frame of the tokenizer.
        question, ids: token ids of the question and of the context.
        offsets: for each of `ids` the characters (from, to) that it stands for.
        room: tokens of the context in a row.
        stride: tokens that two neighbouring windows share, below `room`.

    Returns:
        The columns of `Frame.row` and `context_start` (the place in the row where the context begins), `window_start`
        (the number of the window's first token in the context) and `offsets` (of the window's tokens).
    """
    place = frame.start_of_second(question)
    return [
        frame.row(question, ids[start : start + room])
        | {"context_start": place, "window_start": start, "offsets": [list(o) for o in offsets[start : start + room]]}
        for start in window_starts(len(ids), room, stride)
    ]


def best_answers(context, windows, max_answer_tokens, allow_no_answer=False, top_k=1):
    """The best spans of a context, judged by all of its windows.

    A span's value is the start logit of its first token + the end logit of its last one, the highest among the windows
    that hold it. The value of "no answer" is start + end logit at the first token of a row, where training points if a
    window has no answer, and the lowest among the windows: each must say so.
    Source: Devlin et al. 2019, arXiv:1810.04805, sections 4.2 and 4.3.

    Args:
        windows: for each window its row from `context_windows`, its start logits and its end logits, (N,) each.

    Returns:
        As `answer` with `top_k`. A context without a token has no answer, allowed or not.
    """
    values, offsets = _span_values(windows, max_answer_tokens)
    starts, ends = _without_blanks(context, offsets)
    ends = ends[_lasts(*values.shape).clip(max=len(ends) - 1)]
    values[starts[:, None] >= ends] = -np.inf
    may_be_none, no_answer = allow_no_answer or not (values > -np.inf).any(), -np.inf
    if may_be_none:
        no_answer = min(float(start_logits[0]) + float(end_logits[0]) for _, start_logits, end_logits in windows)
    scores = torch.from_numpy(np.append(values, no_answer)).softmax(0).numpy()

    found = [(float(scores[-1]), 0, 0)] if may_be_none else []
    for _ in range(top_k):
        if not (values > -np.inf).any():
            break
        best = values.argmax()
        start, end = int(starts[best // values.shape[1]]), int(ends.flat[best])
        found.append((float(scores[best]), start, end))
        values[(starts[:, None] == start) & (ends == end)] = -np.inf
    found.sort(key=lambda each: -each[0])
    return [{"answer": context[a:b], "start": a, "end": b, "score": score} for score, a, b in found[:top_k]]


def _span_values(windows, longest):
    """((tokens, longest) float64: the value of the span from token i to token i + j, (tokens, 2) characters)."""
    count = max(row["window_start"] + len(row["offsets"]) for row, _, _ in windows)
    longest = min(longest, max(len(row["offsets"]) for row, _, _ in windows))
    values, offsets = np.full((count, longest), -np.inf), np.zeros((count, 2), dtype=np.int64)
    for row, start_logits, end_logits in windows:
        size = len(row["offsets"])
        in_row = slice(row["context_start"], row["context_start"] + size)
        here = slice(row["window_start"], row["window_start"] + size)
        starts, ends = (np.asarray(logits, dtype=np.float64)[in_row] for logits in (start_logits, end_logits))
        ends = np.append(ends, np.full(longest, -np.inf))[_lasts(size, longest)]
        values[here] = np.maximum(values[here], starts[:, None] + ends)
        offsets[here] = np.reshape(row["offsets"], (size, 2))
    return values, offsets


def _lasts(count, longest):
    """(count, longest): the last token of a span from token i on of j + 1 tokens."""
    return np.arange(count)[:, None] + np.arange(longest)


def _without_blanks(context, offsets):
    """(tokens,) the first character that is no blank from a token's beginning on, and the end of the last before its
    end. (Some tokenizers count the blank before a word as a part of it.)"""
    solid = np.flatnonzero([not character.isspace() for character in context])
    starts = np.append(solid, len(context))[np.searchsorted(solid, offsets[:, 0])]
    ends = np.append(0, solid + 1)[np.searchsorted(solid, offsets[:, 1])]
    return starts, ends


def _rows(tokenizer, config, questions, contexts, max_length, stride):
    """All windows of all questions, in order; `example` is the number of the question."""
    if not questions:
        return []
    frame = Frame(tokenizer, uses_token_types(tokenizer, config))
    room = max_length - len(frame.row([], [])["input_ids"])
    asked = tokenizer(questions, add_special_tokens=False, verbose=False)["input_ids"]
    read = tokenizer(contexts, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    rows = []
    for example, (question, ids) in enumerate(zip(asked, read["input_ids"], strict=True)):
        left = room - len(question)
        if left < 1 or (left < len(ids) and left < room // 2):
            raise ValueError(
                f"A question stands in each window beside a part of its context, half of the window if that is long; "
                f"question {example} has {len(question)} tokens, and max_length={max_length} leaves {max(room, 0)} "
                f"beside special tokens. Shorten the question, or pass a larger max_length."
            )
        shared = min(64, left // 2) if stride is None else stride
        if left < len(ids) and not 0 <= shared < left:
            raise ValueError(
                f"stride counts the tokens that two windows share, from 0 to {left - 1} beside question {example}, "
                f"got {stride}. Pass a smaller stride or a larger max_length."
            )
        windows = context_windows(frame, question, ids, read["offset_mapping"][example], left, shared)
        rows += [row | {"example": example} for row in windows]
    _check_separators(config, rows)
    return rows


def _with_logits(model, collator, rows, batch_size):
    """Each row with its start and end logits, (N,) float64."""
    for first in range(0, len(rows), batch_size):
        batch = rows[first : first + batch_size]
        inputs = {name: tensor.to(model.device) for name, tensor in collator(batch).items()}
        outputs = model(**inputs, return_dict=True)
        logits = [getattr(outputs, name, None) for name in ("start_logits", "end_logits")]
        if any(side is None for side in logits):
            raise TypeError(
                f"answer needs a model with start_logits and end_logits, {type(model).__name__} gives "
                f"{', '.join(outputs)}. Open it with AutoModelForQuestionAnswering."
            )
        yield from zip(batch, *(side.double().cpu().numpy() for side in logits), strict=True)


@contextlib.contextmanager
def _evaluating(model):
    """The model in evaluation mode; afterwards each of its modules is in the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _whole(name, number, least=1):
    """A number that was passed as `name`, as an int."""
    try:
        whole = None if isinstance(number, bool) else operator.index(number)
    except TypeError:
        whole = None
    if whole is None or whole < least:
        raise ValueError(
            f"{name} is a whole number from {least} on, got {number!r}. Pass one, or leave {name} out for its default."
        )
    return whole


def _check_separators(config, rows):
    """Longformer of transformers takes all before the first of three separators for the question, else it fails."""
    if config.model_type != "longformer":
        return
    for row in rows:
        found = row["input_ids"].count(config.sep_token_id)
        if found != 3:
            raise ValueError(
                f"Longformer finds the end of a question by three separators in a row (id {config.sep_token_id}, its "
                f"sep_token_id), question {row['example']} gives a row with {found}. Pass the tokenizer that belongs "
                f"to the model, and texts without separators."
            )


def _check_tokenizer(tokenizer):
    if not tokenizer.is_fast:
        raise TypeError(
            f"answer needs the characters that each token stands for, which only a fast tokenizer tells, got "
            f"{type(tokenizer).__name__}. Open the tokenizer.json of the model with AutoTokenizer."
        )
    if tokenizer.pad_token_id is None:
        raise ValueError(
            "answer pads windows to batches, and the tokenizer has no pad token. Set tokenizer.pad_token to one of "
            "its tokens; padding is not read."
        )


def _checked_length(max_length, tokenizer, config):
    if max_length is None:
        return window_length(None, tokenizer, config)
    max_length, positions = _whole("max_length", max_length), positions_of(config)
    if positions is not None and max_length > positions:
        raise ValueError(
            f"max_length is at most the model's {positions} positions (max_position_embeddings="
            f"{config.max_position_embeddings}), got {max_length}. Pass max_length={positions} or less."
        )
    return max_length


def _texts(question, context):
    """(questions, contexts) as lists."""
    if isinstance(question, str) != isinstance(context, str):
        raise TypeError(
            f"question and context are a text each or a list each, got {type(question).__name__} and "
            f"{type(context).__name__}. Repeat the one for each of the others: [context] * len(questions)."
        )
    questions, contexts = ([question], [context]) if isinstance(question, str) else (list(question), list(context))
    if len(questions) != len(contexts):
        raise ValueError(
            f"Each question has its context, got {len(questions)} questions and {len(contexts)} contexts. "
            f"Repeat a context for each of its questions."
        )
    for name, texts in (("question", questions), ("context", contexts)):
        for number, text in enumerate(texts):
            if not isinstance(text, str):
                raise TypeError(f"A {name} is a text, got {text!r} as number {number}. Pass strings.")
            if not text.strip():
                raise ValueError(f"A {name} is not empty, got {text!r} as number {number}. Leave the pair out.")
    return questions, contexts
