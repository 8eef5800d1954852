"""Scores: how strongly a query matches a key.

A new score is one module with a static `tile`, one row in SCORES, one slow loop in tests/reference.py.
"""

from typing import NamedTuple

import torch
from torch import nn


class Scoring(NamedTuple):
    """What a kernel needs to score: names, numbers and tensors, never a module.

    Attributes:
        name: the row of SCORES whose `tile` computes scores.
        parameters: what `tile` takes after query and key.
        bias: added to the scores, broadcastable to (R, H, N, K), or None.
        softcap: scores become softcap * tanh(score / softcap) before the bias, or None.
        sink: (H,) a score per head that takes part in the softmax and carries no value, or None.
    """

    name: str
    parameters: tuple
    bias: torch.Tensor | None = None
    softcap: float | None = None
    sink: torch.Tensor | None = None


class ScaledDotProduct(nn.Module):
    """query · key / √d_k, with d_k the width of one head. Source: Vaswani et al. 2017, arXiv:1706.03762, eq. 1."""

    is_dot_product = True
    """Whether `tile` is query @ key^T times its one number, so that fused dot product kernels can take it."""

    def __init__(self, config):
        super().__init__()
        self.scale = config.query_key_dim**-0.5

    def forward(self, query, key, bias=None) -> tuple[torch.Tensor, torch.Tensor, Scoring]:
        """Prepares query (R, N, H, d_k) and key (R, K, G, d_k), once a layer."""
        return query, key, Scoring("scaled_dot_product", (self.scale,), bias)

    @staticmethod
    def tile(query, key, scale):
        """(…, N, d_k) and (…, K, d_k) to scores (…, N, K)."""
        return query @ key.transpose(-1, -2) * scale


SCORES: dict[str, type[nn.Module]] = {"scaled_dot_product": ScaledDotProduct}


def register_score(name: str, cls: type[nn.Module]) -> None:
    """Makes `cls` a choice for `score_function`. It must be registered wherever such a model is loaded.

    Raises:
        ValueError: if the name is taken by another class.
    """
    if SCORES.setdefault(name, cls) is not cls:
        raise ValueError(f"score_function {name!r} is taken by {SCORES[name].__name__}. Choose another name.")
