"""Another model's weights under our names, and ours under its names."""

import torch

from .convert_families import FAMILIES, position_offset


def our_names(model, head: str) -> dict[str, list[str]]:
    """For each tensor of a model of one of FAMILIES what it is in ours; [] for what ours has no use for.

    Several names: the tensor is cut along its first dimension.

    Raises:
        KeyError: for a tensor that no table knows.
    """
    family, prefix = FAMILIES[model.config.model_type], "" if head == "base" else model.base_model_prefix + "."
    return {
        name: _in_the_encoder(name.removeprefix(prefix), family, head)
        if name.startswith(prefix)
        else _in_the_head(name, family, head)
        for name in model.state_dict()
    }


def _in_the_encoder(name, family, head):
    before = "" if head == "base" else "model."
    if name.startswith("pooler."):
        after = family.heads[head].get("pooler") if head != "base" else None
        return [] if after is None else [after + name.removeprefix(family.pooler)]
    for theirs, ours in family.names.items():
        name = name.replace(theirs, ours)
    if "/" not in name:
        return [before + name]
    start, parts, end = name.split("/")
    return [before + start + part + end for part in parts.split("+")]


def _in_the_head(name, family, head):
    for theirs, ours in family.heads[head].items():
        if name.startswith(theirs):
            return [ours + name.removeprefix(theirs)]
    raise KeyError(f"{name!r} is in no table of names for the head {head!r}.")


def in_our_names(model, head: str, tensors: dict | None = None) -> dict[str, torch.Tensor]:
    """The weights of `model` (or `tensors` under their names: gradients, say) under our names, cut as ours are."""
    tensors = model.state_dict() if tensors is None else tensors
    offset, renamed = position_offset(model.config), {}
    for theirs, ours in our_names(model, head).items():
        if not ours or theirs not in tensors:
            continue
        tensor = tensors[theirs]
        if offset and ours[0].endswith("embeddings.positions.weight"):
            tensor = tensor[offset:]
        renamed |= {name: part.contiguous() for name, part in zip(ours, tensor.chunk(len(ours)), strict=True)}
    return renamed


def fill_from_ours(model, head: str, weights: dict[str, torch.Tensor]) -> list[str]:
    """Copy our weights into `model`, a BERT or ModernBERT, in place; the names of its tensors that ours has not, and
    which are now 0."""
    state, added = model.state_dict(), []
    with torch.no_grad():
        for theirs, ours in our_names(model, head).items():
            if ours and all(name in weights for name in ours):
                state[theirs].copy_(torch.cat([weights[name] for name in ours]))
            else:
                state[theirs].zero_()
                added.append(theirs)
    return added
