"""Positions: what order does to the result, and what it must not do."""

import math

import pytest
import torch

from hf_selfattn import POSITIONS, register_position
from hf_selfattn.packing import read_batch
from hf_selfattn.positions import Learned, Rotary

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


@pytest.mark.parametrize("position", [name for name in POSITIONS if name != "none"])
def test_with_positions_order_enters(position, kernel, make_config, make_model):
    model, ids = make_model(make_config(position=position), kernel), draw_ids()
    shuffle = torch.randperm(N, generator=torch.Generator().manual_seed(1))
    in_order, shuffled = last_hidden_state(model, ids), last_hidden_state(model, ids[:, shuffle])
    assert (shuffled - in_order[:, shuffle]).abs().max() > 0.01


@pytest.mark.parametrize("position", [name for name in POSITIONS if name != "none"])
def test_position_ids_say_where_tokens_stand(position, kernel, make_config, make_model):
    """Shuffled together with their positions, tokens give the outputs that they give in order."""
    model, ids = make_model(make_config(position=position), kernel), draw_ids()
    shuffle = torch.randperm(N, generator=torch.Generator().manual_seed(1))
    mask = torch.ones(2, N, dtype=torch.long)
    expected = last_hidden_state(model, ids)
    for given in (mask, mask[:, None].expand(2, N, N)):
        actual = last_hidden_state(model, ids[:, shuffle], position_ids=shuffle[None], attention_mask=given)
        assert_close(actual, expected[:, shuffle])


def test_positions_of_each_row(position, make_config, make_model):
    model, ids = make_model(make_config(position=position)), draw_ids()
    offsets = torch.stack([torch.arange(3, 3 + N), torch.arange(20, 20 + 2 * N, 2)])
    together = last_hidden_state(model, ids, position_ids=offsets)
    for row in range(2):
        alone = last_hidden_state(model, ids[row : row + 1], position_ids=offsets[row : row + 1])
        assert_close(together[row : row + 1], alone)


@pytest.mark.parametrize("position", POSITIONS)
def test_counting_starts_at_the_first_real_token(position, make_config, make_model):
    """position_ids that count real tokens from 0, as a caller may give them, change nothing."""
    model, ids = make_model(make_config(position=position)), draw_ids()
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1, 1], [0, 1, 0, 1, 1, 1, 0, 0, 1]])
    counted = (mask.cumsum(1) - 1).clamp(min=0)
    expected = last_hidden_state(model, ids, attention_mask=mask)
    assert_close(last_hidden_state(model, ids, attention_mask=mask, position_ids=counted), expected)


# Rotary


def test_rotary_knows_distances_only(kernel, causal, make_config, make_model):
    model, ids = make_model(make_config("scaled_dot_product", "full", causal, "rotary"), kernel), draw_ids()
    expected = last_hidden_state(model, ids)
    for shift in (1, 1000):
        assert_close(last_hidden_state(model, ids, position_ids=torch.arange(shift, shift + N)[None]), expected)
    stretched = last_hidden_state(model, ids, position_ids=torch.arange(1, 2 * N, 2)[None])
    assert (stretched - expected).abs().max() > 0.01


def test_rotary_score_of_one_pair():
    """d_k = 2, theta^0 = 1: a query at angle 0 and a key turned by its position have score cos(position)."""
    tokens = read_batch(1, 4, torch.device("cpu")).tokens
    rotary = Rotary(head_dim=2, theta=10_000.0)
    ones = torch.tensor([1.0, 0.0]).double().expand(1, 4, 1, 2)
    query, key, bias = rotary.layer(None)(ones, ones, rotary.state(tokens, tokens, torch.float64))
    assert bias is None
    expected = torch.tensor([[math.cos(q - k) for k in range(4)] for q in range(4)], dtype=torch.float64)
    assert_close(query[0, :, 0] @ key[0, :, 0].T, expected)


def test_rotary_keeps_lengths_and_position_0(dtype):
    tokens = read_batch(1, N, torch.device("cpu")).tokens
    rotary = Rotary(head_dim=6, theta=100.0)
    x = torch.randn(1, N, 3, 6, generator=torch.Generator().manual_seed(0)).to(dtype)
    turned, _, _ = rotary.layer(None)(x, x, rotary.state(tokens, tokens, torch.promote_types(dtype, torch.float32)))
    assert turned.dtype == dtype
    assert torch.equal(turned[:, 0], x[:, 0])
    assert_close(turned.double().norm(dim=-1), x.double().norm(dim=-1), dtype=dtype)


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


def test_rotary_settings_come_from_the_config(make_config):
    default = Rotary.from_config(make_config(position="rotary", rope_parameters=None), 0)
    assert default == Rotary(head_dim=6, theta=10_000.0)
    other = make_config(position="rotary", head_dim=8, rope_parameters={"rope_theta": 7.0, "rope_type": "default"})
    assert Rotary.from_config(other, 0) == Rotary(head_dim=8, theta=7.0)


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
