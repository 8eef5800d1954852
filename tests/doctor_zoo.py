"""Models, configs, data and recipes that are broken in one place each, and what the doctor must say of them.

An animal is made in an empty folder from a healthy one by changing one thing, and returns the arguments of `examine`.
"""

import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoConfig,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    BertConfig,
    RobertaConfig,
    TrainingArguments,
)
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from hf_selfattn.tools.tokenizer import save_tokenizer, train_tokenizer

from . import doctor_zoo_model
from .train_scripts import TINY, sentences, tiny_model_folder, tiny_tokenizer, write_rows, write_texts

SIZES = {
    "vocab_size": len(tiny_tokenizer()),
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "pad_token_id": 0,
}
NAMES = {"id2label": {0: "cold", 1: "warm", 2: "hot"}, "label2id": {"cold": 0, "warm": 1, "hot": 2}}


class Animal(NamedTuple):
    """One broken thing.

    Attributes:
        make: (empty folder) -> arguments of `examine`.
        errors, warnings: the checks that find it, all of them.
        what: a pattern in what the first of these says.
    """

    make: Callable
    errors: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    what: str = ""


ZOO: dict[str, Animal] = {}


def animal(errors=(), warnings=(), what=""):
    """Puts a maker into the ZOO."""

    def put(make):
        ZOO[make.__name__] = Animal(make, *(((x,) if isinstance(x, str) else x) for x in (errors, warnings)), what)
        return make

    return put


# Healthy ones


def saved(folder, auto_class, config, tokenizer=None):
    torch.manual_seed(0)
    auto_class.from_config(config).save_pretrained(folder)
    save_tokenizer(tiny_tokenizer() if tokenizer is None else tokenizer, folder)
    return {"name": folder}


def ours(folder):
    shutil.copytree(tiny_model_folder(), folder, dirs_exist_ok=True)
    return {"name": folder}


def our_classifier(folder, **options):
    return saved(
        folder, AutoModelForSequenceClassification, AutoConfig.for_model("selfattn", **SIZES, **NAMES, **options)
    )


def bert(folder):
    set_in(
        saved(folder, AutoModelForMaskedLM, BertConfig(**SIZES, max_position_embeddings=64))["name"],
        "tokenizer_config.json",
        model_max_length=64,
    )
    return {"name": folder}


def remote(folder, *changes):
    """Remote code; changes are pairs of a line's part and what stands there instead."""
    torch.manual_seed(0)
    tokenizer = train_tokenizer(sentences(300), vocab_size=420, progress=False)
    tokenizer.model_max_length = 40
    doctor_zoo_model.ZooForMaskedLM(doctor_zoo_model.ZooConfig(vocab_size=len(tokenizer))).save_pretrained(folder)
    save_tokenizer(tokenizer, folder)
    path = Path(folder, "doctor_zoo_model.py")
    code = path.read_text(encoding="utf-8")
    for before, after in changes:
        assert code.count(before) == 1, before
        code = code.replace(before, after)
    path.write_text(code, encoding="utf-8")
    return {"name": folder, "trust_remote_code": True}


@cache
def texts():
    """Different sentences."""
    return tuple(sorted(set(sentences(600))))


def labelled(folder, train=slice(0, 200), validation=slice(200, 250), names=("cold", "warm", "hot")):
    rows = [{"text": text, "label": names[i % len(names)]} for i, text in enumerate(texts())]
    return {
        "data": write_rows(folder / "train.jsonl", rows[train]),
        "validation_data": write_rows(folder / "validation.jsonl", rows[validation]),
        "label_column": "label",
    }


def classifier_with_data(folder, **options):
    return {**our_classifier(folder / "model"), **labelled(folder, **options)}


def pretraining(folder, validation=slice(300, 340), **options):
    recipe = {
        "train_file": [write_texts(folder / "train.txt", texts()[:300])],
        "validation_file": [write_texts(folder / "validation.txt", texts()[validation])],
        "tokenizer_vocab_size": 420,
        "config_overrides": TINY,
        "max_seq_length": 32,
        "max_steps": 20,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-3,
        "warmup_steps": 5,
        "output_dir": str(folder / "out"),
        "report_to": "none",
        **options,
    }
    Path(folder, "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return {"name": folder / "recipe.yaml"}


def streaming(folder):
    return pretraining(folder, streaming=True)


def finetuning(folder, **options):
    data = labelled(folder)
    recipe = {
        "task": "text-classification",
        "train_file": [data["data"]],
        "validation_file": [data["validation_data"]],
        "model_name_or_path": tiny_model_folder(),
        "num_train_epochs": 2,
        "per_device_train_batch_size": 8,
        "learning_rate": 5e-4,
        "output_dir": str(folder / "out"),
        "report_to": "none",
        **options,
    }
    Path(folder, "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return {"name": folder / "recipe.yaml"}


# Tools to break them with


def set_in(folder, file, **values):
    path = Path(folder, file)
    content = json.loads(path.read_text(encoding="utf-8")) | values
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not None}), encoding="utf-8")


def change_weights(folder, change):
    path = Path(folder, "model.safetensors")
    weights = change(load_file(path))
    save_file({name: x.contiguous() for name, x in weights.items()}, path, metadata={"format": "pt"})


# Tokenizers


@animal(errors="vocabulary", what="2 tokens have ids from 420 up")
def tokens_added_after_training(folder):
    tokenizer = train_tokenizer(sentences(300), vocab_size=420, progress=False)
    tokenizer.add_tokens(["quark", "gluon"])
    save_tokenizer(tokenizer, ours(folder)["name"])
    return {"name": folder}


@animal(errors="special tokens", what="no mask token")
def no_mask_token(folder):
    set_in(ours(folder)["name"], "tokenizer_config.json", mask_token=None)
    return {"name": folder}


@animal(errors="special tokens", what="pad token has id 0 in the tokenizer, and 7")
def another_pad_id_in_the_config(folder):
    set_in(ours(folder)["name"], "config.json", pad_token_id=7)
    return {"name": folder}


@animal(errors="special tokens", what="occurs in ordinary texts")
def pad_token_is_a_letter(folder):
    set_in(ours(folder)["name"], "tokenizer_config.json", pad_token="e")
    set_in(folder, "config.json", pad_token_id=tiny_tokenizer().convert_tokens_to_ids("e"))
    return {"name": folder}


@animal(errors="frame", what="puts none round a text")
def no_special_tokens_round_a_text(folder):
    set_in(ours(folder)["name"], "tokenizer.json", post_processor=None)
    return {"name": folder}


@animal(errors="length", what="allows 128 tokens .* 64 positions")
def more_tokens_than_positions(folder):
    config = AutoConfig.for_model("selfattn", **SIZES, position_encoding="learned", max_position_embeddings=64)
    saved(folder, AutoModelForMaskedLM, config)
    set_in(folder, "tokenizer_config.json", model_max_length=128)
    return {"name": folder}


@animal(errors="length", warnings=("accumulation", "no labels"), what="64 tokens .* 63 positions .1 rows")
def roberta_without_room_for_its_offset(folder):
    saved(folder, AutoModelForMaskedLM, RobertaConfig(**SIZES, max_position_embeddings=64, type_vocab_size=1))
    set_in(folder, "tokenizer_config.json", model_max_length=64)
    return {"name": folder}


@animal(errors="inputs", what="0 to 1, and the model has 0 token types")
def token_types_that_the_model_lacks(folder):
    tokenizer = train_tokenizer(sentences(300), vocab_size=420, token_type_ids=True, progress=False)
    save_tokenizer(tokenizer, ours(folder)["name"])
    return {"name": folder}


def remote_with_token_types(folder, *changes):
    arguments = remote(folder, *changes)
    set_in(folder, "tokenizer_config.json", model_input_names=["input_ids", "token_type_ids", "attention_mask"])
    return arguments


@animal(errors="inputs", what="gives token_type_ids, which ZooForMaskedLM does not take")
def a_column_that_the_model_does_not_take(folder):
    return remote_with_token_types(folder, ("num_items_in_batch=None, **kwargs)", "num_items_in_batch=None)"))


@animal(errors="inputs", what="fails: TypeError: no token types here")
def a_column_that_the_model_refuses(folder):
    line = "        visible = torch.ones"
    strict = "        if 'token_type_ids' in kwargs:\n            raise TypeError('no token types here')\n"
    return remote_with_token_types(folder, (line, strict + line))


@animal(errors="texts survive", what="lower-cases")
def lower_casing_before_a_cased_vocabulary(folder):
    capitals = [text.title() for text in sentences(300)]
    saved(
        folder,
        AutoModelForMaskedLM,
        AutoConfig.for_model("selfattn", **SIZES),
        train_tokenizer(capitals, vocab_size=420, progress=False),
    )
    set_in(folder, "tokenizer.json", normalizer={"type": "Lowercase"})
    return {"name": folder}


# Files and weights


@animal(errors="code", what=r"attention\.py is not in the folder")
def a_file_of_code_is_missing(folder):
    Path(ours(folder)["name"], "attention.py").unlink()
    return {"name": folder}


@animal(warnings="code", what="1 files of the saved code differ")
def code_that_was_changed(folder):
    with open(Path(ours(folder)["name"], "losses.py"), "a", encoding="utf-8") as file:
        file.write("\n# changed\n")
    return {"name": folder}


@animal(errors="code", what="no entry for SelfAttnForMaskedLM")
def a_partial_auto_map(folder):
    path = Path(ours(folder)["name"], "config.json")
    auto_map = json.loads(path.read_text(encoding="utf-8"))["auto_map"]
    set_in(folder, "config.json", auto_map={k: v for k, v in auto_map.items() if k != "AutoModelForMaskedLM"})
    return {"name": folder}


@animal(errors="private", what="access token")
def an_access_token_in_the_record(folder):
    token = "hf_" + "abcDEF123" * 4
    Path(ours(folder)["name"], "run.json").write_text(json.dumps({"hub_token": token}), encoding="utf-8")
    return {"name": folder}


@animal(errors="private", what="training_args.bin holds what looks like an access token")
def an_access_token_in_the_pickled_arguments(folder):
    arguments = TrainingArguments("out", hub_token="hf_" + "abcDEF123" * 4)
    torch.save(arguments, Path(ours(folder)["name"], "training_args.bin"))
    return {"name": folder}


@animal(warnings="format", what="pickled")
def pickled_weights(folder):
    path = Path(ours(folder)["name"], "model.safetensors")
    torch.save(load_file(path), path.with_name("pytorch_model.bin"))
    path.unlink()
    return {"name": folder}


@animal(errors="opening", what="cut short")
def weights_cut_short(folder):
    path = Path(ours(folder)["name"], "model.safetensors")
    path.write_bytes(path.read_bytes()[:-100])
    return {"name": folder}


@animal(errors="names of weights", what=r"1 weights .* not in the file.*q_proj")
def a_weight_is_missing(folder):
    change_weights(
        ours(folder)["name"], lambda w: {n: x for n, x in w.items() if "layers.1.attention.q_proj.weight" not in n}
    )
    return {"name": folder}


@animal(errors="names of weights", what="another shape")
def fewer_classes_in_the_file(folder):
    our_classifier(folder)
    change_weights(folder, lambda w: {n: x[:2] if n.startswith("classifier.") else x for n, x in w.items()})
    return {"name": folder}


@animal(errors="weights", what="NaN")
def a_diverged_training(folder):
    change_weights(ours(folder)["name"], lambda w: {n: x * torch.nan if "layers.1" in n else x for n, x in w.items()})
    return {"name": folder}


@animal(errors="weights", what="one and the same number")
def a_matrix_of_zeros(folder):
    change_weights(
        ours(folder)["name"], lambda w: {n: x * 0 if "layers.0.attention.k_proj" in n else x for n, x in w.items()}
    )
    return {"name": folder}


@animal(errors="tying", what="two different matrices")
def said_to_be_tied_and_is_not(folder):
    change_weights(ours(folder)["name"], lambda w: {**w, "lm_head.weight": torch.randn(SIZES["vocab_size"], 32)})
    return {"name": folder}


@animal(warnings="dtype", what="says dtype float32, and the weights are bfloat16")
def another_dtype_in_the_config(folder):
    change_weights(ours(folder)["name"], lambda w: {n: x.bfloat16() for n, x in w.items()})
    return {"name": folder}


@animal(errors="opening", what="config.json is refused: .*ValueError: hidden_size .*num_attention_heads")
def a_config_that_is_refused(folder):
    set_in(ours(folder)["name"], "config.json", num_attention_heads=3)
    return {"name": folder}


@animal(errors="opening", what="config.json is refused: .*hidden_size.*TypeError: .*expected int, got str")
def a_config_with_a_word_for_a_number(folder):
    set_in(ours(folder)["name"], "config.json", hidden_size="wide")
    return {"name": folder}


@animal(errors="forward", what="plain batch .*ValueError: memory_length goes with SelfAttnModel")
def a_memory_below_a_head(folder):
    config = AutoConfig.for_model(
        "selfattn", **SIZES, causal=True, memory_length=8, position_encoding="transformer_xl"
    )
    return saved(folder, AutoModelForMaskedLM, config)


# Labels and data


@animal(errors="label names", what="not the inverse")
def label2id_is_not_the_inverse(folder):
    our_classifier(folder)
    set_in(folder, "config.json", label2id={"cold": 0, "warm": 2, "hot": 1})
    return {"name": folder}


@animal(errors="labels", what="none of the model's 3 classes, as 'boiling'")
def labels_that_the_model_does_not_know(folder):
    return classifier_with_data(folder, names=("cold", "warm", "hot", "boiling"))


@animal(warnings="labels", what="No row of the train data has the class 'hot'")
def a_class_without_a_row(folder):
    return classifier_with_data(folder, names=("cold", "warm"))


@animal(errors="overlap", what="50 of 50 validation texts are in the training data")
def validation_rows_in_the_training_data(folder):
    return classifier_with_data(folder, validation=slice(0, 50))


@animal(warnings="texts", what="20 of 200 texts of the train data are empty")
def empty_texts(folder):
    arguments = classifier_with_data(folder)
    rows = [json.loads(line) for line in Path(arguments["data"]).read_text(encoding="utf-8").splitlines()]
    write_rows(arguments["data"], [{**row, "text": row["text"] if i % 10 else ""} for i, row in enumerate(rows)])
    return arguments


@animal(warnings="texts", what="100 of 200 texts of the train data stand there before")
def each_text_twice(folder):
    arguments = classifier_with_data(folder)
    lines = Path(arguments["data"]).read_text(encoding="utf-8").splitlines(keepends=True)
    Path(arguments["data"]).write_text("".join(lines[:100] * 2), encoding="utf-8")
    return arguments


@animal(warnings="contradictions", what="5 training texts have several labels")
def equal_texts_with_other_labels(folder):
    arguments = classifier_with_data(folder)
    rows = [json.loads(line) for line in Path(arguments["data"]).read_text(encoding="utf-8").splitlines()]
    write_rows(arguments["data"], rows + [{**row, "label": "cold"} for row in rows if row["label"] == "warm"][:5])
    return arguments


# Other people's code


@animal(errors="padding", what="attention_mask 0 are attended to")
def a_line_that_forgets_the_mask(folder):
    return remote(folder, ("        scores = scores.masked_fill(~visible[:, None, None], -1e9)\n", ""))


@animal(errors="padding", warnings=("accumulation", "no labels"), what="attention_mask 0 are attended to")
def a_kernel_without_its_mask(folder):
    def unmasked(module, query, key, value, attention_mask, scaling=None, **kwargs):
        return torch.nn.functional.scaled_dot_product_attention(query, key, value, scale=scaling).transpose(1, 2), None

    AttentionInterface.register("unmasked", unmasked)  # and not in AttentionMaskInterface
    return {**bert(folder), "attn_implementation": "unmasked"}


@animal(errors="kernel", warnings=("accumulation", "no labels"), what="'rescaled' gives other numbers than 'eager'")
def a_kernel_with_another_scale(folder):
    def rescaled(module, query, key, value, attention_mask, scaling=None, **kwargs):
        attended = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, attention_mask, scale=2 * scaling
        )
        return attended.transpose(1, 2), None

    AttentionInterface.register("rescaled", rescaled)
    AttentionMaskInterface.register("rescaled", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    return {**bert(folder), "attn_implementation": "rescaled"}


@animal(warnings="empty row", what="padding alone are NaN")
def a_softmax_over_nothing(folder):
    return remote(folder, ("~visible[:, None, None], -1e9", "~visible[:, None, None], -torch.inf"))


@animal(errors="forward", what="NaN or infinite")
def answers_that_are_infinite(folder):
    return remote(folder, ("self.lm_head(self.norm(x))", "self.lm_head(self.norm(x)) / torch.zeros(1)"))


@animal(errors="buffers", what="garbage from from_pretrained: layers.0.slopes, layers.1.slopes")
def a_buffer_that_nobody_fills(folder):
    return remote(folder, ("isinstance(module, ZooLayer)", "False"))


@animal(errors="buffers", what="on the meta device")
def a_tensor_that_stays_on_meta(folder):
    line = "        self.heads, self.dropout ="
    return remote(folder, (line, "        self.table = torch.arange(4)\n" + line))


@animal(errors="buffers", what="drawn at random")
def a_buffer_that_is_drawn_and_not_saved(folder):
    return remote(
        folder,
        ("torch.linspace(0.1, 0.4, self.heads)", "torch.rand(self.heads)"),
        ("torch.linspace(0.1, 0.4, module.heads)", "torch.rand(module.heads)"),
    )


@animal(errors="repeatable", what="other answers the second time")
def dropout_that_is_never_off(folder):
    return remote(
        folder,
        (
            "F.dropout(self.out(attended), self.dropout, training=self.training)",
            "F.dropout(self.out(attended), self.dropout)",
        ),
    )


@animal(errors="direction", what="no later token")
def an_encoder_that_looks_back_only(folder):
    line = "        attended ="
    causal = "        scores = scores.masked_fill(places > places[:, None], -1e9)\n"
    return remote(folder, (line, causal + line))


@animal(errors="order", what="in another order a text has the same answers")
def positions_without_effect(folder):
    return remote(
        folder, ("- self.slopes[", "- 0 * self.slopes["), ("self.positions(places)", "self.positions(0 * places)")
    )


@animal(warnings="accumulation", what="4 accumulation steps .* times those of the same batch at once")
def a_loss_that_ignores_the_count(folder):
    return remote(folder, (" if num_items_in_batch is None else num_items_in_batch", ""))


@animal(warnings="no labels", what="the loss nan")
def a_loss_without_labels_is_nan(folder):
    return remote(folder, ("torch.as_tensor(count).clamp(min=1)", "count"))


@animal(errors="gradients", what="No weight may learn")
def a_forward_that_freezes_the_model(folder):
    return remote(folder, ("        logits =", "        self.requires_grad_(False)\n        logits ="))


@animal(errors="overfitting", warnings="gradients", what="cannot be overfitted")
def a_forward_that_freezes_the_head(folder):
    return remote(folder, ("        logits =", "        self.lm_head.requires_grad_(False)\n        logits ="))


@animal(warnings="gradients", what="26 weights take no part in the loss: layers.0.mlp.0.bias")
def an_encoder_that_is_cut_off(folder):
    return remote(folder, ("self.lm_head(self.norm(x))", "self.lm_head(self.norm(x.detach()))"))


@animal(errors="overfitting", what="cannot be overfitted")
def labels_in_another_order(folder):
    return remote(
        folder, ("labels.flatten(), reduction", "labels[:, torch.randperm(labels.shape[1])].flatten(), reduction")
    )


@animal(errors="gradients", what="NaN or infinity")
def a_gradient_of_nan(folder):
    return remote(folder, ("self.lm_head(self.norm(x))", "self.lm_head(self.norm(x) + (x.sum() * 0).sqrt())"))


@animal(warnings="gradients", what="1 weights take no part .*extra")
def a_weight_that_nobody_uses(folder):
    unused = "        self.extra = nn.Linear(5, 7, bias=False)\n        self.post_init()\n"
    arguments = remote(folder, ("        self.post_init()\n", unused))
    change_weights(folder, lambda w: {**w, "extra.weight": torch.randn(7, 5)})
    return arguments


@animal(errors="saving", what="answers are not")
def an_option_that_is_not_in_the_config(folder):
    line = "        self.heads, self.dropout ="
    counted = "        ZooLayer.made = getattr(ZooLayer, 'made', 0) + 1\n        self.scale = 1 + ZooLayer.made\n"
    return remote(folder, (line, counted + line), ("/ query.shape[-1] ** 0.5", "* self.scale"))


# Recipes


@animal(errors="recipe", what="learning_rat.*Did you mean")
def a_misspelt_option(folder):
    return pretraining(folder, learning_rat=1e-3)


@animal(errors="recipe", what="64 positions")
def rows_longer_than_the_positions(folder):
    return pretraining(
        folder, max_seq_length=128, config_overrides=f"{TINY},position_encoding=learned,max_position_embeddings=64"
    )


@animal(errors="recipe", what="--unigram_bias gives a new model .* which is trained")
def first_values_for_a_trained_model(folder):
    return pretraining(folder, unigram_bias=True, model_name_or_path=tiny_model_folder(), config_overrides=None)


@animal(errors="recipe", what="--neighbour_vectors .*--streaming reads no text before")
def counts_of_a_stream_that_nobody_has_read(folder):
    return pretraining(folder, neighbour_vectors=0.08, streaming=True)


@animal(errors="steps", what="warm-up is 100 steps and the training 20")
def a_warm_up_longer_than_the_training(folder):
    return pretraining(folder, warmup_steps=100)


@animal(warnings="steps", what="is read .* times")
def a_few_rows_read_for_ever(folder):
    return pretraining(folder, max_steps=5000)


@animal(warnings="learning rate", what="0.5")
def a_learning_rate_far_too_high(folder):
    return pretraining(folder, learning_rate=0.5)


@animal(errors="overlap", what="40 of 40")
def evaluation_on_the_training_texts(folder):
    return pretraining(folder, validation=slice(0, 40))


@animal(errors="accumulation", warnings="no labels", what="4 accumulation steps")
def stock_bert_with_accumulation(folder):
    return pretraining(
        folder,
        gradient_accumulation_steps=4,
        per_device_train_batch_size=2,
        config_overrides=f"{TINY},model_type=bert",
    )


@animal(errors="memory", warnings="steps", what="GiB")
def a_model_larger_than_the_machine(folder):
    return pretraining(folder, per_device_train_batch_size=2**24)


@animal(warnings="initial loss", what="a loss of")
def an_initial_loss_far_from_guessing(folder):
    return pretraining(folder, config_overrides=f"{TINY},initializer_range=1.0")


@animal(errors="batch", what="No token and no row of the first batch has a label")
def a_masking_rate_of_almost_nothing(folder):
    return pretraining(folder, mlm_probability=1e-6)


@animal(warnings="learning rate", what="trained model")
def a_learning_rate_that_forgets(folder):
    return finetuning(folder, learning_rate=5e-3)


@animal(errors="recipe", what="not a folder")
def a_model_that_is_not_there(folder):
    return finetuning(folder, model_name_or_path=str(folder / "nothing"))


@animal(warnings="truncation", what="of the texts have more than 5 tokens")
def rows_too_short_for_the_texts(folder):
    return finetuning(folder, max_seq_length=5, long_texts="truncate")
