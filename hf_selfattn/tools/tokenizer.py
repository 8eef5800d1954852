"""Train a tokenizer, check that one fits a model, and measure its tokens."""

import json
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AddedToken, AutoTokenizer, PreTrainedTokenizerFast

from .recipes import nearest

SPECIAL_TOKENS = {
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
}
SMALLEST_VOCABULARY = 261  # special tokens and the bytes, which make [UNK] unnecessary


def _special_tokens():
    # " [MASK]" stands for a token that begins with the blank, as it did when that token was masked in pretraining
    return [AddedToken(token, lstrip=token == "[MASK]", special=True) for token in SPECIAL_TOKENS.values()]


def _byte_level_bpe(vocab_size, min_frequency):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        special_tokens=_special_tokens(),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    return tokenizer, trainer


def _wordpiece(vocab_size, min_frequency):
    """WordPiece over bytes: BERT's would lose case, blanks and rare characters.

    A piece inside a word is written as one at its beginning. Were it `##piece`, transformers' token classification
    would call whatever differs in length from its text the rest of a word, and that is every " word", too.
    """
    tokenizer = Tokenizer(
        models.WordPiece(
            unk_token=SPECIAL_TOKENS["unk_token"], max_input_chars_per_word=10_000, continuing_subword_prefix=""
        )
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Punctuation("isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        special_tokens=_special_tokens(),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        continuing_subword_prefix="",
    )
    return tokenizer, trainer


ALGORITHMS = {"bpe": _byte_level_bpe, "wordpiece": _wordpiece}


def train_tokenizer(texts, vocab_size, algorithm="bpe", min_frequency=2, token_type_ids=False, progress=True):
    """A tokenizer of at most `vocab_size` tokens, learned from an iterable of strings.

    Both algorithms work on bytes: no text has an unknown token, and `decode` gives back every text as it was.

    Args:
        min_frequency: a pair of tokens is merged only if it occurs that often.
        token_type_ids: whether a pair of texts is also told apart by 0 and 1; for models with token types.

    Raises:
        ValueError: an unknown algorithm, a vocabulary too small for the bytes, no text at all.
    """
    if algorithm not in ALGORITHMS:
        raise ValueError(
            f"A tokenizer is one of {list(ALGORITHMS)}, got {algorithm!r}.{nearest(algorithm, ALGORITHMS)}"
        )
    if vocab_size < SMALLEST_VOCABULARY:
        raise ValueError(
            f"A {algorithm} vocabulary has at least {SMALLEST_VOCABULARY} tokens (special tokens and single bytes), "
            f"got {vocab_size}. Pass a larger --tokenizer_vocab_size or --vocab_size."
        )
    tokenizer, trainer = ALGORITHMS[algorithm](vocab_size, min_frequency)
    trainer.show_progress = progress
    seen = [0]

    def counted():
        for text in texts:
            if text and not text.isspace():
                seen[0] += 1
                yield text

    tokenizer.train_from_iterator(counted(), trainer)
    if not seen[0]:
        raise ValueError("The data set is empty: no text to learn a tokenizer from. Check the file and --text_column.")
    special = [(token, tokenizer.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.Sequence(
        [
            # The offsets of " word" are those of "word", at the beginning of a text or window too.
            processors.ByteLevel(trim_offsets=True, add_prefix_space=False),
            processors.TemplateProcessing(
                single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=special
            ),
        ]
    )
    names = dict(zip(SPECIAL_TOKENS, _special_tokens(), strict=True))
    inputs = ["input_ids", "token_type_ids", "attention_mask"] if token_type_ids else ["input_ids", "attention_mask"]
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_input_names=inputs, clean_up_tokenization_spaces=False, **names
    )


def save_tokenizer(tokenizer, folder):
    """`save_pretrained`, with a class name that every release of transformers knows.

    transformers 5 writes its fast tokenizers as `TokenizersBackend`, which earlier releases refuse.
    """
    tokenizer.save_pretrained(folder)
    path = Path(folder, "tokenizer_config.json")
    config = json.loads(path.read_text(encoding="utf-8"))
    if config.get("tokenizer_class") == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
        path.write_text(json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def open_tokenizer(name, **kwargs):
    """`AutoTokenizer.from_pretrained`; a folder without a tokenizer is refused with the way out."""
    if Path(name).is_dir() and not any(Path(name).glob("tokenizer*")) and not any(Path(name).glob("*vocab*")):
        raise FileNotFoundError(f"There is no tokenizer in {str(name)!r} (no tokenizer.json). Pass --tokenizer_name.")
    return AutoTokenizer.from_pretrained(name, **kwargs)


def check_tokenizer(tokenizer, config, model_name=None, masks=False):
    """Refuse a tokenizer whose ids do not mean to the model what they mean to the tokenizer.

    Args:
        model_name: the folder that the model comes from, if any: the tokenizer in it must agree.
        masks: whether a mask token is needed.
    """
    largest = max(tokenizer.get_vocab().values())
    if largest >= config.vocab_size:
        raise ValueError(
            f"The tokenizer does not fit the model: it has ids up to {largest}, the model's vocab_size is "
            f"{config.vocab_size}. Use the model's own tokenizer, or a new model with --config_overrides "
            f'"vocab_size={largest + 1}".'
        )
    if tokenizer.pad_token_id is None or (masks and tokenizer.mask_token_id is None):
        raise ValueError(
            f"The tokenizer does not fit the model: {'masking' if masks else 'a batch'} needs a pad token"
            f"{' and a mask token' if masks else ''}, its special tokens are {tokenizer.special_tokens_map}. "
            f"Use one made by train_tokenizer.py."
        )
    own = getattr(config, "pad_token_id", None)
    if own is not None and own != tokenizer.pad_token_id:
        raise ValueError(
            f"The tokenizer does not fit the model: it pads with id {tokenizer.pad_token_id}, the model with {own}. "
            f"Use the model's own tokenizer."
        )
    if model_name is not None and Path(model_name, "tokenizer.json").is_file():
        theirs, ours = open_tokenizer(model_name).get_vocab(), tokenizer.get_vocab()
        other = [token for token, number in ours.items() if theirs.get(token) != number]
        if other:
            raise ValueError(
                f"The tokenizer does not fit the model: {len(other):,} of {len(ours):,} tokens have another id "
                f"than in the tokenizer saved with it ({other[0]!r}: {ours[other[0]]}, there {theirs.get(other[0])}). "
                f"Leave --tokenizer_name out."
            )


def is_byte_level(tokenizer):
    """Whether each character of a token stands for one byte."""
    return any(part in str(tokenizer.backend_tokenizer.decoder) for part in ("ByteLevel",))


def bytes_of_tokens(tokenizer, vocab_size):
    """(vocab_size,) int64: how many bytes of text each id stands for; 0 for special tokens and unused ids."""
    sizes = np.zeros(vocab_size, dtype=np.int64)
    byte_level = is_byte_level(tokenizer)
    continuing = getattr(tokenizer.backend_tokenizer.model, "continuing_subword_prefix", None) or ""
    for token, number in tokenizer.get_vocab().items():
        piece = token.removeprefix(continuing)
        sizes[number] = len(piece) if byte_level else len(piece.removeprefix("▁").encode())
    sizes[tokenizer.all_special_ids] = 0
    return sizes
