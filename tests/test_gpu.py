"""On a GPU: every kernel gives what the eager one gives on the CPU, and real tokens go through flash attention.

pytest -m gpu tests/test_gpu.py
"""

import pytest
import torch

from hf_selfattn import SelfAttnForMaskedLM, kernels_varlen, unsupported_reasons

from .conftest import FORMS
from .test_packing import LENGTHS, draw_ids
from .tolerances import assert_close

pytestmark = pytest.mark.gpu

WIDTHS = {"head_dim": 16, "value_head_dim": 16}


def outputs_and_gradients(model, ids, inputs, device):
    model = model.to(device)
    output = model(ids.to(device), **{name: x.to(device) for name, x in inputs.items()}).last_hidden_state
    output.square().mean().backward()
    return output.cpu(), [None if x.grad is None else x.grad.cpu() for x in model.parameters()]


@pytest.mark.parametrize("form", ["padded_with_holes", "packed_by_positions"])
def test_every_kernel_gives_what_eager_gives_on_a_cpu(choice, form, kernel, make_config, make_model):
    config = make_config(*choice, **WIDTHS)
    reasons = unsupported_reasons(config, kernel, device_type="cuda", dtype=torch.float32, training=False)
    layout = FORMS[form](LENGTHS)
    ids = layout.put(draw_ids(LENGTHS))
    if reasons:
        with pytest.raises(ValueError, match="cannot compute this configuration"):
            outputs_and_gradients(make_model(config, kernel, torch.float32), ids, layout.inputs, "cuda")
        return
    output, gradients = outputs_and_gradients(make_model(config, kernel, torch.float32), ids, layout.inputs, "cuda")
    expected, others = outputs_and_gradients(make_model(config, "eager", torch.float32), ids, layout.inputs, "cpu")
    assert_close(output, expected)
    for actual, other in zip(gradients, others, strict=True):
        if other is not None:
            assert_close(actual, other, "gradient")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("pattern", ["full", "sliding_window"])
@pytest.mark.parametrize("form", FORMS)
def test_real_tokens_go_through_flash_attention(form, pattern, causal, dtype, monkeypatch, make_config, make_model):
    calls, (real, shares_keys) = [], kernels_varlen._varlen_attn()
    counted = lambda *args, **kw: calls.append(kw) or real(*args, **kw)  # noqa: E731
    monkeypatch.setattr(kernels_varlen, "_varlen_attn", lambda: (counted, shares_keys))
    config, layout = make_config("cosine", pattern, causal, "rotary", **WIDTHS), FORMS[form](LENGTHS)
    ids = layout.put(draw_ids(LENGTHS))
    output, gradients = outputs_and_gradients(make_model(config, "sdpa", dtype), ids, layout.inputs, "cuda")
    assert len(calls) == config.num_hidden_layers
    exact = make_model(config, "eager", torch.float64)
    expected, others = outputs_and_gradients(exact, ids, layout.inputs, "cpu")
    assert_close(output, expected)
    for actual, other in zip(gradients, others, strict=True):
        assert_close(actual, other, "gradient")


def test_training_in_autocast_is_that_of_eager(make_config, make_model):
    """Ten steps of masked language modelling over packed documents."""
    curves = []
    for kernel in ("sdpa", "eager"):
        model = make_model(make_config(position="rotary", **WIDTHS), kernel, torch.float32, SelfAttnForMaskedLM)
        model = model.cuda().train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
        layout = FORMS["packed_by_boundaries"](LENGTHS)
        ids = layout.put(draw_ids(LENGTHS)).cuda()
        inputs = {name: x.cuda() for name, x in layout.inputs.items()}
        labels = ids.masked_fill(layout.padding.cuda(), -100)
        losses = []
        for _ in range(10):
            with torch.autocast("cuda", torch.bfloat16):
                loss = model(ids, labels=labels, **inputs).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        curves.append(losses)
    assert curves[0][-1] < curves[0][0]
    assert curves[0] == pytest.approx(curves[1], rel=2e-2)
