"""Packed tokens for kernels that look at every pair: a row for each document, just for the attention.

In one row of T tokens such a kernel would compute T × T scores, where the squares of the documents' lengths are meant.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.nn.functional import pad

from .packing import Packing, Tokens, runs_of_like_length


class Group(NamedTuple):
    """Documents of like length, a row for each.

    Attributes:
        shape: (documents, longest).
        mask: what the kernel's `mask` made of the rows.
        positions: (documents, longest), for biases by distance.
    """

    shape: tuple[int, int]
    mask: Any
    positions: torch.Tensor


class Rows(NamedTuple):
    """How T packed tokens are spread over the rows of all groups, S places in all.

    Attributes:
        places: (S,) which token stands there; T where none does.
        back: (T,) where each token stands.
        groups: one after the other.
    """

    places: torch.Tensor
    back: torch.Tensor
    groups: list[Group]


def by_rows(make_mask: Callable, attend: Callable) -> tuple[Callable, Callable]:
    """The `mask` and `attend` of a kernel, which take packed tokens as well."""

    def mask(pattern, query: Tokens, key: Tokens, packing: Packing, heads: range, user_mask: torch.Tensor | None):
        """The kernel's own mask of the grid, or Rows of packed tokens."""
        if not packing.is_packed or not query.document.numel():
            return make_mask(pattern, query, key, packing, heads, user_mask)
        groups = []
        places = group_by_length(query)
        for place in places:
            missing = place == query.document.shape[1]
            full = not bool(missing.any())
            inside = place.clamp(max=query.document.shape[1] - 1)
            rows = Tokens(*(None if x is None else x[0, inside] for x in query))
            rows = rows._replace(document=rows.document.masked_fill(missing, -1))
            own = Packing(rows, tuple(place.shape), all_real=full, one_document=True)
            groups.append(Group(own.shape, make_mask(pattern, rows, rows, own, heads, None), rows.position))
        places = torch.cat([place.flatten() for place in places])
        real = (places < query.document.shape[1]).nonzero().squeeze(1)
        back = torch.empty_like(real)
        back[places[real]] = real
        return Rows(places, back, groups)

    @torch.compiler.disable(reason="how many groups there are differs from batch to batch")
    def attend_groups(query, key, value, mask: Rows, scoring, dropout):
        bias = scoring.bias
        second = None if bias is None or bias.query is None else _spread(bias.query, mask)
        heads = []
        parts = zip(*(_spread(x, mask) for x in (query, key, value)), second or mask.groups, mask.groups, strict=True)
        for q, k, v, own, group in parts:
            if bias is not None:
                positions = {"query_position": group.positions, "key_position": group.positions}
                scoring = scoring._replace(bias=bias._replace(query=own if second else None, **positions))
            heads.append(attend(q, k, v, group.mask, scoring, dropout, False)[0].flatten(0, 1))
        return _Take.apply(torch.cat(heads), mask.back, mask.places).unsqueeze(0)

    def attend_rows(query, key, value, mask, scoring, dropout=0.0, need_weights=False):
        if isinstance(mask, Rows):
            return attend_groups(query, key, value, mask, scoring, dropout), None
        return attend(query, key, value, mask, scoring, dropout, need_weights)

    return mask, attend_rows


def group_by_length(tokens: Tokens) -> list[torch.Tensor]:
    """For each group of documents of packed Tokens (1, T), which tokens stand where: (documents, longest), T: none."""
    _, lengths = tokens.document[0].unique_consecutive(return_counts=True)
    starts, device = lengths.cumsum(0) - lengths, lengths.device
    lengths, order = lengths.sort(descending=True, stable=True)
    starts, groups = starts[order], []
    for longest, first, end in runs_of_like_length(lengths.tolist()):
        offset = torch.arange(longest, device=device)
        inside = offset < lengths[first:end, None]
        groups.append(torch.where(inside, starts[first:end, None] + offset, tokens.document.shape[1]))
    return groups


def _spread(x: torch.Tensor, rows: Rows) -> list[torch.Tensor]:
    """(1, T, …) to (documents, longest, …) of each group."""
    sizes = [documents * longest for documents, longest in (group.shape for group in rows.groups)]
    parts = _Take.apply(x.squeeze(0), rows.places, rows.back).split(sizes)
    return [part.unflatten(0, group.shape) for part, group in zip(parts, rows.groups, strict=True)]


class _Take(torch.autograd.Function):
    """x[places], 0 where a place is one past the end; its backward takes from the gradient at `back`, the way back, so
    that both are gathers, where indexing would scatter."""

    @staticmethod
    def forward(x, places, back):
        if len(places) > len(x):
            x = pad(x, (0, 0) * (x.dim() - 1) + (0, 1))
        return x.index_select(0, places)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx, grad):
        places, back = ctx.saved_tensors
        return _Take.apply(grad, back, places), None, None
