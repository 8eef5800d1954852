"""Examples small enough to compute by hand, through every kernel, and three remarks that numbers make."""

import math

import pytest
import torch

from hf_selfattn import KERNELS, SCORES, Scoring, SelfAttnConfig, SelfAttnModel
from hf_selfattn.packing import read_batch
from hf_selfattn.patterns import Full

from . import reference
from .tolerances import assert_close

pytestmark = pytest.mark.usefixtures("uncompiled")

EYE = torch.eye(3, dtype=torch.float64).tolist()
KEYS_OF_TOY = [[0, 1, 0], [1, 0, 1], [0, 1, 0]]
THREE = {"query": [[1], [2], [3]], "key": [[2], [3], [4]], "value": [[3], [4], [5]], "scale": 1.0}

EXAMPLES = {
    "toy-scale_of_3": {
        "query": EYE,
        "key": KEYS_OF_TOY,
        "value": EYE,
        "scale": 3**-0.5,
        "weights": [
            [0.2644584615, 0.4710830770, 0.2644584615],
            [0.3904139456, 0.2191721088, 0.3904139456],
            [0.2644584615, 0.4710830770, 0.2644584615],
        ],
    },
    "toy-scale_of_2": {
        "query": EYE,
        "key": KEYS_OF_TOY,
        "value": EYE,
        "scale": 2**-0.5,
        "weights": [
            [0.2482550783, 0.5034898435, 0.2482550783],
            [0.4011120927, 0.1977758146, 0.4011120927],
            [0.2482550783, 0.5034898435, 0.2482550783],
        ],
    },
    "three_tokens_of_width_1": {
        **THREE,
        "weights": [
            [0.0900305732, 0.2447284711, 0.6652409558],
            [0.0158762400, 0.1173104278, 0.8668133322],
            [0.0023556331, 0.0473141552, 0.9503302117],
        ],
        "output": [[4.5752103826], [4.8509370922], [4.9479745786]],
        "with_residual": [[5.5752103826], [6.8509370922], [7.9479745786]],
    },
    "three_tokens_of_width_1-causal": {
        **THREE,
        "causal": True,
        "output": [[3.0], [3.8807970780], [4.9479745786]],
    },
    "three_characters-scaled": {
        "query": EYE,
        "key": EYE,
        "value": EYE,
        "scale": 3**-0.5,
        "weights": [
            [0.4710830770, 0.2644584615, 0.2644584615],
            [0.2644584615, 0.4710830770, 0.2644584615],
            [0.2644584615, 0.2644584615, 0.4710830770],
        ],
    },
    "three_characters-unscaled": {
        "query": EYE,
        "key": EYE,
        "value": EYE,
        "scale": 1.0,
        "weights": [
            [0.5761168848, 0.2119415576, 0.2119415576],
            [0.2119415576, 0.5761168848, 0.2119415576],
            [0.2119415576, 0.2119415576, 0.5761168848],
        ],
    },
    "one_token_of_width_2": {
        "query": [[1, 2]],
        "key": [[3, 4]],
        "value": [[5, 6]],
        "scale": 2**-0.5,
        "weights": [[1.0]],
        "output": [[5.0, 6.0]],
    },
    "two_tokens_of_width_1": {
        "query": [[1], [2]],
        "key": [[3], [4]],
        "value": [[5], [6]],
        "scale": 1.0,
        "weights": [[0.2689414214, 0.7310585786], [0.1192029220, 0.8807970780]],
        "output": [[5.7310585786], [5.8807970780]],
    },
}
"""The numbers are printed to ten decimals, so they are equal to within half of the last one: 1e-10."""


@pytest.mark.parametrize("example", EXAMPLES)
def test_worked_example(example, kernel):
    given = EXAMPLES[example]
    query, key, value = (as_heads(given[name]) for name in ("query", "key", "value"))
    causal = given.get("causal", False)
    output, _ = attend(kernel, query, key, value, given["scale"], causal=causal)
    _, weights = attend(kernel, query, key, value, given["scale"], causal=causal, need_weights=True)

    # With the unit matrix as values the output is the weights, so that they are seen from the kernel itself, too.
    expected_output = given["output"] if "output" in given else given["weights"]
    assert_close(output[0, :, 0], as_tensor(expected_output), "output")
    assert_close(weights[0, 0] @ value[0, :, 0], output[0, :, 0], "weights times values")
    if "weights" in given:
        assert_close(weights[0, 0], as_tensor(given["weights"]), "weights")
    if "with_residual" in given:
        assert_close(query[0, :, 0] + output[0, :, 0], as_tensor(given["with_residual"]), "with the residual")


def test_scores_of_one_token_of_width_2(make_config):
    query, key = torch.tensor([[1.0, 2.0]]).double(), torch.tensor([[3.0, 4.0]]).double()
    config = make_config("scaled_dot_product", head_dim=2)
    query, key, scoring = SCORES["scaled_dot_product"](config)(query, key)
    score = SCORES[scoring.name].tile(query, key, *scoring.parameters)
    assert_close(score, as_tensor([[7.7781745931]]))
    assert_close(score * math.sqrt(2), as_tensor([[11.0]]))


def test_linear_additive_form_gives_every_query_the_same_weights():
    """w·[q; k] = w_q·q + w_k·k, and the softmax over keys takes away what all keys share: the query has no say."""
    torch.manual_seed(0)
    queries, keys, w = torch.randn(5, 3).double(), torch.randn(7, 3).double(), torch.randn(6).double()
    linear = [
        reference.softmax(torch.stack([torch.dot(w, torch.cat([query, key])) for key in keys])) for query in queries
    ]
    for weights in linear:
        assert_close(weights, linear[0])

    # With a tanh between, w·tanh([q; k]) still parts into a term of q and one of k; a sum inside the tanh does not.
    apart = [
        reference.softmax(torch.stack([torch.dot(w, torch.tanh(torch.cat([query, key]))) for key in keys]))
        for query in queries
    ]
    mixed = [
        reference.softmax(torch.stack([torch.dot(w[:3], torch.tanh(query + key)) for key in keys]))
        for query in queries
    ]
    assert_close(apart[1], apart[0])
    assert (mixed[1] - mixed[0]).abs().max() > 0.01


def test_scale_keeps_weights_from_collapsing(kernel):
    """Scores of unit-normal vectors of width 128 have variance 128; unscaled, one of ten keys takes nearly all."""
    torch.manual_seed(0)
    draws, keys, width = 4000, 10, 128
    query = torch.randn(draws, 1, 1, width).double()
    key, value = torch.randn(draws, keys, 1, width).double(), torch.randn(draws, keys, 1, 1).double()
    tokens_of_query, tokens_of_key = (read_batch(draws, n, query.device).tokens for n in (1, keys))
    mask = KERNELS[kernel].mask(
        Full(), tokens_of_query, tokens_of_key, read_batch(draws, keys, query.device), range(1), None
    )

    def entropy(scale):
        scoring = Scoring("scaled_dot_product", (scale,))
        _, weights = KERNELS[kernel].attend(query, key, value, mask, scoring, need_weights=True)
        return float(torch.special.entr(weights).sum(-1).mean())

    assert entropy(1.0) == pytest.approx(0.235, abs=0.01)
    assert entropy(width**-0.5) == pytest.approx(1.92, abs=0.01)
    assert math.log(keys) == pytest.approx(2.30, abs=0.01)


@pytest.mark.parametrize("batch_size", [16, 32])
def test_shapes(batch_size, kernel):
    config = SelfAttnConfig(
        vocab_size=10, hidden_size=128, num_hidden_layers=1, num_attention_heads=8, intermediate_size=16
    )
    model = SelfAttnModel._from_config(config, attn_implementation=kernel).eval()
    embeds = torch.randn(batch_size, 10, 128)
    with torch.no_grad():
        assert model(inputs_embeds=embeds).last_hidden_state.shape == (batch_size, 10, 128)
        (weights,) = model(inputs_embeds=embeds, output_attentions=True).attentions
    assert weights.shape == (batch_size, 8, 10, 10)


def attend(kernel, query, key, value, scale, causal=False, need_weights=False):
    packing = read_batch(1, query.shape[1], query.device)
    mask = KERNELS[kernel].mask(Full(causal=causal), packing.tokens, packing.tokens, packing, range(1), None)
    scoring = Scoring("scaled_dot_product", (scale,))
    return KERNELS[kernel].attend(query, key, value, mask, scoring, need_weights=need_weights)


def as_heads(rows):
    """(N, d) numbers as (1, N, 1, d), one row and one head."""
    return as_tensor(rows)[None, :, None]


def as_tensor(rows):
    return torch.tensor(rows, dtype=torch.float64)
