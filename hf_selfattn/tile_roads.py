"""What is computed together: what the two roads of the from-scratch kernel share.

Documents of few tokens are taken whole, several of like length at once (`tile_documents`); longer ones block by block,
only blocks that are visited (`tile_blocks`). Either arranges its tokens once, goes through steps, and puts the results
back where the tokens stood. A step is (units, heads, queries, keys); memory grows with the length of the text.
"""

import torch

from .biases import BIASES
from .masks import visible
from .packing import Tokens
from .patterns import mix, pattern_of
from .scores import SCORES
from .tile_problem import Problem, Step

SCORES_AT_ONCE = 2**20
"""Scores held at once where each takes two bytes."""

SCORES_AT_ONCE_GPU = 2**26
"""The same where many cores work on them."""


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
        self.pattern = pattern_of(*problem.pattern)
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


def scaled_product(x: torch.Tensor, y: torch.Tensor, scale: float) -> torch.Tensor:
    """scale * x @ y of (n, h, a, b) and (n, h, b, c), the number taken along in the product."""
    left, right = x.flatten(0, 1), y.flatten(0, 1)
    out = x.new_empty(len(left), left.shape[1], right.shape[2])
    return torch.baddbmm(out, left, right, beta=0, alpha=scale).unflatten(0, x.shape[:2])


def with_flags(fields) -> Tokens:
    """Tokens from their fields, `is_global` bool again."""
    tokens = Tokens(*fields)
    return tokens if tokens.is_global is None else tokens._replace(is_global=tokens.is_global == 1)
