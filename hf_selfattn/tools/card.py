"""The model card beside a saved model: what it is, how it was made, what it scored."""

from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData

FROM_SCRIPT = {
    "fill-mask": "AutoModelForMaskedLM",
    "text-classification": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
    "question-answering": "AutoModelForQuestionAnswering",
    "multiple-choice": "AutoModelForMultipleChoice",
}

SETTINGS = (
    "learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay", "per_device_train_batch_size",
    "gradient_accumulation_steps", "world_size", "max_steps", "num_train_epochs", "bf16", "seed",
)  # fmt: skip


def table(header, rows):
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    return "\n".join(lines + ["| " + " | ".join(map(str, row)) + " |" for row in rows])


def shown(value):
    value = getattr(value, "value", value)  # of an Enum
    if isinstance(value, float):
        return f"{value:,.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def write_card(folder, *, model, arguments, pipeline_tag, data_name, metrics, data_sizes, base_model=None, curve=None):
    """README.md in `folder`, with the metadata that the Hub reads.

    Args:
        metrics: {name: number} on the validation data, without the prefix `eval_`.
        data_sizes: {split: number of examples}.
        base_model: the model that this one was fine-tuned from; a local folder is named in the text only.
        curve: the file name of a picture beside the card.
    """
    name, config = Path(folder).resolve().name, model.config
    auto_class = FROM_SCRIPT[pipeline_tag]
    is_local = base_model is None or Path(base_model).exists()
    results = [
        EvalResult(task_type=pipeline_tag, dataset_type=Path(data_name).name, dataset_name=Path(data_name).name,
                   metric_type=metric, metric_value=value, dataset_split="validation")
        for metric, value in metrics.items() if isinstance(value, (int, float))
    ]  # fmt: skip
    metadata = ModelCardData(
        library_name="transformers",
        pipeline_tag=pipeline_tag,
        tags=["hf-selfattn", config.model_type],
        base_model=None if is_local else base_model,
        model_name=name,
        eval_results=results,
    )
    unused = "num_train_epochs" if arguments.max_steps > 0 else "max_steps"
    settings = [(key, shown(getattr(arguments, key))) for key in SETTINGS if key != unused]
    shape = ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "score_function",
             "attention_pattern", "position_encoding", "max_position_embeddings")  # fmt: skip
    shape = [(key, getattr(config, key)) for key in shape if hasattr(config, key)]
    sizes = ", ".join(f"{size:,} {split}" for split, size in data_sizes.items())
    origin = f"It starts from `{Path(base_model).name if is_local else base_model}`." if base_model else (
        "It starts from random weights.")  # fmt: skip
    content = f"""---
{metadata.to_yaml()}
---

# {name}

{type(model).__name__} with {model.num_parameters():,} parameters, made with
`hf_selfattn` for {pipeline_tag}. {origin}

```python
import hf_selfattn  # or trust_remote_code=True, without the package
from transformers import {auto_class}, AutoTokenizer

model = {auto_class}.from_pretrained("{name}")
tokenizer = AutoTokenizer.from_pretrained("{name}")
```

## Data

`{Path(data_name).name}` ({sizes} rows).

## Results on the validation data

{table(("metric", "value"), [(key, shown(value)) for key, value in metrics.items()])}
{f"{chr(10)}![training curve]({curve}){chr(10)}" if curve else ""}
## Model

{table(("option", "value"), shape)}

## Training

{table(("setting", "value"), settings)}

The command, the versions and the commit are in `run.json`, all numbers in `all_results.json`.

## Limits

The model knows what its training data says, with the errors and the bias of that data. It was measured on the
validation data above and nowhere else.
"""
    ModelCard(content, ignore_metadata_errors=False).save(Path(folder, "README.md"))
