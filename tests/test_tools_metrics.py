import math

import evaluate
import pytest

from hf_selfattn.tools.scoring import FOLDER, score

METRICS = sorted(path.name for path in FOLDER.iterdir() if (path / f"{path.name}.py").is_file())


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setattr(evaluate.config, "HF_EVALUATE_OFFLINE", True)


@pytest.mark.parametrize("name", METRICS)
def test_each_metric_loads_from_its_folder(name):
    assert isinstance(evaluate.load(str(FOLDER / name)), evaluate.Metric)


def test_the_metrics_of_the_tasks_are_there():
    assert METRICS == ["accuracy", "f1", "matthews_correlation", "pearsonr", "seqeval", "spearmanr", "squad"]


def test_classification():
    ours, theirs = [0, 1, 1, 2, 2, 2], [0, 1, 2, 2, 2, 1]
    assert score("accuracy", ours, theirs) == {"accuracy": pytest.approx(4 / 6)}
    # class 0: 1; class 1: precision 1/2, recall 1/2; class 2: 2/3, 2/3
    assert score("f1", ours, theirs)["f1"] == pytest.approx((1 + 1 / 2 + 2 / 3) / 3)
    assert score("f1", [1, 0, 1], [1, 1, 1], average="binary")["f1"] == pytest.approx(0.8)
    # 2 x 2 table: tp 2, tn 1, fp 1, fn 1
    phi = (2 * 1 - 1 * 1) / math.sqrt(3 * 3 * 2 * 2)
    assert score("matthews_correlation", [1, 1, 1, 0, 0], [1, 1, 0, 1, 0])["matthews_correlation"] == pytest.approx(
        phi
    )
    assert score("matthews_correlation", [1, 1], [1, 0])["matthews_correlation"] == 0
    several = score("f1", [[1, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 1, 0]], "multilabel", average="micro")
    assert several["f1"] == pytest.approx(2 * 2 / (3 + 3))


def test_correlations():
    x, y = [1.0, 2.0, 3.0, 4.0], [1.0, 4.0, 9.0, 7.0]
    mean_x, mean_y = 2.5, 5.25
    cov = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    norm = math.sqrt(sum((a - mean_x) ** 2 for a in x) * sum((b - mean_y) ** 2 for b in y))
    assert score("pearsonr", x, y)["pearsonr"] == pytest.approx(cov / norm)
    assert score("spearmanr", x, y)["spearmanr"] == pytest.approx(1 - 6 * 2 / (4 * 15))


def test_entities_count_as_wholes():
    wanted = [["B-PER", "I-PER", "O", "B-LOC"], ["O", "B-LOC"]]
    given = [["B-PER", "O", "O", "B-LOC"], ["O", "B-LOC"]]
    result = score("seqeval", given, wanted)
    assert result["precision"] == result["recall"] == pytest.approx(2 / 3)
    assert result["f1"] == pytest.approx(2 / 3)
    assert result["accuracy"] == pytest.approx(5 / 6)


@pytest.mark.parametrize(
    ("given", "wanted", "exact", "f1"),
    [
        ("The Norman dynasty!", ["norman dynasty"], 100, 100),
        ("in 1066", ["1066", "the year 1066"], 0, 2 / 3 * 100),
        ("", [], 100, 100),
        ("something", [], 0, 0),
        ("", ["something"], 0, 0),
        ("我爱北京。", ["我爱北京"], 100, 100),
        ("北京大学", ["北京"], 0, 2 / 3 * 100),
        ("Windows 系统", ["系统"], 0, 2 * 2 / 5 * 100),
    ],
)
def test_answers(given, wanted, exact, f1):
    assert score("squad", [given], [wanted]) == pytest.approx({"exact_match": exact, "f1": f1})
