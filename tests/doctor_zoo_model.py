"""Somebody else's encoder, healthy, in one file: what the zoo saves as remote code, and breaks by changing a line."""

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedConfig, PreTrainedModel, initialization
from transformers.modeling_outputs import MaskedLMOutput


class ZooConfig(PreTrainedConfig):
    model_type = "zoo"
    vocab_size: int = 420
    hidden_size: int = 32
    num_hidden_layers: int = 2
    num_attention_heads: int = 4
    max_position_embeddings: int = 40
    hidden_dropout: float = 0.1
    pad_token_id: int | None = 0
    tie_word_embeddings: bool = False


class ZooLayer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.heads, self.dropout = config.num_attention_heads, config.hidden_dropout
        self.norm, self.mlp_norm = nn.LayerNorm(config.hidden_size), nn.LayerNorm(config.hidden_size)
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.out = nn.Linear(config.hidden_size, config.hidden_size)
        self.mlp = nn.Sequential(
            nn.Linear(config.hidden_size, 2 * config.hidden_size),
            nn.GELU(),
            nn.Linear(2 * config.hidden_size, config.hidden_size),
        )
        self.register_buffer("slopes", torch.linspace(0.1, 0.4, self.heads), persistent=False)

    def forward(self, x, visible):
        query, key, value = self.qkv(self.norm(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
        places = torch.arange(x.shape[1])
        scores = scores - self.slopes[:, None, None] * (places - places[:, None]).abs()
        scores = scores.masked_fill(~visible[:, None, None], -1e9)
        attended = (scores.softmax(-1) @ value).transpose(1, 2).flatten(-2)
        x = x + F.dropout(self.out(attended), self.dropout, training=self.training)
        return x + F.dropout(self.mlp(self.mlp_norm(x)), self.dropout, training=self.training)


class ZooForMaskedLM(PreTrainedModel):
    config_class = ZooConfig
    base_model_prefix = "zoo"

    def __init__(self, config):
        super().__init__(config)
        self.tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.layers = nn.ModuleList(ZooLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(config.hidden_size)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size)
        self.post_init()

    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, ZooLayer):
            initialization.copy_(module.slopes, torch.linspace(0.1, 0.4, module.heads))

    def get_input_embeddings(self):
        return self.tokens

    def get_output_embeddings(self):
        return self.lm_head

    def forward(self, input_ids, attention_mask=None, labels=None, num_items_in_batch=None, **kwargs):
        visible = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        places = (visible.cumsum(-1) - 1).clamp(min=0)
        x = self.tokens(input_ids) + self.positions(places)
        for layer in self.layers:
            x = layer(x, visible.bool())
        logits = self.lm_head(self.norm(x))
        loss = None
        if labels is not None:
            total = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
            count = (labels != -100).sum() if num_items_in_batch is None else num_items_in_batch
            loss = total / torch.as_tensor(count).clamp(min=1)
        return MaskedLMOutput(loss=loss, logits=logits)


ZooConfig.register_for_auto_class()
ZooForMaskedLM.register_for_auto_class("AutoModelForMaskedLM")
