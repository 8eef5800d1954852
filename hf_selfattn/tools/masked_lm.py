"""What a masked language model is measured by: true means over the masked tokens, beside those of a unigram model."""

import math

import numpy as np
import torch

from .tokenizer import bytes_of_tokens

SUMS = ("tokens", "loss", "correct", "bytes", "unigram_loss", "unigram_correct")


class MaskedTokenMetrics:
    """The two halves of an evaluation that keeps six numbers a row instead of the logits.

    The Trainer's own `eval_loss` is a mean over batches, in which a token of a batch with few labels weighs more; the
    one from here, over tokens, takes its place. The unigram model predicts each token by its share of the training
    tokens (each count plus one), always the same: what a model gains above it, it has from the context.

    Args:
        tokenizer: for the bytes that each masked token stands for.
        counts: (V,) how often each id occurs in the training data, special tokens included (they are set to 0).
    """

    def __init__(self, tokenizer, counts):
        counts = np.array(counts, dtype=np.float64)
        counts[tokenizer.all_special_ids] = 0
        self.most_frequent = int(counts.argmax())
        self.unigram_loss = torch.from_numpy(-np.log((counts + 1) / (counts + 1).sum()))
        self.bytes = torch.from_numpy(bytes_of_tokens(tokenizer, len(counts)))

    def init_output_bias(self, model):
        """Begins a new model's output bias at the unigram model's log-probabilities.

        Raises:
            ValueError: its output layer has no bias.
        """
        bias = getattr(model.get_output_embeddings(), "bias", None)
        if bias is None:
            raise ValueError(
                f"--unigram_bias begins the bias of the output layer, and that of {type(model).__name__} has none in "
                "this configuration. Give it one, or leave --unigram_bias out."
            )
        with torch.no_grad():
            bias.copy_(-self.unigram_loss)

    def sums_of_rows(self, logits, labels):
        """(B, 6) sums over each row's labels, from logits (B, N, V) and labels (B, N); -100 is no label.

        For the Trainer's `preprocess_logits_for_metrics`.
        """
        logits = logits[0] if isinstance(logits, tuple) else logits
        if logits.shape[:-1] != labels.shape:
            raise ValueError(
                f"Evaluation needs a logit for each position: labels are {tuple(labels.shape)}, logits "
                f"{tuple(logits.shape)}. Switch off what thins them out (as ModernBERT's sparse_prediction)."
            )
        device, dtype = labels.device, torch.float32 if labels.device.type == "mps" else torch.float64
        rows, _ = chosen = (labels != -100).nonzero(as_tuple=True)
        target, scores = labels[chosen], logits[chosen].float()
        values = torch.stack(
            [
                torch.ones_like(target, dtype=dtype),
                torch.nn.functional.cross_entropy(scores, target, reduction="none").to(dtype),
                (scores.argmax(-1) == target).to(dtype),
                self.bytes.to(device)[target].to(dtype),
                self.unigram_loss.to(device, dtype)[target],
                (target == self.most_frequent).to(dtype),
            ],
            dim=-1,
        )
        return torch.zeros(len(labels), len(SUMS), dtype=dtype, device=device).index_add_(0, rows, values)

    def compute(self, prediction):
        """Metrics from the rows' sums; for the Trainer's `compute_metrics`."""
        sums = dict(zip(SUMS, np.asarray(prediction.predictions, dtype=np.float64).sum(0), strict=True))
        tokens = sums["tokens"]
        if tokens == 0:
            raise ValueError(
                "No token of the evaluation data is masked, so there is nothing to measure. Evaluate on more text, or "
                "raise --eval_mlm_probability."
            )
        loss = sums["loss"] / tokens
        return {
            "loss": loss,
            "perplexity": math.exp(min(loss, 700)),
            "accuracy": sums["correct"] / tokens,
            "bits_per_byte": sums["loss"] / math.log(2) / max(sums["bytes"], 1),
            "masked_tokens": int(tokens),
            "unigram_loss": sums["unigram_loss"] / tokens,
            "unigram_accuracy": sums["unigram_correct"] / tokens,
        }


def sentences_with_a_mask(texts, tokenizer, count=4, length=(6, 16)):
    """`count` (sentence with a mask token, the token that was there) pairs from short texts or beginnings of texts."""
    pairs = []
    for text in texts:
        text = " ".join(text.split("\n\n")[0].split())
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if not length[0] <= len(ids) <= length[1]:
            continue
        pieces = [tokenizer.decode([number]) for number in ids]
        places = [
            i for i in range(1, len(ids)) if sum(c.isalpha() for c in pieces[i]) >= min(3, len(pieces[i].strip()))
        ]
        places = [i for i in places if pieces[i].strip() and "\ufffd" not in pieces[i]]
        if places:
            place = places[len(places) // 2]
            before, after = tokenizer.decode(ids[:place]), tokenizer.decode(ids[place + 1 :])
            blank = " " if pieces[place].startswith(" ") else ""
            pairs.append((f"{before}{blank}{tokenizer.mask_token}{after}", pieces[place].strip()))
        if len(pairs) == count:
            break
    return pairs


def show_predictions(folder, texts, count=4, top_k=3):
    """Lines with what the saved model puts into masked sentences; through the pipeline, as a user would."""
    from transformers import pipeline

    fill = pipeline("fill-mask", model=str(folder), top_k=top_k, device="cpu")
    lines = []
    for sentence, truth in sentences_with_a_mask(texts, fill.tokenizer, count):
        guesses = ", ".join(f"{guess['token_str'].strip(' ')!r} {guess['score']:.0%}" for guess in fill(sentence))
        lines.append(f"{sentence}\n    was {truth!r}, the model says {guesses}")
    return lines
