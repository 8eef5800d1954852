"""Trainings that are killed and resumed until they are done. One process imports everything and forks each of them.

python -m tests.killed_runs < requests      a request and its answer are a line of JSON each
"""

import contextlib
import itertools
import json
import os
import random
import select
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path

import numpy as np
import torch
import transformers.modeling_utils
from accelerate.data_loader import IterableDatasetShard
from datasets import Dataset
from tqdm.std import tqdm
from transformers import (
    AutoConfig,
    AutoModelForMaskedLM,
    DataCollatorForLanguageModeling,
    TrainerCallback,
    set_seed,
)

from hf_selfattn.tools.checkpoints import checkpoint_to_resume, prepare_output_dir
from hf_selfattn.tools.collators import MaskingCollator
from hf_selfattn.tools.documents import Documents
from hf_selfattn.tools.loss_guard import LossGuard
from hf_selfattn.tools.packed_rows import PackedRows, PackingCollator
from hf_selfattn.tools.safe_checkpoints import (
    checkpoint_folders,
    is_unfinished,
    newest_whole_checkpoint,
    step_of,
)
from hf_selfattn.tools.streaming import StreamCollator, StreamedRows
from hf_selfattn.tools.training import CheckedTrainer, Rows, ScriptArguments

from .processes import join
from .train_scripts import sentences, tiny_tokenizer, write_texts

STEPS, SAVE_STEPS, ACCUMULATION, ROWS_PER_STEP = 14, 3, 2, 8
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
DROPOUT = {  # BERT's are 0.1
    "selfattn": {"embedding_dropout": 0.1, "hidden_dropout": 0.1, "attention_dropout": 0.1},
    "bert": {},
}
ROW_LENGTH = 48
PATIENCE = 200  # seconds after which a run that does not end hangs


class ToyStream(torch.utils.data.IterableDataset):
    """Rows without end, each data worker of each process its own part; a cursor counts what a worker has taken."""

    def __init__(self, rows, batch_size, process, processes):
        self.rows, self.batch_size, self.process, self.processes = rows, batch_size, process, processes
        self.taken = {}

    def restore(self, cursors):
        self.taken = {worker: cursor["taken"] for worker, cursor in cursors.items()}

    def keep_whole(self, loader):
        if isinstance(loader.dataset, IterableDatasetShard):
            loader.dataset.num_processes, loader.dataset.process_index = 1, 0
        return loader

    def __iter__(self):
        info = torch.utils.data.get_worker_info()
        number, workers = (0, 1) if info is None else (info.id, info.num_workers)
        worker = (number + sum(self.taken.values()) // self.batch_size) % workers  # whose turn it is
        taken, parts = self.taken.get(worker, 0), self.processes * workers
        size = len(self.rows) // parts
        for place in itertools.count(taken):
            epoch, row = divmod(place, size)
            order = np.random.default_rng(epoch).permutation(len(self.rows))[self.process * workers + worker :: parts]
            cursor = {"worker": worker, "taken": place + 1}
            yield {**self.rows[(epoch, int(order[row]))], "cursor": cursor}


class ToyCollator(MaskingCollator):
    def __call__(self, rows):
        return {**super().__call__(rows), "cursor": rows[-1]["cursor"]}


class Begun(TrainerCallback):
    """Says on a pipe that training begins."""

    def __init__(self, pipe):
        self.pipe = pipe

    def on_train_begin(self, args, state, control, **kwargs):
        os.write(self.pipe, b"x")


def rows_of(count=44):
    ids = tiny_tokenizer()(sentences(count))["input_ids"]
    return Rows(Dataset.from_dict({"input_ids": ids, "length": [len(row) for row in ids]}))


def make_trainer(case, folder, rows, pipe):
    processes, layout = case["processes"], case["layout"]
    arguments = ScriptArguments(
        output_dir=str(folder),
        max_steps=case.get("steps", STEPS),
        save_steps=SAVE_STEPS,
        divergence_patience=3,
        save_total_limit=case.get("limit", 1),
        per_device_train_batch_size=ROWS_PER_STEP // ACCUMULATION // processes,
        gradient_accumulation_steps=ACCUMULATION,
        dataloader_num_workers=case["workers"],
        learning_rate=1e-2,
        logging_steps=5,
        report_to="none",
        bf16=False,
        use_cpu=True,
        disable_tqdm=True,
    )
    collator = MaskingCollator(tiny_tokenizer(), 0.3)
    if layout == "packed":
        rows, collator = PackedRows(rows, ROW_LENGTH), PackingCollator(collator, ROW_LENGTH)
    if layout == "stream":
        rows = ToyStream(rows, arguments.per_device_train_batch_size, arguments.process_index, processes)
        collator = ToyCollator(tiny_tokenizer(), 0.3)
    if layout == "streamed":
        rows = StreamedRows(
            Documents([folder.parents[1] / "texts.txt"]),
            tiny_tokenizer(),
            ROW_LENGTH,
            arguments.per_device_train_batch_size,
            shuffle_buffer=9,
            process=arguments.process_index,
            processes=processes,
        )
        collator = StreamCollator(PackingCollator(collator, ROW_LENGTH))
    if layout == "stock masks":
        rows = [{"input_ids": row["input_ids"]} for row in rows.rows]
        collator = DataCollatorForLanguageModeling(tiny_tokenizer(), mlm_probability=0.3)
    set_seed(1)
    model = case.get("model", "selfattn")
    config = AutoConfig.for_model(model, vocab_size=len(tiny_tokenizer()), pad_token_id=0, **SIZES, **DROPOUT[model])
    return CheckedTrainer(
        model=AutoModelForMaskedLM.from_config(config),
        args=arguments,
        train_dataset=rows,
        data_collator=collator,
        processing_class=tiny_tokenizer(),
        callbacks=[Begun(pipe)],
    )


class Writes:
    """Counts what is written below a folder (files opened, copied, renamed, deleted) and kills in the midst of one."""

    EVENTS = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.copyfile")

    def __init__(self, folder, fatal):
        self.folder, self.fatal, self.count = str(folder), fatal, 0
        sys.addaudithook(self.hear)
        torch.save = self.torn(torch.save)
        transformers.modeling_utils.safe_save_file = self.torn(transformers.modeling_utils.safe_save_file)

    def hear(self, event, args):
        if event in self.EVENTS and str(args[0]).startswith(self.folder):
            if event == "open" and not args[2] & (os.O_WRONLY | os.O_RDWR):
                return
            self.count += 1
            if self.count == self.fatal:
                os.killpg(0, signal.SIGKILL)

    def torn(self, save):
        """`save`, of which half a file is left where it is the fatal one."""

        def saving(content, path, *args, **kwargs):
            self.count += 1
            save(content, path, *args, **kwargs)
            if self.count == self.fatal:
                os.truncate(path, os.path.getsize(path) // 2)
                os.killpg(0, signal.SIGKILL)

        return saving


def train(case, folder, rank, port, rows, pipe, fatal):
    """One process of a run: from the newest whole checkpoint to the end; `final.pt` and `writes` stand for the end."""
    if case["processes"] > 1:
        join(rank, port, case["processes"])
    writes = Writes(folder / "run", fatal)
    trainer = make_trainer(case, folder / "run", rows, pipe)
    with trainer.args.main_process_first():
        resume_from = checkpoint_to_resume("auto", folder / "run")
        prepare_output_dir(trainer.args, resume_from)
    if "spoilt" in case:
        train_spoilt(trainer, case["spoilt"], folder, rank)
        return
    trainer.train(resume_from_checkpoint=resume_from)
    if rank == 0:
        torch.save(trainer.model.state_dict(), folder / "final.part")
        os.replace(folder / "final.part", folder / "final.pt")
        (folder / "writes").write_text(str(writes.count))


def train_spoilt(trainer, factor, folder, rank):
    """Multiply the loss of the last process alone, after twelve steps; `error-N` is what stopped process N."""
    LossGuard.FIRST = 10
    original = trainer.compute_loss

    def spoilt(*args, **kwargs):
        hit = trainer.state.global_step >= 12 and rank == trainer.args.world_size - 1
        return original(*args, **kwargs) * (float(factor) if hit else 1.0)

    trainer.compute_loss = spoilt
    try:
        trainer.train()
    except FloatingPointError as error:
        (folder / f"error-{rank}").write_text(str(error))


def fork(function, *args):
    """The process id of a child that calls the function and ends."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        function(*args)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def lead(case, folder, rows, pipe, fatal):
    """The first process of a run and of its group; it forks the others."""
    os.setsid()
    # Progress bars of all processes that were forked share a lock, and who is killed with it never gives it back.
    tqdm.set_lock(threading.RLock())
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    fatal_rank, fatal_write = fatal or (0, None)
    others = [
        fork(train, case, folder, rank, port, rows, pipe, fatal_write if rank == fatal_rank else None)
        for rank in range(1, case["processes"])
    ]
    train(case, folder, 0, port, rows, pipe, fatal_write if fatal_rank == 0 else None)
    for other in others:
        if os.waitpid(other, 0)[1]:
            raise RuntimeError("a process of the run failed")


def attempt(case, folder, rows, fatal=None, seconds=None):
    """Let a run go on until it ends, or is killed: by itself at a write, or `seconds` after it began.

    Returns:
        whether it was killed.
    """
    reader, writer = os.pipe()
    leader = fork(lead, case, folder, rows, writer, fatal)
    os.close(writer)
    patience, ended = time.monotonic() + PATIENCE, 0
    if seconds is not None:
        select.select([reader], [], [], PATIENCE)
        time.sleep(seconds)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(leader, signal.SIGKILL)
    while not ended and time.monotonic() < patience:
        time.sleep(0.01)
        ended, status = os.waitpid(leader, os.WNOHANG)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(leader, signal.SIGKILL)
    os.close(reader)
    if not ended:
        os.waitpid(leader, 0)
        raise RuntimeError(f"a run of {case} hangs (fatal {fatal}, seconds {seconds})")
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
        return True
    if status:
        raise RuntimeError(f"a run of {case} failed")
    return False


def whole_run(case, folder, rows):
    """(weights, writes, seconds) of a run that nobody disturbs."""
    start = time.perf_counter()
    attempt(case, folder, rows)
    return torch.load(folder / "final.pt"), int((folder / "writes").read_text()), time.perf_counter() - start


def answer(case):
    """Kills runs of a case `kills` times in all, and compares the weights of each that came to its end.

    A case may name its fatal writes, [[process, number], …]; otherwise they, and the times of kills, are random.

    (Of a case with a `spoilt` loss it tells what stopped each process.)

    Returns:
        How many kills there were; how many runs ended, and with weights other than those of a run that nobody
        disturbed; how often a kill left a checkpoint to go on from, one half written, and fewer steps in whole ones
        than there had been.
    """
    rows, draw = rows_of(), random.Random(case.get("seed", 0))
    folder = Path(tempfile.mkdtemp(prefix="killed"))
    write_texts(folder / "texts.txt", sentences(200))
    told = dict.fromkeys(("kills", "ended", "different", "resumed", "half_written", "lost"), 0)
    try:
        if "spoilt" in case:
            attempt(case, folder, rows)
            return [path.read_text() for path in sorted(folder.glob("error-*"))]
        (folder / "whole").mkdir()
        expected, writes, seconds = whole_run(case, folder / "whole", rows)
        planned = [tuple(pair) for pair in case.get("fatal", [])]
        while told["kills"] < case["kills"] or not told["ended"]:
            place = folder / f"run-{told['ended']}"
            place.mkdir()
            left, killed, reached = draw.randint(2, 6), True, 0
            while killed:
                fatal, after = None, None
                if told["kills"] < case["kills"] and left > 0:
                    left -= 1
                    if planned:
                        fatal = planned.pop(0)
                    elif draw.random() < 0.6:
                        rank = case["processes"] - 1 if draw.random() < 0.2 else 0
                        fatal = (rank, draw.randint(1, writes // 2 if rank == 0 else 6))
                    else:
                        after = draw.uniform(0, 0.5 * seconds)
                killed = attempt(case, place, rows, fatal, after)
                last = newest_whole_checkpoint(place / "run")
                told["lost"] += (step_of(last) if last else 0) < reached
                reached = step_of(last) if last else 0
                told["kills"] += killed
                told["resumed"] += killed and reached > 0
                told["half_written"] += killed and any(map(is_unfinished, checkpoint_folders(place / "run")))
            told["ended"] += 1
            final = torch.load(place / "final.pt")
            told["different"] += any(not torch.equal(value, final[name]) for name, value in expected.items())
            shutil.rmtree(place)
        return told
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def main():
    torch.set_num_threads(1)
    tiny_tokenizer()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a Trainer prints is no answer
    for line in sys.stdin:
        try:
            told = answer(json.loads(line))
        except Exception:
            told = {"error": traceback.format_exc()}
        print(json.dumps(told), file=answers, flush=True)


if __name__ == "__main__":
    main()
