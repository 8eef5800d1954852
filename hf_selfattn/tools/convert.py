"""Turn another encoder into a `SelfAttn…` model, prove that it is the same, and write it with the certificate.

    python -m hf_selfattn.tools.convert FacebookAI/roberta-base ours
    python -m hf_selfattn.tools.convert FacebookAI/roberta-base ours --pattern sliding_window --window_radius 64 \
        --max_positions 4096
    python -m hf_selfattn.tools.convert ours theirs --to bert
"""

import argparse
import hashlib
import json
import platform
import sys
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file

from .. import SelfAttnConfig, __version__
from .checkpoints import check_model_folder
from .convert_back import BACK, back_config
from .convert_changes import CHANGES, SHORT, change, read_changes
from .convert_families import AUTO_CLASSES, FAMILIES, head_of
from .convert_proof import prove
from .convert_weights import fill_from_ours, in_our_names, our_names
from .opening import fit_inputs
from .recipes import nearest
from .tokenizer import check_tokenizer, open_tokenizer, save_tokenizer
from .whole_folders import check_out, whole_folder

CERTIFICATE = "conversion.json"


def convert(source, out=None, head=None, to=None, seed=0, **changes):
    """A model that computes what `source` computes, and the proof.

    Args:
        source: a folder or a name on the Hub: a model of one of FAMILIES, or with `to` one of ours.
        out: the folder to write (not there yet, or empty); None: nothing is written.
        head: a key of AUTO_CLASSES; None: that of the class that the source's config names.
        to: "bert" or "modernbert", to turn a model of ours into one of these; None: into ours.
        seed: of the proof's batches.
        changes: of the attention, made once the model is proven: options of CHANGES, `pattern` for attention_pattern
            and `max_positions` for max_position_embeddings.

    Returns:
        The model, in evaluation mode and the source's dtype, and the certificate, a dict that is also written as
        conversion.json.

    Raises:
        FileExistsError: `out` holds something.
        FileNotFoundError: `source` is no checkpoint.
        TypeError: an option that cannot be changed.
        ValueError: a model that cannot be converted, with the reasons; or one whose conversion is not proven. Nothing
            is written then.
    """
    changes = read_changes(changes)
    if out is not None:
        check_out(out)
    if Path(source).exists():
        check_model_folder(source)
    config = transformers.AutoConfig.from_pretrained(source)
    head = head_of(config) if head is None else head
    if head not in AUTO_CLASSES:
        raise ValueError(f"head is one of {', '.join(AUTO_CLASSES)}, got {head!r}.{nearest(head, AUTO_CLASSES)}")
    certificate = {"source": _about(source, config), "head": head, "versions": _versions()}
    if to is None:
        theirs, model, told = _to_ours(source, config, head, changes)
        ours = model
    else:
        ours, model, told = _from_ours(source, config, head, to, changes)
        theirs = model
    certificate |= {"result": type(model).__name__, **told}
    certificate["proof"] = prove(theirs, ours, head, seed)
    certificate["changed"] = None
    if changes:
        model, certificate["changed"] = change(model, changes, head, seed)
    tokenizer = _tokenizer(source, model.config, changes)
    certificate["tokenizer"] = None if tokenizer is None else _about_tokenizer(tokenizer)
    if out is not None:
        _write(model, tokenizer, certificate, out)
    return model, certificate


def _to_ours(source, config, head, changes):
    family = _family(config)
    if head != "base" and head not in family.heads:
        raise ValueError(
            f"A {config.model_type} has no head {head!r} that ours has too. It has base, {', '.join(family.heads)}."
        )
    if config.model_type == "big_bird" and "attention_pattern" in changes:
        # Short texts are what both attentions of BigBird agree on, and full attention is what they get.
        config.attention_type = "original_full"
    problems = family.problems(config, head)
    if head == "question_answering" and config.num_labels != 2:
        problems.append(f"its head for answers has {config.num_labels} outputs, and ours has start and end")
    if problems:
        raise ValueError(f"This {config.model_type} cannot be converted: {'; '.join(problems)}.")
    theirs, info = getattr(transformers, AUTO_CLASSES[head]).from_pretrained(
        source, config=config, attn_implementation="eager", dtype="auto", output_loading_info=True
    )
    theirs.eval()
    names = our_names(theirs, head)
    new = sorted(name for name in info["missing_keys"] if names.get(name))
    if new:
        raise ValueError(
            f"The source has no weights for {', '.join(new[:4])}{' …' if len(new) > 4 else ''}: its head {head!r} "
            "would be a random one. Pass head='base' (--head base), or the head that it was saved with."
        )
    options = SelfAttnConfig(**family.options(config, head))
    ours = getattr(transformers, AUTO_CLASSES[head]).from_config(options).to(theirs.dtype).eval()
    ours.load_state_dict(in_our_names(theirs, head))
    unused = [name for name, own in names.items() if not own and name not in info["missing_keys"]]
    return (
        theirs,
        ours,
        {
            "dropped": sorted({*unused, *info["unexpected_keys"]}),
            "added": [],
            "differs_in_training": family.notes(config, head),
        },
    )


def _family(config):
    if config.model_type == "selfattn":
        raise ValueError(
            f"The source is a model of ours already. Pass to= (--to) with {' or '.join(map(repr, BACK))} to turn it "
            "into one of these."
        )
    if config.model_type not in FAMILIES:
        raise ValueError(
            f"A {config.model_type!r} cannot be converted: its block is not one that SelfAttnConfig describes, or "
            f"nobody has written its table yet. Known are {', '.join(FAMILIES)}."
        )
    return FAMILIES[config.model_type]


def _from_ours(source, config, head, to, changes):
    if config.model_type != "selfattn":
        raise ValueError(f"to={to!r} turns a model of ours into one, got a {config.model_type!r}. Leave it out first.")
    if changes:
        raise ValueError(f"to={to!r} keeps the attention as it is, got {sorted(changes)}. Leave these out.")
    their_config = back_config(config, head, to)
    auto_class = getattr(transformers, AUTO_CLASSES[head])
    ours, info = auto_class.from_pretrained(source, config=config, dtype="auto", output_loading_info=True)
    if info["missing_keys"]:
        raise ValueError(
            f"The source has no weights for {', '.join(sorted(info['missing_keys'])[:4])}: its head {head!r} would "
            "be a random one. Pass head='base' (--head base), or the head that it was saved with."
        )
    theirs = _without_pooler(auto_class, their_config, head).to(ours.dtype).eval()
    added = fill_from_ours(theirs, head, ours.state_dict())
    return (
        ours.eval(),
        theirs,
        {
            "dropped": sorted(info["unexpected_keys"]),
            "added": [f"{name}: 0" for name in added],
            "differs_in_training": FAMILIES[to].notes(their_config, head),
        },
    )


def _without_pooler(auto_class, config, head):
    more = {"add_pooling_layer": False} if head == "base" and config.model_type == "bert" else {}
    return auto_class.from_config(config, attn_implementation="eager", **more)


def _about(source, config):
    """The source, without the path of a folder, which is nobody's business."""
    name = Path(source).resolve().name if Path(source).exists() else str(source)
    written = json.dumps(config.to_dict(), sort_keys=True, default=str).encode()
    return {
        "name": name,
        "revision": getattr(config, "_commit_hash", None),
        "model_type": config.model_type,
        "architectures": config.architectures,
        "config_sha256": hashlib.sha256(written).hexdigest(),
    }


def _versions():
    return {
        "hf_selfattn": __version__,
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _tokenizer(source, config, changes):
    """The source's tokenizer as the new model needs it: its length, its token types; None where there is none."""
    try:
        tokenizer = open_tokenizer(source)
    except FileNotFoundError:
        return None
    check_tokenizer(tokenizer, config)
    tokenizer.model_max_length = changes.get("max_position_embeddings", tokenizer.model_max_length)
    fit_inputs(tokenizer, config)
    return tokenizer


def _about_tokenizer(tokenizer):
    return {
        "class": type(tokenizer).__name__,
        "model_max_length": tokenizer.model_max_length,
        "model_input_names": list(tokenizer.model_input_names),
        "special_tokens": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
    }


def _write(model, tokenizer, certificate, out):
    """Everything, read again before it stands in `out`."""
    with whole_folder(out) as folder:
        model.save_pretrained(folder)
        if tokenizer is not None:
            save_tokenizer(tokenizer, folder)
        files = sorted(folder.glob("*.safetensors"))
        _check_written(model, files)
        certificate["weights_sha256"] = {file.name: _sha256(file) for file in files}
        text = json.dumps(certificate, indent=2, ensure_ascii=False, default=str) + "\n"
        (folder / CERTIFICATE).write_text(text, encoding="utf-8")


def _check_written(model, files):
    written = {name: tensor for file in files for name, tensor in load_file(file).items()}
    for name, tensor in model.state_dict().items():
        if name in written and not torch.equal(written[name].cpu(), tensor.cpu()):
            raise OSError(f"{name} was not written as it is. Try again; nothing was left behind.")


def _sha256(file):
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _value(text):
    """A number, a list or a dict as JSON; else the word."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def told(certificate) -> str:
    """The certificate in a few lines."""
    lines = [f"{certificate['source']['name']} -> {certificate['result']}"]
    for dtype, errors in certificate["proof"]["errors"].items():
        held = f", {errors['tolerance']:g} allowed" if "tolerance" in errors else ", its rounding"
        lines.append(f"  {dtype}: largest error {errors['largest']:.3g} ({errors['of']}{held})")
    lines += [f"  dropped: {', '.join(certificate['dropped'])}"] if certificate["dropped"] else []
    lines += [f"  added: {', '.join(certificate['added'])}"] if certificate["added"] else []
    lines += [f"  in training: {note}" for note in certificate["differs_in_training"]]
    for option, values in (certificate["changed"] or {"options": {}})["options"].items():
        how = f" ({values['how']})" if "how" in values else ""
        lines.append(f"  changed: {option} from {values['from']} to {values['to']}{how}")
    if certificate["tokenizer"] is None:
        lines.append("  the source has no tokenizer")
    return "\n".join(lines)


def main(arguments=None) -> int:
    """The command line; 1 where nothing was written."""
    parser = argparse.ArgumentParser(prog="python -m hf_selfattn.tools.convert", description=__doc__.split("\n")[0])
    parser.add_argument("source", help="a folder or a name on the Hub")
    parser.add_argument("out", help="the folder to write")
    parser.add_argument("--head", choices=AUTO_CLASSES, help="default: that of the source")
    parser.add_argument("--to", choices=BACK, help="turn a model of ours into one of these")
    parser.add_argument("--seed", type=int, default=0, help="of the proof's batches")
    for name in (*SHORT, *CHANGES):
        parser.add_argument(f"--{name}", type=_value, help=f"the same as --{SHORT[name]}" if name in SHORT else None)
    given = vars(parser.parse_args(arguments))
    try:
        _, certificate = convert(**given)
    except (OSError, TypeError, ValueError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    print(told(certificate))
    before = " (proven before the changes)" if certificate["changed"] else ""
    print(f"Saved in {given['out']}, with {CERTIFICATE}{before}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
