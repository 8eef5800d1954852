"""Where tokens stand, and in which form a batch travels through the layers.

Shape letters, the same in every file: B batch, N sequence length, T packed tokens, R rows of a layout,
K keys, H heads, G key/value heads, D hidden size, d_k, d_v, V vocabulary.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from transformers.utils import is_tracing


class Tokens(NamedTuple):
    """Where each token stands, each field (R, N). Who sees whom and how far apart is read here, never from indices.

    Attributes:
        document: the number of its document, unique in the batch; -1 for padding.
        position: its place in that document, from 0 (or as `position_ids` said); 0 at padding.
        length: the number of tokens of that document; 0 at padding.
        is_global: whether it sees and is seen by all of its document, or None where no pattern asks.
        coordinate: its place for distances where that is not `position` (several axes), or None.
    """

    document: torch.Tensor
    position: torch.Tensor
    length: torch.Tensor
    is_global: torch.Tensor | None = None
    coordinate: torch.Tensor | None = None

    def at(self, index) -> "Tokens":
        """The same fields, each indexed by `index`."""
        return Tokens(*(None if field is None else field[index] for field in self))


class Packing(NamedTuple):
    """The form in which a batch travels through the layers.

    Packed, it is one row of the T real tokens (R = 1, N = T), document after document. The grid is the batch as it
    came (R = B, padding kept and seen by nobody); graphs are traced with it, and masks of pairs and memory need it.

    Attributes:
        tokens: where each token of the layout stands.
        shape: (B, N), the shape of the batch outside.
        all_real: True where it is known without reading values that the batch has no padding.
        one_document: True where it is known without reading values that each row holds one document.
        is_packed: whether the layout is the packed one.
        places: (T,) where each packed token stands among the B * N outside; None where all do, in their order.
    """

    tokens: Tokens
    shape: tuple[int, int]
    all_real: bool
    one_document: bool
    is_packed: bool = False
    places: torch.Tensor | None = None

    @property
    def real(self) -> torch.Tensor:
        """(B, N) bool: False at padding."""
        if not self.is_packed:
            return self.tokens.document >= 0
        return self.unpack(self.tokens.document >= 0)

    def packed(self) -> "Packing":
        """The packed form of this grid. Values are read: not while a graph is traced."""
        real = self.real.flatten()
        places = None if bool(real.all()) else real.nonzero().squeeze(1)
        form = self._replace(is_packed=True, places=places)
        return form._replace(tokens=Tokens(*(None if x is None else form.pack(x) for x in self.tokens)))

    def to(self, device: torch.device) -> "Packing":
        """The same on another device: the last layers may stand on another one than the first."""
        places = None if self.places is None else self.places.to(device)
        return self._replace(tokens=Tokens(*(None if x is None else x.to(device) for x in self.tokens)), places=places)

    def pack(self, batch: torch.Tensor | None, fill: int | None = None) -> torch.Tensor | None:
        """(B, N, …) to the layout (R, N, …); with `fill`, padding that is kept takes that value (labels: -100)."""
        if batch is None:
            return None
        if self.is_packed:
            batch = batch.flatten(0, 1)
            return (batch if self.places is None else batch.index_select(0, self.places.to(batch.device))).unsqueeze(0)
        if fill is None or self.all_real:
            return batch
        return batch.masked_fill(~_like(self.real, batch), fill)

    def unpack(self, layout: torch.Tensor) -> torch.Tensor:
        """The layout (R, N, …) back to (B, N, …), 0 at padding."""
        if not self.is_packed:
            return layout if self.all_real else layout.masked_fill(~_like(self.real, layout), 0)
        layout = layout.squeeze(0)
        if self.places is not None:
            empty = layout.new_zeros(self.shape[0] * self.shape[1], *layout.shape[1:])
            layout = empty.index_copy(0, self.places.to(layout.device), layout)
        return layout.unflatten(0, self.shape)


def read_batch(
    batch_size: int,
    length: int,
    device: torch.device,
    padding_mask: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    cu_seq_lens: torch.Tensor | None = None,
    restarts: bool = True,
    is_global: torch.Tensor | None = None,
) -> Packing:
    """Finds the documents of a batch of shape (B, N) and where each token stands.

    Documents come from `cu_seq_lens` (boundaries in the batch read row by row; what follows the last is padding);
    else, with `restarts`, a document begins where `position_ids` is 0 and nowhere else; else each row is one document.
    A hole in the mask closes up: the token after it follows the token before it.

    Args:
        padding_mask: (B, N) bool, True for a real token; None: all are real.
        position_ids: (B, N) or (1, N) integers; used as `Tokens.position` where given.
        cu_seq_lens: (documents + 1,) integers, increasing from 0.
        restarts: whether `position_ids` tell documents apart (they do where the user gave no mask).
        is_global: (B, N) bool, `Tokens.is_global`.

    Raises:
        ValueError: for `position_ids` or `cu_seq_lens` that cannot be read.
    """
    shape = (batch_size, length)
    if position_ids is not None:
        position_ids = _read_position_ids(position_ids, shape, device)
    real = torch.ones(shape, dtype=torch.bool, device=device) if padding_mask is None else padding_mask
    starts = torch.zeros(shape, dtype=torch.bool, device=device)
    if cu_seq_lens is not None:
        _check_boundaries(cu_seq_lens, batch_size * length)
        place = torch.arange(batch_size * length, device=device)
        number = torch.searchsorted(cu_seq_lens.to(device=device, dtype=place.dtype), place, right=True).view(shape)
        real = real & (number < cu_seq_lens.shape[0])
        starts[:, 1:] = number[:, 1:] != number[:, :-1]
    elif restarts and position_ids is not None:
        starts = position_ids == 0
    tokens = _stand(real, starts, position_ids)._replace(is_global=is_global)
    one_document = cu_seq_lens is None and not (restarts and position_ids is not None)
    return Packing(tokens, shape, padding_mask is None and cu_seq_lens is None, one_document)


def _stand(real: torch.Tensor, starts: torch.Tensor, position_ids: torch.Tensor | None) -> Tokens:
    """Numbers documents over the whole batch and counts the real tokens of each; all arguments are (B, N)."""
    first_of_row = torch.zeros_like(starts)
    first_of_row[:, :1] = True
    starts = starts | first_of_row
    number = starts.flatten().cumsum(0) - 1
    counts = torch.zeros_like(number).scatter_add_(0, number, real.flatten().long())
    length = counts[number].view(real.shape)
    if position_ids is None:
        before = counts.cumsum(0) - counts  # real tokens of the documents before each one
        position_ids = (real.flatten().cumsum(0) - before[number] - 1).view(real.shape)
    number = number.view(real.shape)
    return Tokens(
        document=torch.where(real, number, -1),
        position=torch.where(real, position_ids, 0),
        length=torch.where(real, length, 0),
    )


def _read_position_ids(position_ids: torch.Tensor, shape: tuple[int, int], device: torch.device) -> torch.Tensor:
    if position_ids.is_floating_point() or position_ids.dim() != 2 or position_ids.shape[0] not in (1, shape[0]):
        _refuse_position_ids(position_ids, shape)
    if position_ids.shape[1] != shape[1]:
        _refuse_position_ids(position_ids, shape)
    return position_ids.to(device=device, dtype=torch.long).expand(shape)


def _check_boundaries(cu_seq_lens: torch.Tensor, total: int) -> None:
    wrong = cu_seq_lens.dim() != 1 or cu_seq_lens.is_floating_point()
    if not wrong and cu_seq_lens.device.type == "cpu" and values_can_be_read(cu_seq_lens):
        steps = cu_seq_lens.diff()
        wrong = not len(steps) or int(cu_seq_lens[0]) != 0 or bool((steps < 0).any()) or int(cu_seq_lens[-1]) > total
    if wrong:
        raise ValueError(
            f"cu_seq_lens_q must be boundaries of documents, integers that grow from 0 to at most {total} (B * N), "
            f"got {cu_seq_lens}. For documents of 3 and 2 tokens it is [0, 3, 5]."
        )


def _refuse_position_ids(position_ids: torch.Tensor, shape: tuple[int, int]):
    raise ValueError(
        f"position_ids must be integers of shape {shape} or (1, {shape[1]}), got {position_ids.dtype} of shape "
        f"{tuple(position_ids.shape)}. Leave them out for positions that count from 0 in each row."
    )


FILLED = 0.75
"""The shortest of documents that are computed together, as a share of the longest."""


def runs_of_like_length(lengths: list[int], budget: float = math.inf) -> Iterator[tuple[int, int, int]]:
    """(longest, first, end) of runs of falling lengths whose documents are computed together, each a row: alike, and
    no more than `budget` pairs of tokens unless a single document has more."""
    first = 0
    for end in range(1, len(lengths) + 1):
        longest = lengths[first]
        full = (end - first + 1) * longest**2 > budget
        if end == len(lengths) or full or lengths[end] < FILLED * longest:
            yield longest, first, end
            first = end


def values_can_be_read(tensor: torch.Tensor) -> bool:
    """False while a graph is traced (compile, export, fake or meta tensors), when no branch may depend on values."""
    return not (is_tracing(tensor) or tensor.is_meta)


def _like(real: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    return real.view(real.shape + (1,) * (other.dim() - 2)).to(other.device)
