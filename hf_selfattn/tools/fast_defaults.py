"""What is decided for speed where the user says nothing, and the lines of the log that say so."""

import ctypes
import platform

import torch
from transformers import TrainingArguments
from transformers.utils import is_torch_bf16_gpu_available, is_torch_xla_available, logging

from ..kernels import KERNELS, unsupported_reasons

logger = logging.get_logger(__name__)


def accelerator_available():
    return torch.accelerator.is_available() or is_torch_xla_available()


def bf16_in_hardware(on_cpu):
    """(whether bf16 is multiplied by the hardware, which): emulated bf16 is slower than fp32."""
    if on_cpu:
        if torch.cpu._is_amx_tile_supported():
            return True, "the CPU multiplies bf16 by AMX"
        if torch.cpu._is_avx512_bf16_supported():
            return True, "the CPU multiplies bf16 by AVX-512"
        return False, "the CPU multiplies no bf16: it has neither AMX nor AVX-512 BF16"
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
        able = torch.cuda.is_bf16_supported(including_emulation=False)
        return able, f"{name} multiplies {'' if able else 'no '}bf16"
    able = is_torch_bf16_gpu_available()
    return able, f"the accelerator multiplies {'' if able else 'no '}bf16"


def keep_memory():
    """Tells glibc to keep freed memory, on a CPU: else each step asks the system for its large tensors anew, and the
    system fills them with zeros (15 % of a step of a small encoder). Returns the line of the log, or None."""
    if accelerator_available() or platform.system() != "Linux" or platform.libc_ver()[0] != "glibc":
        return None
    libc, trim_threshold, mmap_max = ctypes.CDLL(None), -1, -4  # M_TRIM_THRESHOLD and M_MMAP_MAX of malloc.h
    libc.mallopt(trim_threshold, 2**31 - 1)
    libc.mallopt(mmap_max, 0)
    return "memory: what is freed stays with this process for the next step (mallopt)"


def optimizer_line(arguments):
    default = TrainingArguments.__dataclass_fields__["optim"].default
    name = getattr(arguments.optim, "value", arguments.optim)
    if name != default:
        return f"optimizer: {name}, as asked"
    fused = ": one pass over the weights" if "fused" in name else ""
    return f"optimizer: {name}, the Trainer's default{fused}"


def log_kernel(config, arguments, asked):
    """Says which attention kernel the layers run in this training, and why none of the others.

    Args:
        config: of the model.
        arguments: ScriptArguments.
        asked: the kernel that the user named, or None.
    """
    name, layers = config._attn_implementation, config.num_hidden_layers
    why = "as asked" if asked else "the default for this configuration"
    dtype = torch.bfloat16 if arguments.bf16 else torch.float16 if arguments.fp16 else torch.float32
    place = f"{arguments.device.type}, {str(dtype).removeprefix('torch.')}"
    refused = []
    if config.model_type == "selfattn":
        known = {"device_type": arguments.device.type, "dtype": dtype, "training": arguments.do_train}
        reasons = {other: unsupported_reasons(config, other, **known) for other in KERNELS if other != name}
        refused = [f"; {other} cannot: {', '.join(found)}" for other, found in reasons.items() if found]
    layers = f"{'all ' if layers > 1 else ''}{layers} layer{'s' if layers > 1 else ''}"
    logger.info(f"attention: {name} in {layers} ({place}; {why}{''.join(refused)})")
