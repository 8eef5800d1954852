"""Columns and labels found, words aligned, answers traced, windows joined; what is wrong is said at once."""

import itertools

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, List, Value
from transformers import AutoConfig

from hf_selfattn.tools.answering import window_starts
from hf_selfattn.tools.task_choices import MultipleChoice
from hf_selfattn.tools.task_questions import QuestionAnswering, locate, token_span
from hf_selfattn.tools.task_texts import TextClassification, TextRegression
from hf_selfattn.tools.task_tokens import TokenClassification, as_in_text
from hf_selfattn.tools.tasks import TaskArguments

from .train_scripts import sentences, tiny_tokenizer


def splits_of(train, validation=None):
    return {"train": Dataset.from_dict(train), "validation": Dataset.from_dict(validation or train)}


def features_of(task, rows, length=512, **kwargs):
    tokenizer = tiny_tokenizer()
    encoder = task.encoder(tokenizer, AutoConfig.for_model("selfattn"), length)
    return task.features(rows, encoder, **kwargs)


class Output:
    def __init__(self, predictions):
        self.predictions = predictions


def perfect(size, targets, scale=9.0):
    return np.eye(size)[targets] * scale


TEXTS = sentences(12)


class TestTextClassification:
    def test_columns_and_names_are_found(self):
        task = TextClassification(
            TaskArguments(), splits_of({"id": range(12), "sentence": TEXTS, "label": ["b", "a"] * 6})
        )
        assert (task.text_columns, task.label_column) == (["sentence"], "label")
        changes = task.config_changes()
        assert changes["id2label"] == {0: "a", 1: "b"}
        assert changes["problem_type"] == "single_label_classification"
        rows = splits_of({"sentence": TEXTS, "label": ["b", "a"] * 6})["train"]
        assert task.targets(rows) == [1, 0] * 6

    def test_a_data_sets_own_names_are_kept_in_their_order(self):
        names = ClassLabel(names=["zebra", "ant", "never"])
        rows = Dataset.from_dict({"text": TEXTS, "label": [0, 1] * 6}, Features(text=Value("string"), label=names))
        task = TextClassification(TaskArguments(), {"train": rows, "validation": rows})
        assert task.label_names == ["zebra", "ant", "never"]

    def test_names_that_are_numbered_otherwise_in_validation_are_matched_by_name(self):
        features = [
            Features(text=Value("string"), label=ClassLabel(names=names)) for names in (["x", "y"], ["y", "x"])
        ]
        train, validation = (Dataset.from_dict({"text": TEXTS, "label": [0, 1] * 6}, f) for f in features)
        task = TextClassification(TaskArguments(), {"train": train, "validation": validation})
        assert task.targets(train) == [0, 1] * 6
        assert task.targets(validation) == [1, 0] * 6

    def test_labels_that_training_never_had_are_refused(self):
        message = r"labels that the training data never has: 'bb' \(2x\) Did you mean 'b'\?. Training labels: a, b"
        with pytest.raises(ValueError, match=message):
            TextClassification(
                TaskArguments(),
                splits_of({"text": TEXTS, "label": ["a", "b"] * 6}, {"text": TEXTS[:3], "label": ["a", "bb", "bb"]}),
            )

    def test_empty_labels_are_refused(self):
        features = Features(text=Value("string"), label=ClassLabel(names=["x", "y"]))
        good = Dataset.from_dict({"text": TEXTS, "label": [0, 1] * 6}, features)
        bad = Dataset.from_dict({"text": TEXTS, "label": [0, -1] * 6}, features)
        with pytest.raises(ValueError, match="6 labels in column 'label' of the training data are empty"):
            TextClassification(TaskArguments(), {"train": bad, "validation": good})
        with pytest.raises(ValueError, match="6 labels in column 'label' of the validation data are empty"):
            TextClassification(TaskArguments(), {"train": good, "validation": bad})

    @pytest.mark.parametrize(
        ("options", "columns", "message"),
        [
            ({"text_columns": ["txet"]}, {}, "no column 'txet'. Columns there: text, label. Did you mean 'text'"),
            ({"label_column": "lable"}, {}, "no column 'lable'. Columns there: text, label. Did you mean 'label'"),
            ({"text_columns": ["label"]}, {"label": [0, 1] * 6}, "column 'label' holds .*, not text"),
            ({"text_columns": ["text"] * 3}, {}, "takes one text or a pair, got 3"),
            ({}, {"label": ["a"] * 12}, r"needs two labels or more, .* has \['a'\]"),
            ({"long_texts": "cut"}, {}, "--long_texts is one of split, truncate, refuse here, got 'cut'"),
        ],
    )
    def test_bad_columns_are_refused(self, options, columns, message):
        with pytest.raises(ValueError, match=message):
            TextClassification(TaskArguments(**options), splits_of({"text": TEXTS, "label": ["a", "b"] * 6} | columns))

    def test_columns_that_are_not_clear_are_listed(self):
        with pytest.raises(ValueError, match=r"Which column holds the labels is not clear. Columns there: text, p, q"):
            TextClassification(TaskArguments(), splits_of({"text": TEXTS, "p": [1, 2] * 6, "q": [1, 2] * 6}))
        with pytest.raises(
            ValueError, match=r"Which column holds the text is not clear. Columns there: one, two, label"
        ):
            TextClassification(TaskArguments(), splits_of({"one": TEXTS, "two": TEXTS, "label": [1, 2] * 6}))

    def test_windows_of_a_long_text_are_judged_together(self):
        texts = [" ".join(sentences(n, seed=n)) for n in (3, 9, 4, 12)]
        splits = splits_of({"text": texts, "label": ["a", "b", "b", "a"]})
        task = TextClassification(TaskArguments(), splits)
        features = features_of(task, splits["train"], length=16)
        examples = np.array(features["example"])
        assert (np.bincount(examples) > 1).all()
        assert [features["labels"][i] for i in np.unique(examples, return_index=True)[1]] == [0, 1, 1, 0]
        logits = np.random.default_rng(0).normal(size=(len(features), 2))
        means = [logits[examples == i].mean(0) for i in range(4)]
        result = task.compute_metrics(splits["train"], features)(Output(logits))
        right = [int(m.argmax()) == t for m, t in zip(means, [0, 1, 1, 0], strict=True)]
        assert result["accuracy"] == np.mean(right)
        lines = list(task.predictions(splits["train"], features, logits))
        assert [line["prediction"] for line in lines] == [["a", "b"][int(m.argmax())] for m in means]
        assert all(abs(sum(line["scores"].values()) - 1) < 1e-4 for line in lines)

    def test_long_texts_are_refused_on_request(self):
        splits = splits_of({"text": [*TEXTS[:3], " ".join(TEXTS)], "label": ["a", "b"] * 2})
        task = TextClassification(TaskArguments(long_texts="refuse"), splits)
        with pytest.raises(ValueError, match=r"Row 3, text, has .* tokens, more than the 30 that a row holds"):
            features_of(task, splits["train"], length=32)

    def test_of_a_pair_the_longer_text_is_cut(self):
        tokenizer = tiny_tokenizer()
        long, short = " ".join(sentences(9)), "the cat"
        ids = {text: tokenizer(text, add_special_tokens=False)["input_ids"] for text in (long, short)}
        splits = splits_of({"premise": [long, short], "hypothesis": [short, long], "label": ["a", "b"]})
        task = TextClassification(TaskArguments(), splits)
        assert task.text_columns == ["premise", "hypothesis"]
        rows = features_of(task, splits["train"], length=24)
        for example, first in enumerate((long, short)):
            sides = [[], []]
            for row in rows:
                if row["example"] == example:
                    inner = row["input_ids"][1:-1]
                    middle = inner.index(tokenizer.sep_token_id)
                    sides[0].append(inner[:middle])
                    sides[1].append(inner[middle + 1 :])
            cut, whole = (sides[0], sides[1]) if first == long else (sides[1], sides[0])
            assert list(itertools.chain(*cut)) == ids[long]
            assert all(part == ids[short] for part in whole)
        both = splits_of({"premise": [long] * 2, "hypothesis": [long] * 2, "label": ["a", "b"]})
        with pytest.raises(ValueError, match=r"is a pair of .* tokens. Windows are cut from the longer text"):
            features_of(TextClassification(TaskArguments(), both), both["train"], length=24)
        kept = features_of(TextClassification(TaskArguments(long_texts="truncate"), both), both["train"], length=24)
        assert kept["length"] == [24, 24]

    def test_lists_of_labels_are_several_labels(self):
        splits = splits_of({"text": TEXTS[:4], "label": [["x"], ["x", "y"], [], ["z"]]})
        task = TextClassification(TaskArguments(), splits)
        assert task.config_changes()["problem_type"] == "multi_label_classification"
        targets = task.targets(splits["train"])
        assert targets == [[1, 0, 0], [1, 1, 0], [0, 0, 0], [0, 0, 1]]
        features = features_of(task, splits["train"])
        result = task.compute_metrics(splits["train"], features)(Output(np.array(targets) * 2 - 1))
        assert result == {"f1_micro": 1, "f1_macro": 1, "accuracy": 1}
        lines = list(task.predictions(splits["train"], features, np.array(targets) * 2 - 1))
        assert [line["prediction"] for line in lines] == [["x"], ["x", "y"], [], ["z"]]

    def test_a_test_set_without_labels_is_predicted_only(self):
        splits = splits_of({"text": TEXTS, "label": ["a", "b"] * 6})
        wrong = {"test": Dataset.from_dict({"text": ["x"], "label": ["c"]})}
        with pytest.raises(ValueError, match="The test data has labels that the training data never has: 'c'"):
            TextClassification(TaskArguments(), splits | wrong)
        task = TextClassification(TaskArguments(), splits)
        test = Dataset.from_dict({"text": TEXTS})
        assert not task.is_labelled(test)
        assert task.is_labelled(splits["train"])
        assert "labels" not in features_of(task, test, labelled=False).column_names


class TestTextRegression:
    def test_numbers(self):
        splits = splits_of({"sentence1": TEXTS, "sentence2": TEXTS[::-1], "score": [i / 2 for i in range(12)]})
        task = TextRegression(TaskArguments(), splits)
        assert (task.text_columns, task.label_column) == (["sentence1", "sentence2"], "score")
        features = features_of(task, splits["train"])
        result = task.compute_metrics(splits["train"], features)(Output(np.array(features["labels"])[:, None] * 2 + 1))
        assert result["pearsonr"] == pytest.approx(1)
        assert result["spearmanr"] == pytest.approx(1)
        assert result["mean_squared_error"] == pytest.approx(np.mean([(i / 2 + 1) ** 2 for i in range(12)]))

    def test_what_is_no_number_is_refused(self):
        with pytest.raises(ValueError, match="needs numbers in column 'label', found 'a'"):
            TextRegression(TaskArguments(), splits_of({"text": TEXTS, "label": ["a"] * 12}))
        with pytest.raises(ValueError, match="has no number in row 1"):
            TextRegression(TaskArguments(), splits_of({"text": TEXTS, "label": [1.0, None] * 6}))


WORDS = [["The", "cat", "likes", "naïveté", "."], ["我", "爱", "北京", "x", "y"], ["one"], ["a", "", " ", "b"]]
TAGS = [["D", "N", "V", "N", "P"], ["R", "V", "N", "X", "X"], ["N"], ["D", "P", "P", "N"]]


class TestTokenClassification:
    def splits(self, **columns):
        return splits_of({"id": range(4), "tokens": WORDS, "tags": TAGS} | columns)

    def test_each_word_is_labelled_at_its_first_token(self):
        """Found again by decoding: the tokens from one label to the next are the word."""
        splits, tokenizer = self.splits(), tiny_tokenizer()
        task = TokenClassification(TaskArguments(), splits)
        assert (task.word_column, task.label_column, task.best_metric) == ("tokens", "tags", "accuracy")
        for row, words, tags in zip(features_of(task, splits["train"]), WORDS, TAGS, strict=True):
            starts = [i for i, label in enumerate(row["labels"]) if label != -100]
            assert [task.label_names[row["labels"][i]] for i in starts] == tags
            for word, start, stop in zip(words, starts, [*starts[1:], row["length"] - 1], strict=True):
                text = tokenizer.decode(row["input_ids"][start:stop]).strip()
                assert text == word.strip()

    def test_blanks_stand_where_they_stand_in_a_text(self):
        assert "".join(as_in_text(["The", "cat", "爱", "北京", "and", "x"])) == "The cat爱北京and x"

    def test_a_blank_that_is_a_token_of_its_own_is_not_labelled(self):
        """Z never stood behind a blank when the tokenizer was trained: " Zebra" is "Ġ", "Z", and so on."""
        words, tokenizer = ["Zebra", "Zebra", "cat", "  Zebra", " ", "Q"], tiny_tokenizer()
        assert tokenizer.tokenize(" Zebra")[:2] == ["Ġ", "Z"]
        splits = splits_of({"tokens": [words] * 2, "tags": [["B-X", "B-X", "O", "I-X", "O", "B-X"]] * 2})
        task = TokenClassification(TaskArguments(), splits)
        for row in features_of(task, splits["train"]):
            tokens = tokenizer.convert_ids_to_tokens([row["input_ids"][place] for place in row["places"]])
            assert tokens == ["Z", "Z", "Ġcat", "Z", "Ġ", "Q"]
            assert [task.label_names[row["labels"][place]] for place in row["places"]] == splits["train"]["tags"][0]
            assert sum(label != -100 for label in row["labels"]) == len(words)

    @pytest.mark.parametrize("length", [6, 8, 13])
    def test_long_texts_are_cut_between_words(self, length):
        splits = self.splits()
        task = TokenClassification(TaskArguments(), splits)
        features = features_of(task, splits["train"], length=length)
        logits = np.zeros((len(features), 64, len(task.label_names)))
        for row, scores in zip(features, logits, strict=True):
            assert row["length"] <= length
            for place, label in enumerate(row["labels"]):
                if label != -100:
                    scores[place, label] = 1
        assert task.tags(splits["train"], features, logits) == TAGS
        assert task.compute_metrics(splits["train"], features)(Output(logits))["accuracy"] == 1

    def test_truncated_words_count_as_wrong(self):
        splits = self.splits()
        task = TokenClassification(TaskArguments(long_texts="truncate"), splits)
        features = features_of(task, splits["train"], length=6)
        logits = np.zeros((len(features), 64, len(task.label_names)))
        assert None in task.tags(splits["train"], features, logits)[0]
        assert task.compute_metrics(splits["train"], features)(Output(logits))["accuracy"] < 1
        refusing = TokenClassification(TaskArguments(long_texts="refuse"), splits)
        with pytest.raises(ValueError, match=r"Row 0 has .* tokens, more than the 4"):
            features_of(refusing, splits["train"], length=6)

    def test_entities_are_scored_by_seqeval(self):
        tags = [["B-A", "I-A", "O", "O", "B-A"], ["O"] * 5, ["B-A"], ["O"] * 4]
        splits = self.splits(tags=tags)
        task = TokenClassification(TaskArguments(), splits)
        features = features_of(task, splits["train"])
        logits = np.zeros((len(features), 64, 3))
        for row, scores in zip(features, logits, strict=True):
            scores[row["places"], [label for label in row["labels"] if label != -100]] = 1
        assert task.compute_metrics(splits["train"], features)(Output(logits))["f1"] == 1
        lines = list(task.predictions(splits["train"], features, logits))
        assert [line["prediction"] for line in lines] == tags

    def test_bad_columns_are_refused(self):
        splits = self.splits(tags=[*TAGS[:2], ["N", "N"], TAGS[3]])
        with pytest.raises(ValueError, match=r"Row 2 has 1 words .tokens. and 2 labels"):
            features_of(TokenClassification(TaskArguments(), splits), splits["train"])
        with pytest.raises(ValueError, match="takes one column with lists of words, 'id' holds"):
            TokenClassification(TaskArguments(text_columns=["id"]), self.splits())
        with pytest.raises(
            ValueError, match=r"needs a list with a label for each word. Columns with lists: tokens, tags"
        ):
            TokenClassification(TaskArguments(label_column="id"), self.splits())
        with pytest.raises(ValueError, match="Which column holds the words' labels is not clear"):
            TokenClassification(TaskArguments(), self.splits(more=TAGS))
        wrong = {"tokens": [["x"]], "tags": [["Q"]]}
        with pytest.raises(ValueError, match="labels that the training data never has: 'Q'"):
            TokenClassification(TaskArguments(), splits_of({"tokens": WORDS, "tags": TAGS}, wrong))

    def test_numbered_labels_get_their_names(self):
        features = Features(tokens=List(Value("string")), ner=List(ClassLabel(names=["O", "B-X"])))
        rows = Dataset.from_dict({"tokens": [["a", "b"]], "ner": [[0, 1]]}, features)
        task = TokenClassification(TaskArguments(), {"train": rows, "validation": rows})
        assert task.label_names == ["O", "B-X"]
        assert task.is_chunks


CONTEXTS = [" ".join(sentences(n, seed=n)) for n in (2, 14, 25)]
ANSWERS = [context.split(" ")[place] for context, place in zip(CONTEXTS, (1, 40, -2), strict=True)]


class TestQuestionAnswering:
    def splits(self, **columns):
        answers = [{"text": [a], "answer_start": [c.rindex(a)]} for a, c in zip(ANSWERS, CONTEXTS, strict=True)]
        return splits_of(
            {
                "id": ["p", "q", "r"],
                "question": ["who?", "谁?", "what is it?"],
                "context": CONTEXTS,
                "answers": answers,
            }
            | columns
        )

    def test_windows_overlap_and_end_with_the_text(self):
        for length in range(1, 60):
            for room, stride in ((10, 3), (10, 0), (7, 6)):
                starts = window_starts(length, room, stride)
                covered = {i for start in starts for i in range(start, min(start + room, length))}
                assert covered == set(range(length))
                assert all(b - a <= room - stride for a, b in itertools.pairwise(starts))
                assert starts[-1] == max(0, length - room)

    @pytest.mark.parametrize("length", [24, 40, 512])
    def test_answers_are_traced_through_the_windows(self, length):
        """A window with the whole answer points to it, the others to the first token; and back from perfect scores."""
        splits = self.splits()
        task = QuestionAnswering(TaskArguments(doc_stride=8), splits)
        features = features_of(task, splits["train"], length=length)
        starts, ends = np.zeros((2, len(features), 600))
        found = {}
        for number, row in enumerate(features):
            first, last = row["start_positions"], row["end_positions"]
            answer, context = ANSWERS[row["example"]], CONTEXTS[row["example"]]
            place = context.rindex(answer)
            inside = row["offsets"][0][0] <= place and place + len(answer) <= row["offsets"][-1][1]
            assert inside == (first > 0)
            if inside:
                offsets = row["offsets"][first - row["context_start"] : last + 1 - row["context_start"]]
                assert offsets[0][0] <= place < offsets[0][1]
                assert offsets[-1][0] < place + len(answer) <= offsets[-1][1]
                found[row["example"]] = context[offsets[0][0] : offsets[-1][1]]
            starts[number, first], ends[number, last] = 1, 1
        assert set(found) == {0, 1, 2}
        result = task.compute_metrics(splits["train"], features)(Output((starts, ends)))
        assert result == {"exact_match": 100, "f1": 100}
        lines = list(task.predictions(splits["train"], features, (starts, ends)))
        assert [line["prediction"] for line in lines] == [found[i].strip() for i in range(3)]
        assert [line["id"] for line in lines] == ["p", "q", "r"]

    def test_small_probabilities_keep_four_digits(self):
        """With equal logits each of n spans has 1 / n."""
        splits = self.splits()
        task = QuestionAnswering(TaskArguments(max_answer_length=60), splits)
        features = features_of(task, splits["train"])
        zeros = np.zeros((2, len(features), 600))
        exact = [value for _, value in task.answers(splits["train"], features, zeros)]
        given = [line["score"] for line in task.predictions(splits["train"], features, zeros)]
        assert min(exact) < 2e-4
        assert given == pytest.approx(exact, rel=5e-4)
        assert all(len(f"{value:e}".split("e")[0].strip("0").replace(".", "")) <= 4 for value in given)

    def test_an_answer_that_is_not_in_the_text_is_the_empty_one(self):
        nothing = {"text": [], "answer_start": []}
        splits = self.splits(
            answers=[{"text": [ANSWERS[0]], "answer_start": [CONTEXTS[0].rindex(ANSWERS[0])]}, nothing, nothing]
        )
        task = QuestionAnswering(TaskArguments(doc_stride=8), splits)
        assert task.has_unanswerable
        features = features_of(task, splits["train"], length=64)
        starts, ends = np.zeros((2, len(features), 64))
        for number, row in enumerate(features):
            starts[number, row["start_positions"]] = ends[number, row["end_positions"]] = 1
        lines = list(task.predictions(splits["train"], features, (starts, ends)))
        assert [line["prediction"] for line in lines][1:] == ["", ""]

    def test_answers_are_looked_for_near_their_place(self, monkeypatch):
        from hf_selfattn.tools import task_questions

        assert locate("the cat sat", "cat", 4) == (4, 7)
        assert locate("the cat sat", "cat", 3) == (4, 7)
        assert locate("the cat sat", " cat ", 3) == (4, 7)
        assert locate("the cat sat", "dog", 4) is None
        assert token_span([(0, 3), (4, 4), (4, 7), (8, 11)], (4, 7)) == (2, 2)
        assert token_span([(0, 3), (4, 7)], (4, 9)) is None
        said = []
        monkeypatch.setattr(task_questions.logger, "warning", said.append)
        answers = [{"text": ["nowhere"], "answer_start": [0]}] * 3
        splits = self.splits(answers=answers)
        features_of(QuestionAnswering(TaskArguments(), splits), splits["train"])
        assert said == [
            "3 of 3 answers do not stand at their answer_start (row 0 is one); they are treated as not in the text."
        ]

    def test_blanks_round_a_question_are_left_out(self):
        plain, blanks = (self.splits(question=[text] * 3) for text in ("who?", " " * 500 + "who?\n"))
        of_plain, of_blanks = (features_of(QuestionAnswering(TaskArguments(), splits), splits["train"], length=40)
                               for splits in (plain, blanks))  # fmt: skip
        assert of_blanks["input_ids"] == of_plain["input_ids"]

    def test_bad_columns_are_refused(self):
        with pytest.raises(ValueError, match=r"there is no column 'answers'. Columns there: .*"):
            QuestionAnswering(TaskArguments(), splits_of({"question": ["a"], "context": ["b"]}))
        with pytest.raises(ValueError, match="Column 'answers' must hold answers as"):
            QuestionAnswering(TaskArguments(), self.splits(answers=["x", "y", "z"]))
        with pytest.raises(ValueError, match="are question and context, got question"):
            QuestionAnswering(TaskArguments(text_columns=["question"]), self.splits())
        splits = self.splits(question=["who? " * 30] * 3)
        with pytest.raises(ValueError, match=r"Row 0: the question has .* tokens, more than half of"):
            features_of(QuestionAnswering(TaskArguments(), splits), splits["train"], length=40)
        with pytest.raises(ValueError, match=r"Row 0 has .* tokens, more than the 37"):
            features_of(QuestionAnswering(TaskArguments(long_texts="refuse"), splits), splits["train"], length=40)


class TestMultipleChoice:
    COLUMNS = {"context": TEXTS, "ending0": TEXTS[::-1], "ending1": ["music"] * 12, "ending2": ["the cat"] * 12}

    @pytest.mark.parametrize("labels", [[0, 1, 2] * 4, ["A", "B", "C"] * 4, ["0", "1", "2"] * 4])
    def test_columns_are_found_and_choices_stand_beside_the_context(self, labels):
        splits = splits_of(self.COLUMNS | {"label": labels})
        task = MultipleChoice(TaskArguments(), splits)
        assert task.choice_columns == ["ending0", "ending1", "ending2"]
        assert task.text_columns == ["context"]
        features = features_of(task, splits["train"])
        assert features["labels"][:] == [0, 1, 2] * 4
        tokenizer = tiny_tokenizer()
        for row, context, ending in zip(features, TEXTS, TEXTS[::-1], strict=True):
            assert row["input_ids"][0] == tokenizer(context, ending)["input_ids"]
            assert row["input_ids"][1] == tokenizer(context, "music")["input_ids"]
        result = task.compute_metrics(splits["train"], features)(Output(perfect(3, [0, 1, 2] * 4)))
        assert result == {"accuracy": 1}
        lines = list(task.predictions(splits["train"], features, perfect(3, [0, 1, 2] * 4)))
        assert [line["prediction"] for line in lines] == [0, 1, 2] * 4

    def test_a_column_of_lists(self):
        splits = splits_of({"question": TEXTS, "choices": [["x", "y"]] * 12, "answer": [1, 0] * 6})
        task = MultipleChoice(TaskArguments(), splits)
        assert (task.choice_columns, task.text_columns, task.label_column) == (["choices"], ["question"], "answer")
        assert [len(row) for row in features_of(task, splits["train"])["input_ids"]] == [2] * 12

    def test_bad_choices_are_refused(self):
        with pytest.raises(
            ValueError, match=r"Which columns hold the choices is not clear. Columns there: context, label"
        ):
            MultipleChoice(TaskArguments(), splits_of({"context": TEXTS, "label": [0] * 12}))
        with pytest.raises(ValueError, match="a number from 0 to 2 or a letter from A, row 0 of the train has 3"):
            MultipleChoice(TaskArguments(), splits_of(self.COLUMNS | {"label": [3] * 12}))
        with pytest.raises(ValueError, match="--long_texts is one of refuse, truncate here, got 'split'"):
            MultipleChoice(TaskArguments(long_texts="split"), splits_of(self.COLUMNS | {"label": [0] * 12}))
        ragged = splits_of({"question": TEXTS[:2], "choices": [["x", "y"], ["x"]], "label": [0, 0]})
        with pytest.raises(ValueError, match="Row 1 has 1 choices, the first training row 2"):
            features_of(MultipleChoice(TaskArguments(), ragged), ragged["train"])
        long = splits_of(self.COLUMNS | {"label": [0] * 12})
        with pytest.raises(ValueError, match=r"Row 0 has .* tokens, more than the"):
            features_of(MultipleChoice(TaskArguments(), long), long["train"], length=12)


def test_baselines_are_for_text_classification():
    with pytest.raises(ValueError, match="--baselines are for text-classification, the task is text-regression"):
        TextRegression(TaskArguments(baselines=True), splits_of({"text": TEXTS, "label": [0.5] * 12}))
