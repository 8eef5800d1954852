import math

import numpy as np
import pytest
import torch

from hf_selfattn.tools.masked_lm import MaskedTokenMetrics, sentences_with_a_mask
from hf_selfattn.tools.tokenizer import bytes_of_tokens

from .train_scripts import sentences, tiny_tokenizer


class Prediction:
    def __init__(self, predictions):
        self.predictions = predictions


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    size = len(tiny_tokenizer())
    logits = torch.randn(7, 11, size, generator=generator) * 3
    labels = torch.randint(5, size, (7, 11), generator=generator)
    keep = torch.rand(7, 11, generator=generator) < torch.linspace(0.0, 0.9, 7)[:, None]
    return logits, labels.masked_fill(~keep, -100)


def slow_loop(logits, labels, counts):
    tokenizer = tiny_tokenizer()
    counts = [0 if i in tokenizer.all_special_ids else int(n) for i, n in enumerate(counts)]
    sizes = bytes_of_tokens(tokenizer, len(counts))
    total, best = sum(counts) + len(counts), max(range(len(counts)), key=counts.__getitem__)
    tokens = loss = right = size = unigram = unigram_right = 0
    for row, wanted in zip(logits.double(), labels.tolist(), strict=True):
        for scores, target in zip(row, wanted, strict=True):
            if target == -100:
                continue
            tokens += 1
            loss += -float(torch.log_softmax(scores, -1)[target])
            right += int(scores.argmax()) == target
            size += int(sizes[target])
            unigram += -math.log((counts[target] + 1) / total)
            unigram_right += target == best
    return {
        "loss": loss / tokens,
        "perplexity": math.exp(loss / tokens),
        "accuracy": right / tokens,
        "bits_per_byte": loss / math.log(2) / size,
        "masked_tokens": tokens,
        "unigram_loss": unigram / tokens,
        "unigram_accuracy": unigram_right / tokens,
    }


@pytest.mark.parametrize("batch_size", [1, 2, 3, 7])
def test_metrics_are_means_over_tokens_whatever_the_batches(batch, batch_size):
    logits, labels = batch
    counts = np.random.default_rng(0).integers(0, 50, logits.shape[-1])
    metrics = MaskedTokenMetrics(tiny_tokenizer(), counts)
    parts = [
        metrics.sums_of_rows(a, b) for a, b in zip(logits.split(batch_size), labels.split(batch_size), strict=True)
    ]
    assert sum(part.numel() for part in parts) == 7 * 6
    result = metrics.compute(Prediction(torch.cat(parts).numpy()))
    assert result == pytest.approx(slow_loop(logits, labels, counts), rel=1e-5)


def test_logits_that_are_thinned_out_are_refused(batch):
    metrics = MaskedTokenMetrics(tiny_tokenizer(), np.ones(len(tiny_tokenizer())))
    with pytest.raises(ValueError, match="Evaluation needs a logit for each position"):
        metrics.sums_of_rows(batch[0].flatten(0, 1), batch[1])


def test_nothing_masked_is_refused(batch):
    metrics = MaskedTokenMetrics(tiny_tokenizer(), np.ones(len(tiny_tokenizer())))
    with pytest.raises(ValueError, match="No token of the evaluation data is masked"):
        metrics.compute(Prediction(metrics.sums_of_rows(batch[0], torch.full_like(batch[1], -100)).numpy()))


def test_shown_sentences_lack_one_token():
    tokenizer = tiny_tokenizer()
    pairs = sentences_with_a_mask(sentences(50), tokenizer, count=3, length=(4, 20))
    assert len(pairs) == 3
    for sentence, truth in pairs:
        assert tokenizer.mask_token in sentence
        assert sentence.replace(tokenizer.mask_token, truth) in sentences(50)
