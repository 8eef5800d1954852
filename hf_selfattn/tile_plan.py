"""Which documents the from-scratch kernel computes whole, and where their tokens go: made once a forward."""

from typing import NamedTuple

import torch

from .packing import Tokens, runs_of_like_length


class DocumentPlan(NamedTuple):
    """Documents that are computed whole, by falling length, those of like length filled up to the longest of them.

    Attributes:
        groups: (longest, number of documents) of those that are alike.
        in_place: whether all tokens stand as they should: documents of one length, and no padding.
        order: (P,) the place of each arranged token among R * N; at what a document is filled up with, some token's.
        real: (P,) bool, False at what documents are filled up with.
        back: (R * N,) where each token stands among the P arranged; P where it does not.
    """

    groups: list[tuple[int, int]]
    in_place: bool
    order: torch.Tensor
    real: torch.Tensor
    back: torch.Tensor

    @property
    def pairs(self) -> int:
        """Pairs of tokens that are computed, those that documents are filled up with included."""
        return sum(longest**2 * count for longest, count in self.groups)

    def as_tensor(self) -> torch.Tensor:
        """All in one, so that a graph has one size to know."""
        header = [len(self.groups), self.in_place, len(self.order), *(x for group in self.groups for x in group)]
        header = torch.tensor(header, device=self.order.device)
        return torch.cat([header, self.order, self.real.long(), self.back])

    @classmethod
    def from_tensor(cls, plan: torch.Tensor) -> "DocumentPlan":
        groups, in_place, size = plan[:3].tolist()
        numbers = plan[3 : 3 + 2 * groups].tolist()
        order, real, back = plan[3 + 2 * groups :].tensor_split((size, 2 * size))
        return cls(list(zip(numbers[::2], numbers[1::2], strict=True)), bool(in_place), order, real.bool(), back)


def is_short(tokens: Tokens, whole_below: int) -> torch.Tensor:
    """bool (R, N): real tokens of documents that are computed whole."""
    return (tokens.document >= 0) & (tokens.length <= whole_below)


def without_short(tokens: Tokens, whole_below: int) -> Tokens:
    """The same, with documents that are computed whole as padding."""
    return tokens._replace(document=tokens.document.masked_fill(is_short(tokens, whole_below), -1))


def plan_documents(tokens: Tokens, whole_below: int | None = None, more_than: int = 0) -> DocumentPlan:
    """The plan of all documents with at most `whole_below` tokens (None: any length), and `more_than` so many. Values
    are read."""
    device = tokens.document.device
    taken = tokens.length > more_than  # 0 at padding
    taken = taken if whole_below is None else taken & is_short(tokens, whole_below)
    places = taken.flatten().nonzero().squeeze(1)
    _, lengths = tokens.document.flatten()[places].unique_consecutive(return_counts=True)
    starts = lengths.cumsum(0) - lengths
    lengths, by_length = lengths.sort(descending=True, stable=True)
    starts = starts[by_length]

    groups, order, real = [], [places.new_empty(0)], [places.new_empty(0, dtype=torch.bool)]
    for longest, low, high in runs_of_like_length(lengths.tolist()):
        offset = torch.arange(longest, device=device)
        filled = offset < lengths[low:high, None]
        groups.append((longest, high - low))
        order.append(places[torch.where(filled, starts[low:high, None] + offset, 0)].flatten())
        real.append(filled.flatten())
    order, real = torch.cat(order), torch.cat(real)
    back = torch.full((tokens.document.numel(),), len(order), device=device)
    kept = real.nonzero().squeeze(1)
    back[order[kept]] = kept
    in_place = len(places) == len(order) == len(back) and bool((lengths == lengths[:1]).all())
    return DocumentPlan(groups, in_place, order, real, back)
