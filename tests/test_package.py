"""The package as a whole: what importing it needs and brings, and the rules that let its files travel with a model."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import transformers
from transformers.dynamic_module_utils import get_relative_imports

import hf_selfattn

ROOT = Path(hf_selfattn.__file__).parent
ROOT_FILES = sorted(ROOT.glob("*.py"))
TRAVELLING = [file for file in ROOT_FILES if file.name != "__init__.py"]

# What train/ and hf_selfattn.tools may import, and transformers where it is there (yaml it needs itself).
ABSENT = [
    "accelerate",
    "datasets",
    "evaluate",
    "jinja2",
    "matplotlib",
    "pandas",
    "peft",
    "PIL",
    "pyarrow",
    "pytest",
    "scipy",
    "seqeval",
    "sentence_transformers",
    "sklearn",
]

# Importing these takes longer than all of ours.
HEAVY = [
    *ABSENT,
    "sympy",
    "torch._dynamo",
    "torch._inductor",
    "torch.distributed.tensor",
    "torch.nn.attention.flex_attention",
    "torch.onnx",
    "torch.utils.tensorboard",
    "torchvision",
    "transformers.generation.utils",
    "transformers.pipelines",
    "transformers.trainer",
    "triton",
    "hf_selfattn.tools",
]


def run(code, *arguments):
    """Runs `code` in a fresh interpreter that finds the package, and returns what it printed as JSON last."""
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT.parent,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


WITHOUT = """
import json, sys
from importlib.machinery import PathFinder

absent, folder = json.loads(sys.argv[1]), sys.argv[2]

class Finder(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.split(".")[0] in absent else super().find_spec(name, path, target)

sys.meta_path = [Finder if finder is PathFinder else finder for finder in sys.meta_path]

import torch
import hf_selfattn
from hf_selfattn import SelfAttnConfig, SelfAttnForMaskedLM

sizes = dict(vocab_size=29, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
model = SelfAttnForMaskedLM(SelfAttnConfig(**sizes))
ids = torch.tensor([[1, 2, 3]])
model(ids, labels=ids).loss.backward()
model.save_pretrained(folder)
again = SelfAttnForMaskedLM.from_pretrained(folder)
same = bool((again.eval()(ids).logits == model.eval()(ids).logits).all())
print(json.dumps({"same": same, "imported": sorted(set(absent) & set(sys.modules))}))
"""


def test_torch_and_transformers_are_enough(tmp_path):
    assert run(WITHOUT, json.dumps(ABSENT), str(tmp_path)) == {"same": True, "imported": []}


NEWLY_IMPORTED = """
import json, sys
import torch
from transformers import AutoModel, PreTrainedModel  # in 5.17 AutoModel brings scikit-learn where it is there

before = set(sys.modules)
import hf_selfattn

print(json.dumps(sorted(set(sys.modules) - before)))
"""


def test_importing_brings_nothing_heavy():
    new = run(NEWLY_IMPORTED)
    heavy = [name for name in new if any(name == root or name.startswith(f"{root}.") for root in HEAVY)]
    assert heavy == []
    assert {name.split(".")[0] for name in new} <= {
        "hf_selfattn",
        "transformers",
        "tokenizers",
    } | sys.stdlib_module_names


def imports_of(file):
    """(level, module) of each `from … import …`, and (0, module) of each `import …`, anywhere in a file."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from ((0, alias.name) for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            yield node.level, node.module


@pytest.mark.parametrize("file", ROOT_FILES, ids=lambda file: file.name)
class TestFiles:
    def test_at_most_400_lines(self, file):
        assert len(file.read_text().splitlines()) <= 400

    def test_has_a_docstring(self, file):
        assert ast.get_docstring(ast.parse(file.read_text()))

    def test_annotations_are_evaluated(self, file):
        assert (0, "__future__") not in set(imports_of(file))

    def test_imports_only_torch_and_transformers(self, file):
        allowed = {"torch", "transformers", "huggingface_hub"} | sys.stdlib_module_names
        assert {module.split(".")[0] for level, module in imports_of(file) if level == 0} <= allowed

    def test_imports_nothing_that_stays_behind(self, file):
        siblings = {other.stem for other in TRAVELLING} | ({None} if file.name == "__init__.py" else set())
        assert {(level, module) for level, module in imports_of(file) if level} <= {(1, name) for name in siblings}


@pytest.mark.parametrize("file", TRAVELLING, ids=lambda file: file.name)
def test_transformers_reads_the_same_relative_imports_as_python(file):
    """transformers finds them with a regular expression, which a line of a docstring can mislead."""
    assert set(get_relative_imports(file)) == {module for level, module in imports_of(file) if level}


def test_imports_point_one_way():
    """No file imports, however far round, what imports it; what is lower in the list imports nothing above it."""
    graph = {file.stem: {module for level, module in imports_of(file) if level} for file in TRAVELLING}
    order = [
        "modeling_selfattn",
        "heads_text",
        "encoder",
        "layers",
        "attention",
        "kernels",
        "scores",
        "masks",
        "packing",
    ]

    def reached(name, seen=()):
        assert name not in seen, f"{' -> '.join((*seen, name))} is a circle"
        return {name}.union(*(reached(other, (*seen, name)) for other in graph[name]))

    below = {name: reached(name) for name in graph}
    for i, lower in enumerate(order):
        assert not below[lower] & set(order[:i]), f"{lower} imports what stands above it"


def test_every_travelling_file_is_reached_from_the_auto_map():
    entries = {path.split(".")[0] for path in hf_selfattn.AUTO_MAP.values()}
    reached = set(entries)
    while new := {m for name in reached for m in get_relative_imports(ROOT / f"{name}.py")} - reached:
        reached |= new
    assert reached == {file.stem for file in TRAVELLING}


def test_every_public_name_exists():
    assert [name for name in hf_selfattn.__all__ if not hasattr(hf_selfattn, name)] == []
    assert len(set(hf_selfattn.__all__)) == len(hf_selfattn.__all__)


def test_every_public_object_is_documented():
    objects = [getattr(hf_selfattn, name) for name in hf_selfattn.__all__ if not name.isupper()]
    assert [o.__name__ for o in objects if not o.__doc__] == []


def test_every_head_is_public_and_in_the_auto_map():
    heads = {name for name in hf_selfattn.__all__ if name.startswith("SelfAttnFor")} | {"SelfAttnModel"}
    classes = {path.split(".")[1] for path in hf_selfattn.AUTO_MAP.values()}
    assert classes == heads | {"SelfAttnConfig"}


@pytest.mark.parametrize("auto_class", sorted(set(hf_selfattn.AUTO_MAP) - {"AutoConfig"}))
def test_auto_class_knows_the_model(auto_class):
    path = hf_selfattn.AUTO_MAP[auto_class]
    cls = getattr(hf_selfattn, path.split(".")[1])
    config = hf_selfattn.SelfAttnConfig(vocab_size=29, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    assert type(getattr(transformers, auto_class).from_config(config)) is cls
    assert f"{cls.__module__}.{cls.__name__}" == f"hf_selfattn.{path}"


def test_auto_config_knows_the_model_type():
    config = transformers.AutoConfig.for_model("selfattn", hidden_size=24)
    assert type(config) is hf_selfattn.SelfAttnConfig
    assert config.hidden_size == 24
