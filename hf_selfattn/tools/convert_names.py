"""What parameters are called in other people's encoders, and in ours."""

BLOCK = {
    "embeddings.word_embeddings": "embed_tokens",
    "embeddings.position_embeddings": "embeddings.positions",
    "embeddings.token_type_embeddings": "embeddings.token_types",
    "embeddings.LayerNorm": "embeddings.norm",
    "embeddings_project": "embeddings.projection",
    "encoder.layer.": "layers.",
    "attention.self.query": "attention.q_proj",
    "attention.self.key": "attention.k_proj",
    "attention.self.value": "attention.v_proj",
    "attention.output.dense": "attention.o_proj",
    "attention.output.LayerNorm": "attention_post_norm",
    "intermediate.dense": "feed_forward.up_proj",
    "output.dense": "feed_forward.down_proj",
    "output.LayerNorm": "feed_forward_post_norm",
}

PRE_NORM = {"attention.LayerNorm": "attention_norm", "intermediate.LayerNorm": "feed_forward_norm", **BLOCK}
MEGATRON = {"encoder.ln": "norm", "attention.ln": "attention_norm", ".ln.": ".feed_forward_norm.", **BLOCK}
XL = {
    "encoder.LayerNorm": "norm",
    "attention.self_attn_layer_norm": "attention_norm",
    **BLOCK,
    ".LayerNorm.": ".feed_forward_norm.",
}
GLOBAL = {f"attention.self.{name}_global": f"attention.of_global.{name[0]}_proj" for name in ("query", "key", "value")}

EUROBERT = {
    "self_attn.": "attention.",
    "mlp.": "feed_forward.",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "feed_forward_norm",
}

NOMIC_BERT = {
    **{theirs: ours for theirs, ours in BLOCK.items() if theirs.startswith("embeddings.")},
    "self_attn.": "attention.",
    "mlp.": "feed_forward.",
    "post_attention_layernorm": "attention_post_norm",
    "post_mlp_layernorm": "feed_forward_post_norm",
}

DISTILBERT = {
    **{theirs: ours for theirs, ours in BLOCK.items() if theirs.startswith("embeddings.")},
    "transformer.layer.": "layers.",
    "q_lin": "q_proj",
    "k_lin": "k_proj",
    "v_lin": "v_proj",
    "out_lin": "o_proj",
    "sa_layer_norm": "attention_post_norm",
    "ffn.lin1": "feed_forward.up_proj",
    "ffn.lin2": "feed_forward.down_proj",
    "output_layer_norm": "feed_forward_post_norm",
}

MODERNBERT = {
    "embeddings.tok_embeddings": "embed_tokens",
    "attn_norm": "attention_norm",
    "attn.Wqkv": "attention./q_proj+k_proj+v_proj/",
    "attn.Wo": "attention.o_proj",
    "mlp_norm": "feed_forward_norm",
    "mlp.Wi": "feed_forward./gate_proj+up_proj/",
    "mlp.Wo": "feed_forward.down_proj",
    "final_norm": "norm",
}

POOLED = {"pooler": "classifier.head.dense.", "classifier.": "classifier.out_proj."}
TOKENS = {
    "token_classification": {"classifier.": "classifier.out_proj."},
    "question_answering": {"qa_outputs.": "qa_outputs.out_proj."},
}
DENSE = {"classifier.dense.": "classifier.head.dense.", "classifier.out_proj.": "classifier.out_proj."}

BERT_HEADS = {
    **TOKENS,
    "masked_lm": {
        "cls.predictions.transform.dense.": "prediction_head.dense.",
        "cls.predictions.transform.LayerNorm.": "prediction_head.norm.",
        "cls.predictions.decoder.": "lm_head.",
        "cls.predictions.bias": "lm_head.bias",
    },
    "sequence_classification": POOLED,
    "multiple_choice": {"pooler": "choice_output.head.dense.", "classifier.": "choice_output.out_proj."},
}

ROBERTA_HEADS = {
    **BERT_HEADS,
    "masked_lm": {
        "lm_head.dense.": "prediction_head.dense.",
        "lm_head.layer_norm.": "prediction_head.norm.",
        "lm_head.decoder.": "lm_head.",
        "lm_head.bias": "lm_head.bias",
    },
    "sequence_classification": DENSE,
}

ELECTRA_HEADS = {
    **TOKENS,
    "masked_lm": {
        "generator_predictions.dense.": "prediction_head.dense.",
        "generator_predictions.LayerNorm.": "prediction_head.norm.",
        "generator_lm_head.": "lm_head.",
    },
    "sequence_classification": DENSE,
    "multiple_choice": {
        "sequence_summary.summary.": "choice_output.head.dense.",
        "classifier.": "choice_output.out_proj.",
    },
}

DISTILBERT_HEADS = {
    **TOKENS,
    "masked_lm": {
        "vocab_transform.": "prediction_head.dense.",
        "vocab_layer_norm.": "prediction_head.norm.",
        "vocab_projector.": "lm_head.",
    },
    "sequence_classification": {"pre_classifier.": "classifier.head.dense.", "classifier.": "classifier.out_proj."},
    "multiple_choice": {"pre_classifier.": "choice_output.head.dense.", "classifier.": "choice_output.out_proj."},
}

MODERNBERT_HEADS = {
    "masked_lm": {"head.": "prediction_head.", "decoder.": "lm_head."},
    "sequence_classification": {"head.": "classifier.head.", "classifier.": "classifier.out_proj."},
    "token_classification": {"head.": "classifier.head.", "classifier.": "classifier.out_proj."},
    "question_answering": {"head.": "qa_outputs.head.", "classifier.": "qa_outputs.out_proj."},
    "multiple_choice": {"head.": "choice_output.head.", "classifier.": "choice_output.out_proj."},
}

NOMIC_BERT_HEADS = {
    "masked_lm": {**BERT_HEADS["masked_lm"], "cls.predictions.transform.layer_norm.": "prediction_head.norm."},
    "sequence_classification": POOLED,
    "token_classification": TOKENS["token_classification"],
}
