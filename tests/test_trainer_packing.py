"""The stock Trainer with packed rows: the curve of a training is that of padded rows."""

import json
import os
import socket

import pytest
import torch
from datasets import Dataset
from torch import multiprocessing
from transformers import (
    AutoConfig,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    Trainer,
    TrainingArguments,
)

from hf_selfattn.tools.collators import MaskingCollator, PaddingCollator
from hf_selfattn.tools.packed_rows import PackedRows, PackingCollator
from hf_selfattn.tools.training import Rows

from .processes import join_two
from .test_tools_collators import rows_of
from .train_scripts import tiny_tokenizer

STEPS = 3
ROW_LENGTH = 64
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24, "num_labels": 5}
HEADS = {
    "masked_lm": (AutoModelForMaskedLM, lambda row: {}),
    "token_classification": (
        AutoModelForTokenClassification,
        lambda row: {"labels": [i % 5 if i % 3 else -100 for i in range(len(row["input_ids"]))]},
    ),
    "text_classification": (AutoModelForSequenceClassification, lambda row: {"labels": row["example_id"] % 5}),
}


def documents(head, count=8 * STEPS):
    rows = [{"input_ids": row["input_ids"], **HEADS[head][1](row)} for row in rows_of(count)]
    return Rows(Dataset.from_list([{**row, "length": len(row["input_ids"])} for row in rows]))


def trainer_of(head, folder, packed, rows=None, batch_size=8, accumulation=1, **options):
    """The stock Trainer on `rows`, with the collator that packs or with the one that pads."""
    torch.manual_seed(0)
    config = AutoConfig.for_model("selfattn", vocab_size=len(tiny_tokenizer()), pad_token_id=0, **SIZES)
    collator = MaskingCollator(tiny_tokenizer(), 0.3) if head == "masked_lm" else PaddingCollator(tiny_tokenizer())
    arguments = {
        "per_device_train_batch_size": batch_size,
        "gradient_accumulation_steps": accumulation,
        "max_steps": STEPS,
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "remove_unused_columns": False,
        "use_cpu": True,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "seed": 0,
        **options,
    }
    rows = documents(head) if rows is None else rows
    return Trainer(
        HEADS[head][0].from_config(config),
        TrainingArguments(str(folder), **arguments),
        train_dataset=rows,
        eval_dataset=rows,
        data_collator=PackingCollator(collator, ROW_LENGTH) if packed else collator,
    )


def train(*args, **kwargs):
    """(loss, gradient norm) of each step, as the Trainer logs them."""
    trainer = trainer_of(*args, **kwargs)
    trainer.train()
    return [(log["loss"], log["grad_norm"]) for log in trainer.state.log_history if "grad_norm" in log]


def assert_same_curve(actual, expected):
    assert len(actual) == len(expected) == STEPS
    for step, (one, other) in enumerate(zip(actual, expected, strict=True)):
        assert one == pytest.approx(other, rel=1e-5), f"step {step}"


@pytest.mark.parametrize("head", HEADS)
class TestOneProcess:
    @pytest.mark.parametrize(
        ("batch_size", "accumulation", "options"),
        [
            (8, 1, {}),
            (2, 4, {}),
            (4, 2, {"dataloader_num_workers": 1}),
            (8, 1, {"accelerator_config": {"split_batches": True}}),
        ],
        ids=["8", "2x4", "4x2_workers", "split_batches"],
    )
    def test_packing_does_not_change_the_curve(self, head, batch_size, accumulation, options, tmp_path):
        padded = train(head, tmp_path, False)
        assert_same_curve(train(head, tmp_path, True, None, batch_size, accumulation, **options), padded)

    def test_evaluation_gives_the_same_loss(self, head, tmp_path):
        losses = [trainer_of(head, tmp_path, packed).evaluate()["eval_loss"] for packed in (False, True)]
        assert losses[1] == pytest.approx(losses[0], rel=1e-5)

    def test_packed_rows_train(self, head, tmp_path):
        rows = PackedRows(documents(head), ROW_LENGTH)
        curve = train(head, tmp_path, True, rows, 2, 1, max_steps=40)
        assert sum(loss for loss, _ in curve[-5:]) < sum(loss for loss, _ in curve[:5])

    def test_a_resumed_run_is_one_that_never_stopped(self, head, tmp_path):
        rows = PackedRows(documents(head), ROW_LENGTH)
        whole = trainer_of(head, tmp_path, True, rows, 2, save_strategy="steps", save_steps=1)
        whole.train()
        resumed = trainer_of(head, tmp_path / "resumed", True, rows, 2)
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
        for name, x in whole.model.state_dict().items():
            assert torch.equal(resumed.model.state_dict()[name], x), name


def _in_one_of_two(rank, port, folder):
    """One of two processes: trains each head on packed rows, and the first writes the curves."""
    join_two(rank, port)
    curves = {head: train(head, folder, True, None, 4) for head in HEADS}
    assert torch.distributed.get_world_size() == 2
    if rank == 0:
        with open(os.path.join(folder, "curves.json"), "w") as file:
            json.dump(curves, file)
    torch.distributed.destroy_process_group()


def test_two_processes_do_not_change_the_curve(tmp_path):
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    multiprocessing.spawn(_in_one_of_two, (port, str(tmp_path)), nprocs=2)
    curves = json.loads((tmp_path / "curves.json").read_text())
    for head in HEADS:
        assert_same_curve([tuple(step) for step in curves[head]], train(head, tmp_path, False))
