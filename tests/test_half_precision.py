"""Where half precision would break: zero vectors, long sums, great distances."""

import pytest
import torch
from transformers import T5Config, T5EncoderModel

from hf_selfattn import KERNELS, SelfAttnConfig, SelfAttnForSequenceClassification, SelfAttnModel, unsupported_reasons

SMALL = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_cosine_of_a_zero_vector_is_no_nan(kernel, dtype):
    config = SelfAttnConfig(**SMALL, score_function="cosine", pad_token_id=0)
    if unsupported_reasons(config, kernel, device_type="cpu", training=True):
        with pytest.raises(ValueError, match="Use attn_implementation="):
            SelfAttnModel._from_config(config, attn_implementation=kernel).train()(torch.ones(1, 2, dtype=torch.long))
        return
    model = SelfAttnModel._from_config(config, attn_implementation=kernel).to(dtype)
    tokens = torch.tensor([[3, 4, 5, 0, 0], [6, 7, 0, 0, 0]])
    hidden = model(tokens, attention_mask=tokens > 0).last_hidden_state
    hidden.float().square().sum().backward()
    assert torch.isfinite(hidden).all()
    assert all(torch.isfinite(x.grad).all() for x in model.parameters() if x.grad is not None)


def test_mean_over_a_long_text_does_not_overflow():
    from hf_selfattn.heads_text import pool
    from hf_selfattn.packing import read_batch

    packing = read_batch(1, 16_384, torch.device("cpu"))
    pooled = pool(torch.full((1, 16_384, 2), 5.0, dtype=torch.float16), packing, "mean")
    assert torch.equal(pooled, torch.full((1, 2), 5.0, dtype=torch.float16))


def test_alibi_of_half_precision_slopes_counts_every_token():
    from hf_selfattn.biases import alibi

    far = alibi(torch.arange(1000, 1012), None, torch.tensor([0.25], dtype=torch.bfloat16))
    assert torch.equal(far.flatten(), -0.25 * torch.arange(1000.0, 1012.0))


def test_labels_of_turned_shape_are_refused():
    config = SelfAttnConfig(**SMALL, num_labels=3, problem_type="multi_label_classification")
    with pytest.raises(ValueError, match=r"needs a label for each of the 3 outputs of each of the 2 texts.*\(3, 2\)"):
        SelfAttnForSequenceClassification(config)(torch.ones(2, 4, dtype=torch.long), labels=torch.zeros(3, 2))


def test_stock_model_with_a_position_bias_is_refused():
    model = T5EncoderModel(T5Config(vocab_size=50, d_model=16, d_kv=4, num_heads=4, num_layers=1, d_ff=16)).eval()
    model.set_attn_implementation("selfattn")
    with pytest.raises(ValueError, match=r"'selfattn' cannot add the position_bias.*Use attn_implementation='sdpa'"):
        model(torch.ones(1, 5, dtype=torch.long))


@pytest.mark.parametrize("chosen", [{"layers": [7]}, {"heads": [-1]}, {"queries": [5]}, {"layers": [1, 0]}])
def test_weights_that_there_are_not_are_refused(chosen):
    with pytest.raises(ValueError, match=r"must be numbers from 0 to|come in rising order"):
        SelfAttnModel(SelfAttnConfig(**SMALL)).attention_weights({"input_ids": torch.ones(1, 5).long()}, **chosen)


@pytest.mark.parametrize(
    "name", ["d_model", "n_heads", "n_layers", "ffn_dim", "max_len", "theta", "dropout", "layers"]
)
def test_options_called_otherwise_elsewhere_are_refused(name):
    with pytest.raises(TypeError, match=f"has no option '{name}'.*Did you mean"):
        SelfAttnConfig(**{name: 2})
