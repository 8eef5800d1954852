"""Writes texts to pretrain on: without the articles that hold text of what models are evaluated on.

    python benchmarks/clean_texts.py --data path/to/data

An article is left out for one sentence or passage that overlap.py finds in it. ten_minutes.py does this itself, for
the language that it trains on.
"""

import argparse
import json
import os
from itertools import chain
from pathlib import Path

from datasets import load_dataset
from overlap import (
    BEGINNING,
    PASSAGE,
    PASSAGES,
    PRETRAINING,
    SENTENCES,
    by_beginning,
    evaluated_on,
    file_of,
    found_in,
    words_of,
)
from trainings import shortened_hash

TEXTS = Path("runs/clean-texts")


def made_from(data: Path, language: str) -> dict:
    """All that decides what is left out: the files, by the beginnings of their SHA-256, and how words are compared.

    Raises:
        FileNotFoundError: one of them is not there.
    """
    compared = [(name, split) for name, split, *_ in (*SENTENCES[language], *PASSAGES[language])]
    trained_on = [(name, "train") for name in PRETRAINING[language]]
    files = [file_of(data, *each) for each in dict.fromkeys(trained_on + compared)]
    hashes = {f"{file.parent.name}/{file.name}": shortened_hash(file.read_bytes()) for file in files}
    looked_for = json.dumps([SENTENCES[language], PASSAGES[language]])
    return {"files": hashes, "looked_for": looked_for, "words": [BEGINNING, PASSAGE]}


def record_of(language: str, output: Path) -> Path:
    return output / f"{language}.json"


def is_clean(data: Path, language: str, output: Path = TEXTS) -> bool:
    """Whether all texts of the language have been written from these data."""
    record = record_of(language, output)
    now = made_from(data, language)
    return record.exists() and json.loads(record.read_text(encoding="utf-8"))["made_from"] == now


def clean(data: Path, language: str, output: Path = TEXTS) -> None:
    """Writes `output`/NAME/train.parquet for each text of the language, and says how much was left out of it.

    Raises:
        ValueError: `output` is `data`, whose files would be lost.
        FileNotFoundError: something that is compared is not there.
    """
    if output.resolve() == data.resolve():
        raise ValueError(f"--output is the folder of the data, {output}: its texts would be lost. Pass another one.")
    source, left_out, record = made_from(data, language), {}, record_of(language, output)
    record.unlink(missing_ok=True)  # it says that all is written, and is so last
    wanted = by_beginning(set(chain.from_iterable(passages for _, passages in evaluated_on(data, language))))
    for name in PRETRAINING[language]:
        table = load_dataset("parquet", data_files=str(file_of(data, name, "train")), split="train")
        words = [len(words_of(text)) for text in table["text"]]
        kept = [place for place, text in enumerate(table["text"]) if next(found_in(wanted, [text]), None) is None]
        file = output / name / "train.parquet"
        file.parent.mkdir(parents=True, exist_ok=True)
        unfinished = file.with_suffix(f".{os.getpid()}.part")
        table.select(kept).to_parquet(unfinished)
        unfinished.replace(file)
        share = 1 - sum(words[place] for place in kept) / max(sum(words), 1)
        left_out[name] = f"{len(table) - len(kept):,} of {len(table):,} articles left out, {share:.1%} of the words"
        print(f"{name}: {left_out[name]}", flush=True)
    written = {"made_from": source, "left_out": left_out}
    record.write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the data sets")
    parser.add_argument("--languages", nargs="+", choices=PRETRAINING, default=list(PRETRAINING))
    parser.add_argument("--output", type=Path, default=TEXTS)
    arguments = parser.parse_args()
    for language in arguments.languages:
        clean(arguments.data, language, arguments.output)


if __name__ == "__main__":
    main()
