"""Losses that stay right however a batch is split.

Each is a sum over labelled items divided by `num_items_in_batch` where the Trainer gives it (the labelled items of all
accumulation steps and processes), else by the items here; by 1 where there are none, so that a batch without any label
gives 0 with zero gradients. A label of -100 is no label.
"""

import torch
from torch.nn import functional as F

from .packing import values_can_be_read

IGNORED = -100


def _mean(total: torch.Tensor, count: torch.Tensor, num_items_in_batch) -> torch.Tensor:
    items = count if num_items_in_batch is None else torch.as_tensor(num_items_in_batch, device=total.device)
    return total / items.clamp(min=1)


def check_labels(labels: torch.Tensor, shape: tuple[int, ...]) -> None:
    """Raises ValueError unless there is one label for each place of `shape`."""
    if tuple(labels.shape) != tuple(shape):
        raise ValueError(
            f"The model gives answers of shape {tuple(shape)} and needs a label for each, got labels of shape "
            f"{tuple(labels.shape)}. Pad labels with -100 where there is nothing to predict."
        )


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor, num_items_in_batch=None) -> torch.Tensor:
    """Mean cross-entropy in nats, computed in at least fp32.

    Args:
        logits: (…, classes).
        labels: (…), class numbers, or -100 for none.
        num_items_in_batch: what to divide the sum by, or None.

    Raises:
        ValueError: if shapes do not fit.
    """
    check_labels(labels, logits.shape[:-1])
    labels = labels.to(logits.device)
    logits, flat = logits.reshape(-1, logits.shape[-1]), labels.reshape(-1)
    labelled = flat != IGNORED
    if values_can_be_read(flat):
        # Only labelled rows are copied to fp32.
        rows = labelled.nonzero().squeeze(1)
        logits, flat = logits.index_select(0, rows), flat.index_select(0, rows)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    total = F.cross_entropy(logits, flat, ignore_index=IGNORED, reduction="sum")
    return _mean(total, labelled.sum(), num_items_in_batch)


LOGITS_AT_ONCE = 2**24
"""Logits that `linear_cross_entropy` holds at once."""

EXACT_AT_ONCE = 2**18
"""Of these, as many in fp32 as stay near a processor's core."""


def linear_cross_entropy(
    hidden_states: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    labels: torch.Tensor,
    num_items_in_batch=None,
) -> torch.Tensor:
    """`cross_entropy` of hidden_states W^T + b without keeping the logits: their gradient is made with them.

    Under autocast the logits are of its type, their softmax is in at least fp32 all the same.

    Args:
        hidden_states: (n, D).
        weight, bias: (V, D), (V,) or None.
        labels: (n,) class numbers, none of them -100.
        num_items_in_batch: as in `cross_entropy`.
    """
    total = _LinearCrossEntropy.apply(hidden_states, weight, bias, labels.to(hidden_states.device))
    return _mean(total, torch.tensor(len(labels), device=total.device), num_items_in_batch)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_states, weight, bias, labels):
        kind = hidden_states.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
        exact = torch.promote_types(dtype, torch.float32)
        low_hidden, low_weight = hidden_states.to(dtype), weight.to(dtype)
        total = torch.zeros((), dtype=exact, device=labels.device)
        of_hidden, of_weight = torch.empty_like(hidden_states), None
        of_bias = torch.zeros_like(bias, dtype=exact) if ctx.needs_input_grad[2] else None
        at_once, few = (max(1, count // len(weight)) for count in (LOGITS_AT_ONCE, EXACT_AT_ONCE))
        with torch.autocast(kind, enabled=False):
            for first in range(0, len(labels), at_once):
                rows = slice(first, first + at_once)
                logits = low_hidden[rows] @ low_weight.t()
                for part, label in zip(logits.split(few), labels[rows].unsqueeze(1).split(few), strict=True):
                    exact_part = part.to(exact)
                    if bias is not None:
                        exact_part += bias
                    log_share = exact_part.log_softmax(-1)
                    total -= log_share.gather(1, label).sum()
                    share = log_share.exp_()
                    share.scatter_add_(1, label, share.new_full(label.shape, -1))
                    part.copy_(share)
                    if of_bias is not None:
                        of_bias += share.sum(0)
                of_hidden[rows] = logits @ low_weight
                if ctx.needs_input_grad[1]:
                    # Written (D, V): the narrow side is the one to transpose for the product, twice as fast on a CPU.
                    product = low_hidden[rows].t().contiguous() @ logits
                    of_weight = product if of_weight is None else of_weight.to(exact).add_(product)
        if ctx.needs_input_grad[1] and of_weight is None:
            of_weight = torch.zeros_like(weight.t())
        ctx.types = [None if x is None else x.dtype for x in (hidden_states, weight, bias)]
        ctx.save_for_backward(of_hidden, of_weight, of_bias)
        return total

    @staticmethod
    def backward(ctx, grad):
        if torch.is_grad_enabled():
            raise RuntimeError(
                "The masked language model's loss in training keeps no logits and has no second derivatives. Call "
                "model.eval() and model.set_attn_implementation('eager') before a backward with create_graph=True."
            )
        of_hidden, of_weight, of_bias = ctx.saved_tensors
        grads = (of_hidden, None if of_weight is None else of_weight.t(), of_bias)
        return *(None if x is None else x.to(dtype, memory_format=torch.contiguous_format, copy=True).mul_(grad)
                 for x, dtype in zip(grads, ctx.types, strict=True)), None  # fmt: skip


def classification_loss(
    logits: torch.Tensor, labels: torch.Tensor, problem_type: str, num_items_in_batch=None
) -> torch.Tensor:
    """The loss of a classifier of whole texts.

    Args:
        logits: (B, num_labels).
        labels: (B,) class numbers for "single_label_classification"; (B, num_labels) of 0 and 1 for
            "multi_label_classification"; (B,) or (B, num_labels) numbers for "regression".
        num_items_in_batch: the number of entries of `labels` that are not -100, or None.

    Raises:
        ValueError: if shapes do not fit.
    """
    labels = labels.to(logits.device)
    if problem_type == "single_label_classification":
        labels = labels.squeeze(-1) if labels.dim() == 2 and labels.shape[1] == 1 else labels
        return cross_entropy(logits, labels, num_items_in_batch)
    if labels.shape != logits.shape and not (logits.shape[-1] == 1 and labels.numel() == logits.shape[0]):
        raise ValueError(
            f"{problem_type} needs a label for each of the {logits.shape[-1]} outputs of each of the "
            f"{logits.shape[0]} texts, got labels of shape {tuple(labels.shape)}. Set num_labels to fit the labels."
        )
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    labels = labels.view_as(logits).to(logits.dtype)
    labelled = labels != IGNORED
    of = F.mse_loss if problem_type == "regression" else F.binary_cross_entropy_with_logits
    each = of(logits, torch.where(labelled, labels, 0), reduction="none")
    return _mean(torch.where(labelled, each, 0).sum(), labelled.sum(), num_items_in_batch)


def span_loss(
    start_logits: torch.Tensor,
    end_logits: torch.Tensor,
    start_positions: torch.Tensor,
    end_positions: torch.Tensor,
    real: torch.Tensor,
) -> torch.Tensor:
    """Mean of the cross-entropies of the first and the last token of the answer over the real tokens of each row.

    Args:
        start_logits, end_logits: (B, N).
        start_positions, end_positions: (B,); a place outside 0 … N - 1 or at padding is no label.
        real: (B, N) bool, False at padding.
    """
    sides, real = [], real.to(start_logits.device)
    for logits, place in ((start_logits, start_positions), (end_logits, end_positions)):
        place = place.to(logits.device).reshape(-1)
        inside = (place >= 0) & (place < logits.shape[1])
        inside = inside & real.gather(1, torch.where(inside, place, 0).unsqueeze(1)).squeeze(1)
        # A row without a label keeps finite logits, so that its gradient is 0 and not NaN.
        logits = logits.masked_fill(~real & inside.unsqueeze(1), float("-inf"))
        sides.append(cross_entropy(logits, torch.where(inside, place, IGNORED)))
    return (sides[0] + sides[1]) / 2
