r"""Train a tokenizer on any text.

    python train/train_tokenizer.py --dataset_name docstrings --output_dir runs/tokenizer
    python train/train_tokenizer.py --train_file corpus.txt --algorithm wordpiece --output_dir runs/tokenizer
    python train/train_tokenizer.py recipe.yaml --vocab_size 16384

A recipe is a flat YAML file of the same options; the command line wins. `AutoTokenizer.from_pretrained` opens the
result. It works on bytes: no text, in whatever language, has an unknown token, and decoding gives back the text.
"""

import json
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from accelerate import PartialState

from hf_selfattn.tools.recipes import parse_arguments
from hf_selfattn.tools.run_record import versions
from hf_selfattn.tools.sources import SourceArguments, find_text_column, load_source, take
from hf_selfattn.tools.tokenizer import save_tokenizer, train_tokenizer


@dataclass
class TokenizerArguments(SourceArguments):
    """The tokenizer and where it goes."""

    text_column: str | None = field(default=None, metadata={"help": "The column with the text; found where clear."})
    output_dir: str | None = field(default=None, metadata={"help": "Where the tokenizer is saved."})
    algorithm: str = field(default="bpe", metadata={"help": "bpe or wordpiece, both on bytes."})
    vocab_size: int = field(default=8192, metadata={"help": "Tokens in the vocabulary, special ones included."})
    min_frequency: int = field(default=2, metadata={"help": "Merge a pair of tokens only if it occurs that often."})
    token_type_ids: bool = field(default=False, metadata={"help": "Tell two texts apart by 0 and 1 (token types)."})
    model_max_length: int | None = field(default=None, metadata={"help": "Tokens of the longest text, if limited."})
    seed: int = field(default=0, metadata={"help": "Draws --max_train_samples."})


def main(argv=None):
    (arguments,) = parse_arguments(TokenizerArguments, argv, __doc__)
    if arguments.output_dir is None:
        raise ValueError("--output_dir is needed: the folder in which the tokenizer is saved.")
    if not PartialState().is_main_process:
        return None
    rows = load_source(arguments, arguments.seed, evaluate=False)["train"]
    column = find_text_column(rows, arguments.text_column)
    rows = take(rows, arguments.max_train_samples, arguments.seed)
    tokenizer = train_tokenizer(
        iter(rows[column]),
        arguments.vocab_size,
        arguments.algorithm,
        arguments.min_frequency,
        arguments.token_type_ids,
    )
    if arguments.model_max_length is not None:
        tokenizer.model_max_length = arguments.model_max_length
    save_tokenizer(tokenizer, arguments.output_dir)

    sample = list(islice((text for text in rows[column] if text and not text.isspace()), 1000))
    tokens = sum(len(ids) for ids in tokenizer(sample, add_special_tokens=False, verbose=False)["input_ids"])
    characters, size = sum(map(len, sample)), sum(len(text.encode()) for text in sample)
    results = {
        "vocab_size": len(tokenizer),
        "rows": len(rows),
        "characters_per_token": characters / tokens,
        "bytes_per_token": size / tokens,
    }
    record = {"arguments": vars(arguments), "versions": versions(), "results": results}
    Path(arguments.output_dir, "run.json").write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n")
    print(
        f"{arguments.output_dir}: {len(tokenizer):,} of the {arguments.vocab_size:,} tokens asked for, learned from "
        f"{len(rows):,} rows, {results['characters_per_token']:.2f} characters a token."
    )
    return results


if __name__ == "__main__":
    main()
