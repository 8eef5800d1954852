"""SelfAttnConfig: what it accepts, what it refuses and in which words, and that it survives a file."""

import copy
import json
import pickle
import re
from dataclasses import fields

import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError, StrictDataclassFieldValidationError
from transformers import AutoConfig, AutoModel, PreTrainedConfig

from hf_selfattn import KERNELS, PATTERNS, POSITIONS, SCORES, SelfAttnConfig, SelfAttnForMaskedLM, SelfAttnModel
from hf_selfattn.kernels import default_kernel

SMALL = {"vocab_size": 29, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}

OWN = [
    field.name
    for field in fields(SelfAttnConfig)
    if field.name not in {inherited.name for inherited in fields(PreTrainedConfig)}
]

COUNTS = ["vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"]
COUNTS_OR_NONE = [
    "num_key_value_heads",
    "head_dim",
    "value_head_dim",
    "intermediate_size",
    "embedding_size",
    "max_position_embeddings",
]
RATES = ["attention_dropout", "hidden_dropout", "embedding_dropout", "classifier_dropout"]
FLAGS = [
    "causal",
    "attention_bias",
    "qk_norm",
    "attention_sink",
    "norm_bias",
    "first_layer_norm",
    "embedding_norm",
    "mlp_bias",
    "tie_word_embeddings",
]
FLAGS_OR_NONE = ["learned_temperature", "global_projections"]
NUMBERS_OR_NONE = ["logit_softcap", "temperature"]
NUMBERS_OF_PATTERNS = [
    "window_radius",
    "dilation",
    "num_global_tokens",
    "block_size",
    "block_radius",
    "num_global_blocks",
    "num_random_blocks",
]
CHOICES = {
    "norm_position": ("pre", "post"),
    "norm_type": ("layer_norm", "rms_norm"),
    "mlp_type": ("plain", "gated"),
    "head_type": ("bert", "roberta", "electra", "distilbert", "modernbert"),
    "pooling": ("first", "mean", "max"),
}

WRONG_TYPES = {
    **{key: ["16", 16.0, True, None, [16]] for key in COUNTS},
    **{key: ["16", 16.0, True, [16]] for key in COUNTS_OR_NONE},
    **{key: ["2", 2.0, True, None] for key in ["type_vocab_size", "memory_length"]},
    **{key: ["2", 2.0, True, [2]] for key in ["random_blocks_seed", "relative_num_buckets", "relative_max_distance"]},
    **{key: ["0.1", True, None, [0.1]] for key in RATES},
    **{key: ["1e-5", True, None] for key in ["norm_eps", "initializer_range"]},
    **{key: [1, 0, "true", None] for key in FLAGS},
    **{key: [1, 0, "true", [True]] for key in FLAGS_OR_NONE},
    **{key: ["0.1", True, [0.1]] for key in NUMBERS_OR_NONE},
    **{key: ["last", "Pre", 1, None] for key in CHOICES},
    **{key: [1, None, ["rotary"]] for key in ["score_function", "position_encoding", "hidden_act"]},
    "attention_pattern": [1, None, ("full", "full"), ["full", 1], {"0": "full"}],
    **{key: ["3", 3.0, True, [3, "3"], (3, 3)] for key in NUMBERS_OF_PATTERNS},
    "rope_parameters": ["default", 10_000.0, [10_000.0]],
    "initial_offsets": [1, "1", [1.0], [True], (1, -1)],
    **{key: ["0", 0.0, True, [0]] for key in ["pad_token_id", "bos_token_id"]},
    "eos_token_id": ["0", 0.0, True, ["0"]],
}


def as_id(value):
    """A short name for a table's row."""
    return re.sub(r"[^\w.,=-]+", "_", str(value)).strip("_")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A saved masked language model of SMALL."""
    path = tmp_path_factory.mktemp("small")
    SelfAttnForMaskedLM(SelfAttnConfig(**SMALL)).save_pretrained(path)
    return path


class TestTypes:
    def test_the_table_below_names_every_option(self):
        assert set(WRONG_TYPES) == set(OWN)

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            pytest.param(name, value, id=f"{name}={type(value).__name__}-{as_id(value)}")
            for name, values in WRONG_TYPES.items()
            for value in values
        ],
    )
    def test_wrong_type_is_refused_when_made_and_when_assigned(self, name, value):
        with pytest.raises(StrictDataclassFieldValidationError, match=f"'{name}'"):
            SelfAttnConfig(**{**SMALL, name: value})
        config = SelfAttnConfig(**SMALL)
        before = getattr(config, name, None)
        with pytest.raises(StrictDataclassFieldValidationError, match=f"'{name}'"):
            setattr(config, name, value)
        assert getattr(config, name, None) == before

    @pytest.mark.parametrize("name", CHOICES)
    def test_a_closed_choice_names_what_there_is(self, name):
        with pytest.raises(StrictDataclassFieldValidationError, match=re.escape(str(CHOICES[name])) + ".*got nearest"):
            SelfAttnConfig(**SMALL, **{name: "nearest"})

    @pytest.mark.parametrize("rate", RATES)
    def test_a_rate_may_be_the_integer_0(self, rate):
        assert getattr(SelfAttnConfig(**SMALL, **{rate: 0}), rate) == 0

    def test_options_are_given_by_name(self):
        with pytest.raises(ValueError, match="only keyword arguments"):
            SelfAttnConfig(29)


AT_LEAST_1 = [({name: value}, f"{name} must be at least 1, got {value}") for name in COUNTS for value in (0, -3)] + [
    ({name: 0}, f"{name} must be at least 1, got 0") for name in COUNTS_OR_NONE
]
FROM_0_TO_1 = [
    ({name: value}, f"{name} must be from 0 to below 1, got {value}")
    for name in RATES
    for value in (1, 1.5, -0.1, float("nan"))
]
ABOVE_0 = [
    ({name: value}, f"{name} must be above 0, got {value}")
    for name in ("norm_eps", "initializer_range")
    for value in (0.0, -1.0, float("nan"))
] + [
    ({"score_function": "cosine", name: value}, f"{name} must be above 0, got {value}. None leaves it out")
    for name in NUMBERS_OR_NONE
    for value in (0, -1.0, float("nan"), float("inf"))
]

# Options that only some choices use, with a value that those take.
OF_SOME_CHOICES = {
    "score_function": {"temperature": 0.5, "learned_temperature": False},
    "attention_pattern": {
        **dict.fromkeys(NUMBERS_OF_PATTERNS, 3),
        "global_projections": True,
        "random_blocks_seed": 3,
    },
    "position_encoding": {
        "rope_parameters": {"rope_theta": 500.0},
        "initial_offsets": [-1, 1],
        "relative_num_buckets": 8,
        "relative_max_distance": 20,
    },
}
TABLES = {"score_function": SCORES, "attention_pattern": PATTERNS, "position_encoding": POSITIONS}
WITHOUT_EFFECT = [
    (
        {"max_position_embeddings": 40, choice: name, option: value, **({"window_radius": 2} if needed else {})},
        f"{re.escape(f'{option}={value}')} has no effect with {choice}={name!r}: only .* use it. "
        f"Set one of these, or {option}=None",
    )
    for choice, options in OF_SOME_CHOICES.items()
    for option, value in options.items()
    for name, cls in TABLES[choice].items()
    for needed in ["window_radius" in cls.options]
    if option not in cls.options
]
WRONG_NUMBERS = [
    (
        {"attention_pattern": pattern, **({"window_radius": 2} if pattern != "bigbird" else {}), option: value},
        rf"'{pattern}' needs {option} \(.*as an integer >= {least}, got {least - 1}\. Set {option}, or .*='full'",
    )
    for pattern, option, least in [
        ("sliding_window", "window_radius", 1),
        ("sliding_window", "dilation", 1),
        ("longformer", "window_radius", 1),
        ("longformer", "num_global_tokens", 0),
        ("bigbird", "block_size", 1),
        ("bigbird", "block_radius", 0),
        ("bigbird", "num_global_blocks", 0),
        ("bigbird", "num_random_blocks", 0),
    ]
    for value in (least - 1, [least, least - 1])
] + [
    (
        {"attention_pattern": pattern, **({"window_radius": 2} if pattern != "bigbird" else {}), option: [3, 3, 3]},
        f"{option} as a list has one entry per layer, got 3 entries for num_hidden_layers=2. Give one for each, or a",
    )
    for pattern in ("sliding_window", "longformer", "bigbird")
    for option in PATTERNS[pattern].options
    if option in NUMBERS_OF_PATTERNS
]
WRONG_BUCKETS = [
    (
        {"position_encoding": "t5", **options},
        f"'t5' needs relative_num_buckets, a multiple of {multiple}, and relative_max_distance above the {exact} "
        f"distances with a bucket of their own, got {got}. Use 32 and 128, say",
    )
    for options, multiple, exact, got in [
        ({"relative_num_buckets": 30}, 4, 7, "30 and 128"),
        ({"relative_num_buckets": 0}, 4, 0, "0 and 128"),
        ({"relative_max_distance": 8}, 4, 8, "32 and 8"),
        ({"relative_max_distance": 16, "causal": True}, 2, 16, "32 and 16"),
        ({"relative_num_buckets": 7, "causal": True}, 2, 3, "7 and 128"),
    ]
]
WRONG_MEMORY = [
    ({"memory_length": -1}, "memory_length must be 0 .no memory. or more, got -1"),
    ({"memory_length": 4}, "memory_length=4 needs causal=True.*Set causal=True, or memory_length=0"),
    *(
        (
            {"memory_length": 4, "causal": True, "position_encoding": position, "max_position_embeddings": 40},
            f"memory_length=4 needs a position_encoding by distance, got '{position}'. Use 'none' or 'rotary' or "
            "'alibi' or 't5' or 'transformer_xl', or memory_length=0",
        )
        for position in ("learned", "sinusoidal")
    ),
    *(
        (
            {"memory_length": 4, "causal": True, "attention_pattern": pattern},
            "memory_length=4 needs an attention_pattern that does not ask for the end of the document, got 'bigbird'. "
            "Use another pattern, or memory_length=0",
        )
        for pattern in ("bigbird", ["full", "bigbird"])
    ),
]
# Each of these would be read by nobody, or break where the frequencies are made.
WRONG_ROPE = [
    (
        {"rope_parameters": rope, **options},
        f"rope_parameters.*{message}",
    )
    for rope, message, options in [
        ({"rope_type": "yarnn"}, "rope_type must be one of 'default', 'linear', 'llama3', 'yarn', got 'yarnn'", {}),
        ({"rope_type": "dynamic", "factor": 2.0}, "rope_type must be one of.*got 'dynamic'.*longest text", {}),
        ({"rope_type": "longrope"}, "rope_type must be one of .*got 'longrope'.*longest text", {}),
        ({"rope_theta": 0}, "rope_theta must be a number above 0, got 0. 10000.0 is usual", {}),
        ({"rope_theta": -1e4}, "rope_theta must be a number above 0, got -10000.0", {}),
        ({"rope_theta": "many"}, "rope_theta must be a number above 0, got 'many'", {}),
        ({"rope_theta": float("nan")}, "rope_theta must be a number above 0, got nan", {}),
        ({"rope_theta": 1e4, "factr": 2.0}, r"knows .*factor.*got \['factr'\]. Leave them out", {}),
        ({"rope_theta": 1e4, "factor": 2.0}, "factor.*default", {}),
        ({"rope_theta": 1e4, "beta_fast": 2.0}, "beta_fast.*default", {}),
        ({"rope_type": "linear"}, "linear.*factor", {}),
        ({"rope_type": "linear", "factor": 0}, "factor.*got 0", {}),
        ({"rope_type": "linear", "factor": "2"}, "factor.*got '2'", {}),
        ({"rope_type": "llama3", "factor": 2.0}, "llama3.*low_freq_factor", {}),
        ({"rope_type": "yarn", "factor": 2.0}, "yarn.*original_max_position_embeddings", {}),
        ({"partial_rotary_factor": "half"}, "partial_rotary_factor.*got 'half'", {}),
        (
            {"full": {"rope_theta": 5.0}},
            "sliding_window",
            {"attention_pattern": ["full", "sliding_window"], "window_radius": 3},
        ),
        ({"full": {"rope_theta": 5.0}, "rope_theta": 6.0}, "rope_theta", {}),
        ({"full": {"rope_theta": 5.0}, "ful": {"rope_theta": 6.0}}, "ful", {}),
    ]
]
WRONG_OFFSETS = [
    *(
        (
            {"initial_offsets": [-1, 1], **options},
            rf"initial_offsets=\[-1, 1\] are biases .* it needs attention_bias=True, qk_norm=False and "
            rf"score_function='scaled_dot_product', got {got}.*Set these, or initial_offsets=\[\]",
        )
        for options, got in [
            ({"attention_bias": False}, "attention_bias=False, qk_norm=False"),
            ({"attention_bias": True, "qk_norm": True}, "attention_bias=True, qk_norm=True"),
            ({"attention_bias": True, "score_function": "cosine"}, ".*score_function='cosine'"),
        ]
    ),
    (
        {"initial_offsets": [-1, 1], "attention_bias": True, "causal": True},
        r"With causal=True no head sees .* got initial_offsets=\[-1, 1\]. Use 0 and negative ones",
    ),
]
BAD = [
    *AT_LEAST_1,
    *WRONG_OFFSETS,
    *FROM_0_TO_1,
    *ABOVE_0,
    *WITHOUT_EFFECT,
    *WRONG_NUMBERS,
    *WRONG_BUCKETS,
    *WRONG_MEMORY,
    *WRONG_ROPE,
    ({"type_vocab_size": -1}, r"type_vocab_size must be 0 \(no token types\) or more, got -1"),
    ({"num_attention_heads": 3}, "hidden_size 16 is not a multiple of num_attention_heads 3.*set head_dim"),
    (
        {"hidden_size": 18, "num_attention_heads": 4},
        "hidden_size 18 is not a multiple of num_attention_heads 4. Change one of them, or set head_dim",
    ),
    (
        {"num_attention_heads": 4, "num_key_value_heads": 3},
        "num_attention_heads 4 is not a multiple of num_key_value_heads 3.*Use a divisor",
    ),
    ({"num_key_value_heads": 4}, "num_attention_heads 2 is not a multiple of num_key_value_heads 4.*Use a divisor"),
    ({"pad_token_id": 29}, "pad_token_id must be below vocab_size 29, got 29.*length of the tokenizer.*=None"),
    ({"pad_token_id": -1}, "pad_token_id must be .*got -1.*pad_token_id=None"),
    ({"score_function": "dot"}, "score_function must be one of 'scaled_dot_product'.*got 'dot'.*registered"),
    ({"attention_pattern": "window"}, "attention_pattern must be one of 'full'.*got 'window'.*registered"),
    ({"attention_pattern": ["full", "window"]}, "attention_pattern must be one of 'full'.*got 'window'.*registered"),
    ({"position_encoding": "rope"}, "position_encoding must be one of 'none'.*got 'rope'.*registered"),
    ({"hidden_act": "geluu"}, "hidden_act must be one of .*relu.*got 'geluu'"),
    (
        {"attention_pattern": ["full"]},
        "attention_pattern as a list has one entry per layer, got 1 entries for num_hidden_layers=2. Give one",
    ),
    ({"attention_pattern": []}, "attention_pattern as a list has one entry per layer, got 0 entries.*Give one for"),
    (
        {"attention_pattern": "sliding_window"},
        "'sliding_window' needs window_radius.*say 64.*>= 1, got None. Set window_radius, or attention_pattern='full'",
    ),
    (
        {"attention_pattern": "longformer"},
        "'longformer' needs window_radius.*say 64.*>= 1, got None. Set window_radius, or attention_pattern='full'",
    ),
    (
        {"attention_pattern": ["full", "sliding_window"], "window_radius": [3, None]},
        "needs window_radius.*>= 1, got None. Set",
    ),
    (
        {"head_dim": 5},
        r"'rotary' turns pairs and needs an even head_dim \* partial_rotary_factor, got 5.*Change head_dim",
    ),
    *(
        ({"rope_parameters": {"partial_rotary_factor": factor}}, f"'rotary' turns pairs.*got {width}. Change head_dim")
        for factor, width in [(0.3, 2.4), (0, 0), (2.0, 16.0), (0.125, 1.0)]
    ),
    (
        {"position_encoding": "learned"},
        "'learned' needs max_position_embeddings.*got None. Set max_position_embeddings=512",
    ),
    (
        {"norm_bias": True, "norm_type": "rms_norm"},
        "norm_bias=True has no effect with norm_type 'rms_norm'.*Set norm_bias=False, or norm_type='layer_norm'",
    ),
    (
        {"first_layer_norm": False, "norm_position": "post"},
        "first_layer_norm=False has no effect with norm_position 'post'.*=True, or norm_position='pre'",
    ),
    ({"causal": True, "pooling": "first"}, "pooling 'first' with causal=True.*Use pooling='mean' or 'max'"),
    ({"problem_type": "regresion"}, "problem_type.*regression.*got '?regresion"),
]


def made(options, folder, tmp_path):
    SelfAttnConfig(**{**SMALL, **options})


def changed(options):
    config = SelfAttnConfig(**SMALL)
    for name, value in options.items():
        setattr(config, name, value)
    return config


def saved(options, folder, tmp_path):
    changed(options).save_pretrained(tmp_path)


def loaded(options, folder, tmp_path):
    on_disk = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**on_disk, **options}))
    AutoConfig.from_pretrained(tmp_path)


def model_made(options, folder, tmp_path):
    SelfAttnModel(changed(options))


def model_loaded(options, folder, tmp_path):
    AutoModel.from_pretrained(folder, **options)


@pytest.mark.parametrize("road", [made, saved, loaded, model_made, model_loaded], ids=lambda road: road.__name__)
@pytest.mark.parametrize(
    ("options", "message"), [pytest.param(options, message, id=as_id(options)) for options, message in BAD]
)
def test_bad_combination_is_refused(options, message, road, folder, tmp_path):
    with pytest.raises(
        (StrictDataclassClassValidationError, StrictDataclassFieldValidationError), match=f"(?s){message}"
    ):
        road(options, folder, tmp_path)


GOOD = [
    {"attention_pattern": "sliding_window", "window_radius": 3},
    {"attention_pattern": ["full", "sliding_window"], "window_radius": 3},
    {"attention_pattern": ["full", "sliding_window"], "window_radius": [None, 3]},
    {"attention_pattern": ["sliding_window", "sliding_window"], "window_radius": [1, 3]},
    {"num_attention_heads": 3, "head_dim": 6},
    {"head_dim": 5, "position_encoding": "none"},
    {"num_attention_heads": 4, "num_key_value_heads": 1},
    {"causal": True, "pooling": "max"},
    {"rope_parameters": {"rope_theta": 500.0}},
    {"rope_parameters": {"partial_rotary_factor": 0.5}},
    {"rope_parameters": {"rope_type": "linear", "factor": 4.0}},
    {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}},
    {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}, "max_position_embeddings": 32},
    {
        "rope_parameters": {
            "rope_type": "llama3",
            "factor": 8,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        }
    },
    {
        "attention_pattern": ["full", "sliding_window"],
        "window_radius": 3,
        "rope_parameters": {"full": {"rope_theta": 500.0}, "sliding_window": {"rope_theta": 50.0}},
    },
    {"score_function": "cosine", "temperature": 1},
    {"score_function": "cosine", "learned_temperature": False},
    {"score_function": "additive", "qk_norm": True, "logit_softcap": 5, "attention_sink": True},
    {"attention_pattern": "sliding_window", "window_radius": 3, "dilation": [1, 2]},
    {"attention_pattern": "longformer", "window_radius": 3, "num_global_tokens": 0},
    {"attention_pattern": "longformer", "window_radius": [1, 3], "global_projections": True},
    {"attention_pattern": "bigbird"},
    {"attention_pattern": "bigbird", "block_radius": 0, "num_global_blocks": 0, "num_random_blocks": 0},
    {"attention_pattern": "bigbird", "block_size": [1, 200], "random_blocks_seed": -3},
    {"attention_pattern": ["longformer", "bigbird"], "window_radius": [3, None], "num_random_blocks": [None, 1]},
    {"position_encoding": "sinusoidal", "hidden_size": 15, "num_attention_heads": 3},
    {"position_encoding": "alibi", "score_function": "cosine"},
    {"position_encoding": "t5", "relative_num_buckets": 4, "relative_max_distance": 2},
    {"position_encoding": "t5", "relative_num_buckets": 6, "causal": True},
    {"position_encoding": "transformer_xl", "score_function": "additive"},
    {"memory_length": 4, "causal": True},
    {"memory_length": 4, "causal": True, "attention_pattern": "longformer", "window_radius": 3},
    *({"memory_length": 4, "causal": True, "position_encoding": p} for p in ("none", "alibi", "t5", "transformer_xl")),
    {"position_encoding": "learned", "max_position_embeddings": 7},
    {"eos_token_id": [1, 2], "pad_token_id": 0},
    {"hidden_act": "relu", "mlp_type": "plain"},
]


@pytest.mark.parametrize("road", [made, saved, loaded, model_made], ids=lambda road: road.__name__)
@pytest.mark.parametrize("options", GOOD, ids=as_id)
def test_good_combination_is_accepted(options, road, folder, tmp_path):
    road(options, folder, tmp_path)


def test_from_pretrained_takes_a_complete_override(folder):
    model = AutoModel.from_pretrained(folder, attention_pattern="sliding_window", window_radius=3)
    assert (model.config.attention_pattern, model.config.window_radius) == ("sliding_window", 3)


def misspellings(name):
    """`name` with one letter dropped, or two neighbours swapped."""
    dropped = {name[:i] + name[i + 1 :] for i in range(len(name))}
    swapped = {name[:i] + name[i + 1] + name[i] + name[i + 2 :] for i in range(len(name) - 1)}
    return sorted((dropped | swapped) - set(OWN))


class TestMisspelt:
    @pytest.mark.parametrize("name", OWN)
    def test_misspelt_option_is_refused_with_the_nearest_name(self, name):
        accepted, without_hint = [], []
        for misspelt in misspellings(name):
            try:
                SelfAttnConfig(**SMALL, **{misspelt: 1})
            except TypeError as error:
                rule, _, hint = str(error).partition("Did you mean ")
                if f"has no option {misspelt!r}, got {misspelt}=1" not in rule or repr(name) not in hint:
                    without_hint.append((misspelt, str(error)))
            else:
                accepted.append(misspelt)
        assert (accepted, without_hint) == ([], [])

    def test_misspelt_option_in_a_file_is_refused(self, folder, tmp_path):
        with pytest.raises(TypeError, match=r"no option 'window_radios', got window_radios=3. Did.*'window_radius'"):
            loaded({"window_radios": 3}, folder, tmp_path)

    @pytest.mark.parametrize("auto_class", [AutoConfig, AutoModel], ids=lambda cls: cls.__name__)
    def test_misspelt_override_is_refused(self, auto_class, folder):
        with pytest.raises(TypeError, match="Did you mean 'attention_pattern'"):
            auto_class.from_pretrained(folder, attention_patern="full")


def contents(config):
    """Everything in a config but the folder that it was read from."""
    return {name: value for name, value in config.to_dict().items() if name != "_name_or_path"}


# What transformers and libraries around it put into the config of any model.
LIBRARY_KEYS = {
    "num_labels": 3,
    "id2label": {0: "no", 1: "yes"},
    "label2id": {"no": 0, "yes": 1},
    "problem_type": "regression",
    "architectures": ["SelfAttnModel"],
    "attn_implementation": "eager",
    "experts_implementation": None,
    "dtype": "bfloat16",
    "torch_dtype": "bfloat16",
    "rope_theta": 500.0,
    "output_attentions": True,
    "output_hidden_states": True,
    "return_dict": False,
    "use_cache": False,
    "chunk_size_feed_forward": 0,
    "is_encoder_decoder": False,
    "is_decoder": False,
    "add_cross_attention": False,
    "tie_last_hidden_states": True,
    "transformers_version": "5.0.0",
    "_name_or_path": "someone/something",
    "name_or_path": "someone/something",
    "_commit_hash": "0123",
    "_attn_implementation_autoset": True,
    "tokenizer_class": "PreTrainedTokenizerFast",
    "task_specific_params": {"fill-mask": {"top_k": 3}},
    "custom_pipelines": {"own": {"impl": "own.Pipeline", "pt": ["AutoModel"]}},
    "quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True},
    "compression_config": {"format": "dense"},
    "cls_token_id": 1,
    "sep_token_id": 2,
    "mask_token_id": 3,
    "unk_token_id": 4,
    "decoder_start_token_id": 1,
    "finetuning_task": "sst2",
    "gradient_checkpointing": False,
    "pruned_heads": {},
    "prefix": None,
    "torchscript": False,
    "max_length": 20,
    "num_beams": 1,
    "do_sample": False,
    "sentence_transformers": {"version": "5.0.0", "activation_fn": "torch.nn.modules.linear.Identity"},
    "transformers.js_config": {"dtype": "fp32"},
    "unsloth_version": "2026.1",
    "model_max_length": 512,
    "language": "en",
    "per_layer_config": None,
}


@pytest.mark.parametrize("name", LIBRARY_KEYS)
def test_key_of_the_library_is_let_through(name, tmp_path):
    config = SelfAttnConfig(**SMALL, **{name: LIBRARY_KEYS[name]})
    config.save_pretrained(tmp_path)
    assert contents(AutoConfig.from_pretrained(tmp_path)) == contents(config)


def test_keys_of_the_library_have_their_meaning():
    config = SelfAttnConfig(**SMALL, num_labels=3, torch_dtype="bfloat16", rope_theta=500.0)
    assert (config.num_labels, config.dtype) == (3, torch.bfloat16)
    assert config.rope_parameters["rope_theta"] == 500.0


@pytest.mark.parametrize("position", sorted(POSITIONS))
def test_an_old_file_without_rope_scaling_says_so_with_null(position, folder, tmp_path):
    options = {"position_encoding": position, "max_position_embeddings": 9, "rope_scaling": None}
    loaded(options, folder, tmp_path)


EVERY_OPTION = {
    "vocab_size": 31,
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "value_head_dim": 3,
    "intermediate_size": 20,
    "embedding_size": 12,
    "type_vocab_size": 2,
    "max_position_embeddings": 40,
    "score_function": "cosine",
    "temperature": 0.25,
    "learned_temperature": False,
    "attention_pattern": ["sliding_window", "longformer", "bigbird"],
    "causal": True,
    "qk_norm": True,
    "logit_softcap": 30,
    "attention_sink": True,
    "window_radius": [2, 3, None],
    "dilation": [2, None, None],
    "num_global_tokens": 2,
    "global_projections": True,
    "block_size": 8,
    "block_radius": 0,
    "num_global_blocks": [None, None, 3],
    "num_random_blocks": 1,
    "random_blocks_seed": 7,
    "position_encoding": "rotary",
    "rope_parameters": {"rope_theta": 500.0, "rope_type": "default"},
    "attention_bias": True,
    "norm_position": "post",
    "norm_type": "rms_norm",
    "norm_eps": 1e-6,
    "norm_bias": False,
    "first_layer_norm": True,
    "embedding_norm": False,
    "mlp_type": "plain",
    "mlp_bias": True,
    "hidden_act": "relu",
    "attention_dropout": 0.1,
    "hidden_dropout": 0.2,
    "embedding_dropout": 0.3,
    "classifier_dropout": 0,
    "head_type": "bert",
    "pooling": "max",
    "tie_word_embeddings": False,
    "initializer_range": 0.01,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": [2, 3],
}
"""A value for every option but those of NOT_WITH_THOSE, most of them not the default."""

NOT_WITH_THOSE = {
    "attention_pattern": "sliding_window",
    "window_radius": 3,
    "causal": True,
    "memory_length": 5,
    "position_encoding": "t5",
    "relative_num_buckets": 8,
    "relative_max_distance": 20,
    "norm_bias": True,
    "first_layer_norm": False,
}

NOR_WITH_THESE = {"attention_bias": True, "initial_offsets": [-1, 0]}


class TestRoundTrip:
    def test_the_tables_above_name_every_option(self):
        assert set(EVERY_OPTION) | set(NOT_WITH_THOSE) | set(NOR_WITH_THESE) == set(OWN)

    @pytest.mark.parametrize(
        "options",
        [SMALL, EVERY_OPTION, {**SMALL, **NOT_WITH_THOSE}, {**SMALL, **NOR_WITH_THESE}],
        ids=["defaults", "every-option", "the-others", "and-more"],
    )
    def test_json(self, options, tmp_path):
        config = SelfAttnConfig(**options, num_labels=3)
        config.save_pretrained(tmp_path)
        for cls in (SelfAttnConfig, AutoConfig):
            again = cls.from_pretrained(tmp_path)
            assert type(again) is SelfAttnConfig
            assert contents(again) == contents(config)
            assert {name: getattr(again, name) for name in options} == options

    @pytest.mark.parametrize(
        "again",
        [lambda c: SelfAttnConfig(**c.to_dict()), copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))],
        ids=["to_dict", "deepcopy", "pickle"],
    )
    def test_in_memory(self, again):
        config = SelfAttnConfig(**EVERY_OPTION)
        assert again(config).to_dict() == config.to_dict()

    def test_none_stays_none_so_that_overrides_change_what_follows_from_it(self, tmp_path):
        SelfAttnConfig(**SMALL).save_pretrained(tmp_path)
        config = SelfAttnConfig.from_pretrained(tmp_path, hidden_size=64)
        assert (config.query_key_dim, config.value_dim, config.embedding_width) == (32, 32, 64)
        assert config.feed_forward_size == 192


def test_every_option_is_documented_once():
    """The class docstring names each option at the beginning of a line, several with one text parted by commas."""
    lines = re.findall(r"^ {8}([a-z_]+(?:, [a-z_]+)*): \S", SelfAttnConfig.__doc__, flags=re.MULTILINE)
    documented = [name for line in lines for name in line.split(", ")]
    assert sorted(documented) == sorted(OWN)


def test_every_default_is_accepted():
    config = SelfAttnConfig()
    config.validate()
    assert config.score_function in SCORES
    assert config.attention_pattern in PATTERNS
    assert config.position_encoding in POSITIONS


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, {"query_key_dim": 8, "value_dim": 8, "num_groups": 2, "embedding_width": 16}),
        ({"head_dim": 6}, {"query_key_dim": 6, "value_dim": 6}),
        ({"value_head_dim": 5}, {"query_key_dim": 8, "value_dim": 5}),
        ({"head_dim": 6, "value_head_dim": 5}, {"query_key_dim": 6, "value_dim": 5}),
        ({"num_key_value_heads": 1}, {"num_groups": 1}),
        ({"embedding_size": 12}, {"embedding_width": 12}),
        ({"mlp_type": "plain"}, {"feed_forward_size": 64}),
        ({"mlp_type": "gated"}, {"feed_forward_size": 64}),  # 8 * 16 / 3 = 42.7
        ({"mlp_type": "gated", "hidden_size": 48}, {"feed_forward_size": 128}),  # 128 exactly
        ({"mlp_type": "gated", "hidden_size": 256}, {"feed_forward_size": 704}),  # 682.7
        ({"mlp_type": "gated", "intermediate_size": 20}, {"feed_forward_size": 20}),
        ({"mlp_type": "plain", "intermediate_size": 20}, {"feed_forward_size": 20}),
    ],
    ids=as_id,
)
def test_derived_sizes(options, expected):
    config = SelfAttnConfig(**{**SMALL, **options})
    assert {name: getattr(config, name) for name in expected} == expected


class TestOutputAttentions:
    @pytest.mark.parametrize("kernel", list(KERNELS))
    def test_weights_are_asked_for_by_the_config_with_any_kernel(self, kernel):
        config = SelfAttnConfig(**SMALL, output_attentions=True, attn_implementation=kernel)
        model = SelfAttnModel(config).eval()
        assert model.config._attn_implementation == kernel
        with torch.no_grad():
            (first, second) = model(torch.tensor([[1, 2, 3]])).attentions
        assert first.shape == second.shape == (1, 2, 3, 3)

    @pytest.mark.parametrize("kernel", list(KERNELS))
    def test_assignment_keeps_the_kernel(self, kernel):
        model = SelfAttnModel._from_config(SelfAttnConfig(**SMALL), attn_implementation=kernel)
        model.config.output_attentions = True
        assert (model.config.output_attentions, model.config._attn_implementation) == (True, kernel)

    def test_without_a_name_the_default_kernel_stays(self):
        config = SelfAttnConfig(**SMALL)
        config.output_attentions = True
        assert SelfAttnModel(config).config._attn_implementation == default_kernel(SelfAttnConfig(**SMALL))

    def test_it_survives_a_file(self, tmp_path):
        SelfAttnConfig(**SMALL, output_attentions=True).save_pretrained(tmp_path)
        assert AutoConfig.from_pretrained(tmp_path).output_attentions is True
