"""Equalities whatever the numbers are: weights = output, training = evaluation, batch = single, half = whole; kernels
chosen, switched and refused."""

import copy

import pytest
import torch

from hf_selfattn import (
    KERNELS,
    SCORES,
    Scoring,
    SelfAttnForMaskedLM,
    SelfAttnForTokenClassification,
    SelfAttnModel,
    register_score,
    unsupported_reasons,
)
from hf_selfattn.packing import read_batch
from hf_selfattn.patterns import SlidingWindow
from hf_selfattn.scores import ScaledDotProduct

from .tolerances import assert_close

pytestmark = pytest.mark.usefixtures("uncompiled")

B, N, H = 3, 13, 4


def draw_ids(batch_size=B):
    return torch.randint(43, (batch_size, N), generator=torch.Generator().manual_seed(0))


def draw_mask():
    """A row without padding, one padded on the left with a hole, one of nothing but padding."""
    mask = torch.ones(B, N, dtype=torch.long)
    mask[1, :4] = mask[1, 7] = mask[2] = 0
    return mask


USER_MASK = torch.rand(B, H, N, N, generator=torch.Generator().manual_seed(1)) < 0.7
USER_MASK[1, 2, 3] = False

MASKS = {"no_mask": None, "padding": draw_mask(), "pairs": USER_MASK[:, :1], "pairs_per_head": USER_MASK}


def can_train(config, kernel, dtype=torch.float64):
    """Where a kernel cannot, test_reference_encoder.py holds it to its refusal."""
    return not unsupported_reasons(config, kernel, device_type="cpu", dtype=dtype, training=True)


def can_run(config, kernel, dtype=torch.float64):
    """As `can_train`, for values alone."""
    return not unsupported_reasons(config, kernel, device_type="cpu", dtype=dtype, training=False)


# Attention weights


def test_weights_on_request(choice, kernel, make_config, make_model):
    check_weights(make_config(*choice), kernel, "padding", make_model)


@pytest.mark.parametrize("mask", MASKS)
def test_weights_with_mask(mask, pattern, kernel, make_config, make_model):
    check_weights(make_config(pattern=pattern, position="rotary"), kernel, mask, make_model)


def check_weights(config, kernel, mask, make_model):
    """Rows sum to 1, or to 0 where a query sees nothing; they are eager's; asking for them changes no output."""
    if not can_run(config, kernel):
        return
    model, eager = make_model(config, kernel), make_model(config, "eager")
    with torch.no_grad():
        without = model(draw_ids(), attention_mask=MASKS[mask])
        outputs = model(draw_ids(), attention_mask=MASKS[mask], output_attentions=True)
        expected = eager(draw_ids(), attention_mask=MASKS[mask], output_attentions=True)
    assert without.attentions is None
    assert_close(outputs.last_hidden_state, without.last_hidden_state)
    assert len(outputs.attentions) == config.num_hidden_layers
    for weights, of_eager in zip(outputs.attentions, expected.attentions, strict=True):
        assert weights.shape == (B, H, N, N)
        assert_close(weights, of_eager)
        sees_something = (of_eager > 0).any(-1)
        assert_close(weights.sum(-1), sees_something.double())
        assert (weights[~sees_something] == 0).all()
    if mask == "padding":
        assert torch.equal(sees_something, MASKS["padding"].bool()[:, None].expand(B, H, N))


def test_weights_reproduce_the_output(choice, kernel, make_config, make_model):
    """Output of each layer's attention = weights times values, through the output projection.

    The kernel reads the real tokens alone, the weights are those of the batch as it came.
    """
    config = make_config(*choice, attention_bias=True)
    if not can_run(config, kernel):
        return
    model, inputs, outputs = make_model(config, kernel), [], []
    for layer in model.layers:
        layer.attention.v_proj.register_forward_hook(lambda module, args, output: inputs.append(output))
        layer.attention.register_forward_hook(lambda module, args, output: outputs.append(output[0]))
    with torch.no_grad():
        model(draw_ids(), attention_mask=draw_mask())
        of_kernel = list(outputs)
        attentions = model(draw_ids(), attention_mask=draw_mask(), output_attentions=True).attentions
        for layer, weights, value, output in zip(
            model.layers, attentions, inputs[len(of_kernel) :], of_kernel, strict=True
        ):
            value = value.unflatten(-1, (2, 5)).repeat_interleave(2, dim=2)
            heads = torch.einsum("bhqk,bkhd->bqhd", weights, value)
            assert_close(layer.attention.o_proj(heads.flatten(-2))[draw_mask().bool()], output.squeeze(0))


def test_weights_by_configuration(kernel, make_config, make_model):
    model = make_model(make_config(output_attentions=True, output_hidden_states=True), kernel)
    with torch.no_grad():
        outputs = model(draw_ids())
        assert len(model(draw_ids(), output_attentions=False, output_hidden_states=False)) == 1
    assert [weights.shape for weights in outputs.attentions] == [(B, H, N, N)] * 2
    assert len(outputs.hidden_states) == 3


def test_gradients_beside_weights(kernel, make_config, make_model):
    config = make_config(position="rotary")
    if not can_train(config, kernel):
        return
    gradients = []
    for output_attentions in (False, True):
        model = make_model(config, kernel)
        model(draw_ids(), attention_mask=draw_mask(), output_attentions=output_attentions)[0].square().sum().backward()
        gradients.append({name: x.grad for name, x in model.named_parameters()})
    for name in gradients[0]:
        assert_close(gradients[1][name], gradients[0][name], name)


# Equalities


def test_training_without_dropout_equals_evaluation(choice, kernel, make_config, make_model):
    config = make_config(*choice)
    if not can_train(config, kernel):
        return
    model = make_model(config, kernel)
    expected = model(draw_ids(), attention_mask=draw_mask()).last_hidden_state
    assert torch.equal(model.train()(draw_ids(), attention_mask=draw_mask()).last_hidden_state, expected)


@pytest.mark.parametrize("mask", MASKS)
def test_batch_equals_single(mask, pattern, kernel, make_config, make_model):
    model, mask = make_model(make_config(pattern=pattern, position="rotary"), kernel), MASKS[mask]
    with torch.no_grad():
        batch = model(draw_ids(), attention_mask=mask).last_hidden_state
        for row in range(B):
            row_mask = None if mask is None else mask[row : row + 1]
            single = model(draw_ids()[row : row + 1], attention_mask=row_mask).last_hidden_state
            assert_close(batch[row : row + 1], single)


def test_inputs_embeds_equal_input_ids(position, make_config, make_model):
    model = make_model(make_config(position=position, embedding_size=9))
    with torch.no_grad():
        by_ids = model(draw_ids(), attention_mask=draw_mask())
        by_embeds = model(inputs_embeds=model.embed_tokens(draw_ids()), attention_mask=draw_mask())
    assert torch.equal(by_ids.last_hidden_state, by_embeds.last_hidden_state)


def test_token_types_are_0_where_none_are_given(make_config, make_model):
    model = make_model(make_config(type_vocab_size=3))
    types = torch.zeros(B, N, dtype=torch.long)
    with torch.no_grad():
        without = model(draw_ids()).last_hidden_state
        assert torch.equal(without, model(draw_ids(), token_type_ids=types).last_hidden_state)
        assert (without - model(draw_ids(), token_type_ids=types + 1).last_hidden_state).abs().max() > 0.01


def test_no_batch_leaves_a_trace(kernel, make_config, make_model):
    """Short, then long = long alone; and the same once more."""
    model = make_model(make_config(pattern="sliding_window", position="rotary"), kernel)
    with torch.no_grad():
        alone = model(draw_ids(), attention_mask=draw_mask()).last_hidden_state
        model(draw_ids()[:1, :2])
        model(draw_ids(), output_attentions=True, output_hidden_states=True)
        again = model(draw_ids(), attention_mask=draw_mask()).last_hidden_state
    assert torch.equal(again, alone)


def test_forward_does_not_change_the_model(kernel, make_config, make_model):
    """No tensor, no attribute of any module, no field of the config."""
    model = make_model(make_config(position="learned"), kernel, cls=SelfAttnForMaskedLM)
    inputs = {"attention_mask": draw_mask(), "labels": draw_ids()}
    trains = can_train(model.config, kernel)
    with torch.set_grad_enabled(trains):
        # The first request installs transformers' capturing hooks.
        model(draw_ids(), output_attentions=True, output_hidden_states=True)
        before = snapshot(model)
        model(draw_ids(), **inputs)
        model(draw_ids(), **inputs, output_attentions=True, output_hidden_states=True)
        if trains:
            model.train()(draw_ids(), **inputs)
            model.eval()
    after = snapshot(model)
    assert before.keys() == after.keys()
    for name, value in before.items():
        same = torch.equal(after[name], value) if isinstance(value, torch.Tensor) else after[name] == value
        assert same, f"{name} changed"


def snapshot(model):
    """Every tensor and every attribute of every module, and the config."""
    found = {f"tensor {name}": tensor.clone() for name, tensor in model.state_dict().items()}
    for name, module in model.named_modules():
        for attribute, value in vars(module).items():
            # Of hooks, parameters and sub-modules it is enough that they are the same ones.
            if isinstance(value, dict):
                value = {key: id(item) for key, item in value.items()}
            found[f"attribute {name}.{attribute}"] = value
    found["config"] = copy.deepcopy(model.config.to_dict())
    return found


# Dropout

RATES = ["attention_dropout", "hidden_dropout", "embedding_dropout", "classifier_dropout"]


@pytest.mark.parametrize("rate", RATES)
def test_dropout_is_on_in_training_and_off_in_evaluation(rate, kernel, make_config, make_model):
    config = make_config(**{rate: 0.5})
    model = make_model(config, kernel, cls=SelfAttnForTokenClassification)
    without = make_model(make_config(), kernel, cls=SelfAttnForTokenClassification)
    with torch.no_grad():
        evaluated = [model(draw_ids(), attention_mask=draw_mask()).logits for _ in range(2)]
        assert torch.equal(evaluated[0], evaluated[1])
        assert torch.equal(evaluated[0], without(draw_ids(), attention_mask=draw_mask()).logits)

    if not can_train(config, kernel):
        with pytest.raises(ValueError, match="Use attn_implementation="):
            model.train()(draw_ids())
        return
    torch.manual_seed(0)
    trained = [model.train()(draw_ids(), attention_mask=draw_mask()).logits for _ in range(2)]
    assert (trained[0] - trained[1]).abs().max() > 0.01
    assert (trained[0] - evaluated[0]).abs().max() > 0.01
    torch.manual_seed(0)
    assert torch.equal(model(draw_ids(), attention_mask=draw_mask()).logits, trained[0])


def test_attention_dropout_keeps_the_mean(kernel, make_config, make_model):
    """Weights that stay are scaled up by 1 / (1 - rate), and none comes back from behind the mask."""
    if not can_train(make_config(attention_dropout=0.3), kernel):
        return
    torch.manual_seed(0)
    packing, query, value = read_batch(1, N, torch.device("cpu")), torch.randn(1, N, 1, 6), torch.eye(N)[None, :, None]
    window = SlidingWindow(window_radius=3)
    mask = KERNELS[kernel].mask(window, packing.tokens, packing.tokens, packing, range(1), None)
    scoring = Scoring("scaled_dot_product", (6**-0.5,))
    _, weights = KERNELS[kernel].attend(query, query, value, mask, scoring, need_weights=True)
    draws = torch.stack([KERNELS[kernel].attend(query, query, value, mask, scoring, 0.3)[0] for _ in range(1000)])
    draws, weights = draws[:, 0, :, 0], weights[0, 0]
    kept = draws != 0
    assert (draws[:, weights == 0] == 0).all()
    assert_close(draws[kept], (weights / 0.7).expand_as(draws)[kept])
    assert float(kept[:, weights > 0].double().mean()) == pytest.approx(0.7, abs=0.02)
    assert (draws.mean(0) - weights).abs().max() < 0.05


# Precision

HALVES = {
    "to_bfloat16": lambda model: model.to(torch.bfloat16),
    "half": lambda model: model.half(),
}


@pytest.mark.parametrize("half", HALVES)
def test_half_precision_with_pattern(half, pattern, kernel, make_config, make_model):
    check_half_precision(half, make_config(pattern=pattern, position="rotary"), kernel, make_model)


@pytest.mark.parametrize("half", HALVES)
def test_half_precision_with_position(half, position, kernel, make_config, make_model):
    check_half_precision(half, make_config(position=position, causal=True), kernel, make_model)


@pytest.mark.parametrize("half", HALVES)
def test_half_precision_with_score(half, score, kernel, make_config, make_model):
    check_half_precision(half, make_config(score), kernel, make_model)


def check_half_precision(half, config, kernel, make_model):
    """A model that was made half is close to the one in fp32, in values and in weights."""
    if not can_run(config, kernel):
        return
    exact, model = make_model(config, kernel, torch.float32), HALVES[half](make_model(config, kernel, torch.float32))
    with torch.no_grad():
        expected = exact(draw_ids(), attention_mask=draw_mask(), output_attentions=True)
        outputs = model(draw_ids(), attention_mask=draw_mask(), output_attentions=True)
        without_weights = model(draw_ids(), attention_mask=draw_mask())
    assert outputs.last_hidden_state.dtype == model.dtype == outputs.attentions[0].dtype
    assert_close(outputs.last_hidden_state, expected.last_hidden_state)
    assert_close(without_weights.last_hidden_state, expected.last_hidden_state)
    for weights, of_exact in zip(outputs.attentions, expected.attentions, strict=True):
        assert_close(weights, of_exact)


def test_autocast(pattern, kernel, make_config, make_model):
    """fp32 parameters, bfloat16 products: values near fp32, gradients in fp32 and near, too."""
    config = make_config(pattern=pattern, position="rotary")
    trains, gradients, outputs = can_train(config, kernel, torch.bfloat16), [], []
    for enabled in (False, True):
        model = make_model(config, kernel, torch.float32)
        with torch.set_grad_enabled(trains), torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            outputs.append(model(draw_ids(), attention_mask=draw_mask()).last_hidden_state)
        if trains:
            (outputs[-1].float().square().sum() / outputs[-1].numel()).backward()
            gradients.append({name: x.grad for name, x in model.named_parameters()})
    assert_close(outputs[1], outputs[0], dtype=torch.bfloat16)
    if trains:
        for name, gradient in gradients[0].items():
            assert gradients[1][name].dtype == torch.float32
            assert_close(gradients[1][name], gradient, name, dtype=torch.bfloat16)


# Choosing the kernel


class NotADotProduct(ScaledDotProduct):
    name = "not_a_dot_product"
    is_dot_product = False


@pytest.fixture
def not_a_dot_product():
    register_score("not_a_dot_product", NotADotProduct)
    yield "not_a_dot_product"
    del SCORES["not_a_dot_product"]


def test_kernel_is_switched_at_run_time(kernel, make_config, make_model, monkeypatch):
    """On the whole model, on the base model inside it, and without building anything anew."""
    calls = []
    for name, row in KERNELS.items():
        counting = row._replace(
            attend=lambda *args, name=name, row=row, **kw: calls.append(name) or row.attend(*args, **kw)
        )
        monkeypatch.setitem(KERNELS, name, counting)
    model = make_model(make_config(), "eager", cls=SelfAttnForMaskedLM)
    with torch.no_grad():
        expected = model(draw_ids()).logits
        model.set_attn_implementation(kernel)
        assert model.config._attn_implementation == kernel
        assert_close(model(draw_ids()).logits, expected)
        model.set_attn_implementation("eager")
        model(draw_ids())
    assert calls == ["eager"] * 2 + [kernel] * 2 + ["eager"] * 2


def test_unknown_kernel_is_refused(make_config, make_model):
    known = ", ".join(KERNELS)
    with pytest.raises(ValueError, match=f"attn_implementation 'spda' is not known. Known are: {known}"):
        SelfAttnModel._from_config(make_config(), attn_implementation="spda")
    with pytest.raises(ValueError, match=f"attn_implementation 'spda' is not known. Known are: {known}"):
        make_model(make_config()).set_attn_implementation("spda")
    with pytest.raises(ValueError, match="attn_implementation 'flash_attention_2' is not known"):
        SelfAttnModel._from_config(make_config(), attn_implementation="flash_attention_2")
    with pytest.raises(ValueError, match=f"attn_implementation 'spda' is not known. Known are: {known}"):
        unsupported_reasons(make_config(), "spda")


def test_named_kernel_that_cannot_run_is_refused(kernel, not_a_dot_product, make_config, make_model):
    config = make_config(not_a_dot_product)
    reasons = unsupported_reasons(config, kernel)
    if not reasons:
        make_model(config, kernel)(draw_ids())
        return
    message = (
        f"attn_implementation '{kernel}' cannot compute this configuration: score_function 'not_a_dot_product' is not "
        "a dot product. Use attn_implementation=.*'eager'"
    )
    with pytest.raises(ValueError, match=message):
        SelfAttnModel._from_config(config, attn_implementation=kernel)
    model = make_model(config, "eager")
    with pytest.raises(ValueError, match=message):
        model.set_attn_implementation(kernel)
    assert model.config._attn_implementation == "eager"
    assert model(draw_ids()).last_hidden_state.isfinite().all()


@pytest.mark.parametrize("accelerator", [False, True])
def test_kernel_is_chosen_where_none_is_named(not_a_dot_product, accelerator, monkeypatch, make_config):
    """On a CPU the from-scratch kernel, elsewhere torch's fused one where it can compute the score."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: accelerator)
    chosen = {score: SelfAttnModel(make_config(score)).config._attn_implementation for score in SCORES}
    assert chosen["scaled_dot_product"] == ("sdpa" if accelerator else "selfattn")
    assert chosen[not_a_dot_product] == "selfattn"
    sparse = SelfAttnModel(make_config(pattern="sliding_window")).config
    assert sparse._attn_implementation == "selfattn"


def test_refusals_name_everything_that_is_wrong(not_a_dot_product, make_config):
    config = make_config(not_a_dot_product, attention_dropout=0.1)
    reasons = unsupported_reasons(config, "flex_attention", device_type="cpu", training=True)
    assert [reason.split()[0] for reason in reasons] == ["score_function", "it", "it"]
    assert "no dropout of weights, and attention_dropout is 0.1" in reasons[1]
    assert "no backward on a CPU" in reasons[2]
    assert unsupported_reasons(config, "eager", device_type="cpu", training=True) == []
