"""The encoder: read the batch, embed, layers, norm."""

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import can_return_tuple
from transformers.utils.generic import TransformersKwargs
from transformers.utils.output_capturing import capture_outputs

from .attention import Selection, SelfAttention, View
from .configuration_selfattn import SelfAttnConfig
from .embeddings import Embeddings
from .kernels import attention_kernel, check_kernel, default_kernel
from .layers import EncoderLayer
from .masks import read_mask
from .memory import Memory, SelfAttnModelOutput, continue_from, remember
from .norms import make_norm
from .packing import Packing, Tokens, read_batch, values_can_be_read
from .parallel import check_distribution, check_version, heads_here
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
    def attention_weights(
        self, batch: dict | None = None, layers=None, heads=None, queries=None, **inputs
    ) -> list[torch.Tensor]:
        """Some attention weights, and nothing larger is kept.

        Args:
            batch: what the base model's forward takes, as a dict; or by name, as `inputs`.
            layers, heads, queries: lists of numbers from 0, the layers in rising order; None: all.

        Returns:
            For each chosen layer (B, chosen heads, chosen queries, N), rows as `output_attentions` gives them.

        Raises:
            ValueError: for a number that there is not.
        """
        inputs = {**(batch or {}), **inputs}
        given = inputs.get("input_ids") if inputs.get("inputs_embeds") is None else inputs["inputs_embeds"]
        counts = {
            "layers": self.config.num_hidden_layers,
            "heads": self.config.num_attention_heads,
            "queries": 0 if given is None else given.shape[1],
        }
        for name, numbers in (("layers", layers), ("heads", heads), ("queries", queries)):
            if not set(numbers or ()) <= set(range(counts[name])):
                raise ValueError(
                    f"attention_weights: {name} must be numbers from 0 to {counts[name] - 1}, got {list(numbers)}. "
                    "None means all."
                )
        if list(layers or ()) != sorted(layers or ()):
            raise ValueError(f"attention_weights: layers come in rising order, got {list(layers)}. Sort them.")
        outputs = self.base_model(**inputs, output_attentions=Selection(layers, heads, queries), return_dict=True)
        return list(outputs.attentions)

    def compile_layers(self, **options) -> None:
        """Compiles each layer by itself, in place, for batches of any size: pointwise work is fused.

        What reads values stays outside of the graphs, so that padding is left out all the same; `torch.compile` of the
        whole model would keep it. Needs a C++ compiler on a CPU, and some ten seconds at the first batch.

        Args:
            options: of `torch.compile`.
        """
        for layer in self.base_model.layers:
            layer.compile(**{"dynamic": True, **options})

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """As in transformers; modules with parameters of their own give them their first values themselves."""
        super()._init_weights(module)
        if hasattr(module, "init_parameters"):
            module.init_parameters(self.config.initializer_range)

    def _initialize_weights(self, module: nn.Module, is_custom_code: bool = False) -> None:
        """As in transformers, which would pass over modules without parameters of their own in code from a Hub.

        It does so for code that writes over what was loaded; ours asks `transformers.initialization`, which does not.
        """
        super()._initialize_weights(module)

    def _check_and_adjust_attn_implementation(self, attn_implementation, *args, **kwargs) -> str:
        """transformers' gate for the kernel's name, at `__init__`, `from_pretrained` and `set_attn_implementation`."""
        if attn_implementation is None:
            return default_kernel(self.config)
        check_kernel(self.config, attn_implementation)
        return attn_implementation

    @classmethod
    def prepare_distribute_model(cls, distributed_config, *args, **kwargs):
        """transformers' gate for `from_pretrained(distributed_config=...)`, before anything is loaded."""
        if distributed_config is not None:
            check_version()
        return super().prepare_distribute_model(distributed_config, *args, **kwargs)

    @classmethod
    def maybe_distribute_model(cls, model, distributed_config, *args, **kwargs):
        """As in transformers, and before it, whether this model can be spread so."""
        if distributed_config is None:
            return super().maybe_distribute_model(model, distributed_config, *args, **kwargs)
        check_distribution(model.config, distributed_config)
        if distributed_config.tp_size == 1:
            # Known as one weight before it is cut, a tied weight has one set of pieces. With two, those of one of the
            # two modules would stay as they were loaded wherever the vocabulary does not divide.
            model.tie_weights(recompute_mapping=False)
        model = super().maybe_distribute_model(model, distributed_config, *args, **kwargs)
        if distributed_config.dp_size > 1:
            # A method beside forward has to gather the weights as forward does.
            torch.distributed.fsdp.register_fsdp_forward_method(model, "attention_weights")
        return model


class SelfAttnModel(SelfAttnPreTrainedModel):
    """The encoder without a head: token ids to hidden states.

    Args:
        config: a SelfAttnConfig.
    """

    def __init__(self, config):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.embedding_width, padding_idx=config.pad_token_id)
        self.embeddings = Embeddings(config)

        # One setting a layer, two where global queries have projections of their own.
        settings = [
            [(part, position) for part in pattern.parts(config)]
            for pattern, position in zip(layer_patterns(config), layer_positions(config), strict=True)
        ]
        self.distinct_settings = list(dict.fromkeys(setting for of_layer in settings for setting in of_layer))
        self.layers = nn.ModuleList(
            EncoderLayer(config, layer_idx, [self.distinct_settings.index(setting) for setting in of_layer])
            for layer_idx, of_layer in enumerate(settings)
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
        global_attention_mask: torch.Tensor | None = None,
        memory: Memory | None = None,
        return_packing: bool = False,
        **kwargs,
    ) -> SelfAttnModelOutput:
        """
        Args:
            input_ids: (B, N) token ids.
            attention_mask: (B, N) for padding; (B, N, N), (B, 1, N, N) or (B, H, N, N) for pairs; True or 1 means
                "may attend".
            position_ids: (B, N). Without `attention_mask` and `cu_seq_lens_q` a document begins where it is 0 and
                nowhere else, and documents do not see each other.
            token_type_ids: (B, N) sentence numbers; only where `type_vocab_size` > 0.
            inputs_embeds: (B, N, embedding width) instead of `input_ids`.
            global_attention_mask: (B, N), True or 1 for tokens that see and are seen by all of their document; only
                where a layer has the pattern 'longformer'.
            memory: what the last segment's output had as `memory`; only with `memory_length`.
            return_packing: for heads: `last_hidden_state` stays in the layout of the layers, and `packing`, which
                leads back from it, is returned beside it.
            kwargs: `output_hidden_states`, `output_attentions`, `return_dict`, `cu_seq_lens_q` (boundaries of
                documents), as in transformers.

        Returns:
            `last_hidden_state` (B, N, D); `hidden_states`, one more than layers, (B, N, D); `attentions`, one a layer,
            (B, H, N, N) with rows that sum to 1 over the tokens seen (with memory, (B, H, N, M + N)). All are 0 at
            padding. `memory` where `memory_length` > 0.

        Raises:
            ValueError: for a mask, positions or ids that the model cannot read, or a kernel that cannot run here.
        """
        _refuse_unknown(kwargs)
        given = self._check_inputs(input_ids, inputs_embeds)
        (batch_size, length), device = given.shape[:2], given.device
        padding_mask, user_mask = read_mask(attention_mask, batch_size, length, self.config.num_attention_heads)
        is_global = self._check_global(global_attention_mask, (batch_size, length))
        packing = read_batch(
            batch_size,
            length,
            device,
            padding_mask,
            position_ids,
            kwargs.get("cu_seq_lens_q"),
            restarts=attention_mask is None,
            is_global=is_global,
        )
        self._check_memory(memory, packing, user_mask, return_packing)
        if self._may_pack(packing, user_mask, kwargs.get("output_attentions")):
            packing = packing.packed()
        packing, key_tokens = continue_from(packing, memory)

        token_types = packing.pack(self._check_token_types(token_type_ids, (batch_size, length)))
        given = packing.pack(given)
        embeds = self.embed_tokens(given) if inputs_embeds is None else given
        hidden_states = self.embeddings(embeds, packing.tokens, token_types)
        check_kernel(
            self.config,
            self.config._attn_implementation,
            device_type=device.type,
            dtype=hidden_states.dtype,
            training=self.training,
        )
        views = self.views(packing, key_tokens, user_mask, hidden_states.dtype)
        outputs = self.encode(hidden_states, views, key_tokens, memory, **{**kwargs, "return_dict": True})

        if outputs.hidden_states is not None:
            outputs.hidden_states = tuple(None if x is None else packing.unpack(x) for x in outputs.hidden_states)
        if return_packing:
            return outputs, packing.to(outputs.last_hidden_state.device)
        outputs.last_hidden_state = packing.unpack(outputs.last_hidden_state)
        return outputs

    def views(
        self, packing: Packing, key_tokens: Tokens, user_mask: torch.Tensor | None, dtype: torch.dtype
    ) -> list[View]:
        """What each distinct pair of pattern and position needs to know of the tokens, once a forward."""
        tokens = packing.tokens
        heads = heads_here(self.layers[0].attention.q_proj.weight, self.config.num_attention_heads)
        if user_mask is not None and user_mask.shape[1] > len(heads):
            user_mask = user_mask[:, heads.start : heads.stop]
        make_mask, table_dtype = attention_kernel(self.config).mask, torch.promote_types(dtype, torch.float32)
        masks, states, views = {}, {}, []
        for pattern, position in self.distinct_settings:
            if pattern not in masks:
                masks[pattern] = make_mask(pattern, tokens, key_tokens, packing, heads, user_mask)
            if position not in states:
                states[position] = position.state(tokens, key_tokens, table_dtype)
            views.append(View(masks[pattern], states[position], (pattern, tokens, key_tokens, heads, user_mask)))
        return views

    @capture_outputs
    def encode(
        self, hidden_states: torch.Tensor, views: list[View], key_tokens: Tokens, memory: Memory | None, **kwargs
    ) -> SelfAttnModelOutput:
        """Layers and norm over (R, N, D); hidden states and attention weights are captured here."""
        wanted = kwargs.get("output_attentions")
        wanted = bool(self.config.output_attentions) if wanted is None else wanted
        entered = []
        for i, layer in enumerate(self.layers):
            need_weights = wanted.layers is None or i in wanted.layers if isinstance(wanted, Selection) else wanted
            entered.append(hidden_states)
            hidden_states = layer(
                hidden_states,
                views,
                wanted if need_weights else False,
                None if memory is None else memory.hidden_states[i],
            )
        remembered = None
        if self.config.memory_length:
            remembered = remember(memory, entered, key_tokens, self.config.memory_length)
        return SelfAttnModelOutput(last_hidden_state=self.norm(hidden_states), memory=remembered)

    def _may_pack(self, packing: Packing, user_mask: torch.Tensor | None, output_attentions) -> bool:
        """Whether the batch travels as its real tokens alone, where that leaves anything out.

        Weights are asked for in the batch's own shape, and a traced graph has no branch on values.
        """
        if (packing.all_real and packing.one_document) or not values_can_be_read(packing.tokens.document):
            return False
        wanted = self.config.output_attentions if output_attentions is None else output_attentions
        return user_mask is None and not self.config.memory_length and not wanted

    def _check_inputs(self, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None) -> torch.Tensor:
        """The one of the two that was given."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError(
                "The model reads either input_ids or inputs_embeds, got "
                f"{'neither' if input_ids is None else 'both'}. Pass exactly one of them."
            )
        if inputs_embeds is not None:
            if inputs_embeds.dim() != 3 or inputs_embeds.shape[2] != self.config.embedding_width:
                raise ValueError(
                    f"inputs_embeds must be of shape (B, N, {self.config.embedding_width}), got "
                    f"{tuple(inputs_embeds.shape)}. Its width is embedding_size, or else hidden_size."
                )
            return inputs_embeds
        if input_ids.dim() != 2 or input_ids.is_floating_point():
            raise ValueError(
                f"input_ids must be integers of shape (B, N), got {input_ids.dtype} of shape "
                f"{tuple(input_ids.shape)}. A single text is a batch of one: input_ids[None]."
            )
        # Reading values from another device would wait for it.
        if input_ids.device.type == "cpu" and input_ids.numel() and values_can_be_read(input_ids):
            low, high = (int(x) for x in input_ids.aminmax())
            if low < 0 or high >= self.config.vocab_size:
                raise ValueError(
                    f"input_ids must be from 0 to {self.config.vocab_size - 1} (vocab_size - 1), got ids from {low} "
                    f"to {high}. Use the model's own tokenizer, or model.resize_token_embeddings(len(tokenizer))."
                )
        return input_ids

    def _check_token_types(self, token_type_ids: torch.Tensor | None, shape: tuple[int, int]) -> torch.Tensor | None:
        if token_type_ids is None:
            return None
        types = max(self.config.type_vocab_size, 1)
        wrong = tuple(token_type_ids.shape) != tuple(shape)
        if token_type_ids.device.type == "cpu" and token_type_ids.numel() and values_can_be_read(token_type_ids):
            wrong = wrong or int(token_type_ids.min()) < 0 or int(token_type_ids.max()) >= types
        if wrong:
            raise ValueError(
                f"token_type_ids must be of shape {tuple(shape)}, from 0 and below "
                f"type_vocab_size={self.config.type_vocab_size} (all 0 where that is 0), got shape "
                f"{tuple(token_type_ids.shape)} or values out of that range. Leave them out, or make the model with "
                f"type_vocab_size={types + 1}."
            )
        return token_type_ids

    def _check_global(self, mask: torch.Tensor | None, shape: tuple[int, int]) -> torch.Tensor | None:
        if mask is None:
            return None
        if not any(pattern.reads_global for pattern, _ in self.distinct_settings):
            raise ValueError(
                "global_attention_mask names tokens for attention_pattern 'longformer', got "
                f"{self.config.attention_pattern!r}. Leave it out, or set that pattern."
            )
        if tuple(mask.shape) != tuple(shape):
            raise ValueError(f"global_attention_mask must be of shape {tuple(shape)}, got {tuple(mask.shape)}.")
        return mask.to(torch.bool)

    def _check_memory(self, memory, packing: Packing, user_mask, return_packing: bool) -> None:
        if memory is not None and not self.config.memory_length:
            raise ValueError("memory goes with memory_length > 0, got memory_length=0. Set it in the config.")
        if memory is not None and memory.tokens.document.shape[0] != packing.tokens.document.shape[0]:
            raise ValueError(
                f"memory is of {memory.tokens.document.shape[0]} texts and the batch of "
                f"{packing.tokens.document.shape[0]}. Pass the memory of the same texts in the same order."
            )
        if self.config.memory_length and (user_mask is not None or not packing.one_document or return_packing):
            raise ValueError(
                "memory_length goes with SelfAttnModel, one document in each row, and an attention_mask (B, N) or "
                "none; got a head, several documents in a row, or a mask of pairs. Set memory_length=0 for these."
            )


_KNOWN_KWARGS = set(TransformersKwargs.__annotations__) - {"is_causal"} | {"return_dict", "use_cache"}


def _refuse_unknown(kwargs: dict) -> None:
    unknown = {name for name, value in kwargs.items() if value is not None} - _KNOWN_KWARGS
    if unknown:
        raise TypeError(
            f"forward() got unexpected arguments {sorted(unknown)}. It knows input_ids, attention_mask, position_ids, "
            "token_type_ids, inputs_embeds, labels where the model has a head, and "
            f"{', '.join(sorted(_KNOWN_KWARGS))}."
        )
