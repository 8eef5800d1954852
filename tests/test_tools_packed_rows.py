"""Packed rows: no token lost, no row over-full, and for a document the same as alone in a row."""

import itertools

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import AutoConfig, AutoModelForMaskedLM, AutoModelForTokenClassification, TrainingArguments

from hf_selfattn.tools.collators import MaskingCollator, PaddingCollator
from hf_selfattn.tools.packed_rows import PackedRows, PackingCollator, best_fit, choose_packing
from hf_selfattn.tools.training import EpochSampler, Rows

from .test_tools_collators import rows_of
from .tolerances import assert_close
from .train_scripts import tiny_tokenizer

DRAWS = {
    "uniform": lambda draw, row_length, count: draw.integers(1, row_length + 1, count),
    "short": lambda draw, row_length, count: draw.integers(1, 4, count).clip(max=row_length),
    "halves": lambda draw, row_length, count: draw.integers(row_length // 2, row_length // 2 + 3, count),
    "skewed": lambda draw, row_length, count: draw.lognormal(2, 1, count).astype(int).clip(1, row_length),
    "one": lambda draw, row_length, count: np.full(count, (row_length + 2) // 3),
}


def slow_best_fit(lengths, row_length):
    """The tokens of each row, by looking at all rows for each document."""
    rows = []
    for length in sorted(lengths, reverse=True):
        fitting = [number for number, used in enumerate(rows) if used + length <= row_length]
        if fitting:
            rows[max(fitting, key=rows.__getitem__)] += length
        else:
            rows.append(length)
    return rows


@pytest.mark.parametrize("row_length", [5, 16, 37, 128])
@pytest.mark.parametrize("lengths", DRAWS)
@pytest.mark.parametrize("count", [1, 2, 67, 300])
def test_rows_are_filled_as_by_the_slow_loop(lengths, row_length, count):
    lengths = DRAWS[lengths](np.random.default_rng(count), row_length, count)
    order, bounds = best_fit(lengths, row_length)
    assert sorted(order) == list(range(count))
    assert (bounds[0], bounds[-1]) == (0, count)
    assert (np.diff(bounds) > 0).all()
    used = np.add.reduceat(lengths[order], bounds[:-1])
    assert sorted(used) == sorted(slow_best_fit(lengths.tolist(), row_length))
    again = best_fit(lengths.tolist(), row_length)
    assert np.array_equal(order, again[0])
    assert np.array_equal(bounds, again[1])


@pytest.mark.parametrize("row_length", [128, 4096])
def test_a_million_documents(row_length):
    """Within the bound of the proof, over the least number of rows that can hold the tokens; in fact nearly it."""
    lengths = np.random.default_rng(0).lognormal(4, 1, 1_000_000).astype(int).clip(1, row_length)
    order, bounds = best_fit(lengths, row_length)
    used = np.add.reduceat(lengths[order], bounds[:-1])
    assert used.max() <= row_length
    assert used.sum() == lengths.sum()
    assert np.array_equal(np.sort(order), np.arange(len(lengths)))
    assert len(used) <= 1.01 * lengths.sum() / row_length


def test_no_documents_are_no_rows():
    order, bounds = best_fit([], 8)
    assert (len(order), bounds.tolist()) == (0, [0])


@pytest.mark.parametrize(("lengths", "wrong"), [([3, 9, 2], "document 1 has 9"), ([3, 0], "document 1 has 0")])
def test_a_document_that_does_not_fit_is_refused(lengths, wrong):
    with pytest.raises(ValueError, match=rf"has 1 to 8 tokens \(row_length\), {wrong}. Cut long documents into"):
        best_fit(lengths, 8)


def data_of(rows):
    return Dataset.from_list([{"input_ids": row["input_ids"], "length": len(row["input_ids"])} for row in rows])


def packed(count=67, row_length=64, seed=0):
    return PackedRows(Rows(data_of(rows_of(count))), row_length, seed)


class TestPackedRows:
    def test_each_document_stands_in_one_row(self):
        documents, rows = rows_of(67), packed()
        items = rows.__getitems__(range(len(rows)))
        assert [sum(len(document["input_ids"]) for document in item) for item in items] == rows.lengths.tolist()
        assert rows.lengths.max() <= 64
        there = {document["example_id"]: document["input_ids"] for item in items for document in item}
        assert sum(map(len, items)) == len(documents)
        assert there == {row["example_id"]: row["input_ids"] for row in documents}

    def test_the_composition_is_a_function_of_the_seed(self):
        first, again, other = (list(packed(seed=seed)) for seed in (0, 0, 1))
        assert first == again
        assert first != other

    def test_epochs_change_the_order_and_nothing_else(self):
        rows = packed()
        sampler = EpochSampler(rows, seed=0)
        first = list(sampler)
        rows.set_epoch(1)
        second = list(sampler)
        assert [index for _, index in first] != [index for _, index in second]
        assert sorted(index for _, index in first) == sorted(index for _, index in second) == list(range(len(rows)))
        item = rows[(1, 2)]
        assert {document["epoch"] for document in item} == {1}
        assert [document["example_id"] for document in item] == [document["example_id"] for document in rows[2]]

    def test_data_workers_change_nothing(self):
        rows, collate = packed(), PackingCollator(MaskingCollator(tiny_tokenizer(), 0.3), 64)
        sampler = [(3, index) for index in range(len(rows))]
        alone, workers = (
            list(DataLoader(rows, batch_size=5, sampler=sampler, collate_fn=collate, num_workers=n)) for n in (0, 2)
        )
        for ours, theirs in zip(alone, workers, strict=True):
            assert all(torch.equal(torch.as_tensor(ours[name]), torch.as_tensor(theirs[name])) for name in ours)

    def test_documents_without_lengths_are_refused(self):
        with pytest.raises(ValueError, match="Packing needs the documents' lengths, and there is no column 'length'"):
            PackedRows(Rows(data_of(rows_of(3)).remove_columns("length")), 64)


def check_layout(batch, documents, row_length):
    """Reads a batch row by row: what stands between two boundaries is a document, as `documents` has it, or a tail.

    Returns the numbers of the documents in their order; `documents` maps (ids, labels) to numbers.
    """
    rows, length = batch["input_ids"].shape
    assert length <= row_length
    assert length % 8 == 0 or length == row_length
    boundaries = batch["cu_seq_lens_q"].tolist()
    assert batch["cu_seq_lens_q"].dtype == torch.int32
    assert torch.equal(batch["cu_seq_lens_q"], batch["cu_seq_lens_k"])
    assert (boundaries[0], boundaries[-1]) == (0, rows * length)
    steps = [stop - start for start, stop in itertools.pairwise(boundaries)]
    assert batch["max_length_q"] == batch["max_length_k"] == max(steps)
    assert set(range(0, rows * length, length)) <= set(boundaries)
    found = []
    for start, stop in itertools.pairwise(boundaries):
        assert batch["position_ids"].flatten()[start:stop].tolist() == list(range(stop - start))
        parts = {name: batch[name].flatten()[start:stop].tolist() for name in ("input_ids", "attention_mask")}
        labels = batch["labels"].flatten()[start:stop].tolist() if batch["labels"].shape == (rows, length) else None
        if parts["attention_mask"][0]:
            assert set(parts["attention_mask"]) == {1}
            found.append(documents[(tuple(parts["input_ids"]), None if labels is None else tuple(labels))])
        else:
            assert set(parts["attention_mask"]) == {0}
            assert stop % length == 0
            assert set(parts["input_ids"]) == {tiny_tokenizer().pad_token_id}
            assert labels is None or set(labels) == {-100}
    return found


def alone(collator, rows):
    """(ids, labels of tokens or None) -> number of the document, from a batch of each by itself."""
    found = {}
    for number, row in enumerate(rows):
        batch, length = collator([row]), len(row["input_ids"])
        labels = batch["labels"][0, :length].tolist() if batch["labels"].dim() == 2 else None
        found[(tuple(batch["input_ids"][0, :length].tolist()), None if labels is None else tuple(labels))] = number
    return found


class TestPackingCollator:
    @pytest.mark.parametrize("row_length", [43, 64, 200])
    @pytest.mark.parametrize("count", [1, 2, 31])
    def test_masked_documents_are_what_they_are_alone(self, row_length, count):
        rows, collator = rows_of(count, epoch=2), MaskingCollator(tiny_tokenizer(), 0.3, seed=5)
        batch = PackingCollator(collator, row_length)(rows)
        assert sorted(check_layout(batch, alone(collator, rows), row_length)) == list(range(count))

    def test_rows_stay_as_they_are(self):
        rows, collator = packed(), MaskingCollator(tiny_tokenizer(), 0.3)
        items = rows.__getitems__([4, 0, 7])
        documents = [document for item in items for document in item]
        batch = PackingCollator(collator, 64)(items)
        assert batch["input_ids"].shape[0] == 3
        assert check_layout(batch, alone(collator, documents), 64) == list(range(len(documents)))

    def test_labels_of_tokens_go_with_them(self):
        rows = [{**row, "labels": [7 * i % 5 for i in range(len(row["input_ids"]))]} for row in rows_of(31)]
        collator = PaddingCollator(tiny_tokenizer())
        batch = PackingCollator(collator, 64)(rows)
        assert sorted(check_layout(batch, alone(collator, rows), 64)) == list(range(31))

    @pytest.mark.parametrize(
        ("dtype", "label"), [(torch.int64, lambda i: i), (torch.float32, lambda i: [float(i), -1.0])]
    )
    def test_labels_of_documents_follow_their_order(self, dtype, label):
        rows = [
            {**row, "labels": label(i), "token_type_ids": [i] * len(row["input_ids"])}
            for i, row in enumerate(rows_of(31))
        ]
        batch = PackingCollator(PaddingCollator(tiny_tokenizer(), label_dtype=dtype), 64)(rows)
        assert batch["labels"].dtype == dtype
        labels = batch["labels"] if dtype == torch.int64 else batch["labels"][:, 0]
        documents = {(tuple(row["input_ids"]), None): i for i, row in enumerate(rows)}
        assert check_layout(batch, documents, 64) == labels.tolist()
        starts = (batch["position_ids"] == 0) & (batch["attention_mask"] == 1)
        assert batch["token_type_ids"][starts].tolist() == labels.tolist()

    def test_what_it_cannot_read(self):
        collate = PackingCollator(PaddingCollator(tiny_tokenizer()), 16)
        with pytest.raises(ValueError, match=r"has 1 to 16 tokens \(row_length\), document 1 has 17"):
            collate([{"input_ids": [5] * 3}, {"input_ids": [5] * 17}])
        with pytest.raises(ValueError, match=r"A row holds 16 tokens .*, got a row of 20. Give PackedRows and"):
            collate([[{"input_ids": [5] * 10}, {"input_ids": [5] * 10}]])
        with pytest.raises(ValueError, match=r"one list of token ids, got a list of lists .* do not pack"):
            collate([{"input_ids": [[5, 6], [7]]}])
        with pytest.raises(ValueError, match="'labels' has one value for each token, got 1 values in a row of 2"):
            collate([{"input_ids": [5, 6], "labels": [1]}])
        with pytest.raises(ValueError, match=r"have only input_ids. Wrap the data set in .*Rows"):
            PackingCollator(MaskingCollator(tiny_tokenizer()), 16)([{"input_ids": [5, 6]}])


CONFIG = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "num_labels": 5,
}


@pytest.mark.parametrize("kernel", ["eager", "sdpa", "selfattn"])
@pytest.mark.parametrize("position_encoding", ["learned", "rotary", "t5"])
@pytest.mark.parametrize("head", ["masked_lm", "token_classification"])
class TestLoss:
    def test_loss_and_gradients_are_those_of_padded_rows(self, head, position_encoding, kernel):
        config = AutoConfig.for_model("selfattn", vocab_size=len(tiny_tokenizer()), pad_token_id=0, **CONFIG)
        config.position_encoding, config.max_position_embeddings = position_encoding, 48
        auto_class = AutoModelForMaskedLM if head == "masked_lm" else AutoModelForTokenClassification
        torch.manual_seed(0)
        model = auto_class.from_config(config, attn_implementation=kernel)
        model.to(torch.float64).train()
        rows = [{**row, "labels": [i % 5 for i in range(len(row["input_ids"]))]} for row in rows_of(23)]
        collator = (MaskingCollator if head == "masked_lm" else PaddingCollator)(tiny_tokenizer())
        found = []
        for collate in (collator, PackingCollator(collator, 64)):
            model.zero_grad()
            loss = model(**collate(rows)).loss
            loss.backward()
            found.append((loss, {name: x.grad.clone() for name, x in model.named_parameters() if x.grad is not None}))
        assert_close(found[1][0], found[0][0], "loss")
        for name, grad in found[0][1].items():
            assert_close(found[1][1][name], grad, name)


class TestChoice:
    def choose(self, asked, tmp_path, *reasons, model_type="selfattn", **options):
        arguments = TrainingArguments(str(tmp_path), use_cpu=True, **options)
        return choose_packing(asked, AutoConfig.for_model(model_type), arguments, *reasons)

    def test_it_is_the_default_where_it_is_possible(self, tmp_path):
        assert self.choose(None, tmp_path)
        assert self.choose(True, tmp_path)
        assert not self.choose(False, tmp_path)
        assert not self.choose(None, tmp_path, model_type="bert")
        assert not self.choose(False, tmp_path, "for no reason")

    def test_it_is_refused_where_it_is_not(self, tmp_path):
        bert = r"not possible: a bert model lets the documents of a row see each other. Use --packing false."
        with pytest.raises(ValueError, match=bert):
            self.choose(True, tmp_path, model_type="bert")
        with pytest.raises(ValueError, match="not possible: the answer is 42; dispatch_batches cuts batches apart"):
            self.choose(True, tmp_path, "the answer is 42", accelerator_config={"dispatch_batches": True})

    def test_data_parallel_is_refused(self, tmp_path):
        arguments = TrainingArguments(str(tmp_path), use_cpu=True)
        arguments._n_gpu = 2
        with pytest.raises(ValueError, match=r"DataParallel on 2 GPUs cuts batches apart \(`accelerate launch`"):
            choose_packing(True, AutoConfig.for_model("selfattn"), arguments)
