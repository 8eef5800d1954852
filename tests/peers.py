"""The encoders of transformers in our terms: their options as a SelfAttnConfig, their weights under our names."""

import torch
import transformers

from hf_selfattn import SelfAttnConfig

HEADS = {
    "base": "AutoModel",
    "masked_lm": "AutoModelForMaskedLM",
    "sequence_classification": "AutoModelForSequenceClassification",
    "token_classification": "AutoModelForTokenClassification",
    "question_answering": "AutoModelForQuestionAnswering",
    "multiple_choice": "AutoModelForMultipleChoice",
}
"""The Auto class of each kind of model."""

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
            "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
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
    config = SelfAttnConfig(**{**options_of(peer.config), "num_labels": 2, **options})
    model = getattr(transformers, HEADS[head]).from_config(config).eval()
    model.load_state_dict(in_our_names(peer, peer.state_dict()))
    return model


def options_of(config):
    """The options of SelfAttnConfig that a peer's configuration means."""
    return _OPTIONS[config.model_type](config)


def _post_norm(config):
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "max_position_embeddings": config.max_position_embeddings,
        "pad_token_id": config.pad_token_id,
        "position_encoding": "learned",
        "attention_bias": True,
        "norm_position": "post",
        "norm_bias": True,
        "mlp_type": "plain",
        "mlp_bias": True,
        "head_type": config.model_type,
        "pooling": "first",
    }


def _bert(config):
    return {
        **_post_norm(config),
        "type_vocab_size": config.type_vocab_size,
        "intermediate_size": config.intermediate_size,
        "hidden_act": config.hidden_act,
        "norm_eps": config.layer_norm_eps,
    }


def _roberta(config):
    # The first pad_token_id + 1 positions of RoBERTa are never used.
    return {**_bert(config), "max_position_embeddings": config.max_position_embeddings - config.pad_token_id - 1}


def _distilbert(config):
    return {
        **_post_norm(config),
        "intermediate_size": config.hidden_dim,
        "hidden_act": config.activation,
        "norm_eps": 1e-12,
    }


def _modernbert(config):
    sliding = [layer_type == "sliding_attention" for layer_type in config.layer_types]
    (theta,) = {rope["rope_theta"] for rope in config.rope_parameters.values()}
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "intermediate_size": config.intermediate_size,
        "pad_token_id": config.pad_token_id,
        "attention_pattern": ["sliding_window" if local else "full" for local in sliding],
        "window_radius": [config.local_attention // 2 if local else None for local in sliding],
        "rope_parameters": {"rope_theta": theta},
        "attention_bias": config.attention_bias,
        "norm_eps": config.norm_eps,
        "norm_bias": config.norm_bias,
        "first_layer_norm": False,
        "mlp_bias": config.mlp_bias,
        "hidden_act": config.hidden_activation,
        "head_type": "modernbert",
        "pooling": "first" if config.classifier_pooling == "cls" else "mean",
    }


_OPTIONS = {"bert": _bert, "roberta": _roberta, "distilbert": _distilbert, "modernbert": _modernbert}


def in_our_names(peer, tensors):
    """Tensors under a peer's parameter names (weights, gradients) under our names, and cut as ours are."""
    config, names = peer.config, _NAMES[peer.config.model_type]
    if isinstance(peer, transformers.ModernBertForQuestionAnswering):
        names = {**names, "classifier": "qa_outputs"}
    if isinstance(peer, transformers.ModernBertForMaskedLM):
        names = {"head.": "prediction_head.", **names}
    if type(peer).__name__.endswith("ForMultipleChoice"):
        names = {**names, "classifier": "choice_output"}
    renamed = {}
    for name, tensor in tensors.items():
        if name.startswith("pooler."):
            continue  # the pooler of a model without a head has nothing to do
        for theirs, ours in names.items():
            name = name.replace(theirs, ours)
        if "/" in name:  # one matrix of theirs is several of ours
            before, parts, after = name.split("/")
            parts = parts.split("+")
            renamed |= {before + part + after: x for part, x in zip(parts, tensor.chunk(len(parts)), strict=True)}
        elif config.model_type == "roberta" and name.endswith("positions.weight"):
            renamed[name] = tensor[config.pad_token_id + 1 :]
        else:
            renamed[name] = tensor
    return renamed


_BERT = {
    "pooler.dense": "head.dense",
    "embeddings.word_embeddings": "embed_tokens",
    "embeddings.position_embeddings": "embeddings.positions",
    "embeddings.token_type_embeddings": "embeddings.token_types",
    "embeddings.LayerNorm": "embeddings.norm",
    "encoder.layer": "layers",
    "attention.self.query": "attention.q_proj",
    "attention.self.key": "attention.k_proj",
    "attention.self.value": "attention.v_proj",
    "attention.output.dense": "attention.o_proj",
    "attention.output.LayerNorm": "attention_post_norm",
    "intermediate.dense": "feed_forward.up_proj",
    "output.dense": "feed_forward.down_proj",
    "output.LayerNorm": "feed_forward_post_norm",
}

_NAMES = {
    "bert": {
        "bert.pooler": "pooler",
        "bert.": "model.",
        **_BERT,
        "cls.predictions.transform.dense": "prediction_head.dense",
        "cls.predictions.transform.LayerNorm": "prediction_head.norm",
        "cls.predictions.decoder": "lm_head",
        "cls.predictions.bias": "lm_head.bias",
    },
    "roberta": {
        "roberta.pooler": "pooler",
        "roberta.": "model.",
        **_BERT,
        "lm_head.dense": "prediction_head.dense",
        "lm_head.layer_norm": "prediction_head.norm",
        "lm_head.decoder": "lm_head",
        "classifier.dense": "head.dense",
        "classifier.out_proj": "classifier",
    },
    "distilbert": {
        "distilbert.": "model.",
        "embeddings.word_embeddings": "embed_tokens",
        "embeddings.position_embeddings": "embeddings.positions",
        "embeddings.LayerNorm": "embeddings.norm",
        "transformer.layer": "layers",
        "q_lin": "q_proj",
        "k_lin": "k_proj",
        "v_lin": "v_proj",
        "out_lin": "o_proj",
        "sa_layer_norm": "attention_post_norm",
        "ffn.lin1": "feed_forward.up_proj",
        "ffn.lin2": "feed_forward.down_proj",
        "output_layer_norm": "feed_forward_post_norm",
        "vocab_transform": "prediction_head.dense",
        "vocab_layer_norm": "prediction_head.norm",
        "vocab_projector": "lm_head",
        "pre_classifier": "head.dense",
    },
    "modernbert": {
        "embeddings.tok_embeddings": "embed_tokens",
        "attn_norm": "attention_norm",
        "attn.Wqkv": "attention./q_proj+k_proj+v_proj/",
        "attn.Wo": "attention.o_proj",
        "mlp_norm": "feed_forward_norm",
        "mlp.Wi": "feed_forward./gate_proj+up_proj/",
        "mlp.Wo": "feed_forward.down_proj",
        "final_norm": "norm",
        "decoder": "lm_head",
    },
}
