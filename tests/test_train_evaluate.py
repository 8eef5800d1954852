import gc
import json
import shutil
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
from transformers import AutoModelForSequenceClassification, BertConfig, BertForMaskedLM

from hf_selfattn.tools.tokenizer import save_tokenizer

from .train_scripts import (
    ROOT,
    environment,
    script,
    sentences,
    tiny_model_folder,
    tiny_tokenizer,
    write_rows,
    write_texts,
)


@pytest.fixture
def evaluate(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "train"))  # as it is when the script is run
    return script("evaluate_models")


@pytest.fixture
def files(tmp_path):
    """Options that name small data for each part."""
    pairs = [{"sentence_good": good, "sentence_bad": " ".join(reversed(good.split())), "UID": f"p{i % 2}",
              "linguistics_term": "binding"} for i, good in enumerate(sentences(6))]  # fmt: skip
    (tmp_path / "pairs").mkdir()
    write_rows(tmp_path / "pairs" / "pairs.jsonl", pairs)
    rows = [{"text": text, "label": int("apples" in text or "苹果" in text)} for text in sentences(60)]
    for task in ("first", "second"):
        folder = tmp_path / "data" / task
        folder.mkdir(parents=True)
        write_rows(folder / "train.jsonl", rows[:40])
        write_rows(folder / "validation.jsonl", rows[40:])
        (tmp_path / f"{task}.yaml").write_text(
            "task: text-classification\ndataset_name: a/name\nlabel_column: label\neval_strategy: 'no'\n"
            "save_strategy: 'no'\nload_best_model_at_end: false\nmax_steps: 2\nreport_to: none\nuse_cpu: true\n"
            "bf16: false\ndisable_tqdm: true\n"
        )
    options = {
        "validation_file": write_texts(tmp_path / "text.txt", sentences(30, seed=7)),
        "blimp": tmp_path / "pairs",
        "suite_recipes": tmp_path,
        "suite_data": tmp_path / "data",
        "output_dir": tmp_path / "out",
    }
    return [word for name, value in options.items() for word in (f"--{name}", str(value))]


def test_all_parts_of_a_model_and_one_from_scratch(evaluate, files, tmp_path, monkeypatch, capsys):
    command = [*files, "--model_name_or_path", tiny_model_folder(), "--parts", "masked_lm", "blimp", "suite",
               "--from_scratch", "--num_seeds", "2", "--disable_tqdm"]  # fmt: skip
    trained, main = [], evaluate.finetune

    def killed(argv):
        if len(trained) == 3:
            raise KeyboardInterrupt
        trained.append(argv)
        return main(argv)

    monkeypatch.setattr(evaluate, "finetune", killed)
    with pytest.raises(KeyboardInterrupt):
        evaluate.main(command)
    monkeypatch.setattr(evaluate, "finetune", lambda argv: trained.append(argv) or main(argv))
    found = evaluate.main(command)
    assert len(trained) == 8
    name = tiny_model_folder()
    assert set(found["models"][name]) == {"masked_tokens", "masked_words", "blimp"}
    assert found["models"][name]["blimp"]["pairs"] == 6
    for task in ("first", "second"):
        assert found["suite"][task]["metric"] == "accuracy"
        assert found["suite"][task]["recipe"]["bf16"] is False
        assert list(found["suite"][task]["models"]) == [name, f"{name} from scratch"]
        assert all(len(of_model["values"]) == 2 for of_model in found["suite"][task]["models"].values())
        assert set(found["suite"][task]["baselines"]) == {"majority", "tfidf_logistic_regression"}
    assert json.loads((tmp_path / "out" / "evaluation.json").read_text())["suite"] == found["suite"]
    tables = (tmp_path / "out" / "evaluation.md").read_text()
    assert "| nats a masked word |" in tables
    assert "| p0 |" in tables
    assert "| nats a masked word |" in capsys.readouterr().out

    def nothing(*args, **kwargs):
        raise AssertionError("all of it is known")

    for step in ("finetune", "open_masked_lm", "baselines_of"):
        monkeypatch.setattr(evaluate, step, nothing)
    assert evaluate.main(command)["models"] == found["models"]


def test_another_text_or_seed_is_measured_again(evaluate, files):
    command = [*files, "--model_name_or_path", tiny_model_folder(), "--parts", "masked_lm", "--disable_tqdm"]
    first, other, fewer, again = (evaluate.main([*command, *options])["models"][tiny_model_folder()]
                                  for options in ([], ["--seed", "1"], ["--max_eval_samples", "9"], []))  # fmt: skip
    assert first == again
    assert other["masked_words"]["loss"] != first["masked_words"]["loss"]
    assert fewer["masked_tokens"]["tokens"] < first["masked_tokens"]["tokens"]


def test_what_is_missing_is_said_before_anything_is_measured(evaluate, files, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "open_masked_lm", None)
    command = [*files, "--model_name_or_path", tiny_model_folder(), "--parts", "masked_lm", "suite"]
    with pytest.raises(ValueError, match="--suite_tasks are first, second, got 'third'"):
        evaluate.main([*command, "--suite_tasks", "third"])
    with pytest.raises(FileNotFoundError, match=r"--validation_file: '.*nothing.txt' is not a file"):
        evaluate.main([*command, "--validation_file", str(tmp_path / "nothing.txt")])
    with pytest.raises(ValueError, match=r"--dataset_name NAME .* or --validation_file FILE; got both"):
        evaluate.main([*command, "--dataset_name", str(tmp_path / "data" / "first")])
    with pytest.raises(ValueError, match=r'--suite_overrides is written "name=value,name=value", got .seed'):
        evaluate.main([*command, "--suite_overrides", "seed"])
    with pytest.raises(ValueError, match="--num_seeds is at least 1, got 0"):
        evaluate.main([*command, "--num_seeds", "0"])
    place = files.index("--validation_file")
    without = ["--dataset_name", str(tmp_path / "data" / "first"), "--validation_split", "dev"]
    with pytest.raises(ValueError, match=r"--validation_split 'dev' is not a split .* train, validation"):
        evaluate.main([*files[:place], *files[place + 2 :], *command[len(files) :], *without])
    with pytest.raises(ValueError, match=r"no column 'texts'. Columns there: text. Did you mean 'text'"):
        evaluate.main([*command, "--text_column", "texts"])


def test_a_model_that_is_too_short_is_said_before_another_is_measured(evaluate, files, tmp_path, monkeypatch):
    config = BertConfig(vocab_size=len(tiny_tokenizer()), hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                        intermediate_size=24, max_position_embeddings=128)  # fmt: skip
    BertForMaskedLM(config).save_pretrained(tmp_path / "short")
    save_tokenizer(tiny_tokenizer(), tmp_path / "short")
    measured, text = [], write_texts(tmp_path / "long.txt", [" ".join(sentences(60))])
    monkeypatch.setattr(evaluate, "masked_token_metrics", lambda *args, **kwargs: measured.append(args))
    command = [*files, "--model_name_or_path", tiny_model_folder(), str(tmp_path / "short"), "--parts", "masked_lm"]
    with pytest.raises(ValueError, match=r"short reads .* 128 tokens, and the longest window of 4000 bytes has"):
        evaluate.main([*command, "--window_bytes", "4000", "--validation_file", text])
    with pytest.raises(ValueError, match=r"short reads rows of at most 128 tokens, got --max_seq_length 129"):
        evaluate.main([*command, "--max_seq_length", "129"])
    assert not measured


def test_each_model_is_opened_once_and_let_go_before_the_next(evaluate, files, tmp_path, monkeypatch):
    opened, open_masked_lm = [], evaluate.open_masked_lm

    def open_one(arguments):
        gc.collect()
        assert not any(model() for model in opened)
        model, tokenizer = open_masked_lm(arguments)
        opened.append(weakref.ref(model))
        return model, tokenizer

    monkeypatch.setattr(evaluate, "open_masked_lm", open_one)
    names = [tiny_model_folder(), shutil.copytree(tiny_model_folder(), tmp_path / "other")]
    evaluate.main([*files, "--model_name_or_path", *map(str, names), "--disable_tqdm"])
    assert len(opened) == 2


def cut_short(folder):
    with open(folder / "model.safetensors", "r+b") as file:
        file.truncate(2000)


def without_weights(folder):
    (folder / "model.safetensors").unlink()


def with_another_head(folder):
    AutoModelForSequenceClassification.from_pretrained(folder).save_pretrained(folder)


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (shutil.rmtree, FileNotFoundError, "is not a folder"),
        (without_weights, FileNotFoundError, "holds no weights"),
        (cut_short, Exception, "header"),
        (with_another_head, ValueError, "lacks 3 of its weights"),
    ],
)
def test_a_model_that_cannot_be_opened_is_said_before_another_is_measured(
    spoil, error, message, evaluate, files, tmp_path, monkeypatch
):
    spoil(shutil.copytree(tiny_model_folder(), tmp_path / "other"))
    measured = []
    monkeypatch.setattr(evaluate, "blimp_metrics", lambda *args, **kwargs: measured.append(args))
    names = [tiny_model_folder(), str(tmp_path / "other")]
    with pytest.raises(error, match=message):
        evaluate.main([*files, "--model_name_or_path", *names, "--parts", "blimp"])
    assert not measured


def test_what_is_said_of_all_models_reaches_the_suite(evaluate):
    options = {"model_name_or_path": ["x"], "output_dir": "out", "suite_overrides": "learning_rate=1e-4"}
    arguments = evaluate.EvaluationArguments(**options, attn_implementation="eager", trust_remote_code=True)
    recipe = evaluate.read_suite([evaluate.RECIPES], ["sst2"], overrides=arguments.overrides_of_suite)["sst2"]
    changed = {"learning_rate": 1e-4, "attn_implementation": "eager", "trust_remote_code": True}
    assert changed.items() <= recipe.items()


def test_the_recipes_of_the_suite(evaluate):
    chinese = Path(evaluate.RECIPES).with_name("suite_zh")
    suite = evaluate.read_suite([evaluate.RECIPES])
    assert set(suite) == {"sst2", "cola", "mrpc", "rte", "stsb", "ud_english_ewt", "squad", "zh_waimai"}
    suite = evaluate.read_suite([evaluate.RECIPES, chinese])
    assert set(suite) > {"sst2", "zh_waimai", "zh_csl_category", "zh_weibo_ner"}
    metrics = {name: evaluate.metric_of(suite[name]) for name in ("sst2", "cola", "stsb", "squad", "zh_weibo_ner")}
    assert metrics == {"sst2": "accuracy", "cola": "matthews_correlation", "stsb": "spearmanr", "squad": "f1",
                       "zh_weibo_ner": "f1"}  # fmt: skip
    classes = [evaluate.SourceArguments, evaluate.ModelArguments, evaluate.TaskArguments, evaluate.FinetuningArguments]
    for recipe in [*evaluate.RECIPES.glob("*.yaml"), *chinese.glob("*.yaml")]:
        *_, training = evaluate.parse_arguments(classes, [str(recipe), "--output_dir", "out"])
        assert (training.eval_strategy, training.save_strategy) == ("no", "no")
        assert not training.load_best_model_at_end


def test_the_command(files, tmp_path):
    command = [sys.executable, "train/evaluate_models.py", "--model_name_or_path", tiny_model_folder(), *files]
    run = subprocess.run([*command, "--parts", "blimp"], cwd=ROOT, env=environment(), capture_output=True, text=True,
                         check=True)  # fmt: skip
    assert "| overall |" in run.stdout
    assert "BLiMP: 100%" in run.stderr
    assert (tmp_path / "out" / "evaluation.json").is_file()
