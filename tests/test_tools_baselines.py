import pytest
from datasets import Dataset

from hf_selfattn.tools.baselines import baseline_accuracies, majority_accuracy, tfidf_accuracy
from hf_selfattn.tools.task_texts import TextClassification
from hf_selfattn.tools.tasks import TaskArguments


def test_majority():
    assert majority_accuracy([0, 1, 1, 2], [1, 1, 0, 2]) == 0.5


@pytest.mark.parametrize(
    ("train", "texts"),
    [
        (["good film", "bad film", "very good", "so bad"] * 5, ["good", "bad day", "bad"]),
        (["这个很好吃", "太差了真难吃", "很好", "真差"] * 5, ["很好吃的", "难吃太差", "差"]),
    ],
)
def test_tfidf_learns_words_and_characters(train, texts):
    assert tfidf_accuracy(train, [1, 0, 1, 0] * 5, texts, [1, 0, 0]) == 1


def test_both_on_a_task():
    rows = Dataset.from_dict({"text": ["good film", "bad film", "good one"] * 4, "label": ["p", "n", "p"] * 4})
    task = TextClassification(TaskArguments(baselines=True), {"train": rows, "validation": rows})
    assert baseline_accuracies(task, rows, rows) == {"majority": pytest.approx(2 / 3), "tfidf_logistic_regression": 1}
