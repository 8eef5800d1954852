"""The proof of a conversion: two models, the same random batches, every hidden state and logit compared."""

import contextlib
import copy
import math
from typing import NamedTuple

import torch
from torch.overrides import TorchFunctionMode

from .convert_families import FAMILIES, TEXT_HEADS

TOLERANCES = {"float64": 1e-10, "float32": 1e-5, "bfloat16": None}
"""The largest error allowed, times max(1, |value|). On that of float64 rests whether anything is written; that of
float32 is reported, as is the error of bfloat16, for which there is none: both models round every step."""


_BY_SEPARATORS = ("question_answering", "multiple_choice")


class Batch(NamedTuple):
    """One batch of the proof.

    Attributes:
        name: which it is.
        mask: (B, N), True at real tokens; with choices (B, C, N).
        inputs: what our model is given; the other one is given `more` beside it.
        more: position_ids, where the other model would count padding.
        texts: whether logits of whole texts are compared.
    """

    name: str
    mask: torch.Tensor
    inputs: dict
    more: dict
    texts: bool = True


class InFloat64(TorchFunctionMode):
    """Whatever would be cast to float32 or made in it is float64: transformers' models take softmax, rotation and
    rotary frequencies in float32 whatever their own type is, which is an error of 1e-7."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        func = torch.Tensor.double if func is torch.Tensor.float else func
        args = tuple(torch.float64 if x is torch.float32 else x for x in args)
        kwargs = {name: torch.float64 if x is torch.float32 else x for name, x in (kwargs or {}).items()}
        return func(*args, **kwargs)


def exact(model):
    """A copy in float64, with the rotary frequencies, which are kept rounded to float32, computed again."""
    model = copy.deepcopy(model).double().eval()
    with InFloat64():
        for module in model.modules():
            own = [name for name, _ in module.named_buffers(recurse=False) if name.endswith("inv_freq")]
            if own:
                again = type(module)(module.config)
                for name in own:
                    setattr(module, name, getattr(again, name))
    return model


def make_batches(config, head, seed=0, counts_padding=False, longest=None):
    """Batches of several lengths, padded and not, whose token ids are drawn at random.

    Args:
        config: our model's.
        head: a key of AUTO_CLASSES.
        counts_padding: whether the other model counts padding on the left as positions, unless it is told.
        longest: the length of the longest text; None: what goes well beyond every window, and at least 128.
    """
    radii = config.window_radius if isinstance(config.window_radius, list) else [config.window_radius]
    radii = sorted({radius or 0 for radius in radii})
    uneven = longest is None and len(radii) > 1
    longest = min(longest or max(128, 2 * radii[-1] + 32), getattr(config, "max_position_embeddings", math.inf))
    longformer = "longformer" in config.attention_pattern
    kinds = {
        "padded on the right": ([longest, max(longest // 3, 1), 1], "right"),
        "padded on the left": ([min(longest, 17), min(longest, 9), 1], "left"),
        "alone": ([min(longest, 33)], None),
    }
    if longformer:
        kinds["padded on the right, with global tokens"] = ([longest, max(longest // 2, 1), 2], "right")
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for name, (lengths, side) in kinds.items():
        if side == "left" and counts_padding and head == "multiple_choice":
            continue  # position_ids are not read there by all
        if longformer and uneven:
            # Longformer pads to a multiple of its widest window, and fails where that is none of the others'.
            step = math.lcm(*(2 * radius for radius in radii))
            lengths = [-(-lengths[0] // step) * step, *lengths[1:]]
        # Longformer makes tokens global on its own, unless it is told: by separators, or the first column.
        on_its_own = head in _BY_SEPARATORS or (head == "sequence_classification" and side == "left")
        is_global = longformer and ("global" in name or on_its_own)
        batches.append(_make_batch(name, lengths, side, config, head, generator, counts_padding, is_global))
    return batches


def _make_batch(name, lengths, side, config, head, generator, counts_padding, is_global):
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    mask = mask.flip(1) if side == "left" else mask
    if head == "multiple_choice":
        mask = torch.stack((mask, mask.flip(0)), dim=1)
    ids = torch.randint(0, config.vocab_size, mask.shape, generator=generator)
    if config.pad_token_id is not None:
        # Models that find padding by its id may not meet it in a text.
        ids = torch.where(ids == config.pad_token_id, (ids + 1) % config.vocab_size, ids)
        ids = ids.masked_fill(~mask, config.pad_token_id)
    inputs, more = {"input_ids": ids}, {}
    if side is not None or head == "multiple_choice":  # whose mean over a text needs one in ModernBERT
        inputs["attention_mask"] = mask.long()
    if config.type_vocab_size > 1:
        inputs["token_type_ids"] = torch.randint(0, config.type_vocab_size, mask.shape, generator=generator)
    if is_global:
        chosen = (torch.rand(mask.shape, generator=generator) < 0.1) | (mask.cumsum(-1) == 1)
        inputs["global_attention_mask"] = (chosen & mask).long()
    if side == "left" and counts_padding:
        more["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
    return Batch(name, mask, inputs, more, texts=side != "left")


@torch.no_grad()
def outputs_of(model, batch: Batch, head: str, with_more: bool) -> dict[str, torch.Tensor]:
    """Hidden states and logits by name, those of tokens at the real ones alone."""
    inputs = {**batch.inputs, **(batch.more if with_more else {})}
    outputs = model(**inputs, output_hidden_states=True, return_dict=True)
    real = batch.mask.flatten(0, -2)
    found = {f"hidden_states.{layer}": x[real] for layer, x in enumerate(outputs.hidden_states)}
    if head == "base":
        return found | {"last_hidden_state": outputs.last_hidden_state[real]}
    if head in TEXT_HEADS:
        return found | ({"logits": outputs.logits} if batch.texts else {})
    names = ("start_logits", "end_logits") if head == "question_answering" else ("logits",)
    return found | {name: outputs[name][real] for name in names}


def compare(theirs, ours, head, batches, widened=False) -> dict[str, dict]:
    """For each output the largest error of `ours` over the batches, divided by max(1, |value|), and where it is.

    Args:
        widened: whether `theirs` runs with casts to float32 left out.
    """
    errors = {}
    for batch in batches:
        with InFloat64() if widened else contextlib.nullcontext():
            expected = outputs_of(theirs, batch, head, with_more=True)
        actual = outputs_of(ours, batch, head, with_more=False)
        if set(expected) != set(actual):
            raise ValueError(
                f"The models do not give the same outputs: {sorted(set(expected) ^ set(actual))} come from one of "
                "them alone. This pair cannot be compared, so it is not converted."
            )
        for name, right in expected.items():
            error = _error(actual[name].double(), right.double())
            if name not in errors or not error <= errors[name]["error"]:
                errors[name] = {"error": error, "batch": batch.name}
    return errors


def _error(actual, expected):
    if actual.shape != expected.shape:
        return math.inf
    error = ((actual - expected).abs() / expected.abs().clamp(min=1)).max().item()
    return math.inf if math.isnan(error) else error


def prove(theirs, ours, head, seed=0, longest=None) -> dict:
    """Compare both in each type; what the certificate says of it.

    Args:
        theirs, ours: the models, whichever was made of the other.

    Raises:
        ValueError: where they differ in float64; with the output and the batch.
    """
    counts_padding = FAMILIES[theirs.config.model_type].counts_padding
    batches = make_batches(ours.config, head, seed, counts_padding, longest)
    proof = {
        "seed": seed,
        "batches": {batch.name: list(batch.mask.shape) for batch in batches},
        "compared": "at real tokens; error = |difference| / max(1, |value|)",
        "errors": {},
    }
    proof["errors"]["float64"] = check(compare(exact(theirs), exact(ours), head, batches, widened=True))
    for dtype in ("float32", "bfloat16"):
        pair = (copy.deepcopy(model).to(getattr(torch, dtype)).eval() for model in (theirs, ours))
        errors = compare(*pair, head, batches)
        proof["errors"][dtype] = summary(errors, TOLERANCES[dtype])
    return proof


def check(errors, what="the converted model is not the source") -> dict:
    """`summary` of errors in float64, or a ValueError with the first output that differs and the largest error."""
    tolerance = TOLERANCES["float64"]
    wrong = [name for name, of_output in errors.items() if not of_output["error"] <= tolerance]
    if wrong:
        largest = max(wrong, key=lambda name: errors[name]["error"])
        raise ValueError(
            f"Nothing was written, for {what}: {len(wrong)} of {len(errors)} outputs differ in float64. The first is "
            f"{wrong[0]} ({errors[wrong[0]]['error']:.3g}), the largest error is that of {largest} "
            f"({errors[largest]['error']:.3g} times max(1, |value|), batch {errors[largest]['batch']!r}), and "
            f"{tolerance:g} is allowed. A mapping of weights or options is wrong for this model; please report it "
            "with its config.json."
        )
    return summary(errors, tolerance)


def summary(errors, tolerance) -> dict:
    """Errors of one type: the largest, and of each output."""
    largest = max(errors, key=lambda name: errors[name]["error"])
    told = {"largest": errors[largest]["error"], "of": largest, "batch": errors[largest]["batch"]}
    if tolerance is not None:
        told |= {"tolerance": tolerance, "within": told["largest"] <= tolerance}
    return told | {"by_output": {name: of_output["error"] for name, of_output in errors.items()}}
