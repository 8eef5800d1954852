"""What a result was made with: command, seed, versions, commit, machine."""

import contextlib
import importlib.metadata
import json
import platform
import shlex
import subprocess
import sys
from pathlib import Path

import torch

LIBRARIES = ("torch", "transformers", "tokenizers", "datasets", "accelerate", "evaluate", "numpy", "hf-selfattn")


def git_commit():
    """The commit of this code, with `-dirty` where files differ from it; None where it does not stand in git."""
    code = Path(__file__)
    tracked = ["git", "ls-files", "--error-unmatch", code.name]
    describe = ["git", "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    try:
        subprocess.run(tracked, cwd=code.parent, capture_output=True, check=True)
        return subprocess.run(describe, cwd=code.parent, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def versions():
    """Of Python and of the libraries that decide about a result."""
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _without_token(argv):
    """The command line with what follows --hub_token hidden."""
    shown, hide = [], False
    for word in argv:
        name, is_pair, _ = word.partition("=")
        is_token = name.startswith("--") and name.endswith("token")
        shown.append("…" if hide else f"{name}=…" if is_token and is_pair else word)
        hide = is_token and not is_pair
    return shown


def write_run_record(arguments, data):
    """`run.json` beside the result: command, seed, versions, commit, machine and the size of the data."""
    record = {
        "command": shlex.join(_without_token(sys.argv)),
        "seed": arguments.seed,
        "versions": versions(),
        "commit": git_commit(),
        "machine": {"processor": platform.processor() or platform.machine(), "threads": torch.get_num_threads(),
                    "processes": arguments.world_size, "device": str(arguments.device)},
        "data": data,
        "training_arguments": arguments.to_dict(),
    }  # fmt: skip
    path = Path(arguments.output_dir, "run.json")
    path.write_text(json.dumps(record, indent=2, ensure_ascii=False, default=str) + "\n", encoding="utf-8")
