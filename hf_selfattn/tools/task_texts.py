"""A label, several labels or a number for a text or a pair of texts."""

import numpy as np
import torch
from datasets import ClassLabel
from transformers import AutoModelForSequenceClassification

from .collators import PaddingCollator
from .labels import find_label_column, is_list, label_names, names_in
from .scoring import score
from .sources import check_columns, is_text
from .tasks import Task, joined_windows, softmax

PAIRS = (("sentence1", "sentence2"), ("text1", "text2"), ("premise", "hypothesis"), ("question1", "question2"),
         ("question", "sentence"), ("text_a", "text_b"))  # fmt: skip
SINGLE = ("text", "sentence", "content", "document", "review")


def find_text_columns(rows, given, label=None):
    """The column or the two columns of text: as given, or by their usual names, or the only column of strings."""
    if given:
        check_columns(rows, given, "--text_columns")
        if len(given) > 2:
            raise ValueError(f"--text_columns takes one text or a pair, got {len(given)}: {', '.join(given)}.")
        wrong = [name for name in given if not is_text(rows, name)]
        if wrong:
            raise ValueError(f"--text_columns: column {wrong[0]!r} holds {rows.features[wrong[0]]}, not text.")
        return list(given)
    texts = [name for name in rows.column_names if is_text(rows, name) and name != label]
    pairs = [list(pair) for pair in PAIRS if set(pair) <= set(texts)]
    singles = [[name] for name in SINGLE if name in texts]
    found = pairs[:1] or singles[:1] or ([texts] if len(texts) == 1 else [])
    if not found:
        raise ValueError(
            f"Which column holds the text is not clear. Columns there: {', '.join(rows.column_names)}. "
            f"Pass --text_columns with one of them, or with two for a pair."
        )
    return found[0]


class TextTask(Task):
    """What classification and regression of texts share: the texts."""

    auto_class = AutoModelForSequenceClassification
    pipeline_tag = "text-classification"

    def __init__(self, arguments, splits):
        super().__init__(arguments, splits)
        train = splits["train"]
        self.label_column = find_label_column(train, arguments.label_column, self.candidates(train))
        self.text_columns = find_text_columns(train, arguments.text_columns, self.label_column)
        check_columns(splits["validation"], [self.label_column], "--label_column (validation data)")
        for split, rows in splits.items():
            check_columns(rows, self.text_columns, f"--text_columns ({split} data)")

    def texts(self, rows):
        for column in self.text_columns:
            yield from rows[column]

    def features(self, rows, encoder, labelled=True):
        targets = self.targets(rows) if labelled else None

        def encode(batch, indices):
            sides = [encoder.ids(batch[column]) for column in self.text_columns]
            made = []
            for index, *ids in zip(indices, *sides, strict=True):
                long = encoder.is_long(*ids)
                for row in encoder.rows(*ids, where=f"Row {index}, {' and '.join(self.text_columns)},"):
                    label = {"labels": targets[index]} if labelled else {}
                    made.append({**row, **label, "example": index, "long": long})
            return made

        return self.map(rows, encode, encoder)


class TextClassification(TextTask):
    """One label for each text, or (where the label column holds lists) any number of them."""

    name = "text-classification"

    def __init__(self, arguments, splits):
        super().__init__(arguments, splits)
        train = splits["train"]
        self.multi_label = is_list(train.features[self.label_column])
        if self.multi_label and arguments.baselines:
            raise ValueError("--baselines are for one label a text, and the label column holds lists. Leave them out.")
        self.best_metric = "f1_micro" if self.multi_label else "accuracy"
        self.label_names = label_names(train, self.label_column)
        self.check_labels(splits)

    def candidates(self, rows):
        kinds = {name: rows.features[name] for name in rows.column_names}
        classes = [name for name, kind in kinds.items() if isinstance(kind, ClassLabel)]
        return classes or [
            n for n, kind in kinds.items() if str(getattr(kind, "dtype", "")).startswith(("int", "bool"))
        ]

    def config_changes(self):
        names = self.label_names
        return {
            "num_labels": len(names),
            "id2label": dict(enumerate(names)),
            "label2id": {name: number for number, name in enumerate(names)},
            "problem_type": f"{'multi' if self.multi_label else 'single'}_label_classification",
        }

    def targets(self, rows):
        number = {name: index for index, name in enumerate(self.label_names)}
        names = names_in(rows, self.label_column)
        if not self.multi_label:
            return [number[name] for name in names]
        return [[float(name in chosen) for name in self.label_names] for chosen in map(set, names)]

    def is_labelled(self, rows):
        if not super().is_labelled(rows):
            return False
        names = names_in(rows, self.label_column)
        return all(n is not None and (not self.multi_label or None not in n) for n in names)

    def collator(self, tokenizer):
        return PaddingCollator(tokenizer, label_dtype=torch.float32 if self.multi_label else torch.int64)

    def compute_metrics(self, rows, features):
        targets = np.asarray(self.targets(rows))

        def compute(prediction):
            logits = joined_windows(prediction.predictions, features, len(rows))
            if self.multi_label:
                chosen, wanted = (logits > 0).astype(int), targets.astype(int)
                micro, macro = (score("f1", chosen, wanted, "multilabel", average=a)["f1"] for a in ("micro", "macro"))
                return {"f1_micro": micro, "f1_macro": macro, "accuracy": float((chosen == wanted).all(-1).mean())}
            chosen = logits.argmax(-1)
            return {
                **score("accuracy", chosen, targets),
                **score("f1", chosen, targets, average="macro", labels=sorted(set(targets.tolist()))),
                **score("matthews_correlation", chosen, targets),
            }

        return compute

    def predictions(self, rows, features, outputs):
        logits = joined_windows(outputs, features, len(rows))
        shares = 1 / (1 + np.exp(-logits)) if self.multi_label else softmax(logits)
        for index, share in enumerate(shares):
            scores = {name: round(float(p), 5) for name, p in zip(self.label_names, share, strict=True)}
            best = self.label_names[int(share.argmax())]
            chosen = [name for name, p in scores.items() if p > 0.5] if self.multi_label else best
            yield {"index": index, "prediction": chosen, "scores": scores}


class TextRegression(TextTask):
    """A number for each text or pair."""

    name = "text-regression"
    best_metric = "pearsonr"

    def __init__(self, arguments, splits):
        super().__init__(arguments, splits)
        self.targets(splits["train"])
        self.targets(splits["validation"])

    def candidates(self, rows):
        kinds = {name: str(getattr(rows.features[name], "dtype", "")) for name in rows.column_names}
        return [name for name, kind in kinds.items() if kind.startswith("float")]

    def config_changes(self):
        return {"num_labels": 1, "problem_type": "regression"}

    def targets(self, rows):
        values = rows[self.label_column][:]
        try:
            numbers = np.array([np.nan if value is None else float(value) for value in values])
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"--task text-regression needs numbers in column {self.label_column!r}, found {values[0]!r}. "
                f"Pass another --label_column, or --task text-classification."
            ) from error
        if not np.isfinite(numbers).all():
            place = int(np.flatnonzero(~np.isfinite(numbers))[0])
            raise ValueError(
                f"Column {self.label_column!r} has no number in row {place} ({values[place]!r}). Remove such rows."
            )
        return numbers.tolist()

    def collator(self, tokenizer):
        return PaddingCollator(tokenizer, label_dtype=torch.float32)

    def compute_metrics(self, rows, features):
        targets = np.asarray(self.targets(rows))

        def compute(prediction):
            numbers = joined_windows(prediction.predictions, features, len(rows)).reshape(-1)
            correlations = {**score("pearsonr", numbers, targets), **score("spearmanr", numbers, targets)}
            return {**correlations, "mean_squared_error": float(((numbers - targets) ** 2).mean())}

        return compute

    def predictions(self, rows, features, outputs):
        for index, number in enumerate(joined_windows(outputs, features, len(rows)).reshape(-1)):
            yield {"index": index, "prediction": round(float(number), 5)}
