"""transformers' own pipelines over our models: each result is computed again, slowly, from the model's logits."""

import copy
import itertools
import re

import numpy as np
import pytest
import torch
from transformers import pipeline

from hf_selfattn import (
    SelfAttnForMaskedLM,
    SelfAttnForSequenceClassification,
    SelfAttnForTokenClassification,
    SelfAttnModel,
)
from hf_selfattn.tools.tokenizer import save_tokenizer, train_tokenizer

from .tolerances import TOLERANCE, assert_close
from .train_scripts import sentences, tiny_tokenizer

CHOICES = {
    "full-rotary": {"pattern": "full", "position": "rotary"},
    "cosine-window-alibi": {"score": "cosine", "pattern": "sliding_window", "position": "alibi"},
    "additive-longformer-t5": {"score": "additive", "pattern": "longformer", "position": "t5"},
    "bigbird-learned": {"pattern": "bigbird", "position": "learned"},
    "causal-transformer_xl": {"score": "dot_product", "position": "transformer_xl", "causal": True},
}
CLASSES = {
    "fill-mask": SelfAttnForMaskedLM,
    "text-classification": SelfAttnForSequenceClassification,
    "token-classification": SelfAttnForTokenClassification,
    "feature-extraction": SelfAttnModel,
    "zero-shot-classification": SelfAttnForSequenceClassification,
}
TAGS = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]
LABELS = {
    "text-classification": ["bad", "fair", "good"],
    "token-classification": TAGS,
    "zero-shot-classification": ["contradiction", "neutral", "entailment"],
}
TEXTS = [
    "the cat [MASK] music",
    "our neighbour is looking for books about whales, 7. The [MASK] dog, naïvely",
    "[MASK]",
]


@pytest.fixture(params=CHOICES.values(), ids=CHOICES)
def attention(request):
    return request.param


@pytest.fixture(params=CLASSES)
def task(request):
    return request.param


@pytest.fixture(scope="module")
def build(make_config, make_model):
    """(task, kernel, dtype, **options) -> a model for it, in float64 if nothing else is said."""

    def build(task, kernel="eager", dtype=torch.float64, **options):
        names = dict(enumerate(LABELS.get(task, [])))
        labels = {"id2label": names, "label2id": {name: number for number, name in names.items()}} if names else {}
        config = make_config(**{"vocab_size": len(tiny_tokenizer()), "pad_token_id": 0, **labels, **options})
        return make_model(config, kernel, dtype, CLASSES[task])

    return build


def padding(side):
    tokenizer = copy.deepcopy(tiny_tokenizer())
    tokenizer.padding_side = side
    return tokenizer


def outputs_of(model, *texts, tokenizer=None):
    """(ids (N,), the model's first output (N, …)) of a text alone."""
    inputs = (tokenizer or tiny_tokenizer())(*texts, return_tensors="pt")
    with torch.no_grad():
        return inputs["input_ids"][0], model(**inputs)[0][0]


def arguments_of(task):
    return {"candidate_labels": ["music", "dogs"]} if task == "zero-shot-classification" else {}


def numbers(result):
    """Every number in a pipeline's result, in order."""
    if isinstance(result, dict):
        return [number for value in result.values() for number in numbers(value)]
    if isinstance(result, (list, tuple)):
        return [number for value in result for number in numbers(value)]
    return [] if isinstance(result, str) else [float(result)]


class TestFillMask:
    def test_gives_the_probabilities_at_the_mask(self, build, attention):
        model, tokenizer = build("fill-mask", **attention), tiny_tokenizer()
        ids, logits = outputs_of(model, TEXTS[1])
        place = ids.tolist().index(tokenizer.mask_token_id)
        expected = logits[place].softmax(-1).sort(descending=True)
        found = pipeline("fill-mask", model=model, tokenizer=tokenizer)(TEXTS[1], top_k=4)
        assert [guess["token"] for guess in found] == expected.indices[:4].tolist()
        assert [guess["score"] for guess in found] == pytest.approx(expected.values[:4].tolist())
        for guess in found:
            ids[place] = guess["token"]
            assert guess["token_str"] == tokenizer.decode([guess["token"]])
            assert guess["sequence"] == tokenizer.decode(ids, skip_special_tokens=True)

    def test_targets(self, build):
        model = build("fill-mask")
        ids, logits = outputs_of(model, TEXTS[0])
        scores = logits[ids.tolist().index(tiny_tokenizer().mask_token_id)].softmax(-1)
        wanted = tiny_tokenizer().convert_tokens_to_ids(["Ġmusic", "Ġgreen", "Ġlikes"])
        found = pipeline("fill-mask", model=model, tokenizer=tiny_tokenizer())(
            TEXTS[0], targets=["Ġmusic", "Ġgreen", "Ġlikes"]
        )
        assert {guess["token"] for guess in found} == set(wanted)
        assert [guess["score"] for guess in found] == sorted(scores[wanted].tolist(), reverse=True)

    def test_several_masks(self, build):
        model, text = build("fill-mask", position="rotary"), "the [MASK] sees [MASK], [MASK]."
        ids, logits = outputs_of(model, text)
        places = (ids == tiny_tokenizer().mask_token_id).nonzero().flatten()
        found = pipeline("fill-mask", model=model, tokenizer=tiny_tokenizer(), top_k=2)(text)
        assert len(places) == 3
        assert [[guess["token"] for guess in guesses] for guesses in found] == logits[places].topk(2)[1].tolist()


class TestTextClassification:
    def test_names_and_probabilities(self, build, attention):
        model = build("text-classification", **attention)
        scores = outputs_of(model, TEXTS[1])[1].softmax(-1)
        classify = pipeline("text-classification", model=model, tokenizer=tiny_tokenizer())
        everything = classify(TEXTS[1], top_k=None)
        order = scores.argsort(descending=True).tolist()
        assert [row["label"] for row in everything] == [LABELS["text-classification"][i] for i in order]
        # The pipeline rounds logits to float32.
        assert [row["score"] for row in everything] == pytest.approx(scores[order].tolist(), abs=1e-6)
        assert classify(TEXTS[1]) == everything[:1]

    def test_pairs_of_texts(self, build):
        tokenizer = train_tokenizer(sentences(300), vocab_size=420, token_type_ids=True, progress=False)
        model = build("text-classification", type_vocab_size=2)
        classify = pipeline("text-classification", model=model, tokenizer=tokenizer, top_k=None)
        one, two = "the cat likes music", "a small dog sees the long road"
        both = [classify({"text": a, "text_pair": b}) for a, b in ((one, two), (two, one))]
        for found, pair in zip(both, ((one, two), (two, one)), strict=True):
            logits = outputs_of(model, *pair, tokenizer=tokenizer)[1]
            assert found[0]["score"] == pytest.approx(logits.softmax(-1).max().item(), abs=1e-6)
        assert both[0] != both[1]

    @pytest.mark.parametrize(
        ("options", "arguments", "function"),
        [
            ({"num_labels": 1, "problem_type": "regression"}, {}, lambda x: x),
            ({"num_labels": 1}, {}, torch.sigmoid),
            ({"problem_type": "multi_label_classification"}, {}, torch.sigmoid),
            ({"problem_type": "single_label_classification"}, {}, lambda x: x.softmax(-1)),
            ({"problem_type": "multi_label_classification"}, {"function_to_apply": "none"}, lambda x: x),
        ],
        ids=["regression", "one-number", "several-labels", "one-label", "as-asked"],
    )
    def test_what_a_problem_means(self, build, options, arguments, function):
        labels = {"id2label": None, "label2id": None} if "num_labels" in options else {}
        model = build("text-classification", **labels, **options)
        expected = function(outputs_of(model, TEXTS[0])[1]).tolist()
        found = pipeline("text-classification", model=model, tokenizer=tiny_tokenizer())(
            TEXTS[0], top_k=None, **arguments
        )
        assert [row["score"] for row in found] == pytest.approx(sorted(expected, reverse=True), abs=1e-6)


def test_zero_shot_classification(build):
    model, candidates = build("zero-shot-classification", position="rotary"), ["music", "dogs", "green apples"]
    logits = torch.stack([outputs_of(model, TEXTS[1], f"It is about {label}.")[1] for label in candidates])
    judge = pipeline("zero-shot-classification", model=model, tokenizer=tiny_tokenizer())
    for multi_label, scores in ((False, logits[:, 2].softmax(0)), (True, logits[:, [0, 2]].softmax(1)[:, 1])):
        found = judge(TEXTS[1], candidates, hypothesis_template="It is about {}.", multi_label=multi_label)
        assert dict(zip(found["labels"], found["scores"], strict=True)) == pytest.approx(
            dict(zip(candidates, scores.tolist(), strict=True))
        )


def words_of(text, offsets):
    """The tokens (numbers) of each word: what stands between blanks."""
    words = [match.span() for match in re.finditer(r"\S+", text)]
    of_words = [[i for i, (a, b) in enumerate(offsets) if a < b and a < end and b > start] for start, end in words]
    return [tokens for tokens in of_words if tokens]


def entities_of(text, offsets, scores, strategy):
    """(tag, score, start, end) for each entity, from scores (N, labels) of the tokens, by what a strategy means."""
    if strategy in ("none", "simple"):
        units = [([i], scores[i]) for i in range(len(scores))]
    else:
        join = {
            "first": lambda tokens: scores[tokens[0]],
            "average": lambda tokens: scores[tokens].mean(0),
            "max": lambda tokens: scores[max(tokens, key=lambda i: scores[i].max())],
        }[strategy]
        units = [(tokens, join(tokens)) for tokens in words_of(text, offsets)]
    tagged = [(TAGS[s.argmax()], s.max(), offsets[tokens[0]][0], offsets[tokens[-1]][1]) for tokens, s in units]
    if strategy == "none":
        return tagged
    groups = []
    for tag, score, start, end in tagged:
        kind = tag.split("-")[-1]
        if groups and groups[-1][0] == kind and not tag.startswith("B-"):
            groups[-1][1].append(score)
            groups[-1][3] = end
        else:
            groups.append([kind, [score], start, end])
    return [(kind, np.mean(found), start, end) for kind, found, start, end in groups]


def as_rows(found):
    return [
        (row.get("entity_group", row.get("entity")), row["score"], int(row["start"]), int(row["end"])) for row in found
    ]


def assert_same_entities(found, expected):
    assert [row[:1] + row[2:] for row in found] == [row[:1] + row[2:] for row in expected]
    assert [row[1] for row in found] == pytest.approx([row[1] for row in expected])


@pytest.mark.filterwarnings("ignore:Tokenizer does not support real words")
class TestTokenClassification:
    TEXT = " the old teacher's friend, the naïve dog is looking for books about whales; never forgets green apples."

    @pytest.mark.parametrize("strategy", ["none", "simple", "first", "average", "max"])
    @pytest.mark.parametrize("algorithm", ["bpe", "wordpiece"])
    def test_strategies(self, build, strategy, algorithm):
        """Words are what stands between blanks, with either of our tokenizers."""
        tokenizer = train_tokenizer(sentences(300), 420, algorithm, progress=False)
        model = build("token-classification", position="rotary", vocab_size=len(tokenizer))
        offsets = tokenizer(self.TEXT, return_offsets_mapping=True)["offset_mapping"][1:-1]
        scores = outputs_of(model, self.TEXT, tokenizer=tokenizer)[1][1:-1].softmax(-1).numpy()
        expected = entities_of(self.TEXT, offsets, scores, strategy)
        tag = pipeline("token-classification", model=model, tokenizer=tokenizer, aggregation_strategy=strategy)
        found = tag(self.TEXT, ignore_labels=[])
        assert_same_entities(as_rows(found), expected)
        assert len(expected) > 8
        assert_same_entities(as_rows(tag(self.TEXT)), [row for row in expected if row[0] != "O"])

    def test_chinese(self, build):
        model, text = build("token-classification", position="rotary"), "一个学生 喜欢 苹果 and 这只猫 看见 音乐和书"
        found = pipeline("token-classification", model=model, tokenizer=tiny_tokenizer())(text, ignore_labels=[])
        assert [text[row["start"] : row["end"]] for row in found][:2] == ["一个学生", "喜欢"]
        scores = outputs_of(model, text)[1][1:-1].softmax(-1)
        assert [row["score"] for row in found] == pytest.approx(scores.max(-1)[0].tolist())

    @pytest.mark.parametrize("strategy", ["simple", "first", "max"])
    def test_long_texts_in_overlapping_windows(self, build, strategy):
        """`stride`, with learned positions: of entities that overlap the longer is kept, then the more probable."""
        size, stride = 24, 7
        text = " ".join(
            t for t in sentences(60, seed=5) if "Ġ" not in tiny_tokenizer().tokenize(f" {t}") and t.isascii()
        )
        tokenizer = copy.deepcopy(tiny_tokenizer())
        tokenizer.model_max_length = size
        model = build("token-classification", position="learned", max_position_embeddings=size)
        encoded = tiny_tokenizer()(text, add_special_tokens=False, return_offsets_mapping=True)
        ids, offsets, found = encoded["input_ids"], encoded["offset_mapping"], []
        for start in itertools.count(0, size - 2 - stride):
            window = slice(start, start + size - 2)
            row = torch.tensor([[tokenizer.cls_token_id, *ids[window], tokenizer.sep_token_id]])
            with torch.no_grad():
                scores = model(row).logits[0, 1:-1].softmax(-1).numpy()
            found += [row for row in entities_of(text, offsets[window], scores, strategy) if row[0] != "O"]
            if start + size - 2 >= len(ids):
                break
        assert start > 3 * (size - 2 - stride)
        expected = []
        for row in sorted(found, key=lambda row: row[2]):
            if not expected or row[2] >= expected[-1][3]:
                expected.append(row)
            else:
                expected[-1] = max(expected[-1], row, key=lambda one: (one[3] - one[2], one[1]))
        tag = pipeline("token-classification", model=model, tokenizer=tokenizer)
        assert_same_entities(as_rows(tag(text, stride=stride, aggregation_strategy=strategy)), expected)


class TestFeatureExtraction:
    def test_is_the_models_output(self, build, attention):
        model = build("feature-extraction", **attention)
        expected = outputs_of(model, TEXTS[1])[1]
        extract = pipeline("feature-extraction", model=model, tokenizer=tiny_tokenizer())
        assert_close(extract(TEXTS[1], return_tensors=True)[0], expected)
        assert torch.equal(torch.tensor(extract(TEXTS[1]), dtype=torch.float64)[0], expected)

    @pytest.mark.parametrize("side", ["right", "left"])
    def test_padding_changes_nothing_and_is_zero(self, build, attention, side):
        model, tokenizer = build("feature-extraction", **attention), padding(side)
        extract = pipeline("feature-extraction", model=model, tokenizer=tokenizer, return_tensors=True)
        for text, found in zip(TEXTS, extract(TEXTS, batch_size=3), strict=True):
            expected = outputs_of(model, text)[1]
            real, pad = len(expected), found.shape[1] - len(expected)
            assert_close(found[0, :real] if side == "right" else found[0, pad:], expected)
            assert not (found[0, real:] if side == "right" else found[0, :pad]).any()

    def test_more_outputs_do_not_disturb_a_batch(self, build):
        model = build("feature-extraction", output_hidden_states=True, output_attentions=True)
        memory = build("feature-extraction", causal=True, memory_length=4)
        for each in (model, memory):
            extract = pipeline("feature-extraction", model=each, tokenizer=tiny_tokenizer(), return_tensors=True)
            found = extract(TEXTS[:2], batch_size=2)
            assert_close(found[1][0], outputs_of(each, TEXTS[1])[1])


class TestEveryPipeline:
    # The results of feature extraction have the batch's length: `test_padding_changes_nothing_and_is_zero`.
    @pytest.mark.parametrize("task", [name for name in CLASSES if name != "feature-extraction"])
    @pytest.mark.parametrize("side", ["right", "left"])
    def test_a_batch_gives_what_each_text_gives(self, build, task, side):
        model = build(task, pattern="bigbird", position="rotary")
        run = pipeline(task, model=model, tokenizer=padding(side), **arguments_of(task))
        together = run(TEXTS, batch_size=3)
        alone = [run(text) for text in TEXTS]
        if task == "token-classification":  # `index` counts padding
            together, alone = ([as_rows(rows) for rows in found] for found in (together, alone))
        assert len(numbers(alone)) >= len(TEXTS)
        assert numbers(together) == pytest.approx(numbers(alone), rel=1e-6)

    @pytest.mark.usefixtures("uncompiled")
    def test_every_kernel_gives_the_same(self, build, task, kernel, tmp_path):
        """Opened by path, with the kernel that is asked for."""
        model = build(task, pattern=["sliding_window", "full"], position="rotary", window_radius=3)
        expected = numbers(pipeline(task, model=model, tokenizer=tiny_tokenizer(), **arguments_of(task))(TEXTS))
        model.save_pretrained(tmp_path)
        save_tokenizer(tiny_tokenizer(), tmp_path)
        run = pipeline(
            task,
            model=str(tmp_path),
            dtype=torch.float64,
            model_kwargs={"attn_implementation": kernel},
            **arguments_of(task),
        )
        assert (type(run.model), run.model.config._attn_implementation) == (CLASSES[task], kernel)
        assert not run.model.training
        assert numbers(run(TEXTS)) == pytest.approx(expected, rel=1e-6)

    def test_bfloat16(self, build, task, tmp_path):
        model = build(task, dtype=torch.float32, position="rotary")
        model.save_pretrained(tmp_path)
        save_tokenizer(tiny_tokenizer(), tmp_path)
        run = pipeline(task, model=str(tmp_path), dtype=torch.bfloat16, **arguments_of(task))
        assert run.model.dtype == torch.bfloat16
        one_text = {"aggregation_strategy": "simple"} if task == "token-classification" else {}
        found = numbers(run(TEXTS[:2], batch_size=2, **one_text))
        assert np.isfinite(found).all()
        if task == "feature-extraction":
            expected = outputs_of(model, TEXTS[0])[1]
            assert_close(torch.tensor(run(TEXTS[0]))[0], expected, dtype=torch.bfloat16)
        if task == "text-classification":
            expected = outputs_of(model, TEXTS[0])[1].softmax(-1).max().item()
            assert run(TEXTS[0])[0]["score"] == pytest.approx(expected, abs=TOLERANCE[torch.bfloat16])

    def test_rotary_positions_have_no_end(self, build, task):
        """Longer than any tokenizer's default of 512: the model reads every token."""
        model = build(task, kernel="selfattn", dtype=torch.float32, pattern="sliding_window", position="rotary")
        lengths, text = [], "the [MASK] likes " + "music and the long road, " * 150
        model.register_forward_pre_hook(
            lambda module, args, inputs: lengths.append(inputs["input_ids"].shape[1]), with_kwargs=True
        )
        found = pipeline(task, model=model, tokenizer=tiny_tokenizer(), **arguments_of(task))(text)
        assert min(lengths) >= len(tiny_tokenizer()(text)["input_ids"]) > 900
        assert np.isfinite(numbers(found)).all()

    def test_too_long_for_learned_positions(self, build, task):
        """Refused by a message of ours, and cut where that is asked for."""
        model = build(task, position="learned", max_position_embeddings=24)
        text = "the cat [MASK] music, " * 20
        run = pipeline(task, model=model, tokenizer=tiny_tokenizer(), **arguments_of(task))
        with pytest.raises(ValueError, match="Cut texts to max_position_embeddings=24 tokens"):
            run(text)
        run.tokenizer = copy.deepcopy(tiny_tokenizer())
        run.tokenizer.model_max_length = 24
        cut = {"fill-mask": {"tokenizer_kwargs": {"truncation": True}}, "token-classification": {}}
        found = run(text, **cut.get(task, {"truncation": True}))
        kept = run.tokenizer(text, truncation=True, return_offsets_mapping=True)["offset_mapping"]
        if task != "zero-shot-classification":  # it cuts the text to make room for the hypothesis
            assert numbers(found) == pytest.approx(numbers(run(text[: kept[-2][1]])))
