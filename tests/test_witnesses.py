"""Equal weights, equal numbers, for everything that makes attention special: models of the installed transformers.

Float64 to 1e-10 where the peer computes in float64, or is brought to it; where it rounds to fp32, the table's.
"""

import pytest
import torch
import transformers
from torch.nn import functional as F
from transformers.models.big_bird import modeling_big_bird
from transformers.models.bloom import modeling_bloom
from transformers.models.gemma2 import modeling_gemma2
from transformers.models.gpt_oss import modeling_gpt_oss
from transformers.models.llama import modeling_llama
from transformers.models.stablelm import modeling_stablelm
from transformers.models.t5 import modeling_t5

from hf_selfattn import kernels_selfattn
from hf_selfattn.kernels_eager import attend as attend_eager
from hf_selfattn.packing import read_batch
from hf_selfattn.patterns import BigBird, Full
from hf_selfattn.positions import T5
from hf_selfattn.positions_relative import alibi_slopes
from hf_selfattn.scores import Scoring
from hf_selfattn.tiles import mask as tile_mask

from .peers import in_our_names, make_ours
from .tolerances import assert_close

_SIZES = {"vocab_size": 43, "hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 3}
_BERT = {**_SIZES, "intermediate_size": 20, "max_position_embeddings": 64, "pad_token_id": 1}
_NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
_LLAMA = {**_SIZES, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 20, "pad_token_id": 0}
_LLAMA |= {"max_position_embeddings": 32, "head_dim": 6}


@pytest.fixture(params=[torch.float64, torch.float32], ids=["float64", "float32"])
def dtype(request, monkeypatch):
    """In float64, peers that softmax in float32 do so in float64."""
    if request.param is torch.float64:
        softmax = F.softmax
        monkeypatch.setattr(F, "softmax", lambda x, dim=None, dtype=None, **kwargs: softmax(x, dim=dim))
    return request.param


@pytest.fixture(params=["eager", "sdpa", "selfattn"])
def kernel(request):
    return request.param


def draw_model(model, dtype=torch.float32):
    """In evaluation mode, with parameters at random, so that nothing that is forgotten stays 0 or 1."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += torch.randn(parameter.shape, generator=generator) * 0.1
    return model.to(dtype).eval()


def draw_ids(rows, length, seed=1):
    return torch.randint(4, 43, (rows, length), generator=torch.Generator().manual_seed(seed))


def padded(lengths, length, left=False):
    mask = torch.arange(length) < torch.tensor(lengths)[:, None]
    return mask.flip(1) if left else mask


def check(peer, ours, mask, given, ours_given=None, gradients=True):
    """Hidden states of all layers at real tokens, and the gradients of all weights that both have."""
    actual = ours(**(given if ours_given is None else ours_given), output_hidden_states=True)
    expected = peer(**given, output_hidden_states=True)
    for layer, (x, y) in enumerate(zip(actual.hidden_states, expected.hidden_states, strict=True)):
        assert_close(x[mask], y[mask], f"hidden states {layer}")
    assert_close(actual.last_hidden_state[mask], expected.last_hidden_state[mask], "last hidden state")
    if not gradients:
        return
    actual.last_hidden_state[mask].square().mean().backward()
    expected.last_hidden_state[mask].square().mean().backward()
    theirs = in_our_names(peer, {n: p.grad for n, p in peer.named_parameters() if p.grad is not None})
    compared = 0
    for name, parameter in ours.named_parameters():
        if name in theirs and parameter.grad is not None:
            assert_close(parameter.grad, theirs[name], f"gradient of {name}")
            compared += 1
    assert compared > 5 * ours.config.num_hidden_layers


# Longformer


class TestLongformer:
    def pair(self, dtype, kernel, windows=(4, 8, 12)):
        config = transformers.LongformerConfig(
            **_BERT, **_NO_DROPOUT, attention_window=list(windows), type_vocab_size=1, bos_token_id=0, eos_token_id=2
        )
        peer = draw_model(transformers.LongformerModel(config, add_pooling_layer=False), dtype)
        return peer, make_ours(peer, attn_implementation=kernel).to(dtype)

    def test_window_alone(self, dtype, kernel):
        peer, ours = self.pair(dtype, kernel)
        mask = padded([37, 20, 1], 37)
        ids = draw_ids(3, 37).masked_fill(~mask, 1)
        check(peer, ours, mask, {"input_ids": ids, "attention_mask": mask.long()})

    def test_global_tokens_with_their_own_projections(self, dtype, kernel):
        """A question's tokens in the first row, the first token in the second, two far apart in the third."""
        peer, ours = self.pair(dtype, kernel)
        mask = padded([37, 20, 30], 37)
        ids = draw_ids(3, 37).masked_fill(~mask, 1)
        is_global = torch.zeros_like(ids)
        is_global[0, :5] = is_global[1, 0] = is_global[2, 3] = is_global[2, 29] = 1
        given = {"input_ids": ids, "attention_mask": mask.long(), "global_attention_mask": is_global}
        check(peer, ours, mask, given)


# BigBird


class TestBigBird:
    """Stock BigBird's random blocks are drawn in training alone; in evaluation each of them is block 0, which is
    global anyway and so counts twice. It is sparse where a text has more than 5 + 2 * num_random_blocks blocks."""

    BLOCK, N = 4, 48

    def pair(self, dtype, kernel, **options):
        config = transformers.BigBirdConfig(
            **_BERT,
            **_NO_DROPOUT,
            attention_type="block_sparse",
            block_size=self.BLOCK,
            num_random_blocks=1,
            hidden_act="gelu",
        )
        peer = draw_model(transformers.BigBirdModel(config, add_pooling_layer=False), dtype)
        return peer, make_ours(peer, attn_implementation=kernel, **options).to(dtype)

    def test_window_and_global_blocks(self, dtype, kernel):
        """In evaluation: the weights of our first layer, once those of block 0 are counted twice."""
        peer, ours = self.pair(dtype, kernel, num_random_blocks=0)
        ids = draw_ids(2, self.N)
        with torch.no_grad():
            expected = peer(ids, output_attentions=True).attentions[0]
            actual = ours(ids, output_attentions=True).attentions[0]
        sparse = slice(self.BLOCK, -self.BLOCK)
        assert_close(actual[:, :, : self.BLOCK], expected[:, :, : self.BLOCK], "the first block's queries")
        assert_close(actual[:, :, -self.BLOCK :], expected[:, :, -self.BLOCK :], "the last block's queries")
        twice = 1 + actual[:, :, sparse, : self.BLOCK].sum(-1, keepdim=True)
        assert_close(actual[:, :, sparse] / twice, expected[:, :, sparse], "all others")

    def test_random_blocks_of_its_training(self, dtype, kernel, monkeypatch):
        """The peer in training without dropout, and ours with the blocks that the peer drew."""
        peer, ours = self.pair(dtype, kernel)
        drawn = []
        original = modeling_big_bird.BigBirdBlockSparseAttention._bigbird_block_rand_mask_with_head

        def watched(self, **kwargs):
            drawn.append(torch.stack([torch.as_tensor(x) for x in original(self, **kwargs)]).long())  # (H, n - 2, r)
            return list(drawn[-1].numpy())

        monkeypatch.setattr(
            modeling_big_bird.BigBirdBlockSparseAttention, "_bigbird_block_rand_mask_with_head", watched
        )
        peer.train()
        peer(draw_ids(1, self.N))
        tables = [F.pad(table, (0, 0, 1, 1)) for table in drawn]
        assert len(tables) == 3
        assert all(table[:, 1:-1].min() > 0 for table in tables), "no random block is the first one, which is global"

        def of_the_peer(self, number, head, own, count):
            head, own = torch.broadcast_tensors(torch.as_tensor(head).long(), own.long())
            return tables[self.layer][head, own.clamp(0, len(tables[self.layer][0]) - 1), number]

        monkeypatch.setattr(BigBird, "_random_block", of_the_peer)
        check(peer, ours, torch.ones(2, self.N, dtype=torch.bool), {"input_ids": draw_ids(2, self.N)})


# T5


class TestT5:
    def config(self, **options):
        return transformers.T5Config(
            vocab_size=43,
            d_model=24,
            d_kv=6,
            d_ff=20,
            num_layers=3,
            num_heads=3,
            dropout_rate=0.0,
            relative_attention_num_buckets=8,
            relative_attention_max_distance=20,
            **options,
        )

    @pytest.fixture(autouse=True)
    def exact_norm(self, monkeypatch):
        def forward(self, x):
            return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)

        monkeypatch.setattr(modeling_t5.T5LayerNorm, "forward", forward)

    @pytest.mark.parametrize("side", ["right", "left"])
    def test_encoder(self, dtype, kernel, side):
        peer = draw_model(transformers.T5EncoderModel(self.config()), dtype)
        ours = make_ours(peer, attn_implementation=kernel).to(dtype)
        mask = padded([37, 20, 1], 37, left=side == "left")
        given = {"input_ids": draw_ids(3, 37), "attention_mask": mask.long()}
        # T5's one table is shared by all layers.
        for layer in ours.layers[1:]:
            layer.attention.position.table = ours.layers[0].attention.position.table
        check(peer, ours, mask, given)

    @pytest.mark.parametrize("is_decoder", [False, True], ids=["both_directions", "causal"])
    @pytest.mark.parametrize(("buckets", "farthest"), [(8, 20), (32, 128), (16, 32), (4, 2)])
    def test_buckets(self, buckets, farthest, is_decoder):
        """Of every distance up to three times the farthest one."""
        distance = torch.arange(-3 * farthest, 3 * farthest + 1)
        expected = modeling_t5.T5Attention._relative_position_bucket(
            distance, bidirectional=not is_decoder, num_buckets=buckets, max_distance=farthest
        )
        if is_decoder and farthest <= buckets // 2:
            return  # refused by the config: the logarithm of 1
        assert torch.equal(T5(buckets, farthest, is_decoder).buckets(distance), expected)


# ALiBi


class TestAlibi:
    def test_mpt(self, kernel):
        """Its bias is slope * (key - last key): softmax does not see the difference. It softmaxes in fp32."""
        config = transformers.MptConfig(vocab_size=43, d_model=24, n_layers=3, n_heads=3, max_seq_len=64)
        peer = draw_model(transformers.MptModel(config))
        ours = make_ours(peer, attn_implementation=kernel)
        mask = padded([37, 20, 1], 37)
        check(peer, ours, mask, {"input_ids": draw_ids(3, 37), "attention_mask": mask.long()})

    @pytest.mark.parametrize("heads", range(1, 17))
    def test_slopes_of_bloom(self, heads):
        """The bias of the key at position 1 is the slope."""
        bias = modeling_bloom.build_alibi_tensor(torch.ones(1, 2), heads, torch.float64)
        assert_close(torch.tensor(alibi_slopes(heads)), bias[:, 0, 1].float())


# Transformer-XL


class TestXLNet:
    """Relative attention with memory, in one direction (attn_type "uni"); its sinusoids are fp32."""

    def pair(self, kernel, mem_len):
        config = transformers.XLNetConfig(
            vocab_size=43,
            d_model=24,
            n_layer=3,
            n_head=3,
            d_inner=20,
            attn_type="uni",
            mem_len=mem_len,
            dropout=0.0,
            ff_activation="gelu",
        )
        peer = draw_model(transformers.XLNetModel(config))
        return peer, make_ours(peer, attn_implementation=kernel)

    @pytest.mark.parametrize("mem_len", [7, 40])
    def test_three_segments(self, kernel, mem_len):
        peer, ours = self.pair(kernel, mem_len)
        ids, mems, memory = draw_ids(2, 33), None, None
        for begin in range(0, 33, 11):
            part = ids[:, begin : begin + 11]
            expected = peer(part, mems=mems, use_mems=True, output_hidden_states=True)
            actual = ours(part, memory=memory, output_hidden_states=True)
            for layer, (x, y) in enumerate(zip(actual.hidden_states, expected.hidden_states, strict=True)):
                assert_close(x, y, f"hidden states {layer} of the segment at {begin}")
            mems, memory = expected.mems, actual.memory
            for kept, theirs in zip(memory.hidden_states, mems, strict=False):
                assert_close(kept, theirs.transpose(0, 1), "memory")
        expected.last_hidden_state.square().mean().backward()
        actual.last_hidden_state.square().mean().backward()
        theirs = in_our_names(peer, {n: p.grad for n, p in peer.named_parameters() if p.grad is not None})
        for name, parameter in ours.named_parameters():
            assert_close(parameter.grad, theirs[name], f"gradient of {name}")


# Rotary


ROPES = {
    "default": {"rope_type": "default", "rope_theta": 500.0},
    "linear": {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 500.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    "yarn": {
        "rope_type": "yarn",
        "rope_theta": 500.0,
        "factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    "yarn-every_number": {
        "rope_type": "yarn",
        "rope_theta": 500.0,
        "factor": 4.0,
        "original_max_position_embeddings": 16,
        "beta_fast": 16.0,
        "beta_slow": 2.0,
        "mscale": 0.7,
        "mscale_all_dim": 0.5,
        "truncate": False,
    },
    "yarn-attention_factor": {
        "rope_type": "yarn",
        "rope_theta": 500.0,
        "factor": 4.0,
        "original_max_position_embeddings": 16,
        "attention_factor": 1.3,
    },
}


@pytest.mark.parametrize("rope", ROPES)
def test_llama(rope, kernel):
    """Grouped heads, RMS norm, gated feed-forward, causal; it rotates and norms in fp32."""
    config = transformers.LlamaConfig(**_LLAMA, rope_parameters=ROPES[rope])
    peer = draw_model(transformers.LlamaModel._from_config(config, attn_implementation="eager"))
    ours = make_ours(peer, attn_implementation=kernel)
    mask = padded([37, 20, 1], 37)
    check(peer, ours, mask, {"input_ids": draw_ids(3, 37), "attention_mask": mask.long()})


@pytest.mark.parametrize("rope", ROPES)
def test_tables_of_llama(rope):
    """cos and sin at each position."""
    config = transformers.LlamaConfig(**_LLAMA, rope_parameters=dict(ROPES[rope]))
    ours = make_ours(transformers.LlamaModel(config))
    position_ids = torch.arange(64)[None]
    cos, sin = modeling_llama.LlamaRotaryEmbedding(config)(torch.zeros(1, 64, 1), position_ids)
    tokens = read_batch(1, 64, torch.device("cpu")).tokens
    ((_, setting),) = ours.distinct_settings
    ((our_cos, our_sin), _) = setting.state(tokens, tokens, torch.float32)
    assert_close(our_cos[..., 0, :].repeat(1, 1, 2), cos)
    assert_close(our_sin[..., 0, :].repeat(1, 1, 2), sin)


@pytest.mark.parametrize("factor", [0.25, 0.5, 0.75])
def test_stablelm(factor, kernel):
    """Partial rotation: a part of each head's features is turned."""
    sizes = {**_LLAMA, "hidden_size": 32}
    del sizes["head_dim"]
    config = transformers.StableLmConfig(
        **sizes, rope_parameters={"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": factor}
    )
    peer = draw_model(modeling_stablelm.StableLmModel._from_config(config, attn_implementation="eager"))
    ours = make_ours(peer, attn_implementation=kernel)
    mask = padded([37, 20, 1], 37)
    check(peer, ours, mask, {"input_ids": draw_ids(3, 37), "attention_mask": mask.long()})


# Query-key norm, soft cap, sinks


def test_qwen3(kernel):
    """The norm of query and key in each head, before rotation."""
    config = transformers.Qwen3Config(**_LLAMA)
    peer = draw_model(transformers.Qwen3Model._from_config(config, attn_implementation="eager"))
    ours = make_ours(peer, attn_implementation=kernel)
    mask = padded([37, 20, 1], 37)
    check(peer, ours, mask, {"input_ids": draw_ids(3, 37), "attention_mask": mask.long()})


def draw_attention(dtype, rows=2, length=150):
    generator = torch.Generator().manual_seed(0)
    shapes = [(4, 6), (2, 6), (2, 5)]
    return [torch.randn(rows, length, *s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes]


def both_kernels(query, key, value, scoring):
    """The dense definition and the tiled kernel."""
    packing = read_batch(*query.shape[:2], torch.device("cpu"))
    tiles = tile_mask(Full(), packing.tokens, packing.tokens, packing, range(4), None)
    yield attend_eager(query, key, value, None, scoring)[0]
    yield kernels_selfattn.attend(query, key, value, tiles, scoring)[0]


class _Module(torch.nn.Module):
    num_key_value_groups = 2


def test_soft_cap_of_gemma2(dtype):
    query, key, value = draw_attention(dtype)
    expected, _ = modeling_gemma2.eager_attention_forward(
        _Module(), *(x.transpose(1, 2) for x in (query, key, value)), None, scaling=0.7, softcap=1.5
    )
    for heads in both_kernels(query, key, value, Scoring("scaled_dot_product", (0.7,), softcap=1.5)):
        assert_close(heads, expected)


def test_sinks_of_gpt_oss(dtype):
    query, key, value = draw_attention(dtype)
    module = _Module().eval()
    module.sinks = torch.nn.Parameter(torch.tensor([0.5, -1.0, 3.0, 0.0], dtype=dtype))
    expected, _ = modeling_gpt_oss.eager_attention_forward(
        module, *(x.transpose(1, 2) for x in (query, key, value)), None, scaling=0.7
    )
    for heads in both_kernels(query, key, value, Scoring("scaled_dot_product", (0.7,), sink=module.sinks)):
        assert_close(heads, expected)
