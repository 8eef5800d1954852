"""Scores: how strongly a query matches a key.

A new score is one module with a static `tile`, one row in SCORES, one slow loop in tests/reference.py.
"""

import math
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init

from .biases import Bias


class Scoring(NamedTuple):
    """What a kernel needs to score: names, numbers and tensors, never a module.

    Attributes:
        name: the row of SCORES whose `tile` computes scores.
        parameters: what `tile` takes after query and key: numbers, and tensors with heads first.
        bias: what is added to the scores, or None.
        softcap: scores become softcap * tanh(score / softcap) before the bias, or None.
        sink: (H,) a score per head that takes part in the softmax and carries no value, or None.
    """

    name: str
    parameters: tuple
    bias: Bias | None = None
    softcap: float | None = None
    sink: torch.Tensor | None = None


class Score(nn.Module):
    """Base class of all scores: soft cap and sink, which go with every one of them.

    Source: soft cap, Gemma Team 2024, arXiv:2408.00118, section 2; learned sinks, Xiao et al. 2023, arXiv:2309.17453,
    section 3.2.
    """

    name: str
    is_dot_product = True
    """Whether `tile` is query @ key^T times its one number, so that fused dot product kernels can take it."""

    options = ()
    """Config fields that this score alone uses."""

    def __init__(self, config):
        super().__init__()
        self.softcap = config.logit_softcap
        self.sink = nn.Parameter(torch.zeros(config.num_attention_heads)) if config.attention_sink else None

    def init_parameters(self, std: float) -> None:
        """Gives new parameters their first values; `std` is the config's initializer_range."""
        if self.sink is not None:
            init.zeros_(self.sink)

    def forward(self, query, key, bias: Bias | None = None) -> tuple[torch.Tensor, torch.Tensor, Scoring]:
        """Prepares query (R, N, H, d_k) and key (R, K, G, d_k), once a layer."""
        query, key, parameters = self.prepare(query, key)
        return query, key, Scoring(self.name, parameters, bias, self.softcap, self.sink)

    def prepare(self, query, key) -> tuple[torch.Tensor, torch.Tensor, tuple]:
        """Query, key, and what `tile` takes after them."""
        raise NotImplementedError

    @staticmethod
    def tile(query, key, scale):
        """(…, H, N, d_k) and (…, H, K, d_k) to scores (…, H, N, K)."""
        return query @ key.transpose(-1, -2) * scale


class ScaledDotProduct(Score):
    """query · key / √d_k, with d_k the width of one head. Source: Vaswani et al. 2017, arXiv:1706.03762, eq. 1."""

    name = "scaled_dot_product"

    def __init__(self, config):
        super().__init__(config)
        self.scale = config.query_key_dim**-0.5

    def prepare(self, query, key):
        return query, key, (self.scale,)


class DotProduct(Score):
    """query · key. Source: Luong et al. 2015, arXiv:1508.04025, section 3.1 ("dot")."""

    name = "dot_product"

    def prepare(self, query, key):
        return query, key, (1.0,)


class Cosine(Score):
    """cos(query, key) / temperature, the temperature fixed or learned per head.

    Without a temperature, softmax over values from -1 to 1 is nearly flat. Source: Henry et al. 2020,
    arXiv:2010.04245, section 3; temperature per head: Liu et al. 2022, arXiv:2111.09883, eq. 2.
    """

    name = "cosine"
    options = ("temperature", "learned_temperature")

    def __init__(self, config):
        super().__init__(config)
        self.temperature = 0.1 if config.temperature is None else config.temperature
        learned = config.learned_temperature is not False
        self.log_scale = nn.Parameter(torch.empty(config.num_attention_heads, 1)) if learned else None

    def init_parameters(self, std):
        super().init_parameters(std)
        if self.log_scale is not None:
            init.constant_(self.log_scale, -math.log(self.temperature))

    def prepare(self, query, key):
        # In half precision the square of a small number, and the eps that keeps 0 / 0 away, would both be 0.
        exact = torch.promote_types(query.dtype, torch.float32)
        query, key = (F.normalize(x.to(exact), dim=-1).to(x.dtype) for x in (query, key))
        if self.log_scale is None:
            return query, key, (1 / self.temperature,)
        return (query * self.log_scale.exp()).to(key.dtype), key, (1.0,)


class Additive(Score):
    """v · tanh(W_q query + W_k key), per head; W_q and W_k are d_k × d_k.

    "The dot product of the concatenation": W [query; key] is W_q query + W_k key, so nothing is concatenated.
    Source: Bahdanau et al. 2014, arXiv:1409.0473, appendix A.1.2.
    """

    name = "additive"
    is_dot_product = False

    def __init__(self, config):
        super().__init__(config)
        heads, groups, width = config.num_attention_heads, config.num_groups, config.query_key_dim
        self.width = width
        self.query_weight = nn.Parameter(torch.empty(heads, width * width))
        self.key_weight = nn.Parameter(torch.empty(groups, width * width))
        self.v = nn.Parameter(torch.empty(heads, width))

    def init_parameters(self, std):
        super().init_parameters(std)
        # Linear maps that keep the size of query and key; v as a new row of a linear layer of that width.
        for weight in (self.query_weight, self.key_weight, self.v):
            init.normal_(weight, mean=0.0, std=self.width**-0.5)

    def prepare(self, query, key):
        def project(x, weight):
            return torch.einsum("rnhi,hoi->rnho", x, weight.unflatten(-1, (self.width, self.width)).to(x.dtype))

        return project(query, self.query_weight), project(key, self.key_weight), (self.v.to(query.dtype),)

    @staticmethod
    def tile(query, key, v):
        return (torch.tanh(query.unsqueeze(-2) + key.unsqueeze(-3)) @ v.unsqueeze(-2).unsqueeze(-1)).squeeze(-1)


SCORES: dict[str, type[Score]] = {cls.name: cls for cls in (ScaledDotProduct, DotProduct, Cosine, Additive)}


def register_score(name: str, cls: type[Score]) -> None:
    """Makes `cls` a choice for `score_function`. It must be registered wherever such a model is loaded.

    Raises:
        ValueError: if the name is taken by another class.
    """
    if SCORES.setdefault(name, cls) is not cls:
        raise ValueError(f"score_function {name!r} is taken by {SCORES[name].__name__}. Choose another name.")
