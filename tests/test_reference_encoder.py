"""The whole encoder against reference.py: hidden states, and the gradients of every parameter and every embedding."""

import re
from itertools import product
from typing import NamedTuple

import pytest
import torch

from hf_selfattn import unsupported_reasons

from . import reference
from .tolerances import assert_close

pytestmark = pytest.mark.usefixtures("uncompiled")

LENGTHS = [19, 8, 1, 0]
"""Tokens of each document; the one without tokens is a row of padding where documents stand in rows."""

BLOCK = {
    "embedding_size": 14,
    "embedding_norm": True,
    "type_vocab_size": 3,
    "attention_bias": True,
    "mlp_bias": True,
    "norm_bias": True,
}
"""Everything that has a parameter."""


class Documents(NamedTuple):
    """What goes in, and what comes out of the slow loops; `upstream` is a loss's gradient at the last hidden state."""

    ids: list[torch.Tensor]
    types: list[torch.Tensor]
    upstream: list[torch.Tensor]
    encoded: list[reference.Encoded]
    embeds_gradient: list[torch.Tensor]
    gradients: dict[str, torch.Tensor]


DOCUMENTS: dict[tuple, Documents] = {}


@pytest.mark.parametrize(
    ("form", "dtype"),
    [
        ("padded_right", torch.float32),
        ("padded_left", torch.float64),
        ("padded_with_holes", torch.float64),
        ("packed_by_positions", torch.float64),
        ("packed_by_boundaries", torch.float64),
    ],
    ids=lambda value: str(value).removeprefix("torch."),
)
def test_encoder_equals_slow_loops(choice, kernel, form, dtype, make_config, make_model, lay_out):
    config = make_config(*choice, **BLOCK)
    if unsupported_reasons(config, kernel, device_type="cpu", dtype=dtype, training=False):
        with pytest.raises(ValueError, match=f"'{kernel}' cannot compute this configuration: .* Use"):
            make_model(config, kernel, dtype)
        return
    model, layout = make_model(config, kernel, dtype), lay_out(form, LENGTHS)
    if choice not in DOCUMENTS:
        DOCUMENTS[choice] = slow_documents(config, make_model(config), LENGTHS)
    documents = DOCUMENTS[choice]
    batch = {
        "input_ids": layout.put(documents.ids),
        "token_type_ids": layout.put(documents.types),
        "output_hidden_states": True,
        **layout.inputs,
    }

    refusal = unsupported_reasons(config, kernel, device_type="cpu", dtype=dtype, training=True)
    if refusal:
        with torch.no_grad():
            check_values(model(**batch), documents, layout)
        with pytest.raises(ValueError, match="Use attn_implementation="):
            model(**batch)
        with pytest.raises(ValueError, match=re.escape("; ".join(refusal)) + ".* Use attn_implementation="):
            model.train()(**batch)
        return

    embeds = []
    model.embed_tokens.register_forward_hook(lambda module, args, output: embeds.append(output))
    outputs = model(**batch)
    embeds[0].retain_grad()
    check_values(outputs, documents, layout)

    upstream = torch.zeros_like(outputs.last_hidden_state)
    for place, gradient in zip(layout.places, documents.upstream, strict=True):
        upstream[place] = gradient.to(dtype)
    outputs.last_hidden_state.backward(upstream)
    gradient = embeds[0].grad
    if gradient.shape[:2] != layout.shape:  # padding was left out before the embeddings
        gradient = torch.zeros(*layout.shape, gradient.shape[-1], dtype=dtype)
        gradient[~layout.padding] = embeds[0].grad.squeeze(0)
    for actual, expected in zip(layout.take(gradient), documents.embeds_gradient, strict=True):
        assert_close(actual, expected, "gradient of embeddings")
    assert (gradient[layout.padding] == 0).all()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert_close(parameter.grad, documents.gradients[name], f"gradient of {name}")


BLOCKS = {
    f"{norm_position}-{norm_type}-{mlp_type}-{'biases' if bias else 'no_biases'}": {
        "norm_position": norm_position,
        "norm_type": norm_type,
        "mlp_type": mlp_type,
        "attention_bias": bias,
        "mlp_bias": bias,
        "norm_bias": bias and norm_type == "layer_norm",
    }
    for norm_position, norm_type, mlp_type, bias in product(
        ["pre", "post"], ["layer_norm", "rms_norm"], ["plain", "gated"], [False, True]
    )
}
BLOCKS |= {
    "no_first_norm": {"first_layer_norm": False},
    "no_embedding_norm": {"embedding_norm": False},
    "token_types": {"type_vocab_size": 3},
    "embedding_size": {"embedding_size": 9},
    "large_norm_eps": {"norm_eps": 0.1, "embedding_norm": True},
    "relu": {"hidden_act": "relu"},
    "silu": {"hidden_act": "silu"},
    "one_layer": {"num_hidden_layers": 1},
    "one_head": {"num_attention_heads": 1, "num_key_value_heads": 1},
    "own_keys_for_each_head": {"num_key_value_heads": None},
    "one_key_for_all_heads": {"num_key_value_heads": 1},
    "derived_head_dim": {"head_dim": None, "value_head_dim": None, "hidden_size": 24},
    "window_in_one_layer": {"attention_pattern": ["full", "sliding_window"], "window_radius": [None, 2]},
    "window_of_each_layer": {"attention_pattern": "sliding_window", "window_radius": [1, 5]},
    "default_rope_theta": {"rope_parameters": None},
    "rope_theta": {"rope_parameters": {"rope_theta": 50.0}},
    "rope_theta_of_each_pattern": {
        "attention_pattern": ["full", "sliding_window"],
        "window_radius": [None, 2],
        "rope_parameters": {"full": {"rope_theta": 50.0}, "sliding_window": {"rope_theta": 7.0}},
    },
    "partial_rotary": {"rope_parameters": {"rope_theta": 50.0, "partial_rotary_factor": 2 / 3}},
    "qk_norm": {"qk_norm": True, "norm_bias": True},
    "qk_norm-rms_norm": {"qk_norm": True, "norm_type": "rms_norm"},
    "softcap": {"logit_softcap": 2.0},
    "sink": {"attention_sink": True},
    "bigbird_of_each_layer": {"attention_pattern": "bigbird", "block_size": [2, 3], "random_blocks_seed": 7},
    "global_projections": {"attention_pattern": "longformer", "window_radius": 2, "global_projections": True},
    "global_projections-everything": {
        "attention_pattern": "longformer",
        "window_radius": 2,
        "global_projections": True,
        "attention_bias": True,
        "qk_norm": True,
        "attention_sink": True,
        "causal": True,
    },
}


@pytest.mark.parametrize("block", BLOCKS)
def test_block_equals_slow_loops(block, make_config, make_model, lay_out):
    config = make_config(**{"position": "rotary", **BLOCKS[block]})
    model, lengths = make_model(config), [13, 6, 1, 0]
    documents, layout = slow_documents(config, model, lengths), lay_out("padded_left", lengths)
    inputs_embeds = layout.put([model.embed_tokens.weight[ids].detach() for ids in documents.ids]).requires_grad_()
    types = {"token_type_ids": layout.put(documents.types)} if config.type_vocab_size else {}
    outputs = model(inputs_embeds=inputs_embeds, **types, **layout.inputs, output_hidden_states=True)
    check_values(outputs, documents, layout)

    upstream = torch.zeros_like(outputs.last_hidden_state)
    for place, gradient in zip(layout.places, documents.upstream, strict=True):
        upstream[place] = gradient
    outputs.last_hidden_state.backward(upstream)
    for actual, expected in zip(layout.take(inputs_embeds.grad), documents.embeds_gradient, strict=True):
        assert_close(actual, expected, "gradient of inputs_embeds")
    for name, parameter in model.named_parameters():
        if name != "embed_tokens.weight":
            assert_close(parameter.grad, documents.gradients[name], f"gradient of {name}")


def check_values(outputs, documents: Documents, layout):
    """Each document's hidden states are those that it has alone, and 0 stands at padding."""
    assert len(outputs.hidden_states) == len(documents.encoded[0].hidden_states)
    assert torch.equal(outputs.hidden_states[-1], outputs.last_hidden_state)
    for layer, hidden_states in enumerate(outputs.hidden_states):
        for document, actual in enumerate(layout.take(hidden_states)):
            expected = documents.encoded[document].hidden_states[layer]
            assert_close(actual, expected, f"hidden state {layer} of document {document}")
        assert (hidden_states[layout.padding] == 0).all()


def slow_documents(config, model, lengths: list[int]) -> Documents:
    """The slow loops' answer for each document alone, computed once for all forms, kernels and dtypes."""
    generator = torch.Generator().manual_seed(4)
    ids = [torch.randint(config.vocab_size, (n,), generator=generator) for n in lengths]
    types = [torch.randint(max(config.type_vocab_size, 1), (n,), generator=generator) for n in lengths]
    size = (sum(lengths) * config.hidden_size) ** 0.5
    upstream = [torch.randn(n, config.hidden_size, generator=generator).double() / size for n in lengths]

    parameters = {name: x.detach().double().requires_grad_() for name, x in model.named_parameters()}
    embeds = [parameters["embed_tokens.weight"][x] for x in ids]
    encoded = [
        reference.encode(config, parameters, x, token_types=t.tolist())
        if len(x)
        else reference.Encoded([torch.zeros(0, config.hidden_size)] * (config.num_hidden_layers + 1), [])
        for x, t in zip(embeds, types, strict=True)
    ]
    loss = sum((x.hidden_states[-1] * g).sum() for x, g in zip(encoded, upstream, strict=True))
    gradients = torch.autograd.grad(loss, [*embeds, *parameters.values()], allow_unused=True, materialize_grads=True)
    return Documents(
        ids,
        types,
        upstream,
        [reference.Encoded([h.detach() for h in x.hidden_states], x.attentions) for x in encoded],
        gradients[: len(embeds)],
        dict(zip(parameters, gradients[len(embeds) :], strict=True)),
    )
