"""`docstrings`: the documentation of the Python packages installed here, as a corpus that needs no network.

Each docstring of the standard library and of every package in this environment's site-packages is one document with
the fields `text` and `package` (the top-level module; `python` for the standard library). They are read with `ast`
(nothing is imported), equal texts are kept once, and a document belongs to the validation split or not by the hash of
its text, whatever else is installed. The result is cached below `HF_HOME` under the versions of all packages.
"""

import collections
import hashlib
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from datasets import Dataset, DatasetDict
from huggingface_hub import constants
from tqdm.auto import tqdm

from . import docstring_reader
from .docstring_reader import MIN_CHARACTERS

FORMAT = 1  # part of the cache key: raise it when what is read changes
FILES_A_PROCESS = 256
VALIDATION_SHARE = 0.05
STANDARD_LIBRARY = "python"
OWN_PACKAGE = "hf_selfattn"  # left out: its texts change while one works on them, its version does not
# Other people's packages inside one (their texts would carry the wrong name), and programs rather than libraries.
SKIPPED_FOLDERS = {"_vendor", "_vendored", "vendor", "site-packages", "dist-packages", "test", "tests", "idlelib"}

# Names by which a package's texts call it beside its module and distribution name.
ALIASES = {
    "torch": ["pytorch"],
    "sklearn": ["scikit", "scikits"],
    "numpy": ["np", "ndarray"],
    "pandas": ["pd", "dataframe"],
    "matplotlib": ["mpl", "pyplot", "plt"],
    "networkx": ["nx"],
    "tensorflow": ["tf"],
    "transformers": ["huggingface", "hugging face"],
    STANDARD_LIBRARY: ["cpython"],
}


def document_hash(text):
    """64 bits that depend on the words of a text alone (not on case, digits or layout)."""
    words = re.sub(r"[\W\d_]+", " ", text.lower()).strip()
    return int.from_bytes(hashlib.blake2b(words.encode(), digest_size=8).digest(), "big")


def read_files(paths):
    """For each path the docstrings in it, read by a process of its own."""
    lines = "".join(json.dumps(path) + "\n" for path in paths)
    command = [sys.executable, "-I", docstring_reader.__file__]
    output = subprocess.run(command, input=lines, stdout=subprocess.PIPE, text=True, check=True).stdout
    return [json.loads(line) for line in output.splitlines()]


def python_files(roots):
    """(package, path) of each Python file below `roots`, a dict from folder to package name (None: by folder)."""
    found = []
    for root, package in roots.items():
        for folder, subfolders, files in os.walk(root):
            subfolders[:] = sorted(name for name in subfolders if name not in SKIPPED_FOLDERS)
            for name in sorted(files):
                if name.endswith(".py"):
                    path = Path(folder, name)
                    owner = package or path.relative_to(root).parts[0].removesuffix(".py")
                    if owner != OWN_PACKAGE:
                        found.append((owner, str(path)))
    return found


def installed_roots():
    """The folders to read: this environment's packages and the standard library it runs on."""
    paths = sysconfig.get_paths()
    packages = {paths[kind]: None for kind in ("purelib", "platlib")}
    return {**packages, paths["stdlib"]: STANDARD_LIBRARY}


def read_documents(roots, progress=True):
    """(hash, package, text) of every docstring below `roots`, each text once, sorted by hash.

    Of equal texts (vendored packages, inherited documentation) the first in the alphabet of packages stays.
    """
    files = sorted(python_files(roots))
    documents = {}
    chunks = [files[start : start + FILES_A_PROCESS] for start in range(0, len(files), FILES_A_PROCESS)]
    bar = tqdm(total=len(files), desc="Reading docstrings", unit=" files", disable=not progress)
    with bar, ThreadPoolExecutor(os.cpu_count()) as pool:
        results = pool.map(lambda chunk: read_files([path for _, path in chunk]), chunks)
        for chunk, texts_of_files in zip(chunks, results, strict=True):
            for (package, _), texts in zip(chunk, texts_of_files, strict=True):
                for text in texts:
                    documents.setdefault(document_hash(text), (package, text))
            bar.update(len(chunk))
    return [(key, *documents[key]) for key in sorted(documents)]


def is_validation(key):
    return (key >> 20) % 10_000 < VALIDATION_SHARE * 10_000


def as_splits(documents):
    """The DatasetDict of (hash, package, text) triples."""
    parts = {"train": [], "validation": []}
    for key, package, text in documents:
        parts["validation" if is_validation(key) else "train"].append({"text": text, "package": package})
    empty = [name for name, rows in parts.items() if not rows]
    if empty:
        raise ValueError(
            f"The data set is empty: {len(documents)} docstrings were found, none for {empty[0]}. Install packages "
            f"with documentation, or pass --train_file."
        )
    return DatasetDict({name: Dataset.from_list(rows) for name, rows in parts.items()})


def cache_folder():
    """Below HF_HOME, under a key that changes with any package's version."""
    versions = sorted({(d.name or "", d.version or "") for d in importlib.metadata.distributions()})
    key = repr((FORMAT, sys.version, MIN_CHARACTERS, VALIDATION_SHARE, versions, sorted(installed_roots())))
    return Path(constants.HF_HOME, OWN_PACKAGE, f"docstrings-{hashlib.sha256(key.encode()).hexdigest()[:16]}")


def load_docstrings(packages=None):
    """The corpus as a DatasetDict with `train` and `validation`.

    Args:
        packages: if a number N, the N packages with most documents, equally many from each (as many as the smallest
            of them has), with the packages' names hidden in the texts; for learning to tell them apart.
    """
    folder = cache_folder()
    if not all((folder / f"{split}.parquet").is_file() for split in ("train", "validation")):
        splits = as_splits(read_documents(installed_roots()))
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            for split, rows in splits.items():
                rows.to_parquet(Path(scratch, f"{split}.parquet"))
            folder.mkdir(exist_ok=True)
            for split in splits:  # renamed whole, so that a killed run leaves nothing half written
                os.replace(Path(scratch, f"{split}.parquet"), folder / f"{split}.parquet")
    splits = DatasetDict(
        {s: Dataset.from_parquet(str(folder / f"{s}.parquet"), split=s) for s in ("train", "validation")}
    )
    return splits if packages is None else packages_apart(splits, packages)


def names_of_package(package):
    distributions = importlib.metadata.packages_distributions().get(package, [])
    return {package, *distributions, *ALIASES.get(package, [])}


def hide_names(text, names):
    """`text` with each of `names` (whole words, any case, also inside identifiers with underscores) as `package`."""
    pattern = "|".join(sorted((re.escape(name) for name in names), key=len, reverse=True))
    return re.sub(rf"(?<![A-Za-z])(?:{pattern})(?![A-Za-z])", "package", text, flags=re.IGNORECASE)


def packages_apart(splits, count):
    """The classification task: which of `count` packages does this text come from?

    Every name by which one of them goes is hidden in all texts (also in those of the others), since the name alone
    would answer the question. The parts of both splits have equally many documents from each package.
    """
    sizes = collections.Counter(splits["train"]["package"])
    validation = set(splits["validation"]["package"])
    chosen = sorted(name for name, _ in sizes.most_common() if name in validation)
    chosen = sorted(chosen, key=lambda name: (-sizes[name], name))[:count]
    if count < 2 or len(chosen) < count:
        raise ValueError(
            f"--dataset_config_name {count}-packages: from 2 to {len(sizes)} packages with documentation are here."
        )
    names = set().union(*[names_of_package(package) for package in chosen])
    apart = DatasetDict()
    for split, rows in splits.items():
        members = {package: [] for package in chosen}
        for index, package in enumerate(rows["package"]):
            if package in members:
                members[package].append(index)
        size = min(len(indices) for indices in members.values())
        kept = sorted(index for indices in members.values() for index in indices[:size])
        rows = rows.select(kept)
        texts = [hide_names(text, names) for text in rows["text"]]
        apart[split] = Dataset.from_dict({"text": texts, "package": list(rows["package"])})
    return apart
