"""Other people's encoders in our terms: their options as those of SelfAttnConfig, their parameters' names as ours.

A family is a model type of transformers whose block is one that SelfAttnConfig can describe.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from .convert_names import (
    BERT_HEADS,
    BLOCK,
    DENSE,
    DISTILBERT,
    DISTILBERT_HEADS,
    ELECTRA_HEADS,
    EUROBERT,
    GLOBAL,
    MEGATRON,
    MODERNBERT,
    MODERNBERT_HEADS,
    NOMIC_BERT,
    NOMIC_BERT_HEADS,
    PRE_NORM,
    ROBERTA_HEADS,
    XL,
)

AUTO_CLASSES = {
    "base": "AutoModel",
    "masked_lm": "AutoModelForMaskedLM",
    "sequence_classification": "AutoModelForSequenceClassification",
    "token_classification": "AutoModelForTokenClassification",
    "question_answering": "AutoModelForQuestionAnswering",
    "multiple_choice": "AutoModelForMultipleChoice",
}
"""The Auto class of each head."""

TEXT_HEADS = ("sequence_classification", "multiple_choice")

_ENDINGS = {
    "ForMaskedLM": "masked_lm",
    "ForPreTraining": "masked_lm",
    "ForSequenceClassification": "sequence_classification",
    "ForTokenClassification": "token_classification",
    "ForQuestionAnswering": "question_answering",
    "ForMultipleChoice": "multiple_choice",
    "Model": "base",
}


def head_of(config) -> str:
    """The head of the class that a config names as its model's; "base" where it names none."""
    name = (config.architectures or ["Model"])[0]
    if name == "ElectraForPreTraining":  # a discriminator: it says of each token whether it was replaced
        return "base"
    for ending, head in _ENDINGS.items():
        if name.endswith(ending):
            return head
    raise ValueError(
        f"The source is a {name}, and no head of ours does its work. Pass head= (--head) with one of "
        f"{', '.join(AUTO_CLASSES)}; what that one does not need is dropped."
    )


@dataclass(frozen=True)
class Family:
    """One model type.

    Attributes:
        options: (config, head) to options of SelfAttnConfig.
        names: parts of their names in the base model and what stands in ours for them, replaced in this order; one
            matrix of theirs that is several of ours is written "/a+b/".
        heads: for each head, the beginnings of their names outside of the base model and ours.
        problems: (config, head) to the reasons why this model cannot be converted.
        notes: (config, head) to what differs in training alone.
        counts_padding: whether learned positions count from the first column, padding or not.
    """

    options: Callable
    names: dict[str, str]
    heads: dict[str, dict[str, str]]
    problems: Callable = lambda config, head: []
    notes: Callable = lambda config, head: []
    counts_padding: bool = False
    pooler: str = field(default="pooler.dense.")


def position_offset(config) -> int:
    """How many rows of the table of positions are never used: those of RoBERTa's kind begin after pad_token_id."""
    return config.pad_token_id + 1 if config.model_type in OFFSET else 0


OFFSET = (
    "roberta",
    "xlm-roberta",
    "camembert",
    "data2vec-text",
    "longformer",
    "roberta-prelayernorm",
    "xlm-roberta-xl",
    "mpnet",
    "ibert",
)


# Options


def _common(config):
    """What every config of transformers has."""
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "pad_token_id": config.pad_token_id,
        "bos_token_id": getattr(config, "bos_token_id", None),
        "eos_token_id": getattr(config, "eos_token_id", None),
        "initializer_range": config.initializer_range,
        "tie_word_embeddings": config.tie_word_embeddings,
        "id2label": dict(config.id2label),
        "label2id": dict(config.label2id),
        "problem_type": getattr(config, "problem_type", None),
    }


BERT_BLOCK = {
    "position_encoding": "learned",
    "attention_bias": True,
    "norm_position": "post",
    "norm_bias": True,
    "mlp_type": "plain",
    "mlp_bias": True,
}
"""What makes our block that of BERT."""


def _post_norm(config):
    length = config.max_position_embeddings - position_offset(config)
    return {**_common(config), **BERT_BLOCK, "max_position_embeddings": length, "pooling": "first"}


def bert_options(config, head):
    classifier = getattr(config, "classifier_dropout", None)
    classifier = config.hidden_dropout_prob if classifier is None else classifier
    return {
        **_post_norm(config),
        "type_vocab_size": config.type_vocab_size,
        "intermediate_size": config.intermediate_size,
        "hidden_act": config.hidden_act,
        "norm_eps": config.layer_norm_eps,
        "attention_dropout": config.attention_probs_dropout_prob,
        "hidden_dropout": config.hidden_dropout_prob,
        "embedding_dropout": config.hidden_dropout_prob,
        "classifier_dropout": 0.0 if head == "question_answering" else classifier,
        "head_type": "bert",
    }


def _roberta(config, head):
    """RoBERTa's multiple choice goes through BERT's pooler, its classifier has a head of its own."""
    options = {**bert_options(config, head), "head_type": "bert" if head == "multiple_choice" else "roberta"}
    if head == "multiple_choice":
        options["classifier_dropout"] = config.hidden_dropout_prob
    return options


def _pre_norm(config, head):
    return {**_roberta(config, head), "norm_position": "pre"}


def _megatron(config, head):
    return {**bert_options(config, head), "norm_position": "pre", "embedding_norm": False}


def _xlm_roberta_xl(config, head):
    return {**_pre_norm(config, head), "embedding_norm": False}


def _longformer(config, head):
    windows = config.attention_window
    windows = windows if isinstance(windows, list) else [windows] * config.num_hidden_layers
    return {
        **_roberta(config, head),
        "attention_pattern": "longformer",
        "window_radius": [window // 2 for window in windows],
        "num_global_tokens": int(head == "sequence_classification"),
        "global_projections": True,
    }


def _big_bird(config, head):
    classifies = head == "sequence_classification"
    return {**bert_options(config, head), "head_type": "electra" if classifies else "bert"}


def _electra(config, head):
    options = {**bert_options(config, head), "embedding_size": config.embedding_size, "head_type": "electra"}
    if head == "multiple_choice":
        options["head_type"] = "bert" if config.summary_activation == "tanh" else "electra"
        options["classifier_dropout"] = config.summary_last_dropout
    return options


def _distilbert(config, head):
    dropouts = {"token_classification": config.dropout, "question_answering": config.qa_dropout}
    return {
        **_post_norm(config),
        "intermediate_size": config.hidden_dim,
        "hidden_act": config.activation,
        "norm_eps": 1e-12,
        "attention_dropout": config.attention_dropout,
        "hidden_dropout": config.dropout,
        "embedding_dropout": config.dropout,
        "classifier_dropout": dropouts.get(head, config.seq_classif_dropout),
        "head_type": "distilbert",
    }


def _modernbert(config, head):
    patterns = {"full_attention": "full", "sliding_attention": "sliding_window"}
    used = [patterns[layer_type] for layer_type in config.layer_types]
    radius = config.local_attention // 2
    ropes = {patterns[name]: dict(rope) for name, rope in config.rope_parameters.items() if rope is not None}
    return {
        **_common(config),
        "intermediate_size": config.intermediate_size,
        "max_position_embeddings": config.max_position_embeddings,
        "attention_pattern": used,
        "window_radius": [radius if name == "sliding_window" else None for name in used]
        if "sliding_window" in used
        else None,
        "rope_parameters": {name: rope for name, rope in ropes.items() if name in used},
        "attention_bias": config.attention_bias,
        "norm_eps": config.norm_eps,
        "norm_bias": config.norm_bias,
        "first_layer_norm": False,
        "mlp_bias": config.mlp_bias,
        "hidden_act": config.hidden_activation,
        "attention_dropout": config.attention_dropout,
        "hidden_dropout": config.mlp_dropout,
        "embedding_dropout": config.embedding_dropout,
        "classifier_dropout": config.classifier_dropout,
        "head_type": "modernbert",
        "pooling": "first" if config.classifier_pooling == "cls" else "mean",
    }


def _nomic_bert(config, head):
    options = bert_options(config, head)
    return {
        **options,
        "position_encoding": "rotary",
        "rope_parameters": dict(config.rope_parameters),
        "head_dim": config.head_dim,
        "attention_bias": False,
        "mlp_type": "gated",
        "mlp_bias": False,
    }


def _eurobert(config, head):
    return {
        **_common(config),
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.intermediate_size,
        "max_position_embeddings": config.max_position_embeddings,
        "rope_parameters": dict(config.rope_parameters),
        "attention_bias": config.attention_bias,
        "attention_dropout": config.attention_dropout,
        "norm_type": "rms_norm",
        "norm_eps": config.rms_norm_eps,
        "embedding_norm": False,
        "mlp_bias": config.mlp_bias,
        "hidden_act": config.hidden_act,
    }


# Problems


def bert_problems(config, head):
    problems = []
    if getattr(config, "is_decoder", False) or getattr(config, "add_cross_attention", False):
        problems.append("it is a decoder (is_decoder, add_cross_attention), and ours is an encoder")
    kind = getattr(config, "position_embedding_type", None) or "absolute"
    if kind != "absolute":
        problems.append(f"position_embedding_type={kind!r} adds learned vectors of distances to the keys")
    return problems


def _ernie_problems(config, head):
    task = ["use_task_id=True adds a vector of the task"] if config.use_task_id else []
    return bert_problems(config, head) + task


def _electra_problems(config, head):
    problems = bert_problems(config, head)
    summary = (config.summary_type, config.summary_use_proj, config.summary_activation)
    if head == "multiple_choice" and (summary[:2] != ("first", True) or summary[2] not in ("gelu", "tanh")):
        problems.append(f"its summary is {summary}, and ours takes the first token through gelu or tanh")
    return problems


def _big_bird_problems(config, head):
    problems = bert_problems(config, head)
    if config.attention_type != "original_full":
        longest = (5 + 2 * config.num_random_blocks) * config.block_size
        problems.append(
            "attention_type='block_sparse' draws its random blocks anew whenever it trains and has none in "
            f"evaluation, where the first block counts twice instead; up to {longest} tokens it is full attention. "
            "Say which is meant: pattern='full', or pattern='bigbird' with block_size="
            f"{config.block_size}, num_random_blocks={config.num_random_blocks} (proven in full attention, then "
            "changed; random blocks that stay)"
        )
    if config.rescale_embeddings:
        problems.append("rescale_embeddings=True multiplies token vectors by the square root of their width")
    if not config.use_bias:
        problems.append("use_bias=False leaves biases out of three of the four projections")
    if head == "question_answering":
        problems.append("its head for answers has a feed-forward of its own; pass head='base'")
    if head == "sequence_classification" and config.hidden_act != "gelu":
        problems.append(f"its classifier's activation is {config.hidden_act!r}, ours is gelu; pass head='base'")
    return problems


def _modernbert_problems(config, head):
    problems = []
    if head == "masked_lm" and not config.decoder_bias:
        problems.append("decoder_bias=False, and our output layer has a bias")
    if head != "base" and config.classifier_bias:
        problems.append("classifier_bias=True, and the dense layer of our head has no bias")
    if head != "base" and config.classifier_activation != config.hidden_activation:
        problems.append(
            f"classifier_activation={config.classifier_activation!r} differs from hidden_activation="
            f"{config.hidden_activation!r}, and our head takes the latter; pass head='base'"
        )
    return problems


# Notes


def _distilbert_notes(config, head):
    return ["hidden_dropout is also applied to what attention adds, where DistilBERT has none"]


def _modernbert_notes(config, head):
    where = "mlp_dropout stands inside ModernBERT's feed-forward; hidden_dropout is applied to what attention and "
    return [where + "feed-forward add"] if config.mlp_dropout else []


def _longformer_notes(config, head):
    told = "Longformer finds the {} by its separators and makes it global; pass global_attention_mask instead"
    parts = {"question_answering": "question", "multiple_choice": "prompt"}
    return [told.format(parts[head])] if head in parts else []


# Families

_ROBERTA = Family(_roberta, BLOCK, ROBERTA_HEADS, bert_problems)

FAMILIES: dict[str, Family] = {
    "bert": Family(bert_options, BLOCK, BERT_HEADS, bert_problems, counts_padding=True),
    "ernie": Family(bert_options, BLOCK, BERT_HEADS, _ernie_problems, counts_padding=True),
    "roberta": _ROBERTA,
    "xlm-roberta": _ROBERTA,
    "camembert": _ROBERTA,
    "data2vec-text": _ROBERTA,
    "distilbert": Family(_distilbert, DISTILBERT, DISTILBERT_HEADS, notes=_distilbert_notes, counts_padding=True),
    "electra": Family(_electra, BLOCK, ELECTRA_HEADS, _electra_problems, counts_padding=True),
    "modernbert": Family(_modernbert, MODERNBERT, MODERNBERT_HEADS, _modernbert_problems, _modernbert_notes),
    "longformer": Family(_longformer, {**GLOBAL, **BLOCK}, ROBERTA_HEADS, bert_problems, _longformer_notes),
    "big_bird": Family(
        _big_bird,
        BLOCK,
        {**BERT_HEADS, "sequence_classification": DENSE},
        _big_bird_problems,
        counts_padding=True,
        pooler="pooler.",
    ),
    "megatron-bert": Family(_megatron, MEGATRON, BERT_HEADS, bert_problems, counts_padding=True),
    "roberta-prelayernorm": Family(_pre_norm, {**PRE_NORM, "LayerNorm": "norm"}, ROBERTA_HEADS, bert_problems),
    "nomic_bert": Family(_nomic_bert, NOMIC_BERT, NOMIC_BERT_HEADS),
    "eurobert": Family(_eurobert, EUROBERT, {}),
    "xlm-roberta-xl": Family(_xlm_roberta_xl, XL, ROBERTA_HEADS, bert_problems),
}
"""Every model type that can be converted."""
