"""A run resumed with other settings: what changes is said and happens, what would mean nothing is refused."""

import logging
import shutil

import pytest
import torch
from datasets import Dataset
from transformers import AutoConfig, AutoModelForMaskedLM, Trainer, TrainerCallback, set_seed

from hf_selfattn.tools.collators import MaskingCollator
from hf_selfattn.tools.packed_rows import PackedRows, PackingCollator
from hf_selfattn.tools.resuming import refusing_old_versions
from hf_selfattn.tools.safe_checkpoints import newest_whole_checkpoint
from hf_selfattn.tools.tokenizer import train_tokenizer
from hf_selfattn.tools.training import CheckedTrainer, Rows, ScriptArguments

from .train_scripts import sentences, tiny_tokenizer

SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
COUNT = 40


def rows_of(count=COUNT, seed=0):
    ids = tiny_tokenizer()(sentences(count, seed))["input_ids"]
    return Rows(Dataset.from_dict({"input_ids": ids, "length": [len(row) for row in ids]}))


class Recorder(MaskingCollator):
    """Remembers which example of which epoch it was given."""

    def __call__(self, rows):
        self.__dict__.setdefault("seen", []).extend((row["epoch"], row["example_id"]) for row in rows)
        return super().__call__(rows)


def make_trainer(
    folder, *, rows=None, config=None, tokenizer=None, rate=0.3, packed=False, kind=CheckedTrainer, **kwargs
):
    options = {
        "max_steps": 8,
        "save_steps": 3,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "report_to": "none",
        "bf16": False,
        "use_cpu": True,
        "disable_tqdm": True,
        "train_sampling_strategy": "random",
    }
    tokenizer = tokenizer or tiny_tokenizer()
    rows, collator = rows or rows_of(), Recorder(tokenizer, rate)
    if packed:
        rows, collator = PackedRows(rows, 48), PackingCollator(collator, 48)
    set_seed(0)
    config = AutoConfig.for_model(
        "selfattn", **{"vocab_size": len(tiny_tokenizer()), "pad_token_id": 0, **SIZES, **(config or {})}
    )
    return kind(
        model=AutoModelForMaskedLM.from_config(config),
        args=ScriptArguments(output_dir=str(folder), **{**options, **kwargs}),
        train_dataset=rows,
        eval_dataset=rows,
        data_collator=collator,
        processing_class=tokenizer,
    )


class Stop(TrainerCallback):
    """Ends a run as a kill would, after some steps."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.step


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    """A run of 8 steps that was left after its third, 24 of its 40 rows read."""
    folder = tmp_path_factory.mktemp("interrupted")
    trainer = make_trainer(folder)
    trainer.add_callback(Stop(3))
    trainer.train()
    return str(newest_whole_checkpoint(folder))


def resume(checkpoint, tmp_path, caplog=None, **kwargs):
    """(the trainer after its run, what it said of the resumption)."""
    trainer = make_trainer(tmp_path / "resumed", **kwargs)
    if caplog is not None:
        caplog.clear()
        caplog.set_level(logging.INFO, logger="hf_selfattn")
    trainer.train(resume_from_checkpoint=checkpoint)
    return trainer, [] if caplog is None else [line for line in caplog.messages if line.startswith("resumed")]


def weights(trainer):
    return trainer.model.state_dict()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The run that was not left."""
    trainer = make_trainer(tmp_path_factory.mktemp("whole"))
    trainer.train()
    return trainer


def learning_rates(trainer):
    return {log["step"]: log["learning_rate"] for log in trainer.state.log_history if "loss" in log}


def test_the_same_settings_are_not_remarked_upon(interrupted, whole, tmp_path, caplog):
    trainer, said = resume(interrupted, tmp_path, caplog)
    assert said == []
    assert all(torch.equal(value, weights(trainer)[name]) for name, value in weights(whole).items())
    assert trainer.data_collator.seen == whole.data_collator.seen[24:]


def test_the_same_rows_a_step_in_another_split(interrupted, whole, tmp_path, caplog):
    trainer, said = resume(interrupted, tmp_path, caplog, per_device_train_batch_size=2, gradient_accumulation_steps=4)
    assert len(said) == 1
    assert "gradient_accumulation_steps 1 -> 4" in said[0]
    assert "8 rows a step as before, so all is the same up to rounding" in said[0]
    seen = trainer.data_collator.seen  # accelerate reads one batch ahead
    assert seen[:40] == whole.data_collator.seen[24:64]
    for name, value in weights(whole).items():
        torch.testing.assert_close(weights(trainer)[name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("batch", "left"), [(4, 16), (12, 16), (16, 24)])
def test_more_or_fewer_rows_a_step_go_on_at_the_row_where_the_run_stood(
    interrupted, whole, tmp_path, caplog, batch, left
):
    """Steps that are left are those up to --max_steps; the epoch's rows come once (twice, where a step began among
    them, which is said)."""
    trainer, said = resume(interrupted, tmp_path, caplog, per_device_train_batch_size=batch)
    assert f"8 -> {batch} rows a step" in said[0]
    assert len(said) == (2 if batch == 16 else 1)
    assert batch != 16 or "of epoch 0 are no whole number of steps, so the last 8 come twice" in said[1]
    assert trainer.state.global_step == 8
    assert trainer.data_collator.seen[:left] == whole.data_collator.seen[40 - left : 40]
    if batch == 4:  # accelerate reads one batch ahead
        assert trainer.data_collator.seen[left:] == whole.data_collator.seen[40 : 40 + 8]


def test_a_second_interruption_after_another_number_of_rows(interrupted, tmp_path):
    """Its place is that of the rows, and no longer the number of steps times the rows in one."""
    first = make_trainer(tmp_path / "first", per_device_train_batch_size=4, save_steps=1, max_steps=12)
    first.add_callback(Stop(5))
    first.train(resume_from_checkpoint=interrupted)
    through = make_trainer(tmp_path / "through", per_device_train_batch_size=4, max_steps=12)
    through.train(resume_from_checkpoint=interrupted)
    again, _ = resume(str(tmp_path / "first" / "checkpoint-5"), tmp_path, per_device_train_batch_size=4, max_steps=12)
    assert again.data_collator.seen == through.data_collator.seen[8:]
    assert all(torch.equal(value, weights(again)[name]) for name, value in weights(through).items())


def test_with_epochs_the_rows_of_a_step_are_fixed(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=-1, num_train_epochs=2)
    trainer.add_callback(Stop(3))
    trainer.train()
    with pytest.raises(
        ValueError, match=r"an epoch would now have 10 steps instead of 5 .*rows_per_step 8 -> 4"
    ) as error:
        resume(str(tmp_path / "checkpoint-3"), tmp_path, max_steps=-1, num_train_epochs=2,
               per_device_train_batch_size=4)  # fmt: skip
    assert (
        "accumulation * processes at 8, or say with --max_steps where the run ends (it stands at step 3 of 10"
        in str(error.value)
    )


def test_the_learning_rate_that_was_asked_for_is_used(interrupted, whole, tmp_path, caplog):
    """The control is the stock Trainer, which keeps the old one without a word."""
    trainer, said = resume(interrupted, tmp_path, caplog, learning_rate=3e-2, weight_decay=0.1)
    assert said == [
        "resumed: learning_rate 0.01 -> 0.03: from this step on",
        "resumed: weight_decay 0.0 -> 0.1: from this step on",
    ]
    before = learning_rates(whole)
    for step, rate in learning_rates(trainer).items():
        assert rate == pytest.approx(before[step] * (1 if step < 4 else 3))
    assert {group["weight_decay"] for group in trainer.optimizer.param_groups} == {0.0, 0.1}
    stock, _ = resume(interrupted, tmp_path, kind=Trainer, learning_rate=3e-2)
    assert learning_rates(stock)[5] == pytest.approx(before[5])


def test_another_end_gives_the_schedule_another_form(interrupted, tmp_path, caplog):
    trainer, said = resume(interrupted, tmp_path, caplog, max_steps=12)
    assert said == ["resumed: max_steps 8 -> 12: the schedule goes on at this step in its new form"]
    assert trainer.state.global_step == 12
    for step, rate in learning_rates(trainer).items():
        if step > 3:  # linear, to 0
            assert rate == pytest.approx(1e-2 * (1 - (step - 1) / 12))


def test_intervals_that_were_asked_for_are_used(interrupted, tmp_path):
    """The stock Trainer goes on with the checkpoint's."""
    resume(interrupted, tmp_path, save_steps=2)
    assert {path.name for path in (tmp_path / "resumed").glob("checkpoint-*")} == {
        f"checkpoint-{step}" for step in (4, 6, 8)
    }


def test_other_masks_and_dropout(interrupted, tmp_path, caplog):
    _, said = resume(interrupted, tmp_path, caplog, rate=0.5, config={"hidden_dropout": 0.1})
    assert "resumed: collator.mlm_probability 0.3 -> 0.5: batches are made in the new way from here on" in said
    assert "resumed with another hidden_dropout: 0.0 -> 0.1, from this step on" in said


def test_other_data_or_another_order_within_an_epoch_are_refused(interrupted, tmp_path):
    place = "The checkpoint stands 24 rows into an epoch of other data, or of another order: "
    for changes, told in (
        ({"rows": rows_of(41)}, "data.fingerprint .*, data.rows 40 -> 41"),
        ({"rows": rows_of(seed=1)}, "data.fingerprint"),
        ({"seed": 7}, "order.seed 42 -> 7"),
        ({"train_sampling_strategy": "group_by_length"}, "order.by_length False -> True"),
        ({"packed": True}, ".*data.kind 'Rows' -> 'PackedRows'"),
    ):
        with pytest.raises(ValueError, match=place + told + r".* with --ignore_data_skip; or start a new run from"):
            resume(interrupted, tmp_path, **changes)


def test_other_data_from_their_first_row(interrupted, tmp_path, caplog):
    other = rows_of(48, seed=1)
    trainer, said = resume(interrupted, tmp_path, caplog, rows=other, ignore_data_skip=True)
    assert "data.rows 40 -> 48): read from their first row on" in said[0]
    assert sorted(trainer.data_collator.seen[:40]) == sorted(set(trainer.data_collator.seen[:40]))
    assert trainer.state.global_step == 8


def test_another_model_tokenizer_or_optimizer_is_refused(interrupted, tmp_path):
    model = (
        r"intermediate_size 24 \(here 32\), score_function 'scaled_dot_product' \(here 'cosine'\)\. Resume with these"
    )
    with pytest.raises(ValueError, match=r"A run is resumed with the model it was begun with; .* has " + model):
        resume(interrupted, tmp_path, config={"intermediate_size": 32, "score_function": "cosine"})
    with pytest.raises(
        ValueError, match=r"the tokenizer it was begun with; .* is another, of .* Pass --tokenizer_name"
    ):
        resume(interrupted, tmp_path, tokenizer=train_tokenizer(sentences(99, 5), vocab_size=410, progress=False))
    optimizer = (
        r"means nothing to another: optim 'adamw_torch_fused' -> 'adafactor'. Resume with the old one, or start"
    )
    with pytest.raises(ValueError, match=optimizer):
        resume(interrupted, tmp_path, optim="adafactor")


def test_a_run_that_is_done_is_left_as_it_is(whole, tmp_path, caplog):
    """(The stock Trainer trains one step more.)"""
    trainer, said = resume(whole.args.output_dir + "/checkpoint-8", tmp_path, caplog)
    assert trainer.state.global_step == 8
    assert said == ["resumed: at step 8 nothing is left to train"]
    assert all(torch.equal(value, weights(trainer)[name]) for name, value in weights(whole).items())


def test_a_checkpoint_of_the_stock_trainer(interrupted, whole, tmp_path, caplog):
    folder = tmp_path / "checkpoint-3"
    shutil.copytree(interrupted, folder)
    (folder / "resume.json").unlink()
    (folder / "complete.json").unlink()
    trainer, said = resume(str(folder), tmp_path, caplog)
    assert said == []
    assert "has no resume.json (made by the stock Trainer" in caplog.text
    assert all(torch.equal(value, weights(trainer)[name]) for name, value in weights(whole).items())


def test_evaluation_leaves_the_random_state(tmp_path):
    """A data loader draws from it when it begins; what dropout draws in an epoch must not depend on who evaluated."""
    trainer = make_trainer(tmp_path)
    before = torch.random.get_rng_state()
    trainer.evaluate()
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_version_that_cannot_resume_two_processes_is_named():
    told = r"transformers \S+ does not load .* Use transformers 5.23 or newer"
    with pytest.raises(RuntimeError, match=told), refusing_old_versions():
        torch.serialization.default_restore_location(torch.zeros(1).untyped_storage(), "cpu:0")
    with pytest.raises(RuntimeError, match="another"), refusing_old_versions():
        raise RuntimeError("another")
