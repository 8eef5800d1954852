"""The tiled kernel over several tiles and several steps of running softmax, for every choice.

Twice: at its own tile sizes, 150 to 300 tokens, against the dense definition, which test_kernels.py holds to the slow
loops at N = 37; and with tiles of 5 tokens against the slow loops themselves.
"""

import pytest
import torch

from hf_selfattn import tile_blocks, tile_roads, tiles

from . import test_kernels
from .small_tiles import use_small_tiles
from .test_kernels import BATCHES, EXTRAS, HEADS, check_kernel
from .tolerances import assert_close

N = 150


def _batches():
    """Each form of a batch: padded on each side with holes and an empty row, packed, one token, masks of pairs."""
    generator = torch.Generator().manual_seed(0)

    def lengths(*numbers):
        return torch.arange(N) < torch.tensor(numbers)[:, None]

    holes = torch.rand(3, N, generator=generator) < 0.6
    holes[1, 20:140] = False
    pairs = torch.rand(2, 4, N, N, generator=generator) < 0.3
    pairs[:, :, 70] = pairs[:, 1, :, 5] = False
    pairs[:, :, :64, 64:128] = False
    return {
        "whole": (2, {}),
        "padded_right": (4, {"attention_mask": lengths(N, 129, 1, 0)}),
        "padded_left": (4, {"attention_mask": lengths(N, 129, 1, 0).flip(1)}),
        "padded_with_holes": (3, {"attention_mask": holes}),
        "packed": (1, {"position_ids": torch.cat([torch.arange(n) for n in (70, 1, 64, 15)])[None]}),
        "boundaries": (2, {"cu_seq_lens_q": torch.tensor([0, 64, 65, 200, 280])}),
        "pairs": (2, {"attention_mask": pairs[:, 0]}),
        "pairs_per_head": (2, {"attention_mask": pairs}),
        "one_token": (3, {"attention_mask": lengths(N, 2, 3)[:, :1]}),
    }


LONG = _batches()
PLAIN_OR_NOT = {
    "plain": {},
    "qk_norm-softcap-sink": {"qk_norm": True, "logit_softcap": 2.0, "attention_sink": True},
}


def compare(config, make_model, rows, batch, length=N, dtype=torch.float64):
    """Hidden states and the gradients of all parameters and embeddings."""
    embeds = torch.randn(rows, length, config.embedding_width, generator=torch.Generator().manual_seed(1))
    upstream = torch.randn(rows, length, config.hidden_size, generator=torch.Generator().manual_seed(2))
    found = []
    for kernel, kind in (("selfattn", dtype), ("eager", torch.float64)):
        model, leaf = make_model(config, kernel, kind), embeds.to(kind).requires_grad_()
        outputs = model(inputs_embeds=leaf, **batch).last_hidden_state
        outputs.backward(upstream.to(kind) / upstream.numel() ** 0.5)
        found.append((outputs, leaf.grad, {name: x.grad for name, x in model.named_parameters() if x.requires_grad}))
    (outputs, gradient, gradients), (expected, expected_gradient, expected_gradients) = found
    assert_close(outputs, expected, "hidden states")
    assert_close(gradient, expected_gradient, "gradient of embeddings")
    for name, x in gradients.items():
        if expected_gradients[name] is not None:
            assert_close(x, expected_gradients[name], f"gradient of {name}")


@pytest.fixture
def turn(request):
    """The number of a test's choice, to go through other tables in turn with it."""
    return request.node.callspec.indices["choice"]


@pytest.mark.parametrize("extras", PLAIN_OR_NOT)
def test_choice_equals_dense(choice, extras, turn, make_config, make_model):
    """Forms of batches in turn, so that each occurs with many choices; all of them with each pattern: below."""
    rows, batch = LONG[list(LONG)[turn % len(LONG)]]
    config = make_config(*choice, num_hidden_layers=1, **longer(choice), **PLAIN_OR_NOT[extras])
    length = batch["attention_mask"].shape[-1] if "attention_mask" in batch else N
    compare(config, make_model, rows, batch, length)


def longer(choice):
    """Learned positions for as many tokens."""
    return {"max_position_embeddings": 512} if choice.position == "learned" else {}


@pytest.mark.parametrize("batch", LONG)
def test_batch_equals_dense(batch, pattern, causal, make_config, make_model):
    rows, batch = LONG[batch]
    config = make_config("scaled_dot_product", pattern, causal, "t5", num_hidden_layers=1, attention_sink=True)
    length = batch["attention_mask"].shape[-1] if "attention_mask" in batch else N
    compare(config, make_model, rows, batch, length)


SPARSE = {
    "window_of_whole_tiles": {"pattern": "sliding_window", "window_radius": 140},
    "window_of_one_tile": {"pattern": "sliding_window", "window_radius": 64},
    "dilated": {"pattern": "sliding_window", "window_radius": 30, "dilation": 3},
    "dilated_beyond_a_tile": {"pattern": "sliding_window", "window_radius": 2, "dilation": 70},
    "no_global_token": {"pattern": "longformer", "window_radius": 40, "num_global_tokens": 0},
    "global_tokens_over_a_tile": {"pattern": "longformer", "window_radius": 20, "num_global_tokens": 70},
    "global_projections": {"pattern": "longformer", "window_radius": 90, "global_projections": True},
    "blocks_of_a_tile": {"pattern": "bigbird", "block_size": 64},
    "blocks_of_16": {"pattern": "bigbird", "block_size": 16, "num_global_blocks": 2, "num_random_blocks": 3},
    "blocks_larger_than_a_tile": {"pattern": "bigbird", "block_size": 200, "num_global_blocks": 1},
    "blocks_that_do_not_fit_tiles": {"pattern": "bigbird", "block_size": 7, "num_global_blocks": 3},
    "one_block_alone": {
        "pattern": "bigbird",
        "block_size": 20,
        "block_radius": 0,
        "num_global_blocks": 0,
        "num_random_blocks": 0,
    },
    "random_blocks_alone": {
        "pattern": "bigbird",
        "block_size": 20,
        "block_radius": 0,
        "num_global_blocks": 0,
        "num_random_blocks": 4,
    },
}


@pytest.mark.parametrize("sparse", SPARSE)
@pytest.mark.parametrize("score", ["scaled_dot_product", "additive"])
def test_sparse_equals_dense(sparse, score, causal, make_config, make_model):
    """Windows and blocks of all sizes beside a tile's, over 300 tokens; a padded row, tokens that the user chose."""
    config = make_config(score, causal=causal, position="alibi", num_hidden_layers=1, **SPARSE[sparse])
    mask = torch.ones(2, 300, dtype=torch.bool)
    mask[1, :80] = mask[1, 200:210] = False
    batch = {"attention_mask": mask}
    if config.attention_pattern == "longformer":
        batch["global_attention_mask"] = torch.zeros(2, 300, dtype=torch.long)
        batch["global_attention_mask"][0, [3, 150]] = batch["global_attention_mask"][1, 299] = 1
    compare(config, make_model, 2, batch, 300)


@pytest.mark.parametrize("position", ["rotary", "t5", "transformer_xl"])
def test_many_steps_of_the_running_softmax(score, position, monkeypatch, make_config, make_model):
    """One key block a step, so that rows meet their greatest score early, late or after a step that is all hidden."""
    monkeypatch.setattr(tile_blocks, "KEYS_AT_ONCE", 1)
    monkeypatch.setattr(tile_roads, "SCORES_AT_ONCE", 1)
    config = make_config(score, "full", True, position, num_hidden_layers=1, attention_sink=True)
    compare(config, make_model, *LONG["pairs"])


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["float32", "bfloat16", "float16"]
)
def test_scores_of_great_size(dtype, make_config, make_model):
    """Scores of some thousands neither overflow nor vanish: the greatest takes all."""
    config = make_config("dot_product", num_hidden_layers=1)
    model, exact = make_model(config, "selfattn", dtype), make_model(config, "eager")
    ids = torch.randint(43, (2, N), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for kind in (model, exact):
            kind.layers[0].attention.q_proj.weight *= 512
        outputs, expected = model(ids), exact(ids)
    assert torch.isfinite(outputs.last_hidden_state).all()
    if dtype == torch.float32:
        # Scores of 10^4 are known to 10^-3: the weights that they decide are compared, not their last digits.
        assert (outputs.last_hidden_state - expected.last_hidden_state).abs().median() < 1e-3


# With tiles of 5 tokens, against the slow loops


@pytest.fixture
def small_tiles(monkeypatch):
    use_small_tiles(monkeypatch)
    test_kernels.tokens_and_mask.cache_clear()
    yield
    test_kernels.tokens_and_mask.cache_clear()


def test_small_tiles_equal_slow_loops(choice, turn, small_tiles, make_config):
    batch = list(BATCHES)[turn % len(BATCHES)]
    check_kernel(make_config(*choice, **HEADS), "selfattn", batch, torch.float64)


@pytest.mark.parametrize("extra", EXTRAS)
def test_small_tiles_with_extras_equal_slow_loops(extra, small_tiles, make_config):
    choices = {"pattern": "sliding_window", "position": "t5"}
    check_kernel(make_config(**{**choices, **HEADS, **EXTRAS[extra]}), "selfattn", "padded", torch.float64)


# Short documents whole beside long ones in blocks


@pytest.mark.parametrize("extras", PLAIN_OR_NOT)
def test_both_roads_in_one_batch(choice, extras, monkeypatch, make_config, make_model):
    """Documents of up to 20 tokens go whole, longer ones block by block; they share blocks of the layout."""
    monkeypatch.setattr(tiles, "WHOLE_BELOW", 20)
    config = make_config(*choice, num_hidden_layers=1, **longer(choice), **PLAIN_OR_NOT[extras])
    batch = {"position_ids": torch.cat([torch.arange(n) for n in (33, 20, 1, 64, 15, 17)])[None]}
    compare(config, make_model, 1, batch)


def test_many_heads_of_one_document_are_taken_in_turn(score, monkeypatch, make_config, make_model):
    """Where one document's scores are too many at once: heads one by one, with parameters of their own."""
    monkeypatch.setattr(tile_roads, "SCORES_AT_ONCE", 1)
    config = make_config(score, "bigbird", position="t5", num_hidden_layers=1)
    compare(config, make_model, *LONG["padded_right"])


def test_what_is_not_a_number_stays_so(kernel, make_config, make_model):
    model = make_model(make_config(num_hidden_layers=1), kernel)
    with torch.no_grad():
        model.layers[0].attention.q_proj.weight.fill_(float("nan"))
        for length in (5, 700):
            ids = torch.randint(43, (1, length), generator=torch.Generator().manual_seed(0))
            assert torch.isnan(model(ids).last_hidden_state).all()
