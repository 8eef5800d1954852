"""Int8 by torchao on a CPU: what becomes int8, how far the numbers move, and what survives saving.

A weight w of a row with largest value m is rounded to steps of m / 127.5, so it moves by at most half a step, m / 255.
With the dynamic scheme each token's values are rounded so too, for each product anew.
"""

import copy

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig, quantize_
from torchao.quantization.quantize_.workflows import Int8Tensor
from transformers import AutoModel, AutoModelForMaskedLM, TorchAoConfig

import hf_selfattn
from hf_selfattn import SelfAttnForMaskedLM, SelfAttnForSequenceClassification, SelfAttnModel

from .tolerances import assert_close

HALF_STEP = 1 / 255
"""Of the largest value of a row."""

SCHEMES = {"weight_only": Int8WeightOnlyConfig, "dynamic": Int8DynamicActivationInt8WeightConfig}
CHOICES = {
    "rotary": {"position": "rotary"},
    "additive_alibi": {"score": "additive", "position": "alibi"},
    "cosine_t5": {"score": "cosine", "position": "t5", "pattern": "sliding_window"},
    "longformer": {"pattern": "longformer", "position": "none", "global_projections": True},
    "transformer_xl": {"position": "transformer_xl", "score": "dot_product"},
    "bert": {"position": "learned", "norm_position": "post", "mlp_type": "plain", "attention_bias": True,
             "mlp_bias": True, "norm_bias": True, "embedding_size": 8, "head_type": "bert"},
}  # fmt: skip
"""Attentions with weights of their own beside q, k, v and o: a score's, a position's, those of global queries."""

IDS = torch.randint(1, 43, (3, 11), generator=torch.Generator().manual_seed(1))


@pytest.fixture(params=SCHEMES)
def scheme(request):
    return request.param


@pytest.fixture(params=CHOICES)
def choice(request):
    return request.param


@pytest.fixture
def make(make_config, make_model):
    """(choice, class) -> a model in fp32."""

    def make(choice, cls=SelfAttnForMaskedLM, **options):
        config = make_config(**{**CHOICES[choice], **options})
        return make_model(config, kernel=None, dtype=torch.float32, cls=cls)

    return make


@pytest.fixture
def quantise(tmp_path):
    """(model, scheme) -> the same loaded again in int8."""

    def quantise(model, scheme, **options):
        model.save_pretrained(tmp_path / "fp32")
        config = TorchAoConfig(SCHEMES[scheme](set_inductor_config=False))
        return type(model).from_pretrained(tmp_path / "fp32", quantization_config=config, **options)

    return quantise


def linears(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}


def is_int8(tensor):
    return isinstance(tensor, Int8Tensor) and tensor.qdata.dtype == torch.int8


@torch.no_grad()
def first_output(model, ids=IDS, **more):
    return model(ids, **more)[0]


class TestWhat:
    @pytest.mark.parametrize("name", [name for name in hf_selfattn.__all__ if name.startswith("SelfAttnFor")])
    def test_every_linear_layer_but_the_language_model_s_last(self, name, scheme, make, quantise):
        model = quantise(make("bert", getattr(hf_selfattn, name)), scheme)
        for where, module in linears(model).items():
            assert is_int8(module.weight) is (where != "lm_head"), where
        others = {where for where, parameter in model.named_parameters() if not is_int8(parameter)}
        assert others == {n for n, _ in model.named_parameters()} - {f"{where}.weight" for where in linears(model)} | (
            {"lm_head.weight"} & others
        )
        assert all(p.dtype == torch.float32 for n, p in model.named_parameters() if n in others)

    def test_in_every_attention(self, choice, scheme, make, quantise):
        model = make(choice, SelfAttnModel)
        found = linears(quantise(model, scheme))
        assert set(found) == set(linears(model))
        assert all(is_int8(module.weight) for module in found.values())

    @pytest.mark.parametrize("tie", [True, False], ids=["tied", "untied"])
    def test_tied_weights_stay_tied(self, tie, scheme, make, quantise):
        model = quantise(make("rotary", tie_word_embeddings=tie), scheme)
        assert (model.lm_head.weight is model.model.embed_tokens.weight) is tie
        assert model.lm_head.weight.dtype == torch.float32

    def test_a_quarter_of_the_bytes(self, scheme, make, quantise, tmp_path):
        """A byte a weight and, for each row, the step (4 bytes) and a zero point (1 byte), in memory and on disk."""
        model = make("rotary", SelfAttnModel)
        quantised = quantise(model, scheme)
        quantised.save_pretrained(tmp_path / "int8")
        sizes = {name: linear.weight for name, linear in linears(model).items()}
        for name, linear in linears(quantised).items():
            weight = linear.weight
            kept = [weight.qdata, weight.scale, weight.zero_point]
            assert sum(x.nbytes for x in kept if x is not None) <= sizes[name].numel() + 5 * len(weight), name
        saved = sum(3 * weight.numel() - 5 * len(weight) for weight in sizes.values())
        files = [load_file(tmp_path / folder / "model.safetensors").values() for folder in ("fp32", "int8")]
        fp32, int8 = (sum(x.nbytes for x in tensors) for tensors in files)
        assert int8 <= fp32 - saved


class TestNumbers:
    def test_weights_move_by_half_a_step(self, choice, scheme, make, quantise):
        model = make(choice)
        quantised = linears(quantise(model, scheme))
        for name, linear in linears(model).items():
            if name != "lm_head":
                moved = (quantised[name].weight.dequantize() - linear.weight).abs()
                largest = linear.weight.abs().amax(1, keepdim=True)
                assert (moved <= (HALF_STEP + 1e-6) * largest).all(), name

    def test_each_product_within_its_bound(self, choice, scheme, make, quantise):
        """Of what a layer is given in a forward: |error| <= Σ |x| dw + |w| dx + dw dx, with half a step each."""
        model = make(choice)
        exact, quantised, seen = linears(copy.deepcopy(model).double()), quantise(model, scheme), set()

        def check(name, given, made):
            x, w = given.double(), exact[name].weight
            dw = HALF_STEP * w.abs().amax(1, keepdim=True).expand_as(w)
            dx = HALF_STEP * x.abs().amax(-1, keepdim=True).expand_as(x) * (scheme == "dynamic")
            bound = x.abs() @ dw.T + dx @ w.abs().T + dx @ dw.T
            assert ((made - exact[name](x)).abs() <= bound + 1e-5).all(), name
            seen.add(name)

        for name, linear in linears(quantised).items():
            linear.register_forward_hook(lambda _, given, made, name=name: check(name, given[0], made))
        first_output(quantised)
        assert seen == set(exact)

    def test_weight_only_is_the_model_of_rounded_weights(self, choice, make, quantise):
        model = make(choice)
        quantised = quantise(model, "weight_only")
        with torch.no_grad():
            for name, linear in linears(quantised).items():
                if name != "lm_head":
                    model.get_submodule(name).weight.copy_(linear.weight.dequantize())
        mask = torch.ones_like(IDS)
        mask[1, 5:] = 0
        assert_close(first_output(quantised, attention_mask=mask), first_output(model, attention_mask=mask))

    @pytest.mark.parametrize("cls", [SelfAttnModel, SelfAttnForMaskedLM, SelfAttnForSequenceClassification])
    def test_close_to_fp32(self, cls, choice, scheme, make, quantise):
        """As if each linear layer on the way added its half step, or two, of the largest value."""
        model = make(choice, cls)
        expected, actual = first_output(model), first_output(quantise(model, scheme))
        roundings = len(linears(model)) * (2 if scheme == "dynamic" else 1)
        assert (actual - expected).abs().max() <= roundings * HALF_STEP * expected.abs().max()
        assert not torch.equal(actual, expected)

    def test_a_token_s_product_does_not_depend_on_the_others(self, scheme, make, quantise):
        """Steps are those of a token, not of a batch; whole numbers add up exactly in any order."""
        linear = quantise(make("rotary"), scheme).model.layers[0].feed_forward.up_proj
        x = torch.randn(7, 20, generator=torch.Generator().manual_seed(2)) * torch.logspace(-3, 3, 7)[:, None]
        with torch.no_grad():
            together, alone = linear(x), torch.cat([linear(row) for row in x.split(1)])
        if scheme == "dynamic":
            assert torch.equal(together, alone)
        assert_close(together, alone)

    def test_padded_as_alone(self, choice, scheme, make, quantise):
        model = quantise(make(choice, SelfAttnModel), scheme)
        lengths = [11, 4, 7]
        mask = torch.tensor([[column < length for column in range(11)] for length in lengths])
        padded = first_output(model, attention_mask=mask)
        for row, length in enumerate(lengths):
            alone = first_output(model, IDS[row : row + 1, :length])[0]
            if scheme == "weight_only":
                assert_close(padded[row, :length], alone)
            else:  # a last bit may decide to which side a value is rounded
                roundings = 2 * len(linears(model))
                assert (padded[row, :length] - alone).abs().max() <= roundings * HALF_STEP * alone.abs().max()
            assert (padded[row, length:] == 0).all()

    def test_bf16_around_it(self, choice, scheme, make, quantise):
        model = make(choice)
        quantised = quantise(model, scheme, dtype=torch.bfloat16)
        assert all(is_int8(x.weight) or name == "lm_head" for name, x in linears(quantised).items())
        actual, expected = first_output(quantised), first_output(model)
        assert actual.dtype == torch.bfloat16
        roundings = len(linears(model)) * (HALF_STEP * 2 + 2**-8)
        assert (actual - expected).abs().max() <= roundings * expected.abs().max()

    def test_weight_only_passes_gradients_on(self, choice, make, quantise):
        """To what is not int8 (adapters, norms, tokens) they come as through the rounded weights."""
        model = make(choice)
        quantised = quantise(model, "weight_only")
        with torch.no_grad():
            for name, linear in linears(quantised).items():
                if name != "lm_head":
                    model.get_submodule(name).weight.copy_(linear.weight.dequantize())
        for each in (model, quantised):
            each(IDS, labels=IDS).loss.backward()
        expected = {name: x.grad for name, x in model.named_parameters()}
        others = [name for name, x in quantised.named_parameters() if not is_int8(x) and x.requires_grad]
        assert "model.layers.0.feed_forward_norm.weight" in others or CHOICES[choice].get("norm_position") == "post"
        for name, parameter in quantised.named_parameters():
            if name in others:
                assert_close(parameter.grad, expected[name], name)


class TestSaving:
    def test_there_and_back(self, choice, scheme, make, quantise, tmp_path):
        model = quantise(make(choice), scheme)
        model.save_pretrained(tmp_path / "int8")
        again = AutoModelForMaskedLM.from_pretrained(tmp_path / "int8")
        assert type(again) is SelfAttnForMaskedLM
        assert all(is_int8(x.weight) or name == "lm_head" for name, x in linears(again).items())
        assert torch.equal(first_output(again), first_output(model))
        assert {file.suffix for file in (tmp_path / "int8").iterdir()} == {".json", ".py", ".safetensors"}

    def test_in_pieces(self, scheme, make, quantise, tmp_path):
        model = quantise(make("rotary"), scheme)
        model.save_pretrained(tmp_path / "int8", max_shard_size="3KB")
        assert len(list((tmp_path / "int8").glob("model-*.safetensors"))) > 2
        again = SelfAttnForMaskedLM.from_pretrained(tmp_path / "int8", device_map="cpu")
        assert torch.equal(first_output(again), first_output(model))

    def test_not_a_second_time(self, scheme, make, quantise, tmp_path):
        """transformers has no way back from what it made of an int8 file; the folder can be copied."""
        quantise(make("rotary"), scheme).save_pretrained(tmp_path / "int8")
        with pytest.raises(NotImplementedError):
            SelfAttnForMaskedLM.from_pretrained(tmp_path / "int8").save_pretrained(tmp_path / "again")

    def test_another_head_on_it(self, scheme, make, quantise, tmp_path):
        model = quantise(make("rotary"), scheme)
        model.save_pretrained(tmp_path / "int8")
        other = SelfAttnForSequenceClassification.from_pretrained(tmp_path / "int8")
        assert all(is_int8(x.weight) for x in linears(other.model).values())
        assert torch.equal(first_output(other.model), first_output(model.model))

    def test_the_encoder_alone_is_refused_from_a_head_s_folder(self, scheme, make, quantise, tmp_path):
        """transformers looks for each weight's step under its name with the prefix; half a model would be worse."""
        quantise(make("rotary"), scheme).save_pretrained(tmp_path / "int8")
        with pytest.raises(RuntimeError, match="automatic conversion of the weights"):
            AutoModel.from_pretrained(tmp_path / "int8")

    def test_the_encoder_saved_by_itself(self, scheme, make, quantise, tmp_path):
        model = quantise(make("rotary", SelfAttnModel), scheme)
        model.save_pretrained(tmp_path / "int8")
        assert torch.equal(first_output(AutoModel.from_pretrained(tmp_path / "int8")), first_output(model))


class TestInPlace:
    """`torchao.quantize_` on a model in memory, as after training."""

    def test_as_through_from_pretrained(self, choice, scheme, make, quantise):
        model = make(choice, SelfAttnModel)
        expected = first_output(quantise(model, scheme))
        quantize_(model, SCHEMES[scheme](set_inductor_config=False))
        assert torch.equal(first_output(model), expected)

    def test_on_the_encoder_a_tie_stays(self, scheme, make):
        model = make("rotary")
        quantize_(model.model, SCHEMES[scheme](set_inductor_config=False))
        assert model.lm_head.weight is model.model.embed_tokens.weight
        model.train()
        assert model(IDS, labels=IDS).loss.isfinite()

    def test_on_the_whole_model_the_head_is_a_copy_in_int8(self, scheme, make):
        """It has a table of its own then, and the loss in training lets it multiply itself."""
        model = make("rotary")
        expected = [model.train(mode)(IDS, labels=IDS).loss for mode in (True, False)]
        quantize_(model, SCHEMES[scheme](set_inductor_config=False))
        assert is_int8(model.lm_head.weight)
        assert not is_int8(model.model.embed_tokens.weight)
        actual = [model.train(mode)(IDS, labels=IDS).loss for mode in (True, False)]
        assert_close(actual[0], actual[1], "loss in training")
        assert (actual[0] - expected[0]).abs() <= 2 * HALF_STEP * len(linears(model)) * expected[0]


@pytest.mark.slow
def test_compiled_layers(scheme, make, quantise):
    model = quantise(make("rotary", SelfAttnModel), scheme)
    expected = first_output(model)
    model.compile_layers()
    # In another order a last bit may decide to which side a value is rounded.
    assert (first_output(model) - expected).abs().max() <= 2 * len(linears(model)) * HALF_STEP * expected.abs().max()
