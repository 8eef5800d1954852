import numpy as np
import pytest
import torch
from datasets import Dataset
from torch.utils.data import DataLoader

from hf_selfattn.tools.collators import MaskingCollator, PaddingCollator, hashed_uniforms
from hf_selfattn.tools.training import Rows

from .train_scripts import tiny_tokenizer


def rows_of(count, length=41, seed=0, epoch=0):
    draw = np.random.default_rng(seed)
    tokenizer = tiny_tokenizer()
    return [
        {
            "input_ids": [
                tokenizer.cls_token_id,
                *draw.integers(5, len(tokenizer), draw.integers(1, length)).tolist(),
                tokenizer.sep_token_id,
            ],
            "example_id": index,
            "epoch": epoch,
        }
        for index in range(count)
    ]


def test_the_hash_is_uniform_and_its_keys_are_independent():
    values = hashed_uniforms(7, np.arange(300)[:, None], np.arange(300))
    assert 0 <= values.min() < values.max() < 1
    assert abs(values.mean() - 0.5) < 0.005
    assert abs(np.corrcoef(values[:-1].ravel(), values[1:].ravel())[0, 1]) < 0.02
    assert abs(np.corrcoef(values[:, :-1].ravel(), values[:, 1:].ravel())[0, 1]) < 0.02
    histogram = np.histogram(values, bins=16, range=(0, 1))[0] / values.size
    assert np.abs(histogram - 1 / 16).max() < 0.004


def test_a_mask_is_a_function_of_the_row_alone():
    """Not of the batch, its order or its width, nor of any random state."""
    collate, rows = MaskingCollator(tiny_tokenizer(), 0.3, seed=5), rows_of(17)
    torch.manual_seed(0)
    together = collate(rows)
    torch.manual_seed(1)
    for index in (0, 5, 16):
        length = len(rows[index]["input_ids"])
        alone = collate([rows[index]])
        for name in ("input_ids", "labels", "attention_mask"):
            assert torch.equal(alone[name][0, :length], together[name][index, :length])
    backwards = collate(rows[::-1])
    assert torch.equal(backwards["labels"].flip(0), together["labels"])


def test_epochs_and_seeds_mask_differently():
    tokenizer = tiny_tokenizer()
    masks = [
        MaskingCollator(tokenizer, 0.3, seed)(rows_of(17, epoch=epoch))["labels"] != -100
        for seed, epoch in ((5, 0), (5, 1), (6, 0))
    ]
    for a, b in ((0, 1), (0, 2), (1, 2)):
        shared = (masks[a] & masks[b]).sum() / masks[a].sum()
        assert 0.1 < shared < 0.5


@pytest.mark.parametrize("shares", [(), (0.8, 0.1), (1.0, 0.0), (0.5, 0.0), (0.0, 0.5)], ids=str)
def test_shares_of_masked_random_and_kept_tokens(shares):
    tokenizer, rows = tiny_tokenizer(), rows_of(3000)
    options = dict(zip(("mask_replace_prob", "random_replace_prob"), shares, strict=False))
    of_mask, of_random = shares or (0.8, 0.1)
    batch = MaskingCollator(tokenizer, 0.15, **options)(rows)
    original = torch.zeros_like(batch["input_ids"])
    for index, row in enumerate(rows):
        original[index, : len(row["input_ids"])] = torch.tensor(row["input_ids"])
    chosen = batch["labels"] != -100
    assert torch.equal(batch["labels"][chosen], original[chosen])
    assert torch.equal(batch["input_ids"][~chosen], original[~chosen])
    special = torch.isin(original, torch.tensor(tokenizer.all_special_ids))
    assert not (chosen & special).any()
    maskable = (~special & (batch["attention_mask"] == 1)).sum()
    assert abs(chosen.sum() / maskable - 0.15) < 0.003
    now = batch["input_ids"][chosen]
    assert abs((now == tokenizer.mask_token_id).float().mean() - of_mask) < 0.02
    drawn = of_random / (len(tokenizer) - len(tokenizer.all_special_ids))  # a random token may be the same again
    assert abs((now == original[chosen]).float().mean() - (1 - of_mask - of_random) - drawn) < 0.015
    assert not torch.isin(now[now != tokenizer.mask_token_id], torch.tensor(tokenizer.all_special_ids)).any()
    assert batch["input_ids"].shape[1] % 8 == 0


@pytest.mark.parametrize("value", [0, -0.1, 1.5])
def test_a_rate_that_is_none_is_refused(value):
    with pytest.raises(ValueError, match="mlm_probability is above 0 and at most 1"):
        MaskingCollator(tiny_tokenizer(), value)


@pytest.mark.parametrize("shares", [(-0.1, 0.1), (0.8, -0.1), (0.8, 0.3)], ids=str)
def test_shares_that_are_none_are_refused(shares):
    with pytest.raises(ValueError, match=r"mask_replace_prob and random_replace_prob are shares .* got"):
        MaskingCollator(tiny_tokenizer(), 0.15, mask_replace_prob=shares[0], random_replace_prob=shares[1])


def test_data_workers_change_nothing():
    data = [{"input_ids": row["input_ids"], "length": len(row["input_ids"])} for row in rows_of(24)]
    rows = Rows(Dataset.from_list(data))
    sampler = [(3, index) for index in range(24)]
    collate = MaskingCollator(tiny_tokenizer(), 0.3)
    alone, workers = (
        list(DataLoader(rows, batch_size=5, sampler=sampler, collate_fn=collate, num_workers=n)) for n in (0, 2)
    )
    for ours, theirs in zip(alone, workers, strict=True):
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_padding_of_texts_words_and_choices():
    collate = PaddingCollator(tiny_tokenizer())
    texts = collate(
        [{"input_ids": [2, 9, 3], "labels": 1, "example": 0}, {"input_ids": [2, 3], "labels": 0, "example": 1}]
    )
    assert texts["input_ids"].tolist() == [[2, 9, 3, 0, 0, 0, 0, 0], [2, 3, 0, 0, 0, 0, 0, 0]]
    assert texts["attention_mask"].sum(1).tolist() == [3, 2]
    assert texts["labels"].tolist() == [1, 0]
    assert set(texts) == {"input_ids", "attention_mask", "labels"}
    words = collate(
        [{"input_ids": [2, 9, 3], "labels": [-100, 4, -100]}, {"input_ids": [2, 3], "labels": [-100, -100]}]
    )
    assert words["labels"][0].tolist() == [-100, 4] + [-100] * 6
    choices = collate([{"input_ids": [[2, 9, 3], [2, 3]], "token_type_ids": [[0, 1, 1], [0, 0]], "labels": 1}] * 3)
    assert (
        choices["input_ids"].shape == choices["token_type_ids"].shape == choices["attention_mask"].shape == (3, 2, 8)
    )
    numbers = PaddingCollator(tiny_tokenizer(), label_dtype=torch.float32)
    assert numbers([{"input_ids": [2, 3], "labels": 1.5}])["labels"].tolist() == [1.5]
    several = numbers([{"input_ids": [2, 3], "labels": [1.0, 0.0]}])["labels"]
    assert several.tolist() == [[1.0, 0.0]]
    spans = PaddingCollator(tiny_tokenizer(), columns=("start_positions", "end_positions"))
    assert spans([{"input_ids": [2, 3], "start_positions": 1, "end_positions": 1}])["end_positions"].tolist() == [1]
