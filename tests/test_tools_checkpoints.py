import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForMaskedLM
from transformers.trainer_utils import rotate_checkpoints

from hf_selfattn.tools.checkpoints import check_model_folder, check_resumable, checkpoint_to_resume
from hf_selfattn.tools.safe_checkpoints import (
    begin_checkpoint,
    checkpoint_folders,
    delete_checkpoint,
    delete_old_checkpoints,
    finish_checkpoint,
    is_unfinished,
    newest_whole_checkpoint,
    why_not_whole,
    withdraw_checkpoint,
)

from .train_scripts import tiny_model_folder


@pytest.fixture
def folder(tmp_path):
    return Path(shutil.copytree(tiny_model_folder(), tmp_path / "model"))


def truncate(path, share=0.5):
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])


def test_a_whole_folder_passes(folder):
    check_model_folder(folder)


def test_what_is_no_checkpoint_is_refused(tmp_path, folder):
    with pytest.raises(FileNotFoundError, match=r"is not a folder. Pass a folder made by save_pretrained"):
        check_model_folder(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match=r"is not a checkpoint: it has no config.json"):
        check_model_folder(tmp_path)
    shutil.move(folder, tmp_path / "checkpoint-7")
    with pytest.raises(FileNotFoundError, match=r"Perhaps .*checkpoint-7' is meant"):
        check_model_folder(tmp_path)
    (tmp_path / "checkpoint-7" / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="holds no weights"):
        check_model_folder(tmp_path / "checkpoint-7")


@pytest.mark.parametrize("share", [0, 0.0001, 0.5, 0.999])
def test_weights_that_are_cut_short_are_refused(folder, share):
    truncate(folder / "model.safetensors", share)
    with pytest.raises(ValueError, match=r"model.safetensors' is cut short or damaged: "):
        check_model_folder(folder)


def test_a_config_that_is_cut_short_is_refused(folder):
    truncate(folder / "config.json")
    with pytest.raises(ValueError, match=r"config.json' is cut short or damaged: it is not readable as JSON"):
        check_model_folder(folder)


def test_missing_shards_are_named(tmp_path):
    AutoModelForMaskedLM.from_pretrained(tiny_model_folder()).save_pretrained(tmp_path, max_shard_size="20KB")
    check_model_folder(tmp_path)
    shard = sorted(tmp_path.glob("model-*.safetensors"))[-1]
    truncate(shard)
    with pytest.raises(ValueError, match=f"{shard.name}' is cut short"):
        check_model_folder(tmp_path)
    shard.unlink()
    with pytest.raises(ValueError, match=f"of its .* files of weights {shard.name} is not there"):
        check_model_folder(tmp_path)


def test_resuming_needs_the_trainers_state(folder):
    with pytest.raises(ValueError, match=r"optimizer.pt, scheduler.pt is not there. Pass one of the checkpoint-"):
        check_resumable(folder)


@pytest.fixture
def run(tmp_path, folder):
    """An output folder with the whole checkpoints 2, 4 and 6; they take 30 KB each."""
    for step in (2, 4, 6):
        write(tmp_path / "run", step, folder)
    return tmp_path / "run"


def write(run, step, model, whole=True):
    checkpoint = run / f"checkpoint-{step}"
    begin_checkpoint(checkpoint)
    shutil.copytree(model, checkpoint, dirs_exist_ok=True)
    (checkpoint / "trainer_state.json").write_text("{}")
    for name in ("optimizer.pt", "scheduler.pt", "part/of/a/shard.pt"):
        (checkpoint / name).parent.mkdir(parents=True, exist_ok=True)
        torch.save(torch.arange(99) + step, checkpoint / name)
    if whole:
        finish_checkpoint(checkpoint)
    return checkpoint


def names(run):
    return [path.name for path in checkpoint_folders(run)]


def test_a_finished_checkpoint_is_whole(run):
    """Sizes and hashes are those of the standard tools."""
    checkpoint = run / "checkpoint-6"
    assert why_not_whole(checkpoint) is None
    entries = json.loads((checkpoint / "complete.json").read_text())["files"]
    files = {path.relative_to(checkpoint).as_posix() for path in checkpoint.rglob("*") if path.is_file()}
    assert set(entries) == files - {"complete.json"}
    assert "part/of/a/shard.pt" in entries
    sums = "".join(f"{entry['sha256']}  {name}\n" for name, entry in entries.items())
    subprocess.run(["sha256sum", "--check", "--strict"], input=sums, cwd=checkpoint, text=True, check=True)
    assert newest_whole_checkpoint(run) == checkpoint
    assert checkpoint_to_resume("last", run) == str(checkpoint)
    assert checkpoint_to_resume("auto", run) == str(checkpoint)


def test_a_sharded_state_is_one(run):
    """As FSDP leaves it: weights and optimizer in folders of their own."""
    checkpoint = run / "checkpoint-6"
    withdraw_checkpoint(checkpoint)
    for name in ("optimizer.pt", "model.safetensors"):
        (checkpoint / name).rename(checkpoint / "part" / name)
    (checkpoint / "part").rename(checkpoint / "optimizer_0")
    finish_checkpoint(checkpoint)
    check_resumable(checkpoint)
    (checkpoint / "optimizer_0").rename(run / "elsewhere")
    finish_checkpoint(checkpoint)
    with pytest.raises(ValueError, match=r"optimizer.pt is not there. Pass one of the checkpoint-"):
        check_resumable(checkpoint)


def spoil(checkpoint, how):
    optimizer = checkpoint / "optimizer.pt"
    if how == "cut":
        truncate(optimizer)
    elif how == "missing":
        optimizer.unlink()
    elif how == "changed":
        content = bytearray(optimizer.read_bytes())
        content[len(content) // 2] ^= 1
        optimizer.write_bytes(content)
    elif how == "torn mark":
        truncate(checkpoint / "complete.json")
    elif how == "foreign":
        (checkpoint / "complete.json").unlink()
    else:
        withdraw_checkpoint(checkpoint)


REASONS = {
    "cut": r"optimizer.pt has [\d,]+ bytes and had [\d,]+",
    "missing": "optimizer.pt is not there",
    "changed": "the content of optimizer.pt has changed",
    "torn mark": "complete.json is unreadable",
    "foreign": r"it has no complete.json \(made by the stock Trainer or an earlier version\); pass the folder itself",
    "withdrawn": "it was still being written, or deleted, when its run was interrupted",
}


@pytest.mark.parametrize("how", REASONS)
def test_what_is_not_whole_is_passed_over_with_the_reason(run, how, caplog):
    spoil(run / "checkpoint-6", how)
    assert newest_whole_checkpoint(run) == run / "checkpoint-4"
    assert re.search(r"checkpoint-6' is passed over: " + REASONS[how], caplog.text)
    if how == "foreign":  # nothing is known against it
        assert checkpoint_to_resume(run / "checkpoint-6", run) == str(run / "checkpoint-6")
    else:
        with pytest.raises(ValueError, match=r"checkpoint-6' is cut short or damaged: " + REASONS[how]):
            checkpoint_to_resume(run / "checkpoint-6", run)


def test_last_is_the_newest_checkpoint(tmp_path):
    assert checkpoint_to_resume(None, tmp_path) is None
    assert checkpoint_to_resume("false", tmp_path) is None
    with pytest.raises(FileNotFoundError, match=r"There is no checkpoint-.* that is whole"):
        checkpoint_to_resume("last", tmp_path)


def test_auto_begins_where_there_is_nothing_to_lose(tmp_path, folder):
    assert checkpoint_to_resume("auto", tmp_path / "run") is None
    unfinished = write(tmp_path / "run", 2, folder, whole=False)
    assert checkpoint_to_resume("auto", tmp_path / "run") is None
    with pytest.raises(FileNotFoundError, match=r"There is no checkpoint-.* that is whole. *Leave"):
        checkpoint_to_resume("last", tmp_path / "run")
    (unfinished / "unfinished").unlink()
    for word in ("auto", "last"):
        with pytest.raises(FileNotFoundError, match=r"\(checkpoint-2 cannot be taken for one: see the warnings.\)"):
            checkpoint_to_resume(word, tmp_path / "run")


def test_a_checkpoint_of_the_same_step_stays_until_the_new_one_is_whole(run, folder):
    write(run, 6, folder, whole=False)
    assert names(run) == ["checkpoint-2", "checkpoint-4", "replaced-checkpoint-6", "checkpoint-6"]
    assert checkpoint_to_resume("last", run) == str(run / "replaced-checkpoint-6")
    write(run, 6, folder, whole=False)  # once more
    assert why_not_whole(run / "replaced-checkpoint-6") is None
    write(run, 6, folder)
    assert names(run) == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]


def test_a_checkpoint_whose_deletion_was_interrupted_is_not_whole(run, monkeypatch):
    removed = []

    def unlink(path, *args, **kwargs):
        removed.append(path)
        if len(removed) > 4:
            raise KeyboardInterrupt
        os.unlink(path)

    monkeypatch.setattr(Path, "unlink", unlink)
    with pytest.raises(KeyboardInterrupt):
        delete_checkpoint(run / "checkpoint-6")
    monkeypatch.undo()
    assert is_unfinished(run / "checkpoint-6")
    assert newest_whole_checkpoint(run) == run / "checkpoint-4"
    delete_checkpoint(run / "checkpoint-6")
    assert names(run) == ["checkpoint-2", "checkpoint-4"]


@pytest.mark.parametrize("best", [None, 1, 3, 5])
@pytest.mark.parametrize("limit", [None, 0, 1, 2, 4, 9])
def test_the_limit_is_that_of_the_stock_trainer(tmp_path, limit, best):
    for run in ("ours", "stock"):
        for step in (1, 2, 3, 4, 5):
            (tmp_path / run / f"checkpoint-{step}").mkdir(parents=True)
            (tmp_path / run / f"checkpoint-{step}" / "complete.json").touch()
    path = None if best is None else str(tmp_path / "ours" / f"checkpoint-{best}")
    delete_old_checkpoints(tmp_path / "ours", limit, path)
    path = None if best is None else str(tmp_path / "stock" / f"checkpoint-{best}")
    rotate_checkpoints(str(tmp_path / "stock"), limit, path)
    assert names(tmp_path / "ours") == names(tmp_path / "stock")


def test_what_is_not_whole_goes_first(run, folder):
    write(run, 8, folder, whole=False)
    delete_old_checkpoints(run, 2)
    assert names(run) == ["checkpoint-4", "checkpoint-6"]
