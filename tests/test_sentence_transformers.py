"""sentence-transformers on our checkpoints: embeddings, training, saving, loading, and roads without padding."""

import json
import os
import pickle
import subprocess
import sys

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from sentence_transformers import CrossEncoder, SentenceTransformer, SparseEncoder
from sentence_transformers.cross_encoder import CrossEncoderTrainer, CrossEncoderTrainingArguments
from sentence_transformers.cross_encoder.losses import BinaryCrossEntropyLoss
from sentence_transformers.sentence_transformer import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.losses import CosineSimilarityLoss, MultipleNegativesRankingLoss
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM, AutoTokenizer, modeling_flash_attention_utils

from hf_selfattn import SelfAttnConfig, SelfAttnForMaskedLM
from hf_selfattn.tools.tokenizer import save_tokenizer

from .processes import where_refused
from .test_save_load import CODE
from .tolerances import assert_close
from .train_scripts import sentences, tiny_tokenizer

SIZES = {
    "hidden_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "head_dim": 6,
    "value_head_dim": 5,
    "intermediate_size": 18,
    "initializer_range": 0.2,
    "pad_token_id": 0,
}
FORMS = {
    "full": {},
    "causal_window": {"attention_pattern": "sliding_window", "window_radius": 4, "causal": True},
    "bigbird": {"attention_pattern": "bigbird", "block_size": 8, "num_random_blocks": 1, "position_encoding": "alibi"},
    "learned": {"position_encoding": "learned", "max_position_embeddings": 900, "score_function": "cosine"},
}
TEXTS = [*sentences(7), " ".join(sentences(60)), "", "whales"]
"""Short ones, one of more than 500 tokens, and one of special tokens alone."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """(form) -> the folder of a masked language model, made once."""
    made = {}

    def make(form="full"):
        if form not in made:
            made[form] = str(tmp_path_factory.mktemp(form))
            torch.manual_seed(0)
            config = SelfAttnConfig(vocab_size=len(tiny_tokenizer()), **SIZES, **FORMS[form])
            SelfAttnForMaskedLM(config).save_pretrained(made[form])
            save_tokenizer(tiny_tokenizer(), made[form])
        return made[form]

    return make


def open_as(cls, path, **options):
    return cls(str(path), device="cpu", local_files_only=True, **options)


def embeddings(model, texts=TEXTS, **options):
    return model.encode(texts, convert_to_tensor=True, show_progress_bar=False, **options)


def one_by_one(path, texts=TEXTS):
    """The mean of each text's last hidden states, without padding and without the library."""
    model, tokenizer = AutoModel.from_pretrained(path).eval(), AutoTokenizer.from_pretrained(path)
    with torch.no_grad():
        outputs = [model(tokenizer(text, return_tensors="pt")["input_ids"])[0][0] for text in texts]
    return torch.stack([output.mean(0) for output in outputs])


@pytest.mark.parametrize("form", FORMS)
class TestEmbeddings:
    def test_the_mean_over_real_tokens(self, folder, form):
        model = open_as(SentenceTransformer, folder(form))
        assert [type(module).__name__ for module in model] == ["Transformer", "Pooling"]
        assert model[1].pooling_mode == "mean"
        assert model.get_embedding_dimension() == SIZES["hidden_size"]
        assert_close(embeddings(model), one_by_one(folder(form)))

    @pytest.mark.parametrize("side", ["left", "right"])
    def test_alone_and_in_batches(self, folder, form, side):
        model = open_as(SentenceTransformer, folder(form))
        model.tokenizer.padding_side = side
        alone = torch.stack([embeddings(model, text) for text in TEXTS])
        for batch_size in (2, 3, len(TEXTS)):
            assert_close(embeddings(model, batch_size=batch_size), alone)

    def test_normalized(self, folder, form):
        model = open_as(SentenceTransformer, folder(form))
        expected = torch.nn.functional.normalize(one_by_one(folder(form)), dim=1)
        found = embeddings(model, normalize_embeddings=True)
        assert_close(found, expected)
        assert_close(model.similarity(found, found), expected @ expected.T)

    def test_nothing_is_new(self, folder, form):
        """The encoder is all there is, and no pooler was drawn at random."""
        model = open_as(SentenceTransformer, folder(form))
        saved = AutoModelForMaskedLM.from_pretrained(folder(form)).model.state_dict()
        opened = model[0].auto_model.state_dict()
        assert set(opened) == set(saved)
        assert all(torch.equal(x, saved[name]) for name, x in opened.items())


class TestLength:
    def test_a_model_without_a_limit_has_the_tokenizers(self, folder, tmp_path):
        model = open_as(SentenceTransformer, folder("full"))
        assert model.max_seq_length == AutoTokenizer.from_pretrained(folder("full")).model_max_length > 10**9
        tokenizer = AutoTokenizer.from_pretrained(folder("full"), model_max_length=12)
        AutoModel.from_pretrained(folder("full")).save_pretrained(tmp_path)
        tokenizer.save_pretrained(tmp_path)
        assert open_as(SentenceTransformer, tmp_path).max_seq_length == 12

    def test_a_limit_of_the_config_cuts_texts(self, folder):
        model = open_as(SentenceTransformer, folder("learned"))
        assert model.max_seq_length == 900
        far = TEXTS[7] * 3
        assert model.preprocess([far])["input_ids"].shape[1] == 900
        assert embeddings(model, far).isfinite().all()

    def test_one_that_is_set_is_saved(self, folder, tmp_path):
        model = open_as(SentenceTransformer, folder("full"))
        model.max_seq_length = 9
        model.save(str(tmp_path))
        again = open_as(SentenceTransformer, tmp_path)
        assert again.max_seq_length == 9
        assert again.preprocess(TEXTS)["input_ids"].shape[1] == 9
        assert_close(embeddings(again), embeddings(model))

    def test_no_limit_is_no_attribute(self):
        config = SelfAttnConfig()
        assert not hasattr(config, "max_position_embeddings")
        with pytest.raises(
            AttributeError, match=r"has no max_position_embeddings: there is no limit\. Set one, or ask"
        ):
            _ = config.max_position_embeddings
        config.max_position_embeddings = 7
        assert (config.max_position_embeddings, pickle.loads(pickle.dumps(config))) == (7, config)
        del config.max_position_embeddings
        assert not hasattr(config, "max_position_embeddings")
        config.max_position_embeddings = None
        assert config == SelfAttnConfig()

    def test_a_limit_given_when_loading(self, folder, tmp_path):
        config = AutoConfig.from_pretrained(folder("full"), max_position_embeddings=30)
        assert config.max_position_embeddings == 30
        config.save_pretrained(tmp_path)
        assert AutoConfig.from_pretrained(tmp_path).max_position_embeddings == 30
        assert AutoConfig.from_pretrained(tmp_path, max_position_embeddings=8).max_position_embeddings == 8
        assert not hasattr(
            AutoConfig.from_pretrained(tmp_path, max_position_embeddings=None), "max_position_embeddings"
        )
        assert (
            AutoModel.from_pretrained(folder("full"), max_position_embeddings=30).config.max_position_embeddings == 30
        )


class TestWithoutPadding:
    def test_layers_see_real_tokens_alone(self, folder):
        """A padded batch is packed inside, so the library's own way of doing that has nothing to add."""
        model, seen = open_as(SentenceTransformer, folder("full")), []
        features = model.preprocess(TEXTS)
        model[0].auto_model.layers[0].register_forward_hook(lambda module, given, output: seen.append(output.shape))
        with torch.no_grad():
            model(features)
        real = int(features["attention_mask"].sum())
        assert seen == [(1, real, SIZES["hidden_size"])]
        assert real < features["attention_mask"].numel() / 3

    @pytest.mark.parametrize("form", FORMS)
    def test_the_librarys_own_road_gives_the_same(self, folder, form, monkeypatch):
        """It flattens batches where flash attention is installed and named: one row, boundaries and positions."""
        model = open_as(SentenceTransformer, folder(form))
        expected = embeddings(model)
        monkeypatch.setattr(type(model[0]), "_is_flash_attention_requested", lambda self: True)
        functions = (len,) * 4, None
        monkeypatch.setattr(modeling_flash_attention_utils, "lazy_import_flash_attention", lambda name: functions)
        model[0].unpad_inputs = True
        assert model[0].can_flatten_inputs
        features = model.preprocess(TEXTS)
        assert features["input_ids"].shape[0] == 1
        assert len(features["cu_seq_lens_q"]) == len(TEXTS) + 1
        assert "attention_mask" not in features
        assert_close(embeddings(model), expected)


def pairs(count=24):
    """Sentences, and the same without their ends."""
    texts = sentences(2 * count, seed=3)
    return Dataset.from_dict({"anchor": texts[:count], "positive": [text.rsplit(",", 1)[0] for text in texts[:count]]})


def scored():
    texts = sentences(24, seed=4)
    return Dataset.from_dict({"a": texts, "b": texts[1:] + texts[:1], "score": [float(i % 2) for i in range(24)]})


LOSSES = {"ranking": (MultipleNegativesRankingLoss, pairs), "similarity": (CosineSimilarityLoss, scored)}


def train(model, rows, loss, path, trainer_class, arguments_class, steps=15, rate=2e-2):
    arguments = arguments_class(
        str(path), max_steps=steps, per_device_train_batch_size=24, learning_rate=rate, logging_steps=1, use_cpu=True,
        report_to=[], save_strategy="no", disable_tqdm=True, seed=0,
    )  # fmt: skip
    trainer = trainer_class(model=model, args=arguments, train_dataset=rows, loss=loss)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def assert_same_tensors(actual, expected):
    actual, expected = actual.state_dict(), expected.state_dict()
    assert set(actual) == set(expected) != set()
    for name, x in expected.items():
        assert torch.equal(actual[name], x), name


@pytest.mark.parametrize(("loss", "form"), [("ranking", "causal_window"), ("similarity", "full")])
def test_trained_saved_and_opened(folder, loss, form, tmp_path):
    make, rows = LOSSES[loss]
    model = open_as(SentenceTransformer, folder(form))
    before = embeddings(model)
    losses = train(
        model, rows(), make(model), tmp_path, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
    )
    assert losses[-1] < 0.7 * losses[0]
    expected = embeddings(model)
    assert (expected - before).abs().max() > 0.1
    model.save(str(tmp_path / "saved"))
    again = open_as(SentenceTransformer, tmp_path / "saved")
    assert_same_tensors(again, model)
    assert_close(embeddings(again), expected)
    assert_close(one_by_one(tmp_path / "saved"), expected)


def test_adapters(folder, tmp_path):
    """`add_adapter` of the library, with LoRA: its numbers come back from the file."""
    model = open_as(SentenceTransformer, folder("full"))
    before = embeddings(model)
    torch.manual_seed(0)
    model.add_adapter(LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    expected = embeddings(model)
    assert (expected - before).abs().max() > 0.01
    model.save(str(tmp_path))
    assert (tmp_path / "adapter_model.safetensors").is_file()
    assert_close(embeddings(open_as(SentenceTransformer, tmp_path)), expected)


# Run where `hf_selfattn` cannot be imported.
ELSEWHERE = (
    where_refused("hf_selfattn")
    + """
import json, sys
import torch
from sentence_transformers import SentenceTransformer

torch.set_num_threads(1)
told = json.loads(sys.argv[1])
model = SentenceTransformer(told["folder"], device="cpu", local_files_only=True, trust_remote_code=True)
torch.save(model.encode(told["texts"], convert_to_tensor=True, show_progress_bar=False), told["answer"])
model.save(told["again"])
print(json.dumps({"module": type(model[0].auto_model).__module__.split(".")[0], "length": model.max_seq_length}))
"""
)


def test_opens_without_the_package(folder, tmp_path):
    """And what is saved there opens here."""
    model = open_as(SentenceTransformer, folder("causal_window"))
    model.max_seq_length = 700
    model.save(str(tmp_path / "saved"))
    assert {file.name for file in (tmp_path / "saved").iterdir()} >= CODE
    told = {"folder": "saved", "texts": TEXTS, "answer": "answer.pt", "again": "again"}
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, json.dumps(told)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == {"module": "transformers_modules", "length": 700}
    assert_close(torch.load(tmp_path / "answer.pt"), embeddings(model))
    assert {file.name for file in (tmp_path / "again").iterdir()} >= CODE
    again = open_as(SentenceTransformer, tmp_path / "again", trust_remote_code=True)
    assert_same_tensors(again, model)
    assert_close(embeddings(again), embeddings(model))


QUESTIONS = [(a, b) for a in TEXTS[:3] for b in TEXTS]


def test_cross_encoder(folder, tmp_path):
    """One number for a pair of texts: the classifier's logit; trained, saved and opened."""
    path = folder("full")
    torch.manual_seed(0)  # of the new classifier
    model, tokenizer = open_as(CrossEncoder, path), AutoTokenizer.from_pretrained(path)
    with torch.no_grad():
        logits = [
            model[0].auto_model.eval()(**tokenizer([a], [b], return_tensors="pt")).logits[0] for a, b in QUESTIONS
        ]
    options = {"convert_to_tensor": True, "show_progress_bar": False}
    found = model.predict(QUESTIONS, batch_size=5, activation_fn=torch.nn.Identity(), **options)
    assert_close(found, torch.cat(logits))

    rows, loss = scored().rename_column("score", "label"), BinaryCrossEntropyLoss(model)
    losses = train(
        model, rows, loss, tmp_path, CrossEncoderTrainer, CrossEncoderTrainingArguments, steps=30, rate=5e-3
    )
    assert losses[-1] < 0.7 * losses[0]
    model.save_pretrained(str(tmp_path / "saved"))
    again = open_as(CrossEncoder, tmp_path / "saved")
    assert_same_tensors(again, model)
    assert_close(again.predict(QUESTIONS, **options), model.predict(QUESTIONS, **options))


def test_sparse_encoder(folder, tmp_path):
    """SPLADE on the masked language model's head: log(1 + relu(logit)), the greatest over a text's tokens."""
    model = open_as(SparseEncoder, folder("full"))
    head, tokenizer = (
        AutoModelForMaskedLM.from_pretrained(folder("full")).eval(),
        AutoTokenizer.from_pretrained(folder("full")),
    )
    expected = []
    with torch.no_grad():
        for text in TEXTS:
            logits = head(**tokenizer(text, return_tensors="pt")).logits[0]
            expected.append(logits.relu().log1p().amax(0))
    found = model.encode(TEXTS, batch_size=4, convert_to_sparse_tensor=False, show_progress_bar=False)
    assert_close(found, torch.stack(expected))
    model.save_pretrained(str(tmp_path))
    again = open_as(SparseEncoder, tmp_path)
    assert_same_tensors(again, model)
    assert_close(again.encode(TEXTS, convert_to_sparse_tensor=False, show_progress_bar=False), found)
