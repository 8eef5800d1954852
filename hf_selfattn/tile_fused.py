"""The road of documents whose attention and gradient are left to torch's fused attention on a CPU.

Full attention with plain scores in fp32, and in half precision documents that are too long to be computed whole: there
it is the faster one (its backward in bf16 is slow for short documents).
"""

import torch
from torch.nn.functional import scaled_dot_product_attention

from .tile_documents import DocumentRoad
from .tile_problem import Problem

_aten = torch.ops.aten
# What scaled_dot_product_attention calls on a CPU, and its derivative: inside an operator autograd cannot be asked.
_FORWARD = getattr(_aten, "_scaled_dot_product_flash_attention_for_cpu", None)
_BACKWARD = getattr(_aten, "_scaled_dot_product_flash_attention_for_cpu_backward", None)

WHOLE = (torch.float32,)
"""Types in which documents of any length go this way."""

LONG = (torch.bfloat16, torch.float16)
"""Types in which documents go this way that are too long to be computed whole."""


def may_fuse(problem: Problem, sink, query: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether torch's fused attention computes the same, for values alone."""
    return problem.scores_alone and sink is None and not problem.dropout and query.shape[3] == value.shape[3]


def may_train(problem: Problem, sink, query, key, value) -> bool:
    """Whether torch's fused attention has the values and the gradient of this full attention on this device."""
    known = query.device.type == "cpu" and query.dtype in WHOLE + LONG and None not in (_FORWARD, _BACKWARD)
    return known and may_fuse(problem, sink, query, value) and is_full(problem, query, key)


def is_full(problem: Problem, query: torch.Tensor, key: torch.Tensor) -> bool:
    """Whether each token sees all of its document and no more, so that documents of any length may be taken whole."""
    alone = problem.user_mask is None and query.shape[1] == key.shape[1]
    return problem.sees_documents and alone and query.numel() > 0


class FusedRoad(DocumentRoad):
    """Whole documents of any length; there are no scores to hold."""

    def __init__(self, problem, plan, query, key, value):
        super().__init__(problem, plan, query, key, value)
        self.budget = 2**62

    def read(self, x, places, length):
        """(n, H, length, d), a view where each head has its own keys."""
        x = x[places[0]].unflatten(0, (-1, length))
        if x.shape[2] != self.heads:
            x = x.repeat_interleave(self.heads // x.shape[2], dim=2)
        return x.transpose(1, 2)

    def attend(self) -> torch.Tensor:
        """(R, N, H, d_v), where no gradient is asked for; on every device."""
        if self.plan.in_place:
            length = self.plan.groups[0][0]
            inputs = (self.read(x, (slice(None),), length) for x in (self.query, self.key, self.value))
            heads = scaled_dot_product_attention(*inputs, scale=self.scale).transpose(1, 2)
            return heads.reshape(*self.shape, self.heads, -1)
        heads = self.empty(self.value.shape[2], self.value.dtype)
        for (step,) in self.steps(False):
            inputs = (self.read(x, step.query_places, step.lengths[0]) for x in (self.query, self.key, self.value))
            seen = None if step.hidden is None else ~step.hidden
            self.write(heads, step.query_places, scaled_dot_product_attention(*inputs, seen, scale=self.scale))
        return self.restore(heads)

    def forward(self) -> tuple[torch.Tensor, torch.Tensor]:
        """heads (R, N, H, d_v) and the logarithms of the softmaxes' denominators (R, N, H), else 0."""
        heads, log_sums = self.empty(self.value.shape[2], self.value.dtype), self.empty(1, self.exact)
        for (step,) in self.steps(False):
            places, length = step.query_places, step.lengths[0]
            inputs = (self.read(x, places, length) for x in (self.query, self.key, self.value))
            out, log_sum = _FORWARD(*inputs, attn_mask=self.bias_of(step), scale=self.scale)
            self.write(heads, places, out)
            self.write(log_sums, places, log_sum.unsqueeze(-1))
        return self.restore(heads), self.restore(log_sums).squeeze(-1)

    def backward(self, grad: torch.Tensor, heads: torch.Tensor, log_sum: torch.Tensor) -> list[torch.Tensor | None]:
        """Gradients of query, key and value, and None for a second query.

        Args:
            grad: (R, N, H, d_v), the gradient of `heads`.
            heads, log_sum: what `forward` returned.
        """
        grad, heads = self.arrange_gradient(grad), self.arrange(heads)
        log_sum = self.arrange(log_sum.unsqueeze(-1))
        if self.fillers is not None:
            # What stands there is some other token's sum, and exp(score - sum) might overflow: inf makes it 0.
            log_sum = log_sum.index_fill(0, self.fillers, float("inf"))
        found = [self.empty(x.shape[2], x.dtype) for x in (self.query, self.key, self.value)]
        for (step,) in self.steps(False):
            places, length = step.query_places, step.lengths[0]
            inputs = [self.read(x, places, length) for x in (grad, self.query, self.key, self.value, heads)]
            sums = self.read(log_sum, places, length).squeeze(-1)
            parts = _BACKWARD(*inputs, sums, 0.0, False, attn_mask=self.bias_of(step), scale=self.scale)
            for total, part in zip(found, parts, strict=True):
                self.write(total, places, part)
        of_query, *of_keys = found
        return [self.restore(of_query), *map(self.restore_keys, of_keys), None]

    def bias_of(self, step) -> torch.Tensor | None:
        """What hides what documents are filled up with, as this operator takes it: 0 or -inf, in the type of query."""
        if step.hidden is None:
            return None
        return torch.zeros_like(step.hidden, dtype=self.query.dtype).masked_fill_(step.hidden, float("-inf"))
