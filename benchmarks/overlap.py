"""How much of what the models are evaluated on stands in the text that they are pretrained on.

    python benchmarks/overlap.py --data ../shared/data

Words are compared without case and punctuation. Sentences of BLiMP and CoLA are looked for whole; the validation text
in passages of 13 words, as Brown et al. 2020 (arXiv:2005.14165, appendix C) did.
"""

import argparse
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

from datasets import load_dataset

BEGINNING = 4  # words by which a passage is looked up; shorter ones are not looked for
PASSAGE = 13  # words
WORD = re.compile(r"\w+")


def words_of(text: str) -> tuple[str, ...]:
    return tuple(WORD.findall(text.lower()))


def passages_of(texts: Iterable[str], size: int = PASSAGE) -> set[tuple[str, ...]]:
    """Every sequence of `size` words."""
    found = set()
    for text in texts:
        words = words_of(text)
        found.update(words[first : first + size] for first in range(len(words) - size + 1))
    return found


def sentences_of(texts: Iterable[str]) -> set[tuple[str, ...]]:
    """The words of each text that is long enough to be looked for."""
    return {words for words in map(words_of, texts) if len(words) >= BEGINNING}


def found_in(passages: set[tuple[str, ...]], texts: Iterable[str]) -> Iterator[tuple[str, ...]]:
    """Those of the passages whose words stand in a text one after another, as often as they do."""
    by_beginning = defaultdict(list)
    for passage in passages:
        by_beginning[passage[:BEGINNING]].append(passage)
    for text in texts:
        words = words_of(text)
        for first, beginning in enumerate(zip(*(words[shift:] for shift in range(BEGINNING)), strict=False)):
            for passage in by_beginning.get(beginning, ()):
                if words[first : first + len(passage)] == passage:
                    yield passage


def column(data: Path, name: str, split: str, *columns: str) -> list[str]:
    files = {split: str(data / name / f"{split}.parquet")}
    table = load_dataset("parquet", data_files=files, split=split, columns=list(columns))
    return [text for each in columns for text in table[each]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the data sets")
    data = parser.parse_args().data
    training = [text for name in ("en_wikipedia", "en_wikinews") for text in column(data, name, "train", "text")]
    evaluated = {
        "BLiMP, good sentences": sentences_of(column(data, "blimp", "test", "sentence_good")),
        "BLiMP, bad sentences": sentences_of(column(data, "blimp", "test", "sentence_bad")),
        "CoLA, training": sentences_of(column(data, "cola", "train", "sentence")),
        "CoLA, validation": sentences_of(column(data, "cola", "validation", "sentence")),
        f"en_wikipedia, validation ({PASSAGE} words)": passages_of(column(data, "en_wikipedia", "validation", "text")),
    }
    for name, passages in evaluated.items():
        found = set(found_in(passages, training))
        print(f"{name}: {len(found):,} of {len(passages):,} ({len(found) / len(passages):.2%})")
        for passage in sorted(found, key=lambda words: (len(words), words))[-3:]:
            print(f"    {' '.join(passage)}")


if __name__ == "__main__":
    main()
