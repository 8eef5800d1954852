"""The block: attention and feed-forward, each with its residual connection, and norms wherever they are wanted."""

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer

from .attention import GlobalSelfAttention, Selection, SelfAttention, View
from .norms import make_norm


class FeedForward(nn.Module):
    """act(x W_up) W_down, or gated: (act(x W_gate) * x W_up) W_down. Source: Shazeer 2020, arXiv:2002.05202."""

    def __init__(self, config):
        super().__init__()
        inner, bias = config.feed_forward_size, config.mlp_bias
        self.gate_proj = nn.Linear(config.hidden_size, inner, bias=bias) if config.mlp_type == "gated" else None
        self.up_proj = nn.Linear(config.hidden_size, inner, bias=bias)
        self.down_proj = nn.Linear(inner, config.hidden_size, bias=bias)
        self.activation = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(R, N, D) to (R, N, D)."""
        if self.gate_proj is None:
            return self.down_proj(self.activation(self.up_proj(hidden_states)))
        return self.down_proj(self.activation(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))


class EncoderLayer(GradientCheckpointingLayer):
    """One layer: x + attention(norm(x)), then x + feed_forward(norm(x)), or with the norms after each sum.

    Source: post-norm, Vaswani et al. 2017, arXiv:1706.03762; pre-norm, Xiong et al. 2020, arXiv:2002.04745.
    """

    def __init__(self, config, layer_idx: int, view_indices: list[int]):
        super().__init__()
        pre, post = config.norm_position == "pre", config.norm_position == "post"
        first = pre and (layer_idx > 0 or config.first_layer_norm)
        attention = SelfAttention if len(view_indices) == 1 else GlobalSelfAttention
        self.attention_norm = make_norm(config) if first else nn.Identity()
        self.attention = attention(config, layer_idx, *view_indices)
        self.attention_post_norm = make_norm(config) if post else nn.Identity()
        self.feed_forward_norm = make_norm(config) if pre else nn.Identity()
        self.feed_forward = FeedForward(config)
        self.feed_forward_post_norm = make_norm(config) if post else nn.Identity()
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(
        self,
        hidden_states: torch.Tensor,
        views: list[View],
        need_weights: bool | Selection = False,
        memory: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """(R, N, D) to (R, N, D). The weights are taken from the attention by transformers' capturing hooks.

        Args:
            hidden_states: (R, N, D).
            views: of the forward.
            need_weights: whether weights are wanted, or which of them.
            memory: (R, M, D), what entered this layer for earlier tokens that are attended to, or None.
        """
        normed = self.attention_norm(hidden_states)
        source = None if memory is None else torch.cat((self.attention_norm(memory), normed), dim=1)
        attended, _ = self.attention(normed, views, need_weights, source)
        hidden_states = self.attention_post_norm(hidden_states + self.dropout(attended))
        transformed = self.feed_forward(self.feed_forward_norm(hidden_states))
        return self.feed_forward_post_norm(hidden_states + self.dropout(transformed))
