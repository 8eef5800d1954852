"""The doctor finds what is broken in each animal of the zoo, and nothing in healthy models and recipes."""

import gc
import json
import re
import subprocess
import sys

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForMultipleChoice,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BartConfig,
    BertForPreTraining,
    DistilBertConfig,
    GPT2Config,
    ModernBertConfig,
    TrainingArguments,
    ViTConfig,
    XLMConfig,
    XLNetConfig,
)
from transformers.utils import logging

from hf_selfattn.tools.doctor import CHECKS, Finding, diagnose, examine, main
from hf_selfattn.tools.doctor_attention import check_order
from hf_selfattn.tools.doctor_opening import add_data, open_checkpoint
from hf_selfattn.tools.doctor_weights import check_names

from . import doctor_zoo
from .doctor_zoo import NAMES, SIZES, ZOO, saved, set_in
from .hub_server import LARGE_SUFFIXES, File, Hub, Repository
from .train_scripts import ROOT, environment, script


@pytest.fixture(autouse=True, scope="module")
def quick_collections():
    """The stock Trainer collects garbage after each training, which takes long where all of transformers is loaded."""
    gc.freeze()
    yield
    gc.unfreeze()


TRAINED = {check.name for check in CHECKS if check.trains}


def severe(findings, severity):
    return sorted({finding.check for finding in findings if finding.severity == severity})


@pytest.mark.parametrize("name", ZOO)
def test_each_broken_thing_is_found_by_the_check_that_it_concerns(name, tmp_path):
    broken = ZOO[name]
    folder = tmp_path / name
    folder.mkdir()
    found = {*broken.errors, *broken.warnings}
    findings = examine(**broken.make(folder), quick=not found & TRAINED)
    told = "\n".join(map(str, findings))
    assert (severe(findings, "error"), severe(findings, "warning")) == (
        sorted(broken.errors),
        sorted(broken.warnings),
    ), told
    main_check = (broken.errors or broken.warnings)[0]
    assert any(re.search(broken.what, finding.what) for finding in findings if finding.check == main_check), told
    assert all(finding.remedy for finding in findings)


def test_every_check_has_an_animal():
    found = {check for broken in ZOO.values() for check in broken.errors + broken.warnings}
    only_notes = {"documents", "portable"}  # of stock models, below
    assert {check.name for check in CHECKS} - found == only_notes


def test_the_documentation_names_every_check():
    text = (ROOT / "docs" / "doctor.md").read_text(encoding="utf-8").split("## The checks")[1]
    rows = re.findall(r"^\| ([a-z ,]+) \|", text, flags=re.MULTILINE)
    assert rows == ["check", "opening, recipe", *(check.name for check in CHECKS)]


OURS = {
    "cosine, bigbird, alibi": (
        AutoModelForMaskedLM,
        {"score_function": "cosine", "attention_pattern": "bigbird", "block_size": 4, "position_encoding": "alibi"},
    ),
    "additive, longformer, learned": (
        AutoModelForMaskedLM,
        {
            "score_function": "additive",
            "attention_pattern": "longformer",
            "window_radius": 3,
            "position_encoding": "learned",
            "max_position_embeddings": 64,
        },
    ),
    "sliding window, rotary, untied": (
        AutoModelForMaskedLM,
        {"attention_pattern": "sliding_window", "window_radius": 2, "tie_word_embeddings": False},
    ),
    "no positions": (AutoModelForMaskedLM, {"position_encoding": "none", "hidden_dropout": 0.1}),
    "causal": (AutoModelForMaskedLM, {"causal": True, "norm_position": "post", "position_encoding": "sinusoidal"}),
    "encoder, t5": (AutoModel, {"position_encoding": "t5"}),
    "classifier, transformer_xl": (
        AutoModelForSequenceClassification,
        {"position_encoding": "transformer_xl", "pooling": "mean", **NAMES},
    ),
    "several labels": (
        AutoModelForSequenceClassification,
        {"problem_type": "multi_label_classification", "pooling": "max", **NAMES},
    ),
    "regression": (AutoModelForSequenceClassification, {"num_labels": 1, "problem_type": "regression"}),
    "tagger": (AutoModelForTokenClassification, NAMES),
    "answers": (AutoModelForQuestionAnswering, {}),
    "choices": (AutoModelForMultipleChoice, {}),
}


@pytest.mark.parametrize("name", OURS)
def test_nothing_is_found_in_healthy_models_of_ours(name, tmp_path):
    auto_class, options = OURS[name]
    saved(tmp_path, auto_class, AutoConfig.for_model("selfattn", **SIZES, **options))
    if "max_position_embeddings" in options:
        set_in(tmp_path, "tokenizer_config.json", model_max_length=64)
    assert examine(tmp_path) == []


HEALTHY = ("classifier_with_data", "pretraining", "streaming", "finetuning")


@pytest.mark.parametrize("name", HEALTHY)
def test_nothing_is_found_in_healthy_data_and_recipes(name, tmp_path):
    assert examine(**getattr(doctor_zoo, name)(tmp_path)) == []
    assert not (tmp_path / "out").exists()


def test_nothing_is_found_in_what_a_script_writes(tmp_path, capsys):
    script("pretrain").main([str(doctor_zoo.pretraining(tmp_path, max_steps=3, num_shown=0, warmup_steps=1)["name"])])
    assert (tmp_path / "out" / "training_args.bin").is_file()
    assert examine(tmp_path / "out") == []


def test_pickled_arguments_that_name_a_home(tmp_path):
    torch.save(TrainingArguments("/home/ann/runs/first"), doctor_zoo.ours(tmp_path)["name"] / "training_args.bin")
    findings = examine(tmp_path, quick=True)
    assert [(finding.severity, finding.check) for finding in findings] == [("note", "private")]
    assert "names folders of this machine (/home/ann" in findings[0].what


@pytest.mark.slow
def test_nothing_is_found_in_the_quickstart():
    """Reads the documentation of all packages installed here, minutes where that is not cached."""
    assert examine(ROOT / "train/recipes/quickstart.yaml") == []


FRAME = {"bos_token_id": 2, "cls_token_id": 2, "eos_token_id": 3, "sep_token_id": 3}
_SMALL = {"vocab_size": SIZES["vocab_size"], "pad_token_id": 0}
_TINY = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
_TINY_BART = {
    **_SMALL,
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
}
STOCK = {
    "bert": (
        doctor_zoo.BertConfig(**SIZES, max_position_embeddings=64),
        "accumulation, no labels",
        "padding, documents",
    ),
    "distilbert": (
        DistilBertConfig(**_SMALL, dim=32, n_layers=2, n_heads=2, hidden_dim=48, max_position_embeddings=64),
        "accumulation, no labels",
        "padding, documents",
    ),
    "roberta": (
        doctor_zoo.RobertaConfig(**SIZES, max_position_embeddings=65, type_vocab_size=1),
        "accumulation, no labels",
        "documents",
    ),
    "modernbert": (
        ModernBertConfig(**SIZES, **FRAME, max_position_embeddings=64, local_attention=6),
        "no labels",
        "documents",
    ),
    "gpt2": (
        GPT2Config(**_SMALL, n_embd=32, n_layer=2, n_head=2, n_positions=64),
        "no labels",
        "padding, documents",
    ),
    "xlnet": (
        XLNetConfig(**_SMALL, d_model=32, n_layer=2, n_head=2, d_inner=48),
        "accumulation, gradients, no labels",
        "documents",
    ),
    "xlm": (
        XLMConfig(
            n_words=SIZES["vocab_size"],
            pad_token_id=0,
            mask_token_id=4,
            emb_dim=32,
            n_layers=2,
            n_heads=2,
            max_position_embeddings=64,
        ),
        "accumulation, no labels",
        "padding, documents",
    ),
}
"""Stock models: (config, what is warned of, what is noted). All of it is true of them: docs/doctor.md."""


@pytest.mark.parametrize("name", STOCK)
def test_what_is_said_of_healthy_stock_models(name, tmp_path):
    config, warned, noted = STOCK[name]
    auto_class = AutoModelForCausalLM if name in ("gpt2", "xlnet") else AutoModelForMaskedLM
    saved(tmp_path, auto_class, config)
    set_in(tmp_path, "config.json", **FRAME)
    set_in(tmp_path, "tokenizer_config.json", model_max_length=64, tokenizer_class="TokenizersBackend")
    findings = examine(tmp_path)
    told = "\n".join(map(str, findings))
    assert severe(findings, "error") == [], told
    assert severe(findings, "warning") == sorted(warned.split(", ")), told
    assert severe(findings, "note") == sorted([*noted.split(", "), "portable"]), told


def test_a_healthy_model_with_code_of_its_own(tmp_path):
    findings = examine(**doctor_zoo.remote(tmp_path / "a_healthy_animal"))
    assert [(finding.severity, finding.check) for finding in findings] == [("note", "documents")]


def test_worst_first_and_the_exit_status(tmp_path, capsys):
    doctor_zoo.bert(tmp_path)
    set_in(tmp_path, "config.json", pad_token_id=7)
    assert main([str(tmp_path), "--json", str(tmp_path / "findings.json")]) == 1
    printed = capsys.readouterr()
    places = [printed.out.index(word) for word in ("ERROR [special tokens]", "WARNING [", "NOTE [")]
    assert places == sorted(places)
    assert printed.out.count("Remedy: ") == printed.out.count("[")
    told = [line for line in printed.err.splitlines() if re.search(r" \(\d+\.\d s\)$", line)]
    assert [line.split("  ")[0] for line in told] == [check.name for check in CHECKS]
    told = json.loads((tmp_path / "findings.json").read_text(encoding="utf-8"))
    assert told["checks"]["vocabulary"] == "ok"
    assert told["checks"]["batch"] == "left out: no recipe"
    assert [Finding(**finding) for finding in told["findings"]] == examine(tmp_path)


def test_quick_trains_nothing(tmp_path, capsys, monkeypatch):
    def train(*args):
        raise AssertionError("trained")

    monkeypatch.setattr("hf_selfattn.tools.doctor_training.copy_without_dropout", train)
    doctor_zoo.ours(tmp_path)
    assert main([str(tmp_path), "--quick"]) == 0
    printed = capsys.readouterr()
    assert printed.out.strip() == f"{tmp_path}: nothing found"
    assert printed.err.count("left out: --quick") == sum(check.trains for check in CHECKS) == 5


def test_a_check_that_fails_is_a_finding(tmp_path):
    line = "        visible = torch.ones"
    strict = "        assert attention_mask is None or attention_mask.all()\n"
    findings = examine(**doctor_zoo.remote(tmp_path / "fails_when_padded", (line, strict + line)), quick=True)
    assert [(f.severity, f.check) for f in findings][:2] == [("warning", "padding"), ("warning", "empty row")]
    assert re.search(
        r"could not be checked: AssertionError: no message \(doctor_zoo_model.py, line \d+\)", findings[0].what
    )


def test_a_name_on_the_hub(tmp_path):
    folder = doctor_zoo.another_pad_id_in_the_config(tmp_path)["name"]
    hub = Hub({})
    hub.repositories["ann/broken"] = Repository("ann", private=False)
    files = {path.name: File(path.read_bytes(), path.suffix in LARGE_SUFFIXES) for path in folder.iterdir()}
    hub.repositories["ann/broken"].commit("main", files, "Upload")
    both = "[main([name, '--quick']) for name in ('ann/broken', 'ann/not-there', 'not a name')]"
    code = f"from hf_selfattn.tools.doctor import main; print({both})"
    with hub.serve() as endpoint:
        here = {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_DISABLE_XET": "1"}
        told = subprocess.run(
            [sys.executable, "-c", code], env={**environment(), **here}, capture_output=True, text=True
        )
    assert told.stdout.splitlines()[-1:] == ["[1, 2, 2]"], told.stderr
    assert "ERROR [special tokens] The pad token has id 0 in the tokenizer, and 7 in config.json." in told.stdout
    for name in ("ann/not-there", "not a name"):
        unknown = f"{name} cannot be examined: {name!r} is not a folder here, and the Hub does not give it: "
        assert unknown in told.stderr


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("nothing", "is not a folder"),
        ("empty", "no config.json"),
        ("recipe.yaml", "is not a file"),
        ("list.yaml", "mapping"),
    ],
)
def test_what_cannot_be_opened(name, what, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "list.yaml").write_text("- 1\n")
    assert main([str(tmp_path / name)]) == 2
    assert what in capsys.readouterr().err


@pytest.mark.parametrize(
    ("config", "what"),
    [
        (BartConfig(**_TINY_BART), "is_encoder_decoder .*'bart'"),
        (ViTConfig(**_TINY, image_size=16, patch_size=8), "ViTModel reads pixel_values"),
    ],
    ids=["bart", "vit"],
)
def test_what_is_no_encoder_or_decoder_of_token_ids_is_refused(config, what, tmp_path, capsys):
    AutoModel.from_config(config).save_pretrained(tmp_path)
    assert main([str(tmp_path)]) == 2
    assert re.search(what, capsys.readouterr().err)


def test_columns_that_are_not_there_or_hold_no_text(tmp_path):
    arguments = doctor_zoo.classifier_with_data(tmp_path)
    rows = [{"text": "a", "length": 1, "words": ["a", "b"], "label": "cold"}]
    arguments["data"] = doctor_zoo.write_rows(tmp_path / "few.jsonl", rows)
    for options, what in (
        ({"label_column": "lable"}, "--label_column: there is no column 'lable'.*Did you mean 'label'"),
        ({"text_columns": ["txt"]}, "--text_columns: there is no column 'txt'"),
        ({"text_columns": ["text", "length"]}, r"--text_columns: column 'length' holds Value\('int64'\), not text"),
        ({"text_columns": ["words"]}, "--text_columns: there is no column 'words'"),  # in the validation data
    ):
        with pytest.raises(ValueError, match=what):
            examine(**{**arguments, **options})
    examination = open_checkpoint(arguments["name"])
    add_data(examination, arguments["data"], text_columns=["words"])
    assert (examination.texts("train"), examination.label_column) == (["a b"], None)


def test_a_model_with_few_positions_is_examined_within_them(tmp_path):
    config = AutoConfig.for_model("selfattn", **SIZES, position_encoding="learned", max_position_embeddings=4)
    saved(tmp_path, AutoModelForMaskedLM, config)
    set_in(tmp_path, "tokenizer_config.json", model_max_length=4)
    assert examine(tmp_path) == []


@pytest.mark.parametrize("seed", range(3))
def test_the_order_is_seen_in_small_new_models_that_judge_whole_texts(seed, tmp_path):
    torch.manual_seed(seed)
    for auto_class in (AutoModelForMultipleChoice, AutoModelForSequenceClassification):
        config = AutoConfig.for_model("selfattn", **{**SIZES, "hidden_size": 16, "num_hidden_layers": 1})
        auto_class.from_config(config).save_pretrained(tmp_path)
        assert list(check_order(open_checkpoint(tmp_path))) == []


def test_positions_without_effect_below_a_head_that_judges_whole_texts(tmp_path):
    model = AutoModelForSequenceClassification.from_config(doctor_zoo.BertConfig(**SIZES))
    torch.nn.init.zeros_(model.bert.embeddings.position_embeddings.weight)
    model.save_pretrained(tmp_path)
    (found,) = check_order(open_checkpoint(tmp_path))
    assert found.severity == "error"


def test_weights_of_other_heads_are_a_note(tmp_path):
    BertForPreTraining(doctor_zoo.BertConfig(**SIZES)).save_pretrained(tmp_path)
    (found,) = check_names(open_checkpoint(tmp_path))
    assert found.severity == "note"
    assert "4 weights in the file are of a pooler or a head that BertForMaskedLM does not have" in found.what


def test_options_that_do_not_go_together(tmp_path):
    recipe = doctor_zoo.pretraining(tmp_path)["name"]
    with pytest.raises(ValueError, match="A recipe says itself what its data is, got --data too"):
        examine(recipe, data="train.jsonl")
    with pytest.raises(ValueError, match="--label_column goes with --data"):
        examine(doctor_zoo.ours(tmp_path / "model")["name"], label_column="label")
    with pytest.raises(FileNotFoundError, match=r"pretrain\.py' is not there.*--scripts"):
        examine(recipe, scripts=tmp_path)


def test_the_model_is_left_as_it_was(tmp_path):
    examination = open_checkpoint(doctor_zoo.ours(tmp_path)["name"])
    before = {name: x.clone() for name, x in examination.model.state_dict().items()}
    random_state, verbosity = torch.get_rng_state(), logging.get_verbosity()
    diagnose(examination)
    assert all(torch.equal(x, before[name]) for name, x in examination.model.state_dict().items())
    assert not examination.model.training
    assert torch.equal(torch.get_rng_state(), random_state)
    assert logging.get_verbosity() == verbosity
    assert not torch.are_deterministic_algorithms_enabled()
