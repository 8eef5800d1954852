"""Positions that enter as a bias by distance: ALiBi, T5, Transformer-XL."""

import math
from dataclasses import dataclass

import torch
from torch import nn
from transformers import initialization as init

from .biases import Bias
from .packing import Tokens, values_can_be_read
from .positions_base import NoPosition
from .positions_embedding import sinusoids


@dataclass(frozen=True)
class Alibi(NoPosition):
    """-slope * |distance| added to the scores, a slope for each head; symmetric where attention is not causal.

    Source: Press et al. 2021, arXiv:2108.12409, section 3.
    """

    is_bias = True

    def state(self, query, source, dtype):
        """(query position, key position)."""
        return query.position, source.position

    def layer(self, config):
        return AlibiSlopes(config)


class AlibiSlopes(nn.Module):
    """Slopes 2^(-8 (h + 1) / H), for H that is no power of 2 filled up from twice as many; frozen."""

    def __init__(self, config):
        super().__init__()
        self.slopes = nn.Parameter(torch.empty(config.num_attention_heads))

    def register_parameter(self, name: str, param: nn.Parameter) -> None:
        """As in torch; `from_pretrained` sets new parameters, and makes all that it sets trainable."""
        super().register_parameter(name, param.requires_grad_(False))

    def init_parameters(self, std: float) -> None:
        """Sets the slopes; `std` is not used."""
        init.copy_(self.slopes, torch.tensor(alibi_slopes(len(self.slopes)), dtype=self.slopes.dtype))

    def forward(self, query, key, state):
        return query, key, Bias("alibi", (self.slopes,), None, *state)


def alibi_slopes(num_heads: int) -> list[float]:
    """The slopes of Press et al. 2021 for any number of heads."""
    power = 2 ** int(math.log2(num_heads))
    slopes = [2 ** (-8 * (head + 1) / power) for head in range(power)]
    return slopes + [2 ** (-4 * (2 * head + 1) / power) for head in range(num_heads - power)]


@dataclass(frozen=True)
class T5(NoPosition):
    """A learned number for each head and bucket of distances, added to the scores.

    Half of the buckets are single distances, the others grow with the logarithm up to `relative_max_distance`; without
    `causal` each sign has half of them.

    Args:
        num_buckets: `relative_num_buckets`.
        max_distance: `relative_max_distance` in tokens; everything farther is one bucket.
        causal: whether only keys before the query have buckets.

    Source: Raffel et al. 2019, arXiv:1910.10683, section 2.1.
    """

    is_bias = True
    num_buckets: int = 32
    max_distance: int = 128
    causal: bool = False
    options = ("relative_num_buckets", "relative_max_distance")

    @classmethod
    def from_config(cls, config, layer):
        buckets, farthest = config.relative_num_buckets, config.relative_max_distance
        return cls(32 if buckets is None else buckets, 128 if farthest is None else farthest, config.causal)

    @classmethod
    def check(cls, config):
        setting = cls.from_config(config, 0)
        exact = setting.num_buckets // (2 if setting.causal else 4)
        if exact < 1 or setting.max_distance <= exact or setting.num_buckets % (2 if setting.causal else 4):
            return (
                f"position_encoding 't5' needs relative_num_buckets, a multiple of {2 if setting.causal else 4}, and "
                f"relative_max_distance above the {exact} distances with a bucket of their own, got "
                f"{setting.num_buckets} and {setting.max_distance}. Use 32 and 128, say."
            )
        return None

    def state(self, query, source, dtype):
        """(bucket of each distance from -r to r, query position, key position)."""
        distance = torch.arange(-self.max_distance, self.max_distance + 1, device=query.position.device)
        return self.buckets(distance), query.position, source.position

    def buckets(self, distance: torch.Tensor) -> torch.Tensor:
        """The bucket of each distance (key position - query position)."""
        if self.causal:
            offset, near, count = 0, (-distance).clamp(min=0), self.num_buckets
        else:
            count = self.num_buckets // 2
            offset, near = (distance > 0) * count, distance.abs()
        exact = count // 2
        ratio = torch.log(near.clamp(min=1).float() / exact) / math.log(self.max_distance / exact)
        far = (exact + (ratio * (count - exact)).long()).clamp(max=count - 1)
        return offset + torch.where(near < exact, near, far)

    def layer(self, config):
        return BucketBias(config.num_attention_heads, self.num_buckets)


class BucketBias(nn.Module):
    """(H, buckets) learned numbers, read by distance."""

    def __init__(self, num_heads: int, num_buckets: int):
        super().__init__()
        self.table = nn.Parameter(torch.empty(num_heads, num_buckets))

    def init_parameters(self, std: float) -> None:
        """New numbers are normal with standard deviation `std`."""
        init.normal_(self.table, mean=0.0, std=std)

    def forward(self, query, key, state):
        buckets, query_position, key_position = state
        return query, key, Bias("by_distance", (self.table[:, buckets],), None, query_position, key_position)


@dataclass(frozen=True)
class TransformerXL(NoPosition):
    """(query + u) · key, and (query + v) · W_r sinusoid(query position - key position) / √d_k, with u and v per head.

    Source: Dai et al. 2019, arXiv:1901.02860, section 3.3.
    """

    is_bias = True
    width: int

    @classmethod
    def from_config(cls, config, layer):
        return cls(config.hidden_size)

    def state(self, query, source, dtype):
        """(sinusoids of query - key position for each distance from -r to r, query position, key position)."""
        reach = _farthest(query, source)
        distance = torch.arange(-reach, reach + 1, device=query.position.device)
        return sinusoids(-distance, self.width, dtype), query.position, source.position

    def layer(self, config):
        return ContentAndPosition(config)


def _farthest(query: Tokens, source: Tokens) -> int:
    """At least the greatest distance in a document: found from the places, or the number of keys where values cannot
    be read (places that count up have none beyond it)."""
    if not (query.position.numel() and source.position.numel() and values_can_be_read(source.position)):
        return source.position.shape[1]
    places = [torch.where(x.document >= 0, x.position, x.position.amax(1, keepdim=True)) for x in (query, source)]
    high = torch.maximum(*(x.position.amax(1) for x in (query, source)))
    low = torch.minimum(*(x.amin(1) for x in places))
    return max(1, int((high - low).max()))


class ContentAndPosition(nn.Module):
    """u, v and W_r of Transformer-XL."""

    def __init__(self, config):
        super().__init__()
        self.head_dim = config.query_key_dim
        self.content_bias = nn.Parameter(torch.empty(config.num_attention_heads, self.head_dim))  # u
        self.position_bias = nn.Parameter(torch.empty(config.num_attention_heads, self.head_dim))  # v
        self.r_proj = nn.Linear(config.hidden_size, config.num_attention_heads * self.head_dim, bias=False)

    def init_parameters(self, std: float) -> None:
        """u and v are normal with standard deviation `std`."""
        init.normal_(self.content_bias, mean=0.0, std=std)
        init.normal_(self.position_bias, mean=0.0, std=std)

    def forward(self, query, key, state):
        table, query_position, key_position = state
        keys = self.r_proj(table.to(self.r_proj.weight.dtype)).unflatten(-1, (-1, self.head_dim))  # (2r + 1, H, d_k)
        parameters = (keys.transpose(0, 1).flatten(1), self.head_dim**-0.5)
        by_position = (query + self.position_bias).to(query.dtype)
        bias = Bias("by_query_and_distance", parameters, by_position, query_position, key_position)
        return (query + self.content_bias).to(query.dtype), key, bias
