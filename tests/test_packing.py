"""Documents and padding: found as the slow loop finds them, blind to each other, and 0 in every public output."""

import pytest
import torch

from hf_selfattn import (
    SelfAttnForMaskedLM,
    SelfAttnForQuestionAnswering,
    SelfAttnForTokenClassification,
    kernels_rows,
    unsupported_reasons,
)
from hf_selfattn.packing import FILLED, read_batch

from . import reference
from .conftest import FORMS
from .tolerances import assert_close

pytestmark = pytest.mark.usefixtures("uncompiled")

LENGTHS = [6, 1, 9, 3]


def draw_ids(lengths, vocab_size=43):
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(vocab_size, (n,), generator=generator) for n in lengths]


# Where tokens stand


def _random_mask(seed, shape=(3, 11)):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.6


BATCHES = {
    "nothing_said": {},
    "padded": {"padding_mask": torch.arange(11) < torch.tensor([[11], [4], [0]])},
    "holes": {"padding_mask": _random_mask(0)},
    "one_token": {"padding_mask": torch.arange(11) == torch.tensor([[0], [10], [5]])},
    "restarting_positions": {
        "position_ids": torch.tensor([[*range(5), *range(6)], [*range(11)], [0, 0, 0, *range(8)]])
    },
    "offset_positions": {"position_ids": torch.arange(2, 13).expand(3, 11)},
    "one_row_of_positions": {"position_ids": torch.tensor([[*range(5), *range(6)]])},
    "positions_of_a_grid": {"position_ids": torch.tensor([[0, 1, 2, 1, 2, 3, 2, 3, 4, 0, 7]]).expand(3, 11)},
    "positions_with_mask": {
        "padding_mask": _random_mask(1),
        "position_ids": torch.tensor([[*range(5), *range(6)]]),
        "restarts": False,
    },
    "positions_with_full_mask": {"position_ids": torch.tensor([[*range(5), *range(6)]]), "restarts": False},
    "boundaries": {"cu_seq_lens": torch.tensor([0, 4, 5, 11, 20, 33])},
    "boundaries_before_the_end": {"cu_seq_lens": torch.tensor([0, 4, 17], dtype=torch.int32)},
    "boundaries_and_empty_documents": {"cu_seq_lens": torch.tensor([0, 0, 4, 4, 9, 9])},
    "boundaries_and_mask": {"cu_seq_lens": torch.tensor([0, 4, 5, 11, 20, 33]), "padding_mask": _random_mask(2)},
    "boundaries_and_positions": {
        "cu_seq_lens": torch.tensor([0, 4, 5, 11, 33]),
        "position_ids": torch.tensor([[*range(5), *range(6)]]),
    },
}


@pytest.mark.parametrize("batch", BATCHES)
def test_tokens_stand_where_the_slow_loop_says(batch):
    given = dict(BATCHES[batch])
    restarts = given.get("restarts", True)
    packing = read_batch(3, 11, torch.device("cpu"), **given)
    real = given.get("padding_mask", None if restarts else torch.ones(3, 11))
    position_ids = None if "position_ids" not in given else given["position_ids"].expand(3, 11)
    cu_seq_lens = None if "cu_seq_lens" not in given else given["cu_seq_lens"].tolist()
    places = reference.stand(3, 11, real, position_ids, cu_seq_lens)

    expected = torch.tensor(places).movedim(-1, 0)
    assert torch.equal(packing.real, expected[0] != reference.PADDING)
    assert torch.equal(packing.tokens.position, expected[1])
    assert torch.equal(packing.tokens.length, expected[2])
    same_document = packing.tokens.document.flatten()[:, None] == packing.tokens.document.flatten()
    assert torch.equal(same_document, expected[0].flatten()[:, None] == expected[0].flatten())
    if packing.all_real:
        assert packing.real.all()
    if packing.one_document:
        assert all(len({place.document for place in row} - {reference.PADDING}) <= 1 for row in places)


REFUSED = {
    "position_ids_of_other_length": ({"position_ids": torch.arange(10)[None]}, "position_ids must be integers"),
    "position_ids_1d": ({"position_ids": torch.arange(11)}, r"of shape \(3, 11\) or \(1, 11\), got .* \(11,\)"),
    "position_ids_of_other_batch": ({"position_ids": torch.arange(11).expand(2, 11)}, r"got .* shape \(2, 11\)"),
    "position_ids_float": ({"position_ids": torch.arange(11.0)[None]}, "integers .* got torch.float32 .* Leave them"),
    "boundaries_2d": ({"cu_seq_lens": torch.tensor([[0, 11]])}, "cu_seq_lens_q must be boundaries"),
    "boundaries_float": ({"cu_seq_lens": torch.tensor([0.0, 11.0])}, "integers that grow from 0 to at most 33"),
    "boundaries_from_1": ({"cu_seq_lens": torch.tensor([1, 11])}, r"grow from 0 .* got tensor\(\[ 1, 11\]\)"),
    "boundaries_that_fall": ({"cu_seq_lens": torch.tensor([0, 11, 5])}, "grow from 0"),
    "boundaries_past_the_end": ({"cu_seq_lens": torch.tensor([0, 34])}, "at most 33 .* For documents of 3 and 2"),
    "no_boundaries": ({"cu_seq_lens": torch.tensor([0])}, "cu_seq_lens_q must be boundaries"),
}


@pytest.mark.parametrize("batch", REFUSED)
def test_refused_documents(batch):
    given, message = REFUSED[batch]
    with pytest.raises(ValueError, match=message):
        read_batch(3, 11, torch.device("cpu"), **given)


# Documents do not see each other


def test_packed_equals_each_document_alone(form, pattern, kernel, make_config, make_model, lay_out):
    check_packed_equals_alone(
        make_model(make_config(pattern=pattern, position="rotary"), kernel), lay_out(form, LENGTHS)
    )


def test_positions_packed_equal_each_document_alone(form, position, make_config, make_model, lay_out):
    check_packed_equals_alone(make_model(make_config(position=position)), lay_out(form, LENGTHS))


def check_packed_equals_alone(model, layout):
    documents = draw_ids(LENGTHS)
    with torch.no_grad():
        together = model(layout.put(documents), **layout.inputs).last_hidden_state
        alone = [model(document[None]).last_hidden_state[0] for document in documents]
    for actual, expected in zip(layout.take(together), alone, strict=True):
        assert_close(actual, expected)


@pytest.mark.parametrize("form", ["padded_with_holes", "packed_by_positions", "packed_by_boundaries"])
def test_no_gradient_between_documents(form, pattern, kernel, make_config, make_model, lay_out):
    config = make_config(pattern=pattern, position="rotary")
    if unsupported_reasons(config, kernel, device_type="cpu", training=True):
        check_no_influence_between_documents(form, make_model(config, kernel), lay_out)
        return
    model, layout = make_model(config, kernel), lay_out(form, LENGTHS)
    embeds = layout.put([model.embed_tokens.weight[ids].detach() for ids in draw_ids(LENGTHS)]).requires_grad_()
    outputs = layout.take(model(inputs_embeds=embeds, **layout.inputs).last_hidden_state)
    for i, output in enumerate(outputs):
        (gradient,) = torch.autograd.grad(output.square().sum(), embeds, retain_graph=True)
        for j, of_document in enumerate(layout.take(gradient)):
            assert (of_document != 0).any() if i == j else (of_document == 0).all()
        assert (gradient[layout.padding] == 0).all()


def check_no_influence_between_documents(form, model, lay_out):
    """Where there is no gradient: a document's output keeps its bits whatever the others and the padding say."""
    layout = lay_out(form, LENGTHS)
    embeds = layout.put([model.embed_tokens.weight[ids].detach() for ids in draw_ids(LENGTHS)])
    with torch.no_grad():
        before = layout.take(model(inputs_embeds=embeds, **layout.inputs).last_hidden_state)
        for i, place in enumerate(layout.places):
            others = embeds + torch.randn_like(embeds)
            others[place] = embeds[place]
            after = layout.take(model(inputs_embeds=others, **layout.inputs).last_hidden_state)
            assert torch.equal(before[i], after[i])
            assert all(not torch.equal(before[j], after[j]) for j in range(len(before)) if j != i)


def test_full_mask_and_positions_are_one_document(kernel, make_config, make_model):
    """position_ids tell documents apart only where no attention_mask is given."""
    model = make_model(make_config(position="rotary"), kernel)
    ids, position_ids = draw_ids([8])[0][None], torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]])
    with torch.no_grad():
        masks = [torch.ones(1, 8, dtype=torch.long), torch.ones(1, 8, 8, dtype=torch.bool)]
        joined = [model(ids, attention_mask=mask, position_ids=position_ids).last_hidden_state for mask in masks]
        apart = model(ids, position_ids=position_ids).last_hidden_state
        by_pairs = torch.block_diag(torch.ones(4, 4), torch.ones(4, 4)).bool()[None]
        apart_by_pairs = model(ids, attention_mask=by_pairs, position_ids=position_ids).last_hidden_state
    assert_close(joined[0], joined[1])
    assert (joined[0] - apart).abs().max() > 0.01
    assert_close(apart_by_pairs, apart)


def test_boundaries_run_over_rows(kernel, make_config, make_model):
    """cu_seq_lens_q counts through the batch row by row; a document that meets the end of a row ends there."""
    model = make_model(make_config(position="rotary"), kernel)
    ids = draw_ids([14])[0].view(2, 7)
    with torch.no_grad():
        outputs = model(ids, cu_seq_lens_q=torch.tensor([0, 3, 7, 12])).last_hidden_state
        for row, start, end in [(0, 0, 3), (0, 3, 7), (1, 0, 5)]:
            alone = model(ids[row : row + 1, start:end]).last_hidden_state[0]
            assert_close(outputs[row, start:end], alone)
    assert (outputs[1, 5:] == 0).all()


# 0 at padding

HEADS = {
    SelfAttnForMaskedLM: ["logits"],
    SelfAttnForTokenClassification: ["logits"],
    SelfAttnForQuestionAnswering: ["start_logits", "end_logits"],
}


def test_attentions_are_0_at_padding(form, kernel, make_config, make_model, lay_out):
    model, layout = make_model(make_config(position="rotary"), kernel), lay_out(form, LENGTHS)
    with torch.no_grad():
        outputs = model(layout.put(draw_ids(LENGTHS)), **layout.inputs, output_attentions=True)
    assert len(outputs.attentions) == 2
    for weights in outputs.attentions:
        by_query, by_key = weights.transpose(1, 2), weights.permute(0, 3, 1, 2)
        assert (by_query[layout.padding] == 0).all()
        assert (by_key[layout.padding] == 0).all()
        assert_close(by_query.sum(-1)[~layout.padding], torch.ones(sum(LENGTHS), 4))


@pytest.mark.parametrize("cls", HEADS, ids=lambda cls: cls.__name__)
def test_logits_and_hidden_states_are_0_at_padding(cls, form, make_config, make_model, lay_out):
    model, layout = make_model(make_config(position="rotary"), cls=cls), lay_out(form, LENGTHS)
    documents = draw_ids(LENGTHS)
    with torch.no_grad():
        outputs = model(layout.put(documents), **layout.inputs, output_hidden_states=True)
        for name in HEADS[cls]:
            for actual, document in zip(layout.take(outputs[name]), documents, strict=True):
                assert_close(actual, model(document[None])[name][0], name)
    for output in [*outputs.hidden_states, *(outputs[name] for name in HEADS[cls])]:
        assert (output[layout.padding] == 0).all()


@pytest.mark.parametrize("form", ["padded_left", "packed_by_positions", "packed_by_boundaries"])
@pytest.mark.parametrize("selected", [[0, -1], -1, 1], ids=["first_and_last", "last", "one"])
def test_selected_hidden_states(selected, form, make_config, make_model, lay_out):
    """transformers takes numbers of hidden states, too, and gives None for the others."""
    model, layout = make_model(make_config()), lay_out(form, LENGTHS)
    ids = layout.put(draw_ids(LENGTHS))
    with torch.no_grad():
        everything = model(ids, **layout.inputs, output_hidden_states=True).hidden_states
        some = model(ids, **layout.inputs, output_hidden_states=selected).hidden_states
    wanted = {number % 3 for number in (selected if isinstance(selected, list) else [selected])}
    assert [number for number, state in enumerate(some) if state is not None] == sorted(wanted)
    assert all(torch.equal(some[number], everything[number]) for number in wanted)


# The two forms of a batch


def test_both_forms_give_the_same(choice, kernel, request, make_config, make_model, lay_out):
    """The real tokens alone, and the grid, which weights are asked for in: hidden states and all gradients.

    Ways to lay documents out in turn, so that each occurs with many choices.
    """
    config = make_config(*choice)
    if unsupported_reasons(config, kernel):
        return
    form = list(FORMS)[request.node.callspec.indices["choice"] % len(FORMS)]
    documents = draw_ids(LENGTHS)
    layout = lay_out(form, LENGTHS)
    ids = layout.put(documents)
    found = []
    for more in ({}, {"output_attentions": True}):
        model = make_model(config, kernel)
        with torch.set_grad_enabled(kernel != "flex_attention"):
            outputs = model(ids, **layout.inputs, **more, output_hidden_states=True)
        if kernel != "flex_attention":
            outputs.last_hidden_state.square().mean().backward()
        found.append((outputs.hidden_states, [x.grad for x in model.parameters()]))
    (states, gradients), (expected, expected_gradients) = found
    for actual, other in zip(states, expected, strict=True):
        assert_close(actual, other, "hidden states")
    for actual, other in zip(gradients, expected_gradients, strict=True):
        if other is not None:
            assert_close(actual, other, "gradient")


@pytest.mark.parametrize("kernel", ["eager", "selfattn"])
def test_layers_see_real_tokens_alone(kernel, make_config, make_model, lay_out):
    model, seen = make_model(make_config(), kernel), []
    model.layers[0].register_forward_hook(lambda module, args, output: seen.append(tuple(output.shape)))
    layout = lay_out("padded_right", LENGTHS)
    model(layout.put(draw_ids(LENGTHS)), **layout.inputs)
    assert seen == [(1, sum(LENGTHS), model.config.hidden_size)]


def test_a_batch_without_a_real_token(kernel, make_config, make_model):
    model = make_model(make_config(), kernel)
    with torch.no_grad():
        outputs = model(torch.ones(2, 5, dtype=torch.long), attention_mask=torch.zeros(2, 5, dtype=torch.bool))
    assert (outputs.last_hidden_state == 0).all()
    assert outputs.last_hidden_state.shape[:2] == (2, 5)


def test_dense_kernels_compute_little_more_than_is_meant():
    """Pairs of tokens that are computed: less than 1 / FILLED² times the squares of the lengths, not longest² each."""
    lengths = [600, 8, 9, 10, 8, 64, 60, 1]
    position_ids = torch.cat([torch.arange(n) for n in lengths])[None]
    packing = read_batch(1, sum(lengths), torch.device("cpu"), position_ids=position_ids).packed()
    groups = kernels_rows.group_by_length(packing.tokens)
    computed = sum(len(group) * group.shape[1] ** 2 for group in groups)
    assert computed <= sum(n * n for n in lengths) / FILLED**2
    assert sorted(torch.cat([x[x < sum(lengths)] for x in groups]).tolist()) == list(range(sum(lengths)))
