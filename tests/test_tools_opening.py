import copy
import json

import pytest
from transformers import AutoConfig, AutoTokenizer, TrainingArguments

from hf_selfattn.tools.opening import (
    ModelArguments,
    check_source_of_model,
    fit_inputs,
    new_config,
    open_config,
    parse_overrides,
    prepare_tokenizer,
)
from hf_selfattn.tools.tokenizer import save_tokenizer

from .train_scripts import tiny_model_folder, tiny_tokenizer


def test_overrides_are_read_as_json_where_they_can_be():
    text = 'a=1, b=0.5,c=1e-5,d=full,e=[1, 2],f={"g": 3, "h": [4]},i=True,j=None,k=true,l="7"'
    assert parse_overrides(text) == {
        "a": 1,
        "b": 0.5,
        "c": 1e-5,
        "d": "full",
        "e": [1, 2],
        "f": {"g": 3, "h": [4]},
        "i": True,
        "j": None,
        "k": True,
        "l": "7",
    }
    assert parse_overrides(None) == parse_overrides("") == {}
    for bad in ("a", "a=", "=1", "a=1,b"):
        with pytest.raises(ValueError, match='--config_overrides is written "name=value,name=value", got'):
            parse_overrides(bad)


def test_a_new_configuration_from_json_and_overrides(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2}))
    config = new_config(ModelArguments(config_file=str(path), config_overrides="num_hidden_layers=3"), vocab_size=99)
    assert (config.model_type, config.hidden_size, config.num_hidden_layers, config.vocab_size) == (
        "selfattn",
        64,
        3,
        99,
    )
    bert = new_config(ModelArguments(config_overrides="model_type=bert,hidden_size=24,num_attention_heads=2"))
    assert (bert.model_type, bert.hidden_size) == ("bert", 24)


def test_a_tokenizer_gives_the_vocabulary():
    config = open_config(ModelArguments(), tiny_tokenizer())
    assert (config.vocab_size, config.pad_token_id) == (len(tiny_tokenizer()), 0)


@pytest.mark.parametrize("option", ["tokenizer_name", "model_name_or_path"])
def test_a_vocabulary_size_beside_a_tokenizer_is_warned_of(option, caplog, tmp_path):
    training, folder = TrainingArguments(output_dir=str(tmp_path)), {option: tiny_model_folder()}
    size = len(tiny_tokenizer())
    for asked in ({}, {"tokenizer_vocab_size": size}):
        assert len(prepare_tokenizer(ModelArguments(**folder, **asked), training, [])) == size
    assert not caplog.text
    prepare_tokenizer(ModelArguments(**folder, tokenizer_vocab_size=9000), training, [])
    assert "--tokenizer_vocab_size 9,000 has no effect" in caplog.text
    assert f"{tiny_model_folder()} has one, of {size} tokens" in caplog.text
    caplog.clear()
    prepare_tokenizer(ModelArguments(tokenizer_vocab_size=9000), training, [], resume_from=tiny_model_folder())
    assert not caplog.text


def test_a_saved_models_options_may_be_changed():
    arguments = ModelArguments(model_name_or_path=tiny_model_folder(), config_overrides="attention_dropout=0.25")
    assert open_config(arguments, tiny_tokenizer()).attention_dropout == 0.25


def test_bad_configurations_are_refused(tmp_path):
    broken = tmp_path / "broken.json"
    broken.write_text('{"hidden_size": ')
    for arguments, error, message in (
        (
            {"config_overrides": "hiden_size=64"},
            ValueError,
            "'hiden_size' is not an option of SelfAttnConfig. Did you mean 'hidden_size'",
        ),
        (
            {"config_overrides": "model_type=bret"},
            ValueError,
            "model_type 'bret' is unknown to transformers. Did you mean 'bert'",
        ),
        ({"config_file": str(tmp_path / "none.json")}, FileNotFoundError, "none.json' is not a file"),
        ({"config_file": str(broken)}, ValueError, "broken.json' is not readable as JSON"),
    ):
        with pytest.raises(error, match=message):
            new_config(ModelArguments(**arguments))


def test_a_model_that_is_not_there_is_refused(tmp_path):
    check_source_of_model(ModelArguments(model_name_or_path=tiny_model_folder()))
    with pytest.raises(FileNotFoundError, match="is not a folder here, and the Hub does not give it"):
        check_source_of_model(ModelArguments(model_name_or_path="runs/nothing-of-this-name"))
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        check_source_of_model(ModelArguments(model_name_or_path=str(tmp_path / "none")))
    with pytest.raises(FileNotFoundError, match=r"is not a checkpoint: it has no config.json"):
        check_source_of_model(ModelArguments(model_name_or_path=str(tmp_path)))
    with pytest.raises(ValueError, match="brings its own configuration, and --config_file is given too"):
        check_source_of_model(ModelArguments(model_name_or_path=tiny_model_folder(), config_file="x.json"))


def test_the_tokenizer_is_fitted_to_what_the_model_reads(tmp_path):
    tokenizer = copy.deepcopy(tiny_tokenizer())
    fit_inputs(tokenizer, AutoConfig.for_model("selfattn", type_vocab_size=2, max_position_embeddings=64))
    save_tokenizer(tokenizer, tmp_path)
    saved = AutoTokenizer.from_pretrained(tmp_path)
    assert saved.model_max_length == 64
    assert saved.model_input_names == ["input_ids", "token_type_ids", "attention_mask"]
    fit_inputs(saved, AutoConfig.for_model("selfattn"))
    save_tokenizer(saved, tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path).model_input_names == ["input_ids", "attention_mask"]
