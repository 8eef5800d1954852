"""Training rows read, tokenised and packed while training goes on, in an order that needs no memory of what was read.

Documents come in blocks of `shuffle_buffer` consecutive ones. The order of the blocks is a function of (seed, epoch),
and what becomes of a block (which of its documents share a row, the order of the rows) one of (seed, epoch, block).
Each data worker of each process, a consumer, takes every C-th block of an epoch, C consumers in all, and goes on with
the next epoch by itself: the stream has no end. A few integers, the cursor, say where a consumer stands.
"""

import functools
import itertools
import zlib
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import NamedTuple

import numpy as np
import torch
from accelerate.data_loader import DataLoaderDispatcher, IterableDatasetShard
from transformers.utils import logging

from .packed_rows import best_fit
from .windows import Frame, check_choice, cut_into_windows

logger = logging.get_logger(__name__)

SAMPLED = 8
"""Documents that stand for the texts of a stream in its fingerprint."""

TEXTS_AT_ONCE = 512  # that are tokenised together: their ids are Python integers until they are counted
WINDOWS = 2**20  # numbers for the windows of one document: example_id = number of the document * WINDOWS + window


class StreamedRow(NamedTuple):
    """What the stream hands out: a row for the collators, how many more make its batch whole, and the cursor after."""

    row: list | dict
    missing: int
    cursor: dict


class StreamedRows(torch.utils.data.IterableDataset):
    """Rows of `documents` without end: lists of documents for a `PackingCollator`, or one document each.

    A document, or a window of one, is `input_ids`, `example_id` (its own, whoever reads it) and `epoch`. Within an
    epoch each document is read by one consumer, once. Rows that are not packed stand beside rows of like length, in
    batches of `batch_size`, as far as a block reaches.

    Args:
        documents: `Documents`.
        tokenizer: for their texts.
        row_length: tokens that a row holds.
        batch_size: rows in a batch of one process; that of the data loader.
        seed: of the order, and of which documents share a row; an epoch's order differs from that of any other.
        shuffle_buffer: documents in a block: a larger one mixes and packs better, and takes longer to get ready.
        long_texts: `split`, `truncate` or `refuse`, as in `windows.as_rows`.
        process, processes: of which process of how many this is the stream; without them those of torch.distributed.
    """

    def __init__(
        self,
        documents,
        tokenizer,
        row_length,
        batch_size,
        seed=0,
        shuffle_buffer=4096,
        packing=True,
        long_texts="split",
        process=None,
        processes=None,
    ):
        check_choice(long_texts)
        if shuffle_buffer < 1 or batch_size < 1:
            raise ValueError(
                f"A block has at least one document and a batch at least one row, got --shuffle_buffer "
                f"{shuffle_buffer} and a batch of {batch_size}."
            )
        self.documents, self.tokenizer, self.frame = documents, tokenizer, Frame(tokenizer)
        self.row_length, self.room = row_length, self.frame.room(row_length)
        self.batch_size, self.seed, self.shuffle_buffer = batch_size, seed, shuffle_buffer
        self.packing, self.long_texts = packing, long_texts
        together = torch.distributed.is_available() and torch.distributed.is_initialized()
        if process is None:
            world = torch.distributed
            process, processes = (world.get_rank(), world.get_world_size()) if together else (0, 1)
        self.process, self.processes = process, processes
        self.blocks = -(-len(documents) // shuffle_buffer)
        self.split_by_accelerate = together and processes > 1  # until `keep_whole` has seen the data loader
        self.starts, self.batches, self.begin = {}, 0, (0, 0)
        self.workers_before = None
        logger.info(
            f"a stream of {len(documents):,} documents from {len(documents.files)} files, in {self.blocks:,} blocks "
            f"of {shuffle_buffer:,} (--shuffle_buffer), for {processes} processes; texts of more than {row_length} "
            f"tokens: --long_texts {long_texts}"
        )

    @functools.cached_property
    def fingerprint(self):
        """Of whatever decides which rows a block gives; of the texts some are read."""
        files = [(PurePosixPath(file.name).name, len(file)) for file in self.documents.files]
        places = sorted({number * (len(self.documents) - 1) // (SAMPLED - 1) for number in range(SAMPLED)})
        texts = [self.documents.texts(place, place + 1) for place in places]
        settings = (files, len(self.documents), self.documents.column, texts)
        settings += (len(self.tokenizer), self.row_length, self.seed, self.shuffle_buffer,
                    self.packing or self.batch_size, self.long_texts)  # fmt: skip
        return zlib.crc32(repr(settings).encode())

    def keep_whole(self, loader):
        """Makes what `accelerate` prepared read this stream as it is. The stream is that of one process already;
        accelerate would hand on every n-th batch of it and throw the rest away.

        Raises:
            ValueError: for a loader that reads for all processes in the first (`dispatch_batches`).
        """
        if isinstance(loader, DataLoaderDispatcher):
            raise ValueError(
                "A stream is read by each process itself, and accelerate's dispatch_batches reads all in the first. "
                "Pass --accelerator_config '{\"dispatch_batches\": false}'."
            )
        if isinstance(loader.dataset, IterableDatasetShard):
            loader.dataset.num_processes, loader.dataset.process_index = 1, 0
        self.split_by_accelerate = False
        return loader

    def restore(self, cursors):
        """Go on after the batches with these cursors: {worker: the newest of its cursors}, all of this process.

        The batches to come are those of a run that was never stopped.

        Raises:
            ValueError: if data, settings, the number of processes or, once it is read, that of data workers differ.
        """
        cursors = {int(worker): dict(cursor) for worker, cursor in cursors.items()}
        self.starts, self.batches, self.workers_before = cursors, 0, None
        for cursor in cursors.values():
            self._check_settings(cursor)
            if (cursor["process"], cursor["processes"]) != (self.process, self.processes):
                raise ValueError(
                    f"The cursor of process {cursor['process']} of {cursor['processes']} is no place for process "
                    f"{self.process} of {self.processes}. Resume with as many processes, or begin behind the furthest "
                    f"block of all (`restore_elsewhere`)."
                )
            self.batches = max(self.batches, cursor["batch"])
            self.begin = cursor["begin_epoch"], cursor["begin_block"]
            self.workers_before = cursor["workers"]

    def restore_elsewhere(self, cursors):
        """Go on with another number of processes or data workers, after the furthest block that any consumer began.

        No document is read twice in the epoch. What the others had not read up to there waits for the next epoch.

        Args:
            cursors: the newest of each worker of each process.

        Raises:
            ValueError: if data or settings differ, or a process has left no cursor.
        """
        cursors = list(cursors)
        for cursor in cursors:
            self._check_settings(cursor)
        lost = {*range(cursors[0]["processes"])} - {cursor["process"] for cursor in cursors} if cursors else {0}
        if lost:
            raise ValueError(
                f"Where the stream stands is known from the cursors of all processes, and there is none of process "
                f"{', '.join(map(str, sorted(lost)))}. Put the checkpoint's files of all machines in one folder."
            )
        epoch = max(cursor["epoch"] for cursor in cursors)
        furthest = [self._place(cursor) for cursor in cursors if cursor["epoch"] == epoch]
        self.starts, self.batches, self.workers_before = {}, 0, None
        self.begin = (epoch, max(furthest) + 1)
        logger.warning(
            f"The stream goes on in epoch {epoch} after {self.begin[1]:,} of {self.blocks:,} blocks, split anew over "
            f"{self.processes} processes: what earlier consumers had left of these blocks waits for the next epoch."
        )

    def _place(self, cursor):
        """Where in the epoch's order the block stands in which the cursor is."""
        begin = cursor["begin_block"] if cursor["epoch"] == cursor["begin_epoch"] else 0
        consumer = cursor["process"] * cursor["workers"] + cursor["worker"]
        return begin + cursor["block"] * cursor["processes"] * cursor["workers"] + consumer

    def _check_settings(self, cursor):
        if cursor["fingerprint"] != self.fingerprint:
            raise ValueError(
                f"The stream is another one than that of the checkpoint; now it has {len(self.documents):,} "
                f"documents, {len(self.tokenizer):,} tokens in its tokenizer, rows of {self.row_length}, seed "
                f"{self.seed}, --shuffle_buffer {self.shuffle_buffer}, --packing {self.packing} (if False: batches of "
                f"{self.batch_size}), --long_texts {self.long_texts}. Resume with the same data and options, or begin "
                f"a new run from the saved weights (--model_name_or_path)."
            )

    def __iter__(self):
        info = torch.utils.data.get_worker_info()
        number, workers = (0, 1) if info is None else (info.id, info.num_workers)
        self._check_split(workers)
        # a loader asks its workers in turn, from the first on: after n batches it is the turn of worker n modulo all
        worker = (number + self.batches) % workers
        start = self.starts.get(worker) or {"epoch": self.begin[0], "block": 0, "row": 0}
        fixed = {
            "process": self.process, "processes": self.processes, "worker": worker, "workers": workers,
            "begin_epoch": self.begin[0], "begin_block": self.begin[1], "fingerprint": self.fingerprint,
        }  # fmt: skip
        places = self._places(self.process * workers + worker, self.processes * workers, start)
        for taken, (place, row) in enumerate(places):
            of_this_worker, before = divmod(taken, self.batch_size)
            batch = self.batches + of_this_worker * workers + number + 1
            yield StreamedRow(row, self.batch_size - 1 - before, {**fixed, **place, "batch": batch})

    def _check_split(self, workers):
        if self.split_by_accelerate:
            raise ValueError(
                "This stream is the part of one process, and accelerate's data loader takes it for that of all and "
                "drops the others' batches. Call `keep_whole(loader)` on the prepared loader, as CheckedTrainer does."
            )
        if self.workers_before not in (None, workers):
            before = self.workers_before if self.workers_before > 1 else "0 or 1"
            raise ValueError(
                f"The checkpoint is that of {before} data workers a process, got {workers}. Resume with "
                f"--dataloader_num_workers {before}, or begin behind the furthest block of all (`restore_elsewhere`)."
            )
        consumers = self.processes * workers
        if self.blocks < consumers:
            raise ValueError(
                f"Each data worker of each process reads blocks of its own: {len(self.documents):,} documents are "
                f"{self.blocks:,} blocks of {self.shuffle_buffer:,} for {consumers} of them. Pass a --shuffle_buffer "
                f"of {max(len(self.documents) // consumers, 1)} or less, or fewer --dataloader_num_workers."
            )

    def _places(self, consumer, consumers, start):
        """(where a row stands, the row), without end."""
        done, skipped, missing = start["block"], start["row"], 0
        for epoch in itertools.count(start["epoch"]):
            order = np.random.default_rng((self.seed, epoch)).permutation(self.blocks)
            first = self.begin[1] if epoch == self.begin[0] else 0
            mine, found = order[first:][consumer::consumers].tolist(), done + first > 0
            for number in range(done, len(mine)):
                # the cursor stands at the end of a batch, so what it counts of a block is `head` and whole batches
                head = skipped % self.batch_size if skipped else missing
                for row, item in enumerate(self.rows_of_block(epoch, mine[number], head), 1):
                    found = True
                    if row > skipped:
                        missing = (missing - 1) % self.batch_size
                        yield {"epoch": epoch, "block": number, "row": row}, item
                skipped = 0
            if not found:
                raise ValueError(
                    f"The data set is empty: no document that consumer {consumer} of {consumers} reads has text. "
                    f"Check the files, or pass another --text_column."
                )
            done = 0

    def rows_of_block(self, epoch, block, head=0):
        """The rows that documents block * shuffle_buffer, … become in an epoch.

        Args:
            head: how many rows are missing in the batch that is being filled; without packing they come first.
        """
        pieces = [{**piece, "epoch": epoch} for piece in self._pieces(block)]
        lengths = np.array([len(piece["input_ids"]) for piece in pieces], dtype=np.int64)
        generator = np.random.default_rng((self.seed, epoch, block))
        mixed = generator.permutation(len(pieces))
        if self.packing:
            order, bounds = best_fit(lengths[mixed], self.row_length)
            for row in generator.permutation(len(bounds) - 1):
                yield [pieces[piece] for piece in mixed[order[bounds[row] : bounds[row + 1]]]]
            return
        by_length = mixed[np.argsort(lengths[mixed], kind="stable")]
        # the shortest fill up the batch of two blocks, where a difference in length costs least
        odd = min(head, len(by_length)) + max(len(by_length) - head, 0) % self.batch_size
        batches = generator.permutation(by_length[odd:].reshape(-1, self.batch_size))
        for piece in [*by_length[:head], *batches.reshape(-1), *by_length[head:odd]]:
            yield pieces[piece]

    def _pieces(self, block):
        """The windows of the documents of a block: `input_ids` (tokens,) with special ones, and `example_id`."""
        start = block * self.shuffle_buffer
        texts = self.documents.texts(start, min(start + self.shuffle_buffer, len(self.documents)))
        texts = [(number, text) for number, text in enumerate(texts, start) if text and not text.isspace()]
        for first in range(0, len(texts), TEXTS_AT_ONCE):
            numbers, some = zip(*texts[first : first + TEXTS_AT_ONCE], strict=True)
            encoded = self.tokenizer(list(some), add_special_tokens=False, verbose=False)["input_ids"]
            for number, ids in zip(numbers, encoded, strict=True):
                where = f"Document {number} of the stream"
                windows = cut_into_windows(ids, self.room, self.long_texts, where, full=self.packing)
                for window, part in enumerate(windows):
                    ids = np.array(self.frame.row(part)["input_ids"], dtype=np.int32)
                    yield {"input_ids": ids, "example_id": number * WINDOWS + window}


@dataclass
class StreamCollator:
    """What `collator` makes of the rows of a `StreamedRows`, and `cursor`: where the stream stands after the batch.

    `cursor` is a dict of integers; it has to leave the batch before the model sees it.
    """

    collator: object

    def __call__(self, items):
        if [item.missing for item in items] != list(range(len(items) - 1, -1, -1)):
            raise ValueError(
                f"The cursor counts whole batches, and the data loader makes batches of {len(items)} rows of a stream "
                f"made for another batch_size. Give StreamedRows the batch_size of the loader."
            )
        return {**self.collator([item.row for item in items]), "cursor": items[-1].cursor}


def check_training(arguments):
    """Refuse TrainingArguments with which a stream cannot be read, and let each process read its own part.

    Raises:
        ValueError: without a number of steps, or where batches are cut apart or come out of turn.
    """
    if arguments.max_steps <= 0:
        raise ValueError(
            "A stream has no end, so training needs a number of steps, and --max_steps is not given. Pass it "
            "(--num_train_epochs does not count for a stream)."
        )
    options = arguments.accelerator_config
    reasons = []
    if options.dispatch_batches:
        reasons.append("accelerator_config dispatch_batches reads everything in the first process")
    if options.split_batches:
        reasons.append("accelerator_config split_batches cuts batches apart")
    if arguments.n_gpu > 1:
        reasons.append(f"DataParallel on {arguments.n_gpu} GPUs cuts batches apart (`accelerate launch` does not)")
    if not arguments.dataloader_in_order:
        reasons.append("--dataloader_in_order false lets batches overtake each other")
    if reasons:
        raise ValueError(f"--streaming true is not possible: {'; '.join(reasons)}. Leave that out.")
    options.dispatch_batches = False
