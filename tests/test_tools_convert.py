"""Other people's encoders turned into ours and back: the numbers, the proof, the certificate, what is refused."""

import json
import os

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoTokenizer, pipeline

from hf_selfattn import SelfAttnConfig
from hf_selfattn.tools import convert as convert_module
from hf_selfattn.tools.convert import CERTIFICATE, convert, main, told
from hf_selfattn.tools.convert_changes import sees_all
from hf_selfattn.tools.convert_families import AUTO_CLASSES, FAMILIES
from hf_selfattn.tools.tokenizer import save_tokenizer

from .tolerances import assert_close
from .train_scripts import tiny_tokenizer

_SIZES = {
    "vocab_size": 43,
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "intermediate_size": 20,
    "max_position_embeddings": 150,
    "pad_token_id": 1,
    "bos_token_id": 2,
    "eos_token_id": 3,
    "initializer_range": 0.15,
}
_OWN = {
    "distilbert": {"dim": 24, "n_layers": 3, "n_heads": 3, "hidden_dim": 20},
    "electra": {"embedding_size": 14},
    "longformer": {"attention_window": [4, 8, 12], "sep_token_id": 3},
    "modernbert": {"local_attention": 6, "cls_token_id": 2, "sep_token_id": 3},
    "big_bird": {"attention_type": "original_full", "hidden_act": "gelu", "sep_token_id": 3},
    "eurobert": {"num_attention_heads": 4, "num_key_value_heads": 2, "mask_token_id": 4},
}
_OF_DISTILBERT = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
OWN_HEADS = ("roberta", "distilbert", "electra", "longformer", "big_bird")
LIKE_OTHERS = ("ernie", "camembert", "data2vec-text")


def make_config(name, **options):
    sizes = {option: x for option, x in _SIZES.items() if name != "distilbert" or option not in _OF_DISTILBERT}
    return AutoConfig.for_model(name, **{**sizes, **_OWN.get(name, {}), **options})


def save_source(folder, name, head="masked_lm", dtype=torch.float32, **options):
    """A model with parameters drawn at random, so that nothing that is forgotten stays 0 or 1, in `folder`."""
    model = getattr(transformers, AUTO_CLASSES[head]).from_config(make_config(name, **options))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += torch.randn(parameter.shape, generator=generator) * 0.1
    model = model.to(dtype).eval()
    model.save_pretrained(folder)
    return model


def save_with_tokenizer(folder, name="bert", head="masked_lm", **options):
    tokenizer = tiny_tokenizer()
    model = save_source(folder, name, head, vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, **options)
    save_tokenizer(tokenizer, folder)
    return model


def open_ours(folder, head="masked_lm"):
    return getattr(transformers, AUTO_CLASSES[head]).from_pretrained(folder).eval()


def batch_of(config, head, lengths=(24, 7, 1)):
    """Rows padded on the right to 24, the length that Longformer's three windows divide."""
    generator = torch.Generator().manual_seed(5)
    mask = torch.arange(24) < torch.tensor(lengths)[:, None]
    mask = mask[:, None].repeat(1, 2, 1) if head == "multiple_choice" else mask
    ids = torch.randint(4, config.vocab_size, mask.shape, generator=generator).masked_fill(~mask, config.pad_token_id)
    return {"input_ids": ids, "attention_mask": mask.long()}


def _cases():
    for name, family in FAMILIES.items():
        for head in ("base", *family.heads):
            if (name, head) != ("big_bird", "question_answering"):
                # BERT and ModernBERT go there and back with every head below.
                own = name in OWN_HEADS and head not in ("base", "token_classification")
                often = own or (name not in LIKE_OTHERS and head == "masked_lm") or name == "eurobert"
                yield pytest.param(name, head, marks=[] if often else [pytest.mark.slow], id=f"{name}-{head}")


@pytest.mark.parametrize(("name", "head"), list(_cases()))
def test_what_is_written_computes_what_the_source_computes(name, head, tmp_path):
    """Opened anew, in float32, in a batch that the proof does not have."""
    source = save_source(tmp_path / "source", name, head)
    _, certificate = convert(tmp_path / "source", tmp_path / "ours")
    errors = certificate["proof"]["errors"]
    assert errors["float64"]["largest"] <= 1e-10
    assert errors["float32"]["within"]
    batch = batch_of(source.config, head)
    more = {}
    if name == "longformer" and head in ("question_answering", "multiple_choice"):
        more["global_attention_mask"] = torch.zeros_like(batch["input_ids"])
        more["global_attention_mask"][..., :2] = 1
    with torch.no_grad():
        actual, expected = open_ours(tmp_path / "ours", head)(**batch, **more), source(**batch, **more)
    mask = batch["attention_mask"].bool()
    names = {"base": ["last_hidden_state"], "question_answering": ["start_logits", "end_logits"]}.get(head, ["logits"])
    for output in names:
        pair = actual[output], expected[output]
        if head not in ("sequence_classification", "multiple_choice"):
            pair = (x[mask] for x in pair)
        assert_close(*pair, output)


def test_settings_are_kept(tmp_path):
    save_source(
        tmp_path / "source",
        "bert",
        "sequence_classification",
        id2label={0: "bad", 1: "fair", 2: "good"},
        label2id={"bad": 0, "fair": 1, "good": 2},
        problem_type="multi_label_classification",
        layer_norm_eps=1e-3,
        hidden_dropout_prob=0.25,
        attention_probs_dropout_prob=0.125,
        classifier_dropout=0.5,
        hidden_act="relu",
        tie_word_embeddings=False,
    )
    config = convert(tmp_path / "source")[0].config
    assert config.id2label == {0: "bad", 1: "fair", 2: "good"}
    assert config.label2id == {"bad": 0, "fair": 1, "good": 2}
    assert config.problem_type == "multi_label_classification"
    assert (config.norm_eps, config.hidden_act, config.tie_word_embeddings) == (1e-3, "relu", False)
    assert (config.hidden_dropout, config.embedding_dropout) == (0.25, 0.25)
    assert (config.attention_dropout, config.classifier_dropout) == (0.125, 0.5)
    assert (config.pad_token_id, config.bos_token_id, config.eos_token_id) == (1, 2, 3)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", ["bert", "electra", "modernbert"])
def test_the_output_layer_is_tied_as_the_sources(name, tied, tmp_path):
    save_source(tmp_path / "source", name, tie_word_embeddings=tied)
    model, _ = convert(tmp_path / "source", tmp_path / "ours")
    opened = open_ours(tmp_path / "ours")
    for ours in (model, opened):
        assert (ours.lm_head.weight.data_ptr() == ours.model.embed_tokens.weight.data_ptr()) is tied


def test_unused_positions_of_roberta_are_left_out(tmp_path):
    source = save_source(tmp_path / "source", "roberta")
    model, _ = convert(tmp_path / "source")
    table = source.roberta.embeddings.position_embeddings.weight
    assert model.config.max_position_embeddings == 148
    assert torch.equal(model.model.embeddings.positions.weight, table[2:])


def test_the_dtype_is_the_sources(tmp_path):
    source = save_source(tmp_path / "source", "bert", dtype=torch.bfloat16)
    convert(tmp_path / "source", tmp_path / "ours")
    opened = open_ours(tmp_path / "ours")
    assert opened.dtype == torch.bfloat16
    assert torch.equal(opened.model.embed_tokens.weight, source.bert.embeddings.word_embeddings.weight)


def test_a_pretraining_checkpoint_becomes_a_language_model(tmp_path):
    transformers.BertForPreTraining(make_config("bert")).save_pretrained(tmp_path / "source")
    model, certificate = convert(tmp_path / "source")
    assert type(model).__name__ == "SelfAttnForMaskedLM"
    assert "cls.seq_relationship.weight" in certificate["dropped"]
    assert "bert.pooler.dense.weight" in certificate["dropped"]


def test_a_discriminator_becomes_an_encoder(tmp_path):
    transformers.ElectraForPreTraining(make_config("electra")).save_pretrained(tmp_path / "source")
    model, certificate = convert(tmp_path / "source")
    assert type(model).__name__ == "SelfAttnModel"
    assert "discriminator_predictions.dense.weight" in certificate["dropped"]


class TestTokenizer:
    def test_it_comes_along_and_opens_in_a_pipeline(self, tmp_path):
        source = save_with_tokenizer(tmp_path / "source")
        _, certificate = convert(tmp_path / "source", tmp_path / "ours")
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / "ours")
        assert tokenizer.get_vocab() == tiny_tokenizer().get_vocab()
        assert tokenizer.special_tokens_map == tiny_tokenizer().special_tokens_map
        assert tokenizer.model_max_length == certificate["tokenizer"]["model_max_length"] == 150
        text = f"the cat {tokenizer.mask_token} music."
        actual = pipeline("fill-mask", model=str(tmp_path / "ours"), top_k=5)(text)
        expected = pipeline("fill-mask", model=source, tokenizer=AutoTokenizer.from_pretrained(tmp_path / "source"))
        assert [x["token_str"] for x in actual] == [x["token_str"] for x in expected(text, top_k=5)]

    def test_positions_of_roberta(self, tmp_path):
        """One of its token types, and 150 - (pad_token_id + 1) positions."""
        save_with_tokenizer(tmp_path / "source", "roberta", type_vocab_size=1)
        convert(tmp_path / "source", tmp_path / "ours")
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / "ours")
        assert tokenizer.model_max_length == 149 - tokenizer.pad_token_id
        assert "token_type_ids" not in tokenizer.model_input_names
        inputs = tokenizer("the cat " * 200, truncation=True, return_tensors="pt")
        assert open_ours(tmp_path / "ours")(**inputs).logits.shape[1] == 149

    def test_one_that_cuts_shorter_stays_so(self, tmp_path):
        save_with_tokenizer(tmp_path / "source")
        path = tmp_path / "source" / "tokenizer_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "model_max_length": 40}))
        convert(tmp_path / "source", tmp_path / "ours")
        assert AutoTokenizer.from_pretrained(tmp_path / "ours").model_max_length == 40

    def test_one_that_does_not_fit_is_refused(self, tmp_path):
        save_source(tmp_path / "source", "bert")
        save_tokenizer(tiny_tokenizer(), tmp_path / "source")
        with pytest.raises(ValueError, match="The tokenizer does not fit the model: it has ids up to"):
            convert(tmp_path / "source", tmp_path / "ours")
        assert not (tmp_path / "ours").exists()

    def test_a_source_without_one(self, tmp_path):
        save_source(tmp_path / "source", "bert")
        assert convert(tmp_path / "source")[1]["tokenizer"] is None


class TestProof:
    @pytest.mark.parametrize("damaged", ["layers.2.attention.k_proj.weight", "lm_head.bias", "embeddings.norm.weight"])
    def test_a_wrong_weight_is_found(self, damaged, tmp_path, monkeypatch):
        """One number of one tensor, by a ten-thousandth: nothing is written, and nothing is left behind."""
        save_source(tmp_path / "source", "bert")
        original = convert_module.in_our_names

        def wrong(model, head):
            weights = {name: x.clone() for name, x in original(model, head).items()}
            (name,) = [name for name in weights if name.endswith(damaged)]
            weights[name].view(-1)[3] += 1e-4
            return weights

        monkeypatch.setattr(convert_module, "in_our_names", wrong)
        first = {"embeddings.norm.weight": "hidden_states.0", "lm_head.bias": "logits"}.get(damaged, "hidden_states.3")
        with pytest.raises(ValueError, match=rf"Nothing was written.*The first is {first} \(") as caught:
            convert(tmp_path / "source", tmp_path / "ours")
        assert "1e-10 is allowed" in str(caught.value)
        assert os.listdir(tmp_path) == ["source"]

    @pytest.mark.parametrize(
        ("name", "wrong"),
        [
            ("bert", {"norm_eps": 1e-7}),
            ("bert", {"hidden_act": "gelu_pytorch_tanh"}),
            ("roberta", {"pooling": "mean"}),
            ("electra", {"head_type": "roberta"}),
            ("longformer", {"window_radius": [4, 4, 6]}),
            ("longformer", {"num_global_tokens": 0}),
            ("modernbert", {"rope_parameters": {"full": {"rope_theta": 10_001.0}, "sliding_window": {}}}),
        ],
    )
    def test_a_wrong_option_is_found(self, name, wrong, tmp_path, monkeypatch):
        save_source(tmp_path / "source", name, "sequence_classification")
        monkeypatch.setattr(convert_module, "SelfAttnConfig", lambda **options: SelfAttnConfig(**{**options, **wrong}))
        with pytest.raises(ValueError, match="Nothing was written, for the converted model is not the source"):
            convert(tmp_path / "source", tmp_path / "ours")

    def test_swapped_projections_are_found(self, tmp_path, monkeypatch):
        save_source(tmp_path / "source", "modernbert")
        family = FAMILIES["modernbert"]
        monkeypatch.setitem(family.names, "attn.Wqkv", "attention./k_proj+q_proj+v_proj/")
        with pytest.raises(ValueError, match=r"The first is hidden_states\.1 \("):
            convert(tmp_path / "source")

    def test_the_seed_gives_the_batches(self, tmp_path):
        save_source(tmp_path / "source", "bert")
        runs = [convert(tmp_path / "source", seed=seed)[1]["proof"]["errors"]["bfloat16"] for seed in (0, 0, 1)]
        assert runs[0] == runs[1] != runs[2]


class TestCertificate:
    def test_what_it_says(self, tmp_path):
        save_source(tmp_path / "source", "bert", "token_classification")
        _, certificate = convert(tmp_path / "source", tmp_path / "ours", seed=3)
        written = json.loads((tmp_path / "ours" / CERTIFICATE).read_text())
        assert written == json.loads(json.dumps(certificate))
        assert written["source"]["name"] == "source"
        assert written["source"]["architectures"] == ["BertForTokenClassification"]
        assert len(written["source"]["config_sha256"]) == 64
        assert written["result"] == "SelfAttnForTokenClassification"
        assert written["versions"]["transformers"] == transformers.__version__
        proof = written["proof"]
        assert proof["seed"] == 3
        assert proof["batches"]["padded on the right"] == [3, 128]
        assert set(proof["errors"]) == {"float64", "float32", "bfloat16"}
        outputs = {"hidden_states.0", "hidden_states.1", "hidden_states.2", "hidden_states.3", "logits"}
        assert all(set(errors["by_output"]) == outputs for errors in proof["errors"].values())
        assert proof["errors"]["float64"]["tolerance"] == 1e-10
        assert set(written["weights_sha256"]) == {"model.safetensors"}

    def test_it_holds_no_path(self, tmp_path):
        save_source(tmp_path / "source", "bert")
        convert(tmp_path / "source", tmp_path / "ours")
        for path in (tmp_path / "ours").glob("*.json"):
            assert str(tmp_path) not in path.read_text(), path.name

    def test_in_a_few_lines(self, tmp_path):
        save_source(tmp_path / "source", "distilbert")
        text = told(convert(tmp_path / "source", pattern="sliding_window", window_radius=4)[1])
        assert text.startswith("source -> SelfAttnForMaskedLM\n  float64: largest error ")
        assert "changed: attention_pattern from full to sliding_window" in text
        assert "in training: hidden_dropout is also applied" in text


class TestChanges:
    def test_a_window_and_more_positions(self, tmp_path):
        """Positions are copied again and again, as Longformer's authors did."""
        source = save_with_tokenizer(tmp_path / "source")
        changes = {"pattern": "sliding_window", "window_radius": 5, "max_positions": 400}
        _, certificate = convert(tmp_path / "source", tmp_path / "ours", **changes)
        ours = open_ours(tmp_path / "ours")
        table, old = ours.model.embeddings.positions.weight, source.bert.embeddings.position_embeddings.weight
        assert torch.equal(table, torch.cat((old, old, old[:100])))
        options = certificate["changed"]["options"]
        assert options["attention_pattern"] == {"from": "full", "to": "sliding_window"}
        assert options["max_position_embeddings"]["to"] == 400
        assert "the 150 positions copied again and again to make 400" in options["max_position_embeddings"]["how"]
        assert AutoTokenizer.from_pretrained(tmp_path / "ours").model_max_length == 400
        ids = torch.randint(5, 43, (1, 400), generator=torch.Generator().manual_seed(0))
        assert ours(ids).logits.shape[1] == 400
        # Six tokens see each other, and seven do not.
        assert certificate["changed"]["unchanged"]["tokens"] == 6
        assert_close(ours(ids[:, :6]).logits, source(ids[:, :6]).logits)
        assert (ours(ids[:, :7]).logits - source(ids[:, :7]).logits).abs().max() > 1e-3

    def test_fewer_positions(self, tmp_path):
        source = save_source(tmp_path / "source", "bert")
        model, certificate = convert(tmp_path / "source", max_positions=20)
        assert torch.equal(
            model.model.embeddings.positions.weight, source.bert.embeddings.position_embeddings.weight[:20]
        )
        assert "the first 20 of 150" in certificate["changed"]["options"]["max_position_embeddings"]["how"]

    def test_global_projections_begin_as_the_others(self, tmp_path):
        save_source(tmp_path / "source", "roberta")
        changes = {"pattern": "longformer", "window_radius": 5, "global_projections": True}
        model, certificate = convert(tmp_path / "source", **changes)
        attention = model.model.layers[1].attention
        assert torch.equal(attention.of_global.q_proj.weight, attention.q_proj.weight)
        assert "copies" in certificate["changed"]["options"]["global_projections"]["how"]

    def test_numbers_of_the_former_pattern_do_not_stay(self, tmp_path):
        save_source(tmp_path / "source", "longformer")
        model, _ = convert(tmp_path / "source", pattern="full")
        assert (model.config.window_radius, model.config.global_projections) == (None, None)
        assert not any("of_global" in name for name in model.state_dict())

    def test_big_bird_says_which_blocks(self, tmp_path):
        save_source(tmp_path / "source", "big_bird", attention_type="block_sparse", block_size=8, num_random_blocks=1)
        with pytest.raises(ValueError, match=r"up to 56 tokens it is full attention.*pattern='full', or pattern='big"):
            convert(tmp_path / "source")
        assert convert(tmp_path / "source", pattern="full")[0].config.attention_pattern == "full"
        model, certificate = convert(tmp_path / "source", pattern="bigbird", block_size=8, num_random_blocks=1)
        assert (model.config.attention_pattern, model.config.num_random_blocks) == ("bigbird", 1)
        assert certificate["changed"]["unchanged"]["tokens"] == 16

    def test_two_rotations_need_a_word(self, tmp_path):
        save_source(tmp_path / "source", "modernbert")
        with pytest.raises(ValueError, match="Say rope_parameters"):
            convert(tmp_path / "source", pattern="sliding_window", window_radius=3)
        changes = {"pattern": "sliding_window", "window_radius": 3, "rope_parameters": {"rope_theta": 50.0}}
        model, certificate = convert(tmp_path / "source", **changes)
        assert model.config.rope_parameters == {"rope_theta": 50.0}
        assert certificate["changed"]["unchanged"] is None

    def test_an_attention_that_changes_short_texts_is_found(self, tmp_path, monkeypatch):
        save_source(tmp_path / "source", "bert")
        monkeypatch.setattr("hf_selfattn.tools.convert_changes.sees_all", lambda config: sees_all(config) + 3)
        with pytest.raises(ValueError, match="the changed attention is another one for texts of 9 tokens"):
            convert(tmp_path / "source", pattern="sliding_window", window_radius=5)

    @pytest.mark.parametrize(
        ("changes", "match"),
        [
            ({"hidden_size": 8}, "convert cannot change 'hidden_size': it knows pattern, max_positions"),
            ({"max_position": 8}, "Did you mean 'max_positions' or 'max_position_embeddings'"),
            ({"pattern": "full", "attention_pattern": "full"}, "attention_pattern is said twice"),
        ],
    )
    def test_what_cannot_be_changed(self, changes, match, tmp_path):
        with pytest.raises(TypeError, match=match):
            convert(tmp_path / "nowhere", **changes)


ROUND_TRIPS = [(name, head) for name in ("bert", "modernbert") for head in AUTO_CLASSES]


class TestBack:
    @pytest.mark.parametrize(("name", "head"), ROUND_TRIPS)
    def test_there_and_back_every_bit_is_the_same(self, name, head, tmp_path):
        source = save_source(tmp_path / "source", name, head)
        convert(tmp_path / "source", tmp_path / "ours")
        back, certificate = convert(tmp_path / "ours", tmp_path / "back", to=name)
        opened = type(source).from_pretrained(tmp_path / "back")
        kept = {key: x for key, x in source.state_dict().items() if head != "base" or not key.startswith("pooler.")}
        for model in (back, opened):
            state = model.state_dict()
            assert set(kept) <= set(state)
            assert all(torch.equal(state[key], tensor) for key, tensor in kept.items())
        assert type(back) is type(source)
        assert certificate["proof"]["errors"]["float64"]["largest"] <= 1e-10
        assert certificate["added"] == []
        forget = {"transformers_version", "_name_or_path", "dtype", "classifier_dropout"}
        wanted = {key: value for key, value in source.config.to_dict().items() if key not in forget}
        actual = back.config.to_dict()
        assert {key: actual[key] for key in wanted if key not in ("cls_token_id", "sep_token_id")} == {
            key: value for key, value in wanted.items() if key not in ("cls_token_id", "sep_token_id")
        }

    def test_a_model_without_token_types_gets_one_of_zeros(self, tmp_path):
        save_source(tmp_path / "source", "distilbert")
        convert(tmp_path / "source", tmp_path / "ours")
        back, certificate = convert(tmp_path / "ours", to="bert")
        assert certificate["added"] == ["bert.embeddings.token_type_embeddings.weight: 0"]
        assert not back.bert.embeddings.token_type_embeddings.weight.any()

    def test_a_damaged_way_back_is_found(self, tmp_path, monkeypatch):
        save_source(tmp_path / "source", "bert")
        convert(tmp_path / "source", tmp_path / "ours")
        monkeypatch.setitem(FAMILIES["bert"].names, "attention.self.query", "attention.k_proj")
        with pytest.raises(ValueError, match="Nothing was written"):
            convert(tmp_path / "ours", tmp_path / "back", to="bert")

    @pytest.mark.parametrize(
        ("name", "to", "match"),
        [
            ("roberta", "modernbert", r"cannot be turned into a modernbert: position_encoding='learned', and modernb"),
            (
                "modernbert",
                "bert",
                r"norm_position='pre', and bert has 'post'.*mlp_type='gated', and bert has 'pl",
            ),
            ("electra", "bert", r"embedding_size=14, and in bert it is hidden_size"),
            ("longformer", "bert", r"attention_pattern='longformer', and bert has 'full'"),
            ("eurobert", "modernbert", r"num_key_value_heads=2, and modernbert has as many as heads"),
        ],
    )
    def test_what_does_not_fit_is_refused_with_all_reasons(self, name, to, match, tmp_path):
        save_source(tmp_path / "source", name, "base" if name == "eurobert" else "masked_lm")
        convert(tmp_path / "source", tmp_path / "ours")
        with pytest.raises(ValueError, match=match):
            convert(tmp_path / "ours", tmp_path / "back", to=to)
        assert not (tmp_path / "back").exists()

    @pytest.mark.parametrize(
        ("name", "match"),
        [("distilbert", "head_type='distilbert' with pooling='first', and bert has tanh"), ("electra", "'electra'")],
    )
    def test_heads_that_bert_has_not(self, name, match, tmp_path):
        save_source(tmp_path / "source", name, "sequence_classification")
        convert(tmp_path / "source", tmp_path / "ours")
        with pytest.raises(ValueError, match=match):
            convert(tmp_path / "ours", to="bert")

    def test_it_takes_ours_and_no_changes(self, tmp_path):
        save_source(tmp_path / "source", "bert")
        with pytest.raises(ValueError, match="to='bert' turns a model of ours into one, got a 'bert'"):
            convert(tmp_path / "source", to="bert")
        convert(tmp_path / "source", tmp_path / "ours")
        with pytest.raises(ValueError, match="keeps the attention as it is"):
            convert(tmp_path / "ours", to="bert", max_positions=10)
        with pytest.raises(ValueError, match="can be turned into 'bert' or 'modernbert', got 'roberta'"):
            convert(tmp_path / "ours", to="roberta")
        with pytest.raises(ValueError, match=r"a model of ours already\. Pass to="):
            convert(tmp_path / "ours")


REFUSED = {
    "an unknown model type": ("deberta-v2", {}, "Known are bert, ernie, roberta, xlm-roberta, camembert"),
    "a decoder": ("bert", {"is_decoder": True}, "it is a decoder"),
    "a vector of the task": ("ernie", {"use_task_id": True}, "use_task_id=True"),
    "scaled embeddings": ("big_bird", {"rescale_embeddings": True}, "rescale_embeddings=True"),
    "no bias in three": ("big_bird", {"use_bias": False}, "use_bias=False"),
    "an output without a bias": ("modernbert", {"decoder_bias": False}, "decoder_bias=False"),
    "a bias in the head": ("modernbert", {"classifier_bias": True}, "classifier_bias=True"),
    "another activation": ("modernbert", {"classifier_activation": "relu"}, "classifier_activation='relu' differs"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_converted(what, tmp_path):
    name, options, match = REFUSED[what]
    save_source(tmp_path / "source", name, **options)
    with pytest.raises(ValueError, match=match):
        convert(tmp_path / "source", tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize(
    ("name", "head", "options", "match"),
    [
        ("big_bird", "question_answering", {}, "a feed-forward of its own; pass head='base'"),
        (
            "big_bird",
            "sequence_classification",
            {"hidden_act": "gelu_new"},
            "classifier's activation is 'gelu_new'",
        ),
        (
            "bert",
            "question_answering",
            {"num_labels": 3},
            "its head for answers has 3 outputs, and ours has start and",
        ),
        ("electra", "multiple_choice", {"summary_type": "mean"}, r"its summary is \('mean', True, 'gelu'\)"),
    ],
)
def test_heads_that_cannot_be_converted(name, head, options, match, tmp_path):
    save_source(tmp_path / "source", name, head, **options)
    with pytest.raises(ValueError, match=match):
        convert(tmp_path / "source")
    assert convert(tmp_path / "source", head="base")[1]["proof"]["errors"]["float64"]["within"]


class TestHead:
    def test_a_mean_over_each_choice(self, tmp_path):
        """Which ModernBERT takes only with a mask."""
        save_source(tmp_path / "source", "modernbert", "multiple_choice", classifier_pooling="mean")
        _, certificate = convert(tmp_path / "source")
        assert certificate["proof"]["errors"]["float64"]["largest"] <= 1e-10

    def test_one_that_the_source_has_not(self, tmp_path):
        save_source(tmp_path / "source", "bert", "sequence_classification")
        with pytest.raises(ValueError, match="its head 'masked_lm' would be a random one"):
            convert(tmp_path / "source", head="masked_lm")

    def test_one_that_there_is_not(self, tmp_path):
        save_source(tmp_path / "source", "bert")
        with pytest.raises(ValueError, match="Did you mean 'masked_lm'"):
            convert(tmp_path / "source", head="maskedlm")

    def test_one_that_ours_has_not(self, tmp_path):
        transformers.BertForNextSentencePrediction(make_config("bert")).save_pretrained(tmp_path / "source")
        with pytest.raises(ValueError, match="is a BertForNextSentencePrediction, and no head of ours does its work"):
            convert(tmp_path / "source")

    def test_one_that_the_family_has_not(self, tmp_path):
        save_source(tmp_path / "source", "eurobert", "base")
        with pytest.raises(ValueError, match="A eurobert has no head 'masked_lm' that ours has too"):
            convert(tmp_path / "source", head="masked_lm")


class TestWriting:
    def test_what_is_there_stays(self, tmp_path):
        (tmp_path / "ours").mkdir()
        (tmp_path / "ours" / "notes.txt").write_text("mine")
        with pytest.raises(FileExistsError, match="is there and not an empty folder"):
            convert(tmp_path / "nowhere", tmp_path / "ours")
        assert os.listdir(tmp_path / "ours") == ["notes.txt"]

    def test_an_empty_folder_is_taken(self, tmp_path):
        save_source(tmp_path / "source", "bert")
        (tmp_path / "ours").mkdir()
        convert(tmp_path / "source", tmp_path / "ours")
        assert (tmp_path / "ours" / "model.safetensors").is_file()

    @pytest.mark.parametrize("where", ["save_tokenizer", "_check_written", "_sha256"])
    def test_interrupted_it_leaves_nothing(self, where, tmp_path, monkeypatch):
        save_with_tokenizer(tmp_path / "source")

        def fail(*args):
            raise KeyboardInterrupt

        monkeypatch.setattr(convert_module, where, fail)
        with pytest.raises(KeyboardInterrupt):
            convert(tmp_path / "source", tmp_path / "ours")
        assert os.listdir(tmp_path) == ["source"]

    def test_a_weight_that_was_not_written_as_it_is(self, tmp_path, monkeypatch):
        save_source(tmp_path / "source", "bert")
        original = convert_module.load_file
        monkeypatch.setattr(
            convert_module, "load_file", lambda file: {name: tensor + 1 for name, tensor in original(file).items()}
        )
        with pytest.raises(OSError, match="was not written as it is"):
            convert(tmp_path / "source", tmp_path / "ours")
        assert os.listdir(tmp_path) == ["source"]

    def test_the_folder_is_as_open_as_any(self, tmp_path):
        save_source(tmp_path / "source", "bert")
        convert(tmp_path / "source", tmp_path / "ours")
        (tmp_path / "usual").mkdir()
        assert (tmp_path / "ours").stat().st_mode == (tmp_path / "usual").stat().st_mode

    def test_a_source_that_is_no_checkpoint(self, tmp_path):
        (tmp_path / "source").mkdir()
        with pytest.raises(FileNotFoundError, match=r"is not a checkpoint: it has no config\.json"):
            convert(tmp_path / "source")


def test_the_command(tmp_path, capsys):
    save_with_tokenizer(tmp_path / "source", "roberta")
    changes = ["--pattern", "sliding_window", "--window_radius", "8", "--max_positions", "300"]
    assert main([str(tmp_path / "source"), str(tmp_path / "ours"), *changes]) == 0
    told_of = capsys.readouterr().out
    assert "source -> SelfAttnForMaskedLM" in told_of
    assert "changed: window_radius from None to 8" in told_of
    assert open_ours(tmp_path / "ours").config.max_position_embeddings == 300
    assert main([str(tmp_path / "source"), str(tmp_path / "ours")]) == 1
    assert "is there and not an empty folder" in capsys.readouterr().err


def test_the_command_with_values_for_each_layer(tmp_path, capsys):
    save_source(tmp_path / "source", "bert")
    changes = ["--pattern", '["full", "sliding_window", "full"]', "--window_radius", "[null, 3, null]"]
    assert main([str(tmp_path / "source"), str(tmp_path / "ours"), *changes]) == 0
    assert open_ours(tmp_path / "ours").config.window_radius == [None, 3, None]
