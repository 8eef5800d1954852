from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from PIL import Image
from transformers import AutoModelForMaskedLM

from hf_selfattn.tools.card import write_card
from hf_selfattn.tools.curve import draw_training_curve, points
from hf_selfattn.tools.training import ScriptArguments

from .train_scripts import tiny_model_folder


@pytest.mark.parametrize("steps", [-1, 500])
def test_a_card_that_the_hub_can_read(tmp_path, steps):
    model = AutoModelForMaskedLM.from_pretrained(tiny_model_folder())
    arguments = ScriptArguments(output_dir=str(tmp_path), max_steps=steps, use_cpu=True, bf16=False)
    write_card(
        tmp_path,
        model=model,
        arguments=arguments,
        pipeline_tag="fill-mask",
        data_name="/somewhere/here/corpus.txt",
        metrics={"loss": 1.25, "accuracy": 0.5, "masked_tokens": 12345},
        data_sizes={"train": 9000, "validation": 100},
        base_model=tiny_model_folder(),
        curve="training_curve.png",
    )
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.pipeline_tag == "fill-mask"
    assert card.data.library_name == "transformers"
    assert {r.metric_type: r.metric_value for r in card.data.eval_results}["accuracy"] == 0.5
    assert "| masked_tokens | 12,345 |" in card.text
    assert "9,000 train, 100 validation" in card.text
    assert "AutoModelForMaskedLM.from_pretrained" in card.text
    assert ("| max_steps | 500 |" in card.text) == (steps > 0)
    assert ("| num_train_epochs | 3 |" in card.text) == (steps < 0)
    assert "| bf16 | False |" in card.text
    assert "| lr_scheduler_type | linear |" in card.text
    assert "/somewhere" not in card.content
    assert str(Path(tiny_model_folder()).parent) not in card.content


def test_the_curve_is_a_picture(tmp_path):
    history = [{"step": 1, "loss": 3.0}, {"step": 2, "eval_loss": 2.5, "eval_accuracy": 0.1}, {"step": 2, "loss": 2.0}]
    assert points(history, "loss") == ([1, 2], [3.0, 2.0])
    draw_training_curve(history, tmp_path / "curve.png", baseline={"eval_loss": 4.0})
    draw_training_curve([], tmp_path / "empty.png")
    for name in ("curve.png", "empty.png"):
        assert Image.open(tmp_path / name).width > 500
