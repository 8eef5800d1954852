"""Checkpoints that are whole or not taken: a list of their files with sizes and hashes, written last.

While `checkpoint-N` is being written or deleted it holds a file `unfinished`; once everything else is on the disk,
`complete.json` names each file. So a process may be killed at any moment:

    unfinished   complete.json
        x             -           being written, or deleted: never taken, deleted or overwritten freely
        -             -           by somebody else (the stock Trainer): taken where it is named, deleted by limit alone
      x or -          x           whole, if the files are what complete.json says
"""

import hashlib
import json
import os
import re
import shutil
from pathlib import Path

from transformers.utils import logging

logger = logging.get_logger(__name__)

COMPLETE, UNFINISHED = "complete.json", "unfinished"
MARKS = (COMPLETE, UNFINISHED, f"{COMPLETE}.part")
# `replaced-`: a whole one, set aside until the new one of the same step is whole too
NAME = re.compile(r"(replaced-)?checkpoint-(\d+)")


def checkpoint_folders(output_dir):
    """The folders of checkpoints in output_dir, whole or not, by rising step."""
    output_dir = Path(output_dir)
    folders = [path for path in output_dir.iterdir() if path.is_dir()] if output_dir.is_dir() else []
    found = [(NAME.fullmatch(path.name), path) for path in folders]
    return [path for _, _, path in sorted((step_of(path), not match[1], path) for match, path in found if match)]


def step_of(folder):
    """The number of optimizer steps that a checkpoint's name tells."""
    return int(NAME.fullmatch(Path(folder).name)[2])


def _flush(path):
    """Wait until a file, or the list of a folder's files, is on the disk. (Windows has no such call for either.)"""
    if os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _digest(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _files(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in MARKS)


def is_unfinished(folder):
    """Whether this is what an interrupted run of `CheckedTrainer` left, good for nothing."""
    folder = Path(folder)
    return not (folder / COMPLETE).exists() and ((folder / UNFINISHED).exists() or not any(folder.iterdir()))


def begin_checkpoint(folder):
    """An empty folder to write into, with the mark that it is unfinished; call it in one process, others wait.

    A whole checkpoint of the same step is set aside, and deleted by `finish_checkpoint`; anything else gives way.
    """
    folder = Path(folder)
    if folder.exists():
        aside = folder.with_name(f"replaced-{folder.name}")
        if why_not_whole(folder) is None:
            if aside.exists():
                delete_checkpoint(aside)
            folder.rename(aside)
        else:
            delete_checkpoint(folder)
    folder.mkdir(parents=True)
    (folder / UNFINISHED).touch()
    _flush(folder)


def finish_checkpoint(folder):
    """Write `complete.json`: name -> size in bytes and SHA-256 of each file. Call it when all processes have written.

    (SHA-256 reads 0.9 GB/s on one core: 2 s for 150 million parameters with AdamW's state, and `sha256sum` checks it.)
    """
    folder = Path(folder)
    entries = {}
    for path in _files(folder):
        _flush(path)
        entries[path.relative_to(folder).as_posix()] = {"size": path.stat().st_size, "sha256": _digest(path)}
    for path in {path.parent for path in _files(folder)} | {folder.parent}:
        _flush(path)
    part = folder / f"{COMPLETE}.part"
    part.write_text(json.dumps({"files": entries}, indent=2) + "\n", encoding="utf-8")
    _flush(part)
    part.replace(folder / COMPLETE)
    _flush(folder)
    (folder / UNFINISHED).unlink(missing_ok=True)
    aside = folder.with_name(f"replaced-{folder.name}")
    if aside.exists():
        delete_checkpoint(aside)


def why_not_whole(folder):
    """What is wrong with a checkpoint, in words; None where each of its files is what `complete.json` says."""
    folder = Path(folder)
    if not (folder / COMPLETE).is_file():
        if is_unfinished(folder):
            return "it was still being written, or deleted, when its run was interrupted"
        return (
            f"it has no {COMPLETE} (made by the stock Trainer or an earlier version); pass the folder itself to "
            "resume from it"
        )
    try:
        entries = json.loads((folder / COMPLETE).read_text(encoding="utf-8"))["files"]
        for name, entry in entries.items():
            path = folder / name
            if not path.is_file():
                return f"{name} is not there"
            if path.stat().st_size != entry["size"]:
                return f"{name} has {path.stat().st_size:,} bytes and had {entry['size']:,}"
        for name, entry in entries.items():
            if _digest(folder / name) != entry["sha256"]:
                return f"the content of {name} has changed"
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{COMPLETE} is unreadable ({error!r})"
    return None


def newest_whole_checkpoint(output_dir, before_step=None):
    """The checkpoint of most steps in output_dir of which every file is as it was written; None without one.

    Others are passed over, each with a warning that says why.

    Args:
        before_step: only those of fewer steps.
    """
    for folder in reversed(checkpoint_folders(output_dir)):
        if before_step is not None and step_of(folder) >= before_step:
            continue
        reason = why_not_whole(folder)
        if reason is None:
            return folder
        logger.warning(f"{str(folder)!r} is passed over: {reason}.")
    return None


def withdraw_checkpoint(folder):
    """Let a checkpoint count as unfinished from now on."""
    folder = Path(folder)
    (folder / UNFINISHED).touch()
    _flush(folder)
    (folder / COMPLETE).unlink(missing_ok=True)
    _flush(folder)


def delete_checkpoint(folder):
    """Delete a checkpoint so that it counts as unfinished until it is gone: its mark goes last."""
    folder = Path(folder)
    withdraw_checkpoint(folder)
    for path in folder.iterdir():
        if path.name != UNFINISHED:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    (folder / UNFINISHED).unlink()
    folder.rmdir()


def delete_old_checkpoints(output_dir, limit, best=None):
    """Keep `limit` checkpoints, as the stock Trainer counts them: the newest and the best one are among them.

    Those without a `complete.json` go first, then the oldest.

    Args:
        limit: how many are kept; None or 0: all.
        best: the folder of the best one.
    """
    folders = checkpoint_folders(output_dir)
    if not limit or len(folders) <= limit:
        return
    complete = [folder for folder in folders if (folder / COMPLETE).is_file()]
    kept = {folder.resolve() for folder in [*complete[-1:], *([Path(best)] if best is not None else [])]}
    kept &= {folder.resolve() for folder in folders}
    order = [folder for folder in folders if folder not in complete] + complete
    removable = [folder for folder in order if folder.resolve() not in kept]
    for folder in removable[: len(folders) - max(limit, len(kept))]:
        delete_checkpoint(folder)
