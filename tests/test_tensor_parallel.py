"""Heads and features spread over two processes: every number is that of one process, in values and gradients."""

import functools
import itertools

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModel, AutoModelForMaskedLM

import hf_selfattn
from hf_selfattn import PATTERNS, POSITIONS, SCORES, SelfAttnConfig, parallel, unsupported_reasons
from hf_selfattn.parallel import NORM_OF_HEADS, check_distribution, spreads_models
from hf_selfattn.scores import ScaledDotProduct

from .processes import together
from .reference import OPTIONS

if spreads_models():
    from transformers.distributed import DistributedConfig, mixin
    from transformers.distributed.parallel_utils import ALL_PARALLEL_STYLES
    from transformers.distributed.utils import initialize_distributed_mesh

needs_version = pytest.mark.skipif(not spreads_models(), reason="transformers is too old; the refusal is tested")

SIZES = {
    "vocab_size": 43,
    "hidden_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "value_head_dim": 5,
    "intermediate_size": 19,
    "pad_token_id": 25,
}
"""Vocabulary and feed-forward do not divide by two, and the token of padding is in the second half."""

HEADS = {
    "SelfAttnModel": {},
    "SelfAttnForMaskedLM": {},
    "SelfAttnForSequenceClassification": {"num_labels": 3},
    "SelfAttnForTokenClassification": {"num_labels": 5},
    "SelfAttnForQuestionAnswering": {},
    "SelfAttnForMultipleChoice": {},
}
BATCH, LENGTH = 3, 19


def options_of(score="scaled_dot_product", pattern="full", causal=False, position="rotary", **more):
    chosen = {"score_function": score, "attention_pattern": pattern, "position_encoding": position, "causal": causal}
    of_rows = [OPTIONS.get(row, {}) for row in (score, pattern, position) if isinstance(row, str)]
    return dict(itertools.chain(*(part.items() for part in (*of_rows, chosen, more))))


CASES = {
    **{f"score_{row}": options_of(score=row) for row in SCORES},
    **{f"pattern_{row}": options_of(pattern=row, position="none") for row in PATTERNS},
    "pattern_bigbird": options_of(pattern="bigbird", position="none", block_size=2, num_random_blocks=1),
    **{f"position_{row}": options_of(position=row) for row in POSITIONS},
    "causal": options_of(position="alibi", causal=True),
    "every_head_its_own_keys": options_of(num_key_value_heads=4, score="additive"),
    "sink": options_of(attention_sink=True),
    "softcap": options_of(logit_softcap=2.0),
    "norms_of_heads": options_of(qk_norm=True, norm_bias=True),
    "biases": options_of(attention_bias=True, mlp_bias=True, norm_bias=True),
    "plain_post_norm": options_of(mlp_type="plain", norm_position="post", position="learned", type_vocab_size=2),
    "narrow_embeddings": options_of(embedding_size=12),
    "untied": options_of(tie_word_embeddings=False),
    "global_projections": options_of(
        pattern="longformer", global_projections=True, position="t5", score="cosine", attention_sink=True
    ),
    "pattern_by_layer": options_of(
        pattern=["bigbird", "full"],
        position="transformer_xl",
        **{name: [number, None] for name, number in OPTIONS["bigbird"].items()},
    ),
}


def make_batch(head, generator):
    def integers(high, *shape):
        return torch.randint(0, high, shape, generator=generator)

    shape = (BATCH, 2, LENGTH) if head == "SelfAttnForMultipleChoice" else (BATCH, LENGTH)
    batch = {"input_ids": integers(43, *shape), "attention_mask": torch.ones(shape, dtype=torch.long)}
    batch["attention_mask"][1, ..., 11:] = 0
    batch["input_ids"][0, ..., 2] = SIZES["pad_token_id"]  # among real tokens, where its vector has no gradient
    if head in ("SelfAttnForMaskedLM", "SelfAttnForTokenClassification"):
        batch["labels"] = integers(5, *shape).masked_fill(integers(2, *shape) == 0, -100)
    elif head == "SelfAttnForQuestionAnswering":
        batch |= {"start_positions": integers(11, BATCH), "end_positions": integers(11, BATCH)}
    elif head != "SelfAttnModel":
        batch["labels"] = integers(2, BATCH)
    return batch


@functools.cache
def meshes():
    return initialize_distributed_mesh(DistributedConfig(tp_size=2))


def make_models(head, options, kernel):
    """The same float64 weights, every parameter drawn at random: whole, and spread over the processes."""
    # Each model would start groups of processes, with threads, that end with the process.
    mixin.initialize_distributed_mesh = lambda config: meshes()
    cls = getattr(hf_selfattn, head)
    config = SelfAttnConfig(**{**SIZES, **HEADS[head], **options})
    whole = cls._from_config(config, attn_implementation=kernel).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in whole.named_parameters():
            drawn = torch.randn(parameter.shape, generator=generator) * parameter.shape[-1] ** -0.5
            parameter.copy_(drawn + 1 if parameter.dim() == 1 and name.endswith("weight") else drawn)
    weights = {name: x.clone() for name, x in whole.state_dict().items()}
    spread = cls.from_pretrained(
        None,
        config=config,
        state_dict=weights,
        attn_implementation=kernel,
        dtype=torch.float64,
        distributed_config=DistributedConfig(tp_plan="auto"),
    )
    return whole, spread


def all_of(x):
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def loss_of(outputs):
    loss = getattr(outputs, "loss", None)
    return (outputs.last_hidden_state**2).sum() if loss is None else loss


def differences(ours, theirs, prefix=""):
    """Names of tensors to the largest difference, over whatever two outputs hold."""
    if isinstance(ours, torch.Tensor):
        assert ours.shape == theirs.shape, (prefix, ours.shape, theirs.shape)
        return {prefix: float((ours - theirs).detach().abs().max())}
    items = ours.items() if hasattr(ours, "items") else enumerate(ours)
    found = {}
    for name, x in items:
        if x is not None:
            found |= differences(x, theirs[name], f"{prefix}.{name}")
    return found


def compare(case, folder):
    """The largest difference of each kind, and how much smaller a process' share of the layers is."""
    head, options, kernel = case
    whole, spread = make_models(head, options, kernel)
    batch = make_batch(head, torch.Generator().manual_seed(1))
    with torch.no_grad():
        wanted = {"output_hidden_states": True, "output_attentions": True}
        found = differences(*(model.eval()(**batch, **wanted) for model in (spread, whole)), "eval")
    # Twice, since what is summed over processes must be the gradient of each backward and not what was accumulated.
    for _ in range(2):
        losses = [loss_of(model.train()(**batch)) for model in (spread, whole)]
        for loss in losses:
            loss.backward()
    found["loss"] = float((losses[0] - losses[1]).detach().abs())
    for (name, mine), (other, theirs) in zip(spread.named_parameters(), whole.named_parameters(), strict=True):
        assert name == other
        assert (mine.grad is None) == (theirs.grad is None), name
        if theirs.grad is not None:
            found[f"gradient of {name}"] = float((all_of(mine.grad) - theirs.grad).abs().max())
    here = sum(getattr(x, "_local_tensor", x).numel() for x in spread.base_model.layers.parameters())
    share = here / sum(x.numel() for x in whole.base_model.layers.parameters())
    return found, share


def runs_of(table, kernels):
    """(head, options, kernel) for each row of the table and each kernel that can compute it."""
    runs = {}
    for (name, options), kernel in itertools.product(table.items(), kernels):
        if not unsupported_reasons(SelfAttnConfig(**{**SIZES, **options}), kernel):
            runs[f"{name}-{kernel}"] = ("SelfAttnForMaskedLM", options, kernel)
    return runs


READ_HEAD_NUMBERS = {name: CASES[name] for name in ("pattern_bigbird", "position_alibi", "global_projections")}
RUNS = runs_of(CASES, ["selfattn"]) | runs_of(READ_HEAD_NUMBERS, ["eager", "sdpa"])
RUNS |= {head: (head, options_of(position="t5"), "selfattn") for head in HEADS}

EVERYTHING = runs_of(
    {
        "-".join(map(str, row)): options_of(*row)
        for row in itertools.product(SCORES, PATTERNS, [False, True], POSITIONS)
    },
    ["eager", "sdpa", "selfattn"],
)


def assert_equal(answer):
    """Values, weights, loss and gradients in float64, and each process with about half of the layers' parameters."""
    found, share = answer
    assert {name: x for name, x in found.items() if not x < 1e-10} == {}
    assert {"eval.hidden_states.0", "eval.attentions.0", "loss"} <= set(found)
    assert any(name.startswith("gradient of ") for name in found)
    assert share < 0.6


@needs_version
@pytest.mark.slow
def test_the_whole_product(tmp_path):
    found = together(compare, EVERYTHING.values(), tmp_path)
    for name, answer in zip(EVERYTHING, found, strict=True):
        try:
            assert_equal(answer)
        except AssertionError as error:
            raise AssertionError(name) from error


def mask_of_heads():
    generator = torch.Generator().manual_seed(2)
    return torch.randint(0, 2, (BATCH, 4, LENGTH, LENGTH), generator=generator).bool()


def of_documents():
    return torch.tensor([[*range(13), *range(4), *range(2)]] * BATCH)


def with_mask_of_heads(spread, whole, folder):
    batch = {
        "input_ids": make_batch("SelfAttnModel", torch.Generator())["input_ids"],
        "attention_mask": mask_of_heads(),
    }
    return differences(spread(**batch, output_attentions=True), whole(**batch, output_attentions=True))


def with_several_documents_in_a_row(spread, whole, folder):
    position_ids = torch.tensor([[*range(13), *range(4), *range(2)]] * BATCH)
    batch = {"input_ids": make_batch("SelfAttnModel", torch.Generator())["input_ids"], "position_ids": position_ids}
    return differences(spread(**batch), whole(**batch))


def with_chosen_weights(spread, whole, folder):
    batch = make_batch("SelfAttnModel", torch.Generator())
    chosen = {"layers": [1], "heads": [3, 0], "queries": [4, 2]}
    ours, theirs = (model.attention_weights(batch, **chosen) for model in (spread, whole))
    assert ours[0].shape == (BATCH, 2, 2, LENGTH)
    return differences(ours, theirs)


def with_dropout(spread, whole, folder):
    """Of weights, from the number of the head in the whole model: the same in any number of processes."""
    for model in (spread, whole):
        torch.manual_seed(3)
        model.config.attention_dropout = 0.3
        loss_of(model.train()(**make_batch("SelfAttnForMaskedLM", torch.Generator()))).backward()
    mine, theirs = (model.base_model.layers[0].attention.q_proj.weight.grad for model in (spread, whole))
    return {"gradient": float((all_of(mine) - theirs).abs().max())}


def with_checkpointing(spread, whole, folder):
    for model in (spread, whole):
        model.train()
    spread.gradient_checkpointing_enable()
    batch = make_batch("SelfAttnForMaskedLM", torch.Generator())
    losses = [loss_of(model(**batch)) for model in (spread, whole)]
    for loss in losses:
        loss.backward()
    pairs = zip(spread.parameters(), whole.parameters(), strict=True)
    return {"gradients": max(float((all_of(x.grad) - y.grad).abs().max()) for x, y in pairs if y.grad is not None)}


def saved(spread, whole, folder):
    """`save_pretrained` in every process writes the whole weights once."""
    spread.save_pretrained(folder / "saved")
    written = load_file(folder / "saved" / "model.safetensors")
    kept = {name: x for name, x in whole.state_dict().items() if name in written}
    assert set(whole.state_dict()) - set(kept) <= set(whole._tied_weights_keys)
    again = AutoModelForMaskedLM.from_pretrained(folder / "saved", dtype=torch.float64).eval()
    batch = make_batch("SelfAttnForMaskedLM", torch.Generator())
    return differences(written, kept) | differences(again(**batch), whole(**batch), "opened")


def with_wrong_head_numbers(spread, whole, folder):
    """For control: each process takes its heads for the first ones."""
    from hf_selfattn import encoder

    right = encoder.heads_here
    encoder.heads_here = lambda weight, num_heads: range(len(right(weight, num_heads)))
    try:
        batch = make_batch("SelfAttnModel", torch.Generator())
        return differences(spread(**batch), whole(**batch))
    finally:
        encoder.heads_here = right


MORE = {
    f"{check.__name__}-{kernel}": (check.__name__, options, kernel)
    for check, options, kernels in (
        (with_mask_of_heads, options_of(), ["eager", "sdpa", "selfattn"]),
        (with_several_documents_in_a_row, CASES["pattern_bigbird"], ["eager", "sdpa", "selfattn"]),
        (with_chosen_weights, CASES["position_transformer_xl"], ["selfattn"]),
        (with_dropout, CASES["position_alibi"], ["selfattn"]),
        (with_checkpointing, options_of(qk_norm=True), ["selfattn"]),
        (saved, CASES["global_projections"], ["selfattn"]),
        (saved, CASES["untied"], ["eager"]),
        (with_wrong_head_numbers, CASES["pattern_bigbird"], ["selfattn"]),
    )
    for kernel in kernels
}


def answer(case, folder):
    name, case = case
    if name in RUNS:
        return compare(case, folder)
    check, options, kernel = case
    spread, whole = reversed(make_models("SelfAttnForMaskedLM", options, kernel))
    return globals()[check](spread.eval(), whole.eval(), folder)


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """Of every run and check, all by one pair of processes."""
    cases = RUNS | MORE
    found = together(answer, cases.items(), tmp_path_factory.mktemp("tensor_parallel"))
    return dict(zip(cases, found, strict=True))


@needs_version
@pytest.mark.parametrize("run", RUNS)
def test_every_number_is_that_of_one_process(answers, run):
    assert_equal(answers[run])


@needs_version
@pytest.mark.parametrize("check", [name for name in MORE if "wrong" not in name])
def test_what_else_reads_heads(answers, check):
    found = answers[check]
    assert found
    assert {name: x for name, x in found.items() if not x < 1e-10} == {}


@needs_version
def test_control_wrong_head_numbers_are_seen(answers):
    assert max(answers["with_wrong_head_numbers-selfattn"].values()) > 1e-3


def refused(match, **options):
    config = SelfAttnConfig(**{**SIZES, **options})
    with pytest.raises(ValueError, match=match):
        hf_selfattn.SelfAttnModel.maybe_distribute_model(
            hf_selfattn.SelfAttnModel(config), DistributedConfig(tp_size=2), None
        )


@needs_version
class TestRefused:
    def test_heads_that_do_not_divide(self):
        refused("tp_size=2 processes as many heads, and num_attention_heads is 3", num_attention_heads=3,
                num_key_value_heads=3)  # fmt: skip

    def test_shared_heads_that_do_not_divide(self):
        refused(r"num_key_value_heads is 1\. Use a tp_size that divides .* or fsdp_size", num_key_value_heads=1)

    def test_parameters_without_heads(self, monkeypatch):
        class Shared(ScaledDotProduct):
            def __init__(self, config):
                super().__init__(config)
                self.of_all = nn.Parameter(torch.zeros(3))

        monkeypatch.setitem(SCORES, "shared", Shared)
        refused(r"its parameter 'of_all' is of shape \(3,\)\. Give it one or two dimensions", score_function="shared")

    def test_a_tied_vocabulary_that_both_ways_cut_unevenly(self):
        config = SelfAttnConfig(**SIZES)
        with pytest.raises(ValueError, match=r"into 4 equal pieces, and vocab_size is 43\. .*pad_to_multiple_of=4"):
            check_distribution(config, DistributedConfig(tp_size=2, fsdp_size=2))
        check_distribution(
            SelfAttnConfig(**SIZES, tie_word_embeddings=False), DistributedConfig(tp_size=2, fsdp_size=2)
        )

    def test_few_heads_that_both_ways_cut(self):
        config = SelfAttnConfig(**{**SIZES, "num_attention_heads": 2, "vocab_size": 44}, position_encoding="t5")
        with pytest.raises(ValueError, match=r"'table' is of shape \(2, 32\)\. Use one of the two alone"):
            check_distribution(config, DistributedConfig(tp_size=2, fsdp_size=2))

    def test_pipelines(self):
        config = SelfAttnConfig(**SIZES)
        with pytest.raises(ValueError, match=r"no plan for these models, got pp_size=2\. Use .*fsdp_size"):
            check_distribution(config, DistributedConfig(pp_size=2))


def test_refused_by_an_older_transformers(monkeypatch, tmp_path):
    hf_selfattn.SelfAttnModel(SelfAttnConfig(**SIZES)).save_pretrained(tmp_path)
    monkeypatch.setattr(parallel.transformers, "__version__", "5.17.0")
    with pytest.raises(ImportError, match=r"need transformers >= 5\.23 .*'local_params'.*, got 5\.17\.0\. Install"):
        AutoModel.from_pretrained(tmp_path, distributed_config={"tp_size": 2})
    assert SelfAttnConfig(**SIZES).base_model_tp_plan is None


@needs_version
@pytest.mark.parametrize("name", CASES)
def test_the_plan_names_what_there_is_and_leaves_no_head_out(name):
    """Each rule matches something, and of an attention all but o_proj's bias is spread."""
    model = hf_selfattn.SelfAttnForMaskedLM(SelfAttnConfig(**{**SIZES, **CASES[name]}))
    rules = model._expand_parallel_plan(model.tp_plan)
    wild = {name.replace("layers.0", "layers.*").replace("layers.1", "layers.*") for name in rules}
    assert set(model.tp_plan) <= wild | {rule for rule in model.tp_plan if rule.endswith(("_proj", "lm_head"))}
    assert set(rules.values()) <= set(ALL_PARALLEL_STYLES)
    of_attention = {x for x, _ in model.named_parameters() if ".attention." in x}
    assert of_attention == {x for x in of_attention if x in rules}
    assert any(style == NORM_OF_HEADS for style in rules.values()) == bool(model.config.qk_norm)
