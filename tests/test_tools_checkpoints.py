import shutil
from pathlib import Path

import pytest
from transformers import AutoModelForMaskedLM

from hf_selfattn.tools.checkpoints import check_model_folder, check_resumable, checkpoint_to_resume

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


def test_last_is_the_newest_checkpoint(tmp_path):
    assert checkpoint_to_resume(None, tmp_path) is None
    assert checkpoint_to_resume("false", tmp_path) is None
    with pytest.raises(FileNotFoundError, match="There is no checkpoint-"):
        checkpoint_to_resume("last", tmp_path)
