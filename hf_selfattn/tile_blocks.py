"""The road of long documents: blocks of queries, and only the blocks of keys that they may see."""

from collections.abc import Iterator

import torch
from torch.nn.functional import pad

from .packing import Tokens
from .tile_problem import Problem, Step
from .tile_roads import Road, with_flags
from .tiles import pad_to_blocks

KEYS_AT_ONCE = 2048
"""Keys of one step of the running softmax."""


class BlockRoad(Road):
    """Blocks of queries with the heads that share their list of key blocks; units with equally long lists together.

    The key blocks of a unit are gathered side by side.
    """

    def __init__(self, problem: Problem, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor):
        super().__init__(problem, query, key, value)
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
        query = with_flags(None if x is None else x[:, None, :, None] for x in query)
        key = with_flags(None if x is None else x.flatten(1)[:, None, None, :] for x in key)
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
