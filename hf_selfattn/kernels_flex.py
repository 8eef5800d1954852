"""torch's flex attention: whole blocks of pairs that nobody may see are skipped."""

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import torch

from .kernels_dense import dot_product_reasons
from .kernels_eager import attend as attend_eager
from .masks import allowed, visible
from .packing import Packing, Tokens
from .positions import POSITIONS
from .scores import Scoring


class FlexMask(NamedTuple):
    """flex's own mask, what its rule and (where weights are wanted) the dense mask are made from, and where."""

    blocks: Any
    pattern: Any
    query: Tokens
    key: Tokens
    heads: range
    user_mask: torch.Tensor | None
    device: torch.device


def mask(
    pattern, query: Tokens, key: Tokens, packing: Packing, heads: range, user_mask: torch.Tensor | None
) -> FlexMask:
    """A BlockMask of who sees whom, made from the same rule as the dense mask."""
    from torch.nn.attention.flex_attention import create_block_mask

    (rows, num_queries), device = query.document.shape, query.document.device
    if not (query.document.numel() and key.document.numel()):
        return FlexMask(None, pattern, query, key, heads, user_mask, device)
    by_head = pattern.per_head or (user_mask is not None and user_mask.shape[1] > 1)
    blocks = create_block_mask(
        _rule(pattern, query, key, heads, user_mask),
        B=rows,
        H=len(heads) if by_head else None,
        Q_LEN=num_queries,
        KV_LEN=key.document.shape[1],
        device=device,
    )
    return FlexMask(blocks, pattern, query, key, heads, user_mask, device)


def _rule(pattern, query: Tokens, key: Tokens, heads: range, user_mask: torch.Tensor | None) -> Callable:
    """Who sees whom as flex asks it: by row, head and the indices of query and key."""

    def may_see(row, head, query_index, key_index):
        seen = visible(pattern, head + heads.start, query.at((row, query_index)), key.at((row, key_index)))
        if user_mask is None:
            return seen
        return seen & user_mask[row, head if user_mask.shape[1] > 1 else 0, query_index, key_index]

    return may_see


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: FlexMask,
    scoring: Scoring,
    dropout: float = 0.0,
    need_weights: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """As `kernels_eager.attend`, by `flex_attention`; with `need_weights` it is `kernels_eager.attend`."""
    if need_weights or mask.blocks is None:
        dense = allowed(mask.pattern, mask.query, mask.key, mask.heads, mask.user_mask)
        return attend_eager(query, key, value, dense, scoring, dropout, need_weights)
    if dropout > 0:
        raise ValueError(f"flex_attention has no dropout of weights, got {dropout}. {_WAY_OUT}.")
    if query.requires_grad and query.device.type == "cpu":
        raise ValueError(f"flex_attention has no backward on a CPU. {_WAY_OUT}, or torch.no_grad() for values alone.")
    if mask.device != query.device:
        # Moved to a layer on another device, blocks are copies, and their rule still reads tensors of the first one.
        mask.blocks.mask_mod = _rule(mask.pattern, mask.query, mask.key, mask.heads, mask.user_mask)
    (scale,) = scoring.parameters
    heads = _flex_attention(query.device.type)(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        block_mask=mask.blocks,
        scale=scale,
        enable_gqa=query.shape[2] != key.shape[2],
    )
    return heads.transpose(1, 2), None


_WAY_OUT = "Use attn_implementation='sdpa' or 'eager'"


@lru_cache
def _flex_attention(device_type: str):
    from torch.nn.attention.flex_attention import flex_attention

    # Compiling for a CPU takes about 10 s for each new shape.
    return flex_attention if device_type == "cpu" else torch.compile(flex_attention)


def reasons(config, device_type: str | None, dtype: torch.dtype | None, training: bool | None) -> list[str]:
    """What flex attention cannot compute."""
    found = dot_product_reasons(config)
    if POSITIONS[config.position_encoding].is_bias:
        found.append(f"it has no biases by distance, and position_encoding is {config.position_encoding!r}")
    if training and config.attention_dropout > 0:
        found.append(f"it has no dropout of weights, and attention_dropout is {config.attention_dropout}")
    if training and device_type == "cpu":
        found.append("it has no backward on a CPU (for values alone: model.eval() and torch.no_grad())")
    return found
