r"""Fine-tune an encoder, or train one from scratch, on a task.

    python train/finetune.py train/recipes/quickstart-finetune.yaml
    python train/finetune.py --task text-classification --dataset_name FOLDER_OR_NAME --baselines \
        --model_name_or_path runs/quickstart --output_dir runs/mine
    python train/finetune.py --task token-classification --train_file train.jsonl --validation_file dev.jsonl \
        --text_columns words --label_column tags --model_name_or_path runs/quickstart --output_dir runs/tagger
    python train/finetune.py --task question-answering ... --test_file test.jsonl --do_predict
    accelerate launch --num_processes 8 train/finetune.py recipe.yaml

Tasks: text-classification (one label, or lists of labels), text-regression, token-classification, question-answering,
multiple-choice; texts or pairs. A recipe is a flat YAML file of the same options; the command line wins. The best
checkpoint on the validation data is kept. Without --model_name_or_path a new model is made (see pretrain.py).
--packing fills training rows with several texts, where a task's answers are those of texts or tokens.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

from transformers import set_seed

import hf_selfattn  # noqa: F401  registers the model with the Auto classes
from hf_selfattn.tools.baselines import baselines_of_task
from hf_selfattn.tools.card import hash_of_rows, write_card
from hf_selfattn.tools.checkpoints import checkpoint_to_resume, prepare_output_dir
from hf_selfattn.tools.curve import draw_training_curve
from hf_selfattn.tools.fast_defaults import log_kernel
from hf_selfattn.tools.opening import (
    ModelArguments,
    check_source_of_model,
    open_config,
    open_model,
    prepare_tokenizer,
)
from hf_selfattn.tools.packed_rows import PackedRows, PackingCollator, choose_packing
from hf_selfattn.tools.recipes import nearest, parse_arguments
from hf_selfattn.tools.run_record import write_run_record
from hf_selfattn.tools.sources import SourceArguments, load_source, take
from hf_selfattn.tools.task_choices import MultipleChoice
from hf_selfattn.tools.task_questions import QuestionAnswering
from hf_selfattn.tools.task_texts import TextClassification, TextRegression
from hf_selfattn.tools.task_tokens import TokenClassification
from hf_selfattn.tools.tasks import TaskArguments
from hf_selfattn.tools.tokenizer import save_tokenizer
from hf_selfattn.tools.training import (
    CheckedTrainer,
    Rows,
    ScriptArguments,
    start_logging,
)
from hf_selfattn.tools.windows import check_token_ids, window_length

TASKS = {
    task.name: task
    for task in (TextClassification, TextRegression, TokenClassification, QuestionAnswering, MultipleChoice)
}


@dataclass
class FinetuningArguments(ScriptArguments):
    """The Trainer's arguments: evaluated and saved after each epoch, the best checkpoint kept."""

    eval_strategy: str = field(
        default="epoch", metadata={"help": "When to evaluate.", "choices": ["no", "steps", "epoch"]}
    )
    save_strategy: str = field(
        default="epoch", metadata={"help": "When to save.", "choices": ["no", "steps", "epoch", "best"]}
    )
    metric_for_best_model: str = field(
        default="task", metadata={"help": "What decides which checkpoint is the best; `task`: the task's main metric."}
    )
    load_best_model_at_end: bool = field(default=True, metadata={"help": "Keep the best checkpoint, not the last."})
    save_total_limit: int | None = field(default=1, metadata={"help": "Checkpoints kept beside the best one."})


def check_task(task):
    if task not in TASKS:
        raise ValueError(f"--task is one of {', '.join(TASKS)}, got {task!r}.{nearest(task, TASKS)}")


def make_task(arguments, splits):
    check_task(arguments.task)
    return TASKS[arguments.task](arguments, splits)


def sampled(splits, source, seed):
    """The rows that are used. Labels were compared on all of them, so a small sample cannot hide one."""
    counts = {"train": source.max_train_samples, "validation": source.max_eval_samples}
    return {split: take(rows, counts.get(split, source.max_predict_samples), seed if split in counts else None)
            for split, rows in splits.items()}  # fmt: skip


def main(argv=None):
    source, model_arguments, arguments, training = parse_arguments(
        [SourceArguments, ModelArguments, TaskArguments, FinetuningArguments], argv, __doc__
    )
    start_logging(training)
    check_task(arguments.task)
    check_source_of_model(model_arguments)
    with training.main_process_first(desc="preparing the output folder"):
        resume_from = checkpoint_to_resume(training.resume_from_checkpoint, training.output_dir)
        prepare_output_dir(training, resume_from)
    set_seed(training.seed)

    with training.main_process_first(desc="preparing the data"):
        splits = load_source(source, training.seed, predict=training.do_predict)
        task = make_task(arguments, splits)
        splits = sampled(splits, source, training.seed)
        tokenizer = prepare_tokenizer(model_arguments, training, task.texts(splits["train"]), resume_from)
        config = open_config(model_arguments, tokenizer, **task.config_changes())
        packing = choose_packing(arguments.packing, config, training, *task.no_packing)
        length = window_length(arguments.max_seq_length, tokenizer, config)
        encoder = task.encoder(tokenizer, config, length)
        model = open_model(task.auto_class, model_arguments, config, tokenizer)
        features = {}
        for split, rows in splits.items():
            features[split] = task.features(rows, encoder, labelled=split != "test" or task.is_labelled(rows))
            check_token_ids(features[split], config.vocab_size)

    log_kernel(model.config, training, model_arguments.attn_implementation)

    train_rows, collator = Rows(features["train"]), task.collator(tokenizer)
    if packing:
        train_rows, collator = PackedRows(train_rows, length, training.seed), PackingCollator(collator, length)
    if training.metric_for_best_model == "task":
        training.metric_for_best_model = f"eval_{task.best_metric}"
    trainer = CheckedTrainer(
        model=model,
        args=training,
        train_dataset=train_rows,
        eval_dataset=Rows(features["validation"]),
        processing_class=tokenizer,
        data_collator=collator,
        eval_collator=task.collator(tokenizer),
        compute_metrics=task.compute_metrics(splits["validation"], features["validation"]),
    )
    if training.do_train:
        result = trainer.train(resume_from_checkpoint=resume_from)
        trainer.save_metrics("train", {**result.metrics, "train_rows": len(features["train"])})
        trainer.save_model(_internal_call=True)  # what is pushed is pushed once, with the card
        trainer.save_state()
    scores = trainer.evaluate()
    trainer.save_metrics("eval", scores)
    if training.do_predict:
        predict(trainer, task, splits, features)
    if trainer.is_world_process_zero():
        report(trainer, task, source, model_arguments, scores, splits)
    trainer.accelerator.wait_for_everyone()
    if training.push_to_hub:
        trainer.push_to_hub()
    return scores


def predict(trainer, task, splits, features):
    """`predictions.jsonl`: a line for each test example (of the validation data where there is no test data)."""
    split = "test" if "test" in splits else "validation"
    rows = splits[split]
    trainer.compute_metrics = task.compute_metrics(rows, features[split]) if task.is_labelled(rows) else None
    output = trainer.predict(Rows(features[split]), metric_key_prefix="predict")
    trainer.save_metrics("predict", output.metrics)
    if trainer.is_world_process_zero():
        path = Path(trainer.args.output_dir, "predictions.jsonl")
        with open(path, "w", encoding="utf-8") as file:
            for prediction in task.predictions(rows, features[split], output.predictions):
                file.write(json.dumps(prediction, ensure_ascii=False) + "\n")
        print(f"{len(rows):,} predictions of the {split} data are in {path}")


def report(trainer, task, source, model_arguments, scores, splits):
    """Curve, card and record beside the model, and the metrics (and baselines) on the screen."""
    training, folder = trainer.args, Path(trainer.args.output_dir)
    save_tokenizer(trainer.processing_class, folder)
    own = ("eval_runtime", "eval_samples_per_second", "eval_steps_per_second", "eval_model_preparation_time")
    metrics = {name.removeprefix("eval_"): value for name, value in scores.items() if name not in (*own, "epoch")}
    baselines = {}
    if task.arguments.baselines:
        baselines = baselines_of_task(task, splits["train"], splits["validation"], "accuracy")
        trainer.save_metrics("baselines", {f"{name}_accuracy": value for name, value in baselines.items()})
    draw_training_curve(trainer.state.log_history, folder / "training_curve.png", f"eval_{task.best_metric}")
    sizes = {split: len(rows) for split, rows in splits.items()}
    data_name = source.dataset_name or ", ".join(source.train_file)
    write_run_record(training, {"name": data_name, "config": source.dataset_config_name, "rows": sizes})
    write_card(folder, model=trainer.model, arguments=training, pipeline_tag=task.pipeline_tag, data_name=data_name,
               metrics=metrics, data_sizes=sizes, base_model=model_arguments.model_name_or_path,
               curve="training_curve.png", data_config=source.dataset_config_name,
               data_hashes={split: hash_of_rows(rows) for split, rows in splits.items()},
               options=(source, model_arguments, task.arguments))  # fmt: skip
    print(f"\n{task.name} on {sizes['validation']:,} validation examples")
    for name, value in [*metrics.items(), *((f"accuracy of {name}", value) for name, value in baselines.items())]:
        print(f"  {name.replace('_', ' '):44}{value:10.4f}")
    print(f"Saved in {folder}.")


if __name__ == "__main__":
    main()
