"""Who sees whom? Checks of the doctor on a model's answers, each (Examination) -> Findings.

They run a few short rows of random ordinary tokens through a copy in float64 (`Examination.exact`).
"""

import copy

import torch

from .convert_families import position_offset
from .doctor_examination import error, first_line, note, warning

ORDER_MATTERS = 1e-5
"""What the order of the others changes in a token's answer at least, as a share of what other ones there change.

New models of 8 to 128 dimensions with rotary positions have 2e-3 and more, models without positions 1e-13 and less; a
softmax in float32 may round by 1e-7.
"""


def difference(actual, expected):
    """The largest |difference| / max(1, |value|); infinite where one is NaN and the other is not."""
    error = (actual - expected).abs() / expected.abs().clamp(min=1)
    same = (actual == expected) | (actual.isnan() & expected.isnan())
    error = torch.where(same, 0, error).nan_to_num(nan=torch.inf)
    return error.max().item() if error.numel() else 0.0


def check_forward(examination):
    """The model reads a batch, and its answers are numbers."""
    ids = examination.ids(examination.lengths)
    try:
        answers = examination.answers(ids, torch.ones_like(ids))
    except Exception as failure:  # other people's code raises whatever it likes
        yield error(
            f"The model does not take a plain batch of input_ids and attention_mask: {first_line(failure)}",
            "Do what the message says; a model that needs more than these two cannot be examined any further.",
        )
        return
    if not answers.isfinite().all():
        yield error(
            "The model's answers to a plain batch are NaN or infinite.",
            "Look for the first layer that gives them (output_hidden_states=True); half precision may be too "
            "narrow for these weights.",
        )


def check_repeatable(examination):
    """In evaluation mode the same batch has the same answers."""
    ids = examination.ids(examination.lengths)
    first, second = examination.answers(ids), examination.answers(ids)
    if not torch.equal(first, second):
        yield error(
            "In evaluation mode the same batch gives other answers the second time (by "
            f"{difference(second, first):.2g}): something random is left on.",
            "Call dropout with training=self.training, and draw nothing at random in the forward.",
        )


def _grid(examination, side):
    """(ids (B, N), mask (B, N), rows of ids without padding), padded with the pad token."""
    lengths = examination.lengths
    rows = [row[:length] for row, length in zip(examination.ids(lengths), lengths, strict=True)]
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    mask = mask.flip(1) if side == "left" else mask
    pad = getattr(examination.config, "pad_token_id", None)
    if pad is None and examination.tokenizer is not None:
        pad = examination.tokenizer.pad_token_id
    ids = torch.full(mask.shape, 0 if pad is None else pad)
    ids[mask] = torch.cat(rows)
    return ids, mask.long(), rows


def _padded_against_alone(examination, side):
    model, _ = examination.exact
    ids, mask, rows = _grid(examination, side)
    together = examination.answers(ids, mask, model)
    found = 0.0
    for answer, real, row in zip(together, mask.bool(), rows, strict=True):
        alone = examination.answers(row[None], torch.ones(1, len(row), dtype=torch.long), model)[0]
        found = max(found, difference(answer[real] if examination.judges_tokens else answer, alone))
    return found


def check_padding(examination):
    """What has attention_mask 0 is not attended to: neither a token in the middle nor padding at either end."""
    model, tolerance = examination.exact
    ids = examination.ids(examination.lengths)
    mask = torch.ones_like(ids)
    mask[:, 3:5] = 0
    changed = ids.clone()
    changed[:, 3:5] = examination.ids(examination.lengths, seed=1)[:, 3:5]
    before, after = (examination.answers(x, mask, model) for x in (ids, changed))
    if examination.judges_tokens:
        before, after = before[mask.bool()], after[mask.bool()]
    found = difference(after, before)
    if found > tolerance:
        yield error(
            f"Tokens with attention_mask 0 are attended to: other tokens there change the answers by {found:.2g}.",
            "Hand the mask to the attention in the form that its kernel wants (an own kernel is registered in "
            "AttentionMaskInterface too), and leave masked tokens out of pooling.",
        )
        return
    found = _padded_against_alone(examination, "right")
    if found > tolerance:
        yield error(
            f"A text padded on the right has other answers than alone, by {found:.2g}.",
            "Look at what reads the length of the batch instead of the mask: pooling, positions, norms over tokens.",
        )
        return
    found = _padded_against_alone(examination, "left")
    if found > tolerance:
        pads_left = examination.tokenizer is not None and examination.tokenizer.padding_side == "left"
        remedies = {
            (True, True): "Pass position_ids that begin at the first real token (generate does).",
            (True, False): "Set padding_side to 'right' in the tokenizer.",
        }
        yield (error if pads_left and not examination.is_causal else note)(
            f"A text padded on the left has other answers than alone, by {found:.2g}: positions or pooling count "
            "the padding.",
            remedies.get((pads_left, examination.is_causal), "Pad on the right, as this tokenizer does."),
        )


def check_empty_row(examination):
    """A row that is padding alone does no harm."""
    ids, mask, _ = _grid(examination, "right")
    mask[1] = 0
    answers = examination.answers(ids, mask)
    if not answers[[0, 2]].isfinite().all():
        yield error(
            "One row that is padding alone makes the answers of other rows NaN.",
            "Give queries that see nothing 0 instead of a softmax over nothing.",
        )
    elif not answers[1].isfinite().all():
        yield warning(
            "The answers for a row that is padding alone are NaN; a loss or a mean over them is NaN too.",
            "Leave such rows out, or use a kernel that gives 0 there (attn_implementation).",
        )


def check_direction(examination):
    """Tokens see what is after them in an encoder, and do not in a causal model."""
    model, tolerance = examination.exact
    ids = examination.ids(examination.lengths)
    half = ids.shape[1] // 2
    changed = ids.clone()
    changed[:, half:] = examination.ids(examination.lengths, seed=1)[:, half:]
    found = difference(*(examination.answers(x, model=model)[:, :half] for x in (changed, ids)))
    if examination.is_causal and found > tolerance:
        yield error(
            f"The model is causal, and later tokens change the answers of earlier ones by {found:.2g}.",
            "Set is_causal on the attention module and hand it the causal mask: a kernel given a mask of its own "
            "is not causal by itself.",
        )
    if not examination.is_causal and not found:
        yield error(
            "The model is an encoder, and no later token changes the answer of an earlier one: it looks back "
            "only, or not at all.",
            "Set is_causal = False on the attention module: transformers' sdpa is causal where there is no mask "
            "and no such attribute.",
        )


def check_order(examination):
    """The order of the tokens matters: to each token's answer, for a mean over tokens hides much of it."""
    if getattr(examination.config, "position_encoding", None) == "none":
        return
    model, _ = examination.exact
    ids = examination.ids(examination.lengths[:1])
    order = torch.cat((torch.arange(1, ids.shape[1], 2), torch.arange(0, ids.shape[1], 2)))
    others = torch.cat((examination.ids(examination.lengths[:1], seed=1)[:, :-1], ids[:, -1:]), dim=1)
    straight, shuffled, replaced = (examination.of_tokens(x, model) for x in (ids, ids[:, order], others))
    of_order, of_others = difference(shuffled, straight[:, order]), difference(replaced[:, -1], straight[:, -1])
    if of_order < ORDER_MATTERS * of_others:
        yield error(
            "With its tokens in another order a text has the same answers: positions have no effect.",
            "Look at the position embeddings (loaded, not 0, added) or at the rotation of query and key.",
        )


def check_documents(examination):
    """Documents that share a row, told apart by position_ids that restart, do not see each other."""
    if not examination.takes("position_ids"):
        return
    model, tolerance = examination.exact
    lengths = examination.lengths[-2:]
    first, second = (row[:length] for row, length in zip(examination.ids(lengths), lengths, strict=True))
    places = torch.cat([torch.arange(length) for length in lengths])[None] + position_offset(examination.config)
    together = examination.answers(torch.cat((first, second))[None], model=model, position_ids=places)
    alone = examination.answers(second[None], model=model)
    found = difference(together[:, lengths[0] :], alone)
    if found <= tolerance:
        return
    if examination.config.model_type == "selfattn":
        yield error(
            f"Documents in one row see each other: the answers change by {found:.2g}.",
            "Open the model with the code of this package.",
        )
    else:
        yield note(
            "Documents in one row see each other, position_ids that restart or not: the answers change by "
            f"{found:.2g}.",
            "Train with one document a row, or convert the model (python -m hf_selfattn.tools.convert), whose "
            "documents are kept apart.",
        )


def check_kernel(examination):
    """The kernel gives the numbers of eager."""
    model, tolerance = examination.exact
    kernel = model.config._attn_implementation
    if kernel == "eager":
        return
    plain = copy.deepcopy(model)
    plain.set_attn_implementation("eager")
    for side in ("right", None):
        ids, mask, _ = _grid(examination, "right")
        if side is None:
            ids, mask = ids[:1], torch.ones_like(mask[:1])
        pair = [examination.answers(ids, mask, x) for x in (model, plain)]
        if examination.judges_tokens:
            pair = [x[mask.bool()] for x in pair]
        if difference(*pair) > tolerance:
            yield error(
                f"attn_implementation {kernel!r} gives other numbers than 'eager', by {difference(*pair):.2g}.",
                "Open the model with attn_implementation='eager', and correct the kernel: its mask, scale or dropout.",
            )
            return
