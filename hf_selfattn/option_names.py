"""Options of a config by their names: misspelt ones, which transformers would accept and store, and absent ones."""

import difflib
import inspect
from dataclasses import fields

from transformers import GenerationConfig, PreTrainedConfig

OF_THE_LIBRARY = (
    {field.name for field in fields(PreTrainedConfig)}
    | set(GenerationConfig._get_default_generation_params())
    | {"num_labels", "name_or_path", "torch_dtype", "attn_implementation", "experts_implementation"}
    | {"output_attentions", "rope_theta", "rope_scaling", "partial_rotary_factor", "per_layer_config"}
    | {"add_cross_attention", "is_decoder", "tie_last_hidden_states", "model_max_length", "tie_encoder_decoder"}
    | {
        "output_loading_info",
        "quantization_config",
        "auto_map",
        "model_type",
        "use_cache",
        "task_specific_params",
        "custom_pipelines",
    }
    | {f"{name}_token_id" for name in ("cls", "sep", "mask", "unk", "decoder_start")}
)
"""What transformers itself, and what saves configs with it, puts into a config."""

OFTEN_SET = ("num_labels", "id2label", "label2id", "problem_type", "output_hidden_states", "output_attentions")

CALLED_ELSEWHERE = {
    name: here
    for here, names in {
        "window_radius": ("sliding_window", "local_attention", "attention_window"),
        "hidden_size": ("d_model", "n_embd", "dim", "embed_dim"),
        "num_attention_heads": ("n_heads", "n_head", "heads", "num_heads"),
        "num_hidden_layers": ("n_layers", "n_layer", "layers", "num_layers", "depth"),
        "intermediate_size": ("ffn_dim", "d_ff", "hidden_dim", "n_inner"),
        "max_position_embeddings": ("max_len", "n_positions", "max_seq_len"),
        "rope_parameters": ("theta",),
        "hidden_dropout": ("dropout", "resid_pdrop"),
        "hidden_act": ("activation", "activation_function"),
    }.items()
    for name in names
}
"""Options by the names that other models give them."""


def refuse_misspelt(cls: type[PreTrainedConfig], options: dict) -> None:
    """Raises TypeError for an option that `cls` does not have and that looks like one that it has.

    Names that look like nothing here are transformers' to keep or refuse.
    """
    own = [field.name for field in fields(cls) if field.name not in {x.name for x in fields(PreTrainedConfig)}]
    for name in options:
        if name in OF_THE_LIBRARY or name in own or name.startswith("_"):
            continue
        nearest = difflib.get_close_matches(name, [*own, *OFTEN_SET], n=3, cutoff=0.59)
        nearest = [CALLED_ELSEWHERE[name]] if name in CALLED_ELSEWHERE else nearest
        if nearest:
            raise TypeError(
                f"{cls.__name__} has no option {name!r}, got {name}={options[name]!r}. "
                f"Did you mean {' or '.join(map(repr, nearest))}?"
            )


def check_choice(option: str, values: list[str], table: dict) -> None:
    """Raises ValueError for a value of an option that is no row of its table."""
    for value in values:
        if value not in table:
            raise ValueError(
                f"{option} must be one of {', '.join(map(repr, table))}, got {value!r}. "
                "A choice of your own must be registered (import its module) before the config is made."
            )


class AbsentWhileNone:
    """An option that a config does not have while it is None, as it is by default. For `MayLackOptions`.

    Libraries that ask `hasattr(config, "max_position_embeddings")` take what they find for a number. While it is
    absent, `dataclasses.asdict`, `dataclasses.replace` and `update_from_string` of it raise; `to_dict` does not.
    """

    def __set_name__(self, cls, name: str) -> None:
        self.name = name

    def __get__(self, config, cls=None):
        if config is None:  # asked of the class: the default
            return None
        if self.name not in vars(config):
            raise AttributeError(
                f"{type(config).__name__} has no {self.name}: there is no limit. Set one, or ask for "
                f"getattr(config, {self.name!r}, None)."
            )
        return vars(config)[self.name]

    def __set__(self, config, value) -> None:
        vars(config).pop(self.name, None)
        if value is not None:
            vars(config)[self.name] = value

    def __delete__(self, config) -> None:
        self.__set__(config, None)


class MayLackOptions:
    """What a config with an option that is `AbsentWhileNone` does as if it were there."""

    def __init_subclass__(cls, **kwargs):
        cls.__eq__ = MayLackOptions.__eq__  # a dataclass would make one that asks for the attribute
        super().__init_subclass__(**kwargs)

    def __eq__(self, other) -> bool:
        if type(other) is not type(self):
            return NotImplemented
        return all(getattr(self, x.name, None) == getattr(other, x.name, None) for x in fields(self))

    __hash__ = None

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        """As in transformers, which by itself overrides only attributes that are there."""
        absent = {name for name in kwargs if isinstance(inspect.getattr_static(cls, name, None), AbsentWhileNone)}
        return super().from_dict({**config_dict, **{name: kwargs.pop(name) for name in absent}}, **kwargs)
