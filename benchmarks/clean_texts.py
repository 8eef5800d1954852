"""Writes texts to pretrain on: without the articles that hold text of what models are evaluated on.

    python benchmarks/clean_texts.py --data ../shared/data

An article is left out for one sentence or passage that overlap.py finds in it. ten_minutes.py does this itself, for
the language that it trains on.
"""

import argparse
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

from datasets import load_dataset
from overlap import PRETRAINING, by_beginning, evaluated_on, found_in, words_of

TEXTS = Path("runs/clean-texts")


def is_clean(language: str, output: Path = TEXTS) -> bool:
    """Whether all texts of the language have been written."""
    return all((output / name / "train.parquet").exists() for name in PRETRAINING[language])


def clean(data: Path, language: str, output: Path = TEXTS) -> Iterator[dict]:
    """Writes `output`/NAME/train.parquet for each text of the language; yields how much was left out of it."""
    wanted = by_beginning(set(chain.from_iterable(passages for _, passages in evaluated_on(data, language))))
    for name in PRETRAINING[language]:
        table = load_dataset("parquet", data_files=str(data / name / "train.parquet"), split="train")
        words = [len(words_of(text)) for text in table["text"]]
        kept = [place for place, text in enumerate(table["text"]) if next(found_in(wanted, [text]), None) is None]
        file = output / name / "train.parquet"
        file.parent.mkdir(parents=True, exist_ok=True)
        unfinished = file.with_suffix(".part")
        table.select(kept).to_parquet(unfinished)
        unfinished.rename(file)
        share = 1 - sum(words[place] for place in kept) / max(sum(words), 1)
        yield {"name": name, "articles": len(table), "left_out": len(table) - len(kept), "share_of_words": share}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the data sets")
    parser.add_argument("--languages", nargs="+", choices=PRETRAINING, default=list(PRETRAINING))
    parser.add_argument("--output", type=Path, default=TEXTS)
    arguments = parser.parse_args()
    for language in arguments.languages:
        for of in clean(arguments.data, language, arguments.output):
            told = (
                f"{of['left_out']:,} of {of['articles']:,} articles left out, {of['share_of_words']:.1%} of the words"
            )
            print(f"{of['name']}: {told}", flush=True)


if __name__ == "__main__":
    main()
