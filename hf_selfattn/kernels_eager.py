"""The definition: attention as it is written in the papers, every score in memory at once."""

import torch
from torch.nn import functional as F

from .biases import dense_bias
from .masks import allowed
from .scores import SCORES, Scoring


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scoring: Scoring,
    dropout: float = 0.0,
    need_weights: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Softmax over the keys of the scores, then the weighted sum of the values.

    Args:
        query: (R, N, H, d_k).
        key: (R, K, G, d_k); head h reads key/value head h // (H / G).
        value: (R, K, G, d_v).
        mask: bool (R, 1 or H, N, K), True where a query may see a key; None: everywhere.
        scoring: which score, and what it needs.
        dropout: the share of weights that are set to 0, the others scaled up to make up for them.
        need_weights: whether the weights, before dropout, are wanted.

    Returns:
        heads (R, N, H, d_v), and weights (R, H, N, K) or None. Rows of weights sum to 1 (to less with a sink); a query
        that sees nothing has weights 0 and gives 0.
    """
    groups = query.shape[2] // key.shape[2]
    key, value = (_to_heads(x, groups) for x in (key, value))
    weights = _weights(query.transpose(1, 2), key, mask, scoring).to(value.dtype)
    heads = F.dropout(weights, dropout) @ value
    return heads.transpose(1, 2), weights if need_weights else None


def _to_heads(x: torch.Tensor, groups: int) -> torch.Tensor:
    """(R, K, G, d) to (R, H, K, d), each key/value head repeated for the heads that share it."""
    return x.transpose(1, 2).unsqueeze(2).expand(-1, -1, groups, -1, -1).flatten(1, 2)


def _weights(query, key, mask, scoring: Scoring) -> torch.Tensor:
    """(R, H, N, d_k) and (R, H, K, d_k) to weights (R, H, N, K) in at least fp32."""
    scores = SCORES[scoring.name].tile(query, key, *scoring.parameters)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    if scoring.softcap is not None:
        scores = scoring.softcap * torch.tanh(scores / scoring.softcap)
    if scoring.bias is not None:
        scores = scores + dense_bias(scoring.bias)
    return masked_softmax(scores, mask, scoring.sink)


def some_weights(
    query: torch.Tensor,
    key: torch.Tensor,
    who: tuple,
    scoring: Scoring,
    heads: list[int] | None,
    queries: list[int] | None,
) -> torch.Tensor:
    """Weights (R, chosen heads, chosen queries, K), without making those of the others.

    Args:
        query, key: (R, N, H, d_k) and (R, K, G, d_k), as `attend` takes them.
        who: what `masks.allowed` takes.
        scoring: as `attend` takes it.
        heads, queries: numbers; None: all.
    """
    pattern, query_tokens, key_tokens, numbers, user_mask = who
    device = query.device
    chosen = torch.tensor(range(query.shape[2]) if heads is None else heads, device=device)
    places = torch.tensor(range(query.shape[1]) if queries is None else queries, device=device)
    query_tokens = query_tokens.at((slice(None), places))
    if user_mask is not None:
        user_mask = user_mask[:, :, places]
    mask = allowed(pattern, query_tokens, key_tokens, numbers, user_mask)
    mask = mask if mask.shape[1] == 1 else mask[:, chosen]

    key = _to_heads(key, query.shape[2] // key.shape[2])[:, chosen]
    query = query[:, places].transpose(1, 2)[:, chosen]
    parameters = tuple(x[chosen] if isinstance(x, torch.Tensor) else x for x in scoring.parameters)
    bias = scoring.bias
    if bias is not None:
        bias = bias._replace(
            parameters=tuple(x[chosen] if isinstance(x, torch.Tensor) else x for x in bias.parameters),
            query=None if bias.query is None else bias.query[:, places][:, :, chosen],
            query_position=bias.query_position[:, places],
        )
    sink = None if scoring.sink is None else scoring.sink[chosen]
    scoring = scoring._replace(parameters=parameters, bias=bias, sink=sink)
    return _weights(query, key, mask, scoring).to(query.dtype)


def masked_softmax(scores: torch.Tensor, mask: torch.Tensor | None, sink: torch.Tensor | None = None) -> torch.Tensor:
    """Softmax of scores (R, H, N, K) over the keys that `mask` allows; 0 elsewhere, and for a row that sees nothing.

    `sink` (H,) is one more score in each row whose share is thrown away.
    """
    if mask is not None:
        # A row that sees nothing keeps its finite scores through the softmax and is set to 0 after it, so that
        # neither the softmax nor its gradient meets a row of -inf.
        sees_something = mask.any(-1, keepdim=True)
        scores = scores.masked_fill(~mask & sees_something, float("-inf"))
    if sink is not None:
        sink = sink.to(scores.dtype).view(-1, 1, 1).expand(*scores.shape[:-1], 1)
        scores = torch.cat((scores, sink), dim=-1)
    weights = scores.softmax(dim=-1)
    if sink is not None:
        weights = weights[..., :-1]
    return weights if mask is None else weights.masked_fill(~mask, 0)
