"""A graph gives the numbers of its model: ONNX in onnxruntime, torch's program in a process without this package."""

import contextlib
import json
import logging
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import onnxruntime
import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModelForMaskedLM, AutoTokenizer

import hf_selfattn
from hf_selfattn import KERNELS, PATTERNS, POSITIONS, SCORES, Pattern, SelfAttnModel, register_pattern
from hf_selfattn.tools import export as export_module
from hf_selfattn.tools import export_graph
from hf_selfattn.tools.convert_families import AUTO_CLASSES
from hf_selfattn.tools.export import DEFAULT_OPSET, FILES, OPSETS, ORDER, export, export_reasons, main

from .processes import where_refused
from .tolerances import assert_close
from .train_scripts import tiny_tokenizer

VOCABULARY = 43
SHAPES = [(1, 1), (1, 8), (3, 1), (2, 11), (4, 30)]
HEADS = {
    head: getattr(hf_selfattn, name.replace("AutoModel", "SelfAttn"))
    for head, name in AUTO_CLASSES.items()
    if head != "base"
}
HEADS["base"] = SelfAttnModel


def draw_inputs(shape, types=1, choices=None):
    """Ids, types and padding on either side; the second row has no real token."""
    generator = torch.Generator().manual_seed(sum(shape))
    length = shape[1]
    mask = torch.ones(shape, dtype=torch.long)
    mask[:, : length // 4] = 0
    mask[2:, length - length // 3 :] = 0
    mask[0] = 1
    mask[1:2] = 0
    if choices is not None:
        mask = mask[:, None].expand(-1, choices, -1).clone()
    inputs = {"input_ids": torch.randint(VOCABULARY, mask.shape, generator=generator), "attention_mask": mask}
    if types > 1:
        inputs["token_type_ids"] = torch.randint(types, mask.shape, generator=generator)
    return inputs


def run_onnx(folder, inputs):
    """Every output of `model.onnx` by name, as any user of onnxruntime gets them."""
    session = onnxruntime.InferenceSession(str(Path(folder, "model.onnx")))
    names = [output.name for output in session.get_outputs()]
    found = session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})
    return dict(zip(names, map(torch.from_numpy, found), strict=True))


def assert_graph_is(run, model, every_inputs):
    for inputs in every_inputs:
        with torch.no_grad():
            expected = {name: x for name, x in model(**inputs).items() if name != "memory"}
        found = run(inputs)
        assert set(found) == set(expected)
        for name in expected:
            assert found[name].isfinite().all()
            assert_close(found[name], expected[name], f"{name} of {tuple(inputs['input_ids'].shape)}")


def every_row_once():
    """Every head, every opset, and every row of each table in one of them."""
    cases = []
    for i, position in enumerate(POSITIONS):
        head, score = (list(table)[i % len(table)] for table in (HEADS, SCORES))
        pattern = list(PATTERNS)[(i + i // len(SCORES)) % len(PATTERNS)]
        row, opset = (score, pattern, i % 2 == 1, position), OPSETS[(i - 2) % len(OPSETS)]
        cases.append(pytest.param(head, row, opset, id=f"{head}-{score}-{pattern}-{position}-{opset}"))
    return cases


@pytest.mark.parametrize(("head", "row", "opset"), every_row_once())
def test_every_head_as_onnx(head, row, opset, make_config, make_model, tmp_path):
    """Batch and length other than the traced ones, one token, one row, a row that is all padding."""
    config = make_config(*row, num_hidden_layers=1, type_vocab_size=2)
    model = make_model(config, "eager", torch.float32, HEADS[head])
    assert export(model, tmp_path / "out", opset=opset)["opset"] == opset
    choices = 3 if head == "multiple_choice" else None
    inputs = [draw_inputs(shape, 2, choices) for shape in SHAPES]
    assert_graph_is(lambda given: run_onnx(tmp_path / "out", given), model, inputs)


class TestRules:
    @pytest.mark.slow
    def test_what_really_happens(self, choice, kernel, make_config, make_model, tmp_path):
        """The whole product: what no rule refuses is exported and right, what one refuses cannot be."""
        config = make_config(*choice)
        if hf_selfattn.unsupported_reasons(config, kernel, device_type="cpu", training=False):
            assert export_reasons(config, kernel, "pt2")
            return
        check_rules(make_model(config, kernel, torch.float32), tmp_path)

    @pytest.mark.parametrize(
        ("kernel", "position"), [("selfattn", "none"), ("flex_attention", "none"), ("sdpa", "alibi")]
    )
    def test_what_is_refused_cannot_be_done(self, kernel, position, make_config, make_model, tmp_path):
        config = make_config(pattern="sliding_window", position=position)
        check_rules(make_model(config, kernel, torch.float32), tmp_path)

    def test_a_kernel_that_cannot_compute_it_cannot_export_it(self, make_config):
        config = make_config("additive")
        assert export_reasons(config, "sdpa", "onnx") == ["score_function 'additive' is not a dot product"]
        assert export_reasons(config, "eager", "onnx") == []

    @pytest.mark.parametrize("format", FILES)
    def test_without_a_name_some_kernel_is_taken(self, choice, format, make_config):
        config = make_config(*choice)
        assert any(not export_reasons(config, kernel, format) for kernel in ORDER)

    def test_only_models_of_ours(self):
        config = AutoConfig.for_model("bert")
        (reason,) = export_reasons(config, "sdpa", "onnx")
        assert "it is a 'bert'" in reason

    @pytest.mark.parametrize(
        ("option", "value"),
        [("output_attentions", True), ("output_hidden_states", True), ("quantization_config", {"quant_method": "x"})],
    )
    def test_settings_that_a_graph_cannot_have(self, option, value, make_config):
        config = make_config()
        setattr(config, option, value)
        (reason,) = export_reasons(config, "sdpa", "onnx")
        assert option in reason or "quantized" in reason

    def test_memory(self, make_config):
        config = make_config(causal=True, position="rotary", memory_length=4)
        for kernel in KERNELS:
            assert "memory_length=4" in export_reasons(config, kernel, "pt2")[-1]

    @pytest.mark.parametrize(("kernel", "format", "name"), [("sdpa", "onx", "format"), ("spda", "onnx", "'spda'")])
    def test_unknown_names(self, kernel, format, name, make_config):
        with pytest.raises(ValueError, match=name):
            export_reasons(make_config(), kernel, format)


def check_rules(model, folder):
    """`export_reasons` against an attempt in each format, from one trace. A NaN at padding is everywhere after two
    layers."""
    config, kernel = model.config, model.config._attn_implementation
    signature = export_graph.signature_of(config, "base")
    batches = export_graph.make_batches(config, signature)
    expected = export_graph.outputs_of(model, signature, batches)
    works = dict.fromkeys(FILES, False)
    with contextlib.suppress(Exception):
        program = export_graph.trace(model, config, signature)
        export_graph.write_pt2(program, folder / "model.pt2", signature)
        export_graph.largest_difference(export_graph.run_pt2(folder / "model.pt2"), batches, expected)
        works["pt2"] = True
        export_graph.write_onnx(program, folder / "model.onnx", signature, DEFAULT_OPSET)
        export_graph.largest_difference(export_graph.run_onnx(folder / "model.onnx"), batches, expected)
        works["onnx"] = True
    assert works == {format: not export_reasons(config, kernel, format) for format in FILES}


@dataclass(frozen=True, kw_only=True)
class EveryThird(Pattern):
    """Keys at distances that three divides."""

    def sees(self, head, query, key):
        return (query.position - key.position) % 3 == 0


def test_a_pattern_of_ones_own(make_config, make_model, tmp_path, monkeypatch):
    monkeypatch.setattr(hf_selfattn.patterns, "PATTERNS", PATTERNS)
    monkeypatch.setitem(PATTERNS, "every_third", EveryThird)
    register_pattern("every_third", EveryThird)
    model = make_model(make_config(pattern="every_third", num_hidden_layers=1), "sdpa", torch.float32)
    export(model, tmp_path / "out")
    assert_graph_is(lambda inputs: run_onnx(tmp_path / "out", inputs), model, [draw_inputs((3, 17))])


# A folder, what is written, what stays as it was


def save_source(folder, make_config, make_model, dtype=torch.float32, cls=HEADS["masked_lm"], **options):
    tokenizer = tiny_tokenizer()
    config = make_config(position="rotary", vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, **options)
    model = make_model(config, "sdpa", dtype, cls)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


@pytest.fixture(scope="module")
def exported(tmp_path_factory, make_config, make_model):
    """A masked language model in bfloat16 and its graph, by the command line, and what that said."""
    folder = tmp_path_factory.mktemp("export")
    model = save_source(folder / "source", make_config, make_model, torch.bfloat16)
    said = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    export_module.logger.addHandler(handler)
    try:
        assert main([str(folder / "source"), str(folder / "out")]) == 0
    finally:
        export_module.logger.removeHandler(handler)
    return folder, model, said


class TestFolder:
    def test_the_graph_computes_in_float32(self, exported):
        """The same numbers as the checkpoint's, cast up."""
        folder, _, said = exported
        model = AutoModelForMaskedLM.from_pretrained(folder / "source", dtype=torch.float32)
        assert_graph_is(lambda inputs: run_onnx(folder / "out", inputs), model, map(draw_inputs, SHAPES))
        assert "The weights are bfloat16; the graph computes in float32" in said

    def test_the_kernel_is_named(self, exported):
        assert "kernel: sdpa, the first of sdpa, eager that can be exported" in exported[2]

    def test_inputs_outputs_and_axes(self, exported):
        session = onnxruntime.InferenceSession(str(exported[0] / "out" / "model.onnx"))
        axes = ["batch_size", "sequence_length"]
        assert {x.name: x.shape for x in session.get_inputs()} == {"input_ids": axes, "attention_mask": axes}
        assert [(x.name, x.shape[:2]) for x in session.get_outputs()] == [("logits", axes)]
        assert {x.type for x in session.get_inputs()} == {"tensor(int64)"}

    def test_the_tokenizer_makes_what_the_graph_reads(self, exported):
        folder = exported[0] / "out"
        tokenizer = AutoTokenizer.from_pretrained(folder)
        batch = tokenizer(["a text", "another one that is longer"], padding=True, return_tensors="np")
        session = onnxruntime.InferenceSession(str(folder / "model.onnx"))
        (logits,) = session.run(None, dict(batch))
        model = AutoModelForMaskedLM.from_pretrained(exported[0] / "source", dtype=torch.float32)
        with torch.no_grad():
            assert_close(
                torch.from_numpy(logits), model(**{name: torch.from_numpy(x) for name, x in batch.items()}).logits
            )

    def test_the_config_opens(self, exported):
        config = AutoConfig.from_pretrained(exported[0] / "out")
        assert config.architectures == ["SelfAttnForMaskedLM"]
        assert config.dtype == torch.float32

    def test_no_paths_of_this_machine(self, exported):
        here = str(Path(hf_selfattn.__file__).parent).encode()
        for file in (exported[0] / "out").iterdir():
            assert here not in file.read_bytes(), file.name

    def test_weights_beside_the_graph_where_they_are_large(self, exported, tmp_path, monkeypatch):
        folder, _, _ = exported
        monkeypatch.setattr(export_graph, "ONE_FILE", 1000)
        report = export(folder / "source", tmp_path / "out", head="base")
        assert set(report["bytes"]) == {"model.onnx", "model.onnx_data"}
        model = transformers.AutoModel.from_pretrained(folder / "source", dtype=torch.float32)
        assert_graph_is(lambda inputs: run_onnx(tmp_path / "out", inputs), model, [draw_inputs((2, 9))])

    def test_half_precision_of_the_other_kind(self, make_config, make_model, tmp_path):
        model = save_source(tmp_path / "source", make_config, make_model, torch.float16, HEADS["token_classification"])
        export(tmp_path / "source", tmp_path / "out", format="pt2")
        program = torch.export.load(tmp_path / "out" / "model.pt2").module()
        assert_graph_is(lambda inputs: program(**inputs), model.float(), [draw_inputs((3, 10))])


def test_a_model_stays_as_it_is(make_config, make_model, tmp_path):
    """And what is exported is in evaluation mode, with another kernel."""
    tokenizer = tiny_tokenizer()
    config = make_config(position="rotary", num_hidden_layers=1, hidden_dropout=0.5, vocab_size=len(tokenizer))
    model = make_model(config, "selfattn", torch.float64).train()
    before = {name: x.clone() for name, x in model.state_dict().items()}
    report = export(model, tmp_path / "out", format="pt2", tokenizer=tokenizer)
    assert model.training
    assert model.config._attn_implementation == "selfattn"
    assert model.config.architectures is None
    assert all(x.dtype == torch.float64 and torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert report["kernel"] == "sdpa"
    assert report["tokenizer"] is not None
    program = torch.export.load(tmp_path / "out" / "model.pt2").module()
    assert_graph_is(lambda inputs: program(**inputs), model.float().eval(), [draw_inputs((3, 10))])


@pytest.mark.parametrize("format", FILES)
def test_learned_positions_end(format, make_config, make_model, tmp_path):
    """A text that is too long raises; it does not read some other position."""
    model = make_model(
        make_config(position="learned", max_position_embeddings=9, num_hidden_layers=1), "sdpa", torch.float32
    )
    assert export(model, tmp_path, format=format)["longest"] == 9
    if format == "onnx":
        run = lambda inputs: run_onnx(tmp_path, inputs)  # noqa: E731
    else:
        program = torch.export.load(tmp_path / "model.pt2").module()
        run = lambda inputs: program(**inputs)  # noqa: E731
    assert_graph_is(run, model, [draw_inputs((2, 9)), draw_inputs((1, 3))])
    with pytest.raises(Exception, match=r"out of.*bounds|sequence_length|<= 9|indices"):
        run(draw_inputs((2, 10)))


# Run where neither this package nor transformers can be imported.
ELSEWHERE = (
    where_refused("hf_selfattn", "transformers")
    + """
import json, sys
import torch

torch.set_num_threads(1)
told = {}
for folder in sys.argv[1:]:
    cases = torch.load(f"{folder}/cases.pt")
    try:
        program = torch.export.load(f"{folder}/model.pt2").module()
    except Exception as error:
        told[folder] = f"{type(error).__name__}: {error}"
        continue
    errors = [float((program(**inputs)["last_hidden_state"] - right).abs().max()) for inputs, right in cases]
    told[folder] = max(errors)
print(json.dumps(told))
"""
)


def test_a_process_without_this_package(make_config, make_model, tmp_path):
    """'sdpa' and 'eager' need nothing but torch there; 'selfattn' is an operator that this package brings."""
    choices = {
        "sdpa": ("scaled_dot_product", "bigbird"),
        "eager": ("additive", "full"),
        "selfattn": ("cosine", "full"),
    }
    for kernel, row in choices.items():
        model = make_model(make_config(*row, position="rotary", num_hidden_layers=1), "eager", torch.float32)
        export(model, tmp_path / kernel, format="pt2", kernel=kernel)
        inputs = [draw_inputs(shape) for shape in SHAPES]
        with torch.no_grad():
            cases = [(given, model(**given).last_hidden_state) for given in inputs]
        torch.save(cases, tmp_path / kernel / "cases.pt")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, *(str(tmp_path / kernel) for kernel in choices)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    told = {Path(folder).name: answer for folder, answer in json.loads(done.stdout).items()}
    assert told["sdpa"] < 1e-5
    assert told["eager"] < 1e-5
    assert told["selfattn"].startswith("RuntimeError")


# Refused before any work


@pytest.fixture
def no_work(monkeypatch):
    """Fails where weights are read or a graph is traced."""

    def too_late(*args, **kwargs):
        raise AssertionError("work was begun")

    monkeypatch.setattr(export_module, "trace", too_late)
    monkeypatch.setattr(transformers.PreTrainedModel, "from_pretrained", too_late)


@pytest.fixture(scope="module")
def source(tmp_path_factory, make_config, make_model):
    folder = tmp_path_factory.mktemp("source")
    save_source(folder, make_config, make_model)
    return folder


@pytest.mark.usefixtures("no_work")
class TestRefusals:
    @pytest.mark.parametrize(
        ("options", "rule"),
        [
            ({"format": "onx"}, r"format is one of onnx, pt2, got 'onx'\. Did you mean 'onnx'\?"),
            ({"opset": 12}, r"opset is from 18 to 23, got 12.* Leave it out for 20"),
            ({"opset": 20, "format": "pt2"}, r"opset goes with format 'onnx', got opset=20 with 'pt2'"),
            ({"head": "masked"}, r"head is one of .*, got 'masked'\. Did you mean 'masked_lm'"),
            ({"kernel": "flash"}, r"attn_implementation 'flash' is not known\. Known are: sdpa"),
            ({"kernel": "selfattn"}, r"'selfattn' is an operator of this package.* Use kernel='sdpa' or 'eager'\."),
            ({"kernel": "flex_attention"}, r"torch\.export cannot trace the block masks of 'flex_attention'"),
        ],
    )
    def test_options(self, options, rule, source, tmp_path):
        with pytest.raises(ValueError, match=rule):
            export(source, tmp_path / "out", **options)
        assert not os.listdir(tmp_path)

    def test_a_folder_that_holds_something(self, source, tmp_path):
        (tmp_path / "notes.txt").write_text("mine")
        for out in (tmp_path, tmp_path / "notes.txt"):
            with pytest.raises(FileExistsError, match="is there and not an empty folder"):
                export(source, out)
        assert os.listdir(tmp_path) == ["notes.txt"]

    @pytest.mark.parametrize("package", ["onnxscript", "onnxruntime"])
    def test_missing_packages(self, package, source, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(ImportError, match=f"needs {package}, which.* pip install onnx onnxscript onnxruntime"):
            export(source, tmp_path / "out")

    def test_a_folder_without_weights(self, source, tmp_path):
        AutoConfig.from_pretrained(source).save_pretrained(tmp_path / "config")
        with pytest.raises(FileNotFoundError, match="holds no weights"):
            export(tmp_path / "config", tmp_path / "out")

    def test_no_checkpoint(self, tmp_path):
        (tmp_path / "empty").mkdir()
        with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
            export(tmp_path / "empty", tmp_path / "out")

    def test_something_else(self, tmp_path):
        with pytest.raises(TypeError, match=r"got Linear\. A model with adapters: model\.merge_and_unload\(\) first"):
            export(torch.nn.Linear(2, 2), tmp_path / "out")

    def test_a_head_for_a_model(self, make_config, make_model, tmp_path):
        with pytest.raises(ValueError, match="head goes with a folder or a name, got 'base' with a model"):
            export(make_model(make_config()), tmp_path / "out", head="base")

    def test_a_model_of_others(self, tmp_path):
        config = AutoConfig.for_model("bert", hidden_size=8, num_attention_heads=2, num_hidden_layers=1, vocab_size=9)
        with pytest.raises(ValueError, match="it is a 'bert', and this exports models of ours"):
            export(transformers.AutoModel.from_config(config), tmp_path / "out")

    def test_a_model_with_memory(self, make_config, make_model, tmp_path):
        model = make_model(make_config(causal=True, position="rotary", memory_length=4))
        with pytest.raises(
            ValueError, match=r"a graph has no memory from one call to the next.*each text is read alone\)\.$"
        ):
            export(model, tmp_path / "out")

    def test_a_tokenizer_of_another_model(self, make_config, make_model, tmp_path):
        with pytest.raises(ValueError, match="The tokenizer does not fit the model"):
            export(make_model(make_config(vocab_size=7)), tmp_path / "out", tokenizer=tiny_tokenizer())


# Nothing is left of what went wrong


def test_a_head_without_weights(source, tmp_path):
    with pytest.raises(ValueError, match=r"no weights for classifier.*would be a random one\. Pass head='base'"):
        export(source, tmp_path / "out", head="token_classification")
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("wrong", [1e-3, float("nan")])
def test_a_graph_that_is_not_the_model(wrong, source, tmp_path, monkeypatch):
    def off(path):
        program = torch.export.load(path).module()
        return lambda **batch: {name: x + wrong if len(x) == 5 else x for name, x in program(**batch).items()}

    monkeypatch.setattr(export_module, "run_pt2", off)
    with pytest.raises(
        ValueError, match=r"the graph is not the model\. logits of a batch of shape \(5, 23\) differs by"
    ):
        export(source, tmp_path / "out", format="pt2")
    assert not os.listdir(tmp_path)


def test_a_model_that_torch_cannot_trace(source, tmp_path, monkeypatch):
    """The reason is what torch's error came from."""

    def fail(*args):
        raise RuntimeError("somewhere") from NotImplementedError("\nno such thing\nmore of it")

    monkeypatch.setattr(export_module, "trace", fail)
    rule = r"cannot export this model as 'onnx' with kernel 'sdpa'\. NotImplementedError: no such thing Try another"
    with pytest.raises(ValueError, match=rule):
        export(source, tmp_path / "out")
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("error", [OSError("No space left on device"), KeyboardInterrupt()])
def test_interrupted_it_leaves_nothing(error, source, tmp_path, monkeypatch):
    def fail(*args):
        raise error

    monkeypatch.setattr(export_module, "write_pt2", fail)
    with pytest.raises(type(error)):
        export(source, tmp_path / "out", format="pt2")
    assert not os.listdir(tmp_path)


class TestCommand:
    def test_what_it_says(self, source, tmp_path, capsys):
        assert main([str(source), str(tmp_path / "out"), "--format", "pt2", "--kernel", "eager"]) == 0
        told = capsys.readouterr().out
        assert "SelfAttnForMaskedLM: model.pt2" in told
        assert "kernel eager, float32" in told
        assert "inputs: input_ids, attention_mask (batch_size, sequence_length)" in told
        assert "outputs: logits" in told
        assert "(0.0001 allowed)" in told

    def test_what_it_refuses(self, source, tmp_path, capsys):
        assert main([str(source), str(tmp_path / "out"), "--kernel", "selfattn"]) == 1
        assert "ValueError: This model cannot be exported as 'onnx'" in capsys.readouterr().err
