import numpy as np
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from datasets import Dataset
from torch.utils.data import BatchSampler
from transformers import AutoModelForMaskedLM
from transformers.trainer_utils import get_last_checkpoint

from hf_selfattn.tools.collators import MaskingCollator
from hf_selfattn.tools.training import CheckedTrainer, EpochSampler, Rows, ScriptArguments, prepare_output_dir

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
    model = AutoModelForMaskedLM.from_pretrained(tiny_model_folder())
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


def test_two_runs_are_not_mixed(tmp_path):
    (tmp_path / "checkpoint-900").mkdir()
    arguments = ScriptArguments(output_dir=str(tmp_path))
    with pytest.raises(ValueError, match=r"holds checkpoints of an earlier run. .* --resume_from_checkpoint last"):
        prepare_output_dir(arguments, None)
    prepare_output_dir(arguments, resume_from=str(tmp_path / "checkpoint-900"))
    prepare_output_dir(ScriptArguments(output_dir=str(tmp_path), overwrite_output_dir=True), None)
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
