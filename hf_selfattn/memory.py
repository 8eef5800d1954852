"""Memory: hidden states of earlier segments, which the next segment attends to."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from transformers.modeling_outputs import BaseModelOutput

from .packing import Packing, Tokens


class Memory(NamedTuple):
    """What a model remembers of the segments that it has read.

    Attributes:
        hidden_states: for each layer what entered it, (B, M, D); M is at most `memory_length`. No gradient flows back.
        tokens: where these tokens stand, (B, M).

    Source: Dai et al. 2019, arXiv:1901.02860, section 3.2.
    """

    hidden_states: tuple[torch.Tensor, ...]
    tokens: Tokens


@dataclass
class SelfAttnModelOutput(BaseModelOutput):
    """transformers' BaseModelOutput, and with `memory_length` the `memory` to pass on with the next segment."""

    memory: Memory | None = None


def continue_from(packing: Packing, memory: Memory | None) -> tuple[Packing, Tokens]:
    """The packing of a segment whose positions follow those of its memory, and the Tokens of memory and segment."""
    tokens = packing.tokens
    if memory is None:
        return packing, tokens
    read = torch.where(memory.tokens.document >= 0, memory.tokens.position + 1, 0).amax(1, keepdim=True)
    tokens = tokens._replace(
        position=torch.where(packing.real, tokens.position + read, 0),
        length=torch.where(packing.real, tokens.length + read, 0),
    )
    before, after = memory.tokens, tokens
    if (before.is_global is None) != (after.is_global is None):
        before, after = (
            x if x.is_global is not None else x._replace(is_global=torch.zeros_like(x.document, dtype=torch.bool))
            for x in (before, after)
        )
    joined = (None if new is None else torch.cat((old, new), dim=1) for old, new in zip(before, after, strict=True))
    return packing._replace(tokens=after, all_real=False), Tokens(*joined)


def remember(memory: Memory | None, entered: list[torch.Tensor], tokens: Tokens, memory_length: int) -> Memory:
    """The last `memory_length` real tokens of each row of memory and segment.

    Args:
        memory: what was attended to, or None.
        entered: for each layer what entered it, (B, N, D).
        tokens: of memory and segment, (B, M + N).
        memory_length: tokens to keep.
    """
    # Padding first, then the real tokens in their order; the last of them stay.
    order = (tokens.document >= 0).long().argsort(dim=1, stable=True)[:, -memory_length:]
    if memory is not None:
        # Layers may stand on different devices.
        pairs = zip(memory.hidden_states, entered, strict=True)
        entered = [torch.cat((old.to(new.device), new), dim=1) for old, new in pairs]
    kept = tuple(x.detach().gather(1, order.to(x.device).unsqueeze(-1).expand(-1, -1, x.shape[-1])) for x in entered)
    return Memory(kept, Tokens(*(None if x is None else x.gather(1, order) for x in tokens)))
