"""Who may attend to whom: what a user's mask means, and the one rule that every kernel obeys."""

import torch

from .packing import Tokens, values_can_be_read

ACCEPTED = (
    "Accepted are (B, N) for padding and (B, N, N), (B, 1, N, N) or (B, H, N, N) for pairs, where True or 1 means "
    "'may attend': bool, integers 0 and 1, or float whose values are 0 (may attend) and <= -1e4 (may not), with at "
    "least one of the latter."
)


def read_mask(
    attention_mask: torch.Tensor | None, batch_size: int, length: int, num_heads: int
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Reads a user's `attention_mask` by the one contract.

    Returns:
        (padding_mask, user_mask), at most one of them not None: padding_mask (B, N) bool, True for a real token
        (None where every token is real); user_mask (B, 1 or H, N, N) bool, True where a query may see a key.

    Raises:
        ValueError: for another shape, type or value.
    """
    if attention_mask is None:
        return None, None
    if not isinstance(attention_mask, torch.Tensor):
        raise TypeError(f"attention_mask must be a tensor, got {type(attention_mask).__name__}. {ACCEPTED}")
    shape = tuple(attention_mask.shape)
    padding, pairs = (batch_size, length), (length, length)
    if shape not in [padding, (batch_size, *pairs), (batch_size, 1, *pairs), (batch_size, num_heads, *pairs)]:
        raise ValueError(
            f"attention_mask of shape {shape} does not fit a batch of B={batch_size}, N={length} and "
            f"H={num_heads} heads. {ACCEPTED}"
        )
    mask = _may_attend(attention_mask)
    if mask.dim() == 2:
        return (None if values_can_be_read(mask) and bool(mask.all()) else mask), None
    return None, mask.unsqueeze(1) if mask.dim() == 3 else mask


def _may_attend(mask: torch.Tensor) -> torch.Tensor:
    """The mask as bool; values are checked wherever they can be read."""
    if mask.dtype == torch.bool:
        return mask
    readable = values_can_be_read(mask)
    if mask.is_complex():
        raise ValueError(f"attention_mask of type {mask.dtype} does not say what is meant. {ACCEPTED}")
    if mask.is_floating_point():
        hidden = mask <= -1e4
        if not readable:
            raise ValueError(
                f"attention_mask of type {mask.dtype} cannot be checked while the model is compiled or exported. "
                f"Pass it as bool. {ACCEPTED}"
            )
        if not bool(((mask == 0) | hidden).all() & hidden.any()):
            raise ValueError(
                f"attention_mask of type {mask.dtype} has values from {float(mask.min()):g} to {float(mask.max()):g}, "
                f"which do not say what is meant. {ACCEPTED} Convert a 0/1 mask with .bool()."
            )
        return ~hidden
    if readable and mask.numel() and not bool(((mask == 0) | (mask == 1)).all()):
        raise ValueError(
            f"attention_mask of type {mask.dtype} has values from {int(mask.min())} to {int(mask.max())}; only 0 and "
            f"1 have a meaning. {ACCEPTED} Documents in one row are told apart by position_ids that restart at 0."
        )
    return mask != 0


def visible(pattern, head, query: Tokens, key: Tokens) -> torch.Tensor:
    """Same document, not padding, the direction and the pattern, for Tokens that broadcast against each other."""
    # Padding is document -1; a query there looks for a document that no key has.
    seen = torch.where(query.document < 0, -2, query.document) == key.document
    if pattern.causal:
        seen = seen & (key.position <= query.position)
    return seen & pattern.sees(head, query, key)


def allowed(pattern, query: Tokens, key: Tokens, heads: range, user_mask: torch.Tensor | None = None) -> torch.Tensor:
    """Who sees whom, once for every kernel: `visible`, and the user's mask where there is one.

    Args:
        pattern: a Pattern.
        query: (R, N) Tokens.
        key: (R, K) Tokens.
        heads: the numbers of these heads in the whole model.
        user_mask: (R, 1 or H, N, K) bool, or None.

    Returns:
        bool (R, 1 or H, N, K), True where the query may attend to the key.
    """
    head = torch.arange(heads.start, heads.stop, device=query.document.device).view(-1, 1, 1)
    seen = visible(pattern, head, query.at((slice(None), None, slice(None), None)), key.at((slice(None), None, None)))
    return seen if user_mask is None else seen & user_mask
