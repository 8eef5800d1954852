"""Patterns: what each sees, where its numbers come from, and a new one in five lines."""

from dataclasses import dataclass

import pytest
import torch

from hf_selfattn import KERNELS, PATTERNS, Pattern, register_pattern, unsupported_reasons
from hf_selfattn.masks import allowed, visible
from hf_selfattn.packing import read_batch
from hf_selfattn.patterns import BigBird, Full, Longformer, SlidingWindow, layer_patterns

from . import reference
from .tolerances import assert_close

pytestmark = pytest.mark.usefixtures("uncompiled")

PICTURES = {
    "full": (
        Full(),
        """
        1 1 1 1 1
        1 1 1 1 1
        1 1 1 1 1
        1 1 1 1 1
        1 1 1 1 1
        """,
    ),
    "full-causal": (
        Full(causal=True),
        """
        1 . . . .
        1 1 . . .
        1 1 1 . .
        1 1 1 1 .
        1 1 1 1 1
        """,
    ),
    "sliding_window-radius_1": (
        SlidingWindow(window_radius=1),
        """
        1 1 . . .
        1 1 1 . .
        . 1 1 1 .
        . . 1 1 1
        . . . 1 1
        """,
    ),
    "sliding_window-radius_2-causal": (
        SlidingWindow(window_radius=2, causal=True),
        """
        1 . . . .
        1 1 . . .
        1 1 1 . .
        . 1 1 1 .
        . . 1 1 1
        """,
    ),
    "sliding_window-radius_1-dilation_2": (
        SlidingWindow(window_radius=1, dilation=2),
        """
        1 . 1 . .
        . 1 . 1 .
        1 . 1 . 1
        . 1 . 1 .
        . . 1 . 1
        """,
    ),
    "longformer-radius_1-one_global": (
        Longformer(window_radius=1, num_global_tokens=1),
        """
        1 1 1 1 1
        1 1 1 . .
        1 1 1 1 .
        1 . 1 1 1
        1 . . 1 1
        """,
    ),
    "longformer-causal": (
        Longformer(window_radius=1, num_global_tokens=1, causal=True),
        """
        1 . . . .
        1 1 . . .
        1 1 1 . .
        1 . 1 1 .
        1 . . 1 1
        """,
    ),
    "bigbird-blocks_of_1-both_ends": (
        BigBird(block_size=1, block_radius=0, num_global_blocks=2, num_random_blocks=0),
        """
        1 1 1 1 1
        1 1 . . 1
        1 . 1 . 1
        1 . . 1 1
        1 1 1 1 1
        """,
    ),
    "bigbird-blocks_of_2-window": (
        BigBird(block_size=2, block_radius=1, num_global_blocks=0, num_random_blocks=0),
        """
        1 1 1 1 .
        1 1 1 1 .
        1 1 1 1 1
        1 1 1 1 1
        . . 1 1 1
        """,
    ),
}


@pytest.mark.parametrize("picture", PICTURES)
def test_picture(picture):
    pattern, drawn = PICTURES[picture]
    tokens = read_batch(1, 5, torch.device("cpu")).tokens
    seen = allowed(pattern, tokens, tokens, range(1))[0, 0]
    assert [["." if not s else "1" for s in row] for row in seen] == [
        row.split() for row in drawn.strip().splitlines()
    ]


def test_pattern_equals_slow_loop(pattern, causal, make_config):
    """Over documents, padding and a hole, for each head."""
    config = make_config(pattern=pattern, causal=causal)
    real = torch.rand(2, 19, generator=torch.Generator().manual_seed(0)) < 0.7
    cu_seq_lens = [0, 8, 9, 19, 30]
    tokens = read_batch(2, 19, torch.device("cpu"), real, None, torch.tensor(cu_seq_lens)).tokens
    places = reference.stand(2, 19, real, None, cu_seq_lens)
    for layer, made in enumerate(layer_patterns(config)):
        options = reference.layer_options(config, layer)
        seen = allowed(made, tokens, tokens, range(4)).expand(2, 4, 19, 19)
        expected = [
            [[[reference.sees(q, k, pattern, causal, head, options) for k in row] for q in row] for head in range(4)]
            for row in places
        ]
        assert torch.equal(seen, torch.tensor(expected))


def test_random_blocks_are_spread_and_fixed():
    """Each query block sees one random block in each head: all of them equally often, the same whenever asked."""
    random_only = BigBird(block_size=1, block_radius=0, num_global_blocks=0, num_random_blocks=1, seed=3)
    tokens = read_batch(1, 16, torch.device("cpu")).tokens
    heads = range(400)
    seen = allowed(random_only, tokens, tokens, heads)[0]
    assert torch.equal(seen, allowed(random_only, tokens, tokens, heads)[0])
    others = seen & ~torch.eye(16, dtype=torch.bool)
    assert (others.sum(-1) <= 1).all()
    share = others.double().sum((0, 1)) / others.sum()
    assert ((share - 1 / 16).abs() < 0.01).all()
    for other in ({"seed": 4}, {"layer": 1}):
        changed = BigBird(**{**vars(random_only), **other})
        assert not torch.equal(allowed(changed, tokens, tokens, heads)[0], seen)


def test_global_tokens_of_the_user(kernel, make_config, make_model):
    """global_attention_mask makes any token global, in its own document alone."""
    config = make_config(pattern="longformer", position="rotary", num_global_tokens=0, window_radius=1)
    model, ids = make_model(config, kernel), torch.arange(12)[None]
    is_global = torch.zeros(1, 12, dtype=torch.long)
    is_global[0, [2, 9]] = 1
    documents = {"cu_seq_lens_q": torch.tensor([0, 7, 12])}
    with torch.no_grad():
        outputs = model(ids, global_attention_mask=is_global, **documents).last_hidden_state[0]
    parameters = {name: x.detach() for name, x in model.named_parameters()}
    for start, end in [(0, 7), (7, 12)]:
        embeds, chosen = parameters["embed_tokens.weight"][start:end], is_global[0, start:end].bool().tolist()
        expected = reference.encode(config, parameters, embeds, is_global=chosen)
        assert_close(outputs[start:end], expected.hidden_states[-1])


def test_pattern_reads_no_indices(pattern, causal, make_config):
    """Asked about one pair at a time it says what it says about all of them at once."""
    made = layer_patterns(make_config(pattern=pattern, causal=causal))[0]
    tokens = read_batch(1, 9, torch.device("cpu")).tokens
    seen = allowed(made, tokens, tokens, range(4))
    for head in range(4):
        for q in range(9):
            for k in range(9):
                one = visible(made, torch.tensor(head), tokens.at((0, q)), tokens.at((0, k)))
                assert bool(one) == bool(seen.expand(1, 4, 9, 9)[0, head, q, k])


def test_window_as_wide_as_the_text_is_full(kernel, causal, make_config, make_model):
    ids = torch.randint(43, (2, 9), generator=torch.Generator().manual_seed(0))
    full = make_model(make_config("scaled_dot_product", "full", causal, "rotary"), kernel)
    wide = make_model(make_config("scaled_dot_product", "sliding_window", causal, "rotary", window_radius=8), kernel)
    with torch.no_grad():
        assert_close(wide(ids).last_hidden_state, full(ids).last_hidden_state)


def test_each_layer_has_its_own_pattern(kernel, make_config, make_model):
    names = ["full", "sliding_window", "sliding_window", "full"]
    config = make_config(pattern=names, num_hidden_layers=4, window_radius=[None, 1, 3, None])
    ids = torch.randint(43, (1, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        attentions = make_model(config, kernel)(ids, output_attentions=True).attentions
    distance = (torch.arange(9)[:, None] - torch.arange(9)).abs()
    for weights, radius in zip(attentions, [9, 1, 3, 9], strict=True):
        assert torch.equal(weights[0] > 0, (distance <= radius).expand(4, 9, 9))


def test_layers_of_one_pattern_share_a_mask(make_config, make_model, monkeypatch):
    """A mask is made once a forward for each distinct pattern, not once a layer."""
    made = []
    eager = KERNELS["eager"]
    counting = eager._replace(mask=lambda pattern, *args: made.append(pattern) or eager.mask(pattern, *args))
    monkeypatch.setitem(KERNELS, "eager", counting)
    names = ["full", "sliding_window", "sliding_window", "full", "sliding_window"]
    config = make_config(pattern=names, num_hidden_layers=5, window_radius=[None, 1, 3, None, 1])
    make_model(config)(torch.zeros(1, 4, dtype=torch.long))
    assert made == [Full(), SlidingWindow(window_radius=1), SlidingWindow(window_radius=3)]


@pytest.mark.parametrize("radius", [None, 0, -1, 1.5, "3", True], ids=str)
def test_refused_radius(radius):
    with pytest.raises(
        ValueError, match=f"needs window_radius .* as an integer >= 1, got {radius!r}. Set window_radius"
    ):
        SlidingWindow(window_radius=radius)


def test_taken_name_is_refused():
    register_pattern("full", Full)
    with pytest.raises(ValueError, match=r"attention_pattern 'full' is taken by Full\. Choose another name"):
        register_pattern("full", SlidingWindow)
    assert PATTERNS["full"] is Full


# A pattern of one's own


@dataclass(frozen=True, kw_only=True)
class EveryOther(Pattern):
    def sees(self, head, query, key):
        return (query.position - key.position) % 2 == 0


@dataclass(frozen=True, kw_only=True)
class OneDistancePerHead(Pattern):
    per_head = True

    def sees(self, head, query, key):
        return (query.position - key.position).abs() <= head


OWN = {
    "every_other": (EveryOther, lambda query, key, head, options: (query.position - key.position) % 2 == 0),
    "one_distance_per_head": (
        OneDistancePerHead,
        lambda query, key, head, options: abs(query.position - key.position) <= head,
    ),
}


@pytest.fixture(params=OWN)
def own(request):
    cls, slow_loop = OWN[request.param]
    register_pattern(request.param, cls)
    reference.PATTERNS[request.param] = slow_loop
    yield request.param
    del PATTERNS[request.param], reference.PATTERNS[request.param]


def test_own_pattern_on_every_kernel(own, causal, kernel, make_config, make_model):
    config = make_config(pattern=own, causal=causal, position="rotary")
    assert unsupported_reasons(config, kernel, training=False) == []
    model = make_model(config, kernel)
    ids = torch.randint(43, (2, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1] * 9, [0, 0, 1, 1, 1, 0, 1, 1, 0]])
    with torch.no_grad():
        outputs = model(ids, attention_mask=mask).last_hidden_state
        attentions = model(ids, attention_mask=mask, output_attentions=True).attentions
    parameters = {name: x.detach() for name, x in model.named_parameters()}
    for row in range(2):
        real = mask[row].bool()
        expected = reference.encode(config, parameters, parameters["embed_tokens.weight"][ids[row, real]])
        assert_close(outputs[row, real], expected.hidden_states[-1])
        for weights, slow_weights in zip(attentions, expected.attentions, strict=True):
            assert_close(weights[row][:, real][..., real], slow_weights)
