import copy

import pytest
import torch
from transformers import AutoConfig, AutoModelForMaskedLM, Trainer

from hf_selfattn.tools.optimizers import (
    MuonWithAdamW,
    hidden_matrices,
    muon_with_adamw,
    without_biases,
)

from .pretraining_runs import make_trainer, trained_weights

SIZES = {
    "vocab_size": 43,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
}
OPTIONS = {"lr": 1e-2, "muon_lr": 2e-2, "weight_decay": 0.1, "betas": (0.9, 0.95), "eps": 1e-8,
           "muon": {"momentum": 0.9, "nesterov": True, "ns_steps": 5, "adjust_lr_fn": "match_rms_adamw"}}  # fmt: skip


def make_model(model_type="selfattn", **options):
    torch.manual_seed(0)
    return AutoModelForMaskedLM.from_config(AutoConfig.for_model(model_type, **SIZES, **options))


def decayed(model):
    return without_biases(model, Trainer.get_decay_parameter_names(None, model))


def make_optimizer(model, **changes):
    return muon_with_adamw(model, decay_names=decayed, **{**OPTIONS, **changes})


def set_gradients(model, step):
    """Gradients of full rank, so that no direction is rounding alone."""
    generator = torch.Generator().manual_seed(step)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize(
    ("options", "undecayed"),
    [
        ({"attention_bias": True, "norm_bias": True, "mlp_bias": True}, ("bias",)),
        ({"position_encoding": "t5", "attention_sink": True}, ("table", "sink")),
        ({"score_function": "cosine", "position_encoding": "alibi", "qk_norm": True}, ("log_scale", "slopes")),
        ({"position_encoding": "transformer_xl"}, ("content_bias", "position_bias")),
        (
            {"position_encoding": "learned", "max_position_embeddings": 8, "type_vocab_size": 2, "embedding_size": 8},
            (),
        ),
        ({"score_function": "additive", "tie_word_embeddings": False}, ()),
        ({"model_type": "bert"}, ("bias",)),
    ],
    ids=lambda value: "-".join(map(str, value)),
)
def test_what_decays_and_what_is_a_matrix_for_muon(options, undecayed):
    model = make_model(**options)
    for name, parameter in model.named_parameters():
        last = name.split(".")[-1]
        is_norm = any("norm" in part.lower() for part in name.split(".")[:-1])
        assert (name in decayed(model)) == (last not in undecayed and last != "bias" and not is_norm), name
        in_layer = "layer" in name or "projection" in name
        is_matrix = in_layer and last == "weight" and parameter.ndim == 2
        assert (name in hidden_matrices(model)) == is_matrix, name


def newton_schulz(matrix, steps):
    """In float64 on the singular values: what the iteration does to a matrix, it does to each of them."""
    left, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    values = values / matrix.double().norm()
    for _ in range(steps):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    return left @ values.diag() @ right


@pytest.mark.parametrize("adjust", ["match_rms_adamw", "original"])
@pytest.mark.parametrize("nesterov", [True, False])
def test_two_steps_by_hand(adjust, nesterov):
    model = make_model()
    muon = {**OPTIONS["muon"], "adjust_lr_fn": adjust, "nesterov": nesterov}
    optimizer = make_optimizer(model, muon=muon)
    matrices, decaying = hidden_matrices(model), set(decayed(model))
    expected = {name: parameter.detach().double().clone() for name, parameter in model.named_parameters()}
    momentum = dict.fromkeys(expected, 0)
    square = dict.fromkeys(expected, 0)
    for step in (1, 2):
        set_gradients(model, step)
        for name, parameter in model.named_parameters():
            gradient, weight = parameter.grad.double(), expected[name]
            decay = OPTIONS["weight_decay"] if name in decaying else 0
            if name in matrices:
                momentum[name] = 0.9 * momentum[name] + 0.1 * gradient
                update = 0.1 * gradient + 0.9 * momentum[name] if nesterov else momentum[name]
                rows, columns = gradient.shape
                size = (
                    0.2 * max(rows, columns) ** 0.5 if adjust == "match_rms_adamw" else max(1, rows / columns) ** 0.5
                )
                weight *= 1 - 2e-2 * decay
                weight -= 2e-2 * size * newton_schulz(update, 5)
            else:
                momentum[name] = 0.9 * momentum[name] + 0.1 * gradient
                square[name] = 0.95 * square[name] + 0.05 * gradient**2
                corrected = momentum[name] / (1 - 0.9**step), square[name] / (1 - 0.95**step)
                weight *= 1 - 1e-2 * decay
                weight -= 1e-2 * corrected[0] / (corrected[1].sqrt() + 1e-8)
        optimizer.step()
    for name, parameter in model.named_parameters():
        # Muon works in bf16; its updates here are around 2e-2.
        torch.testing.assert_close(parameter.double(), expected[name], rtol=0, atol=2e-3 if name in matrices else 1e-6)


def test_it_is_the_two_optimizers_of_torch():
    model, other = make_model(), make_model()
    optimizer, matrices = make_optimizer(model), hidden_matrices(other)
    parts = {kind: [p for n, p in other.named_parameters() if kind(n)] for kind in (
        lambda n: n in matrices, lambda n: n not in matrices and n in decayed(other),
        lambda n: n not in matrices and n not in decayed(other))}  # fmt: skip
    hidden, with_decay, without = parts.values()
    muon = torch.optim.Muon(hidden, lr=2e-2, weight_decay=0.1, **OPTIONS["muon"])
    groups = [{"params": with_decay}, {"params": without, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    for step in range(3):
        for each in (model, other):
            set_gradients(each, step)
        optimizer.step()
        muon.step()
        adamw.step()
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_it_goes_on_bit_for_bit_from_its_state(tmp_path):
    model = make_model()
    optimizer = make_optimizer(model)
    for step in range(2):
        set_gradients(model, step)
        optimizer.step()
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    other = copy.deepcopy(model)
    resumed = make_optimizer(other)
    resumed.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    for step in range(2, 4):
        for each, of in ((model, optimizer), (other, resumed)):
            set_gradients(each, step)
            of.step()
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_schedule_moves_all_parts_in_proportion():
    optimizer = make_optimizer(make_model())
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    assert [group["lr"] for group in optimizer.param_groups] == [1e-2, 1e-2, 2e-2]
    optimizer.step()
    scheduler.step()
    assert [group["lr"] for group in optimizer.param_groups] == [5e-3, 5e-3, 1e-2]
    assert all(part.param_groups[0]["lr"] == lr for part, lr in zip(optimizer.parts, [1e-2, 5e-3], strict=True))


def test_a_closure_is_called_once():
    model = make_model()
    optimizer, calls = make_optimizer(model), []

    def closure():
        calls.append(1)
        set_gradients(model, 0)
        return torch.tensor(3.0)

    assert optimizer.step(closure) == 3
    assert len(calls) == 1


def test_a_model_without_matrices_is_refused():
    model = make_model()
    for name, parameter in model.named_parameters():
        parameter.requires_grad = name not in hidden_matrices(model)
    with pytest.raises(
        ValueError, match="--optimizer muon is for the weights of an encoder's linear layers, and Self"
    ):
        make_optimizer(model)


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_the_trainer_takes_it_and_resumes_bit_for_bit(optimizer, tmp_path):
    options = {
        "optimizer": optimizer,
        "weight_decay": 0.1,
        "max_grad_norm": 0.5,
        "save_steps": 2,
        "hidden_dropout": 0.1,
    }
    if optimizer == "muon":
        options["muon_learning_rate"] = 2e-2
    whole = make_trainer(tmp_path, max_steps=6, **options)
    whole.train()
    parts = {type(part).__name__ for part in getattr(whole.optimizer.optimizer, "parts", [whole.optimizer.optimizer])}
    assert parts == ({"Muon", "AdamW"} if optimizer == "muon" else {"AdamW"})
    resumed = make_trainer(tmp_path / "resumed", max_steps=6, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert all(torch.equal(a, b) for a, b in zip(trained_weights(whole), trained_weights(resumed), strict=True))
    logs = [entry for entry in whole.state.log_history if "loss" in entry]
    if optimizer == "muon":
        ratio = 2e-2 / whole.args.learning_rate
        assert all(entry["muon_learning_rate"] == entry["learning_rate"] * ratio for entry in logs)


def test_muon_can_learn_where_adamw_does_not(tmp_path):
    trainer = make_trainer(tmp_path, optimizer="muon", learning_rate=0.0, muon_learning_rate=1e-3, max_steps=2)
    trainer.train()
    groups = zip(trainer.optimizer.param_groups, trainer.lr_scheduler.base_lrs, strict=True)
    assert all(rate == (1e-3 if group["uses_muon"] else 0) for group, rate in groups)


@pytest.mark.slow
def test_compiled_layers_train_with_it(tmp_path):
    """A layer compiled in place keeps its names: the same weights are Muon's, and the curve is the same."""
    curves = []
    for compiled in (False, True):
        trainer = make_trainer(tmp_path, optimizer="muon", learning_rate=1e-3, max_steps=4, compile_layers=compiled)
        trainer.train()
        assert sum(len(group["params"]) for group in trainer.optimizer.param_groups if group["uses_muon"]) == 7
        curves.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert curves[1] == pytest.approx(curves[0], rel=1e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"optimizer": "muon", "optim": "adafactor"},
            "--optimizer muon brings its own AdamW .* got --optim adafactor",
        ),
        ({"muon_learning_rate": 0.1}, "--muon_learning_rate 0.1 has no effect without --optimizer muon"),
        ({"muon_ns_steps": 4}, "--muon_ns_steps 4 has no effect without --optimizer muon"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, **options)


def test_it_is_one_optimizer_for_torch():
    optimizer = make_optimizer(make_model())
    assert isinstance(optimizer, MuonWithAdamW)
    assert isinstance(optimizer, torch.optim.Optimizer)
    numbered = [number for group in optimizer.state_dict()["param_groups"] for number in group["params"]]
    assert numbered == list(range(len(list(make_model().parameters()))))
