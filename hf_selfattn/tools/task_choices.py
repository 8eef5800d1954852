"""The right one of several texts that may follow another."""

import re
import string

import numpy as np
from datasets import ClassLabel
from transformers import AutoModelForMultipleChoice

from .collators import PaddingCollator
from .labels import find_label_column
from .scoring import score
from .sources import check_columns, is_text
from .task_tokens import is_words
from .tasks import Task, softmax

LIST_COLUMNS = ("choices", "options", "endings", "answers")


def find_choice_columns(rows, given):
    """One column with lists of choices, or a column for each choice: as given, or by their names."""
    if given:
        check_columns(rows, given, "--choice_columns")
        if len(given) == 1 and not is_words(rows.features[given[0]]):
            raise ValueError(f"--choice_columns: the one column {given[0]!r} must hold lists of texts, it holds "
                             f"{rows.features[given[0]]}. Pass a column for each choice.")  # fmt: skip
        return list(given)
    lists = [name for name in LIST_COLUMNS if name in rows.column_names and is_words(rows.features[name])]
    if lists:
        return lists[:1]
    numbered = {}
    for name in rows.column_names:
        match = re.fullmatch(r"(ending|choice|option|answer)[_-]?(\d+|[a-zA-Z])", name)
        if match and is_text(rows, name):
            numbered.setdefault(match.group(1), []).append(name)
    if len(numbered) != 1 or len(next(iter(numbered.values()))) < 2:
        raise ValueError(
            f"Which columns hold the choices is not clear. Columns there: {', '.join(rows.column_names)}. "
            f"Pass --choice_columns: one with lists, or one for each choice."
        )
    return sorted(next(iter(numbered.values())))


class MultipleChoice(Task):
    """Each choice is read beside what stands before it. Windows of one would decide nothing: long ones are refused."""

    name = "multiple-choice"
    auto_class = AutoModelForMultipleChoice
    pipeline_tag = "multiple-choice"
    best_metric = "accuracy"
    long_texts = ("refuse", "truncate")
    no_packing = ("the choices of a row belong together",)

    def __init__(self, arguments, splits):
        super().__init__(arguments, splits)
        train = splits["train"]
        self.choice_columns = find_choice_columns(train, arguments.choice_columns)
        numbers = [n for n in train.column_names if str(getattr(train.features[n], "dtype", "")).startswith("int")]
        usual = [n for n in ("label", "answer", "answerKey", "correct") if n in train.column_names]
        self.label_column = find_label_column(train, arguments.label_column, usual[:1] or numbers, "the right choice")
        self.text_columns = arguments.text_columns or self.find_texts(train)
        for split, rows in splits.items():
            check_columns(rows, self.text_columns, f"--text_columns ({split} data)")
            check_columns(rows, self.choice_columns, f"--choice_columns ({split} data)")
        check_columns(splits["validation"], [self.label_column], "--label_column (validation data)")
        self.count = len(self.choices(train[0]))
        for split in ("train", "validation"):
            self.targets(splits[split], split)

    def find_texts(self, rows):
        others = {*self.choice_columns, self.label_column, "id"}
        texts = [name for name in rows.column_names if is_text(rows, name) and name not in others]
        if not texts or len(texts) > 2:
            raise ValueError(
                f"Which columns stand before the choices is not clear. Columns there: {', '.join(rows.column_names)}. "
                f"Pass --text_columns with one or more of them; they are joined by a blank."
            )
        return texts

    def choices(self, row):
        return row[self.choice_columns[0]] if len(self.choice_columns) == 1 else [row[c] for c in self.choice_columns]

    def texts(self, rows):
        for row in rows:
            yield from (str(row[column]) for column in self.text_columns)
            yield from self.choices(row)

    def targets(self, rows, split="data"):
        """The number of the right choice, from 0: of numbers, digits, or letters (A is 0)."""
        feature = rows.features[self.label_column]
        numbers = []
        for place, value in enumerate(rows[self.label_column]):
            name = feature.int2str(value) if isinstance(feature, ClassLabel) and value >= 0 else value
            text = str(value if isinstance(feature, ClassLabel) else name).strip()
            if len(text) == 1 and text in string.ascii_uppercase:
                text = str(string.ascii_uppercase.index(text))
            number = int(text) if re.fullmatch(r"\d+", text) else -1
            if not 0 <= number < self.count:
                raise ValueError(
                    f"The right choice is a number from 0 to {self.count - 1} or a letter from A, row {place} of the "
                    f"{split} has {value!r} in column {self.label_column!r}. Convert the column, or pass another."
                )
            numbers.append(number)
        return numbers

    def is_labelled(self, rows):
        return super().is_labelled(rows) and -1 not in rows[self.label_column]

    def features(self, rows, encoder, labelled=True):
        targets = self.targets(rows) if labelled else None

        def encode(batch, indices):
            made = []
            for place, index in enumerate(indices):
                row = {name: batch[name][place] for name in batch}
                choices = self.choices(row)
                if len(choices) != self.count:
                    raise ValueError(
                        f"Row {index} has {len(choices)} choices, the first training row {self.count}. All rows of "
                        f"multiple-choice need equally many: fill them up or leave them out."
                    )
                context = encoder.ids([" ".join(str(row[column]) for column in self.text_columns)])[0]
                ids = encoder.ids(choices)
                pairs = [encoder.rows(context, choice, f"Row {index}")[0] for choice in ids]
                joined = {name: [pair[name] for pair in pairs] for name in pairs[0]}
                joined["length"] = max(joined["length"])
                joined |= {"example": index, "long": any(encoder.is_long(context, choice) for choice in ids)}
                made.append({**joined, "labels": targets[index]} if labelled else joined)
            return made

        return self.map(rows, encode, encoder)

    def collator(self, tokenizer):
        return PaddingCollator(tokenizer)

    def compute_metrics(self, rows, features):
        targets = self.targets(rows)

        def compute(prediction):
            return score("accuracy", np.asarray(prediction.predictions).argmax(-1), targets)

        return compute

    def predictions(self, rows, features, outputs):
        for index, scores in enumerate(softmax(np.asarray(outputs, dtype=np.float64))):
            yield {"index": index, "prediction": int(scores.argmax()), "scores": [round(float(p), 5) for p in scores]}
