"""A label for each word of a text."""

import functools
import re

import numpy as np
from datasets import Value
from transformers import AutoModelForTokenClassification

from .collators import PaddingCollator
from .labels import element, find_label_column, label_names, names_in
from .scoring import score
from .sources import check_columns
from .tasks import Task
from .windows import too_long

WORD_COLUMNS = ("tokens", "words")
# scripts that put no blank between words
UNSPACED = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u2e80-\ua4cf\uf900-\ufaff\ufe30-\uffef\U00020000-\U0003134f]"
)


def is_words(feature):
    inner = element(feature)
    return isinstance(inner, Value) and inner.dtype in ("string", "large_string")


def as_in_text(words):
    """Each word with the blank that stands before it in a text, so that its tokens are those of running text."""
    previous = [None, *words]
    return [
        word if before is None or UNSPACED.match(word) or UNSPACED.match(before[-1:]) else f" {word}"
        for before, word in zip(previous, words, strict=False)
    ]


class TokenClassification(Task):
    """Each word is judged by its first token with text; the others have no label. Long texts are cut between words.

    (Where a blank is a token of its own, pipelines find no text in it.)
    """

    name = "token-classification"
    auto_class = AutoModelForTokenClassification
    pipeline_tag = "token-classification"

    def __init__(self, arguments, splits):
        super().__init__(arguments, splits)
        train = splits["train"]
        lists = [name for name in train.column_names if element(train.features[name]) is not None]
        self.word_column = self.find_word_column(train, arguments.text_columns)
        candidates = [name for name in lists if name != self.word_column]
        self.label_column = find_label_column(train, arguments.label_column, candidates, "the words' labels")
        for split, rows in splits.items():
            check_columns(rows, [self.word_column], f"--text_columns ({split} data)")
        check_columns(splits["validation"], [self.label_column], "--label_column (validation data)")
        if element(train.features[self.label_column]) is None:
            raise ValueError(
                f"--label_column: {self.label_column!r} holds {train.features[self.label_column]}; "
                f"token-classification needs a list with a label for each word. Columns with lists: "
                f"{', '.join(lists)}."
            )
        self.label_names = label_names(train, self.label_column)
        self.check_labels(splits)
        self.is_chunks = any(name.startswith(("B-", "I-")) for name in self.label_names)
        self.best_metric = "f1" if self.is_chunks else "accuracy"

    def find_word_column(self, rows, given):
        if given:
            check_columns(rows, given, "--text_columns")
            if len(given) > 1 or not is_words(rows.features[given[0]]):
                raise ValueError(
                    f"--text_columns: token-classification takes one column with lists of words, {given[0]!r} holds "
                    f"{rows.features[given[0]]}."
                )
            return given[0]
        lists = [name for name in rows.column_names if is_words(rows.features[name])]
        found = [name for name in WORD_COLUMNS if name in lists][:1] or lists
        if len(found) != 1:
            raise ValueError(
                f"Which column holds the words is not clear. Columns there: {', '.join(rows.column_names)}. "
                f"Pass --text_columns with one that holds lists of words."
            )
        return found[0]

    def config_changes(self):
        names = self.label_names
        return {
            "num_labels": len(names),
            "id2label": dict(enumerate(names)),
            "label2id": {name: number for number, name in enumerate(names)},
        }

    def texts(self, rows):
        return ("".join(as_in_text(words)) for words in rows[self.word_column])

    def targets(self, rows):
        number = {name: index for index, name in enumerate(self.label_names)}
        return [[number[name] for name in names] for names in names_in(rows, self.label_column)]

    def is_labelled(self, rows):
        return super().is_labelled(rows) and all(None not in names for names in names_in(rows, self.label_column))

    def windows(self, pieces, room, where):
        """(first word, last word + 1) of each window: as many whole words as fit."""
        total = sum(map(len, pieces))
        if total > room and self.how_long == "refuse":
            raise too_long(total, room, where)
        sizes = [min(len(piece), room) for piece in pieces]
        bounds, start, used = [], 0, 0
        for word, size in enumerate(sizes):
            if used and used + size > room:
                bounds.append((start, word))
                start, used = word, 0
            used += size
        bounds.append((start, len(sizes)))
        return bounds[:1] if self.how_long == "truncate" else bounds

    def features(self, rows, encoder, labelled=True):
        targets = self.targets(rows) if labelled else None
        room = encoder.frame.room(encoder.max_seq_length)
        before, unknown = len(encoder.frame.before), encoder.tokenizer.unk_token_id

        @functools.cache
        def is_blank(number):
            return not encoder.tokenizer.decode([number]).strip()

        def first_with_text(part):
            return next((place for place, number in enumerate(part) if not is_blank(number)), 0)

        def encode(batch, indices):
            made = []
            for index, words in zip(indices, batch[self.word_column], strict=True):
                if labelled and len(words) != len(targets[index]):
                    raise ValueError(
                        f"Row {index} has {len(words)} words ({self.word_column}) and {len(targets[index])} labels "
                        f"({self.label_column}). Each word needs one label."
                    )
                pieces = [ids or [unknown] for ids in encoder.ids(as_in_text(words))]  # a word of blanks alone
                bounds = self.windows(pieces, room, f"Row {index}") if words else []
                for start, stop in bounds:
                    parts = [piece[:room] for piece in pieces[start:stop]]
                    row = encoder.frame.row([number for part in parts for number in part])
                    starts = before + np.cumsum([0, *[len(part) for part in parts[:-1]]])
                    places = (starts + [first_with_text(part) for part in parts]).tolist()
                    row |= {"places": places, "first_word": start, "example": index}
                    row["long"] = sum(map(len, pieces)) > room
                    if labelled:
                        row["labels"] = [-100] * row["length"]
                        for place, word in zip(places, range(start, stop), strict=True):
                            row["labels"][place] = targets[index][word]
                    made.append(row)
            return made

        return self.map(rows, encode, encoder)

    def collator(self, tokenizer):
        return PaddingCollator(tokenizer)

    def tags(self, rows, features, outputs):
        """For each example its words' labels; None for words that were truncated."""
        tags = [[None] * len(words) for words in rows[self.word_column]]
        for row, scores in zip(features, np.asarray(outputs), strict=False):
            best = scores[row["places"]].argmax(-1)
            for word, number in enumerate(best, start=row["first_word"]):
                tags[row["example"]][word] = self.label_names[number]
        return tags

    def compute_metrics(self, rows, features):
        # a word cut off by `truncate` counts as wrong, not as absent
        return lambda prediction: self.score(self.tags(rows, features, prediction.predictions), rows)

    def score(self, tags, rows):
        """The metrics of these tags, a list for each row; those of chunks where labels begin with B- and I-."""
        wanted = names_in(rows, self.label_column)
        if self.is_chunks:
            return score("seqeval", [[tag or "O" for tag in row] for row in tags], wanted)
        number = {name: index for index, name in enumerate(self.label_names)}
        chosen = [number.get(tag, -1) for row in tags for tag in row]
        right = [number[name] for row in wanted for name in row]
        macro = score("f1", chosen, right, average="macro", labels=sorted(set(right)))
        return {**score("accuracy", chosen, right), **macro}

    def predictions(self, rows, features, outputs):
        words = rows[self.word_column]
        for index, tags in enumerate(self.tags(rows, features, outputs)):
            yield {"index": index, "words": words[index], "prediction": tags}
