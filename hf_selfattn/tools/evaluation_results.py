"""Results that are kept one by one in a file, what identifies a model, and the tables made of them."""

import hashlib
import json
import os
import statistics
from pathlib import Path

from transformers import AutoConfig

from .blimp_published import OF_PARADIGMS, PARADIGMS, PHENOMENA, PUBLISHED
from .card import shown, table
from .run_record import git_commit, versions

FILES_OF_A_MODEL = ("config.json", "*.safetensors", "*model*.bin", "tokenizer*", "special_tokens_map.json",
                    "added_tokens.json", "vocab*", "merges.txt", "*.model")  # fmt: skip


class Results:
    """Results in a file of JSON lines with `key`, `result`, `commit`, `versions`; on the disk as soon as it is known.

    A result is found by its key, a dict of JSON values: the data, models and options that it depends on. The code that
    made it is no part of that, but is written down.

    Args:
        path: of the file, which is made where it is not there. A line that was cut off by a kill is removed.

    Raises:
        ValueError: another line is no result.
    """

    def __init__(self, path):
        self.path, self.known, self.asked = Path(path), {}, {}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.touch()
        whole, _, cut_off = self.path.read_bytes().rpartition(b"\n")
        if cut_off:
            os.truncate(self.path, len(whole) + bool(whole))
        for number, line in enumerate(filter(None, whole.split(b"\n")), 1):
            try:
                record = json.loads(line)
                key, result = record["key"], record["result"]
                code = {name: record.get(name) for name in ("commit", "versions")}
                self.known[self._name(key)] = {"result": result, **code}
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{self.path}, line {number}, is no result ({error}). Delete the line, or pass another "
                    "--output_dir."
                ) from error

    @staticmethod
    def _name(key):
        return json.dumps(key, sort_keys=True)

    def __contains__(self, key):
        return self._name(key) in self.known

    def __getitem__(self, key):
        name = self._name(key)
        self.asked[name] = self.known[name]
        return self.known[name]["result"]

    def __setitem__(self, key, result):
        record = {"result": result, "commit": git_commit(), "versions": versions()}
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"key": key, **record}, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.known[self._name(key)] = record

    def made_by(self):
        """[{"commit", "versions", "results"}]: with which code how many were made, of those that were read."""
        found = {}
        for record in self.asked.values():
            code = {name: record[name] for name in ("commit", "versions")}
            found.setdefault(json.dumps(code, sort_keys=True), {**code, "results": 0})["results"] += 1
        return list(found.values())


def identity_of_model(name, weights=True, trust_remote_code=False):
    """SHA-256 of a folder's configuration, tokenizer and (with `weights`) weights; of a name on the Hub its commit.

    With `trust_remote_code` the folder's code counts, too.
    """
    folder = Path(name).expanduser()
    if not folder.is_dir():
        return AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)._commit_hash
    patterns = [x for x in FILES_OF_A_MODEL if weights or not x.endswith((".safetensors", ".bin"))]
    patterns += ["*.py"] if trust_remote_code else []
    digest = hashlib.sha256()
    for path in sorted({path for pattern in patterns for path in folder.glob(pattern)}):
        with open(path, "rb") as file:
            digest.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def percent(share):
    return "" if share is None else f"{100 * share:.1f}"


def masked_table(of_models):
    """Of {model: {"masked_tokens": …, "masked_words": …}}. Losses of tokens compare models with one tokenizer."""
    rows = []
    for part, unit in (("masked_tokens", "token"), ("masked_words", "word")):
        found = [scores[part] for scores in of_models.values()]
        rows += [
            [f"nats a masked {unit}", *(f"{scores['loss']:.3f}" for scores in found)],
            [f"masked {unit}s right, %", *(percent(scores["accuracy"]) for scores in found)],
            [f"bits per byte of masked {unit}s", *(f"{scores['bits_per_byte']:.3f}" for scores in found)],
            [f"masked {unit}s", *(shown(scores[f"{unit}s"]) for scores in found)],
        ]
    return table(["", *of_models], rows)


def spread(values, digits=3):
    """The mean, and half of the distance between the lowest and the highest where there are several."""
    half = (max(values) - min(values)) / 2
    return f"{statistics.mean(values):.{digits}f}" + (f" ± {half:.{digits}f}" if len(values) > 1 else "")


def blimp_table(of_models, paradigms=False):
    """Accuracies in %, beside published ones: overall and by phenomenon, or by paradigm.

    Args:
        of_models: {model: [blimp_metrics of each of its trainings]}; means, overall with their spread.
    """

    def means(part, name):
        found = [[each[part][name] for each in seeds if name in each[part]] for seeds in of_models.values()]
        return [percent(statistics.mean(values)) if values else "" for values in found]

    if paradigms:
        names = sorted({name for seeds in of_models.values() for each in seeds for name in each["paradigms"]})
        published = {name: [f"{figure:.1f}" for figure in figures] for name, figures in PARADIGMS.items()}
        rows = [[n, *means("paradigms", n), *published.get(n, [""] * len(OF_PARADIGMS))] for n in names]
        return table(["", *of_models, *OF_PARADIGMS], rows)
    overall = [spread([100 * each["accuracy"] for each in seeds], digits=1) for seeds in of_models.values()]
    rows = [["overall", *overall], *([n.replace("_", " "), *means("phenomena", n)] for n in PHENOMENA)]
    published = [[*figures, *[""] * (len(rows) - len(figures))] for figures in PUBLISHED.values()]
    rows = [[*row, *figures] for row, *figures in zip(rows, *published, strict=True)]
    return table(["", *of_models, *PUBLISHED], rows)


def suite_table(suite):
    """Medians over seeds in %, with the lowest and the highest, of {task: {"metric", "models", "baselines"}}."""
    models = list(dict.fromkeys(name for task in suite.values() for name in task["models"]))

    def cell(scores):
        if scores is None:
            return ""
        between = (
            f" ({percent(scores['lowest'])} to {percent(scores['highest'])})" if len(scores["values"]) > 1 else ""
        )
        return percent(scores["median"]) + between

    rows = []
    for name, task in suite.items():
        baselines = ", ".join(f"{other.replace('_', ' ')} {percent(x)}" for other, x in task["baselines"].items())
        rows.append(
            [name, task["metric"].replace("_", " "), *(cell(task["models"].get(m)) for m in models), baselines]
        )
    everywhere = [all(m in task["models"] for task in suite.values()) for m in models]
    means = [sum(task["models"][m]["median"] for task in suite.values()) / len(suite) if there else None
             for m, there in zip(models, everywhere, strict=True)]  # fmt: skip
    return table(["", "metric", *models, "baselines"], [*rows, ["mean", "", *map(percent, means), ""]])
