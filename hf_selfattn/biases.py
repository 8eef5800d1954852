"""Biases: what a position adds to the scores, by distance; no matrix (N, K) until a kernel needs a tile of it.

Distance is key position - query position.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from .packing import values_can_be_read


class Bias(NamedTuple):
    """What a kernel needs to make any tile of a bias: names, numbers and tensors.

    Attributes:
        name: the row of BIASES that computes it.
        parameters: numbers, and tensors with heads first.
        query: (R, N, H, d_k) a second query for biases that depend on it, or None.
        query_position: (R, N).
        key_position: (R, K).
    """

    name: str
    parameters: tuple
    query: torch.Tensor | None
    query_position: torch.Tensor
    key_position: torch.Tensor


def alibi(distance: torch.Tensor, query: Any, slopes: torch.Tensor) -> torch.Tensor:
    """-slope * |distance|, symmetric. Args: distance (…, 1, N, K), slopes (H,). Returns (…, H, N, K)."""
    return -slopes[..., None, None].to(torch.promote_types(slopes.dtype, torch.float32)) * distance.abs()


def by_distance(distance: torch.Tensor, query: Any, table: torch.Tensor) -> torch.Tensor:
    """table (H, 2r + 1) read at distance + r; greater distances read its ends. Returns (…, H, N, K)."""
    reach = table.shape[-1] // 2
    index = distance.clamp(-reach, reach) + reach
    heads = torch.broadcast_shapes(index.shape[:-2], table.shape[:-1])
    rows = table.unsqueeze(-2).expand(*heads, index.shape[-2], -1)
    return rows.gather(-1, index.expand(*heads, -1, -1))


def by_query_and_distance(
    distance: torch.Tensor, query: torch.Tensor, keys: torch.Tensor, scale: float
) -> torch.Tensor:
    """query · keys[distance + r] * scale.

    Args:
        distance: (…, 1, N, K).
        query: (…, H, N, d_k).
        keys: (H, (2r + 1) * d_k), a key for each distance from -r to r; greater distances read its ends.
        scale: a number.

    Returns:
        (…, H, N, K).
    """
    keys = keys.unflatten(-1, (-1, query.shape[-1]))
    reach = keys.shape[-2] // 2
    index = distance.clamp(-reach, reach) + reach
    # Only the distances that occur: a tile of b queries and k keys has about b + k of them, not 2r + 1.
    first, last = 0, 2 * reach
    if index.numel() and values_can_be_read(index):
        first, last = int(index.min()), int(index.max())
    scores = query @ keys[..., first : last + 1, :].transpose(-1, -2) * scale
    return scores.gather(-1, (index - first).expand(*scores.shape[:-1], -1))


BIASES: dict[str, Callable] = {
    "alibi": alibi,
    "by_distance": by_distance,
    "by_query_and_distance": by_query_and_distance,
}


def dense_bias(bias: Bias) -> torch.Tensor:
    """The whole of a bias, broadcastable to (R, H, N, K), for kernels that hold every score in memory."""
    distance = (bias.key_position.unsqueeze(-2) - bias.query_position.unsqueeze(-1)).unsqueeze(-3)
    query = None if bias.query is None else bias.query.transpose(1, 2)
    return BIASES[bias.name](distance, query, *bias.parameters)
