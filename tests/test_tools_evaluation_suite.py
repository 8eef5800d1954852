"""The suite of fine-tunings: its recipes, its runs, its baselines."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from datasets import Dataset
from transformers import AutoModelForMaskedLM

from hf_selfattn.tools.baselines import baselines_of_task
from hf_selfattn.tools.evaluation_results import Results, suite_table
from hf_selfattn.tools.evaluation_suite import SuiteModel, metric_of, read_suite, run_suite
from hf_selfattn.tools.scoring import METRICS, score
from hf_selfattn.tools.task_choices import MultipleChoice
from hf_selfattn.tools.task_texts import TextClassification, TextRegression
from hf_selfattn.tools.task_tokens import TokenClassification
from hf_selfattn.tools.tasks import TaskArguments

from .train_scripts import tiny_model_folder


def recipes(folder, **of_tasks):
    for name, task in of_tasks.items():
        (folder / f"{name}.yaml").write_text(f"task: {task}\ndataset_name: on/hub\nlearning_rate: 1e-3\n")
    return folder


class Trainings:
    """Stands for finetune.py: remembers its recipes, and is killed after some."""

    def __init__(self, killed_after=None):
        self.recipes, self.killed_after = [], killed_after

    def __call__(self, argv):
        if len(self.recipes) == self.killed_after:
            raise KeyboardInterrupt
        self.recipes.append(yaml.safe_load(Path(argv[0]).read_text()))
        seed, value = self.recipes[-1]["seed"], {"path/x": 0.6}.get(self.recipes[-1]["model_name_or_path"], 0.0)
        Path(self.recipes[-1]["output_dir"]).mkdir()
        return {
            "eval_accuracy": value + [0.1, 0.3, 0.0][seed],
            "eval_f1": 50.0 + seed,
            "eval_matthews_correlation": 0.5,
        }


class TestSuite:
    MODELS = (SuiteModel("x", "path/x", "1"), SuiteModel("yy", "path/yy", "2"))

    def run(self, folder, trainings, models=MODELS, seeds=(0, 1, 2), data="rows", where="on/hub"):
        tasks = {"a": "text-classification", "b": "question-answering", "cola": "text-classification"}
        suite, results = read_suite([recipes(folder, **tasks)]), Results(folder / "results.jsonl")
        suite["cola"]["metric_for_best_model"] = "matthews_correlation"
        for recipe in suite.values():
            recipe["dataset_name"] = where
        runs = folder / "runs"
        functions = trainings, lambda recipe: {"majority": 0.4}, lambda recipe: data
        return run_suite(*functions, suite, models, seeds, results, runs, False)

    def test_medians_over_seeds(self, tmp_path):
        trainings = Trainings()
        found = self.run(tmp_path, trainings)
        assert len(trainings.recipes) == 18
        assert [r["seed"] for r in trainings.recipes] == [0] * 6 + [1] * 6 + [2] * 6  # a whole picture early
        assert found["a"]["metric"] == "accuracy"
        assert found["a"]["models"]["x"] == {
            "values": pytest.approx([0.7, 0.9, 0.6]), "median": pytest.approx(0.7),
            "lowest": pytest.approx(0.6), "highest": pytest.approx(0.9)}  # fmt: skip
        assert found["b"]["models"]["yy"]["values"] == [0.5, 0.51, 0.52]  # the F1 of answers is in %
        assert (found["cola"]["metric"], found["cola"]["models"]["x"]["median"]) == ("matthews_correlation", 0.5)
        assert found["a"]["baselines"] == {"majority": 0.4}
        assert not [path for path in (tmp_path / "runs").iterdir() if path.is_dir()]
        lines = suite_table(found).splitlines()
        assert lines[2].startswith("| a | accuracy | 70.0 (60.0 to 90.0) | ")
        assert lines[2].endswith(" | majority 40.0 |")
        assert lines[0] == "|  | metric | x | yy | baselines |"
        assert lines[-1].startswith("| mean |  | 57.0 |")

    def test_a_killed_suite_goes_on_where_it_stopped(self, tmp_path):
        first = Trainings(killed_after=7)
        with pytest.raises(KeyboardInterrupt):
            self.run(tmp_path, first)
        second, whole = Trainings(), Trainings()
        found = self.run(tmp_path, second)
        (tmp_path / "other").mkdir()
        assert found == self.run(tmp_path / "other", whole)
        runs = [[(r["seed"], r["task"], r["model_name_or_path"]) for r in t.recipes] for t in (first, second, whole)]
        assert (len(runs[0]), len(runs[1])) == (7, 11)
        assert runs[0] + runs[1] == runs[2]
        third = Trainings()
        assert self.run(tmp_path, third) == found
        assert not third.recipes

    def test_a_model_that_changed_is_trained_again(self, tmp_path):
        self.run(tmp_path, Trainings(), seeds=[0])
        again = Trainings()
        self.run(tmp_path, again, (self.MODELS[0], self.MODELS[1]._replace(identity="3")), seeds=[0])
        assert [r["model_name_or_path"] for r in again.recipes] == ["path/yy"] * 3

    def test_a_task_whose_data_changed_is_trained_again(self, tmp_path):
        self.run(tmp_path, Trainings(), seeds=[0])
        again = Trainings()
        self.run(tmp_path, again, seeds=[0], data="other rows")
        assert len(again.recipes) == 6

    def test_a_task_whose_data_were_moved_is_not(self, tmp_path):
        found = self.run(tmp_path, Trainings(), seeds=[0])
        again = Trainings()
        assert self.run(tmp_path, again, seeds=[0], where="another/folder") == found
        assert not again.recipes

    def test_fresh_weights_of_a_name_on_the_hub_have_a_recipe_of_their_own(self, tmp_path):
        name = tiny_model_folder()
        models = [SuiteModel("x", name, "commit"), SuiteModel("x from scratch", name, "commit", from_scratch=True)]
        self.run(tmp_path, Trainings(), models, seeds=[0])
        assert len(list((tmp_path / "runs").glob("a-commit*-seed-0.yaml"))) == 2

    def test_fresh_weights_differ_by_seed(self, tmp_path):
        starts = []

        def finetune(argv):
            recipe = yaml.safe_load(Path(argv[0]).read_text())
            model = AutoModelForMaskedLM.from_pretrained(recipe["model_name_or_path"])
            starts.append(model.get_input_embeddings().weight.detach().clone())
            return {"eval_accuracy": 0.5}

        suite = read_suite([recipes(tmp_path, a="text-classification")])
        model = SuiteModel("x", tiny_model_folder(), "1", from_scratch=True)
        for folder in ("once", "twice"):
            results = Results(tmp_path / folder / "results.jsonl")
            functions = finetune, lambda recipe: {}, lambda recipe: "rows"
            run_suite(*functions, suite, [model], [0, 1], results, tmp_path / folder, False)
        trained = AutoModelForMaskedLM.from_pretrained(tiny_model_folder()).get_input_embeddings().weight
        assert torch.equal(starts[0], starts[2])
        assert torch.equal(starts[1], starts[3])
        assert not torch.equal(starts[0], starts[1])
        assert not torch.equal(starts[0], trained)
        assert not list(tmp_path.glob("*/from-scratch*"))

    def test_local_data_and_overrides(self, tmp_path):
        (tmp_path / "data" / "a").mkdir(parents=True)
        recipes(tmp_path, a="text-classification", b="text-classification")
        suite = read_suite([tmp_path], ["a"], tmp_path / "data", "learning_rate=5e-5,num_train_epochs=2")
        assert list(suite) == ["a"]
        assert suite["a"]["dataset_name"] == str((tmp_path / "data" / "a").resolve())
        assert (suite["a"]["learning_rate"], suite["a"]["num_train_epochs"]) == (5e-5, 2)
        with pytest.raises(FileNotFoundError, match=r"a folder for each task, and .*b' is none. Leave b out"):
            read_suite([tmp_path], None, tmp_path / "data")

    def test_what_cannot_be_a_suite_is_refused(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="holds no recipe"):
            read_suite([tmp_path])
        recipes(tmp_path, sst2="text-classification")
        with pytest.raises(ValueError, match=r"--suite_tasks are sst2, got 'sst'. Did you mean 'sst2'"):
            read_suite([tmp_path], ["sst"])
        with pytest.raises(ValueError, match=r"the suite sets 'seed' itself for each run. Leave it out"):
            read_suite([tmp_path], overrides="seed=3")
        recipes(tmp_path, other="cooking")
        with pytest.raises(ValueError, match=r"says its task, one of .*; 'other' has 'cooking'"):
            read_suite([tmp_path])

    def test_two_recipes_of_one_name_are_refused(self, tmp_path):
        folders = [tmp_path / "one", tmp_path / "two"]
        for folder in folders:
            folder.mkdir()
            recipes(folder, sst2="text-classification")
        with pytest.raises(ValueError, match=r"'sst2' is in --suite_recipes '.*one' and '.*two'. Rename one of"):
            read_suite(folders)

    @pytest.mark.parametrize(
        ("kind", "metric", "message"),
        [
            (
                "text-classification",
                "acuracy",
                r"'a' \(text-classification\) one of accuracy, .* Did you mean 'accuracy'",
            ),
            ("text-classification", "loss", "is 'loss'. Name one of these, or leave it out"),
            ("text-regression", "mean_squared_error", "one of pearsonr, spearmanr; its .* is 'mean_squared_error'"),
            ("multiple-choice", "eval_f1", "one of accuracy; its metric_for_best_model is 'f1'"),
            ("question-answering", 3, "one of f1, exact_match; its metric_for_best_model is '3'"),
        ],
    )
    def test_a_metric_that_is_none_of_the_task_is_refused(self, kind, metric, message, tmp_path):
        recipe = recipes(tmp_path, a=kind) / "a.yaml"
        with pytest.raises(ValueError, match=message):
            read_suite([tmp_path], overrides=f"metric_for_best_model={metric}")
        recipe.write_text(f"{recipe.read_text()}metric_for_best_model: {metric}\n")
        with pytest.raises(ValueError, match=message):
            read_suite([tmp_path])

    @pytest.mark.parametrize("named", ["null", "task", "accuracy", "eval_accuracy"])
    def test_the_usual_metric_however_it_is_named(self, named, tmp_path):
        recipe = recipes(tmp_path, a="token-classification") / "a.yaml"
        recipe.write_text(f"{recipe.read_text()}metric_for_best_model: {named}\n")
        assert metric_of(read_suite([tmp_path])["a"]) == "accuracy"

    def test_baselines_that_fail_do_so_before_a_model_is_trained(self, tmp_path):
        def baselines(recipe):
            raise FileNotFoundError(recipe)

        trainings, suite = Trainings(), read_suite([recipes(tmp_path, a="text-classification")])
        results = Results(tmp_path / "results.jsonl")
        with pytest.raises(FileNotFoundError, match="a-baselines"):
            run_suite(trainings, baselines, str, suite, self.MODELS, [0], results, tmp_path / "runs", False)
        assert not trainings.recipes


class TestBaselines:
    def test_labels_of_texts_by_any_metric(self):
        rows = Dataset.from_dict({"text": ["good film", "bad film", "good one"] * 4, "label": ["p", "n", "p"] * 4})
        task = TextClassification(TaskArguments(), {"train": rows, "validation": rows})
        assert baselines_of_task(task, rows, rows, "accuracy") == {
            "majority": pytest.approx(2 / 3), "tfidf_logistic_regression": 1.0}  # fmt: skip
        assert baselines_of_task(task, rows, rows, "matthews_correlation") == {
            "majority": 0.0, "tfidf_logistic_regression": pytest.approx(1.0)}  # fmt: skip

    def test_pairs_with_numbers(self):
        pairs = [("the cat", "the cat", 5.0), ("the cat sees", "the cat", 4.0), ("a dog", "music", 0.0)]
        rows = Dataset.from_list([{"sentence1": a, "sentence2": b, "label": c} for a, b, c in pairs])
        task = TextRegression(TaskArguments(), {"train": rows, "validation": rows})
        assert baselines_of_task(task, rows, rows, "spearmanr") == {"tfidf_cosine": pytest.approx(1.0)}

    def test_labels_of_words(self):
        train = Dataset.from_list([{"tokens": ["a", "b", "a", "c"], "tags": ["X", "Y", "Z", "X"]},
                                   {"tokens": ["a"], "tags": ["Z"]}, {"tokens": ["d"], "tags": ["X"]}])  # fmt: skip
        validation = Dataset.from_list([{"tokens": ["a", "b", "new", "c"], "tags": ["Z", "Y", "X", "Y"]}])
        task = TokenClassification(TaskArguments(), {"train": train, "validation": validation})
        assert baselines_of_task(task, train, validation, "accuracy") == {
            "majority": 0.25,
            "commonest_of_each_word": 0.75,
        }

    def test_chunks(self):
        tags = ["O", "O", "O", "B-X", "I-X", "O", "B-X"]
        rows = Dataset.from_list([{"tokens": list("abacdab"), "tags": tags}])
        task = TokenClassification(TaskArguments(), {"train": rows, "validation": rows})
        # By its commonest labels, c d alone is a chunk: found, and all that is found is one.
        assert baselines_of_task(task, rows, rows, "f1") == {
            "majority": 0.0, "commonest_of_each_word": pytest.approx(2 / 3)}  # fmt: skip

    def test_others_have_none(self):
        rows = Dataset.from_list([{"context": "a", "ending0": "b", "ending1": "c", "label": 1}])
        task = MultipleChoice(TaskArguments(), {"train": rows, "validation": rows})
        assert baselines_of_task(task, rows, rows, "accuracy") == {}

    def test_a_metric_that_such_labels_do_not_have_is_refused(self):
        several = Dataset.from_dict({"text": ["a", "b"], "label": [["p", "n"], ["n"]]})
        one = Dataset.from_dict({"text": ["a", "b"], "label": ["p", "n"]})
        words = Dataset.from_dict({"tokens": [["a", "b"]], "tags": [["X", "Y"]]})
        for kind, rows, metric, known in (
            (TextClassification, several, "f1", "accuracy, f1_micro, f1_macro"),
            (TextClassification, one, "f1_micro", "accuracy, f1, matthews_correlation"),
            (TokenClassification, words, "recall", "accuracy, f1"),
        ):
            task = kind(TaskArguments(), {"train": rows, "validation": rows})
            with pytest.raises(ValueError, match=f"the labels of this {task.name} one of {known}; .* is '{metric}'"):
                baselines_of_task(task, rows, rows, metric)


def test_the_metrics_are_those_that_the_tasks_compute():
    several = Dataset.from_dict({"text": ["a", "b"], "label": [["p", "n"], ["n"]]})
    one = Dataset.from_dict({"text": ["a", "b"], "label": ["p", "n"]})
    numbers = Dataset.from_dict({"text": ["a", "b"], "label": [1.0, 2.0]})
    words, chunks = ({"tokens": [["a", "b"]], "tags": [tags]} for tags in (["X", "Y"], ["B-X", "O"]))
    index = {"example": np.arange(2)}
    found = {kind: [] for kind in METRICS}
    for kind, rows in ((TextClassification, one), (TextClassification, several), (TextRegression, numbers)):
        task = kind(TaskArguments(), {"train": rows, "validation": rows})
        outputs = np.array([[0.0], [1.0]]) if kind is TextRegression else np.eye(2)
        found[task.name].append(task.compute_metrics(rows, index)(SimpleNamespace(predictions=outputs)))
    for rows in map(Dataset.from_dict, (words, chunks)):
        task = TokenClassification(TaskArguments(), {"train": rows, "validation": rows})
        found[task.name].append(task.score(rows["tags"][:], rows))
    found["question-answering"].append(score("squad", ["a"], [["a"]]))
    found["multiple-choice"].append(score("accuracy", [0], [0]))
    less_is_better = {"mean_squared_error"}
    for kind, variants in METRICS.items():
        assert [set(names) for names in variants] == [set(scores) - less_is_better for scores in found[kind]]
