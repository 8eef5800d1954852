"""A recipe before it is run: the script's own road up to the Trainer, on a sample of the data, and its budget.

A recipe with `task` belongs to finetune.py, others to pretrain.py; the doctor reads arguments, data and model with the
functions of that script, and writes nothing but a temporary folder.
"""

import importlib.util
import math
import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForMaskedLM

from .doctor_examination import Examination, Finding, error, warning
from .doctor_opening import garbage_is_nan, head_of_checkpoint
from .opening import ModelArguments, check_source_of_model, open_config, open_model, prepare_tokenizer
from .packed_rows import PackedRows, PackingCollator, choose_packing
from .plan import GIB, plan_pretraining
from .recipes import parse_arguments, read_recipe
from .sources import SourceArguments, load_source, take
from .training import Rows
from .windows import check_token_ids, window_length

SAMPLE = 1000
"""Rows of each split that are tokenised."""

COLUMNS = ("text_columns", "word_column", "question_column", "context_column", "choice_columns")
"""Attributes of tasks that name columns with text."""

SCRIPTS = Path(__file__).parent.parent.parent / "train"


@dataclass
class Recipe:
    """What a script was asked for.

    Attributes:
        training: its TrainingArguments.
        model_arguments, arguments: ModelArguments, and those of its data or task.
        length: tokens in a row; None before the tokenizer is open.
        long_texts: what is done with longer ones.
        rows: training rows in all, those of packed texts estimated from the sample; None for a stream.
        batch: the first of training, of few rows.
    """

    training: object
    model_arguments: ModelArguments
    arguments: object
    length: int | None = None
    long_texts: str = "split"
    rows: int | None = None
    batch: dict | None = None

    @property
    def rows_per_step(self):
        of_device = self.training.per_device_train_batch_size * self.training.gradient_accumulation_steps
        return of_device * max(1, self.training.world_size)

    @property
    def steps(self):
        """Optimizer steps; None where a budget of tokens or minutes, or a stream, leaves them open."""
        if getattr(self.training, "max_tokens", None) or getattr(self.training, "max_minutes", None):
            return None
        if self.training.max_steps > 0:
            return self.training.max_steps
        return self.rows and math.ceil(self.rows / self.rows_per_step) * math.ceil(self.training.num_train_epochs)


def _script(name, folder=SCRIPTS):
    path = Path(folder, f"{name}.py")
    if not path.is_file():
        raise FileNotFoundError(
            f"A recipe is examined with the script that it is for, and {str(path)!r} is not there. Run the doctor "
            "from a checkout of hf_selfattn, or pass --scripts FOLDER, where pretrain.py and finetune.py are."
        )
    spec = importlib.util.spec_from_file_location(f"hf_selfattn_doctor_{name}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for their module
    spec.loader.exec_module(module)
    return module


def open_recipe(path, scripts=None):
    """An Examination of a recipe. Where the script would stop, so does the opening, with a finding.

    Raises:
        OSError: the recipe, or the script that it is for, is not there.
        ValueError: it is no flat YAML.
    """
    is_task = "task" in read_recipe(path)
    script = _script("finetune" if is_task else "pretrain", scripts or SCRIPTS)
    examination = Examination(str(path))
    try:
        with tempfile.TemporaryDirectory() as folder:
            (_follow_finetuning if is_task else _follow_pretraining)(examination, script, str(path), folder)
    except Exception as refusal:
        what = f"The script stops at this recipe: {refusal}"
        remedy = "Do what the message says; what comes after it was not examined."
        examination.troubles.append(Finding("error", "recipe", what, remedy))
        examination.config = examination.tokenizer = examination.model = None  # half made
    return examination


def _begin(examination, training, model_arguments, arguments, folder):
    training.output_dir = folder
    examination.recipe = Recipe(training, model_arguments, arguments)
    examination.trust_remote_code = model_arguments.trust_remote_code
    check_source_of_model(model_arguments)


def _follow_pretraining(examination, script, path, folder):
    kinds = [SourceArguments, ModelArguments, script.PretrainingArguments, script.PretrainingScriptArguments]
    source, model_arguments, arguments, training = parse_arguments(kinds, [path])
    _begin(examination, training, model_arguments, arguments, folder)
    examination.recipe.long_texts = arguments.long_texts
    script.check_choice(arguments.long_texts)
    script.check_first_values(arguments, model_arguments, source)
    script.check_rate_end(arguments.mlm_probability_end, training, source.streaming)
    if source.streaming:
        script.check_training(training)
    documents, splits, column = script.open_documents(source, arguments, training)
    examination.data, examination.text_columns = splits, [column]
    few = {split: take(rows, SAMPLE, training.seed) for split, rows in splits.items()}
    examination.tokenizer = prepare_tokenizer(model_arguments, training, iter(few["train"][column]))
    examination.config = config = open_config(model_arguments, examination.tokenizer)
    packing = choose_packing(arguments.packing, config, training)
    examination.recipe.length = length = window_length(arguments.max_seq_length, examination.tokenizer, config)
    _open(examination, AutoModelForMaskedLM, masks=True)
    made = script.prepare_rows(few, column, examination.tokenizer, length, arguments, config.vocab_size, packing)
    rows, collator, _ = script.prepare_training_data(
        made["train"], None, examination.tokenizer, length, packing, arguments, source, training
    )
    _first_batch(examination, rows, collator, None if documents else len(splits["train"]) / len(few["train"]))


def _follow_finetuning(examination, script, path, folder):
    kinds = [SourceArguments, ModelArguments, script.TaskArguments, script.FinetuningArguments]
    source, model_arguments, arguments, training = parse_arguments(kinds, [path])
    _begin(examination, training, model_arguments, arguments, folder)
    splits = load_source(source, training.seed)
    task = script.make_task(arguments, splits)
    examination.recipe.long_texts = task.how_long
    examination.data = splits = script.sampled(splits, source, training.seed)
    columns = [getattr(task, name) for name in COLUMNS if hasattr(task, name)]
    examination.text_columns = [name for given in columns for name in ([given] if isinstance(given, str) else given)]
    examination.label_column = task.label_column
    few = {split: take(rows, SAMPLE, training.seed) for split, rows in splits.items()}
    examination.tokenizer = prepare_tokenizer(model_arguments, training, task.texts(few["train"]))
    examination.config = config = open_config(model_arguments, examination.tokenizer, **task.config_changes())
    packing = choose_packing(arguments.packing, config, training, *task.no_packing)
    examination.recipe.length = length = window_length(arguments.max_seq_length, examination.tokenizer, config)
    encoder = task.encoder(examination.tokenizer, config, length)
    _open(examination, task.auto_class)
    features = task.features(few["train"], encoder)
    check_token_ids(features, config.vocab_size)
    rows, collator = Rows(features), task.collator(examination.tokenizer)
    if packing:
        rows, collator = PackedRows(rows, length, training.seed), PackingCollator(collator, length)
    _first_batch(examination, rows, collator, len(splits["train"]) / len(few["train"]))


def _open(examination, auto_class, masks=False):
    model_arguments = examination.recipe.model_arguments
    with garbage_is_nan(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(examination.recipe.training.seed)
        model = open_model(auto_class, model_arguments, examination.config, examination.tokenizer, masks=masks)
    examination.model, examination.kernel = model.eval(), model_arguments.attn_implementation
    examination.config.architectures = [type(model).__name__]
    examination.head = head_of_checkpoint(examination.config)


def _first_batch(examination, rows, collator, share):
    """Args: share: training texts for each sampled one; None for a stream."""
    examination.recipe.rows = None if share is None else round(len(rows) * share)
    examination.recipe.batch = collator(rows.__getitems__(list(range(min(4, len(rows))))))


def check_batch(examination):
    """The first batch of the script has a loss."""
    batch = examination.recipe.batch
    if "labels" in batch and not (batch["labels"] != -100).any():
        yield error(
            "No token and no row of the first batch has a label (-100 throughout).",
            "Look at the label column, and at max_seq_length: a label may stand beyond the end of its row.",
        )
        return
    loss = examination.model(**batch).loss
    if not loss.isfinite():
        yield error(
            f"The first batch has the loss {float(loss)}.",
            "Look at its labels and at the model's weights, and lower the precision's demands (fp32).",
        )


def check_steps(examination):
    """Warm-up, evaluation and passes over the data go with the number of steps."""
    recipe, training = examination.recipe, examination.recipe.training
    steps = recipe.steps
    if recipe.rows is not None and recipe.rows < recipe.rows_per_step:
        yield warning(
            f"The {recipe.rows} training rows are less than one step's {recipe.rows_per_step}.",
            "Lower per_device_train_batch_size or gradient_accumulation_steps.",
        )
    if steps is None:
        return
    warmup = training.get_warmup_steps(steps)
    if warmup >= steps:
        yield error(
            f"The warm-up is {warmup} steps and the training {steps}: the learning rate never arrives.",
            "Lower warmup_steps (below 1 it is a share of the training), or raise max_steps.",
        )
    if training.eval_strategy == "steps" and training.eval_steps and training.eval_steps > steps:
        yield warning(
            f"eval_steps is {training.eval_steps:g} and the training {steps} steps: nothing is evaluated before "
            "its end.",
            "Lower eval_steps.",
        )
    passes = steps * recipe.rows_per_step / recipe.rows if recipe.rows else 0
    if passes > 40:
        yield warning(
            f"Each training row is read {passes:.0f} times in {steps} steps; beyond 40 times nothing is gained "
            "(Muennighoff et al. 2023, arXiv:2305.16264).",
            "Lower max_steps or num_train_epochs, or add data.",
        )


def check_learning_rate(examination):
    """The learning rate is one that AdamW can use with such a model."""
    recipe = examination.recipe
    rate, most = recipe.training.learning_rate, 1e-2 if recipe.model_arguments.model_name_or_path is None else 2e-3
    if not 1e-7 <= rate <= most:
        kind = "a new model" if recipe.model_arguments.model_name_or_path is None else "a trained model"
        yield warning(
            f"The learning rate is {rate:g}; for {kind} AdamW's are between 1e-7 and {most:g}.",
            "Begin with 1e-3 for a small new model, 1e-4 for a large one, 5e-5 for a trained one.",
        )


def check_memory(examination):
    """Weights, gradients, optimizer and activations fit into the device, by the estimate of --dry_run."""
    recipe = examination.recipe
    if not hasattr(recipe.training, "max_tokens"):
        return  # the plan is of masked language models
    plan = plan_pretraining(recipe.model_arguments, recipe.arguments, recipe.training)
    device, needed = recipe.training.device, sum(plan.memory.values())
    if device.type == "cuda":
        there = torch.cuda.get_device_properties(device).total_memory
    else:
        there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > there:
        yield error(
            f"The training needs about {needed / GIB:.0f} GiB, and {device} has {there / GIB:.0f}.",
            "Lower per_device_train_batch_size and raise gradient_accumulation_steps, set "
            "gradient_checkpointing, or make the model smaller.",
        )
