"""What enters the first layer."""

import torch
from torch import nn

from .norms import make_norm
from .packing import Tokens
from .positions import POSITIONS


class Embeddings(nn.Module):
    """Token vectors, plus token types and positions where the config has them; norm, dropout, and a projection to
    hidden_size where `embedding_size` differs from it (the order of BERT and ELECTRA)."""

    def __init__(self, config):
        super().__init__()
        size = config.embedding_width
        self.token_types = nn.Embedding(config.type_vocab_size, size) if config.type_vocab_size else None
        self.positions = POSITIONS[config.position_encoding].from_config(config, 0).embedding(config)
        self.norm = make_norm(config, size) if config.embedding_norm else nn.Identity()
        self.dropout = nn.Dropout(config.embedding_dropout)
        self.projection = nn.Linear(size, config.hidden_size) if size != config.hidden_size else nn.Identity()

    def forward(
        self, embeds: torch.Tensor, tokens: Tokens, token_type_ids: torch.Tensor | None = None
    ) -> torch.Tensor:
        """(R, N, embedding width) to (R, N, D); without `token_type_ids` every token is of type 0."""
        if self.token_types is not None:
            types = torch.zeros_like(tokens.position) if token_type_ids is None else token_type_ids
            embeds = embeds + self.token_types(types)
        if self.positions is not None:
            embeds = embeds + self.positions(tokens, embeds.dtype)
        return self.projection(self.dropout(self.norm(embeds)))
