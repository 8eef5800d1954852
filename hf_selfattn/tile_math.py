"""The from-scratch attention: softmax forward, recomputation backward, step by step along the roads of a problem.

A softmax whose keys are all in one step is taken at once; else it runs over the steps, and a sum is kept for the
backward. The weights of short documents can be kept for the backward, too; all others are computed again.
"""

from collections.abc import Iterator

import torch
from torch.nn.functional import scaled_dot_product_attention

from .tile_blocks import BlockRoad
from .tile_documents import DocumentRoad
from .tile_fused import WHOLE, FusedRoad, is_full, may_fuse, may_train
from .tile_plan import plan_documents, without_short
from .tile_problem import Problem, Step
from .tile_roads import Road, scaled_product


def forward(
    problem: Problem,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias_query: torch.Tensor | None,
    sink: torch.Tensor | None,
    with_gradient: bool,
    room: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """heads (R, N, H, d_v); for the backward the logarithm of each softmax's denominator (R, H, N), 0 where it is not
    needed, and the weights of short documents (room,).

    Args:
        query, key, value: (R, N, H, d_k), (R, K, G, d_k), (R, K, G, d_v).
        bias_query: (R, N, H, d_k) for a bias that depends on the query, or None.
        sink: (H,) or None.
        with_gradient: whether a backward may follow.
        room: numbers that are kept for it, `TileMask.room` for each head; 0: it computes weights again.
    """
    exact = torch.promote_types(query.dtype, torch.float32)
    found, log_sum = None, query.new_zeros(*query.shape[:3], dtype=exact)
    fused = not with_gradient and may_fuse(problem, sink, query, value)
    if fused and is_full(problem, query, key):
        plan = problem.documents(of_any_length=True)
        if plan is not None:
            heads = FusedRoad(problem, plan, query, key, value).attend()
            return heads, log_sum.transpose(1, 2).contiguous(), query.new_empty(0)
    kept = query.new_empty(room)
    for road in roads(problem, query, key, value, sink):
        if isinstance(road, FusedRoad):
            out, sums = road.forward()
            found, log_sum = out if found is None else found + out, log_sum + sums
            continue
        road.fused = fused
        second = None if bias_query is None else road.arrange(bias_query)
        out, log_sums = road.empty(value.shape[3], value.dtype), None
        for steps in road.steps(sink is not None):
            of_query = _read_query(road, steps[0], second)
            if len(steps) == 1 and sink is None:
                heads = _at_once(road, steps[0], *of_query, kept if room else None)
            else:
                heads, sums = _running(road, steps, *of_query, sink)
                log_sums = road.empty(1, exact) if log_sums is None else log_sums
                # Padding here may be a short document, whose sum is the other road's.
                sums = sums.masked_fill(steps[0].query.document < 0, 0)
                road.write(log_sums, steps[0].query_places, sums)
            road.write(out, steps[0].query_places, heads)
        out = road.restore(out)
        found = out if found is None else found + out
        if log_sums is not None:
            log_sum = log_sum + road.restore(log_sums).squeeze(-1)
    if found is None:
        found = value.new_zeros(*query.shape[:3], value.shape[3])
    return found.contiguous(), log_sum.transpose(1, 2).contiguous(), kept


def roads(problem: Problem, query, key, value, sink) -> Iterator[Road]:
    """The roads that have something to compute; together they compute all."""
    by_torch, blocks = may_train(problem, sink, query, key, value), bool(problem.visited.any())
    if by_torch and query.dtype in WHOLE:
        plan = problem.documents(of_any_length=True)
        if plan is not None:
            yield FusedRoad(problem, plan, query, key, value)
        return
    plan = problem.documents()
    if plan is not None:
        yield DocumentRoad(problem, plan, query, key, value)
        tokens = without_short(problem.query_tokens, problem.whole_below)
        problem = problem._replace(query_tokens=tokens, key_tokens=tokens)
    if blocks and by_torch:
        plan = plan_documents(problem.query_tokens, more_than=problem.whole_below)
        yield FusedRoad(problem, plan, query, key, value)
    elif blocks:
        yield BlockRoad(problem, query, key, value)


def _read_query(road: Road, step: Step, second: torch.Tensor | None) -> tuple:
    read = road.read(road.query, step.query_places, step.lengths[0])
    return read, None if second is None else road.read(second, step.query_places, step.lengths[0])


def _read_key(road: Road, step: Step) -> tuple[torch.Tensor, torch.Tensor]:
    return tuple(road.read(x, step.key_places, step.lengths[1]) for x in (road.key, road.value))


def _hide(scores: torch.Tensor, hidden: torch.Tensor | None) -> torch.Tensor:
    """The least number there is, and not -inf: a row that sees nothing stays finite until it is set to 0."""
    return scores if hidden is None else scores.masked_fill_(hidden, torch.finfo(scores.dtype).min)


def _at_once(road: Road, step: Step, query, second, kept: torch.Tensor | None) -> torch.Tensor:
    """heads (n, h, b, d_v) of a step that has every key of its queries."""
    problem, (key, value) = road.problem, _read_key(road, step)
    if road.fused:
        seen = None if step.hidden is None else ~step.hidden
        heads = scaled_dot_product_attention(query, key, value, seen, scale=road.scale)
        return heads if step.nothing is None else heads.masked_fill_(step.nothing, 0)
    if problem.scores_alone:
        scores = scaled_product(query, key.transpose(-1, -2), road.scale)
    else:
        scores = road.scores(step, query, key, second, problem.score[1], problem.bias[1])
    _hide(scores, step.hidden)
    if kept is not None and step.weights is not None and problem.scores_alone:
        weights = kept[step.weights].view(scores.shape)
        torch.ops.aten._softmax.out(scores, -1, False, out=weights)
    else:
        weights = scores.softmax(-1)
    if problem.dropout:
        weights = weights * road.kept(step)
    heads = weights.to(value.dtype) @ value
    return heads if step.nothing is None else heads.masked_fill_(step.nothing, 0)


def _running(road: Road, steps: list[Step], query, second, sink) -> tuple[torch.Tensor, torch.Tensor]:
    """heads (n, h, b, d_v) and logarithms of denominators (n, h, b, 1), one step of keys after the other.

    Source: Milakov and Gimelshein 2018, arXiv:1805.02867, algorithm 3; Dao et al. 2022, arXiv:2205.14135.
    """
    problem, exact, best = road.problem, road.exact, None
    for step in steps:
        key, value = _read_key(road, step)
        scores = road.scores(step, query, key, second, problem.score[1], problem.bias[1])
        if step.hidden is not None:
            scores.masked_fill_(step.hidden, float("-inf"))
        greatest = scores.amax(-1, keepdim=True)
        new_best = greatest if best is None else torch.maximum(best, greatest)
        # Where nothing has been seen yet, any finite number stands for the greatest score.
        shift = new_best.masked_fill(new_best == float("-inf"), 0)
        weights = scores.sub_(shift).exp_()
        part = weights.sum(-1, keepdim=True)
        if problem.dropout:
            weights = weights * road.kept(step)
        product = (weights.to(value.dtype) @ value).to(exact)
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
    some = total != 0  # and not > 0: what is not a number stays so
    return (mixed / total.where(some, 1)).where(some, 0), shift + total.where(some, 1).log()


def backward(
    problem: Problem,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias_query: torch.Tensor | None,
    sink: torch.Tensor | None,
    heads: torch.Tensor,
    log_sum: torch.Tensor,
    kept: torch.Tensor,
    grad: torch.Tensor,
) -> tuple:
    """Gradients of query, key, value, bias_query, sink, and of the tensors of score and bias, step by step.

    Args:
        heads, log_sum, kept: what `forward` returned.
        grad: (R, N, H, d_v), the gradient of `heads`.
    """
    exact = torch.promote_types(query.dtype, torch.float32)
    tensors = (*problem.score[1], *problem.bias[1])
    of_tensors = [torch.zeros_like(x, dtype=exact) for x in tensors]
    found = None
    common, log_sum = None, log_sum.transpose(1, 2).unsqueeze(-1)
    for road in roads(problem, query, key, value, sink):
        if isinstance(road, FusedRoad):
            made = road.backward(grad, heads, log_sum.squeeze(-1))
            found = made if found is None else [_plus(x, y, exact) for x, y in zip(found, made, strict=True)]
            continue
        grads, sums = road.arrange_gradient(grad), None
        second = None if bias_query is None else road.arrange(bias_query)
        of_query, of_second = road.empty(query.shape[3], query.dtype), None
        if second is not None:
            of_second = road.empty(query.shape[3], query.dtype)
        of_key, of_value = (road.empty_keys(x.shape[3], x.dtype) for x in (key, value))
        for steps in road.steps(sink is not None):
            places, length = steps[0].query_places, steps[0].lengths[0]
            at_once = sink is None and len(steps) == 1
            if not at_once and sums is None:
                # How much a row's weights gain together: what each one gains beyond it moves its score.
                common = (grad.to(exact) * heads.to(exact)).sum(-1, keepdim=True) if common is None else common
                sums = road.arrange(log_sum), road.arrange(common)
            queries = _read_query(road, steps[0], second)
            read = [None if at_once else road.read(x, places, length) for x in sums or (None, None)]
            to_query = to_second = None
            for step in steps:
                parts = _step_back(road, step, *queries, road.read(grads, places, length), *read, kept)
                step_query, step_key, step_value, step_second, step_tensors = parts
                road.add(of_key, step.key_places, step_key)
                road.add(of_value, step.key_places, step_value)
                to_query, to_second = _plus(to_query, step_query, exact), _plus(to_second, step_second, exact)
                for total, part in zip(of_tensors, step_tensors, strict=True):
                    total += part
            road.write(of_query, places, to_query)
            if of_second is not None:
                road.write(of_second, places, to_second)
        made = [road.restore(of_query), road.restore_keys(of_key), road.restore_keys(of_value)]
        made.append(None if second is None else road.restore(of_second))
        found = made if found is None else [_plus(x, y, exact) for x, y in zip(found, made, strict=True)]
    of_sink = None
    if sink is not None:
        at_sink = (sink.to(exact).unsqueeze(-1) - log_sum).exp()  # (R, N, H, 1); 1 where only the sink was seen
        of_sink = torch.zeros_like(sink) if common is None else -(at_sink * common).sum((0, 1, 3)).to(sink.dtype)
    inputs = (query, key, value, bias_query)
    found = [None if x is None else torch.zeros_like(x) for x in inputs] if found is None else found
    return (
        *(None if x is None else x.to(y.dtype) for x, y in zip(found, inputs, strict=True)),
        of_sink,
        [x.to(y.dtype) for x, y in zip(of_tensors, tensors, strict=True)],
    )


def _plus(total: torch.Tensor | None, part: torch.Tensor | None, exact: torch.dtype) -> torch.Tensor | None:
    """The sum of several parts in at least fp32; a single one as it is."""
    return part if total is None else total.to(exact) + part


def _step_back(road: Road, step: Step, query, second, grad, log_sum, common, kept) -> tuple:
    """What one step adds to the gradients of query, key, value, bias_query, and of the tensors of score and bias."""
    problem, exact, (key, value), at_once = road.problem, road.exact, _read_key(road, step), log_sum is None
    if at_once and problem.scores_alone:
        if kept.numel() and step.weights is not None:
            weights = kept[step.weights].view(*query.shape[:3], key.shape[2])
        else:
            weights = _hide(scaled_product(query, key.transpose(-1, -2), road.scale), step.hidden).softmax(-1)
        pull_back = _of_dot_product(query, key, road.scale)
    else:
        scores, pull_back = _scores_with_gradient(road, step, query, key, second)
        if at_once:
            weights = _hide(scores, step.hidden).softmax(-1)
        else:
            if step.hidden is not None:
                scores.masked_fill_(step.hidden, float("-inf"))
            weights = scores.sub_(log_sum).exp_()
    if at_once and step.nothing is not None:
        grad = grad.masked_fill(step.nothing, 0)

    gain, dropped = (grad @ value.transpose(-1, -2)).to(weights.dtype), weights
    if problem.dropout:
        left = road.kept(step)
        dropped, gain = weights * left, (gain * left).to(weights.dtype)
    to_value = dropped.to(grad.dtype).transpose(-1, -2) @ grad
    if at_once:
        moved = torch._softmax_backward_data(gain, weights, -1, weights.dtype)
    else:
        moved = gain.to(exact).sub_(common).mul_(weights)
    to_query, to_key, to_second, to_tensors = pull_back(moved)
    return to_query, to_key, to_value, to_second, to_tensors


def _of_dot_product(query, key, scale: float):
    def pull_back(moved):
        moved = moved.to(query.dtype)
        return scaled_product(moved, key, scale), scaled_product(moved.transpose(-1, -2), query, scale), None, ()

    return pull_back


def _scores_with_gradient(road: Road, step: Step, query, key, second):
    """The scores of a step, and the function from their gradient to those of query, key, second and all tensors."""
    problem = road.problem
    if problem.scores_alone:
        return road.scores(step, query, key, None, (), ()), _of_dot_product(query, key, road.scale)
    tensors, split = (*problem.score[1], *problem.bias[1]), len(problem.score[1])

    def scores_of(query, key, second, *tensors):
        return road.scores(step, query, key, second, tensors[:split], tensors[split:])

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
