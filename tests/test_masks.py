"""The one contract for attention_mask: what is accepted, what is refused, and what a query that sees nothing gives."""

import pytest
import torch

from hf_selfattn import KERNELS, Scoring, unsupported_reasons
from hf_selfattn.masks import allowed, read_mask
from hf_selfattn.packing import Tokens, read_batch
from hf_selfattn.patterns import SlidingWindow, layer_patterns

from .tolerances import assert_close

pytestmark = pytest.mark.usefixtures("uncompiled")

B, N, H = 3, 7, 4

LENGTHS = [7, 4, 0]


def padding():
    """(B, N) bool: no padding, three tokens of it on the right, nothing else."""
    return torch.arange(N) < torch.tensor(LENGTHS)[:, None]


def pairs(heads=1, seed=0):
    """(B, heads, N, N) bool, two thirds of it True."""
    return torch.rand(B, heads, N, N, generator=torch.Generator().manual_seed(seed)) < 0.67


def additive(mask, hidden, dtype=torch.float32):
    """0 where `mask` is True, `hidden` elsewhere."""
    return torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, hidden)


def ids(batch_size=B):
    return torch.randint(43, (batch_size, N), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def model(kernel, make_config, make_model):
    """Window in one layer, all in the other: a mask must come together with each pattern."""
    options = {"attention_pattern": ["full", "sliding_window"], "window_radius": [None, 2], "type_vocab_size": 0}
    return make_model(make_config(position="rotary", **options), kernel)


# Accepted

PADDING = padding()
PAIRS = pairs()

EQUAL_FORMS = {
    "padding": {
        "bool": PADDING,
        "int64": PADDING.long(),
        "int32": PADDING.int(),
        "uint8": PADDING.to(torch.uint8),
        "float32_-1e4": additive(PADDING, -1e4),
        "float32_-inf": additive(PADDING, float("-inf")),
        "float32_lowest": additive(PADDING, torch.finfo(torch.float32).min),
        "float64_-1e9": additive(PADDING, -1e9, torch.float64),
        "bfloat16_lowest": additive(PADDING, torch.finfo(torch.bfloat16).min, torch.bfloat16),
        "float16_lowest": additive(PADDING, torch.finfo(torch.float16).min, torch.float16),
    },
    "pairs": {
        "bool_3d": PAIRS[:, 0],
        "bool_4d": PAIRS,
        "bool_4d_each_head": PAIRS.expand(B, H, N, N),
        "int64_3d": PAIRS[:, 0].long(),
        "int64_4d": PAIRS.long(),
        "float32_-1e4_3d": additive(PAIRS[:, 0], -1e4),
        "float32_-inf_4d": additive(PAIRS, float("-inf")),
        "bfloat16_lowest_4d": additive(PAIRS, torch.finfo(torch.bfloat16).min, torch.bfloat16),
        "float16_-inf_each_head": additive(PAIRS.expand(B, H, N, N), float("-inf"), torch.float16),
    },
    "pairs_per_head": {
        "bool": pairs(H),
        "int64": pairs(H).long(),
        "float32_-1e4": additive(pairs(H), -1e4),
        "float64_-inf": additive(pairs(H), float("-inf"), torch.float64),
    },
    "everything": {
        "none": None,
        "bool": torch.ones(B, N, dtype=torch.bool),
        "int64": torch.ones(B, N, dtype=torch.long),
        "bool_3d": torch.ones(B, N, N, dtype=torch.bool),
        "int64_4d": torch.ones(B, 1, N, N, dtype=torch.long),
        "bool_each_head": torch.ones(B, H, N, N, dtype=torch.bool),
    },
    "nothing": {
        "bool": torch.zeros(B, N, dtype=torch.bool),
        "int64": torch.zeros(B, N, dtype=torch.long),
        "float32_-inf": torch.full((B, N), float("-inf")),
        "float32_-1e4": torch.full((B, N), -1e4),
    },
}


@pytest.mark.parametrize(
    ("meaning", "form"), [(meaning, form) for meaning, forms in EQUAL_FORMS.items() for form in forms]
)
def test_equal_masks_give_equal_results(meaning, form, model):
    forms = EQUAL_FORMS[meaning]
    with torch.no_grad():
        expected = model(ids(), attention_mask=next(iter(forms.values()))).last_hidden_state
        actual = model(ids(), attention_mask=forms[form]).last_hidden_state
    assert_close(actual, expected)


def test_each_meaning_is_another(model):
    with torch.no_grad():
        outputs = [model(ids(), attention_mask=next(iter(forms.values())))[0] for forms in EQUAL_FORMS.values()]
    for i, one in enumerate(outputs):
        for other in outputs[:i]:
            assert (one - other).abs().max() > 0.01


def test_padding_equals_the_same_as_pairs(model):
    """As pairs, padding is a token that nobody sees: the real tokens do not notice the difference."""
    with torch.no_grad():
        by_padding = model(ids(), attention_mask=PADDING).last_hidden_state
        by_pairs = model(ids(), attention_mask=PADDING[:, None, :].expand(B, N, N)).last_hidden_state
    assert_close(by_pairs[PADDING], by_padding[PADDING])


def test_pairs_are_anded_with_the_pattern(make_config, make_model, kernel):
    """Full attention under a mask in the shape of a window is a window."""
    tokens = torch.arange(N)
    window = ((tokens[:, None] - tokens).abs() <= 3).expand(B, N, N)
    full = make_model(make_config("scaled_dot_product", "full", position="rotary"), kernel)
    sliding = make_model(make_config("scaled_dot_product", "sliding_window", position="rotary"), kernel)
    with torch.no_grad():
        expected = sliding(ids(), attention_mask=PAIRS).last_hidden_state
        assert_close(full(ids(), attention_mask=PAIRS & window[:, None]).last_hidden_state, expected)
        assert_close(sliding(ids(), attention_mask=PAIRS & window[:, None]).last_hidden_state, expected)


def test_user_sees_which_key_is_which(make_config, make_model, kernel):
    """mask[b, h, q, k]: where query 2 of head 1 may not see key 5, that weight is 0 and no other."""
    mask = torch.ones(B, H, N, N, dtype=torch.bool)
    mask[:, 1, 2, 5] = False
    model = make_model(make_config(position="rotary"), kernel)
    with torch.no_grad():
        weights = model(ids(), attention_mask=mask, output_attentions=True).attentions[0]
    assert torch.equal(weights == 0, ~mask)


# Refused

REFUSED_SHAPES = {
    "1d": (N,),
    "one_token_more": (B, N + 1),
    "transposed": (N, B),
    "no_batch": (N, N),
    "other_batch": (1, N),
    "pairs_of_other_batch": (1, N, N),
    "pairs_of_other_length": (B, N, N + 1),
    "one_row_of_pairs": (B, 1, N),
    "row_of_keys": (B, 1, 1, N),
    "heads_of_another_model": (B, H + 1, N, N),
    "key_value_heads": (B, 2, N, N),
    "4d_of_other_batch": (1, 1, N, N),
    "5d": (B, 1, 1, N, N),
}


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32], ids=["bool", "int64", "float32"])
@pytest.mark.parametrize("shape", REFUSED_SHAPES)
def test_refused_shape(shape, dtype, make_config, make_model):
    mask = torch.zeros(REFUSED_SHAPES[shape], dtype=dtype)
    rule = rf"attention_mask of shape \({REFUSED_SHAPES[shape][0]},.* does not fit .*B={B}, N={N} and H={H}.*Accepted"
    with pytest.raises(ValueError, match=rule):
        make_model(make_config())(ids(), attention_mask=mask)


REFUSED_VALUES = {
    "float_0_and_1": (PADDING.float(), "from 0 to 1, .* Accepted .* Convert a 0/1 mask with .bool"),
    "float_all_0": (torch.zeros(B, N), "from 0 to 0, .* with at least one of the latter"),
    "float_all_1": (torch.ones(B, N), "from 1 to 1, .* Accepted"),
    "float_-1": (additive(PADDING, -1.0), "from -1 to 0, .* Accepted"),
    "float_-9999": (additive(PADDING, -9999.0), "from -9999 to 0, .* Accepted"),
    "float_bias": (additive(PADDING, -1e4) + 0.5, "to 0.5, .* Accepted"),
    "float_nan": (torch.full((B, N), float("nan")), "nan, .* Accepted"),
    "float_nan_and_-inf": (additive(PADDING, float("-inf")).nan_to_num(0.0, neginf=float("nan")), "nan, .* Accepted"),
    "float_pairs_0_and_1": (PAIRS.float(), "from 0 to 1, .* Accepted"),
    "bfloat16_0_and_1": (PADDING.bfloat16(), "torch.bfloat16 has values from 0 to 1, .* Accepted"),
    "int_2": (PADDING.long() * 2, "from 0 to 2; only 0 and 1 have a meaning.* Accepted"),
    "int_document_numbers": (torch.tensor([[1, 1, 1, 2, 2, 3, 3]] * B), "from 1 to 3; .* position_ids that restart"),
    "int_-1": (PADDING.long() - 1, "from -1 to 0; only 0 and 1"),
    "int_pairs_-10000": (~PAIRS * -10000, "from -10000 to 0; only 0 and 1"),
    "complex": (PADDING.to(torch.complex64), "torch.complex64.* Accepted"),
}


@pytest.mark.parametrize("values", REFUSED_VALUES)
def test_refused_values(values, make_config, make_model):
    mask, message = REFUSED_VALUES[values]
    with pytest.raises(ValueError, match=f"attention_mask of type .*{message}"):
        make_model(make_config())(ids(), attention_mask=mask)


def test_refused_type(make_config, make_model):
    with pytest.raises((TypeError, ValueError), match=r"attention_mask .* Accepted"):
        make_model(make_config())(ids(), attention_mask=PADDING.tolist())


def test_mask_of_no_batch_is_read():
    assert read_mask(torch.ones(0, N, dtype=torch.long), 0, N, H) == (None, None)


# Who sees whom


def test_allowed_asks_tokens_and_not_indices():
    """Tokens in any order, with gaps: the rule is the same as in order."""
    tokens = read_batch(1, 9, torch.device("cpu"), position_ids=torch.tensor([[0, 1, 2, 3, 0, 1, 2, 0, 1]])).tokens
    shuffle = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    shuffled = Tokens(*(None if field is None else field[:, shuffle] for field in tokens))
    pattern = SlidingWindow(window_radius=1, causal=True)
    in_order = allowed(pattern, tokens, tokens, range(H))
    expected = "1........ 11....... .11...... ..11..... ....1.... ....11... .....11.. .......1. .......11"
    assert picture(in_order[0, 0]) == expected.split()
    assert torch.equal(allowed(pattern, shuffled, shuffled, range(H)), in_order[:, :, shuffle][..., shuffle])


def picture(mask):
    return ["".join("1" if seen else "." for seen in row) for row in mask]


# A query that sees nothing


@pytest.mark.parametrize("by", ["padding", "user_mask", "user_mask_per_head"])
def test_query_that_sees_nothing_gives_exactly_0(by, pattern, kernel, dtype, make_config):
    """In outputs, in weights and in its gradient, with no NaN on the way back, beside a query with enormous scores."""
    torch.manual_seed(0)
    config = make_config(pattern=pattern)
    trains = not unsupported_reasons(config, kernel, device_type="cpu", dtype=dtype, training=True)
    heads = {"padding": 1, "user_mask": 1, "user_mask_per_head": H}[by]
    mask = torch.ones(2, heads, N, N, dtype=torch.bool)
    mask[0, -1, 2] = False
    mask[1] = False
    if by == "padding":
        real = torch.tensor([[1, 1, 0, 1, 1, 1, 1], [0] * N], dtype=torch.bool)
        packing, user_mask, dead = read_batch(2, N, torch.device("cpu"), real), None, ~real[:, None].expand(2, H, N)
    else:
        packing, user_mask, dead = read_batch(2, N, torch.device("cpu")), mask, ~mask.any(-1).expand(2, H, N)
    tokens = packing.tokens
    made = KERNELS[kernel].mask(layer_patterns(config)[0], tokens, tokens, packing, range(H), user_mask)

    query, key, value = (torch.randn(2, N, n, 6, dtype=dtype) for n in (H, 2, 2))
    query[:, 4] *= -1e3
    leaves = [x.requires_grad_(trains) for x in (query, key, value)]
    scoring = Scoring("scaled_dot_product", (6**-0.5,))
    for need_weights in (False, True):
        with torch.autograd.set_detect_anomaly(True):
            output, weights = KERNELS[kernel].attend(*leaves, made, scoring, need_weights=need_weights)
            output = output.transpose(1, 2)
            assert (output[dead] == 0).all()
            assert output.isfinite().all()
            assert (output[~dead] != 0).any(-1).all()
            if need_weights:
                assert (weights[dead] == 0).all()
                assert_close(weights.double().sum(-1), (~dead).double(), "sums of weights", dtype=dtype)
            if trains:
                gradients = torch.autograd.grad(output.double().square().sum(), leaves)
                assert all(gradient.isfinite().all() for gradient in gradients)
                assert (gradients[0].transpose(1, 2)[dead] == 0).all()


@pytest.mark.parametrize("mask", ["padding", "pairs", "pairs_per_head"])
def test_batch_without_one_real_token(mask, kernel, dtype, make_config, make_model):
    shape = {"padding": (B, N), "pairs": (B, N, N), "pairs_per_head": (B, H, N, N)}[mask]
    config = make_config(pattern="sliding_window", position="rotary")
    model = make_model(config, kernel, dtype)
    trains = not unsupported_reasons(config, kernel, device_type="cpu", dtype=dtype, training=True)
    with torch.set_grad_enabled(trains), torch.autograd.set_detect_anomaly(True):
        outputs = model(ids(), attention_mask=torch.zeros(shape, dtype=torch.bool), output_hidden_states=True)
        assert outputs.last_hidden_state.isfinite().all()
        if mask == "padding":
            assert all((hidden == 0).all() for hidden in outputs.hidden_states)
        if trains:
            outputs.last_hidden_state.sum().backward()
            assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("shape", [(0, N), (B, 0)], ids=["no_rows", "no_columns"])
def test_empty_batch(shape, kernel, make_config, make_model):
    model = make_model(make_config(position="rotary"), kernel)
    with torch.no_grad():
        output = model(torch.zeros(shape, dtype=torch.long)).last_hidden_state
    assert output.shape == (*shape, 20)
