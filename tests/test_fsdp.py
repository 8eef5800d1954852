"""Weights cut into pieces, one in each of two processes: values, gradients and curves are those of whole weights."""

import pytest
import torch
import transformers
from torch import distributed
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from hf_selfattn import SelfAttnForMaskedLM
from hf_selfattn.parallel import spreads_models

from .processes import together
from .test_trainer import HEADS, assert_same_curve, make_examples, make_model, train
from .train_scripts import ROOT

if spreads_models():
    from transformers.distributed import DistributedConfig

needs_version = pytest.mark.skipif(not spreads_models(), reason="transformers is too old; the refusal is tested")

VARIANTS = {
    **{head: (head, {}) for head in HEADS},
    "untied": ("masked_lm", {"tie_word_embeddings": False}),
    "post_norm": (
        "masked_lm",
        {"norm_position": "post", "position_encoding": "learned", "max_position_embeddings": 16, "head_type": "bert"},
    ),
    "frozen_slopes": ("masked_lm", {"position_encoding": "alibi", "score_function": "additive", "qk_norm": True}),
}
"""Heads, and what else decides which weights there are. The vocabulary of 43 does not divide by two."""


def cut(model):
    """The same weights, cut by transformers."""
    weights = {name: x.clone() for name, x in model.state_dict().items()}
    return type(model).from_pretrained(
        None, config=model.config, state_dict=weights, distributed_config=DistributedConfig(fsdp_size=2)
    )


def with_the_stock_trainer(variant, folder):
    """The curve, and how far the saved model's answers are from those of the one that was trained."""
    head, options = VARIANTS[variant]
    model = cut(make_model(head, **options))
    assert all(isinstance(x, DTensor) for x in model.parameters())
    held = sum(x.to_local().numel() for x in model.parameters())
    total = sum(x.numel() for x in model.parameters())
    folder = folder / variant
    curve = train(model, make_examples(head), folder, 4, 1, save_strategy="steps", save_steps=3, save_only_model=True)
    saved = getattr(transformers, HEADS[head][0]).from_pretrained(folder / "checkpoint-3").eval()
    assert type(saved.get_input_embeddings().weight) is torch.nn.Parameter
    example = make_examples(head)[3]
    batch = {name: example[name].unsqueeze(0) for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        ours, theirs = (model.eval()(**batch)[0], saved(**batch)[0])
    return {"curve": curve, "apart": float((ours - theirs).abs().max()), "share": held / total}


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """Of the stock Trainer with every variant, and of plain torch, all by one pair of processes."""
    cases = [*(VARIANTS if spreads_models() else ()), *PLAIN]
    found = together(answer, cases, tmp_path_factory.mktemp("fsdp"))
    return dict(zip(cases, found, strict=True))


def answer(case, folder):
    return PLAIN[case](folder) if case in PLAIN else with_the_stock_trainer(case, folder)


@needs_version
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_stock_trainer_and_a_folder_that_opens_in_one_process(answers, variant, tmp_path):
    head, options = VARIANTS[variant]
    found = answers[variant]
    whole = train(make_model(head, **options), make_examples(head), tmp_path, 8, 1)
    assert_same_curve([tuple(step) for step in found["curve"]], whole)
    assert found["apart"] < 1e-5
    assert found["share"] < 0.6


def batches(head, steps):
    """(whole batch, this process' half of it) for each step."""
    examples, rank = make_examples(head, 8 * steps), distributed.get_rank()
    for step in range(steps):
        batch = {name: torch.stack([x[name] for x in examples[8 * step : 8 * step + 8]]) for name in examples[0]}
        yield batch, {name: x[4 * rank : 4 * rank + 4] for name, x in batch.items()}


def plain_model(head="masked_lm", **options):
    return make_model(head, **{"position_encoding": "t5", **options}).double().train()


def cut_by_torch(model):
    for layer in model.base_model.layers:
        fully_shard(layer)
    return fully_shard(model)


def backward(model, whole_batch, half):
    """Divided by the items of both processes, whose gradients are averaged."""
    items = (whole_batch["labels"] != -100).sum()
    loss = 2 * model(**half, num_items_in_batch=items).loss
    loss.backward()


def gradients_as_ddp(folder):
    """The largest difference of a gradient from that of whole weights in each process, and of one process."""
    found = {}
    for head in ("masked_lm", "single_label"):
        cut_model, whole, alone = cut_by_torch(plain_model(head)), plain_model(head), plain_model(head)
        replicated = DistributedDataParallel(whole)
        assert all(isinstance(x, DTensor) for x in cut_model.parameters())
        for whole_batch, half in batches(head, 2):
            backward(cut_model, whole_batch, half)
            backward(replicated, whole_batch, half)
            alone(**whole_batch).loss.backward()
        triples = zip(cut_model.parameters(), whole.parameters(), alone.parameters(), strict=True)
        pairs = [(x.grad.full_tensor(), y.grad, z.grad) for x, y, z in triples if z.grad is not None]
        found[head] = [max(float((x - y).abs().max()) for x, *others in pairs for y in [others[i]]) for i in (0, 1)]
    return found


def steps_of(model, optimizer, first, last):
    for step, (whole_batch, half) in enumerate(batches("masked_lm", last)):
        if step >= first:
            backward(model, whole_batch, half)
            optimizer.step()
            optimizer.zero_grad()


def resumed_by_torch(folder):
    """Whether a run that is saved in pieces and resumed ends with the weights of one that went through."""

    def start():
        model = cut_by_torch(plain_model(attention_dropout=0.1))
        return model, torch.optim.AdamW(model.parameters(), lr=1e-2)

    through, optimizer = start()
    torch.manual_seed(5)
    steps_of(through, optimizer, 0, 2)
    names = ("model", "optimizer")
    checkpoint.save(
        {**dict(zip(names, get_state_dict(through, optimizer), strict=True)), "rng": torch.get_rng_state()},
        checkpoint_id=folder / "pieces",
    )
    steps_of(through, optimizer, 2, 4)

    resumed, optimizer = start()
    torch.manual_seed(6)
    loaded = {**dict(zip(names, get_state_dict(resumed, optimizer), strict=True)), "rng": torch.get_rng_state()}
    checkpoint.load(loaded, checkpoint_id=folder / "pieces")
    set_state_dict(resumed, optimizer, model_state_dict=loaded["model"], optim_state_dict=loaded["optimizer"])
    torch.set_rng_state(loaded["rng"])
    steps_of(resumed, optimizer, 2, 4)

    def equal(model):
        pairs = zip(through.parameters(), model.parameters(), strict=True)
        return all(torch.equal(x.to_local(), y.to_local()) for x, y in pairs)

    return {"resumed": equal(resumed), "untrained": equal(start()[0])}


def weights_of_attention(folder):
    """`attention_weights` stands beside forward, and reads whole weights all the same."""
    if not spreads_models():
        return 0.0
    whole = make_model("masked_lm").eval()
    batch = {"input_ids": make_examples("masked_lm")[0]["input_ids"].unsqueeze(0)}
    ours, theirs = (model.eval().attention_weights(batch, heads=[1]) for model in (cut(whole), whole))
    return max(float((x - y).abs().max()) for x, y in zip(ours, theirs, strict=True))


PLAIN = {f.__name__: f for f in (gradients_as_ddp, resumed_by_torch, weights_of_attention)}


def test_torchs_own_cutting_gives_the_gradients_of_ddp(answers):
    for differences in answers["gradients_as_ddp"].values():
        assert all(x < 1e-12 for x in differences)


def test_a_run_resumed_from_torchs_pieces_is_one_that_never_stopped(answers):
    assert answers["resumed_by_torch"] == {"resumed": True, "untrained": False}


@needs_version
def test_attention_weights(answers):
    assert answers["weights_of_attention"] < 1e-6


def test_the_layers_are_named_for_whoever_cuts():
    names = {type(module).__name__ for module in make_model("masked_lm").modules()}
    assert set(SelfAttnForMaskedLM._no_split_modules) <= names


CONFIGS = {"multi-gpu.yaml": "MULTI_GPU", "fsdp2-8gpu.yaml": "FSDP"}


def launched(name):
    """What `accelerate launch` makes of a config file, without launching."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser

    path = str(ROOT / "train" / "accelerate" / name)
    return _validate_launch_command(launch_command_parser().parse_args(["--config_file", path, "train/pretrain.py"]))


@pytest.mark.parametrize("name", CONFIGS)
def test_accelerate_reads_the_config(name):
    arguments, config, _ = launched(name)
    assert config.distributed_type == CONFIGS[name]
    assert (arguments.num_processes, arguments.mixed_precision, arguments.cpu) == (8, "bf16", False)
    assert arguments.use_fsdp == (CONFIGS[name] == "FSDP")


def test_every_config_is_tested():
    assert {path.name for path in (ROOT / "train" / "accelerate").iterdir()} == set(CONFIGS)


def test_accelerate_cuts_at_the_layers(monkeypatch):
    """The plugin as a launched process makes it from its environment, and what it would cut of a model."""
    from accelerate.utils import FullyShardedDataParallelPlugin
    from accelerate.utils.fsdp_utils import fsdp2_prepare_auto_wrap_policy
    from accelerate.utils.launch import prepare_multi_gpu_env

    arguments, *_ = launched("fsdp2-8gpu.yaml")
    for name, value in prepare_multi_gpu_env(arguments).items():
        monkeypatch.setenv(name, value)
    plugin = FullyShardedDataParallelPlugin()
    assert (plugin.fsdp_version, plugin.reshard_after_forward) == (2, True)
    assert plugin.state_dict_type.name == "FULL_STATE_DICT"  # else the Trainer's save_model saves nothing
    model = make_model("masked_lm")
    plugin.set_auto_wrap_policy(model)
    wants = fsdp2_prepare_auto_wrap_policy(plugin, model)
    assert [module for module in model.modules() if wants(module)] == [
        module for module in model.modules() if type(module).__name__ in SelfAttnForMaskedLM._no_split_modules
    ]


def cut_both_ways(case, folder):
    """Two pieces of each weight times two processes for the heads: the largest difference from one whole model."""
    options = {"vocab_size": 44, "tie_word_embeddings": case, "num_attention_heads": 4, "qk_norm": True}
    whole = plain_model(**options)
    weights = {name: x.clone() for name, x in whole.state_dict().items()}
    model = type(whole).from_pretrained(
        None,
        config=whole.config,
        state_dict=weights,
        dtype=torch.float64,
        distributed_config=DistributedConfig(fsdp_size=2, tp_size=2),
    )
    optimizers = [torch.optim.SGD(x.parameters(), lr=0.1) for x in (model.train(), whole)]
    losses = []
    examples = make_examples("masked_lm", 16)
    for step in range(2):
        batch = {name: torch.stack([x[name] for x in examples[8 * step : 8 * step + 8]]) for name in examples[0]}
        first = 4 * (distributed.get_rank() // 2)
        half = {name: x[first : first + 4] for name, x in batch.items()}
        backward(model, batch, half)
        loss = whole(**batch).loss
        loss.backward()
        losses.append(loss.item())
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    pairs = zip(model.parameters(), whole.parameters(), strict=True)
    return {"weights": max(float((x.full_tensor() - y).abs().max()) for x, y in pairs), "losses": losses}


@needs_version
@pytest.mark.slow
def test_pieces_of_spread_heads(tmp_path):
    for found in together(cut_both_ways, [True, False], tmp_path, size=4):
        assert found["weights"] < 1e-12
        assert found["losses"][0] != found["losses"][1]
