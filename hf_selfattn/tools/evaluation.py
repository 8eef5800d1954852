"""Ask a masked language model for tokens: opening one, and the log-probabilities of chosen tokens of rows.

A question is a place in a row of token ids and the id that belongs there; the row has mask tokens wherever the model
shall not look. Rows of one length are computed together, so there is no padding, and equal rows are computed once.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoModelForMaskedLM

from .opening import check_source_of_model
from .sources import SourceArguments, find_text_column, load_validation, take
from .tokenizer import check_tokenizer, open_tokenizer
from .windows import positions_of

WIKITEXT = {"dataset_name": "Salesforce/wikitext", "dataset_config_name": "wikitext-2-raw-v1"}
PARTS = ("masked_lm", "blimp", "suite")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class EvaluationArguments:
    """Which models, what of them, and on which data."""

    model_name_or_path: list[str] = field(metadata={"help": "Checkpoints: folders or names on the Hub."})
    output_dir: str = field(metadata={"help": "Where results are kept and tables are written."})
    parts: list[str] = field(
        default_factory=lambda: ["masked_lm", "blimp"], metadata={"help": "What is measured.", "choices": PARTS}
    )
    dataset_name: str | None = field(
        default=None,
        metadata={"help": "Text of masked_lm: on the Hub, or a folder; else WikiText-2's validation data."},
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "The data set's configuration."})
    validation_split: str = field(default="validation", metadata={"help": "The split that is evaluated."})
    validation_file: list[str] | None = field(default=None, metadata={"help": "Files with the text instead."})
    text_column: str | None = field(default=None, metadata={"help": "The column with the text; found where clear."})
    text_unit: str = field(
        default="line", metadata={"help": "What is one document of a txt file.",
                                  "choices": ["line", "paragraph", "document"]}
    )  # fmt: skip
    max_eval_samples: int | None = field(default=None, metadata={"help": "That many documents, drawn by the seed."})
    max_seq_length: int = field(default=128, metadata={"help": "Tokens of a window, where tokens are masked."})
    window_bytes: int = field(default=384, metadata={"help": "Bytes of a window, where words are masked."})
    mlm_probability: float = field(default=0.15, metadata={"help": "Share of tokens, or of words, that are masked."})
    seed: int = field(default=0, metadata={"help": "Of the masks, and the first one of the suite."})
    blimp: str = field(default="nyu-mll/blimp", metadata={"help": "BLiMP on the Hub, or a folder."})
    max_pairs_per_paradigm: int | None = field(default=None, metadata={"help": "The first pairs, for a quick look."})
    suite_recipes: list[str] | None = field(
        default=None, metadata={"help": "Folders of the suite's recipes; without them train/recipes/suite."}
    )
    suite_tasks: list[str] | None = field(default=None, metadata={"help": "Recipes by name; without it, all."})
    suite_data: str | None = field(
        default=None, metadata={"help": "A folder with a data set for each task, instead of those on the Hub."}
    )
    suite_overrides: str | None = field(
        default=None, metadata={"help": 'Changes to all recipes, as "learning_rate=5e-5,num_train_epochs=3".'}
    )
    num_seeds: int = field(default=3, metadata={"help": "Runs of each task, with the seeds from --seed on."})
    from_scratch: bool = field(
        default=False, metadata={"help": "The suite also with the first model's fresh weights."}
    )
    dtype: str = field(default="float32", metadata={"help": "Of the matrix products.", "choices": list(DTYPES)})
    tokens_per_batch: int = field(default=4096, metadata={"help": "Tokens computed at a time."})
    attn_implementation: str | None = field(default=None, metadata={"help": "The attention kernel of all models."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Whether to run code that comes with a model."})
    disable_tqdm: bool = field(default=False, metadata={"help": "No progress bars."})

    def __post_init__(self):
        if self.num_seeds < 1:
            raise ValueError(f"--num_seeds is at least 1, got {self.num_seeds}.")

    @property
    def overrides_of_suite(self):
        """`suite_overrides`, and what is said of all models."""
        kernel, code = self.attn_implementation, self.trust_remote_code
        changes = (self.suite_overrides, kernel and f"attn_implementation={kernel}", code and "trust_remote_code=True")
        return ",".join(filter(None, changes))


def read_texts(arguments):
    """The Dataset of masked_lm's documents, with one column `text`."""
    named = {"dataset_name": arguments.dataset_name, "dataset_config_name": arguments.dataset_config_name}
    if arguments.dataset_name is None and not arguments.validation_file:
        named = WIKITEXT
    source = SourceArguments(
        **named,
        validation_file=arguments.validation_file,
        validation_split=arguments.validation_split,
        text_unit=arguments.text_unit,
    )
    rows = load_validation(source)
    column = find_text_column(rows, arguments.text_column)
    rows = take(rows, arguments.max_eval_samples, arguments.seed)
    return rows.select_columns([column]).rename_columns({} if column == "text" else {column: "text"})


def open_masked_lm(arguments):
    """(model in evaluation mode and in fp32, tokenizer) of `ModelArguments`.

    Raises:
        FileNotFoundError: there is no such model.
        ValueError: the weights of its head are not in the checkpoint, it is no masked language model, or its tokenizer
            has no mask token or does not fit it.
    """
    check_source_of_model(arguments)
    name, code = arguments.model_name_or_path, {"trust_remote_code": arguments.trust_remote_code}
    config = AutoConfig.from_pretrained(name, **code)
    tokenizer = open_tokenizer(arguments.tokenizer_name or name, **code)
    check_tokenizer(tokenizer, config, name, masks=True)
    kernel = {"attn_implementation": arguments.attn_implementation} if arguments.attn_implementation else {}
    try:
        model, info = AutoModelForMaskedLM.from_pretrained(
            name, config=config, dtype=torch.float32, output_loading_info=True, **kernel, **code
        )
    except ValueError as error:
        if "Unrecognized configuration class" not in str(error):
            raise
        raise ValueError(
            f"What is evaluated is a masked language model, and transformers knows none of type {config.model_type!r} "
            f"({name!r}). Pass an encoder that was trained to fill in masked tokens."
        ) from error
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise ValueError(
            f"What is evaluated is a masked language model, and {name!r} lacks {len(missing)} of its weights "
            f"({', '.join(missing[:3])}{', …' if len(missing) > 3 else ''}). Pass the pretrained checkpoint, not one "
            "that was fine-tuned with another head."
        )
    return model.eval(), tokenizer


def longest_row(tokenizer, config):
    """Tokens in the longest row that the model reads, special tokens included."""
    limits = (positions_of(config), tokenizer.model_max_length)
    return min(limit for limit in limits if limit is not None)


class Questions(NamedTuple):
    """What is asked for in rows of one length, ordered by row.

    Attributes:
        ids: (R, N) token ids with mask tokens.
        row, place, target: (M,) where a token is asked for, and its id.
        number: (M,) which of all questions each is.
    """

    ids: np.ndarray
    row: np.ndarray
    place: np.ndarray
    target: np.ndarray
    number: np.ndarray


def questions_of_length(ids, row, place, target, number):
    """`Questions` from rows of one length, of which equal ones become one."""
    ids, inverse = np.unique(ids, axis=0, return_inverse=True)
    row = inverse.reshape(-1)[row]
    order = np.argsort(row, kind="stable")
    return Questions(ids, row[order], place[order], target[order], number[order])


def questions_by_length(rows, row, place, target):
    """`Questions` for each length, longest first, from rows (lists of ids) and a row, place and target a question."""
    row, place, target = (np.asarray(values, dtype=np.int64) for values in (row, place, target))
    lengths = np.array([len(ids) for ids in rows])
    found = []
    for length in np.unique(lengths)[::-1]:
        chosen, number = np.flatnonzero(lengths == length), np.flatnonzero(lengths[row] == length)
        ids = np.array([rows[i] for i in chosen], dtype=np.int64)
        found.append(
            questions_of_length(ids, np.searchsorted(chosen, row[number]), place[number], target[number], number)
        )
    return found


def logits_at(model, ids, row, place):
    """(M, V) logits of the places alone, from rows (B, N) without padding.

    The output layer, which makes V numbers of each token, is handed the wanted tokens where it is a module that reads
    (B, N, D), as in nearly all masked language models; of the others all logits are made.
    """

    def thin_out(module, inputs):
        hidden, *others = inputs
        if hidden.shape[:2] != ids.shape:
            return None
        return (hidden.flatten(0, 1).index_select(0, row * ids.shape[1] + place), *others)

    head = model.get_output_embeddings()
    hook = None if head is None else head.register_forward_pre_hook(thin_out)
    try:
        logits = model(input_ids=ids).logits
    finally:
        if hook is not None:
            hook.remove()
    return logits if logits.dim() == 2 else logits[row, place]


@torch.no_grad()
def answers(model, questions, dtype=torch.float32, tokens_per_batch=4096, progress=None):
    """(log-probabilities in nats, whether the model's first choice is the right token), both (questions,).

    Args:
        model: a masked language model in evaluation mode.
        questions: list of `Questions`; each number from 0 occurs once.
        dtype: of the matrix products (autocast); softmax is taken in fp32 from logits of this type.
        tokens_per_batch: rows of N tokens are computed `tokens_per_batch // N` at a time.
        progress: what stands before the progress bar; None: there is none.
    """
    count = sum(len(group.number) for group in questions)
    log_probabilities, right = np.zeros(count), np.zeros(count, dtype=bool)
    device = model.device
    total = sum(group.ids.size for group in questions)
    bar = tqdm(total=total, desc=progress, unit=" tokens", unit_scale=True, disable=progress is None)
    with bar, torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        for group in questions:
            rows_per_batch = max(1, tokens_per_batch // group.ids.shape[1])
            for start in range(0, len(group.ids), rows_per_batch):
                ids = torch.from_numpy(group.ids[start : start + rows_per_batch].astype(np.int64)).to(device)
                asked = slice(*np.searchsorted(group.row, [start, start + len(ids)]))
                row, place, target = (
                    torch.from_numpy(values[asked].astype(np.int64)).to(device)
                    for values in (group.row - start, group.place, group.target)
                )
                logits = logits_at(model, ids, row, place).float()
                chosen = logits.gather(1, target[:, None]).squeeze(1)
                log_probabilities[group.number[asked]] = (chosen - logits.logsumexp(1)).double().cpu().numpy()
                right[group.number[asked]] = (logits.argmax(1) == target).cpu().numpy()
                bar.update(ids.numel())
    return log_probabilities, right
