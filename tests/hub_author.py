"""Who shares: a process that has the package and pushes to the Hub of `HF_ENDPOINT`. See tests/test_hub.py.

    python -m tests.hub_author FOLDER

In FOLDER it leaves `expected.pt` and `author.json`, {case: what happened}.
"""

import json
import sys
import time
from pathlib import Path

import torch
from huggingface_hub import HfApi
from transformers import Trainer, TrainingArguments, default_data_collator

from hf_selfattn import AUTO_MAP
from hf_selfattn.tools.card import write_card
from hf_selfattn.tools.curve import draw_training_curve
from hf_selfattn.tools.run_record import write_run_record
from hf_selfattn.tools.training import CheckedTrainer, ScriptArguments

from .hub_reader import MARKER, attempt, set_faults, training_rows
from .test_save_load import make_batch, make_model, values
from .train_scripts import tiny_tokenizer

HEADS = [name for name in AUTO_MAP if name != "AutoConfig"]
METRICS = {"loss": 1 / 3, "accuracy": 0.1 + 0.2, "masked_tokens": 12345, "perplexity": 1e-17}


def new_model(auto_class):
    options = {"max_position_embeddings": 64, "initializer_range": 0.5}
    return make_model(auto_class, "bert", vocab_size=len(tiny_tokenizer()), **options)


def push_heads():
    """A repository for each head, with the tokenizer; that of AutoModel is private."""
    expected = {}
    for name in HEADS:
        model = new_model(name)
        model.push_to_hub(f"ann/{name}", private=name == "AutoModel")
        tiny_tokenizer().push_to_hub(f"ann/{name}")
        expected[name] = {"batch": make_batch(name), "values": values(model, name)}
    return expected


def push_revisions():
    """{revision: values}: two commits on main, the first of them tagged, and a branch."""
    expected, name, repository = {}, "AutoModelForMaskedLM", "ann/revisions"
    model = new_model(name)
    for revision in ("v1", "main", "trial"):
        with torch.no_grad():
            model.model.embed_tokens.weight.mul_(1.5)
        pushed = model.push_to_hub(repository, revision=revision if revision == "trial" else None)
        expected[revision] = expected[pushed.oid] = values(model, name)
        if revision == "v1":
            HfApi().create_tag(repository, tag="v1")
    return expected


def train(folder, trainer_class, arguments_class, repository):
    """Four steps, a checkpoint after each second one, pushed while training goes on; then everything."""
    torch.manual_seed(0)
    folder = Path(folder, repository.split("/")[1])
    arguments = arguments_class(
        output_dir=str(folder), max_steps=4, per_device_train_batch_size=4, save_steps=2, save_strategy="steps",
        logging_steps=1, report_to="none", use_cpu=True, seed=0, learning_rate=1e-2, push_to_hub=True,
        hub_model_id=repository, hub_strategy="checkpoint", hub_always_push=True, hub_private_repo=True,
        hub_token="hf_of_ann", disable_tqdm=True, bf16=False, remove_unused_columns=False)  # fmt: skip
    model, tokenizer = new_model("AutoModelForMaskedLM"), tiny_tokenizer()
    rows = training_rows(tokenizer)
    trainer = trainer_class(model, arguments, default_data_collator, rows, processing_class=tokenizer)
    result = trainer.train()
    trainer.save_model(_internal_call=True)
    if trainer_class is CheckedTrainer:  # what the scripts leave there
        trainer.save_metrics("train", result.metrics)
        trainer.save_state()
        draw_training_curve(trainer.state.log_history, folder / "training_curve.png")
        write_run_record(arguments, {"name": str(folder / "corpus.txt")})
        (folder / "predictions.jsonl").write_text(json.dumps({"text": MARKER}) + "\n")
        write_card(folder, model=model, arguments=arguments, pipeline_tag="fill-mask", metrics=METRICS,
                   data_name=str(folder / "corpus.txt"), data_sizes={"train": len(rows)},
                   curve="training_curve.png")  # fmt: skip
    trainer.push_to_hub()


def push_through_faults(answers):
    """An upload that breaks once goes on; one that always breaks is an error, and nothing of it is seen."""
    model = new_model("AutoModelForTokenClassification")
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(3)  # else the Hub would know the file, and nothing would be sent
    set_faults(drop_uploads=[10_000])
    answers["upload broken once"] = attempt(lambda: model.push_to_hub("ann/faults"))
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(2)
    set_faults(drop_uploads=[10_000] * 6)
    answers["upload always broken"] = attempt(lambda: model.push_to_hub("ann/faults"))
    set_faults(drop_uploads=[])
    answers["wrong token"] = attempt(lambda: model.push_to_hub("ann/faults", token="hf_wrong"))
    answers["another's namespace"] = attempt(lambda: model.push_to_hub("bob/faults"))
    answers["no token"] = attempt(lambda: model.push_to_hub("ann/faults", token=False))


def main(folder):
    wait = time.sleep
    time.sleep = lambda seconds: wait(min(seconds, 0.01))  # between the client's attempts
    answers = {}
    torch.save({"heads": push_heads(), "revisions": push_revisions()}, Path(folder, "expected.pt"))
    train(folder, Trainer, TrainingArguments, "ann/stock")
    train(folder, CheckedTrainer, ScriptArguments, "ann/run")
    push_through_faults(answers)
    Path(folder, "author.json").write_text(json.dumps(answers))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1])
