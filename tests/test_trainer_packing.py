"""The stock Trainer with packed rows: the curve of a training is that of padded rows."""

import pytest
import torch
from datasets import Dataset
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

from .processes import together
from .test_tools_collators import rows_of
from .train_scripts import tiny_tokenizer

STEPS = 3
ROW_LENGTH = 64
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
HEADS = {
    "masked_lm": (AutoModelForMaskedLM, lambda row: {}, {}),
    "token_classification": (
        AutoModelForTokenClassification,
        lambda row: {"labels": [i % 5 if i % 3 else -100 for i in range(len(row["input_ids"]))]},
        {"num_labels": 5},
    ),
    "text_classification": (
        AutoModelForSequenceClassification,
        lambda row: {"labels": row["example_id"] % 5},
        {"num_labels": 5},
    ),
    "multi_label": (
        AutoModelForSequenceClassification,
        lambda row: {"labels": [float(row["example_id"] % n == 0) for n in (2, 3, 4)]},
        {"num_labels": 3, "problem_type": "multi_label_classification"},
    ),
    "regression": (
        AutoModelForSequenceClassification,
        lambda row: {"labels": len(row["input_ids"]) / 20},
        {"num_labels": 1},
    ),
}
"""Auto class, labels of a text, and what the config says of them. Other heads have no packed rows."""

KINDS = ("masked_lm", "token_classification", "text_classification")
WITH_SLOW = [*KINDS, *(pytest.param(head, marks=pytest.mark.slow) for head in HEADS if head not in KINDS)]


def documents(head, count=8 * STEPS):
    rows = [{"input_ids": row["input_ids"], **HEADS[head][1](row)} for row in rows_of(count)]
    return Rows(Dataset.from_list([{**row, "length": len(row["input_ids"])} for row in rows]))


def trainer_of(head, folder, packed, rows=None, batch_size=8, accumulation=1, **options):
    """The stock Trainer on `rows`, with the collator that packs, with the one that pads, or that unpacks and pads."""
    torch.manual_seed(0)
    auto_class, _, labels = HEADS[head]
    config = AutoConfig.for_model("selfattn", vocab_size=len(tiny_tokenizer()), pad_token_id=0, **SIZES, **labels)
    collator = MaskingCollator(tiny_tokenizer(), 0.3)
    if head != "masked_lm":
        kind = torch.float32 if head in ("multi_label", "regression") else torch.int64
        collator = PaddingCollator(tiny_tokenizer(), label_dtype=kind)
    collators = {True: PackingCollator(collator, ROW_LENGTH), False: collator, "one by one": OneByOne(collator)}
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
        auto_class.from_config(config),
        TrainingArguments(str(folder), **arguments),
        train_dataset=rows,
        eval_dataset=rows,
        data_collator=collators[packed],
    )


class OneByOne:
    """Rows of several documents to a batch of padded documents."""

    def __init__(self, collator):
        self.collator = collator

    def __call__(self, rows):
        return self.collator([document for row in rows for document in row])


def train(*args, **kwargs):
    """(loss, gradient norm) of each step, as the Trainer logs them."""
    trainer = trainer_of(*args, **kwargs)
    trainer.train()
    return [(log["loss"], log["grad_norm"]) for log in trainer.state.log_history if "grad_norm" in log]


def assert_same_curve(actual, expected):
    assert len(actual) == len(expected) == STEPS
    for step, (one, other) in enumerate(zip(actual, expected, strict=True)):
        assert one == pytest.approx(other, rel=1e-5), f"step {step}"


@pytest.mark.parametrize("head", KINDS)
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


def uneven_rows(head):
    """Rows of 1 to 4 documents, as many in turn as have room: their numbers of documents and of tokens differ."""
    rows, row = [], []
    for document in (documents(head, 100)[i] for i in range(100)):
        used = sum(len(other["input_ids"]) for other in row)
        if row and (len(row) > len(rows) % 4 or used + len(document["input_ids"]) > ROW_LENGTH):
            rows.append(row)
            row = []
        row.append(document)
    return rows


def test_what_each_process_gets_is_uneven():
    def differ(halves, number):
        return [number(one) != number(other) for one, other in zip(halves[::2], halves[1::2], strict=True)]

    loader = trainer_of("multi_label", "unused", True, uneven_rows("multi_label"), 4).get_train_dataloader()
    halves = list(loader)[: 2 * STEPS]
    assert all(differ(halves, lambda batch: batch["attention_mask"].sum()))
    assert any(differ(halves, lambda batch: len(batch["labels"])))


SPLITS = [(8, 1, 1), (2, 4, 1), (1, 8, 1), (4, 1, 2), (2, 2, 2)]
"""Rows of a device's batch, steps of accumulation, processes."""


@pytest.fixture(scope="module")
def padded_curve(tmp_path_factory):
    """Of the same documents, each padded in a row of its own; made once for each head."""
    curves = {}

    def of(head):
        if head not in curves:
            curves[head] = train(head, tmp_path_factory.mktemp("padded"), "one by one", uneven_rows(head))
        return curves[head]

    return of


def curve_of(case, folder):
    head, rows, batch_size, accumulation = case
    return train(head, folder, True, uneven_rows(head) if rows else None, batch_size, accumulation)


@pytest.fixture(scope="module")
def in_two_processes(tmp_path_factory):
    """The curve of a case in two gloo processes; those of all heads of a kind are made by one pair."""
    curves = {}

    def of(case):
        if case not in curves:
            heads = [head for head in HEADS if (head in KINDS) == (case[0] in KINDS)]
            cases = [(head, True, *split[:2]) for head in heads for split in SPLITS if split[2] == 2]
            cases += [(head, False, 4, 1) for head in heads]
            found = together(curve_of, cases, tmp_path_factory.mktemp("two_processes"))
            curves.update(zip(cases, ([tuple(step) for step in curve] for curve in found), strict=True))
        return curves[case]

    return of


@pytest.mark.parametrize("split", SPLITS, ids=lambda split: "x".join(map(str, split)))
@pytest.mark.parametrize("head", WITH_SLOW)
def test_how_rows_are_split_does_not_change_the_curve(padded_curve, in_two_processes, head, split, tmp_path):
    batch_size, accumulation, processes = split
    case = (head, True, batch_size, accumulation)
    curve = in_two_processes(case) if processes == 2 else curve_of(case, tmp_path)
    assert_same_curve(curve, padded_curve(head))


@pytest.mark.parametrize("head", WITH_SLOW)
def test_two_processes_do_not_change_the_curve(in_two_processes, head, tmp_path):
    assert_same_curve(in_two_processes((head, False, 4, 1)), train(head, tmp_path, False))
