r"""Pretrain an encoder by masked language modelling.

    python train/pretrain.py train/recipes/quickstart.yaml
    python train/pretrain.py --train_file corpus.txt --validation_file held_out.txt --output_dir runs/mine \
        --config_overrides "num_hidden_layers=4,hidden_size=256" --max_steps 1000
    python train/pretrain.py --streaming true --train_file "shards/*.parquet" --max_steps 100000 --output_dir runs/mine
    python train/pretrain.py recipe.yaml --resume_from_checkpoint last      # or --dry_run
    accelerate launch --num_processes 8 train/pretrain.py recipe.yaml

A recipe is a flat YAML file of the same options; the command line wins. Without --model_name_or_path a new model is
made (SelfAttnConfig, or --config_file, changed by --config_overrides); without a tokenizer one is trained on the data.
Rows are filled with documents, or windows of long ones, and none sees another (--packing false: one a row, padded);
--per_device_train_batch_size counts rows. Evaluation has one document a row and uses the same masks every time.
"""

from pathlib import Path

from transformers import AutoModelForMaskedLM, set_seed

import hf_selfattn  # noqa: F401  registers the model with the Auto classes
from hf_selfattn.tools.card import hash_of_rows, write_card
from hf_selfattn.tools.checkpoints import checkpoint_to_resume, prepare_output_dir
from hf_selfattn.tools.collators import MaskingCollator
from hf_selfattn.tools.curve import draw_training_curve
from hf_selfattn.tools.documents import open_stream
from hf_selfattn.tools.fast_defaults import log_kernel
from hf_selfattn.tools.masked_lm import MaskedTokenMetrics, show_predictions
from hf_selfattn.tools.masking_rates import RatedRows, check_rate_end
from hf_selfattn.tools.neighbour_vectors import init_token_vectors
from hf_selfattn.tools.opening import ModelArguments, check_source_of_model, open_config, open_model, prepare_tokenizer
from hf_selfattn.tools.packed_rows import PackedRows, PackingCollator, choose_packing
from hf_selfattn.tools.plan import flops_per_token, plan_pretraining
from hf_selfattn.tools.pretraining import (
    PretrainingArguments,
    PretrainingScriptArguments,
    PretrainingTrainer,
    check_first_values,
    warn_of_learning_rate,
)
from hf_selfattn.tools.recipes import parse_arguments
from hf_selfattn.tools.run_record import write_run_record
from hf_selfattn.tools.sources import SourceArguments, find_text_column, load_source, take
from hf_selfattn.tools.streaming import StreamCollator, StreamedRows, check_training
from hf_selfattn.tools.tokenizer import save_tokenizer
from hf_selfattn.tools.training import Rows, start_logging
from hf_selfattn.tools.windows import as_rows, check_choice, check_token_ids, token_counts, window_length


def open_documents(source, arguments, training):
    """(Documents of a stream or None, {split: texts, of a stream a sample of those to train on}, their column)."""
    if source.streaming:
        documents, validation = open_stream(source, arguments.text_column)
        return documents, {"train": documents.sample(10_000), "validation": validation}, documents.column
    splits = load_source(source, training.seed)
    column = find_text_column(splits["train"], arguments.text_column)
    find_text_column(splits["validation"], column)
    splits["train"] = take(splits["train"], source.max_train_samples, training.seed)
    splits["validation"] = take(splits["validation"], source.max_eval_samples, training.seed)
    return None, splits, column


def prepare_rows(splits, column, tokenizer, length, arguments, vocab_size, packing):
    """Each split as rows of token ids, with the length, checked against the vocabulary."""
    rows = {}
    for split, documents in splits.items():
        desc = f"Tokenising {split}"
        full = packing and split == "train"
        rows[split] = as_rows(documents, column, tokenizer, length, arguments.long_texts, desc, full)
        check_token_ids(rows[split], vocab_size)
    return rows


def prepare_training_data(rows, documents, tokenizer, length, packing, arguments, source, training):
    """(data set, collator, the length of document that a token is in, on average) of training.

    Args:
        documents: of a stream, of which `rows` are a sample; or None.
    """
    shares = {"mask_replace_prob": arguments.mask_replace_prob, "random_replace_prob": arguments.random_replace_prob}
    collator = MaskingCollator(tokenizer, arguments.mlm_probability, training.seed, **shares)
    train_rows = Rows(rows)
    mean_length = round((train_rows.lengths**2).sum() / train_rows.lengths.sum())
    collator = PackingCollator(collator, length) if packing else collator
    if documents is not None:
        train_rows = StreamedRows(documents, tokenizer, length, training.train_batch_size, training.seed,
                                  source.shuffle_buffer, packing, arguments.long_texts)  # fmt: skip
        return train_rows, StreamCollator(collator), mean_length
    if packing:
        train_rows = PackedRows(train_rows, length, training.seed)
    if arguments.mlm_probability_end is not None:
        train_rows = RatedRows(train_rows, arguments.mlm_probability, arguments.mlm_probability_end)
    return train_rows, collator, mean_length


def main(argv=None):
    source, model_arguments, arguments, training = parse_arguments(
        [SourceArguments, ModelArguments, PretrainingArguments, PretrainingScriptArguments], argv, __doc__
    )
    start_logging(training)
    check_choice(arguments.long_texts)
    check_source_of_model(model_arguments)
    check_first_values(arguments, model_arguments, source)
    warn_of_learning_rate(training, model_arguments)
    check_rate_end(arguments.mlm_probability_end, training, getattr(source, "streaming", False))
    if source.streaming:
        check_training(training)
    if training.dry_run:
        if training.process_index == 0:
            print(plan_pretraining(model_arguments, arguments, training))
        return None
    with training.main_process_first(desc="preparing the output folder"):
        resume_from = checkpoint_to_resume(training.resume_from_checkpoint, training.output_dir)
        prepare_output_dir(training, resume_from)
    set_seed(training.seed)

    with training.main_process_first(desc="preparing the data"):
        documents, splits, column = open_documents(source, arguments, training)
        tokenizer = prepare_tokenizer(model_arguments, training, iter(splits["train"][column]), resume_from)
        config = open_config(model_arguments, tokenizer)
        packing = choose_packing(arguments.packing, config, training)
        length = window_length(arguments.max_seq_length, tokenizer, config)
        model = open_model(AutoModelForMaskedLM, model_arguments, config, tokenizer, masks=True)
        rows = prepare_rows(splits, column, tokenizer, length, arguments, config.vocab_size, packing)
    log_kernel(model.config, training, model_arguments.attn_implementation)

    train_rows, collator, mean_length = prepare_training_data(
        rows["train"], documents, tokenizer, length, packing, arguments, source, training
    )
    metrics = MaskedTokenMetrics(tokenizer, token_counts(rows["train"], config.vocab_size))
    if arguments.unigram_bias:
        metrics.init_output_bias(model)
    counting = 0.0
    if arguments.neighbour_vectors and resume_from is None:
        counting = init_token_vectors(model, rows["train"], arguments.neighbour_vectors, training.seed)
    trainer = PretrainingTrainer(
        model=model,
        args=training,
        train_dataset=train_rows,
        eval_dataset=Rows(rows["validation"]),
        processing_class=tokenizer,
        data_collator=collator,
        eval_collator=MaskingCollator(
            tokenizer,
            arguments.eval_mlm_probability,
            arguments.eval_masks_seed,
            mask_replace_prob=1.0,
            random_replace_prob=0.0,
        ),
        compute_metrics=metrics.compute,
        preprocess_logits_for_metrics=metrics.sums_of_rows,
        flops_per_token=lambda: flops_per_token(model.config, mean_length, arguments.mlm_probability, model),
        seconds_before=counting,
    )
    if training.do_train:
        result = trainer.train(resume_from_checkpoint=resume_from)
        sizes = {"train_documents": len(documents)} if documents else {
            "train_rows": len(rows["train"]), "train_tokens": int(trainer.train_dataset.lengths.sum())}  # fmt: skip
        used = {f"train_{name}": number for name, number in trainer.progress.used().items()}
        trainer.save_metrics("train", {**result.metrics, **sizes, **used})
        trainer.save_model(_internal_call=True)  # what is pushed is pushed once, with the card
        trainer.save_state()
    scores = trainer.evaluate()
    trainer.save_metrics("eval", scores)
    if trainer.is_world_process_zero():
        sizes = {split: len(found) for split, found in {**splits, "train": documents or splits["train"]}.items()}
        report(trainer, training, source, model_arguments, scores, splits, sizes, column, arguments)
    trainer.accelerator.wait_for_everyone()
    if training.push_to_hub:
        trainer.push_to_hub()
    return scores


def report(trainer, training, source, model_arguments, scores, splits, sizes, column, arguments):
    """Curve, card and record beside the model, and the numbers that matter on the screen."""
    folder = Path(training.output_dir)
    save_tokenizer(trainer.processing_class, folder)
    baseline = {f"eval_{name}": scores[f"eval_unigram_{name}"] for name in ("loss", "accuracy")}
    draw_training_curve(trainer.state.log_history, folder / "training_curve.png", baseline=baseline)
    data_name = source.dataset_name or ", ".join(source.train_file)
    names = ("loss", "perplexity", "accuracy", "bits_per_byte", "masked_tokens", "unigram_loss", "unigram_accuracy")
    metrics = {name: scores[f"eval_{name}"] for name in names}
    write_run_record(training, {"name": data_name, "config": source.dataset_config_name, "rows": sizes})
    hashes = {split: hash_of_rows(rows) for split, rows in splits.items() if split != "train" or not source.streaming}
    write_card(folder, model=trainer.model, arguments=training, pipeline_tag="fill-mask", data_name=data_name,
               metrics=metrics, data_sizes=sizes, base_model=model_arguments.model_name_or_path,
               curve="training_curve.png", data_config=source.dataset_config_name, data_hashes=hashes,
               options=(source, model_arguments, arguments))  # fmt: skip
    print(f"\n{'on ' + format(metrics['masked_tokens'], ',') + ' masked tokens':28}{'model':>10}{'unigram':>10}")
    print(f"{'loss (nats)':28}{metrics['loss']:10.3f}{metrics['unigram_loss']:10.3f}")
    print(f"{'masked-token accuracy':28}{metrics['accuracy']:10.1%}{metrics['unigram_accuracy']:10.1%}")
    print(f"{'perplexity':28}{metrics['perplexity']:10.1f}")
    print(f"{'bits per byte':28}{metrics['bits_per_byte']:10.3f}\n")
    if training.do_train and arguments.num_shown:
        print("\n".join(show_predictions(folder, splits["validation"][column], arguments.num_shown)))
        print(f"\nSaved in {folder}: import hf_selfattn, and pipeline('fill-mask', {str(folder)!r}) opens it.")


if __name__ == "__main__":
    main()
