"""Change the attention of a converted model: another pattern, more positions."""

import math

from ..patterns import PATTERNS, of_layer
from .convert_proof import check, compare, exact, make_batches
from .recipes import nearest

SHORT = {"pattern": "attention_pattern", "max_positions": "max_position_embeddings"}
_PATTERN_OPTIONS = tuple(dict.fromkeys(option for cls in PATTERNS.values() for option in cls.options))
_DROPOUTS = ("attention_dropout", "hidden_dropout", "embedding_dropout", "classifier_dropout")
CHANGES = ("attention_pattern", *_PATTERN_OPTIONS, "max_position_embeddings", "rope_parameters", *_DROPOUTS)
"""Options that may be changed on the way: none of them asks for weights that the source has not."""


def read_changes(changes: dict) -> dict:
    """Changes under the options' full names; None stands for nothing said.

    Raises:
        TypeError: for an option that cannot be changed, or that is said twice.
    """
    read = {}
    for name, value in changes.items():
        option = SHORT.get(name, name)
        if option not in CHANGES:
            known = [*SHORT, *CHANGES]
            raise TypeError(
                f"convert cannot change {name!r}: it knows {', '.join(known)}. Others would ask for weights that the "
                f"source has not.{nearest(name, known)}"
            )
        if value is not None and option in read:
            raise TypeError(f"{option} is said twice, as {name!r} and by its other name. Leave one out.")
        if value is not None:
            read[option] = value
    return read


def change(model, changes: dict, head: str, seed=0):
    """A model with `changes` and the same weights, and what the certificate says of it.

    Positions are added by copying those that there are, again and again; global projections begin as copies of the
    others. Source: Beltagy et al. 2020, arXiv:2004.05150, section 5.

    Raises:
        ValueError: where a text so short that both attentions see all of it does not get the same numbers.
    """
    before = model.config
    options = dict(changes)
    if "attention_pattern" in changes:
        # The numbers of the pattern that goes do not stay behind for the one that comes.
        options = {**dict.fromkeys(_PATTERN_OPTIONS), "rope_parameters": _one_rope(before, changes), **options}
    config = type(before).from_dict({**before.to_dict(), **options})
    dtype = model.dtype
    changed = type(model)._from_config(config).to(dtype).eval()
    weights, how = _weights(model, changed)
    changed.load_state_dict(weights)
    report = {}
    for option in sorted(options):
        values = getattr(before, option, None), getattr(config, option, None)
        if values[0] != values[1]:
            report[option] = {"from": values[0], "to": values[1]} | ({"how": how[option]} if option in how else {})
    return changed, {"options": report, "unchanged": _short_texts(model, changed, head, changes, seed)}


def _one_rope(before, changes):
    """Rotation is by pattern in ModernBERT; with one pattern for all there is one rotation, and it has to be said."""
    ropes = before.rope_parameters
    given = changes["attention_pattern"]
    used = {given} if isinstance(given, str) else set(given)
    if "rope_parameters" in changes or not ropes or not any(isinstance(rope, dict) for rope in ropes.values()):
        return ropes
    if used == set(ropes):
        return ropes
    if len(ropes) == 1:
        return next(iter(ropes.values()))
    raise ValueError(
        f"The source turns its layers by pattern, {ropes}, and attention_pattern={given!r} has other patterns. Say "
        "rope_parameters, a dict for all layers or one for each of the new patterns."
    )


def _weights(model, changed):
    weights, how = dict(model.state_dict()), {}
    for name, wanted in changed.state_dict().items():
        if name.endswith("embeddings.positions.weight"):
            rows, more = len(weights[name]), len(wanted)
            weights[name] = weights[name].repeat(-(-more // rows), 1)[:more]
            if more > rows:
                how["max_position_embeddings"] = f"the {rows} positions copied again and again to make {more}"
            elif more < rows:
                how["max_position_embeddings"] = f"the first {more} of {rows} positions kept"
        elif ".of_global." in name and name not in weights:
            weights[name] = weights[name.replace("of_global.", "")]
            how["global_projections"] = "copies of the other projections"
    known = changed.state_dict()
    return {name: tensor for name, tensor in weights.items() if name in known}, how


def _short_texts(model, changed, head, changes, seed):
    """The longest text that both attentions see all of, and the error there; None where there is none."""
    if "rope_parameters" in changes:
        return None
    lengths = [64]
    for config in (model.config, changed.config):
        lengths += [sees_all(config), getattr(config, "max_position_embeddings", 64)]
    longest = int(min(lengths))
    batches = make_batches(model.config, head, seed, longest=longest)
    batches = [batch for batch in batches if "global_attention_mask" not in batch.inputs]
    if not batches:
        return None
    errors = compare(exact(model), exact(changed), head, batches)
    told = check(errors, f"the changed attention is another one for texts of {longest} tokens")
    return {"tokens": longest, "float64": told["largest"]}


def sees_all(config) -> float:
    """The length up to which every token of a text sees all of it in each layer."""
    lengths = []
    for layer in range(config.num_hidden_layers):
        pattern = of_layer(config.attention_pattern, layer)
        if pattern in ("sliding_window", "longformer"):
            stepped = (of_layer(config.dilation, layer) or 1) > 1
            lengths.append(1 if stepped else of_layer(config.window_radius, layer) + 1)
        elif pattern == "bigbird":
            size, radius = (of_layer(getattr(config, name), layer) for name in ("block_size", "block_radius"))
            lengths.append((64 if size is None else size) * ((1 if radius is None else radius) + 1))
        else:
            lengths.append(math.inf if pattern == "full" else 1)
    return min(lengths)
