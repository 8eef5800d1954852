"""The definition: attention as it is written in the papers, every score in memory at once."""

import torch
from torch.nn import functional as F

from .biases import dense_bias
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
    query = query.transpose(1, 2)
    key, value = (x.transpose(1, 2).unsqueeze(2).expand(-1, -1, groups, -1, -1).flatten(1, 2) for x in (key, value))

    scores = SCORES[scoring.name].tile(query, key, *scoring.parameters)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    if scoring.softcap is not None:
        scores = scoring.softcap * torch.tanh(scores / scoring.softcap)
    if scoring.bias is not None:
        scores = scores + dense_bias(scoring.bias)
    weights = masked_softmax(scores, mask, scoring.sink).to(value.dtype)

    heads = F.dropout(weights, dropout) @ value
    return heads.transpose(1, 2), weights if need_weights else None


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
