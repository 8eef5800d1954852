"""Token vectors of neighbours, against counts made pair by pair and a full SVD in float64."""

import itertools
import math

import pytest
import torch
from datasets import Dataset
from transformers import AutoModel, AutoModelForMaskedLM, RemBertConfig, RemBertForMaskedLM

from hf_selfattn import SelfAttnConfig
from hf_selfattn.tools import neighbour_vectors as tools

from .tolerances import assert_close

V = 12
TEXT = torch.randint(1, V, (400,), generator=torch.Generator().manual_seed(0)).tolist()
ROWS = Dataset.from_dict({"input_ids": [TEXT[:100], TEXT[100:103], TEXT[103:]]})


def pmi_by_hand():
    counts = [[0] * (2 * V) for _ in range(V)]
    for left, right in itertools.pairwise(TEXT):
        counts[right][left] += 1
        counts[left][V + right] += 1
    of_token = [sum(row) for row in counts]
    of_context = [sum(column) ** 0.75 for column in zip(*counts, strict=True)]
    return torch.tensor(
        [[max(0, math.log(c * sum(of_context) / (of_token[a] * of_context[b]))) if c else 0 for b, c in enumerate(row)]
         for a, row in enumerate(counts)], dtype=torch.float64
    )  # fmt: skip


def test_pmi_of_neighbours_in_rows_that_are_one_text():
    found = tools.positive_pmi(tools.neighbour_counts(ROWS, V)).to_dense()
    assert_close(found, pmi_by_hand(), dtype=torch.float32)


@pytest.mark.parametrize("width", [3, V])
def test_vectors_are_the_left_factor(width):
    beside = TEXT[:-1] + TEXT[1:]  # as often as each has a neighbour
    weights = torch.tensor([max(beside.count(token) / len(beside), 1e-7) ** 0.25 for token in range(V)]).double()
    weighted = torch.diag(weights) @ pmi_by_hand() @ torch.diag(weights.repeat(2))
    left, values, _ = torch.linalg.svd(weighted, full_matrices=False)
    expected = (left * values.sqrt())[:, :width]
    expected[1:] /= expected[1:].norm(dim=1, keepdim=True)
    found = tools.neighbour_vectors(tools.neighbour_counts(ROWS, V), width).double()
    assert not found[0].any()  # 0 stands nowhere
    # Directions of an SVD have no sign: what stays are the products of vectors.
    torch.testing.assert_close(found[1:] @ found[1:].T, expected[1:] @ expected[1:].T, atol=1e-4, rtol=1e-4)


def test_words_that_are_nowhere_get_no_rounding_errors():
    seed = torch.Generator().manual_seed(0)
    text = torch.multinomial(1 / torch.arange(1, 301.0), 20_000, replacement=True, generator=seed) * 2
    counts = tools.neighbour_counts(Dataset.from_dict({"input_ids": [text.tolist()]}), 600)
    vectors = tools.neighbour_vectors(counts, 128)
    assert not vectors[1::2].any()
    assert_close(vectors[::2].norm(dim=1), torch.ones(300), dtype=torch.float32)


def test_tokens_with_the_same_neighbours_have_the_same_vector():
    rows = Dataset.from_dict({"input_ids": [[1, 2, 3, 1, 4, 3, 1, 2, 3, 1, 4, 3, 5, 1, 1, 5, 3, 3]]})
    vectors = tools.neighbour_vectors(tools.neighbour_counts(rows, 6), 4)
    assert_close(vectors[2], vectors[4], dtype=torch.float32)
    assert (vectors[2] @ vectors[5]).abs() < 0.9


def test_the_seed_and_nothing_else_decides():
    counts = tools.neighbour_counts(ROWS, V)
    torch.manual_seed(1)
    state = torch.random.get_rng_state()
    once = tools.neighbour_vectors(counts, 3, seed=5)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(2)
    assert torch.equal(tools.neighbour_vectors(counts, 3, seed=5), once)


def test_no_more_than_the_most_tokens_are_counted(monkeypatch):
    monkeypatch.setattr(tools, "MOST_TOKENS", 50)
    assert tools.neighbour_counts(ROWS, V).values().sum() == 2 * 49


def test_vectors_wider_than_there_are_words_are_refused():
    with pytest.raises(ValueError, match=r"12 tokens have vectors .* at most that width, got 13"):
        tools.neighbour_vectors(tools.neighbour_counts(ROWS, V), 13)


@pytest.mark.parametrize("tied", [True, False])
def test_both_sides_begin_with_them_except_tokens_that_the_text_has_not(tied):
    size = {"hidden_size": 4, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = AutoModelForMaskedLM.from_config(SelfAttnConfig(vocab_size=V, tie_word_embeddings=tied, **size))
    tables = [model.get_input_embeddings().weight, model.get_output_embeddings().weight]
    before = [table.detach().clone() for table in tables]
    tools.init_token_vectors(model, ROWS, std=0.02)
    assert torch.equal(tables[0][1:], tables[1][1:])
    for table, first in zip(tables, before, strict=True):
        assert torch.equal(table[0], first[0])
        assert_close(table.detach()[1:].pow(2).mean(1).sqrt(), torch.full((V - 1,), 0.02), dtype=torch.float32)


def test_a_model_without_an_output_layer_begins_with_them():
    size = {"hidden_size": 4, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = AutoModel.from_config(SelfAttnConfig(vocab_size=V, **size))
    assert model.get_output_embeddings() is None
    before = model.get_input_embeddings().weight.detach().clone()
    tools.init_token_vectors(model, ROWS, std=0.02)
    assert (model.get_input_embeddings().weight[1:] != before[1:]).all()


def test_an_output_layer_of_another_width_keeps_its_weights():
    size = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    model = RemBertForMaskedLM(RemBertConfig(vocab_size=V, input_embedding_size=4, output_embedding_size=6, **size))
    head = model.get_output_embeddings().weight
    before = head.detach().clone()
    tools.init_token_vectors(model, ROWS, std=0.02)
    assert torch.equal(head, before)
