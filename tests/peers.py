"""The encoders of transformers in our terms: their options as a SelfAttnConfig, their weights under our names."""

import torch
import transformers

from hf_selfattn import SelfAttnConfig
from hf_selfattn.positions_relative import alibi_slopes
from hf_selfattn.tools import convert_weights
from hf_selfattn.tools.convert_families import AUTO_CLASSES as HEADS
from hf_selfattn.tools.convert_families import FAMILIES, head_of

_SIZES = {"vocab_size": 43, "max_position_embeddings": 24, "initializer_range": 0.15, "pad_token_id": 1}

CONFIGS = {
    "bert": transformers.BertConfig(
        **_SIZES, hidden_size=24, num_hidden_layers=3, num_attention_heads=3, intermediate_size=20
    ),
    "roberta": transformers.RobertaConfig(
        **_SIZES,
        hidden_size=24,
        num_hidden_layers=3,
        num_attention_heads=3,
        intermediate_size=20,
        type_vocab_size=1,
    ),
    "distilbert": transformers.DistilBertConfig(**_SIZES, dim=24, n_layers=3, n_heads=3, hidden_dim=20),
    "modernbert": transformers.ModernBertConfig(
        **_SIZES,
        hidden_size=24,
        num_hidden_layers=3,
        num_attention_heads=3,
        intermediate_size=20,
        local_attention=6,
        layer_types=["full_attention", "sliding_attention", "sliding_attention"],
        rope_parameters={
            "full_attention": {"rope_type": "default", "rope_theta": 500.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 20.0},
        },
        cls_token_id=2,
        bos_token_id=2,
        eos_token_id=3,
        sep_token_id=3,
    ),
}
"""A small configuration of each peer; layers, heads and widths are odd where the peer allows it."""


def make_peer(name, head="base", **options):
    """A peer in evaluation mode with parameters drawn at random, so that nothing that is forgotten stays 0 or 1."""
    config = type(CONFIGS[name])(**{**CONFIGS[name].to_dict(), "num_labels": 2, **options})
    model = getattr(transformers, HEADS[head]).from_config(config, attn_implementation="eager").eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += torch.randn(parameter.shape, generator=generator) * 0.1
    return model


def make_ours(peer, head="base", **options):
    """Our model of the same kind with the options and the weights of `peer`; every weight of both is accounted for."""
    config = SelfAttnConfig(**{**options_of(peer.config, head), **options})
    model = getattr(transformers, HEADS[head]).from_config(config).eval()
    model.load_state_dict(in_our_names(peer, peer.state_dict()))
    return model


def options_of(config, head="base"):
    """The options of SelfAttnConfig that a peer's configuration means."""
    own = _OPTIONS.get(config.model_type)
    if own is None:
        return FAMILIES[config.model_type].options(config, head)
    return {"attention_bias": False, **own(config)}


def _big_bird(config):
    return {
        **FAMILIES["big_bird"].options(config, "base"),
        "attention_pattern": "bigbird",
        "block_size": config.block_size,
        "block_radius": 1,
        "num_global_blocks": 2,
        "num_random_blocks": config.num_random_blocks,
    }


def _llama(config):
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": getattr(config, "head_dim", None),
        "intermediate_size": config.intermediate_size,
        "causal": True,
        "position_encoding": "rotary",
        "rope_parameters": dict(config.rope_parameters),
        "norm_type": "rms_norm",
        "norm_eps": config.rms_norm_eps,
        "embedding_norm": False,
        "hidden_act": config.hidden_act,
    }


def _qwen3(config):
    return {**_llama(config), "qk_norm": True}


def _stablelm(config):
    names = {"rms_norm_eps": "layer_norm_eps"}
    config = type("", (), {**config.to_dict(), **{ours: getattr(config, name) for ours, name in names.items()}})
    return {**_llama(config), "norm_type": "layer_norm", "norm_bias": True}


def _t5(config):
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "head_dim": config.d_kv,
        "intermediate_size": config.d_ff,
        "score_function": "dot_product",
        "position_encoding": "t5",
        "relative_num_buckets": config.relative_attention_num_buckets,
        "relative_max_distance": config.relative_attention_max_distance,
        "norm_type": "rms_norm",
        "norm_eps": config.layer_norm_epsilon,
        "embedding_norm": False,
        "mlp_type": "plain",
        "hidden_act": "relu",
    }


def _mpt(config):
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "intermediate_size": config.d_model * config.expansion_ratio,
        "causal": True,
        "position_encoding": "alibi",
        "norm_eps": config.layer_norm_epsilon,
        "embedding_norm": False,
        "mlp_type": "plain",
        "hidden_act": "gelu",
    }


def _xlnet(config):
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "num_hidden_layers": config.n_layer,
        "num_attention_heads": config.n_head,
        "head_dim": config.d_head,
        "intermediate_size": config.d_inner,
        "causal": True,
        "memory_length": config.mem_len,
        "position_encoding": "transformer_xl",
        "norm_position": "post",
        "norm_eps": config.layer_norm_eps,
        "norm_bias": True,
        "embedding_norm": False,
        "mlp_type": "plain",
        "mlp_bias": True,
        "hidden_act": config.ff_activation,
    }


_OPTIONS = {
    "big_bird": _big_bird,
    "llama": _llama,
    "qwen3": _qwen3,
    "stablelm": _stablelm,
    "t5": _t5,
    "mpt": _mpt,
    "xlnet": _xlnet,
}


def in_our_names(peer, tensors):
    """Tensors under a peer's parameter names (weights, gradients) under our names, and cut as ours are."""
    config = peer.config
    if config.model_type in FAMILIES:
        config.architectures = [type(peer).__name__]
        return convert_weights.in_our_names(peer, head_of(config), tensors)
    renamed = {}
    for name, tensor in tensors.items():
        for theirs, ours in _NAMES[config.model_type].items():
            name = name.replace(theirs, ours)
        if "/" in name:  # one matrix of theirs is several of ours
            before, parts, after = name.split("/")
            parts = parts.split("+")
            renamed |= {before + part + after: x for part, x in zip(parts, tensor.chunk(len(parts)), strict=True)}
        else:
            renamed[name] = tensor
    return _TURNED.get(config.model_type, lambda renamed, config: renamed)(renamed, config)


def _t5_turned(renamed, config):
    """T5 has one table of (buckets, H) in its first layer; each of our layers has one of (H, buckets)."""
    renamed.pop("shared.weight", None)
    table = renamed.pop("layers.0.attention.relative_attention_bias.weight").T
    renamed |= {f"layers.{layer}.attention.position.table": table for layer in range(config.num_layers)}
    return renamed


def _mpt_turned(renamed, config):
    """ALiBi's slopes are parameters of ours that are never trained."""
    slopes = torch.tensor(alibi_slopes(config.n_heads))
    return renamed | {f"layers.{layer}.attention.position.slopes": slopes for layer in range(config.n_layers)}


def _xlnet_turned(renamed, config):
    """Projections of XLNet are (D, H, d_k), its sinusoids all sines, then all cosines."""
    sin_cos_in_turn = torch.arange(config.d_model).view(2, -1).T.flatten()
    for name, x in list(renamed.items()):
        if name.endswith("o_proj.weight"):
            renamed[name] = x.flatten(1)
        elif name.endswith("_proj.weight") and ".attention." in name:
            renamed[name] = x.flatten(1).T
        if name.endswith("r_proj.weight"):
            renamed[name] = renamed[name][:, sin_cos_in_turn]
        if name.endswith(("mask_emb", "seg_embed", "r_s_bias")):
            del renamed[name]
    return renamed


_TURNED = {"t5": _t5_turned, "mpt": _mpt_turned, "xlnet": _xlnet_turned}

_LLAMA = {
    "self_attn": "attention",
    "mlp.": "feed_forward.",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "feed_forward_norm",
}

_NAMES = {
    "llama": _LLAMA,
    "qwen3": _LLAMA,
    "stablelm": _LLAMA,
    "t5": {
        "encoder.embed_tokens": "embed_tokens",
        "encoder.final_layer_norm": "norm",
        "encoder.block": "layers",
        "layer.0.SelfAttention": "attention",
        "attention.q.": "attention.q_proj.",
        "attention.k.": "attention.k_proj.",
        "attention.v.": "attention.v_proj.",
        "attention.o.": "attention.o_proj.",
        "layer.0.layer_norm": "attention_norm",
        "layer.1.layer_norm": "feed_forward_norm",
        "layer.1.DenseReluDense.wi": "feed_forward.up_proj",
        "layer.1.DenseReluDense.wo": "feed_forward.down_proj",
    },
    "mpt": {
        "wte": "embed_tokens",
        "blocks": "layers",
        "norm_f": "norm",
        "norm_1": "attention_norm",
        "norm_2": "feed_forward_norm",
        "attn.Wqkv": "attention./q_proj+k_proj+v_proj/",
        "attn.out_proj": "attention.o_proj",
        "ffn": "feed_forward",
    },
    "xlnet": {
        "word_embedding": "embed_tokens",
        "layer.": "layers.",
        "rel_attn.layer_norm": "attention_post_norm",
        "rel_attn.r_w_bias": "attention.position.content_bias",
        "rel_attn.r_r_bias": "attention.position.position_bias",
        "rel_attn.r_s_bias": "r_s_bias",
        "rel_attn.seg_embed": "seg_embed",
        **{f"rel_attn.{x}": f"attention.{x}_proj.weight" for x in "qkvo"},
        "rel_attn.r": "attention.position.r_proj.weight",
        "ff.layer_norm": "feed_forward_post_norm",
        "ff.layers.1": "feed_forward.up_proj",
        "ff.layer_1": "feed_forward.up_proj",
        "ff.layer_2": "feed_forward.down_proj",
    },
}
