"""Patterns: which keys a query may see, beside what `masks.visible` says of documents, padding and direction.

A new pattern is one frozen dataclass of numbers, one row in PATTERNS, one slow loop in tests/reference.py.
"""

from dataclasses import dataclass

import torch

from .packing import Tokens


@dataclass(frozen=True, kw_only=True)
class Pattern:
    """Base class of all patterns.

    Args:
        causal: whether a query sees only keys at its own and earlier positions. Applied for every pattern by
            `masks.visible`, so that no `sees` needs to know of it.
    """

    causal: bool = False

    options = ()
    """Config fields that this pattern needs beside `causal`: a number for all layers, or a list with one per layer."""

    per_head = False
    """Whether `sees` depends on the head."""

    def sees(self, head: torch.Tensor, query: Tokens, key: Tokens) -> torch.Tensor:
        """Whether the query may see the key: bool, broadcastable to (R, H, N, K).

        Args:
            head: (H, 1, 1), the head's number in the whole model.
            query: Tokens, (R, 1, N, 1).
            key: Tokens, (R, 1, 1, K).
        """
        raise NotImplementedError

    @classmethod
    def from_config(cls, config, layer: int) -> "Pattern":
        """The pattern of one layer, its numbers read from the config fields named in `options`."""
        return cls(causal=config.causal, **{name: _of_layer(getattr(config, name), layer) for name in cls.options})


@dataclass(frozen=True, kw_only=True)
class Full(Pattern):
    """Each token sees every token of its document.

    Source: Vaswani et al. 2017, arXiv:1706.03762, section 3.2.
    """

    def sees(self, head, query, key):
        return torch.ones((), dtype=torch.bool, device=query.position.device)


@dataclass(frozen=True, kw_only=True)
class SlidingWindow(Pattern):
    """Each token sees itself and `window_radius` tokens on either side (2 * window_radius + 1 in all).

    Args:
        window_radius: tokens on one side, >= 1. Longformer's `attention_window` is 2 * window_radius.

    Raises:
        ValueError: if `window_radius` is not an integer >= 1.

    Source: Beltagy et al. 2020, arXiv:2004.05150, section 3.1.

        window_radius=1, N=5     1 1 . . .
                                 1 1 1 . .
                                 . 1 1 1 .
                                 . . 1 1 1
                                 . . . 1 1
    """

    window_radius: int
    options = ("window_radius",)

    def __post_init__(self):
        if not isinstance(self.window_radius, int) or self.window_radius < 1:
            raise ValueError(
                f"attention_pattern 'sliding_window' needs window_radius, the number of tokens seen on one side, as "
                f"an integer >= 1, got {self.window_radius!r}. Set window_radius=64, say, or attention_pattern='full'."
            )

    def sees(self, head, query, key):
        return (query.position - key.position).abs() <= self.window_radius


PATTERNS: dict[str, type[Pattern]] = {"full": Full, "sliding_window": SlidingWindow}


def register_pattern(name: str, cls: type[Pattern]) -> None:
    """Makes `cls` a choice for `attention_pattern`. It must be registered wherever such a model is loaded.

    Raises:
        ValueError: if the name is taken by another class.
    """
    if PATTERNS.setdefault(name, cls) is not cls:
        raise ValueError(f"attention_pattern {name!r} is taken by {PATTERNS[name].__name__}. Choose another name.")


def layer_patterns(config) -> list[Pattern]:
    """The pattern of each layer, from `config.attention_pattern` (one name for all layers, or a list of names)."""
    names = [_of_layer(config.attention_pattern, layer) for layer in range(config.num_hidden_layers)]
    return [PATTERNS[name].from_config(config, layer) for layer, name in enumerate(names)]


def _of_layer(value, layer: int):
    return value[layer] if isinstance(value, (list, tuple)) else value
