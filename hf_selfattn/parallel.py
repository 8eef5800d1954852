"""One model on several devices: what is spread how, which heads a process computes, and what is refused.

Fully sharded (FSDP2), every weight is gathered where it is used, and nothing here takes part. Tensor parallel, each
process computes some of the heads and features of every layer, by transformers' styles.
"""

import torch
import transformers
from torch import nn
from transformers.utils import is_torch_distributed_available

from .patterns import layer_patterns
from .positions import POSITIONS
from .scores import SCORES

LEAST_VERSION = (5, 23)
"""Of transformers: earlier ones have no style for parameters that stand in no layer ('local_params')."""


def spreads_models() -> bool:
    """Whether this transformers can spread our models over devices."""
    return tuple(int(x) for x in transformers.__version__.split(".")[:2]) >= LEAST_VERSION


def tensor_parallel_plan(config) -> dict[str, str] | None:
    """The base model's modules and parameters, and by which of transformers' styles each is spread.

    Token vectors are added by transformers. What a score or a position owns is spread by heads: each parameter is one-
    or two-dimensional and has heads first, a linear layer has them first in its output.
    """
    if not spreads_models():
        return None
    plan = {"layers.*.feed_forward.up_proj": "colwise", "layers.*.feed_forward.down_proj": "rowwise"}
    if config.mlp_type == "gated":
        plan["layers.*.feed_forward.gate_proj"] = "colwise"
    plan["layers.*.attention.o_proj"] = "rowwise"
    for attention in _attentions(config):
        plan |= {f"{attention}.{name}": "colwise" for name in ("q_proj", "k_proj", "v_proj")}
        if config.qk_norm:
            plan |= {f"{attention}.{name}": NORM_OF_HEADS for name in ("q_norm", "k_norm")}
        for owner, owned in _owners(config).items():
            for name, module in owned.named_modules(prefix=f"{attention}.{owner}"):
                if isinstance(module, nn.Linear):
                    plan[name] = "colwise"
                elif own := dict(module.named_parameters(recurse=False)):
                    plan |= {name: "local_params", **{f"{name}.{parameter}": "colwise" for parameter in own}}
    return plan


def _attentions(config) -> list[str]:
    places = ["layers.*.attention"]
    if any(len(pattern.parts(config)) > 1 for pattern in layer_patterns(config)):
        places.append("layers.*.attention.of_global")
    return places


def _owners(config) -> dict[str, nn.Module]:
    """What of an attention may own parameters beside its projections and norms, without memory for them."""
    with torch.device("meta"):
        return {
            "score_function": SCORES[config.score_function](config),
            "position": POSITIONS[config.position_encoding].from_config(config, 0).layer(config),
        }


def check_distribution(config, distributed_config) -> None:
    """Raises ValueError for a way to spread a model of `config` that is not possible."""
    if distributed_config.pp_size > 1:
        raise ValueError(
            f"Pipeline parallelism has no plan for these models, got pp_size={distributed_config.pp_size}. Use "
            "DistributedConfig(fsdp_size=...) or DistributedConfig(tp_plan='auto')."
        )
    size = distributed_config.tp_size
    if size == 1:
        return
    heads = {"num_attention_heads": config.num_attention_heads, "num_key_value_heads": config.num_groups}
    for name, count in heads.items():
        if count % size:
            raise ValueError(
                f"Tensor parallelism gives each of tp_size={size} processes as many heads, and {name} is {count}. "
                "Use a tp_size that divides num_attention_heads and num_key_value_heads, or fsdp_size, which needs "
                "no divisor."
            )
    pieces = size * distributed_config.fsdp_size
    if distributed_config.dp_size > 1 and config.tie_word_embeddings and config.vocab_size % pieces:
        raise ValueError(
            f"tp_size={size} and fsdp_size={distributed_config.fsdp_size} together cut a tied vocabulary into "
            f"{pieces} equal pieces, and vocab_size is {config.vocab_size}. Fill it up by "
            f"model.resize_token_embeddings({config.vocab_size}, pad_to_multiple_of={pieces}), set "
            "tie_word_embeddings=False, or use one of the two alone."
        )
    for owner, owned in _owners(config).items():
        for name, parameter in owned.named_parameters():
            if distributed_config.dp_size > 1 and parameter.shape[0] % pieces:
                raise ValueError(
                    f"tp_size={size} and fsdp_size={distributed_config.fsdp_size} together cut what a {owner} owns "
                    f"into {pieces} equal pieces, and its parameter {name!r} is of shape {tuple(parameter.shape)}. "
                    "Use one of the two alone."
                )
            if parameter.dim() > 2 or parameter.shape[0] % config.num_groups:
                raise ValueError(
                    f"Tensor parallelism spreads what a {owner} owns by heads, and its parameter {name!r} is of shape "
                    f"{tuple(parameter.shape)}. Give it one or two dimensions with heads first, or use fsdp_size."
                )


def check_version() -> None:
    """Raises ImportError where transformers is too old to spread our models."""
    if not spreads_models():
        least = ".".join(map(str, LEAST_VERSION))
        raise ImportError(
            f"distributed_config, tp_plan and tp_size need transformers >= {least} (its parallel style "
            f"'local_params'), got {transformers.__version__}. Install transformers>={least}, or train with "
            "`accelerate launch` (one whole model on each device)."
        )


def tensor_parallel_mesh(weight: torch.Tensor):
    """The processes that a weight is spread over by tensor parallelism, or None."""
    mesh = getattr(weight, "device_mesh", None)
    return mesh["tp"] if mesh is not None and "tp" in (mesh.mesh_dim_names or ()) else None


def heads_here(query_weight: torch.Tensor, num_heads: int) -> range:
    """The numbers in the whole model of the heads that this process computes.

    Args:
        query_weight: of the projection of queries.
        num_heads: of the whole model.
    """
    mesh = tensor_parallel_mesh(query_weight)
    if mesh is None:
        return range(num_heads)
    count = num_heads // mesh.size()
    return range(mesh.get_local_rank() * count, (mesh.get_local_rank() + 1) * count)


def heads_of_all(weights: torch.Tensor, mesh) -> torch.Tensor:
    """Attention weights (R, heads here, N, K) of all processes, (R, H, N, K), in each of them."""
    from torch.distributed.tensor import DTensor, Shard

    return DTensor.from_local(weights, mesh, [Shard(1)], run_check=False).full_tensor()


NORM_OF_HEADS = f"{__name__}.norm_of_heads"
"""The style of a norm with the same weights for every head, each process with its own heads. transformers' table is
global: two copies of this code may meet in one process."""

if spreads_models() and is_torch_distributed_available():
    from torch.distributed.tensor import Partial, Replicate, distribute_tensor
    from transformers.distributed.parallel_utils import ALL_PARALLEL_STYLES
    from transformers.distributed.tensor_parallel import TensorParallelLayer

    class NormOfHeads(TensorParallelLayer):
        """Whole weights in each process, their gradients summed over processes in each backward.

        transformers' `replicated_with_grad_allreduce` sums what has been accumulated, and so sums the earlier of
        several backwards more than once.
        """

        def shard_param(self, module, param, mesh):
            whole = module._parameters[param]
            whole = distribute_tensor(whole, mesh, [Replicate()], src_data_rank=None)
            module._parameters[param] = nn.Parameter(whole)

        def install_forward(self, module, mesh):
            """Lets the module's forward see plain tensors, whose gradients are parts of a sum over processes."""
            forward = module.forward

            def with_local_weights(*args, **kwargs):
                whole = dict(module._parameters)
                local = {name: x.to_local(grad_placements=[Partial()]) for name, x in whole.items() if x is not None}
                module._parameters.update(local)
                try:
                    return forward(*args, **kwargs)
                finally:
                    module._parameters.update(whole)

            module.forward = with_local_weights
            return module

    ALL_PARALLEL_STYLES.register(NORM_OF_HEADS, NormOfHeads())
