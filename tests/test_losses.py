"""Losses against plain formulas in float64, and that they do not depend on how a batch is split."""

import math
import re

import pytest
import torch

from hf_selfattn import (
    SelfAttnForMaskedLM,
    SelfAttnForMultipleChoice,
    SelfAttnForQuestionAnswering,
    SelfAttnForSequenceClassification,
    SelfAttnForTokenClassification,
    losses,
)
from hf_selfattn.losses import classification_loss, cross_entropy, linear_cross_entropy, span_loss

from .tolerances import assert_close

B, N = 8, 9
LENGTHS = torch.tensor([9, 1, 5, 7, 2, 8, 3, 9])
REAL = torch.arange(N) < LENGTHS.unsqueeze(1)


def drawn(*shape, dtype=torch.float64, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def integers(low, high, *shape, seed=0):
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed))


def mean(values):
    return sum(values) / max(1, len(values))


def plain_cross_entropy(logits, labels):
    """-log softmax(row)[label], one for each row with a label."""
    losses = []
    for row, label in zip(logits.double().tolist(), labels.tolist(), strict=True):
        if label != -100:
            losses.append(math.log(sum(math.exp(x) for x in row)) - row[label])
    return losses


def plain_binary_cross_entropy(logits, labels):
    """-log sigmoid(x) where the label is 1, -log(1 - sigmoid(x)) where it is 0, one for each entry with a label."""
    losses = []
    for x, label in zip(logits.double().flatten().tolist(), labels.flatten().tolist(), strict=True):
        if label != -100:
            probability = 1 / (1 + math.exp(-x))
            losses.append(-(label * math.log(probability) + (1 - label) * math.log(1 - probability)))
    return losses


def plain_squared_error(logits, labels):
    """(x - label)², one for each entry with a label."""
    pairs = zip(logits.double().flatten().tolist(), labels.double().flatten().tolist(), strict=True)
    return [(x - label) ** 2 for x, label in pairs if label != -100]


def plain_span(logits, places, real):
    """-log softmax over the real tokens of the place, one for each row whose place is a real token."""
    losses = []
    for row, place, is_real in zip(logits.double().tolist(), places.tolist(), real.tolist(), strict=True):
        if 0 <= place < len(row) and is_real[place]:
            total = sum(math.exp(x) for x, one in zip(row, is_real, strict=True) if one)
            losses.append(math.log(total) - row[place])
    return losses


def close(actual, expected, tolerance=1e-10):
    assert actual.dim() == 0
    assert abs(actual.item() - expected) <= tolerance * max(1, abs(expected))


DTYPES = pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-10), (torch.float32, 1e-5), (torch.bfloat16, 1e-5), (torch.float16, 1e-5)],
    ids=["float64", "float32", "bfloat16", "float16"],
)
"""Half precision is rounded on the way in, and computed in float32."""


class TestFormulas:
    @DTYPES
    @pytest.mark.parametrize("shape", [(7,), (3, 5)], ids=["flat", "batch"])
    def test_cross_entropy(self, shape, dtype, tolerance):
        logits, labels = drawn(*shape, 11, dtype=dtype), integers(0, 11, *shape)
        labels.view(-1)[::3] = -100
        loss = cross_entropy(logits, labels)
        assert loss.dtype == torch.promote_types(dtype, torch.float32)
        close(loss, mean(plain_cross_entropy(logits.view(-1, 11), labels.view(-1))), tolerance)

    @DTYPES
    def test_single_label(self, dtype, tolerance):
        logits, labels = drawn(6, 4, dtype=dtype), torch.tensor([0, 3, -100, 1, 2, 2])
        loss = classification_loss(logits, labels, "single_label_classification")
        close(loss, mean(plain_cross_entropy(logits, labels)), tolerance)

    @DTYPES
    @pytest.mark.parametrize("label_dtype", [torch.float32, torch.int64, torch.bool], ids=["float", "int", "bool"])
    def test_multi_label(self, label_dtype, dtype, tolerance):
        logits, labels = drawn(6, 4, dtype=dtype), integers(0, 2, 6, 4).to(label_dtype)
        if label_dtype != torch.bool:
            labels[1, 2] = labels[4] = -100
        loss = classification_loss(logits, labels, "multi_label_classification")
        assert loss.dtype == torch.promote_types(dtype, torch.float32)
        close(loss, mean(plain_binary_cross_entropy(logits, labels)), tolerance)

    @DTYPES
    @pytest.mark.parametrize("shape", [(6, 1), (6,), (6, 3)], ids=["column", "flat", "three_outputs"])
    def test_regression(self, shape, dtype, tolerance):
        labels = drawn(*shape, seed=1).float()
        labels.view(-1)[2] = -100
        logits = drawn(6, labels.numel() // 6, dtype=dtype)
        loss = classification_loss(logits, labels, "regression")
        close(loss, mean(plain_squared_error(logits, labels)), tolerance)

    def test_regression_takes_integers(self):
        logits, labels = drawn(5, 1), torch.tensor([0, 1, 5, 3, 2])
        close(classification_loss(logits, labels, "regression"), mean(plain_squared_error(logits, labels)))

    @DTYPES
    def test_span(self, dtype, tolerance):
        start, end = drawn(B, N, dtype=dtype), drawn(B, N, dtype=dtype, seed=1)
        starts, ends = integers(0, 9, B) % LENGTHS, integers(0, 9, B, seed=1) % LENGTHS
        expected = (mean(plain_span(start, starts, REAL)) + mean(plain_span(end, ends, REAL))) / 2
        close(span_loss(start, end, starts, ends, REAL), expected, tolerance)

    @pytest.mark.parametrize("shape", [(B,), (B, 1)], ids=["flat", "column"])
    def test_a_place_outside_the_text_is_no_label(self, shape):
        start, end = drawn(B, N), drawn(B, N, seed=1)
        starts = torch.tensor([N, -1, 5, -100, 1, 1000, 0, 8])  # rows 0 to 3 and 5 have none: 5 is padding in row 2
        ends = torch.tensor([0, 0, 4, 6, 2, 7, 3, 8])  # rows 4 and 6 have none: padding
        assert (len(plain_span(start, starts, REAL)), len(plain_span(end, ends, REAL))) == (3, 6)
        expected = (mean(plain_span(start, starts, REAL)) + mean(plain_span(end, ends, REAL))) / 2
        close(span_loss(start, end, starts.view(shape), ends.view(shape), REAL), expected)

    def test_padding_takes_no_part_in_a_span(self):
        start, end, places = drawn(B, N), drawn(B, N, seed=1), LENGTHS - 1
        other = torch.where(REAL, start, 1e4)
        assert_close(span_loss(other, end, places, places, REAL), span_loss(start, end, places, places, REAL))

    def test_every_gradient_of_a_span_is_finite(self):
        logits = drawn(B, N).requires_grad_()
        nothing = torch.full((B,), -1)
        span_loss(logits, logits, nothing, nothing, torch.zeros(B, N, dtype=torch.bool)).backward()
        assert (logits.grad == 0).all()

    @pytest.mark.parametrize("count", [7, torch.tensor(7)], ids=["int", "tensor"])
    def test_the_sum_is_divided_by_the_given_count(self, count):
        logits, labels = drawn(5, 11), integers(0, 11, 5)
        loss = cross_entropy(logits, labels, count)
        close(loss, sum(plain_cross_entropy(logits, labels)) / 7)

    @pytest.mark.parametrize("count", [None, 0, 7], ids=["own_count", "count_0", "count_7"])
    def test_no_label_gives_0(self, count):
        logits = drawn(5, 11).requires_grad_()
        loss = cross_entropy(logits, torch.full((5,), -100), count)
        close(loss, 0)
        loss.backward()
        assert (logits.grad == 0).all()

    @pytest.mark.parametrize(
        ("problem", "labels"),
        [("regression", torch.zeros(4)), ("multi_label_classification", torch.zeros(4, 2))],
        ids=["regression", "multi_label"],
    )
    def test_labels_that_do_not_fit_are_refused(self, problem, labels):
        message = rf"{problem} needs a label for each of the 3 outputs of each of the 4 texts, got .*Set num_labels"
        with pytest.raises(ValueError, match=message):
            classification_loss(torch.zeros(4, 3), labels, problem)

    @pytest.mark.parametrize(
        ("logits", "labels"),
        [((2, 5, 11), (2, 4)), ((2, 5, 11), (2, 6)), ((6, 4), (5,)), ((6, 4), (6, 2))],
        ids=["one_token_less", "one_token_more", "one_text_less", "two_for_each_text"],
    )
    def test_labels_of_another_number_are_refused(self, logits, labels):
        """Flattened they would be read as the labels of other rows."""
        message = rf"labels of shape {re.escape(str(labels))}"
        with pytest.raises(ValueError, match=message):
            cross_entropy(torch.zeros(logits), torch.zeros(labels, dtype=torch.long))


def token_labels(classes):
    """(B, N) with -100 at padding, on half of the tokens, and on all of row 3."""
    labels = integers(0, classes, B, N).masked_fill(~REAL | (integers(0, 2, B, N, seed=2) == 0), -100)
    labels[3] = -100
    return labels


def text_labels(classes):
    return integers(0, classes, B).index_fill(0, torch.tensor([3]), -100)


MULTI_LABEL = integers(0, 2, B, 3).double()
MULTI_LABEL[3] = MULTI_LABEL[5, 1] = -100

CASES = {
    "masked_lm": (SelfAttnForMaskedLM, {}, {"labels": token_labels(43)}),
    "single_label": (SelfAttnForSequenceClassification, {"num_labels": 3}, {"labels": text_labels(3)}),
    "multi_label": (SelfAttnForSequenceClassification, {"num_labels": 3}, {"labels": MULTI_LABEL}),
    "regression": (SelfAttnForSequenceClassification, {"num_labels": 1}, {"labels": drawn(B, seed=3)}),
    "regression_of_two": (
        SelfAttnForSequenceClassification,
        {"num_labels": 2, "problem_type": "regression"},
        {"labels": drawn(B, 2, seed=3)},
    ),
    "token_classification": (SelfAttnForTokenClassification, {"num_labels": 5}, {"labels": token_labels(5)}),
    "question_answering": (
        SelfAttnForQuestionAnswering,
        {},
        {"start_positions": integers(0, 9, B) % LENGTHS, "end_positions": integers(0, 9, B, seed=1) % LENGTHS},
    ),
    "multiple_choice": (SelfAttnForMultipleChoice, {}, {"labels": text_labels(4)}),
}
"""Each head and each of its problems: the class, its options, and labels for the batch of `inputs`."""


def inputs(case):
    ids, mask = integers(0, 43, B, N), REAL.long()
    if case == "multiple_choice":
        ids = integers(0, 43, B, 4, N)
        mask = torch.stack([mask, mask.roll(1, 0), mask.roll(2, 0), mask.roll(3, 0)], dim=1)
    return {"input_ids": ids, "attention_mask": mask}


@pytest.fixture(params=CASES)
def case(request):
    return request.param


@pytest.fixture
def model(case, make_config, make_model):
    cls, options, _ = CASES[case]
    return make_model(make_config(position="rotary", **options), cls=cls)


def rows(batch, which):
    return {name: tensor[which] for name, tensor in batch.items()}


def gradients(model, losses):
    model.zero_grad()
    for loss in losses:
        loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


class TestHeads:
    def test_loss_is_the_plain_formula(self, case, model):
        batch, labels = inputs(case), CASES[case][2]
        outputs = model(**batch, **labels)
        if case == "question_answering":
            sides = ((outputs.start_logits, "start_positions"), (outputs.end_logits, "end_positions"))
            expected = mean([mean(plain_span(logits, labels[name], REAL)) for logits, name in sides])
        elif case == "multi_label":
            expected = mean(plain_binary_cross_entropy(outputs.logits, labels["labels"]))
        elif case.startswith("regression"):
            expected = mean(plain_squared_error(outputs.logits, labels["labels"]))
        else:
            logits = outputs.logits.flatten(0, -2)
            expected = mean(plain_cross_entropy(logits, labels["labels"].flatten()))
        close(outputs.loss, expected)

    @pytest.mark.parametrize("sizes", [[8], [4, 4], [2, 2, 2, 2], [1] * 8, [3, 5]], ids=str)
    def test_accumulated_micro_batches_equal_the_whole_batch(self, case, model, sizes):
        batch = {**inputs(case), **CASES[case][2]}
        pieces = [
            rows(batch, slice(end - size, end)) for size, end in zip(sizes, torch.tensor(sizes).cumsum(0), strict=True)
        ]
        if case == "question_answering":
            # Its batches carry no `labels`, so the Trainer takes the mean over micro-batches, which are equal there.
            losses = [model(**piece).loss * size / B for piece, size in zip(pieces, sizes, strict=True)]
        else:
            count = (batch["labels"] != -100).sum()  # as the Trainer counts
            losses = [model(**piece, num_items_in_batch=count).loss for piece in pieces]
        whole = model(**batch).loss
        assert_close(sum(losses), whole, "loss")
        expected = {name: gradient.clone() for name, gradient in gradients(model, [whole]).items()}
        for name, gradient in gradients(model, losses).items():
            assert_close(gradient, expected[name], f"gradient of {name}")

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
    def test_a_batch_without_labels_gives_0_and_no_gradient(self, case, model, dtype):
        """Every parameter gets a gradient of 0, not None: distributed training waits for each."""
        nothing = {name: torch.full_like(labels, -100) for name, labels in CASES[case][2].items()}
        model.to(dtype).train()
        loss = model(**inputs(case), **nothing).loss
        assert loss.item() == 0
        for name, gradient in gradients(model, [loss]).items():
            assert gradient is not None, name
            assert (gradient == 0).all(), name

    def test_loss_of_half_precision_is_computed_in_float32(self, case, model):
        batch, labels = inputs(case), CASES[case][2]
        outputs = model.to(torch.bfloat16)(**batch, **labels)
        assert outputs.loss.dtype == torch.float32
        outputs.loss.backward()
        assert all(torch.isfinite(p.grad).all() for p in model.parameters())

    def test_no_loss_without_labels(self, case, model):
        assert model(**inputs(case)).loss is None

    def test_the_config_is_not_written_to(self, case, model):
        before = model.config.to_dict()
        model(**inputs(case), **CASES[case][2])
        assert model.config.to_dict() == before

    def test_the_trainer_is_told_the_truth(self, case, model):
        """Whether the model divides by `num_items_in_batch` itself; a head without `labels` cannot."""
        assert getattr(model, "accepts_loss_kwargs", True) is (case != "question_answering")


@pytest.mark.parametrize("case", ["masked_lm", "token_classification"])
class TestTokenLabels:
    @pytest.mark.parametrize("padded", [True, False], ids=["padded", "all_real"])
    def test_labels_of_another_length_are_refused(self, case, model, padded):
        batch = inputs(case) if padded else {"input_ids": inputs(case)["input_ids"]}
        with pytest.raises(ValueError, match=r"labels of shape \(8, 8\)"):
            model(**batch, labels=CASES[case][2]["labels"][:, 1:])

    def test_a_label_on_padding_is_no_label(self, case, model):
        labels = CASES[case][2]["labels"]
        loss = model(**inputs(case), labels=labels.masked_fill(~REAL, 1)).loss
        assert_close(loss, model(**inputs(case), labels=labels).loss, "loss")

    def test_the_side_of_the_padding_does_not_matter(self, case, model):
        batch = {**inputs(case), **CASES[case][2]}
        left = {name: x.clone() for name, x in batch.items()}
        for row, length in enumerate(LENGTHS.tolist()):
            for x in left.values():
                x[row] = x[row].roll(N - length)
        assert_close(model(**left).loss, model(**batch).loss, "loss")


@pytest.mark.parametrize("case", ["single_label", "multi_label", "regression"])
def test_problem_type_follows_from_the_labels(case, model):
    """As transformers says: one output is regression, integers are classes, floats are 0 and 1 for each class."""
    assert model.config.problem_type is None
    problem = {"single_label": "single_label_classification", "multi_label": "multi_label_classification"}.get(
        case, case
    )
    labels = CASES[case][2]["labels"]
    outputs = model(**inputs(case), labels=labels)
    assert_close(outputs.loss, classification_loss(outputs.logits, labels, problem), "loss")
    model.config.problem_type = problem
    assert_close(model(**inputs(case), labels=labels).loss, outputs.loss, "loss")


class TestLinearCrossEntropy:
    """The loss without logits equals the one with them, in value and gradients."""

    @pytest.fixture(params=["whole", "in_parts"])
    def _in_parts(self, request, monkeypatch):
        if request.param == "in_parts":
            monkeypatch.setattr(losses, "LOGITS_AT_ONCE", 5 * 43)
            monkeypatch.setattr(losses, "EXACT_AT_ONCE", 2 * 43)

    @pytest.mark.usefixtures("_in_parts")
    @pytest.mark.parametrize("items", [None, 3, torch.tensor(40)], ids=["own", "number", "tensor"])
    @pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no_bias"])
    @pytest.mark.parametrize("count", [13, 1, 0])
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
    def test_equals_the_plain_one(self, dtype, count, with_bias, items):
        drawn_tensors = [drawn(count, 8), drawn(43, 8, seed=1), drawn(43, seed=2) if with_bias else None]
        labels = integers(0, 43, count)
        found = []
        for plain in (False, True):
            leaves = [None if x is None else x.to(torch.float64 if plain else dtype) for x in drawn_tensors]
            leaves = [None if x is None else x.requires_grad_() for x in leaves]
            hidden, weight, bias = leaves
            if plain:
                loss = cross_entropy(torch.nn.functional.linear(hidden, weight, bias), labels, items)
            else:
                loss = linear_cross_entropy(hidden, weight, bias, labels, items)
            (3 * loss).backward()
            found.append([loss.detach(), *(x.grad for x in leaves if x is not None)])
        for name, actual, expected in zip(("loss", "hidden", "weight", "bias"), *found, strict=False):
            if dtype == torch.bfloat16 and name != "loss":
                assert actual.dtype == dtype
                assert (actual - expected).norm() <= 2e-2 * max(1e-9, expected.norm())
            elif dtype == torch.bfloat16:
                assert actual.dtype == torch.float32
                assert abs(actual - expected) <= 2e-2 * max(1, abs(expected))
            else:
                assert_close(actual, expected, name)

    def test_autocast_is_respected(self):
        hidden, weight = drawn(13, 8, dtype=torch.float32), drawn(43, 8, seed=1, dtype=torch.float32)
        labels, types = integers(0, 43, 13), []
        original = torch.Tensor.__matmul__
        with pytest.MonkeyPatch.context() as patch, torch.autocast("cpu", torch.bfloat16):
            patch.setattr(torch.Tensor, "__matmul__", lambda x, y: types.append(x.dtype) or original(x, y))
            loss = linear_cross_entropy(hidden.requires_grad_(), weight.requires_grad_(), None, labels)
        loss.backward()
        assert set(types) == {torch.bfloat16}
        assert (loss.dtype, hidden.grad.dtype, weight.grad.dtype) == (torch.float32,) * 3

    def test_the_head_in_training_equals_evaluation(self, make_config, make_model):
        """Loss and gradients; in training no logits are returned."""
        ids, labels = integers(0, 43, B, N), integers(0, 43, B, N, seed=1).masked_fill(~REAL, -100)
        labels[:, ::2] = -100
        found = []
        for training in (True, False):
            model = make_model(make_config(), cls=SelfAttnForMaskedLM).train(training)
            outputs = model(ids, attention_mask=REAL, labels=labels)
            assert (outputs.logits is None) == training
            outputs.loss.backward()
            found.append([outputs.loss, *(x.grad for x in model.parameters())])
        for actual, expected in zip(*found, strict=True):
            assert_close(actual, expected)

    def test_an_adapter_on_the_head_is_used(self, make_config, make_model):
        model = make_model(make_config(), cls=SelfAttnForMaskedLM).train()
        ids = integers(0, 43, B, N)
        expected = model(ids, labels=ids).loss

        class Doubled(torch.nn.Linear):
            def forward(self, x):
                return 2 * super().forward(x)

        head = Doubled(*reversed(model.lm_head.weight.shape)).double()
        head.load_state_dict(model.lm_head.state_dict())
        model.lm_head = head
        assert not torch.allclose(model(ids, labels=ids).loss, expected)

    def test_second_derivatives_are_refused(self):
        hidden, weight = drawn(3, 8).requires_grad_(), drawn(43, 8, seed=1).requires_grad_()
        loss = linear_cross_entropy(hidden, weight, None, integers(0, 43, 3))
        with pytest.raises(RuntimeError, match=r"no second derivatives. Call model.eval\(\)"):
            torch.autograd.grad(loss, hidden, create_graph=True)

    def test_a_frozen_weight_gets_no_gradient(self):
        hidden, weight = drawn(3, 8).requires_grad_(), drawn(43, 8, seed=1)
        loss = linear_cross_entropy(hidden, weight, drawn(43, seed=2), integers(0, 43, 3))
        assert [x is None for x in loss.grad_fn.next_functions[0][0].saved_tensors] == [False, True, True]

    def test_hooks_of_the_head_are_called(self, make_config, make_model):
        model, called = make_model(make_config(), cls=SelfAttnForMaskedLM).train(), []
        model.lm_head.register_forward_hook(lambda *args: called.append(True))
        ids = integers(0, 43, B, N)
        model(ids, labels=ids)
        assert called == [True]
