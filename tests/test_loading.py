"""Loading: in pieces, over devices, from disk, without a network, in little memory; nothing is unpickled unseen."""

import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForMaskedLM

from hf_selfattn import KERNELS, SelfAttnConfig, SelfAttnForMaskedLM, kernels_flex, unsupported_reasons
from hf_selfattn.positions_relative import alibi_slopes
from hf_selfattn.tools.checkpoints import check_model_folder
from hf_selfattn.tools.convert import convert

from .hub_server import Hub
from .test_save_load import CLASSES, FORMS, assert_identical, make_batch, make_model, tensors, values
from .tolerances import assert_close
from .train_scripts import ROOT

pytestmark = pytest.mark.usefixtures("uncompiled")

PIECES = {"max_shard_size": "5KB"}
CHOICES = {
    "rotary_bigbird": {"attention_pattern": "bigbird", "block_size": 2, "num_random_blocks": 1, "qk_norm": True},
    "alibi_additive": {"position_encoding": "alibi", "score_function": "additive", "attention_sink": True},
    "longformer": {"attention_pattern": "longformer", "window_radius": 2, "global_projections": True},
    "t5_cosine": {"position_encoding": "t5", "score_function": "cosine"},
    "transformer_xl": {"position_encoding": "transformer_xl", "score_function": "dot_product"},
    "learned": {"position_encoding": "learned", "max_position_embeddings": 9, "type_vocab_size": 2},
    "sinusoidal": {"position_encoding": "sinusoidal", "embedding_size": 7, "tie_word_embeddings": True},
}
"""Between them every kind of table and parameter that an attention has beside its projections."""


def make_choice(choice, auto_class="AutoModelForMaskedLM"):
    return make_model(auto_class, "rms_norm", **{"causal": False, **CHOICES[choice]})


def spread_over(encoder, head, prefix="model."):
    """A device map by which the first layer and the token vectors stand on `encoder`'s and the rest on `head`'s."""
    names = {"embed_tokens": encoder, "embeddings": encoder, "layers.0": encoder, "layers.1": head, "norm": head}
    return {prefix + name: device for name, device in names.items()} | {"prediction_head": head, "lm_head": encoder}


def tensors_in(thing):
    """Every tensor in nested tuples, lists, dicts and plain objects."""
    if torch.is_tensor(thing):
        return [thing]
    if isinstance(thing, dict):
        thing = list(thing.values())
    elif not isinstance(thing, (tuple, list)):
        thing = list(getattr(thing, "__dict__", {}).values())
    return [x for part in thing for x in tensors_in(part)]


class TestPickles:
    """Weights that stand in a pickle are read by torch's restricted reader, or not at all."""

    SIZES = {
        "vocab_size": 43,
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 20,
        "max_position_embeddings": 16,
    }

    def in_a_pickle(self, model, folder, **more):
        model.save_pretrained(folder)
        (folder / "model.safetensors").unlink()
        torch.save({**model.state_dict(), **more}, folder / "pytorch_model.bin")

    def bert(self):
        return BertForMaskedLM(BertConfig(**self.SIZES)).eval()

    class Hostile:
        """What runs a command where it is unpickled."""

        def __init__(self, path):
            self.path = path

        def __reduce__(self):
            return os.mkdir, (str(self.path),)

    def test_plain_tensors_are_read(self, tmp_path):
        model = make_model("AutoModelForMaskedLM")
        self.in_a_pickle(model, tmp_path)
        assert_identical(tensors(SelfAttnForMaskedLM.from_pretrained(tmp_path)), tensors(model))

    def test_none_is_read_where_safetensors_are_asked_for(self, tmp_path):
        self.in_a_pickle(make_model("AutoModelForMaskedLM"), tmp_path)
        with pytest.raises(OSError, match=r"no file named model\.safetensors"):
            SelfAttnForMaskedLM.from_pretrained(tmp_path, use_safetensors=True)

    def test_safetensors_come_first(self, tmp_path):
        model = make_model("AutoModelForMaskedLM")
        self.in_a_pickle(model, tmp_path, hostile=self.Hostile(tmp_path / "ran"))
        model.save_pretrained(tmp_path)
        assert_identical(tensors(SelfAttnForMaskedLM.from_pretrained(tmp_path)), tensors(model))
        assert not (tmp_path / "ran").exists()

    @pytest.mark.parametrize("road", ["from_pretrained", "convert"])
    def test_code_is_not_run(self, road, tmp_path):
        model, read = {
            "from_pretrained": (make_model("AutoModelForMaskedLM"), SelfAttnForMaskedLM.from_pretrained),
            "convert": (self.bert(), convert),
        }[road]
        self.in_a_pickle(model, tmp_path / "saved", hostile=self.Hostile(tmp_path / "ran"))
        with pytest.raises(Exception, match="Weights only load failed"):
            read(str(tmp_path / "saved"))
        assert not (tmp_path / "ran").exists()

    def test_what_is_converted_leaves_as_safetensors(self, tmp_path):
        self.in_a_pickle(self.bert(), tmp_path / "saved")
        convert(str(tmp_path / "saved"), str(tmp_path / "ours"))
        assert {file.suffix for file in (tmp_path / "ours").iterdir()} == {".json", ".py", ".safetensors"}


class TestPieces:
    def cut(self, folder):
        """A model in pieces, and the second of them."""
        make_model("AutoModelForMaskedLM").save_pretrained(folder, **PIECES)
        return next(folder.glob("model-00002-*.safetensors"))

    @pytest.mark.parametrize("form", FORMS)
    def test_each_weight_is_in_one_piece_and_a_tied_one_too(self, form, tmp_path):
        model = make_model("AutoModelForMaskedLM", form)
        model.save_pretrained(tmp_path, **PIECES)
        stored = [(name, file.name) for file in tmp_path.glob("*.safetensors") for name in load_file(file)]
        index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
        assert sorted(stored) == sorted(index.items())
        assert ("lm_head.weight" in index) is not model.config.tie_word_embeddings
        assert set(index) | {"lm_head.weight"} == set(model.state_dict())

    @pytest.mark.parametrize("kept", [0, 4, 200, -1], ids=["empty", "4_bytes", "in_the_header", "last_byte"])
    def test_one_cut_short_is_refused(self, kept, tmp_path):
        piece = self.cut(tmp_path)
        piece.write_bytes(piece.read_bytes()[:kept])
        with pytest.raises(SafetensorError):
            SelfAttnForMaskedLM.from_pretrained(tmp_path)
        with pytest.raises(ValueError, match=rf"{piece.name}' is cut short or damaged"):
            check_model_folder(tmp_path)

    def test_without_the_index_there_are_no_weights(self, tmp_path):
        self.cut(tmp_path)
        (tmp_path / "model.safetensors.index.json").unlink()
        with pytest.raises(OSError, match=r"no file named model\.safetensors"):
            SelfAttnForMaskedLM.from_pretrained(tmp_path)

    def test_one_from_another_saving_is_seen(self, tmp_path):
        """All files are there and whole, and a tensor is in none of them: transformers tells, our tools refuse."""
        piece = self.cut(tmp_path)
        kept = load_file(piece)
        lost = sorted(kept)[0]
        del kept[lost]
        save_file(kept or {"other": torch.zeros(1)}, piece, {"format": "pt"})
        _, told = SelfAttnForMaskedLM.from_pretrained(tmp_path, output_loading_info=True)
        assert told["missing_keys"] == {lost}
        with pytest.raises(ValueError, match=rf"its index names '{lost}' in {piece.name}, which does not hold it"):
            check_model_folder(tmp_path)

    def test_a_whole_folder_passes(self, tmp_path):
        self.cut(tmp_path)
        check_model_folder(tmp_path)


class TestRoads:
    """However a model is loaded, it gives the numbers of the one that was saved."""

    def assert_same_numbers(self, actual, expected, auto_class="AutoModelForMaskedLM"):
        """Not to the bit: mapped from a file, weights begin at any address, and some are multiplied otherwise then."""
        actual, expected = values(actual, auto_class), values(expected, auto_class)
        assert set(actual) == set(expected)
        for name, x in expected.items():
            assert_close(actual[name], x, name)

    @pytest.mark.parametrize("choice", CHOICES)
    @pytest.mark.parametrize(
        "options",
        [{}, {"low_cpu_mem_usage": True}, {"device_map": "cpu"}, {"device_map": "auto"}, {"dtype": "auto"}],
        ids=["plain", "low_mem", "cpu", "auto", "dtype"],
    )
    def test_in_memory(self, choice, options, tmp_path):
        model = make_choice(choice)
        model.save_pretrained(tmp_path, **PIECES)
        again = SelfAttnForMaskedLM.from_pretrained(tmp_path, **options)
        assert_identical(tensors(again), tensors(model))
        self.assert_same_numbers(again, model)

    @pytest.mark.parametrize("choice", CHOICES)
    @pytest.mark.parametrize("device_map", ["all", "second_half", "first_half", "what_fits"])
    def test_from_disk(self, choice, device_map, tmp_path):
        """Weights that are fetched for each use: no module reads another's outside of its forward."""
        model = make_choice(choice)
        model.save_pretrained(tmp_path / "saved")
        options = {
            "all": {"device_map": {"": "disk"}},
            "second_half": {"device_map": spread_over("cpu", "disk")},
            "first_half": {"device_map": spread_over("disk", "cpu")},
            "what_fits": {"device_map": "auto", "max_memory": {"cpu": 13_000}},
        }[device_map]
        again = SelfAttnForMaskedLM.from_pretrained(tmp_path / "saved", **options, offload_folder=tmp_path / "off")
        assert "disk" in again.hf_device_map.values()
        self.assert_same_numbers(again, model)
        assert any(parameter.is_meta for parameter in again.parameters())

    @pytest.mark.parametrize("place", ["cpu", "disk", "both"])
    def test_on_every_kernel(self, kernel, place, tmp_path):
        model = make_model("AutoModelForMaskedLM")
        model.save_pretrained(tmp_path / "saved")
        device_map = spread_over("cpu", "disk") if place == "both" else {"": place}
        options = {"device_map": device_map, "attn_implementation": kernel, "offload_folder": tmp_path / "off"}
        again = SelfAttnForMaskedLM.from_pretrained(tmp_path / "saved", **options)
        model.set_attn_implementation(kernel)
        assert again.config._attn_implementation == kernel
        self.assert_same_numbers(again, model)

    def test_every_auto_class_from_disk(self, tmp_path):
        options = {"device_map": {"": "disk"}, "offload_folder": tmp_path / "off"}
        for auto_class, cls in CLASSES.items():
            model = make_model(auto_class, "bert")
            model.save_pretrained(tmp_path / auto_class)
            again = cls.from_pretrained(tmp_path / auto_class, **options)
            self.assert_same_numbers(again, model, auto_class)

    def test_the_loss_in_training_from_disk(self, tmp_path):
        """The head's weight is on the meta device then, and its forward knows how to fetch it."""
        model = make_model("AutoModelForMaskedLM")
        model.save_pretrained(tmp_path / "saved")
        options = {"device_map": spread_over("cpu", "disk"), "offload_folder": tmp_path / "off"}
        again = SelfAttnForMaskedLM.from_pretrained(tmp_path / "saved", **options)
        batch = make_batch("AutoModelForMaskedLM")
        batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        losses = [x.train()(**batch).loss for x in (model, again)]
        torch.testing.assert_close(*losses, atol=1e-5, rtol=1e-5)

    @pytest.mark.parametrize("choice", CHOICES)
    @pytest.mark.parametrize("options", [{}, {"device_map": "cpu"}, {"dtype": torch.bfloat16}], ids=str)
    def test_what_is_trained_is_the_same(self, choice, options, tmp_path):
        """transformers makes what it loads trainable, and ALiBi's slopes are not."""
        model = make_choice(choice)
        model.save_pretrained(tmp_path)
        again = SelfAttnForMaskedLM.from_pretrained(tmp_path, **options)
        trained = [{n for n, x in each.named_parameters() if x.requires_grad} for each in (again, model)]
        assert trained[0] == trained[1]
        assert [n for n, _ in model.named_parameters() if n not in trained[1] and not n.endswith("slopes")] == []

    def test_a_kernel_that_cannot_is_refused_before_anything_is_loaded(self, tmp_path):
        make_choice("alibi_additive").save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="attn_implementation 'sdpa' cannot compute this configuration"):
            SelfAttnForMaskedLM.from_pretrained(tmp_path, device_map="cpu", attn_implementation="sdpa")

    def test_slopes_that_were_not_saved_are_made(self, tmp_path):
        """ALiBi's slopes are numbers of the config; the meta device keeps none."""
        make_choice("alibi_additive").save_pretrained(tmp_path)
        saved = load_file(tmp_path / "model.safetensors")
        kept = {name: x for name, x in saved.items() if not name.endswith("slopes")}
        assert len(kept) == len(saved) - 2
        save_file(kept, tmp_path / "model.safetensors", {"format": "pt"})
        for options in ({}, {"device_map": "cpu"}, {"dtype": torch.bfloat16}):
            model = SelfAttnForMaskedLM.from_pretrained(tmp_path, **options)
            for layer in model.model.layers:
                assert torch.equal(layer.attention.position.slopes, torch.tensor(alibi_slopes(4), dtype=model.dtype))

    @pytest.mark.parametrize("choice", CHOICES)
    def test_emptied_and_filled_again(self, choice):
        """By `to_empty` and a state dict, as sharded training starts: nothing hangs on a module beside it."""
        model = make_choice(choice)
        again = SelfAttnForMaskedLM(model.config).to("meta")
        assert all(x.is_meta for x in tensors(again).values())
        again = again.to_empty(device="cpu").eval()
        again.load_state_dict(model.state_dict())
        assert_identical(values(again, "AutoModelForMaskedLM"), values(model, "AutoModelForMaskedLM"))


class TestTypes:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.parametrize("choice", CHOICES)
    @pytest.mark.parametrize("options", [{}, {"device_map": "cpu"}], ids=["plain", "cpu"])
    def test_another_type_is_a_cast(self, choice, dtype, options, tmp_path):
        model = make_choice(choice)
        model.save_pretrained(tmp_path)
        again = SelfAttnForMaskedLM.from_pretrained(tmp_path, dtype=dtype, **options)
        model.to(dtype)
        assert_identical(tensors(again), tensors(model))
        assert_identical(values(again, "AutoModelForMaskedLM"), values(model, "AutoModelForMaskedLM"))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
    def test_auto_is_the_config_s_or_else_the_weights(self, dtype, tmp_path):
        model = make_model("AutoModelForMaskedLM").to(dtype)
        model.save_pretrained(tmp_path)
        assert SelfAttnForMaskedLM.from_pretrained(tmp_path, dtype="auto").dtype == dtype
        config = json.loads((tmp_path / "config.json").read_text())
        del config["dtype"]
        (tmp_path / "config.json").write_text(json.dumps(config))
        again = SelfAttnForMaskedLM.from_pretrained(tmp_path, dtype="auto")
        assert_identical(tensors(again), tensors(model))


class TestOtherSizes:
    @pytest.mark.parametrize("auto_class", ["AutoModelForSequenceClassification", "AutoModelForTokenClassification"])
    def test_another_number_of_labels(self, auto_class, tmp_path):
        model = make_model(auto_class, "bert")
        model.save_pretrained(tmp_path)
        with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
            CLASSES[auto_class].from_pretrained(tmp_path, num_labels=5)

        again, told = CLASSES[auto_class].from_pretrained(
            tmp_path, num_labels=5, ignore_mismatched_sizes=True, output_loading_info=True
        )
        new = {name for name, *_ in told["mismatched_keys"]}
        saved, now = model.state_dict(), again.state_dict()
        assert new == {name for name, x in saved.items() if now[name].shape != x.shape}
        assert_identical({n: x for n, x in now.items() if n not in new}, {n: saved[n] for n in saved if n not in new})
        assert all(len(now[name]) == 5 and now[name].abs().max() < 1 for name in new)
        assert len(again.config.id2label) == again.config.num_labels == 5
        assert values(again, auto_class)["logits"].shape[-1] == 5

    @pytest.mark.parametrize("form", FORMS)
    def test_another_vocabulary(self, form, tmp_path):
        model = make_model("AutoModelForMaskedLM", form)
        model.resize_token_embeddings(51)
        model.save_pretrained(tmp_path, **PIECES)
        again = SelfAttnForMaskedLM.from_pretrained(tmp_path, device_map="auto")
        assert_identical(tensors(again), tensors(model))
        assert values(again, "AutoModelForMaskedLM")["logits"].shape[-1] == 51

    def test_saved_where_it_was_loaded_from(self, tmp_path):
        """Loaded weights are the file, mapped; to write over it must change neither."""
        expected = make_model("AutoModelForMaskedLM")
        expected.save_pretrained(tmp_path)
        model = SelfAttnForMaskedLM.from_pretrained(tmp_path)
        model.save_pretrained(tmp_path)
        assert_identical(tensors(model), tensors(expected))
        assert_identical(tensors(SelfAttnForMaskedLM.from_pretrained(tmp_path)), tensors(expected))


class TestSeveralDevices:
    """The later layers on another device than the first ones. There, the meta device stands for the second one: it
    refuses to compute with tensors of the first."""

    def record_second_layer(self, model, received):
        """Lets the second layer put down what it is given, and do nothing."""

        def record(*arguments, **kwargs):
            received.append((arguments, kwargs))
            return arguments[0]

        model.layers[1].forward = record

    def on_another(self, model):
        encoder = model.base_model
        later = [*encoder.layers[1:], encoder.norm]
        later += [module for module in model.children() if module is not encoder] if model is not encoder else []
        for module in later:
            add_hook_to_module(module.to("meta"), AlignDevicesHook("meta"))
        return model

    @pytest.mark.parametrize("choice", CHOICES)
    @pytest.mark.parametrize("padded", [True, False], ids=["padded", "whole"])
    def test_what_a_layer_is_told_goes_along(self, choice, padded):
        for kernel in KERNELS:
            model, batch, received = make_choice(choice, "AutoModel"), make_batch("AutoModel"), []
            if unsupported_reasons(model.config, kernel):
                continue
            if not padded:
                del batch["attention_mask"]
            model.set_attn_implementation(kernel)
            self.record_second_layer(model, received)
            with torch.no_grad():
                self.on_another(model)(**batch)
            assert {x.device.type for x in tensors_in(received)} == {"meta"}, kernel

    @pytest.mark.parametrize("padded", [True, False], ids=["padded", "whole"])
    @pytest.mark.parametrize("options", [{}, {"user_mask": True}], ids=["", "mask_of_pairs"])
    def test_the_rule_of_flex_goes_along(self, padded, options, monkeypatch):
        """It is a function that reads tensors, which nobody can move."""
        seen = []

        def record(query, key, value, block_mask, **options):
            seen.append(block_mask)
            return query.new_empty(*query.shape[:3], value.shape[3])

        monkeypatch.setattr(kernels_flex, "_flex_attention", lambda device_type: record)
        model, batch = make_model("AutoModel"), make_batch("AutoModel")
        if options:
            batch["attention_mask"] = torch.ones(3, 9, 9, dtype=torch.bool).tril()
        elif not padded:
            del batch["attention_mask"]
        model.set_attn_implementation("flex_attention")
        with torch.no_grad():
            self.on_another(model)(**batch)
        first, *_, last = seen
        for block_mask, device in ((first, "cpu"), (last, "meta")):
            known = inspect.getclosurevars(block_mask.mask_mod).nonlocals
            assert {x.device.type for x in tensors_in([known, vars(block_mask)])} == {device}

    @pytest.mark.parametrize("padded", [True, False], ids=["padded", "whole"])
    @pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
    def test_outputs_and_losses_of_every_head(self, padded, training):
        for auto_class in CLASSES:
            model, batch = make_model(auto_class, tie_word_embeddings=False, pooling="first"), make_batch(auto_class)
            shapes = {name: x.shape for name, x in values(model, auto_class).items()}
            if not padded:
                del batch["attention_mask"]
            elif auto_class in ("AutoModelForSequenceClassification", "AutoModelForMultipleChoice"):
                continue  # to pool packed documents their numbers are read; see the next test
            batch |= self.labels(auto_class, batch["input_ids"].shape)
            outputs = dict(self.on_another(model).train(training)(**batch, output_hidden_states=True).items())
            assert [x.device.type for x in outputs.pop("hidden_states")] == ["cpu", "cpu", "meta"]
            assert {x.device.type for x in outputs.values()} == {"meta"}
            assert {n: x.shape for n, x in outputs.items() if n != "loss"}.items() <= shapes.items()
            assert ("loss" in outputs) is (auto_class != "AutoModel")

    def test_where_tokens_stand_is_known_there(self):
        outputs, packing = self.on_another(make_model("AutoModel"))(**make_batch("AutoModel"), return_packing=True)
        assert packing.is_packed
        assert {x.device.type for x in tensors_in([outputs.last_hidden_state, packing])} == {"meta"}

    def labels(self, auto_class, shape):
        """A batch's labels, by the name of the model's argument."""
        if auto_class == "AutoModel":
            return {}
        if auto_class == "AutoModelForQuestionAnswering":
            return {"start_positions": torch.tensor([0, 1, 2]), "end_positions": torch.tensor([1, 2, 3])}
        of_tokens = auto_class in ("AutoModelForMaskedLM", "AutoModelForTokenClassification")
        return {"labels": torch.ones(shape if of_tokens else shape[:1], dtype=torch.long)}

    def test_memory(self):
        """Each layer's stands where what enters it stands, also where the last segment's has been moved away."""
        options = {"memory_length": 7, "causal": True, "attention_pattern": "full", "window_radius": None}
        model = self.on_another(make_model("AutoModel", num_hidden_layers=3, **options))
        memory, batch = None, make_batch("AutoModel")
        for _ in range(2):
            with torch.no_grad():
                memory = model(**batch, memory=memory).memory
            assert [x.device.type for x in memory.hidden_states] == ["cpu", "cpu", "meta"]
            memory = memory._replace(hidden_states=[torch.zeros(x.shape) for x in memory.hidden_states])

    def test_no_layer_is_cut_through(self, tmp_path):
        """By `device_map="auto"` a layer goes to one place as a whole, however little room there is."""
        make_model("AutoModelForMaskedLM").save_pretrained(tmp_path / "saved")
        splits = set()
        for room in range(4_000, 40_000, 4_000):
            options = {"device_map": "auto", "max_memory": {"cpu": room}, "offload_folder": tmp_path / "off"}
            model = SelfAttnForMaskedLM.from_pretrained(tmp_path / "saved", **options)
            device_map = getattr(model, "hf_device_map", {"": "cpu"})
            splits.add(tuple(sorted(device_map.items())))
            assert all(len(name.split(".")) <= 3 for name in device_map if "layers" in name), device_map
        assert len(splits) > 3


def test_on_the_meta_device_first(monkeypatch, tmp_path):
    """`from_pretrained` makes no weight that it would then write over."""
    make_model("AutoModelForMaskedLM").save_pretrained(tmp_path)
    made, init = [], SelfAttnForMaskedLM.__init__

    def watched(self, *arguments, **kwargs):
        init(self, *arguments, **kwargs)
        made.extend(x.is_meta for x in self.state_dict().values())

    monkeypatch.setattr(SelfAttnForMaskedLM, "__init__", watched)
    SelfAttnForMaskedLM.from_pretrained(tmp_path)
    assert made
    assert all(made)


# Pushes a model in pieces to the Hub of HF_ENDPOINT and opens it, with a network, without one, and with a piece lost.
SHARED = """
from pathlib import Path
from huggingface_hub import constants
from tests.test_save_load import assert_identical, make_model, tensors
from transformers import AutoModel, AutoModelForMaskedLM

model = make_model("AutoModelForMaskedLM")
model.push_to_hub("ann/pieces", max_shard_size="5KB")
for constants.HF_HUB_OFFLINE in (False, True):
    assert_identical(tensors(AutoModelForMaskedLM.from_pretrained("ann/pieces")), tensors(model))
    assert_identical(tensors(AutoModel.from_pretrained("ann/pieces")), tensors(model.model))
next(Path(constants.HF_HUB_CACHE).rglob("model-00002-*.safetensors")).unlink()
try:
    AutoModelForMaskedLM.from_pretrained("ann/pieces")
except OSError as error:
    print(error)
"""


def test_pieces_from_the_hub_and_then_without_a_network(tmp_path):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment |= {"HF_HOME": str(tmp_path), "HF_TOKEN": "hf_of_ann", "HF_HUB_DISABLE_XET": "1",
                    "HF_HUB_DISABLE_TELEMETRY": "1", "OMP_NUM_THREADS": "1"}  # fmt: skip
    hub = Hub({"hf_of_ann": "ann"})
    with hub.serve() as environment["HF_ENDPOINT"]:
        command = [sys.executable, "-c", SHARED]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert sum(name.endswith(".safetensors") for name in hub.repositories["ann/pieces"].files()) > 2
    assert "couldn't find them in the cached files" in done.stdout


# Loads folders in types, looks at each weight, and says by how many MiB its memory grew at most.
GROWTH = """
import json, sys
from pathlib import Path
import torch, hf_selfattn

def memory(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))

def load(folder, dtype):
    model = hf_selfattn.SelfAttnForMaskedLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    return sum(x.detach().sum(dtype=torch.float64).item() for x in model.parameters())

grown = []
for folder, dtype in json.loads(sys.argv[1]):
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak is what it is now
    load(folder, dtype)
    grown.append(memory("VmHWM") - before)
print(json.dumps(grown))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux alone tells a peak from a point on")
def test_memory_for_one_copy(tmp_path):
    """In fp32 the weights are the file itself, mapped; in bf16 a copy of half the size is made of it."""
    sizes = {"hidden_size": 1024, "num_attention_heads": 16, "vocab_size": 20_000, "num_hidden_layers": 3}
    make_large().save_pretrained(tmp_path / "small")
    large = make_large(**sizes)
    large.save_pretrained(tmp_path / "whole")
    large.save_pretrained(tmp_path / "pieces", max_shard_size="40MB")
    copy = sum(x.numel() for x in large.parameters()) * 4 / 2**20
    assert copy > 180

    # One weight made in vain would be a whole copy more in fp32, and half a one in bf16.
    limits = {"float32": 1.5, "bfloat16": 1.75}
    cases = {(folder, dtype): n for folder in ("whole", "pieces") for dtype, n in limits.items()}
    before = [("small", "float32"), ("whole", "float32")]  # what the libraries themselves need for the first time
    folders = [(str(tmp_path / folder), dtype) for folder, dtype in [*before, *cases]]
    command = [sys.executable, "-c", GROWTH, json.dumps(folders)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    _, _, *grown = json.loads(done.stdout.splitlines()[-1])
    found = {case: mebibytes / copy for case, mebibytes in zip(cases, grown, strict=True)}
    assert all(found[case] < limit for case, limit in cases.items()), found


def make_large(**sizes):
    """A model whose weights are all zero: nothing is drawn, which would take longer than all the rest."""
    sizes = {"hidden_size": 32, "num_attention_heads": 2, "vocab_size": 50, "num_hidden_layers": 1, **sizes}
    with torch.device("meta"):
        model = SelfAttnForMaskedLM(SelfAttnConfig(**sizes))
    model.to_empty(device="cpu").tie_weights()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    return model
