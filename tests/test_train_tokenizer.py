import json
import subprocess
import sys

import pytest
from transformers import AutoTokenizer

from .train_scripts import ROOT, environment, script, sentences, write_rows, write_texts


@pytest.fixture
def corpus(tmp_path):
    return write_texts(tmp_path / "corpus.txt", sentences(200))


@pytest.mark.parametrize("algorithm", ["bpe", "wordpiece"])
def test_a_tokenizer_from_a_text_file(tmp_path, corpus, algorithm, capsys):
    folder = tmp_path / "out"
    options = ["--train_file", corpus, "--algorithm", algorithm, "--vocab_size", "650", "--model_max_length", "128"]
    results = script("train_tokenizer").main([*options, "--output_dir", str(folder)])
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert len(tokenizer) == results["vocab_size"] <= 650
    assert tokenizer.model_max_length == 128
    for text in ("the cat likes green apples, 7.", "一个学生喜欢苹果。"):
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text
    record = json.loads((folder / "run.json").read_text())
    assert record["arguments"]["vocab_size"] == 650
    assert "tokenizers" in record["versions"]
    assert "characters a token" in capsys.readouterr().out


def test_blank_rows_are_no_part_of_its_numbers(tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", [{"text": ""}] * 1100 + [{"text": text} for text in sentences(50)])
    options = ["--train_file", rows, "--vocab_size", "300", "--output_dir", str(tmp_path / "out")]
    assert script("train_tokenizer").main(options)["characters_per_token"] > 1


def test_bad_input_is_refused(tmp_path, corpus):
    main = script("train_tokenizer").main
    rows = write_rows(tmp_path / "rows.jsonl", [{"sentence": "a", "label": 1}])
    folder = ["--output_dir", str(tmp_path / "out")]
    with pytest.raises(ValueError, match="--output_dir is needed"):
        main(["--train_file", corpus])
    with pytest.raises(ValueError, match=r"no column 'text'. Columns there: sentence, label"):
        main(["--train_file", rows, "--text_column", "text", *folder])
    with pytest.raises(ValueError, match="has at least 261 tokens"):
        main(["--train_file", corpus, "--vocab_size", "100", *folder])


def test_the_command(tmp_path, corpus):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"train_file: [{corpus}]\nvocab_size: 400\noutput_dir: {tmp_path / 'out'}\n")
    command = [sys.executable, str(ROOT / "train" / "train_tokenizer.py"), str(recipe), "--vocab_size", "500"]
    output = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, check=True).stdout
    assert "of the 500 tokens asked for, learned from 200 rows" in output
    assert 400 < len(AutoTokenizer.from_pretrained(tmp_path / "out")) <= 500
