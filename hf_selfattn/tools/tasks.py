"""What fine-tuning tasks have in common: columns in, rows of token ids, metrics, predictions out.

A task is made from the raw splits and finds its columns and labels at once, so that what is wrong with them is said
before a model is opened. Each is a class in a file of its own, with the same methods:

    config_changes()                         what the model's configuration has to know (labels)
    texts(rows)                              all texts, for a tokenizer to learn from
    features(rows, encoder)                  a Dataset of `input_ids`, `length`, labels and `example`, windows included
    collator(tokenizer)
    compute_metrics(rows, features)          a function for the Trainer
    predictions(rows, features, outputs)     a dict for each example
"""

from dataclasses import dataclass, field

import numpy as np

from .labels import check_unseen
from .windows import Frame, check_choice, cut_into_windows, report_long, too_long, uses_token_types


@dataclass
class TaskArguments:
    """The task, its columns, and how texts become rows."""

    task: str | None = field(
        default=None,
        metadata={"help": "text-classification, text-regression, token-classification, question-answering or "
                          "multiple-choice."},
    )  # fmt: skip
    text_columns: list[str] | None = field(
        default=None,
        metadata={"help": "One text, or a pair; words for token-classification; question and context for "
                          "question-answering; what stands before the choices for multiple-choice."},
    )  # fmt: skip
    label_column: str | None = field(default=None, metadata={"help": "The label; the answers for question-answering."})
    choice_columns: list[str] | None = field(
        default=None, metadata={"help": "The choices of multiple-choice: a column with lists, or a column for each."}
    )
    max_seq_length: int | None = field(
        default=None, metadata={"help": "Tokens in a row, special ones included; the model's positions, at most 512."}
    )
    long_texts: str | None = field(
        default=None,
        metadata={"help": "What is done with longer texts: split (windows, whose results are joined), truncate or "
                          "refuse. Default: split, for multiple-choice refuse."},
    )  # fmt: skip
    doc_stride: int = field(
        default=64, metadata={"help": "Tokens that two neighbouring windows of a question's context share."}
    )
    max_answer_length: int = field(default=30, metadata={"help": "Tokens of the longest answer."})
    packing: bool = field(default=False, metadata={"help": "Whether training rows are filled with several texts."})
    baselines: bool = field(
        default=False,
        metadata={"help": "Whether to print the majority class and TF-IDF with logistic regression beside the model."},
    )


@dataclass
class Encoder:
    """Texts to rows: the tokenizer, how many tokens a row holds, and what is done with longer texts."""

    tokenizer: object
    max_seq_length: int
    long_texts: str
    frame: Frame

    @classmethod
    def of(cls, tokenizer, config, max_seq_length, long_texts):
        return cls(tokenizer, max_seq_length, long_texts, Frame(tokenizer, uses_token_types(tokenizer, config)))

    def ids(self, texts):
        """The token ids of each text, without special tokens; a missing text has none."""
        texts = ["" if text is None else str(text) for text in texts]
        return self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []

    def rows(self, first, second=None, where="A text"):
        """The row, or the windows, of one text or a pair, given as token ids. Of a pair the longer text is cut."""
        room = self.frame.room(self.max_seq_length, texts=1 if second is None else 2)
        if second is None:
            return [self.frame.row(ids) for ids in cut_into_windows(first, room, self.long_texts, where)]
        if len(first) + len(second) <= room:
            return [self.frame.row(first, second)]
        shorter = min(len(first), len(second))
        if self.long_texts == "refuse":
            raise too_long(len(first) + len(second), room, where)
        if self.long_texts == "truncate":
            half = room // 2
            shorter = min(shorter, half)
        elif shorter > room // 2:
            raise ValueError(
                f"{where} is a pair of {len(first)} and {len(second)} tokens. Windows are cut from the longer text "
                f"beside the whole shorter one, which may have {room // 2} tokens at most. "
                f"Pass --long_texts truncate or a larger --max_seq_length."
            )
        left = room - shorter
        if len(first) >= len(second):
            windows = cut_into_windows(first, left, self.long_texts, where)
            return [self.frame.row(window, second[:shorter]) for window in windows]
        windows = cut_into_windows(second, left, self.long_texts, where)
        return [self.frame.row(first[:shorter], window) for window in windows]

    def is_long(self, first, second=None):
        room = self.frame.room(self.max_seq_length, texts=1 if second is None else 2)
        return len(first) + len(second or ()) > room


class Task:
    """The part of a task that most tasks share."""

    name = None
    auto_class = None
    pipeline_tag = None
    best_metric = None  # decides which checkpoint is the best
    long_texts = ("split", "truncate", "refuse")  # the first is the default
    no_packing = ()  # why several of its texts cannot share a row

    def __init__(self, arguments, splits):
        self.arguments = arguments
        self.how_long = arguments.long_texts or self.long_texts[0]
        check_choice(self.how_long, self.long_texts)
        if arguments.baselines and self.name != "text-classification":
            raise ValueError(f"--baselines are for text-classification, the task is {self.name}. Leave them out.")

    def encoder(self, tokenizer, config, max_seq_length):
        return Encoder.of(tokenizer, config, max_seq_length, self.how_long)

    def config_changes(self):
        return {}

    def is_labelled(self, rows):
        """Whether predictions on `rows` can be scored."""
        return self.label_column in rows.column_names and None not in rows[self.label_column]

    def check_labels(self, splits):
        """Validation labels, and test labels where there are any, must occur in the training data."""
        check_unseen(splits["train"], splits["validation"], self.label_column)
        if "test" in splits and self.is_labelled(splits["test"]):
            check_unseen(splits["train"], splits["test"], self.label_column, "test")

    def map(self, rows, encode, encoder):
        """Rows through `encode(batch, indices) -> list of dicts`, with a report about the long ones among them.

        `encode` marks each row of a long text by `long: True`; the mark is taken off here.
        """

        def columns(batch, indices):
            made = encode(batch, indices)
            names = made[0].keys() if made else ()
            return {name: [row[name] for row in made] for name in names}

        features = rows.map(
            columns, batched=True, with_indices=True, remove_columns=rows.column_names, desc="Tokenising"
        )
        if len(features) == 0:
            raise ValueError("The data set is empty: no example gives a row. Check the columns and the texts.")
        features = features.with_format("numpy")
        long = np.unique(features["example"][:][np.asarray(features["long"][:], dtype=bool)])
        report_long(len(long), len(rows), encoder.max_seq_length, self.how_long)
        return features.with_format(None).remove_columns("long")


def joined_windows(outputs, features, examples):
    """(examples, …) mean of the outputs of each example's windows."""
    outputs = np.asarray(outputs, dtype=np.float64)
    index = np.asarray(features["example"][:])
    sums = np.zeros((examples, *outputs.shape[1:]))
    np.add.at(sums, index, outputs[: len(index)])
    return sums / np.maximum(np.bincount(index, minlength=examples), 1).reshape(-1, *[1] * (outputs.ndim - 1))


def softmax(scores):
    scores = np.exp(scores - scores.max(-1, keepdims=True))
    return scores / scores.sum(-1, keepdims=True)
