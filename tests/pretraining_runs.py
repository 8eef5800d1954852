"""Small pretrainings for the tests of optimizers, schedules, budgets and the log."""

import torch
from datasets import Dataset
from transformers import AutoConfig, AutoModelForMaskedLM

from hf_selfattn.tools.collators import MaskingCollator
from hf_selfattn.tools.masking_rates import RatedRows
from hf_selfattn.tools.packed_rows import PackedRows, PackingCollator
from hf_selfattn.tools.pretraining import PretrainingScriptArguments, PretrainingTrainer
from hf_selfattn.tools.training import Rows

from .test_tools_collators import rows_of
from .train_scripts import tiny_tokenizer

ROW_LENGTH = 64
CONFIG = ("hidden_size", "num_hidden_layers", "intermediate_size", "hidden_dropout", "model_type")
DEFAULTS = {
    "per_device_train_batch_size": 8,
    "learning_rate": 1e-2,
    "logging_steps": 1,
    "save_steps": 1000,
    "use_cpu": True,
    "bf16": False,
    "report_to": [],
    "disable_tqdm": True,
    "seed": 0,
}


def make_arguments(folder, **options):
    return PretrainingScriptArguments(str(folder), **{**DEFAULTS, **options})


def make_trainer(folder, *, packed=False, count=40, rate_end=None, callbacks=None, seconds_before=0.0,
                 **options):  # fmt: skip
    """A PretrainingTrainer on `count` rows of 3 to 42 tokens, or on packed rows of 64 of them."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    sizes |= {name: options.pop(name) for name in CONFIG if name in options}
    kind = sizes.pop("model_type", "selfattn")
    config = AutoConfig.for_model(kind, vocab_size=len(tiny_tokenizer()), pad_token_id=0, **sizes)
    columns = [{"input_ids": row["input_ids"], "length": len(row["input_ids"])} for row in rows_of(count)]
    rows, collator = Rows(Dataset.from_list(columns)), MaskingCollator(tiny_tokenizer(), 0.3)
    if packed:
        rows, collator = PackedRows(rows, ROW_LENGTH), PackingCollator(collator, ROW_LENGTH)
    if rate_end is not None:
        rows = RatedRows(rows, 0.3, rate_end)
    return PretrainingTrainer(
        model=AutoModelForMaskedLM.from_config(config),
        args=make_arguments(folder, **options),
        train_dataset=rows,
        eval_dataset=rows,
        data_collator=collator,
        processing_class=tiny_tokenizer(),
        callbacks=callbacks,
        seconds_before=seconds_before,
    )


def trained_weights(trainer):
    return [parameter.detach() for parameter in trainer.model.parameters()]
