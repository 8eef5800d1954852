"""Who opens what was shared: a process without the package, with the Hub of `HF_ENDPOINT`. See tests/test_hub.py.

    python tests/hub_reader.py FOLDER online
    python tests/hub_reader.py FOLDER offline

It leaves FOLDER/online.json or FOLDER/offline.json, {case: what happened}.
"""

import json
import os
import sys
import time
import urllib.request
from pathlib import Path

MARKER = "the lighthouse keeper wrote nobody a letter"


class Refused:
    """An import hook for which the package is not there."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.split(".")[0] == "hf_selfattn":
            raise ModuleNotFoundError(f"No module named {name!r}")


def attempt(function):
    """What came of it: "done", or the error, and where it came from, as text."""
    try:
        function()
    except Exception as error:
        texts = []
        while error is not None:
            texts.append(f"{type(error).__name__}: {error}")
            error = error.__cause__ or error.__context__
        return "\n".join(texts)
    return "done"


def set_faults(**sizes):
    data = json.dumps(sizes).encode()
    urllib.request.urlopen(urllib.request.Request(os.environ["HF_ENDPOINT"] + "/faults", data=data)).read()


def training_rows(tokenizer):
    """Sixteen examples of one length, each asked for all of its tokens."""
    import torch

    texts = [f"{MARKER}, {number}." for number in range(10, 26)]
    ids = tokenizer(texts, padding="max_length", max_length=32, truncation=True)["input_ids"]
    return [{"input_ids": torch.tensor(row), "labels": torch.tensor(row)} for row in ids]


def open_model(auto_class, repository, **options):
    import transformers

    return getattr(transformers, auto_class).from_pretrained(repository, trust_remote_code=True, **options)


def differences(model, batch, expected):
    """Names of outputs that are not those expected, bit for bit, from weights that are aligned in memory."""
    import torch

    with torch.no_grad():
        found = dict(model._apply(torch.clone)(**batch).items())
    if set(found) != set(expected):
        return sorted(set(found) ^ set(expected))
    return [name for name, x in expected.items() if not torch.equal(x, found[name])]


def open_heads(expected):
    """{Auto class of a repository: what differs}, and each Auto class on one repository."""
    problems, modules = {}, set()
    for name, told in expected.items():
        model = open_model(name, f"ann/{name}")
        problems[name] = differences(model, told["batch"], told["values"])
        modules.add(type(model).__module__.split(".")[0])
        open_model(name, "ann/AutoModelForMaskedLM")
    return {"problems": problems, "modules": sorted(modules)}


def open_pipelines():
    """{task: what a pipeline answers}; that of ann/run finds its task in the card."""
    import transformers

    text = "the cat likes [MASK], 12."
    tasks = {"fill-mask": "AutoModelForMaskedLM", "text-classification": "AutoModelForSequenceClassification",
             "token-classification": "AutoModelForTokenClassification", "feature-extraction": "AutoModel"}  # fmt: skip
    answers = {}
    for task, name in tasks.items():
        answers[task] = transformers.pipeline(task, model=f"ann/{name}", trust_remote_code=True)([text, text])
    found = transformers.pipeline(model="ann/run", trust_remote_code=True)
    return {task: len(answer) for task, answer in answers.items()} | {"ann/run": [found.task, len(found(text))]}


def open_revisions(expected, batch):
    name = "AutoModelForMaskedLM"
    return {revision: differences(open_model(name, "ann/revisions", revision=revision), batch, values)
            for revision, values in expected.items()}  # fmt: skip


def go_on(repository, revision, folder):
    """Resume a run from the checkpoint that was pushed at step 2: the names of weights that end otherwise."""
    import torch
    from huggingface_hub import snapshot_download
    from safetensors.torch import load_file
    from transformers import AutoTokenizer, Trainer, TrainingArguments, default_data_collator

    checkpoint = Path(snapshot_download(repository, revision=revision), "last-checkpoint")
    model = open_model("AutoModelForMaskedLM", str(checkpoint))
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=4, per_device_train_batch_size=4, save_strategy="no", report_to="none",
        use_cpu=True, seed=0, learning_rate=1e-2, disable_tqdm=True, remove_unused_columns=False)  # fmt: skip
    rows = training_rows(AutoTokenizer.from_pretrained(checkpoint))
    trainer = Trainer(model, arguments, default_data_collator, rows)
    trainer.train(resume_from_checkpoint=str(checkpoint))
    final = load_file(Path(snapshot_download(repository), "model.safetensors"))
    begin = load_file(checkpoint / "model.safetensors")
    now = model.state_dict()
    return {"steps": trainer.state.global_step, "different": [n for n in final if not torch.equal(final[n], now[n])],
            "moved": sum(not torch.equal(final[n], begin[n]) for n in final), "weights": len(final)}  # fmt: skip


def online(folder, expected):
    from huggingface_hub import HfApi, ModelCard, constants, hf_hub_download

    name = "AutoModelForMaskedLM"
    answers = {"heads": open_heads(expected["heads"]), "pipelines": open_pipelines()}
    answers["revisions"] = open_revisions(expected["revisions"], expected["heads"][name]["batch"])
    for repository in ("ann/stock", "ann/run"):
        commits = HfApi().list_repo_commits(repository)
        wanted = "Training in progress, step 2" + ", checkpoint" * (repository == "ann/stock")
        step_2 = next(commit.commit_id for commit in commits if commit.title == wanted)
        answers[f"resume {repository}"] = go_on(repository, step_2, Path(folder, "resumed"))
    card = ModelCard.load("ann/run")
    answers["card"] = {result.metric_type: result.metric_value for result in card.data.eval_results}
    answers["wrong token"] = attempt(lambda: open_model("AutoModel", "ann/AutoModel", token="hf_wrong", cache_dir="a"))
    answers["another's"] = attempt(lambda: open_model("AutoModel", "ann/AutoModel", token="hf_of_bob", cache_dir="b"))
    answers["no token"] = attempt(lambda: open_model("AutoModel", "ann/AutoModel", token=False, cache_dir="c"))
    answers["no repository"] = attempt(lambda: open_model(name, "ann/nothing"))
    answers["no revision"] = attempt(lambda: open_model(name, "ann/revisions", revision="v7"))

    weights = {"repo_id": f"ann/{name}", "filename": "model.safetensors", "cache_dir": "d"}
    set_faults(drop_downloads=[5000] * 6)
    answers["download always broken"] = attempt(lambda: hf_hub_download(**weights))
    blobs = [path for path in Path("d").rglob("*") if "blobs" in path.parts and path.is_file()]
    answers["left of it"] = [path.name for path in blobs if path.suffix != ".incomplete"]
    answers["model of it"] = attempt(lambda: open_model(name, f"ann/{name}", cache_dir="d", local_files_only=True))
    constants.DOWNLOAD_CHUNK_SIZE = 1000  # what has arrived is kept in whole chunks
    set_faults(drop_downloads=[5500, 3500])
    answers["download broken twice"] = attempt(lambda: hf_hub_download(**weights))
    model = open_model(name, f"ann/{name}", cache_dir="d")
    answers["after that"] = differences(model, **_batch_and_values(expected, name))
    return answers


def _batch_and_values(expected, name):
    told = expected["heads"][name]
    return {"batch": told["batch"], "expected": told["values"]}


def offline(folder, expected):
    """With what the other process downloaded; then the same where the Hub does not answer."""
    from huggingface_hub import constants

    name, answers = "AutoModelForMaskedLM", {}
    for case in ("offline", "no answer"):
        constants.HF_HUB_OFFLINE = case == "offline"
        for auto_class in expected["heads"]:
            model = open_model(auto_class, f"ann/{auto_class}")
            answers[f"{case}, {auto_class}"] = differences(model, **_batch_and_values(expected, auto_class))
        model = open_model(name, "ann/revisions", revision="v1")
        batch = expected["heads"][name]["batch"]
        answers[f"{case}, v1"] = differences(model, batch, expected["revisions"]["v1"])
        answers[f"{case}, not in the cache"] = attempt(lambda: open_model(name, "ann/faults"))
    return answers


def main(folder, which):
    sys.meta_path.insert(0, Refused)
    wait = time.sleep
    time.sleep = lambda seconds: wait(min(seconds, 0.01))  # between the client's attempts

    import torch

    torch.set_num_threads(1)
    expected = torch.load(Path(folder, "expected.pt"))
    answers = {"online": online, "offline": offline}[which](folder, expected)
    answers["package"] = "hf_selfattn" in sys.modules
    Path(folder, f"{which}.json").write_text(json.dumps(answers))


if __name__ == "__main__":
    main(*sys.argv[1:])
