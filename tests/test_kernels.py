"""Every kernel against the slow loops of reference.py: every score, pattern, direction and position, at odd sizes."""

from functools import lru_cache
from typing import NamedTuple

import pytest
import torch

from hf_selfattn import KERNELS, PATTERNS, POSITIONS, SCORES, SelfAttnModel, unsupported_reasons
from hf_selfattn.packing import read_batch

from . import reference
from .small_tiles import use_small_tiles
from .tolerances import TOLERANCE, assert_close

pytestmark = pytest.mark.usefixtures("uncompiled")

N, H, G, D_K, D_V = 37, 4, 2, 6, 5


class Batch(NamedTuple):
    """What tells documents and padding apart, in the words of `read_batch` and of `reference.stand`."""

    rows: int
    length: int = N
    padding_mask: torch.Tensor | None = None
    position_ids: torch.Tensor | None = None
    cu_seq_lens: torch.Tensor | None = None
    user_mask: torch.Tensor | None = None


def _padding_mask():
    """Rows of 37: padded right, padded left with holes, one token in the middle, nothing."""
    mask = torch.zeros(4, N, dtype=torch.bool)
    mask[0, :20] = True
    mask[1, torch.tensor([9, 10, 11, 14, 20, 21, 22, 23, 30, 33, 34, 35, 36])] = True
    mask[2, 17] = True
    return mask


def _user_mask(rows, heads, length):
    """(rows, heads, N, N), about half True; for each head one query sees nothing and one key is seen by nobody."""
    mask = torch.rand(rows, heads, length, length, generator=torch.Generator().manual_seed(heads)) < 0.5
    for head in range(heads):
        mask[:, head, 5 + head] = False
        mask[:, head, :, 10 + head] = False
    return mask


BATCHES = {
    "one_token": Batch(1, 1),
    "whole_rows": Batch(2, 11),
    "padded": Batch(4, padding_mask=_padding_mask()),
    "restarting_positions": Batch(1, 27, position_ids=torch.cat([torch.arange(n) for n in (12, 1, 14)])[None]),
    "boundaries": Batch(1, 23, cu_seq_lens=torch.tensor([0, 5, 6, 19])),
    "user_mask": Batch(1, user_mask=_user_mask(1, 1, N)),
    "user_mask_per_head": Batch(2, 19, user_mask=_user_mask(2, H, 19)),
}


class Case(NamedTuple):
    """What goes into an attention, and what comes out of the slow loops: `gradients` of query, key, value and the
    parameters that are not frozen, for a loss whose gradient at the heads is `upstream`."""

    inputs: list[torch.Tensor]
    parameters: dict[str, torch.Tensor]
    frozen: set[str]
    upstream: torch.Tensor
    heads: torch.Tensor
    weights: torch.Tensor
    gradients: list[torch.Tensor]


CASES: dict[tuple, Case] = {}


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """A kernel of tiles has several of them in these short texts."""
    use_small_tiles(monkeypatch)


HEADS = {"num_attention_heads": H, "num_key_value_heads": G, "head_dim": D_K, "value_head_dim": D_V}

EXTRAS = {
    "softcap": {"logit_softcap": 2.0},
    "sink": {"attention_sink": True},
    "softcap_and_sink": {"logit_softcap": 2.0, "attention_sink": True},
    "dilation": {"dilation": 2},
    "no_global_block": {"pattern": "bigbird", "num_global_blocks": 0},
    "no_random_block": {"pattern": "bigbird", "num_random_blocks": 0},
    "own_block_alone": {"pattern": "bigbird", "num_global_blocks": 0, "num_random_blocks": 0, "block_radius": 0},
    "many_blocks_at_both_ends": {"pattern": "bigbird", "num_global_blocks": 3, "num_random_blocks": 1},
    "no_global_token": {"pattern": "longformer", "num_global_tokens": 0},
    "partial_rotary": {"position": "rotary", "rope_parameters": {"rope_theta": 50.0, "partial_rotary_factor": 2 / 3}},
    "fixed_temperature": {"score": "cosine", "learned_temperature": False, "temperature": 0.2},
}
"""Options beside the choices, each over other rows that have it in common with their neighbours."""


@pytest.mark.parametrize(
    ("batch", "dtype"),
    [
        pytest.param(batch, dtype, id=f"{batch}-{str(dtype).removeprefix('torch.')}")
        for batch in BATCHES
        for dtype in TOLERANCE
        if dtype == torch.float64 or batch in ("padded", "user_mask_per_head")
    ],
)
def test_kernel_equals_slow_loops(choice, kernel, batch, dtype, make_config):
    check_kernel(make_config(*choice, **HEADS), kernel, batch, dtype)


@pytest.mark.parametrize("batch", ["padded", "user_mask_per_head"])
@pytest.mark.parametrize("extra", EXTRAS)
def test_kernel_with_extras_equals_slow_loops(extra, kernel, batch, make_config):
    choices = {"pattern": "sliding_window", "position": "t5" if kernel in ("eager", "selfattn") else "rotary"}
    check_kernel(make_config(**{**choices, **HEADS, **EXTRAS[extra]}), kernel, batch, torch.float64)


def check_kernel(config, kernel, batch, dtype):
    """Values, weights and gradients; or the refusal."""
    if unsupported_reasons(config, kernel, device_type="cpu", dtype=dtype, training=False):
        assert_refused(config, kernel)
        return
    case = slow_case(config, batch)
    with torch.no_grad():
        heads, weights = run(kernel, config, batch, *leaves(case, dtype, requires_grad=False))
        assert weights is None
        assert_close(heads, case.heads, "heads")

        heads, weights = run(kernel, config, batch, *leaves(case, dtype, requires_grad=False), need_weights=True)
        assert_close(heads, case.heads, "heads beside weights")
        assert_close(weights, case.weights, "weights")
        assert (weights[case.weights == 0] == 0).all()

    # What cannot be trained is refused by the model: test_reference_encoder.py.
    if not unsupported_reasons(config, kernel, device_type="cpu", dtype=dtype, training=True):
        for need_weights in (False, True):
            inputs, parameters = leaves(case, dtype)
            heads, _ = run(kernel, config, batch, inputs, parameters, need_weights)
            heads.backward(case.upstream.to(dtype))
            trained = {name: x for name, x in parameters.items() if name not in case.frozen}
            names = ["query", "key", "value", *trained]
            for name, leaf, gradient in zip(names, [*inputs, *trained.values()], case.gradients, strict=True):
                assert_close(leaf.grad, gradient, f"gradient of {name}")


@pytest.mark.parametrize(
    ("table", "loops"),
    [(SCORES, reference.SCORES), (PATTERNS, reference.PATTERNS), (POSITIONS, reference.POSITIONS)],
    ids=["SCORES", "PATTERNS", "POSITIONS"],
)
def test_every_row_has_its_slow_loop(table, loops):
    assert set(loops) == set(table)


def test_slow_softmax_is_the_textbook_one():
    weights = reference.softmax(torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64))
    expected = torch.tensor([0.0900305732, 0.2447284711, 0.6652409558], dtype=torch.float64)
    assert_close(weights, expected)


def run(kernel, config, batch, inputs, parameters, need_weights=False):
    """Position, score and kernel as `SelfAttention.forward` calls them."""
    query, key, value = inputs
    tokens, mask = tokens_and_mask(kernel, PATTERNS[config.attention_pattern].from_config(config, 0), batch)
    position = POSITIONS[config.position_encoding].from_config(config, 0)
    state = position.state(tokens, tokens, torch.promote_types(query.dtype, torch.float32))

    modules = {"position": position.layer(config), "score_function": SCORES[config.score_function](config)}
    call = {
        name: lambda *args, name=name, module=module: torch.func.functional_call(
            module.to(query.dtype), {k.split(".", 1)[1]: v for k, v in parameters.items() if k.startswith(name)}, args
        )
        for name, module in modules.items()
    }
    query, key, bias = call["position"](query, key, state)
    query, key, scoring = call["score_function"](query, key, bias)
    return KERNELS[kernel].attend(query, key, value, mask, scoring, need_weights=need_weights)


@lru_cache
def tokens_and_mask(kernel, pattern, batch):
    """Where the batch's tokens stand, and what the kernel makes of who sees whom: the same for all else."""
    rows, length, padding_mask, position_ids, cu_seq_lens, user_mask = BATCHES[batch]
    packing = read_batch(rows, length, torch.device("cpu"), padding_mask, position_ids, cu_seq_lens)
    return packing.tokens, KERNELS[kernel].mask(pattern, packing.tokens, packing.tokens, packing, range(H), user_mask)


def slow_case(config, batch) -> Case:
    """The slow loops' answer, computed once for all kernels and dtypes."""
    key = (config.to_json_string(), batch)
    if key not in CASES:
        CASES[key] = _slow_case(config, BATCHES[batch])
    return CASES[key]


def _slow_case(config, batch: Batch) -> Case:
    # Numbers that bfloat16 can write are the same in every dtype. Parameters are of the size of trained ones, so that
    # scores are; gradients are sums over up to 148 queries, and stay near 1.
    def draw(*shape, size=1.0):
        return (torch.randn(shape, generator=generator) * size).bfloat16().double()

    generator = torch.Generator().manual_seed(1)
    row = (batch.rows, batch.length)
    inputs = [draw(*row, H, D_K), draw(*row, G, D_K), draw(*row, G, D_V)]
    attention = SelfAttnModel._from_config(config, attn_implementation="eager").layers[0].attention
    parameters = {
        name: draw(*parameter.shape, size=0.25)
        for name, parameter in attention.named_parameters()
        if name.startswith(("position.", "score_function."))
    }
    upstream = draw(*row, H, D_V, size=0.1)
    frozen = {name for name in parameters if not attention.get_parameter(name).requires_grad}
    wanted = [x.requires_grad_() for x in (*inputs, *(x for name, x in parameters.items() if name not in frozen))]

    places = reference.stand(*row, batch.padding_mask, batch.position_ids, _as_list(batch.cu_seq_lens))
    heads, weights = [], []
    for b in range(batch.rows):
        user_mask = None if batch.user_mask is None else batch.user_mask[b].expand(H, -1, -1).tolist()
        row_heads, row_weights = reference.attention(
            *([token.unbind() for token in x[b]] for x in inputs),
            places[b],
            score=config.score_function,
            pattern=config.attention_pattern,
            causal=config.causal,
            position=config.position_encoding,
            options=reference.layer_options(config, 0),
            parameters=parameters,
            mask=user_mask,
        )
        heads.append(row_heads)
        weights.append(row_weights)
    heads = torch.stack(heads)
    gradients = torch.autograd.grad(heads, wanted, upstream, allow_unused=True, materialize_grads=True)
    return Case(
        [x.detach() for x in inputs],
        {name: x.detach() for name, x in parameters.items()},
        frozen,
        upstream,
        heads.detach(),
        torch.stack(weights),
        gradients,
    )


def leaves(case: Case, dtype, requires_grad=True):
    """The case's inputs and parameters, afresh."""
    inputs = [x.to(dtype, copy=True).requires_grad_(requires_grad) for x in case.inputs]
    parameters = {name: x.to(dtype, copy=True) for name, x in case.parameters.items()}
    for name in parameters.keys() - case.frozen:
        parameters[name].requires_grad_(requires_grad)
    return inputs, parameters


def assert_refused(config, kernel):
    with pytest.raises(ValueError, match=f"attn_implementation '{kernel}' cannot compute this configuration: .* Use"):
        SelfAttnModel._from_config(config, attn_implementation=kernel)


def _as_list(tensor):
    return None if tensor is None else tensor.tolist()
