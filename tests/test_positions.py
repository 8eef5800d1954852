"""Positions: what order does to the result, and what it must not do."""

import math

import pytest
import torch

from hf_selfattn import POSITIONS, SelfAttnModel, register_position
from hf_selfattn.packing import read_batch
from hf_selfattn.positions import Learned, Rotary

from . import reference
from .tolerances import assert_close

pytestmark = pytest.mark.usefixtures("uncompiled")

N = 9


def draw_ids():
    return torch.randint(43, (2, N), generator=torch.Generator().manual_seed(0))


def last_hidden_state(model, ids, **inputs):
    with torch.no_grad():
        return model(ids, **inputs).last_hidden_state


# With and without


def test_without_positions_order_does_not_enter(kernel, make_config, make_model):
    """The encoder sees a set: shuffled tokens give shuffled outputs, whatever position_ids say."""
    model, ids = make_model(make_config(position="none"), kernel), draw_ids()
    shuffle = torch.randperm(N, generator=torch.Generator().manual_seed(1))
    expected = last_hidden_state(model, ids)
    assert_close(last_hidden_state(model, ids[:, shuffle]), expected[:, shuffle])
    assert_close(last_hidden_state(model, ids, position_ids=shuffle[None] + 1), expected)


ORDERED = [name for name in POSITIONS if name != "none"]
RELATIVE = [name for name in ORDERED if POSITIONS[name].relative]


@pytest.mark.parametrize("position", ORDERED)
def test_with_positions_order_enters(position, make_config, make_model):
    model, ids = make_model(make_config(position=position)), draw_ids()
    shuffle = torch.randperm(N, generator=torch.Generator().manual_seed(1))
    in_order, shuffled = last_hidden_state(model, ids), last_hidden_state(model, ids[:, shuffle])
    assert (shuffled - in_order[:, shuffle]).abs().max() > 0.01


@pytest.mark.parametrize("position", ORDERED)
def test_position_ids_say_where_tokens_stand(position, make_config, make_model):
    """Shuffled together with their positions, tokens give the outputs that they give in order."""
    model, ids = make_model(make_config(position=position)), draw_ids()
    shuffle = torch.randperm(N, generator=torch.Generator().manual_seed(1))
    mask = torch.ones(2, N, dtype=torch.long)
    expected = last_hidden_state(model, ids)
    for given in (mask, mask[:, None].expand(2, N, N)):
        actual = last_hidden_state(model, ids[:, shuffle], position_ids=shuffle[None], attention_mask=given)
        assert_close(actual, expected[:, shuffle])


@pytest.mark.parametrize("place", ["offset", "stretched", "gap"])
@pytest.mark.parametrize("kernel", ["eager", "selfattn"])
def test_positions_far_apart_equal_slow_loops(place, position, kernel, make_config, make_model):
    """Distances are taken from positions, which may be larger than the text is long."""
    config = make_config(position=position)
    model, ids = make_model(config, kernel), draw_ids()[:1]
    counted = torch.arange(N)
    places = {"offset": counted + 5, "stretched": 3 * counted + 1, "gap": counted + 1 + 40 * (counted > 3)}[place]
    actual = last_hidden_state(model, ids, position_ids=places[None])[0]
    parameters = {name: x.detach() for name, x in model.named_parameters()}
    embeds = parameters["embed_tokens.weight"][ids[0]]
    expected = reference.encode(config, parameters, embeds, positions=places.tolist())
    assert_close(actual, expected.hidden_states[-1])


@pytest.mark.parametrize("position", RELATIVE)
def test_relative_positions_know_distances_only(position, causal, make_config, make_model):
    model, ids = make_model(make_config(causal=causal, position=position)), draw_ids()
    expected = last_hidden_state(model, ids)
    for shift in (1, 1000):
        assert_close(last_hidden_state(model, ids, position_ids=torch.arange(shift, shift + N)[None]), expected)
    stretched = last_hidden_state(model, ids, position_ids=torch.arange(1, 2 * N, 2)[None])
    assert (stretched - expected).abs().max() > 0.01


def test_positions_of_each_row(position, make_config, make_model):
    model, ids = make_model(make_config(position=position)), draw_ids()
    offsets = torch.stack([torch.arange(3, 3 + N), torch.arange(20, 20 + 2 * N, 2)])
    together = last_hidden_state(model, ids, position_ids=offsets)
    for row in range(2):
        alone = last_hidden_state(model, ids[row : row + 1], position_ids=offsets[row : row + 1])
        assert_close(together[row : row + 1], alone)


def test_counting_starts_at_the_first_real_token(position, make_config, make_model):
    """position_ids that count real tokens from 0, as a caller may give them, change nothing."""
    model, ids = make_model(make_config(position=position)), draw_ids()
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1, 1], [0, 1, 0, 1, 1, 1, 0, 0, 1]])
    counted = (mask.cumsum(1) - 1).clamp(min=0)
    expected = last_hidden_state(model, ids, attention_mask=mask)
    assert_close(last_hidden_state(model, ids, attention_mask=mask, position_ids=counted), expected)


# Rotary


def rotate(x, make_config, **rope_parameters):
    """(1, N, heads, d_k) turned as a query and as a key, at positions from 0."""
    config = make_config(position="rotary", head_dim=x.shape[-1], rope_parameters=rope_parameters or None)
    rotary, tokens = Rotary.from_config(config, 0), read_batch(1, x.shape[1], x.device).tokens
    state = rotary.state(tokens, tokens, torch.promote_types(x.dtype, torch.float32))
    query, key, bias = rotary.layer(config)(x, x, state)
    assert bias is None
    return query, key


def test_rotary_score_of_one_pair(make_config):
    """d_k = 2, theta^0 = 1: a query at angle 0 and a key turned by its position have score cos(position)."""
    query, key = rotate(torch.tensor([1.0, 0.0], dtype=torch.float64).expand(1, 4, 1, 2), make_config)
    expected = torch.tensor([[math.cos(q - k) for k in range(4)] for q in range(4)], dtype=torch.float64)
    assert_close(query[0, :, 0] @ key[0, :, 0].T, expected)


def test_rotary_keeps_lengths_and_position_0(dtype, make_config):
    x = torch.randn(1, N, 3, 6, generator=torch.Generator().manual_seed(0)).to(dtype)
    turned, _ = rotate(x, make_config, rope_theta=100.0)
    assert turned.dtype == dtype
    assert torch.equal(turned[:, 0], x[:, 0])
    assert_close(turned.double().norm(dim=-1), x.double().norm(dim=-1), dtype=dtype)


def test_rotary_base_is_ten_thousand(make_config):
    x = torch.randn(1, N, 1, 6, generator=torch.Generator().manual_seed(0)).double()
    assert torch.equal(rotate(x, make_config)[0], rotate(x, make_config, rope_theta=10_000.0)[0])
    assert not torch.equal(rotate(x, make_config)[0], rotate(x, make_config, rope_theta=9_000.0)[0])


def test_rotary_of_a_part_leaves_the_rest(make_config):
    x = torch.randn(1, N, 1, 8, generator=torch.Generator().manual_seed(0)).double()
    turned, _ = rotate(x, make_config, partial_rotary_factor=0.5)
    assert torch.equal(turned[..., 4:], x[..., 4:])
    assert torch.equal(turned[..., :4], rotate(x[..., :4], make_config)[0])


def test_rotary_of_a_long_text_is_exact_in_half_precision(make_config, make_model):
    """Angles are computed in fp32 at least: bfloat16 cannot tell position 1000 from 1003."""
    config = make_config(position="rotary")
    ids = torch.randint(43, (1, 5), generator=torch.Generator().manual_seed(0))
    far = torch.arange(1000, 1005)[None]
    exact = make_model(config, dtype=torch.float32)
    half = make_model(config, dtype=torch.bfloat16)
    at_0, at_1000 = last_hidden_state(half, ids), last_hidden_state(half, ids, position_ids=far)
    assert_close(at_1000, last_hidden_state(exact, ids, position_ids=far))
    assert_close(at_1000, at_0)


# ALiBi, T5


def test_alibi_slopes_are_those_of_the_paper(make_config):
    """Press et al. 2021: for 8 heads 1/2, 1/4, … 1/256; in between those of twice as many heads, every other one."""

    def slopes(num_heads):
        config = make_config(position="alibi", num_attention_heads=num_heads, num_key_value_heads=1)
        return SelfAttnModel(config).layers[0].attention.position.slopes

    assert slopes(8).tolist() == [2.0**-n for n in range(1, 9)]
    assert slopes(2).tolist() == [2.0**-4, 2.0**-8]
    expected = [2.0**-2, 2.0**-4, 2.0**-6, 2.0**-8, 2.0**-1, 2.0**-3]
    assert_close(slopes(6), torch.tensor(expected))
    assert not slopes(8).requires_grad


def test_t5_buckets_equal_transformers(causal, make_config):
    """The buckets of transformers' own T5, for every distance that matters, at two sizes."""
    from transformers.models.t5.modeling_t5 import T5Attention

    for buckets, farthest in [(32, 128), (8, 12)]:
        config = make_config(
            causal=causal, position="t5", relative_num_buckets=buckets, relative_max_distance=farthest
        )
        distance = torch.arange(-2 * farthest, 2 * farthest + 1)
        expected = T5Attention._relative_position_bucket(distance, not causal, buckets, farthest)
        slow = [reference.t5_bucket(int(d), reference.layer_options(config, 0)) for d in distance]
        assert slow == expected.tolist()
        assert torch.equal(POSITIONS["t5"].from_config(config, 0).buckets(distance), expected)


# Learned


def test_learned_positions_are_looked_up(make_config, make_model):
    """Two tokens trade places, and so do the two vectors: the outputs trade places."""
    model, ids = make_model(make_config(position="learned")), draw_ids()
    expected = last_hidden_state(model, ids)
    swapped = torch.arange(N)
    swapped[2], swapped[5] = 5, 2
    with torch.no_grad():
        weight = model.embeddings.positions.weight
        weight[[2, 5]] = weight[[5, 2]]
    assert_close(last_hidden_state(model, ids[:, swapped]), expected[:, swapped])


def test_learned_positions_have_an_end(make_config, make_model):
    model = make_model(make_config(position="learned", max_position_embeddings=8))
    assert last_hidden_state(model, draw_ids()[:, :8]).isfinite().all()
    message = "a token at position 8, and the model has learned positions 0 to 7. Cut texts to .*=8 tokens"
    with pytest.raises(ValueError, match=message):
        model(draw_ids())


def test_learned_positions_end_by_position_and_not_by_column(make_config, make_model):
    """Nine columns with eight real tokens fit; five columns of which one says that it stands at 8 do not."""
    model = make_model(make_config(position="learned", max_position_embeddings=8))
    mask = torch.ones(2, N, dtype=torch.long)
    mask[:, 3] = 0
    assert last_hidden_state(model, draw_ids(), attention_mask=mask).isfinite().all()
    with pytest.raises(ValueError, match="a token at position 8"):
        model(draw_ids()[:, :5], position_ids=torch.arange(4, 9)[None])


def test_negative_positions_are_refused_where_they_have_no_vector(make_config, make_model):
    model = make_model(make_config(position="learned"))
    with pytest.raises(ValueError, match="position -1"):
        model(draw_ids(), position_ids=torch.arange(-1, N - 1)[None])


# Tables


def test_positions_are_made_once_a_forward(position, make_config, make_model, monkeypatch):
    calls, cls = [], POSITIONS[position]
    state = cls.state
    monkeypatch.setattr(cls, "state", lambda self, *args: calls.append(self) or state(self, *args))
    make_model(make_config(position=position, num_hidden_layers=3))(draw_ids())
    assert len(calls) == 1


def test_taken_name_is_refused():
    register_position("learned", Learned)
    with pytest.raises(ValueError, match=r"position_encoding 'learned' is taken by Learned\. Choose another name"):
        register_position("learned", Rotary)
    assert POSITIONS["learned"] is Learned
