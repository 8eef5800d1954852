"""Do tokenizer and model mean the same? Checks of the doctor, each (Examination) -> Findings."""

import re
from pathlib import Path

from .convert_families import position_offset
from .doctor_examination import error, first_line, note, warning

OWN_TOKENIZER = "Use the tokenizer that the model was trained with."
HUGE = 10**9
"""Lengths above it are transformers' way of saying that a tokenizer knows no longest text."""


def check_vocabulary(examination):
    """Every id has a vector."""
    vocabulary = examination.tokenizer.get_vocab()
    token, largest = max(vocabulary.items(), key=lambda item: item[1])
    rows, source = examination.config.vocab_size, "config.vocab_size"
    if examination.model is not None:
        rows, source = examination.model.get_input_embeddings().weight.shape[0], "rows of the embedding"
    if largest >= rows:
        outside = sum(number >= rows for number in vocabulary.values())
        yield error(
            f"{outside} tokens have ids from {rows} up (the {source}), the largest is {token!r} with {largest}: "
            "an index error, or garbage on a GPU.",
            f"{OWN_TOKENIZER} For tokens that were added call model.resize_token_embeddings({largest + 1}), train "
            "them, and save both.",
        )
    elif rows > largest + 1 + max(1024, 0.1 * largest):
        yield note(
            f"The model has {rows} token vectors and the tokenizer uses {largest + 1} of them.",
            f"{OWN_TOKENIZER} If it is that one, a smaller vocab_size saves memory.",
        )


def _ids_that_differ(examination):
    for name in ("pad", "mask", "bos", "eos", "cls", "sep"):
        wanted = getattr(examination.config, f"{name}_token_id", None)
        wanted = wanted[0] if isinstance(wanted, list) else wanted
        found = getattr(examination.tokenizer, f"{name}_token_id", None)
        if wanted is not None and found is not None and wanted != found:
            yield name, wanted, found


def check_special_tokens(examination):
    """Those that are needed are there, are one id, mean nothing else, and have the ids that the config says."""
    tokenizer, ids = examination.tokenizer, {}
    needed = ["pad"] + (["mask"] if examination.head == "masked_lm" else [])
    with_frame = [] if examination.is_causal else ["cls", "sep"]
    for name in (*needed, *with_frame):
        ids[name] = getattr(tokenizer, f"{name}_token_id", None)
        if ids[name] is None:
            yield (error if name in needed else warning)(
                f"The tokenizer has no {name} token.",
                f"{OWN_TOKENIZER} Otherwise tokenizer.add_special_tokens({{'{name}_token': …}}) with a token of "
                "its own, and resize_token_embeddings.",
            )
        elif ids[name] == tokenizer.unk_token_id:
            yield error(
                f"The {name} token {getattr(tokenizer, f'{name}_token')!r} is not in the vocabulary, so it is "
                f"read as the unknown token, id {ids[name]}.",
                f"{OWN_TOKENIZER} Otherwise name a token that is in its vocabulary.",
            )
    pad = ids["pad"]
    same = [name for name in ("mask", "cls", "bos", "eos", "sep") if pad is not None
            and getattr(tokenizer, f"{name}_token_id", None) == pad]  # fmt: skip
    if "mask" in same or "cls" in same or (same and with_frame):
        yield error(
            f"The pad token is the {same[0]} token too (id {pad}): collators take what is padding out of the "
            "labels and the attention.",
            "Give the tokenizer a pad token of its own.",
        )
    elif same:
        yield warning(
            f"The pad token is the {same[0]} token too (id {pad}): collators that mask labels by the pad id never "
            "teach it.",
            "Give the tokenizer a pad token of its own, or mask labels by the attention mask.",
        )
    texts = examination.sample_texts()
    used = {number for row in tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] for number in row}
    if pad is not None and not same and pad in used:
        yield error(
            f"The pad token {tokenizer.pad_token!r} (id {pad}) occurs in ordinary texts.",
            "Give the tokenizer a pad token of its own, which no text contains.",
        )
    for name, wanted, found in _ids_that_differ(examination):
        yield (error if name in ("pad", "mask") else warning)(
            f"The {name} token has id {found} in the tokenizer, and {wanted} in config.json.",
            f"{OWN_TOKENIZER} If it is that one, set config.{name}_token_id = {found} and save the model again.",
        )


def check_frame(examination):
    """An encoder's tokenizer puts its special tokens round a text."""
    tokenizer = examination.tokenizer
    special = {tokenizer.cls_token_id, tokenizer.sep_token_id} - {None}
    if examination.is_causal or not special:
        return
    found = set(tokenizer("a")["input_ids"])
    if not special & found:
        yield error(
            "The tokenizer has special tokens and puts none round a text: the model gets texts in a form that it "
            "was not trained on.",
            "Save it again with its post-processor (processors.TemplateProcessing), or with add_special_tokens on.",
        )


def check_texts_survive(examination):
    """Few tokens are unknown, and case is kept or dropped as the vocabulary wants it."""
    tokenizer, texts = examination.tokenizer, examination.sample_texts()
    rows = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    count = sum(map(len, rows))
    unknown = sum(number == tokenizer.unk_token_id for row in rows for number in row) / max(count, 1)
    what = "the data" if examination.data else "a few sentences"
    if tokenizer.unk_token_id is not None and unknown > 0.05:
        yield (error if unknown > 0.3 else warning)(
            f"{unknown:.0%} of the tokens of {what} are unknown.",
            "Use a tokenizer that was trained on such texts; train_tokenizer.py makes one that knows every byte.",
        )
    mixed = "The Quick BROWN Fox"
    lowers = tokenizer(mixed)["input_ids"] == tokenizer(mixed.lower())["input_ids"]
    plain = [token for token in tokenizer.get_vocab() if re.search("[A-Za-z]{2}", token)
             and token not in tokenizer.all_special_tokens and not re.fullmatch(r"[\[<].*[\]>]", token)]  # fmt: skip
    upper = sum(bool(re.search("[A-Z]", token)) for token in plain) / max(len(plain), 1)
    if lowers and upper > 0.01:
        yield error(
            f"The tokenizer lower-cases texts, and {upper:.0%} of the words in its vocabulary have capital "
            "letters, which it can never give.",
            "Set do_lower_case to false in tokenizer_config.json, and take the lower-casing normalizer out of "
            "tokenizer.json.",
        )
    elif not lowers and len(plain) > 100 and upper == 0:
        yield warning(
            "No word of the vocabulary has a capital letter, and the tokenizer keeps capitals: words with one "
            "fall apart.",
            "Set do_lower_case to true, as the vocabulary was made.",
        )


def check_length(examination):
    """`truncation=True` cuts texts to what the model has positions for."""
    positions, longest = examination.positions, examination.tokenizer.model_max_length
    if positions is None or longest <= positions:
        return
    told = "any length" if longest > HUGE else f"{longest} tokens"
    offset = position_offset(examination.config)
    counted = f" ({offset} rows of the table are never used)" if offset else ""
    yield (warning if longest > HUGE else error)(
        f"The tokenizer allows {told} (model_max_length), and the model has {positions} positions{counted}: "
        "truncation=True does not cut what is too long.",
        f"Set tokenizer.model_max_length = {positions} and save it again.",
    )


def check_inputs(examination):
    """The model reads what the tokenizer makes of a pair of texts."""
    model, batch = examination.model, examination.tokenizer("one", "two", return_tensors="pt")
    types = getattr(examination.config, "type_vocab_size", None)
    largest = int(batch["token_type_ids"].max()) if "token_type_ids" in batch else 0
    room = examination.positions or batch["input_ids"].shape[1]
    refused = [name for name in batch if not examination.takes(name)]
    without = "in tokenizer_config.json, or open the tokenizer that the model was trained with."
    if refused:
        yield error(
            f"The tokenizer gives {', '.join(refused)}, which {type(model).__name__} does not take.",
            f"Take it out of model_input_names {without}",
        )
    elif types is not None and largest >= max(types, 1):
        yield error(
            f"The tokenizer numbers the texts of a pair 0 to {largest}, and the model has {types} token types: an "
            "index error.",
            f"Take token_type_ids out of model_input_names {without}",
        )
    elif (
        examination.head != "multiple_choice"
        and int(batch["input_ids"].max()) < model.get_input_embeddings().weight.shape[0]
        and batch["input_ids"].shape[1] <= room
    ):
        try:
            model(**batch)
        except Exception as failure:
            yield error(
                f"model(**tokenizer(text, text)) fails: {first_line(failure)}. The inputs are {', '.join(batch)}.",
                f"Correct model_input_names {without}",
            )


def check_portable(examination):
    """Older releases of transformers can open the tokenizer."""
    path = Path(examination.folder, "tokenizer_config.json")
    if path.is_file() and '"TokenizersBackend"' in path.read_text(encoding="utf-8"):
        yield note(
            "tokenizer_config.json names the class TokenizersBackend, which transformers 4 does not know.",
            "Write PreTrainedTokenizerFast in its place (hf_selfattn.tools.tokenizer.save_tokenizer does).",
        )
