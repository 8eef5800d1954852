"""PEFT on our models: what is wrapped, trained, saved, loaded and merged."""

import copy
import sys
from typing import NamedTuple

import peft
import pytest
import torch
import transformers
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import constants
from safetensors.torch import load_file
from transformers import (
    AutoModelForMaskedLM,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    Trainer,
    TrainingArguments,
)

from hf_selfattn import SelfAttnConfig, SelfAttnForMaskedLM
from hf_selfattn.tools.lora import register_peft_targets

from .tolerances import assert_close

SIZES = {
    "vocab_size": 43,
    "hidden_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "value_head_dim": 5,
    "intermediate_size": 18,
    "pad_token_id": 0,
    "initializer_range": 0.2,
}
RICH = {
    "score_function": "additive",
    "attention_pattern": ["longformer", "sliding_window"],
    "window_radius": 3,
    "global_projections": True,
    "position_encoding": "transformer_xl",
    "embedding_size": 7,
    "qk_norm": True,
    "attention_sink": True,
}
"""Every kind of parameter that an attention may own."""

LABELS = 3


class Task(NamedTuple):
    """A head: the Auto class of transformers, PEFT's name of the task and its Auto class, and what is new above."""

    auto_class: str
    task_type: str | None
    peft_class: str | None
    output: str | None


TASKS = {
    "text": Task(
        "AutoModelForSequenceClassification", "SEQ_CLS", "AutoPeftModelForSequenceClassification", "classifier"
    ),
    "tokens": Task(
        "AutoModelForTokenClassification", "TOKEN_CLS", "AutoPeftModelForTokenClassification", "classifier"
    ),
    "answers": Task(
        "AutoModelForQuestionAnswering", "QUESTION_ANS", "AutoPeftModelForQuestionAnswering", "qa_outputs"
    ),
    "base": Task("AutoModel", "FEATURE_EXTRACTION", "AutoPeftModelForFeatureExtraction", None),
    "masked_lm": Task("AutoModelForMaskedLM", None, None, None),
    "choices": Task("AutoModelForMultipleChoice", None, None, "choice_output"),
}


@pytest.fixture(autouse=True)
def tables(monkeypatch):
    """PEFT's tables, which are global, as they were after each test."""
    found = {name: table for name, table in vars(constants).items() if name.endswith("_MODULES_MAPPING")}
    for table in found.values():
        monkeypatch.setitem(table, "selfattn", None)
        del table["selfattn"]
    return found


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """A folder with a masked language model, so that what another head needs above the encoder is new."""
    folder = tmp_path_factory.mktemp("pretrained")
    torch.manual_seed(0)
    SelfAttnForMaskedLM(SelfAttnConfig(**SIZES)).save_pretrained(folder)
    return str(folder)


def new_model(task, **options):
    labels = {"num_labels": LABELS} if task in ("text", "tokens") else {}
    torch.manual_seed(0)
    model = getattr(transformers, TASKS[task].auto_class).from_config(SelfAttnConfig(**SIZES, **options, **labels))
    return model.double()


def open_pretrained(task, folder, seed=0):
    """The model of a task with the encoder of `folder`; what is new depends on the seed."""
    torch.manual_seed(seed)
    labels = {"num_labels": LABELS} if task in ("text", "tokens") else {}
    return getattr(transformers, TASKS[task].auto_class).from_pretrained(folder, **labels)


def adapt(model, task=None, **options):
    """With LoRA in which nothing is 0, unless `options` say otherwise, in the model's own precision."""
    options = {"init_lora_weights": False, "r": 3, "task_type": TASKS[task].task_type if task else None, **options}
    torch.manual_seed(1)
    return get_peft_model(model, LoraConfig(**options), autocast_adapter_dtype=False)


def make_batch(task, seed=1):
    """Five texts, padded on either side, with labels."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 43, (5, 11), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 7:], mask[2, :4], mask[4, 1:] = 0, 0, 0
    labels = torch.randint(0, LABELS, ids.shape, generator=generator)
    batch = {"input_ids": ids * mask, "attention_mask": mask}
    if task == "choices":
        batch = {name: x[:, None].repeat(1, 2, 1) for name, x in batch.items()}
        batch["input_ids"][:, 1] = batch["input_ids"][:, 1].roll(1, 0)
        return batch | {"labels": labels[:, 0] % 2}
    if task == "answers":
        first = mask.argmax(1)
        return batch | {"start_positions": first, "end_positions": first}
    more = {
        "text": labels[:, 0],
        "tokens": labels.masked_fill(mask == 0, -100),
        "masked_lm": ids * mask - 100 * (1 - mask),
    }
    return batch | ({"labels": more[task]} if task in more else {})


def outputs_of(model, task):
    batch = {name: x for name, x in make_batch(task).items() if name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        return {name: x for name, x in model.eval()(**batch).items() if torch.is_tensor(x)}


def assert_same_outputs(actual, expected, task):
    expected = outputs_of(expected, task) if isinstance(expected, torch.nn.Module) else expected
    actual = outputs_of(actual, task)
    assert set(actual) == set(expected) != set()
    for name, x in expected.items():
        assert_close(actual[name], x, name)


def loss_of(model, task, **batch):
    """The loss in training mode, where the language model's head sees labelled tokens alone."""
    outputs = model.train()(**(batch or make_batch(task)))
    return outputs.last_hidden_state.square().mean() if task == "base" else outputs.loss


def gradients(model, task, **batch):
    model.zero_grad(set_to_none=True)
    loss_of(model, task, **batch).backward()
    return {name: x.grad for name, x in model.named_parameters() if x.requires_grad}


def assert_same_gradients(actual, expected):
    assert set(actual) == set(expected) != set()
    for name, gradient in expected.items():
        assert_close(actual[name], gradient, name)
    assert any(gradient.abs().max() > 1e-6 for gradient in expected.values())


def trained_names(model):
    """(modules with an adapter, parameters that are trained as they are), by their names without PEFT."""
    adapted, whole = set(), set()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            name = name.removeprefix("base_model.model.").replace(".modules_to_save.default", "")
            (adapted if ".lora_" in name else whole).add(name.split(".lora_")[0])
    return adapted, whole


METHODS = {
    "LORA": LoraConfig(),
    "ADALORA": peft.AdaLoraConfig(total_step=10),
    "IA3": IA3Config(),
    "LOHA": peft.LoHaConfig(),
    "LOKR": peft.LoKrConfig(),
    "VERA": peft.VeraConfig(),
    "HRA": peft.HRAConfig(),
    "OFT": peft.OFTConfig(oft_block_size=5, r=0),
    "BOFT": peft.BOFTConfig(boft_block_size=2),
    "FOURIERFT": peft.FourierFTConfig(n_frequency=9),
    "OSF": peft.OSFConfig(),
}


class TestDefaults:
    def test_every_table_that_knows_llama_knows_ours(self, tables):
        registered = register_peft_targets()
        names = {name for name, table in tables.items() if "llama" in table and "LNTUNING" not in name}
        assert {f"TRANSFORMERS_MODELS_TO_{method}_MODULES_MAPPING" for method in registered} == names
        assert len(names) >= 20
        assert registered["LORA_TARGET"] == ["q_proj", "v_proj"]
        assert registered["IA3_TARGET"] == ["k_proj", "v_proj", "down_proj"]
        assert registered["IA3_FEEDFORWARD"] == ["down_proj"]

    def test_again_changes_nothing(self, tables):
        register_peft_targets()
        once = {name: dict(table) for name, table in tables.items()}
        register_peft_targets()
        assert once == tables

    def test_an_entry_that_is_there_stays(self):
        constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING["selfattn"] = ["o_proj"]
        assert register_peft_targets()["LORA_TARGET"] == ["o_proj"]
        assert constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING["selfattn"] == ["o_proj"]

    def test_without_them_peft_asks(self):
        with pytest.raises(ValueError, match="target_modules"):
            get_peft_model(new_model("base"), LoraConfig())

    def test_without_peft(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "peft.utils", None)
        with pytest.raises(ImportError, match=r"peft is not installed here\. Run: pip install peft"):
            register_peft_targets()

    @pytest.mark.parametrize("method", METHODS)
    def test_a_method_needs_no_more(self, method):
        """Each wraps what its table says, in every layer, and trains."""
        targets = register_peft_targets()[f"{method}_TARGET"]
        config = METHODS[method]
        model = get_peft_model(new_model("masked_lm").float(), copy.deepcopy(config))
        adapted = {
            name.removeprefix("base_model.model.")
            for name, module in model.named_modules()
            if isinstance(module, BaseTunerLayer)
        }
        inner = {"gate_proj", "up_proj", "down_proj"}
        names = {f"{'feed_forward' if name in inner else 'attention'}.{name}" for name in targets}
        assert adapted == {f"model.layers.{i}.{name}" for i in range(2) for name in names}
        loss_of(model, "masked_lm").backward()
        assert any(x.grad is not None and x.grad.abs().sum() > 0 for x in model.parameters())


LINEAR = {
    *(f"attention.{name}_proj" for name in "qkvo"),
    *(f"feed_forward.{name}_proj" for name in ("gate", "up", "down")),
}


class TestWhatIsWrapped:
    @pytest.mark.parametrize("task", TASKS)
    def test_by_name(self, task):
        output = TASKS[task].output
        options = {"modules_to_save": [output]} if task == "choices" else {}
        model = adapt(new_model(task, **RICH), task, target_modules=["q_proj", "v_proj"], **options)
        before = "" if task == "base" else "model."
        places = {"layers.0.attention", "layers.0.attention.of_global", "layers.1.attention"}
        adapted, whole = trained_names(model)
        assert adapted == {f"{before}{place}.{name}" for place in places for name in ("q_proj", "v_proj")}
        parts = ("head.dense.weight", "head.norm.weight", "out_proj.weight", "out_proj.bias")
        assert whole == ({f"{output}.{part}" for part in parts} if output else set())

    @pytest.mark.parametrize("task", TASKS)
    def test_all_linear(self, task):
        output = TASKS[task].output
        options = {"modules_to_save": [output]} if output else {}
        model = adapt(new_model(task, **RICH), task, target_modules="all-linear", **options)
        expected = {f"layers.{i}.{name}" for i in range(2) for name in LINEAR}
        expected |= {f"layers.0.attention.of_global.{name}_proj" for name in "qkv"}
        expected |= {
            f"layers.{place}.position.r_proj" for place in ("0.attention", "0.attention.of_global", "1.attention")
        }
        expected |= {"embeddings.projection"}
        expected = {name if task == "base" else f"model.{name}" for name in expected}
        expected |= {"prediction_head.dense"} if task == "masked_lm" else set()
        adapted, whole = trained_names(model)
        assert adapted == expected
        assert {name.split(".")[0] for name in whole} == ({output} if output else set())

    def test_a_classifier_of_texts_is_saved_whole_without_a_word(self):
        adapted, whole = trained_names(adapt(new_model("text"), "text", target_modules="all-linear"))
        assert adapted == {f"model.layers.{i}.{name}" for i in range(2) for name in LINEAR}
        assert {name.split(".")[0] for name in whole} == {"classifier"}

    @pytest.mark.parametrize("task", ["text", "tokens", "answers"])
    def test_of_all_linear_nothing_is_lost(self, task, pretrained, tmp_path):
        """For texts PEFT keeps the classifier out of the way by itself; for the others it has to be named."""
        named = {} if task == "text" else {"modules_to_save": [TASKS[task].output]}
        model = adapt(open_pretrained(task, pretrained), task, target_modules="all-linear", **named)
        model.save_pretrained(tmp_path)
        opened = PeftModel.from_pretrained(open_pretrained(task, pretrained, seed=5), tmp_path)
        assert_same_outputs(opened, model, task)

    def test_parameters_of_a_score_on_request(self):
        """They are no linear layers: trained as they are, and saved."""
        model = adapt(new_model("base", **RICH), "base", target_modules=["q_proj"], modules_to_save=["score_function"])
        _, whole = trained_names(model)
        places = ("layers.0.attention", "layers.0.attention.of_global", "layers.1.attention")
        names = ("query_weight", "key_weight", "v", "sink")
        assert whole == {f"{place}.score_function.{name}" for place in places for name in names}
        moved = gradients(model, "base")
        assert all(
            x.abs().max() > 0 for name, x in moved.items() if "score_function" in name and "of_global" not in name
        )


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], "all-linear"], ids=["by_name", "all_linear"])
@pytest.mark.parametrize("options", [{}, RICH], ids=["plain", "rich"])
@pytest.mark.parametrize("task", ["text", "masked_lm"])
class TestNumbers:
    def test_a_new_adapter_changes_nothing(self, task, options, targets):
        model = new_model(task, **options)
        expected = outputs_of(model, task)
        assert_same_outputs(adapt(model, task, target_modules=targets, init_lora_weights=True), expected, task)

    def test_it_adds_the_product_of_its_matrices(self, task, options, targets, tmp_path):
        """The file, read and added to the weights by hand, gives the numbers of the adapter, and so does merging."""
        model = adapt(new_model(task, **options), task, target_modules=targets, lora_alpha=5)
        expected = outputs_of(model, task)
        model.save_pretrained(tmp_path)
        saved = {
            name.removeprefix("base_model.model."): x
            for name, x in load_file(tmp_path / "adapter_model.safetensors").items()
        }
        weights = new_model(task, **options).state_dict()
        for name, lora_a in saved.items():
            if name.endswith("lora_A.weight"):
                weights[name.replace("lora_A.", "")] += saved[name.replace("lora_A", "lora_B")] @ lora_a * 5 / 3
        weights |= {name: x for name, x in saved.items() if ".lora_" not in name}
        by_hand = new_model(task, **options)
        by_hand.load_state_dict(weights)
        assert_same_outputs(by_hand, expected, task)
        assert_same_outputs(model.merge_and_unload(), expected, task)


STEPS = 12


@pytest.fixture(scope="module")
def trained(pretrained, tmp_path_factory):
    """(task) -> (losses, the model, its folder, its tensors before), each made once, by the stock Trainer."""
    made = {}

    def train(task):
        if task in made:
            return made[task]
        folder, batch = tmp_path_factory.mktemp(task), make_batch(task)
        options = {"target_modules": ["q_proj", "v_proj"], "init_lora_weights": True}
        model = adapt(open_pretrained(task, pretrained), task, **options)
        before = {name: x.clone() for name, x in model.state_dict().items()}
        arguments = TrainingArguments(
            str(folder), max_steps=STEPS, per_device_train_batch_size=5, learning_rate=3e-2, logging_steps=1,
            use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True,
        )  # fmt: skip
        rows = [{name: x[i] for name, x in batch.items()} for i in range(5)] * STEPS
        trainer = Trainer(model, arguments, train_dataset=rows)
        trainer.train()
        trainer.save_model(str(folder))
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        made[task] = losses, model, str(folder), before
        return made[task]

    return train


@pytest.fixture(scope="module")
def berts_classifier_comes_back(tmp_path_factory):
    """Whether transformers itself opens an adapter of stock BERT with the classifier that was saved in it."""
    base, folder = (tmp_path_factory.mktemp(name) for name in ("bert", "adapter"))
    config = BertConfig(vocab_size=43, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    BertModel(config).save_pretrained(base)
    model = adapt(BertForSequenceClassification.from_pretrained(base), "text", target_modules=["query"])
    model.save_pretrained(folder)
    opened = BertForSequenceClassification.from_pretrained(base)
    opened.load_adapter(str(folder))
    found = opened.state_dict().get("classifier.modules_to_save.default.weight")
    return found is not None and torch.equal(found, model.base_model.model.classifier.modules_to_save.default.weight)


TRAINED = ["text", "tokens", "answers", "masked_lm"]


@pytest.mark.parametrize("task", TRAINED)
class TestTraining:
    def test_the_loss_falls(self, trained, task):
        losses, *_ = trained(task)
        assert len(losses) == STEPS
        assert losses[-1] < 0.9 * losses[0]

    def test_nothing_moves_but_the_adapter_and_what_is_new(self, trained, task):
        _, model, _, before = trained(task)
        moved = {name for name, x in model.state_dict().items() if not torch.equal(x, before[name])}
        may = {name for name, x in model.named_parameters() if x.requires_grad}
        assert moved == may
        assert any("lora_A" in name for name in moved)

    def test_saved_and_opened_by_peft(self, trained, pretrained, task):
        """In another order of random numbers: what is new above the encoder comes from the adapter's file."""
        _, model, folder, _ = trained(task)
        torch.manual_seed(7)
        if TASKS[task].peft_class is None:
            opened = PeftModel.from_pretrained(AutoModelForMaskedLM.from_pretrained(pretrained), folder)
        else:
            labels = {"num_labels": LABELS} if task in ("text", "tokens") else {}
            opened = getattr(peft, TASKS[task].peft_class).from_pretrained(folder, **labels)
        used = {name for name in model.state_dict() if ".original_module." not in name}
        for name in used:
            assert torch.equal(opened.state_dict()[name], model.state_dict()[name]), name
        assert_same_outputs(opened, model, task)

    def test_opened_by_transformers(self, trained, pretrained, task, berts_classifier_comes_back):
        if TASKS[task].output and not berts_classifier_comes_back:
            pytest.skip("this version of transformers leaves classifiers out of adapters, those of BERT too")
        _, model, folder, _ = trained(task)
        opened = open_pretrained(task, pretrained, seed=8)
        opened.load_adapter(folder)
        assert_same_outputs(opened, model, task)
        assert_same_outputs(open_pretrained(task, folder, seed=9), model, task)

    def test_merged_it_is_an_ordinary_checkpoint(self, trained, pretrained, task, tmp_path):
        _, model, folder, _ = trained(task)
        opened = PeftModel.from_pretrained(open_pretrained(task, pretrained, seed=10), folder)
        merged = opened.merge_and_unload()
        assert type(merged) is type(open_pretrained(task, pretrained))
        assert set(merged.state_dict()) == set(open_pretrained(task, pretrained).state_dict())
        merged.save_pretrained(tmp_path)
        assert not list(tmp_path.glob("adapter*"))
        assert (tmp_path / "modeling_selfattn.py").is_file()
        assert_same_outputs(getattr(transformers, TASKS[task].auto_class).from_pretrained(tmp_path), model, task)


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["use_reentrant_False", "use_reentrant_True"])
@pytest.mark.parametrize("options", [{}, RICH, {"position_encoding": "t5"}], ids=["plain", "rich", "t5"])
@pytest.mark.parametrize("task", ["text", "masked_lm"])
def test_gradient_checkpointing_changes_nothing(task, options, use_reentrant):
    """The weights below the first adapter are frozen, so the embeddings have to be told to carry a gradient."""
    kept, again = (adapt(new_model(task, **options), task, target_modules="all-linear") for _ in range(2))
    again.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    again.enable_input_require_grads()
    assert all(layer.gradient_checkpointing for layer in again.get_base_model().base_model.layers)
    assert_same_gradients(gradients(again, task), gradients(kept, task))


def test_layers_compile_with_their_adapters():
    kept, compiled = (adapt(new_model("text"), "text", target_modules=["q_proj"]) for _ in range(2))
    compiled.compile_layers(backend="eager")
    assert_same_gradients(gradients(compiled, "text"), gradients(kept, "text"))


@pytest.mark.parametrize("form", ["packed_by_positions", "packed_by_boundaries"])
@pytest.mark.parametrize("task", ["text", "tokens", "masked_lm"])
def test_packed_documents_give_the_gradients_of_padded_ones(task, form, lay_out):
    model = adapt(new_model(task), task, target_modules="all-linear")
    lengths, generator = [5, 1, 9], torch.Generator().manual_seed(4)
    documents = [torch.randint(1, 43, (n,), generator=generator) for n in lengths]
    found = []
    for layout in (lay_out("padded_left", lengths), lay_out(form, lengths)):
        labels = torch.tensor([0, 2, 1]) if task == "text" else layout.put([x % LABELS for x in documents])
        if task != "text":
            labels[layout.padding] = -100
        found.append(gradients(model, task, input_ids=layout.put(documents), labels=labels, **layout.inputs))
    assert_same_gradients(*found)


class TestTokenVectors:
    @pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
    def test_an_adapter_of_an_untied_one(self, target):
        model = adapt(new_model("masked_lm", tie_word_embeddings=False), target_modules=[target])
        expected = outputs_of(model, "masked_lm")
        found = gradients(model, "masked_lm")
        assert {name.split(".lora_")[0] for name in found} == {
            "base_model.model.model.embed_tokens" if target == "embed_tokens" else "base_model.model.lm_head"
        }
        assert all(gradient.abs().max() > 0 for gradient in found.values())
        assert_same_outputs(model.merge_and_unload(), expected, "masked_lm")

    @pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
    def test_of_tied_ones_only_that_one_is_adapted_and_peft_warns(self, target):
        """The weight is shared, the adapter is not, so such a model cannot be merged; PEFT says so."""
        by_hand = new_model("masked_lm", tie_word_embeddings=False)
        with pytest.warns(UserWarning, match="`tie_word_embeddings=True` and a tied layer is part of the adapter"):
            model = adapt(new_model("masked_lm"), target_modules=[target])
        by_hand.load_state_dict(model.get_base_model().state_dict(), strict=False)
        with torch.no_grad():
            tied = model.get_base_model()
            weight = (tied.lm_head if target == "embed_tokens" else tied.model.embed_tokens).weight
            layer = tied.model.embed_tokens if target == "embed_tokens" else tied.lm_head
            by_hand.lm_head.weight.copy_(weight)
            by_hand.model.embed_tokens.weight.copy_(weight)
            adapted = by_hand.model.embed_tokens if target == "embed_tokens" else by_hand.lm_head
            adapted.weight += layer.get_delta_weight("default")
            by_hand.lm_head.bias.copy_(tied.lm_head.bias)
        assert_same_outputs(model, by_hand, "masked_lm")

    def test_some_tokens_of_tied_ones(self):
        """Their rows are trained where they enter and where they are predicted, and no others."""
        model = adapt(
            new_model("masked_lm"), target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [5, 6]}
        )
        ours = model.get_base_model()
        with torch.no_grad():
            ours.model.embed_tokens.token_adapter.trainable_tokens_delta["default"].add_(1)
        expected = outputs_of(model, "masked_lm")
        merged = model.merge_and_unload()
        before = new_model("masked_lm").model.embed_tokens.weight
        changed = (merged.model.embed_tokens.weight != before).any(1).nonzero().flatten()
        assert changed.tolist() == [5, 6]
        assert merged.lm_head.weight is merged.model.embed_tokens.weight
        assert_same_outputs(merged, expected, "masked_lm")


@pytest.mark.parametrize("options", [{"use_dora": True}, {"use_rslora": True}], ids=["dora", "rslora"])
@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], "all-linear"], ids=["by_name", "all_linear"])
def test_relatives_of_lora(options, targets):
    expected = outputs_of(new_model("text", **RICH), "text")
    new = adapt(new_model("text", **RICH), "text", target_modules=targets, init_lora_weights=True, **options)
    assert_same_outputs(new, expected, "text")
    model = adapt(new_model("text", **RICH), "text", target_modules=targets, **options)
    assert all(gradient is not None for gradient in gradients(model, "text").values())
    expected = outputs_of(model, "text")
    assert_same_outputs(model.merge_and_unload(), expected, "text")


def test_ia3_scales_the_inner_activations():
    """What (IA)^3 learns for the feed-forward multiplies what enters its last projection."""
    register_peft_targets()
    model = get_peft_model(new_model("text"), IA3Config(task_type="SEQ_CLS"), autocast_adapter_dtype=False)
    weights = model.get_base_model().state_dict()
    torch.manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "ia3_l" in name:
                parameter.copy_(torch.rand(parameter.shape) + 0.5)
    by_hand, learned = new_model("text"), dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in by_hand.named_parameters():
            module, _, kind = name.rpartition(".")
            scale = learned.get(f"base_model.model.{module}.ia3_l.default")
            if scale is not None:
                parameter *= scale if kind == "weight" else scale.flatten()  # keys and values: all that comes out
        by_hand.classifier.load_state_dict(
            {name.removeprefix("classifier.modules_to_save.default."): x for name, x in weights.items()
             if name.startswith("classifier.modules_to_save.default.")}
        )  # fmt: skip
    assert_same_outputs(model, by_hand, "text")
