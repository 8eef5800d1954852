"""Norms."""

from torch import nn


def make_norm(config, size: int | None = None, bias: bool | None = None) -> nn.Module:
    """The norm that the config asks for, over the last `size` features (hidden_size if None).

    Source: LayerNorm, Ba et al. 2016, arXiv:1607.06450; RMSNorm (which has no bias), Zhang & Sennrich 2019,
    arXiv:1910.07467.
    """
    size = config.hidden_size if size is None else size
    if config.norm_type == "rms_norm":
        return nn.RMSNorm(size, eps=config.norm_eps)
    return nn.LayerNorm(size, eps=config.norm_eps, bias=config.norm_bias if bias is None else bias)
