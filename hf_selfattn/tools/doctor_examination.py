"""What the doctor looks at, a model with all that belongs to it, and what it says of it."""

import copy
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from torch import nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES as MASKED_NAMES

from .convert_families import AUTO_CLASSES
from .windows import positions_of

SEVERITIES = ("error", "warning", "note")
"""Worst first: what gives wrong results or stops a run; what does so under a condition that is named; what to know."""

HEADS = {**AUTO_CLASSES, "causal_lm": "AutoModelForCausalLM"}
"""The Auto class of each head that is examined."""

LENGTHS = (13, 8, 5)
"""Tokens of the texts that are compared; fewer where the model has fewer positions."""

SAMPLE_TEXTS = (
    "The quick brown fox jumps over the lazy dog, and nobody asked why.",
    "In 1998 she wrote: “Reading is a kind of travelling.” Was she right?",
    "Water boils at 100 degrees; at high altitudes it needs less.",
    "Der Bär schläft im Wald, et le garçon mange une pomme.",
)
"""What a tokenizer is tried on where no data is given."""


@dataclass(frozen=True)
class Finding:
    """What is wrong, and what to do about it.

    Attributes:
        severity: one of SEVERITIES.
        check: the name of the check that found it.
        what: what was found, with the numbers.
        remedy: the way out.
    """

    severity: str
    check: str
    what: str
    remedy: str

    def __str__(self):
        return f"{self.severity.upper()} [{self.check}] {self.what}\n    Remedy: {self.remedy}"


def error(what, remedy):
    """A Finding whose check fills in its own name; so are `warning` and `note`."""
    return Finding("error", "", what, remedy)


def warning(what, remedy):
    return Finding("warning", "", what, remedy)


def note(what, remedy):
    return Finding("note", "", what, remedy)


def listed(names, most=4):
    """The first names, and how many more there are."""
    names = sorted(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def first_line(exception):
    """What an exception says, in one line: its first, and what follows as long as a line ends with a colon."""
    lines = [line.strip() for line in str(exception).strip().splitlines()] or ["no message"]
    end = next((i for i, line in enumerate(lines) if not line.endswith(":")), len(lines)) + 1
    return f"{type(exception).__name__}: {' '.join(lines[:end])}"


@dataclass(frozen=True)
class Check:
    """One row of the doctor's table.

    Attributes:
        name: by which findings call it.
        find: (Examination) -> an iterable of Findings.
        needs: attributes of the Examination without which there is nothing to check.
        after: checks whose errors would show here too; after one of them this check is left out.
        trains: whether it trains a copy of the model; left out by --quick.
    """

    name: str
    find: Callable
    needs: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    trains: bool = False


@dataclass
class Examination:
    """What was opened. A part that could not be opened is None, and `troubles` says why.

    Attributes:
        name: what was asked for.
        folder: with the files of a checkpoint; None for a recipe's model.
        config, tokenizer: of the model.
        model: in float32 and evaluation mode.
        loading: what `from_pretrained` says of the weights.
        head: a key of HEADS.
        data: split -> Dataset.
        text_columns, label_column: in these; what they hold.
        recipe: a `doctor_recipes.Recipe`, or None.
        trust_remote_code, kernel: as asked for.
        troubles: Findings from the opening.
    """

    name: str
    folder: Path | None = None
    config: object = None
    tokenizer: object = None
    model: nn.Module | None = None
    loading: dict | None = None
    head: str = "base"
    data: dict = field(default_factory=dict)
    text_columns: list[str] = field(default_factory=list)
    label_column: str | None = None
    recipe: object = None
    trust_remote_code: bool = False
    kernel: str | None = None
    troubles: list[Finding] = field(default_factory=list)

    @property
    def of_head(self):
        """The head's name where it has a loss, else None."""
        return None if self.head == "base" else self.head

    @cached_property
    def fresh(self):
        """A new model of the same configuration, built directly and not on the meta device."""
        return None if self.model is None else new_model(self.model)

    @cached_property
    def exact(self):
        """(model, tolerance): a copy in float64 where the model can run in it, and what counts as equal there.

        Equal is |difference| <= tolerance * max(1, |value|). Stock models take softmax and rotary tables in float32
        whatever their type is, an error of 1e-7 in each layer; what a token that must not be seen changes is 1e-4 or
        more. In float32 the shapes of matrix products alone make 5e-6 in 12 layers of 768.
        """
        model = copy.deepcopy(self.model).double()
        try:
            self.answers(self.ids([5]), model=model)
        except (RuntimeError, ValueError, TypeError):
            return self.model, 1e-4
        return model, 1e-5

    @property
    def positions(self):
        """Tokens that a text may have; None: any number."""
        return positions_of(self.config)

    @property
    def lengths(self):
        """Tokens of the texts that are compared: LENGTHS, within the model's positions."""
        limit = self.positions or LENGTHS[0]
        return [max(2, min(length, limit - i)) for i, length in enumerate(LENGTHS)]

    @cached_property
    def ordinary_ids(self):
        """(n,) ids of tokens that are not special, for which the model has a vector."""
        rows = self.model.get_input_embeddings().weight.shape[0]
        if self.tokenizer is None:
            return torch.arange(rows)[torch.arange(rows) != getattr(self.config, "pad_token_id", None)]
        special = set(self.tokenizer.all_special_ids)
        used = sorted({i for i in self.tokenizer.get_vocab().values() if i < rows and i not in special})
        return torch.tensor(used)

    def ids(self, lengths, seed=0):
        """(B, longest) ids of ordinary tokens drawn at random, different ones in a row where there are enough."""
        longest, known = max(lengths), self.ordinary_ids
        generator = torch.Generator().manual_seed(seed)
        order = [torch.randperm(len(known), generator=generator) for _ in lengths]
        return torch.stack([known[row.repeat(-(-longest // len(known)))[:longest]] for row in order])

    def takes(self, argument):
        """Whether the model's forward takes `argument`, by name or as one of any."""
        parameters = inspect.signature(self.model.forward).parameters.values()
        return any(p.name == argument or p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)

    @torch.no_grad()
    def answers(self, ids, mask=None, model=None, **more):
        """What the model says of token ids (B, N): (B, N, …) where it judges tokens, (B, …) where whole texts.

        Args:
            mask: (B, N), 1 at what may be seen.
            model: another one of the same kind.
            more: of the forward, (B, N).
        """
        inputs = {"input_ids": ids, **({} if mask is None else {"attention_mask": mask}), **more}
        if self.head == "multiple_choice":
            inputs = {name: value.unsqueeze(1) for name, value in inputs.items()}
        outputs = (self.model if model is None else model)(**inputs)
        if self.head == "question_answering":
            return torch.stack((outputs.start_logits, outputs.end_logits), dim=-1)
        return outputs.last_hidden_state if self.head == "base" else outputs.logits

    @torch.no_grad()
    def of_tokens(self, ids, model):
        """(B, N, …) answers for each token of ids (B, N): those of the encoder where the model judges whole texts."""
        if self.judges_tokens:
            return self.answers(ids, model=model)
        return model.base_model(input_ids=ids).last_hidden_state

    @property
    def is_causal(self):
        """Whether the model is meant to see what is before a token alone."""
        config = self.config
        if config.model_type == "xlnet":  # listed among causal models, and sees both ways unless told otherwise
            return config.attn_type == "uni"
        only = config.model_type in CAUSAL_NAMES and config.model_type not in MASKED_NAMES
        return (
            only
            or self.head == "causal_lm"
            or getattr(config, "causal", False)
            or getattr(config, "is_decoder", False)
        )

    @property
    def judges_tokens(self):
        """Whether there is an answer for each token."""
        return self.head not in ("sequence_classification", "multiple_choice")

    def texts(self, split, count=None):
        """One string for each row of the data (the first `count`): what its columns hold, joined by blanks."""
        rows = self.data[split]

        def joined(values):
            return " ".join("" if v is None else v if isinstance(v, str) else joined(v) for v in values)

        columns = [rows[name][: len(rows) if count is None else count] for name in self.text_columns]
        return [joined(values) for values in zip(*columns, strict=True)]

    def sample_texts(self, count=200):
        """Texts to try a tokenizer on: of the data, else SAMPLE_TEXTS."""
        if not self.data:
            return list(SAMPLE_TEXTS)
        return [text for text in self.texts(next(iter(self.data)), count) if text.strip()]


def new_model(model, config=None, seed=0):
    """A model of the same class and kernel as `model` with new weights, drawn by the seed."""
    config = copy.deepcopy(model.config if config is None else config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return type(model)._from_config(config, attn_implementation=model.config._attn_implementation).float().eval()
