"""Flash attention over boundaries: chosen where it can compute a configuration, and told the right boundaries.

On a CPU a slow loop over documents and windows stands in for the GPU's kernel; in test_gpu.py the real one runs.
"""

from itertools import pairwise

import pytest
import torch

from hf_selfattn import kernels_varlen
from hf_selfattn.kernels import SDPA_WITH_VARLEN, attention_kernel, default_kernel

from .conftest import FORMS
from .test_packing import LENGTHS, draw_ids
from .tolerances import assert_close

WIDTHS = {"head_dim": 8, "value_head_dim": 8}
PATTERNS = {"full": "full", "sliding_window": "sliding_window", "alternating": ["full", "sliding_window"]}
LAYOUTS = {"full": "padded_left", "sliding_window": "padded_with_holes", "alternating": "packed_by_boundaries"}


def slow_varlen(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale, window_size, enable_gqa=False):
    """Document by document and query by query, as the documentation of `varlen_attn` says."""
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    assert int(cu_seq_q.diff().max()) == max_q == max_k
    assert enable_gqa or query.shape[1] == key.shape[1]
    left, right = window_size
    share, heads = query.shape[1] // key.shape[1], []
    for start, end in pairwise(cu_seq_q.tolist()):
        for i in range(start, end):
            first = start if left < 0 else max(start, i - left)
            last = end if right < 0 else min(end, i + right + 1)
            for h in range(query.shape[1]):
                scores = key[first:last, h // share] @ query[i, h] * scale
                heads.append(scores.softmax(0) @ value[first:last, h // share])
    return torch.stack(heads).view(query.shape)


@pytest.fixture
def calls(monkeypatch):
    """The loop instead of the GPU's kernel, for float64; which windows it was called with."""
    windows = []

    def counted(*args, **options):
        windows.append(options["window_size"])
        return slow_varlen(*args, **options)

    monkeypatch.setattr(kernels_varlen, "_varlen_attn", lambda: (counted, True))
    monkeypatch.setattr(kernels_varlen, "DEVICES", ("cpu",))
    monkeypatch.setattr(kernels_varlen, "HALF", (torch.float64,))
    return windows


def outputs_and_gradients(model, ids, inputs):
    output = model(ids, **inputs).last_hidden_state
    output.square().mean().backward()
    return output, [x.grad for x in model.parameters()]


@pytest.mark.parametrize("native", [True, False], ids=["shares_keys", "repeats_keys"])
@pytest.mark.parametrize("score", ["scaled_dot_product", "dot_product", "cosine"])
@pytest.mark.parametrize("name", PATTERNS)
def test_it_gives_what_eager_gives(name, causal, score, native, monkeypatch, calls, make_config, make_model):
    loop, _ = kernels_varlen._varlen_attn()
    monkeypatch.setattr(kernels_varlen, "_varlen_attn", lambda: (loop, native))
    config = make_config(score, PATTERNS[name], causal, "rotary", **WIDTHS)
    layout = FORMS[LAYOUTS[name]](LENGTHS)
    ids = layout.put(draw_ids(LENGTHS))
    found = [outputs_and_gradients(make_model(config, kernel), ids, layout.inputs) for kernel in ("sdpa", "eager")]
    assert len(calls) == config.num_hidden_layers
    assert len(set(calls)) == (2 if name == "alternating" else 1)
    (output, gradients), (expected, expected_gradients) = found
    assert_close(output, expected)
    for actual, other in zip(gradients, expected_gradients, strict=True):
        assert_close(actual, other, "gradient")


def test_a_batch_without_padding_needs_no_packing(calls, make_config, make_model):
    config = make_config(pattern="sliding_window", **WIDTHS)
    ids = draw_ids([14])[0].view(2, 7)
    with torch.no_grad():
        output, expected = (make_model(config, kernel)(ids).last_hidden_state for kernel in ("sdpa", "eager"))
    assert calls == [(3, 3)] * config.num_hidden_layers
    assert_close(output, expected)


TAKEN_BY_OTHERS = {
    "pairs": ({}, {"attention_mask": torch.ones(2, 7, 7).tril().bool()}),
    "weights": ({}, {"output_attentions": True}),
    "t5": ({"position": "t5"}, {}),
    "alibi": ({"position": "alibi"}, {}),
    "dropout": ({"attention_dropout": 0.1}, {}),
    "another_width": ({"value_head_dim": 5}, {}),
    "dilated": ({"dilation": 2}, {}),
    "longformer": ({"pattern": "longformer"}, {}),
    "positions_with_gaps": (
        {},
        {"position_ids": torch.tensor([[0, 1, 2, 4, 6, 7, 9]]), "attention_mask": torch.ones(2, 7)},
    ),
}


@pytest.mark.parametrize("name", TAKEN_BY_OTHERS)
def test_the_dense_road_takes_the_rest(name, calls, make_config, make_model):
    options, inputs = TAKEN_BY_OTHERS[name]
    config = make_config(**{"pattern": "sliding_window", **WIDTHS, **options})
    ids = draw_ids([14])[0].view(2, 7)
    inputs = {key: x.bool() if key == "attention_mask" else x for key, x in inputs.items()} if inputs else inputs
    with torch.no_grad():
        output, expected = (
            make_model(config, kernel)(ids, **inputs).last_hidden_state for kernel in ("sdpa", "eager")
        )
    assert calls == []
    assert_close(output, expected)


@pytest.mark.parametrize("is_half", [False, True], ids=["no_autocast", "autocast"])
def test_tokens_in_full_precision_take_the_dense_road(is_half, monkeypatch, calls, make_config, make_model):
    monkeypatch.setattr(kernels_varlen, "HALF", (torch.bfloat16,))
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: is_half)
    config, layout = make_config(**WIDTHS), FORMS["padded_left"](LENGTHS)
    ids = layout.put(draw_ids(LENGTHS))
    with torch.no_grad():
        output, expected = (
            make_model(config, kernel)(ids, **layout.inputs).last_hidden_state for kernel in ("sdpa", "eager")
        )
    assert calls == []
    assert_close(output, expected)


def test_reasons(make_config):
    assert kernels_varlen.varlen_reasons(make_config(**WIDTHS)) == []
    reasons = kernels_varlen.varlen_reasons(make_config(position="alibi", attention_dropout=0.1, head_dim=6))
    assert [reason.split(",")[0] for reason in reasons] == [
        "it takes no bias", "it has no dropout", "it takes query",
    ]  # fmt: skip
    assert attention_kernel(make_model_config(make_config(**WIDTHS))) is SDPA_WITH_VARLEN
    assert attention_kernel(make_model_config(make_config(position="alibi", **WIDTHS))) is not SDPA_WITH_VARLEN


def make_model_config(config):
    config._attn_implementation = "sdpa"
    return config


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"pattern": "sliding_window"}, "sdpa"),
        ({"pattern": ["full", "sliding_window"]}, "sdpa"),
        ({"pattern": "sliding_window", "dilation": 2}, "selfattn"),
        ({"pattern": "sliding_window", "position": "alibi"}, "selfattn"),
        ({"pattern": "bigbird"}, "selfattn"),
        ({"pattern": "full", "position": "alibi"}, "sdpa"),
        ({"score": "additive"}, "selfattn"),
    ],
)
def test_the_default_on_a_gpu(options, expected, monkeypatch, make_config):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    assert default_kernel(make_config(**options, **WIDTHS)) == expected
