"""Whether a folder is a checkpoint, and a whole one: asked before any work, answered without reading the weights."""

import json
import zipfile
from pathlib import Path

from transformers.trainer_utils import get_last_checkpoint

from .safe_checkpoints import (
    COMPLETE,
    NAME,
    UNFINISHED,
    checkpoint_folders,
    delete_checkpoint,
    is_unfinished,
    newest_whole_checkpoint,
    step_of,
    why_not_whole,
)
from .sharing import prepare_repository

WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
TRAINER_STATE = ("trainer_state.json", "optimizer.pt", "scheduler.pt")


def _broken(path, reason):
    return ValueError(
        f"{str(path)!r} is cut short or damaged: {reason}. Its saving was probably interrupted; use an earlier "
        f"checkpoint, or copy the folder again."
    )


def _read_json(path):
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise _broken(path, f"it is not readable as JSON ({error})") from error
    if not isinstance(content, dict):
        raise _broken(path, "it does not hold a JSON object")
    return content


def check_safetensors(path):
    """The names of a safetensors file's tensors; one shorter than its header says is refused.

    It is 8 bytes of header size, the header, and the tensors.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        header_size = int.from_bytes(file.read(8), "little")
        if size < 8 or 8 + header_size > size:
            raise _broken(path, f"its {size} bytes end within the header")
        try:
            header = json.loads(file.read(header_size))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise _broken(path, "its header is unreadable") from error
    header.pop("__metadata__", None)
    expected = 8 + header_size + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if size != expected:
        raise _broken(path, f"it has {size:,} bytes where its header asks for {expected:,}")
    return set(header)


def _check_weights(folder):
    present = [folder / name for name in WEIGHTS if (folder / name).is_file()]
    if not present:
        others = ", ".join(sorted(p.name for p in folder.iterdir())[:8]) or "nothing"
        raise FileNotFoundError(
            f"{str(folder)!r} holds no weights (none of {', '.join(WEIGHTS)}; there is {others}). "
            f"Pass a folder made by save_pretrained, or one of its checkpoint-* folders."
        )
    files, file_of = present, {}
    if present[0].suffix == ".json":
        file_of = _read_json(present[0])["weight_map"]
        files = [folder / name for name in sorted(set(file_of.values()))]
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            raise _broken(folder, f"of its {len(files)} files of weights {', '.join(missing)} is not there")
    for file in files:
        if file.suffix == ".safetensors":
            found = check_safetensors(file)
            lost = sorted(name for name, of in file_of.items() if of == file.name and name not in found)
            if lost:
                raise _broken(folder, f"its index names {lost[0]!r} in {file.name}, which does not hold it")
        elif file.suffix == ".bin" and not zipfile.is_zipfile(file):
            raise _broken(file, "it is not a whole torch file")


def check_model_folder(folder):
    """Refuse a folder that `from_pretrained` could not open, or only in part.

    Raises:
        FileNotFoundError: there is no such folder, no config.json or no weights in it.
        ValueError: a file in it is cut short.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{str(folder)!r} is not a folder. Pass a folder made by save_pretrained.")
    if not (folder / "config.json").is_file():
        inside = get_last_checkpoint(folder)
        hint = f"Perhaps {inside!r} is meant." if inside else "Pass a folder made by save_pretrained."
        raise FileNotFoundError(f"{str(folder)!r} is not a checkpoint: it has no config.json. {hint}")
    _read_json(folder / "config.json")
    _check_weights(folder)


def check_resumable(folder):
    """Refuse a folder from which training cannot go on exactly: beside the model it needs the Trainer's state.

    Where there is a `complete.json`, each file must be what it says.
    """
    folder = Path(folder)
    is_ours = folder.is_dir() and ((folder / COMPLETE).exists() or (folder / UNFINISHED).exists())
    reason = why_not_whole(folder) if is_ours else None
    if reason is not None:
        raise _broken(folder, reason)
    if not is_ours:
        check_model_folder(folder)
    missing = [name for name in TRAINER_STATE if not (folder / name).is_file()]
    if is_ours and any(folder.glob("optimizer*")):  # where it is sharded, a folder or one file a process
        missing = [name for name in missing if name != "optimizer.pt"]
    if missing:
        raise ValueError(
            f"Training cannot be resumed from {str(folder)!r}: {', '.join(missing)} is not there. Pass one of the "
            f"checkpoint-* folders, or start a new training from it with --model_name_or_path."
        )
    if is_ours:
        return
    _read_json(folder / "trainer_state.json")
    for name in TRAINER_STATE[1:]:
        if not zipfile.is_zipfile(folder / name):
            raise _broken(folder / name, "it is not a whole torch file")


def checkpoint_to_resume(value, output_dir):
    """The folder that `--resume_from_checkpoint` means.

    Args:
        value: a path; `last` (or `true`): the newest whole checkpoint in output_dir; `auto`: the same, or None where
            there is nothing yet, so that one command begins a run and goes on with it; None.

    Raises:
        FileNotFoundError: for `last` without a whole checkpoint, for `auto` with others only.
        ValueError: for a path to a checkpoint that is not whole.
    """
    word = str(value).lower()
    if value is None or word in ("false", "none", "no"):
        return None
    if word in ("last", "true", "yes", "auto"):
        folder = newest_whole_checkpoint(output_dir)
        others = [path.name for path in checkpoint_folders(output_dir) if not is_unfinished(path)]
        if folder is None and word == "auto" and not others:
            return None
        if folder is None:
            told = f" ({', '.join(others)} cannot be taken for one: see the warnings.)" if others else ""
            raise FileNotFoundError(
                f"There is no checkpoint-* folder in {str(output_dir)!r} to resume from that is whole.{told} "
                f"Leave --resume_from_checkpoint out to start anew, or pass the folder."
            )
        value = folder
    check_resumable(value)
    return str(value)


def prepare_output_dir(arguments, resume_from):
    """Refuse to mix two runs: checkpoints are told apart by step alone, and the newest would be the wrong one.

    The repository of `--push_to_hub` is made here, too, before any work.
    What an interrupted run left of a checkpoint is no obstacle; it is deleted. So call this and, before it,
    `checkpoint_to_resume` under one `main_process_first`: no process looks for checkpoints while another deletes.
    """
    folder = Path(arguments.output_dir)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--output_dir {str(folder)!r} is a file. Pass a folder.")
    if arguments.should_save:
        prepare_repository(arguments)
    if arguments.do_train:
        found = checkpoint_folders(folder)
        goes_on = resume_from is not None and Path(resume_from).resolve().parent == folder.resolve()
        if goes_on and not NAME.fullmatch(Path(resume_from).name):
            raise ValueError(
                f"A checkpoint in --output_dir is named checkpoint-N by its step, got --resume_from_checkpoint "
                f"{str(resume_from)!r}. Give it that name, or move it to another folder."
            )
        if goes_on:  # those of a run that went on from there before
            found = [path for path in found if step_of(path) > step_of(resume_from)]
        others = [path for path in found if not is_unfinished(path)]
        if others and not arguments.overwrite_output_dir:
            if goes_on:
                raise ValueError(
                    f"--resume_from_checkpoint {str(resume_from)!r} is not the newest: {others[-1].name} would count "
                    "as this run's, too. Delete the later ones by --overwrite_output_dir, or pass another folder."
                )
            raise ValueError(
                f"--output_dir {str(folder)!r} holds checkpoints of an earlier run. Go on with it by "
                f"--resume_from_checkpoint last, delete them by --overwrite_output_dir, or pass another folder."
            )
        if arguments.should_save:
            for path in found:
                delete_checkpoint(path)
    if resume_from is None and arguments.should_save:
        # The Trainer would add to the numbers of the earlier run.
        (folder / "all_results.json").unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
