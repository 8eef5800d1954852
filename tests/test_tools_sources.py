import pandas as pd
import pytest
from datasets import Dataset

from hf_selfattn.tools.sources import SourceArguments, check_columns, find_text_column, hold_out, load_source, take

from .train_scripts import sentences, write_rows, write_texts

TEXTS = sentences(40)


def as_text(path):
    return write_texts(path, TEXTS)


def as_json_lines(path):
    return write_rows(path, [{"text": text} for text in TEXTS])


def as_table(path):
    frame = pd.DataFrame({"text": TEXTS})
    if path.suffix == ".parquet":
        frame.to_parquet(path)
    else:
        frame.to_csv(path, index=False, sep="\t" if path.suffix == ".tsv" else ",")
    return str(path)


FORMATS = {
    "txt": as_text,
    "jsonl": as_json_lines,
    "json": as_json_lines,
    "csv": as_table,
    "tsv": as_table,
    "parquet": as_table,
}


@pytest.mark.parametrize("extension", FORMATS)
def test_each_kind_of_file_is_read(tmp_path, extension):
    path = FORMATS[extension](tmp_path / f"train.{extension}")
    splits = load_source(SourceArguments(train_file=[path], validation_file=[path]))
    assert splits["train"]["text"][:] == splits["validation"]["text"][:] == TEXTS


def test_a_local_folder_is_read_and_its_splits_are_chosen(tmp_path):
    for split in ("train", "validation", "test"):
        write_rows(tmp_path / f"{split}.jsonl", [{"text": f"{split} {i}"} for i in range(3)])
    splits = load_source(SourceArguments(dataset_name=str(tmp_path), validation_split="test"), predict=True)
    assert splits["train"][0]["text"] == "train 0"
    assert splits["validation"][0]["text"] == "test 0"
    assert set(splits) == {"train", "validation", "test"}
    with pytest.raises(
        ValueError, match=r"--train_split 'trian' is not a split .* Splits there: .* Did you mean 'train'"
    ):
        load_source(SourceArguments(dataset_name=str(tmp_path), train_split="trian"))


def test_paragraphs_of_a_text_file(tmp_path):
    path = tmp_path / "train.txt"
    path.write_text("one\ntwo\n\nthree\n")
    splits = load_source(SourceArguments(train_file=[str(path)], text_unit="paragraph"), evaluate=False)
    assert splits["train"]["text"][:] == ["one\ntwo", "three\n"]


def test_validation_data_is_held_out_where_there_is_none(tmp_path):
    path = as_text(tmp_path / "train.txt")
    splits = load_source(SourceArguments(train_file=[path], validation_fraction=0.1))
    assert (len(splits["train"]), len(splits["validation"])) == (36, 4)
    assert sorted(splits["train"]["text"][:] + splits["validation"]["text"][:]) == sorted(TEXTS)
    with pytest.raises(ValueError, match="1 training rows cannot be held out"):
        hold_out(Dataset.from_dict({"text": ["a"]}), 0.1, 0)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({}, ValueError, "One source of examples is needed: .* got neither"),
        ({"dataset_name": "a", "train_file": ["b"]}, ValueError, "One source of examples is needed: .* got both"),
        (
            {"dataset_name": "a", "validation_file": ["b"]},
            ValueError,
            "--validation_file goes with --train_file, got it",
        ),
        (
            {"train_file": ["b"], "dataset_config_name": "c"},
            ValueError,
            "config_name goes with --dataset_name, got it",
        ),
        ({"train_file": ["none.txt"]}, FileNotFoundError, "--train_file: 'none.txt' is not a file"),
        ({"dataset_name": "./none"}, FileNotFoundError, "'./none' is not a folder here"),
        ({"dataset_name": "docstrings", "dataset_config_name": "10"}, ValueError, "`N-packages` .* got '10'"),
    ],
)
def test_a_bad_source_is_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        load_source(SourceArguments(**arguments))


def test_a_hub_out_of_reach_is_said_with_the_way_out(monkeypatch):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(ConnectionError, match=r"someone/nothing.* name data that is here: a folder .* or files"):
        load_source(SourceArguments(dataset_name="someone/nothing"))


def test_an_empty_data_set_is_refused(tmp_path):
    empty, other = tmp_path / "empty.txt", tmp_path / "train.pdf"
    empty.write_text("")
    other.write_text("x")
    with pytest.raises(ValueError, match=r"The data set is empty: --train_file .* holds no byte"):
        load_source(SourceArguments(train_file=[str(empty)]))
    with pytest.raises(ValueError, match="takes files of one kind among txt, json"):
        load_source(SourceArguments(train_file=[str(other)]))
    folder = tmp_path / "folder"
    folder.mkdir()
    pd.DataFrame({"text": pd.Series([], dtype=str)}).to_parquet(folder / "train.parquet")
    with pytest.raises(ValueError, match=r"The data set is empty or damaged: .* cannot be read"):
        load_source(SourceArguments(dataset_name=str(folder)))
    header = tmp_path / "train.csv"
    header.write_text("text,label\n")
    with pytest.raises(ValueError, match=r"The data set is empty: .* has no row"):
        load_source(SourceArguments(train_file=[str(header)]))


def test_a_missing_column_is_refused_with_the_columns_there():
    rows = Dataset.from_dict({"sentence": ["a"], "label": [1]})
    message = "there is no column 'sentense'. Columns there: sentence, label. Did you mean 'sentence'"
    with pytest.raises(ValueError, match=message):
        check_columns(rows, ["sentense"], "--text_column")
    with pytest.raises(ValueError, match=message):
        find_text_column(rows, "sentense")
    with pytest.raises(ValueError, match=r"column 'label' holds .*, not text"):
        find_text_column(rows, "label")
    assert find_text_column(rows) == "sentence"
    with pytest.raises(ValueError, match=r"Which column holds the text is not clear. Columns there: a, b"):
        find_text_column(Dataset.from_dict({"a": ["x"], "b": ["y"]}))


def test_take_draws_by_the_seed():
    rows = Dataset.from_dict({"text": TEXTS})
    assert take(rows, 5)["text"][:] == TEXTS[:5]
    assert take(rows, 5, seed=1)["text"][:] == take(rows, 5, seed=1)["text"][:] != TEXTS[:5]
    assert len(take(rows, None)) == len(take(rows, 99, seed=1)) == 40
    with pytest.raises(ValueError, match="at least 1, got 0"):
        take(rows, 0)
