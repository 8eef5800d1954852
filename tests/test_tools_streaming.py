"""The stream: each document once an epoch whoever reads it, and from any batch on the same as if never stopped."""

import collections
import itertools
import json
import pickle

import pytest
import torch
from datasets import Dataset
from torch.utils.data import DataLoader

from hf_selfattn.tools.collators import MaskingCollator
from hf_selfattn.tools.documents import Documents
from hf_selfattn.tools.packed_rows import PackingCollator
from hf_selfattn.tools.streaming import WINDOWS, StreamCollator, StreamedRows
from hf_selfattn.tools.windows import as_rows

from .test_tools_documents import shards
from .train_scripts import sentences, tiny_tokenizer

LENGTH = 32
BATCH = 4
BLOCK = 9
# some longer than a row, some empty, in shards of very different sizes
TEXTS = [" ".join(sentences(1 + 4 * (i % 13 == 5), i)) if i % 11 != 3 else " " * (i % 2) for i in range(130)]
SIZES = [60, 0, 1, 69]


@pytest.fixture(scope="module")
def documents(tmp_path_factory):
    return Documents(shards(tmp_path_factory.mktemp("shards"), "jsonl", TEXTS, SIZES))


def stream(documents, process=0, processes=1, **options):
    options = {"shuffle_buffer": BLOCK, "seed": 3, **options}
    return StreamedRows(documents, tiny_tokenizer(), LENGTH, BATCH, process=process, processes=processes, **options)


def collator(rows):
    masking = MaskingCollator(tiny_tokenizer(), 0.3, seed=1)
    return StreamCollator(PackingCollator(masking, LENGTH) if rows.packing else masking)


def loader(rows, workers, collate=None, **options):
    return DataLoader(rows, BATCH, collate_fn=collate or collator(rows), num_workers=workers, **options)


def items(rows, workers, epochs):
    """The rows of the first epochs, whole, as the data workers give them."""
    found, reached = [], dict.fromkeys(range(max(workers, 1)), -1)
    for batch in loader(rows, workers, list):
        found += [item for item in batch if item.cursor["epoch"] < epochs]
        reached[batch[-1].cursor["worker"]] = batch[-1].cursor["epoch"]
        if min(reached.values()) >= epochs:
            break
    return found


def pieces_of(found):
    """epoch -> the documents and windows in it, in their order."""
    pieces = collections.defaultdict(list)
    for item in found:
        for piece in item.row if isinstance(item.row, list) else [item.row]:
            assert piece["epoch"] == item.cursor["epoch"]
            pieces[piece["epoch"]].append({**piece, "input_ids": piece["input_ids"].tolist()})
    return pieces


def prepared(packing=True):
    """What the same texts are when they are prepared first: the rows of all documents, in order."""
    texts = Dataset.from_dict({"text": TEXTS})
    return as_rows(texts, "text", tiny_tokenizer(), LENGTH, full=packing)["input_ids"][:]


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize(("processes", "workers"), [(1, 0), (1, 2), (2, 0), (2, 2), (3, 4)])
def test_each_document_is_read_once_an_epoch(documents, processes, workers, packing):
    parts = [items(stream(documents, i, processes, packing=packing), workers, 2) for i in range(processes)]
    pieces = [pieces_of(part) for part in parts]
    orders = []
    for epoch in (0, 1):
        found = [piece for part in pieces for piece in part[epoch]]
        orders.append([piece["example_id"] for piece in found])
        assert len(set(orders[-1])) == len(found)
        in_order = [piece["input_ids"] for piece in sorted(found, key=lambda piece: piece["example_id"])]
        assert in_order == prepared(packing)
        assert {number // WINDOWS for number in orders[-1]} == {i for i, text in enumerate(TEXTS) if text.strip()}
    assert orders[0] != orders[1]
    assert orders[0] != sorted(orders[0])
    assert max(len(piece["input_ids"]) for part in pieces for epoch in part for piece in part[epoch]) <= LENGTH


def test_rows_are_as_full_as_a_block_allows(documents):
    rows = [[len(piece["input_ids"]) for piece in item.row] for item in items(stream(documents), 0, 1)]
    assert max(map(sum, rows)) <= LENGTH
    one_block = [item.row for item in items(stream(documents, shuffle_buffer=1000), 0, 1)]
    assert len(one_block) <= len(rows)
    assert sum(map(sum, rows)) == sum(len(piece["input_ids"]) for row in one_block for piece in row)


def test_documents_of_like_length_stand_in_a_batch(documents):
    """Without packing: nearly as little padding as sorting everything gives."""
    rows = stream(documents, packing=False, shuffle_buffer=len(documents))
    lengths = torch.tensor([len(item.row["input_ids"]) for item in itertools.islice(rows, 400 // BATCH * BATCH)])

    def padding(lengths):
        batches = lengths.reshape(-1, BATCH)
        return 1 - lengths.sum() / (batches.amax(1) * BATCH).sum()

    assert padding(lengths) < padding(lengths.sort().values) + 0.05
    assert padding(lengths[torch.randperm(400)]) > 0.2


@pytest.mark.parametrize("packing", [True, False])
def test_masks_do_not_depend_on_the_split(documents, packing):
    """And neither do the documents' numbers: what is masked of a document is the same whoever reads it."""
    seen = []
    for processes, workers in ((1, 0), (2, 2)):
        labels = {}
        for process in range(processes):
            rows = stream(documents, process, processes, packing=packing)
            for batch in loader(rows, workers, with_ids(collator(rows))):
                for key, value in labels_of(batch).items():
                    assert labels.setdefault(key, value) == value
                if batch["cursor"]["epoch"] > 2:
                    break
        seen.append({key: value for key, value in labels.items() if key[0] < 2})
    assert seen[0] == seen[1]
    assert len(seen[0]) == 2 * len(prepared())
    assert len({tuple(value) for value in seen[0].values()}) > len(prepared())


class with_ids:  # noqa: N801
    """A collator that also says which documents stand in a batch, as (epoch, example_id), in order."""

    def __init__(self, collate):
        self.collate = collate

    def __call__(self, items):
        rows = [item.row if isinstance(item.row, list) else [item.row] for item in items]
        ids = [[piece["epoch"], piece["example_id"]] for row in rows for piece in row]
        return {**self.collate(items), "ids": ids}


def labels_of(batch):
    """(epoch, example_id) -> labels of its tokens."""
    real = batch["attention_mask"].bool()
    positions = batch.get("position_ids", torch.arange(real.shape[1]).expand_as(real))[real]
    starts = (positions == 0).nonzero().flatten().tolist()
    labels = batch["labels"][real].tolist()
    parts = [labels[start:stop] for start, stop in itertools.pairwise([*starts, len(labels)])]
    return {tuple(key): part for key, part in zip(batch["ids"], parts, strict=True)}


def assert_same(ours, theirs):
    assert set(ours) == set(theirs)
    for name, value in ours.items():
        same = torch.equal(value, theirs[name]) if torch.is_tensor(value) else value == theirs[name]
        assert same, name


def uninterrupted(rows, workers, epochs):
    batches, reached = [], dict.fromkeys(range(max(workers, 1)), -1)
    for batch in loader(rows, workers):
        batches.append(batch)
        reached[batch["cursor"]["worker"]] = batch["cursor"]["epoch"]
        if min(reached.values()) >= epochs:
            break
    return batches


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize(("processes", "workers", "stride"), [
    (1, 0, 1), (2, 0, 1), (1, 2, 3), (1, 4, 5), (2, 2, 7),
    pytest.param(1, 2, 1, marks=pytest.mark.slow),
    pytest.param(1, 4, 1, marks=pytest.mark.slow),
    pytest.param(3, 4, 1, marks=pytest.mark.slow),
])  # fmt: skip
def test_a_stream_goes_on_as_if_it_had_never_stopped(documents, processes, workers, stride, packing):
    """Stopped after every batch of two epochs and more: the rest is the same."""
    process = processes - 1
    whole = uninterrupted(stream(documents, process, processes, packing=packing), workers, 2)
    assert whole[-1]["cursor"]["batch"] == len(whole)
    cursors = {}
    for done, batch in enumerate(whole[:-1], 1):
        cursors[batch["cursor"]["worker"]] = batch["cursor"]
        if done % stride:
            continue
        rows = stream(documents, process, processes, packing=packing)
        rows.restore(json.loads(json.dumps(cursors)))
        rest = whole[done : done + 2 * workers + 3] if workers else whole[done:]
        for theirs, ours in zip(rest, loader(rows, workers), strict=False):
            assert_same(ours, theirs)


def test_persistent_workers_and_prefetching_change_nothing(documents):
    whole = uninterrupted(stream(documents), 2, 2)
    ways = [{"persistent_workers": True, "prefetch_factor": 5}, {"prefetch_factor": 1}]
    for options in ways:
        rows = stream(documents)
        rows.restore({cursor["worker"]: cursor for cursor in (batch["cursor"] for batch in whole[:7])})
        batches = loader(rows, 2, **options)
        for _ in range(2):  # each time from where it was restored
            for theirs, ours in zip(whole[7:], batches, strict=False):
                assert_same(ours, theirs)


def test_a_stream_travels_to_workers_that_are_not_forked(documents):
    rows = stream(documents)
    there = loader(pickle.loads(pickle.dumps(rows)), 0)
    for ours, theirs in zip(itertools.islice(there, 30), loader(rows, 0), strict=False):
        assert_same(ours, theirs)


def test_no_batch_depends_on_the_random_state(documents):
    first = uninterrupted(stream(documents), 0, 1)
    torch.manual_seed(99)
    for ours, theirs in zip(uninterrupted(stream(documents), 0, 1), first, strict=True):
        assert_same(ours, theirs)
    others = uninterrupted(stream(documents, seed=4), 0, 1)
    assert any(ours["input_ids"].tolist() != theirs["input_ids"].tolist() for ours, theirs in zip(others, first))  # noqa: B905


class TestAnotherSplit:
    """A run that goes on with other numbers of processes and workers: nothing twice, and later epochs whole."""

    def read(self, rows, workers, batches):
        pieces, cursors = [], {}
        for batch in itertools.islice(loader(rows, workers, with_ids(collator(rows))), batches):
            pieces += map(tuple, batch["ids"])
            cursors[batch["cursor"]["worker"]] = batch["cursor"]
        return pieces, cursors

    @pytest.mark.parametrize(("before", "after"), [((2, 2), (1, 3)), ((1, 0), (2, 2)), ((2, 0), (1, 0))])
    @pytest.mark.parametrize("batches", [3, 11])
    def test_nothing_is_read_twice(self, documents, before, after, batches):
        read, cursors = [], []
        for process in range(before[0]):
            pieces, newest = self.read(stream(documents, process, before[0]), before[1], batches)
            read += pieces
            cursors += newest.values()
        rest = []
        for process in range(after[0]):
            rows = stream(documents, process, after[0])
            rows.restore_elsewhere(json.loads(json.dumps(cursors)))
            pieces = pieces_of(items(rows, after[1], 3))
            rest += [(epoch, piece["example_id"]) for epoch in pieces for piece in pieces[epoch]]
        times = collections.Counter(read + rest)
        assert set(times.values()) == {1}
        last = max(epoch for epoch, _ in read)
        assert last < 2
        for epoch in range(last + 1, 3):
            assert sum(key[0] == epoch for key in rest) == len(prepared())
        left_out = len(prepared()) - sum(key[0] == last for key in times)
        assert left_out < 2 * len(prepared()) * max(before[0] * before[1], 1) * BLOCK / len(documents)

    def test_it_can_be_stopped_again(self, documents):
        _, cursors = self.read(stream(documents), 2, 9)
        rows = stream(documents)
        rows.restore_elsewhere(cursors.values())
        whole = uninterrupted(rows, 3, 2)
        for done in (1, 2, 5, len(whole) - 4):
            again = stream(documents)
            again.restore({batch["cursor"]["worker"]: batch["cursor"] for batch in whole[:done]})
            for theirs, ours in zip(whole[done:], loader(again, 3), strict=False):
                assert_same(ours, theirs)


class TestWhatIsRefused:
    def test_fewer_blocks_than_readers(self, documents):
        with pytest.raises(ValueError, match=r"130 documents are 3 blocks of 50 for 4 of them. Pass a .* 32 or less"):
            next(iter(stream(documents, 0, 4, shuffle_buffer=50)))
        assert stream(documents, 0, 4, shuffle_buffer=32).blocks >= 4

    def test_batches_of_another_size(self, documents):
        rows = stream(documents)
        with pytest.raises(ValueError, match=r"makes batches of 3 rows of a stream made for another batch_size. Give"):
            next(iter(DataLoader(rows, 3, collate_fn=collator(rows))))
        with pytest.raises(ValueError, match=r"at least one document .* got --shuffle_buffer 0 and a batch of 4"):
            stream(documents, shuffle_buffer=0)

    def test_a_cursor_of_something_else(self, documents):
        cursor = next(iter(loader(stream(documents, 1, 2), 2)))["cursor"]
        for options in ({"seed": 4}, {"shuffle_buffer": 8}, {"packing": False}, {"long_texts": "truncate"}):
            for restore in ("restore", "restore_elsewhere"):
                with pytest.raises(
                    ValueError, match=r"another one than that of the checkpoint; now it has 130 documents"
                ):
                    getattr(stream(documents, 1, 2, **options), restore)(
                        {0: cursor} if restore == "restore" else [cursor]
                    )
        with pytest.raises(ValueError, match=r"another one than .* now it has 100 documents"):
            stream(documents.first(100), 1, 2).restore({0: cursor})
        with pytest.raises(
            ValueError, match=r"cursor of process 1 of 2 is no place for process 0 of 1. Resume with as many"
        ):
            stream(documents).restore({0: cursor})
        with pytest.raises(
            ValueError, match=r"there is none of process 0. Put the checkpoint's files of all machines"
        ):
            stream(documents).restore_elsewhere([cursor])
        rows = stream(documents, 1, 2)
        rows.restore({0: cursor})
        with pytest.raises(
            ValueError, match=r"that of 2 data workers a process, got 1. Resume with --dataloader_num_workers 2"
        ):
            next(iter(rows))

    def test_texts(self, documents, tmp_path):
        rows = stream(documents, long_texts="refuse")
        with pytest.raises(
            ValueError, match=r"Document \d+ of the stream has \d+ tokens, more than the 30 .*long_texts"
        ):
            list(itertools.islice(rows, 200))
        with pytest.raises(ValueError, match="--long_texts is one of split, truncate, refuse here, got 'cut'"):
            stream(documents, long_texts="cut")
        blank = Documents(shards(tmp_path, "txt", [" "] * 30, [10, 20]))
        with pytest.raises(
            ValueError, match=r"The data set is empty: no document that consumer 1 of 2 reads has text"
        ):
            next(iter(stream(blank, 1, 2)))

    def test_an_error_in_a_worker_arrives(self, tmp_path):
        (tmp_path / "a.jsonl").write_text('{"text": "a"}\n' * 140 + '{"text": "b"\n')
        rows = stream(Documents([tmp_path / "a.jsonl"]))
        with pytest.raises(ValueError, match=r"a.jsonl, line 141: each line of a stream is a JSON object"):
            list(itertools.islice(loader(rows, 2), 50))


def test_other_texts_are_other_data(tmp_path):
    """The same file with its lines in another order, and another column of it."""
    file = tmp_path / "two.jsonl"
    lines = [json.dumps({"a": f"one {number}", "b": f"two {number}"}) for number in range(60)]
    found = []
    for order, column in ((lines, "a"), (lines, "b"), (lines[1:] + lines[:1], "a"), (lines, "a")):
        file.write_text("\n".join(order))
        found.append(stream(Documents([str(file)], column)).fingerprint)
    assert found[0] == found[3]
    assert len(set(found)) == 3
