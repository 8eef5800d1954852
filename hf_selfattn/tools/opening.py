"""Open or make the model and the tokenizer that a script was asked for, and refuse what does not fit together."""

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import AutoConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.utils import logging

from .checkpoints import check_model_folder
from .recipes import nearest
from .tokenizer import check_tokenizer, open_tokenizer, save_tokenizer, train_tokenizer
from .windows import positions_of

logger = logging.get_logger(__name__)


@dataclass
class ModelArguments:
    """Which model: an existing one, or a new one of a given configuration."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "A saved model to start from: a folder or a name on the Hub."}
    )
    config_file: str | None = field(
        default=None, metadata={"help": "JSON with the configuration of a new model (without it: SelfAttnConfig's)."}
    )
    config_overrides: str | None = field(
        default=None,
        metadata={"help": 'Changes to the configuration, as "num_hidden_layers=4,attention_pattern=sliding_window".'},
    )
    tokenizer_name: str | None = field(
        default=None, metadata={"help": "The tokenizer, where it is not the model's: a folder or a name on the Hub."}
    )
    tokenizer_vocab_size: int = field(
        default=8192, metadata={"help": "Tokens of the tokenizer that is learned from the data if there is no other."}
    )
    tokenizer_algorithm: str = field(default="bpe", metadata={"help": "Of that tokenizer: bpe or wordpiece."})
    attn_implementation: str | None = field(
        default=None, metadata={"help": "The attention kernel; without it the first that can is taken."}
    )
    trust_remote_code: bool = field(default=False, metadata={"help": "Whether to run code that comes with a model."})


def parse_overrides(text, option="--config_overrides"):
    """`"a=1,b=[1, 2],c=full"` as a dict; values are read as JSON where they can be, else as strings.

    Raises:
        ValueError: it is not written so; `option` is what the message calls it.
    """
    parts, depth, current = [], 0, ""
    for character in text or "":
        depth += (character in "[{") - (character in "]}")
        if character == "," and depth == 0:
            parts.append(current)
            current = ""
        else:
            current += character
    overrides = {}
    for part in filter(str.strip, [*parts, current]):
        name, separator, value = (piece.strip() for piece in part.partition("="))
        if not separator or not name or not value:
            raise ValueError(f'{option} is written "name=value,name=value", got {part.strip()!r} in {text!r}.')
        words = {"True": True, "False": False, "None": None}
        try:
            overrides[name] = words[value] if value in words else json.loads(value)
        except json.JSONDecodeError:
            overrides[name] = value
    return overrides


def _check_keys(values, config, where):
    known = {
        *config.to_dict(),
        *config.attribute_map,
        *getattr(type(config), "__dataclass_fields__", {}),
        "num_labels",
    }
    for name in values:
        if name not in known:
            raise ValueError(f"{where}: {name!r} is not an option of {type(config).__name__}.{nearest(name, known)}")


def new_config(arguments, **defaults):
    """The configuration of a new model: `defaults`, below the JSON file, below the overrides.

    Raises:
        FileNotFoundError: the JSON file is not there.
        ValueError: it is not JSON, an unknown option or model type (the nearest names are given).
    """
    written = {}
    if arguments.config_file is not None:
        path = Path(arguments.config_file)
        if not path.is_file():
            raise FileNotFoundError(f"--config_file {str(path)!r} is not a file. Check the path.")
        try:
            written = json.loads(path.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise ValueError(f"--config_file {str(path)!r} is not readable as JSON: {error}.") from error
    overrides = parse_overrides(arguments.config_overrides)
    model_type = overrides.pop("model_type", written.pop("model_type", "selfattn"))
    if model_type not in CONFIG_MAPPING:
        raise ValueError(f"model_type {model_type!r} is unknown to transformers.{nearest(model_type, CONFIG_MAPPING)}")
    plain = AutoConfig.for_model(model_type)
    _check_keys(written, plain, f"--config_file {arguments.config_file}")
    _check_keys(overrides, plain, "--config_overrides")
    return AutoConfig.for_model(model_type, **{**defaults, **written, **overrides})


def check_source_of_model(arguments):
    """Refuse, before anything is read or trained, a model that is not there or is described twice."""
    if arguments.model_name_or_path is None:
        return
    if arguments.config_file is not None:
        raise ValueError(
            "--model_name_or_path brings its own configuration, and --config_file is given too. Leave one out; "
            "single options of a saved model are changed with --config_overrides."
        )
    name = arguments.model_name_or_path
    if Path(name).exists() or name.startswith((".", "/", "~")) or name.count("/") > 1:
        check_model_folder(Path(name).expanduser())
        return
    try:
        AutoConfig.from_pretrained(name, trust_remote_code=arguments.trust_remote_code)
    except OSError as error:
        raise FileNotFoundError(
            f"--model_name_or_path {name!r} is not a folder here, and the Hub does not give it: {error} Pass the "
            "folder of a saved model (a recipe's model comes from the recipe before it), or a Hub name."
        ) from error


def prepare_tokenizer(arguments, training, texts, resume_from=None):
    """The tokenizer that was named, or the model's, or the interrupted run's, or one learned from `texts`.

    The last is learned by the first process and read by the others, so call it under `main_process_first`.
    """
    name = arguments.tokenizer_name or arguments.model_name_or_path or resume_from
    if name is None:
        name = training.output_dir
        if training.process_index == 0:
            tokenizer = train_tokenizer(texts, arguments.tokenizer_vocab_size, arguments.tokenizer_algorithm)
            save_tokenizer(tokenizer, name)
        return open_tokenizer(name)
    tokenizer = open_tokenizer(name, trust_remote_code=arguments.trust_remote_code)
    if name != resume_from and training.process_index == 0 and (remark := unused_vocab_size(arguments, tokenizer)):
        logger.warning(remark)
    return tokenizer


def unused_vocab_size(arguments, tokenizer):
    """That a --tokenizer_vocab_size which is not the default has no effect beside this tokenizer, or None."""
    size, tokens = arguments.tokenizer_vocab_size, len(tokenizer)
    if size in (ModelArguments.tokenizer_vocab_size, tokens):
        return None
    return (
        f"--tokenizer_vocab_size {size:,} has no effect: it is for a tokenizer that is learned from the data, and "
        f"{arguments.tokenizer_name or arguments.model_name_or_path} has one, of {tokens:,} tokens. Leave "
        "the option out, or, for a new model, --tokenizer_name."
    )


def open_config(arguments, tokenizer, **changes):
    """The configuration of the model that was asked for; a new one takes its vocabulary from the tokenizer."""
    if arguments.model_name_or_path is None:
        special = {"pad_token_id": tokenizer.pad_token_id}
        return new_config(arguments, vocab_size=max(tokenizer.get_vocab().values()) + 1, **special, **changes)
    config = AutoConfig.from_pretrained(
        arguments.model_name_or_path, trust_remote_code=arguments.trust_remote_code, **changes
    )
    overrides = parse_overrides(arguments.config_overrides)
    _check_keys(overrides, config, "--config_overrides")
    for name, value in overrides.items():
        setattr(config, name, value)
    return config


def fit_inputs(tokenizer, config):
    """Let the tokenizer, as it is saved with the model, make what this model reads: its length, its token types."""
    positions = positions_of(config)
    if positions is not None:
        tokenizer.model_max_length = min(tokenizer.model_max_length, positions)
    types = getattr(config, "type_vocab_size", None)
    if types is not None:
        names = [name for name in tokenizer.model_input_names if name != "token_type_ids"]
        tokenizer.model_input_names = [names[0], "token_type_ids", *names[1:]] if types > 1 else names
        tokenizer.init_kwargs["model_input_names"] = tokenizer.model_input_names


def open_model(auto_class, arguments, config, tokenizer, masks=False):
    """The model of `config`, with the weights of --model_name_or_path or new ones, in fp32.

    (`from_pretrained` takes the dtype in which a model was saved; training bf16 weights without a master copy in fp32
    loses small updates.)
    """
    check_tokenizer(tokenizer, config, arguments.model_name_or_path, masks=masks)
    fit_inputs(tokenizer, config)
    kwargs = {"trust_remote_code": arguments.trust_remote_code, "dtype": torch.float32}
    if arguments.attn_implementation is not None:
        kwargs["attn_implementation"] = arguments.attn_implementation
    if arguments.model_name_or_path is not None:
        model = auto_class.from_pretrained(arguments.model_name_or_path, config=config, **kwargs)
    else:
        model = auto_class.from_config(config, **kwargs)
    logger.info(f"{type(model).__name__} with {model.num_parameters():,} parameters")
    return model
