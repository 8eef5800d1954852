import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoConfig, AutoModelForMultipleChoice, AutoModelForQuestionAnswering, pipeline

from .train_scripts import (
    OBJECTS,
    ROOT,
    SUBJECTS,
    TINY,
    environment,
    script,
    sentences,
    tiny_model_folder,
    tiny_tokenizer_folder,
    write_rows,
)

QUICK = [
    "--num_train_epochs",
    "2",
    "--per_device_train_batch_size",
    "16",
    "--bf16",
    "false",
    "--use_cpu",
    "--report_to",
    "none",
    "--learning_rate",
    "3e-3",
    "--disable_tqdm",
    "true",
    "--seed",
    "1",
]


def finetune(task, folder, *options):
    return script("finetune").main(["--task", task, "--output_dir", str(folder), *QUICK, *options])


def split_files(folder, rows):
    """Options that name a training, a validation and a test file with these rows."""
    parts = {"train": rows[: len(rows) * 2 // 3], "validation": rows[len(rows) * 2 // 3 :], "test": rows[-7:]}
    options = []
    for split, part in parts.items():
        options += [f"--{split}_file", write_rows(folder / f"{split}.jsonl", part)]
    return options


def classified():
    return [
        {"text": text, "topic": "food" if "apples" in text or "苹果" in text else "other"} for text in sentences(240)
    ]


def lines_of(folder):
    return [json.loads(line) for line in (Path(folder) / "predictions.jsonl").read_text().splitlines()]


class TestTextClassification:
    @pytest.fixture(scope="class")
    @classmethod
    def run(cls, tmp_path_factory):
        folder = tmp_path_factory.mktemp("classification")
        options = split_files(folder, classified())
        scores = finetune(
            "text-classification",
            folder / "out",
            "--model_name_or_path",
            tiny_model_folder(),
            *options,
            "--label_column",
            "topic",
            "--do_predict",
            "--baselines",
            "--num_train_epochs",
            "4",
        )
        return folder, options, scores

    def test_it_learns_and_names_are_stored(self, run):
        folder, _, scores = run
        results = json.loads((folder / "out" / "all_results.json").read_text())
        assert scores["eval_accuracy"] > results["majority_accuracy"]
        assert results["tfidf_logistic_regression_accuracy"] > results["majority_accuracy"]
        assert AutoConfig.from_pretrained(folder / "out").id2label == {0: "food", 1: "other"}
        classify = pipeline("text-classification", model=str(folder / "out"))
        assert classify("the cat likes green apples")[0]["label"] in ("food", "other")

    def test_the_best_checkpoint_is_kept(self, run):
        state = json.loads((run[0] / "out" / "trainer_state.json").read_text())
        accuracies = [entry["eval_accuracy"] for entry in state["log_history"] if "eval_accuracy" in entry]
        assert len(accuracies) >= 4
        assert run[2]["eval_accuracy"] == max(accuracies[:4]) == state["best_metric"]

    def test_predictions_are_written(self, run):
        lines = lines_of(run[0] / "out")
        assert [line["index"] for line in lines] == list(range(7))
        assert {line["prediction"] for line in lines} <= {"food", "other"}
        results = json.loads((run[0] / "out" / "all_results.json").read_text())
        right = [row["topic"] == line["prediction"] for row, line in zip(classified()[-7:], lines, strict=True)]
        assert results["predict_accuracy"] == pytest.approx(sum(right) / 7)

    def test_the_card_and_the_curve_are_there(self, run):
        card = (run[0] / "out" / "README.md").read_text()
        assert "pipeline_tag: text-classification" in card
        assert "| accuracy |" in card
        assert (run[0] / "out" / "training_curve.png").is_file()
        assert (run[0] / "out" / "run.json").is_file()

    def test_from_scratch_with_a_tokenizer_of_its_own(self, run, tmp_path):
        scores = finetune(
            "text-classification",
            tmp_path,
            *run[1],
            "--label_column",
            "topic",
            "--config_overrides",
            TINY,
            "--tokenizer_vocab_size",
            "400",
            "--max_train_samples",
            "40",
            "--max_eval_samples",
            "20",
        )
        assert 0 <= scores["eval_accuracy"] <= 1


def test_pairs_and_numbers(tmp_path):
    rows = [
        {"sentence1": a, "sentence2": b, "score": float(len(set(a) & set(b)))}
        for a, b in zip(sentences(90), sentences(90, seed=5), strict=True)
    ]
    scores = finetune(
        "text-regression",
        tmp_path / "out",
        "--model_name_or_path",
        tiny_model_folder(),
        *split_files(tmp_path, rows),
        "--do_predict",
    )
    assert {"eval_pearsonr", "eval_spearmanr", "eval_mean_squared_error"} <= set(scores)
    assert isinstance(lines_of(tmp_path / "out")[0]["prediction"], float)
    config = AutoConfig.from_pretrained(tmp_path / "out")
    assert (config.num_labels, config.problem_type) == (1, "regression")


@pytest.mark.parametrize("packing", ["false", "true"], ids=["padded", "packed"])
def test_words(packing, tmp_path):
    rows = []
    for text in sentences(120):
        words = text.replace(",", " ,").split(" ")
        rows.append({"words": words, "tags": ["B-NUM" if word[0].isdigit() else "O" for word in words]})
    scores = finetune(
        "token-classification",
        tmp_path / "out",
        "--model_name_or_path",
        tiny_model_folder(),
        *split_files(tmp_path, rows),
        "--do_predict",
        "--num_train_epochs",
        "4",
        "--packing",
        packing,
        "--max_seq_length",
        "64",
        *(["--per_device_train_batch_size", "4"] if packing == "true" else []),
    )
    assert scores["eval_f1"] > 0.5
    for line, row in zip(lines_of(tmp_path / "out"), rows[-7:], strict=True):
        assert line["words"] == row["words"]
        assert len(line["prediction"]) == len(row["words"])
    assert set(AutoConfig.from_pretrained(tmp_path / "out").label2id) == {"B-NUM", "O"}


def test_texts_that_share_rows(tmp_path):
    scores = finetune(
        "text-classification",
        tmp_path / "out",
        "--model_name_or_path",
        tiny_model_folder(),
        *split_files(tmp_path, classified()),
        "--label_column",
        "topic",
        "--packing",
        "true",
        "--max_seq_length",
        "64",
        "--per_device_train_batch_size",
        "4",
        "--num_train_epochs",
        "4",
    )
    assert scores["eval_accuracy"] > 0.8


def test_questions(tmp_path):
    rows = []
    for number, (first, second) in enumerate(zip(sentences(90), sentences(90, seed=3), strict=True)):
        context = f"{first} {second}"
        answer = next(o for o in OBJECTS if o in context)
        rows.append(
            {
                "id": str(number),
                "question": "what?",
                "context": context,
                "answers": {"text": [answer], "answer_start": [context.index(answer)]},
            }
        )
    scores = finetune(
        "question-answering",
        tmp_path / "out",
        "--model_name_or_path",
        tiny_model_folder(),
        *split_files(tmp_path, rows),
        "--do_predict",
        "--max_seq_length",
        "32",
        "--doc_stride",
        "8",
    )
    assert {"eval_exact_match", "eval_f1", "eval_loss"} <= set(scores)
    for line, row in zip(lines_of(tmp_path / "out"), rows[-7:], strict=True):
        assert line["id"] == row["id"]
        assert line["prediction"] in row["context"]
    AutoModelForQuestionAnswering.from_pretrained(tmp_path / "out")


def test_choices(tmp_path):
    rows = []
    for number, text in enumerate(sentences(90)):
        right = next(s for s in SUBJECTS if text.startswith(s))
        wrong = SUBJECTS[(SUBJECTS.index(right) + 1) % len(SUBJECTS)]
        endings = [right, wrong] if number % 2 else [wrong, right]
        rows.append({"context": text, "ending0": endings[0], "ending1": endings[1], "label": endings.index(right)})
    scores = finetune(
        "multiple-choice",
        tmp_path / "out",
        "--model_name_or_path",
        tiny_model_folder(),
        *split_files(tmp_path, rows),
        "--do_predict",
    )
    assert 0 <= scores["eval_accuracy"] <= 1
    assert {line["prediction"] for line in lines_of(tmp_path / "out")} <= {0, 1}
    AutoModelForMultipleChoice.from_pretrained(tmp_path / "out")


def test_an_encoder_of_transformers_with_token_types(tmp_path):
    rows = [
        {"text1": a, "text2": b, "label": number % 2}
        for number, (a, b) in enumerate(zip(sentences(60), sentences(60, seed=2), strict=True))
    ]
    scores = finetune(
        "text-classification",
        tmp_path / "out",
        *split_files(tmp_path, rows),
        "--tokenizer_name",
        tiny_tokenizer_folder(),
        "--config_overrides",
        TINY + ",model_type=bert",
    )
    assert 0 <= scores["eval_accuracy"] <= 1


class TestBadInput:
    @pytest.fixture(autouse=True)
    def setup(self, tmp_path):
        self.folder, self.rows = tmp_path, classified()

    def refused(self, error, message, *options, task="text-classification", rows=None):
        files = split_files(self.folder, rows or self.rows)
        with pytest.raises(error, match=message):
            finetune(task, self.folder / "out", "--model_name_or_path", tiny_model_folder(), *files, *options)
        assert not list(self.folder.glob("out/checkpoint-*"))

    def test_a_missing_column(self):
        message = "no column 'topics'. Columns there: text, topic. Did you mean 'topic'"
        self.refused(ValueError, message, "--label_column", "topics")
        message = "no column 'test'. Columns there: text, topic. Did you mean 'text'"
        self.refused(ValueError, message, "--label_column", "topic", "--text_columns", "test")

    def test_labels_that_training_never_had(self):
        rows = [*self.rows[:-1], {"text": "new", "topic": "foood"}]
        message = r"labels that the training data never has: 'foood' \(1x\) Did you mean 'food'"
        self.refused(ValueError, message, "--label_column", "topic", rows=rows)

    def test_tasks_whose_texts_cannot_share_a_row(self):
        rows = [{"context": text, "ending0": "a", "ending1": "b", "label": 1} for text in sentences(60)]
        message = "--packing true is not possible: the choices of a row belong together. Use --packing false."
        self.refused(ValueError, message, "--packing", task="multiple-choice", rows=rows)
        answers = {"text": ["the"], "answer_start": [0]}
        rows = [{"context": f"the {text}", "question": "what", "answers": answers} for text in sentences(60)]
        message = "not possible: an answer is a place in a row of its own"
        self.refused(ValueError, message, "--packing", task="question-answering", rows=rows)

    def test_an_unknown_task(self):
        self.refused(
            ValueError,
            "--task is one of text-classification, .* Did you mean 'text-classification'",
            task="text-clasification",
        )
        assert not (self.folder / "out").exists()  # before anything is written or read

    def test_an_empty_data_set(self):
        empty = self.folder / "empty.jsonl"
        empty.write_text("")
        self.refused(ValueError, "The data set is empty", "--train_file", str(empty))

    def test_texts_that_are_too_long(self):
        self.refused(
            ValueError,
            "and --long_texts is refuse",
            "--label_column",
            "topic",
            "--max_seq_length",
            "12",
            "--long_texts",
            "refuse",
        )

    def test_a_tokenizer_that_does_not_fit(self, tmp_path):
        script("train_tokenizer").main(
            [
                "--train_file",
                write_rows(tmp_path / "t.jsonl", [{"text": "zyx " * 50}] * 5),
                "--vocab_size",
                "300",
                "--output_dir",
                str(tmp_path / "other"),
            ]
        )
        self.refused(
            ValueError,
            "The tokenizer does not fit the model: ",
            "--label_column",
            "topic",
            "--tokenizer_name",
            str(tmp_path / "other"),
        )

    def test_a_checkpoint_that_is_cut_short(self, tmp_path):
        model = Path(shutil.copytree(tiny_model_folder(), tmp_path / "model"))
        weights = model / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:1000])
        self.refused(ValueError, "model.safetensors' is cut short", "--model_name_or_path", str(model))
        weights.unlink()
        self.refused(FileNotFoundError, "holds no weights", "--model_name_or_path", str(model))

    def test_a_loss_that_is_no_number(self):
        self.refused(
            FloatingPointError,
            "The loss is nan at step",
            "--label_column",
            "topic",
            "--learning_rate",
            "1e30",
            "--max_grad_norm",
            "0",
        )


def test_the_command(tmp_path):
    files = split_files(tmp_path, classified()[:60])
    command = [
        sys.executable,
        "train/finetune.py",
        "--task",
        "text-classification",
        "--label_column",
        "topic",
        *files,
        "--model_name_or_path",
        tiny_model_folder(),
        "--output_dir",
        str(tmp_path / "out"),
        *QUICK,
    ]
    output = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, check=True).stdout
    assert "text-classification on 20 validation examples" in output
    assert "matthews correlation" in output
