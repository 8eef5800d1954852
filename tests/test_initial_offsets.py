"""Heads that look at their neighbours first: what new weights do, and that trained ones are left alone."""

import itertools
import math

import pytest
import torch
from transformers import AutoModel, AutoModelForMaskedLM

from hf_selfattn import SelfAttnConfig, SelfAttnForMaskedLM, SelfAttnModel
from hf_selfattn.positions_rotary import Rotary

from .tolerances import assert_close

SIZE = {"vocab_size": 43, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 32}
OFFSETS = [-1, 1, -2]
N = 11


def make(**options):
    torch.manual_seed(0)
    config = SelfAttnConfig(**{**SIZE, "attention_bias": True, "initial_offsets": OFFSETS, **options})
    return SelfAttnModel(config).double().eval()


def weights_without_content(model):
    """Each layer's attention weights (H, N, N) where tokens say nothing."""
    with torch.no_grad():
        for layer in model.layers:
            layer.attention.q_proj.weight.zero_()
            layer.attention.k_proj.weight.zero_()
        ids = torch.randint(43, (1, N), generator=torch.Generator().manual_seed(0))
        return [weights[0] for weights in model.attention_weights(input_ids=ids)]


def by_hand(offset, theta=10_000.0, width=32, fall=1.5):
    """(N, N) weights of a head: softmax of the score that the docstring names, key by key."""
    frequencies = [theta ** (-i / width) for i in range(0, width, 2)]
    beside = sum(f * (1 - math.cos(f)) for f in frequencies)
    scores = [[fall / beside * sum(f * math.cos(f * (k - q - offset)) for f in frequencies) for k in range(N)]
              for q in range(N)]  # fmt: skip
    return torch.tensor(scores, dtype=torch.float64).softmax(-1)


@pytest.mark.parametrize("kernel", ["eager", "sdpa", "selfattn"])
def test_new_heads_look_at_the_offsets_in_turn(kernel):
    model = make(attn_implementation=kernel)
    for weights in weights_without_content(model):
        for head, offset in zip(weights, itertools.cycle(OFFSETS), strict=False):
            assert_close(head, by_hand(offset), dtype=torch.float32)
            for query in range(2, N - 1):
                assert head[query].argmax() == query + offset


def test_heads_look_at_their_neighbours_where_nothing_is_said():
    asked = dict(make(initial_offsets=[-1, 1, -2, 2]).named_parameters())
    for name, parameter in make(initial_offsets=None).named_parameters():
        assert torch.equal(parameter, asked[name])
    for weights in weights_without_content(make(initial_offsets=None, causal=True)):
        for head, offset in zip(weights, (-1, -2, -1, -2), strict=True):
            assert (head[4:].argmax(-1) == torch.arange(4, N) + offset).all()


@pytest.mark.parametrize(
    "options",
    [
        {"qk_norm": True},
        {"score_function": "cosine"},
        {"position_encoding": "alibi"},
        {"position_encoding": "none"},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 8.0}},
    ],
)
def test_where_neighbours_cannot_be_told_apart_biases_begin_at_0(options):
    for layer in make(initial_offsets=None, **options).layers:
        assert not layer.attention.q_proj.bias.any()
        assert not layer.attention.k_proj.bias.any()


def test_without_biases_there_is_nothing_to_begin_with():
    assert make(initial_offsets=None, attention_bias=False).layers[0].attention.q_proj.bias is None


def test_heads_that_share_keys_look_at_one_offset():
    for weights in weights_without_content(make(num_key_value_heads=2)):
        for head, offset in zip(weights, (-1, -1, 1, 1), strict=True):
            assert_close(head, by_hand(offset), dtype=torch.float32)


def test_theta_and_the_turned_part_are_the_layers_own():
    ropes = {"full": {"rope_theta": 100.0}, "sliding_window": {"rope_theta": 50.0, "partial_rotary_factor": 0.5}}
    model = make(attention_pattern=["full", "sliding_window"], window_radius=N, rope_parameters=ropes)
    full, window = weights_without_content(model)
    assert_close(full[0], by_hand(-1, 100.0), dtype=torch.float32)
    assert_close(window[1], by_hand(1, 50.0, 16), dtype=torch.float32)


def test_global_projections_have_them_too():
    model = make(attention_pattern="longformer", window_radius=N, num_global_tokens=2, global_projections=True)
    for layer in model.layers:
        attention = layer.attention
        assert attention.q_proj.bias.abs().sum() > 0
        assert torch.equal(attention.of_global.q_proj.bias, attention.q_proj.bias)
        assert torch.equal(attention.of_global.k_proj.bias, attention.k_proj.bias)


def test_all_else_begins_as_without_them():
    ours, plain = make(), make(initial_offsets=[])
    for (name, one), other in zip(ours.named_parameters(), plain.parameters(), strict=True):
        changed = name.endswith(("q_proj.bias", "k_proj.bias"))
        assert torch.equal(one, other) != changed, name
        assert not changed or not other.any()


@pytest.mark.parametrize("head_dim", [32, 64, 128])
@pytest.mark.parametrize("theta", [1e4, 1e6])
def test_first_scores_are_no_larger_than_they_need_to_be(head_dim, theta):
    """They are rounded to bf16 in training; and a sink, whose score begins at 0, has to be seen beside them."""
    frequencies = tuple(theta ** (-i / head_dim) for i in range(0, head_dim, 2))
    query, key = Rotary(frequencies).biases_for_offset(0, head_dim)
    assert 5 < query @ key / head_dim**0.5 < 9


def test_the_factor_of_yarn_does_not_enlarge_them():
    plain, scaled = (Rotary((1.0, 0.1), factor).biases_for_offset(1, 4) for factor in (1.0, 1.5))
    assert_close(plain, scaled * 1.5, dtype=torch.float64)


def test_a_sink_learns_beside_them():
    model = make(attention_sink=True)
    model(input_ids=torch.randint(43, (2, N))).last_hidden_state.pow(3).sum().backward()
    assert model.layers[0].attention.score_function.sink.grad.abs().min() > 1e-6


def test_biases_that_a_checkpoint_lacks_change_nothing(tmp_path):
    trained = make(attention_bias=False, initial_offsets=None)
    trained.save_pretrained(tmp_path)
    more = AutoModel.from_pretrained(tmp_path, attention_bias=True, dtype=torch.float64).eval()
    ids = torch.randint(43, (2, N))
    assert_close(more(input_ids=ids).last_hidden_state, trained(input_ids=ids).last_hidden_state, dtype=torch.float64)


def test_trained_biases_come_back(tmp_path):
    """From a checkpoint of the whole model, and of the encoder in a model whose head is new."""
    model = make()
    for parameter in model.parameters():
        parameter.data.normal_()
    model.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path, dtype=torch.float64)
    headed = AutoModelForMaskedLM.from_pretrained(tmp_path, dtype=torch.float64)
    assert isinstance(headed, SelfAttnForMaskedLM)
    for name, parameter in model.named_parameters():
        assert torch.equal(again.get_parameter(name), parameter), name
        assert torch.equal(headed.get_parameter(f"model.{name}"), parameter), name
    assert again.config.initial_offsets == OFFSETS
