import copy
import itertools
from collections import Counter

import pytest
import torch
from datasets import Dataset
from transformers import AutoConfig, AutoModel, BertConfig, XLNetConfig

from hf_selfattn.tools.convert_families import OFFSET
from hf_selfattn.tools.evaluation import longest_row
from hf_selfattn.tools.opening import fit_inputs
from hf_selfattn.tools.windows import (
    Frame,
    as_rows,
    check_token_ids,
    cut_into_windows,
    positions_of,
    token_counts,
    window_length,
)

from .train_scripts import sentences, tiny_tokenizer


def test_windows_are_the_text_in_order():
    for length in range(1, 60):
        windows = cut_into_windows(list(range(length)), 7)
        assert list(itertools.chain(*windows)) == list(range(length))
        assert max(map(len, windows)) <= 7
        assert max(map(len, windows)) - min(map(len, windows)) <= 1
        assert len(windows) == -(-length // 7)


def test_full_windows_are_the_text_in_order():
    for length in range(1, 60):
        windows = cut_into_windows(list(range(length)), 7, full=True)
        assert list(itertools.chain(*windows)) == list(range(length))
        assert {len(window) for window in windows[:-1]} <= {7}
        assert 1 <= len(windows[-1]) <= 7
        assert len(cut_into_windows(list(range(length)), 7, "truncate", full=True)) == 1


def test_no_token_is_lost():
    """Counted over a corpus, id by id: what the tokenizer gives for whole texts is what stands in the rows."""
    tokenizer, texts = tiny_tokenizer(), [" ".join(sentences(n % 9, seed=n)) for n in range(60)]
    rows = as_rows(Dataset.from_dict({"text": texts}), "text", tokenizer, max_seq_length=16)
    whole = Counter(number for text in texts for number in tokenizer(text, add_special_tokens=False)["input_ids"])
    special = tokenizer.all_special_ids
    there = Counter(number for row in rows["input_ids"] for number in row if number not in special)
    assert there == whole
    assert all(row[0] == tokenizer.cls_token_id and row[-1] == tokenizer.sep_token_id for row in rows["input_ids"])
    assert max(rows["length"]) == 16
    assert rows["length"][:] == [len(row) for row in rows["input_ids"]]
    counts = token_counts(rows, len(tokenizer))
    assert {i: n for i, n in enumerate(counts) if n and i not in special} == whole


def test_long_texts_are_truncated_or_refused(caplog, monkeypatch):
    tokenizer, text = tiny_tokenizer(), " ".join(sentences(20))
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    rows = as_rows(Dataset.from_dict({"text": [text]}), "text", tokenizer, 16, "truncate")
    assert rows["input_ids"][0] == [tokenizer.cls_token_id, *ids[:14], tokenizer.sep_token_id]
    with pytest.raises(ValueError, match=f"Row 1, column 'text', has {len(ids)} tokens, more than the 14 .* split"):
        as_rows(Dataset.from_dict({"text": ["short", text]}), "text", tokenizer, 16, "refuse")
    with pytest.raises(ValueError, match="--long_texts is one of split, truncate, refuse here, got 'cut'"):
        as_rows(Dataset.from_dict({"text": [text]}), "text", tokenizer, 16, "cut")


@pytest.mark.parametrize(
    ("how", "done"), [("split", "each is cut into windows"), ("truncate", "their ends are dropped")]
)
def test_long_texts_are_reported(how, done, monkeypatch):
    from hf_selfattn.tools import windows

    said = []
    monkeypatch.setattr(windows.logger, "warning", said.append)
    texts = ["short", " ".join(sentences(20)), " ".join(sentences(9))]
    as_rows(Dataset.from_dict({"text": texts}), "text", tiny_tokenizer(), 16, how)
    assert said == [f"2 of 3 texts have more than 16 tokens: {done} (--long_texts {how})."]


def test_no_text_is_an_empty_data_set():
    with pytest.raises(ValueError, match="The data set is empty: none of its 2 rows has text in column 'text'"):
        as_rows(Dataset.from_dict({"text": ["", "  \n"]}), "text", tiny_tokenizer(), 16)


def test_rows_longer_than_the_positions_are_refused():
    tokenizer = tiny_tokenizer()
    limited = AutoConfig.for_model("selfattn", max_position_embeddings=64, position_encoding="learned")
    assert window_length(None, tokenizer, limited) == 64
    assert window_length(48, tokenizer, limited) == 48
    assert window_length(None, tokenizer, AutoConfig.for_model("selfattn")) == 512
    with pytest.raises(ValueError, match="--max_seq_length 65 is longer than the model's 64 positions"):
        window_length(65, tokenizer, limited)
    with pytest.raises(ValueError, match="--max_seq_length counts the 2 special tokens of a row, got 2"):
        Frame(tokenizer).room(2)
    assert window_length(None, tokenizer, BertConfig(max_position_embeddings=32)) == 32


@pytest.mark.parametrize("pad", [1, 3])
@pytest.mark.parametrize("name", ["bert", "distilbert", *OFFSET])
def test_positions_are_as_many_as_the_model_takes(name, pad):
    """The longest row that the model itself computes; the next one falls out of its table of positions."""
    pad = 1 if name == "mpnet" else pad  # its model takes no other
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    if name == "distilbert":
        sizes = {"dim": 8, "n_layers": 1, "n_heads": 2, "hidden_dim": 8}
    window = {"attention_window": 4} if name == "longformer" else {}
    config = AutoConfig.for_model(name, vocab_size=9, max_position_embeddings=20, pad_token_id=pad, **sizes, **window)
    model, positions = AutoModel.from_config(config).eval(), positions_of(config)
    with torch.no_grad():
        model(torch.full((2, positions), 5))
        with pytest.raises((IndexError, RuntimeError)):
            model(torch.full((2, positions + 1), 5))

    tokenizer = copy.deepcopy(tiny_tokenizer())
    assert window_length(None, tokenizer, config) == window_length(positions, tokenizer, config) == positions
    with pytest.raises(
        ValueError, match=rf"the model's {positions} positions .*=20\). Pass --max_seq_length {positions} "
    ):
        window_length(positions + 1, tokenizer, config)
    assert longest_row(tokenizer, config) == positions
    fit_inputs(tokenizer, config)
    assert tokenizer.model_max_length == positions


def test_no_limit_of_positions():
    tokenizer = copy.deepcopy(tiny_tokenizer())
    for config in (AutoConfig.for_model("selfattn"), XLNetConfig(d_model=8, n_head=2)):
        assert positions_of(config) is None
        assert window_length(None, tokenizer, config) == 512
        assert window_length(9999, tokenizer, config) == 9999
        longest = tokenizer.model_max_length
        fit_inputs(tokenizer, config)
        assert tokenizer.model_max_length == longest


def test_token_ids_outside_the_vocabulary_are_refused():
    rows = Dataset.from_dict({"input_ids": [[1, 2], [3, 99]]})
    check_token_ids(rows, 100)
    with pytest.raises(ValueError, match=r"Token ids are from 0 to 98 .* found 99 in column 'input_ids'"):
        check_token_ids(rows, 99)
    with pytest.raises(ValueError, match="found -1"):
        check_token_ids(Dataset.from_dict({"input_ids": [[1, -1]]}), 99)
    nested = Dataset.from_dict({"input_ids": [[[1, 2], [3, 99]]]})
    with pytest.raises(ValueError, match="found 99"):
        check_token_ids(nested, 50)


def test_a_frame_writes_what_the_tokenizer_writes():
    tokenizer = tiny_tokenizer()
    frame = Frame(tokenizer, token_types=True)
    first, second = "the cat likes music", "我的朋友"
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in (first, second)]
    for texts, parts in (((first,), ids[:1]), ((first, second), ids)):
        expected = tokenizer(*texts, return_token_type_ids=True)
        row = frame.row(*parts)
        assert row["input_ids"] == expected["input_ids"]
        assert row["token_type_ids"] == expected["token_type_ids"]
        assert row["length"] == len(expected["input_ids"])
    start = frame.start_of_second(ids[0])
    assert frame.row(*ids)["input_ids"][start : start + len(ids[1])] == ids[1]
