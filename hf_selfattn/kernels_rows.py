"""Packed tokens for kernels that look at every pair: a row for each document, just for the attention.

In one row of T tokens such a kernel would compute T × T scores, where the squares of the documents' lengths are meant.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.nn.functional import pad

from .packing import Packing, Tokens


class Rows(NamedTuple):
    """How T packed tokens are spread over rows, and the kernel's own mask of these rows.

    Attributes:
        places: (documents, longest) which token stands there; T where none does.
        back: (T,) where each token stands among documents * longest.
        mask: what the kernel's `mask` made of the rows.
        positions: (documents, longest), for biases by distance.
    """

    places: torch.Tensor
    back: torch.Tensor
    mask: Any
    positions: torch.Tensor


def by_rows(make_mask: Callable, attend: Callable) -> tuple[Callable, Callable]:
    """The `mask` and `attend` of a kernel, which take packed tokens as well."""

    def mask(pattern, query: Tokens, key: Tokens, packing: Packing, heads: range, user_mask: torch.Tensor | None):
        if not packing.is_packed or not query.document.numel():
            return make_mask(pattern, query, key, packing, heads, user_mask)
        places, back = spread(query)
        full = len(back) == places.numel()
        rows = Tokens(*(None if x is None else _rows_of(x.squeeze(0), places, full) for x in query))
        if not full:
            rows = rows._replace(document=rows.document.masked_fill(places == len(back), -1))
        own = Packing(rows, tuple(places.shape), all_real=full, one_document=True)
        return Rows(places, back, make_mask(pattern, rows, rows, own, heads, None), rows.position)

    def attend_rows(query, key, value, mask, scoring, dropout=0.0, need_weights=False):
        if not isinstance(mask, Rows):
            return attend(query, key, value, mask, scoring, dropout, need_weights)
        bias = scoring.bias
        if bias is not None:
            second = None if bias.query is None else _Spread.apply(bias.query.squeeze(0), mask.places, mask.back)
            positions = {"query_position": mask.positions, "key_position": mask.positions}
            scoring = scoring._replace(bias=bias._replace(query=second, **positions))
        query, key, value = (_Spread.apply(x.squeeze(0), mask.places, mask.back) for x in (query, key, value))
        heads, weights = attend(query, key, value, mask.mask, scoring, dropout, need_weights)
        return _Gather.apply(heads, mask.places, mask.back).unsqueeze(0), weights

    return mask, attend_rows


def spread(tokens: Tokens) -> tuple[torch.Tensor, torch.Tensor]:
    """`Rows.places` and `Rows.back` of packed Tokens (1, T)."""
    _, number, lengths = tokens.document[0].unique_consecutive(return_inverse=True, return_counts=True)
    first, longest, device = lengths.cumsum(0) - lengths, int(lengths.max()), lengths.device
    offset = torch.arange(longest, device=device)
    places = torch.where(offset < lengths[:, None], first[:, None] + offset, len(number))
    back = number * longest + torch.arange(len(number), device=device) - first[number]
    return places, back


def _rows_of(x: torch.Tensor, places: torch.Tensor, full: bool) -> torch.Tensor:
    """(T, …) to (documents, longest, …), 0 where no token stands."""
    x = x if full else pad(x, (0, 0) * (x.dim() - 1) + (0, 1))
    return x.index_select(0, places.flatten()).unflatten(0, places.shape)


class _Spread(torch.autograd.Function):
    """(T, …) to (documents, longest, …) and back in the backward: gathers both, where indexing would scatter."""

    @staticmethod
    def forward(x, places, back):
        return _rows_of(x, places, places.numel() == len(back))

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx, grad):
        places, back = ctx.saved_tensors
        return _Gather.apply(grad, places, back), None, None


class _Gather(torch.autograd.Function):
    """(documents, longest, …) to (T, …), and back in the backward."""

    @staticmethod
    def forward(x, places, back):
        return x.flatten(0, 1).index_select(0, back)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx, grad):
        places, back = ctx.saved_tensors
        return _Spread.apply(grad, places, back), None, None
