"""Equal weights, equal numbers: BERT, RoBERTa, DistilBERT and ModernBERT of the installed transformers."""

import pytest
import torch
from torch.nn import functional as F
from transformers.models.modernbert import modeling_modernbert

from .peers import CONFIGS, in_our_names, make_ours, make_peer
from .tolerances import assert_close

LENGTHS = torch.tensor([11, 7, 1])
N = 11


@pytest.fixture(params=[torch.float64, torch.float32], ids=["float64", "float32"])
def dtype(request, monkeypatch):
    """Both types of the table that parity is held in; in float64 ModernBERT's rotation is, too."""
    if request.param is torch.float64:
        # ModernBERT rotates in float32 whatever the model's type.
        monkeypatch.setattr(modeling_modernbert, "apply_rotary_pos_emb", _rotate)
        monkeypatch.setattr(modeling_modernbert.ModernBertRotaryEmbedding, "forward", _cos_sin)
        monkeypatch.setattr(modeling_modernbert, "eager_attention_forward", _attend)
    return request.param


def _cos_sin(self, x, position_ids, layer_type):
    theta = self.config.rope_parameters[layer_type]["rope_theta"]
    dim = self.config.hidden_size // self.config.num_attention_heads
    frequency = theta ** -(torch.arange(0, dim, 2, dtype=x.dtype) / dim)
    angle = (position_ids[..., None] * frequency).repeat(1, 1, 2)
    return angle.cos(), angle.sin()


def _rotate(query, key, cos, sin, unsqueeze_dim=1):
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    half = modeling_modernbert.rotate_half
    return query * cos + half(query) * sin, key * cos + half(key) * sin


def _attend(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    scores = query @ key.transpose(2, 3) * scaling
    weights = (scores if attention_mask is None else scores + attention_mask).softmax(-1)
    return (weights @ value).transpose(1, 2), weights


def make_batch(name, rows=LENGTHS, left=False):
    """Rows of the given lengths, padded to N: input_ids, attention_mask, and token types where the peer has two."""
    generator = torch.Generator().manual_seed(1)
    config = CONFIGS[name]
    mask = torch.arange(N) < rows.unsqueeze(-1)
    mask = mask.flip(-1) if left else mask
    ids = torch.randint(4, config.vocab_size, mask.shape, generator=generator)
    batch = {"input_ids": ids.masked_fill(~mask, config.pad_token_id), "attention_mask": mask.long()}
    if getattr(config, "type_vocab_size", 1) == 2:
        batch["token_type_ids"] = torch.randint(0, 2, mask.shape, generator=generator)
    return batch


def assert_equal_at_real_tokens(actual, expected, mask, what):
    assert_close(actual[mask.bool()], expected[mask.bool()], what)


@pytest.mark.parametrize("name", CONFIGS)
class TestEveryHead:
    @pytest.mark.parametrize("side", ["right", "left"])
    def test_hidden_states(self, name, side, dtype):
        peer = make_peer(name).to(dtype)
        ours = make_ours(peer).to(dtype)
        batch = make_batch(name, left=side == "left")
        mask = batch["attention_mask"]
        # The peers that add positions count padding on the left, unless they are told; RoBERTa looks at the ids.
        told = {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)} if name in ("bert", "distilbert") else {}
        expected = peer(**batch, **told, output_hidden_states=True).hidden_states
        actual = ours(**batch, output_hidden_states=True).hidden_states
        assert len(actual) == len(expected) == ours.config.num_hidden_layers + 1
        for layer, pair in enumerate(zip(actual, expected, strict=True)):
            assert_equal_at_real_tokens(*pair, mask, f"hidden states {layer}")

    @pytest.mark.parametrize("kernel", ["eager", "sdpa"])
    def test_attention_weights(self, name, kernel, dtype):
        peer = make_peer(name).to(dtype)
        ours = make_ours(peer, attn_implementation=kernel).to(dtype)
        batch = make_batch(name)
        pairs = zip(
            ours(**batch, output_attentions=True).attentions,
            peer(**batch, output_attentions=True).attentions,
            strict=True,
        )
        for layer, (actual, expected) in enumerate(pairs):
            assert_equal_at_real_tokens(
                actual.transpose(1, 2), expected.transpose(1, 2), batch["attention_mask"], f"weights {layer}"
            )

    @pytest.mark.parametrize("head", ["masked_lm", "token_classification"])
    def test_logits_of_tokens(self, name, head, dtype):
        peer = make_peer(name, head).to(dtype)
        ours = make_ours(peer, head).to(dtype)
        batch = make_batch(name)
        assert_equal_at_real_tokens(ours(**batch).logits, peer(**batch).logits, batch["attention_mask"], "logits")

    def test_logits_of_texts(self, name, dtype):
        peer = make_peer(name, "sequence_classification", num_labels=3).to(dtype)
        ours = make_ours(peer, "sequence_classification", num_labels=3).to(dtype)
        batch = make_batch(name)
        assert_close(ours(**batch).logits, peer(**batch).logits, "logits")

    def test_logits_of_answers(self, name, dtype):
        peer = make_peer(name, "question_answering").to(dtype)
        ours = make_ours(peer, "question_answering").to(dtype)
        batch = make_batch(name)
        actual, expected = ours(**batch), peer(**batch)
        for side in ("start_logits", "end_logits"):
            assert_equal_at_real_tokens(actual[side], expected[side], batch["attention_mask"], side)

    def test_logits_of_choices(self, name, dtype):
        peer = make_peer(name, "multiple_choice").to(dtype)
        ours = make_ours(peer, "multiple_choice").to(dtype)
        batch = make_batch(name, rows=torch.tensor([[11, 4, 2], [7, 11, 1]]))
        actual, expected = ours(**batch).logits, peer(**batch).logits
        assert actual.shape == (2, 3)
        assert_close(actual, expected, "logits")

    def test_loss_and_gradients(self, name, dtype):
        peer = make_peer(name, "masked_lm").to(dtype)
        ours = make_ours(peer, "masked_lm").to(dtype)
        batch = make_batch(name)
        labels = batch["input_ids"].masked_fill(torch.arange(N) % 3 > 0, -100)
        labels = labels.masked_fill(batch["attention_mask"] == 0, -100)
        loss = ours(**batch, labels=labels).loss
        # ModernBERT's own loss rounds the logits to float32.
        expected = F.cross_entropy(peer(**batch).logits.flatten(0, 1), labels.flatten())
        assert_close(loss, expected, "loss")
        loss.backward()
        expected.backward()
        expected = in_our_names(peer, {n: p.grad for n, p in peer.named_parameters()})
        actual = {n: p.grad for n, p in ours.named_parameters()}
        assert set(actual) == set(expected)
        for parameter, gradient in actual.items():
            assert_close(gradient, expected[parameter], f"gradient of {parameter}")


def test_modernbert_with_mean_pooling(dtype):
    peer = make_peer("modernbert", "sequence_classification", classifier_pooling="mean").to(dtype)
    ours = make_ours(peer, "sequence_classification").to(dtype)
    batch = make_batch("modernbert")
    assert ours.config.pooling == "mean"
    assert_close(ours(**batch).logits, peer(**batch).logits, "logits")


def test_modernbert_with_every_bias(dtype):
    peer = make_peer("modernbert", "masked_lm", attention_bias=True, mlp_bias=True, norm_bias=True).to(dtype)
    ours = make_ours(peer, "masked_lm").to(dtype)
    batch = make_batch("modernbert")
    assert_equal_at_real_tokens(ours(**batch).logits, peer(**batch).logits, batch["attention_mask"], "logits")


@pytest.mark.parametrize("radius", [2, 3, 4])
def test_the_window_radius_is_half_of_local_attention(radius):
    """ModernBERT's local_attention=6 means 3 tokens on either side, and neither 2 nor 4."""
    peer = make_peer("modernbert")
    batch = make_batch("modernbert")
    mask = batch["attention_mask"].bool()
    actual = make_ours(peer, window_radius=radius)(**batch).last_hidden_state[mask]
    difference = (actual - peer(**batch).last_hidden_state[mask]).abs().max().item()
    assert (difference < 1e-4) if radius == 3 else (difference > 1e-2)


@pytest.mark.parametrize("name", ["bert", "roberta"])
def test_another_activation(name, dtype):
    """RoBERTa's language model head stays GELU whatever the feed-forward's activation is."""
    peer = make_peer(name, "masked_lm", hidden_act="relu").to(dtype)
    ours = make_ours(peer, "masked_lm").to(dtype)
    batch = make_batch(name)
    assert_equal_at_real_tokens(ours(**batch).logits, peer(**batch).logits, batch["attention_mask"], "logits")
