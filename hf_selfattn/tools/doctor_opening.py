"""A checkpoint and its data, opened for the doctor as far as they can be."""

import contextlib
import copy
from pathlib import Path

import torch
import transformers
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES as MASKED_NAMES

from .checkpoints import check_model_folder
from .convert_families import head_of
from .doctor_examination import HEADS, Examination, Finding, first_line
from .labels import element, is_list
from .sources import FORMATS, SourceArguments, check_columns, find_text_column, is_text, load_source
from .tokenizer import open_tokenizer


def head_of_checkpoint(config):
    """A key of HEADS, from the class that the config names; "base" where that is none of these."""
    name = (config.architectures or [""])[0]
    if name == MASKED_NAMES.get(config.model_type):  # XLM's is XLMWithLMHeadModel
        return "masked_lm"
    if name.endswith(("ForCausalLM", "LMHeadModel")):
        return "causal_lm"
    try:
        return head_of(config)
    except ValueError:
        return "base"


def _files_of(name):
    """The folder of a checkpoint; what has a name on the Hub is fetched."""
    if Path(name).exists() or str(name).startswith((".", "/", "~")) or str(name).count("/") > 1:
        return Path(name).expanduser()
    small = ["*.json", "*.txt", "*.py", "*.model", "*.jinja", "merges.txt"]
    try:
        folder = Path(snapshot_download(str(name), allow_patterns=[*small, "*.safetensors"]))
        if not any(folder.glob("*.safetensors")):
            snapshot_download(str(name), allow_patterns=[*small, "*.bin"])
    except (LocalEntryNotFoundError, RepositoryNotFoundError, HFValidationError) as error:
        raise FileNotFoundError(
            f"{str(name)!r} is not a folder here, and the Hub does not give it: {error} Pass the folder of a saved "
            "model, or a name on the Hub; connect this machine, or log in (`hf auth login`), where that is the reason."
        ) from error
    return folder


def open_checkpoint(name, *, trust_remote_code=False, kernel=None):
    """An Examination of a folder or a name on the Hub. A config.json that is refused is a finding.

    Raises:
        OSError: no such folder, nothing by that name on the Hub, or no config.json in it.
        ValueError: an encoder-decoder, or a model that does not read token ids.
    """
    folder = _files_of(name)
    if not (folder / "config.json").is_file():
        check_model_folder(folder)  # says what is there instead
    examination = Examination(str(name), folder, trust_remote_code=trust_remote_code, kernel=kernel)
    try:
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as refusal:  # remote code and the checks of a config raise whatever they like
        what = f"config.json is refused: {first_line(refusal)}"
        remedy = (
            "Correct config.json as the message says (code that comes with a checkpoint needs --trust_remote_code); "
            "nothing about model and tokenizer was examined."
        )
        examination.troubles.append(Finding("error", "opening", what, remedy))
        return examination
    if config.is_encoder_decoder:
        raise ValueError(
            "encoders, and decoders alone, are examined, and its config.json says is_encoder_decoder "
            f"(model_type {config.model_type!r}). Pass one of those."
        )
    examination.config, examination.head = config, head_of_checkpoint(config)
    try:
        examination.tokenizer = open_tokenizer(folder, trust_remote_code=trust_remote_code)
    except Exception as refusal:
        examination.troubles.append(
            Finding(
                "warning",
                "opening",
                f"No tokenizer can be opened: {first_line(refusal)}",
                "Save the tokenizer beside the model (tokenizer.save_pretrained); without it nobody can use the model "
                "as it was trained.",
            )
        )
    _open_model(examination)
    if examination.model is not None and not _reads_tokens(examination.model):
        raise ValueError(
            "models that read token ids are examined, each id with a vector, and "
            f"{type(examination.model).__name__} reads {examination.model.main_input_name} in its own way. Pass a "
            "model of texts."
        )
    return examination


def _reads_tokens(model):
    try:
        vectors = model.get_input_embeddings()
    except NotImplementedError:  # of models that have several, or none
        return False
    return model.main_input_name == "input_ids" and hasattr(vectors, "weight")


@contextlib.contextmanager
def garbage_is_nan():
    """Memory that nothing has written to holds NaN, and not by chance the right numbers."""
    was = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(was[0], warn_only=was[1])


def _open_model(examination):
    auto_class = getattr(transformers, HEADS[examination.head])
    chosen = {} if examination.kernel is None else {"attn_implementation": examination.kernel}
    try:
        check_model_folder(examination.folder)
        with garbage_is_nan(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            examination.model, examination.loading = auto_class.from_pretrained(
                examination.folder,
                config=copy.deepcopy(examination.config),
                dtype=torch.float32,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                trust_remote_code=examination.trust_remote_code,
                **chosen,
            )
        examination.model.eval()
    except Exception as refusal:
        examination.troubles.append(
            Finding(
                "error",
                "opening",
                f"The model cannot be opened: {first_line(refusal)}",
                "Do what the message says; nothing about the weights was examined.",
            )
        )


def add_data(examination, train, validation=None, text_columns=None, label_column=None):
    """Rows for a checkpoint: files or names of data sets; labels are in `label_column`, or in `label` if there is one.

    Raises:
        FileNotFoundError, ValueError: as `sources.load_source`; no such column in a split, or one without texts.
    """
    splits = {}
    for split, source in (("train", train), ("validation", validation)):
        if source is not None:
            is_file = Path(source).suffix.lstrip(".") in FORMATS
            named = {"train_file": [str(source)]} if is_file else {"dataset_name": str(source)}
            splits[split] = load_source(SourceArguments(**named), evaluate=False)["train"]
    rows = splits["train"]
    examination.data = splits
    examination.text_columns = list(text_columns or [find_text_column(rows, None, "--text_columns")])
    labels = [name for name in ("label", "labels") if name in rows.column_names and not is_text(rows, name)]
    examination.label_column = label_column or next(iter(labels), None)
    for rows in splits.values():
        check_text_columns(rows, examination.text_columns)
        check_columns(rows, [examination.label_column] if examination.label_column else [], "--label_column")


def check_text_columns(rows, names):
    """Refuse columns that are not there, or hold neither strings nor lists of them."""
    check_columns(rows, names, "--text_columns")
    for name in names:
        feature = rows.features[name]
        while is_list(feature):
            feature = element(feature)
        if getattr(feature, "dtype", None) not in ("string", "large_string"):
            raise ValueError(
                f"--text_columns: column {name!r} holds {rows.features[name]}, not text. Pass another column."
            )
