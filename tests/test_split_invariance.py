"""The scripts under `accelerate launch` on two processes: the curve is that of one process with larger batches."""

import json
import subprocess
import sys

import pytest

from .train_scripts import ROOT, TINY, environment, sentences, tiny_model_folder, write_rows, write_texts

# `--cpu` would start one process, whatever is asked for; `--multi_gpu` starts two, and use_cpu keeps them on the CPU.
LAUNCH = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
LAUNCH += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]

pytestmark = pytest.mark.slow


def curve(folder, launcher, *arguments):
    """(loss, gradient norm, epoch) of each step of a script in processes of its own: the epoch counts all of them."""
    command = [sys.executable, *launcher, *arguments, "--output_dir", str(folder), "--logging_steps", "1",
               "--bf16", "false", "--use_cpu", "--report_to", "none", "--seed", "1", "--learning_rate", "1e-3",
               "--disable_tqdm", "true"]  # fmt: skip
    result = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [(entry["loss"], entry["grad_norm"], entry["epoch"]) for entry in history if "grad_norm" in entry]


def assert_the_same_in_two_processes(folder, *arguments):
    size, steps = "--per_device_train_batch_size", "--gradient_accumulation_steps"
    whole = curve(folder / "1x8x1", [], *arguments, size, "8", steps, "1")
    split = curve(folder / "2x2x2", LAUNCH, *arguments, size, "2", steps, "2")
    assert len(whole) == len(split) == 6
    for step, (one, other) in enumerate(zip(split, whole, strict=True)):
        assert one[:2] == pytest.approx(other[:2], rel=1e-5), f"step {step}"
        # Of one process it would be half as much; a last batch that is not full may count as a whole one.
        assert one[2] == pytest.approx(other[2], rel=0.2)


@pytest.mark.parametrize("packing", ["true", "false"])
def test_pretrain(packing, tmp_path):
    corpus = write_texts(tmp_path / "corpus.txt", sentences(600))
    assert_the_same_in_two_processes(
        tmp_path, "train/pretrain.py", "--train_file", corpus, "--tokenizer_name", tiny_model_folder(),
        "--config_overrides", TINY, "--max_steps", "6", "--packing", packing, "--max_seq_length", "64",
    )  # fmt: skip


@pytest.mark.parametrize("packing", ["true", "false"])
def test_finetune(packing, tmp_path):
    rows = [{"text": text, "label": ["odd", "even"][i % 2]} for i, text in enumerate(sentences(400))]
    assert_the_same_in_two_processes(
        tmp_path, "train/finetune.py", "--task", "text-classification", "--train_file",
        write_rows(tmp_path / "train.jsonl", rows[:360]), "--validation_file",
        write_rows(tmp_path / "dev.jsonl", rows[360:]), "--model_name_or_path", tiny_model_folder(),
        "--max_steps", "6", "--packing", packing, "--max_seq_length", "64", "--eval_strategy", "no",
        "--save_strategy", "no", "--load_best_model_at_end", "false",
    )  # fmt: skip
