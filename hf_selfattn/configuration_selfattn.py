"""SelfAttnConfig: every option of the encoder, its unit and its check."""

import math
from typing import Literal

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN

from .option_names import AbsentWhileNone, MayLackOptions, check_choice, refuse_misspelt
from .parallel import tensor_parallel_plan
from .patterns import PATTERNS, layer_patterns
from .positions import POSITIONS
from .scores import SCORES

AUTO_MAP = {
    "AutoConfig": "configuration_selfattn.SelfAttnConfig",
    "AutoModel": "modeling_selfattn.SelfAttnModel",
    "AutoModelForMaskedLM": "modeling_selfattn.SelfAttnForMaskedLM",
    "AutoModelForSequenceClassification": "modeling_selfattn.SelfAttnForSequenceClassification",
    "AutoModelForTokenClassification": "modeling_selfattn.SelfAttnForTokenClassification",
    "AutoModelForQuestionAnswering": "modeling_selfattn.SelfAttnForQuestionAnswering",
    "AutoModelForMultipleChoice": "modeling_selfattn.SelfAttnForMultipleChoice",
}
"""Which class in the saved code serves which Auto class; the whole of it goes with every model, whatever its head."""


@strict
class SelfAttnConfig(MayLackOptions, PreTrainedConfig):
    """Configuration of a `SelfAttn…` model.

    Types are checked on every assignment; combinations when the config is made, saved or loaded, and when a model is
    made from it. A misspelt option is refused with the nearest name.

    Sizes (counts of features, tokens or layers, all >= 1):
        vocab_size: V, the number of token ids.
        hidden_size: D, the width between layers.
        num_hidden_layers: the number of layers.
        num_attention_heads: H.
        num_key_value_heads: G, heads of keys and values, each shared by H / G query heads; None: H.
        head_dim: d_k, the width of one head's query and key; None: hidden_size / num_attention_heads.
        value_head_dim: d_v, the width of one head's value; None: head_dim.
        intermediate_size: inner width of the feed-forward; None: 4 * hidden_size if plain, and if gated two thirds of
            that rounded up to a multiple of 64, for the same number of parameters.
        embedding_size: width of the token vectors, projected to hidden_size where it differs; None: hidden_size.
        type_vocab_size: the number of token types (sentence A, sentence B); 0: none.
        max_position_embeddings: learned positions; for others, what texts are cut to. None (no attribute): any length.

    Attention:
        score_function: a row of SCORES.
        attention_pattern: a row of PATTERNS, one for all layers or a list with one per layer.
        causal: whether a token sees only itself and what is before it.
        position_encoding: a row of POSITIONS.
        attention_bias: whether the four projections have biases.
        qk_norm: whether query and key are normed in each head, before positions.
        logit_softcap: scores become logit_softcap * tanh(score / logit_softcap); None: they stay.
        attention_sink: whether each head has a learned score that takes part in the softmax and carries no value.
        memory_length: tokens of earlier segments that are remembered and attended to; 0: none.

    Numbers of single choices (None: the default named here; set without that choice they are refused). Those of
    patterns are one number for all layers, or a list with one per layer:
        temperature: 'cosine' divides by it (0.1).
        learned_temperature: 'cosine' learns it, per head (True).
        window_radius: 'sliding_window', 'longformer': tokens seen on one side (must be set).
        dilation: 'sliding_window': the step from one token seen to the next (1).
        num_global_tokens: 'longformer': global tokens at the beginning of each document (1).
        global_projections: 'longformer': whether global queries have projections of their own (False).
        block_size: 'bigbird': tokens in a block (64).
        block_radius: 'bigbird': blocks seen on one side (1).
        num_global_blocks: 'bigbird': global blocks, in turn from the beginning and the end (2).
        num_random_blocks: 'bigbird': random blocks of each query block and head (3).
        random_blocks_seed: 'bigbird': seed of the random blocks (0).
        rope_parameters: 'rotary': as in transformers, {"rope_type": "default", "rope_theta": 10000.0} and more, or a
            dict of them with one for each pattern.
        initial_offsets: 'rotary': how many tokens to the right (left: below 0) new heads look first, in turn, or []:
            anywhere (their neighbours, [-1, 1, -2, 2], with attention_bias and without qk_norm: it saves steps).
        relative_num_buckets: 't5': the number of buckets (32).
        relative_max_distance: 't5': tokens from which all distances share a bucket (128).

    Block:
        norm_position: "pre" (before attention and feed-forward, and once after the last layer) or "post" (after each
            sum, as in BERT).
        norm_type: "layer_norm" or "rms_norm".
        norm_eps: added to the variance.
        norm_bias: whether layer norms have biases.
        first_layer_norm: with "pre", whether the first layer has a norm before its attention (ModernBERT: no).
        embedding_norm: whether embeddings are normed.
        mlp_type: "plain" or "gated".
        mlp_bias: whether the feed-forward has biases.
        hidden_act: the activation of the feed-forward (gated, "silu" makes SwiGLU and "gelu" GEGLU) and of the heads'
            dense layer where `head_type` leaves it open; a name in transformers' ACT2FN.

    Dropout (rates from 0 to below 1, in training only):
        attention_dropout: of attention weights.
        hidden_dropout: of what attention and feed-forward add.
        embedding_dropout: of embeddings.
        classifier_dropout: of what enters a classifier.

    Heads:
        head_type: the form of the masked language model's and the classifiers' heads: "bert", "roberta",
            "electra", "distilbert" or "modernbert".
        pooling: what stands for a whole text: the "first" token, the "mean" or the "max" over its tokens.
        tie_word_embeddings: whether the masked language model's output layer shares the token vectors.

    Others:
        initializer_range: standard deviation of new weights; with 'sinusoidal', also what the sinusoids are multiplied
            by, to stand in the paper's proportion to the token vectors.
        pad_token_id, bos_token_id, eos_token_id: special token ids, or None.

    Raises:
        StrictDataclassFieldValidationError: for a value of the wrong type.
        StrictDataclassClassValidationError: for values that do not go together.
        TypeError: for a misspelt option.
    """

    model_type = "selfattn"
    base_model_tp_plan = property(tensor_parallel_plan)

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    value_head_dim: int | None = None
    intermediate_size: int | None = None
    embedding_size: int | None = None
    type_vocab_size: int = 0
    max_position_embeddings: int | None = AbsentWhileNone()

    score_function: str = "scaled_dot_product"
    attention_pattern: str | list[str] = "full"
    causal: bool = False
    position_encoding: str = "rotary"
    attention_bias: bool = True
    qk_norm: bool = False
    logit_softcap: float | int | None = None
    attention_sink: bool = False
    memory_length: int = 0

    temperature: float | int | None = None
    learned_temperature: bool | None = None
    window_radius: int | list[int | None] | None = None
    dilation: int | list[int | None] | None = None
    num_global_tokens: int | list[int | None] | None = None
    global_projections: bool | None = None
    block_size: int | list[int | None] | None = None
    block_radius: int | list[int | None] | None = None
    num_global_blocks: int | list[int | None] | None = None
    num_random_blocks: int | list[int | None] | None = None
    random_blocks_seed: int | None = None
    rope_parameters: dict | None = None
    initial_offsets: list[int] | None = None
    relative_num_buckets: int | None = None
    relative_max_distance: int | None = None

    norm_position: Literal["pre", "post"] = "pre"
    norm_type: Literal["layer_norm", "rms_norm"] = "layer_norm"
    norm_eps: float = 1e-5
    norm_bias: bool = False
    first_layer_norm: bool = True
    embedding_norm: bool = True
    mlp_type: Literal["plain", "gated"] = "gated"
    mlp_bias: bool = False
    hidden_act: str = "silu"

    attention_dropout: float | int = 0.0
    hidden_dropout: float | int = 0.0
    embedding_dropout: float | int = 0.0
    classifier_dropout: float | int = 0.0

    head_type: Literal["bert", "roberta", "electra", "distilbert", "modernbert"] = "modernbert"
    pooling: Literal["first", "mean", "max"] = "mean"
    tie_word_embeddings: bool = True

    initializer_range: float = 0.02
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs):
        refuse_misspelt(type(self), kwargs)
        # The code travels with every saved model, so the map always names the files beside it.
        kwargs["auto_map"] = dict(AUTO_MAP)
        super().__post_init__(**kwargs)

    def convert_rope_params_to_dict(self, **kwargs):
        """transformers would fill `rope_parameters` up with defaults; ours stay what the user wrote."""
        said = {name: kwargs.pop(name, None) for name in ("rope_theta", "partial_rotary_factor")}
        said = {name: value for name, value in said.items() if value is not None}
        said |= kwargs.pop("rope_scaling", None) or {}
        if said:
            self.rope_parameters = {**said, **(self.rope_parameters or {})}
        return kwargs

    def validate_rope(self):
        """transformers checks only what it knows of; `_check_positions` checks ours."""

    @property
    def query_key_dim(self) -> int:
        """d_k, the width of one head's query and key."""
        return self.hidden_size // self.num_attention_heads if self.head_dim is None else self.head_dim

    @property
    def value_dim(self) -> int:
        """d_v, the width of one head's value."""
        return self.query_key_dim if self.value_head_dim is None else self.value_head_dim

    @property
    def num_groups(self) -> int:
        """G, the number of key/value heads."""
        return self.num_attention_heads if self.num_key_value_heads is None else self.num_key_value_heads

    @property
    def feed_forward_size(self) -> int:
        """The inner width of the feed-forward."""
        if self.intermediate_size is not None:
            return self.intermediate_size
        return 4 * self.hidden_size if self.mlp_type == "plain" else -(-8 * self.hidden_size // (3 * 64)) * 64

    @property
    def embedding_width(self) -> int:
        """The width of the token vectors."""
        return self.hidden_size if self.embedding_size is None else self.embedding_size

    @property
    def output_attentions(self) -> bool | None:
        """Whether the model returns attention weights. They come from every kernel, so none is excluded."""
        return self._output_attentions

    @output_attentions.setter
    def output_attentions(self, value: bool | None):
        self._output_attentions = value

    def validate_output_attentions(self):
        """transformers allows weights from 'eager' alone; here every kernel gives them."""

    def validate_selfattn(self):
        """All checks of combinations, those on which others rest first."""
        self._check_sizes()
        self._check_rates()
        self._check_choices()
        self._check_block()
        self._check_options()
        self._check_patterns()
        self._check_positions()
        self._check_memory()

    def _check_sizes(self):
        for name in _SIZES:
            value = getattr(self, name, None)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}.")
        if self.type_vocab_size < 0:
            raise ValueError(f"type_vocab_size must be 0 (no token types) or more, got {self.type_vocab_size}.")
        if self.head_dim is None and self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads {self.num_attention_heads}. "
                "Change one of them, or set head_dim, which is free of both."
            )
        if self.num_attention_heads % self.num_groups:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of num_key_value_heads "
                f"{self.num_groups}, and each key/value head serves the same number of heads. Use a divisor."
            )
        if self.pad_token_id is not None and not 0 <= self.pad_token_id < self.vocab_size:
            raise ValueError(
                f"pad_token_id must be below vocab_size {self.vocab_size}, got {self.pad_token_id}. "
                "Set vocab_size to the length of the tokenizer, or pad_token_id=None."
            )

    def _check_rates(self):
        for name in ("attention_dropout", "hidden_dropout", "embedding_dropout", "classifier_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be from 0 to below 1, got {getattr(self, name)}.")
        for name in ("norm_eps", "initializer_range"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}.")
        for name in ("logit_softcap", "temperature"):
            if getattr(self, name) is not None and not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}. None leaves it out.")

    def _check_choices(self):
        patterns = self.attention_pattern if isinstance(self.attention_pattern, list) else [self.attention_pattern]
        check_choice("score_function", [self.score_function], SCORES)
        check_choice("attention_pattern", patterns, PATTERNS)
        check_choice("position_encoding", [self.position_encoding], POSITIONS)
        if self.hidden_act not in ACT2FN:
            raise ValueError(f"hidden_act must be one of {', '.join(sorted(ACT2FN))}, got {self.hidden_act!r}.")

    def _check_options(self):
        """Options that only some choices use are refused where none of those is chosen."""
        chosen = {
            "score_function": (SCORES, {self.score_function}),
            "attention_pattern": (PATTERNS, self._chosen_patterns()),
            "position_encoding": (POSITIONS, {self.position_encoding}),
        }
        for choice, (table, names) in chosen.items():
            used = {option for name in names for option in table[name].options}
            for option in {option for cls in table.values() for option in cls.options} - used:
                if getattr(self, option) is not None:
                    able = [repr(name) for name, cls in table.items() if option in cls.options]
                    raise ValueError(
                        f"{option}={getattr(self, option)} has no effect with {choice}={getattr(self, choice)!r}: "
                        f"only {' and '.join(able)} use it. Set one of these, or {option}=None."
                    )

    def _check_patterns(self):
        for name in ("attention_pattern", *{option for cls in PATTERNS.values() for option in cls.options}):
            value = getattr(self, name)
            if isinstance(value, list) and len(value) != self.num_hidden_layers:
                raise ValueError(
                    f"{name} as a list has one entry per layer, got {len(value)} entries for "
                    f"num_hidden_layers={self.num_hidden_layers}. Give one for each, or a single value for all."
                )
        layer_patterns(self)

    def _check_positions(self):
        problem = POSITIONS[self.position_encoding].check(self)
        if problem is not None:
            raise ValueError(problem)

    def _check_memory(self):
        if self.memory_length < 0:
            raise ValueError(f"memory_length must be 0 (no memory) or more, got {self.memory_length}.")
        if self.memory_length and not self.causal:
            raise ValueError(
                f"memory_length={self.memory_length} needs causal=True: a token that has been read may not change "
                "when the next segment comes. Set causal=True, or memory_length=0."
            )
        if self.memory_length and not POSITIONS[self.position_encoding].relative:
            able = [repr(name) for name, cls in POSITIONS.items() if cls.relative]
            raise ValueError(
                f"memory_length={self.memory_length} needs a position_encoding by distance, got "
                f"{self.position_encoding!r}. Use {' or '.join(able)}, or memory_length=0."
            )

        for pattern in self._chosen_patterns():
            if self.memory_length and not PATTERNS[pattern].streams:
                raise ValueError(
                    f"memory_length={self.memory_length} needs an attention_pattern that does not ask for the end of "
                    f"the document, got {pattern!r}. Use another pattern, or memory_length=0."
                )

    def _chosen_patterns(self) -> set[str]:
        return {self.attention_pattern} if isinstance(self.attention_pattern, str) else set(self.attention_pattern)

    def _check_block(self):
        if self.causal and self.pooling == "first":
            raise ValueError(
                "pooling 'first' with causal=True reads a token that sees nothing but itself. "
                "Use pooling='mean' or 'max'."
            )
        if self.norm_bias and self.norm_type == "rms_norm":
            raise ValueError(
                "norm_bias=True has no effect with norm_type 'rms_norm', which has no bias. Set norm_bias=False, or "
                "norm_type='layer_norm'."
            )
        if not self.first_layer_norm and self.norm_position == "post":
            raise ValueError(
                "first_layer_norm=False has no effect with norm_position 'post', where no norm stands before the "
                "first layer. Set first_layer_norm=True, or norm_position='pre'."
            )
        if self.problem_type not in (None, *_PROBLEM_TYPES):
            raise ValueError(
                f"problem_type must be None or one of {', '.join(map(repr, _PROBLEM_TYPES))}, "
                f"got {self.problem_type!r}."
            )

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        """As in transformers; misspelt overrides (as `from_pretrained` passes them on) are refused."""
        refuse_misspelt(cls, kwargs)
        return super().from_dict(config_dict, **kwargs)


_SIZES = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "value_head_dim",
    "intermediate_size",
    "embedding_size",
    "max_position_embeddings",
)

_PROBLEM_TYPES = ("regression", "single_label_classification", "multi_label_classification")


SelfAttnConfig.register_for_auto_class()
