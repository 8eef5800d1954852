"""What the from-scratch kernel is asked, and what it computes at once."""

from typing import NamedTuple

import torch

from .packing import Tokens
from .patterns import pattern_of
from .scores import SCORES
from .tile_plan import DocumentPlan, plan_documents


class Problem(NamedTuple):
    """What is to be computed, beside query, key and value: names, numbers and tensors.

    Attributes:
        visited, whole: bool (R, 1 or H, query blocks + 1, key blocks + 1), as `tiles.visit_table` makes them.
        block_size: tokens in a block.
        whole_below: documents of at most this many tokens are computed whole.
        plan: how, a `DocumentPlan` as a tensor; without numbers where it is not made yet.
        pattern: a row of PATTERNS, and its numbers as text.
        query_tokens, key_tokens: Tokens (R, N) and (R, K).
        first_head: the number of the first head in the whole model.
        user_mask: bool (R, 1 or H, N, K) or None.
        score: a row of SCORES, tensors with heads first, then numbers.
        bias: a row of BIASES or "", tensors with heads first, then numbers.
        softcap: 0 for none.
        dropout: the rate.
        seed: () int64, of the dropout.
    """

    visited: torch.Tensor
    whole: torch.Tensor
    block_size: int
    whole_below: int
    plan: torch.Tensor
    pattern: tuple[str, str]
    query_tokens: Tokens
    key_tokens: Tokens
    first_head: int
    user_mask: torch.Tensor | None
    score: tuple[str, list, list]
    bias: tuple[str, list, list]
    softcap: float
    dropout: float
    seed: torch.Tensor

    def documents(self, of_any_length: bool = False) -> DocumentPlan | None:
        """The documents that are computed whole, or None where there are none."""
        if of_any_length and bool(self.visited.any()):
            return plan_documents(self.query_tokens)
        if not self.whole_below:
            return None
        made = self.plan.numel() > 0
        plan = DocumentPlan.from_tensor(self.plan) if made else plan_documents(self.query_tokens, self.whole_below)
        return plan if plan.groups else None

    @property
    def sees_documents(self) -> bool:
        """Whether the pattern shows each token all of its document."""
        pattern = pattern_of(*self.pattern)
        return pattern.sees_all and not pattern.causal

    @property
    def scores_alone(self) -> bool:
        """Whether scores are query · key times a number, and nothing more."""
        return SCORES[self.score[0]].is_dot_product and not self.softcap and not self.bias[0]


class Step(NamedTuple):
    """n units, h heads, b queries, k keys that are computed at once.

    Attributes:
        head: (n or 1, h, 1, 1) head numbers, from 0.
        query_places, key_places: where they stand in what the road has arranged.
        lengths: (b, k).
        query, key: Tokens, (n, 1, b, 1) and (n, 1, 1, k), or None where nobody asks.
        hidden: bool (n, 1 or h, b or 1, k), True where a key may not be seen; None where all are.
        nothing: bool (n, 1 or h, b, 1), True for a query that sees none of these keys; None where it does not matter.
        weights: where its weights stand among those that are kept for the backward, or None.
    """

    head: torch.Tensor
    query_places: torch.Tensor | slice
    key_places: torch.Tensor | slice
    lengths: tuple[int, int]
    query: Tokens | None
    key: Tokens | None
    hidden: torch.Tensor | None
    nothing: torch.Tensor | None
    weights: slice | None = None
