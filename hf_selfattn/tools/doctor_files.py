"""Is the folder whole? Checks of the doctor on files and code, each (Examination) -> Findings."""

import ast
import json
import re
import zipfile
from pathlib import Path

import transformers
from transformers.dynamic_module_utils import get_relative_imports

from .doctor_examination import error, listed, note, warning

ROOT = Path(__file__).parent.parent
"""Where the code stands that is saved with a model of ours."""

SAVE_AGAIN = "Open the model and save it again with save_pretrained"
TOKEN = re.compile(rb"\bhf_[A-Za-z0-9]{30,}")
HOME = re.compile(rb"(?:/home/|/Users/|/root/|[A-Z]:\\Users\\)[\w.-]+")


def check_format(examination):
    """Weights are in safetensors."""
    pickles = sorted(path.name for path in examination.folder.glob("pytorch_model*.bin"))
    if not pickles:
        return
    if any(examination.folder.glob("*.safetensors")):
        yield note(f"{', '.join(pickles)} lies beside the safetensors and is not read.", "Delete it.")
    else:
        yield warning(
            f"The weights are pickled ({', '.join(pickles)}): who opens them runs whatever is in the file.",
            f"{SAVE_AGAIN}: that writes safetensors.",
        )


def _contents(path):
    """The bytes of a file, those of a zip archive (what torch.save writes) uncompressed."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            return b"\n".join(archive.read(name) for name in archive.namelist() if name.endswith(".pkl"))
    return path.read_bytes()


def check_private(examination):
    """Nothing in the folder gives away an access token or a home directory."""
    for path in sorted(examination.folder.iterdir()):
        is_text = path.suffix in (".json", ".py", ".md", ".yaml", ".yml", ".txt", ".jsonl", ".log")
        if not path.is_file() or not (path.name == "training_args.bin" or (is_text and path.stat().st_size < 2**20)):
            continue
        content = _contents(path)
        if TOKEN.search(content):
            yield error(
                f"{path.name} holds what looks like an access token of the Hub.",
                "Revoke the token, and delete the file before the folder is shared.",
            )
        elif path.suffix == ".bin" and HOME.search(content):
            yield note(
                f"{path.name} names folders of this machine ({HOME.search(content).group().decode()}…).",
                "Leave it out when the folder is shared; the model does not need it.",
            )


def _code_from(folder, module, found):
    """Adds a module and what it imports from beside it to `found`: name -> whether the file is there."""
    path = folder / f"{module}.py"
    if module not in found:
        found[module] = path.is_file()
        for imported in get_relative_imports(path) if path.is_file() else ():
            _code_from(folder, imported, found)


def _has_class(path, name):
    """Whether a module defines or imports a class `name`."""
    body = ast.parse(path.read_text(encoding="utf-8")).body
    imported = [
        alias.asname or alias.name for node in body if isinstance(node, ast.ImportFrom) for alias in node.names
    ]
    return name in imported or any(isinstance(node, ast.ClassDef) and node.name == name for node in body)


def check_code(examination):
    """A model of a type that transformers does not have brings all of its code, and the whole auto_map."""
    folder, config = examination.folder, examination.config
    written = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("auto_map")
    if not written and not type(config).__module__.startswith("transformers.models."):
        yield warning(
            f"config.json has no auto_map, so model_type {config.model_type!r} opens only where its package is "
            "installed.",
            f"Register the classes (register_for_auto_class). Then: {SAVE_AGAIN}.",
        )
    auto_map = {auto: path for auto, path in (written or {}).items() if isinstance(path, str) and "--" not in path}
    if not auto_map:  # there is none, or it names another repository
        return
    found = {}
    for auto, path in sorted(auto_map.items()):
        module, name = path.rsplit(".", 1)
        _code_from(folder, module, found)
        if found[module] and not _has_class(folder / f"{module}.py", name):
            yield error(
                f"auto_map names {path} for {auto}, and {module}.py has no such class.",
                f"Correct the name in config.json. Or: {SAVE_AGAIN}.",
            )
    missing = [f"{module}.py" for module, is_there in found.items() if not is_there]
    if missing:
        yield error(
            f"The code that auto_map names is not whole: {listed(missing)} is not in the folder, so nobody else can "
            "open the model.",
            f"{SAVE_AGAIN} in a process where its classes have called register_for_auto_class (AutoModel.register "
            "alone saves no code).",
        )
    saved = (config.architectures or [None])[0]
    if (
        saved
        and not any(path.endswith(f".{saved}") for path in auto_map.values())
        and not hasattr(transformers, saved)
    ):
        yield error(
            f"auto_map has no entry for {saved}, the class that was saved: nobody else can open it.",
            f"Put the whole auto_map into the config and save again; it has {', '.join(sorted(auto_map))}.",
        )
    if config.model_type == "selfattn":
        both = [module for module, is_there in found.items() if is_there and (ROOT / f"{module}.py").is_file()]
        files = [f"{module}.py" for module in both]
        changed = [name for name in files if (folder / name).read_bytes() != (ROOT / name).read_bytes()]
        if changed:
            yield warning(
                f"{len(changed)} files of the saved code differ from the installed package: {listed(changed)}. The "
                "numbers found here need not be those found elsewhere.",
                f"Install the release that wrote the checkpoint. Or: {SAVE_AGAIN}, with this release's code.",
            )
