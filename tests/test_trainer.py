"""The stock Trainer: what it logs does not depend on how a batch is split over steps and processes."""

import json
import os
import socket

import pytest
import torch
import transformers
from torch import multiprocessing
from transformers import BertConfig, Trainer, TrainingArguments

from hf_selfattn import AUTO_MAP, SelfAttnConfig

from .processes import join_two

STEPS = 3
SIZES = {
    "vocab_size": 43,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "initializer_range": 0.2,
}
HEADS = {
    "masked_lm": ("AutoModelForMaskedLM", {}),
    "single_label": ("AutoModelForSequenceClassification", {"num_labels": 3}),
    "multi_label": (
        "AutoModelForSequenceClassification",
        {"num_labels": 3, "problem_type": "multi_label_classification"},
    ),
    "regression": ("AutoModelForSequenceClassification", {"num_labels": 1}),
    "token_classification": ("AutoModelForTokenClassification", {"num_labels": 5}),
    "question_answering": ("AutoModelForQuestionAnswering", {}),
    "multiple_choice": ("AutoModelForMultipleChoice", {}),
}


BERT = ["bert masked_lm", "bert single_label", "bert token_classification"]
"""Heads of stock BERT, for control."""


def make_examples(head, number=8 * STEPS):
    """Texts of 1 to 9 tokens; how many of a text's tokens have labels differs from text to text, and may be none.

    For control each token has a label, so that the factor by which stock BERT is off is a whole number.
    """
    head, control = head.removeprefix("bert "), head.startswith("bert ")
    generator = torch.Generator().manual_seed(0)

    def integers(high, *shape):
        return torch.randint(0, high, shape, generator=generator)

    examples = []
    for i in range(number):
        length = 1 + (5 * i) % 9
        shape = (3, 9) if head == "multiple_choice" else (9,)
        real = torch.arange(9) < length
        example = {"input_ids": integers(43, *shape), "attention_mask": real.long().expand(shape)}
        if head in ("masked_lm", "token_classification"):
            hidden = ~real | (integers(3, 9) < i % 3)
            example["labels"] = integers(5, 9).masked_fill(hidden & (not control), -100)
        elif head == "question_answering":
            example |= {"start_positions": integers(length, 1)[0], "end_positions": integers(length, 1)[0]}
        elif head == "multi_label":
            example["labels"] = integers(2, 3).float()
        elif head == "regression":
            example["labels"] = torch.randn((), generator=generator)
        else:
            example["labels"] = integers(3, 1)[0]
        examples.append(example)
    return examples


def make_model(head, **options):
    """A model of ours, or stock BERT where `head` begins with "bert "."""
    torch.manual_seed(0)
    if head.startswith("bert "):
        auto_class, labels = HEADS[head.removeprefix("bert ")]
        dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        config = BertConfig(**SIZES, **dropout, **labels, max_position_embeddings=16)
    else:
        auto_class, labels = HEADS[head]
        config = SelfAttnConfig(**{**SIZES, **labels, **options})
    return getattr(transformers, auto_class).from_config(config)


def train(model, examples, folder, batch_size, accumulation, **options):
    """Loss and gradient norm of each step, as the stock Trainer logs them."""
    arguments = {
        "output_dir": str(folder),
        "per_device_train_batch_size": batch_size,
        "gradient_accumulation_steps": accumulation,
        "max_steps": STEPS,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "learning_rate": 1e-2,
        "use_cpu": True,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "seed": 0,
        **options,
    }
    trainer = Trainer(model, TrainingArguments(**arguments), train_dataset=examples)
    trainer.train()
    return [(log["loss"], log["grad_norm"]) for log in trainer.state.log_history if "grad_norm" in log]


def assert_same_curve(actual, expected):
    """Loss and gradient norm of each step, to 1e-5 of their size."""
    assert len(actual) == len(expected) == STEPS
    for step, (one, other) in enumerate(zip(actual, expected, strict=True)):
        assert one == pytest.approx(other, rel=1e-5), f"step {step}"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The curve of a head trained with whole batches of 8, made once for each head."""
    curves = {}

    def of(head):
        if head not in curves:
            curves[head] = train(make_model(head), make_examples(head), tmp_path_factory.mktemp("whole"), 8, 1)
        return curves[head]

    return of


@pytest.mark.parametrize("head", HEADS)
class TestOneProcess:
    @pytest.mark.parametrize(("batch_size", "accumulation"), [(2, 4), (1, 8)], ids=["2x4", "1x8"])
    def test_accumulation_does_not_change_the_curve(self, whole, head, batch_size, accumulation, tmp_path):
        curve = train(make_model(head), make_examples(head), tmp_path, batch_size, accumulation)
        assert_same_curve(curve, whole(head))

    @pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")  # 5.17 knows no other
    def test_gradient_checkpointing_does_not_change_the_curve(self, whole, head, tmp_path):
        model = make_model(head)
        curve = train(model, make_examples(head), tmp_path, 8, 1, gradient_checkpointing=True)
        assert all(layer.gradient_checkpointing for layer in model.base_model.layers)
        assert_same_curve(curve, whole(head))

    def test_it_learns(self, head, tmp_path):
        """The loss of eight examples seen over and over falls by half."""
        curve = train(make_model(head), make_examples(head, 8), tmp_path, 8, 1, max_steps=40)
        assert curve[-1][0] < curve[0][0] / 2


def assert_off_by(factor, curve, whole):
    """Loss and gradient norm of the first step."""
    for theirs, right in zip(curve[0], whole[0], strict=True):
        assert theirs / right == pytest.approx(factor, rel=1e-4)


@pytest.mark.parametrize("head", BERT)
def test_control_stock_bert_is_four_times_off_in_four_steps(whole, head, tmp_path):
    """The same harness shows the error that it looks for."""
    assert_off_by(4, train(make_model(head), make_examples(head), tmp_path, 2, 4), whole(head))


@pytest.mark.parametrize("head", HEADS)
def test_a_checkpoint_opens_through_the_auto_class(head, tmp_path):
    model = make_model(head)
    train(model, make_examples(head), tmp_path, 8, 1, save_strategy="steps", save_steps=STEPS)
    folder = tmp_path / f"checkpoint-{STEPS}"
    again = getattr(transformers, HEADS[head][0]).from_pretrained(folder)
    assert type(again) is type(model)
    for name, x in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], x), name
    assert json.loads((folder / "config.json").read_text())["auto_map"] == AUTO_MAP
    code = {path.name for path in folder.glob("*.py")}
    assert {f"{path.split('.')[0]}.py" for path in AUTO_MAP.values()} < code


def test_a_resumed_run_is_one_that_never_stopped(tmp_path):
    head = "masked_lm"
    options = {"save_strategy": "steps", "save_steps": 1}
    through = make_model(head)
    train(through, make_examples(head), tmp_path, 8, 1, **options)
    resumed = make_model(head)
    arguments = TrainingArguments(
        str(tmp_path / "resumed"),
        per_device_train_batch_size=8,
        max_steps=STEPS,
        learning_rate=1e-2,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        seed=0,
    )
    trainer = Trainer(resumed, arguments, train_dataset=make_examples(head))
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    for name, x in through.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], x), name


def _in_one_of_two(rank, port, folder, runs):
    """One of two processes: trains each (head, batch size, accumulation) and the first writes the curves."""
    join_two(rank, port)
    curves = []
    for head, batch_size, accumulation in runs:
        curves.append(train(make_model(head), make_examples(head), folder, batch_size, accumulation))
        assert torch.distributed.get_world_size() == 2
    if rank == 0:
        with open(os.path.join(folder, "curves.json"), "w") as file:
            json.dump(curves, file)
    torch.distributed.destroy_process_group()


def train_in_two_processes(runs, folder):
    """The curve of each (head, batch size, accumulation)."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    multiprocessing.spawn(_in_one_of_two, (port, str(folder), runs), nprocs=2)
    curves = json.loads((folder / "curves.json").read_text())
    return {run: [tuple(step) for step in curve] for run, curve in zip(runs, curves, strict=True)}


SPLITS = [(4, 1), (2, 2)]


@pytest.fixture(scope="module")
def in_two_processes(tmp_path_factory):
    """The curves of every head, split over two gloo processes and some steps; all are trained by one pair."""
    runs = [(head, *split) for head in HEADS for split in SPLITS] + [(head, 4, 1) for head in BERT]
    return train_in_two_processes(runs, tmp_path_factory.mktemp("two_processes"))


@pytest.mark.parametrize("split", SPLITS, ids=["4x1x2", "2x2x2"])
@pytest.mark.parametrize("head", HEADS)
def test_two_processes_do_not_change_the_curve(in_two_processes, whole, head, split):
    assert_same_curve(in_two_processes[(head, *split)], whole(head))


@pytest.mark.parametrize("head", BERT)
def test_control_stock_bert_is_twice_off_in_two_processes(in_two_processes, whole, head):
    assert_off_by(2, in_two_processes[(head, 4, 1)], whole(head))
