"""Where the examples come from: a Hub name, a local folder, files, or the built-in corpus of docstrings."""

import re
from dataclasses import dataclass, field
from pathlib import Path

from datasets import Dataset, DatasetDict, load_dataset
from datasets.exceptions import DatasetGenerationError
from transformers.utils import logging

from .docstrings import load_docstrings
from .recipes import nearest

logger = logging.get_logger(__name__)

FORMATS = {"txt": "text", "json": "json", "jsonl": "json", "csv": "csv", "tsv": "csv", "parquet": "parquet"}


@dataclass
class SourceArguments:
    """Which examples to read. Either `dataset_name` or `train_file` is needed."""

    dataset_name: str | None = field(
        default=None,
        metadata={"help": "A data set's name on the Hub, a local folder, or `docstrings`: the documentation of the "
                          "Python packages installed here."},
    )  # fmt: skip
    dataset_config_name: str | None = field(
        default=None,
        metadata={"help": "The data set's configuration. For docstrings: `N-packages`, the N largest packages in "
                          "equal shares with their names hidden, to tell which one a text comes from."},
    )  # fmt: skip
    train_file: list[str] | None = field(
        default=None, metadata={"help": "Files to train on: txt, json, jsonl, csv, tsv or parquet."}
    )
    validation_file: list[str] | None = field(default=None, metadata={"help": "Files to evaluate on."})
    test_file: list[str] | None = field(default=None, metadata={"help": "Files to predict."})
    train_split: str = field(default="train", metadata={"help": "Name of the split to train on."})
    validation_split: str = field(default="validation", metadata={"help": "Name of the split to evaluate on."})
    test_split: str = field(default="test", metadata={"help": "Name of the split to predict."})
    validation_fraction: float = field(
        default=0.05, metadata={"help": "Share of the training examples held out where no validation data is given."}
    )
    text_unit: str = field(
        default="line",
        metadata={"help": "What one row of a txt file is.", "choices": ["line", "paragraph", "document"]},
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on that many, drawn by the seed."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Evaluate on that many, drawn by the seed."})
    max_predict_samples: int | None = field(default=None, metadata={"help": "Predict that many, from the beginning."})
    streaming: bool = field(
        default=False,
        metadata={"help": "Read parquet, json lines or txt while training goes on, instead of preparing them first."},
    )
    shuffle_buffer: int = field(
        default=4096, metadata={"help": "Of a stream: neighbouring documents that are mixed and packed together."}
    )


def _load(path, *args, **kwargs):
    try:
        return load_dataset(path, *args, **kwargs)
    except ConnectionError as error:
        raise ConnectionError(
            f"{error}. Connect this machine, or name data that is here: a folder (--dataset_name ./folder), or files "
            "(--train_file, --validation_file; --help has those of this script)."
        ) from error
    except DatasetGenerationError as error:
        cause = error.__cause__ or error.__context__ or error
        raise ValueError(
            f"The data set is empty or damaged: {kwargs.get('data_files', path)} cannot be read ({cause}). "
            f"Check the files."
        ) from error
    except ValueError as error:
        if "corresponds to no data" not in str(error):  # what `datasets` says of a file without a row
            raise
        raise ValueError(
            f"The data set is empty: {kwargs.get('data_files', path)} has no row. Check the file."
        ) from error


def _load_files(arguments):
    files = {
        "train": arguments.train_file,
        "validation": arguments.validation_file,
        "test": arguments.test_file,
    }
    splits = DatasetDict()
    for split, paths in files.items():
        if not paths:
            continue
        missing = [path for path in paths if not Path(path).exists()]
        if missing:
            raise FileNotFoundError(f"--{split}_file: {missing[0]!r} is not a file. Check the path.")
        extensions = {Path(path.removesuffix(".gz")).suffix.lstrip(".") for path in paths}
        if len(extensions) > 1 or not extensions <= set(FORMATS):
            raise ValueError(
                f"--{split}_file takes files of one kind among {', '.join(FORMATS)}, got "
                f"{', '.join(map(str, paths))}. Convert them to one of these."
            )
        extension = extensions.pop()
        kwargs = {"sample_by": arguments.text_unit} if extension == "txt" else {}
        if extension == "tsv":
            kwargs["sep"] = "\t"
        if all(Path(path).stat().st_size == 0 for path in paths):
            raise ValueError(f"The data set is empty: --{split}_file {', '.join(paths)} holds no byte.")
        splits[split] = _load(FORMATS[extension], data_files=list(paths), split="train", **kwargs)
    return splits


def _load_named(arguments):
    name, config = arguments.dataset_name, arguments.dataset_config_name
    if name == "docstrings":
        packages = re.fullmatch(r"(\d+)-packages", config or "")
        if config and not packages:
            raise ValueError(f"--dataset_config_name of docstrings is `N-packages` (as 10-packages), got {config!r}.")
        return load_docstrings(packages=int(packages.group(1)) if packages else None)
    looks_like_path = name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name
    if looks_like_path and not Path(name).expanduser().exists():
        raise FileNotFoundError(
            f"--dataset_name {name!r} is not a folder here. Pass a folder that is, a name on the Hub, or docstrings."
        )
    return _load(str(Path(name).expanduser()) if looks_like_path else name, config)


def _named_split(splits, name, option, required):
    if name in splits:
        return splits[name]
    default = SourceArguments.__dataclass_fields__[option].default
    if required or name != default:
        raise ValueError(
            f"--{option} {name!r} is not a split of this data set. Splits there: {', '.join(splits)}."
            f"{nearest(name, splits)}"
        )
    return None


def load_source(arguments, seed=0, evaluate=True, predict=False):
    """A DatasetDict with `train` and, as asked for, `validation` and `test`.

    Where there is no validation data, `validation_fraction` of the training examples is held out (and logged).
    `max_*_samples` are not applied here: see `take`.

    Raises:
        FileNotFoundError: a file or folder that is not there.
        ValueError: no source, two sources, a split that is not there, an empty split, options of a stream.
    """
    if arguments.streaming or arguments.shuffle_buffer != SourceArguments.shuffle_buffer:
        raise ValueError(
            "--streaming and --shuffle_buffer are for the training data of pretrain.py, where they go together; got "
            f"--streaming {arguments.streaming} and --shuffle_buffer {arguments.shuffle_buffer}. Leave them out."
        )
    if (arguments.dataset_name is None) == (not arguments.train_file):
        raise ValueError(
            "One source of examples is needed: --dataset_name NAME (a Hub name, a local folder, or docstrings), "
            "or --train_file FILE; got " + ("both." if arguments.train_file else "neither.")
        )
    ignored = [
        name for name in ("validation_file", "test_file") if arguments.dataset_name and getattr(arguments, name)
    ]
    if arguments.train_file and arguments.dataset_config_name:
        ignored.append("dataset_config_name")
    if ignored:
        raise ValueError(
            f"--{ignored[0]} goes with {'--dataset_name' if arguments.train_file else '--train_file'}, got it with "
            f"{'--train_file' if arguments.train_file else '--dataset_name'}. Files go with files; of a named data "
            "set choose --train_split, --validation_split and --test_split."
        )
    if arguments.train_file:
        splits = _load_files(arguments)
        if not predict:
            splits.pop("test", None)
    else:
        found = _load_named(arguments)
        splits = DatasetDict(train=_named_split(found, arguments.train_split, "train_split", required=True))
        for split, wanted in (("validation", evaluate), ("test", predict)):
            option = f"{split}_split"
            rows = _named_split(found, getattr(arguments, option), option, required=False) if wanted else None
            if rows is not None:
                splits[split] = rows
    for split, rows in splits.items():
        _check_rows(rows, split)
    if evaluate and "validation" not in splits:
        splits["train"], splits["validation"] = hold_out(splits["train"], arguments.validation_fraction, seed)
    return splits


def load_validation(arguments):
    """The validation rows alone: of --validation_file, or a split of a named data set.

    Raises:
        FileNotFoundError: a file or folder that is not there.
        ValueError: no source, two sources, a split that is not there, an empty split.
    """
    if (arguments.dataset_name is None) == (not arguments.validation_file):
        raise ValueError(
            "One source of examples is needed: --dataset_name NAME (a Hub name, a local folder, or docstrings), "
            "or --validation_file FILE; got " + ("both." if arguments.validation_file else "neither.")
        )
    if arguments.validation_file and arguments.dataset_config_name:
        raise ValueError(
            f"--dataset_config_name goes with --dataset_name, got {arguments.dataset_config_name!r} with "
            "--validation_file. Leave it out."
        )
    if arguments.validation_file:
        rows = _load_files(arguments)["validation"]
    else:
        rows = _named_split(_load_named(arguments), arguments.validation_split, "validation_split", required=True)
    _check_rows(rows, "validation")
    return rows


def _check_rows(rows, split):
    if len(rows) == 0:
        raise ValueError(f"The data set is empty: its {split} split has no row. Check the file or the split's name.")


def hold_out(rows, fraction, seed):
    """(training rows, validation rows): a share drawn by the seed, at least one row each."""
    if len(rows) < 2 or not 0 < fraction < 1:
        raise ValueError(
            f"There is no validation data, and {fraction} of {len(rows)} training rows cannot be held out. "
            f"Pass --validation_file, --validation_split or a --validation_fraction between 0 and 1."
        )
    size = min(max(1, round(fraction * len(rows))), len(rows) - 1)
    parts = rows.train_test_split(test_size=size, seed=seed)
    logger.warning(
        f"No validation data: {size:,} of {len(rows):,} training rows (drawn by seed {seed}) are held out for it."
    )
    return parts["train"], parts["test"]


def take(rows: Dataset, count, seed=None):
    """The first `count` rows in the order drawn by `seed` (without a seed: in their own order); all where None."""
    if count is None or count >= len(rows):
        return rows
    if count < 1:
        raise ValueError(f"A number of samples is at least 1, got {count}. Leave --max_*_samples out to take all.")
    return (rows if seed is None else rows.shuffle(seed=seed)).select(range(count))


def check_columns(rows, names, option):
    """Refuse names that are not columns, with the list of those that are."""
    for name in names:
        if name not in rows.column_names:
            raise ValueError(
                f"{option}: there is no column {name!r}. Columns there: {', '.join(rows.column_names)}."
                f"{nearest(name, rows.column_names)} Pass {option} with one of them."
            )


def is_text(rows, name):
    feature = rows.features[name]
    return getattr(feature, "dtype", None) in ("string", "large_string")


def find_text_column(rows, name=None, option="--text_column"):
    """The column that holds the text: `name` if given, else `text`, else the only column of strings."""
    if name is not None:
        check_columns(rows, [name], option)
        if not is_text(rows, name):
            raise ValueError(f"{option}: column {name!r} holds {rows.features[name]}, not text. Pass another column.")
        return name
    texts = [column for column in rows.column_names if is_text(rows, column)]
    if "text" in texts:
        return "text"
    if len(texts) != 1:
        raise ValueError(
            f"Which column holds the text is not clear. Columns there: {', '.join(rows.column_names)}. "
            f"Pass {option} with one of them."
        )
    return texts[0]
