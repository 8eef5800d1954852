"""Write a model as a graph that runs without this package: ONNX, or a program of torch.export.

python -m hf_selfattn.tools.export CHECKPOINT OUT
python -m hf_selfattn.tools.export CHECKPOINT OUT --format pt2
python -m hf_selfattn.tools.export CHECKPOINT OUT --head base --kernel eager --opset 18
"""

import argparse
import copy
import importlib.util
import logging
import sys
import time
from functools import partial
from pathlib import Path

import torch
import transformers

from ..kernels import KERNELS, unsupported_reasons
from ..positions import POSITIONS
from .checkpoints import check_model_folder
from .convert_families import AUTO_CLASSES, head_of
from .export_graph import (
    TOLERANCE,
    largest_difference,
    make_batches,
    outputs_of,
    run_onnx,
    run_pt2,
    signature_of,
    trace,
    write_onnx,
    write_pt2,
)
from .opening import fit_inputs
from .recipes import nearest
from .tokenizer import check_tokenizer, open_tokenizer, save_tokenizer
from .whole_folders import check_out, whole_folder

logger = logging.getLogger(__name__)

FILES = {"onnx": "model.onnx", "pt2": "model.pt2"}
"""The formats, and where their graphs stand."""

OPSETS = range(18, 24)
"""Those of ONNX that torch's exporter writes without converting one to another."""

DEFAULT_OPSET = 20

PACKAGES = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "pt2": ()}
"""What a format needs beside torch."""

ORDER = ("sdpa", "eager")
"""The kernels whose graphs hold nothing of ours, in the order in which they are tried where none is named."""


def export_reasons(config, kernel: str, format: str) -> list[str]:
    """Why a model of `config`, computed by `kernel`, cannot be exported; empty if it can.

    The graph is one for evaluation in fp32 with a free batch and length.

    Args:
        config: a SelfAttnConfig.
        kernel: a row of KERNELS.
        format: "onnx" or "pt2".

    Raises:
        ValueError: for a format or a kernel that is not known.
    """
    _check_format(format)
    if config.model_type != "selfattn":
        return [f"it is a {config.model_type!r}, and this exports models of ours (tools.convert makes one of it)"]
    found = unsupported_reasons(config, kernel, device_type="cpu", dtype=torch.float32, training=False)
    if kernel == "selfattn" and format == "onnx":
        found.append("'selfattn' is an operator of this package, which ONNX does not have")
    if kernel == "sdpa" and format == "onnx" and POSITIONS[config.position_encoding].is_bias:
        found.append(
            f"in ONNX below opset 23 'sdpa' gives NaN where a token sees nothing if there is a bias, and "
            f"position_encoding is {config.position_encoding!r}"
        )
    if kernel == "flex_attention":
        found.append("torch.export cannot trace the block masks of 'flex_attention' for a free length")
    if config.memory_length:
        found.append(
            f"memory_length={config.memory_length}, and a graph has no memory from one call to the next "
            "(memory_length=0 in config.json: each text is read alone)"
        )
    for name in ("output_attentions", "output_hidden_states"):
        if getattr(config, name):
            found.append(f"{name}=True, and a graph has no such output (set it False)")
    if getattr(config, "quantization_config", None):
        found.append("its weights are quantized, and a graph computes in fp32 (export what they were made from)")
    return found


def export(source, out, format="onnx", *, head=None, kernel=None, opset=None, tokenizer=None):
    """Write the graph of a model into a new folder, with the config and the tokenizer, and compare both.

    The graph's inputs are `input_ids` and `attention_mask`, and `token_type_ids` where the model has several types.
    Its outputs are `logits`, `start_logits` and `end_logits`, or `last_hidden_state`. It computes in fp32, in
    evaluation mode; batch and length are free.

    Args:
        source: a folder, a name on the Hub, or a model; it stays as it is.
        out: the folder to write (not there yet, or empty).
        format: "onnx" (model.onnx, for onnxruntime) or "pt2" (model.pt2, for torch.export.load).
        head: a key of AUTO_CLASSES, for a folder or a name; None: that of the class that the config names.
        kernel: how the graph computes attention, a row of KERNELS; None: the first of ORDER that can.
        opset: of ONNX, one of OPSETS; None: DEFAULT_OPSET.
        tokenizer: to save beside the graph; None: that of the folder, if there is one.

    Returns:
        What was written, as a dict.

    Raises:
        FileExistsError: `out` holds something.
        FileNotFoundError: `source` is no checkpoint, or one without weights.
        ImportError: a package that the format needs is missing.
        TypeError: `source` is neither.
        ValueError: what cannot be exported, with the reasons, before any work; or a graph that does not give the
            model's numbers on random padded batches, to 1e-4 times max(1, |value|). Nothing is written then.
    """
    start = time.perf_counter()
    opset = _check(format, opset, out)
    config, head, model = _look_at(source, head)
    kernel = _choose_kernel(config, kernel, format)
    tokenizer = _tokenizer(source, tokenizer, config)
    model = _load(source, config, head) if model is None else _own_copy(model)
    signature = signature_of(config, head)
    batches = make_batches(config, signature)
    with whole_folder(out) as folder:
        expected = outputs_of(model, signature, batches)
        model.set_attn_implementation(kernel)
        path = folder / FILES[format]
        _write_graph(model, signature, path, format, opset)
        logger.info(f"compare: {len(batches)} random padded batches")
        run = run_onnx if format == "onnx" else run_pt2
        difference = largest_difference(run(path), batches, expected)
        files = {file.name: file.stat().st_size for file in sorted(folder.glob(f"{path.name}*"))}
        model.config.save_pretrained(folder)
        if tokenizer is not None:
            save_tokenizer(tokenizer, folder)
    return {
        "model": type(model).__name__,
        "format": format,
        "opset": opset,
        "kernel": kernel,
        "inputs": list(signature.inputs),
        "axes": list(signature.axes),
        "longest": signature.limit,
        "outputs": list(signature.outputs),
        "bytes": files,
        "largest_difference": difference,
        "tokenizer": None if tokenizer is None else type(tokenizer).__name__,
        "seconds": round(time.perf_counter() - start, 1),
    }


def _check_format(format) -> None:
    if format not in FILES:
        raise ValueError(f"format is one of {', '.join(FILES)}, got {format!r}.{nearest(format, FILES)}")


def _check(format, opset, out) -> int | None:
    """The opset, once what needs no model is found to be right."""
    _check_format(format)
    if format != "onnx" and opset is not None:
        raise ValueError(f"opset goes with format 'onnx', got opset={opset} with {format!r}. Leave it out.")
    opset = DEFAULT_OPSET if opset is None and format == "onnx" else opset
    if format == "onnx" and opset not in OPSETS:
        raise ValueError(
            f"opset is from {OPSETS[0]} to {OPSETS[-1]}, got {opset!r}: torch's exporter writes these. Leave it out "
            f"for {DEFAULT_OPSET}."
        )
    missing = [name for name in PACKAGES[format] if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(
            f"format {format!r} needs {' and '.join(missing)}, which cannot be imported here. "
            f"pip install {' '.join(PACKAGES[format])}"
        )
    check_out(out)
    return opset


def _look_at(source, head):
    """Config, head and, where it was given, the model; before weights are read."""
    if isinstance(source, transformers.PreTrainedModel):
        if head is not None:
            raise ValueError(f"head goes with a folder or a name, got {head!r} with a model, which has its head.")
        config = copy.deepcopy(source.config)
        config.architectures = [type(source).__name__]
        return config, head_of(config), source
    if not isinstance(source, (str, Path)):
        raise TypeError(
            f"source is a folder, a name on the Hub or a model of transformers, got {type(source).__name__}. "
            "A model with adapters: model.merge_and_unload() first."
        )
    if Path(source).exists():
        check_model_folder(source)
    config = transformers.AutoConfig.from_pretrained(source)
    head = head_of(config) if head is None else head
    if head not in AUTO_CLASSES:
        raise ValueError(f"head is one of {', '.join(AUTO_CLASSES)}, got {head!r}.{nearest(head, AUTO_CLASSES)}")
    return config, head, None


def _choose_kernel(config, kernel, format) -> str:
    reasons = {name: export_reasons(config, name, format) for name in KERNELS}
    able = [name for name in KERNELS if not reasons[name]]
    if kernel is None and able:
        kernel = next(name for name in ORDER if name in able)
        logger.info(f"kernel: {kernel}, the first of {', '.join(ORDER)} that can be exported")
    found = export_reasons(config, ORDER[-1] if kernel is None else kernel, format)
    if found:
        way_out = f" Use kernel={' or '.join(map(repr, able))}." if able else ""
        raise ValueError(f"This model cannot be exported as {format!r}: {'; '.join(found)}.{way_out}")
    return kernel


def _load(source, config, head):
    logger.info(f"load: {source}")
    _say_type(config.dtype)
    model, told = getattr(transformers, AUTO_CLASSES[head]).from_pretrained(
        source, config=config, dtype=torch.float32, output_loading_info=True
    )
    missing = sorted(told["missing_keys"])
    if missing:
        raise ValueError(
            f"{str(source)!r} has no weights for {', '.join(missing[:4])}{' …' if len(missing) > 4 else ''}: the head "
            f"{head!r} would be a random one. Pass head='base' (--head base), or the head that it was saved with."
        )
    return _ready(model)


def _own_copy(model):
    _say_type(model.dtype)
    return _ready(copy.deepcopy(model).to("cpu", torch.float32))


def _say_type(dtype) -> None:
    if dtype not in (None, torch.float32):
        logger.info(f"The weights are {str(dtype).removeprefix('torch.')}; the graph computes in float32")


def _ready(model):
    model.config.architectures = [type(model).__name__]
    model.config.dtype = torch.float32
    return model.eval()


def _tokenizer(source, tokenizer, config):
    """A tokenizer that makes what the graph reads; None where there is none."""
    if tokenizer is None:
        try:
            tokenizer = None if isinstance(source, transformers.PreTrainedModel) else open_tokenizer(source)
        except FileNotFoundError:
            logger.info("The source has no tokenizer, so none is saved with the graph")
        if tokenizer is None:
            return None
    tokenizer = copy.deepcopy(tokenizer)
    check_tokenizer(tokenizer, config)
    fit_inputs(tokenizer, config)
    return tokenizer


def _write_graph(model, signature, path, format, opset):
    write = partial(write_onnx, opset=opset) if format == "onnx" else write_pt2
    try:
        logger.info(f"trace: {type(model).__name__} with {model.num_parameters():,} parameters")
        program = trace(model, model.config, signature)
        logger.info(f"write: {path.name}")
        write(program, path, signature)
    except OSError:
        raise
    except Exception as error:  # torch raises of every kind
        root = error
        while root.__cause__ is not None:
            root = root.__cause__
        what = next((line for line in str(root).splitlines() if line.strip()), "no more is said")
        raise ValueError(
            f"Nothing was written: torch {torch.__version__} cannot export this model as {format!r} with kernel "
            f"{model.config._attn_implementation!r}. {type(root).__name__}: {what} Try another kernel or format."
        ) from error


def told(report) -> str:
    """The report in a few lines."""
    size = ", ".join(f"{name} {number / 1e6:,.1f} MB" for name, number in report["bytes"].items())
    opset = "" if report["opset"] is None else f", opset {report['opset']}"
    longest = "" if report["longest"] is None else f" (at most {report['longest']})"
    return "\n".join(
        (
            f"{report['model']}: {size}, kernel {report['kernel']}{opset}, float32",
            f"  inputs: {', '.join(report['inputs'])} ({', '.join(report['axes'])}{longest})",
            f"  outputs: {', '.join(report['outputs'])}",
            f"  largest difference from torch {report['largest_difference']:.2g} ({TOLERANCE:g} allowed)",
            f"  {report['seconds']} seconds",
        )
    )


def main(arguments=None) -> int:
    """The command line; 1 where nothing was written."""
    parser = argparse.ArgumentParser(prog="python -m hf_selfattn.tools.export", description=__doc__.split("\n")[0])
    parser.add_argument("source", help="a folder or a name on the Hub")
    parser.add_argument("out", help="the folder to write")
    parser.add_argument("--format", choices=FILES, default="onnx")
    parser.add_argument("--head", choices=AUTO_CLASSES, help="default: that of the source")
    parser.add_argument("--kernel", choices=KERNELS, help=f"default: the first of {', '.join(ORDER)} that can")
    parser.add_argument("--opset", type=int, help=f"of ONNX, {OPSETS[0]} to {OPSETS[-1]}; default: {DEFAULT_OPSET}")
    given = parser.parse_args(arguments)
    logging.basicConfig(format="%(message)s")
    logger.setLevel(logging.INFO)
    try:
        report = export(**vars(given))
    except (ImportError, OSError, TypeError, ValueError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    print(told(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
