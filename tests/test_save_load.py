"""Saving and loading: every tensor bit for bit, in this process, in one without the package, and in pieces."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file

import hf_selfattn
from hf_selfattn import AUTO_MAP, SelfAttnConfig, SelfAttnForMaskedLM

from .processes import where_refused

SIZES = {
    "vocab_size": 43,
    "hidden_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "value_head_dim": 5,
    "intermediate_size": 18,
    "num_labels": 3,
}
FORMS = {
    "modernbert": {"attention_pattern": ["full", "sliding_window"], "window_radius": 3, "first_layer_norm": False},
    "bert": {
        "position_encoding": "learned",
        "max_position_embeddings": 16,
        "type_vocab_size": 2,
        "embedding_size": 7,
        "norm_position": "post",
        "norm_bias": True,
        "attention_bias": True,
        "mlp_bias": True,
        "mlp_type": "plain",
        "head_type": "bert",
        "pad_token_id": 0,
    },
    "rms_norm": {"norm_type": "rms_norm", "causal": True, "tie_word_embeddings": False, "head_type": "roberta"},
}
"""Three configurations that between them have every kind of tensor."""

CLASSES = {auto: getattr(hf_selfattn, path.split(".")[1]) for auto, path in AUTO_MAP.items() if auto != "AutoConfig"}

CODE = {
    "attention.py",
    "biases.py",
    "configuration_selfattn.py",
    "embeddings.py",
    "encoder.py",
    "heads_text.py",
    "kernels.py",
    "kernels_dense.py",
    "kernels_eager.py",
    "kernels_flex.py",
    "kernels_rows.py",
    "kernels_selfattn.py",
    "kernels_stock.py",
    "kernels_varlen.py",
    "layers.py",
    "losses.py",
    "masks.py",
    "memory.py",
    "modeling_selfattn.py",
    "norms.py",
    "option_names.py",
    "packing.py",
    "parallel.py",
    "patterns.py",
    "positions.py",
    "positions_base.py",
    "positions_embedding.py",
    "positions_relative.py",
    "positions_rotary.py",
    "scores.py",
    "tile_blocks.py",
    "tile_documents.py",
    "tile_fused.py",
    "tile_math.py",
    "tile_plan.py",
    "tile_problem.py",
    "tile_roads.py",
    "tiles.py",
}
"""The files of the package that travel with a model. A new one must be added here, so that none travels unnoticed."""


def make_config(form="modernbert", **options):
    return SelfAttnConfig(**{**SIZES, **FORMS[form], **options})


def make_model(auto_class, form="modernbert", **options):
    """A model in evaluation mode whose every parameter is drawn at random, so that a new one could not be the same."""
    model = CLASSES[auto_class](make_config(form, **options)).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    return model


def make_batch(auto_class):
    ids = torch.randint(1, 43, (3, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    if auto_class == "AutoModelForMultipleChoice":
        ids, mask = ids[:, None].repeat(1, 2, 1), mask[:, None].repeat(1, 2, 1)
        ids[:, 1] = ids[:, 1].roll(1, 0)
    return {"input_ids": ids, "attention_mask": mask}


def values(model, auto_class):
    """Outputs, with weights that are aligned in memory: those in a file are not, and then the last bit may differ."""
    with torch.no_grad():
        model._apply(torch.clone)
        return dict(model(**make_batch(auto_class)).items())


def tensors(model):
    """Every parameter and buffer, buffers that are not saved included, and every tensor that hangs on a module."""
    found = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    for name, module in model.named_modules():
        found |= {f"{name}.{key}": x for key, x in vars(module).items() if torch.is_tensor(x)}
    return found


def assert_identical(actual, expected):
    """Same names, types, shapes and bits."""
    assert set(actual) == set(expected)
    for name, x in expected.items():
        assert not actual[name].is_meta, name
        assert actual[name].dtype == x.dtype, name
        assert torch.equal(actual[name], x), name


@pytest.fixture(params=CLASSES)
def auto_class(request):
    return request.param


class TestRoundTrip:
    @pytest.mark.parametrize("form", FORMS)
    def test_every_tensor_bit_for_bit(self, auto_class, form, tmp_path):
        model = make_model(auto_class, form)
        model.save_pretrained(tmp_path)
        again = getattr(transformers, auto_class).from_pretrained(tmp_path)
        assert type(again) is type(model)
        assert_identical(tensors(again), tensors(model))
        assert_identical(values(again, auto_class), values(model, auto_class))
        assert not again.training

    def test_nothing_is_missing_and_nothing_is_left_over(self, auto_class, tmp_path):
        make_model(auto_class, "bert").save_pretrained(tmp_path)
        _, told = CLASSES[auto_class].from_pretrained(tmp_path, output_loading_info=True)
        assert {name: list(what) for name, what in told.items() if what} == {}

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
    def test_another_type_is_a_cast(self, auto_class, dtype, tmp_path):
        model = make_model(auto_class, "bert")
        model.save_pretrained(tmp_path)
        again = CLASSES[auto_class].from_pretrained(tmp_path, dtype=dtype)
        assert_identical(tensors(again), {name: x.to(dtype) for name, x in tensors(model).items()})

    def test_the_type_is_remembered(self, auto_class, tmp_path):
        model = make_model(auto_class).to(torch.bfloat16)
        model.save_pretrained(tmp_path)
        again = getattr(transformers, auto_class).from_pretrained(tmp_path)
        assert again.dtype == torch.bfloat16
        assert_identical(tensors(again), tensors(model))

    @pytest.mark.parametrize("form", FORMS)
    @pytest.mark.parametrize(
        "options", [{"device_map": "cpu"}, {"low_cpu_mem_usage": True}], ids=["device_map", "low_mem"]
    )
    def test_by_way_of_the_meta_device(self, auto_class, form, options, tmp_path):
        model = make_model(auto_class, form)
        model.save_pretrained(tmp_path)
        again = CLASSES[auto_class].from_pretrained(tmp_path, **options)
        assert_identical(tensors(again), tensors(model))
        assert_identical(values(again, auto_class), values(model, auto_class))

    @pytest.mark.parametrize("form", FORMS)
    def test_a_head_without_weights_gets_new_ones(self, auto_class, form, tmp_path):
        """From an encoder alone: what is loaded stays, what is new is finite, and neither is on the meta device."""
        make_model("AutoModel", form).save_pretrained(tmp_path)
        saved = load_file(tmp_path / "model.safetensors")
        model = CLASSES[auto_class].from_pretrained(tmp_path)
        encoder = model if auto_class == "AutoModel" else model.model
        assert_identical(dict(encoder.state_dict()), saved)
        for name, x in tensors(model).items():
            assert not x.is_meta, name
            assert torch.isfinite(x).all(), name
            assert x.abs().max() < 10, name

    def test_the_kernel_is_not_saved(self, auto_class, tmp_path):
        model = make_model(auto_class)
        default = model.config._attn_implementation
        model.set_attn_implementation("eager")
        model.save_pretrained(tmp_path)
        assert "attn_implementation" not in (tmp_path / "config.json").read_text()
        opened = getattr(transformers, auto_class).from_pretrained(tmp_path)
        assert opened.config._attn_implementation == default != "eager"


class TestFiles:
    def test_exactly_these(self, auto_class, tmp_path):
        make_model(auto_class).save_pretrained(tmp_path)
        assert {file.name for file in tmp_path.iterdir()} == CODE | {"config.json", "model.safetensors"}

    def test_code_is_byte_for_byte_the_package(self, tmp_path):
        make_model("AutoModel").save_pretrained(tmp_path)
        package = Path(hf_selfattn.__file__).parent
        assert {name for name in CODE if (tmp_path / name).read_bytes() != (package / name).read_bytes()} == set()

    def test_the_whole_auto_map(self, auto_class, tmp_path):
        make_model(auto_class).save_pretrained(tmp_path)
        assert json.loads((tmp_path / "config.json").read_text())["auto_map"] == AUTO_MAP

    def test_a_config_alone_brings_its_code(self, tmp_path):
        make_config().save_pretrained(tmp_path)
        written = {file.name for file in tmp_path.iterdir()}
        assert {"config.json", "configuration_selfattn.py", "patterns.py", "positions.py", "scores.py"} <= written
        assert json.loads((tmp_path / "config.json").read_text())["auto_map"] == AUTO_MAP

    def test_tied_weights_are_stored_once(self, tmp_path):
        make_model("AutoModelForMaskedLM").save_pretrained(tmp_path)
        stored = load_file(tmp_path / "model.safetensors")
        assert "model.embed_tokens.weight" in stored
        assert "lm_head.weight" not in stored

    def test_pieces(self, auto_class, tmp_path):
        model = make_model(auto_class, "bert")
        model.save_pretrained(tmp_path, max_shard_size="5KB")
        pieces = sorted(tmp_path.glob("model-*.safetensors"))
        assert len(pieces) > 2
        index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
        assert set(index["weight_map"].values()) == {piece.name for piece in pieces}
        again = getattr(transformers, auto_class).from_pretrained(tmp_path)
        assert_identical(tensors(again), tensors(model))

    @pytest.mark.parametrize("size", [None, "5KB"], ids=["whole", "pieces"])
    def test_weights_are_in_safetensors_alone(self, size, tmp_path):
        make_model("AutoModelForMaskedLM").save_pretrained(tmp_path, **({"max_shard_size": size} if size else {}))
        assert {file.suffix for file in tmp_path.iterdir()} == {".json", ".py", ".safetensors"}

    @pytest.mark.parametrize("kept", [0, 4, 200, -1], ids=["empty", "4_bytes", "in_the_header", "last_byte"])
    def test_a_folder_cut_short_is_refused(self, kept, tmp_path):
        make_model("AutoModelForMaskedLM").save_pretrained(tmp_path)
        weights = tmp_path / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:kept])
        with pytest.raises((SafetensorError, OSError)):
            SelfAttnForMaskedLM.from_pretrained(tmp_path)

    def test_a_missing_piece_is_refused(self, tmp_path):
        make_model("AutoModelForMaskedLM").save_pretrained(tmp_path, max_shard_size="5KB")
        next(tmp_path.glob("model-00002-*.safetensors")).unlink()
        with pytest.raises(OSError, match="model-00002"):
            SelfAttnForMaskedLM.from_pretrained(tmp_path)

    def test_weights_of_another_size_are_refused(self, tmp_path):
        make_model("AutoModelForMaskedLM").save_pretrained(tmp_path)
        with pytest.raises(RuntimeError, match="size"):
            SelfAttnForMaskedLM.from_pretrained(tmp_path, intermediate_size=22)


# Run where `hf_selfattn` cannot be imported. Opens each folder with each Auto class, says what differs from what was
# saved, and saves it again for the next such process.
ELSEWHERE = (
    where_refused("hf_selfattn")
    + """
import json, sys
import torch, transformers

torch.set_num_threads(1)
arguments = json.loads(sys.argv[1])
expected = torch.load(arguments["expected"])
problems, opened = [], 0
for saved_as, folder in arguments["folders"].items():
    for auto_class, batch in expected["batches"].items():
        cls = getattr(transformers, auto_class)
        where = f"{auto_class} of {saved_as}"
        try:
            # Whether the weights of one head fit another is tested with the package.
            model = cls.from_pretrained(folder, trust_remote_code=True, ignore_mismatched_sizes=True)
        except Exception as error:
            problems.append(f"{where}: {str(error)[:99]}")
            continue
        opened += 1
        if type(model).__module__.split(".")[0] != "transformers_modules":
            problems.append(f"{where}: {type(model).__module__}")
        with torch.no_grad():
            outputs = model._apply(torch.clone)(**batch)  # aligned in memory, as those expected
        if not all(torch.isfinite(x).all() for x in outputs.values()):
            problems.append(f"{where}: not finite")
        if auto_class == saved_as:
            if set(outputs) != set(expected["values"][saved_as]):
                problems.append(f"{where}: {sorted(outputs)}")
            for name, x in expected["values"][saved_as].items():
                if not torch.equal(x, outputs[name]):
                    problems.append(f"{where}: other {name}")
            model.save_pretrained(f"{arguments['again']}/{saved_as}")
    try:
        transformers.AutoConfig.from_pretrained(folder)
        problems.append(f"{saved_as} opened without trust_remote_code")
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            problems.append(str(error))
print()  # the question that was asked above has no end of line
print(json.dumps({"problems": problems, "opened": opened, "package": "hf_selfattn" in sys.modules}))
"""
)


def elsewhere(folders, expected, again, modules_cache):
    """Runs ELSEWHERE in a fresh process and returns what it printed last."""
    arguments = {"folders": folders, "expected": str(expected), "again": str(again)}
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_MODULES_CACHE": str(modules_cache), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, json.dumps(arguments)],
        capture_output=True,
        text=True,
        cwd=again.parent,
        env=environment,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_opens_without_the_package(tmp_path):
    """Each Auto class opens a folder saved from each class, and what is saved there opens in the next process."""
    folders, expected = {}, {"batches": {}, "values": {}}
    for auto_class in CLASSES:
        model = make_model(auto_class, "bert")
        folders[auto_class] = str(tmp_path / "first" / auto_class)
        model.save_pretrained(folders[auto_class])
        expected["batches"][auto_class] = make_batch(auto_class)
        expected["values"][auto_class] = values(model, auto_class)
    torch.save(expected, tmp_path / "expected.pt")

    for here, there in (("first", "second"), ("second", "third")):
        folders = {name: str(tmp_path / here / name) for name in folders}
        told = elsewhere(folders, tmp_path / "expected.pt", tmp_path / there, tmp_path / f"modules of {here}")
        assert told == {"problems": [], "opened": len(CLASSES) ** 2, "package": False}
        for name in CLASSES:
            written = tmp_path / there / name
            assert {file.name for file in written.iterdir()} == CODE | {"config.json", "model.safetensors"}
            for file in CODE | {"model.safetensors"}:
                assert (written / file).read_bytes() == (tmp_path / "first" / name / file).read_bytes(), file


@pytest.mark.parametrize("form", ["modernbert", "bert"])
@pytest.mark.parametrize("opened_as", CLASSES)
@pytest.mark.parametrize("saved_as", CLASSES)
def test_opens_with_the_package_and_without_a_flag(saved_as, opened_as, form, tmp_path):
    """Any Auto class opens a folder saved from any class, as a class of the package, with the encoder as it was."""
    saved = make_model(saved_as, form)
    saved.save_pretrained(tmp_path)
    for options in ({}, {"trust_remote_code": True}):
        model = getattr(transformers, opened_as).from_pretrained(tmp_path, **options)
        assert type(model) is CLASSES[opened_as]
        assert_identical(tensors(model.base_model), tensors(saved.base_model))


@pytest.mark.parametrize("head_type", ["bert", "roberta", "distilbert"])
@pytest.mark.parametrize("opened_as", ["AutoModelForSequenceClassification", "AutoModelForMultipleChoice"])
def test_a_classifier_does_not_take_the_language_models_dense_layer(opened_as, head_type, tmp_path):
    """In these three they are different layers (in BERT the pooler and the prediction head's transform)."""
    make_model("AutoModelForMaskedLM", head_type=head_type).save_pretrained(tmp_path)
    _, told = CLASSES[opened_as].from_pretrained(tmp_path, output_loading_info=True)
    assert {name for name in told["missing_keys"] if name.endswith("dense.weight")} != set()


def test_loading_info_on_request(tmp_path):
    make_model("AutoModel").save_pretrained(tmp_path)
    model, info = transformers.AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert type(model) is hf_selfattn.SelfAttnModel
    assert not any(info.values())
