"""Positions: how order enters. Each lives in three places, as far as it needs them:

    embedding(config)                  a module of the model; its forward(tokens) is added to the embeddings
    state(query, source, dtype)        tables by position, made once a forward for each distinct setting
    layer(config)                      a module of each attention; forward(query, key, state) -> (query, key, bias)

A new position is one frozen dataclass of numbers, one row in POSITIONS, one slow loop in tests/reference.py.
"""

from dataclasses import dataclass

import torch
from torch import nn

from .packing import Tokens, values_can_be_read


@dataclass(frozen=True)
class NoPosition:
    """Order does not enter: the encoder sees a set (with `causal`, a set of earlier tokens)."""

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
        """Tables for queries (R, N) and for the tokens that keys are projected from (R, K), in `dtype`."""
        return

    def layer(self, config) -> nn.Module:
        return Unchanged()


class Unchanged(nn.Module):
    """The part in an attention of a position that does nothing there."""

    def forward(self, query, key, state):
        return query, key, None


@dataclass(frozen=True)
class Learned(NoPosition):
    """A learned vector for each place in the document, added to the embeddings.

    Needs `max_position_embeddings`. Source: Devlin et al. 2018, arXiv:1810.04805, section 3.
    """

    @classmethod
    def check(cls, config):
        if config.max_position_embeddings is None:
            return (
                "position_encoding 'learned' needs max_position_embeddings, the number of positions to learn, got "
                "None. Set max_position_embeddings=512, say, or position_encoding='rotary', which has no limit."
            )
        return None

    def embedding(self, config):
        return LearnedPositions(config.max_position_embeddings, config.embedding_width)


class LearnedPositions(nn.Embedding):
    """Looks up the vector of each token's position: (R, N) Tokens to (R, N, embedding width).

    Raises:
        ValueError: if a position has no vector.
    """

    def forward(self, tokens: Tokens) -> torch.Tensor:
        position = tokens.position
        # On an accelerator reading a value waits for the device, so only a text that may be too long is looked at.
        worth_reading = position.device.type == "cpu" or position.shape[1] > self.num_embeddings
        readable = position.numel() and worth_reading and values_can_be_read(position)
        if readable and int(position.max()) >= self.num_embeddings:
            raise ValueError(
                f"a text has a token at position {int(position.max())}, and the model has learned positions 0 to "
                f"{self.num_embeddings - 1}. Cut texts to max_position_embeddings={self.num_embeddings} tokens, or "
                "use position_encoding='rotary', which has no limit."
            )
        return super().forward(position)


@dataclass(frozen=True)
class Rotary(NoPosition):
    """Turns pairs (i, i + d_k / 2) of query and key by position * theta^(-2i / d_k).

    Args:
        head_dim: d_k, even.
        theta: base of the frequencies, `rope_parameters["rope_theta"]`.

    Source: Su et al. 2021, arXiv:2104.09864, section 3.2; halves paired as in transformers.
    """

    head_dim: int
    theta: float

    @classmethod
    def from_config(cls, config, layer):
        return cls(config.query_key_dim, float((config.rope_parameters or {}).get("rope_theta", config.default_theta)))

    @classmethod
    def check(cls, config):
        unknown = set(config.rope_parameters or {}) - {"rope_theta", "rope_type"}
        rope_type = (config.rope_parameters or {}).get("rope_type", "default")
        if config.query_key_dim % 2:
            return f"position_encoding 'rotary' turns pairs and needs an even head_dim, got {config.query_key_dim}."
        if unknown or rope_type != "default":
            return (
                f"rope_parameters knows 'rope_theta' and 'rope_type': 'default', got {config.rope_parameters}. "
                "Leave the other entries out."
            )
        return None

    def state(self, query, source, dtype):
        """((cos, sin) of the queries, (cos, sin) of the keys), each (R, N, 1, d_k / 2)."""
        turned = self._cos_sin(query.position, dtype)
        return turned, turned if source is query else self._cos_sin(source.position, dtype)

    def _cos_sin(self, position, dtype):
        # Frequencies are computed here from numbers: a buffer would come back from the meta device as garbage and
        # would be rounded by model.half().
        exponent = torch.arange(0, self.head_dim, 2, dtype=dtype, device=position.device) / self.head_dim
        angle = position[..., None, None].to(dtype) * self.theta**-exponent
        return angle.cos(), angle.sin()

    def layer(self, config):
        return RotateHalves()


class RotateHalves(nn.Module):
    """Rotates query (R, N, H, d_k) and key (R, K, G, d_k) by the tables of `Rotary.state`."""

    def forward(self, query, key, state):
        of_queries, of_keys = state
        return self.rotate(query, *of_queries), self.rotate(key, *of_keys), None

    @staticmethod
    def rotate(x, cos, sin):
        first, second = x.to(cos.dtype).chunk(2, dim=-1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


POSITIONS: dict[str, type[NoPosition]] = {"none": NoPosition, "learned": Learned, "rotary": Rotary}


def register_position(name: str, cls: type[NoPosition]) -> None:
    """Makes `cls` a choice for `position_encoding`. It must be registered wherever such a model is loaded.

    Raises:
        ValueError: if the name is taken by another class.
    """
    if POSITIONS.setdefault(name, cls) is not cls:
        raise ValueError(f"position_encoding {name!r} is taken by {POSITIONS[name].__name__}. Choose another name.")


def layer_positions(config) -> list[NoPosition]:
    """The position setting of each layer."""
    return [POSITIONS[config.position_encoding].from_config(config, i) for i in range(config.num_hidden_layers)]
