"""What benchmarks/ makes of trainings: which are run, with which budget, and the tables; nothing is trained here."""

import argparse
import itertools
import json
import re
import shutil
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from datasets import Dataset
from transformers import AutoConfig, BertConfig, BertForMaskedLM, ModernBertConfig, ModernBertForMaskedLM

from hf_selfattn import POSITIONS, SelfAttnConfig, SelfAttnForMaskedLM, SelfAttnPreTrainedModel
from hf_selfattn.tools import packed_rows
from hf_selfattn.tools.collators import PaddingCollator
from hf_selfattn.tools.opening import ModelArguments, parse_overrides
from hf_selfattn.tools.pretraining import PretrainingArguments, PretrainingScriptArguments, PretrainingTrainer
from hf_selfattn.tools.recipes import parse_arguments
from hf_selfattn.tools.sources import SourceArguments
from hf_selfattn.tools.tables import TABLES, write_tables

from .train_scripts import tiny_tokenizer

ROOT = Path(__file__).resolve().parent.parent

with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(ROOT / "benchmarks")
    import ablation_plan
    import ablation_variants
    import ablations
    import clean_texts
    import learning_curves
    import learning_tables
    import overlap
    import tables
    import ten_minutes
    import trainings

DEFAULT = {"tokenizer_name": "tokenizer", "train_file": ["DATA/a.parquet"], "text_column": "text",
           "config": {"hidden_size": 8, "num_attention_heads": 2}, "max_tokens": 1000,
           "learning_rate": 2e-3}  # fmt: skip
GROUPS = {"rate": {"slow": {"learning_rate": 1e-3}, "none": {"learning_rate": None}},
          "stock models": {"BERT": {"config": {"model_type": "bert"}}}}  # fmt: skip
TINY = SelfAttnConfig(vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2)
MASKED = {"bits_per_byte": 2.0, "masked_tokens": 10}
INPUTS = {"DATA/a.parquet": "ca978112ca1bbdca", "tokenizer's entries": "43b5380793ce7e85"}


@pytest.fixture
def work(tmp_path, monkeypatch):
    """A folder to work in, with rows, a tokenizer and no results."""
    monkeypatch.chdir(tmp_path)
    for folder in ("benchmarks/results", "docs", "tokenizer"):
        Path(folder).mkdir(parents=True)
    Path("a.parquet").write_text("a")
    Path("tokenizer/tokenizer.json").write_text(json.dumps({"model": {"vocab": {"x": 0}}}))
    ablation_plan.ROWS.write_text(yaml.safe_dump({"default": DEFAULT, "groups": GROUPS}, sort_keys=False))
    for module in (ablations, ten_minutes):
        monkeypatch.setattr(module, "precision_here", lambda: "bf16")  # whatever machine tests it
    return tmp_path


def start(monkeypatch, module, *arguments):
    monkeypatch.setattr(sys, "argv", ["script", *map(str, arguments)])
    module.main()


def result(row="default", seed=0, loss=4.0, equal="tokens", budget=1000, **changes):
    default, rows = ablation_plan.read_rows()
    shared = {"max_tokens": budget} if equal == "tokens" else {"max_tokens": None, "max_minutes": budget}
    options = trainings.options_of({**default, **shared}, {**rows.get(row, {}), **changes})
    return {"row": row, "seed": seed, "options": options, "loss": loss, "accuracy": 0.25, "tokens": 1000,
            "equal": equal, "budget": budget, "threads": 1, "precision": "bf16", "inputs": INPUTS,
            **MASKED}  # fmt: skip


def pair(row, seed=0, loss=4.0, tokens=2000, minutes=ablations.MINUTES, **changes):
    """A row at equal time, beside a default with a loss of 4.1 and 1000 tokens."""
    default = result("default", seed, 4.1, "time", minutes)
    return result(row, seed, loss, "time", minutes, **changes) | {"default": default, "tokens": tokens}


def trained(model="ours", seed=0, loss=4.0, minutes=10, language="en", precision="bf16", **options):
    curve = {"columns": ["loss", "tokens", "minutes"], "rows": [[5.0, 10, 0.5], [4.0, 20, 1.0]]}
    run = {"language": language, "model": model, "seed": seed, "budget": minutes, "threads": 2, "options": options}
    numbers = {"loss": loss, "accuracy": 0.25, "tokens": 2_000_000, "precision": precision, **MASKED}
    return {**run, "inputs": INPUTS, **numbers, "curve": curve}


def write(path, results):
    Path(path).write_text("".join(json.dumps(each) + "\n" for each in results))


def planned(rows, default, seeds, found, minutes=None, threads=1):
    return ablation_plan.plan(rows, default, seeds, found, INPUTS, minutes, threads)


def cells_of(table, row):
    line = next(line for line in table.splitlines() if line.startswith(f"| {row} |"))
    return [cell.strip() for cell in line.split("|")[2:-1]]


def test_changes_replace_the_defaults_options_and_null_takes_one_away():
    default = {"a": 1, "b": 2, "config": {"x": 1, "y": 2}}
    assert trainings.options_of(default, {"b": None, "c": 0, "config": {"y": None, "z": 3}}) == {
        "a": 1, "c": 0, "config": {"x": 1, "z": 3}}  # fmt: skip
    assert trainings.options_of({"a": 1}, {}) == {"a": 1}


def test_every_row_of_the_real_file_changes_something():
    default, rows = ablation_plan.read_rows(ROOT / ablation_plan.ROWS)
    same = [row for row, changes in rows.items() if trainings.options_of(default, changes) == default]
    assert same == ["default"]


def test_command_line_of_a_run():
    options = {"variant": "stock", "train_file": ["DATA/a", "DATA/b"], "warmup_steps": 0.1,
               "config": {"attention_pattern": ["full", "random"], "attention_bias": False}}  # fmt: skip
    assert trainings.command_of(options, Path("/data"), 3, "out") == [
        sys.executable, "benchmarks/ablation_variants.py", "stock", "train/pretrain.py", "--seed", "3", "--output_dir",
        "out", "--train_file", "/data/a", "/data/b", "--warmup_steps", "0.1", "--config_overrides",
        'attention_pattern=["full", "random"], attention_bias=false']  # fmt: skip


def test_curve_has_means_of_as_many_entries_each():
    log = [{"tokens": 10 * number, "loss": float(number)} for number in range(1, 6)]
    assert ablations.curve_of(log, points=3) == [[20, 1.5], [40, 3.5], [50, 5.0]]
    assert ablations.curve_of(log) == [[10 * n, float(n)] for n in range(1, 6)]


def test_equal_time_is_that_of_the_default_beside_it(work, monkeypatch, capsys):
    started = []

    def run(row, seed, options, data, threads):
        started.append((row, options.get("max_minutes"), options.get("max_steps"), "max_tokens" in options))
        return {"row": row, "seed": seed, "options": options, "threads": threads, "tokens": 5, "precision": "bf16",
                "loss": 4.0 if row == "default" else 3.5, "accuracy": 0.25}  # fmt: skip

    monkeypatch.setattr(ablations, "run", run)
    for _ in range(2):
        start(monkeypatch, ablations, "--data", work, "--row", "rate: slow", "--equal_time", "2")
    with pytest.raises(SystemExit):
        start(monkeypatch, ablations, "--data", work, "--equal_time", "0")
    printed = capsys.readouterr()
    assert "rate: slow, seed 0: 3.500 nats" in printed.out
    assert "--equal_time is a number of minutes above 0, got 0" in printed.err
    assert started[:2] == [("rate: slow", None, 3, False), ("default", None, 3, False)]  # in which torch compiles
    assert sorted(started[2:]) == [("default", 2, None, False), ("rate: slow", 2, None, False)]
    (kept,) = trainings.read_results(ablation_plan.RESULTS)
    assert (kept["equal"], kept["budget"], kept["loss"], kept["default"]["loss"]) == ("time", 2, 3.5, 4.0)
    assert kept["options"]["learning_rate"] == 1e-3
    assert kept["default"]["options"]["learning_rate"] == 2e-3


def test_equal_time_has_two_at_a_time_already(work, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        start(monkeypatch, ablations, "--data", work, "--row", "rate: slow", "--equal_time", "--workers", 2)
    assert "leave --workers out" in capsys.readouterr().err


@pytest.fixture
def pretraining(monkeypatch):
    """What a run of pretrain.py leaves, without one: the log ends before the last step. Its command lines."""

    def run(command, env, **kwargs):
        commands.append((command, env["OMP_NUM_THREADS"]))
        folder = Path(command[command.index("--output_dir") + 1])
        folder.mkdir(parents=True, exist_ok=True)
        scores = {f"eval_{name}": 4.0 for name in trainings.SCORES} | {"train_tokens_used": 1024, "train_minutes": 0.5}
        log = [{"loss": 6.0, "tokens": 1000, "tokens_per_second": 9.0, "minutes": 0.4}, {"eval_loss": 4.0}]
        record = {"commit": "abc", "versions": {"torch": "2"}, "training_arguments": {"bf16": True, "fp16": False}}
        for name, content in (("all_results", scores), ("run", record),
                              ("trainer_state", {"log_history": log, "global_step": 8})):  # fmt: skip
            (folder / f"{name}.json").write_text(json.dumps(content))
        return argparse.Namespace(returncode=0)

    commands = []
    monkeypatch.setattr(trainings.subprocess, "run", run)
    return commands


def test_numbers_of_a_run_are_those_of_its_end(work, monkeypatch, pretraining):
    start(monkeypatch, ablations, "--data", work, "--row", "rate: slow", "--threads", 3)
    (kept,) = trainings.read_results(ablation_plan.RESULTS)
    assert (kept["tokens"], kept["minutes"], kept["steps"], kept["commit"]) == (1024, 0.5, 8, "abc")
    assert (kept["loss"], kept["unigram_loss"], kept["curve"]) == (4.0, 4.0, [[1000, 6.0]])
    assert (kept["threads"], kept["inputs"], kept["versions"]) == (3, INPUTS, {"torch": "2"})
    assert kept["precision"] == "bf16"
    ((command, threads),) = pretraining
    assert threads == "3"
    assert f"{work}/a.parquet" in command


def test_a_run_that_ends_before_the_first_log_has_its_numbers(work, pretraining):
    state = Path("out/trainer_state.json")
    trainings.start(["train", "--output_dir", "out"], 1)
    state.write_text(json.dumps({"log_history": [{"eval_loss": 4.0}], "global_step": 3}))
    numbers, log = trainings.numbers_of(Path("out"))
    assert (numbers["tokens"], numbers["steps"], ablations.curve_of(log)) == (1024, 3, [])


def test_ten_minutes_train_for_their_minutes_after_a_trial(work, monkeypatch, pretraining):
    arguments = argparse.Namespace(language="en", minutes=10, threads=2, data=work)
    found = ten_minutes.run("ours", {"max_minutes": 3, "train_file": ["DATA/a"]}, 1, arguments)
    assert (found["tokens"], found["budget"], found["minutes"], found["seed"]) == (1024, 10, 0.5, 1)
    assert found["curve"]["rows"] == [[6.0, 1000, 0.4, 9.0]]
    trial, run = (command for command, _ in pretraining)
    assert "--max_minutes" not in trial
    assert trial[trial.index("--max_steps") + 1] == "3"
    assert run[run.index("--max_minutes") + 1] == "10"


def test_a_run_that_fails_says_what_it_printed(monkeypatch):
    failed = argparse.Namespace(returncode=1, stderr="out of memory")
    monkeypatch.setattr(trainings.subprocess, "run", lambda *command, **options: failed)
    with pytest.raises(RuntimeError, match=r"^train it failed:\nout of memory"):
        trainings.start(["train", "it"], 1)


@pytest.mark.parametrize("row", ablation_plan.read_rows(ROOT / ablation_plan.ROWS)[1].items(), ids=lambda row: row[0])
def test_every_row_of_the_real_file_can_be_started(row, monkeypatch):
    """Its options are known to pretrain.py, its configuration to the model, its variant to ablation_variants.py."""
    monkeypatch.syspath_prepend(ROOT / "train")
    options = trainings.options_of(ablation_plan.read_rows(ROOT / ablation_plan.ROWS)[0], row[1])
    words = trainings.command_of(options, Path("data"), 0, "out")
    classes = [SourceArguments, ModelArguments, PretrainingArguments, PretrainingScriptArguments]
    _, model, _, training = parse_arguments(classes, words[words.index("train/pretrain.py") + 1 :])
    assert training.seed == 0
    changes = parse_overrides(model.config_overrides)
    config = AutoConfig.for_model(changes.pop("model_type", "selfattn"), **changes)
    assert options.get("variant", "stock") in ablation_variants.VARIANTS
    if config.model_type == "selfattn" and config.position_encoding == "rotary":
        first = POSITIONS["rotary"].from_config(config, 0).first_biases(config)
        assert (first is None) == ("without first places" in row[0])  # a row that changes two things says so


@pytest.mark.parametrize("name", yaml.safe_load((ROOT / ten_minutes.MODELS).read_text(encoding="utf-8"))["models"])
def test_every_model_of_the_ten_minutes_can_be_started(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(ROOT / "train")
    written = yaml.safe_load(ten_minutes.MODELS.read_text(encoding="utf-8"))
    options = ten_minutes.options_of_model(written, name, "en")
    words = trainings.command_of(options, Path("data"), 0, "out")
    classes = [SourceArguments, ModelArguments, PretrainingArguments, PretrainingScriptArguments]
    _, model, text, training = parse_arguments(classes, words[words.index("train/pretrain.py") + 1 :])
    changes = parse_overrides(model.config_overrides)
    config = AutoConfig.for_model(changes.pop("model_type", "selfattn"), **changes)
    layers = {"ours": 2, "ours-3-layers": 3, "ModernBERT-2-layers": 2}.get(name, 4)
    assert (config.num_hidden_layers, config.hidden_size, text.max_seq_length) == (layers, 256, 128)
    assert (training.optim, text.mlm_probability) == ("adamw_torch_fused", 0.4)
    assert training.lr_scheduler_type == "linear"


def test_ctrl_c_ends_the_runs_that_wait(work, monkeypatch):
    def interrupted(path, result):
        raise KeyboardInterrupt

    def run(row, seed, options, data, threads):
        started.append(row)
        time.sleep(0.02)
        return {"row": row, "seed": seed, "options": options, "loss": 4.0, "accuracy": 0.25}

    started = []
    monkeypatch.setattr(ablations, "run", run)
    monkeypatch.setattr(ablations, "append_result", interrupted)
    with pytest.raises(KeyboardInterrupt):
        start(monkeypatch, ablations, "--data", work, "--row", "rate: slow", "--seeds", *range(1000))
    assert len(started) < 1000  # all would take 20 seconds


def test_a_line_that_was_cut_short_is_named(work):
    ablation_plan.RESULTS.write_text(json.dumps(result()) + '\n{"row": "def')
    with pytest.raises(ValueError, match=r"ablations\.jsonl, line 2, is no result .* cut short\. Delete the line"):
        trainings.read_results(ablation_plan.RESULTS)


def test_results_make_their_folder(tmp_path):
    trainings.append_result(tmp_path / "runs" / "a.jsonl", {"loss": 4.0})
    assert trainings.read_results(tmp_path / "runs" / "a.jsonl") == [{"loss": 4.0}]


def test_what_is_done_is_not_run_again(work):
    default, rows = ablation_plan.read_rows()
    found = [result(), result("rate: slow"), result(seed=1, budget=50), pair("rate: slow", 1)]
    chosen = {row: rows[row] for row in ("default", "rate: slow")}
    assert [run[:2] for run in planned(chosen, default, [0, 1], found)] == [
        ("default", 1), ("rate: slow", 1)]  # fmt: skip
    chosen.pop("default")
    timed = planned(chosen, default, [0, 1], found, ablations.MINUTES)
    assert [run[:2] for run in timed] == [("rate: slow", 0)]
    assert [run[:2] for run in planned(chosen, default, [1], found, 60.0)] == [("rate: slow", 1)]


@pytest.mark.parametrize(("done", "minutes"), [(result, None), (pair, ablations.MINUTES)])
def test_a_result_with_other_options_does_not_count_as_done(work, done, minutes):
    default, rows = ablation_plan.read_rows()
    chosen, done = {"rate: slow": rows["rate: slow"]}, done("rate: slow")
    assert planned(chosen, default, [0], [done], minutes) == []
    done["options"]["learning_rate"] = 0.5
    message = r"'rate: slow', seed 0.* learning_rate: 0\.5 against 0\.001\. Remove its line, or pass another --output"
    with pytest.raises(ValueError, match=message):
        planned(chosen, default, [0], [done], minutes)


def test_a_result_of_other_threads_does_not_count_as_done(work):
    default, rows = ablation_plan.read_rows()
    with pytest.raises(ValueError, match=r"threads: 1 against 2\. Remove its line"):
        planned({"default": rows["default"]}, default, [0], [result()], threads=2)


@pytest.mark.parametrize(("option", "message"), [("--row", "no such row: 'rat'"), ("--group", "no such group: 'rat'")])
def test_unknown_rows_and_groups_are_refused(work, monkeypatch, capsys, option, message):
    monkeypatch.setattr(ablations, "run", lambda *run, **options: pytest.fail("was run"))
    with pytest.raises(SystemExit):
        start(monkeypatch, ablations, "--data", work, option, "rat")
    assert message in capsys.readouterr().err


def test_a_failed_run_is_named_at_the_end_and_the_others_are_kept(work, monkeypatch, capsys):
    def run(row, seed, options, data, threads):
        if row == "rate: slow":
            raise RuntimeError("out of memory")
        return {"row": row, "seed": seed, "options": options, "loss": 4.0, "accuracy": 0.25}

    monkeypatch.setattr(ablations, "run", run)
    with pytest.raises(SystemExit, match=r"failed: 'rate: slow', seed 0$"):
        start(monkeypatch, ablations, "--data", work, "--group", "rate")
    assert "'rate: slow', seed 0 failed: RuntimeError: out of memory" in capsys.readouterr().out
    kept = trainings.read_results(ablation_plan.RESULTS)
    assert [(each["row"], each["equal"], each["budget"]) for each in kept] == [("rate: none", "tokens", 1000)]


def test_tokenizer_is_trained_once_and_its_seconds_are_kept(work, monkeypatch):
    def train(command, **kwargs):
        commands.append(command)
        Path("tokenizer/tokenizer.json").touch()

    commands = []
    monkeypatch.setattr(trainings.subprocess, "run", train)
    assert trainings.make_tokenizer(DEFAULT, work) is None
    Path("tokenizer/tokenizer.json").unlink()
    assert trainings.make_tokenizer(DEFAULT, work) == trainings.make_tokenizer(DEFAULT, work) >= 0
    assert len(commands) == 1
    assert commands[0][2:4] == ["--train_file", f"{work}/a.parquet"]
    assert commands[0][commands[0].index("--vocab_size") + 1] == "8192"


def test_ten_minutes_keep_the_tokenizers_seconds(work, monkeypatch):
    monkeypatch.setattr(ten_minutes, "MODELS", ROOT / ten_minutes.MODELS)
    monkeypatch.setattr(ten_minutes, "make_tokenizer", lambda options, data: 12.5)
    monkeypatch.setattr(ten_minutes, "is_clean", lambda *_: True)
    monkeypatch.setattr(ten_minutes, "inputs_of", lambda options, data: INPUTS)
    monkeypatch.setattr(ten_minutes, "run", lambda name, options, seed, arguments: trained(name, seed, **options))
    written = yaml.safe_load(ten_minutes.MODELS.read_text(encoding="utf-8"))
    Path(written["recipe"]).parent.mkdir(parents=True)
    Path(written["recipe"]).write_text((ROOT / written["recipe"]).read_text(encoding="utf-8"), encoding="utf-8")
    for _ in range(2):
        start(monkeypatch, ten_minutes, "--data", work, "--seeds", 0)
    kept = trainings.read_results(ten_minutes.RESULTS)
    assert [each["model"] for each in kept] == list(written["models"])
    assert {each["tokenizer_seconds"] for each in kept} == {12.5}


def test_results_of_another_text_are_refused_before_any_training(work, monkeypatch):
    """Whatever stands there: another row, seed or precision is of the same text, too."""
    for module in (ten_minutes, ablations):
        monkeypatch.setattr(module, "make_tokenizer", lambda options, data: None)
        monkeypatch.setattr(module, "run", lambda *run, **options: pytest.fail("was run"))
        monkeypatch.setattr(module, "inputs_of", lambda options, data: {**INPUTS, "DATA/a.parquet": "other"})
        monkeypatch.setattr(module, "precision_here", lambda: "fp32")
    monkeypatch.setattr(ten_minutes, "MODELS", ROOT / ten_minutes.MODELS)
    monkeypatch.setattr(ten_minutes, "is_clean", lambda *_: True)
    write(ten_minutes.RESULTS, [trained("BERT", seed=1)])
    write(ablation_plan.RESULTS, [result("rate: slow", seed=1)])
    message = r"DATA/a.parquet is another one for 'what is to be run' than for '.*\(other against ca978112ca1bbdca\)"
    with pytest.raises(ValueError, match=message):
        start(monkeypatch, ten_minutes, "--data", work, "--models", "ours")
    with pytest.raises(ValueError, match=message):
        start(monkeypatch, ablations, "--data", work, "--row", "default")


def test_spread_and_difference():
    assert learning_tables.spread([4.0]) == "4.000"
    assert learning_tables.spread([4.0, 4.5, 4.1]) == "4.200 ± 0.250"
    some = [result(seed=seed, loss=4.0 + seed) for seed in (0, 1)]
    others = [result(seed=seed, loss=3.5) for seed in (1, 2)]
    assert learning_tables.difference(some, others) == "+1.500"
    assert learning_tables.difference(some, [result(loss=3.0), *others]) == "+1.250 ± 0.250"
    # Another precision is another measurement:
    assert learning_tables.difference(some, [{**result(loss=3.0), "precision": "fp32"}, *others]) == "+1.500"
    assert learning_tables.difference(some, others[1:]) == learning_tables.difference(some, []) == ""


def test_ablations_table(work, capsys):
    write(ablation_plan.RESULTS, [
        result(), result(seed=1, loss=4.2), result("rate: slow", loss=4.5),
        pair("rate: slow", loss=3.9), pair("rate: slow", seed=1, loss=4.1, tokens=3000),
        pair("rate: slow", loss=3.0, minutes=60.0),
        result("rate: none", seed=7), result("rate: forgotten"), result("stock models: BERT", budget=50),
    ])  # fmt: skip
    table = learning_tables.ablations()
    assert cells_of(table, "default") == ["4.100 ± 0.100", "", "25.0%", "2", "", "", ""]
    assert cells_of(table, "rate: slow") == ["4.500", "+0.500", "25.0%", "1", "2.50", "-0.100 ± 0.100", "2"]
    # Of a seed that the default has not:
    assert cells_of(table, "rate: none") == ["4.000", "", "25.0%", "1", "", "", ""]
    assert len(table.splitlines()) == 5
    assert "'rate: forgotten' is in benchmarks/results/ablations.jsonl and no longer in" in capsys.readouterr().out


def test_ablations_table_without_the_default(work):
    write(ablation_plan.RESULTS, [result("rate: slow")])
    assert cells_of(learning_tables.ablations(), "rate: slow") == ["4.000", "", "25.0%", "1", "", "", ""]
    write(ablation_plan.RESULTS, [pair("rate: slow")])
    assert cells_of(learning_tables.ablations(), "rate: slow") == ["", "", "", "", "2.00", "-0.100", "1"]


def test_stock_search_has_the_stock_models_at_their_budget(work):
    budget = learning_tables.STOCK_BUDGET
    found = [result("stock models: BERT", budget=budget), result("rate: slow", budget=budget), result()]
    write(ablation_plan.RESULTS, found)
    found.append({**result("stock models: BERT", budget=budget, loss=4.5), "precision": "fp32"})
    write(ablation_plan.RESULTS, found)
    assert learning_tables.stock_search().splitlines()[2:] == [
        "| BERT | bf16 | 4.000 | 25.0% | 1 |",
        "| BERT | fp32 | 4.500 | 25.0% | 1 |",
    ]


def test_tables_do_not_average_results_with_different_options(work):
    write(ablation_plan.RESULTS, [result("rate: slow"), result("rate: slow", seed=1, learning_rate=0.5)])
    with pytest.raises(ValueError, match=r"'rate: slow' has .* options: learning_rate: 0\.001 against 0\.5\. Remove"):
        learning_tables.ablations()
    write(ablation_plan.RESULTS, [result(), {**result("rate: slow"), "inputs": {**INPUTS, "DATA/a.parquet": "other"}}])
    with pytest.raises(ValueError, match=r"DATA/a.parquet is another one for 'rate: slow' than for 'default'"):
        learning_tables.ablations()
    write(ten_minutes.RESULTS, [trained(a=1), trained("BERT", a=2), trained(seed=1, a=2)])
    with pytest.raises(ValueError, match=r"'ours', en, bf16, has results with different options: a: 1 against 2"):
        learning_tables.ten_minutes("en")
    other = {**trained("BERT", precision="fp32"), "inputs": {**INPUTS, "DATA/a.parquet": "other"}}
    write(ten_minutes.RESULTS, [trained(), {**other, "language": "zh"}])
    assert "BERT" not in learning_tables.ten_minutes("en")
    write(ten_minutes.RESULTS, [trained(), other])
    with pytest.raises(ValueError, match=r"DATA/a.parquet is another one for 'BERT' than for 'ours'"):
        learning_tables.ten_minutes("en")


def test_ten_minutes_table(work):
    write(ten_minutes.RESULTS, [
        trained(), trained(seed=1, loss=4.5), trained("BERT"), trained(minutes=1, loss=9), trained(language="zh"),
        trained("BERT", precision="fp32", loss=6.0),
    ])  # fmt: skip
    table = learning_tables.ten_minutes("en")
    assert cells_of(table, "**ours**") == ["bf16", "4.250 ± 0.250", "25.0%", "2.000", "2.0", "2"]
    assert cells_of(table, "BERT")[:2] == ["fp32", "6.000"]
    assert table.splitlines()[-1].startswith("| BERT | bf16 | 4.000 |")


def test_curves_label_every_model_and_keep_minutes_apart(work, monkeypatch, capsys):
    write(ten_minutes.RESULTS, [trained(), trained("BERT", seed=1), trained("other", minutes=1)])
    drawn, draw = [], learning_curves.draw
    monkeypatch.setattr(learning_curves, "draw", lambda found: drawn.append(draw(found)) or drawn[-1])
    for minutes in (10, 1):
        start(monkeypatch, learning_curves, "--minutes", minutes)
    labels = [[text.get_text() for text in figure.axes[0].get_legend().get_texts()] for figure in drawn]
    assert labels == [["ours", "BERT"], ["other"]]
    assert {path.name for path in Path("docs").glob("*.png")} == {"ten_minutes_en.png", "1_minutes_en.png"}
    with pytest.raises(SystemExit):
        start(monkeypatch, learning_curves, "--minutes", 3)
    assert "nothing for --language en --minutes 3" in capsys.readouterr().err


def test_curves_are_of_one_precision(work, monkeypatch, capsys):
    write(ten_minutes.RESULTS, [trained(), trained("BERT", precision="fp32")])
    drawn, draw = [], learning_curves.draw
    monkeypatch.setattr(learning_curves, "draw", lambda found: drawn.append(found) or draw(found))
    start(monkeypatch, learning_curves, "--precision", "fp32")
    assert [result["model"] for result in drawn[0]] == ["BERT"]
    with pytest.raises(SystemExit):
        start(monkeypatch, learning_curves)
    assert "pass --precision, one of bf16, fp32" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        start(monkeypatch, learning_curves, "--precision", "fp16")
    assert "are in bf16, fp32, not in --precision fp16" in capsys.readouterr().err


def test_a_seed_of_both_precisions_counts_once(work):
    default = [result(), {**result(loss=3.0), "precision": "fp32"}]
    row = [result("masking: 15 %", loss=4.5), {**result("masking: 15 %", seed=1, loss=9.0), "precision": "fp32"}]
    assert learning_tables.cells(default)[::2] == ("4.000", "1")
    assert learning_tables.cells([*row, *default])[2] == "2"
    assert learning_tables.difference(row, default) == "+0.500"
    assert learning_tables.difference([{**row[0], "precision": "fp32"}], default) == "+1.500"


def test_what_stands_in_another_precision_is_run_here(work, monkeypatch):
    monkeypatch.setattr(ten_minutes, "MODELS", ROOT / ten_minutes.MODELS)
    for name, stub in (("make_tokenizer", None), ("inputs_of", INPUTS), ("is_clean", True)):
        monkeypatch.setattr(ten_minutes, name, lambda *_, stub=stub: stub)
    ran = []
    monkeypatch.setattr(ten_minutes, "run", lambda name, options, *_: ran.append(name) or trained(name, **options))
    written = yaml.safe_load(ten_minutes.MODELS.read_text(encoding="utf-8"))
    Path(written["recipe"]).parent.mkdir(parents=True)
    shutil.copy(ROOT / written["recipe"], written["recipe"])
    options = ten_minutes.options_of_model(written, "BERT", "en")
    for precision, count in (("fp32", 1), ("bf16", 1)):
        write(ten_minutes.RESULTS, [trained("BERT", precision=precision, **options)])
        start(monkeypatch, ten_minutes, "--data", work, "--models", "BERT")
        assert len(ran) == count


def evaluation(*names):
    blimp = {"blimp": {"accuracy": 0.5, "phenomena": {}, "paradigms": {}}}
    score = {"values": [0.5], "median": 0.5, "lowest": 0.5, "highest": 0.5}
    task = {"metric": "accuracy", "models": {**dict.fromkeys(names, score), f"{names[0]} from scratch": score},
            "baselines": {"majority": 0.4}}  # fmt: skip
    return {"models": dict.fromkeys(names, blimp), "suite": {"cola": task}, "commit": "abc",
            "arguments": {"model_name_or_path": list(names)}}  # fmt: skip


def test_blimp_of_several_seeds_is_their_mean():
    scores = {name: {"blimp": {"accuracy": share, "phenomena": {}, "paradigms": {}}}
              for name, share in (("en-ours-0", 0.5), ("en-ours-1", 0.7), ("en-BERT-0", 0.4))}  # fmt: skip
    lines = learning_tables.table_of("blimp_en", {"models": scores}).splitlines()
    assert lines[0].startswith("|  | **ours**, 2 seeds | BERT | 5-gram |")
    assert lines[2].startswith("| overall | 60.0 ± 10.0 | 40.0 | 61.2 |")


def test_take_keeps_an_evaluation_and_writes_its_table(work, monkeypatch):
    Path("evaluation.json").write_text(json.dumps(evaluation("/home/me/runs/mine", "runs/other/", "google/bert")))
    for name in ("blimp_en", "suite_en"):
        Path("README.md").write_text(f"before\n<!-- table: {name} -->\nold\n<!-- end of table -->\nafter\n")
        start(monkeypatch, tables, "--take", "evaluation.json", name)
        page = Path("README.md").read_text()
        assert page.startswith(f"before\n<!-- table: {name} -->\n| ")
        assert page.endswith("|\n<!-- end of table -->\nafter\n")
        assert "old" not in page
        assert " | mine | other | bert | " in page
        kept = Path("benchmarks/results", f"{name}.json").read_text()
        assert json.loads(kept) == evaluation("mine", "runs/other/", "google/bert")
    assert "| mine from scratch |" in page


@pytest.mark.parametrize("page", tables.PAGES, ids=str)
def test_the_tables_of_a_page_are_those_of_the_results(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    text = page.read_text(encoding="utf-8")
    assert set(re.findall(r"<!-- table: (\w+) -->", text)) & set(tables.TABLES)
    assert write_tables(text, tables.TABLES) == text


def test_masked_tokens_are_means_over_the_seeds_of_a_model():
    def scores(value):
        part = {"loss": value, "accuracy": value / 10, "bits_per_byte": value / 2, "tokens": 10}
        return {"masked_tokens": part, "masked_words": part}

    found = {"models": {"runs/en-ours-0": scores(4.0), "runs/en-ours-1": scores(3.0), "x/en-BERT-2": scores(7.0)}}
    table = learning_tables.table_of("masked_en", found)
    assert cells_of(table, "**ours**") == ["3.500 ± 0.500", "35.0%", "1.750 ± 0.250", "2"]
    assert cells_of(table, "BERT") == ["7.000", "70.0%", "3.500", "1"]


def test_words_and_blimp_compare_models_with_different_tokenizers():
    def scores(value):
        return {
            "masked_tokens": {"tokens": int(value)},
            "masked_words": {"bits_per_byte": value / 2, "accuracy": value / 10},
            "blimp": {"accuracy": value / 8},
        }

    found = {"models": {"en-ours-0": scores(4.0), "en-ours-1": scores(3.0), "en-16384-words-0": scores(5.0)}}
    table = learning_tables.table_of("words_en", found)
    assert cells_of(table, "**ours**") == ["1.750 ± 0.250", "35.0%", "43.8 ± 6.2", "2"]
    assert cells_of(table, "16384-words") == ["2.500", "50.0%", "62.5", "1"]


@pytest.mark.parametrize("name", ["masked_en", "words_en", "blimp_en", "suite_en"])
def test_take_refuses_an_evaluation_without_the_tables_part(work, name):
    found = {**evaluation("mine"), "models": {"mine": {}}, "suite": {}}
    Path("evaluation.json").write_text(json.dumps(found))
    with pytest.raises(ValueError, match=rf"{name} needs .* with that among its --parts"):
        learning_tables.take(Path("evaluation.json"), name)
    assert not list(Path("benchmarks/results").iterdir())


def test_take_refuses_two_models_of_the_same_short_name(work):
    Path("evaluation.json").write_text(json.dumps(evaluation("runs/a/last", "runs/b/last")))
    with pytest.raises(ValueError, match="have the same last folder"):
        learning_tables.take(Path("evaluation.json"), "blimp_en")


def test_take_refuses_an_unknown_table(work, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        start(monkeypatch, tables, "--take", "evaluation.json", "blimp_fr")
    assert (
        "no table 'blimp_fr'. There are masked_en, words_en, blimp_en, suite_en, suite_zh" in capsys.readouterr().err
    )


@pytest.mark.parametrize(("steps", "expected"), [([10, 20], 15.0), ([9], 9.0)], ids=["two", "none"])
def test_averaged_weights_are_the_mean_of_the_steps_that_fell_into_the_share(steps, expected):
    share = iter([0.5, 0.79, *[0.8, 1.0][-len(steps) :]])
    trainer = argparse.Namespace(progress=argparse.Namespace(share=lambda: next(share)))
    model, average = torch.nn.Linear(2, 1), ablation_variants.Average(trainer, 0.2)
    for step in (90, 100, *steps):
        torch.nn.init.constant_(model.weight, step)
        average.on_step_end(None, argparse.Namespace(global_step=step), None, model=model)
    average.on_train_end(None, None, None, model=model)
    assert torch.equal(model.weight, torch.full((1, 2), expected))


@pytest.fixture
def stock_models(monkeypatch):
    """Small BERT and ModernBERT; what a variant changes in their classes is taken back."""
    for kind in (BertForMaskedLM, ModernBertForMaskedLM):
        monkeypatch.setattr(kind, "forward", kind.forward)
    size = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
            "intermediate_size": 24, "max_position_embeddings": 16}  # fmt: skip
    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    modern = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
    return BertForMaskedLM(BertConfig(**size, **no_dropout)), ModernBertForMaskedLM(ModernBertConfig(**size, **modern))


def test_sparse_predictions_have_the_loss_and_the_gradients_of_dense_ones(stock_models):
    ids = torch.randint(3, 40, (3, 8))
    labels = torch.where(torch.rand(3, 8) < 0.4, ids, -100)
    labels[0, 0] = 5
    batch, found = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}, []
    for change in (lambda: None, ablation_variants.sparse_predictions):
        change()
        for model in stock_models:
            model.zero_grad()
            output = model.train()(**batch)
            output.loss.backward()
            gradients = [parameter.grad.clone() for parameter in model.parameters()]
            found.append([output.logits is None, output.loss.detach(), *gradients])
    for dense, sparse in zip(found[:2], found[2:], strict=True):
        assert (dense[0], sparse[0]) == (False, True)
        torch.testing.assert_close(sparse[1:], dense[1:])
    of_two = stock_models[0](**batch, num_items_in_batch=2).loss.item()
    assert of_two == pytest.approx(found[2][1].item() * (labels != -100).sum().item() / 2)


def test_stock_models_get_full_rows_without_the_documents_boundaries(monkeypatch):
    monkeypatch.setattr(packed_rows, "choose_packing", packed_rows.choose_packing)
    monkeypatch.setattr(packed_rows.PackingCollator, "__call__", packed_rows.PackingCollator.__call__)
    monkeypatch.setattr(ablation_variants, "sparse_predictions", lambda: None)
    collate = packed_rows.PackingCollator(PaddingCollator(tiny_tokenizer()), 8)
    documents = [{"input_ids": [2, 5, 3], "labels": 0}, {"input_ids": [2, 6, 7, 3], "labels": 1}]
    before = collate(documents)
    ablation_variants.stock()
    assert packed_rows.choose_packing("auto", BertConfig(), None) is True
    after = collate(documents)
    assert set(before) - set(after) == {
        "position_ids", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"}  # fmt: skip
    assert after["input_ids"].tolist() == before["input_ids"].tolist()
    assert after["attention_mask"].sum() == 7


def test_outputs_that_begin_at_zero_leave_the_embeddings_as_they_are(monkeypatch):
    monkeypatch.setattr(SelfAttnPreTrainedModel, "_init_weights", SelfAttnPreTrainedModel._init_weights)
    ablation_variants.zero_outputs()
    for layer in SelfAttnForMaskedLM(TINY).model.layers:
        assert not layer.attention.o_proj.weight.any()
        assert not layer.feed_forward.down_proj.weight.any()


def test_value_residuals_mix_each_layers_values_with_the_firsts(monkeypatch):
    monkeypatch.setattr(SelfAttnForMaskedLM, "__init__", SelfAttnForMaskedLM.__init__)
    ablation_variants.value_residuals()
    first, second = (layer.attention.v_proj for layer in SelfAttnForMaskedLM(TINY).model.layers)
    some, other = torch.randn(2, 3, 16)
    values, own = first(some), torch.nn.functional.linear(other, second.weight, second.bias)
    torch.testing.assert_close(second(other) * 2, values + own)


def test_batches_grow_with_the_share_of_the_training(monkeypatch):
    monkeypatch.setattr(PretrainingTrainer, "__init__", lambda self: None)
    monkeypatch.setattr(torch.utils.data.BatchSampler, "__iter__", torch.utils.data.BatchSampler.__iter__)
    ablation_variants.batch_ramp((1, 2, 4))
    shares = iter([0.0, 0.2, 0.4, 0.7, 1.0])
    monkeypatch.setattr(PretrainingTrainer, "progress", argparse.Namespace(share=lambda: next(shares)))
    PretrainingTrainer()
    sampler = torch.utils.data.BatchSampler(range(20), batch_size=8, drop_last=False)
    assert [len(batch) for batch in itertools.islice(sampler, 5)] == [1, 1, 2, 4, 4]


# overlap.py


def test_overlap_finds_whole_sentences_whatever_their_case_and_punctuation():
    sentences = overlap.sentences_of(["The cat sat here.", "The cat sat there!", "A cat.", "Dogs, it's said, bark."])
    assert len(sentences) == 3  # too short to be looked for: "A cat."
    texts = ['So "the CAT sat" here; dogs it s said', "bark. The cat sat therefore"]
    assert set(overlap.found_in(overlap.by_beginning(sentences), texts)) == {("the", "cat", "sat", "here")}


def test_overlap_takes_chinese_characters_for_words():
    assert overlap.words_of("Die Stadt 北京, heute.") == ("die", "stadt", "北", "京", "heute")


def write_rows(name, split, **columns):
    Path(name).mkdir(exist_ok=True)
    Dataset.from_dict(columns).to_parquet(f"{name}/{split}.parquet")


def test_overlap_of_data_sets(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(overlap, "PRETRAINING", {"en": ("a", "b")})
    monkeypatch.setattr(overlap, "SENTENCES", {"en": (("task", "validation", "text", "words"),)})
    monkeypatch.setattr(overlap, "PASSAGES", {"en": (("task", "validation", "text"),)})
    long = " ".join(map(str, range(14)))
    write_rows("a", "train", text=["It was found, they said. " + long])
    write_rows("b", "train", text=["Nothing."])
    write_rows(
        "task",
        "validation",
        text=["they said nothing here", long + " more"],
        words=[["It", "was", "found", "they"]] * 2,
    )
    start(monkeypatch, overlap, "--data", tmp_path, "--languages", "en", "--output", "runs/overlap.json")
    assert "task, validation, text, words: 1 of 3 sentences (33.33%)" in capsys.readouterr().out
    sentences, passages = json.loads(Path("runs/overlap.json").read_text())
    assert (sentences["looked_for"], sentences["found"], sentences["examples"]) == (3, 1, ["it was found they"])
    assert (passages["looked_for"], passages["found"], passages["kind"]) == (3, 2, "passages")
    monkeypatch.setattr(learning_tables, "OVERLAP", Path("runs/overlap.json"))
    assert learning_tables.overlap().splitlines()[2:] == [
        "| task, validation: text, words | 3 sentences | 1 | 33.3% |",
        "| task, validation: text | 3 passages | 2 | 66.7% |",
    ]


def test_clean_texts_hold_nothing_that_is_evaluated_on(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    compared = {"en": (("task", "validation", "text"),)}
    for module in (overlap, clean_texts):
        for name, value in (("PRETRAINING", {"en": ("a",)}), ("SENTENCES", compared), ("PASSAGES", compared)):
            monkeypatch.setattr(module, name, value)
    long = " ".join(map(str, range(14)))
    write_rows("task", "validation", text=["It was found.", "It was found, they said.", long + " more."])
    texts = [
        "It was found. It is.",
        'So "it was found", they said.',
        "x " + " ".join(long.split()[1:]) + " y",
        "Other.",
    ]
    write_rows("a", "train", text=texts, id=[0, 1, 2, 3])
    assert not clean_texts.is_clean(tmp_path, "en")
    start(monkeypatch, clean_texts, "--data", tmp_path)
    assert capsys.readouterr().out == "a: 2 of 4 articles left out, 77.8% of the words\n"
    assert clean_texts.is_clean(tmp_path, "en")
    assert [file.name for file in (clean_texts.TEXTS / "a").iterdir()] == ["train.parquet"]
    kept = Dataset.from_parquet(str(clean_texts.TEXTS / "a/train.parquet"))
    assert kept["id"] == [0, 3]
    start(monkeypatch, overlap, "--data", ".", "--pretraining", clean_texts.TEXTS, "--output", "runs/overlap.json")
    assert [each["found"] for each in json.loads(Path("runs/overlap.json").read_text())] == [0, 0]
    write_rows("task", "validation", text=["Other words."])  # the texts are of other data then
    assert not clean_texts.is_clean(tmp_path, "en")
    with monkeypatch.context() as broken:  # killed on the way: nothing says that it is whole
        broken.setattr(clean_texts, "load_dataset", lambda *_, **options: {}["killed"])
        with pytest.raises(KeyError, match="killed"):
            clean_texts.clean(tmp_path, "en")
    assert not clean_texts.record_of("en", clean_texts.TEXTS).exists()
    with pytest.raises(
        ValueError, match=r"^--output is the folder of the data, .*: its texts would be lost\. Pass an"
    ):
        start(monkeypatch, clean_texts, "--data", tmp_path, "--output", ".")
    Path("task/validation.parquet").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"task/validation\.parquet is not there: all that models are evaluated"
    ):
        start(monkeypatch, clean_texts, "--data", tmp_path)


def test_overlap_of_other_texts_does_not_replace_the_results(work, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        start(monkeypatch, overlap, "--data", work, "--pretraining", "runs/clean-texts")
    assert (
        "benchmarks/results/overlap.json is of whole texts: with --pretraining pass --output."
        in capsys.readouterr().err
    )


def test_ten_minutes_clean_the_text_and_want_a_tokenizer_of_it(work, monkeypatch, capsys):
    monkeypatch.setattr(ten_minutes, "MODELS", ROOT / ten_minutes.MODELS)
    cleaned = []
    monkeypatch.setattr(ten_minutes, "clean", lambda data, language: cleaned.append(language))
    monkeypatch.setattr(ten_minutes, "is_clean", lambda *_: False)
    monkeypatch.setattr(ten_minutes, "make_tokenizer", lambda options, data: sys.exit("ended"))
    with pytest.raises(SystemExit, match="ended"):
        start(monkeypatch, ten_minutes, "--data", work, "--language", "zh")
    assert cleaned == ["zh"]
    Path("runs/ten-minutes-tokenizers/zh").mkdir(parents=True)
    with pytest.raises(SystemExit):
        start(monkeypatch, ten_minutes, "--data", work, "--language", "zh")
    assert "runs/ten-minutes-tokenizers/zh was learned from another text than" in capsys.readouterr().err
    assert cleaned == ["zh"]


def test_ten_minutes_train_on_clean_texts():
    languages = yaml.safe_load((ROOT / ten_minutes.MODELS).read_text(encoding="utf-8"))["languages"]
    for language, options in languages.items():
        files = [str(clean_texts.TEXTS / name / "train.parquet") for name in overlap.PRETRAINING[language]]
        assert options["train_file"] == files


def test_what_stands_in_the_results_of_ten_minutes_is_what_would_be_run(monkeypatch):
    monkeypatch.chdir(ROOT)
    written = yaml.safe_load(ten_minutes.MODELS.read_text(encoding="utf-8"))
    for kept in trainings.read_results(ten_minutes.RESULTS):
        options = ten_minutes.options_of_model(written, kept["model"], kept["language"])
        assert trainings.differing(kept["options"], options) == ""


def test_masked_tokens_of_two_tokenizers_are_not_averaged():
    scores = {f"en-{name}": {"masked_tokens": {"tokens": count}} for name, count in (("a-0", 10), ("b-0", 11))}
    with pytest.raises(ValueError, match=r"^en-a-0, en-b-0 were asked for different tokens: .* with one tokenizer\."):
        learning_tables.table_of("masked_en", {"models": scores})


def test_overlap_counts_passages_of_a_text():
    words = [f"w{i}" for i in range(20)]
    passages = overlap.passages_of([" ".join(words)], size=13)
    assert len(passages) == 8
    found = overlap.found_in(overlap.by_beginning(passages), ["x " + " ".join(words[4:18])])
    assert set(found) == {tuple(words[4:17]), tuple(words[5:18])}


def test_the_tables_that_pages_mark_are_those_that_are_made():
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    marked = {
        name for page in pages for name in re.findall(r"<!-- table: (\w+) -->", page.read_text(encoding="utf-8"))
    }
    assert marked == {*tables.TABLES, *TABLES}
