"""Documents whose attention and gradient torch's fused attention computes: the same numbers, and only where it can."""

import pytest
import torch

from hf_selfattn import tile_fused, tile_math, tiles

from .conftest import FORMS
from .test_packing import LENGTHS, draw_ids
from .tolerances import assert_close

DOCUMENTS = {"as_they_are": LENGTHS, "of_one_length": [5, 5, 5], "one": [9]}


@pytest.fixture
def roads(monkeypatch):
    """The names of the roads that were taken, forward and backward."""
    taken, original = [], tile_math.roads

    def counted(*args):
        for road in original(*args):
            taken.append(type(road).__name__)
            yield road

    monkeypatch.setattr(tile_math, "roads", counted)
    return taken


def outputs_and_gradients(model, layout, documents):
    embeds = layout.put([model.embed_tokens.weight[ids].detach() for ids in documents]).requires_grad_()
    output = model(inputs_embeds=embeds, **layout.inputs).last_hidden_state
    output.square().mean().backward()
    return output, [embeds.grad, *(x.grad for x in model.parameters())]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("lengths", DOCUMENTS)
@pytest.mark.parametrize("split", [0, 4], ids=["all", "the_long"])
@pytest.mark.parametrize("score", ["scaled_dot_product", "cosine"])
def test_it_gives_what_eager_gives(score, split, lengths, form, monkeypatch, roads, make_config, make_model):
    """In float64; with `split`, longer documents alone, beside short ones that are computed whole."""
    monkeypatch.setattr(tile_fused, "LONG" if split else "WHOLE", (torch.float64,))
    monkeypatch.setattr(tile_math, "WHOLE", tile_fused.WHOLE)
    monkeypatch.setattr(tiles, "WHOLE_BELOW", split or 512)
    config, layout = make_config(score, position="rotary", value_head_dim=6), FORMS[form](DOCUMENTS[lengths])
    documents = draw_ids(DOCUMENTS[lengths])
    found = [outputs_and_gradients(make_model(config, kernel), layout, documents) for kernel in ("selfattn", "eager")]
    short = split and lengths == "as_they_are"
    assert set(roads) == ({"DocumentRoad", "FusedRoad"} if short else {"FusedRoad"})
    (output, gradients), (expected, others) = found
    assert_close(output, expected)
    for actual, other in zip(gradients, others, strict=True):
        assert (actual is None) == (other is None)
        if other is not None:
            assert_close(actual, other, "gradient")


@pytest.mark.parametrize(
    ("dtype", "length", "options", "expected"),
    [
        (torch.float32, 9, {}, "FusedRoad"),
        (torch.float32, 600, {}, "FusedRoad"),
        (torch.bfloat16, 9, {}, "DocumentRoad"),
        (torch.bfloat16, 600, {}, "FusedRoad"),
        (torch.float64, 9, {}, "DocumentRoad"),
        (torch.float64, 600, {}, "BlockRoad"),
        (torch.float32, 9, {"causal": True}, "DocumentRoad"),
        (torch.float32, 600, {"pattern": "sliding_window"}, "BlockRoad"),
        (torch.float32, 9, {"position": "alibi"}, "DocumentRoad"),
        (torch.float32, 9, {"score": "additive"}, "DocumentRoad"),
        (torch.float32, 9, {"logit_softcap": 5.0}, "DocumentRoad"),
        (torch.float32, 9, {"attention_sink": True}, "DocumentRoad"),
        (torch.float32, 9, {"attention_dropout": 0.1}, "DocumentRoad"),
        (torch.float32, 9, {"value_head_dim": 5}, "DocumentRoad"),
    ],
)
def test_which_road_is_taken(dtype, length, options, expected, roads, make_config, make_model):
    model = make_model(make_config(**{"value_head_dim": 6, **options}), "selfattn", dtype).train()
    model(draw_ids([length])[0][None]).last_hidden_state.float().square().mean().backward()
    assert set(roads) == {expected}


def test_another_torch_does_without(monkeypatch, roads, make_config, make_model):
    monkeypatch.setattr(tile_fused, "_BACKWARD", None)
    model = make_model(make_config(value_head_dim=6), "selfattn", torch.float32)
    model(draw_ids([9])[0][None]).last_hidden_state.square().mean().backward()
    assert set(roads) == {"DocumentRoad"}


@pytest.mark.parametrize("lengths", [[17, 17, 17, 18], [5, 6, 7], [1, 9, 9]], ids=str)
@pytest.mark.parametrize("kernel", ["selfattn", "sdpa"])
def test_large_scores_have_finite_gradients(kernel, lengths, make_config, make_model):
    """Scores of thousands: what a document is filled up with must not overflow."""
    layout, documents = FORMS["padded_right"](lengths), draw_ids(lengths)
    found = []
    for name, dtype in ((kernel, torch.float32), ("eager", torch.float64)):
        model = make_model(make_config(value_head_dim=6), name, dtype)
        with torch.no_grad():
            for layer in model.layers:
                layer.attention.q_proj.weight.mul_(100)
                layer.attention.k_proj.weight.mul_(100)
        found.append(outputs_and_gradients(model, layout, documents))
    (output, gradients), (expected, _) = found
    assert_close(output, expected.float())
    assert all(x is None or x.isfinite().all() for x in gradients)
