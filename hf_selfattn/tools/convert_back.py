"""Our model as a BERT or a ModernBERT of transformers, where its configuration is theirs."""

import transformers

from .convert_families import BERT_BLOCK, TEXT_HEADS

_ALWAYS = {
    "score_function": "scaled_dot_product",
    "causal": False,
    "qk_norm": False,
    "logit_softcap": None,
    "attention_sink": False,
    "memory_length": 0,
    "norm_type": "layer_norm",
    "embedding_norm": True,
}
_BERT = {"attention_pattern": "full", **BERT_BLOCK}
_MODERNBERT = {
    "position_encoding": "rotary",
    "norm_position": "pre",
    "first_layer_norm": False,
    "mlp_type": "gated",
    "type_vocab_size": 0,
}


def back_config(config, head: str, to: str):
    """The other model's config.

    Args:
        config: a SelfAttnConfig.
        head: a key of AUTO_CLASSES.
        to: "bert" or "modernbert".

    Raises:
        ValueError: for a config that the other model cannot have, with all reasons.
    """
    if to not in BACK:
        raise ValueError(f"A model of ours can be turned into {' or '.join(map(repr, BACK))}, got {to!r}.")
    wanted, more_reasons, make = BACK[to]
    reasons = [
        f"{name}={getattr(config, name)!r}, and {to} has {value!r}"
        for name, value in {**_ALWAYS, **wanted}.items()
        if getattr(config, name) != value and not (name == "attention_pattern" and _all_full(config))
    ]
    reasons += _sizes(config, to) + more_reasons(config, head)
    if reasons:
        raise ValueError(
            f"This model cannot be turned into a {to}: {'; '.join(reasons)}. Keep it as it is, or train one that fits."
        )
    return make(config)


def _all_full(config):
    return set(config.attention_pattern) == {"full"} if isinstance(config.attention_pattern, list) else False


def _sizes(config, to):
    reasons = []
    if config.num_groups != config.num_attention_heads:
        reasons.append(f"num_key_value_heads={config.num_groups}, and {to} has as many as heads")
    if config.query_key_dim * config.num_attention_heads != config.hidden_size:
        reasons.append(f"head_dim={config.query_key_dim}, and in {to} it is hidden_size / num_attention_heads")
    if config.value_dim != config.query_key_dim:
        reasons.append(f"value_head_dim={config.value_dim}, and in {to} it is head_dim")
    if config.embedding_width != config.hidden_size:
        reasons.append(f"embedding_size={config.embedding_width}, and in {to} it is hidden_size")
    return reasons


def _bert_reasons(config, head):
    reasons = []
    form = config.head_type
    if head in TEXT_HEADS and (form not in ("bert", "roberta") or config.pooling != "first"):
        reasons.append(f"head_type={form!r} with pooling={config.pooling!r}, and bert has tanh over the first token")
    elif head != "base" and form == "modernbert":
        reasons.append("head_type='modernbert', and bert has another head")
    elif head == "masked_lm" and form in ("roberta", "electra") and config.hidden_act != "gelu":
        reasons.append(f"head_type={form!r} has gelu in its head, and bert has hidden_act={config.hidden_act!r} there")
    return reasons


def _modernbert_reasons(config, head):
    reasons = []
    patterns, radii = _of_layers(config, "attention_pattern"), set(_of_layers(config, "window_radius")) - {None}
    if not set(patterns) <= {"full", "sliding_window"}:
        reasons.append(f"attention_pattern={config.attention_pattern!r}, and modernbert has full and sliding_window")
    if len(radii) > 1:
        reasons.append(f"window_radius={sorted(radii)}, and modernbert has one for all layers")
    if set(_of_layers(config, "dilation")) - {None, 1}:
        reasons.append(f"dilation={config.dilation}, and modernbert has none")
    if head != "base" and config.head_type != "modernbert":
        reasons.append(f"head_type={config.head_type!r}, and modernbert has another head")
    if head in TEXT_HEADS and config.pooling == "max":
        reasons.append("pooling='max', and modernbert has 'first' and 'mean'")
    kinds = {rope.get("rope_type", "default") for rope in _ropes(config).values()}
    partial = {rope.get("partial_rotary_factor", 1.0) for rope in _ropes(config).values()}
    if kinds != {"default"} or partial != {1.0}:
        reasons.append(f"rope_parameters={config.rope_parameters}, and here only default ones over whole heads fit")
    return reasons


def _of_layers(config, name):
    value = getattr(config, name)
    return list(value) if isinstance(value, list) else [value] * config.num_hidden_layers


def _ropes(config):
    """rope_parameters of each pattern that the model has."""
    given = config.rope_parameters or {}
    patterns = set(_of_layers(config, "attention_pattern"))
    return given if any(isinstance(rope, dict) for rope in given.values()) else dict.fromkeys(patterns, given)


def _common(config):
    names = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "pad_token_id", "bos_token_id")
    names += ("eos_token_id", "initializer_range", "tie_word_embeddings", "id2label", "label2id", "problem_type")
    return {name: getattr(config, name) for name in names} | {"intermediate_size": config.feed_forward_size}


def _bert(config):
    return transformers.BertConfig(
        **_common(config),
        max_position_embeddings=config.max_position_embeddings,
        type_vocab_size=max(config.type_vocab_size, 1),
        hidden_act=config.hidden_act,
        layer_norm_eps=config.norm_eps,
        attention_probs_dropout_prob=config.attention_dropout,
        hidden_dropout_prob=config.hidden_dropout,
        classifier_dropout=config.classifier_dropout,
    )


def _modernbert(config):
    names = {"full": "full_attention", "sliding_window": "sliding_attention"}
    ropes = {
        names[pattern]: {"rope_type": "default", "rope_theta": rope.get("rope_theta", config.default_theta)}
        for pattern, rope in _ropes(config).items()
    }
    missing = dict.fromkeys(set(names.values()) - set(ropes), next(iter(ropes.values())))
    radii = set(_of_layers(config, "window_radius")) - {None}
    return transformers.ModernBertConfig(
        **_common(config),
        max_position_embeddings=getattr(config, "max_position_embeddings", 8192),
        layer_types=[names[pattern] for pattern in _of_layers(config, "attention_pattern")],
        rope_parameters={**ropes, **{name: dict(rope) for name, rope in missing.items()}},
        local_attention=2 * max(radii, default=64),
        attention_bias=config.attention_bias,
        norm_eps=config.norm_eps,
        norm_bias=config.norm_bias,
        mlp_bias=config.mlp_bias,
        hidden_activation=config.hidden_act,
        classifier_activation=config.hidden_act,
        attention_dropout=config.attention_dropout,
        mlp_dropout=config.hidden_dropout,
        embedding_dropout=config.embedding_dropout,
        classifier_dropout=config.classifier_dropout,
        classifier_pooling="cls" if config.pooling == "first" else "mean",
        cls_token_id=None,
        sep_token_id=None,
    )


BACK = {"bert": (_BERT, _bert_reasons, _bert), "modernbert": (_MODERNBERT, _modernbert_reasons, _modernbert)}
"""For each model: what our config must say, more reasons against it, and its config."""
