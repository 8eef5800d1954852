"""Patterns: which keys a query may see, beside what `masks.visible` says of documents, padding and direction.

A new pattern is one frozen dataclass of numbers, one row in PATTERNS, one slow loop in tests/reference.py.
"""

import ast
import math
from dataclasses import dataclass, replace
from functools import lru_cache

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
    """Config fields that this pattern uses beside `causal`: a number for all layers, or a list with one per layer."""

    per_head = False
    """Whether `sees` depends on the head."""

    reads_global = False
    """Whether it reads `Tokens.is_global`, which `global_attention_mask` gives."""

    sees_itself = False
    """Whether it is known that each token sees itself, so that only padding sees nothing."""

    sees_all = False
    """Whether it is known that each token sees every token of its document."""

    streams = True
    """Whether it can be applied before the end of the document is known."""

    def parts(self, config) -> list["Pattern"]:
        """The patterns of a layer: itself, or one for each set of projections."""
        return [self]

    def sees(self, head: torch.Tensor, query: Tokens, key: Tokens) -> torch.Tensor:
        """Whether the query may see the key: bool, broadcastable to (R, H, N, K).

        Args:
            head: (H, 1, 1), the head's number in the whole model.
            query: Tokens, (R, 1, N, 1).
            key: Tokens, (R, 1, 1, K).
        """
        raise NotImplementedError

    def may_see(self, head: torch.Tensor, query: tuple[Tokens, Tokens], key: tuple[Tokens, Tokens]) -> torch.Tensor:
        """False only where no token of a block of queries sees any token of a block of keys.

        Kernels that skip blocks ask this, so a pattern without it is computed in full. A block is given by the
        smallest and the greatest of its real tokens' fields; it lies in one document, or the answer is not used.

        Args:
            head, query, key: as for `sees`.
        """
        return torch.ones((), dtype=torch.bool, device=query[0].position.device)

    def all_see(self, head: torch.Tensor, query: tuple[Tokens, Tokens], key: tuple[Tokens, Tokens]) -> torch.Tensor:
        """True only where every token of a block of queries sees every token of a block of keys, as in `may_see`.

        Kernels need not ask `sees` there.
        """
        return torch.zeros((), dtype=torch.bool, device=query[0].position.device)

    @property
    def tile_size(self) -> int:
        """Tokens in the blocks that suit it best."""
        return 64

    def numbers_as_text(self) -> str:
        """Its numbers as a Python literal, for operators, which take no objects."""
        numbers = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return (
            "{" + ", ".join(f"{name!r}: {'1e999' if x == math.inf else repr(x)}" for name, x in numbers.items()) + "}"
        )

    @classmethod
    def from_config(cls, config, layer: int) -> "Pattern":
        """The pattern of one layer, its numbers read from the config fields named in `options`; None: the default."""
        return cls(causal=config.causal, **cls.numbers(config, layer))

    @classmethod
    def numbers(cls, config, layer: int) -> dict[str, int]:
        """The options of one layer that the config sets."""
        values = {name: of_layer(getattr(config, name), layer) for name in cls.options}
        return {name: value for name, value in values.items() if value is not None}


@dataclass(frozen=True, kw_only=True)
class Full(Pattern):
    """Each token sees every token of its document.

    Source: Vaswani et al. 2017, arXiv:1706.03762, section 3.2.
    """

    sees_itself = True
    sees_all = True

    def sees(self, head, query, key):
        return torch.ones((), dtype=torch.bool, device=query.position.device)

    def all_see(self, head, query, key):
        return torch.ones((), dtype=torch.bool, device=query[0].position.device)

    @property
    def tile_size(self):
        return 256


@dataclass(frozen=True, kw_only=True)
class SlidingWindow(Pattern):
    """Each token sees itself and `window_radius` tokens on either side (2 * window_radius + 1 in all).

    Args:
        window_radius: tokens on one side, >= 1. Longformer's `attention_window` is 2 * window_radius.
        dilation: the step from one of them to the next, >= 1.

    Raises:
        ValueError: if one of them is not an integer >= 1.

    Source: Beltagy et al. 2020, arXiv:2004.05150, section 3.1.

        window_radius=1, N=5     1 1 . . .        dilation=2     1 . 1 . .
                                 1 1 1 . .                       . 1 . 1 .
                                 . 1 1 1 .                       1 . 1 . 1
                                 . . 1 1 1                       . 1 . 1 .
                                 . . . 1 1                       . . 1 . 1
    """

    window_radius: int | None = None
    dilation: int = 1
    options = ("window_radius", "dilation")
    sees_itself = True

    def __post_init__(self):
        check_number(
            "sliding_window", "window_radius", self.window_radius, 1, "the number of tokens seen on one side, say 64"
        )
        check_number("sliding_window", "dilation", self.dilation, 1, "the step between tokens seen")

    def sees(self, head, query, key):
        distance = (query.position - key.position).abs()
        near = distance <= self.window_radius * self.dilation
        return near if self.dilation == 1 else near & (distance % self.dilation == 0)

    def may_see(self, head, query, key):
        return within(query, key, self.window_radius * self.dilation)

    def all_see(self, head, query, key):
        return (farthest(query, key) <= self.window_radius) & (self.dilation == 1)


@dataclass(frozen=True, kw_only=True)
class Longformer(Pattern):
    """A sliding window, and global tokens that see and are seen by every token of their document.

    Global are the first `num_global_tokens` tokens of each document and those that `global_attention_mask` names.

    Args:
        window_radius: tokens seen on one side, >= 1. Longformer's `attention_window` is 2 * window_radius.
        num_global_tokens: global tokens at the beginning of each document, >= 0.
        queries: "all", or with projections of their own for global queries, "local" or "global" queries alone.

    Raises:
        ValueError: for a number out of its range.

    Source: Beltagy et al. 2020, arXiv:2004.05150, section 3.1.

        window_radius=1, num_global_tokens=1, N=5     1 1 1 1 1
                                                      1 1 1 . .
                                                      1 1 1 1 .
                                                      1 . 1 1 1
                                                      1 . . 1 1
    """

    window_radius: int | None = None
    num_global_tokens: int = 1
    queries: str = "all"
    options = ("window_radius", "num_global_tokens", "global_projections")
    reads_global = True

    @property
    def sees_itself(self):
        return self.queries == "all"

    @classmethod
    def numbers(cls, config, layer):
        return {name: value for name, value in super().numbers(config, layer).items() if name != "global_projections"}

    def parts(self, config):
        return [replace(self, queries=q) for q in (("local", "global") if config.global_projections else ("all",))]

    def __post_init__(self):
        check_number("longformer", "window_radius", self.window_radius, 1, "tokens seen on one side, say 64")
        check_number("longformer", "num_global_tokens", self.num_global_tokens, 0, "global tokens at the beginning")

    def _is_global(self, tokens: Tokens) -> torch.Tensor:
        first = tokens.position < self.num_global_tokens
        return first if tokens.is_global is None else first | tokens.is_global

    def sees(self, head, query, key):
        near = (query.position - key.position).abs() <= self.window_radius
        if self.queries == "global":
            return self._is_global(query) & (key.document >= 0)
        seen = near | self._is_global(key)
        return seen & ~self._is_global(query) if self.queries == "local" else seen | self._is_global(query)

    def may_see(self, head, query, key):
        # The smallest position and the greatest is_global of a block: whether any of its tokens may be global.
        some_query, some_key = (
            (low.position < self.num_global_tokens) | (False if high.is_global is None else high.is_global)
            for low, high in (query, key)
        )
        if self.queries == "global":
            return some_query
        near = within(query, key, self.window_radius) | some_key
        return near if self.queries == "local" else near | some_query

    def all_see(self, head, query, key):
        none_global = query[0].position >= self.num_global_tokens
        if query[1].is_global is not None:
            none_global = none_global & ~query[1].is_global
        near = farthest(query, key) <= self.window_radius
        return near & none_global if self.queries == "local" else near & (self.queries == "all")


@dataclass(frozen=True, kw_only=True)
class BigBird(Pattern):
    """Blocks of tokens: a window of blocks, global blocks that see and are seen by all, and random blocks.

    A random block is a hash of (seed, layer, its number, head, query block) modulo the document's number of blocks: no
    table and no state, the same packed and alone, in training and evaluation. Two may fall on the same block.

    Args:
        block_size: tokens in a block, >= 1.
        block_radius: blocks seen on one side, >= 0. BigBird's window of 3 blocks is block_radius=1.
        num_global_blocks: global blocks, >= 0, taken in turn from the beginning and the end of the document.
        num_random_blocks: random blocks that each query block sees in each head, >= 0.
        seed: of the random blocks.
        layer: the number of the layer.

    Raises:
        ValueError: for a number out of its range.

    Source: Zaheer et al. 2020, arXiv:2007.14062, section 2 and appendix D.

        blocks, block_radius=1, num_global_blocks=1, num_random_blocks=1 (r)     1 1 1 1 1 1
                                                                                 1 1 1 . r .
                                                                                 1 1 1 1 . .
                                                                                 1 r 1 1 1 .
                                                                                 1 . r 1 1 1
                                                                                 1 . r . 1 1
    """

    block_size: int = 64
    block_radius: int = 1
    num_global_blocks: int = 2
    num_random_blocks: int = 3
    seed: int = 0
    layer: int = 0
    options = ("block_size", "block_radius", "num_global_blocks", "num_random_blocks", "random_blocks_seed")
    per_head = True
    sees_itself = True
    streams = False

    def __post_init__(self):
        check_number("bigbird", "block_size", self.block_size, 1, "tokens in a block")
        for name in ("block_radius", "num_global_blocks", "num_random_blocks"):
            check_number("bigbird", name, getattr(self, name), 0, "a number of blocks")

    @classmethod
    def from_config(cls, config, layer):
        names = {"random_blocks_seed": "seed"}
        numbers = {names.get(name, name): value for name, value in cls.numbers(config, layer).items()}
        return cls(causal=config.causal, layer=layer, **numbers)

    def sees(self, head, query, key):
        return self._blocks_see(head, query.position, query.length, key.position, key.length)

    def _blocks_see(self, head, query_position, query_length, key_position, key_length):
        own, other = query_position // self.block_size, key_position // self.block_size
        count = (query_length + self.block_size - 1) // self.block_size
        seen = (own - other).abs() <= self.block_radius
        first, last = -(-self.num_global_blocks // 2), self.num_global_blocks // 2
        for block in (own, other):
            seen = seen | (block < first) | (block >= count - last)
        for number in range(self.num_random_blocks):
            seen = seen | (other == self._random_block(number, head, own, count))
        return seen

    def _random_block(self, number: int, head, own, count):
        start = mix(mix(mix(torch.as_tensor(self.seed, device=own.device)) + self.layer) + number)
        return mix(mix(start + head) + own) % count.clamp(min=1)

    def may_see(self, head, query, key):
        # A block of at most block_size tokens of one document lies in the blocks of its first and its last token.
        seen = torch.zeros((), dtype=torch.bool, device=query[0].position.device)
        for own in query:
            for other in key:
                seen = seen | self._blocks_see(head, own.position, query[1].length, other.position, key[1].length)
        wide = torch.zeros_like(seen)
        for low, high in (query, key):
            wide = wide | (high.position // self.block_size - low.position // self.block_size > 1)
        return seen | wide

    def all_see(self, head, query, key):
        (first, _), (other, _) = query, key
        aligned = torch.ones((), dtype=torch.bool, device=first.position.device)
        for low, high in (query, key):
            aligned = aligned & (high.position // self.block_size == low.position // self.block_size)
        return aligned & self._blocks_see(head, first.position, query[1].length, other.position, key[1].length)

    @property
    def tile_size(self):
        return self.block_size if 16 <= self.block_size <= 128 else 64


PATTERNS: dict[str, type[Pattern]] = {
    "full": Full,
    "sliding_window": SlidingWindow,
    "longformer": Longformer,
    "bigbird": BigBird,
}


def register_pattern(name: str, cls: type[Pattern]) -> None:
    """Makes `cls` a choice for `attention_pattern`. It must be registered wherever such a model is loaded.

    Raises:
        ValueError: if the name is taken by another class.
    """
    if PATTERNS.setdefault(name, cls) is not cls:
        raise ValueError(f"attention_pattern {name!r} is taken by {PATTERNS[name].__name__}. Choose another name.")


def layer_patterns(config) -> list[Pattern]:
    """The pattern of each layer, from `config.attention_pattern` (one name for all layers, or a list of names)."""
    names = [of_layer(config.attention_pattern, layer) for layer in range(config.num_hidden_layers)]
    return [PATTERNS[name].from_config(config, layer) for layer, name in enumerate(names)]


def pattern_of(name: str, numbers: str) -> Pattern:
    """The pattern that `name` and `numbers_as_text` say."""
    return _read_pattern(PATTERNS[name], numbers)


@lru_cache(maxsize=256)
def _read_pattern(cls: type[Pattern], numbers: str) -> Pattern:
    return cls(**ast.literal_eval(numbers))


def within(query: tuple[Tokens, Tokens], key: tuple[Tokens, Tokens], reach: int) -> torch.Tensor:
    """Whether two blocks, each given by its smallest and greatest fields, come within `reach` positions."""
    apart = torch.maximum(query[0].position - key[1].position, key[0].position - query[1].position)
    return apart <= reach


def farthest(query: tuple[Tokens, Tokens], key: tuple[Tokens, Tokens]) -> torch.Tensor:
    """The greatest distance between tokens of two blocks, each given by its smallest and greatest fields."""
    return torch.maximum(query[1].position - key[0].position, key[1].position - query[0].position)


def check_number(pattern: str, name: str, value, least: int, meaning: str) -> None:
    """Raises ValueError unless `value` is an integer of at least `least`."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(
            f"attention_pattern {pattern!r} needs {name} ({meaning}) as an integer >= {least}, got {value!r}. "
            f"Set {name}, or attention_pattern='full'."
        )


def of_layer(value, layer: int):
    """The value for one layer, from one value for all layers or a list with one per layer."""
    return value[layer] if isinstance(value, (list, tuple)) else value


def mix(number: torch.Tensor) -> torch.Tensor:
    """A hash of integers to 0 … 2^31 - 1, the same on every device: xor with shifts and multiply, in 32 bits.

    Source of the constants: Wellons 2018, "Prospecting for hash functions" (lowbias32).
    """
    number = number.long() & 0xFFFFFFFF
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        number = ((number ^ (number >> shift)) * factor) & 0xFFFFFFFF
    return (number ^ (number >> 16)) >> 1
