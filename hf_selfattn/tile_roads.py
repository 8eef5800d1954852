"""What is computed together: the two roads of the from-scratch kernel, and what a step of either needs.

Documents of few tokens are taken whole, several of like length at once (`DocumentRoad`); longer ones block by block,
only blocks that are visited (`BlockRoad`). Either arranges its tokens once, goes through steps, and puts the results
back where the tokens stood. A step is (units, heads, queries, keys); memory grows with the length of the text.
"""

import ast
from collections.abc import Iterator

import torch
from torch.nn.functional import pad

from .biases import BIASES
from .masks import visible
from .packing import Tokens, runs_of_like_length
from .patterns import PATTERNS, mix
from .scores import SCORES
from .tile_problem import Problem, Step
from .tiles import is_short, pad_to_blocks, without_short

SCORES_AT_ONCE = 2**19
"""Scores held at once where each takes two bytes: 1 MiB, which stays near a processor's core."""

SCORES_AT_ONCE_GPU = 2**26
"""The same where many cores work on them."""

KEYS_AT_ONCE = 2048
"""Keys of one step of the running softmax."""


class Road:
    """Goes through a problem step by step and computes the scores of each.

    A road has
        steps(with_sink)            lists of Steps, those of one running softmax together
        arrange(x), arrange_keys(x) (R, N, H, d) and (R, K, G, d) in its own order
        arrange_gradient(x)         (R, N, H, d), 0 where no query stands
        read(x, places, length)     (n, h, length, d) from what `arrange` made
        restore(x), restore_keys(x) back again, else 0; keys' sums over heads that share them
        empty(width, dtype), empty_keys(width, dtype)   room for results
        write(x, places, values), add(x, places, values)
    """

    fused = False
    """Whether a softmax that is taken at once is left to torch's fused attention."""

    def __init__(self, problem: Problem, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor):
        self.problem, self.heads = problem, query.shape[2]
        self.exact = torch.promote_types(query.dtype, torch.float32)
        name, numbers = problem.pattern
        self.pattern = PATTERNS[name](**ast.literal_eval(numbers))
        self.score, self.bias = SCORES[problem.score[0]], BIASES.get(problem.bias[0])
        self.scale = problem.score[2][0] if self.score.is_dot_product else None
        self.per_head = problem.visited.shape[1] > 1
        at_once = 2 * SCORES_AT_ONCE // query.element_size() if query.device.type == "cpu" else SCORES_AT_ONCE_GPU
        # Additive scores hold d_k numbers for each pair until they are summed.
        self.budget = at_once // (1 if self.score.is_dot_product else query.shape[3])

    def take(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
        """Arranges what is read in every step."""
        self.query, self.key, self.value = self.arrange(query), self.arrange_keys(key), self.arrange_keys(value)

    def scores(self, step: Step, query, key, bias_query, score_tensors, bias_tensors) -> torch.Tensor:
        """(n, h, b, k) scores of a step in at least fp32, capped and with their bias, not yet masked."""
        head = step.head[..., 0, 0]
        score_tensors, bias_tensors = ([self.of_heads(x, head) for x in xs] for xs in (score_tensors, bias_tensors))
        if self.scale is None:
            scores = self.score.tile(query, key, *score_tensors, *self.problem.score[2])
        else:
            scores = scaled_product(query, key.transpose(-1, -2), self.scale)
        scores = scores.to(self.exact)
        if self.problem.softcap:
            scores = self.problem.softcap * torch.tanh(scores / self.problem.softcap)
        if self.bias is not None:
            distance = step.key.position - step.query.position
            scores = scores + self.bias(distance, bias_query, *bias_tensors, *self.problem.bias[2])
        return scores

    def of_heads(self, x: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
        """What a parameter (H, …) has for the heads of a step: all of them, or (n, 1, …) where units have one each."""
        return x if head.shape[0] == 1 and head.shape[1] == self.heads else x[head]

    def kept(self, step: Step) -> torch.Tensor:
        """What dropout leaves of each weight, 0 or 1 / (1 - rate): a hash of seed, head, documents and positions, so
        that the backward draws the same and a text the same wherever it stands in the row."""
        state = mix(self.problem.seed + step.query.document)
        state = mix(mix(state + step.head + self.problem.first_head) + step.query.position)
        chance = mix(state + step.key.position)
        keep = chance >= int(self.problem.dropout * 2**31)
        return keep.to(self.exact) / (1 - self.problem.dropout)

    def hidden(self, head, query: Tokens, key: Tokens) -> torch.Tensor:
        """bool (n, 1 or h, b, k): who does not see whom, without a user's mask."""
        document = query.document[:1, :, :1]
        if bool((document >= 0) & (query.document == document).all() & (key.document == document).all()):
            seen = self.pattern.sees(head + self.problem.first_head, query, key)
            seen = seen & (key.position <= query.position) if self.pattern.causal else seen
            pairs = (*query.document.shape[:3], key.document.shape[3])
            return ~seen.broadcast_to(torch.broadcast_shapes(seen.shape, pairs))
        return ~visible(self.pattern, head + self.problem.first_head, query, key)

    def nothing(self, query: Tokens, hidden: torch.Tensor | None) -> torch.Tensor | None:
        """`Step.nothing`, from the queries alone where a real token is known to see itself."""
        if hidden is None:
            return None
        alone = self.pattern.sees_itself and self.problem.user_mask is None
        nothing = query.document < 0 if alone else hidden.all(-1, keepdim=True)
        return nothing if bool(nothing.any()) else None


class DocumentRoad(Road):
    """Whole documents, (documents, heads, tokens, d), those of like length together, filled up to the longest."""

    def __init__(self, problem: Problem, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor):
        super().__init__(problem, query, key, value)
        self.shape, self.groups, device = query.shape[:2], key.shape[2], query.device
        self.tokens = Tokens(*(None if x is None else x.int().flatten() for x in problem.query_tokens))
        places = is_short(self.tokens, problem.whole_below).nonzero().squeeze(1)
        _, lengths = self.tokens.document[places].unique_consecutive(return_counts=True)
        starts = lengths.cumsum(0) - lengths
        lengths, order = lengths.sort(descending=True, stable=True)
        starts = starts[order]

        self.parts, arranged, first, weights = [], [], 0, 0
        for longest, low, high in runs_of_like_length(lengths.tolist(), self.budget // self.heads):
            offset = torch.arange(longest, device=device)
            real = offset < lengths[low:high, None]
            place = places[torch.where(real, starts[low:high, None] + offset, 0)]
            arranged.append((place, real))
            missing = None if bool(real.all()) else ~real
            # A single document may be too large for all heads at once.
            together = self.heads if high - low > 1 else max(1, min(self.heads, self.budget // longest**2))
            for heads in torch.arange(self.heads, device=device).split(together):
                size = (high - low) * len(heads) * longest
                part = slice(first, first + size), slice(weights, weights + size * longest)
                self.parts.append((*part, place, missing, heads.view(1, -1, 1, 1)))
                first, weights = first + size, weights + size * longest
        head = torch.arange(self.heads, device=device).view(-1, 1)
        shared = head // (self.heads // self.groups)
        self.order, self.key_order = (
            torch.cat([(place.unsqueeze(1) * count + number).flatten() for place, _ in arranged])
            for number, count in ((head, self.heads), (shared, self.groups))
        )
        real = torch.cat([real.unsqueeze(1).expand(-1, self.heads, -1).flatten() for _, real in arranged])
        # Where each token and head stands in what is arranged; one past its end where it does not.
        self.back = torch.full((self.shape.numel() * self.heads,), first, device=device)
        kept = real.nonzero().squeeze(1)
        self.back[self.order[kept]] = kept
        self.fillers = None if len(kept) == first else (~real).nonzero().squeeze(1)
        self.complete = len(places) == self.shape.numel()
        self.take(query, key, value)

    def steps(self, with_sink: bool) -> Iterator[list[Step]]:
        """One step for each part: its softmax needs no other."""
        # With a sink, weights come from a sum that is kept, and none is kept for what documents are filled up with.
        everything = self.pattern.sees_all and not self.pattern.causal and not with_sink
        for where, weights, place, missing, own in self.parts:
            query = key = nothing = None
            if not everything or self.bias is not None or self.problem.dropout:
                tokens = self.tokens.at(place)
                if missing is not None:
                    tokens = tokens._replace(document=tokens.document.masked_fill(missing, -1))
                query = _with_flags(None if x is None else x[:, None, :, None] for x in tokens)
                key = _with_flags(None if x is None else x[:, None, None, :] for x in tokens)
            if everything:
                hidden = None if missing is None else missing[:, None, None, :]
            else:
                hidden = self.hidden(own, query, key)
                nothing = None if self.pattern.sees_itself else self.nothing(query, hidden)
            yield [Step(own, where, where, (place.shape[1],) * 2, query, key, hidden, nothing, weights)]

    def read(self, x, places, length):
        rows = (places.stop - places.start) // length
        return x[places].view(-1, min(rows, self.heads), length, x.shape[-1])

    def arrange(self, x):
        return x.reshape(-1, x.shape[-1]).index_select(0, self.order)

    def arrange_keys(self, x):
        return x.reshape(-1, x.shape[-1]).index_select(0, self.key_order)

    def arrange_gradient(self, x):
        """0 where documents are filled up: what stands there is some other token's."""
        x = self.arrange(x)
        return x if self.fillers is None else x.index_fill_(0, self.fillers, 0)

    def empty(self, width: int, dtype: torch.dtype) -> torch.Tensor:
        """For results: every place is written to once."""
        return torch.empty(len(self.order), width, dtype=dtype, device=self.query.device)

    empty_keys = empty

    def write(self, x, places, values):
        x[places].view(values.shape).copy_(values)

    add = write

    def restore(self, x):
        x = x if self.complete else pad(x, (0, 0, 0, 1))
        return x.index_select(0, self.back).view(*self.shape, self.heads, -1)

    def restore_keys(self, x):
        x = self.restore(x)
        return x if self.groups == self.heads else x.unflatten(2, (self.groups, -1)).sum(3)


class BlockRoad(Road):
    """Blocks of queries with the heads that share their list of key blocks; units with equally long lists together.

    The key blocks of a unit are gathered side by side.
    """

    def __init__(self, problem: Problem, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor):
        super().__init__(problem, query, key, value)
        self.budget *= 2  # measured: fewer, larger steps pay where blocks are gathered
        size = problem.block_size
        self.rows, self.groups = query.shape[0], key.shape[2]
        self.lengths = query.shape[1], key.shape[1]
        self.blocks = tuple(-(-length // size) for length in self.lengths)
        # 32 bits are enough for a place in a text, and are compared twice as fast.
        self.query_tokens, self.key_tokens = (
            Tokens(*(None if x is None else pad_to_blocks(x.int(), size, -1).flatten(0, 1) for x in tokens))
            for tokens in (problem.query_tokens, problem.key_tokens)
        )
        self.user_mask = problem.user_mask
        if self.user_mask is not None:
            missing = (0, -self.lengths[1] % size, 0, -self.lengths[0] % size)
            self.user_mask = pad(self.user_mask, missing).unflatten(3, (-1, size)).unflatten(2, (-1, size))
        self.take(query, key, value)

    def steps(self, with_sink: bool) -> Iterator[list[Step]]:
        """Each unit's key blocks, KEYS_AT_ONCE keys a step."""
        lists, size = self.problem.visited.shape[1], self.problem.block_size
        queries, keys = self.blocks
        visited, seen_whole = (
            table[..., :queries, :keys].flatten(0, 2) for table in (self.problem.visited, self.problem.whole)
        )
        count = visited.sum(1)
        seen_whole = (visited == seen_whole).all(1)
        first = count.cumsum(0) - count
        key_block = visited.nonzero()[:, 1]
        own = torch.arange(self.heads, device=count.device)
        kinds = torch.stack((count, seen_whole), dim=1)
        for blocks, whole in kinds.unique(dim=0).tolist():
            if blocks == 0:
                continue
            at_once = max(1, min(blocks, KEYS_AT_ONCE // size))
            heads = 1 if self.per_head else self.heads
            units = ((count == blocks) & (seen_whole == whole)).nonzero().squeeze(1)
            for chunk in units.split(max(1, self.budget // (heads * size * at_once * size))):
                row = chunk // (lists * queries)
                block = chunk % queries
                head = ((chunk // queries) % self.heads).unsqueeze(1) if self.per_head else own.unsqueeze(0)
                parts = key_block[first[chunk].unsqueeze(1) + torch.arange(blocks, device=count.device)]
                yield [self.step(row, head, block, part, bool(whole)) for part in parts.split(at_once, dim=1)]

    def step(self, row, head, query_block: torch.Tensor, key_blocks: torch.Tensor, whole: bool) -> Step:
        """Units (n,) in `row` at `query_block`, heads (n or 1, h), and their key blocks (n, c)."""
        row_, head_ = row.view(-1, 1, 1), head.unsqueeze(2)
        (queries, keys), key_blocks_ = self.blocks, key_blocks.unsqueeze(1)
        query = self.query_tokens.at(row * queries + query_block)
        key = self.key_tokens.at(row.unsqueeze(1) * keys + key_blocks)
        query = _with_flags(None if x is None else x[:, None, :, None] for x in query)
        key = _with_flags(None if x is None else x.flatten(1)[:, None, None, :] for x in key)
        hidden = None
        if not whole:
            hidden = self.hidden(head_[..., None], query, key)
            if self.user_mask is not None:
                of = head_ if self.user_mask.shape[1] > 1 else torch.zeros_like(head_[:, :1])
                picked = self.user_mask[row_, of, query_block.view(-1, 1, 1), :, key_blocks_]
                hidden = hidden | ~picked.transpose(2, 3).flatten(3)
        group = head_ // (self.heads // self.groups)
        return Step(
            head[..., None, None],
            (row_ * self.heads + head_) * queries + query_block.view(-1, 1, 1),
            (row_ * self.groups + group) * keys + key_blocks_,
            (query.document.shape[2], key.document.shape[3]),
            query,
            key,
            hidden,
            self.nothing(query, hidden),
        )

    def read(self, x, places, length):
        return x.index_select(0, places.flatten()).view(*places.shape[:2], length, x.shape[-1])

    def arrange(self, x):
        size = self.problem.block_size
        x = pad(x.transpose(1, 2), (0, 0, 0, -x.shape[1] % size))
        return x.reshape(-1, size, x.shape[-1])

    arrange_keys = arrange_gradient = arrange

    def empty(self, width: int, dtype: torch.dtype) -> torch.Tensor:
        """For results: 0 where no block is visited."""
        return self.query.new_zeros(len(self.query), self.problem.block_size, width, dtype=dtype)

    def empty_keys(self, width: int, dtype: torch.dtype) -> torch.Tensor:
        """For sums over the queries that see a block, in at least fp32."""
        return self.key.new_zeros(len(self.key), self.problem.block_size, width, dtype=self.exact)

    def write(self, x, places, values):
        x.index_copy_(0, places.flatten(), values.reshape(-1, *x.shape[1:]).to(x.dtype))

    def add(self, x, places, values):
        x.index_add_(0, places.flatten(), values.reshape(-1, *x.shape[1:]).to(x.dtype))

    def restore(self, x):
        x = x.view(self.rows, -1, self.blocks[0] * self.problem.block_size, x.shape[-1])
        return x[:, :, : self.lengths[0]].transpose(1, 2)

    def restore_keys(self, x):
        x = x.view(self.rows, -1, self.blocks[1] * self.problem.block_size, x.shape[-1])
        return x[:, :, : self.lengths[1]].transpose(1, 2)


def roads(problem: Problem, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> Iterator[Road]:
    """The roads that have something to compute; together they compute all."""
    limit, tokens = problem.whole_below, problem.query_tokens
    if limit and bool(is_short(tokens, limit).any()):
        yield DocumentRoad(problem, query, key, value)
        tokens = without_short(tokens, limit)
        problem = problem._replace(query_tokens=tokens, key_tokens=tokens)
    if bool(problem.visited.any()):
        yield BlockRoad(problem, query, key, value)


def scaled_product(x: torch.Tensor, y: torch.Tensor, scale: float) -> torch.Tensor:
    """scale * x @ y of (n, h, a, b) and (n, h, b, c), the number taken along in the product."""
    left, right = x.flatten(0, 1), y.flatten(0, 1)
    out = x.new_empty(len(left), left.shape[1], right.shape[2])
    return torch.baddbmm(out, left, right, beta=0, alpha=scale).unflatten(0, x.shape[:2])


def _with_flags(fields) -> Tokens:
    """Tokens from their fields, `is_global` bool again."""
    tokens = Tokens(*fields)
    return tokens if tokens.is_global is None else tokens._replace(is_global=tokens.is_global == 1)
