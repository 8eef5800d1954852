import json
import random

import pytest
from transformers import AutoConfig, AutoTokenizer

from hf_selfattn.tools.tokenizer import (
    bytes_of_tokens,
    check_tokenizer,
    open_tokenizer,
    save_tokenizer,
    train_tokenizer,
)

from .train_scripts import sentences, tiny_model_folder, tiny_tokenizer

TEXTS = [
    "Hello, world!  Don't  ##x ### stop-words\n\tTabs ",
    "我爱编程，注意力就是一切。 中文 and English mixed",
    " leading blank, émigré 𝔘𝔫𝔦 🤗🤗 \u0378 ﷽ \u200b end",
    "def f(x): return {'a': [1, 2.5e-3]}  # 注释",
]


@pytest.fixture(scope="module", params=["bpe", "wordpiece"])
def tokenizer(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    save_tokenizer(train_tokenizer(sentences(300), 700, request.param, progress=False), folder)
    assert json.loads((folder / "tokenizer_config.json").read_text())["tokenizer_class"] == "PreTrainedTokenizerFast"
    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("text", TEXTS)
def test_text_survives_a_round_trip(tokenizer, text):
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert tokenizer.unk_token_id not in ids


def test_any_text_survives_a_round_trip(tokenizer):
    draw = random.Random(0)
    for _ in range(200):
        codes = [
            draw.choice([draw.randrange(0x20, 0xD800), draw.randrange(0xE000, 0x110000), draw.randrange(32, 127)])
            for _ in range(12)
        ]
        text = "".join(map(chr, codes))
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids) == text
        assert tokenizer.unk_token_id not in ids


def test_special_tokens_and_the_pair_template(tokenizer):
    assert tokenizer.convert_tokens_to_ids(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]) == [0, 1, 2, 3, 4]
    encoded = tokenizer("music", "books", return_token_type_ids=True)
    tokens = tokenizer.convert_ids_to_tokens(encoded["input_ids"])
    assert tokens[0] == "[CLS]"
    assert [i for i, token in enumerate(tokens) if token == "[SEP]"][-1] == len(tokens) - 1
    assert tokens.count("[SEP]") == 2
    middle = tokens.index("[SEP]") + 1
    assert encoded["token_type_ids"] == [0] * middle + [1] * (len(tokens) - middle)
    assert tokenizer.model_input_names == ["input_ids", "attention_mask"]


def test_a_mask_stands_for_the_blank_before_it_too(tokenizer):
    ids = tokenizer("the [MASK] likes", add_special_tokens=False)["input_ids"]
    the, likes = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("the", " likes"))
    assert ids == [*the, tokenizer.mask_token_id, *likes]


@pytest.mark.parametrize("text", TEXTS)
def test_the_bytes_of_tokens_are_those_of_the_text(tokenizer, text):
    sizes = bytes_of_tokens(tokenizer, len(tokenizer) + 3)
    assert sizes[tokenizer(text)["input_ids"]].sum() == len(text.encode())


@pytest.mark.parametrize("algorithm", ["bpe", "wordpiece"])
def test_a_token_that_begins_with_number_signs_has_their_bytes(algorithm):
    text = "## one\n### two\n"
    tokenizer = train_tokenizer([text] * 9, 300, algorithm, progress=False)
    ids = tokenizer(text)["input_ids"]
    assert bytes_of_tokens(tokenizer, len(tokenizer))[ids].sum() == len(text.encode())


def test_token_type_ids_on_request():
    tokenizer = train_tokenizer(sentences(50), 300, token_type_ids=True, progress=False)
    assert "token_type_ids" in tokenizer("a", "b")


def test_bad_requests_are_refused():
    with pytest.raises(ValueError, match=r"one of \['bpe', 'wordpiece'\], got 'wordpeice'. Did you mean 'wordpiece'"):
        train_tokenizer(["a"], 500, "wordpeice")
    with pytest.raises(ValueError, match=r"has at least 261 tokens .* got 100"):
        train_tokenizer(["a"], 100)
    with pytest.raises(ValueError, match="The data set is empty: no text to learn a tokenizer from"):
        train_tokenizer(["", "  "], 500, progress=False)


def test_a_tokenizer_that_does_not_fit_the_model_is_refused():
    tokenizer = tiny_tokenizer()
    config = AutoConfig.for_model("selfattn", vocab_size=len(tokenizer), pad_token_id=0)
    check_tokenizer(tokenizer, config, tiny_model_folder(), masks=True)
    small = AutoConfig.for_model("selfattn", vocab_size=100, pad_token_id=0)
    with pytest.raises(ValueError, match=f"has ids up to {len(tokenizer) - 1}, the model's vocab_size is 100"):
        check_tokenizer(tokenizer, small)
    padded = AutoConfig.for_model("selfattn", vocab_size=len(tokenizer), pad_token_id=1)
    with pytest.raises(ValueError, match="it pads with id 0, the model with 1"):
        check_tokenizer(tokenizer, padded)
    other = train_tokenizer(["completely different words, nothing the same"] * 9, 300, progress=False)
    with pytest.raises(ValueError, match="tokens have another id than in the tokenizer saved with it"):
        check_tokenizer(other, config, tiny_model_folder())
    maskless = train_tokenizer(sentences(50), 300, progress=False)
    maskless.mask_token = None
    with pytest.raises(ValueError, match="masking needs a pad token and a mask token"):
        check_tokenizer(maskless, config, masks=True)


def test_a_folder_without_a_tokenizer_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"There is no tokenizer in .* Pass --tokenizer_name"):
        open_tokenizer(str(tmp_path))
