"""The tiled kernel as an operator: gradients, dropout, tracing, two copies in one process, stock models, its cost."""

import importlib
import math
import shutil
import sys
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import transformers
from torch.autograd import gradcheck
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    BertConfig,
    BertModel,
    ModernBertConfig,
    ModernBertModel,
)

import hf_selfattn
from hf_selfattn import (
    KERNELS,
    PATTERNS,
    POSITIONS,
    Pattern,
    kernels_selfattn,
    kernels_stock,
    register_pattern,
    tile_math,
    tile_roads,
)
from hf_selfattn.packing import read_batch
from hf_selfattn.patterns import BigBird, Full, Longformer, SlidingWindow
from hf_selfattn.scores import Scoring
from hf_selfattn.tiles import mask as tile_mask

from .small_tiles import use_blocks, use_small_tiles
from .tolerances import assert_close

VOCABULARY = 43


@pytest.fixture
def small_tiles(monkeypatch):
    use_small_tiles(monkeypatch, tile=3)


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def draw_ids(batch_size, length, seed=0):
    return torch.randint(VOCABULARY, (batch_size, length), generator=torch.Generator().manual_seed(seed))


# gradcheck


BIASED = [name for name, cls in POSITIONS.items() if cls.is_bias]
EXTRAS = {"plain": {}, "softcap_and_sink": {"logit_softcap": 1.5, "attention_sink": True}}


@pytest.mark.parametrize("extras", EXTRAS)
@pytest.mark.parametrize("bias", ["none", *BIASED])
def test_gradcheck(score, bias, extras, small_tiles, make_config, make_model):
    """Two documents and padding, three heads on one key/value head, d_v ≠ d_k, 4 × 4 tiles."""
    sizes = {"num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 2, "value_head_dim": 3}
    config = make_config(score, "sliding_window", position=bias, num_hidden_layers=1, **sizes, **EXTRAS[extras])
    inputs = [draw(1, 11, heads, width, seed=i) for i, (heads, width) in enumerate([(3, 2), (1, 2), (1, 3)])]
    check_gradients(config, make_model, inputs, cu_seq_lens=torch.tensor([0, 4, 10]))


def test_gradcheck_of_patterns(pattern, causal, small_tiles, make_config, make_model):
    sizes = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 2, "value_head_dim": 2}
    config = make_config("dot_product", pattern, causal, "t5", num_hidden_layers=1, **sizes, attention_sink=True)
    real = torch.tensor([[True] * 11, [False] * 3 + [True] * 4 + [False] * 4])
    check_gradients(config, make_model, [draw(2, 11, 2, 2, seed=i) for i in range(3)], padding_mask=real)


def check_gradients(config, make_model, inputs, **batch):
    packing = read_batch(*inputs[0].shape[:2], torch.device("cpu"), **batch)
    model = make_model(config, "selfattn")
    (view,), attention = model.views(packing, packing.tokens, None, torch.float64), model.layers[0].attention
    assert view.mask.visited.shape[-1] > 3, "several tiles"
    owned = {
        f"{part}.{name}": parameter
        for part in ("position", "score_function")
        for name, parameter in getattr(attention, part).named_parameters()
        if parameter.requires_grad
    }

    def attend(query, key, value, *parameters):
        return torch.func.functional_call(
            _PositionScoreAttend(attention, view), dict(zip(owned, parameters, strict=True)), (query, key, value)
        )

    leaves = [x.detach().clone().requires_grad_() for x in (*inputs, *owned.values())]
    assert gradcheck(attend, leaves, fast_mode=True, atol=1e-6)


class _PositionScoreAttend(torch.nn.Module):
    """From projected query, key and value to heads, as `SelfAttention.heads` goes."""

    def __init__(self, attention, view):
        super().__init__()
        self.position, self.score_function, self.view = attention.position, attention.score_function, view

    def forward(self, query, key, value):
        query, key, bias = self.position(query, key, self.view.position)
        query, key, scoring = self.score_function(query, key, bias)
        return KERNELS["selfattn"].attend(query, key, value, self.view.mask, scoring)[0]


def test_second_derivatives_are_refused(make_config, make_model):
    """They are not computed; a silent 0 would be wrong."""
    query, key, value = (draw(1, 5, 1, 2, seed=i).requires_grad_() for i in range(3))
    heads = kernels_selfattn.attend(query, key, value, mask_of(Full(), 5), SCALED)[0]
    (first,) = torch.autograd.grad(heads.square().sum(), query, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"no second derivatives. Use .*set_attn_implementation\('eager'\)"):
        torch.autograd.grad(first.square().sum(), key)


def test_torch_func_gives_the_gradient_of_autograd(make_config, make_model):
    model = make_model(make_config(position="rotary"), "selfattn")
    ids = torch.arange(7)[None]
    parameters = dict(model.named_parameters())

    def loss(parameters):
        return torch.func.functional_call(model, parameters, (ids,)).last_hidden_state.square().mean()

    found = torch.func.grad(loss)({name: x.detach() for name, x in parameters.items()})
    loss(parameters).backward()
    for name, x in parameters.items():
        if x.grad is not None:
            assert_close(found[name], x.grad, name)


SCALED = Scoring("scaled_dot_product", (0.7,))


def mask_of(pattern, length, rows=1, heads=1, **batch):
    packing = read_batch(rows, length, torch.device("cpu"), **batch)
    return tile_mask(pattern, packing.tokens, packing.tokens, packing, range(heads), None)


# Dropout


RATE = 0.3


def dropped_weights(seed, rate=RATE, rows=2, length=11, heads=2):
    """What dropout leaves of the weights, read off by values that are the rows of an identity: (R, H, N, N)."""
    query, key = (draw(rows, length, heads, 4, seed=i) for i in range(2))
    value = torch.eye(length, dtype=torch.float64).view(1, length, 1, length).expand(rows, -1, heads, -1)
    torch.manual_seed(seed)
    mask = mask_of(Full(), length, rows, heads)
    return kernels_selfattn.attend(query, key, value, mask, SCALED, dropout=rate)[0].transpose(1, 2)


class TestDropout:
    def test_a_weight_is_dropped_or_scaled_up(self, small_tiles):
        weights, left = dropped_weights(0, rate=0.0), dropped_weights(0)
        kept = left != 0
        assert_close(left[kept], weights[kept] / (1 - RATE))
        # 484 draws: five standard deviations are 0.1.
        assert abs(1 - kept.double().mean().item() - RATE) < 0.1

    def test_the_seed_of_torch_decides(self, small_tiles):
        assert torch.equal(dropped_weights(1), dropped_weights(1))
        assert not torch.equal(dropped_weights(1) == 0, dropped_weights(2) == 0)

    def test_rows_heads_and_queries_draw_for_themselves(self, small_tiles):
        kept = (dropped_weights(0, length=40) != 0).flatten(0, 2)
        assert len({tuple(row.tolist()) for row in kept}) == len(kept)

    def test_it_does_not_depend_on_the_tiles(self, monkeypatch):
        whole = dropped_weights(0)
        use_small_tiles(monkeypatch, tile=4)
        assert_close(dropped_weights(0), whole)

    def test_the_mean_is_kept(self, small_tiles):
        """Of each single weight, over 400 seeds: the standard deviation of its mean is w √(p / (1 - p) / 400)."""
        weights = dropped_weights(0, rate=0.0)
        mean = torch.stack([dropped_weights(seed) for seed in range(400)]).mean(0)
        deviations = (mean / weights - 1) / math.sqrt(RATE / (1 - RATE) / 400)
        assert deviations.abs().max() < 5
        assert abs(deviations.std() - 1) < 0.25

    def test_no_key_is_dropped_more_often_than_another(self):
        """Within one forward: of 1600 draws for each key about 30 % are dropped, for the first key, too."""
        dropped = (dropped_weights(0, rows=1, length=400, heads=4) == 0).double().mean((0, 1, 2))
        deviations = (dropped - RATE) / math.sqrt(RATE * (1 - RATE) / 1600)
        assert deviations.abs().max() < 5
        assert abs(deviations.std() - 1) < 0.25

    @pytest.mark.parametrize("bias", ["none", "t5", "transformer_xl"])
    def test_the_backward_uses_the_mask_of_the_forward(self, score, bias, small_tiles, make_config, make_model):
        """Gradient times direction equals the difference quotient along it, all at one seed."""
        config = make_config(score, position=bias, num_hidden_layers=1, attention_dropout=RATE, attention_sink=True)
        model, embeds = make_model(config, "selfattn").train(), draw(2, 11, 20).requires_grad_()
        direction, upstream = draw(2, 11, 20, seed=1), draw(2, 11, 20, seed=2)

        def loss(embeds):
            torch.manual_seed(3)
            return (model(inputs_embeds=embeds).last_hidden_state * upstream).sum()

        (gradient,) = torch.autograd.grad(loss(embeds), embeds)
        step = 1e-5
        with torch.no_grad():
            expected = (loss(embeds + step * direction) - loss(embeds - step * direction)) / (2 * step)
        assert ((gradient * direction).sum() - expected).abs() < 1e-6 * max(1, expected.abs())

    def test_off_in_evaluation(self, make_config, make_model):
        ids = draw_ids(2, 9)
        model = make_model(make_config(attention_dropout=RATE), "selfattn")
        without = make_model(make_config(), "selfattn")
        with torch.no_grad():
            assert torch.equal(model(ids).last_hidden_state, without(ids).last_hidden_state)
            assert not torch.allclose(model.train()(ids).last_hidden_state, without(ids).last_hidden_state)

    def test_layers_draw_for_themselves(self, make_config, make_model, monkeypatch):
        seeds = []
        original = tile_roads.Road.kept
        monkeypatch.setattr(
            tile_roads.Road, "kept", lambda self, tile: seeds.append(int(self.problem.seed)) or original(self, tile)
        )
        make_model(make_config(attention_dropout=RATE, num_hidden_layers=3), "selfattn").train()(draw_ids(1, 5))
        assert len(set(seeds)) == 3

    def test_checkpointing_draws_the_same_again(self, make_config, make_model):
        gradients = []
        for checkpointing in (False, True):
            model = make_model(make_config(attention_dropout=RATE), "selfattn").train()
            if checkpointing:
                model.gradient_checkpointing_enable({"use_reentrant": False})
            torch.manual_seed(0)
            model(draw_ids(2, 9)).last_hidden_state.square().sum().backward()
            gradients.append([x.grad for x in model.parameters()])
        for actual, expected in zip(*gradients, strict=True):
            assert_close(actual, expected, "gradient")


# torch.compile and torch.export


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


COMPILED = {
    "scaled_dot_product-sliding_window-rotary": {"pattern": "sliding_window", "position": "rotary"},
    "cosine-longformer-alibi-causal": {
        "score": "cosine",
        "pattern": "longformer",
        "position": "alibi",
        "causal": True,
    },
    "additive-bigbird-t5-sink": {
        "score": "additive",
        "pattern": "bigbird",
        "position": "t5",
        "attention_sink": True,
    },
    "dot_product-full-transformer_xl-softcap": {
        "score": "dot_product",
        "position": "transformer_xl",
        "logit_softcap": 5.0,
    },
}
"""Every score, pattern and bias once."""


@pytest.mark.parametrize(
    ("kernel", "choices"),
    [
        ("sdpa", next(iter(COMPILED))),
        *(("eager", c) for c in list(COMPILED)[-2:]),
        *(("selfattn", c) for c in COMPILED),
    ],
)
def test_compiled_equals_uncompiled(kernel, choices, fresh_compiler, make_config, make_model):
    """In one graph, values and gradients; several tiles. flex_attention, which has no backward: test_tracing.py."""
    config = make_config(**COMPILED[choices], num_hidden_layers=1)
    plain, model = make_model(config, kernel), make_model(config, kernel)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    batch = {"input_ids": draw_ids(2, 70), "attention_mask": torch.ones(2, 70, dtype=torch.bool)}
    batch["attention_mask"][1, :9] = False
    outputs, expected = compiled(**batch).last_hidden_state, plain(**batch).last_hidden_state
    assert_close(outputs, expected)
    outputs.square().sum().backward()
    expected.square().sum().backward()
    for (name, parameter), other in zip(model.named_parameters(), plain.parameters(), strict=True):
        if other.grad is not None:
            assert_close(parameter.grad, other.grad, f"gradient of {name}")


def test_compiled_dropout(fresh_compiler, make_config, make_model):
    """The graph draws a new mask for each call, and the backward uses the forward's."""
    config = make_config(pattern="sliding_window", num_hidden_layers=1, attention_dropout=RATE)
    model = make_model(config, "selfattn").train()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    embeds, direction, step = draw(2, 9, 20).requires_grad_(), draw(2, 9, 20, seed=1), 1e-5

    def loss(embeds):
        torch.manual_seed(0)
        return compiled(inputs_embeds=embeds).last_hidden_state[..., ::2].square().sum()

    (gradient,) = torch.autograd.grad(loss(embeds), embeds)
    expected = (loss(embeds + step * direction) - loss(embeds - step * direction)).item() / (2 * step)
    assert abs((gradient * direction).sum().item() - expected) < 1e-6 * max(1, abs(expected))
    with torch.no_grad():
        assert not torch.equal(*(compiled(inputs_embeds=embeds.detach()).last_hidden_state for _ in range(2)))


@pytest.mark.parametrize("choices", COMPILED)
def test_exported_with_free_batch_and_length(choices, make_config, make_model):
    """Traced within one tile and run on several, and the other way round."""
    model = make_model(make_config(**COMPILED[choices], num_hidden_layers=1), "selfattn")
    for traced in (13, 150):
        free = {0: torch.export.Dim("batch", max=64), 1: torch.export.Dim("length", min=2, max=512)}
        mask = torch.ones(3, traced, dtype=torch.bool)
        mask[1, :3] = False
        program = torch.export.export(
            model,
            (),
            {"input_ids": draw_ids(3, traced), "attention_mask": mask},
            dynamic_shapes={"input_ids": free, "attention_mask": free},
        ).module()
        for rows, length in [(3, 13), (1, 5), (2, 64), (2, 150)]:
            batch = {"input_ids": draw_ids(rows, length), "attention_mask": torch.ones(rows, length, dtype=torch.bool)}
            batch["attention_mask"][:, 3:5] = False
            with torch.no_grad():
                assert_close(program(**batch)[0], model(**batch)[0], f"traced with N={traced}, run with N={length}")


# Two copies of the code in one process


PACKAGE = Path(hf_selfattn.__file__).parent


@pytest.fixture
def imported_copy(tmp_path, monkeypatch):
    """A second copy of the package under another name, whose operators return 0 forward and backward."""
    folder = tmp_path / "another_selfattn"
    shutil.copytree(PACKAGE, folder, ignore=shutil.ignore_patterns("tools", "__pycache__"))
    (folder / "__init__.py").write_text("")
    code = (folder / "kernels_selfattn.py").read_text()
    for old, new in [
        ("return forward(problem,", "return tuple(x * 0 for x in forward(problem,"),
        (
            "sink, with_gradient, room)\n\n\ntiled_attention =",
            "sink, with_gradient, room))\n\n\ntiled_attention =",
        ),
        ("return [x.contiguous() for", "return [x.contiguous() * 0 for"),
    ]:
        assert code.count(old) == 1
        code = code.replace(old, new)
    (folder / "kernels_selfattn.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    yield importlib.import_module("another_selfattn.modeling_selfattn")
    for name in [name for name in sys.modules if name.startswith("another_selfattn")]:
        del sys.modules[name]
    # transformers' two tables are global: what this module imports last stays.
    AttentionInterface.register("selfattn", kernels_stock.stock_attention)
    AttentionMaskInterface.register("selfattn", kernels_stock.stock_mask)


def saved_copy(folder, model, monkeypatch, tmp_path):
    """The class of the code in a saved folder, as trust_remote_code finds it where the package is not registered."""
    from transformers import dynamic_module_utils
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    model.save_pretrained(folder)
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(tmp_path / "modules")
    return get_class_from_dynamic_module("modeling_selfattn.SelfAttnModel", str(folder), trust_remote_code=True)


@pytest.fixture
def own_tables():
    """Leaves transformers' global tables as they were."""
    yield
    AttentionInterface.register("selfattn", kernels_stock.stock_attention)
    AttentionMaskInterface.register("selfattn", kernels_stock.stock_mask)


def test_a_second_copy_keeps_to_its_own_operator(imported_copy, make_config, make_model):
    ids, config = draw_ids(2, 70), make_config(position="rotary", num_hidden_layers=1)
    ours = make_model(config, "selfattn")
    theirs = imported_copy.SelfAttnModel._from_config(
        imported_copy.SelfAttnModel.config_class(**config.to_diff_dict()), attn_implementation="selfattn"
    )
    theirs.load_state_dict(ours.state_dict())
    theirs = theirs.double().eval()
    silent = make_model(config, "eager")
    with torch.no_grad():
        silent.layers[0].attention.v_proj.weight.zero_()
        silent.layers[0].attention.v_proj.bias.zero_()
    for _ in range(2):
        for model, equal in ((ours, make_model(config, "eager")), (theirs, silent)):
            outputs = model(ids).last_hidden_state
            assert_close(outputs, equal(ids).last_hidden_state, model.__module__)
            model.zero_grad()
            outputs.square().sum().backward()
            assert bool(model.layers[0].attention.v_proj.weight.grad.any()) == (model is ours)


def test_code_saved_with_a_model_keeps_to_its_own_operator(tmp_path, monkeypatch, own_tables, make_config, make_model):
    """Remote code beside the imported package: other modules, other operators, the same numbers."""
    ids, config = draw_ids(2, 70), make_config(pattern="longformer", position="t5", num_hidden_layers=1)
    ours = make_model(config, "selfattn")
    before = ours(ids).last_hidden_state
    cls = saved_copy(tmp_path / "saved", ours, monkeypatch, tmp_path)
    assert cls.__module__.startswith("transformers_modules.")
    theirs = cls.from_pretrained(tmp_path / "saved", attn_implementation="selfattn", dtype=torch.float64).eval()
    copied = sys.modules[cls.__module__.rpartition(".")[0] + ".kernels_selfattn"]
    assert copied.OPERATORS != kernels_selfattn.OPERATORS
    assert copied.tiled_attention is not kernels_selfattn.tiled_attention
    assert_close(theirs(ids).last_hidden_state, before, "the copy")
    assert torch.equal(ours(ids).last_hidden_state, before)


# dtypes


@pytest.mark.parametrize("choices", COMPILED)
def test_many_tiles_in_every_dtype(choices, dtype, make_config, make_model):
    """Against the dense definition in float64 with the same parameters."""
    config, ids = make_config(**COMPILED[choices], num_hidden_layers=1), draw_ids(2, 150)
    model, exact = make_model(config, "selfattn", dtype), make_model(config, "eager")
    outputs, expected = model(ids).last_hidden_state, exact(ids).last_hidden_state
    assert outputs.dtype == dtype
    assert_close(outputs, expected)
    outputs.double().square().mean().backward()
    expected.square().mean().backward()
    for (name, parameter), other in zip(model.named_parameters(), exact.parameters(), strict=True):
        if other.grad is not None:
            assert parameter.grad.dtype == dtype
            assert_close(parameter.grad, other.grad, f"gradient of {name}")


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_sums_are_fp32(half):
    """4096 equal weights: 1 / 4096 each, which a sum in half precision misses by far."""
    query, key = torch.zeros(1, 1, 1, 2, dtype=half), torch.zeros(1, 4096, 1, 2, dtype=half)
    value = torch.ones(1, 4096, 1, 1, dtype=half)
    packing, keys = (read_batch(1, length, torch.device("cpu")) for length in (1, 4096))
    mask = tile_mask(
        Full(), packing.tokens._replace(position=packing.tokens.position + 4095), keys.tokens, packing, range(1), None
    )
    assert kernels_selfattn.attend(query, key, value, mask, SCALED)[0].item() == 1


# Cost: blocks that hold nothing are not computed


def scores_computed(pattern, length, heads=1, **batch):
    """How many scores one forward computes for one head, and the most that it holds at once."""
    counts = []
    original = tile_math._read_key

    def counting(road, step):
        counts.append(step.query_places.numel() * step.key_places.shape[-1] * road.problem.block_size**2)
        return original(road, step)

    x = torch.zeros(1, length, heads, 1, dtype=torch.float64, requires_grad=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tile_math, "_read_key", counting)
        kernels_selfattn.attend(x, x, x, mask_of(pattern, length, heads=heads, **batch), SCALED)
    return sum(counts) // heads, max(counts)


LINEAR = {
    "window": (SlidingWindow(window_radius=64), 3),
    "window_causal": (SlidingWindow(window_radius=64, causal=True), 2),
    "window_of_whole_blocks": (SlidingWindow(window_radius=200), 9),
    "dilation": (SlidingWindow(window_radius=20, dilation=4), 5),
    "longformer": (Longformer(window_radius=64, num_global_tokens=3), 3 + 2),
    "longformer_local": (Longformer(window_radius=64, queries="local"), 3 + 1),
    "longformer_global": (Longformer(window_radius=64, queries="global"), 1),
    "bigbird": (BigBird(), 3 + 3 + 4),
    "bigbird_without_random": (BigBird(num_random_blocks=0), 3 + 4),
    "bigbird_in_small_blocks": (BigBird(block_size=16), (3 + 3 + 4) / 4 + 0.1),
}


class TestCost:
    @pytest.mark.parametrize("pattern", LINEAR)
    @pytest.mark.parametrize("length", [1024, 4096])
    def test_blocks_visited_grow_with_the_length(self, pattern, length):
        """At most so many key blocks of 64 tokens for each query block."""
        pattern, most = LINEAR[pattern]
        mask = mask_of(pattern, length, heads=4)
        per_head = mask.visited.sum().item() / mask.visited.shape[1] * mask.block_size**2
        assert per_head <= most * length * 64

    def test_full_visits_everything_and_causal_half(self):
        assert mask_of(Full(), 1280).visited.sum() == 5 * 5
        assert mask_of(Full(causal=True), 1280).visited.sum() == 5 * 6 / 2

    def test_blocks_seen_whole_are_known(self):
        """They need no mask: all of full attention, and of a wide window all but its edge."""
        assert mask_of(Full(), 1280).whole.sum() == 5 * 5
        mask = mask_of(SlidingWindow(window_radius=256), 1280)
        assert (mask.visited.sum(), mask.whole.sum()) == (20 + 2 * (19 + 18 + 17 + 16), 20 + 2 * (19 + 18 + 17))

    def test_padding_and_other_documents_are_not_visited(self, monkeypatch):
        use_blocks(monkeypatch)
        half = (torch.arange(1024) < 512)[None]
        assert mask_of(Full(), 1024, padding_mask=half).visited.sum() == 2 * 2
        assert mask_of(Full(), 1024, cu_seq_lens=torch.arange(0, 1025, 256)).visited.sum() == 4
        assert mask_of(Full(), 1024, cu_seq_lens=torch.tensor([0, 512, 1024])).visited.sum() == 2 * 2 * 2
        nothing = torch.zeros(1, 1024, dtype=torch.bool)
        assert mask_of(Full(), 1024, padding_mask=nothing).visited.sum() == 0

    def test_a_users_mask_empties_blocks(self):
        packing = read_batch(1, 1024, torch.device("cpu"))
        user_mask = torch.ones(1, 1, 1024, 1024, dtype=torch.bool).tril().triu(-100)
        mask = tile_mask(Full(), packing.tokens, packing.tokens, packing, range(1), user_mask)
        assert mask.visited.sum() == 8 + 7

    @pytest.mark.parametrize("pattern", ["window", "longformer", "bigbird"])
    def test_what_is_computed_is_what_is_visited(self, pattern):
        pattern, most = LINEAR[pattern]
        short, long = (scores_computed(pattern, length)[0] for length in (1024, 4096))
        assert short <= most * 64 * 1024
        assert 3.5 * short <= long <= most * 64 * 4096

    @pytest.mark.parametrize("pattern", [Full(), SlidingWindow(window_radius=64)], ids=["full", "window"])
    def test_scores_held_at_once_do_not_grow(self, pattern):
        for length in (1024, 4096):
            assert scores_computed(pattern, length)[1] <= tile_roads.SCORES_AT_ONCE

    def test_nothing_larger_than_the_inputs_is_kept_for_the_backward(self):
        """Of 1024 tokens one score for each pair would be a million numbers."""
        kept = []
        query, key, value = (draw(1, 1024, 1, 4, seed=i).requires_grad_() for i in range(3))
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
            kernels_selfattn.attend(query, key, value, mask_of(Full(), 1024), SCALED)
        assert max(kept) <= 1024 * 4


# A pattern of one's own


@dataclass(frozen=True, kw_only=True)
class SameColour(Pattern):
    per_head = True

    def sees(self, head, query, key):
        return query.position % (head + 2) == key.position % (head + 2)


@pytest.fixture
def same_colour():
    register_pattern("same_colour", SameColour)
    yield "same_colour"
    del PATTERNS["same_colour"]


def test_own_pattern_on_every_kernel(same_colour, kernel, causal, uncompiled, make_config, make_model):
    """Five lines, and it runs everywhere; on many tiles, and without `may_see` it is computed in full."""
    config, ids = make_config(pattern=same_colour, causal=causal, position="rotary"), draw_ids(2, 150)
    mask = torch.ones(2, 150, dtype=torch.long)
    mask[1, :30] = 0
    model, exact = make_model(config, kernel), make_model(config, "eager")
    with torch.no_grad() if kernel == "flex_attention" else nullcontext():
        outputs, expected = (m(ids, attention_mask=mask).last_hidden_state for m in (model, exact))
        assert_close(outputs, expected)
    if kernel != "flex_attention":
        outputs.square().sum().backward()
        expected.square().sum().backward()
        for (name, parameter), other in zip(model.named_parameters(), exact.parameters(), strict=True):
            assert_close(parameter.grad, other.grad, f"gradient of {name}")


# Stock models


_SIZES = {"vocab_size": VOCABULARY, "hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 3}
_SIZES |= {"intermediate_size": 20, "max_position_embeddings": 200, "pad_token_id": 0}
STOCK = {
    "bert": (BertModel, BertConfig(**_SIZES)),
    "modernbert": (
        ModernBertModel,
        ModernBertConfig(
            **_SIZES,
            local_attention=16,
            layer_types=["full_attention", "sliding_attention", "sliding_attention"],
            bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2,
        ),
    ),
}  # fmt: skip


@pytest.fixture(params=STOCK)
def stock(request, tmp_path):
    """kernel -> the same stock model with that kernel, loaded from a folder as a user loads it."""
    cls, config = STOCK[request.param]
    torch.manual_seed(0)
    cls._from_config(config).save_pretrained(tmp_path)
    return lambda kernel, **options: cls.from_pretrained(tmp_path, attn_implementation=kernel, **options)


def stock_batch(side, length=150):
    ids = torch.randint(3, VOCABULARY, (3, length), generator=torch.Generator().manual_seed(0))
    mask = torch.arange(length) < torch.tensor([[length], [90], [1]])
    return ids, mask.flip(1) if side == "left" else mask


class TestStockModels:
    @pytest.mark.parametrize("side", ["right", "left"])
    def test_the_numbers_of_sdpa(self, stock, side):
        ids, mask = stock_batch(side)
        ours, theirs = stock("selfattn"), stock("sdpa")
        assert ours.config._attn_implementation == "selfattn"
        outputs, expected = (m(ids, attention_mask=mask.long()).last_hidden_state[mask] for m in (ours, theirs))
        assert_close(outputs, expected)
        outputs.square().mean().backward()
        expected.square().mean().backward()
        for (name, parameter), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
            if other.grad is not None:
                assert_close(parameter.grad, other.grad, f"gradient of {name}")

    def test_without_a_mask(self, stock):
        ids, _ = stock_batch("right")
        assert_close(stock("selfattn")(ids).last_hidden_state, stock("sdpa")(ids).last_hidden_state)

    def test_weights(self, stock):
        ids, mask = stock_batch("right")
        ours, theirs = (
            stock(kernel)(ids, attention_mask=mask.long(), output_attentions=True).attentions
            for kernel in ("selfattn", "eager")
        )
        for weights, expected in zip(ours, theirs, strict=True):
            assert_close(weights.transpose(1, 2)[mask], expected.transpose(1, 2)[mask])

    def test_a_mask_of_pairs(self, stock):
        ids, _ = stock_batch("right")
        pairs = torch.rand(3, 1, 150, 150, generator=torch.Generator().manual_seed(1)) < 0.5
        pairs |= torch.eye(150, dtype=torch.bool)
        outputs, expected = (stock(k)(ids, attention_mask=pairs).last_hidden_state for k in ("selfattn", "sdpa"))
        assert_close(outputs, expected)

    def test_a_mask_of_numbers_is_refused(self, stock):
        ids, _ = stock_batch("right")
        with pytest.raises(ValueError, match=r"reads masks made by its own mask function or bool masks, got .*Pass"):
            stock("selfattn")(ids, attention_mask=torch.zeros(3, 1, 150, 150))

    def test_a_window_visits_few_blocks(self, stock):
        """ModernBERT's windows of 8 tokens on a side: 150 tokens are 2 tiles of 128; of 1500, not all 12 × 12."""
        if stock("selfattn").config.model_type != "modernbert":
            return
        mask = kernels_stock.stock_mask(
            1, 1500, 1500, mask_function=lambda b, h, q, k: (q - k).abs() <= 8, q_offset=0, kv_offset=0
        )
        assert mask.visited.sum() == 12 + 2 * 11

    def test_dropout_is_drawn_for_each_row(self):
        """Twice the same text in a batch: the seed decides, and the two do not lose the same weights."""
        query, key, value = (draw(1, 2, 40, 4, seed=i).expand(2, -1, -1, -1) for i in range(3))
        mask = kernels_stock.stock_mask(2, 40, 40, mask_function=lambda b, h, q, k: q >= 0, q_offset=0, kv_offset=0)
        module = torch.nn.Module()
        outputs = []
        for _ in range(2):
            torch.manual_seed(0)
            outputs.append(kernels_stock.stock_attention(module, query, key, value, mask, dropout=0.5)[0])
        assert torch.equal(*outputs)
        assert not torch.allclose(outputs[0][0], outputs[0][1])

    def test_causal_models(self):
        """A decoder of transformers, whose mask function is causal."""
        config = transformers.LlamaConfig(**{**_SIZES, "hidden_size": 24, "num_key_value_heads": 1})
        torch.manual_seed(0)
        model = transformers.LlamaModel._from_config(config, attn_implementation="sdpa").eval()
        ids, mask = stock_batch("right")
        expected = model(ids, attention_mask=mask.long()).last_hidden_state[mask]
        model.set_attn_implementation("selfattn")
        assert_close(model(ids, attention_mask=mask.long()).last_hidden_state[mask], expected)
