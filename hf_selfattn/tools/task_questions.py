"""The answer to a question, as a part of a text."""

import itertools

from transformers import AutoModelForQuestionAnswering
from transformers.utils import logging

from .answering import best_answers, context_windows
from .collators import PaddingCollator
from .scoring import score
from .sources import check_columns
from .tasks import Task
from .windows import too_long

logger = logging.get_logger(__name__)


def read_answers(value):
    """(texts, starts) of a row's answers, from {text: […], answer_start: […]} or a list of {text, answer_start}."""
    if value is None:
        return [], []
    if isinstance(value, list):
        return [answer["text"] for answer in value], [answer["answer_start"] for answer in value]
    return list(value["text"]), list(value["answer_start"])


def locate(context, text, start):
    """(start, end) in characters, without blanks at the ends; None where the text is not at (or near) its place."""
    if context[start : start + len(text)] != text:
        found = context.find(text, max(0, start - 20))
        if not text or found < 0 or found > start + 20:
            return None
        start = found
    inner = text.strip()
    start += len(text) - len(text.lstrip())
    return (start, start + len(inner)) if inner else None


def token_span(offsets, answer):
    """(first token, last token) that cover the answer's characters; None where it is not wholly within the offsets."""
    start, end = answer
    real = [i for i, (a, b) in enumerate(offsets) if b > a]
    if not real or offsets[real[0]][0] > start or offsets[real[-1]][1] < end:
        return None
    first = next((i for i in real if offsets[i][1] > start), None)
    last = next((i for i in reversed(real) if offsets[i][0] < end), None)
    return None if first is None or last is None or last < first else (first, last)


class QuestionAnswering(Task):
    """The context is read in overlapping windows; a window without the answer points to the first token."""

    name = "question-answering"
    auto_class = AutoModelForQuestionAnswering
    pipeline_tag = "question-answering"
    best_metric = "f1"
    no_packing = ("an answer is a place in a row of its own",)

    def __init__(self, arguments, splits):
        super().__init__(arguments, splits)
        given = arguments.text_columns or ["question", "context"]
        if len(given) != 2:
            raise ValueError(f"--text_columns of question-answering are question and context, got {', '.join(given)}.")
        self.question_column, self.context_column = given
        self.label_column = arguments.label_column or "answers"
        for split, rows in splits.items():
            check_columns(rows, given, f"--text_columns ({split} data)")
            if split != "test":
                check_columns(rows, [self.label_column], f"--label_column ({split} data)")
                self.check_answers(rows)
        self.has_unanswerable = any(not texts for texts, _ in map(read_answers, splits["train"][self.label_column]))

    def check_answers(self, rows):
        try:
            read_answers(rows[0][self.label_column])
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"Column {self.label_column!r} must hold answers as {{'text': […], 'answer_start': […]}}, found "
                f"{rows[0][self.label_column]!r}. Pass another --label_column, or convert it."
            ) from error

    def is_labelled(self, rows):
        return self.label_column in rows.column_names and None not in rows[self.label_column]

    def texts(self, rows):
        yield from rows[self.question_column]
        yield from rows[self.context_column]

    def features(self, rows, encoder, labelled=True):
        if labelled:
            self.report_lost(rows)

        def encode(batch, indices):
            # Without blanks at its ends: a question of SQuAD has 25,000 of them.
            questions = encoder.ids([question.strip() for question in batch[self.question_column]])
            contexts = encoder.tokenizer(
                batch[self.context_column], add_special_tokens=False, return_offsets_mapping=True, verbose=False
            )
            made = []
            for place, index in enumerate(indices):
                answer = None
                if labelled:
                    texts, starts = read_answers(batch[self.label_column][place])
                    answer = locate(batch[self.context_column][place], texts[0], starts[0]) if texts else None
                ids, offsets = contexts["input_ids"][place], contexts["offset_mapping"][place]
                for row in self.windows(questions[place], ids, offsets, encoder, index):
                    made.append(self.with_answer(row, answer) if labelled else row)
            return made

        return self.map(rows, encode, encoder)

    def report_lost(self, rows):
        """Answers that are not where they should be are never dropped in silence."""
        lost = []
        for index, (context, value) in enumerate(zip(rows[self.context_column], rows[self.label_column], strict=True)):
            texts, starts = read_answers(value)
            if texts and locate(context, texts[0], starts[0]) is None:
                lost.append(index)
        if lost:
            logger.warning(
                f"{len(lost):,} of {len(rows):,} answers do not stand at their answer_start (row {lost[0]} is one); "
                f"they are treated as not in the text."
            )

    def windows(self, question, ids, offsets, encoder, index):
        room = encoder.frame.room(encoder.max_seq_length, texts=2)
        if self.how_long == "refuse" and len(question) + len(ids) > room:
            raise too_long(len(question) + len(ids), room, f"Row {index}")
        if len(question) > room // 2:
            if self.how_long == "split":
                raise ValueError(
                    f"Row {index}: the question has {len(question)} tokens, more than half of the {room} that a row "
                    f"holds. Pass --long_texts truncate or a larger --max_seq_length."
                )
            question = question[: room // 2]
        left = room - len(question)
        rows = context_windows(encoder.frame, question, ids, offsets, left, min(self.arguments.doc_stride, left // 2))
        for row in rows[:1] if self.how_long == "truncate" else rows:
            yield row | {"example": index, "long": len(rows) > 1}

    def with_answer(self, row, answer):
        span = token_span(row["offsets"], answer) if answer else None
        first, last = (row["context_start"] + place for place in span) if span else (0, 0)
        return {**row, "start_positions": first, "end_positions": last}

    def collator(self, tokenizer):
        return PaddingCollator(tokenizer, columns=("start_positions", "end_positions"))

    def answers(self, rows, features, outputs):
        """(answer, probability) for each example: the best span in any of its windows."""
        windows = zip(features, *outputs[:2], strict=False)
        for index, group in itertools.groupby(windows, key=lambda window: window[0]["example"]):
            context, longest = rows[index][self.context_column], self.arguments.max_answer_length
            [best] = best_answers(context, list(group), longest, self.has_unanswerable)
            yield best["answer"], best["score"]

    def compute_metrics(self, rows, features):
        wanted = [texts for texts, _ in map(read_answers, rows[self.label_column])]

        def compute(prediction):
            given = [answer for answer, _ in self.answers(rows, features, prediction.predictions)]
            return score("squad", given, wanted)

        return compute

    def predictions(self, rows, features, outputs):
        names = rows["id"] if "id" in rows.column_names else range(len(rows))
        for name, (answer, value) in zip(names, self.answers(rows, features, outputs), strict=True):
            yield {"id": name, "prediction": answer, "score": float(f"{value:.4g}")}
