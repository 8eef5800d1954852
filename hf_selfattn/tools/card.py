"""The model card beside a saved model: what it is, how it was made, what it scored."""

import dataclasses
import hashlib
import json
import math
import re
from pathlib import Path

import torch
import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..masks import allowed
from ..packing import Tokens
from ..patterns import layer_patterns
from .run_record import git_commit, versions
from .windows import positions_of

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

MASKING = ("mlm_probability", "mask_replace_prob", "random_replace_prob")

SHAPE = ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
         "value_head_dim", "intermediate_size", "mlp_type", "hidden_act", "vocab_size", "max_position_embeddings",
         "score_function", "attention_pattern", "position_encoding")  # fmt: skip

OF_THIS_MACHINE = re.compile(
    "output_dir|overwrite_|hub_|push_to_hub|resume_|run_name|logging_dir|local_rank|deepspeed|report_to|project|"
    "trackio|log_level|disable_tqdm|accelerator_config|fsdp"
)
"""Options, by the beginning of their names, that say where and by whom a run was made and change nothing of it."""

OF_SCORE = {"temperature", "learned_temperature", "qk_norm", "logit_softcap", "attention_sink"}
OF_POSITION = {"rope_parameters", "relative_num_buckets", "relative_max_distance", "max_position_embeddings"}
CELLS, PICTURED = 16, 256
"""A picture of a pattern: cells in a row, and tokens of the text that is pictured."""

HOW_TO_LOAD = """With the package (`pip install hf-selfattn`):

```python
import hf_selfattn
from transformers import {auto_class}, AutoTokenizer

model = {auto_class}.from_pretrained("{name}")
tokenizer = AutoTokenizer.from_pretrained("{name}")
```

Without it, by the code that lies beside the weights:

```python
from transformers import {auto_class}, AutoTokenizer

model = {auto_class}.from_pretrained("{name}", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("{name}")
```"""

LIMITS = """The model knows what its training data says, with the errors and the bias of that data. It was measured on
the validation data above and nowhere else."""


def _paragraphs(*texts):
    return "\n\n".join(text for text in texts if text)


def table(header, rows):
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    return "\n".join(lines + ["| " + " | ".join(map(str, row)) + " |" for row in rows])


def shown(value):
    value = getattr(value, "value", value)  # of an Enum
    if isinstance(value, float):
        return f"{value:,.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _public(name):
    """A name on the Hub as it is; of paths (several: divided by ", ") the last component alone."""
    parts = str(name).split(", ")
    is_path = [part.count("/") > 1 or part.startswith((".", "/", "~")) or "\\" in part or Path(part).exists()
               for part in parts]  # fmt: skip
    return ", ".join(re.split(r"[/\\]", part.rstrip("/\\"))[-1] if path else part
                     for part, path in zip(parts, is_path, strict=True))  # fmt: skip


def _is_on_hub(name):
    return bool(re.fullmatch(r"[\w.-]+/[\w.-]+", str(name))) and _public(name) == str(name)


def hash_of_rows(rows):
    """SHA-256 of what the rows of a `datasets.Dataset` hold, column by column name, in their order.

    It depends on nothing but the values: not on the file that they came from, nor on how it was cut into parts.
    """
    digest, names = hashlib.sha256(), sorted(rows.column_names)
    for batch in rows.with_format(None).iter(1000):
        for row in zip(*(batch[name] for name in names), strict=True):
            line = json.dumps(dict(zip(names, row, strict=True)), ensure_ascii=False, default=str)
            digest.update(line.encode("utf-8", "surrogatepass") + b"\n")
    return digest.hexdigest()


def pattern_picture(pattern, config):
    """Who sees whom in a text of `PICTURED` tokens, drawn from the pattern itself: a line for each block of queries.

    `1`: each of its tokens sees each token of the block of keys; `+`: some do; `.`: none does. Patterns that differ
    between heads are drawn for the first one.
    """
    size = PICTURED // CELLS
    document = torch.zeros(1, PICTURED, dtype=torch.long)
    tokens = Tokens(document, torch.arange(PICTURED)[None], torch.full_like(document, PICTURED))
    seen = sum(allowed(part, tokens, tokens, range(1))[0, 0].float() for part in pattern.parts(config)).clamp(max=1)
    share = seen.expand(PICTURED, PICTURED).reshape(CELLS, size, CELLS, size).mean((1, 3))
    return "\n".join(" ".join("1" if x == 1 else "." if x == 0 else "+" for x in row) for row in share.tolist())


def _numbers(pattern):
    fields = {field.name: getattr(pattern, field.name) for field in dataclasses.fields(pattern)}
    told = [f"{name} {value}" for name, value in fields.items()
            if name in pattern.options and isinstance(value, (int, float))]  # fmt: skip
    return f" ({', '.join(told)})" if told else ""


def _options(config, names):
    """Those options of one choice that differ from the configuration's defaults, as words."""
    plain = type(config)()
    told = [f"{name} {getattr(config, name)}" for name in sorted(names)
            if getattr(config, name, None) != getattr(plain, name, None)]  # fmt: skip
    return f" ({', '.join(told)})" if told else ""


def attention_section(config):
    """The four choices, and a picture of each distinct pattern; None for models of other types."""
    if config.model_type != "selfattn":
        return None
    layers = {}
    for number, pattern in enumerate(layer_patterns(config), 1):
        layers.setdefault(pattern, []).append(number)
    names = [config.attention_pattern] if isinstance(config.attention_pattern, str) else config.attention_pattern
    name_of = {pattern: names[numbers[0] - 1] if len(names) > 1 else names[0] for pattern, numbers in layers.items()}
    where = {pattern: "all layers" if len(layers) == 1 else f"layer{'s' * (len(numbers) > 1)} "
             + ", ".join(map(str, numbers)) for pattern, numbers in layers.items()}  # fmt: skip
    told = [f"`{name_of[pattern]}`{_numbers(pattern)} in {where[pattern]}" for pattern in layers]
    rows = [
        ("score", f"`{config.score_function}`{_options(config, OF_SCORE)}"),
        ("pattern", "; ".join(told) + (", causal" if config.causal else "")),
        ("position", f"`{config.position_encoding}`{_options(config, OF_POSITION)}"),
        ("kernel", f"`{config._attn_implementation}` in this run; any other gives the same numbers"),
    ]
    pictures = "\n\n".join(f"{name_of[pattern]}, {where[pattern]}:\n\n```\n{pattern_picture(pattern, config)}\n```"
                           for pattern in layers)  # fmt: skip
    return f"""{table(("choice", "here"), rows)}

Who sees whom in a text of {PICTURED} tokens (a line for {PICTURED // CELLS} queries, a column for as many keys; `1`:
all pairs, `+`: some, `.`: none):

{pictures}"""


def _without_paths(value):
    if isinstance(value, (list, tuple)):
        return [_without_paths(x) for x in value]
    if isinstance(value, dict):
        return {key: _without_paths(x) for key, x in value.items()}
    return _public(value) if isinstance(value, str) else value


def _recipe(holders):
    """The options of dataclasses that differ from their defaults, as YAML."""
    changed = {}
    for owner, field in [(holder, field) for holder in holders for field in dataclasses.fields(holder)]:
        value = getattr(owner, field.name)
        value = getattr(value, "value", value)
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        default = getattr(default, "value", default)
        is_plain = isinstance(value, (bool, int, float, str, list, dict))
        is_changed = value != default and (value or default)
        if field.init and is_plain and is_changed and not OF_THIS_MACHINE.match(field.name):
            changed[field.name] = _without_paths(value)
    return yaml.safe_dump(changed, sort_keys=False, allow_unicode=True).strip() if changed else ""


def _hardware(arguments):
    count = arguments.world_size
    if arguments.device.type == "cuda":
        return f"{count} × {torch.cuda.get_device_name(arguments.device)}"
    name = arguments.device.type.upper()
    if Path("/proc/cpuinfo").is_file():
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
        name = found[1] if found else name
    return f"{name}, {count} process{'es' * (count > 1)} of {torch.get_num_threads()} thread(s)"


def _numbers_of_run(folder):
    """What the Trainer noted of the training, from `all_results.json` beside the card."""
    path = Path(folder, "all_results.json")
    found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    names = {"epoch": "epochs", "train_loss": "training loss", "train_tokens": "tokens in the training data",
             "num_input_tokens_seen": "tokens read", "total_flos": "FLOPs"}  # fmt: skip
    rows = [(said, shown(found[name])) for name, said in names.items() if name in found]
    if "train_runtime" in found:
        rows.append(("hours", shown(found["train_runtime"] / 3600)))
    return rows


def _model_section(model):
    embeddings = model.get_input_embeddings().weight.numel()
    parameters = [("parameters", f"{model.num_parameters():,}"), ("of them token embeddings", f"{embeddings:,}")]
    shape = [(key, getattr(model.config, key)) for key in SHAPE if getattr(model.config, key, None) is not None]
    return table(("option", "value"), [*parameters, *shape])


def _data_section(data, configuration, sizes, hashes):
    told = ", ".join(f"{size:,} {split}" for split, size in sizes.items())
    rows = [(split, f"`{found}`") for split, found in (hashes or {}).items()]
    return _paragraphs(
        f"`{data}`{f', configuration `{configuration}`' if configuration else ''} ({told} rows).",
        table(("split", "SHA-256 of the rows"), rows) if rows else None,
    )


def _training_section(folder, arguments, options):
    unused = "num_train_epochs" if arguments.max_steps > 0 else "max_steps"
    settings = [(key, shown(getattr(arguments, key))) for key in SETTINGS if key != unused]
    settings += [(key, shown(getattr(holder, key))) for holder in options for key in MASKING if hasattr(holder, key)]
    recipe = _recipe([*options, arguments])
    return _paragraphs(
        table(("setting", "value"), [*settings, *_numbers_of_run(folder)]),
        f"Options other than the defaults:\n\n```yaml\n{recipe}\n```" if recipe else None,
    )


def _made_with_section(arguments):
    rows = [("hardware", _hardware(arguments)), ("commit of the code", git_commit() or "not in git")]
    return table(("what", "which"), [*rows, *versions().items()])


def _results(metrics, pipeline_tag, data_name, data_config):
    """Numbers that are finite, as the Hub's model-index has them; numpy's as plain ones, for YAML."""
    plain = {name: value.item() if hasattr(value, "item") else value for name, value in metrics.items()}
    return [
        EvalResult(task_type=pipeline_tag, dataset_type=data_name, dataset_name=data_name.split("/")[-1],
                   dataset_config=data_config, dataset_split="validation", metric_type=name, metric_value=value)
        for name, value in plain.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    ]  # fmt: skip


def write_card(
    folder,
    *,
    model,
    arguments,
    pipeline_tag,
    data_name,
    metrics,
    data_sizes,
    base_model=None,
    curve=None,
    data_config=None,
    data_hashes=None,
    language=None,
    license=None,
    limits=None,
    options=(),
):
    """README.md in `folder`, with the metadata that the Hub reads.

    No path of this machine gets into it: of local data and models the last component of the path is named.

    Args:
        metrics: {name: number} on the validation data, without the prefix `eval_`.
        data_sizes: {split: number of examples}.
        base_model: the model that this one was fine-tuned from; a local folder is named in the text only.
        curve: the file name of a picture beside the card.
        data_config: the data set's configuration.
        data_hashes: {split: `hash_of_rows`}.
        language, license: of the metadata, as the Hub writes them ("en", "apache-2.0"), where they are known.
        limits: what is known of the model's limits, in sentences.
        options: the other dataclasses of the run's options; the card shows what differs from their defaults.
    """
    hub_id = getattr(arguments, "hub_model_id", None) or Path(folder).resolve().name
    name = hub_id.split("/")[-1]
    data = _public(data_name)
    is_local = base_model is None or Path(base_model).exists() or _public(base_model) != base_model
    metadata = ModelCardData(
        language=language,
        license=license,
        library_name="transformers",
        pipeline_tag=pipeline_tag,
        tags=["hf-selfattn", model.config.model_type],
        base_model=None if is_local else base_model,
        datasets=[data] if _is_on_hub(data_name) else None,
        model_name=name,
        eval_results=_results(metrics, pipeline_tag, data, data_config),
    )
    longest = positions_of(model.config)
    sections = {
        "How to load it": HOW_TO_LOAD.format(auto_class=FROM_SCRIPT[pipeline_tag], name=hub_id),
        "Attention": attention_section(model.config),
        "Model": _model_section(model),
        "Data": _data_section(data, data_config, data_sizes, data_hashes),
        "Results on the validation data": _paragraphs(
            table(("metric", "value"), [(key, shown(value)) for key, value in metrics.items()]),
            f"![training curve]({curve})" if curve else None,
        ),
        "Training": _training_section(folder, arguments, options),
        "Made with": _made_with_section(arguments),
        "Limits": _paragraphs(limits, f"It reads at most {longest:,} tokens at a time." if longest else None, LIMITS),
    }
    origin = f"It starts from `{_public(base_model)}`." if base_model else "It starts from random weights."
    content = _paragraphs(
        f"---\n{metadata.to_yaml()}\n---",
        f"# {name}",
        f"{type(model).__name__} with {model.num_parameters():,} parameters, made with\n"
        f"`hf_selfattn` for {pipeline_tag}. {origin}",
        *(f"## {heading}\n\n{text}" for heading, text in sections.items() if text),
    )
    ModelCard(content + "\n", ignore_metadata_errors=False).save(Path(folder, "README.md"))
