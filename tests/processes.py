"""Processes that train together, and processes in which a package is not there."""

import datetime
import faulthandler
import gc
import json
import os
import socket
from pathlib import Path

import torch
from torch import distributed, multiprocessing


def join(rank: int, port: int, size: int = 2) -> None:
    """Makes this process one of `size` on one CPU machine, as `accelerate launch` does."""
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "ACCELERATE_USE_CPU": "true",
    }
    torch.set_num_threads(1)


def join_two(rank: int, port: int) -> None:
    """Makes this process one of two."""
    join(rank, port)


def together(function, cases, folder: Path, size: int = 2) -> list:
    """What `function(case, folder)` answers in the first of `size` gloo processes, for each case in turn.

    Args:
        function: of a module; called in every process, so that what it does together it does in all.
        cases: what pickle can carry.
        folder: an empty one; answers go through JSON.
    """
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    folder = Path(folder)
    try:
        multiprocessing.spawn(_one_of, (port, size, function, list(cases), str(folder)), nprocs=size)
    except Exception as error:
        for rank in range(size):  # pytest shows it far from the error, after all that the Trainer printed
            file = folder / f"stderr-{rank}"
            told = file.read_text(errors="replace")[-4000:] if file.is_file() else "no file of its own yet"
            error.add_note(f"Process {rank} ended with:\n{told}")
        raise
    return json.loads((folder / "answers.json").read_text())


def _one_of(rank, port, size, function, cases, folder):
    with open(Path(folder) / f"stderr-{rank}", "w") as file:
        os.dup2(file.fileno(), 2)  # that of torch's own threads too
    faulthandler.enable(all_threads=True)
    join(rank, port, size)
    distributed.init_process_group("gloo", timeout=datetime.timedelta(minutes=5))
    answers = []
    for case in cases:
        answers.append(function(case, Path(folder)))
        gc.collect()  # what a case made is gone before the next begins, in all of them at the same place
        distributed.barrier()
    if rank == 0:
        (Path(folder) / "answers.json").write_text(json.dumps(answers))
    distributed.destroy_process_group()


def where_refused(*packages: str) -> str:
    """The beginning of a script for which these packages are not there."""
    return f"""
import sys

class Refused:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.split(".")[0] in {packages!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}")

sys.meta_path.insert(0, Refused)
"""
