"""Kernels that look at every pair of query and key: the mask that they share, and torch's fused attention."""

import torch
from torch.nn import functional as F

from .biases import dense_bias
from .kernels_eager import attend as attend_eager
from .masks import allowed
from .packing import Packing, Tokens
from .patterns import Full
from .scores import SCORES, Scoring


def mask(
    pattern, query: Tokens, key: Tokens, packing: Packing, heads: range, user_mask: torch.Tensor | None
) -> torch.Tensor | None:
    """bool (R, 1 or H, N, K), True where a query may see a key; None where it is known that all see all."""
    all_see_all = isinstance(pattern, Full) and not pattern.causal and packing.all_real and packing.one_document
    return None if all_see_all and user_mask is None else allowed(pattern, query, key, heads, user_mask)


def attend_sdpa(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scoring: Scoring,
    dropout: float = 0.0,
    need_weights: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """As `kernels_eager.attend`, by torch's fused attention; with `need_weights` it is `kernels_eager.attend`."""
    if need_weights:
        return attend_eager(query, key, value, mask, scoring, dropout, need_weights)
    (scale,) = scoring.parameters
    if scoring.bias is not None:
        bias = dense_bias(scoring.bias)
        mask = bias if mask is None else bias.masked_fill(~mask, float("-inf"))
        mask = mask.to(query.dtype)
    heads = F.scaled_dot_product_attention(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        attn_mask=mask,
        dropout_p=dropout,
        scale=scale,
        enable_gqa=query.shape[2] != key.shape[2],
    )
    return heads.transpose(1, 2), None


def eager_reasons(config, device_type: str | None, dtype: torch.dtype | None, training: bool | None) -> list[str]:
    """Eager computes everything."""
    return []


def sdpa_reasons(config, device_type: str | None, dtype: torch.dtype | None, training: bool | None) -> list[str]:
    """torch's fused attention computes dot products with a bias, and nothing else."""
    return dot_product_reasons(config)


def dot_product_reasons(config) -> list[str]:
    """What a fused kernel for plain dot products cannot compute."""
    found = []
    if not SCORES[config.score_function].is_dot_product:
        found.append(f"score_function {config.score_function!r} is not a dot product")
    if config.logit_softcap is not None:
        found.append(f"it has no soft cap, and logit_softcap is {config.logit_softcap}")
    if config.attention_sink:
        found.append("it has no attention sinks, and attention_sink is True")
    return found
