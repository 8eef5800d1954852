"""How much of what the models are evaluated on stands in the text that they are pretrained on.

    python benchmarks/overlap.py --data path/to/data --output runs/overlap.json
    python benchmarks/overlap.py --data path/to/data                # writes benchmarks/results/overlap.json
    python benchmarks/overlap.py --data path/to/data --pretraining runs/clean-texts --output runs/overlap.json

The third command checks what clean_texts.py left. Words are compared without case and punctuation; a Chinese character
is a word. Sentences are looked for whole; long texts in passages of 13 words, as Brown et al. 2020 (arXiv:2005.14165,
appendix C) did.
"""

import argparse
import json
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

from datasets import load_dataset

Words = tuple[str, ...]  # of a sentence or a passage

BEGINNING = 4  # words by which a passage is looked up; shorter ones are not looked for
PASSAGE = 13  # words
SHOWN = 20  # words of an example
WORD = re.compile(r"[\u3400-\u9fff]|[^\W\u3400-\u9fff]+")
RESULTS = Path("benchmarks/results/overlap.json")

PRETRAINING = {"en": ("en_wikipedia", "en_wikinews"), "zh": ("zh_wikipedia",)}
SENTENCES = {  # data set, split, columns
    "en": (
        ("blimp", "test", "sentence_good"),
        ("blimp", "test", "sentence_bad"),
        ("cola", "train", "sentence"),
        ("cola", "validation", "sentence"),
        ("sst2", "validation", "sentence"),
        ("mrpc", "validation", "sentence1", "sentence2"),
        ("rte", "validation", "premise", "hypothesis"),
        ("stsb", "validation", "sentence1", "sentence2"),
        ("ud_english_ewt", "validation", "text"),
        ("squad", "validation", "question"),
    ),
    "zh": (("zh_weibo_ner", "validation", "tokens"), ("zh_waimai", "validation", "text")),
}
PASSAGES = {
    "en": (
        ("en_wikipedia", "validation", "text"),
        ("en_wikipedia", "test", "text"),
        ("squad", "validation", "context"),
        ("rte", "validation", "premise"),
    ),
    "zh": (("zh_wikipedia", "validation", "text"), ("zh_csl_category", "validation", "text")),
}


def words_of(text: str) -> Words:
    return tuple(WORD.findall(text.lower()))


def passages_of(texts: Iterable[str], size: int = PASSAGE) -> set[Words]:
    """Every sequence of `size` words."""
    found = set()
    for text in texts:
        words = words_of(text)
        found.update(words[first : first + size] for first in range(len(words) - size + 1))
    return found


def sentences_of(texts: Iterable[str]) -> set[Words]:
    """The words of each text that is long enough to be looked for."""
    return {words for words in map(words_of, texts) if len(words) >= BEGINNING}


def by_beginning(passages: Iterable[Words]) -> dict[Words, list[Words]]:
    """The passages by their first words, as `found_in` looks for them."""
    found = defaultdict(list)
    for passage in passages:
        found[passage[:BEGINNING]].append(passage)
    return found


def found_in(passages: dict[Words, list[Words]], texts: Iterable[str]) -> Iterator[Words]:
    """Those of the passages (`by_beginning`) whose words stand in a text one after another, as often as they do."""
    for text in texts:
        words = words_of(text)
        for first, beginning in enumerate(zip(*(words[shift:] for shift in range(BEGINNING)), strict=False)):
            for passage in passages.get(beginning, ()):
                if words[first : first + len(passage)] == passage:
                    yield passage


def file_of(data: Path, name: str, split: str) -> Path:
    """Where a split of a data set is. Raises FileNotFoundError."""
    file = data / name / f"{split}.parquet"
    if not file.exists():
        raise FileNotFoundError(
            f"{file} is not there: all that models are evaluated on is looked for in the text that they are "
            "pretrained on. Put it there; docs/data.md says what it holds."
        )
    return file


def read(data: Path, name: str, split: str, *columns: str) -> list[str]:
    """The texts of some columns of a data set; lists of words are joined."""
    files = {split: str(file_of(data, name, split))}
    table = load_dataset("parquet", data_files=files, split=split, columns=list(columns))
    texts = [text for each in columns for text in table[each]]
    return [text if isinstance(text, str) else " ".join(text) for text in texts]


def evaluated_on(data: Path, language: str) -> Iterator[tuple[dict, set[Words]]]:
    """(what it is, its sentences or passages) for all that models of the language are evaluated on."""
    for kinds, split_up, kind in ((SENTENCES, sentences_of, "sentences"), (PASSAGES, passages_of, "passages")):
        for name, split, *columns in kinds[language]:
            about = {"language": language, "data": name, "split": split, "columns": columns, "kind": kind}
            yield about, split_up(read(data, name, split, *columns))


def compare(data: Path, language: str, pretraining: Path) -> Iterator[dict]:
    training = [text for name in PRETRAINING[language] for text in read(pretraining, name, "train", "text")]
    for about, looked_for in evaluated_on(data, language):
        found = set(found_in(by_beginning(looked_for), training))
        longest_first = sorted(found, key=lambda words: (-len(words), words))
        examples = [" ".join(words[:SHOWN]) for words in longest_first[:3]]
        yield {**about, "looked_for": len(looked_for), "found": len(found), "examples": examples}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the data sets")
    parser.add_argument("--pretraining", type=Path, help="folder of the texts to train on; without it, --data")
    parser.add_argument("--languages", nargs="+", choices=PRETRAINING, default=list(PRETRAINING))
    parser.add_argument("--output", type=Path, help=f"without it, {RESULTS}")
    arguments = parser.parse_args()
    if arguments.pretraining and not arguments.output:
        parser.error(f"{RESULTS} is of whole texts: with --pretraining pass --output.")
    output = arguments.output or RESULTS
    results = []
    for language in arguments.languages:
        for result in compare(arguments.data, language, arguments.pretraining or arguments.data):
            results.append(result)
            share = result["found"] / max(result["looked_for"], 1)
            where = f"{result['data']}, {result['split']}, {', '.join(result['columns'])}"
            told = f"{result['found']:,} of {result['looked_for']:,} {result['kind']} ({share:.2%})"
            print(f"{where}: {told}", flush=True)
            for text in result["examples"]:
                print(f"    {text}")
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
