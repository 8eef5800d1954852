"""The road of short documents: whole, those of like length together."""

from collections.abc import Iterator

import torch

from .packing import Tokens
from .tile_plan import DocumentPlan
from .tile_problem import Problem, Step
from .tile_roads import Road, with_flags


class DocumentRoad(Road):
    """Whole documents, (documents, heads, tokens, d), arranged as in the plan: (P, heads, d)."""

    def __init__(
        self, problem: Problem, plan: DocumentPlan, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ):
        super().__init__(problem, query, key, value)
        self.plan, self.shape, self.groups = plan, query.shape[:2], key.shape[2]
        self.fillers = None if plan.in_place else (~plan.real).nonzero().squeeze(1)
        self.budget *= 2  # measured: few large steps pay, where nothing but weights is held
        self.take(query, key, value)

    def steps(self, with_sink: bool) -> Iterator[list[Step]]:
        """One step for each part: its softmax needs no other."""
        # With a sink, weights come from a sum that is kept, and none is kept for what documents are filled up with.
        everything = self.pattern.sees_all and not self.pattern.causal and not with_sink
        wants_tokens = not everything or self.bias is not None or self.problem.dropout
        weights = 0
        for places, longest in self.parts():
            where, heads = places
            real = self.plan.real[where].view(-1, longest)
            missing = None if self.fillers is None or bool(real.all()) else ~real
            own = torch.arange(heads.start, heads.stop, device=real.device).view(1, -1, 1, 1)
            query = key = hidden = nothing = None
            if wants_tokens:
                query, key = self.tokens(self.plan.order[where].view(-1, longest), missing)
            if not everything:
                hidden = self.hidden(own, query, key)
                nothing = None if self.pattern.sees_itself else self.nothing(query, hidden)
            elif missing is not None:
                hidden = missing[:, None, None, :]
            kept = slice(weights, weights + own.numel() * real.numel() * longest)
            weights = kept.stop
            yield [Step(own, places, places, (longest, longest), query, key, hidden, nothing, kept)]

    def parts(self) -> Iterator[tuple[tuple[slice, slice], int]]:
        """((arranged tokens, heads), longest document) of what is computed at once."""
        end = 0
        for longest, count in self.plan.groups:
            together = max(1, self.budget // (self.heads * longest**2))
            # A single document may be too large for all heads at once.
            heads = self.heads if together > 1 else max(1, min(self.heads, self.budget // longest**2))
            for first in range(0, count, together):
                start, end = end, end + min(together, count - first) * longest
                for head in range(0, self.heads, heads):
                    yield (slice(start, end), slice(head, min(head + heads, self.heads))), longest

    def tokens(self, place: torch.Tensor, missing: torch.Tensor | None) -> tuple[Tokens, Tokens]:
        """Tokens as queries (n, 1, b, 1) and as keys (n, 1, 1, k)."""
        # 32 bits are enough for a place in a text, and are compared twice as fast.
        tokens = Tokens(*(None if x is None else x.flatten()[place].int() for x in self.problem.query_tokens))
        if missing is not None:
            tokens = tokens._replace(document=tokens.document.masked_fill(missing, -1))
        query = with_flags(None if x is None else x[:, None, :, None] for x in tokens)
        return query, with_flags(None if x is None else x[:, None, None, :] for x in tokens)

    def read(self, x, places, length):
        tokens, heads = places
        x = x[tokens].unflatten(0, (-1, length))
        if x.shape[2] != self.heads:  # heads that share keys
            x = x.repeat_interleave(self.heads // x.shape[2], dim=2)
        return x[:, :, heads].transpose(1, 2).contiguous()

    def arrange(self, x):
        x = x.flatten(0, 1)
        return x if self.plan.in_place else x.flatten(1).index_select(0, self.plan.order).view(-1, *x.shape[1:])

    arrange_keys = arrange

    def arrange_gradient(self, x):
        """0 where documents are filled up: what stands there is some other token's."""
        x = self.arrange(x)
        return x if self.fillers is None else x.index_fill_(0, self.fillers, 0)

    def empty(self, width: int, dtype: torch.dtype) -> torch.Tensor:
        """For results: every place is written to once. The last one is for tokens that are not arranged."""
        results = torch.empty(len(self.plan.order) + 1, self.heads, width, dtype=dtype, device=self.query.device)
        results[-1] = 0
        return results

    empty_keys = empty

    def write(self, x, places, values):
        tokens, heads = places
        x[tokens].unflatten(0, (-1, values.shape[2]))[:, :, heads].copy_(values.transpose(1, 2))

    add = write

    def restore(self, x):
        x = x[:-1] if self.plan.in_place else x.flatten(1).index_select(0, self.plan.back)
        return x.view(*self.shape, self.heads, -1)

    def restore_keys(self, x):
        x = self.restore(x)
        return x if self.groups == self.heads else x.unflatten(2, (self.groups, -1)).sum(3)
