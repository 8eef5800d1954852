"""To the Hub and back, with huggingface_hub's own client over HTTP, against a Hub on the loopback address.

Three processes, since the client reads its endpoint when it is imported: who shares (tests/hub_author.py), who opens
it without the package (tests/hub_reader.py), and the same without a network.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load
from transformers import BertConfig, BertForMaskedLM

from hf_selfattn.tools.safe_checkpoints import why_not_whole
from hf_selfattn.tools.tokenizer import save_tokenizer

from .hub_author import HEADS, METRICS
from .hub_reader import MARKER
from .hub_server import Hub
from .test_save_load import CODE
from .train_scripts import ROOT, tiny_tokenizer

TOKENS = {"hf_of_ann": "ann", "hf_of_bob": "bob"}
USER = "annabel-the-author"
TOKENIZER = {"tokenizer.json", "tokenizer_config.json"}
MODEL = CODE | {"config.json", "model.safetensors"}
CHECKPOINT = {"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"}


def run(command, endpoint, folder, **more):
    """A process with a home, a cache and a working directory of its own."""
    home = folder / USER
    home.mkdir(exist_ok=True)
    left_out = ("PYTHONPATH", "HF_HUB_OFFLINE", "HF_HUB_CACHE", "HF_MODULES_CACHE", "TRANSFORMERS_OFFLINE")
    environment = {name: value for name, value in os.environ.items() if name not in left_out}
    environment |= {"HF_ENDPOINT": endpoint, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(home / "cache"), "USER": USER,
                    "HOME": str(home), "HF_TOKEN": "hf_of_ann", "HF_HUB_DISABLE_PROGRESS_BARS": "1",
                    "HF_HUB_DISABLE_TELEMETRY": "1", "OMP_NUM_THREADS": "1", **more}  # fmt: skip
    done = subprocess.run(
        [sys.executable, *command], cwd=home, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The Hub after all, its requests by process, and what each process tells."""
    folder = tmp_path_factory.mktemp("sharing")
    hub, told = Hub(TOKENS), {"folder": folder}
    reader = str(Path(__file__).with_name("hub_reader.py"))
    with hub.serve() as endpoint:
        run(["-m", "tests.hub_author", str(folder)], endpoint, folder, PYTHONPATH=str(ROOT))
        told["uploads"] = [path for method, path, _ in hub.requests if method == "PUT"]
        hub.requests.clear()
        run([reader, str(folder), "online"], endpoint, folder)
        told["requests"] = list(hub.requests)
    run([reader, str(folder), "offline"], endpoint, folder, HF_HUB_OFFLINE="1")
    for name in ("author", "online", "offline"):
        told[name] = json.loads((folder / f"{name}.json").read_text())
    return {**told, "hub": hub}


def files(world, repository, revision="main"):
    return world["hub"].repositories[repository].files(revision)


class TestPushed:
    @pytest.mark.parametrize("head", HEADS)
    def test_exactly_these_files(self, world, head):
        assert set(files(world, f"ann/{head}")) == MODEL | TOKENIZER | {"README.md"}

    def test_exactly_these_files_of_a_run(self, world):
        results = {"training_curve.png", "all_results.json", "train_results.json", "README.md"}
        inside = MODEL | TOKENIZER | CHECKPOINT | {"resume.json", "complete.json"}
        expected = MODEL | TOKENIZER | results | {f"last-checkpoint/{name}" for name in inside}
        assert set(files(world, "ann/run")) == expected

    def test_a_run_is_three_commits(self, world):
        titles = world["hub"].repositories["ann/run"].history()
        assert titles == ["End of training", "Training in progress, step 4", "Training in progress, step 2",
                          "initial commit"]  # fmt: skip

    def test_nothing_of_the_machine(self, world):
        """Beside the stock Trainer's: no path, user or token of the author, and no training text, in any commit."""
        secrets = [str(world["folder"]), str(ROOT), USER, "hf_of_ann", MARKER, MARKER.title()]
        found = []
        for name, repository in world["hub"].repositories.items():
            for commit in repository.commits.values() if name != "ann/stock" else ():
                for path, file in commit["files"].items():
                    found += [(name, path, secret) for secret in secrets if secret.encode() in file.data]
        assert found == []

    def test_the_stock_trainer_pushes_its_arguments(self, world):
        """Why runs are pushed by `HubPushes`: paths and token are in what the stock Trainer pickles."""
        data = files(world, "ann/stock")["training_args.bin"]
        assert b"hf_of_ann" in data
        assert str(world["folder"]).encode() in data

    def test_our_card_stays(self, world):
        card = files(world, "ann/run")["README.md"].decode()
        assert "## Attention" in card
        assert "generated_from_trainer" not in card
        assert "generated_from_trainer" in files(world, "ann/stock")["README.md"].decode()

    def test_private_where_asked(self, world):
        private = {name for name, repository in world["hub"].repositories.items() if repository.private}
        assert private == {"ann/AutoModel", "ann/run", "ann/stock"}

    def test_a_checkpoint_is_whole_after_the_way(self, world, tmp_path):
        for path, data in files(world, "ann/run").items():
            if path.startswith("last-checkpoint/"):
                (tmp_path / path.split("/")[1]).write_bytes(data)
        assert why_not_whole(tmp_path) is None

    def test_large_files_went_by_lfs(self, world):
        repository = world["hub"].repositories["ann/AutoModel"]
        large = {
            path for path, file in repository.commits[repository.resolve("main")]["files"].items() if file.is_large
        }
        assert "model.safetensors" in large
        assert "config.json" not in large


class TestOpened:
    def test_by_every_auto_class_without_the_package(self, world):
        assert world["online"]["heads"] == {
            "problems": {head: [] for head in HEADS},
            "modules": ["transformers_modules"],
        }
        assert not world["online"]["package"]

    def test_by_pipelines(self, world):
        expected = {"fill-mask": 2, "text-classification": 2, "token-classification": 2, "feature-extraction": 2}
        assert world["online"]["pipelines"] == {**expected, "ann/run": ["fill-mask", 5]}

    def test_revisions(self, world):
        """A tag, a branch, main, and the sha of each of their commits."""
        assert len(world["online"]["revisions"]) == 6
        assert set(map(tuple, world["online"]["revisions"].values())) == {()}

    def test_revisions_differ(self, world):
        weights = [load(files(world, "ann/revisions", name)["model.safetensors"]) for name in ("v1", "main", "trial")]
        first, second, third = (x["model.embed_tokens.weight"] for x in weights)
        assert torch.equal(second, first * 1.5)
        assert torch.equal(third, first * 1.5 * 1.5)

    @pytest.mark.parametrize("repository", ["ann/stock", "ann/run"])
    def test_a_run_goes_on(self, world, repository):
        """From the checkpoint of step 2, by the stock Trainer without the package, to the same weights bit for bit."""
        told = world["online"][f"resume {repository}"]
        assert told["steps"] == 4
        assert told["different"] == []
        assert told["moved"] > told["weights"] / 2

    def test_the_card_is_read_back(self, world):
        assert world["online"]["card"] == METRICS


class TestTrouble:
    @pytest.mark.parametrize(
        ("process", "case", "words"),
        [
            ("author", "wrong token", "Invalid credentials in Authorization header"),
            ("author", "no token", "401"),
            ("author", "another's namespace", "You have no right to create a model under the namespace"),
            ("author", "upload always broken", "Error while uploading 'model.safetensors' to the Hub"),
            ("online", "wrong token", "Invalid credentials in Authorization header"),
            ("online", "another's", "is not a local folder and is not a valid model identifier"),
            ("online", "no token", "If this is a private repository"),
            ("online", "no repository", "is not a local folder and is not a valid model identifier"),
            ("online", "no revision", "v7 is not a valid git identifier"),
            ("online", "download always broken", "peer closed connection without sending complete message body"),
            ("online", "model of it", "couldn't find them in the cached files"),
            ("offline", "offline, not in the cache", "couldn't find them in the cached files"),
            ("offline", "no answer, not in the cache", "couldn't find them in the cached files"),
        ],
    )
    def test_a_clear_error(self, world, process, case, words):
        assert words in world[process][case]

    def test_an_upload_goes_on(self, world):
        assert world["author"]["upload broken once"] == "done"
        titles = world["hub"].repositories["ann/faults"].history()
        assert titles == ["Upload SelfAttnForTokenClassification", "initial commit"]

    def test_nothing_half_written_was_pushed(self, world):
        """The file that came at the second attempt is the whole one, and what never came whole is nowhere."""
        first, second = (path for path in dict.fromkeys(world["uploads"][-8:]))
        assert world["uploads"][-8:] == [first] * 2 + [second] * 6
        assert first.split("/")[-1] in world["hub"].objects
        assert second.split("/")[-1] not in world["hub"].objects
        pushed, before = (load(files(world, name)["model.safetensors"])["model.embed_tokens.weight"]
                          for name in ("ann/faults", "ann/AutoModelForTokenClassification"))  # fmt: skip
        assert torch.equal(pushed, before * 3)

    def test_nothing_half_written_is_taken_for_whole(self, world):
        assert world["online"]["left of it"] == []
        assert world["online"]["after that"] == []

    def test_a_download_goes_on_where_it_broke(self, world):
        assert world["online"]["download broken twice"] == "done"
        ranges = [asked for method, path, asked in world["requests"] if method == "GET" and asked]
        assert ranges == ["bytes=5000-", "bytes=8000-"]

    def test_without_a_network(self, world):
        opened = {case: found for case, found in world["offline"].items() if isinstance(found, list)}
        assert len(opened) == 2 * (len(HEADS) + 1)
        assert set(map(tuple, opened.values())) == {()}


def test_the_script_pushes_once_with_its_card(tmp_path):
    """`--push_to_hub`: a commit with model, card and curve, and none before they are there."""
    corpus, hub = tmp_path / "corpus.txt", Hub(TOKENS)
    corpus.write_text("\n".join(f"{MARKER} number {number} of many small sentences" for number in range(60)))
    options = {"max_steps": 2, "max_seq_length": 32, "tokenizer_vocab_size": 300, "num_shown": 0,
               "save_strategy": "no",
               "config_overrides": "hidden_size=16,num_hidden_layers=1,num_attention_heads=2", "report_to": "none",
               "output_dir": tmp_path / "run", "train_file": corpus, "push_to_hub": "true", "use_cpu": "true",
               "hub_model_id": "ann/pretrained"}  # fmt: skip
    arguments = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
    with hub.serve() as endpoint:
        run([str(ROOT / "train" / "pretrain.py"), *arguments], endpoint, tmp_path, PYTHONPATH=str(ROOT))
    repository = hub.repositories["ann/pretrained"]
    assert repository.history() == ["End of training", "initial commit"]
    pushed = repository.files("main")
    expected = {"README.md", "training_curve.png", "all_results.json", "train_results.json", "eval_results.json"}
    assert set(pushed) == MODEL | TOKENIZER | expected
    card = pushed["README.md"].decode()
    assert "## Attention" in card
    assert "corpus.txt" in card
    secrets = (str(tmp_path), USER, "hf_of_ann", MARKER)
    assert [(name, x) for name, file in pushed.items() for x in secrets if x.encode() in file] == []


def test_a_model_of_the_hub_is_converted_and_goes_back_there(tmp_path):
    """By name, over HTTP: stock BERT becomes ours, and what was pushed of that becomes BERT again, bit for bit."""
    hub, sizes = Hub(TOKENS), {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    stock = BertForMaskedLM(BertConfig(vocab_size=len(tiny_tokenizer()), intermediate_size=24, **sizes))
    stock.save_pretrained(tmp_path / "stock")
    save_tokenizer(tiny_tokenizer(), tmp_path / "stock")
    upload = "from huggingface_hub import HfApi; api = HfApi(); api.create_repo('ann/{0}'); "
    upload += "api.upload_folder(repo_id='ann/{0}', folder_path='../{0}')"
    convert = ["-m", "hf_selfattn.tools.convert"]
    with hub.serve() as endpoint:
        for command in (
            ["-c", upload.format("stock")],
            [*convert, "ann/stock", "../ours"],
            ["-c", upload.format("ours")],
            [*convert, "ann/ours", "../theirs", "--to", "bert"],
        ):
            run(command, endpoint, tmp_path, PYTHONPATH=str(ROOT))
    assert set(hub.repositories["ann/ours"].files("main")) == MODEL | TOKENIZER | {"conversion.json"}
    back = BertForMaskedLM.from_pretrained(tmp_path / "theirs").state_dict()
    assert back.keys() == stock.state_dict().keys()
    assert all(torch.equal(back[name], weight) for name, weight in stock.state_dict().items())
