"""Positions: how order enters. Each lives in three places, as far as it needs them:

    embedding(config)               a module of the model; its forward(tokens, dtype) is added to the embeddings
    state(query, source, dtype)     tables by position, made once a forward for each distinct setting
    layer(config)                   a module of each attention; forward(query, key, state) -> (query, key, bias)

A new position is one frozen dataclass of numbers, one row in POSITIONS, one slow loop in tests/reference.py.
"""

from .positions_base import NoPosition
from .positions_embedding import Learned, Sinusoidal
from .positions_relative import T5, Alibi, TransformerXL
from .positions_rotary import Rotary

POSITIONS: dict[str, type[NoPosition]] = {
    "none": NoPosition,
    "learned": Learned,
    "sinusoidal": Sinusoidal,
    "rotary": Rotary,
    "alibi": Alibi,
    "t5": T5,
    "transformer_xl": TransformerXL,
}


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
