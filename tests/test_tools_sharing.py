"""Which files of a folder go to the Hub, and as what. (That they arrive, and open there, is tested in test_hub.py.)"""

import json
from concurrent.futures import Future
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from transformers import AutoModelForMaskedLM, Trainer, TrainingArguments
from transformers.utils import PushInProgress

from hf_selfattn.tools import sharing
from hf_selfattn.tools.checkpoints import prepare_output_dir
from hf_selfattn.tools.safe_checkpoints import finish_checkpoint, why_not_whole
from hf_selfattn.tools.sharing import HubPushes, public_files

from .train_scripts import tiny_model_folder

OF_A_MODEL = ["README.md", "all_results.json", "config.json", "encoder.py", "model-00001-of-00002.safetensors",
              "model.safetensors.index.json", "tokenizer.json", "training_curve.png", "vocab.txt"]  # fmt: skip
TO_RESUME = ["optimizer.pt", "resume.json", "rng_state_0.pth", "scheduler.pt", "stream-1.json"]
NEVER = ["corpus.txt", "events.out.tfevents.1", "predictions.jsonl", "run.json", "train.parquet", "training_args.bin",
         "vocabulary_of_my_corpus.txt"]  # fmt: skip


@pytest.fixture
def checkpoint(tmp_path):
    """One of CheckedTrainer's, with things in it that are nobody's business."""
    folder = tmp_path / "checkpoint-2"
    (folder / "deeper").mkdir(parents=True)
    for name in [*OF_A_MODEL, *TO_RESUME, *NEVER, "deeper/config.json"]:
        (folder / name).write_text(name)
    state = {"best_model_checkpoint": str(tmp_path / "checkpoint-1"), "global_step": 2, "best_metric": 0.1,
             "log_history": [{"loss": 1 / 3, "note": "a/b"}], "stateful_callbacks": {"of": [str(folder)]}}  # fmt: skip
    (folder / "trainer_state.json").write_text(json.dumps(state))
    finish_checkpoint(folder)
    return folder


def test_a_model_is_named_files_alone(checkpoint):
    assert sorted(public_files(checkpoint)) == OF_A_MODEL


def test_a_checkpoint_is_what_a_run_needs_to_go_on(checkpoint):
    found = public_files(checkpoint, to_resume=True)
    assert sorted(found) == sorted([*OF_A_MODEL, *TO_RESUME, "complete.json", "trainer_state.json"])
    assert found["optimizer.pt"] == checkpoint / "optimizer.pt"


def test_paths_become_names(checkpoint):
    state = json.loads(public_files(checkpoint, to_resume=True)["trainer_state.json"])
    assert state == {"best_model_checkpoint": "checkpoint-1", "global_step": 2, "best_metric": 0.1,
                     "log_history": [{"loss": 1 / 3, "note": "a/b"}],
                     "stateful_callbacks": {"of": ["checkpoint-2"]}}  # fmt: skip


def test_what_arrives_is_a_whole_checkpoint(checkpoint, tmp_path):
    there = tmp_path / "there"
    there.mkdir()
    for name, data in public_files(checkpoint, to_resume=True).items():
        (there / name).write_bytes(data.read_bytes() if isinstance(data, Path) else data)
    assert why_not_whole(there) is None
    (there / "optimizer.pt").unlink()
    assert why_not_whole(there) == "optimizer.pt is not there"


def test_what_stays_is_said(checkpoint, caplog):
    with caplog.at_level("INFO", logger="hf_selfattn"):
        public_files(checkpoint)
    assert f"not shared, being no part of a model: {', '.join(NEVER)}" in caplog.text


def test_the_folder_stays_as_it_is(checkpoint):
    before = {path: path.read_bytes() for path in checkpoint.rglob("*") if path.is_file()}
    public_files(checkpoint, to_resume=True)
    assert {path: path.read_bytes() for path in checkpoint.rglob("*") if path.is_file()} == before


def test_what_stands_against_a_push_is_said_before_the_work(tmp_path, monkeypatch):
    """The client reads its endpoint when it is imported, so its address is changed and not the environment."""
    arguments = TrainingArguments(str(tmp_path / "mine"), push_to_hub=True, hub_token="hf_none", use_cpu=True)
    monkeypatch.setattr(sharing.create_repo.__self__, "endpoint", "http://127.0.0.1:9")
    with pytest.raises(RuntimeError, match=r"--push_to_hub: the repository 'mine' cannot be .* Log in"):
        prepare_output_dir(arguments, None)


class SharingTrainer(HubPushes, Trainer):
    """The stock Trainer, sharing."""


@pytest.fixture
def trainer(tmp_path):
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    trainer = SharingTrainer(AutoModelForMaskedLM.from_pretrained(tiny_model_folder()), arguments)
    trainer.hub_model_id = "ann/encoder"
    return trainer


def test_a_push_that_failed_is_said_once(trainer, caplog):
    failed = Future()
    failed.set_exception(RuntimeError("the network is gone"))
    trainer.push_in_progress = PushInProgress([failed])
    with caplog.at_level("WARNING", logger="hf_selfattn"):
        trainer._finish_current_push()
        trainer._finish_current_push()
    assert caplog.text.count("a push to ann/encoder failed, training goes on: the network is gone") == 1


@pytest.mark.parametrize(("tags", "stays"), [(["hf-selfattn", "selfattn"], True), (["theirs"], False), (None, False)])
def test_a_card_of_ours_stays(trainer, tmp_path, tags, stays):
    path = tmp_path / "README.md"
    if tags:
        path.write_text(f"---\ntags: {tags}\n---\n\nsaid by the author\n")
    trainer.create_model_card(model_name="encoder")
    assert ("said by the author" in path.read_text()) == stays
    assert ("generated_from_trainer" in ModelCard.load(path).data.tags) == (not stays)
