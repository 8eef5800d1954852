"""Fine-tuning on a suite of tasks: each model, task and seed once, medians over the seeds, baselines beside them.

A task is a recipe of finetune.py in a folder, named by its file. The model at the end of the training is judged on the
validation data; none of a run's epochs is chosen by them. Every model gets the same recipe and, by seed, the same
examples in the same order.
"""

import shutil
import statistics
from collections import defaultdict
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import yaml
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoModelForMaskedLM, set_seed

from .opening import parse_overrides
from .recipes import nearest, read_recipe
from .scoring import METRICS, check_metric
from .tokenizer import open_tokenizer, save_tokenizer


class SuiteModel(NamedTuple):
    """A model of the comparison.

    Attributes:
        label: what it is called.
        path: the checkpoint, or (with `from_scratch`) where configuration and tokenizer come from.
        identity: `identity_of_model`.
        from_scratch: whether training begins with fresh weights.
    """

    label: str
    path: str
    identity: str
    from_scratch: bool = False


def read_suite(folders, names=None, data=None, overrides=None):
    """{task: recipe} of the recipes in some folders.

    Args:
        folders: list of them.
        names: tasks to keep; None: all.
        data: a folder with a data set for each task, by its name, in the place of those on the Hub.
        overrides: "name=value,name=value", for all recipes.

    Raises:
        FileNotFoundError: no recipe in a folder, no data set of a task in `data`.
        ValueError: two recipes of one name; an unknown task; a recipe without a kind of task, or with a metric that is
            none of its kind; an override of what the suite decides.
    """
    recipes, origin = {}, {}
    for folder in folders:
        found = {path.stem: read_recipe(path) for path in sorted(Path(folder).glob("*.yaml"))}
        if not found:
            raise FileNotFoundError(f"--suite_recipes {str(folder)!r} holds no recipe (*.yaml). Name folders that do.")
        for name in found:
            if name in origin:
                raise ValueError(
                    f"A task of the suite has one recipe, and {name!r} is in --suite_recipes {str(origin[name])!r} "
                    f"and {str(folder)!r}. Rename one of the files, or leave one folder out."
                )
            origin[name] = folder
        recipes |= found
    for name in names or ():
        if name not in recipes:
            raise ValueError(f"--suite_tasks are {', '.join(recipes)}, got {name!r}.{nearest(name, recipes)}")
    changes = parse_overrides(overrides, "--suite_overrides")
    for name in ("seed", "model_name_or_path", "output_dir"):
        if name in changes:
            raise ValueError(f"--suite_overrides: the suite sets {name!r} itself for each run. Leave it out.")
    suite = {}
    for name in names or recipes:
        recipe = {**recipes[name], **changes}
        kind = recipe.get("task")
        if kind not in METRICS:
            raise ValueError(
                f"A recipe of the suite says its task, one of {', '.join(METRICS)}; {name!r} has {kind!r}."
            )
        check_metric(metric_of(recipe), dict.fromkeys(chain(*METRICS[kind])), f"{name!r} ({kind})")
        if data is not None:
            path = Path(data, name)
            if not path.is_dir():
                raise FileNotFoundError(
                    f"--suite_data holds a folder for each task, and {str(path)!r} is none. Leave {name} out with "
                    "--suite_tasks, or --suite_data for data sets from the Hub."
                )
            recipe = {**recipe, "dataset_name": str(path.resolve()), "dataset_config_name": None}
        suite[name] = recipe
    return suite


def metric_of(recipe):
    """By which a task is reported: its recipe's `metric_for_best_model`, or the usual one of its kind."""
    named = recipe.get("metric_for_best_model")
    return METRICS[recipe["task"]][0][0] if named in (None, "task") else str(named).removeprefix("eval_")


def fresh_weights(model, seed, folder, **code):
    """A checkpoint with new weights, drawn by the seed, in the configuration of `model`; returns its path."""
    path = Path(folder, f"from-scratch-seed-{seed}")
    set_seed(seed)
    config = AutoConfig.from_pretrained(model.path, **code)
    AutoModelForMaskedLM.from_config(config, **code).save_pretrained(path)
    save_tokenizer(open_tokenizer(model.path, **code), path)
    return str(path)


def run_suite(finetune, baselines, hash_of_data, suite, models, seeds, results, folder, show=True):
    """Fine-tunes every model on every task with every seed, and writes each result as soon as it is there.

    Baselines come first, because they read all data: what is not there or does not fit is said before a model is
    trained.

    Args:
        finetune: the script's `main([recipe file])`, which returns the scores of the validation data.
        baselines: function of a recipe file that returns {name: score}.
        hash_of_data: function of a recipe file that returns what changes with its examples.
        suite: of `read_suite`.
        models: list of SuiteModel.
        results: evaluation_results.Results; what is in it is not done again.
        folder: where recipes of the runs are written (`finetune.py RECIPE` repeats one of a model that is kept); the
            fine-tuned models and fresh weights are deleted.

    Returns:
        {task: {"metric", "models": {label: {"values", "median", "lowest", "highest"}}, "baselines", "recipe"}},
        scores from 0 (correlations: -1) to 1.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    found = {task: {"metric": metric_of(recipe), "models": defaultdict(list)} for task, recipe in suite.items()}
    about = {}
    for task, scores in found.items():
        recipe = _write_recipe(folder / f"{task}-baselines.yaml", suite[task])
        options = {name: x for name, x in suite[task].items() if name not in ("dataset_name", "dataset_config_name")}
        about[task] = {"task": task, "recipe": options, "data": hash_of_data(recipe)}  # wherever they are
        key = {"part": "baselines", **about[task]}
        if key not in results:
            results[key] = baselines(recipe)
        scores |= {"baselines": results[key], "recipe": options}
    runs = [(seed, task, model) for seed in seeds for task in suite for model in models]
    for seed, task, model in tqdm(runs, desc="fine-tuning", unit=" runs", disable=not show):
        key = {"part": "suite", **about[task], "seed": seed, "model": model.label, "identity": model.identity}
        if key not in results:
            scores = _fine_tuned(finetune, suite[task], task, model, seed, folder)
            results[key] = {name: value for name, value in scores.items() if isinstance(value, int | float)}
        value = results[key][f"eval_{found[task]['metric']}"]
        value /= 100 if suite[task]["task"] == "question-answering" else 1
        found[task]["models"][model.label].append(value)
    for scores in found.values():
        scores["models"] = {label: median_and_range(values) for label, values in scores["models"].items()}
    return found


def median_and_range(values):
    return {"values": values, "median": statistics.median(values), "lowest": min(values), "highest": max(values)}


def _write_recipe(path, recipe):
    recipe = {name: value for name, value in recipe.items() if value is not None}
    recipe.setdefault("output_dir", str(path.with_suffix("")))
    path.write_text(yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True), encoding="utf-8")
    return str(path)


def _fine_tuned(finetune, recipe, task, model, seed, folder):
    code = {"trust_remote_code": recipe.get("trust_remote_code", False)}
    start = fresh_weights(model, seed, folder, **code) if model.from_scratch else model.path
    kind = "-from-scratch" if model.from_scratch else ""
    output = folder / f"{task}-{model.identity[:8]}{kind}-seed-{seed}"
    own = {"model_name_or_path": start, "seed": seed, "output_dir": str(output), "overwrite_output_dir": True}
    try:
        return finetune([_write_recipe(folder / f"{output.name}.yaml", {**recipe, **own})])
    finally:
        shutil.rmtree(output, ignore_errors=True)
        if model.from_scratch:
            shutil.rmtree(start, ignore_errors=True)
