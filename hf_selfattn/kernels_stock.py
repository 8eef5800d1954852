"""The tiled kernel for other people's models: `BertModel.from_pretrained(…, attn_implementation="selfattn")`.

transformers' two tables are global, and the last imported copy of the code wins there; our own models never read them.
"""

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import causal_mask_function, sdpa_mask

from .kernels_selfattn import attend
from .packing import Packing, Tokens
from .patterns import Full
from .scores import Scoring
from .tiles import TileMask
from .tiles import mask as tile_mask


def stock_mask(
    batch_size: int, q_length: int, kv_length: int, mask_function=causal_mask_function, device="cpu", **kwargs
) -> TileMask:
    """What transformers' mask functions give for this kernel: who sees whom, and which blocks are worth a visit.

    Args:
        batch_size, q_length, kv_length, mask_function, device, kwargs: as transformers passes them.
    """
    kwargs |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    pairs = sdpa_mask(batch_size, q_length, kv_length, mask_function=mask_function, device=device, **kwargs)
    return _tile_mask(pairs.expand(batch_size, -1, -1, -1))


def stock_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: TileMask | torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """As transformers' attention functions: (B, H, N, d) in, (B, N, H, d) and weights (or None) out.

    Raises:
        ValueError: for a mask that `stock_mask` did not make, unless it is bool or None.
    """
    if kwargs.get("position_bias") is not None:
        raise ValueError(
            "attn_implementation 'selfattn' cannot add the position_bias that this model passes. Use "
            "attn_implementation='sdpa' or 'eager'."
        )
    if attention_mask is None:
        causal = getattr(module, "is_causal", False) if kwargs.get("is_causal") is None else kwargs["is_causal"]
        pairs = torch.ones(query.shape[0], 1, query.shape[2], key.shape[2], dtype=torch.bool, device=query.device)
        attention_mask = pairs.tril(key.shape[2] - query.shape[2]) if causal else pairs
    if isinstance(attention_mask, torch.Tensor):
        if attention_mask.dtype != torch.bool:
            raise ValueError(
                f"attn_implementation 'selfattn' reads masks made by its own mask function or bool masks, got "
                f"{attention_mask.dtype}. Pass an attention_mask (B, N), or a bool mask where True means 'may attend'."
            )
        attention_mask = _tile_mask(attention_mask)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    scoring = Scoring("scaled_dot_product", (scale,), softcap=softcap, sink=s_aux)
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    need_weights = bool(kwargs.get("output_attentions"))
    return attend(query, key, value, attention_mask, scoring, dropout, need_weights)


def _tile_mask(pairs: torch.Tensor) -> TileMask:
    """A bool mask (B, 1 or H, N, K) as the tiled kernel takes it."""
    (rows, _, *lengths), device = pairs.shape, pairs.device
    query, key = (
        Tokens(
            document=torch.arange(rows, device=device).unsqueeze(1).expand(-1, length),
            position=torch.arange(length, device=device).expand(rows, -1),
            length=torch.full((rows, length), length, device=device),
        )
        for length in lengths
    )
    packing = Packing(query, tuple(query.document.shape), all_real=True, one_document=True)
    return tile_mask(Full(), query, key, packing, range(pairs.shape[1]), pairs)


AttentionInterface.register("selfattn", stock_attention)
AttentionMaskInterface.register("selfattn", stock_mask)
