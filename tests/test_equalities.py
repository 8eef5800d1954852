"""What may not make a difference: other texts in the batch, batches before, packing, the mode; over several tiles.

At a few tokens the same is tested for every position in test_numerics.py and test_packing.py.
"""

import pytest
import torch

from hf_selfattn import unsupported_reasons
from hf_selfattn.patterns import BigBird

from .tolerances import assert_close

pytestmark = pytest.mark.usefixtures("uncompiled")

LENGTHS = [150, 65, 1]

PATTERNS = {
    "full": {"pattern": "full"},
    "sliding_window": {"pattern": "sliding_window", "window_radius": 20},
    "dilated-causal": {"pattern": "sliding_window", "causal": True, "window_radius": 9, "dilation": 3},
    "longformer": {"pattern": "longformer", "window_radius": 20},
    "bigbird": {"pattern": "bigbird", "block_size": 8, "num_global_blocks": 2, "num_random_blocks": 3},
    "bigbird-causal-random_blocks_alone": {
        "pattern": "bigbird",
        "causal": True,
        "block_size": 8,
        "block_radius": 0,
        "num_global_blocks": 0,
        "num_random_blocks": 3,
    },
}


@pytest.fixture(params=PATTERNS)
def model(request, kernel, make_config, make_model):
    """Two layers of each pattern on each kernel."""
    return make_model(make_config(position="rotary", **PATTERNS[request.param]), kernel)


@torch.no_grad()
def alone(model, documents):
    return [model(document[None]).last_hidden_state[0] for document in documents]


def draw_documents(lengths=LENGTHS):
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(43, (n,), generator=generator) for n in lengths]


@torch.no_grad()
def test_batch_equals_alone(form, model, lay_out):
    """Padded on each side, with holes, packed in both ways: random blocks, too, are those of the text alone."""
    documents, layout = draw_documents(), lay_out(form, LENGTHS)
    outputs = model(layout.put(documents), **layout.inputs).last_hidden_state
    for document, (actual, expected) in enumerate(zip(layout.take(outputs), alone(model, documents), strict=True)):
        assert_close(actual, expected, f"document {document}")


@torch.no_grad()
def test_batches_before_and_the_mode_do_not_matter(model):
    """Short, long, short: nothing turns to full attention, and training without dropout is evaluation."""
    kernel = model.config._attn_implementation
    trains = not unsupported_reasons(model.config, kernel, device_type="cpu", training=True)
    short, long = draw_documents([9])[0][None], draw_documents([150])[0][None]
    of_long, of_short = model(long).last_hidden_state, model(short).last_hidden_state
    for _ in range(2):
        model(short)
        assert torch.equal(model.train(trains)(long).last_hidden_state, of_long)
        assert torch.equal(model.eval()(short).last_hidden_state, of_short)
        model(long[:, :1])
        assert torch.equal(model(long).last_hidden_state, of_long)


class TestRandomBlocks:
    BLOCKS = 64

    def drawn(self, heads=48, layers=6, numbers=3, seed=0):
        """(layers, numbers, heads, query blocks) -> random block, of a text of 64 blocks."""
        head, own = torch.arange(heads)[:, None], torch.arange(self.BLOCKS)
        count = torch.tensor(self.BLOCKS)
        return torch.stack(
            [
                torch.stack([pattern._random_block(n, head, own, count) for n in range(numbers)])
                for pattern in (BigBird(layer=layer, seed=seed) for layer in range(layers))
            ]
        )

    def test_they_are_blocks_of_the_text(self):
        drawn = self.drawn()
        assert (drawn.min(), drawn.max()) == (0, self.BLOCKS - 1)

    @pytest.mark.parametrize("seed", [0, 1, 12345])
    def test_every_block_is_as_likely(self, seed):
        """864 query blocks × heads each: χ² over 64 blocks is 63 ± 11, of all, and of each layer and number."""
        for drawn in (*self.drawn(seed=seed).flatten(0, 1), self.drawn(seed=seed)):
            expected = drawn.numel() / self.BLOCKS
            chi2 = ((torch.bincount(drawn.flatten(), minlength=self.BLOCKS) - expected) ** 2 / expected).sum()
            assert 63 - 5 * 11.3 < chi2 < 63 + 5 * 11.3

    @pytest.mark.parametrize("block", [0, 1, 63])
    def test_heads_do_not_follow_each_other(self, block):
        """For one query block, the step from one head's block to the next one's is not always the same."""
        for drawn in self.drawn()[..., block].flatten(0, 1):
            steps = drawn.diff() % self.BLOCKS
            assert torch.bincount(steps).max() < 10

    def test_layers_numbers_and_seeds_draw_for_themselves(self):
        """Two draws agree in about one of 64 places."""
        drawn = torch.cat([self.drawn(seed=seed).flatten(0, 1) for seed in (0, 1, 2)]).flatten(1)
        for i in range(len(drawn)):
            for j in range(i):
                assert (drawn[i] == drawn[j]).double().mean() < 3 / self.BLOCKS
