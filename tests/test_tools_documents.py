"""Documents of files by their numbers: every kind of file, every place in it, and what cannot be read."""

import gzip
import json
import random

import fsspec
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hf_selfattn.tools import documents as documents_module
from hf_selfattn.tools.documents import Documents, open_stream
from hf_selfattn.tools.sources import SourceArguments, load_source

from .train_scripts import sentences, write_rows, write_texts

# the separators of lines and paragraphs, a vertical tab, a form feed, a next line: none of them ends a line of a file
ENDS = ["", "\u2028x", "\u2029", "\v", "\f!", "\x85 y", " 🐋"]
TEXTS = [text + end for text, end in zip(sentences(203), ENDS * 29, strict=True)]


def as_parquet(path, texts):
    table = pa.table({"number": range(len(texts)), "text": pa.array(texts, pa.string())})
    pq.write_table(table, path, row_group_size=17)


def as_json_lines(path, texts):
    write_rows(path, [{"number": i, "text": text} for i, text in enumerate(texts)])


def as_gzipped_json_lines(path, texts):
    with gzip.open(path, "wt", encoding="utf-8", newline="") as file:
        file.writelines(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)


def as_text(path, texts):
    write_texts(path, texts)


KINDS = {
    "parquet": as_parquet,
    "jsonl": as_json_lines,
    "json": as_json_lines,
    "jsonl.gz": as_gzipped_json_lines,
    "txt": as_text,
}


def shards(folder, kind, texts, sizes):
    """`texts` in files of these sizes."""
    paths, start = [], 0
    for number, size in enumerate(sizes):
        paths.append(str(folder / f"train-{number:02}.{kind}"))
        KINDS[kind](paths[-1], texts[start : start + size])
        start += size
    return paths


@pytest.fixture
def small_pieces(monkeypatch):
    """Many pieces of a file in a small file; some hold no line end, some several."""
    monkeypatch.setattr(documents_module, "PIECE", 70)


@pytest.mark.parametrize("kind", KINDS)
def test_any_place_of_uneven_shards_is_read(tmp_path, small_pieces, kind):
    sizes = [100, 0, 1, 102]
    documents = Documents(shards(tmp_path, kind, TEXTS, sizes))
    assert len(documents) == 203
    assert documents.column == "text"
    assert [len(file) for file in documents.files] == sizes
    draw = random.Random(0)
    places = [(0, 203), (100, 101), (99, 102), (202, 203), (0, 1), (200, 900), (7, 7)]
    places += [tuple(sorted((draw.randrange(203), draw.randrange(204)))) for _ in range(60)]
    for start, stop in places:
        assert documents.texts(start, stop) == TEXTS[start:stop]


def test_kinds_may_be_mixed_and_patterns_name_files(tmp_path):
    shards(tmp_path, "jsonl", TEXTS[:50], [20, 30])
    as_parquet(tmp_path / "more.parquet", TEXTS[50:])
    documents = Documents([str(tmp_path / "train-*.jsonl"), str(tmp_path / "more.parquet")])
    assert documents.texts(0, 300) == TEXTS


def test_files_elsewhere_are_read_through_fsspec(small_pieces):
    with fsspec.open("memory://stream/a.jsonl", "wb") as file:
        file.write("".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode())
    assert Documents(["memory://stream/*.jsonl"]).texts(3, 150) == TEXTS[3:150]


@pytest.mark.parametrize("end", ["", "\n", "\r\n", "\n\n", "\n  \n"])
def test_how_a_file_ends(tmp_path, end):
    path = tmp_path / "a.jsonl"
    path.write_bytes(('{"text": "one"}\r\n\n{"text": null}\n{"text": "two"}' + end).encode())
    texts = Documents([path]).texts(0, 9)
    assert [text for text in texts if text] == ["one", "two"]
    path = tmp_path / "a.txt"
    path.write_bytes(("\ufeffone\n\ntwo" + end).encode())
    assert [text for text in Documents([path]).texts(0, 9) if text.strip()] == ["one", "two"]


def test_a_part_has_fewer_documents(tmp_path):
    documents = Documents(shards(tmp_path, "jsonl", TEXTS, [100, 103]))
    part = documents.first(120)
    assert (len(part), len(documents)) == (120, 203)
    assert part.texts(90, 200) == TEXTS[90:120]
    assert len(documents.first(1000)) == 203


def test_a_sample_is_of_all_files(tmp_path):
    documents = Documents(shards(tmp_path, "jsonl", TEXTS, [100, 103]))
    assert documents.sample(1000)["text"][:] == documents.sample(203)["text"][:] == TEXTS
    assert documents.sample(20)["text"][:] == [TEXTS[203 * i // 10 + j] for i in range(10) for j in (0, 1)]
    assert len(documents.sample(7)) == 7
    assert sorted(documents.sample(201)["text"][:]) != sorted(TEXTS)
    assert len(documents.sample(201)) == 201


def test_the_column(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", [{"id": 1, "body": None}, {"id": 2, "body": "b", "title": None}])
    assert Documents([path]).column == "body"
    path = write_rows(tmp_path / "b.jsonl", [{"title": "t", "body": "b"}])
    with pytest.raises(ValueError, match="Which column holds the text is not clear"):
        Documents([path])
    assert Documents([path], "title").texts(0, 1) == ["t"]
    with pytest.raises(ValueError, match=r"there is no column 'titel'. .* Did you mean 'title'"):
        Documents([path], "titel")
    pd.DataFrame({"text": ["a"], "n": [1]}).to_parquet(tmp_path / "a.parquet")
    pd.DataFrame({"texts": ["a"]}).to_parquet(tmp_path / "b.parquet")
    pd.DataFrame({"text": [1]}).to_parquet(tmp_path / "c.parquet")
    with pytest.raises(ValueError, match=r"b.parquet: --text_column: there is no column 'text'. Columns there: texts"):
        Documents([tmp_path / "a.parquet", tmp_path / "b.parquet"])
    with pytest.raises(ValueError, match=r"c.parquet: --text_column: column 'text' holds .*int64.*, not text"):
        Documents([tmp_path / "a.parquet", tmp_path / "c.parquet"])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "cut', r"line 152: each line of a stream is a JSON object, and this one is not \(Unterminated"),
        ('["a"]', r"line 152: .* is not \(it is a list\). Mend or delete the line"),
        ('{"txt": "a"}', "line 152: there is no 'text', only txt. Mend the line"),
        ('{"text": 3}', "line 152: 'text' holds int, not text"),
    ],
)
def test_a_broken_line_is_named(tmp_path, small_pieces, line, message):
    path = tmp_path / "a.jsonl"
    lines = [json.dumps({"text": text}) for text in TEXTS]
    path.write_text("\n".join([*lines[:151], line, *lines[151:]]) + "\n")
    documents = Documents([path])
    assert documents.texts(0, 151) == TEXTS[:151]
    assert documents.texts(152, 204) == TEXTS[151:]
    with pytest.raises(ValueError, match=f"a.jsonl, {message}"):
        documents.texts(140, 160)


class TestWhatIsRefused:
    def test_files(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"no.jsonl' leads to no file that can be read. Check the path"):
            Documents([tmp_path / "no.jsonl"])
        with pytest.raises(FileNotFoundError, match=r"a-\*.jsonl' leads to no file"):
            Documents([tmp_path / "a-*.jsonl"])
        with pytest.raises(ValueError, match=r"is a folder, .* Pass a pattern of them \(as .*/train-\*.parquet\)"):
            Documents([tmp_path])
        for name in ("a.csv", "a", "a.parquet.gz"):
            (tmp_path / name).write_text("a")
            with pytest.raises(ValueError, match=rf"kinds parquet, jsonl, json, txt \(.*, got .*{name}. Convert it"):
                Documents([tmp_path / name])

    def test_damaged_ones(self, tmp_path):
        (tmp_path / "a.parquet").write_bytes(b"PAR1" + b"x" * 100)
        with pytest.raises(ValueError, match=r"a.parquet cannot be read as parquet \(.*\). Check the file"):
            Documents([tmp_path / "a.parquet"])
        whole = gzip.compress(json.dumps({"text": "a" * 1000}).encode())
        for content in (b"not gzip at all", whole[:-12]):
            (tmp_path / "a.jsonl.gz").write_bytes(content)
            with pytest.raises(ValueError, match=r"a.jsonl.gz cannot be read \(.*\). Check the file"):
                Documents([tmp_path / "a.jsonl.gz"])
        (tmp_path / "a.txt").write_bytes(b"one\n\xff\xfe\n")
        with pytest.raises(ValueError, match=r"a.txt, line 2, is not UTF-8 \(.*\). Mend the line"):
            Documents([tmp_path / "a.txt"]).texts(0, 2)

    @pytest.mark.parametrize("content", ["", "\n \n\n"])
    def test_files_without_a_document(self, tmp_path, content):
        (tmp_path / "a.jsonl").write_text(content)
        with pytest.raises(ValueError, match=r"The data set is empty: .*a.jsonl hold no document. Check the files"):
            Documents([tmp_path / "a.jsonl"])

    def test_a_file_that_has_shrunk(self, tmp_path):
        path = tmp_path / "a.txt"
        write_texts(path, TEXTS)
        documents = Documents([path])
        write_texts(path, TEXTS[:50])
        with pytest.raises(ValueError, match=r"a.txt has lost lines since training began \(203 then\)"):
            documents.texts(40, 60)


class TestOpenStream:
    def test_the_last_documents_are_held_out(self, tmp_path):
        paths = shards(tmp_path, "jsonl", TEXTS, [100, 103])
        documents, validation = open_stream(SourceArguments(train_file=paths))
        assert documents.texts(0, 300) == TEXTS[:193]  # a twentieth
        assert validation["text"][:] == TEXTS[193:]
        documents, validation = open_stream(SourceArguments(train_file=paths, max_eval_samples=7))
        assert documents.texts(0, 300) + validation["text"][:] == TEXTS
        assert len(validation) == 7
        with pytest.raises(ValueError, match=r"203 of 203 documents cannot be held out. Pass --validation_file or a"):
            open_stream(SourceArguments(train_file=paths, max_eval_samples=203))

    def test_validation_files(self, tmp_path):
        (tmp_path / "validation").mkdir()
        train = shards(tmp_path, "parquet", TEXTS[:150], [100, 50])
        held_out = shards(tmp_path / "validation", "jsonl", TEXTS[150:], [3, 50])
        source = SourceArguments(train_file=train, validation_file=held_out)
        documents, validation = open_stream(source)
        assert documents.texts(0, 300) == TEXTS[:150]
        assert validation["text"][:] == TEXTS[150:]
        source.max_eval_samples = 5
        assert open_stream(source)[1]["text"][:] == TEXTS[150:155]

    def test_a_folder_with_splits(self, tmp_path):
        for name in ("train", "validation", "test"):
            write_rows(tmp_path / f"{name}.jsonl", [{"text": f"{name} {i}"} for i in range(3)])
        documents, validation = open_stream(SourceArguments(dataset_name=str(tmp_path)))
        assert documents.texts(0, 9) == ["train 0", "train 1", "train 2"]
        assert validation["text"][:] == ["validation 0", "validation 1", "validation 2"]
        with pytest.raises(ValueError, match=r"--train_split 'trian' is no split .* Did you mean 'train'"):
            open_stream(SourceArguments(dataset_name=str(tmp_path), train_split="trian"))

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({}, "One source of documents is needed: .* got neither"),
            ({"train_file": ["a"], "dataset_name": "b"}, "One source of documents is needed: .* got both"),
            (
                {"train_file": ["a"], "max_train_samples": 5},
                "--max_train_samples draws from all examples, .* Leave it",
            ),
            ({"train_file": ["a"], "text_unit": "paragraph"}, "a line of a txt file is a document, got .* paragraph"),
            ({"dataset_name": "docstrings"}, "--streaming reads files, and docstrings come from"),
        ],
    )
    def test_what_it_refuses(self, options, message):
        with pytest.raises(ValueError, match=message):
            open_stream(SourceArguments(**options))

    def test_other_scripts_refuse_its_options(self):
        for options in ({"streaming": True}, {"shuffle_buffer": 100}):
            with pytest.raises(
                ValueError, match="--streaming and --shuffle_buffer are for the training data of pretra"
            ):
                load_source(SourceArguments(dataset_name="docstrings", **options))
