"""`answer` against a search of every span, window by window, one text at a time."""

import copy
import importlib
import math
import sys

import numpy as np
import pytest
import torch
from datasets import Dataset
from tokenizers import processors
from transformers import (
    BertConfig,
    BertForQuestionAnswering,
    ByT5Tokenizer,
    DistilBertConfig,
    DistilBertForQuestionAnswering,
    LongformerConfig,
    LongformerForQuestionAnswering,
    RobertaConfig,
    RobertaForQuestionAnswering,
    Trainer,
    TrainingArguments,
    XLMRobertaConfig,
    XLMRobertaForQuestionAnswering,
    XLNetConfig,
    XLNetForQuestionAnsweringSimple,
)

import hf_selfattn.tools
from hf_selfattn import SelfAttnConfig, SelfAttnForMaskedLM, SelfAttnForQuestionAnswering
from hf_selfattn.tools import answer
from hf_selfattn.tools.answering import best_answers
from hf_selfattn.tools.rows import Rows
from hf_selfattn.tools.task_questions import QuestionAnswering
from hf_selfattn.tools.tasks import TaskArguments
from hf_selfattn.tools.tokenizer import train_tokenizer

from .train_scripts import sentences, tiny_tokenizer

QUESTIONS = ["who likes music?", "谁?", "what does the old teacher see, and when is it?"]
CONTEXTS = [
    "the cat likes music, 7.  a small dog sees the long road.",
    "这只猫 看见 音乐和书，一个学生喜欢苹果。我爱北京",
    " the old teacher never forgets books about whales, 31. our neighbour sees something naïve. ",
]
CHOICES = {
    "full-rotary": {"position": "rotary"},
    "cosine-window-alibi": {"score": "cosine", "pattern": "sliding_window", "position": "alibi"},
    "additive-longformer-t5": {"score": "additive", "pattern": "longformer", "position": "t5"},
    "bigbird-learned": {"pattern": "bigbird", "position": "learned", "max_position_embeddings": 200},
}


@pytest.fixture(scope="module")
def build(make_config, make_model):
    def build(**options):
        config = make_config(**{"vocab_size": len(tiny_tokenizer()), "pad_token_id": 0, **options})
        return make_model(config, cls=SelfAttnForQuestionAnswering)

    return build


@pytest.fixture(scope="module")
def model(build):
    return build(position="rotary")


def row_of(tokenizer, asked, window):
    """A batch of one row with the question and a window of the context; where padding is to the left, three tokens."""
    pads = 3 if tokenizer.padding_side == "left" else 0
    first, second = [tokenizer.cls_token_id, *asked, tokenizer.sep_token_id], [*window, tokenizer.sep_token_id]
    row = {"input_ids": [tokenizer.pad_token_id] * pads + first + second}
    row["attention_mask"] = [0] * pads + [1] * len(first + second)
    if "token_type_ids" in tokenizer.model_input_names:
        row["token_type_ids"] = [0] * (pads + len(first)) + [1] * len(second)
    return {name: torch.tensor([values]) for name, values in row.items()}


def search(model, tokenizer, question, context, max_answer_tokens=30, room=None, stride=0, no_answer=False):
    """Every answer as (probability, start, end), the best first, in loops; `room` tokens of the context a window."""
    encoded = tokenizer(context, add_special_tokens=False, return_offsets_mapping=True)
    ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
    asked = tokenizer(question, add_special_tokens=False)["input_ids"]
    room = room or len(ids)
    values, nothing, begin = {}, math.inf, 0
    while True:
        begin = min(begin, max(0, len(ids) - room))
        window = ids[begin : begin + room]
        with torch.no_grad():
            outputs = model(**row_of(tokenizer, asked, window))
        starts, ends = outputs.start_logits[0].tolist(), outputs.end_logits[0].tolist()
        place = len(starts) - len(window) - 1
        front = place - len(asked) - 2
        nothing = min(nothing, starts[front] + ends[front])
        for first in range(len(window)):
            for last in range(first, min(len(window), first + max_answer_tokens)):
                span, value = (begin + first, begin + last), starts[place + first] + ends[place + last]
                values[span] = max(value, values.get(span, -math.inf))
        if begin + room >= len(ids):
            break
        begin += room - stride
    found = {}
    for (first, last), value in values.items():
        start, end = offsets[first][0], offsets[last][1]
        text = context[start:end]
        start, end = start + len(text) - len(text.lstrip()), end - len(text) + len(text.rstrip())
        if start < end:
            found.setdefault((start, end), []).append(value)
    if no_answer:
        found[0, 0] = [nothing]
    total = sum(math.exp(value) for same in found.values() for value in same)
    return sorted(((math.exp(max(same)) / total, *span) for span, same in found.items()), reverse=True)


def assert_answers(found, expected, context):
    assert [(row["start"], row["end"]) for row in found] == [row[1:] for row in expected]
    assert [row["score"] for row in found] == pytest.approx([row[0] for row in expected])
    for row in found:
        assert row["answer"] == context[row["start"] : row["end"]] == row["answer"].strip()


class TestOneWindow:
    @pytest.mark.parametrize("options", CHOICES.values(), ids=CHOICES)
    @pytest.mark.parametrize("side", ["right", "left"])
    def test_a_batch_is_searched_whole(self, build, options, side):
        model, tokenizer = build(**options), copy.deepcopy(tiny_tokenizer())
        tokenizer.padding_side = side
        found = answer(model, tokenizer, QUESTIONS, CONTEXTS, top_k=7)
        for question, context, answers in zip(QUESTIONS, CONTEXTS, found, strict=True):
            assert_answers(answers, search(model, tokenizer, question, context)[:7], context)

    def test_one_question_and_its_best_answer(self, model):
        [expected, *_] = search(model, tiny_tokenizer(), QUESTIONS[0], CONTEXTS[0])
        found = answer(model, tiny_tokenizer(), QUESTIONS[0], CONTEXTS[0])
        assert_answers([found], [expected], CONTEXTS[0])
        assert found["answer"]
        assert answer(model, tiny_tokenizer(), [QUESTIONS[0]], [CONTEXTS[0]]) == [found]
        assert answer(model, tiny_tokenizer(), [], []) == []

    @pytest.mark.parametrize("longest", [1, 3])
    def test_every_answer_up_to_a_length(self, model, longest):
        """All of them: no two with the same characters, and where all characters differ the scores sum to one."""
        expected = search(model, tiny_tokenizer(), QUESTIONS[0], CONTEXTS[0], longest)
        found = answer(model, tiny_tokenizer(), QUESTIONS[0], CONTEXTS[0], top_k=999, max_answer_tokens=longest)
        assert_answers(found, expected, CONTEXTS[0])
        assert sum(row["score"] for row in found) <= 1 + 1e-9

    def test_characters_of_several_tokens(self, model):
        """The tokens of 乐 are parts of characters; each answer is whole characters, once."""
        context = CONTEXTS[1]
        pieces = tiny_tokenizer()(context, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        assert len({start for start, _ in pieces}) < len(pieces)
        found = answer(model, tiny_tokenizer(), QUESTIONS[1], context, top_k=500, max_answer_tokens=4)
        assert len({(row["start"], row["end"]) for row in found}) == len(found)
        assert_answers(found, search(model, tiny_tokenizer(), QUESTIONS[1], context, 4), context)

    def test_blanks_that_a_tokenizer_counts_to_a_word(self, model):
        tokenizer = copy.deepcopy(tiny_tokenizer())
        ids = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("[CLS]", "[SEP]")]
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=ids
        )
        context = CONTEXTS[2]
        [(start, end), *_] = tokenizer(context, add_special_tokens=False, return_offsets_mapping=True)[
            "offset_mapping"
        ]
        assert context[start:end].startswith(" ")
        found = answer(model, tokenizer, QUESTIONS[2], context, top_k=50)
        assert_answers(found, search(model, tokenizer, QUESTIONS[2], context)[:50], context)


class TestSeveralWindows:
    @pytest.mark.parametrize(("max_length", "stride"), [(24, 5), (31, 0), (40, 12)])
    def test_windows_compete(self, model, max_length, stride):
        tokenizer = tiny_tokenizer()
        context, question = " ".join(CONTEXTS * 2), QUESTIONS[0]
        room = max_length - 3 - len(tokenizer.tokenize(question))
        assert len(tokenizer.tokenize(context)) > 2 * room
        for no_answer in (False, True):
            expected = search(model, tokenizer, question, context, 6, room, stride, no_answer)
            found = answer(model, tokenizer, question, context, max_length=max_length, stride=stride, batch_size=2,
                           max_answer_tokens=6, top_k=40, allow_no_answer=no_answer)  # fmt: skip
            assert_answers(found, expected[:40], context)

    def test_the_models_positions_are_the_default(self, build):
        model, tokenizer = build(position="learned", max_position_embeddings=26), tiny_tokenizer()
        context = " ".join(CONTEXTS)
        room = 26 - 3 - len(tokenizer.tokenize(QUESTIONS[0]))
        expected = search(model, tokenizer, QUESTIONS[0], context, room=room, stride=room // 2)
        assert_answers(answer(model, tokenizer, QUESTIONS[0], context, top_k=9), expected[:9], context)

    def test_a_question_of_several_windows_among_others(self, model):
        contexts = [CONTEXTS[0], " ".join(CONTEXTS), CONTEXTS[1]]
        together = answer(model, tiny_tokenizer(), ["who?"] * 3, contexts, max_length=40, batch_size=3)
        alone = [answer(model, tiny_tokenizer(), "who?", context, max_length=40) for context in contexts]
        assert [row["answer"] for row in together] == [row["answer"] for row in alone]
        assert [row["score"] for row in together] == pytest.approx([row["score"] for row in alone])


class TestNoAnswer:
    def test_competes_where_it_is_allowed(self, model):
        context = CONTEXTS[0]
        everything = search(model, tiny_tokenizer(), QUESTIONS[0], context, 2, no_answer=True)
        found = answer(model, tiny_tokenizer(), QUESTIONS[0], context, top_k=999, max_answer_tokens=2,
                       allow_no_answer=True)  # fmt: skip
        assert_answers(found, everything, context)
        assert [row["answer"] for row in found].count("") == 1

    def test_wins_where_every_window_says_so(self, model):
        """With the first token's logits raised far above the others."""
        certain = copy.deepcopy(model)
        certain.register_forward_hook(raise_first_token)
        for options in ({}, {"max_length": 24}):
            found = answer(certain, tiny_tokenizer(), QUESTIONS[0], CONTEXTS[2], allow_no_answer=True, **options)
            assert (found["answer"], found["start"], found["end"]) == ("", 0, 0)
            assert found["score"] > 0.999
            assert answer(certain, tiny_tokenizer(), QUESTIONS[0], CONTEXTS[2], **options)["answer"]

    def test_is_all_that_a_context_without_tokens_has(self):
        row = {"context_start": 4, "window_start": 0, "offsets": []}
        found = best_answers("", [(row, [0.5, 1.0, 2.0, 3.0, 4.0], [0.0] * 5)], 30)
        assert found == [{"answer": "", "start": 0, "end": 0, "score": 1.0}]


def raise_first_token(module, inputs, outputs):
    outputs.start_logits[:, 0] += 50
    outputs.end_logits[:, 0] += 50


STOCK = {
    "bert": (BertForQuestionAnswering, BertConfig, {"max_position_embeddings": 90}),
    "distilbert": (DistilBertForQuestionAnswering, DistilBertConfig, {"max_position_embeddings": 90}),
    "roberta": (RobertaForQuestionAnswering, RobertaConfig, {"max_position_embeddings": 120, "type_vocab_size": 1}),
    "selfattn": (SelfAttnForQuestionAnswering, SelfAttnConfig, {"type_vocab_size": 2}),
    "one-type": (SelfAttnForQuestionAnswering, SelfAttnConfig, {"type_vocab_size": 1}),
}


@pytest.mark.parametrize("name", STOCK)
def test_other_models_and_token_types(name):
    cls, config, options = STOCK[name]
    types = name in ("bert", "selfattn", "one-type")
    tokenizer = train_tokenizer(sentences(300), vocab_size=420, token_type_ids=types, progress=False)
    torch.manual_seed(0)
    sizes = {"vocab_size": len(tokenizer), "pad_token_id": 0, "hidden_size": 20, "num_hidden_layers": 2}
    model = cls(config(**sizes, num_attention_heads=2, intermediate_size=18, initializer_range=0.3, **options))
    model = model.double().eval()
    found = answer(model, tokenizer, QUESTIONS, CONTEXTS, top_k=5)
    if name == "one-type":  # its tokenizer tells texts apart, the model cannot: as if it did not
        tokenizer = tiny_tokenizer()
    for question, context, answers in zip(QUESTIONS, CONTEXTS, found, strict=True):
        assert_answers(answers, search(model, tokenizer, question, context)[:5], context)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize(
    ("cls", "config"),
    [(RobertaForQuestionAnswering, RobertaConfig), (XLMRobertaForQuestionAnswering, XLMRobertaConfig)],
    ids=["roberta", "xlm-roberta"],
)
def test_positions_that_begin_after_the_padding(cls, config, side):
    """66 rows, two of them for no token: windows of 64 by themselves, refused from 65 on."""
    tokenizer, context = copy.deepcopy(tiny_tokenizer()), " ".join(CONTEXTS * 3)
    tokenizer.padding_side = side
    ids = tokenizer.convert_tokens_to_ids(["[PAD]", "[UNK]"])
    tokenizer.pad_token, tokenizer.unk_token = "[UNK]", "[PAD]"  # the padding has id 1, as in all that are published
    assert ids == [0, 1] == [tokenizer.unk_token_id, tokenizer.pad_token_id]
    torch.manual_seed(0)
    sizes = {"vocab_size": len(tokenizer), "hidden_size": 20, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = cls(config(**sizes, intermediate_size=18, pad_token_id=1, type_vocab_size=1, max_position_embeddings=66))
    model = model.double().eval()
    room = 64 - 3 - len(tokenizer.tokenize(QUESTIONS[0]))
    expected = search(model, tokenizer, QUESTIONS[0], context, room=room, stride=room // 2)[:5]
    for options in ({}, {"max_length": 64}, {"max_length": np.int64(64)}):
        assert_answers(answer(model, tokenizer, QUESTIONS[0], context, top_k=5, **options), expected, context)
    with pytest.raises(
        ValueError, match=r"the model's 64 positions \(max_position_embeddings=66\), got 65. Pass max_length=64"
    ):
        answer(model, tokenizer, QUESTIONS[0], context, max_length=65)


def test_a_model_without_a_limit():
    """XLNet's max_position_embeddings is -1."""
    torch.manual_seed(0)
    sizes = {"vocab_size": len(tiny_tokenizer()), "pad_token_id": 0, "d_model": 20, "n_layer": 1, "n_head": 2}
    model = XLNetForQuestionAnsweringSimple(XLNetConfig(**sizes, d_inner=18)).double().eval()
    expected = search(model, tiny_tokenizer(), QUESTIONS[0], CONTEXTS[0])[:3]
    for options in ({}, {"max_length": 60}):
        found = answer(model, tiny_tokenizer(), QUESTIONS[0], CONTEXTS[0], top_k=3, **options)
        assert_answers(found, expected, CONTEXTS[0])


class TestLongformer:
    """transformers' Longformer reads a question up to the first of three separators."""

    @pytest.fixture
    def model(self):
        torch.manual_seed(0)
        sizes = {"vocab_size": len(tiny_tokenizer()), "hidden_size": 20, "num_hidden_layers": 1}
        config = LongformerConfig(**sizes, num_attention_heads=2, intermediate_size=18, initializer_range=0.3,
                                  max_position_embeddings=200, attention_window=8, pad_token_id=0,
                                  sep_token_id=tiny_tokenizer().sep_token_id)  # fmt: skip
        return LongformerForQuestionAnswering(config).double().eval()

    @pytest.fixture
    def tokenizer(self):
        """Of pairs with three separators."""
        tokenizer = copy.deepcopy(tiny_tokenizer())
        special = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("[CLS]", "[SEP]")]
        tokenizer.backend_tokenizer.post_processor = processors.Sequence(
            [
                processors.ByteLevel(trim_offsets=True),
                processors.TemplateProcessing(
                    single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] [SEP] $B [SEP]", special_tokens=special
                ),
            ]
        )
        return tokenizer

    def test_answers(self, model, tokenizer):
        """The best answers of one token each."""
        question, context = QUESTIONS[0], CONTEXTS[0]
        row = tokenizer(question, context, return_tensors="pt", return_offsets_mapping=True)
        offsets = row.pop("offset_mapping")[0].tolist()
        with torch.no_grad():
            outputs = model(**row)
        values = (outputs.start_logits + outputs.end_logits)[0].tolist()
        places = [i for i, (start, end) in enumerate(offsets) if row.sequence_ids(0)[i] == 1 and start < end]
        total = sum(math.exp(values[i]) for i in places)
        expected = sorted(((math.exp(values[i]) / total, *offsets[i]) for i in places), reverse=True)
        assert_answers(answer(model, tokenizer, question, context, top_k=99, max_answer_tokens=1), expected, context)

    def test_other_numbers_of_separators_are_refused(self, model, tokenizer):
        with pytest.raises(
            ValueError, match=r"question 0 gives a row with 2\. Pass the tokenizer that belongs to the"
        ):
            answer(model, tiny_tokenizer(), QUESTIONS[0], CONTEXTS[0])
        with pytest.raises(ValueError, match=r"three separators in a row .* question 1 gives a row with 4"):
            answer(model, tokenizer, QUESTIONS, [CONTEXTS[0], "a cat [SEP] a dog", CONTEXTS[2]])


class TestTheModelIsLeftAsItWas:
    def test_modes_gradients_and_dropout(self, build):
        model = build(position="rotary", hidden_dropout=0.5, attention_dropout=0.5)
        expected = answer(model, tiny_tokenizer(), QUESTIONS[0], CONTEXTS[0])
        model.train()
        model.model.layers[0].eval()
        modes = [module.training for module in model.modules()]
        recorded = []
        model.register_forward_hook(lambda module, inputs, outputs: recorded.append(outputs.start_logits))
        assert answer(model, tiny_tokenizer(), QUESTIONS[0], CONTEXTS[0]) == expected
        assert [module.training for module in model.modules()] == modes
        assert not recorded[0].requires_grad
        assert all(parameter.grad is None for parameter in model.parameters())

    def test_after_an_error_too(self, model):
        failing = copy.deepcopy(model).train()
        failing.register_forward_hook(lambda module, inputs, outputs: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            answer(failing, tiny_tokenizer(), QUESTIONS[0], CONTEXTS[0])
        assert all(module.training for module in failing.modules())

    def test_half_precision(self, model):
        found = answer(copy.deepcopy(model).to(torch.bfloat16), tiny_tokenizer(), QUESTIONS, CONTEXTS)
        assert all(0 < row["score"] <= 1 for row in found)


def who_likes_what(count):
    """Rows of a data set of questions about one of two sentences; the last two have no answer."""
    people, things = ["the cat", "a small dog", "my friend", "the old teacher"], ["music", "green apples", "whales"]
    rows = []
    for i in range(count):
        one, other = people[i % 4], people[(i + 1 + i % 3) % 4]
        liked, seen = things[i % 3], things[(i + 1) % 3]
        asked = "seen" if i % 2 else "liked"
        context = f"{one} likes {liked}. {other} sees {seen}."
        text = liked if asked == "liked" else seen
        rows.append({"question": f"what is {asked}?", "context": context,
                     "answers": {"text": [text], "answer_start": [context.index(text)]}})  # fmt: skip
    for row in rows[-2:]:
        row |= {"question": "what is lost?", "answers": {"text": [], "answer_start": []}}
    return rows


def test_after_training_it_answers_right(tmp_path):
    """With the stock Trainer, and with the same answers that fine-tuning's own evaluation reads from its logits."""
    rows, tokenizer = Dataset.from_list(who_likes_what(12)), tiny_tokenizer()
    task = QuestionAnswering(TaskArguments(max_answer_length=8), {"train": rows, "validation": rows})
    torch.manual_seed(0)
    config = SelfAttnConfig(vocab_size=len(tokenizer), pad_token_id=0, hidden_size=32, num_hidden_layers=2,
                            num_attention_heads=2, intermediate_size=48, hidden_dropout=0.0)  # fmt: skip
    model = SelfAttnForQuestionAnswering(config)
    features = task.features(rows, task.encoder(tokenizer, config, 64))
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=120,
        per_device_train_batch_size=12,
        learning_rate=3e-3,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        remove_unused_columns=False,
    )
    trainer = Trainer(model, arguments, train_dataset=Rows(features), data_collator=task.collator(tokenizer))
    trainer.train()
    found = answer(
        model, tokenizer, rows["question"][:], rows["context"][:], allow_no_answer=True, max_answer_tokens=8
    )
    assert [row["answer"] for row in found] == [(row["text"] or [""])[0] for row in rows["answers"]]
    outputs = trainer.predict(Rows(features)).predictions
    for own, line in zip(found, task.predictions(rows, features, outputs), strict=True):
        assert (line["prediction"], line["score"]) == (own["answer"], pytest.approx(own["score"], rel=1e-3))


NUMBERS = {"top_k": 1, "max_length": 1, "stride": 0, "max_answer_tokens": 1, "batch_size": 1}
"""What `answer` takes, and the smallest."""


class TestRefusals:
    def refuse(self, error, match, model, question="who?", context="the cat", tokenizer=None, **options):
        with pytest.raises(error, match=match):
            answer(model, tokenizer or tiny_tokenizer(), question, context, **options)

    def test_a_slow_tokenizer(self, model):
        self.refuse(TypeError, "only a fast tokenizer tells, got ByT5Tokenizer", model, tokenizer=ByT5Tokenizer())

    def test_a_tokenizer_without_a_pad_token(self, model):
        tokenizer = copy.deepcopy(tiny_tokenizer())
        tokenizer.pad_token = None
        self.refuse(ValueError, "has no pad token. Set tokenizer.pad_token", model, tokenizer=tokenizer)

    def test_a_model_without_start_and_end(self, make_config):
        other = SelfAttnForMaskedLM(make_config(vocab_size=len(tiny_tokenizer())))
        self.refuse(TypeError, "SelfAttnForMaskedLM gives logits. Open it with AutoModelForQuestionAnswering", other)
        assert other.training

    @pytest.mark.parametrize(
        ("question", "context", "message"),
        [
            (["a", " \n"], ["b", "c"], r"A question is not empty, got ' \\n' as number 1"),
            ("a", "", "A context is not empty, got '' as number 0"),
            (["a"], ["b", "c"], "got 1 questions and 2 contexts. Repeat a context"),
        ],
    )
    def test_empty_texts_and_unlike_numbers_of_them(self, model, question, context, message):
        self.refuse(ValueError, message, model, question, context)

    def test_what_is_no_text(self, model):
        self.refuse(TypeError, r"got list and str. Repeat .*: \[context\] \* len\(questions\)", model, ["a", "b"], "c")
        self.refuse(TypeError, "A context is a text, got None as number 1", model, ["a", "b"], ["c", None])

    def test_a_question_that_fills_the_window(self, model):
        long, context = "what is it? " * 9, " ".join(CONTEXTS)
        count = len(tiny_tokenizer().tokenize(long))
        message = rf"question 1 has {count} tokens, and max_length=40 leaves 37 beside special tokens. Shorten"
        self.refuse(ValueError, message, model, ["who?", long], [context] * 2, max_length=40)
        self.refuse(ValueError, f"max_length={count + 9} leaves", model, long, context, max_length=count + 9)
        self.refuse(ValueError, "max_length=2 leaves 0 beside", model, max_length=2)
        assert answer(model, tiny_tokenizer(), long, "music", max_length=count + 9)["answer"]

    def test_numbers_out_of_range(self, model, build):
        context = " ".join(CONTEXTS)
        for name, least in NUMBERS.items():
            message = f"{name} is a whole number from {least} on, got {least - 1}. Pass one, or leave {name} out"
            self.refuse(ValueError, message, model, **{name: least - 1})
        room = 40 - 3 - len(tiny_tokenizer().tokenize("who?"))
        message = f"from 0 to {room - 1} beside question 0, got {room}"
        self.refuse(ValueError, message, model, "who?", context, max_length=40, stride=room)
        learned = build(position="learned", max_position_embeddings=26)
        self.refuse(
            ValueError, "at most the model's 26 positions .* got 27. Pass max_length=26", learned, max_length=27
        )

    @pytest.mark.parametrize("name", NUMBERS)
    def test_what_is_no_whole_number(self, model, name):
        """Refused before anything else is looked at; whole numbers of any type are taken."""
        for wrong, shown in ((0.5, "0.5"), ("8", "'8'"), (True, "True"), (2.0, "2.0"), (np.True_, "(np.)?True_?")):
            message = f"{name} is a whole number from {NUMBERS[name]} on, got {shown}. Pass one"
            self.refuse(ValueError, message, model, [], [], **{name: wrong})
        options = {"max_length": 60, "max_answer_tokens": 2, "top_k": 1} | {name: 48}
        plain = answer(model, tiny_tokenizer(), "who?", CONTEXTS[0], **options)
        for whole in (np.int64(48), torch.tensor(48)):
            assert answer(model, tiny_tokenizer(), "who?", CONTEXTS[0], **options | {name: whole}) == plain


def test_it_is_imported_when_it_is_asked_for(monkeypatch):
    monkeypatch.setattr(hf_selfattn.tools, "answering", hf_selfattn.tools.answering)  # put back when this is over
    monkeypatch.delitem(sys.modules, "hf_selfattn.tools.answering")
    importlib.reload(hf_selfattn.tools)
    assert "hf_selfattn.tools.answering" not in sys.modules
    assert hf_selfattn.tools.answer is sys.modules["hf_selfattn.tools.answering"].answer
    with pytest.raises(AttributeError, match=r"module 'hf_selfattn.tools' has no attribute 'anwser'"):
        _ = hf_selfattn.tools.anwser
