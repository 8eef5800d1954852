"""The heads: what they return, how they pool, and that they behave as models of transformers do."""

import copy

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn
from transformers import PreTrainedTokenizerFast, pipeline

from hf_selfattn import (
    SelfAttnForMaskedLM,
    SelfAttnForMultipleChoice,
    SelfAttnForQuestionAnswering,
    SelfAttnForSequenceClassification,
    SelfAttnForTokenClassification,
    SelfAttnModel,
)

from .tolerances import assert_close

B, C, N, V = 4, 3, 9, 43
LENGTHS = (9, 5, 1, 7)
HEADS = {
    "base": SelfAttnModel,
    "masked_lm": SelfAttnForMaskedLM,
    "sequence_classification": SelfAttnForSequenceClassification,
    "token_classification": SelfAttnForTokenClassification,
    "question_answering": SelfAttnForQuestionAnswering,
    "multiple_choice": SelfAttnForMultipleChoice,
}
HEAD_TYPES = ["bert", "roberta", "electra", "distilbert", "modernbert"]
LABELS = 5


def ids(*shape, seed=0):
    return torch.randint(0, V, shape, generator=torch.Generator().manual_seed(seed))


def padding(side="right"):
    mask = torch.arange(N) < torch.tensor(LENGTHS).unsqueeze(1)
    return (mask if side == "right" else mask.flip(1)).long()


def make_batch(head, side="right"):
    """Rows of LENGTHS real tokens padded to N; for multiple choice each stands beside two of another order."""
    batch = {"input_ids": ids(B, N), "attention_mask": padding(side)}
    if head == "multiple_choice":
        batch["input_ids"] = ids(B, C, N)
        batch["attention_mask"] = torch.stack([batch["attention_mask"].roll(i, 0) for i in range(C)], dim=1)
    return batch


def make_labels(head):
    """Labels for `make_batch(head)`."""
    if head == "question_answering":
        return {"start_positions": torch.zeros(B, dtype=torch.long), "end_positions": torch.tensor(LENGTHS) - 1}
    of_tokens = head in ("masked_lm", "token_classification")
    return {} if head == "base" else {"labels": ids(*(B, N) if of_tokens else (B,)) % C}


def values(outputs):
    """The tensors of an output without the loss, by name."""
    return {name: x for name, x in outputs.items() if torch.is_tensor(x) and name != "loss"}


@pytest.fixture(params=HEADS)
def head(request):
    return request.param


@pytest.fixture
def make(make_config, make_model):
    """(head, **options) -> a model in float64 with random parameters."""

    def make_head(head, position="rotary", kernel="eager", dtype=torch.float64, **options):
        config = make_config(position=position, **{"num_labels": LABELS, **options})
        return make_model(config, kernel=kernel, dtype=dtype, cls=HEADS[head])

    return make_head


class TestOutputs:
    SHAPES = {
        "base": {"last_hidden_state": (B, N, 20)},
        "masked_lm": {"logits": (B, N, V)},
        "sequence_classification": {"logits": (B, LABELS)},
        "token_classification": {"logits": (B, N, LABELS)},
        "question_answering": {"start_logits": (B, N), "end_logits": (B, N)},
        "multiple_choice": {"logits": (B, C)},
    }

    @pytest.mark.parametrize("head_type", HEAD_TYPES)
    def test_shapes(self, make, head, head_type):
        outputs = make(head, head_type=head_type)(**make_batch(head))
        assert {name: tuple(x.shape) for name, x in values(outputs).items()} == self.SHAPES[head]
        assert all(torch.isfinite(x).all() for x in values(outputs).values())

    @pytest.mark.parametrize("side", ["right", "left"])
    @pytest.mark.parametrize("head", ["base", "masked_lm", "token_classification", "question_answering"])
    def test_0_at_padding(self, make, head, side):
        batch = make_batch(head, side)
        for name, x in values(make(head)(**batch)).items():
            assert (x[batch["attention_mask"] == 0] == 0).all(), name
            assert (x[batch["attention_mask"] == 1] != 0).any(), name

    @pytest.mark.parametrize("side", ["right", "left"])
    def test_each_row_is_what_it_is_alone(self, make, head, side):
        model, batch = make(head), make_batch(head, side)
        together = values(model(**batch))
        for row in range(B):
            if head == "multiple_choice":
                for choice in range(C):
                    real = batch["attention_mask"][row, choice].bool()
                    alone = model(input_ids=batch["input_ids"][row, choice][real][None, None]).logits
                    assert_close(together["logits"][row, choice], alone[0, 0], f"row {row}, choice {choice}")
                continue
            real = batch["attention_mask"][row].bool()
            for name, alone in values(model(input_ids=batch["input_ids"][row][real][None])).items():
                x = together[name][row]
                assert_close(x if head == "sequence_classification" else x[real], alone[0], f"{name} of row {row}")

    def test_hidden_states_and_attentions(self, make, head):
        model, batch = make(head), make_batch(head)
        rows = batch["input_ids"].numel() // N
        outputs = model(**batch, output_hidden_states=True, output_attentions=True)
        assert [tuple(x.shape) for x in outputs.hidden_states] == [(rows, N, 20)] * 3
        assert [tuple(x.shape) for x in outputs.attentions] == [(rows, 4, N, N)] * 2
        real = batch["attention_mask"].view(rows, N).bool()
        for hidden in outputs.hidden_states:
            assert (hidden[~real] == 0).all()
        for weights in outputs.attentions:
            assert_close(weights.sum(-1), real[:, None].double().expand(rows, 4, N), "sums of weights")
            assert (weights.transpose(1, 3)[~real] == 0).all()
        base = model if head == "base" else model.model
        flat = {name: x.view(rows, N) for name, x in batch.items()}
        # Weights are asked for in the grid; without them padding is left out.
        assert_close(outputs.hidden_states[-1], base(**flat).last_hidden_state, "last hidden state")
        assert model(**batch).hidden_states is None
        assert model(**batch).attentions is None

    def test_the_config_asks_for_them_too(self, make, head):
        model, batch = make(head), make_batch(head)
        expected = model(**batch, output_hidden_states=True, output_attentions=True).to_tuple()
        model.config.output_hidden_states = model.config.output_attentions = True
        assert_same(model(**batch).to_tuple(), expected)
        quiet = model(**batch, output_hidden_states=False, output_attentions=False)
        assert (quiet.hidden_states, quiet.attentions) == (None, None)

    @pytest.mark.parametrize(
        "extra", [{}, {"output_hidden_states": True, "output_attentions": True}], ids=["plain", "everything"]
    )
    @pytest.mark.parametrize("asked_by", ["argument", "config"])
    def test_a_tuple_instead_of_a_dict(self, make, head, asked_by, extra):
        model, batch = make(head), {**make_batch(head), **make_labels(head), **extra}
        expected = model(**batch).to_tuple()
        if asked_by == "config":
            model.config.return_dict = False
        else:
            batch["return_dict"] = False
        outputs = model(**batch)
        assert type(outputs) is tuple
        assert_same(outputs, expected)
        if head != "base":
            assert outputs[0].dim() == 0

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
    def test_half_precision(self, make, head, dtype):
        model = make(head, dtype=dtype)
        assert {x.dtype for x in values(model(**make_batch(head))).values()} == {dtype}

    def test_training_without_dropout_is_evaluation(self, make, head):
        model, batch = make(head), make_batch(head)
        expected = values(model(**batch))
        for name, x in values(model.train()(**batch)).items():
            assert torch.equal(x, expected[name])

    @pytest.mark.parametrize(
        "rate", ["attention_dropout", "hidden_dropout", "embedding_dropout", "classifier_dropout"]
    )
    @pytest.mark.parametrize("head_type", ["roberta", "modernbert"])
    def test_dropout_is_on_in_training_alone(self, make, head, head_type, rate):
        if rate == "classifier_dropout" and head in ("base", "masked_lm"):
            rate = "hidden_dropout"
        model, batch = make(head, head_type=head_type, **{rate: 0.5}), make_batch(head)

        def twice(model):
            torch.manual_seed(0)
            first, second = (values(model(**batch)) for _ in range(2))
            return all(torch.equal(x, second[name]) for name, x in first.items())

        assert twice(model.eval())
        assert not twice(model.train())


def assert_same(actual, expected):
    """Equal bit for bit, through tuples."""
    assert type(actual) is type(expected)
    if torch.is_tensor(actual):
        assert torch.equal(actual, expected)
    else:
        assert len(actual) == len(expected)
        for pair in zip(actual, expected, strict=True):
            assert_same(*pair)


POOLS = {
    "first": lambda hidden: hidden[0],
    "mean": lambda hidden: hidden.mean(0),
    "max": lambda hidden: hidden.amax(0),
}


def output_of(model):
    """What a classifier of whole texts has above the encoder."""
    return model.choice_output if hasattr(model, "choice_output") else model.classifier


@pytest.mark.parametrize("head", ["sequence_classification", "multiple_choice"])
class TestPooling:
    @pytest.mark.parametrize("head_type", HEAD_TYPES)
    @pytest.mark.parametrize("pooling", POOLS)
    @pytest.mark.parametrize("side", ["right", "left"])
    def test_over_the_real_tokens_alone(self, make, head, side, pooling, head_type):
        model, batch = make(head, pooling=pooling, head_type=head_type), make_batch(head, side)
        logits = model(**batch).logits.view(-1, 1 if head == "multiple_choice" else LABELS)
        rows = zip(batch["input_ids"].view(-1, N), batch["attention_mask"].view(-1, N).bool(), strict=True)
        for row, (text, real) in enumerate(rows):
            hidden = model.model(text[real][None]).last_hidden_state[0]
            assert_close(logits[row], output_of(model)(POOLS[pooling](hidden)), f"row {row}")

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=["float64", "float16"])
    @pytest.mark.parametrize("head_type", HEAD_TYPES)
    @pytest.mark.parametrize("pooling", POOLS)
    def test_a_row_of_padding_is_a_vector_of_0(self, make, head, pooling, head_type, dtype):
        model = make(head, pooling=pooling, head_type=head_type, dtype=dtype)
        batch = make_batch(head)
        batch["attention_mask"][1] = 0
        logits = model(**batch).logits
        nothing = output_of(model)(torch.zeros(1, 20, dtype=dtype))
        assert_close(logits[1].view(-1, nothing.shape[1]), nothing.expand(logits[1].numel() // nothing.numel(), -1))
        logits.float().square().sum().backward()
        for name, parameter in model.named_parameters():
            assert torch.isfinite(parameter.grad).all(), name

    def test_a_mask_with_holes(self, make, head):
        model, batch = make(head), make_batch(head)
        holes = torch.tensor([1, 0, 1, 1, 0, 0, 1, 0, 1])
        batch["attention_mask"][..., :] = holes
        closed = {"input_ids": batch["input_ids"][..., holes.bool()]}
        assert_close(model(**batch).logits, model(**closed).logits, "logits")

    @pytest.mark.parametrize("pooling", POOLS)
    def test_several_documents_in_a_row(self, make, head, pooling):
        """An answer for each document, row by row; multiple choice, which has one text for a choice, refuses them."""
        model, batch = make(head, pooling=pooling), {"input_ids": make_batch(head)["input_ids"]}
        batch["position_ids"] = torch.tensor([0, 1, 2, 0, 1, 2, 3, 4, 5]).expand_as(batch["input_ids"])
        if head == "multiple_choice":
            with pytest.raises(ValueError, match=r"one text for each choice, got 24 documents.*one document in each"):
                model(**batch)
            return
        alone = [model(text[None]).logits[0] for row in batch["input_ids"] for text in row.split([3, 6])]
        assert_close(model(**batch).logits, torch.stack(alone), "logits")
        # In the grid, which weights are asked for in, and with padding that is no document.
        assert_close(model(**batch, output_attentions=True).logits, torch.stack(alone), "logits")
        real = torch.ones_like(batch["input_ids"])
        real[0, 3:] = 0
        starts = torch.arange(0, real.numel() + 1, N).unsqueeze(1) + torch.tensor([0, 3])
        padded = {"attention_mask": real, "cu_seq_lens_q": starts.flatten()[:-1]}
        kept = torch.stack([alone[0], *alone[2:]])
        assert_close(model(batch["input_ids"], **padded).logits, kept, "logits")

    def test_position_ids_of_one_document_are_accepted(self, make, head):
        model, batch = make(head), {"input_ids": make_batch(head)["input_ids"]}
        placed = {**batch, "position_ids": torch.arange(N).expand_as(batch["input_ids"])}
        assert_close(model(**placed).logits, model(**batch).logits, "logits")


class TestInputs:
    @pytest.mark.parametrize("embedding_size", [None, 7])
    @pytest.mark.parametrize("position", ["rotary", "learned"])
    def test_vectors_instead_of_ids(self, make, head, position, embedding_size):
        model = make(head, position, embedding_size=embedding_size)
        batch = make_batch(head)
        embeds = model.get_input_embeddings()(batch["input_ids"])
        assert embeds.shape[-1] == (embedding_size or 20)
        expected = values(model(**batch))
        for name, x in values(model(inputs_embeds=embeds, attention_mask=batch["attention_mask"])).items():
            assert torch.equal(x, expected[name])

    def test_gradients_reach_the_vectors(self, make, head):
        model, batch = make(head), make_batch(head)
        embeds = model.get_input_embeddings()(batch["input_ids"]).detach().requires_grad_()
        outputs = model(inputs_embeds=embeds, attention_mask=batch["attention_mask"])
        sum(x.square().sum() for x in values(outputs).values()).backward()
        real = batch["attention_mask"].bool()
        assert (embeds.grad[real] != 0).any(-1).all()
        assert (embeds.grad[~real] == 0).all()

    def test_neither_or_both_are_refused(self, make, head):
        model, batch = make(head), make_batch(head)
        embeds = model.get_input_embeddings()(batch["input_ids"])
        with pytest.raises(ValueError, match=r"either input_ids or inputs_embeds, got both. Pass exactly one"):
            model(**batch, inputs_embeds=embeds)
        with pytest.raises(ValueError, match=r"either input_ids or inputs_embeds, got neither. Pass exactly one"):
            model(attention_mask=batch["attention_mask"])

    @pytest.mark.parametrize("bad", [V, -1, 10_000], ids=["V", "negative", "far"])
    def test_ids_outside_the_vocabulary_are_refused(self, make, head, bad):
        batch = make_batch(head)
        batch["input_ids"].view(-1)[4] = bad
        with pytest.raises(
            ValueError, match=rf"input_ids must be from 0 to 42 .*got ids from .*{bad}.*resize_token_emb"
        ):
            make(head)(**batch)

    def test_an_unknown_argument_is_refused(self, make, head):
        with pytest.raises(
            TypeError, match=r"unexpected arguments \['token_types'\]. It knows input_ids.*token_type_ids"
        ):
            make(head)(**make_batch(head), token_types=torch.zeros(B, N))

    @pytest.mark.parametrize("head", ["base", "masked_lm", "question_answering", "multiple_choice"])
    def test_labels_of_another_head_are_refused(self, make, head):
        stranger = "labels" if head in ("base", "question_answering") else "start_positions"
        with pytest.raises(TypeError, match=rf"unexpected.*{stranger}"):
            make(head)(**make_batch(head), **{stranger: torch.zeros(B, dtype=torch.long)})


class TestTokenTypes:
    def test_they_change_the_outputs(self, make, head):
        model, batch = make(head, type_vocab_size=2), make_batch(head)
        types = torch.zeros_like(batch["input_ids"])
        without, zeros = values(model(**batch)), values(model(**batch, token_type_ids=types))
        ones = values(model(**batch, token_type_ids=types + 1))
        for name, x in without.items():
            assert torch.equal(x, zeros[name])
            assert (x - ones[name]).abs().max() > 1e-3

    def test_they_are_a_vector_added_to_the_token(self, make, head):
        model, batch = make(head, type_vocab_size=2), make_batch(head)
        types = (ids(*batch["input_ids"].shape, seed=1) < V // 2).long()
        expected = values(model(**batch, token_type_ids=types))
        base = model if head == "base" else model.model
        table = base.embeddings.token_types.weight.detach()
        embeds = model.get_input_embeddings()(batch["input_ids"]) + table[types] - table[0]
        for name, x in values(model(inputs_embeds=embeds, attention_mask=batch["attention_mask"])).items():
            assert_close(x, expected[name], name)

    def test_a_model_without_them_accepts_zeros(self, make, head):
        """Many tokenizers return them unasked."""
        model, batch = make(head), make_batch(head)
        expected = values(model(**batch))
        for name, x in values(model(**batch, token_type_ids=torch.zeros_like(batch["input_ids"]))).items():
            assert torch.equal(x, expected[name])

    @pytest.mark.parametrize(
        ("types", "size"),
        [(1, 0), (2, 2), (-1, 2), (-1, 0)],
        ids=["1_of_none", "2_of_2", "negative_of_2", "negative_of_none"],
    )
    def test_types_that_are_not_there_are_refused(self, make, head, types, size):
        batch = make_batch(head)
        with pytest.raises(ValueError, match=rf"token_type_ids must be .* type_vocab_size={size}.*Leave them out, or"):
            make(head, type_vocab_size=size)(**batch, token_type_ids=torch.full_like(batch["input_ids"], types))

    @pytest.mark.parametrize("head", [name for name in HEADS if name != "multiple_choice"])
    def test_another_shape_is_refused(self, make, head):
        with pytest.raises(ValueError, match=r"token_type_ids must be of shape \(4, 9\).*got shape \(4, 8\)"):
            make(head, type_vocab_size=2)(**make_batch(head), token_type_ids=torch.zeros(B, N - 1, dtype=torch.long))


class TestEmbeddingSize:
    def test_token_vectors_have_their_own_width(self, make, head):
        model = make(head, embedding_size=7, type_vocab_size=2, position="learned", embedding_norm=True)
        base = model if head == "base" else model.model
        assert base.embed_tokens.weight.shape == (V, 7)
        assert base.embeddings.token_types.weight.shape == (2, 7)
        assert base.embeddings.positions.weight.shape[1] == 7
        assert base.embeddings.projection.weight.shape == (20, 7)

    def test_the_same_width_needs_no_projection(self, make, head):
        model = make(head, embedding_size=20)
        assert isinstance((model if head == "base" else model.model).embeddings.projection, nn.Identity)

    @pytest.mark.parametrize("head_type", HEAD_TYPES)
    def test_the_language_model_decodes_from_that_width(self, make, head_type):
        model = make("masked_lm", embedding_size=7, head_type=head_type)
        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert model(**make_batch("masked_lm")).logits.shape == (B, N, V)


def tied(model):
    return model.lm_head.weight is model.model.embed_tokens.weight


class TestResize:
    @pytest.mark.parametrize("tie", [True, False], ids=["tied", "untied"])
    @pytest.mark.parametrize(
        ("size", "multiple", "expected"),
        [(50, None, 50), (31, None, 31), (43, None, 43), (50, 16, 64), (None, 8, 48)],
        ids=["grown", "shrunk", "same", "grown_to_64", "rounded_up"],
    )
    @pytest.mark.parametrize("embedding_size", [None, 7])
    def test_language_model(self, make, embedding_size, size, multiple, expected, tie):
        model = make("masked_lm", tie_word_embeddings=tie, embedding_size=embedding_size)
        before = copy.deepcopy(model)
        batch = make_batch("masked_lm")
        batch["input_ids"] %= min(V, expected)

        returned = model.resize_token_embeddings(size, pad_to_multiple_of=multiple)
        kept, width = min(V, expected), embedding_size or 20
        assert returned is model.get_input_embeddings()
        assert model.config.vocab_size == model.model.config.vocab_size == expected
        assert model.model.embed_tokens.weight.shape == model.lm_head.weight.shape == (expected, width)
        assert model.lm_head.bias.shape == (expected,)
        assert (model.model.embed_tokens.num_embeddings, model.lm_head.out_features) == (expected, expected)
        assert tied(model) is tie
        for name in ("model.embed_tokens.weight", "lm_head.weight", "lm_head.bias"):
            assert torch.equal(model.state_dict()[name][:kept], before.state_dict()[name][:kept]), name

        logits = model(**batch).logits
        assert logits.shape == (B, N, expected)
        assert torch.isfinite(logits).all()
        assert_close(logits[..., :kept], before(**batch).logits[..., :kept], "logits of the tokens that stayed")

    def test_new_ids_are_known_and_old_ones_forgotten(self, make, head):
        model, batch = make(head), make_batch(head)
        model.resize_token_embeddings(V + 3)
        batch["input_ids"].view(-1)[0] = V + 2
        model(**batch)
        model.resize_token_embeddings(V)
        with pytest.raises(ValueError, match="input_ids must be from 0 to 42"):
            model(**batch)

    def test_other_outputs_do_not_change(self, make, head):
        model, batch = make(head), make_batch(head)
        expected = values(model(**batch))
        model.resize_token_embeddings(V + 5)
        for name, x in values(model(**batch)).items():
            # Products of other shapes are summed in another order on some processors.
            assert_close(x[..., : expected[name].shape[-1]], expected[name], name)

    def test_padding_keeps_its_place(self, make):
        model = make("masked_lm", pad_token_id=2)
        model.resize_token_embeddings(V + 5)
        assert model.model.embed_tokens.padding_idx == 2


class TestTied:
    @pytest.mark.parametrize("tie", [True, False], ids=["tied", "untied"])
    def test_through_saving_resizing_and_casting(self, make, tmp_path, tie):
        model = make("masked_lm", tie_word_embeddings=tie, dtype=torch.float32)
        assert tied(model) is tie
        model.save_pretrained(tmp_path / "first")
        model = SelfAttnForMaskedLM.from_pretrained(tmp_path / "first")
        assert tied(model) is tie
        model.resize_token_embeddings(V + 5)
        assert tied(model) is tie
        model.save_pretrained(tmp_path / "second")
        model = SelfAttnForMaskedLM.from_pretrained(tmp_path / "second", dtype=torch.bfloat16)
        assert tied(model) is tie
        assert tied(model.to(torch.float32)) is tie
        assert tied(copy.deepcopy(model)) is tie

    def test_one_gradient_for_both(self, make):
        model = make("masked_lm")
        names = [name for name, _ in model.named_parameters()]
        assert "model.embed_tokens.weight" in names
        assert "lm_head.weight" not in names

    def test_an_untied_output_layer_has_weights_of_its_own(self, make):
        model = make("masked_lm", tie_word_embeddings=False)
        assert not torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)


class TestNames:
    def test_embeddings_are_found(self, make, head):
        model = make(head)
        base = model if head == "base" else model.model
        assert model.get_input_embeddings() is base.embed_tokens
        assert model.get_output_embeddings() is (model.lm_head if head == "masked_lm" else None)
        assert model.base_model is base

    def test_no_module_but_a_head_ends_in_score_or_classifier(self, make, head):
        """PEFT trains and saves every module of such a name."""
        found = [name for name, _ in make(head).named_modules() if name.endswith(("score", "classifier"))]
        assert found == (["classifier"] if "classification" in head else [])

    def test_a_head_is_loaded_from_the_encoder(self, make, head, tmp_path):
        encoder = make("base", dtype=torch.float32)
        encoder.save_pretrained(tmp_path)
        model = HEADS[head].from_pretrained(tmp_path)
        loaded = (model if head == "base" else model.model).state_dict()
        assert all(torch.equal(x, loaded[name]) for name, x in encoder.state_dict().items())


SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = [*SPECIAL, "the", "a", "cat", "dog", "sat", "ran", "on", "under", "mat", "tree", "good", "bad"]


@pytest.fixture(scope="module")
def tokenizer():
    """Words apart by spaces, made here."""
    vocabulary = {word: i for i, word in enumerate(WORDS)}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    special = {f"{token[1:-1].lower()}_token": token for token in SPECIAL}
    return PreTrainedTokenizerFast(tokenizer_object=inner, **special)


TEXTS = ["the cat sat on the mat", "a dog ran", "good tree"]


class TestPipelines:
    @pytest.fixture(params=[0, 2], ids=["no_types", "two_types"])
    def make_pipeline(self, request, make, tokenizer):
        def of(task, head, **options):
            sizes = {"vocab_size": len(WORDS), "pad_token_id": 0, "type_vocab_size": request.param}
            model = make(head, dtype=torch.float32, kernel="sdpa", **sizes, **options)
            return pipeline(task, model=model, tokenizer=tokenizer), model

        return of

    @staticmethod
    def encode(tokenizer, text):
        return tokenizer(text, return_tensors="pt")

    def test_fill_mask(self, make_pipeline, tokenizer):
        fill, model = make_pipeline("fill-mask", "masked_lm")
        text = "the cat [MASK] on the mat"
        probabilities = model(**self.encode(tokenizer, text)).logits[0, 3].softmax(-1)
        best = probabilities.topk(3)
        found = fill(text, top_k=3)
        assert [row["token"] for row in found] == best.indices.tolist()
        assert [row["score"] for row in found] == pytest.approx(best.values.tolist(), rel=1e-5)
        assert found[0]["token_str"] == WORDS[found[0]["token"]]

    def test_text_classification(self, make_pipeline, tokenizer):
        names = {0: "bad", 1: "middling", 2: "good"}
        options = {"num_labels": 3, "id2label": names, "label2id": {name: i for i, name in names.items()}}
        classify, model = make_pipeline("text-classification", "sequence_classification", **options)
        for text, found in zip(TEXTS, classify(TEXTS, top_k=None, batch_size=3), strict=True):
            probabilities = model(**self.encode(tokenizer, text)).logits[0].softmax(-1).tolist()
            expected = {names[i]: p for i, p in enumerate(probabilities)}
            assert {row["label"]: row["score"] for row in found} == pytest.approx(expected, rel=1e-4)

    def test_token_classification(self, make_pipeline, tokenizer):
        names = {0: "O", 1: "B-X", 2: "I-X", 3: "B-Y", 4: "I-Y"}
        options = {"id2label": names, "label2id": {name: i for i, name in names.items()}}
        tag, model = make_pipeline("token-classification", "token_classification", **options)
        for text, found in zip(TEXTS, tag(TEXTS, batch_size=3, ignore_labels=[]), strict=True):
            best = model(**self.encode(tokenizer, text)).logits[0, 1:-1].argmax(-1).tolist()
            assert [(row["word"], row["entity"]) for row in found] == [
                (word, names[i]) for word, i in zip(text.split(), best, strict=True)
            ]

    def test_feature_extraction(self, make_pipeline, tokenizer):
        extract, model = make_pipeline("feature-extraction", "base")
        for text in TEXTS:
            expected = model(**self.encode(tokenizer, text)).last_hidden_state
            assert_close(extract(text, return_tensors=True), expected, text)
