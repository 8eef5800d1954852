"""Which blocks of queries and keys a kernel of tiles has to look at."""

import re
from typing import NamedTuple

import torch

from .packing import Packing, Tokens, values_can_be_read
from .patterns import PATTERNS, pattern_of
from .tile_plan import plan_documents, without_short

OPERATORS = re.sub(r"\W", "_", __name__.rpartition(".")[0])
"""The namespace of this copy's operators: two copies of the code in one process (the installed package, and the code
saved with a model) do not replace each other's."""


WHOLE_BELOW = 512
"""Documents of at most this many tokens are computed whole; their blocks are not visited."""


class TileMask(NamedTuple):
    """Who sees whom, as the tiled kernel needs it.

    Attributes:
        visited: bool (R, 1 or H, query blocks + 1, key blocks + 1), False where no token sees any of the other block.
        whole: of the same shape, True where every token of the one sees every token of the other.
        block_size: tokens in a block; the last block may be shorter.
        whole_below: documents of at most this many tokens are computed whole, and their blocks are not visited.
        plan: how those are computed, `DocumentPlan.as_tensor`; without numbers while a graph is traced.
        room: for each head, the number of weights of documents that are computed whole; 0 while a graph is traced.
        pattern: what decides within a block.
        query, key: Tokens (R, N) and (R, K).
        heads: the numbers of these heads in the whole model.
        user_mask: bool (R, 1 or H, N, K) or None.
    """

    visited: torch.Tensor
    whole: torch.Tensor
    block_size: int
    whole_below: int
    plan: torch.Tensor
    room: int
    pattern: object
    query: Tokens
    key: Tokens
    heads: range
    user_mask: torch.Tensor | None


def mask(
    pattern, query: Tokens, key: Tokens, packing: Packing, heads: range, user_mask: torch.Tensor | None
) -> TileMask:
    """Finds the blocks to visit from what each block holds, without looking at pairs of tokens."""
    # A mask of pairs may leave out more if it is looked at in smaller blocks.
    block_size = pattern.tile_size if user_mask is None else min(pattern.tile_size, 128)
    if values_can_be_read(query.position):
        # A short text is one block; while a graph is traced, its length may stand for any.
        block_size = min(block_size, max(query.position.shape[1], key.position.shape[1], 1))
    # With a memory a text sees more than its own tokens, and a mask of pairs is read block by block.
    whole_below = WHOLE_BELOW if key is query and user_mask is None else 0
    plan, room, all_short = query.document.new_empty(0), 0, False
    if whole_below and values_can_be_read(query.position):
        documents, all_short = plan_documents(query, whole_below), not bool((query.length > whole_below).any())
        whole_below = max((longest for longest, _ in documents.groups), default=0)
        plan, room = documents.as_tensor(), documents.pairs
    num_heads = len(heads) if pattern.per_head else 1
    if all_short:
        sizes = _table_sizes(query, key, num_heads, block_size)
        # Two tensors: a compiled layer would take notice of one that comes twice.
        visited, whole = (query.document.new_zeros(sizes, dtype=torch.bool) for _ in range(2))
    else:
        visited, whole = visit_table(
            [x for x in query if x is not None],
            [x for x in key if x is not None],
            user_mask,
            fields_given(query),
            name_of(pattern),
            pattern.numbers_as_text(),
            heads.start,
            num_heads,
            block_size,
            whole_below,
        )
    return TileMask(visited, whole, block_size, whole_below, plan, room, pattern, query, key, heads, user_mask)


@torch.library.custom_op(f"{OPERATORS}::visit_table", mutates_args=())
def visit_table(
    query_tokens: list[torch.Tensor],
    key_tokens: list[torch.Tensor],
    user_mask: torch.Tensor | None,
    fields: list[bool],
    pattern: str,
    pattern_numbers: str,
    first_head: int,
    num_heads: int,
    block_size: int,
    whole_below: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`TileMask.visited` and `.whole`, as an operator, so that a traced graph has no arithmetic on their sizes.

    Each has one block more than there is, never visited: a graph traced with a dynamic length would otherwise hold
    only for texts of more than one block.
    """
    pattern = pattern_of(pattern, pattern_numbers)
    query, key = tokens_from(query_tokens, fields), tokens_from(key_tokens, fields)
    if whole_below:
        query = key = without_short(query, whole_below)
    visited, whole = look_at_blocks(pattern, query, key, range(first_head, first_head + num_heads), block_size)
    if user_mask is not None:
        some, every = _in_blocks(user_mask, block_size)
        visited, whole = visited & some, whole & every
    return torch.nn.functional.pad(visited, (0, 1, 0, 1)), torch.nn.functional.pad(whole, (0, 1, 0, 1))


@visit_table.register_fake
def _(query_tokens, key_tokens, user_mask, fields, pattern, pattern_numbers, first_head, num_heads, block_size, _):
    query, key = (tokens_from(tokens, fields) for tokens in (query_tokens, key_tokens))
    sizes = _table_sizes(query, key, num_heads, block_size)
    return tuple(query_tokens[0].new_empty(sizes, dtype=torch.bool) for _ in range(2))


def _table_sizes(query: Tokens, key: Tokens, num_heads: int, block_size: int) -> tuple[int, ...]:
    """One block more than there is, for queries and for keys."""
    (rows, queries), keys = query.document.shape, key.document.shape[1]
    return rows, num_heads, *((length + block_size - 1) // block_size + 1 for length in (queries, keys))


def fields_given(tokens: Tokens) -> list[bool]:
    """Which fields are not None, for operators, which take lists of tensors."""
    return [x is not None for x in tokens]


def tokens_from(given: list[torch.Tensor], fields: list[bool]) -> Tokens:
    """Tokens from those of their fields that are not None."""
    given = iter(given)
    return Tokens(*(next(given) if field else None for field in fields))


def name_of(pattern) -> str:
    """The row of PATTERNS that a pattern is of."""
    return next(name for name, cls in PATTERNS.items() if cls is type(pattern))


def look_at_blocks(
    pattern, query: Tokens, key: Tokens, heads: range, block_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """`TileMask.visited` and `TileMask.whole`, without the user's mask."""
    head = torch.arange(heads.start, heads.stop, device=query.document.device).view(-1, 1, 1)
    in_queries = tuple(x.at((slice(None), None, slice(None), None)) for x in block_bounds(query, block_size))
    in_keys = tuple(x.at((slice(None), None, None)) for x in block_bounds(key, block_size))
    (query_low, query_high), (key_low, key_high) = in_queries, in_keys

    meet = (query_low.document <= key_high.document) & (key_low.document <= query_high.document)
    seen, whole = pattern.may_see(head, in_queries, in_keys), pattern.all_see(head, in_queries, in_keys)
    if pattern.causal:
        seen = seen & (key_low.position <= query_high.position)
        whole = whole & (key_high.position <= query_low.position)
    # In a block with several documents smallest and greatest position are of different ones, and say nothing.
    mixed = (query_low.document != query_high.document) | (key_low.document != key_high.document)
    visited = meet & (seen | mixed)
    filled = _filled(query, block_size)[:, None, :, None] & _filled(key, block_size)[:, None, None, :]
    whole = visited & whole & filled & ~mixed
    return visited, whole


def _filled(tokens: Tokens, block_size: int) -> torch.Tensor:
    """(R, blocks): whether a block has no padding."""
    return pad_to_blocks(tokens.document, block_size, -1).amin(-1) >= 0


def block_bounds(tokens: Tokens, block_size: int) -> tuple[Tokens, Tokens]:
    """The smallest and the greatest of each field over the real tokens of each block, (R, blocks).

    A block without real tokens has document bounds that meet no document.
    """
    real = tokens.document >= 0
    greatest = torch.iinfo(torch.int32).max  # pad takes its value as a double, which cannot hold all of int64
    low, high = [], []
    for field in tokens:
        if field is None:
            low.append(None)
            high.append(None)
            continue
        number = field.long()
        low.append(pad_to_blocks(number.masked_fill(~real, greatest), block_size, greatest).amin(-1))
        high.append(pad_to_blocks(number.masked_fill(~real, -1), block_size, -1).amax(-1))
    low, high = Tokens(*low), Tokens(*high)
    # Without a global token in it, a block's bounds are 0; asked as a question they are bool.
    if tokens.is_global is not None:
        low, high = (x._replace(is_global=x.is_global == 1) for x in (low, high))
    return low, high


def pad_to_blocks(x: torch.Tensor, block_size: int, fill) -> torch.Tensor:
    """(R, N) to (R, blocks, block_size), the last block filled up with `fill`."""
    rows, length = x.shape
    blocks = (length + block_size - 1) // block_size
    return torch.nn.functional.pad(x, (0, blocks * block_size - length), value=fill).view(rows, blocks, block_size)


def _in_blocks(user_mask: torch.Tensor, block_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(R, 1 or H, N, K) to (R, 1, query blocks, key blocks): whether some pair, and whether every pair may be seen."""
    missing = (0, -user_mask.shape[3] % block_size, 0, -user_mask.shape[2] % block_size)
    blocks = torch.nn.functional.pad(user_mask, missing).unflatten(3, (-1, block_size)).unflatten(2, (-1, block_size))
    return blocks.any(5).any(3).any(1, keepdim=True), blocks.all(5).all(3).all(1, keepdim=True)
