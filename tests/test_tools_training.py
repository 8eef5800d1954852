import numpy as np
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from datasets import Dataset
from torch.utils.data import BatchSampler
from transformers import AutoConfig, AutoModelForMaskedLM
from transformers.trainer_utils import get_last_checkpoint

from hf_selfattn.tools.checkpoints import prepare_output_dir
from hf_selfattn.tools.collators import MaskingCollator
from hf_selfattn.tools.loss_guard import LossGuard
from hf_selfattn.tools.rows import EpochSampler, Rows
from hf_selfattn.tools.safe_checkpoints import begin_checkpoint, newest_whole_checkpoint
from hf_selfattn.tools.training import CheckedTrainer, ScriptArguments

from .train_scripts import sentences, tiny_model_folder, tiny_tokenizer


def make_rows(count=203):
    draw = np.random.default_rng(0)
    lengths = draw.integers(3, 90, count)
    return Rows(Dataset.from_dict({"input_ids": [[7] * n for n in lengths], "length": lengths}))


def text_rows(count=32):
    ids = tiny_tokenizer()(sentences(count))["input_ids"]
    return Rows(Dataset.from_dict({"input_ids": ids, "length": [len(row) for row in ids]}))


def test_each_epoch_is_a_permutation_of_its_own():
    rows = make_rows()
    sampler = EpochSampler(rows, seed=3, group=16)
    first = list(sampler)
    assert sorted(index for _, index in first) == list(range(203))
    assert {epoch for epoch, _ in first} == {0}
    torch.rand(100)
    np.random.rand(100)
    assert list(sampler) == first
    rows.set_epoch(1)
    second = list(sampler)
    assert {epoch for epoch, _ in second} == {1}
    assert [index for _, index in second] != [index for _, index in first]
    rows.set_epoch(0)
    assert list(sampler) == first
    assert list(EpochSampler(rows, seed=4, group=16)) != first


def test_rows_of_like_length_stand_together():
    rows = make_rows(1600)

    def padding(sampler):
        order = np.array([index for _, index in sampler]).reshape(-1, 16)
        lengths = rows.lengths[order]
        return 1 - lengths.sum() / (lengths.max(1) * 16).sum()

    assert padding(EpochSampler(rows, 0)) > 0.4
    assert padding(EpochSampler(rows, 0, group=16)) < 0.05


def test_two_processes_share_an_epoch_without_overlap():
    rows = make_rows(208)
    batches = BatchSampler(EpochSampler(rows, 0, group=16), batch_size=8, drop_last=False)
    parts = [[i for batch in BatchSamplerShard(batches, 2, rank) for i in batch] for rank in (0, 1)]
    assert not set(parts[0]) & set(parts[1])
    assert sorted(index for _, index in parts[0] + parts[1]) == list(range(208))


def make_trainer(folder, **kwargs):
    options = {
        "max_steps": 4,
        "per_device_train_batch_size": 8,
        "save_steps": 1,
        "logging_steps": 1,
        "report_to": "none",
        "bf16": False,
        "use_cpu": True,
        "disable_tqdm": True,
    }
    arguments = ScriptArguments(output_dir=str(folder), **{**options, **kwargs})
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    config = AutoConfig.for_model("selfattn", vocab_size=len(tiny_tokenizer()), pad_token_id=0, **sizes)
    model = AutoModelForMaskedLM.from_config(config)
    return CheckedTrainer(
        model=model,
        args=arguments,
        train_dataset=text_rows(),
        eval_dataset=text_rows(9),
        data_collator=MaskingCollator(tiny_tokenizer(), 0.5),
        processing_class=tiny_tokenizer(),
    )


def test_the_epoch_reaches_the_mask(tmp_path):
    """Through Trainer, accelerate and data workers: the same rows are masked anew in each epoch."""
    seen = []
    for workers in (0, 2):
        trainer = make_trainer(tmp_path, dataloader_num_workers=workers)
        loader = trainer.get_train_dataloader()
        epochs = []
        for epoch in range(2):
            loader.set_epoch(epoch)
            epochs.append(list(loader))
        first, second = ({tuple(row.tolist()) for batch in batches for row in batch["labels"]} for batches in epochs)
        assert len(first & second) < len(first) / 2
        seen.append([batch["labels"] for batches in epochs for batch in batches])
    assert all(torch.equal(a, b) for a, b in zip(*seen, strict=True))


def test_evaluation_is_in_order_and_masks_alike(tmp_path):
    trainer = make_trainer(tmp_path)
    rows = trainer.eval_dataset
    first = list(trainer.get_eval_dataloader())
    again = list(trainer.get_eval_dataloader())
    assert all(torch.equal(a["labels"], b["labels"]) for a, b in zip(first, again, strict=True))
    lengths = torch.cat([batch["attention_mask"].sum(1) for batch in first])
    assert lengths.tolist() == rows.lengths.tolist()


def test_evaluation_may_have_a_collator_of_its_own(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.eval_collator = MaskingCollator(tiny_tokenizer(), 1.0)
    labels = next(iter(trainer.get_eval_dataloader()))
    assert ((labels["labels"] != -100).sum(1) == labels["attention_mask"].sum(1) - 2).all()
    batch = next(iter(trainer.get_train_dataloader()))
    assert ((batch["labels"] != -100).sum(1) < batch["attention_mask"].sum(1) - 2).any()


def test_a_loss_that_is_not_a_number_stops_the_training(tmp_path):
    trainer = make_trainer(tmp_path)
    original, calls = trainer.compute_loss, []

    def spoilt(*args, **kwargs):
        calls.append(1)
        loss = original(*args, **kwargs)
        return loss * float("nan") if len(calls) == 3 else loss

    trainer.compute_loss = spoilt
    with pytest.raises(
        FloatingPointError, match=r"The loss is nan at step 3 .* last good checkpoint is .*checkpoint-2"
    ):
        trainer.train()
    assert get_last_checkpoint(tmp_path).endswith("checkpoint-2")
    weights = AutoModelForMaskedLM.from_pretrained(get_last_checkpoint(tmp_path)).state_dict()
    assert all(value.isfinite().all() for value in weights.values())


def test_without_a_checkpoint_the_message_says_so(tmp_path):
    trainer = make_trainer(tmp_path, save_strategy="no", learning_rate=1e30)
    with pytest.raises(FloatingPointError, match="There is no checkpoint yet"):
        trainer.train()


def rise(trainer, step, factor=5.0):
    """Multiply the loss from a step on, counted from 1."""
    original, calls = trainer.compute_loss, []

    def raised(*args, **kwargs):
        calls.append(1)
        loss = original(*args, **kwargs)
        return loss * factor if len(calls) >= step else loss

    trainer.compute_loss = raised


def test_a_loss_far_above_its_mean_stops_the_training(tmp_path, monkeypatch):
    """Checkpoints of the steps in which the loss was high are not taken for good ones, nor is one deleted for them."""
    monkeypatch.setattr(LossGuard, "FIRST", 10)
    options = {"max_steps": 40, "save_steps": 2, "save_total_limit": 1, "divergence_patience": 5}
    trainer = make_trainer(tmp_path, **options)
    rise(trainer, 21)
    told = r"has been far above its running mean, [\d.]+ at its lowest, for 5 steps .* at step 25 "
    with pytest.raises(FloatingPointError, match=told + r".*The last good checkpoint is .*checkpoint-20; lower"):
        trainer.train()
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {f"checkpoint-{step}" for step in (20, 22, 24)}
    assert newest_whole_checkpoint(tmp_path).name == "checkpoint-20"
    again = make_trainer(tmp_path / "again", **options)
    rise(again, 1)
    with pytest.raises(FloatingPointError, match="at step 25"):  # mean and deviation are the checkpoint's
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-20"))


def test_the_watch_can_be_switched_off(tmp_path, monkeypatch):
    monkeypatch.setattr(LossGuard, "FIRST", 10)
    trainer = make_trainer(tmp_path, max_steps=20, save_strategy="no", divergence_deviations=0, divergence_patience=3)
    rise(trainer, 13)
    trainer.train()
    assert trainer.state.global_step == 20


def test_two_runs_are_not_mixed(tmp_path):
    (tmp_path / "checkpoint-900").mkdir()
    (tmp_path / "checkpoint-900" / "config.json").touch()
    arguments = ScriptArguments(output_dir=str(tmp_path))
    with pytest.raises(ValueError, match=r"holds checkpoints of an earlier run. .* --resume_from_checkpoint last"):
        prepare_output_dir(arguments, None)
    prepare_output_dir(arguments, resume_from=str(tmp_path / "checkpoint-900"))
    earlier = str(tmp_path / "checkpoint-800")
    with pytest.raises(
        ValueError, match=r"checkpoint-800' is not the newest: checkpoint-900 would count as this run's"
    ):
        prepare_output_dir(arguments, resume_from=earlier)
    with pytest.raises(
        ValueError, match=r"is named checkpoint-N by its step, got .*best'. Give it that name, or move"
    ):
        prepare_output_dir(arguments, resume_from=str(tmp_path / "best"))
    with pytest.raises(ValueError, match=r"holds checkpoints of an earlier run."):
        prepare_output_dir(arguments, resume_from="elsewhere/checkpoint-800")
    prepare_output_dir(ScriptArguments(output_dir=str(tmp_path), overwrite_output_dir=True), None)
    assert not list(tmp_path.iterdir())
    begin_checkpoint(tmp_path / "checkpoint-3")  # and then the process was killed
    prepare_output_dir(arguments, None)
    assert not list(tmp_path.iterdir())
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(ValueError, match=r"is a file. Pass a folder"):
        prepare_output_dir(ScriptArguments(output_dir=str(file)), None)


def test_what_must_stay_as_it_is(tmp_path):
    with pytest.raises(ValueError, match="--do_eval must stay on"):
        ScriptArguments(output_dir=str(tmp_path), do_eval=False)
    with pytest.raises(ValueError, match="--remove_unused_columns must stay off"):
        ScriptArguments(output_dir=str(tmp_path), remove_unused_columns=True)


@pytest.mark.parametrize("at", [6, 8], ids=["within", "at_the_end"])
def test_a_gradient_that_is_no_number_changes_no_weight(at, tmp_path):
    """The loss is finite, and the last checkpoint is one from before."""
    model = AutoModelForMaskedLM.from_pretrained(tiny_model_folder())
    arguments = ScriptArguments(str(tmp_path), max_steps=8, save_steps=2, save_total_limit=1, use_cpu=True, bf16=False,
                                per_device_train_batch_size=2, report_to="none", disable_tqdm=True)  # fmt: skip
    trainer = CheckedTrainer(
        model, arguments, train_dataset=text_rows(), data_collator=MaskingCollator(tiny_tokenizer())
    )
    weight = next(model.parameters())
    weight.register_hook(lambda grad: grad * float("nan") if trainer.state.global_step == at - 1 else grad)
    with pytest.raises(FloatingPointError, match=rf"gradient norm is nan.* at step {at} .*checkpoint-{at - 2}"):
        trainer.train()
    assert all(x.isfinite().all() for x in model.parameters())
