import contextlib
import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForMaskedLM, AutoTokenizer, pipeline

from hf_selfattn.tools.evaluation import open_masked_lm
from hf_selfattn.tools.evaluation_masked import masked_token_metrics
from hf_selfattn.tools.opening import ModelArguments

from .train_scripts import (
    ROOT,
    TINY,
    environment,
    script,
    sentences,
    tiny_model_folder,
    tiny_tokenizer,
    tiny_tokenizer_folder,
    write_rows,
    write_texts,
)

QUICK = [
    "--config_overrides",
    TINY,
    "--max_steps",
    "6",
    "--save_steps",
    "3",
    "--logging_steps",
    "2",
    "--seed",
    "1",
    "--eval_strategy",
    "steps",
    "--eval_steps",
    "3",
    "--per_device_train_batch_size",
    "16",
    "--bf16",
    "false",
    "--use_cpu",
    "--report_to",
    "none",
    "--learning_rate",
    "1e-2",
    "--disable_tqdm",
    "true",
]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_texts(tmp_path_factory.mktemp("corpus") / "corpus.txt", sentences(300))


def pretrain(corpus, folder, *options, recipe=()):
    return script("pretrain").main([*recipe, "--train_file", corpus, "--output_dir", str(folder), *QUICK, *options])


@pytest.fixture(scope="module")
def run(corpus, tmp_path_factory):
    """(folder, metrics, what was printed) of a run that learns its own tokenizer."""
    folder = tmp_path_factory.mktemp("runs") / "first"
    from io import StringIO

    with contextlib.redirect_stdout(StringIO()) as printed:
        scores = pretrain(corpus, folder, "--tokenizer_vocab_size", "400", "--max_steps", "60")
    return folder, scores, printed.getvalue()


def test_what_lies_beside_the_model(run):
    folder = run[0]
    results = json.loads((folder / "all_results.json").read_text())
    for name in (
        "eval_loss",
        "eval_perplexity",
        "eval_accuracy",
        "eval_bits_per_byte",
        "eval_unigram_accuracy",
        "train_loss",
        "train_tokens",
    ):
        assert isinstance(results[name], (int, float))
    assert (folder / "training_curve.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    record = json.loads((folder / "run.json").read_text())
    assert record["seed"] == 1
    assert {"torch", "transformers", "python"} <= set(record["versions"])
    assert "commit" in record
    card = (folder / "README.md").read_text()
    assert "pipeline_tag: fill-mask" in card
    assert "| bits_per_byte |" in card
    assert "training_curve.png" in card
    assert math.exp(results["eval_loss"]) == pytest.approx(results["eval_perplexity"])


def test_evaluate_models_measures_what_pretrain_does(corpus, tmp_path):
    texts = sentences(40, seed=5)
    held_out = write_texts(tmp_path / "held_out.txt", texts)
    options = ["--validation_file", held_out, "--eval_mlm_probability", "0.3", "--eval_masks_seed", "4"]
    scores = pretrain(corpus, tmp_path / "model", "--tokenizer_name", tiny_tokenizer_folder(), *options)
    model, tokenizer = open_masked_lm(ModelArguments(model_name_or_path=str(tmp_path / "model")))
    found = masked_token_metrics(model, tokenizer, texts, 128, 0.3, seed=4, progress=None)
    for name in ("loss", "accuracy", "bits_per_byte"):
        assert found[name] == pytest.approx(scores[f"eval_{name}"], rel=1e-5)


def test_it_learns_more_than_the_unigram_model(run):
    _, scores, printed = run
    assert scores["eval_loss"] < scores["eval_unigram_loss"]
    assert scores["eval_accuracy"] > scores["eval_unigram_accuracy"]
    assert "masked-token accuracy" in printed
    assert "the model says" in printed


def test_the_folder_opens(run):
    folder, *_ = run
    fill = pipeline("fill-mask", model=str(folder))
    assert len(fill("the cat [MASK] music")) == 5
    assert type(AutoModelForMaskedLM.from_pretrained(folder)).__name__ == "SelfAttnForMaskedLM"
    assert len(AutoTokenizer.from_pretrained(folder)) <= 400


def test_the_history_has_each_evaluation_on_the_same_tokens(run):
    state = json.loads((run[0] / "trainer_state.json").read_text())
    evaluations = [entry for entry in state["log_history"] if "eval_loss" in entry]
    assert len(evaluations) == 20
    assert len({entry["eval_masked_tokens"] for entry in evaluations}) == 1
    assert len({entry["eval_unigram_loss"] for entry in evaluations}) == 1


def test_evaluation_depends_neither_on_the_batch_size_nor_on_the_run(run, corpus, tmp_path):
    scores = []
    for size in ("1", "7"):
        scores.append(
            pretrain(
                corpus,
                tmp_path / size,
                "--model_name_or_path",
                str(run[0]),
                "--config_overrides",
                "",
                "--do_train",
                "false",
                "--per_device_eval_batch_size",
                size,
            )
        )
    for name in ("eval_loss", "eval_accuracy", "eval_bits_per_byte", "eval_masked_tokens"):
        assert scores[0][name] == pytest.approx(run[1][name], rel=1e-4)
        assert scores[1][name] == pytest.approx(run[1][name], rel=1e-4)


def test_a_resumed_run_ends_as_one_that_was_not_stopped(corpus, tmp_path):
    options = [
        "--tokenizer_name",
        tiny_tokenizer_folder(),
        "--config_overrides",
        TINY + ",hidden_dropout=0.1",
        "--num_shown",
        "0",
    ]
    pretrain(corpus, tmp_path / "whole", *options)
    shutil.copytree(tmp_path / "whole" / "checkpoint-3", tmp_path / "stopped" / "checkpoint-3")
    with pytest.raises(ValueError, match="holds checkpoints of an earlier run"):
        pretrain(corpus, tmp_path / "stopped", *options)
    pretrain(corpus, tmp_path / "stopped", *options, "--resume_from_checkpoint", "last")
    whole, resumed = (
        AutoModelForMaskedLM.from_pretrained(tmp_path / name).state_dict() for name in ("whole", "stopped")
    )
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_rows_are_filled_with_documents_in_training_alone(corpus, tmp_path):
    options = ["--tokenizer_name", tiny_tokenizer_folder(), "--max_seq_length", "64", "--num_shown", "0"]
    counting = ["--include_num_input_tokens_seen", "non_padding"]
    scores, seen = {}, {}
    for packing in ("true", "false"):
        scores[packing] = pretrain(corpus, tmp_path / packing, *options, *counting, "--packing", packing)
        state = json.loads((tmp_path / packing / "trainer_state.json").read_text())
        seen[packing] = state["num_input_tokens_seen"] / (6 * 16 * 64)
        scores[packing] |= json.loads((tmp_path / packing / "all_results.json").read_text())
    assert seen["true"] > 0.8  # an epoch ends with a batch of fewer rows
    assert seen["false"] < 0.2
    for name in ("eval_masked_tokens", "eval_unigram_loss", "eval_unigram_accuracy", "train_tokens", "train_rows"):
        assert scores["true"][name] == scores["false"][name]
    default = pretrain(corpus, tmp_path / "default", *options)
    assert default["eval_loss"] == scores["true"]["eval_loss"]


def test_an_existing_encoder_of_transformers_trains_too(corpus, tmp_path):
    overrides = TINY + ",model_type=bert,max_position_embeddings=48"
    options = ["--tokenizer_name", tiny_tokenizer_folder(), "--config_overrides", overrides]
    scores = pretrain(corpus, tmp_path, *options)
    assert scores["eval_loss"] < 10
    assert type(AutoModelForMaskedLM.from_pretrained(tmp_path)).__name__ == "BertForMaskedLM"
    with pytest.raises(ValueError, match="--packing true is not possible: a bert model lets the documents"):
        pretrain(corpus, tmp_path / "packed", *options, "--packing", "true")


@pytest.mark.parametrize("model_type", ["selfattn", "bert"])
@pytest.mark.parametrize("asked", [None, True])
def test_a_new_model_can_begin_at_the_unigram_models_loss(corpus, tmp_path, model_type, asked):
    """To within what its random logits add; with a bias of 0 it begins at that of equal probabilities."""
    overrides = f"{TINY},model_type={model_type},max_position_embeddings=48"
    options = ["--tokenizer_name", tiny_tokenizer_folder(), "--config_overrides", overrides, "--do_train", "false"]
    options += [] if asked is None else ["--unigram_bias", str(asked)]
    scores = pretrain(corpus, tmp_path, *options)
    uniform = math.log(len(tiny_tokenizer()))
    assert scores["eval_unigram_loss"] < uniform - 0.5
    assert abs(scores["eval_loss"] - (scores["eval_unigram_loss"] if asked else uniform)) < 0.1


def test_a_trained_bias_stays(run, corpus, tmp_path):
    trained = ["--model_name_or_path", str(run[0]), "--do_train", "false"]
    assert pretrain(corpus, tmp_path, *trained)["eval_loss"] == pytest.approx(run[1]["eval_loss"], rel=1e-6)
    with pytest.raises(ValueError, match="--unigram_bias gives a new model its first output bias, got --model_name"):
        pretrain(corpus, tmp_path / "again", *trained, "--unigram_bias", "true")
    with pytest.raises(ValueError, match="--neighbour_vectors gives a new model its first token vectors, got --model"):
        pretrain(corpus, tmp_path / "again", *trained, "--neighbour_vectors", "0.1")


def test_a_recipes_first_values_can_be_taken_back(run, corpus, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("neighbour_vectors: 0.1\nunigram_bias: true\n")
    options = ["--model_name_or_path", str(run[0]), "--do_train", "false"]
    taken_back = ["--neighbour_vectors", "0", "--unigram_bias", "false"]
    scores = pretrain(corpus, tmp_path / "out", *options, *taken_back, recipe=[str(recipe)])
    assert scores["eval_loss"] == pytest.approx(run[1]["eval_loss"], rel=1e-6)


def test_an_output_layer_without_a_bias_has_none_to_begin(corpus, tmp_path):
    overrides = f"{TINY},model_type=modernbert,max_position_embeddings=48,decoder_bias=false,intermediate_size=32"
    with pytest.raises(ValueError, match=r"that of ModernBertForMaskedLM has none .* leave --unigram_bias out"):
        pretrain(corpus, tmp_path, "--config_overrides", overrides, "--unigram_bias", "true")


def test_the_masks_of_evaluation_have_their_own_seed(run, corpus, tmp_path):
    def scores(*options):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        return pretrain(corpus, folder, "--model_name_or_path", str(run[0]), "--do_train", "false", *options)

    first, other_seed = scores(), scores("--seed", "5", "--train_file", corpus, "--validation_file", corpus)
    same = scores("--train_file", corpus, "--validation_file", corpus)
    assert other_seed["eval_loss"] == same["eval_loss"]
    assert scores("--eval_masks_seed", "5")["eval_loss"] != first["eval_loss"]


def test_evaluation_shows_nothing_of_what_it_asks_for(run, corpus, tmp_path):
    """All tokens asked for: what is left is how common each is, and how long the rows are."""
    options = ["--model_name_or_path", str(run[0]), "--do_train", "false", "--eval_mlm_probability", "1"]
    scores = pretrain(corpus, tmp_path, *options)
    assert scores["eval_loss"] > 0.7 * scores["eval_unigram_loss"]
    assert scores["eval_accuracy"] < 0.5


def test_a_stream_has_no_neighbours_to_count(corpus, tmp_path):
    with pytest.raises(ValueError, match=r"--neighbour_vectors counts .* and --streaming reads no text before"):
        pretrain(corpus, tmp_path, "--streaming", "true", "--max_steps", "2", "--neighbour_vectors", "0.1")


@pytest.mark.parametrize("model_type", ["selfattn", "bert"])
def test_token_vectors_can_begin_with_the_neighbours_of_tokens(corpus, tmp_path, model_type):
    """One step without a learning rate, so that what is saved is what it began with."""
    overrides = f"{TINY},model_type={model_type},max_position_embeddings=48"
    options = ["--tokenizer_name", tiny_tokenizer_folder(), "--config_overrides", overrides, "--max_steps", "1"]
    pretrain(corpus, tmp_path, *options, "--learning_rate", "0", "--neighbour_vectors", "0.1")
    model = AutoModelForMaskedLM.from_pretrained(tmp_path)
    vectors = model.get_input_embeddings().weight
    lengths = vectors.norm(dim=1) / vectors.shape[1] ** 0.5
    counted = (lengths / 0.1 - 1).abs() < 1e-5
    assert 50 < counted.sum() < len(counted)  # the corpus has not every token of the tokenizer


class TestBadInput:
    @pytest.fixture(autouse=True)
    def setup(self, corpus, tmp_path):
        self.corpus, self.folder = corpus, tmp_path / "out"

    def refused(self, error, message, *options):
        with pytest.raises(error, match=message):
            pretrain(self.corpus, self.folder, *options)
        assert not list(self.folder.glob("checkpoint-*"))

    def test_an_empty_data_set(self, tmp_path):
        blank = write_texts(tmp_path / "blank.txt", ["", "  "])
        self.refused(ValueError, "The data set is empty", "--train_file", blank)

    def test_a_missing_column(self, tmp_path):
        rows = write_rows(tmp_path / "rows.jsonl", [{"sentence": "a", "label": 1}] * 9)
        message = "there is no column 'sentense'. Columns there: sentence, label. Did you mean 'sentence'"
        self.refused(ValueError, message, "--train_file", rows, "--text_column", "sentense")

    def test_texts_that_are_too_long(self, tmp_path):
        long = write_texts(tmp_path / "long.txt", ["short"] * 9 + [" ".join(sentences(9))])
        options = ["--train_file", long, "--tokenizer_name", tiny_tokenizer_folder()]
        self.refused(
            ValueError,
            "more than the 30 that a row holds, and --long_texts is refuse",
            *options,
            "--validation_file",
            self.corpus,
            "--max_seq_length",
            "32",
            "--long_texts",
            "refuse",
        )
        positions = ["--config_overrides", TINY + ",max_position_embeddings=16"]
        self.refused(
            ValueError,
            "--max_seq_length 32 is longer than the model's 16 positions",
            *options,
            *positions,
            "--max_seq_length",
            "32",
        )

    def test_a_tokenizer_that_does_not_fit(self):
        options = ["--tokenizer_name", tiny_tokenizer_folder()]
        self.refused(
            ValueError,
            "The tokenizer does not fit the model: it has ids up to",
            *options,
            "--config_overrides",
            TINY + ",vocab_size=100",
        )

    def test_token_ids_outside_the_vocabulary(self, monkeypatch):
        module = script("pretrain")
        real = module.as_rows
        monkeypatch.setattr(module, "as_rows", lambda *a, **k: real(*a, **k).map(lambda r: {"input_ids": [9999, 3]}))
        self.refused(ValueError, "Token ids are from 0 to .* found 9999")

    def test_an_unknown_key_of_a_recipe(self, tmp_path):
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text("learnig_rate: 1e-3\n")
        with pytest.raises(
            ValueError, match=r"'learnig_rate' is not an argument of this script. Did you mean 'learning_rate'"
        ):
            script("pretrain").main([str(recipe)])

    def test_a_folder_that_is_no_checkpoint(self, tmp_path):
        self.refused(
            FileNotFoundError, "is not a checkpoint: it has no config.json", "--model_name_or_path", str(tmp_path)
        )
        self.refused(FileNotFoundError, "is not a checkpoint", "--resume_from_checkpoint", str(tmp_path))
        self.refused(FileNotFoundError, "There is no checkpoint-", "--resume_from_checkpoint", "last")

    def test_a_checkpoint_that_is_cut_short(self, tmp_path):
        model = Path(shutil.copytree(tiny_model_folder(), tmp_path / "model"))
        weights = model / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-100])
        self.refused(
            ValueError, "model.safetensors' is cut short", "--model_name_or_path", str(model), "--config_overrides", ""
        )

    def test_a_checkpoint_to_resume_that_is_cut_short(self, tmp_path):
        pretrain(self.corpus, tmp_path / "run", "--tokenizer_name", tiny_tokenizer_folder(), "--num_shown", "0")
        checkpoint = tmp_path / "run" / "checkpoint-6"
        for name in ("optimizer.pt", "model.safetensors", "trainer_state.json"):
            content = (checkpoint / name).read_bytes()
            (checkpoint / name).write_bytes(content[: len(content) // 2])
            message = f"is cut short or damaged: {name} has"
            self.refused(ValueError, message, "--resume_from_checkpoint", str(checkpoint))
            (checkpoint / name).write_bytes(content)
        (checkpoint / "scheduler.pt").unlink()
        self.refused(ValueError, "scheduler.pt is not there", "--resume_from_checkpoint", str(checkpoint))

    def test_a_loss_that_is_no_number(self):
        with pytest.raises(FloatingPointError, match=r"The loss is nan at step \d+ .* There is no checkpoint yet"):
            pretrain(
                self.corpus, self.folder, "--learning_rate", "1e30", "--max_grad_norm", "0", "--save_steps", "500"
            )


RECIPES = sorted((ROOT / "train" / "recipes").glob("*.yaml"))


@pytest.mark.parametrize(
    "recipe", [path for path in RECIPES if "train/pretrain.py" in path.read_text()], ids=lambda path: path.stem
)
def test_the_dry_run_of_a_recipe_prints_what_stands_at_its_head(recipe, tmp_path, capsys):
    """Without data, tokenizer or network, and nothing is written."""
    head = re.search(r"# What (--dry_run .*) prints:\n((?:#   .*\n)+)", recipe.read_text())
    assert script("pretrain").main([str(recipe), *head[1].split(), "--output_dir", str(tmp_path / "none")]) is None
    said = head[2].replace("\n#     ", " ").replace("#   ", "")
    assert capsys.readouterr().out == said
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "warned"),
    [([], True), (["--learning_rate", "1e-3"], False), (["--model_name_or_path", tiny_model_folder()], False)],
    ids=["new", "new with a rate", "trained"],
)
def test_a_new_model_with_the_learning_rate_of_trained_ones_is_warned_of(options, warned, tmp_path, caplog):
    script("pretrain").main([*options, "--output_dir", str(tmp_path / "none"), "--max_steps", "5", "--dry_run"])
    assert ("--learning_rate is 5e-05, transformers' default, which suits trained models" in caplog.text) == warned


def test_a_plan_takes_the_vocabulary_from_a_tokenizer_that_is_here(tmp_path, capsys):
    options = ["--config_overrides", TINY, "--output_dir", str(tmp_path / "none"), "--max_steps", "5", "--dry_run"]
    known = len(AutoTokenizer.from_pretrained(tiny_tokenizer_folder()))
    for name, size in ((tiny_tokenizer_folder(), known), ("nobody/nothing", 1000)):
        script("pretrain").main([*options, "--tokenizer_name", name, "--tokenizer_vocab_size", "1000"])
        printed = capsys.readouterr().out
        assert f"embeddings {size * 32:,}" in printed
        assert ("nobody/nothing is not a folder here" in printed) == (size == 1000)
        assert ("--tokenizer_vocab_size 1,000 has no effect" in printed) == (size == known)
    script("pretrain").main([*options[2:], "--model_name_or_path", tiny_model_folder()])
    assert f"embeddings {known * 32:,}" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_muon_a_token_budget_and_a_falling_masking_rate(corpus, tmp_path):
    """The whole of it, interrupted and gone on with: bit for bit what an uninterrupted run gives."""
    options = [
        *("--train_file", corpus, "--tokenizer_name", tiny_tokenizer_folder(), "--num_shown", "0"),
        *(
            "--config_overrides",
            TINY + ",hidden_dropout=0.1",
            "--max_seq_length",
            "64",
            "--bf16",
            "false",
            "--use_cpu",
        ),
        *("--per_device_train_batch_size", "4", "--report_to", "none", "--logging_steps", "2", "--seed", "1"),
        *("--optimizer", "muon", "--weight_decay", "0.1", "--max_tokens", "4000", "--save_steps", "0.3"),
        *("--lr_scheduler_type", "warmup_stable_decay", "--warmup_steps", "0.1", "--decay_steps", "0.4"),
        *("--mlm_probability", "0.3", "--mlm_probability_end", "0.1", "--disable_tqdm", "true"),
    ]
    scores = script("pretrain").main([*options, "--output_dir", str(tmp_path / "whole")])
    first = min((tmp_path / "whole").glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    shutil.copytree(first, tmp_path / "stopped" / first.name)
    again = script("pretrain").main(
        [*options, "--output_dir", str(tmp_path / "stopped"), "--resume_from_checkpoint", "last"]
    )
    assert again["eval_loss"] == scores["eval_loss"]
    whole, resumed = (
        AutoModelForMaskedLM.from_pretrained(tmp_path / name).state_dict() for name in ("whole", "stopped")
    )
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    state = json.loads((tmp_path / "whole" / "trainer_state.json").read_text())
    assert state["stateful_callbacks"]["Progress"]["attributes"]["totals"]["tokens"] >= 4000
    used = [json.loads((tmp_path / name / "all_results.json").read_text())["train_tokens_used"]
            for name in ("whole", "stopped")]  # fmt: skip
    assert used[0] == used[1] >= 4000
    timed = ["--max_minutes", "1", "--lr_scheduler_type", "warmup_stable_decay", "--decay_steps", "0.4"]
    with pytest.raises(ValueError, match=r"--mlm_probability_end 0.1 .* minutes are known when they have passed"):
        script("pretrain").main(["--mlm_probability_end", "0.1", *timed, "--output_dir", str(tmp_path)])


def test_the_command(corpus, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    lines = {
        "train_file": [corpus],
        "tokenizer_name": tiny_tokenizer_folder(),
        "config_overrides": f'"{TINY}"',
        "max_steps": 4,
        "learning_rate": "1e-3",
        "bf16": "false",
        "use_cpu": "true",
        "output_dir": tmp_path / "out",
    }
    recipe.write_text("".join(f"{name}: {value}\n" for name, value in lines.items()))
    command = [sys.executable, "train/pretrain.py", str(recipe), "--max_steps", "2"]
    output = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, check=True).stdout
    assert "unigram" in output
    assert json.loads((tmp_path / "out" / "trainer_state.json").read_text())["global_step"] == 2


def test_two_processes(corpus, tmp_path):
    """The first learns the tokenizer and writes; the evaluation is that of one process."""
    folder = tmp_path / "out"
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--multi_gpu",  # on a machine without one: two processes, which talk through gloo
        "--num_processes",
        "2",
        "--num_machines",
        "1",
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
        "--main_process_port",
        "0",
        "train/pretrain.py",
        "--train_file",
        corpus,
        "--output_dir",
        str(folder),
        "--tokenizer_vocab_size",
        "400",
        *QUICK,
    ]
    result = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.count("masked-token accuracy") == 1
    assert json.loads((folder / "run.json").read_text())["machine"]["processes"] == 2
    scores = json.loads((folder / "all_results.json").read_text())
    alone = pretrain(
        corpus,
        tmp_path / "alone",
        "--model_name_or_path",
        str(folder),
        "--config_overrides",
        "",
        "--do_train",
        "false",
    )
    for name in ("eval_loss", "eval_accuracy", "eval_masked_tokens", "eval_unigram_loss"):
        assert scores[name] == pytest.approx(alone[name], rel=1e-4)
