"""Attention tile by tile: running softmax forward, recomputation backward, only blocks that are visited.

A unit is a block of queries with the heads that share its list of key blocks. Units with equally many key blocks are
computed together: their key blocks are gathered side by side, so that a tile is (units, heads, queries, keys). Memory
grows with the length of the text, not with its square.
"""

import ast
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch.nn.functional import pad

from .biases import BIASES
from .masks import visible
from .packing import Tokens
from .patterns import PATTERNS, mix
from .scores import SCORES
from .tiles import pad_to_blocks

SCORES_AT_ONCE = 2**20
"""Scores held at once: 4 MiB in fp32, which stays near a processor."""

KEYS_AT_ONCE = 512
"""Keys of one step of the running softmax."""


class Problem(NamedTuple):
    """What is to be computed, beside query, key and value: names, numbers and tensors.

    Attributes:
        visited, whole: bool (R, 1 or H, query blocks + 1, key blocks + 1), as `tiles.visit_table` makes them.
        block_size: tokens in a block.
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


class Blocks:
    """A tensor (R, N, G, d) in blocks of tokens, (R * G * blocks, block_size, d), read by `heads` that share its G."""

    def __init__(self, x: torch.Tensor, block_size: int, heads: int):
        self.rows, self.length, self.groups, self.width = x.shape
        self.block_size, self.heads_per_group = block_size, heads // self.groups
        x = pad(x.transpose(1, 2), (0, 0, 0, -self.length % block_size))
        self.count = x.shape[2] // block_size
        self.data = x.reshape(-1, block_size, self.width)

    def places(self, row: torch.Tensor, head: torch.Tensor, block: torch.Tensor) -> torch.Tensor:
        """Where in `data` each (row, head, block) stands."""
        return (row * self.groups + head // self.heads_per_group) * self.count + block

    def gather(self, places: torch.Tensor) -> torch.Tensor:
        """(n, h, c) places to (n, h, c * block_size, d): blocks side by side."""
        n, heads, blocks = places.shape
        return self.data.index_select(0, places.flatten()).view(n, heads, blocks * self.block_size, self.width)

    def restore(self, data: torch.Tensor) -> torch.Tensor:
        """What stands in such blocks back to (R, N, G, d)."""
        return data.view(self.rows, self.groups, -1, data.shape[-1])[:, :, : self.length].transpose(1, 2)


class Tile(NamedTuple):
    """One step: n units, h heads, b queries, k keys.

    Attributes:
        head: (n or 1, h, 1, 1) head numbers, from 0.
        query_places, key_places: where the blocks stand, (n, h, 1) and (n, h, c).
        query, key: Tokens, (n, 1, b, 1) and (n, 1, 1, k).
        hidden: bool (n, 1 or h, b, k), True where a key may not be seen; None where all are.
    """

    head: torch.Tensor
    query_places: torch.Tensor
    key_places: torch.Tensor
    query: Tokens
    key: Tokens
    hidden: torch.Tensor | None


class Tiling:
    """Goes through the tiles of a problem and computes the scores of each."""

    def __init__(self, problem: Problem, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor):
        self.problem, size, self.heads = problem, problem.block_size, query.shape[2]
        name, numbers = problem.pattern
        self.pattern = PATTERNS[name](**ast.literal_eval(numbers))
        self.score, self.bias = SCORES[problem.score[0]], BIASES.get(problem.bias[0])
        # The scale of a dot product is taken into the query: there are fewer numbers in it than scores.
        self.scale = problem.score[2][0] if self.score.is_dot_product else None
        query = query if self.scale is None else query * self.scale
        self.query, self.key, self.value = (Blocks(x, size, self.heads) for x in (query, key, value))
        # 32 bits are enough for a place in a text, and are compared twice as fast.
        self.query_tokens, self.key_tokens = (
            Tokens(*(None if x is None else pad_to_blocks(x.int(), size, -1).flatten(0, 1) for x in tokens))
            for tokens in (problem.query_tokens, problem.key_tokens)
        )
        self.user_mask = problem.user_mask
        if self.user_mask is not None:
            missing = (0, -key.shape[1] % size, 0, -query.shape[1] % size)
            self.user_mask = pad(self.user_mask, missing).unflatten(3, (-1, size)).unflatten(2, (-1, size))
        # Additive scores hold d_k numbers for each pair until they are summed.
        self.budget = SCORES_AT_ONCE // (1 if self.score.is_dot_product else query.shape[3])

    def units(self) -> Iterator[list["Tile"]]:
        """Groups of units, each as the steps of its running softmax (made when they are asked for)."""
        lists, size = self.problem.visited.shape[1], self.problem.block_size
        per_head = lists > 1
        visited, seen_whole = (
            table[..., : self.query.count, : self.key.count].flatten(0, 2)
            for table in (self.problem.visited, self.problem.whole)
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
            step = max(1, min(blocks, KEYS_AT_ONCE // size))
            heads = 1 if per_head else self.heads
            units = ((count == blocks) & (seen_whole == whole)).nonzero().squeeze(1)
            for chunk in units.split(max(1, self.budget // (heads * size * step * size))):
                row = chunk // (lists * self.query.count)
                block = chunk % self.query.count
                head = ((chunk // self.query.count) % self.heads).unsqueeze(1) if per_head else own.unsqueeze(0)
                parts = key_block[first[chunk].unsqueeze(1) + torch.arange(blocks, device=count.device)]
                yield [self.tile(row, head, block, part, bool(whole)) for part in parts.split(step, dim=1)]

    def tile(self, row, head, query_block: torch.Tensor, key_blocks: torch.Tensor, whole: bool) -> Tile:
        """The tile of units (n,) in `row` at `query_block`, heads (n or 1, h), and their key blocks (n, c)."""
        row_, head_ = row.view(-1, 1, 1), head.unsqueeze(2)
        key_blocks_ = key_blocks.unsqueeze(1)
        query = self.query_tokens.at(row * self.query.count + query_block)
        key = self.key_tokens.at(row.unsqueeze(1) * self.key.count + key_blocks)
        query = _with_flags(x if x is None else x[:, None, :, None] for x in query)
        key = _with_flags(x if x is None else x.flatten(1)[:, None, None, :] for x in key)
        hidden = None if whole else ~self.seen(row_, head, query_block, key_blocks_, query, key)
        return Tile(
            head[..., None, None],
            self.query.places(row_, head_, query_block.view(-1, 1, 1)),
            self.key.places(row_, head_, key_blocks_),
            query,
            key,
            hidden,
        )

    def seen(self, row, head, query_block, key_blocks, query: Tokens, key: Tokens) -> torch.Tensor:
        """bool (n, 1 or h, b, k): who sees whom in a tile."""
        seen = visible(self.pattern, (head + self.problem.first_head)[..., None, None], query, key)
        if self.user_mask is None:
            return seen
        of = head if self.user_mask.shape[1] > 1 else torch.zeros_like(head[:, :1])
        picked = self.user_mask[row, of.unsqueeze(2), query_block.view(-1, 1, 1), :, key_blocks]
        return seen & picked.transpose(2, 3).flatten(3)

    def scores(self, tile: Tile, query, key, bias_query, score_tensors, bias_tensors) -> torch.Tensor:
        """(n, h, b, k) scores of a tile in at least fp32, capped and with their bias, not yet masked."""
        head = tile.head[..., 0, 0]
        if self.problem.visited.shape[1] > 1:  # units of one head each
            score_tensors, bias_tensors = ([x[head] for x in tensors] for tensors in (score_tensors, bias_tensors))
        if self.scale is None:
            scores = self.score.tile(query, key, *score_tensors, *self.problem.score[2])
        else:
            scores = query @ key.transpose(-1, -2)
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        if self.problem.softcap:
            scores = self.problem.softcap * torch.tanh(scores / self.problem.softcap)
        if self.bias is not None:
            distance = tile.key.position - tile.query.position
            scores = scores + self.bias(distance, bias_query, *bias_tensors, *self.problem.bias[2])
        return scores

    def kept(self, tile: Tile) -> torch.Tensor:
        """What dropout leaves of each weight, 0 or 1 / (1 - rate): a hash of seed, head, documents and positions, so
        that the backward draws the same and a text the same wherever it stands in the row."""
        state = mix(self.problem.seed + tile.query.document)
        state = mix(mix(state + tile.head + self.problem.first_head) + tile.query.position)
        chance = mix(state + tile.key.position)
        keep = chance >= int(self.problem.dropout * 2**31)
        exact = torch.promote_types(self.query.data.dtype, torch.float32)
        return keep.to(exact) / (1 - self.problem.dropout)


def forward(
    problem: Problem,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias_query: torch.Tensor | None,
    sink: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """heads (R, N, H, d_v), and the logarithm of each softmax's denominator (R, H, N), for the backward.

    Args:
        query, key, value: (R, N, H, d_k), (R, K, G, d_k), (R, K, G, d_v).
        bias_query: (R, N, H, d_k) for a bias that depends on the query, or None.
        sink: (H,) or None.
    """
    tiling = Tiling(problem, query, key, value)
    exact = torch.promote_types(query.dtype, torch.float32)
    second = None if bias_query is None else Blocks(bias_query, problem.block_size, query.shape[2])
    out = tiling.query.data.new_zeros(*tiling.query.data.shape[:2], value.shape[3], dtype=value.dtype)
    log_sum = out.new_zeros(out.shape[:2], dtype=exact)
    for steps in tiling.units():
        best = total = mixed = None
        for tile in steps:
            scores = tiling.scores(
                tile,
                tiling.query.gather(tile.query_places),
                tiling.key.gather(tile.key_places),
                None if second is None else second.gather(tile.query_places),
                problem.score[1],
                problem.bias[1],
            )
            if tile.hidden is not None:
                scores.masked_fill_(tile.hidden, float("-inf"))
            greatest = scores.amax(-1, keepdim=True)
            new_best = greatest if best is None else torch.maximum(best, greatest)
            # Where nothing has been seen yet, any finite number stands for the greatest score.
            shift = new_best.masked_fill(new_best == float("-inf"), 0)
            weights = scores.sub_(shift).exp_()
            part = weights.sum(-1, keepdim=True)
            if problem.dropout:
                weights = weights * tiling.kept(tile)
            product = (weights.to(value.dtype) @ tiling.value.gather(tile.key_places)).to(exact)
            if best is None:
                total, mixed = part, product
            else:
                scale = (best - shift).exp()
                total, mixed = total * scale + part, mixed * scale + product
            best = new_best
        if sink is not None:
            at_sink = sink.to(exact)[steps[0].head]
            shift = torch.maximum(shift, at_sink)
            scale = (best - shift).exp()
            total, mixed = total * scale + (at_sink - shift).exp(), mixed * scale
        places = steps[0].query_places.flatten()
        some = total > 0
        heads = (mixed / total.where(some, 1)).where(some, 0)
        out.index_copy_(0, places, heads.to(value.dtype).flatten(0, 1))
        log_sum.index_copy_(0, places, (shift + total.where(some, 1).log()).squeeze(-1).flatten(0, 1))
    log_sum = log_sum.view(query.shape[0], query.shape[2], -1)[..., : query.shape[1]]
    return tiling.query.restore(out).contiguous(), log_sum.contiguous()


def backward(
    problem: Problem,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias_query: torch.Tensor | None,
    sink: torch.Tensor | None,
    heads: torch.Tensor,
    log_sum: torch.Tensor,
    grad: torch.Tensor,
) -> tuple:
    """Gradients of query, key, value, bias_query, sink, and of the tensors of score and bias, tile by tile.

    Args:
        heads, log_sum: what `forward` returned.
        grad: (R, N, H, d_v), the gradient of `heads`.
    """
    tiling, size, num_heads = Tiling(problem, query, key, value), problem.block_size, query.shape[2]
    exact = torch.promote_types(query.dtype, torch.float32)
    second = None if bias_query is None else Blocks(bias_query, size, num_heads)
    grads = Blocks(grad, size, num_heads)
    # How much a row's weights gain together: what each one gains beyond it moves its score.
    common = (grad.to(exact) * heads.to(exact)).sum(-1, keepdim=True)
    commons, log_sums = (Blocks(x, size, num_heads) for x in (common, log_sum.transpose(1, 2).unsqueeze(-1)))
    of_query, of_key, of_value = (x.data.new_zeros(x.data.shape, dtype=exact) for x in _three(tiling))
    of_second = None if second is None else torch.zeros_like(second.data, dtype=exact)
    of_tensors = [torch.zeros_like(x, dtype=exact) for x in (*problem.score[1], *problem.bias[1])]
    split = len(problem.score[1])

    for steps in tiling.units():
        for tile in steps:
            at_query, at_key = tile.query_places.flatten(), tile.key_places.flatten()
            tile_query, tile_key = tiling.query.gather(tile.query_places), tiling.key.gather(tile.key_places)
            tile_second = None if second is None else second.gather(tile.query_places)
            scores, pull_back = _scores_with_gradient(tiling, tile, tile_query, tile_key, tile_second, split)
            if tile.hidden is not None:
                scores.masked_fill_(tile.hidden, float("-inf"))
            weights = scores.sub_(log_sums.gather(tile.query_places)).exp_()

            tile_grad = grads.gather(tile.query_places)
            gain = (tile_grad @ tiling.value.gather(tile.key_places).transpose(-1, -2)).to(exact)
            dropped = weights
            if problem.dropout:
                kept = tiling.kept(tile)
                dropped, gain = weights * kept, gain * kept
            to_value = dropped.to(grad.dtype).transpose(-1, -2) @ tile_grad
            moved = gain.sub_(commons.gather(tile.query_places)).mul_(weights)

            to_query, to_key, to_second, to_tensors = pull_back(moved)
            of_query.index_add_(0, at_query, _in_blocks(to_query, size).to(exact))
            of_key.index_add_(0, at_key, _in_blocks(to_key, size).to(exact))
            of_value.index_add_(0, at_key, _in_blocks(to_value, size).to(exact))
            if of_second is not None:
                of_second.index_add_(0, at_query, _in_blocks(to_second, size).to(exact))
            for total, part in zip(of_tensors, to_tensors, strict=True):
                total += part
    of_sink = None
    if sink is not None:
        at_sink = (sink.to(exact).view(-1, 1) - log_sum).exp()  # (R, H, N); 1 where only the sink was seen
        of_sink = -(at_sink * common.squeeze(-1).transpose(1, 2)).sum((0, 2)).to(sink.dtype)
    return (
        tiling.query.restore(of_query if tiling.scale is None else of_query * tiling.scale).to(query.dtype),
        tiling.key.restore(of_key).to(key.dtype),
        tiling.value.restore(of_value).to(value.dtype),
        None if second is None else second.restore(of_second).to(bias_query.dtype),
        of_sink,
        [x.to(y.dtype) for x, y in zip(of_tensors, (*problem.score[1], *problem.bias[1]), strict=True)],
    )


def _three(tiling: Tiling) -> tuple[Blocks, Blocks, Blocks]:
    return tiling.query, tiling.key, tiling.value


def _in_blocks(x: torch.Tensor, size: int) -> torch.Tensor:
    """(n, h, c * size, d) to (n * h * c, size, d)."""
    return x.reshape(-1, size, x.shape[-1])


def _scores_with_gradient(tiling: Tiling, tile: Tile, query, key, second, split: int):
    """The scores of a tile, and the function from their gradient to those of query, key, second and all tensors."""
    problem = tiling.problem
    tensors = (*problem.score[1], *problem.bias[1])
    if tiling.scale is not None and not problem.softcap and tiling.bias is None:

        def pull_back(moved):
            moved = moved.to(query.dtype)
            return moved @ key, moved.transpose(-1, -2) @ query, None, ()

        return tiling.scores(tile, query, key, None, (), ()), pull_back

    def scores_of(query, key, second, *tensors):
        return tiling.scores(tile, query, key, second, tensors[:split], tensors[split:])

    # What the gradient needs of the scores stays as it is; the scores that are returned are written to.
    if second is None:
        scores, pull = torch.func.vjp(lambda q, k, *rest: scores_of(q, k, None, *rest), query, key, *tensors)

        def pull_back(moved):
            to_query, to_key, *rest = pull(moved)
            return to_query, to_key, None, rest

    else:
        scores, pull = torch.func.vjp(scores_of, query, key, second, *tensors)

        def pull_back(moved):
            to_query, to_key, to_second, *rest = pull(moved)
            return to_query, to_key, to_second, rest

    return scores.clone(), pull_back


def _with_flags(fields) -> Tokens:
    """Tokens from their fields, `is_global` bool again."""
    tokens = Tokens(*fields)
    return tokens if tokens.is_global is None else tokens._replace(is_global=tokens.is_global == 1)
