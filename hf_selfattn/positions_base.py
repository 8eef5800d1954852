"""What every position is, and the one that does nothing."""

from dataclasses import dataclass

import torch
from torch import nn

from .packing import Tokens


@dataclass(frozen=True)
class NoPosition:
    """Order does not enter: the encoder sees a set (with `causal`, a set of earlier tokens)."""

    options = ()
    """Config fields that this position uses."""

    is_bias = False
    """Whether it enters as a bias on the scores."""

    relative = True
    """Whether it depends on differences of positions alone, as a memory of earlier segments needs it."""

    @classmethod
    def from_config(cls, config, layer: int) -> "NoPosition":
        """The setting of one layer; settings that are equal share one state."""
        return cls()

    @classmethod
    def check(cls, config) -> str | None:
        """What is wrong with the config for this position, or None."""
        return None

    def embedding(self, config) -> nn.Module | None:
        return None

    def state(self, query: Tokens, source: Tokens, dtype: torch.dtype):
        """Tables for queries (R, N) and for the tokens that keys are projected from (R, K), in `dtype`; or None."""

    def layer(self, config) -> nn.Module:
        return Unchanged()

    def first_biases(self, config) -> torch.Tensor | None:
        """(2, G, d_k): biases of queries and keys with which the groups of heads of new weights begin; None: 0."""


class Unchanged(nn.Module):
    """The part in an attention of a position that does nothing there."""

    def forward(self, query, key, state):
        return query, key, None
