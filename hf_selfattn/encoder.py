"""The encoder: read the batch, embed, layers, norm."""

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils import can_return_tuple
from transformers.utils.generic import TransformersKwargs
from transformers.utils.output_capturing import capture_outputs

from .attention import SelfAttention, View
from .configuration_selfattn import SelfAttnConfig
from .embeddings import Embeddings
from .kernels import attention_kernel, check_kernel, default_kernel
from .layers import EncoderLayer
from .masks import read_mask
from .norms import make_norm
from .packing import Packing, read_batch, values_can_be_read
from .patterns import layer_patterns
from .positions import layer_positions


class SelfAttnPreTrainedModel(PreTrainedModel):
    """What all `SelfAttn…` models share: configuration, capabilities, choice of the kernel."""

    config_class = SelfAttnConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["Embeddings", "EncoderLayer"]
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _supports_context_parallel = False
    _can_record_outputs = {"hidden_states": EncoderLayer, "attentions": SelfAttention}

    def __init__(self, config, *inputs, **kwargs):
        config.validate()
        super().__init__(config, *inputs, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """As in transformers; modules with parameters of their own give them their first values themselves."""
        super()._init_weights(module)
        if hasattr(module, "init_parameters"):
            module.init_parameters(self.config.initializer_range)

    def _check_and_adjust_attn_implementation(self, attn_implementation, *args, **kwargs) -> str:
        """transformers' gate for the kernel's name, at `__init__`, `from_pretrained` and `set_attn_implementation`."""
        if attn_implementation is None:
            return default_kernel(self.config)
        check_kernel(self.config, attn_implementation)
        return attn_implementation


class SelfAttnModel(SelfAttnPreTrainedModel):
    """The encoder without a head: token ids to hidden states.

    Args:
        config: a SelfAttnConfig.
    """

    def __init__(self, config):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.embedding_width, padding_idx=config.pad_token_id)
        self.embeddings = Embeddings(config)

        patterns, positions = layer_patterns(config), layer_positions(config)
        settings = list(zip(patterns, positions, strict=True))
        self.distinct_settings = list(dict.fromkeys(settings))
        self.layers = nn.ModuleList(
            EncoderLayer(config, layer_idx, view_index=self.distinct_settings.index(setting))
            for layer_idx, setting in enumerate(settings)
        )
        self.norm = make_norm(config) if config.norm_position == "pre" else nn.Identity()
        self.gradient_checkpointing = False
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        return_packing: bool = False,
        **kwargs,
    ) -> BaseModelOutput:
        """
        Args:
            input_ids: (B, N) token ids.
            attention_mask: (B, N) for padding; (B, N, N), (B, 1, N, N) or (B, H, N, N) for pairs; True or 1 means
                "may attend".
            position_ids: (B, N). Without `attention_mask` and `cu_seq_lens_q` a document begins where it is 0 and
                nowhere else, and documents do not see each other.
            token_type_ids: (B, N) sentence numbers; only where `type_vocab_size` > 0.
            inputs_embeds: (B, N, embedding width) instead of `input_ids`.
            return_packing: for heads: `last_hidden_state` stays in the layout of the layers, and `packing`, which
                leads back from it, is returned beside it.
            kwargs: `output_hidden_states`, `output_attentions`, `return_dict`, `cu_seq_lens_q` (boundaries of
                documents), as in transformers.

        Returns:
            `last_hidden_state` (B, N, D); `hidden_states`, one more than layers, (B, N, D); `attentions`, one a layer,
            (B, H, N, N) with rows that sum to 1 over the tokens seen. All are 0 at padding.

        Raises:
            ValueError: for a mask, positions or ids that the model cannot read, or a kernel that cannot run here.
        """
        _refuse_unknown(kwargs)
        inputs_embeds = self._embed(input_ids, inputs_embeds)
        (batch_size, length), device = inputs_embeds.shape[:2], inputs_embeds.device
        padding_mask, user_mask = read_mask(attention_mask, batch_size, length, self.config.num_attention_heads)
        packing = read_batch(
            batch_size,
            length,
            device,
            padding_mask,
            position_ids,
            kwargs.get("cu_seq_lens_q"),
            restarts=attention_mask is None,
        )

        token_types = packing.pack(self._check_token_types(token_type_ids, (batch_size, length)))
        hidden_states = self.embeddings(packing.pack(inputs_embeds), packing.tokens, token_types)
        check_kernel(
            self.config,
            self.config._attn_implementation,
            device_type=device.type,
            dtype=hidden_states.dtype,
            training=self.training,
        )
        outputs = self.encode(hidden_states, self.views(packing, user_mask, hidden_states.dtype), **kwargs)

        if outputs.hidden_states is not None:
            outputs.hidden_states = tuple(packing.unpack(x) for x in outputs.hidden_states)
        if return_packing:
            return outputs, packing
        outputs.last_hidden_state = packing.unpack(outputs.last_hidden_state)
        return outputs

    def views(self, packing: Packing, user_mask: torch.Tensor | None, dtype: torch.dtype) -> list[View]:
        """What each distinct pair of pattern and position needs to know of the tokens, once a forward."""
        tokens, heads = packing.tokens, range(self.config.num_attention_heads)
        make_mask, table_dtype = attention_kernel(self.config).mask, torch.promote_types(dtype, torch.float32)
        masks, states = {}, {}
        for pattern, position in self.distinct_settings:
            if pattern not in masks:
                masks[pattern] = make_mask(pattern, tokens, tokens, packing, heads, user_mask)
            if position not in states:
                states[position] = position.state(tokens, tokens, table_dtype)
        return [View(masks[pattern], states[position]) for pattern, position in self.distinct_settings]

    @capture_outputs
    def encode(self, hidden_states: torch.Tensor, views: list[View], **kwargs) -> BaseModelOutput:
        """Layers and norm over (R, N, D); hidden states and attention weights are captured here."""
        output_attentions = kwargs.get("output_attentions")
        need_weights = bool(self.config.output_attentions if output_attentions is None else output_attentions)
        for layer in self.layers:
            hidden_states = layer(hidden_states, views, need_weights)
        return BaseModelOutput(last_hidden_state=self.norm(hidden_states))

    def _embed(self, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None) -> torch.Tensor:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError(
                "The model reads either input_ids or inputs_embeds, got "
                f"{'neither' if input_ids is None else 'both'}. Pass exactly one of them."
            )
        if inputs_embeds is not None:
            return inputs_embeds
        # Reading values from another device would wait for it.
        if input_ids.device.type == "cpu" and input_ids.numel() and values_can_be_read(input_ids):
            low, high = (int(x) for x in input_ids.aminmax())
            if low < 0 or high >= self.embed_tokens.num_embeddings:
                raise ValueError(
                    f"input_ids must be from 0 to {self.embed_tokens.num_embeddings - 1} (vocab_size - 1), got ids "
                    f"from {low} to {high}. Use the model's own tokenizer, or model.resize_token_embeddings("
                    "len(tokenizer))."
                )
        return self.embed_tokens(input_ids)

    def _check_token_types(self, token_type_ids: torch.Tensor | None, shape: tuple[int, int]) -> torch.Tensor | None:
        if token_type_ids is None:
            return None
        types = self.config.type_vocab_size
        readable = token_type_ids.device.type == "cpu" and values_can_be_read(token_type_ids)
        if tuple(token_type_ids.shape) != tuple(shape) or (readable and int(token_type_ids.max()) >= max(types, 1)):
            raise ValueError(
                f"token_type_ids must be of shape {tuple(shape)} and below type_vocab_size={types} (all 0 where that "
                f"is 0), got shape {tuple(token_type_ids.shape)}. Leave them out, or make the model with "
                "type_vocab_size=2."
            )
        return token_type_ids


_KNOWN_KWARGS = set(TransformersKwargs.__annotations__) - {"is_causal"} | {"return_dict", "use_cache"}


def _refuse_unknown(kwargs: dict) -> None:
    unknown = {name for name, value in kwargs.items() if value is not None} - _KNOWN_KWARGS
    if unknown:
        raise TypeError(
            f"forward() got unexpected arguments {sorted(unknown)}. It knows input_ids, attention_mask, position_ids, "
            "token_type_ids, inputs_embeds, labels where the model has a head, and "
            f"{', '.join(sorted(_KNOWN_KWARGS))}."
        )
