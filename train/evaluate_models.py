r"""Evaluate masked language models, side by side: ours, or any of transformers.

    python train/evaluate_models.py --model_name_or_path runs/mine google-bert/bert-base-cased --output_dir runs/scores
    python train/evaluate_models.py --model_name_or_path runs/mine --output_dir runs/scores --parts masked_lm \
        --validation_file held_out.txt
    python train/evaluate_models.py --model_name_or_path runs/mine --output_dir runs/scores --parts blimp \
        --max_pairs_per_paradigm 100 --dtype bfloat16
    python train/evaluate_models.py --model_name_or_path runs/mine runs/other --output_dir runs/scores --parts suite \
        --from_scratch

Parts: masked_lm (loss, accuracy and bits per byte on a fixed text with fixed masks), blimp (grammar, by
pseudo-log-likelihood), suite (fine-tuning on the recipes of train/recipes/suite, three seeds). A recipe is a flat YAML
file of the same options; the command line wins. Tables are printed and written to evaluation.md, all numbers to
evaluation.json. What is done stands in results.jsonl: the same command goes on where it was stopped.
"""

import json
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from finetune import FinetuningArguments, make_task, sampled
from finetune import main as finetune
from transformers import AutoConfig, AutoModelForMaskedLM
from transformers.utils import logging

import hf_selfattn  # noqa: F401  registers the model with the Auto classes
from hf_selfattn.tools.baselines import baselines_of_task
from hf_selfattn.tools.blimp import blimp_metrics, first_of_each_paradigm, load_blimp
from hf_selfattn.tools.blimp_published import PUBLISHED
from hf_selfattn.tools.card import hash_of_rows
from hf_selfattn.tools.evaluation import DTYPES, EvaluationArguments, open_masked_lm, read_texts
from hf_selfattn.tools.evaluation_masked import check_readable, masked_token_metrics, masked_word_metrics
from hf_selfattn.tools.evaluation_results import Results, blimp_table, identity_of_model, masked_table, suite_table
from hf_selfattn.tools.evaluation_suite import SuiteModel, metric_of, read_suite, run_suite
from hf_selfattn.tools.fast_defaults import accelerator_available, bf16_in_hardware, keep_memory
from hf_selfattn.tools.opening import ModelArguments, check_source_of_model
from hf_selfattn.tools.recipes import parse_arguments, read_recipe
from hf_selfattn.tools.sources import SourceArguments, load_source
from hf_selfattn.tools.tasks import TaskArguments
from hf_selfattn.tools.tokenizer import check_tokenizer, open_tokenizer

RECIPES = Path(__file__).parent / "recipes" / "suite"


class Measure(NamedTuple):
    """`function(model, tokenizer, rows, **options)`, by the part that it belongs to."""

    function: Callable
    part: str
    rows: Any
    options: dict


def measure_pretrained(arguments, data, results):
    """{model: scores} of the parts masked_lm and blimp."""
    how = {"dtype": DTYPES[arguments.dtype], "tokens_per_batch": arguments.tokens_per_batch}
    if arguments.disable_tqdm:
        how["progress"] = None
    masks = {"mlm_probability": arguments.mlm_probability, "seed": arguments.seed}
    measures = {}
    if "masked_lm" in data:
        texts = data["masked_lm"]["text"][:]
        tokens, words = {"max_seq_length": arguments.max_seq_length}, {"window_bytes": arguments.window_bytes}
        measures["masked_tokens"] = Measure(masked_token_metrics, "masked_lm", texts, {**masks, **tokens})
        measures["masked_words"] = Measure(masked_word_metrics, "masked_lm", texts, {**masks, **words})
    if "blimp" in data:
        measures["blimp"] = Measure(blimp_metrics, "blimp", data["blimp"], {})
    hashes = {part: hash_of_rows(rows) for part, rows in data.items()}
    keys, scores = {}, {}
    for name in arguments.model_name_or_path:
        check_source_of_model(model_arguments(name, arguments))
        about = {"model": name, "identity": identity_of_model(name, trust_remote_code=arguments.trust_remote_code)}
        about |= {"attn_implementation": arguments.attn_implementation} if arguments.attn_implementation else {}
        keys[name] = {
            what: {"part": what, **about, "data": hashes[measure.part], "dtype": arguments.dtype, **measure.options}
            for what, measure in measures.items()
        }
        if any(key not in results for key in keys[name].values()):
            check_model(name, arguments, data["masked_lm"]["text"][:] if "masked_lm" in data else None)
    for name, of_model in keys.items():
        opened, scores[name] = None, {}
        for what, key in of_model.items():
            measure = measures[what]
            if key not in results:
                opened = opened or open_for(name, arguments)
                results[key] = measure.function(*opened, measure.rows, **measure.options, **how)
            scores[name][what] = results[key]
    return scores


def model_arguments(name, arguments):
    options = {option: getattr(arguments, option) for option in ("attn_implementation", "trust_remote_code")}
    return ModelArguments(model_name_or_path=name, **options)


def check_model(name, arguments, texts):
    """Refuse a model that cannot be measured before the first one is, without reading its weights.

    Args:
        texts: of masked_lm; None where that is not asked for.
    """
    options = {"trust_remote_code": arguments.trust_remote_code}
    config, tokenizer = AutoConfig.from_pretrained(name, **options), open_tokenizer(name, **options)
    check_tokenizer(tokenizer, config, name, masks=True)
    if texts is not None:
        check_readable(tokenizer, config, texts, arguments.max_seq_length, arguments.window_bytes, name)
    if arguments.attn_implementation:
        options["attn_implementation"] = arguments.attn_implementation
    try:
        _, found = AutoModelForMaskedLM.from_pretrained(name, device_map="meta", output_loading_info=True, **options)
        opens = not found["missing_keys"]
    except Exception:  # also of other people's code that runs on a real device alone
        opens = False
    if not opens:
        open_masked_lm(model_arguments(name, arguments))  # says what is wrong


def open_for(name, arguments):
    model, tokenizer = open_masked_lm(model_arguments(name, arguments))
    device = torch.accelerator.current_accelerator() if accelerator_available() else "cpu"
    return model.to(device), tokenizer


def data_of(recipe):
    """(options of the task, DatasetDict, where it is from, seed) of a finished recipe file."""
    source, _, options, training = parse_arguments(
        [SourceArguments, ModelArguments, TaskArguments, FinetuningArguments], [recipe]
    )
    return options, load_source(source, training.seed), source, training.seed


def hash_of_data(recipe):
    return {split: hash_of_rows(rows) for split, rows in data_of(recipe)[1].items()}


def baselines_of(recipe):
    """{name: score} on the task of a finished recipe file."""
    options, splits, source, seed = data_of(recipe)
    task = make_task(options, splits)
    splits = sampled(splits, source, seed)
    metric = metric_of(read_recipe(recipe))
    return baselines_of_task(task, splits["train"], splits["validation"], metric)


def fine_tuning(arguments, suite, results):
    code = {"trust_remote_code": arguments.trust_remote_code}
    names = arguments.model_name_or_path
    models = [SuiteModel(name, name, identity_of_model(name, **code)) for name in names]
    if arguments.from_scratch:
        fresh = identity_of_model(names[0], weights=False, **code)
        models.append(SuiteModel(f"{names[0]} from scratch", names[0], fresh, from_scratch=True))
    for recipe in suite.values():  # said, so that it stands by the results, and one machine's never count for another
        if not recipe.keys() & {"bf16", "fp16"}:
            recipe["bf16"] = bf16_in_hardware(recipe.get("use_cpu") or not accelerator_available())[0]
    seeds = range(arguments.seed, arguments.seed + arguments.num_seeds)
    folder = Path(arguments.output_dir, "suite")
    show = not arguments.disable_tqdm
    return run_suite(finetune, baselines_of, hash_of_data, suite, models, seeds, results, folder, show)


def main(argv=None):
    (arguments,) = parse_arguments([EvaluationArguments], argv, __doc__)
    logging.set_verbosity_error()
    keep_memory()
    # All data are read before the first model, so that what is not there is said at once.
    data = {"masked_lm": read_texts(arguments)} if "masked_lm" in arguments.parts else {}
    if "blimp" in arguments.parts:
        data["blimp"] = first_of_each_paradigm(load_blimp(arguments.blimp), arguments.max_pairs_per_paradigm)
    suite = {}
    if "suite" in arguments.parts:
        recipes = arguments.suite_recipes or [RECIPES]
        suite = read_suite(recipes, arguments.suite_tasks, arguments.suite_data, arguments.overrides_of_suite)
    folder = Path(arguments.output_dir)
    results = Results(folder / "results.jsonl")
    scores = measure_pretrained(arguments, data, results)
    suite = fine_tuning(arguments, suite, results) if suite else {}
    tables = [masked_table(scores)] if "masked_lm" in data else []
    blimp = {name: [of_model["blimp"]] for name, of_model in scores.items() if "blimp" in data}
    tables += [blimp_table(blimp)] if blimp else []
    tables += [suite_table(suite)] if suite else []
    pages = [*tables, *([blimp_table(blimp, paradigms=True)] if blimp else [])]
    (folder / "evaluation.md").write_text("\n\n".join(pages) + "\n", encoding="utf-8")
    found = {"models": scores, "suite": suite, "published_blimp": PUBLISHED, "command": shlex.join(sys.argv),
             "arguments": vars(arguments), "made_by": results.made_by()}  # fmt: skip
    (folder / "evaluation.json").write_text(json.dumps(found, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    print("\n\n".join([*tables, f"Written to {folder}: evaluation.json, evaluation.md."]))
    return found


if __name__ == "__main__":
    main()
