"""Self-attention: where query, key and value are made, matched and mixed.

R rows, N tokens, H heads, G key/value heads, D hidden size, d_k = head_dim, d_v = value_head_dim.
"""

from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import initialization as init

from .kernels import attention_kernel
from .kernels_eager import some_weights
from .norms import make_norm
from .parallel import heads_of_all, tensor_parallel_mesh
from .positions import POSITIONS
from .scores import SCORES


class View(NamedTuple):
    """What a layer is told of its tokens, made once a forward and shared by all layers with the same setting.

    Attributes:
        mask: who sees whom, as the kernel's `mask` made it.
        position: the tables that the position's `state` made.
        who: what `masks.allowed` takes, for kernels that need not keep it: (pattern, query, key, heads, user_mask).
    """

    mask: Any
    position: Any
    who: tuple


class Selection(NamedTuple):
    """Which attention weights are wanted; None: all.

    Attributes:
        layers, heads, queries: numbers, the queries in the layout of the layers.
    """

    layers: list[int] | None = None
    heads: list[int] | None = None
    queries: list[int] | None = None


class SelfAttention(nn.Module):
    """Multi-head self-attention.

    Source: Vaswani et al. 2017, arXiv:1706.03762, section 3.2; shared key/value heads: Ainslie et al. 2023,
    arXiv:2305.13245.

    Args:
        config: a SelfAttnConfig.
        layer_idx: the number of the layer, from 0.
        view_index: which of the forward's views this layer reads.
    """

    is_causal = False  # asked for by transformers; direction is config.causal

    def __init__(self, config, layer_idx: int, view_index: int = 0):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.view_index = view_index
        self.head_dim = config.query_key_dim
        self.value_head_dim = config.value_dim
        heads, groups, bias = config.num_attention_heads, config.num_groups, config.attention_bias

        self.q_proj = nn.Linear(config.hidden_size, heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(config.hidden_size, groups * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(config.hidden_size, groups * self.value_head_dim, bias=bias)
        self.o_proj = nn.Linear(heads * self.value_head_dim, config.hidden_size, bias=bias)
        self.q_norm = make_norm(config, self.head_dim) if config.qk_norm else nn.Identity()
        self.k_norm = make_norm(config, self.head_dim) if config.qk_norm else nn.Identity()
        self.position_setting = POSITIONS[config.position_encoding].from_config(config, layer_idx)
        self.position = self.position_setting.layer(config)
        self.score_function = SCORES[config.score_function](config)

    def init_parameters(self, std: float) -> None:
        """First values of the biases that the position asks for; all others are those of the linear layers.

        Beside weights that were loaded, new biases begin at 0: they change nothing.
        """
        biases = self.position_setting.first_biases(self.config)
        if biases is None or getattr(self.q_proj.weight, "_is_hf_initialized", False):
            return
        query, key = biases
        query = query.repeat_interleave(self.config.num_attention_heads // self.config.num_groups, dim=0)
        init.copy_(self.q_proj.bias, query.flatten().to(self.q_proj.bias))
        init.copy_(self.k_proj.bias, key.flatten().to(self.k_proj.bias))

    def forward(
        self,
        hidden_states: torch.Tensor,
        views: list[View],
        need_weights: bool | Selection = False,
        key_value_states: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(R, N, D) to (R, N, D), and weights (R, H, N, K) if they are needed.

        Args:
            hidden_states: (R, N, D), what queries are made from.
            views: of the forward.
            need_weights: whether weights are wanted, or which of them.
            key_value_states: (R, K, D), what keys and values are made from; None: `hidden_states`.
        """
        heads, weights = self.heads(hidden_states, views[self.view_index], need_weights, key_value_states)
        return self.o_proj(heads.flatten(-2)), weights

    def heads(self, hidden_states, view: View, need_weights=False, key_value_states=None):
        """As `forward`, before the output projection: (R, N, H, d_v) and weights."""
        source = hidden_states if key_value_states is None else key_value_states
        query = self.q_norm(self.q_proj(hidden_states).unflatten(-1, (-1, self.head_dim)))  # (R, N, H, d_k)
        key = self.k_norm(self.k_proj(source).unflatten(-1, (-1, self.head_dim)))  # (R, K, G, d_k)
        value = self.v_proj(source).unflatten(-1, (-1, self.value_head_dim))  # (R, K, G, d_v)

        query, key, bias = self.position(query, key, view.position)
        query, key, scoring = self.score_function(query, key, bias)

        dropout = self.config.attention_dropout if self.training else 0.0
        heads, weights = attention_kernel(self.config).attend(
            query, key, value, view.mask, scoring, dropout=dropout, need_weights=need_weights is True
        )
        mesh, chosen = tensor_parallel_mesh(self.q_proj.weight), getattr(need_weights, "heads", None)
        if isinstance(need_weights, Selection):
            # Where heads are spread over processes, the chosen ones are known by number only once all are there.
            here = chosen if mesh is None else None
            weights = some_weights(query, key, view.who, scoring, here, need_weights.queries)
        if weights is not None and mesh is not None:
            weights = heads_of_all(weights, mesh)
            weights = weights if chosen is None else weights[:, chosen]
        return heads, weights


class GlobalSelfAttention(SelfAttention):
    """Longformer's attention with projections of their own for global queries and all that they attend to.

    Source: Beltagy et al. 2020, arXiv:2004.05150, section 3.1 ("linear projections for global attention").

    Args:
        view_index, global_view_index: the views in which only local, and only global queries see anything.
    """

    def __init__(self, config, layer_idx: int, view_index: int, global_view_index: int):
        super().__init__(config, layer_idx, view_index)
        self.of_global = SelfAttention(config, layer_idx, global_view_index)
        self.of_global.o_proj = nn.Identity()

    def forward(self, hidden_states, views, need_weights=False, key_value_states=None):
        """As `SelfAttention.forward`; in each of the two, the other's queries see nothing and give 0."""
        local, weights = self.heads(hidden_states, views[self.view_index], need_weights, key_value_states)
        view = views[self.of_global.view_index]
        of_global, more_weights = self.of_global.heads(hidden_states, view, need_weights, key_value_states)
        return self.o_proj((local + of_global).flatten(-2)), None if weights is None else weights + more_weights
