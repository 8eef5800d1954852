"""The from-scratch kernel as an operator that torch.compile and torch.export can trace.

The operator takes names, numbers and tensors only.
"""

import torch

from .kernels_eager import attend as attend_eager
from .masks import allowed
from .packing import values_can_be_read
from .scores import SCORES, Scoring
from .tile_math import backward, forward
from .tile_problem import Problem
from .tiles import OPERATORS, TileMask, fields_given, name_of, tokens_from


def compute(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias_query: torch.Tensor | None,
    sink: torch.Tensor | None,
    score_tensors: list[torch.Tensor],
    bias_tensors: list[torch.Tensor],
    visited: torch.Tensor,
    whole: torch.Tensor,
    query_tokens: list[torch.Tensor],
    key_tokens: list[torch.Tensor],
    user_mask: torch.Tensor | None,
    plan: torch.Tensor,
    seed: torch.Tensor,
    fields: list[bool],
    pattern: str,
    pattern_numbers: str,
    score: str,
    score_numbers: list[float],
    bias: str,
    bias_numbers: list[float],
    block_size: int,
    whole_below: int,
    first_head: int,
    softcap: float,
    dropout: float,
    with_gradient: bool,
    room: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """heads (R, N, H, d_v), and what `tile_math.forward` keeps for the backward."""
    problem = Problem(
        visited=visited,
        whole=whole,
        block_size=block_size,
        whole_below=whole_below,
        plan=plan,
        pattern=(pattern, pattern_numbers),
        query_tokens=tokens_from(query_tokens, fields),
        key_tokens=tokens_from(key_tokens, fields),
        first_head=first_head,
        user_mask=user_mask,
        score=(score, score_tensors, score_numbers),
        bias=(bias, bias_tensors, bias_numbers),
        softcap=softcap,
        dropout=dropout,
        seed=seed,
    )
    with torch.no_grad(), torch.autocast(query.device.type, enabled=False):
        return forward(problem, query, key, value, bias_query, sink, with_gradient, room)


tiled_attention = torch.library.custom_op(f"{OPERATORS}::tiled_attention", compute, mutates_args=())


@tiled_attention.register_fake
def _(query, key, value, *rest):
    rows, length, heads, _ = query.shape
    exact = torch.promote_types(query.dtype, torch.float32)
    return (
        value.new_empty(rows, length, heads, value.shape[3]),
        query.new_empty(rows, heads, length, dtype=exact),
        query.new_empty(rest[-1]),
    )


@torch.library.custom_op(f"{OPERATORS}::tiled_attention_backward", mutates_args=())
def tiled_attention_backward(
    heads: torch.Tensor,
    log_sum: torch.Tensor,
    kept: torch.Tensor,
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias_query: torch.Tensor | None,
    sink: torch.Tensor | None,
    score_tensors: list[torch.Tensor],
    bias_tensors: list[torch.Tensor],
    visited: torch.Tensor,
    whole: torch.Tensor,
    query_tokens: list[torch.Tensor],
    key_tokens: list[torch.Tensor],
    user_mask: torch.Tensor | None,
    plan: torch.Tensor,
    seed: torch.Tensor,
    fields: list[bool],
    pattern: str,
    pattern_numbers: str,
    score: str,
    score_numbers: list[float],
    bias: str,
    bias_numbers: list[float],
    block_size: int,
    whole_below: int,
    first_head: int,
    softcap: float,
    dropout: float,
    with_gradient: bool,
    room: int,
) -> list[torch.Tensor]:
    """Gradients of query, key, value, bias_query and sink where given, score_tensors and bias_tensors."""
    problem = Problem(
        visited=visited,
        whole=whole,
        block_size=block_size,
        whole_below=whole_below,
        plan=plan,
        pattern=(pattern, pattern_numbers),
        query_tokens=tokens_from(query_tokens, fields),
        key_tokens=tokens_from(key_tokens, fields),
        first_head=first_head,
        user_mask=user_mask,
        score=(score, score_tensors, score_numbers),
        bias=(bias, bias_tensors, bias_numbers),
        softcap=softcap,
        dropout=dropout,
        seed=seed,
    )
    with torch.no_grad(), torch.autocast(query.device.type, enabled=False):
        *grads, of_tensors = backward(problem, query, key, value, bias_query, sink, heads, log_sum, kept, grad)
    return [x.contiguous() for x in (*grads, *of_tensors) if x is not None]


@tiled_attention_backward.register_fake
def _(heads, log_sum, kept, grad, query, key, value, bias_query, sink, score_tensors, bias_tensors, *rest):
    given = (x for x in (query, key, value, bias_query, sink, *score_tensors, *bias_tensors) if x is not None)
    return [torch.empty_like(x, memory_format=torch.contiguous_format) for x in given]


def _save(ctx, inputs, output):
    # torch counts a list as one input for each of its tensors, and as one input if it holds numbers.
    ctx.lists = [
        len(x) if isinstance(x, list) and all(isinstance(y, torch.Tensor) for y in x) else None for x in inputs
    ]
    ctx.constants = inputs[14:]
    flat = []
    for x in inputs[:14]:
        flat.extend(x if isinstance(x, list) else [x])
    ctx.save_for_backward(*output, *flat)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad, *_):
    heads, log_sum, kept, *flat = ctx.saved_tensors
    grad = torch.zeros_like(heads) if grad is None else grad
    inputs = []
    for size in ctx.lists[:14]:
        inputs.append(flat.pop(0) if size is None else [flat.pop(0) for _ in range(size)])
    found = tiled_attention_backward(heads, log_sum, kept, grad.contiguous(), *inputs, *ctx.constants)
    grads = [found.pop(0) if x is not None else None for x in inputs[:5]]
    of_score, of_bias = ([found.pop(0) for _ in range(size)] for size in ctx.lists[5:7])
    none = [None if size is None else [None] * size for size in ctx.lists[7:]]
    return *grads, of_score, of_bias, *none


tiled_attention.register_autograd(_backward, setup_context=_save)


def _refuse_second(ctx, *grads):
    raise NotImplementedError(
        "attn_implementation 'selfattn' has no second derivatives. Use model.set_attn_implementation('eager') where "
        "a backward has create_graph=True."
    )


tiled_attention_backward.register_autograd(_refuse_second)


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: TileMask,
    scoring: Scoring,
    dropout: float = 0.0,
    need_weights: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """As `kernels_eager.attend`, tile by tile; with `need_weights` it is `kernels_eager.attend`."""
    if need_weights or not (query.numel() and key.numel()) or _is_transformed(query):
        dense = allowed(mask.pattern, mask.query, mask.key, mask.heads, mask.user_mask)
        return attend_eager(query, key, value, dense, scoring, dropout, need_weights)
    bias = scoring.bias
    score_tensors, score_numbers = _tensors_first(scoring.parameters)
    bias_tensors, bias_numbers = _tensors_first(() if bias is None else bias.parameters)
    second = None if bias is None or bias.query is None else bias.query.to(value.dtype)
    inputs = (query, key, value, second, scoring.sink, *score_tensors, *bias_tensors)
    with_gradient = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    scores_alone = SCORES[scoring.name].is_dot_product and not scoring.softcap and bias is None
    room = mask.room * query.shape[2] if with_gradient and scores_alone and scoring.sink is None else 0
    seed = torch.randint(2**31, ()) if dropout else torch.zeros((), dtype=torch.int64)
    # Without a gradient and outside a graph nothing needs an operator, which costs a third of a millisecond.
    run = compute if not with_gradient and values_can_be_read(query) else tiled_attention
    heads, *_ = run(
        query.to(value.dtype),
        key.to(value.dtype),
        value,
        second,
        scoring.sink,
        score_tensors,
        bias_tensors,
        mask.visited,
        mask.whole,
        [x for x in mask.query if x is not None],
        [x for x in mask.key if x is not None],
        mask.user_mask,
        mask.plan,
        seed.to(value.device),
        fields_given(mask.query),
        name_of(mask.pattern),
        mask.pattern.numbers_as_text(),
        scoring.name,
        score_numbers,
        "" if bias is None else bias.name,
        bias_numbers,
        mask.block_size,
        mask.whole_below,
        mask.heads.start,
        float(scoring.softcap or 0),
        dropout,
        with_gradient,
        room,
    )
    return heads, None


def _is_transformed(query: torch.Tensor) -> bool:
    """Whether one of torch.func's transforms (grad, jvp, …) is at work: they cannot look into an operator."""
    return values_can_be_read(query) and torch._C._functorch.peek_interpreter_stack() is not None


def reasons(config, device_type: str | None, dtype: torch.dtype | None, training: bool | None) -> list[str]:
    """It computes everything."""
    return []


def _tensors_first(parameters: tuple) -> tuple[list[torch.Tensor], list[float]]:
    tensors = [x for x in parameters if isinstance(x, torch.Tensor)]
    return tensors, [float(x) for x in parameters[len(tensors) :]]
