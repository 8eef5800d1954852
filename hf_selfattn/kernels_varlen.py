"""torch's flash attention over documents of any length: the road of 'sdpa' for real tokens on a GPU.

It takes boundaries where the dense road takes a mask, and never sees a pair of two documents.
"""

import inspect
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import torch

from .packing import Packing, Tokens, values_can_be_read
from .patterns import Full, SlidingWindow
from .positions import POSITIONS

DEVICES = ("cuda",)
HALF = (torch.bfloat16, torch.float16)
WIDEST = 256
"""Numbers in a head, at most."""


class Documents(NamedTuple):
    """What flash attention is told of a batch.

    Attributes:
        boundaries: (documents + 1,) int32, from 0 to the number of tokens.
        longest: tokens of the longest document.
        window: how many tokens to the left and to the right are seen; -1: all.
        other: what the dense road's mask is made from (pattern, query, key, packing, heads, user_mask), or, where it
            is likely to be needed, what was made.
        is_made: which of the two `other` is.
    """

    boundaries: torch.Tensor
    longest: int
    window: tuple[int, int]
    other: Any
    is_made: bool


def varlen_reasons(config) -> list[str]:
    """Why flash attention over boundaries cannot compute what `config` asks for, beside its kernel's own reasons."""
    found = []
    if POSITIONS[config.position_encoding].is_bias:
        found.append(f"it takes no bias, and position_encoding is {config.position_encoding!r}")
    if config.attention_dropout:
        found.append(f"it has no dropout, and attention_dropout is {config.attention_dropout}")
    if config.query_key_dim != config.value_dim or config.value_dim > WIDEST or config.value_dim % 8:
        found.append(
            f"it takes query, key and value of one width, a multiple of 8 up to {WIDEST}, and they have "
            f"{config.query_key_dim}, {config.query_key_dim} and {config.value_dim}"
        )
    return found


def window_of(pattern) -> tuple[int, int] | None:
    """(left, right) tokens that a query sees, -1 for all; None for a pattern that is more than that."""
    if type(pattern) is Full:
        reach = -1
    elif type(pattern) is SlidingWindow and pattern.dilation == 1:
        reach = pattern.window_radius
    else:
        return None
    return reach, 0 if pattern.causal else reach


def with_varlen(make_mask: Callable, attend: Callable) -> tuple[Callable, Callable]:
    """The `mask` and `attend` of a kernel, which leaves to flash attention what that can compute."""

    def mask(pattern, query: Tokens, key: Tokens, packing: Packing, heads: range, user_mask: torch.Tensor | None):
        """Documents, or the kernel's own mask."""
        who = (pattern, query, key, packing, heads, user_mask)
        window, device = window_of(pattern), query.document.device.type
        without_padding = packing.is_packed or (packing.all_real and values_can_be_read(query.document))
        able = without_padding and key is query and user_mask is None and query.document.numel() > 0
        if window is None or device not in DEVICES or not able:
            return make_mask(*who)
        _, lengths = query.document.flatten().unique_consecutive(return_counts=True)
        boundaries = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
        if window != (-1, -1) and not _in_order(query.position.flatten(), boundaries, lengths):
            return make_mask(*who)
        # Outside of autocast the tokens may be fp32, which goes the dense road; its mask is made once then.
        half = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) in HALF
        return Documents(boundaries, int(lengths.max()), window, who if half else make_mask(*who), not half)

    def attend_documents(query, key, value, mask, scoring, dropout=0.0, need_weights=False):
        """As the kernel's own `attend`; of Documents, flash attention takes those in half precision."""
        if not isinstance(mask, Documents):
            return attend(query, key, value, mask, scoring, dropout, need_weights)
        if need_weights or value.dtype not in HALF:
            own = mask.other if mask.is_made else make_mask(*mask.other)
            return attend(query, key, value, own, scoring, dropout, need_weights)
        flash, shares_keys = _varlen_attn()
        grouped = query.shape[2] != key.shape[2]
        options = {"enable_gqa": True} if grouped and shares_keys else {}
        if grouped and not shares_keys:
            key, value = (x.repeat_interleave(query.shape[2] // x.shape[2], dim=2) for x in (key, value))
        parts = (x.to(value.dtype).flatten(0, 1) for x in (query, key, value))
        sizes = (mask.boundaries, mask.boundaries, mask.longest, mask.longest)
        heads = flash(*parts, *sizes, scale=scoring.parameters[0], window_size=mask.window, **options)
        return heads.view(query.shape), None

    return mask, attend_documents


@lru_cache
def _varlen_attn() -> tuple[Callable, bool]:
    """torch's function, and whether it lets heads share keys (torch 2.11 does not); slow to import."""
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn, "enable_gqa" in inspect.signature(varlen_attn).parameters


def _in_order(position: torch.Tensor, boundaries: torch.Tensor, lengths: torch.Tensor) -> bool:
    """Whether positions count up by one in each document, so that a distance is one of places."""
    start = boundaries[:-1].long().repeat_interleave(lengths)
    place = torch.arange(len(position), device=position.device)
    return bool((position - position[start] == place - start).all())
