"""Arguments of a script: a flat YAML recipe, and the command line on top of it.

python train/pretrain.py train/recipes/quickstart.yaml --learning_rate 2e-3
"""

import argparse
import difflib
import sys
from enum import Enum
from pathlib import Path

import yaml
from transformers import HfArgumentParser


def nearest(name, known):
    """A sentence that names the closest known names, or an empty string."""
    close = difflib.get_close_matches(str(name), [str(k) for k in known], n=3, cutoff=0.6)
    return f" Did you mean {' or '.join(repr(c) for c in close)}?" if close else ""


class _UniqueKeyLoader(yaml.SafeLoader):
    """PyYAML keeps the last of two equal keys in silence; a recipe that says two things is refused."""

    def construct_mapping(self, node, deep=False):
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise ValueError(f"A recipe gives each argument once, {key!r} stands twice{node.start_mark}.")
        return super().construct_mapping(node, deep)


def read_recipe(path):
    """The arguments in a recipe, as PyYAML reads them: one flat mapping from name to value."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"The first argument without '--' is a YAML recipe, and {str(path)!r} is not a file. "
            f"Pass the path of a recipe, or options that begin with '--'."
        )
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=_UniqueKeyLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"A recipe is YAML, and {str(path)!r} cannot be read as such: {error}") from error
    if not isinstance(values or {}, dict):
        raise ValueError(f"A recipe is a mapping of `argument: value`, {str(path)!r} holds a {type(values).__name__}.")
    return values or {}


def _one_value(name, value, action, where):
    if isinstance(value, bool) and action.choices and "no" in action.choices:
        value = "yes" if value else "no"  # YAML reads a bare `no` as False, `eval_strategy: no` means the word
    text = value.value if isinstance(value, Enum) else str(value)
    try:
        converted = action.type(text) if action.type else text
    except (ValueError, TypeError, argparse.ArgumentTypeError) as error:
        kind = getattr(action.type, "__name__", str(action.type)).replace("string_to_bool", "bool")
        raise ValueError(
            f"{where}: {name!r} must be readable as {kind}, got {value!r}. Change the value in the recipe."
        ) from error
    if action.choices and converted not in action.choices:
        raise ValueError(
            f"{where}: {name!r} is one of {list(action.choices)}, got {value!r}.{nearest(value, action.choices)}"
        )
    return text


def _recipe_as_options(values, parser, where):
    """Recipe values as command-line strings, so that both are converted by the same field types.

    PyYAML reads `1e-4` as a string and HfArgumentParser.parse_dict leaves it one; the road through argparse does not.
    """
    actions = {action.dest: action for action in parser._actions if action.option_strings and action.dest != "help"}
    options = []
    for name, value in values.items():
        if name not in actions:
            raise ValueError(
                f"{where}: {name!r} is not an argument of this script.{nearest(name, actions)} "
                f"Run the script with --help for all of them."
            )
        action = next(a for a in parser._actions if a.dest == name)
        if value is None:
            continue
        if isinstance(value, dict):
            raise ValueError(
                f"{where}: a recipe is flat, and {name!r} holds a mapping. "
                f"Write a JSON string in quotes where an argument takes one."
            )
        if isinstance(value, list):
            if action.nargs not in ("+", "*"):
                raise ValueError(f"{where}: {name!r} takes one value, got the list {value!r}.")
            options += [f"--{name}", *[_one_value(name, v, action, where) for v in value]]
        else:
            options.append(f"--{name}={_one_value(name, value, action, where)}")
    return options


def parse_arguments(dataclass_types, argv=None, description=None):
    """Instances of `dataclass_types`, from an optional recipe (first argument) and the command line, which wins.

    Raises:
        FileNotFoundError: if the recipe is not there.
        ValueError: for an unknown key or option (the nearest names are given), a value of the wrong type, a recipe
            that is not flat.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = HfArgumentParser(
        dataclass_types,
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        usage="%(prog)s [recipe.yaml] [options]",
    )
    options = []
    if argv and not argv[0].startswith("-"):
        recipe = argv.pop(0)
        options = _recipe_as_options(read_recipe(recipe), parser, f"Recipe {recipe}")
    *instances, unknown = parser.parse_args_into_dataclasses(
        args=options + argv, look_for_args_file=False, return_remaining_strings=True
    )
    if unknown:
        every = [option.lstrip("-") for action in parser._actions for option in action.option_strings]
        known = [option for option in every if "-" not in option]  # each has a spelling with "-" too
        name = unknown[0].lstrip("-").split("=")[0].replace("-", "_")
        raise ValueError(
            f"{unknown[0]!r} is not an argument of this script.{nearest(name, known)} "
            f"Run it with --help for all of them."
        )
    return instances
