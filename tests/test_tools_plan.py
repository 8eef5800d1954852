import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForMaskedLM

from hf_selfattn.tools.plan import (
    PEAK_FLOPS,
    activation_bytes_per_token,
    flops_per_token,
    keys_per_query,
    layer_bytes_per_token,
    make_plan,
    peak_flops,
    peak_of_training,
)

from .pretraining_runs import make_arguments
from .reference import layer_options, sees, stand

SIZES = {
    "vocab_size": 43,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 24,
}


def make_config(model_type="selfattn", **options):
    return AutoConfig.for_model(model_type, **{**SIZES, **options})


def batch_of(rows, length, share=0.3):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 43, (rows, length), generator=generator)
    labels = ids.masked_fill(torch.rand(rows, length, generator=generator) > share, -100)
    return {"input_ids": ids, "labels": labels}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_key_value_heads": 1, "head_dim": 6, "value_head_dim": 5},
        {"mlp_type": "plain", "embedding_size": 10, "position_encoding": "t5"},
        {"score_function": "cosine", "causal": True, "tie_word_embeddings": False},
        {"model_type": "bert", "attn_implementation": "eager"},
    ],
    ids=str,
)
def test_flops_are_those_that_torch_counts(options):
    """Forward and backward, on a kernel that computes every pair (so that a causal one computes more than is seen)."""
    config, length = make_config(**options), 30
    model = AutoModelForMaskedLM.from_config(config, attn_implementation="eager").train()
    batch = batch_of(4, length)
    share = (batch["labels"] != -100).double().mean().item()
    with FlopCounterMode(display=False) as counter:
        model(**batch).loss.backward()
    found = flops_per_token(config, length, share) * batch["input_ids"].numel()
    if getattr(config, "causal", False):
        pairs = 6 * 16 * 2 * 3 * length * batch["input_ids"].numel()
        found += pairs * (1 - (length + 1) / 2 / length)
    assert found == pytest.approx(counter.get_total_flops(), rel=1e-9)


def test_keys_are_counted_as_the_reference_sees_them(pattern, causal, make_config):
    """Every query and key of a document of 37 tokens, one by one."""
    config = make_config(pattern=pattern, causal=causal)
    length, heads = 37, config.num_attention_heads
    for layer, keys in enumerate(keys_per_query(config, length)):
        options, (document,) = layer_options(config, layer), stand(1, length)
        pairs = sum(
            sees(query, key, pattern, causal, head, options)
            for head in range(heads)
            for query in document
            for key in document
        )
        assert keys == pytest.approx(pairs / heads / length)


def test_a_window_costs_what_it_sees():
    """22 layers as in ModernBERT: full attention in every third, a radius of 64 elsewhere, in closed form."""
    length, radius = 1024, 64
    every_third = ["full" if layer % 3 == 0 else "sliding_window" for layer in range(22)]
    config = make_config(num_hidden_layers=22, attention_pattern=every_third,
                         window_radius=[None if kind == "full" else radius for kind in every_third])  # fmt: skip
    inside = 2 * radius + 1 - radius * (radius + 1) / length
    assert keys_per_query(config, length) == pytest.approx(
        [length if kind == "full" else inside for kind in every_third]
    )
    windows, full = flops_per_token(config, length), flops_per_token(make_config(num_hidden_layers=22), length)
    assert full - windows == pytest.approx(every_third.count("sliding_window") * 6 * 2 * 16 * (length - inside))


def saved_bytes(model, batch, low_precision):
    """What autograd keeps between forward and backward, beside parameters and (under autocast) their bf16 copies."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage  # as long as it lives, no other storage has its address
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", torch.bfloat16, enabled=low_precision):
        loss = model(**batch).loss
    copies = sum(2 * parameter.numel() for parameter in model.parameters() if parameter.ndim == 2) * low_precision
    del loss
    return sum(storage.nbytes() for storage in kept.values()) - copies


@pytest.mark.parametrize("low_precision", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    ("options", "length"),
    [
        ({"hidden_size": 64}, 128),
        ({"hidden_size": 64}, 700),
        ({"hidden_size": 64, "mlp_type": "plain", "norm_position": "post", "attention_bias": True, "mlp_bias": True,
          "position_encoding": "learned", "max_position_embeddings": 128, "hidden_dropout": 0.1}, 128),
    ],
    ids=["short", "long", "bert"],
)  # fmt: skip
def test_the_estimate_of_activations_is_what_autograd_keeps(options, length, low_precision):
    config = make_config(**{**options, "vocab_size": 300, "intermediate_size": 192})
    model = AutoModelForMaskedLM.from_config(config, attn_implementation="selfattn").train()
    found = saved_bytes(model, batch_of(8, length), low_precision) / (8 * length)
    layers = layer_bytes_per_token(config, length, low_precision)
    assert activation_bytes_per_token(config, layers, 0.3) == pytest.approx(found, rel=0.15)


def plan_of(folder, length=32, config=None, **options):
    options = {"dry_run": True, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, **options}
    return make_plan(config or make_config(), make_arguments(folder, **options), length, 0.3)


def test_the_numbers_of_a_plan(tmp_path):
    config = make_config()
    model = AutoModelForMaskedLM.from_config(config)
    plan = plan_of(tmp_path, assumed_num_devices=3, max_steps=10, assumed_tokens_per_second=640.0)
    assert plan.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert plan.embeddings == 43 * 16
    assert plan.tokens_per_step == 4 * 32 * 2 * 3
    assert (plan.steps, plan.tokens) == (10, 7680)
    assert plan.hours == pytest.approx(7680 / 640 / 3600)
    assert plan.memory["weights"] == 4 * plan.parameters
    assert plan.memory["gradients"] == 2 * 4 * plan.parameters
    assert plan.memory["optimizer"] == 8 * plan.parameters
    assert f"parameters           {plan.parameters:,}: embeddings 688" in str(plan)
    assert "tokens in all        7,680" in str(plan)


def test_muon_keeps_one_number_for_each_of_its_weights(tmp_path):
    matrices = 3 * (4 * 16 * 16 + 3 * 16 * 24)
    adamw, muon = (plan_of(tmp_path, optimizer=name, max_steps=1).memory["optimizer"] for name in ("adamw", "muon"))
    assert adamw - muon == 4 * matrices


def test_budgets_make_steps(tmp_path):
    plan = plan_of(tmp_path, max_tokens=1000)
    assert (plan.tokens, plan.steps, plan.hours) == (1000, 4, None)
    assert "--assumed_tokens_per_second, or --assumed_device" in str(plan)
    plan = plan_of(tmp_path, max_minutes=3, assumed_tokens_per_second=100.0)
    assert (plan.tokens, plan.steps, plan.hours) == (18000, 71, 0.05)
    plan = plan_of(tmp_path, max_minutes=3)
    assert (plan.tokens, plan.steps, plan.hours) == (None, None, None)
    assert "Steps and tokens depend on the data (epochs) or on the speed (minutes)." in str(plan)
    assert plan_of(tmp_path).steps is None


def test_the_speed_of_a_known_device(tmp_path):
    plan = plan_of(tmp_path, max_tokens=10**12, assumed_device="H100", assumed_mfu=0.5, assumed_num_devices=8)
    assert plan.tokens_per_second == pytest.approx(0.5 * 8 * 989e12 / plan.flops_per_token)
    assert "50% of the peak, 989 TFLOP/s a device" in str(plan)
    with pytest.raises(ValueError, match=r"--assumed_device is one of B200, .*, got 'abacus'. For others pass"):
        plan_of(tmp_path, assumed_device="abacus")


def test_names_of_devices():
    assert peak_flops("NVIDIA H200") == peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert peak_flops("NVIDIA H100 PCIe") == 756e12
    assert peak_flops("NVIDIA L40S") == PEAK_FLOPS["L40S"] != peak_flops("NVIDIA L4")
    assert peak_flops("NVIDIA A100-SXM4-80GB") == PEAK_FLOPS["A100"]
    assert peak_flops("Some CPU") is None


def test_the_peak_of_a_cpu_is_not_known(tmp_path):
    assert peak_of_training(make_arguments(tmp_path, bf16=True)) is None


def test_options_of_the_plan_need_the_plan(tmp_path):
    with pytest.raises(ValueError, match=r"--assumed_mfu 0.5 has no effect without --dry_run"):
        make_arguments(tmp_path, assumed_mfu=0.5)


def test_checkpointed_layers_keep_their_inputs():
    config = make_config(num_hidden_layers=8)
    layers = layer_bytes_per_token(config, 64, False)
    whole, checkpointed = (activation_bytes_per_token(config, layers, 0.3, keep) for keep in (False, True))
    assert whole - checkpointed == pytest.approx(7 * layers[0] - 8 * 4 * 16)
