import hashlib
import importlib.metadata
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from datasets import Dataset
from huggingface_hub import EvalResult, ModelCard
from PIL import Image
from transformers import AutoModelForMaskedLM, BertConfig, BertForMaskedLM

from hf_selfattn import SelfAttnConfig, SelfAttnModel
from hf_selfattn.patterns import layer_patterns
from hf_selfattn.tools.card import CELLS, PICTURED, hash_of_rows, pattern_picture, write_card
from hf_selfattn.tools.curve import draw_training_curve, points
from hf_selfattn.tools.pretraining import PretrainingArguments
from hf_selfattn.tools.sources import SourceArguments
from hf_selfattn.tools.training import ScriptArguments

from .train_scripts import ROOT, tiny_model_folder

METRICS = {"loss": 1.25, "accuracy": 0.1 + 0.2, "masked_tokens": 12345, "tiny": 1e-17, "third": np.float32(1) / 3}
SMALL = {"vocab_size": 43, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}


def write(folder, model=None, steps=-1, arguments=None, **changes):
    model = AutoModelForMaskedLM.from_pretrained(tiny_model_folder()) if model is None else model
    arguments = {"output_dir": str(folder), "max_steps": steps, "use_cpu": True, "bf16": False, **(arguments or {})}
    told = {"pipeline_tag": "fill-mask", "data_name": "/somewhere/here/corpus.txt", "metrics": METRICS,
            "data_sizes": {"train": 9000, "validation": 100}, "curve": "training_curve.png"}  # fmt: skip
    write_card(folder, model=model, arguments=ScriptArguments(**arguments), **{**told, **changes})
    return ModelCard.load(Path(folder, "README.md"))


def section(card, heading):
    return card.text.split(f"\n## {heading}\n")[1].split("\n## ")[0].strip()


@pytest.mark.parametrize("steps", [-1, 500])
def test_a_card_that_the_hub_can_read(tmp_path, steps):
    card = write(tmp_path, steps=steps, base_model=tiny_model_folder())
    assert card.data.pipeline_tag == "fill-mask"
    assert card.data.library_name == "transformers"
    assert "| masked_tokens | 12,345 |" in card.text
    assert "9,000 train, 100 validation" in card.text
    assert "AutoModelForMaskedLM.from_pretrained" in card.text
    assert ("| max_steps | 500 |" in card.text) == (steps > 0)
    assert ("| num_train_epochs | 3 |" in card.text) == (steps < 0)
    assert "| bf16 | False |" in card.text
    assert "| lr_scheduler_type | linear |" in card.text
    assert "/somewhere" not in card.content
    assert str(Path(tiny_model_folder()).parent) not in card.content


def test_results_come_back_exactly(tmp_path):
    metrics = {**METRICS, "not a number": float("nan"), "endless": float("inf"), "in_words": "good", "yes": True}
    card = write(tmp_path, metrics=metrics, data_name="owner/data", data_config="en")
    common = {"task_type": "fill-mask", "dataset_type": "owner/data", "dataset_name": "data", "dataset_config": "en",
              "dataset_split": "validation"}  # fmt: skip
    assert card.data.eval_results == [
        EvalResult(**common, metric_type=name, metric_value=float(value) if name == "third" else value)
        for name, value in METRICS.items()
    ]
    again = ModelCard(str(card))
    assert again.data.to_dict() == card.data.to_dict()


@pytest.mark.parametrize(
    ("name", "shown", "on_hub"),
    [
        ("owner/data", "owner/data", ["owner/data"]),
        ("docstrings", "docstrings", None),
        ("../data/sst2", "sst2", None),
        ("/home/me/a.txt, /home/me/b.txt", "a.txt, b.txt", None),
        (r"C:\me\corpus", "corpus", None),
        ("tests/conftest.py", "conftest.py", None),
    ],
)
def test_data_on_the_hub_and_here(tmp_path, monkeypatch, name, shown, on_hub):
    monkeypatch.chdir(ROOT)
    card = write(tmp_path, data_name=name)
    assert card.data.datasets == on_hub
    assert section(card, "Data") == f"`{shown}` (9,000 train, 100 validation rows)."


@pytest.mark.parametrize(
    ("base_model", "named", "on_hub"),
    [("owner/model", "`owner/model`", "owner/model"), ("/home/me/runs/mine", "`mine`", None), (None, "random", None)],
)
def test_the_model_it_starts_from(tmp_path, base_model, named, on_hub):
    card = write(tmp_path, base_model=base_model)
    assert card.data.base_model == on_hub
    assert named in card.text.split("## ")[0]
    assert "/home" not in card.content


def test_name_language_and_license(tmp_path):
    arguments = {"hub_model_id": "ann/encoder", "hub_token": "hf_secret", "push_to_hub": False}
    card = write(tmp_path, arguments=arguments, language="en", license="apache-2.0", limits="Short texts only.")
    assert (card.data.model_name, card.data.language, card.data.license) == ("encoder", "en", "apache-2.0")
    assert 'from_pretrained("ann/encoder", trust_remote_code=True)' in card.text
    assert 'AutoModelForMaskedLM.from_pretrained("ann/encoder")' in card.text
    assert section(card, "Limits").startswith("Short texts only.\n")
    assert "hf_secret" not in card.content


def test_the_recipe_is_what_was_changed(tmp_path):
    arguments = {"learning_rate": 1e-3, "lr_scheduler_type": "cosine",
                 "resume_from_checkpoint": "/home/me/x", "hub_token": "hf_secret"}  # fmt: skip
    source = SourceArguments(train_file=["/home/me/corpus.txt", "more.txt"], max_eval_samples=10)
    card = write(tmp_path, arguments=arguments, options=[source])
    recipe = yaml.safe_load(section(card, "Training").split("```yaml\n")[1].split("```")[0])
    assert {"learning_rate": 1e-3, "lr_scheduler_type": "cosine", "use_cpu": True}.items() <= recipe.items()
    assert {"train_file": ["corpus.txt", "more.txt"], "max_eval_samples": 10}.items() <= recipe.items()
    assert not {"output_dir", "train_split", "resume_from_checkpoint", "hub_token", "num_train_epochs"} & set(recipe)
    assert str(tmp_path) not in card.content
    assert "/home" not in card.content
    assert "hf_secret" not in card.content


def test_masking_and_activation_are_named_where_they_are_the_defaults_too(tmp_path):
    card = write(tmp_path, options=[PretrainingArguments(random_replace_prob=0.2)])
    training = section(card, "Training")
    assert "| mlm_probability | 0.3 |" in training
    assert "| mask_replace_prob | 0.8 |" in training
    assert "| random_replace_prob | 0.2 |" in training
    assert "| mlp_type | gated |" in section(card, "Model")
    assert "| hidden_act | silu |" in section(card, "Model")


def test_what_it_was_made_with(tmp_path):
    (tmp_path / "all_results.json").write_text(json.dumps({"train_runtime": 1800.0, "train_loss": 2.5, "epoch": 3.0}))
    card = write(tmp_path)
    assert f"| torch | {importlib.metadata.version('torch')} |" in section(card, "Made with")
    assert "| commit of the code | " in section(card, "Made with")
    assert "| hardware | " in section(card, "Made with")
    assert "| hours | 0.5 |" in section(card, "Training")
    assert "| training loss | 2.5 |" in section(card, "Training")


class TestAttention:
    def test_four_choices(self, tmp_path):
        options = {"attention_pattern": ["full", "sliding_window", "full"], "window_radius": [None, 20, None],
                   "score_function": "cosine", "temperature": 0.5, "position_encoding": "alibi",
                   "causal": True}  # fmt: skip
        model = AutoModelForMaskedLM.from_config(SelfAttnConfig(**SMALL, **options), attn_implementation="eager")
        told = section(write(tmp_path, model=model), "Attention")
        assert "| score | `cosine` (temperature 0.5) |" in told
        windows = "`sliding_window` (window_radius 20, dilation 1) in layer 2"
        assert f"| pattern | `full` in layers 1, 3; {windows}, causal |" in told
        assert "| position | `alibi` |" in told
        assert "| kernel | `eager` in this run" in told
        assert told.count("```") == 4

    @pytest.mark.parametrize(
        "options",
        [
            {"attention_pattern": "full"},
            {"attention_pattern": "full", "causal": True},
            {"attention_pattern": "sliding_window", "window_radius": 20},
            {"attention_pattern": "sliding_window", "window_radius": 5, "dilation": 3},
            {"attention_pattern": "longformer", "window_radius": 40, "num_global_tokens": 3},
            {"attention_pattern": "longformer", "window_radius": 40, "global_projections": True},
            {"attention_pattern": "bigbird", "block_size": 16},
        ],
        ids=str,
    )
    def test_the_picture_is_what_weights_are(self, options):
        """A cell is empty where the attention weights of a real forward are all zero, and 1 where none is."""
        config = SelfAttnConfig(**{**SMALL, "num_hidden_layers": 1}, **options)
        model = SelfAttnModel(config).eval()
        ids = torch.randint(43, (1, PICTURED), generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            weights = model(ids, output_attentions=True).attentions[0][0, 0]
        size = PICTURED // CELLS
        share = (weights > 0).float().reshape(CELLS, size, CELLS, size).mean((1, 3))
        expected = [["1" if x == 1 else "." if x == 0 else "+" for x in row] for row in share.tolist()]
        found = [line.split(" ") for line in pattern_picture(layer_patterns(config)[0], config).splitlines()]
        assert found == expected

    def test_other_models_have_no_such_section(self, tmp_path):
        sizes = {**SMALL, "intermediate_size": 16, "max_position_embeddings": 32}
        card = write(tmp_path, model=BertForMaskedLM(BertConfig(**sizes)))
        assert "## Attention" not in card.text
        assert "at most 32 tokens" in section(card, "Limits")


class TestHashOfRows:
    def test_of_values(self):
        rows = Dataset.from_dict({"text": ["a", "ü"], "label": [0, 1]})
        lines = '{"label": 0, "text": "a"}\n{"label": 1, "text": "ü"}\n'
        assert hash_of_rows(rows) == hashlib.sha256(lines.encode()).hexdigest()

    def test_of_nothing_but_values_in_order(self):
        rows = Dataset.from_dict({"text": [str(n) for n in range(3000)], "n": list(range(3000))})
        turned = rows.select_columns(["n", "text"]).select(range(2999, -1, -1))
        assert hash_of_rows(rows) == hash_of_rows(turned.select(range(2999, -1, -1)))
        assert hash_of_rows(rows) == hash_of_rows(rows.with_format("torch"))
        assert hash_of_rows(rows) != hash_of_rows(turned)
        assert hash_of_rows(rows) != hash_of_rows(rows.select(range(2999)))


def test_the_template_is_such_a_card(tmp_path):
    """model_card.md shows a filled example: what it has, a written card has, and the Hub reads it."""
    template, written = ModelCard.load(ROOT / "model_card.md"), write(tmp_path)
    headings = [[line for line in card.text.splitlines() if line.startswith("## ")] for card in (template, written)]
    assert [heading for heading in headings[0] if heading in headings[1]] == headings[1]
    assert template.data.eval_results
    assert template.data.pipeline_tag == "fill-mask"
    for result in template.data.eval_results:
        assert f"| {result.metric_type} | " in section(template, "Results on the validation data")


def test_the_curve_is_a_picture(tmp_path):
    history = [{"step": 1, "loss": 3.0}, {"step": 2, "eval_loss": 2.5, "eval_accuracy": 0.1}, {"step": 2, "loss": 2.0}]
    assert points(history, "loss") == ([1, 2], [3.0, 2.0])
    draw_training_curve(history, tmp_path / "curve.png", baseline={"eval_loss": 4.0})
    draw_training_curve([], tmp_path / "empty.png")
    for name in ("curve.png", "empty.png"):
        assert Image.open(tmp_path / name).width > 500
