"""Positions that are added to the embeddings: learned, sinusoidal."""

from dataclasses import dataclass

import torch
from torch import nn

from .packing import Tokens, values_can_be_read
from .positions_base import NoPosition


@dataclass(frozen=True)
class Learned(NoPosition):
    """A learned vector for each place in the document, added to the embeddings.

    Needs `max_position_embeddings`. Source: Devlin et al. 2018, arXiv:1810.04805, section 3.
    """

    relative = False

    @classmethod
    def check(cls, config):
        if not hasattr(config, "max_position_embeddings"):
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

    def forward(self, tokens: Tokens, dtype: torch.dtype) -> torch.Tensor:
        position = tokens.position
        # On an accelerator reading a value waits for the device, so only a text that may be too long is looked at.
        worth_reading = position.device.type == "cpu" or position.shape[1] > self.num_embeddings
        if position.numel() and worth_reading and values_can_be_read(position):
            low, high = (int(x) for x in position.aminmax())
            if low < 0 or high >= self.num_embeddings:
                raise ValueError(
                    f"a text has a token at position {high if low >= 0 else low}, and the model has learned positions "
                    f"0 to {self.num_embeddings - 1}. Cut texts to max_position_embeddings={self.num_embeddings} "
                    "tokens, or use position_encoding='rotary', which has no limit."
                )
        return super().forward(position)


@dataclass(frozen=True)
class Sinusoidal(NoPosition):
    """sin and cos of position / 10000^(2i / width), added to the embeddings (features 2i and 2i + 1).

    Source: Vaswani et al. 2017, arXiv:1706.03762, section 3.5.
    """

    relative = False

    def embedding(self, config):
        return SinusoidalPositions(config.embedding_width, config.initializer_range)


class SinusoidalPositions(nn.Module):
    """(R, N) Tokens to (R, N, width), multiplied by `size`.

    The paper multiplies token vectors by √width, to unit size; here they stay as small as `initializer_range`, and the
    sinusoids are multiplied by it, for the same proportion.
    """

    def __init__(self, width: int, size: float):
        super().__init__()
        self.width = width
        self.size = size

    def forward(self, tokens: Tokens, dtype: torch.dtype) -> torch.Tensor:
        table = sinusoids(tokens.position, self.width, torch.promote_types(dtype, torch.float32))
        return (table * self.size).to(dtype)


def sinusoids(position: torch.Tensor, width: int, dtype: torch.dtype) -> torch.Tensor:
    """(…) positions to (…, width): feature 2i is sin, 2i + 1 is cos of position / 10000^(2i / width)."""
    exponent = torch.arange(0, width, 2, dtype=dtype, device=position.device) / width
    angle = position.unsqueeze(-1).to(dtype) * 10_000.0**-exponent
    return torch.stack((angle.sin(), angle.cos()), dim=-1).flatten(-2)[..., :width]
