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
    "norm_bias",
    "first_layer_norm",
    "embedding_norm",
    "mlp_bias",
    "tie_word_embeddings",
]
CHOICES = {
    "norm_position": ("pre", "post"),
    "norm_type": ("layer_norm", "rms_norm"),
    "mlp_type": ("plain", "gated"),
    "head_type": ("bert", "roberta", "distilbert", "modernbert"),
    "pooling": ("first", "mean", "max"),
}

WRONG_TYPES = {
    **{key: ["16", 16.0, True, None, [16]] for key in COUNTS},
    **{key: ["16", 16.0, True, [16]] for key in COUNTS_OR_NONE},
    "type_vocab_size": ["2", 2.0, True, None],
    **{key: ["0.1", True, None, [0.1]] for key in RATES},
    **{key: ["1e-5", True, None] for key in ["norm_eps", "initializer_range"]},
    **{key: [1, 0, "true", None] for key in FLAGS},
    **{key: ["last", "Pre", 1, None] for key in CHOICES},
    **{key: [1, None, ["rotary"]] for key in ["score_function", "position_encoding", "hidden_act"]},
    "attention_pattern": [1, None, ("full", "full"), ["full", 1], {"0": "full"}],
    "window_radius": ["3", 3.0, True, [3, "3"], (3, 3)],
    "rope_parameters": ["default", 10_000.0, [10_000.0]],
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
        before = getattr(config, name)
        with pytest.raises(StrictDataclassFieldValidationError, match=f"'{name}'"):
            setattr(config, name, value)
        assert getattr(config, name) == before

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
]
BAD = [
    *AT_LEAST_1,
    *FROM_0_TO_1,
    *ABOVE_0,
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
        {"attention_pattern": "sliding_window", "window_radius": [3, 3, 3]},
        "window_radius as a list has one entry per layer, got 3 entries for num_hidden_layers=2. Give one for each",
    ),
    (
        {"attention_pattern": "sliding_window"},
        "'sliding_window' needs window_radius.*>= 1, got None. Set window_radius=64.*or attention_pattern='full'",
    ),
    ({"attention_pattern": "sliding_window", "window_radius": 0}, "needs window_radius.*>= 1, got 0. Set"),
    ({"attention_pattern": "sliding_window", "window_radius": [2, -1]}, "needs window_radius.*>= 1, got -1. Set"),
    (
        {"attention_pattern": ["full", "sliding_window"], "window_radius": [3, None]},
        "needs window_radius.*>= 1, got None. Set",
    ),
    (
        {"window_radius": 3},
        r"window_radius=3 has no effect.*\('sliding_window'\), got 'full'. Set that pattern, or window_radius=None",
    ),
    ({"head_dim": 5}, "'rotary' turns pairs and needs an even head_dim, got 5"),
    (
        {"rope_parameters": {"rope_theta": 1e4, "factor": 2.0}},
        "rope_parameters knows 'rope_theta' and 'rope_type': 'default', got .*'factor': 2.0.*Leave the other",
    ),
    ({"rope_parameters": {"rope_type": "yarnn"}}, "rope_parameters knows .* got .*'yarnn'.*Leave the other"),
    ({"rope_parameters": {"rope_theta": 0}}, "rope_theta.*got"),
    ({"rope_parameters": {"rope_theta": -1e4}}, "rope_theta.*got"),
    ({"rope_parameters": {"rope_theta": "many"}}, "rope_theta.*got"),
    (
        {"position_encoding": "none", "rope_parameters": {"rope_theta": 1e4}},
        "rope_parameters=.*no effect with position_encoding 'none'. Set position_encoding='rotary', or rope_param",
    ),
    (
        {"position_encoding": "learned"},
        "'learned' needs max_position_embeddings.*got None. Set max_position_embeddings=512",
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
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "value_head_dim": 3,
    "intermediate_size": 20,
    "embedding_size": 12,
    "type_vocab_size": 2,
    "max_position_embeddings": 40,
    "score_function": "scaled_dot_product",
    "attention_pattern": ["full", "sliding_window"],
    "causal": True,
    "window_radius": [None, 3],
    "position_encoding": "rotary",
    "rope_parameters": {"rope_theta": 500.0, "rope_type": "default"},
    "attention_bias": True,
    "norm_position": "post",
    "norm_type": "rms_norm",
    "norm_eps": 1e-6,
    "norm_bias": True,
    "first_layer_norm": False,
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


class TestRoundTrip:
    def test_the_table_above_names_every_option(self):
        assert set(EVERY_OPTION) == set(OWN)

    @pytest.mark.parametrize("options", [SMALL, EVERY_OPTION], ids=["defaults", "every-option"])
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
        assert SelfAttnModel(config).config._attn_implementation == next(iter(KERNELS))

    def test_it_survives_a_file(self, tmp_path):
        SelfAttnConfig(**SMALL, output_attentions=True).save_pretrained(tmp_path)
        assert AutoConfig.from_pretrained(tmp_path).output_attentions is True
