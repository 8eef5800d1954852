"""torch.compile, torch.export and gradient checkpointing give what plain Python gives."""

import pytest
import torch
from torch._dynamo.testing import CompileCounter, CompileCounterWithBackend
from transformers.utils.output_capturing import maybe_install_capturing_hooks

from hf_selfattn import KERNELS, PATTERNS, POSITIONS, SCORES, SelfAttnForMaskedLM, SelfAttnModel

from .tolerances import assert_close

VOCABULARY = 43


def draw_inputs(batch_size, length, seed=0, **more):
    """A batch whose second row is padded on the left by three tokens."""
    ids = torch.randint(VOCABULARY, (batch_size, length), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones(batch_size, length, dtype=torch.long)
    mask[1:2, :3] = 0
    return {"input_ids": ids, "attention_mask": mask, **more}


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(model, backend="aot_eager", dynamic=None):
    return torch.compile(model, fullgraph=True, backend=backend, dynamic=dynamic)


# torch.compile


INPUTS = {
    "ids_alone": {},
    "padding": {"attention_mask": draw_inputs(2, 13)["attention_mask"]},
    "pairs": {"attention_mask": torch.ones(2, 13, 13, dtype=torch.bool).tril()},
    "pairs_per_head": {"attention_mask": torch.rand(2, 4, 13, 13, generator=torch.Generator().manual_seed(2)) < 0.7},
    "restarting_positions": {"position_ids": torch.tensor([[0, 1, 2, 3, 4, *range(8)]]).expand(2, 13)},
    "boundaries": {"cu_seq_lens_q": torch.tensor([0, 5, 13, 20])},
}


@pytest.mark.parametrize(
    ("kernel", "inputs"),
    [
        ("sdpa", "ids_alone"),
        ("sdpa", "padding"),
        ("sdpa", "boundaries"),
        ("eager", "restarting_positions"),
        ("eager", "pairs"),
        ("selfattn", "padding"),
        ("selfattn", "pairs_per_head"),
    ],
)
def test_compiled_equals_eager(kernel, inputs, make_config, make_model):
    """In one graph, values and the gradients of all parameters."""
    config = make_config(
        pattern=["full", "sliding_window"], window_radius=[None, 3], position="rotary", type_vocab_size=2
    )
    given = {"input_ids": draw_inputs(2, 13)["input_ids"], **INPUTS[inputs]}
    model, plain = make_model(config, kernel), make_model(config, kernel)
    outputs, expected = compiled(model)(**given).last_hidden_state, plain(**given).last_hidden_state
    assert_close(outputs, expected)
    outputs.square().mean().backward()
    expected.square().mean().backward()
    assert_same_gradients(model, plain)


def every_row_once():
    """As many combinations as the longest table has rows, every row of each table in one of them."""
    tables = [list(table) for table in (SCORES, PATTERNS, [False, True], POSITIONS)]
    return [tuple(table[i % len(table)] for table in tables) for i in range(max(map(len, tables)))]


@pytest.mark.parametrize("choices", every_row_once(), ids=lambda choices: "-".join(map(str, choices)))
def test_compiled_training_step(choices, make_config, make_model):
    check_training_step(make_config(*choices, num_hidden_layers=1), make_model)


def check_training_step(config, make_model, backend="aot_eager", dtype=torch.float64):
    """The masked language model's loss and all gradients, with the kernel that is taken where none is named."""
    inputs = draw_inputs(2, 13, labels=draw_inputs(2, 13, seed=1)["input_ids"])
    inputs["labels"][:, ::2] = -100
    model, plain = (make_model(config, None, dtype, SelfAttnForMaskedLM).train() for _ in range(2))
    outputs, expected = compiled(model, backend)(**inputs), plain(**inputs)
    assert_close(outputs.loss, expected.loss)
    assert outputs.logits is None
    assert expected.logits is None
    outputs.loss.backward()
    expected.loss.backward()
    assert_same_gradients(model, plain)


def test_compiled_flex(make_config, make_model):
    config = make_config("scaled_dot_product", "sliding_window", position="rotary", num_hidden_layers=1)
    model = make_model(config, "flex_attention")
    inputs = draw_inputs(2, 13)
    with torch.no_grad():
        assert_close(compiled(model)(**inputs).last_hidden_state, model(**inputs).last_hidden_state)


@pytest.mark.slow
def test_compiled_by_inductor(make_config, make_model):
    """The backend that users get. It calls a C++ compiler, for a minute on a cold cache."""
    config = make_config(pattern="sliding_window", position="rotary", num_hidden_layers=1)
    check_training_step(config, make_model, "inductor", torch.float32)


@pytest.mark.parametrize("kernel", ["eager", "sdpa", "selfattn"])
def test_other_lengths_do_not_recompile(kernel, make_config, make_model):
    """One graph for the first shape, one for all others."""
    model = make_model(make_config(pattern="sliding_window", position="rotary", num_hidden_layers=1), kernel)
    counter = CompileCounter()
    fast = compiled(model, counter)
    with torch.no_grad():
        for batch_size, length in [(2, 13), (3, 17), (5, 29), (4, 8), (2, 37), (7, 11)]:
            inputs = draw_inputs(batch_size, length)
            assert_close(fast(**inputs).last_hidden_state, model(**inputs).last_hidden_state)
    assert counter.frame_count == 2


def test_compiled_hidden_states_and_attentions(make_config, make_model):
    model = make_model(make_config("scaled_dot_product", "sliding_window", position="rotary"))
    maybe_install_capturing_hooks(model)
    inputs = draw_inputs(2, 13, output_hidden_states=True, output_attentions=True)
    outputs, expected = compiled(model)(**inputs), model(**inputs)
    assert len(outputs.hidden_states) == len(expected.hidden_states) == 3
    for actual, plain in zip(
        (*outputs.hidden_states, *outputs.attentions), (*expected.hidden_states, *expected.attentions), strict=True
    ):
        assert_close(actual, plain)


@pytest.mark.parametrize("given", ["float", "float_pairs"])
def test_compiled_refuses_a_mask_that_it_cannot_check(given, make_config, make_model):
    inputs = draw_inputs(2, 13)
    inputs["attention_mask"] = {"float": torch.zeros(2, 13), "float_pairs": torch.zeros(2, 13, 13)}[given]
    inputs["attention_mask"][..., -1] = -1e4
    model = make_model(make_config())
    assert model(**inputs).last_hidden_state.isfinite().all()
    with pytest.raises(
        Exception, match=r"cannot be checked while the model is compiled or exported\. Pass it as bool"
    ):
        compiled(model)(**inputs)


# torch.export


@pytest.mark.parametrize(
    ("cls", "kernel", "strict"),
    [
        (SelfAttnModel, "eager", False),
        (SelfAttnModel, "sdpa", False),
        (SelfAttnModel, "selfattn", False),
        (SelfAttnForMaskedLM, None, False),
        (SelfAttnForMaskedLM, None, True),
    ],
    ids=[
        "base-eager-non_strict",
        "base-sdpa-non_strict",
        "base-selfattn-non_strict",
        "masked_lm-default-non_strict",
        "masked_lm-default-strict",
    ],
)
def test_exported_equals_eager(cls, kernel, strict, make_config, make_model):
    """With a batch and a length that stay free, and a mask of padding."""
    config = make_config(pattern="sliding_window", position="rotary", num_hidden_layers=1)
    model = make_model(config, kernel, cls=cls)
    batch, length = torch.export.Dim("batch", min=1, max=64), torch.export.Dim("length", min=2, max=512)
    free = {0: batch, 1: length}
    program = torch.export.export(
        model,
        (),
        draw_inputs(3, 13),
        dynamic_shapes={"input_ids": free, "attention_mask": free},
        strict=strict,
    )
    for shape in [(3, 13), (1, 5), (7, 40)]:
        inputs = draw_inputs(*shape)
        with torch.no_grad():
            assert_close(program.module()(**inputs)[0], model(**inputs)[0])


@pytest.mark.parametrize("position", ["learned", "rotary", "transformer_xl"])
def test_exported_without_mask(position, make_config, make_model):
    model = make_model(make_config(position=position, num_hidden_layers=1), None)
    free = {0: torch.export.Dim("batch", max=64), 1: torch.export.Dim("length", min=2, max=60)}
    ids = draw_inputs(3, 13)["input_ids"]
    program = torch.export.export(model, (), {"input_ids": ids}, dynamic_shapes={"input_ids": free})
    with torch.no_grad():
        for shape in [(3, 13), (1, 5), (7, 40)]:
            ids = draw_inputs(*shape)["input_ids"]
            assert_close(program.module()(input_ids=ids)[0], model(ids)[0])


# Gradient checkpointing


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning")
@pytest.mark.parametrize("use_reentrant", [False, True], ids=["use_reentrant_False", "use_reentrant_True"])
@pytest.mark.parametrize("kernel", [name for name in KERNELS if name != "flex_attention"])
def test_gradient_checkpointing_changes_nothing(use_reentrant, position, kernel, make_config, make_model):
    """Same loss and gradients, dropout included: it draws the same numbers when a layer is computed again."""
    config = make_config(
        pattern=["full", "sliding_window"],
        window_radius=[None, 3],
        position=position,
        hidden_dropout=0.2,
        attention_dropout=0.2,
    )
    inputs = draw_inputs(2, 13, labels=draw_inputs(2, 13, seed=1)["input_ids"])
    models = [make_model(config, kernel, cls=SelfAttnForMaskedLM).train() for _ in range(2)]
    models[1].gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    calls, losses = [0, 0], []
    for i, model in enumerate(models):
        model.model.layers[0].attention.register_forward_hook(lambda *_, i=i: calls.__setitem__(i, calls[i] + 1))
        torch.manual_seed(0)
        losses.append(model(**inputs).loss)
        losses[i].backward()
    assert calls == [1, 2]
    assert_close(losses[1], losses[0])
    assert_same_gradients(models[1], models[0])


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning")
@pytest.mark.parametrize("use_reentrant", [False, True], ids=["use_reentrant_False", "use_reentrant_True"])
def test_gradient_checkpointing_gives_hidden_states(use_reentrant, make_config, make_model):
    config = make_config(position="rotary")
    plain, saving = (make_model(config).train() for _ in range(2))
    saving.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    inputs = draw_inputs(2, 13, output_hidden_states=True, output_attentions=True)
    outputs, expected = saving(**inputs), plain(**inputs)
    for name in ("hidden_states", "attentions"):
        for actual, of_plain in zip(outputs[name], expected[name], strict=True):
            assert_close(actual, of_plain, name)


def assert_same_gradients(model, plain):
    for (name, parameter), of_plain in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert (parameter.grad is None) == (of_plain.grad is None), name
        if parameter.grad is not None:
            assert_close(parameter.grad, of_plain.grad, f"gradient of {name}")


# Layers compiled by themselves


@pytest.mark.parametrize("kernel", ["eager", "sdpa", "selfattn"])
def test_compiled_layers_equal_uncompiled(kernel, make_config, make_model):
    """Padding left out, with loss and gradients."""
    inputs = draw_inputs(3, 13, labels=draw_inputs(3, 13, seed=1)["input_ids"])
    inputs["attention_mask"] = torch.arange(13) < torch.tensor([[13], [4], [7]])
    found = []
    for is_compiled in (True, False):
        model = make_model(make_config(position="rotary"), kernel, cls=SelfAttnForMaskedLM).train()
        if is_compiled:
            model.compile_layers(backend="aot_eager")
        loss = model(**inputs).loss
        loss.backward()
        found.append((loss, model))
    assert_close(found[0][0], found[1][0])
    assert_same_gradients(found[0][1], found[1][1])


def test_compiled_layers_are_compiled_few_times(make_config, make_model):
    """Thirty batches with lengths as they come: at most four graphs (the first layer may differ, and one document)."""
    counter = CompileCounterWithBackend("aot_eager")
    model = make_model(make_config(num_hidden_layers=4), "selfattn", torch.float32, SelfAttnForMaskedLM).train()
    model.compile_layers(backend=counter)
    generator = torch.Generator().manual_seed(0)
    for i in range(30):
        rows, longest = (
            int(torch.randint(1, most, (), generator=generator)) for most in (9, 600 if i % 10 == 9 else 129)
        )
        mask = torch.arange(longest) < torch.randint(1, longest + 1, (rows, 1), generator=generator)
        ids = torch.randint(43, (rows, longest), generator=generator)
        model(ids, attention_mask=mask, labels=ids).loss.backward()
    assert counter.frame_count <= 4
