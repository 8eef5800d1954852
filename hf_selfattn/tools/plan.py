"""What a training will cost, before it is started: parameters, arithmetic, memory, steps and hours."""

import functools
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForMaskedLM

from ..masks import allowed
from ..packing import Tokens
from ..patterns import layer_patterns
from .opening import new_config, open_config, unused_vocab_size
from .optimizers import hidden_matrices
from .tokenizer import open_tokenizer
from .windows import positions_of, window_length

PEAK_FLOPS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10": 125e12,
    "RTX 4090": 165e12,
}
"""Part of a GPU's name -> dense bf16 FLOP/s (no sparsity, accumulated in fp32), from the makers' data sheets.
Looked up in this order."""

GIB = 2**30


def peak_flops(name):
    """Dense bf16 FLOP/s of a GPU by its name, or None where it is not known."""
    return next((peak for part, peak in PEAK_FLOPS.items() if part.lower() in name.lower()), None)


def peak_of_training(arguments):
    """FLOP/s of all devices of this training together, or None: a CPU's is not known, nor what is not bf16 or fp16."""
    if arguments.device.type != "cuda" or not (arguments.bf16 or arguments.fp16):
        return None
    peak = peak_flops(torch.cuda.get_device_name(arguments.device))
    return None if peak is None else peak * arguments.world_size


@functools.cache
def _keys_seen(pattern, heads, length, queries=256):
    document = torch.zeros(1, length, dtype=torch.long)
    tokens = Tokens(document, torch.arange(length).unsqueeze(0), torch.full_like(document, length))
    pairs = 0
    for first in range(0, length, queries):
        query = tokens.at((slice(None), slice(first, first + queries)))
        seen = allowed(pattern, query, tokens, range(heads))
        pairs += int(seen.sum()) * heads // seen.shape[1]
    return pairs / heads / length


def keys_per_query(config, length):
    """For each layer the mean number of keys that a token sees in a document of `length` tokens, counted."""
    if config.model_type != "selfattn":
        return [length] * config.num_hidden_layers
    heads = config.num_attention_heads
    return [
        sum(_keys_seen(part, heads, length) for part in pattern.parts(config)) for pattern in layer_patterns(config)
    ]


def model_without_weights(config, kernel=None):
    """The masked language model on the meta device, names and shapes, with the kernel that it would choose or get."""
    with torch.device("meta"):
        return AutoModelForMaskedLM.from_config(config, **({} if kernel is None else {"attn_implementation": kernel}))


def flops_per_token(config, length, mlm_probability=1.0, model=None):
    """Floating point operations of a training step (forward and backward) for each real token.

    A matrix product of a token with a weight of P numbers is 2 P operations forward and 4 P backward; a query and one
    key are a product of d_k and one of d_v numbers in each head. So

        6 (P_layers + mlm_probability * P_head) + sum over layers of 6 H (d_k + d_v) keys

    with the mean number of keys that a token really sees. The head works on masked tokens alone (in models of other
    types on all). Norms, softmax, activations and what a kernel computes in vain or again are not counted, nor are
    Transformer-XL's distances; every score counts as a dot product.

    Source: Kaplan et al. 2020, arXiv:2001.08361, section 2.1; Chowdhery et al. 2022, arXiv:2204.02311, appendix B.

    Args:
        config: of a masked language model.
        length: tokens of a document.
        mlm_probability: the share of tokens that is masked.
        model: the model, where there is one already.
    """
    model = model_without_weights(config) if model is None else model
    linear = {name: module.weight.numel() for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    prefix = model.base_model_prefix + "."
    layers = sum(n for name, n in linear.items() if name.startswith(prefix) and not name.endswith("r_proj"))
    head = sum(n for name, n in linear.items() if not name.startswith(prefix))
    if config.model_type == "selfattn":
        width = config.num_attention_heads * (config.query_key_dim + config.value_dim)
    else:
        width, mlm_probability = 2 * config.hidden_size, 1.0
    return 6 * (layers + mlm_probability * head) + sum(6 * width * keys for keys in keys_per_query(config, length))


def layer_bytes_per_token(config, length, low_precision, kernel="selfattn"):
    """Bytes that each layer's forward keeps for the backward, for each token: an estimate where nothing is compiled.

    Two norms' inputs in fp32, the inputs of the linear layers (under autocast a copy for each of them), query, key and
    value, the attention's output, and the feed-forward's inner states; the attention weights where the kernel keeps
    them ('selfattn' of documents of at most 512 tokens, 'eager' of all pairs, twice).

    Args:
        low_precision: whether autocast is on (2 bytes where it works, else 4).
        kernel: the attention's.
    """
    size, width = (2 if low_precision else 4), config.hidden_size
    copies = 3 if low_precision else 1
    if config.model_type == "selfattn":
        inner, gated = config.feed_forward_size, config.mlp_type == "gated"
        heads, groups = config.num_attention_heads, config.num_groups
        projected = heads * config.query_key_dim + groups * (config.query_key_dim + config.value_dim)
        attended = heads * config.value_dim
    else:
        inner, gated, heads = config.intermediate_size, False, config.num_attention_heads
        projected, attended = 3 * width, width
    dropout = 2 * width if getattr(config, "hidden_dropout", 0) else 0
    fixed = 2 * 4 * width + (copies + (2 if gated and low_precision else 1)) * size * width
    fixed += size * (projected + attended + (4 if gated else 2) * inner) + dropout
    keeps = kernel == "selfattn" and length <= 512
    weights = [size * heads * keys if keeps else 4 * heads for keys in keys_per_query(config, length)]
    if kernel == "eager":
        weights = [(4 + size) * heads * length] * len(weights)
    return [fixed + of_weights for of_weights in weights]


def activation_bytes_per_token(config, layers, mlm_probability, checkpointing=False):
    """Bytes that a whole forward keeps for the backward, for each token.

    Args:
        layers: of `layer_bytes_per_token`.
        mlm_probability: the share of tokens that enters the head, where the inputs of its norms are kept.
        checkpointing: whether only the layers' inputs are kept, and one layer at a time is computed again.
    """
    width, embedding = config.hidden_size, getattr(config, "embedding_width", config.hidden_size)
    masked = mlm_probability if config.model_type == "selfattn" else 1.0
    kept = len(layers) * 4 * width + max(layers) if checkpointing else sum(layers)
    return kept + 2 * 4 * embedding + masked * 4 * (3 * embedding + width)


@dataclass
class Plan:
    """A training in numbers. FLOPs and memory are those of documents as long as a row and rows that are full.

    Attributes:
        parameters, embeddings: all, and those of token vectors (tied ones once).
        flops_per_token: of forward and backward.
        memory: what -> bytes on each device, an estimate.
        tokens_per_step: of all devices.
        steps, tokens: of the whole training; None where they depend on the data or on an unknown speed.
        tokens_per_second: assumed, of all devices; or None.
        hours: or None.
    """

    parameters: int
    embeddings: int
    flops_per_token: float
    memory: dict
    devices: int
    tokens_per_step: int
    steps: int | None
    tokens: int | None
    tokens_per_second: float | None
    hours: float | None
    remarks: list

    def __str__(self):
        lines = [
            f"parameters           {self.parameters:,}: embeddings {self.embeddings:,}, others "
            f"{self.parameters - self.embeddings:,}",
            f"FLOPs per token      {self.flops_per_token:.4g} (forward and backward)",
            f"memory per device    {sum(self.memory.values()) / GIB:.2f} GiB (estimate): "
            + ", ".join(f"{name} {size / GIB:.2f}" for name, size in self.memory.items()),
            f"tokens per step      {self.tokens_per_step:,} on {self.devices} device{'s' * (self.devices > 1)}",
            "steps                " + (f"{self.steps:,}" if self.steps else "unknown"),
            "tokens in all        "
            + (f"{self.tokens:,}, {self.tokens * self.flops_per_token:.3g} FLOPs" if self.tokens else "unknown"),
            "hours                "
            + (f"{self.hours:.2f} at {self.tokens_per_second:,.0f} tokens a second" if self.hours else "unknown"),
        ]  # fmt: skip
        return "\n".join([*lines, *(f"({remark})" for remark in self.remarks)])


def make_plan(config, arguments, length, mlm_probability, kernel=None):
    """The Plan of a training of a masked language model.

    Args:
        config: of the model.
        arguments: PretrainingScriptArguments.
        length: tokens of a row.
        mlm_probability: the share of tokens that is masked, at the beginning.
        kernel: the attention kernel that was asked for, or None.

    Raises:
        ValueError: for a device of no known peak.
    """
    model = model_without_weights(config, kernel)
    count = sum(p.numel() for p in model.parameters())
    flops = flops_per_token(config, length, mlm_probability, model)
    devices = arguments.assumed_num_devices or arguments.world_size
    rows = arguments.per_device_train_batch_size
    tokens_per_step = rows * length * arguments.gradient_accumulation_steps * devices
    low_precision = arguments.bf16 or arguments.fp16
    checkpointing = getattr(arguments, "activation_checkpointing", False) or arguments.gradient_checkpointing
    matrices = hidden_matrices(model) if arguments.optimizer == "muon" else set()
    of_muon = sum(p.numel() for name, p in model.named_parameters() if name in matrices)
    linear = sum(p.numel() for name, p in model.named_parameters() if p.ndim == 2)
    kernel = model.config._attn_implementation
    layers = layer_bytes_per_token(config, length, low_precision, kernel)
    activations = activation_bytes_per_token(config, layers, mlm_probability, checkpointing)
    memory = {
        "weights": 4 * count + (2 * linear if low_precision else 0),
        "gradients": 4 * count * (2 if devices > 1 else 1),  # DDP has buckets beside them
        "optimizer": 8 * (count - of_muon) + 4 * of_muon,
        "activations": activations * rows * length,
        # Gradients of one layer's states, and pieces that the allocator keeps: twice a layer, as measured.
        "working space": 2 * max(layers) * rows * length,
    }

    remarks, speed = [], arguments.assumed_tokens_per_second
    if speed is None:
        peak = _assumed_peak(arguments)
        if peak is None:
            remarks.append("Hours need --assumed_tokens_per_second, or --assumed_device and --assumed_mfu.")
        else:
            speed = arguments.assumed_mfu * peak * devices / flops
            remarks.append(
                f"The speed is {arguments.assumed_mfu:.0%} of the peak, {peak / 1e12:,.0f} TFLOP/s a device."
            )
    steps = tokens = None
    if arguments.max_tokens is not None:
        tokens = arguments.max_tokens
        steps = -(-tokens // tokens_per_step)
    elif arguments.max_minutes is not None and speed is not None:
        tokens = round(speed * 60 * arguments.max_minutes)
        steps = -(-tokens // tokens_per_step)
    elif arguments.max_minutes is None and arguments.max_steps > 0:
        steps, tokens = arguments.max_steps, arguments.max_steps * tokens_per_step
    else:
        remarks.append("Steps and tokens depend on the data (epochs) or on the speed (minutes).")
    hours = None
    if arguments.max_minutes is not None:
        hours = arguments.max_minutes / 60 if speed is not None else None
    elif tokens is not None and speed is not None:
        hours = tokens / speed / 3600
    return Plan(count, model.get_input_embeddings().weight.numel(), flops, memory, devices, tokens_per_step, steps,
                tokens, speed, hours, remarks)  # fmt: skip


def plan_pretraining(model_arguments, arguments, training):
    """The Plan of a pretraining from its arguments alone; no data is read, and a tokenizer only where it is here.

    Args:
        model_arguments, arguments, training: ModelArguments, the script's PretrainingArguments, and
            PretrainingScriptArguments.
    """
    remarks = []
    if model_arguments.model_name_or_path is not None:
        config = open_config(model_arguments, None)
    else:
        name, vocab_size = model_arguments.tokenizer_name, model_arguments.tokenizer_vocab_size
        if name is not None and Path(name).is_dir():
            tokenizer = open_tokenizer(name)
            vocab_size = max(tokenizer.get_vocab().values()) + 1
            remarks += filter(None, [unused_vocab_size(model_arguments, tokenizer)])
        elif name is not None:
            remarks.append(f"{name} is not a folder here: its vocabulary is taken to be --tokenizer_vocab_size.")
        config = new_config(model_arguments, vocab_size=vocab_size)
    length = arguments.max_seq_length
    if length is None:
        length = min(positions_of(config) or 512, 512)
    length = window_length(length, None, config)
    made = make_plan(config, training, length, arguments.mlm_probability, model_arguments.attn_implementation)
    made.remarks[:0] = remarks
    return made


def _assumed_peak(arguments):
    """FLOP/s of one device: of the one that is assumed, or of the one that is here."""
    if arguments.assumed_device is None:
        peak = peak_of_training(arguments)
        return None if peak is None else peak / arguments.world_size
    peak = peak_flops(arguments.assumed_device)
    if peak is None:
        raise ValueError(
            f"--assumed_device is one of {', '.join(PEAK_FLOPS)}, whose peaks are known, got "
            f"{arguments.assumed_device!r}. For others pass --assumed_tokens_per_second."
        )
    return peak
