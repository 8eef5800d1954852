import re
from dataclasses import dataclass, field

import pytest
from transformers import TrainingArguments

from hf_selfattn.tools.recipes import parse_arguments

from .train_scripts import ROOT, script


@dataclass
class Options:
    rate: float = 0.5
    count: int | None = None
    names: list[str] | None = None
    flag: bool = False
    kind: str = field(default="a", metadata={"choices": ["a", "b"]})
    overrides: str | None = None


@pytest.fixture
def parse(tmp_path):
    def parse(recipe, *options, types=Options):
        path = tmp_path / "recipe.yaml"
        path.write_text(recipe)
        return parse_arguments(types, [str(path), *options])[0]

    return parse


def test_values_are_converted_by_the_field_type(parse):
    options = parse('rate: 1e-4\ncount: "7"\nnames: [x, y]\nflag: yes\nkind: b\noverrides: "a=1,b=2"')
    assert options == Options(1e-4, 7, ["x", "y"], True, "b", "a=1,b=2")


def test_the_command_line_wins(parse):
    options = parse("rate: 0.1\nnames: [x, y]\nflag: true", "--rate", "0.2", "--names", "z", "--flag", "false")
    assert options == Options(rate=0.2, names=["z"], flag=False)


def test_null_is_the_default_and_an_empty_recipe_is_one(parse):
    assert parse("count: null") == parse("") == Options()


def test_without_a_recipe():
    assert parse_arguments(Options, ["--count", "3"])[0].count == 3


def test_no_is_a_word_where_a_word_is_wanted(parse, tmp_path):
    arguments = parse(f"eval_strategy: no\nsave_strategy: no\noutput_dir: {tmp_path}", types=TrainingArguments)
    assert arguments.eval_strategy == "no"


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("raet: 1", "'raet' is not an argument of this script. Did you mean 'rate'"),
        ("rate: fast", "'rate' must be readable as float, got 'fast'"),
        ("count: 1.5", "'count' must be readable as int, got 1.5"),
        ("kind: c", r"'kind' is one of \['a', 'b'\], got 'c'"),
        ("rate: {a: 1}", "a recipe is flat, and 'rate' holds a mapping"),
        ("rate: [1, 2]", r"'rate' takes one value, got the list \[1, 2\]"),
        ("rate: 1\nrate: 2", "gives each argument once, 'rate' stands twice"),
        ("- rate", "a mapping of `argument: value`, .* holds a list"),
        ("rate: [1", "cannot be read as such"),
    ],
)
def test_a_bad_recipe_is_refused(parse, recipe, message):
    with pytest.raises(ValueError, match=message):
        parse(recipe)


def test_a_recipe_that_is_not_there():
    with pytest.raises(FileNotFoundError, match=re.escape("'none.yaml' is not a file")):
        parse_arguments(Options, ["none.yaml"])


def test_an_unknown_option_gets_the_nearest_name():
    with pytest.raises(ValueError, match=r"'--coutn' is not an argument of this script. Did you mean 'count'\?"):
        parse_arguments(Options, ["--coutn", "3"])


@pytest.mark.parametrize("path", sorted((ROOT / "train" / "recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_shipped_recipes_are_read_by_the_script_they_name(path, tmp_path):
    name = re.search(r"train/(\w+)\.py train/recipes/" + path.name, path.read_text()).group(1)
    module = script(name)
    types = {
        "pretrain": ("SourceArguments", "ModelArguments", "PretrainingArguments", "PretrainingScriptArguments"),
        "finetune": ("SourceArguments", "ModelArguments", "TaskArguments", "FinetuningArguments"),
    }[name]
    *_, training = parse_arguments([getattr(module, t) for t in types], [str(path), "--output_dir", str(tmp_path)])
    assert training.learning_rate > 0
