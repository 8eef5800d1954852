"""Attention weights on request: from every kernel, with everything that changes them, and some of them alone."""

import pytest
import torch

from hf_selfattn import SelfAttnForMaskedLM, unsupported_reasons
from hf_selfattn.attention import Selection

from .small_tiles import use_small_tiles
from .tolerances import assert_close

pytestmark = pytest.mark.usefixtures("uncompiled")

B, N, H, G = 3, 17, 4, 2


def draw_batch():
    """Three rows: whole, padded on the left, nothing but padding."""
    mask = torch.ones(B, N, dtype=torch.bool)
    mask[1, :6] = False
    mask[2] = False
    ids = torch.randint(43, (B, N), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": mask}


EXTRAS = {
    "plain": {},
    "qk_norm-softcap-sink": {"qk_norm": True, "logit_softcap": 2.0, "attention_sink": True},
}


@pytest.mark.parametrize("extras", EXTRAS)
def test_weights_of_every_kernel(choice, kernel, extras, monkeypatch, make_config, make_model):
    """They equal eager's, rows sum to 1 (less with a sink, 0 where nothing was seen), and times V they are the output.

    The kernel itself computes the output in tiles of 5 tokens; the weights are dense.
    """
    config = make_config(*choice, **EXTRAS[extras], num_hidden_layers=1)
    if unsupported_reasons(config, kernel, training=False):
        with pytest.raises(ValueError, match="Use attn_implementation="):
            make_model(config, kernel)
        return
    use_small_tiles(monkeypatch)
    batch, model, eager = draw_batch(), make_model(config, kernel), make_model(config, "eager")
    attention, found = model.layers[0].attention, {}
    attention.v_proj.register_forward_hook(lambda module, args, output: found.update(value=output))
    attention.o_proj.register_forward_hook(lambda module, args, output: found.update(heads=args[0]))
    with torch.no_grad():
        model(**batch)
        heads = found["heads"].unflatten(-1, (H, -1)).squeeze(0)
        (weights,) = model(**batch, output_attentions=True).attentions
        (expected,) = eager(**batch, output_attentions=True).attentions
    assert weights.shape == (B, H, N, N)
    assert_close(weights, expected)
    real = batch["attention_mask"]
    assert (weights.transpose(1, 2)[~real] == 0).all()
    assert (weights.permute(0, 3, 1, 2)[~real] == 0).all()
    sums = weights.sum(-1).transpose(1, 2)[real]
    if config.attention_sink:
        assert ((sums > 0) & (sums < 1)).all()
    else:
        assert_close(sums, torch.ones_like(sums))
    value = found["value"].unflatten(-1, (G, -1)).repeat_interleave(H // G, dim=2)
    # The kernel read the real tokens alone.
    assert_close(torch.einsum("bhqk,bkhd->bqhd", weights, value)[real], heads)


def test_a_sink_takes_its_share(kernel, make_config, make_model):
    """What is missing from 1 is exp(sink) / (exp(sink) + Σ exp(scores)): all of it for a large sink, none for -inf."""
    config = make_config(attention_sink=True, num_hidden_layers=1)
    if unsupported_reasons(config, kernel, training=False):
        return  # refused: test_weights_of_every_kernel
    model, batch = make_model(config, kernel), draw_batch()
    plain = make_model(make_config(num_hidden_layers=1), "eager")
    plain.load_state_dict(model.state_dict(), strict=False)
    sink = model.layers[0].attention.score_function.sink
    with torch.no_grad():
        sink.copy_(torch.tensor([30.0, -30.0, 0.0, 1.0]))
        (weights,) = model(**batch, output_attentions=True).attentions
        (without,) = plain(**batch, output_attentions=True).attentions
    sums = weights.sum(-1)[:2]
    assert (sums[:, 0] < 1e-9).all()
    assert_close(weights[:, 1], without[:, 1])
    shares = weights / weights.sum(-1, keepdim=True).clamp(min=1e-300)
    assert_close(shares[0], without[0])


class TestSome:
    SELECTIONS = {
        "one_layer": {"layers": [1]},
        "some_heads": {"heads": [3, 0]},
        "some_queries": {"queries": [16, 2, 2]},
        "all_three": {"layers": [0, 2], "heads": [2], "queries": [0, 9, 16]},
        "everything": {},
    }

    @pytest.mark.parametrize("selection", SELECTIONS)
    def test_slices_of_the_whole(self, selection, kernel, make_config, make_model):
        config = make_config(pattern="bigbird", position="rotary", num_hidden_layers=3)
        self.check(make_model(config, kernel), draw_batch(), **self.SELECTIONS[selection])

    def test_slices_of_every_choice(self, choice, kernel, make_config, make_model):
        config = make_config(*choice, num_hidden_layers=3, qk_norm=True)
        if unsupported_reasons(config, kernel, training=False):
            return  # refused: test_weights_of_every_kernel
        self.check(make_model(config, kernel), draw_batch(), **self.SELECTIONS["all_three"])

    def check(self, model, batch, layers=None, heads=None, queries=None):
        found = model.attention_weights(layers=layers, heads=heads, queries=queries, **batch)
        with torch.no_grad():
            whole = model.base_model(**batch, output_attentions=True).attentions
        whole = whole if layers is None else [whole[layer] for layer in layers]
        assert len(found) == len(whole)
        for some, everything in zip(found, whole, strict=True):
            everything = everything if heads is None else everything[:, heads]
            assert_close(some, everything if queries is None else everything[:, :, queries])
            assert not some.requires_grad

    def test_with_sink_and_softcap(self, kernel, make_config, make_model):
        config = make_config(pattern="longformer", position="transformer_xl", **EXTRAS["qk_norm-softcap-sink"])
        if unsupported_reasons(config, kernel, training=False):
            return  # refused: test_weights_of_every_kernel
        self.check(make_model(config, kernel), draw_batch(), heads=[1, 3], queries=[4])

    @pytest.mark.parametrize("mask_heads", [1, H])
    def test_with_a_mask_of_pairs(self, mask_heads, kernel, make_config, make_model):
        pairs = torch.rand(B, mask_heads, N, N, generator=torch.Generator().manual_seed(1)) < 0.5
        batch = {**draw_batch(), "attention_mask": pairs}
        self.check(make_model(make_config(pattern="bigbird"), kernel), batch, heads=[2], queries=[3, 4])

    def test_with_global_projections(self, kernel, make_config, make_model):
        config = make_config(pattern="longformer", position="rotary", global_projections=True)
        batch = draw_batch()
        batch["global_attention_mask"] = torch.zeros(B, N, dtype=torch.long)
        batch["global_attention_mask"][:, 9] = 1
        self.check(make_model(config, kernel), batch)
        self.check(make_model(config, kernel), batch, layers=[1], heads=[2], queries=[0, 9, 10])

    def test_with_memory(self, kernel, make_config, make_model):
        """(B, H, N, M + N): the memory first, then the segment."""
        config = make_config(causal=True, position="rotary", memory_length=8)
        model, batch = make_model(config, kernel), draw_batch()
        with torch.no_grad():
            first, second = ({name: x[:, part] for name, x in batch.items()} for part in (slice(0, 9), slice(9, N)))
            second["memory"] = model(**first).memory
            weights = model(**second, output_attentions=True).attentions
        assert all(x.shape == (B, H, 8, 8 + 8) for x in weights)
        sums = weights[0].sum(-1).transpose(1, 2)[second["attention_mask"]]
        assert_close(sums, torch.ones_like(sums))
        self.check(model, second, layers=[1], heads=[0, 2], queries=[7])

    def test_of_a_model_with_a_head(self, kernel, make_config, make_model):
        model, batch = make_model(make_config(), kernel, cls=SelfAttnForMaskedLM), draw_batch()
        self.check(model, batch, layers=[0], heads=[1], queries=[2])
        with torch.no_grad():
            by_head = model(**batch, output_attentions=True).attentions
        for some, whole in zip(model.attention_weights(**batch), by_head, strict=True):
            assert_close(some, whole)

    def test_nothing_larger_is_kept(self, kernel, monkeypatch, make_config, make_model):
        """One head and two queries: no kernel is asked for all of the weights."""
        wanted = []
        model = make_model(make_config(), kernel)
        original = type(model.layers[0].attention).heads

        def watched(self, *args):
            result = original(self, *args)
            wanted.append(None if result[1] is None else tuple(result[1].shape))
            return result

        monkeypatch.setattr(type(model.layers[0].attention), "heads", watched)
        model.attention_weights(layers=[1], heads=[0], queries=[0, 1], **draw_batch())
        assert wanted == [None, (B, 1, 2, N)]

    def test_it_is_asked_once_and_not_again(self, make_config, make_model):
        """The next forward returns none, and the mode of the model is its own."""
        model, batch = make_model(make_config(), "sdpa").train(), draw_batch()
        model.attention_weights(**batch)
        assert model.training
        with torch.no_grad():
            assert model(**batch).attentions is None

    @pytest.mark.parametrize(
        "selection", [{"layers": [7]}, {"heads": [4]}, {"queries": [17]}], ids=["layer", "head", "query"]
    )
    def test_what_there_is_not_is_refused(self, selection, make_config, make_model):
        ((name, value),) = selection.items()
        with pytest.raises((ValueError, IndexError), match=f"{name}.*{value[0]}"):
            make_model(make_config(), "eager").attention_weights(**selection, **draw_batch())


def test_weights_beside_gradients(kernel, make_config, make_model):
    """Weights from a training step carry gradients, and asking for some changes neither outputs nor gradients."""
    config = make_config(position="rotary", num_hidden_layers=1)
    if unsupported_reasons(config, kernel, device_type="cpu", training=True):
        return  # refused: test_reference_encoder.py
    gradients = []
    for wanted in (False, Selection(heads=[1])):
        model = make_model(config, kernel)
        model(**draw_batch(), output_attentions=wanted).last_hidden_state.square().sum().backward()
        gradients.append({name: x.grad for name, x in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert_close(gradients[1][name], gradient, name)
    model = make_model(config, kernel)
    model(**draw_batch(), output_attentions=True).attentions[0].square().sum().backward()
    assert model.layers[0].attention.q_proj.weight.grad.abs().max() > 0
