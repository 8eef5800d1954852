"""Memory: a text read segment by segment gives what it gives when it is read whole."""

import pytest
import torch

from hf_selfattn import POSITIONS, SelfAttnForMaskedLM, SelfAttnForSequenceClassification, unsupported_reasons

from .small_tiles import use_small_tiles
from .tolerances import assert_close

pytestmark = pytest.mark.usefixtures("uncompiled")

N, LAYERS = 23, 2

RELATIVE = [name for name, cls in POSITIONS.items() if cls.relative]

SEGMENTS = {
    "one": [23],
    "halves": [12, 11],
    "uneven": [5, 1, 9, 8],
    "tokens": [1] * 23,
}


def draw_ids(rows=2, length=N):
    return torch.randint(43, (rows, length), generator=torch.Generator().manual_seed(0))


def read_in_segments(model, ids, lengths, mask=None, **inputs):
    """The hidden states of all segments, and the memory after the last."""
    memory, hidden_states = None, []
    for begin, length in zip([sum(lengths[:i]) for i in range(len(lengths))], lengths, strict=True):
        part = slice(begin, begin + length)
        given = {"attention_mask": None if mask is None else mask[:, part], **inputs}
        outputs = model(ids[:, part], memory=memory, **given)
        memory = outputs.memory
        hidden_states.append(outputs.last_hidden_state)
    return torch.cat(hidden_states, dim=1), memory


def unlimited(make_config, position="rotary", memory_length=N, **options):
    return make_config(causal=True, position=position, memory_length=memory_length, **options)


@pytest.fixture(params=RELATIVE)
def relative(request):
    return request.param


class TestSegmentsEqualWhole:
    @pytest.mark.parametrize("segments", SEGMENTS)
    def test_memory_of_everything(self, relative, segments, make_config, make_model):
        model, ids = make_model(unlimited(make_config, relative)), draw_ids()
        with torch.no_grad():
            whole = model(ids).last_hidden_state
            assert_close(read_in_segments(model, ids, SEGMENTS[segments])[0], whole)

    @pytest.mark.parametrize("segments", ["halves", "uneven"])
    def test_window_within_the_memory(self, relative, segments, make_config, make_model):
        """A causal window of 4 tokens and a memory of 4: each layer sees as far as it would in the whole text."""
        config = unlimited(make_config, relative, memory_length=4, pattern="sliding_window", window_radius=4)
        model, ids = make_model(config), draw_ids()
        with torch.no_grad():
            states, memory = read_in_segments(model, ids, SEGMENTS[segments])
            assert_close(states, model(ids).last_hidden_state)
        assert memory.tokens.position.shape == (2, 4)

    def test_on_every_kernel(self, relative, kernel, make_config, make_model):
        config = unlimited(make_config, relative)
        if unsupported_reasons(config, kernel, training=False):
            with pytest.raises(ValueError, match="Use attn_implementation="):
                make_model(config, kernel)
            return
        model, ids = make_model(config, kernel), draw_ids()
        with torch.no_grad():
            assert_close(read_in_segments(model, ids, SEGMENTS["uneven"])[0], make_model(config)(ids)[0])

    @pytest.mark.parametrize("segments", ["halves", "uneven"])
    def test_over_several_tiles(self, relative, segments, monkeypatch, make_config, make_model):
        """Memory and segment begin and end within tiles."""
        config = unlimited(make_config, relative, memory_length=9, pattern="sliding_window", window_radius=7)
        whole = make_model(config)(draw_ids()).last_hidden_state
        use_small_tiles(monkeypatch)
        model = make_model(config, "selfattn")
        with torch.no_grad():
            assert_close(read_in_segments(model, draw_ids(), SEGMENTS[segments])[0], whole)

    def test_every_score(self, score, relative, make_config, make_model):
        config = unlimited(make_config, relative, score=score, qk_norm=True, logit_softcap=5.0, attention_sink=True)
        model, ids = make_model(config), draw_ids()
        with torch.no_grad():
            assert_close(read_in_segments(model, ids, SEGMENTS["uneven"])[0], model(ids).last_hidden_state)

    def test_longformer_keeps_its_global_tokens(self, make_config, make_model):
        config = unlimited(make_config, pattern="longformer", window_radius=3, num_global_tokens=2)
        model, ids = make_model(config), draw_ids()
        with torch.no_grad():
            assert_close(read_in_segments(model, ids, SEGMENTS["uneven"])[0], model(ids).last_hidden_state)

    def test_longformer_with_tokens_of_the_users_choice(self, make_config, make_model):
        config = unlimited(make_config, pattern="longformer", window_radius=2, num_global_tokens=0)
        model, ids = make_model(config), draw_ids()
        is_global = torch.zeros(2, N, dtype=torch.long)
        is_global[0, [3, 11]] = is_global[1, 7] = 1
        memory, states = None, []
        with torch.no_grad():
            whole = model(ids, global_attention_mask=is_global).last_hidden_state
            for part in (slice(0, 8), slice(8, N)):
                outputs = model(ids[:, part], global_attention_mask=is_global[:, part], memory=memory)
                memory = outputs.memory
                states.append(outputs.last_hidden_state)
        assert_close(torch.cat(states, dim=1), whole)

    @pytest.mark.parametrize("named", [0, 1], ids=["first_segment", "second_segment"])
    def test_global_tokens_named_in_one_segment(self, named, make_config, make_model):
        """Without a mask no token of that segment was chosen; those of the other are global all the same."""
        config = unlimited(make_config, pattern="longformer", window_radius=2, num_global_tokens=0)
        model, ids, parts = make_model(config), draw_ids(), [slice(0, 8), slice(8, N)]
        is_global = torch.zeros(2, N, dtype=torch.long)
        is_global[:, 3 + 8 * named] = 1
        given = [{"global_attention_mask": is_global[:, part]} if i == named else {} for i, part in enumerate(parts)]
        with torch.no_grad():
            whole = model(ids, global_attention_mask=is_global).last_hidden_state
            memory = model(ids[:, parts[0]], **given[0]).memory
            second = model(ids[:, parts[1]], memory=memory, **given[1]).last_hidden_state
        assert_close(second, whole[:, 8:])

    def test_rows_of_different_length(self, relative, make_config, make_model):
        """The last segment is padded: on the right, on the left, with a hole; one row ended a segment earlier."""
        model, ids = make_model(unlimited(make_config, relative)), draw_ids(rows=4, length=20)
        mask = torch.ones(4, 20, dtype=torch.bool)
        mask[0, 17:] = mask[1, 10:14] = mask[2, 12] = mask[3, 10:] = False
        with torch.no_grad():
            states, memory = read_in_segments(model, ids, [10, 10], mask)
            for row in range(4):
                alone = model(ids[row : row + 1, mask[row]]).last_hidden_state[0]
                assert_close(states[row, mask[row]], alone, f"row {row}")
                assert memory.tokens.position[row].max() == mask[row].sum() - 1
        assert (states[~mask] == 0).all()

    def test_padding_between_segments(self, relative, make_config, make_model):
        """What a padded segment leaves in the memory is its real tokens, and the text goes on after them."""
        model, ids = make_model(unlimited(make_config, relative)), draw_ids(rows=3, length=24)
        mask = torch.ones(3, 24, dtype=torch.bool)
        mask[0, 5:8] = mask[1, 8:12] = mask[2, :8] = False
        with torch.no_grad():
            states, _ = read_in_segments(model, ids, [8, 8, 8], mask)
            for row in range(3):
                assert_close(states[row, mask[row]], model(ids[row : row + 1, mask[row]]).last_hidden_state[0])


class TestWhatIsRemembered:
    def test_what_entered_each_layer(self, make_config, make_model):
        model, ids = make_model(unlimited(make_config, memory_length=5)), draw_ids()
        outputs = model(ids, output_hidden_states=True)
        assert len(outputs.memory.hidden_states) == LAYERS
        for kept, entered in zip(outputs.memory.hidden_states, outputs.hidden_states[:LAYERS], strict=True):
            assert_close(kept, entered[:, -5:])
        assert torch.equal(outputs.memory.tokens.position, torch.arange(18, 23).expand(2, -1))

    def test_it_grows_up_to_memory_length(self, make_config, make_model):
        model, ids, memory, lengths = make_model(unlimited(make_config, memory_length=12)), draw_ids(), None, []
        for begin in range(0, 20, 5):
            memory = model(ids[:, begin : begin + 5], memory=memory).memory
            lengths.append(memory.hidden_states[0].shape[1])
        assert lengths == [5, 10, 12, 12]
        assert torch.equal(memory.tokens.position, torch.arange(8, 20).expand(2, -1))

    def test_no_memory_without_memory_length(self, make_config, make_model):
        assert make_model(make_config(causal=True))(draw_ids()).memory is None

    def test_no_gradient_flows_through_it(self, make_config, make_model):
        model, ids = make_model(unlimited(make_config)), draw_ids()
        first = model.embed_tokens(ids[:, :12]).detach().requires_grad_()
        memory = model(inputs_embeds=first).memory
        assert not any(x.requires_grad for x in memory.hidden_states)
        second = model.embed_tokens(ids[:, 12:]).detach().requires_grad_()
        model(inputs_embeds=second, memory=memory).last_hidden_state.square().sum().backward()
        assert first.grad is None
        assert second.grad.abs().max() > 0

    def test_gradients_of_parameters_reach_the_projections_of_the_memory(self, kernel, make_config, make_model):
        """Keys and values of remembered states are projected again: equal to dense attention over both."""
        if unsupported_reasons(unlimited(make_config), kernel, device_type="cpu", training=True):
            return  # refused: test_reference_encoder.py
        gradients = []
        for name in (kernel, "eager"):
            model = make_model(unlimited(make_config), name)
            memory = model(draw_ids()[:, :12]).memory
            model(draw_ids()[:, 12:], memory=memory).last_hidden_state.square().sum().backward()
            gradients.append({name: x.grad for name, x in model.named_parameters()})
        for name, gradient in gradients[0].items():
            assert_close(gradient, gradients[1][name], name)

    def test_a_shorter_memory_forgets(self, make_config, make_model):
        """With plain causal attention by design: what is forgotten is not seen; and only from then on."""
        short = make_model(unlimited(make_config, memory_length=4))
        ids = draw_ids()
        with torch.no_grad():
            whole = short(ids).last_hidden_state
            states, _ = read_in_segments(short, ids, [4, 4, 15])
        assert_close(states[:, :8], whole[:, :8])
        assert (states[:, 8:] - whole[:, 8:]).abs().max() > 1e-3

    def test_a_window_wider_than_the_memory_forgets(self, make_config, make_model):
        config = unlimited(make_config, memory_length=4, pattern="sliding_window", window_radius=5)
        model, ids = make_model(config), draw_ids()
        with torch.no_grad():
            assert (read_in_segments(model, ids, [12, 11])[0] - model(ids)[0]).abs().max() > 1e-3

    def test_the_memory_given_is_not_changed(self, make_config, make_model):
        model, ids = make_model(unlimited(make_config)), draw_ids()
        memory = model(ids[:, :12]).memory
        before = [x.clone() for x in (*memory.hidden_states, *memory.tokens[:3])]
        model(ids[:, 12:], memory=memory)
        assert all(torch.equal(x, y) for x, y in zip((*memory.hidden_states, *memory.tokens[:3]), before, strict=True))

    def test_as_a_tuple(self, make_config, make_model):
        model = make_model(unlimited(make_config))
        assert torch.equal(
            model(draw_ids(), return_dict=False)[1].hidden_states[0], model(draw_ids())[1].hidden_states[0]
        )


class TestRefusals:
    def test_memory_without_memory_length(self, make_config, make_model):
        memory = make_model(unlimited(make_config))(draw_ids()).memory
        with pytest.raises(ValueError, match=r"memory goes with memory_length > 0, got memory_length=0\. Set it in"):
            make_model(make_config(causal=True, position="rotary"))(draw_ids(), memory=memory)

    def test_memory_of_another_number_of_texts(self, make_config, make_model):
        model = make_model(unlimited(make_config))
        memory = model(draw_ids()).memory
        with pytest.raises(ValueError, match=r"memory is of 2 texts and the batch of 3\. Pass the memory of the same"):
            model(draw_ids(rows=3), memory=memory)

    @pytest.mark.parametrize(
        "inputs",
        [
            {"attention_mask": torch.ones(2, N, N, dtype=torch.bool)},
            {"position_ids": torch.arange(N).expand(2, -1) % 10},
            {"cu_seq_lens_q": torch.tensor([0, 10, 30])},
        ],
        ids=["mask_of_pairs", "restarting_positions", "boundaries"],
    )
    def test_what_memory_does_not_go_with(self, inputs, make_config, make_model):
        with pytest.raises(
            ValueError, match=r"memory_length goes with SelfAttnModel, one document.*Set memory_length=0"
        ):
            make_model(unlimited(make_config))(draw_ids(), **inputs)

    @pytest.mark.parametrize("cls", [SelfAttnForMaskedLM, SelfAttnForSequenceClassification])
    def test_heads(self, cls, make_config, make_model):
        with pytest.raises(
            ValueError, match=r"memory_length goes with SelfAttnModel.*got a head.*Set memory_length=0"
        ):
            make_model(unlimited(make_config), cls=cls)(draw_ids())
