import copy
import functools
import json
import math
import statistics
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from tokenizers import normalizers
from transformers import AutoConfig, AutoModelForMaskedLM, AutoModelForSequenceClassification

from hf_selfattn.tools import evaluation_masked, evaluation_results
from hf_selfattn.tools.blimp import blimp_metrics, first_of_each_paradigm, load_blimp, pseudo_log_likelihoods
from hf_selfattn.tools.blimp_published import OF_PARADIGMS, PARADIGMS, PHENOMENA, PUBLISHED
from hf_selfattn.tools.collators import MaskingCollator
from hf_selfattn.tools.evaluation import answers, longest_row, open_masked_lm, questions_by_length
from hf_selfattn.tools.evaluation_masked import masked_token_metrics, masked_word_metrics, words_in_windows
from hf_selfattn.tools.evaluation_results import Results, blimp_table, identity_of_model, masked_table
from hf_selfattn.tools.opening import ModelArguments
from hf_selfattn.tools.tokenizer import save_tokenizer, train_tokenizer
from hf_selfattn.tools.windows import as_rows

from .tolerances import assert_close
from .train_scripts import sentences, tiny_model_folder, tiny_tokenizer, write_rows

WIDTHS = {"hidden_size": 20, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 18}
TYPES = {
    "selfattn": WIDTHS,
    "bert": WIDTHS,
    "modernbert": {**WIDTHS, "hidden_size": 24, "bos_token_id": 2, "eos_token_id": 3, "cls_token_id": 2},
    "distilbert": {"dim": 20, "n_layers": 1, "n_heads": 2, "hidden_dim": 18},
    "mobilebert": {**WIDTHS, "num_attention_heads": 4, "embedding_size": 16, "intra_bottleneck_size": 12},
}
"""MobileBERT makes its logits without its output layer, all others with it."""


@functools.cache
def wordpiece_tokenizer():
    return train_tokenizer(sentences(300), vocab_size=700, algorithm="wordpiece", progress=False)


def new_model(kind, tokenizer):
    """A model whose predictions are far from uniform."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, vocab_size=len(tokenizer), pad_token_id=0, **TYPES[kind])
    model = AutoModelForMaskedLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


@pytest.fixture(params=TYPES)
def model(request):
    return new_model(request.param, tiny_tokenizer())


def alone(model, ids, place, target):
    """The definition: the log-probability of one token in one row, with all logits."""
    with torch.no_grad():
        return float(model(input_ids=torch.tensor([ids])).logits[0, place].double().log_softmax(-1)[target])


class TestAnswers:
    def questions(self):
        draw = np.random.default_rng(0)
        rows = [draw.integers(5, 400, size).tolist() for size in (3, 7, 7, 4, 11, 7)]
        rows[5] = list(rows[1])  # is computed once
        row = [0, 1, 1, 2, 4, 4, 4, 5, 5]  # nothing is asked in the fourth
        place = [2, 0, 6, 3, 10, 1, 1, 0, 5]
        return rows, row, place, draw.integers(5, 400, len(row)).tolist()

    def test_each_is_what_its_row_gives_alone(self, model):
        rows, row, place, target = self.questions()
        expected = [alone(model, rows[r], p, t) for r, p, t in zip(row, place, target, strict=True)]
        for tokens_per_batch in (1, 9, 1000):
            found, _ = answers(model, questions_by_length(*self.questions()), tokens_per_batch=tokens_per_batch)
            assert_close(torch.tensor(found), torch.tensor(expected).double(), dtype=torch.float32)

    def test_the_first_choice(self, model):
        rows, row, place, _ = self.questions()
        with torch.no_grad():
            best = [int(model(input_ids=torch.tensor([rows[r]])).logits[0, p].argmax())
                    for r, p in zip(row, place, strict=True)]  # fmt: skip
        target = [number + (i % 2) for i, number in enumerate(best)]
        _, right = answers(model, questions_by_length(rows, row, place, target))
        assert right.tolist() == [i % 2 == 0 for i in range(len(row))]

    def test_equal_rows_are_computed_once_and_logits_are_made_of_what_is_asked(self, model):
        seen = []
        hook = model.get_output_embeddings().register_forward_hook(lambda _, i, out: seen.append(out.shape[:-1]))
        groups = questions_by_length(*self.questions())
        assert [(len(group.ids), group.ids.shape[1]) for group in groups] == [(1, 11), (2, 7), (1, 4), (1, 3)]
        answers(model, groups)
        hook.remove()
        if model.config.model_type == "mobilebert":
            assert not seen
        else:
            assert sum(shape.numel() for shape in seen) == 9
        assert not model.get_output_embeddings()._forward_pre_hooks

    def test_half_precision_is_close(self):
        model, rows = new_model("selfattn", tiny_tokenizer()), self.questions()
        exact, _ = answers(model, questions_by_length(*rows))
        half, _ = answers(model, questions_by_length(*rows), dtype=torch.bfloat16)
        assert half.tolist() != exact.tolist()
        assert_close(torch.tensor(half), torch.tensor(exact), dtype=torch.bfloat16)


def test_pseudo_log_likelihoods_are_those_of_sentences_one_at_a_time(model):
    tokenizer, texts = tiny_tokenizer(), [*sentences(5), "music", sentences(1)[0], "the cat sees music, 3."]
    expected = []
    for text in texts:
        ids = tokenizer(text)["input_ids"]
        total = 0.0
        for place in range(1, len(ids) - 1):  # between [CLS] and [SEP]
            masked = [*ids[:place], tokenizer.mask_token_id, *ids[place + 1 :]]
            total += alone(model, masked, place, ids[place])
        expected.append(total)
    found = pseudo_log_likelihoods(model, tokenizer, texts)
    assert_close(torch.tensor(found), torch.tensor(expected).double(), dtype=torch.float32)
    assert found[0] == found[6]


class TestBlimp:
    ROWS = (("the cat sees music", "the music sees cat", "a", "s-selection"),
            ("my friend likes it", "my friend it likes", "a", "s-selection"),
            ("the cat", "cat the", "b", "argument_structure"),
            ("same", "same", "c", "binding"))  # fmt: skip

    def pairs(self):
        names = ("sentence_good", "sentence_bad", "UID", "linguistics_term")
        return Dataset.from_list([dict(zip(names, row, strict=True)) for row in self.ROWS])

    def test_accuracies(self):
        model, tokenizer = new_model("selfattn", tiny_tokenizer()), tiny_tokenizer()
        found = blimp_metrics(model, tokenizer, self.pairs(), progress=None)
        good, bad = (pseudo_log_likelihoods(model, tokenizer, [row[i] for row in self.ROWS]) for i in (0, 1))
        right = (good > bad).tolist()
        paradigms = {"a": (right[0] + right[1]) / 2, "b": float(right[2]), "c": 0.0}
        assert found["paradigms"] == paradigms
        assert found["accuracy"] == pytest.approx(sum(paradigms.values()) / 3)
        assert found["phenomena"] == {"argument_structure": (paradigms["a"] + paradigms["b"]) / 2, "binding": 0.0}
        assert (found["pairs"], found["ties"]) == (4, 1)

    def test_a_model_that_knows_a_sentence_finds_it(self):
        """The likelihood of the only token in the middle decides: the good one was given all the weight."""
        tokenizer, model = tiny_tokenizer(), new_model("selfattn", tiny_tokenizer())
        good, bad = " music", " apples"
        row = {"sentence_good": "the cat likes" + good, "sentence_bad": "the cat likes" + bad, "UID": "a"}
        pairs = Dataset.from_list([{**row, "linguistics_term": "binding"}])
        for better, accuracy in ((good, 1.0), (bad, 0.0)):
            with torch.no_grad():
                model.lm_head.bias.zero_()
                model.lm_head.bias[tokenizer(better, add_special_tokens=False)["input_ids"]] = 100
            assert blimp_metrics(model, tokenizer, pairs, progress=None)["accuracy"] == accuracy

    def test_the_first_pairs_of_each_paradigm(self):
        assert first_of_each_paradigm(self.pairs(), 1)["sentence_good"][:] == ["the cat sees music", "the cat", "same"]
        with pytest.raises(ValueError, match="at least one pair, got --max_pairs_per_paradigm 0"):
            first_of_each_paradigm(self.pairs(), 0)

    def test_files(self, tmp_path):
        for name in ("b", "a"):
            rows = [row for row in self.pairs() if row["UID"] == name]
            write_rows(tmp_path / f"{name}.jsonl", [{**row, "field": "syntax"} for row in rows])
        assert sorted(load_blimp(str(tmp_path))["UID"]) == ["a", "a", "b"]

    def test_wrong_columns_are_refused(self, tmp_path):
        write_rows(tmp_path / "a.jsonl", [{"sentence_good": "a", "bad": "b", "UID": "a", "linguistics_term": "b"}])
        with pytest.raises(ValueError, match="--blimp: there is no column 'sentence_bad'"):
            load_blimp(str(tmp_path))

    def test_a_folder_that_is_not_there_is_refused(self, tmp_path, monkeypatch):
        monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
        with pytest.raises(FileNotFoundError, match="is not a folder here, and the Hub does not give it"):
            load_blimp(str(tmp_path / "nothing"))

    def test_a_sentence_beyond_the_positions_is_refused(self):
        model = new_model("bert", tiny_tokenizer())
        model.config.max_position_embeddings = 4
        with pytest.raises(ValueError, match=r"rows of at most 4 tokens, and 'the cat sees music' has \d+. Evaluate"):
            pseudo_log_likelihoods(model, tiny_tokenizer(), ["the cat sees music", "a"])

    def test_published_figures_are_whole(self):
        assert (len(PHENOMENA), len(PARADIGMS)) == (12, 67)
        for place, name in enumerate(OF_PARADIGMS):
            assert PUBLISHED[name][0] == pytest.approx(statistics.mean(x[place] for x in PARADIGMS.values()), abs=0.06)
        for name, figures in PUBLISHED.items():
            assert len(figures) in (1, 13), name
            if name.startswith("RoBERTa-base"):
                assert figures[0] == pytest.approx(statistics.mean(figures[1:]), abs=0.06)


TEXTS = [
    " ".join(sentences(40)),
    "一个学生喜欢苹果。这只猫看见音乐和书。" * 9,
    "",
    "one\ntwo\tthree " + "x" * 150,
    "short",
]


class TestMaskedTokens:
    def test_means_over_windows_one_at_a_time(self, model):
        tokenizer = tiny_tokenizer()
        found = masked_token_metrics(model, tokenizer, TEXTS, 32, 0.3, seed=3, progress=None)
        collator = MaskingCollator(tokenizer, 0.3, seed=3)
        windows = as_rows(Dataset.from_dict({"text": TEXTS}), "text", tokenizer, 32)["input_ids"][:]
        loss, right, size, count = 0.0, 0, 0, 0
        for number, ids in enumerate(windows):
            labels = collator([{"input_ids": ids, "example_id": number, "epoch": 0}])["labels"][0, : len(ids)].tolist()
            masked = [tokenizer.mask_token_id if label != -100 else i for i, label in zip(ids, labels, strict=True)]
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([masked])).logits[0]
            for place, label in enumerate(labels):
                if label != -100:
                    loss -= float(logits[place].double().log_softmax(-1)[label])
                    right += int(logits[place].argmax()) == label
                    size += len(tokenizer.convert_ids_to_tokens(label))  # a character for each byte
                    count += 1
        assert (found["tokens"], found["windows"], found["bytes"]) == (count, len(windows), size)
        assert found["loss"] == pytest.approx(loss / count, rel=1e-5)
        assert found["accuracy"] == pytest.approx(right / count)
        assert found["bits_per_byte"] == pytest.approx(loss / math.log(2) / size, rel=1e-5)

    def test_a_seed_gives_the_same_masks_whatever_the_batch(self, model):
        tokenizer = tiny_tokenizer()
        first, again, other = (masked_token_metrics(model, tokenizer, TEXTS, 32, seed=seed, progress=None,
                                                    tokens_per_batch=size)
                               for seed, size in ((0, 4096), (0, 40), (1, 4096)))  # fmt: skip
        assert again == pytest.approx(first, rel=1e-5)
        assert other["loss"] != pytest.approx(first["loss"], rel=1e-5)


def uniform_model(tokenizer):
    """A model that gives every token the probability 1 / V."""
    model = new_model("bert", tokenizer)
    with torch.no_grad():
        for parameter in model.get_output_embeddings().parameters():
            parameter.zero_()
        model.cls.predictions.bias.zero_()
    return model


class TestMaskedWords:
    def asked(self, tokenizer, monkeypatch, **options):
        """(metrics, [(the row with blanks for the other masked tokens, the asked token)])"""
        seen = []

        def record(model, questions, **how):
            seen.extend(questions)
            return answers(model, questions, **how)

        monkeypatch.setattr(evaluation_masked, "answers", record)
        options = {"texts": TEXTS, **options}
        found = masked_word_metrics(uniform_model(tokenizer), tokenizer, progress=None, **options)
        asked = {}
        for group in seen:
            for row, place, target, number in zip(*group[1:], strict=True):
                asked[int(number)] = (group.ids[row].tolist(), int(place), int(target))
        return found, [asked[number] for number in sorted(asked)]

    def test_two_tokenizers_are_asked_for_the_same_words(self, monkeypatch):
        text = " ".join(sentence for sentence in sentences(150) if sentence.isascii())
        masked = []
        for tokenizer in (tiny_tokenizer(), wordpiece_tokenizer()):
            options = {"window_bytes": 90, "mlm_probability": 0.3, "texts": [text, "short", text]}
            found, asked = self.asked(tokenizer, monkeypatch, **options)
            masked.append("".join(tokenizer.decode([target for _, _, target in asked]).split()))
            assert found["bytes"] == len(masked[-1])
            assert found["lost_words"] == found["unknown_tokens"] == found["neighbouring_bytes"] == 0
        assert masked[0] == masked[1]
        assert 0.2 < len(masked[0]) / (2 * len(text)) < 0.4

    def test_the_same_bytes_and_bits_of_a_uniform_model(self, monkeypatch):
        sizes = []
        for tokenizer in (tiny_tokenizer(), wordpiece_tokenizer()):
            found, asked = self.asked(tokenizer, monkeypatch, window_bytes=100)
            sizes.append((found["bytes"] - found["neighbouring_bytes"], found["windows"]))
            nats = math.log(len(tokenizer)) * len(asked)
            assert found["tokens"] == len(asked)
            assert found["loss"] == pytest.approx(nats / found["words"], rel=1e-5)
            assert found["bits_per_byte"] == pytest.approx(nats / math.log(2) / found["bytes"], rel=1e-5)
        assert sizes[0] == sizes[1]

    def test_a_word_is_the_product_of_its_tokens_from_left_to_right(self, model, monkeypatch):
        """Two words are masked; neither is seen when the other is asked for."""
        tokenizer, text = tiny_tokenizer(), "my friend sees unbelievable whales"
        masked = lambda seed, document, numbers: np.where(np.isin(numbers, [1, 3]), 0, 1)  # noqa: E731
        monkeypatch.setattr(evaluation_masked, "hashed_uniforms", masked)
        found = masked_word_metrics(model, tokenizer, [text], progress=None)
        encoded = tokenizer(text, return_offsets_mapping=True)
        ids, mask = encoded["input_ids"], tokenizer.mask_token_id
        of_words = []
        for word in ("friend", "unbelievable"):
            start, stop = text.index(word), text.index(word) + len(word)
            of_words.append([i for i, (a, b) in enumerate(encoded["offset_mapping"]) if start <= a < b <= stop])
        assert len(of_words[1]) > 2
        total, right = 0.0, []
        for places, others in (of_words, of_words[::-1]):
            right.append(True)
            for number, place in enumerate(places):
                row = [mask if i in [*places[number:], *others] else token for i, token in enumerate(ids)]
                total += alone(model, row, place, ids[place])
                with torch.no_grad():
                    right[-1] &= int(model(input_ids=torch.tensor([row])).logits[0, place].argmax()) == ids[place]
        assert found["loss"] == pytest.approx(-total / 2, rel=1e-5)
        assert (found["words"], found["tokens"], found["bytes"]) == (2, sum(map(len, of_words)), 18)
        assert found["accuracy"] == sum(right) / 2

    def test_a_token_that_joins_two_words_counts_with_both(self, monkeypatch):
        tokenizer = tiny_tokenizer()
        assert tokenizer("苹果", return_offsets_mapping=True)["offset_mapping"][1:-1] == [(0, 1), (0, 2)]
        counts = ("words", "tokens", "bytes", "neighbouring_bytes", "lost_words")
        for masked, expected in (([0], (1, 2, 6, 3, 0)), ([1], (1, 1, 6, 3, 0)), ([0, 1], (1, 2, 6, 0, 0))):
            shares = lambda seed, document, numbers, masked=masked: np.where(np.isin(numbers, masked), 0, 1)  # noqa: E731
            monkeypatch.setattr(evaluation_masked, "hashed_uniforms", shares)
            found = masked_word_metrics(uniform_model(tokenizer), tokenizer, ["苹果"], progress=None)
            assert tuple(found[name] for name in counts) == expected

    def test_words_without_a_token_do_not_count(self, monkeypatch):
        tokenizer = copy.deepcopy(tiny_tokenizer())
        tokenizer.backend_tokenizer.normalizer = normalizers.Replace("dog", "")
        monkeypatch.setattr(evaluation_masked, "hashed_uniforms", lambda s, d, numbers: 0 * numbers)
        found = masked_word_metrics(uniform_model(tokenizer), tokenizer, ["the dog sees"], progress=None)
        assert (found["words"], found["bytes"], found["lost_words"]) == (2, 7, 1)

    def test_windows_hold_each_word_once(self):
        for text in TEXTS:
            windows = words_in_windows(text, 50)
            words = [text[a:b] for _, spans in windows for a, b in spans]
            assert "".join(words) == "".join(text.split())
            assert [first for first, _ in windows] == np.cumsum([0, *[len(w) for _, w in windows]])[:-1].tolist()
            for _, spans in windows:
                assert len(spans) == 1 or len(text[spans[0][0] : spans[-1][1]].encode()) <= 50
        assert [b - a for _, spans in words_in_windows(TEXTS[3], 50) for a, b in spans] == [3, 3, 5, 64, 64, 22]
        assert all(b - a == 1 for _, spans in words_in_windows("我爱。", 50) for a, b in spans)


class TestWhatIsRefused:
    def opened(self, path, **options):
        return open_masked_lm(ModelArguments(model_name_or_path=str(path), **options))

    def test_a_whole_model_is_opened(self):
        model, tokenizer = self.opened(tiny_model_folder())
        assert not model.training
        assert longest_row(tokenizer, model.config) > 1000

    def test_a_model_that_is_not_there(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="is not a folder"):
            self.opened(tmp_path / "nothing")

    @pytest.mark.parametrize("kind", ["selfattn", "bert"])
    def test_another_head(self, kind, tmp_path):
        config = AutoConfig.for_model(kind, vocab_size=len(tiny_tokenizer()), pad_token_id=0, **WIDTHS)
        AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
        save_tokenizer(tiny_tokenizer(), tmp_path)
        with pytest.raises(ValueError, match=r"lacks \d of its weights \(.*…\)|lacks 3 of its .* Pass the pretrained"):
            self.opened(tmp_path)

    def test_no_masked_language_model(self, tmp_path):
        options = {"n_embd": 20, "n_layer": 1, "n_head": 2, "vocab_size": len(tiny_tokenizer()), "pad_token_id": 0}
        config = AutoConfig.for_model("gpt2", **options)
        AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
        save_tokenizer(tiny_tokenizer(), tmp_path)
        with pytest.raises(ValueError, match=r"transformers knows none of type 'gpt2' .* Pass an encoder"):
            self.opened(tmp_path)

    def test_a_tokenizer_without_a_mask_token(self, tmp_path):
        AutoModelForMaskedLM.from_pretrained(tiny_model_folder()).save_pretrained(tmp_path)
        tokenizer = train_tokenizer(sentences(300), vocab_size=420, progress=False)
        tokenizer.mask_token = None
        save_tokenizer(tokenizer, tmp_path)
        with pytest.raises(ValueError, match="masking needs a pad token and a mask token"):
            self.opened(tmp_path)

    def test_windows_longer_than_the_positions(self):
        model = new_model("bert", tiny_tokenizer())
        model.config.max_position_embeddings = 20
        with pytest.raises(ValueError, match=r"rows of at most 20 tokens, got --max_seq_length 128. Pass 20 or less"):
            masked_token_metrics(model, tiny_tokenizer(), TEXTS)
        with pytest.raises(
            ValueError,
            match=r"The model reads .* at most 20 tokens, and the longest window of 384 .* --window_bytes \d+ or less",
        ):
            masked_word_metrics(model, tiny_tokenizer(), TEXTS)

    def test_nothing_to_mask(self, model):
        with pytest.raises(ValueError, match="No word of the text is masked"):
            masked_word_metrics(model, tiny_tokenizer(), ["", " "])
        with pytest.raises(ValueError, match="No token of the text is masked"):
            masked_token_metrics(model, tiny_tokenizer(), ["a"], mlm_probability=1e-9)

    def test_shares_and_windows_out_of_range(self, model):
        with pytest.raises(ValueError, match=r"at least 1 byte .* got window_bytes 0 and mlm_probability 0.15"):
            masked_word_metrics(model, tiny_tokenizer(), TEXTS, window_bytes=0)

    def test_a_slow_tokenizer(self, model):
        class Slow:
            is_fast = False

        for measure in (masked_token_metrics, masked_word_metrics):
            with pytest.raises(ValueError, match="known to fast tokenizers alone, and Slow is none"):
                measure(model, Slow(), TEXTS)


class TestResults:
    def test_they_are_found_again(self, tmp_path):
        results = Results(tmp_path / "a" / "results.jsonl")
        results[{"task": "a", "seed": 1}] = {"accuracy": 0.5}
        again = Results(tmp_path / "a" / "results.jsonl")
        assert {"seed": 1, "task": "a"} in again
        assert {"seed": 2, "task": "a"} not in again
        assert again[{"seed": 1, "task": "a"}] == {"accuracy": 0.5}

    def test_they_say_with_which_code_they_were_made(self, tmp_path, monkeypatch):
        (tmp_path / "results.jsonl").write_text('{"key": {"a": 1}, "result": 2}\n')
        monkeypatch.setattr(evaluation_results, "git_commit", lambda: "abc")
        results = Results(tmp_path / "results.jsonl")
        results["b"] = results["c"] = results["another model's"] = 3
        for found in (results, Results(tmp_path / "results.jsonl")):
            assert [found[key] for key in ({"a": 1}, "b", "c", "c")] == [2, 3, 3, 3]
            old, new = found.made_by()
            assert old == {"commit": None, "versions": None, "results": 1}
            assert (new["commit"], new["results"]) == ("abc", 2)
            assert new["versions"]["torch"] == torch.__version__

    @pytest.mark.parametrize("tail", ['{"key": {"b": 1}, "res', "{"])
    def test_a_line_that_was_cut_off_is_removed(self, tail, tmp_path):
        path = tmp_path / "results.jsonl"
        for whole in (1, 0):
            path.write_text('{"key": {"a": 1}, "result": 2}\n' * whole + tail)
            results = Results(path)
            results[{"b": 1}] = 3
            assert len(path.read_text().splitlines()) == whole + 1
            assert Results(path).known == results.known

    def test_a_damaged_line_is_refused(self, tmp_path):
        (tmp_path / "results.jsonl").write_text('{"key": {"a": 1}, "result": 2}\n[]\n')
        with pytest.raises(ValueError, match=r"line 2, is no result .* Delete the line"):
            Results(tmp_path / "results.jsonl")

    def test_a_model_is_known_by_what_it_computes(self):
        folder = Path(tempfile.mkdtemp())
        for path in Path(tiny_model_folder()).iterdir():
            if path.is_file():
                (folder / path.name).write_bytes(path.read_bytes())
        before, shape = identity_of_model(folder), identity_of_model(folder, weights=False)
        (folder / "README.md").write_text("changed")
        assert identity_of_model(folder) == before == identity_of_model(tiny_model_folder())
        code = identity_of_model(folder, trust_remote_code=True)
        (folder / "layers.py").write_text("changed")
        assert identity_of_model(folder) == before
        assert identity_of_model(folder, trust_remote_code=True) != code
        weights = bytearray((folder / "model.safetensors").read_bytes())
        weights[-1] ^= 1
        (folder / "model.safetensors").write_bytes(weights)
        assert identity_of_model(folder) != before
        assert identity_of_model(folder, weights=False) == shape


def test_tables():
    part = {"loss": 1.5, "accuracy": 0.25, "bits_per_byte": 2.0, "tokens": 1234, "words": 99}
    lines = masked_table({"m": {"masked_tokens": part, "masked_words": part}}).splitlines()
    assert lines[0] == "|  | m |"
    assert lines[2] == "| nats a masked token | 1.500 |"
    assert lines[-1] == "| masked words | 99 |"
    one = {"accuracy": 0.5, "phenomena": {"binding": 0.75}, "paradigms": {"a": 1.0, "wh_island": 0.5}}
    other = {"accuracy": 0.6, "phenomena": {"binding": 0.25}, "paradigms": {"a": 0.5}}
    lines = blimp_table({"m": [one], "n": [one, other]}).splitlines()
    assert lines[2].startswith("| overall | 50.0 | 55.0 ± 5.0 | 61.2 | 69.8 |")
    assert [line for line in lines if line.startswith("| binding | 75.0 | 50.0 | 64.4 |")]
    assert blimp_table({"m": [one], "n": [other], "o": [one, other]}, paradigms=True).splitlines()[2:] == [
        "| a | 100.0 | 50.0 | 75.0 |  |  |  |  |",
        "| wh_island | 50.0 |  | 50.0 | 56.2 | 46.7 | 19.5 | 78.9 |",
    ]
    json.dumps(PUBLISHED)
