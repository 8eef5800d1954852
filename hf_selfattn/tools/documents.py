"""Documents in files, numbered from 0, file after file, and read from any place without reading what stands before.

What is kept in memory is where to look: rows of a parquet file's row groups, line ends in each piece of a text file.
"""

import copy
import gzip
import itertools
import json
import zlib
from pathlib import PurePosixPath
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, Features, load_dataset_builder
from fsspec.core import url_to_fs
from transformers.utils import logging

from .recipes import nearest
from .sources import find_text_column

logger = logging.get_logger(__name__)

LARGE_GROUP = 100_000  # rows
PIECE = 2**18  # bytes: read and thrown away, at most, to reach a line; an index of 8 bytes for each


class ParquetFile:
    """The rows of a parquet file; only the row groups that hold them are read."""

    def __init__(self, name, opened):
        self.name, self.opened = name, opened
        with opened() as file:
            try:
                parquet = pq.ParquetFile(file)
            except pa.ArrowInvalid as error:
                raise ValueError(f"{name} cannot be read as parquet ({error}). Check the file.") from error
            groups = [parquet.metadata.row_group(i).num_rows for i in range(parquet.num_row_groups)]
            self.schema = parquet.schema_arrow
        self.bounds = np.cumsum([0, *groups])
        if max(groups, default=0) > LARGE_GROUP:
            logger.warning(
                f"{name} has row groups of up to {max(groups):,} rows, and a row group is read whole for each block "
                f"of documents in it. Write it with smaller ones (row_group_size=10000)."
            )

    def __len__(self):
        return int(self.bounds[-1])

    def columns(self):
        features = Features.from_arrow_schema(self.schema)
        return SimpleNamespace(column_names=list(features), features=features)

    def texts(self, start, stop, column):
        first, last = np.searchsorted(self.bounds, [start, stop - 1], side="right") - 1
        with self.opened() as file:
            table = pq.ParquetFile(file).read_row_groups(range(first, last + 1), columns=[column])
        return table.column(0).slice(start - self.bounds[first], stop - start).to_pylist()


class LinesFile:
    """The lines of a file, which end at a line feed and nowhere else (U+2028 inside a JSON string ends none)."""

    def __init__(self, name, opened):
        self.name, self.opened = name, opened
        ends, last = [], b"\n"
        try:
            with opened() as file:
                while piece := file.read(PIECE):
                    ends.append(np.count_nonzero(np.frombuffer(piece, dtype=np.uint8) == 10))
                    last = piece[-1:]
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(f"{name} cannot be read ({error}). Check the file.") from error
        self.ends = np.cumsum([0, *ends])  # before each piece
        self.lines = int(self.ends[-1]) + (last != b"\n")

    def __len__(self):
        return self.lines

    def between(self, start, stop):
        """The lines with the numbers from `start` to `stop` - 1, as bytes."""
        # line n follows the n-th line end, which stands in the last piece that fewer than n stand before
        piece = max(int(np.searchsorted(self.ends, start)) - 1, 0)
        with self.opened() as file:
            file.seek(piece * PIECE)
            lines = itertools.islice(iter(file.readline, b""), start - self.ends[piece], stop - self.ends[piece])
            found = list(lines)
        if len(found) != stop - start:
            raise ValueError(f"{self.name} has lost lines since training began ({self.lines} then). Put it back.")
        return found


class TextFile(LinesFile):
    def columns(self):
        return Dataset.from_dict({"text": [""]})

    def texts(self, start, stop, column):
        texts = []
        for number, line in enumerate(self.between(start, stop), start):
            try:
                texts.append(line.decode("utf-8-sig").rstrip("\r\n"))
            except UnicodeDecodeError as error:
                raise ValueError(f"{self.name}, line {number + 1}, is not UTF-8 ({error}). Mend the line.") from error
        return texts


class JsonLinesFile(LinesFile):
    def columns(self):
        found = {}
        for number, line in enumerate(self.between(0, min(len(self), 100))):
            record = self.record(line, number) or {}
            found |= {name: value for name, value in record.items() if found.get(name) is None}
        return Dataset.from_list([found]) if found else None

    def record(self, line, number):
        """The object of a line; None for a blank one."""
        if line.isspace():
            return None
        try:
            record = json.loads(line.strip())
        except ValueError as error:
            record, why = None, str(error)
        else:
            why = f"it is a {type(record).__name__}"
        if not isinstance(record, dict):
            raise ValueError(
                f"{self.name}, line {number + 1}: each line of a stream is a JSON object, and this one is not "
                f"({why}). Mend or delete the line; write a file that is one JSON array as json lines or parquet."
            )
        return record

    def texts(self, start, stop, column):
        texts = []
        for number, line in enumerate(self.between(start, stop), start):
            record = self.record(line, number)
            if record is not None and not isinstance(record.get(column), str | None):
                raise ValueError(
                    f"{self.name}, line {number + 1}: {column!r} holds {type(record[column]).__name__}, not text. "
                    f"Mend the line, or pass another --text_column."
                )
            if record is not None and column not in record:
                raise ValueError(
                    f"{self.name}, line {number + 1}: there is no {column!r}, only {', '.join(record) or 'nothing'}. "
                    f"Mend the line, or pass another --text_column."
                )
            texts.append(None if record is None else record[column])
        return texts


READERS = {"parquet": ParquetFile, "jsonl": JsonLinesFile, "json": JsonLinesFile, "txt": TextFile}


def kind_of(name):
    return PurePosixPath(str(name).removesuffix(".gz")).suffix.lstrip(".")


class Documents:
    """The documents of files, in the order of the files: `len(documents)` and `documents.texts(start, stop)`.

    A row of a parquet file is a document, and so is a line of json lines or of plain text. An empty one is a document
    without text. Gzipped lines are read, too, but from the beginning of the file each time.

    Args:
        paths: files, or patterns with `*` for several in the order of their names; here or wherever fsspec can look
            (`hf://datasets/name/data/train-*.parquet`).
        column: with the text; found where it is clear (`find_text_column`).

    Raises:
        FileNotFoundError: a path that leads to no file.
        ValueError: a folder, another kind of file, a damaged one, no document, no such column.
    """

    def __init__(self, paths, column=None):
        self.files = [self._open(*found) for path in paths for found in self._find(str(path))]
        self.bounds = np.cumsum([0, *map(len, self.files)])
        self.stop = int(self.bounds[-1])
        with_rows = [file for file in self.files if len(file)]
        columns = {file.name: file.columns() for file in with_rows if isinstance(file, ParquetFile)}
        first = next((found for file in with_rows if (found := columns.get(file.name) or file.columns())), None)
        if first is None:
            raise ValueError(f"The data set is empty: {', '.join(map(str, paths))} hold no document. Check the files.")
        self.column = find_text_column(first, column)
        for name, found in columns.items():
            try:
                find_text_column(found, self.column)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error

    def _find(self, path):
        system, inside = url_to_fs(path)
        if system.isdir(inside):
            raise ValueError(
                f"{path!r} is a folder, and which of its files are for training is not clear. Pass a pattern of them "
                f"(as {path.rstrip('/')}/train-*.parquet), or the folder as --dataset_name."
            )
        found = sorted(system.glob(inside)) if "*" in path else [inside]
        found = [name for name in found if system.isfile(name)]
        if not found:
            raise FileNotFoundError(f"{path!r} leads to no file that can be read. Check the path.")
        return [(system, name) for name in found]

    def _open(self, system, name):
        kind, gzipped = kind_of(name), name.endswith(".gz")
        if kind not in READERS or (gzipped and kind == "parquet"):
            raise ValueError(
                f"A stream is read from files of the kinds {', '.join(READERS)} (the latter three also with .gz), got "
                f"{name}. Convert it, or leave --streaming out."
            )
        if gzipped:
            logger.warning(
                f"{name} is read from its beginning for each block of documents: unpack large files before training."
            )
        return READERS[kind](name, Opened(system, name, "gzip" if gzipped else None))

    def __len__(self):
        return self.stop

    def first(self, count):
        """The first `count` documents, of the same files."""
        part = copy.copy(self)
        part.stop = min(count, len(self))
        return part

    def texts(self, start, stop):
        """The texts of the documents from `start` to `stop` - 1; None or blank where there is none."""
        stop, texts = min(stop, len(self)), []
        for file, before, after in zip(self.files, self.bounds[:-1].tolist(), self.bounds[1:].tolist(), strict=True):
            if max(start, before) < min(stop, after):
                texts += file.texts(max(start, before) - before, min(stop, after) - before, self.column)
        return texts

    def dataset(self, start, stop):
        """The same as a datasets.Dataset with one column."""
        return Dataset.from_dict({self.column: self.texts(start, stop)})

    def sample(self, count, places=10):
        """A Dataset of `count` documents, or all where there are fewer, from places that are equally far apart."""
        if count >= len(self):
            return self.dataset(0, len(self))
        part = -(-count // places)
        starts = [len(self) * place // places for place in range(places)]
        texts = [text for start in starts for text in self.texts(start, min(start + part, len(self)))]
        return Dataset.from_dict({self.column: texts[:count]})


class Opened:
    """`open` for one file, that travels to data workers."""

    def __init__(self, system, name, compression):
        self.system, self.name, self.compression = system, name, compression

    def __call__(self):
        return self.system.open(self.name, "rb", compression=self.compression)


HELD_OUT = 1000  # documents, at most, that are kept from training where neither validation data nor a number is given


def _named_files(arguments):
    """{split: files} of a data set on the Hub or in a folder."""
    if arguments.dataset_name == "docstrings":
        raise ValueError("--streaming reads files, and docstrings come from the packages here. Leave --streaming out.")
    builder = load_dataset_builder(arguments.dataset_name, arguments.dataset_config_name)
    files = {str(split): list(found) for split, found in (builder.config.data_files or {}).items()}
    if arguments.train_split not in files:
        raise ValueError(
            f"--train_split {arguments.train_split!r} is no split of {arguments.dataset_name} that has files. Splits "
            f"there: {', '.join(files) or 'none'}.{nearest(arguments.train_split, files)}"
        )
    return {"train": files[arguments.train_split], "validation": files.get(arguments.validation_split)}


def open_stream(arguments, column=None):
    """(the Documents to train on, a Dataset with the same column to evaluate on).

    The latter is the first `max_eval_samples` documents of the validation data. Without such data the last documents
    of the training data are held out: `max_eval_samples`, or `validation_fraction` of them and 1,000 at most.

    Args:
        arguments: SourceArguments.

    Raises:
        FileNotFoundError: a path that leads to no file.
        ValueError: no source, two sources, options that a stream has no use for, and what `Documents` refuses.
    """
    if (arguments.dataset_name is None) == (not arguments.train_file):
        raise ValueError(
            "One source of documents is needed: --train_file FILES (or patterns of them), or --dataset_name NAME; "
            "got " + ("both." if arguments.train_file else "neither.")
        )
    if arguments.max_train_samples is not None:
        raise ValueError(
            "--max_train_samples draws from all examples, which --streaming does not read at once. Leave it out; "
            "--max_steps is what ends a training."
        )
    if arguments.text_unit != "line":
        raise ValueError(
            f"With --streaming a line of a txt file is a document, got --text_unit {arguments.text_unit}. "
            f"Write other units as json lines."
        )
    if arguments.train_file:
        files = {"train": arguments.train_file, "validation": arguments.validation_file}
    else:
        files = _named_files(arguments)
    documents = Documents(files["train"], column)
    count = arguments.max_eval_samples
    if count is not None and count < 1:
        raise ValueError(f"A number of samples is at least 1, got --max_eval_samples {count}.")
    if files["validation"]:
        held_out = Documents(files["validation"], documents.column)
        return documents, held_out.dataset(0, count or len(held_out))
    count = count or max(1, min(HELD_OUT, round(arguments.validation_fraction * len(documents))))
    if count >= len(documents):
        raise ValueError(
            f"There is no validation data, and {count} of {len(documents)} documents cannot be held out. Pass "
            f"--validation_file or a smaller --max_eval_samples."
        )
    kept = len(documents) - count
    logger.warning(f"No validation data: the last {count:,} of {len(documents):,} documents are held out for it.")
    return documents.first(kept), documents.dataset(kept, len(documents))
