"""The table of kernels: how attention is computed, never what is computed.

A kernel is two functions in one file:

    mask(pattern, query, key, packing, heads, user_mask)
        what this kernel needs to know of who sees whom; called once a forward for each distinct pattern
    attend(query, key, value, mask, scoring, dropout, need_weights) -> (heads, weights or None)
        query (R, N, H, d_k), key (R, K, G, d_k), value (R, K, G, d_v) -> heads (R, N, H, d_v), weights (R, H, N, K)

It computes what `kernels_eager.attend` computes, or `reasons(config, device_type, dtype, training)` says why not.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from transformers.utils import logging

from .kernels_dense import attend_sdpa, eager_reasons, sdpa_reasons
from .kernels_dense import mask as dense_mask
from .kernels_eager import attend as attend_eager
from .kernels_flex import attend as attend_flex
from .kernels_flex import mask as flex_mask
from .kernels_flex import reasons as flex_reasons
from .kernels_rows import by_rows
from .kernels_selfattn import attend as attend_selfattn
from .kernels_selfattn import reasons as selfattn_reasons
from .kernels_varlen import varlen_reasons, window_of, with_varlen
from .patterns import Pattern, layer_patterns
from .tiles import mask as tile_mask

logger = logging.get_logger(__name__)


class Kernel(NamedTuple):
    """The pair of functions of a kernel, and its refusals."""

    mask: Callable
    attend: Callable
    reasons: Callable


KERNELS: dict[str, Kernel] = {
    "sdpa": Kernel(*by_rows(dense_mask, attend_sdpa), sdpa_reasons),
    "flex_attention": Kernel(*by_rows(flex_mask, attend_flex), flex_reasons),
    "selfattn": Kernel(tile_mask, attend_selfattn, selfattn_reasons),
    "eager": Kernel(*by_rows(dense_mask, attend_eager), eager_reasons),
}
"""In the order in which `default_kernel` tries them where `attn_implementation` names none."""

SDPA_WITH_VARLEN = Kernel(*with_varlen(*by_rows(dense_mask, attend_sdpa)), sdpa_reasons)
"""'sdpa' where flash attention over documents can compute the configuration."""


def unsupported_reasons(
    config,
    kernel: str,
    *,
    device_type: str | None = None,
    dtype: torch.dtype | None = None,
    training: bool | None = None,
) -> list[str]:
    """Why `kernel` cannot compute what `config` asks for; empty if it can. None means: not known yet.

    Args:
        config: a SelfAttnConfig.
        kernel: a row of KERNELS.
        device_type: "cpu", "cuda", …
        dtype: the type of query, key and value.
        training: whether the model is in training mode.

    Raises:
        ValueError: for a name that is not in KERNELS.
    """
    if kernel not in KERNELS:
        raise ValueError(f"attn_implementation {kernel!r} is not known. Known are: {', '.join(KERNELS)}.")
    return KERNELS[kernel].reasons(config, device_type, dtype, training)


def default_kernel(config, **known) -> str:
    """The first kernel of KERNELS that can compute `config`; `known` as for `unsupported_reasons`.

    'selfattn' comes first where a pattern leaves blocks out (its time and memory grow with what is seen) that flash
    attention does not leave out as well, and on a machine without an accelerator (torch's fused attention has a slow
    backward on a CPU).
    """
    order, patterns = list(KERNELS), layer_patterns(config)
    sparse = any(type(pattern).may_see is not Pattern.may_see for pattern in patterns)
    flash = torch.cuda.is_available() and not varlen_reasons(config) and all(map(window_of, patterns))
    if (sparse and not flash) or not torch.accelerator.is_available():
        order.sort(key=lambda name: name != "selfattn")
    name = next(name for name in order if not unsupported_reasons(config, name, **known))
    logger.info(f"attn_implementation: {name}, the first of {', '.join(order)} that can compute this configuration.")
    return name


def check_kernel(config, kernel: str, **known) -> None:
    """Raises ValueError if `kernel` cannot compute `config`; `known` as for `unsupported_reasons`."""
    found = unsupported_reasons(config, kernel, **known)
    if found:
        able = [repr(name) for name in KERNELS if not unsupported_reasons(config, name, **known)]
        raise ValueError(
            f"attn_implementation {kernel!r} cannot compute this configuration: {'; '.join(found)}. "
            f"Use attn_implementation={' or '.join(able)}."
        )


def attention_kernel(config) -> Kernel:
    """The kernel that `config` names now: `set_attn_implementation` changes the config and tells no module."""
    name = config._attn_implementation
    return SDPA_WITH_VARLEN if name == "sdpa" and not varlen_reasons(config) else KERNELS[name]
