"""What all tests share: the tables as parameters, and small models of odd sizes.

A test that takes an argument `score`, `pattern`, `causal`, `position`, `kernel` or `dtype` runs once for each row of
that table, and one that takes `choice` for combinations of the first four, so that a new row is tested by being there.
"""

import copy
from itertools import combinations, product
from typing import NamedTuple

import pytest
import torch

from hf_selfattn import KERNELS, PATTERNS, POSITIONS, SCORES, SelfAttnConfig, SelfAttnModel

from .reference import OPTIONS
from .tolerances import TOLERANCE

torch.set_num_threads(1)


@pytest.fixture(params=SCORES)
def score(request):
    return request.param


@pytest.fixture(params=PATTERNS)
def pattern(request):
    return request.param


@pytest.fixture(params=[False, True], ids=["both_directions", "causal"])
def causal(request):
    return request.param


@pytest.fixture(params=POSITIONS)
def position(request):
    return request.param


class Choice(NamedTuple):
    """What makes an attention, in the order in which `make_config` takes it."""

    score: str
    pattern: str
    causal: bool
    position: str


def _choices() -> list:
    """The whole product; all but a part of it in which every two rows of different tables meet are marked slow."""
    everything = [Choice(*row) for row in product(SCORES, PATTERNS, [False, True], POSITIONS)]
    meetings = {choice: set(combinations(enumerate(choice), 2)) for choice in everything}
    missing, covering = set.union(*meetings.values()), set()
    while missing:
        best = max(everything, key=lambda choice: len(meetings[choice] & missing))
        covering.add(best)
        missing -= meetings[best]
    return [
        pytest.param(
            choice,
            id="-".join([choice.score, choice.pattern, *["causal"] * choice.causal, choice.position]),
            marks=[] if choice in covering else pytest.mark.slow,
        )
        for choice in everything
    ]


@pytest.fixture(params=_choices())
def choice(request):
    return request.param


@pytest.fixture(params=KERNELS)
def kernel(request):
    return request.param


@pytest.fixture(params=TOLERANCE, ids=lambda dtype: str(dtype).removeprefix("torch."))
def dtype(request):
    return request.param


SIZES = {
    "vocab_size": 43,
    "hidden_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "value_head_dim": 5,
    "intermediate_size": 18,
}
"""H, G, d_k, d_v all differ, and none divides the hidden size that comes from it."""


def _make_config(score=None, pattern="full", causal=False, position="none", **overrides) -> SelfAttnConfig:
    score = next(iter(SCORES)) if score is None else score
    choices = {
        "score_function": score,
        "attention_pattern": pattern,
        "causal": causal,
        "position_encoding": position,
    }
    rows = [score, position, *(pattern if isinstance(pattern, list) else [pattern])]
    options = {name: value for row in rows for name, value in OPTIONS.get(row, {}).items()}
    return SelfAttnConfig(**{**SIZES, **choices, **options, **overrides})


@pytest.fixture(scope="session")
def make_config():
    """(score, pattern, causal, position, **overrides) -> a small SelfAttnConfig with the options its rows need."""
    return _make_config


@pytest.fixture(scope="session")
def make_model():
    """(config, kernel, dtype, cls) -> a model in evaluation mode, each of its parameters drawn at random.

    The parameters depend on nothing but the config, and are the same numbers in every dtype down to bfloat16.
    """

    def make(config, kernel="eager", dtype=torch.float64, cls=SelfAttnModel):
        model = cls._from_config(copy.deepcopy(config), attn_implementation=kernel).to(dtype).eval()
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                drawn = torch.randn(parameter.shape, generator=generator) * parameter.shape[-1] ** -0.5
                is_gain = parameter.dim() == 1 and name.endswith("weight")
                parameter.copy_((drawn + 1 if is_gain else drawn).to(torch.bfloat16))
        return model

    return make


class Layout(NamedTuple):
    """One way to lay documents out in a batch.

    Attributes:
        shape: (B, N).
        inputs: what tells the model of it: `attention_mask`, `position_ids` or `cu_seq_lens_q`.
        places: for each document the rows and the columns of its tokens, as indices into (B, N, …).
    """

    shape: tuple[int, int]
    inputs: dict[str, torch.Tensor]
    places: list[tuple[torch.Tensor, torch.Tensor]]

    def put(self, documents: list[torch.Tensor]) -> torch.Tensor:
        """Documents (n, …) laid out as (B, N, …); at padding stand other tokens, not zeros."""
        everything = torch.cat(documents)
        other = torch.randint(len(everything), self.shape, generator=torch.Generator().manual_seed(2))
        batch = everything[other]
        for document, place in zip(documents, self.places, strict=True):
            batch[place] = document
        return batch

    def take(self, batch: torch.Tensor) -> list[torch.Tensor]:
        """The documents (n, …) out of (B, N, …)."""
        return [batch[place] for place in self.places]

    @property
    def padding(self) -> torch.Tensor:
        """(B, N) bool, True where no document stands."""
        padding = torch.ones(self.shape, dtype=torch.bool)
        for place in self.places:
            padding[place] = False
        return padding


def _in_rows(lengths: list[int], columns: list[torch.Tensor], width: int) -> Layout:
    mask = torch.zeros(len(lengths), width, dtype=torch.long)
    places = [(torch.full_like(column, row), column) for row, column in enumerate(columns)]
    for place in places:
        mask[place] = 1
    return Layout(tuple(mask.shape), {"attention_mask": mask}, places)


def _padded_right(lengths):
    return _in_rows(lengths, [torch.arange(n) for n in lengths], max(lengths))


def _padded_left(lengths):
    return _in_rows(lengths, [torch.arange(max(lengths) - n, max(lengths)) for n in lengths], max(lengths))


def _padded_with_holes(lengths):
    width, generator = max(lengths) + 5, torch.Generator().manual_seed(3)
    columns = [torch.randperm(width, generator=generator)[:n].sort().values for n in lengths]
    return _in_rows(lengths, columns, width)


def _in_one_row(lengths):
    """Place of each document, and the boundaries between them."""
    bounds = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    return [
        (torch.zeros(n, dtype=torch.long), torch.arange(a, a + n)) for a, n in zip(bounds, lengths, strict=False)
    ], bounds


def _packed_by_positions(lengths):
    places, _ = _in_one_row(lengths)
    position_ids = torch.cat([torch.arange(n) for n in lengths])[None]
    return Layout(tuple(position_ids.shape), {"position_ids": position_ids}, places)


def _packed_by_boundaries(lengths):
    """One row, five tokens of padding at its end."""
    places, bounds = _in_one_row(lengths)
    return Layout((1, bounds[-1] + 5), {"cu_seq_lens_q": torch.tensor(bounds, dtype=torch.int32)}, places)


FORMS = {
    "padded_right": _padded_right,
    "padded_left": _padded_left,
    "padded_with_holes": _padded_with_holes,
    "packed_by_positions": _packed_by_positions,
    "packed_by_boundaries": _packed_by_boundaries,
}


@pytest.fixture(params=FORMS)
def form(request):
    return request.param


@pytest.fixture(scope="session")
def lay_out():
    """(form, lengths) -> the Layout of documents of these lengths; a document gives the same numbers in each form."""
    return lambda form, lengths: FORMS[form](lengths)


@pytest.fixture
def uncompiled():
    """flex_attention compiles parts of itself for each new shape and mask, 0.1 s a time; as plain Python it is fast.

    For whole modules: `pytestmark = pytest.mark.usefixtures("uncompiled")`.
    """
    with torch.compiler.set_stance("force_eager"):
        yield
