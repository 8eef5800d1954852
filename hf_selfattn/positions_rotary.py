"""Rotary positions."""

import itertools
import math
from dataclasses import dataclass

import torch
from torch import nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from .positions_base import NoPosition


@dataclass(frozen=True)
class Rotary(NoPosition):
    """Turns pairs (i, i + r / 2) of the first r features of query and key by position * frequency[i].

    Args:
        frequencies: r / 2 of them; by default theta^(-2i / r), r = d_k * partial_rotary_factor.
        factor: what cos and sin are multiplied by (1, but for yarn).

    Source: Su et al. 2021, arXiv:2104.09864, section 3.2; halves paired and scaled as in transformers.
    """

    frequencies: tuple[float, ...]
    factor: float = 1.0
    options = ("rope_parameters", "initial_offsets")

    @classmethod
    def from_config(cls, config, layer):
        parameters = rope_of_layer(config, layer)
        if parameters["rope_type"] == "default":
            width = int(config.query_key_dim * parameters.get("partial_rotary_factor", 1.0))
            return cls(tuple(parameters["rope_theta"] ** (-i / width) for i in range(0, width, 2)))
        with torch.device("cpu"):
            frequencies, factor = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](_LayerConfig(config, parameters), None)
        return cls(tuple(frequencies.tolist()), float(factor))

    @classmethod
    def check(cls, config):
        given = config.rope_parameters or {}
        if any(isinstance(value, dict) for value in given.values()):
            pattern = config.attention_pattern
            used = {pattern} if isinstance(pattern, str) else set(pattern)
            if set(given) != used or not all(isinstance(value, dict) for value in given.values()):
                return (
                    f"rope_parameters by pattern has one dict for each of {sorted(used)}, got {given}. Name these "
                    "patterns and nothing else, or give one flat dict for all."
                )
        problems = (_problem(config, rope_of_layer(config, layer)) for layer in range(config.num_hidden_layers))
        return next((problem for problem in problems if problem is not None), _problem_of_offsets(config))

    def state(self, query, source, dtype):
        """((cos, sin) of the queries, (cos, sin) of the keys), each (R, N, 1, r / 2)."""
        turned = self._cos_sin(query.position, dtype)
        return turned, turned if source is query else self._cos_sin(source.position, dtype)

    def _cos_sin(self, position, dtype):
        # The table is made here from numbers: a buffer would come back from the meta device as garbage and would be
        # rounded by model.half().
        frequencies = torch.tensor(self.frequencies, dtype=dtype, device=position.device)
        angle = position[..., None, None].to(dtype) * frequencies
        return angle.cos() * self.factor, angle.sin() * self.factor

    def layer(self, config):
        return RotateHalves()

    def first_biases(self, config):
        """As in `NoPosition`. Without `initial_offsets` heads look at their neighbours, where they can: not where even
        the fastest pair turns so slowly that neighbours would be told apart by large scores alone.
        """
        if not _can_begin_with_offsets(config):
            return None
        offsets = config.initial_offsets
        if offsets is None:
            offsets = [] if max(self.frequencies) < 1 else [-1, -2] if config.causal else [-1, 1, -2, 2]
        if not offsets:
            return None
        of_groups = itertools.islice(itertools.cycle(offsets), config.num_groups)
        return torch.stack([self.biases_for_offset(offset, config.query_key_dim) for offset in of_groups], dim=1)

    def biases_for_offset(self, offset: int, head_dim: int) -> torch.Tensor:
        """(2, head_dim): biases of query and key with which a head attends to the token `offset` places on.

        Features (i, i + r / 2) are (a_i, 0) in the query's bias and the same turned back by the offset in the key's.
        The two alone make the score sum_i a_i^2 cos(f_i (distance - offset)) / sqrt(d_k), whose peak is at the offset.
        a_i^2 is in proportion to f_i: pairs that turn slowly would add to the scores of all tokens alike. One token
        beside the peak the score is `FALL` lower. What the weights add decides more and more as they grow.
        """
        frequency = torch.tensor(self.frequencies, dtype=torch.float64)
        fall = (frequency * (1 - frequency.cos())).sum() * self.factor**2
        size = (frequency * FALL * head_dim**0.5 / fall).sqrt()
        query = torch.cat([size, torch.zeros_like(size)])
        key = torch.cat([size * (offset * frequency).cos(), -size * (offset * frequency).sin()])
        return nn.functional.pad(torch.stack([query, key]), (0, head_dim - len(query)))


FALL = 1.5
"""By how much the score of a new head that looks at an offset is lower one token beside it."""


def _can_begin_with_offsets(config) -> bool:
    return config.attention_bias and not config.qk_norm and config.score_function == "scaled_dot_product"


class RotateHalves(nn.Module):
    """Rotates query (R, N, H, d_k) and key (R, K, G, d_k) by the tables of `Rotary.state`."""

    def forward(self, query, key, state):
        of_queries, of_keys = state
        return self.rotate(query, *of_queries), self.rotate(key, *of_keys), None

    @staticmethod
    def rotate(x, cos, sin):
        """x (R, N, H, d_k), cos and sin (R, N, 1, r / 2); features after the first r stay as they are."""
        cos, sin = cos.to(x.dtype), sin.to(x.dtype)
        if not torch.compiler.is_compiling():
            return Rotate.apply(x, cos, sin)
        half = cos.shape[-1]
        first, second, rest = x.split((half, half, x.shape[-1] - 2 * half), dim=-1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), dim=-1)


class Rotate(torch.autograd.Function):
    """`RotateHalves.rotate` without a concatenation: each half is written where it belongs."""

    @staticmethod
    def forward(x, cos, sin):
        half, out = cos.shape[-1], torch.empty_like(x)
        (first, second), (to_first, to_second) = (y[..., : 2 * half].split(half, dim=-1) for y in (x, out))
        torch.mul(first, cos, out=to_first).addcmul_(second, sin, value=-1)
        torch.mul(second, cos, out=to_second).addcmul_(first, sin)
        if 2 * half < x.shape[-1]:
            out[..., 2 * half :] = x[..., 2 * half :]
        return out

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx, grad):
        """The rotation back."""
        cos, sin = ctx.saved_tensors
        return Rotate.apply(grad, cos, -sin), None, None


_NEEDED = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings"),
}
"""The types of rotary frequencies, and what each cannot do without. Not 'dynamic' and 'longrope': their frequencies
depend on the longest text of the batch, so a text would not get the same numbers alone and beside others."""

_ALWAYS = ("rope_type", "rope_theta", "partial_rotary_factor")

_MORE = {"yarn": ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate")}


def _problem(config, parameters: dict) -> str | None:
    """What is wrong with the rope_parameters of one layer, or None."""
    rope_type, theta = parameters["rope_type"], parameters["rope_theta"]
    if rope_type not in _NEEDED:
        return (
            f"rope_parameters: rope_type must be one of {', '.join(map(repr, _NEEDED))}, got {rope_type!r}. "
            "('dynamic' and 'longrope' depend on the longest text of a batch.)"
        )
    known = (*_ALWAYS, *_NEEDED[rope_type], *_MORE.get(rope_type, ()))
    unknown = sorted(set(parameters) - set(known))
    if unknown:
        return (
            f"rope_parameters has {unknown}, which rope_type {rope_type!r} does not use. It knows {', '.join(known)}, "
            f"and 'factor' and more for others of {', '.join(map(repr, _NEEDED))}; got {unknown}. Leave them out, or "
            "set the rope_type that is meant."
        )
    if not _above_0(theta):
        return f"rope_parameters: rope_theta must be a number above 0, got {theta!r}. 10000.0 is usual."
    missing = [name for name in _NEEDED[rope_type] if parameters.get(name) is None]
    if missing:
        return f"rope_parameters of rope_type {rope_type!r} needs {', '.join(missing)}, got {parameters}. Set them."
    for name in (*_NEEDED[rope_type], "partial_rotary_factor"):
        if not (_above_0(parameters.get(name, 1)) or (name == "partial_rotary_factor" and parameters[name] == 0)):
            return f"rope_parameters: {name} must be a number above 0, got {parameters[name]!r}."
    width = config.query_key_dim * parameters.get("partial_rotary_factor", 1)
    if width != int(width) or int(width) % 2 or not 0 < width <= config.query_key_dim:
        return (
            "position_encoding 'rotary' turns pairs and needs an even head_dim * partial_rotary_factor, got "
            f"{width}. Change head_dim or the factor."
        )
    return None


def _problem_of_offsets(config) -> str | None:
    offsets = config.initial_offsets
    if not offsets:
        return None
    if not _can_begin_with_offsets(config):
        return (
            f"initial_offsets={offsets} are biases of queries and keys that a dot product reads: it needs "
            "attention_bias=True, qk_norm=False and score_function='scaled_dot_product', got attention_bias="
            f"{config.attention_bias}, qk_norm={config.qk_norm} and score_function={config.score_function!r}. Set "
            "these, or initial_offsets=[]."
        )
    if config.causal and max(offsets) > 0:
        return (
            f"With causal=True no head sees what comes after a token, got initial_offsets={offsets}. Use 0 and "
            "negative ones."
        )
    return None


def _above_0(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < math.inf


def rope_of_layer(config, layer: int) -> dict:
    """rope_parameters of one layer: the flat dict, or its entry for the layer's pattern; defaults filled in."""
    parameters = config.rope_parameters or {}
    if any(isinstance(value, dict) for value in parameters.values()):
        pattern = config.attention_pattern
        parameters = parameters[pattern if isinstance(pattern, str) else pattern[layer]]
    parameters = {"rope_type": "default", "rope_theta": config.default_theta, **parameters}
    if "original_max_position_embeddings" in _NEEDED.get(parameters["rope_type"], ()):
        parameters.setdefault("original_max_position_embeddings", getattr(config, "max_position_embeddings", None))
    return parameters


class _LayerConfig:
    """The config as one layer's frequencies read it in transformers."""

    def __init__(self, config, parameters: dict):
        self.rope_parameters = parameters
        self.head_dim = config.query_key_dim
        self.hidden_size = config.hidden_size
        self.num_attention_heads = config.num_attention_heads
        original = parameters.get("original_max_position_embeddings")
        self.max_position_embeddings = getattr(config, "max_position_embeddings", original)

    def standardize_rope_params(self):
        """transformers calls it; the parameters are complete."""
