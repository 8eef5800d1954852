"""Is every tensor what it should be? Checks of the doctor, each (Examination) -> Findings."""

import tempfile
from collections import Counter

import torch
from safetensors import safe_open

from .doctor_examination import error, listed, new_model, note, warning

OTHER_HEADS = {
    "pooler",
    "seq_relationship",
    "sop_classifier",
    "discriminator_predictions",
    "mask_predictions",
    "lm_predictions",
}
"""Modules that pretrained checkpoints bring and most classes leave out."""

DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""Names of floating types in safetensors and in torch."""


def check_names(examination):
    """Every weight of the model is in the file, in its shape, and nothing else is."""
    loading, kind = examination.loading, type(examination.model).__name__
    again = "Open the checkpoint with the class that was saved, and check the names of the weights."
    if loading["missing_keys"]:
        yield error(
            f"{len(loading['missing_keys'])} weights of {kind} are not in the file, so they are new and random: "
            f"{listed(loading['missing_keys'])}.",
            again,
        )
    mismatched = [str(key[0] if isinstance(key, tuple) else key) for key in loading.get("mismatched_keys") or ()]
    if mismatched:
        yield error(
            f"{len(mismatched)} weights have another shape in the file than config.json gives them, so they are "
            f"new and random: {listed(mismatched)}.",
            "Correct the sizes in config.json (vocab_size, num_labels, max_position_embeddings, …).",
        )
    of_heads = [name for name in loading["unexpected_keys"] if OTHER_HEADS & set(name.split("."))]
    unexpected = set(loading["unexpected_keys"]) - set(of_heads)
    if unexpected:
        yield warning(
            f"{len(unexpected)} weights in the file belong to no part of {kind}, so they are left out: "
            f"{listed(unexpected)}.",
            again,
        )
    if of_heads:
        yield note(
            f"{len(of_heads)} weights in the file are of a pooler or a head that {kind} does not have, so they are "
            f"left out: {listed(of_heads)}.",
            "Nothing; where that head is wanted, open the checkpoint with its class.",
        )


def check_values(examination):
    """Weights are numbers, and no matrix is dead."""
    wrong = [name for name, x in examination.model.state_dict().items() if not x.isfinite().all()]
    if wrong:
        yield error(
            f"{len(wrong)} weights hold NaN or infinity: {listed(wrong)}.",
            "Take an earlier checkpoint: this training had diverged.",
        )
    new = dict(examination.fresh.named_parameters())

    def is_dead(weight):
        return weight.dim() > 1 and min(weight.shape) > 1 and bool((weight == weight.flatten()[0]).all())

    dead = [name for name, weight in examination.model.named_parameters() if is_dead(weight)
            and not is_dead(new[name])]  # fmt: skip
    if dead:
        yield error(
            f"{len(dead)} matrices hold one and the same number everywhere: {listed(dead)}.",
            "They were written over, or never copied from the model that they came from: convert it again.",
        )


def check_tying(examination):
    """Output layer and token vectors are one tensor if and only if the config says so."""
    model, wanted = examination.model, bool(getattr(examination.config, "tie_word_embeddings", False))
    output, vectors = model.get_output_embeddings(), model.get_input_embeddings()
    if output is None or output.weight.shape != vectors.weight.shape:
        return
    if wanted and output.weight is not vectors.weight:
        yield error(
            "tie_word_embeddings is true, and output layer and token vectors are two different matrices here: "
            "they train apart, and one of them may be lost on saving.",
            "Set tie_word_embeddings to false if both were trained, else take the output layer's weight out of "
            "the file. A model class of your own needs _tied_weights_keys (a dict).",
        )
    if not wanted and output.weight is vectors.weight:
        yield error(
            "tie_word_embeddings is false, and output layer and token vectors are one matrix here.",
            "Set tie_word_embeddings to true, or give the output layer a weight of its own.",
        )


def check_dtype(examination):
    """The config names the type of the weights in the file."""
    found = Counter()
    for path in sorted(examination.folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118  a file is no dict
                piece = file.get_slice(name)
                if piece.get_dtype() in DTYPES:
                    found[DTYPES[piece.get_dtype()]] += torch.Size(piece.get_shape()).numel()
    said = str(examination.config.dtype).removeprefix("torch.") if examination.config.dtype else None
    if found and said and said not in found:
        most = found.most_common(1)[0][0]
        yield warning(
            f"config.json says dtype {said}, and the weights are {most}: from_pretrained casts them.",
            f"Set dtype to {most!r}, or save the model in {said}.",
        )
    if len(found) > 1:
        yield note(
            f"The file mixes types: {', '.join(f'{kind} ({n:,} numbers)' for kind, n in found.items())}.",
            "If that is not meant, model.to(one dtype) before save_pretrained.",
        )


def _unsaved(model):
    """name -> what is no weight and stands in no file: buffers that are not persistent, tensors in attributes."""
    saved = set(model.state_dict())
    found = {name: buffer for name, buffer in model.named_buffers() if name not in saved}
    for prefix, module in model.named_modules():
        for name, value in vars(module).items():
            if name in ("_parameters", "_buffers", "_modules"):
                continue
            items = (
                value.items()
                if isinstance(value, dict)
                else enumerate(value if isinstance(value, (list, tuple)) else [])
            )
            tensors = {name: value} if torch.is_tensor(value) else {f"{name}[{key!r}]": item for key, item in items}
            found |= {f"{prefix}.{key}".lstrip("."): x for key, x in tensors.items() if torch.is_tensor(x)}
    return found


def _same(a, b):
    return (
        a.shape == b.shape
        and not a.is_meta
        and torch.equal(a.nan_to_num(), b.to(a.dtype).nan_to_num())
        and torch.equal(a.isnan(), b.isnan())
    )


def check_buffers(examination):
    """What is computed and not saved is the same in a model from `from_pretrained` and in one that is built directly.

    `from_pretrained` builds on the meta device: a buffer that is not saved comes back as memory that nothing has
    written to (NaN here, see `garbage_is_nan`), an attribute stays on meta, both without a warning.
    """
    loaded, built, other = map(_unsaved, (examination.model, examination.fresh, new_model(examination.model, seed=1)))
    drawn = {name for name in set(built) & set(other) if not _same(built[name], other[name])}
    if drawn:
        yield error(
            f"{len(drawn)} tensors are drawn at random when the model is made and are not saved: {listed(drawn)}. "
            "Each process has others.",
            "Save them (persistent=True), or make them a function of a seed in the config.",
        )
    wrong = {name for name in set(loaded) & set(built) - drawn if not _same(loaded[name], built[name])}
    if wrong:
        on_meta = [name for name in wrong if loaded[name].is_meta]
        told = f" ({listed(on_meta)} without any numbers, on the meta device)" if on_meta else ""
        yield error(
            f"{len(wrong)} tensors that are not saved come back as garbage from from_pretrained: "
            f"{listed(wrong)}{told}.",
            "Fill them in _init_weights with transformers.initialization (init.copy_), compute them in the "
            "forward, or register them with persistent=True.",
        )


def check_saving(examination):
    """What is saved and opened again is the same, bit for bit: weights and answers."""
    model = examination.model
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        again = type(model).from_pretrained(folder, dtype=torch.float32,
                                            attn_implementation=model.config._attn_implementation).eval()  # fmt: skip
    before, after = model.state_dict(), again.state_dict()
    wrong = [name for name in before.keys() | after.keys()
             if name not in before or name not in after or not torch.equal(before[name], after[name])]  # fmt: skip
    ids = examination.ids(examination.lengths)
    if wrong:
        yield error(
            f"{len(wrong)} weights are not the same after save_pretrained and from_pretrained: {listed(wrong)}.",
            "Look at _init_weights (transformers.initialization leaves loaded weights alone, .data.normal_() "
            "does not) and at _tied_weights_keys.",
        )
    elif not torch.equal(examination.answers(ids), examination.answers(ids, model=again)):
        yield error(
            "The weights are the same after save_pretrained and from_pretrained, and the answers are not.",
            "The config does not hold everything that the model was made with: compare config.json with what "
            "__init__ reads.",
        )
