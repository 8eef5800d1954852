"""The graph of a model: traced once, written for a runtime, run there and compared with the model."""

import contextlib
import logging
import math
import warnings
from typing import NamedTuple

import torch
from torch import nn

from .convert_changes import sees_all

OUTPUTS = {"base": ("last_hidden_state",), "question_answering": ("start_logits", "end_logits")}
"""What a graph gives, by head; `logits` of those that are not named."""

TOLERANCE = 1e-4
"""The largest difference allowed between graph and model, times max(1, |value|)."""

ONE_FILE = 1 << 30
"""Bytes of weights above which they stand in a file beside the ONNX graph (protobuf ends at 2 GiB)."""


class Signature(NamedTuple):
    """What goes into a graph and comes out of it.

    Attributes:
        inputs: names of integer tensors.
        axes: names of their dimensions, all of which are free.
        outputs: names.
        limit: the longest sequence that the graph takes; None: any.
    """

    inputs: tuple[str, ...]
    axes: tuple[str, ...]
    outputs: tuple[str, ...]
    limit: int | None


def signature_of(config, head: str) -> Signature:
    """The names are those of transformers and optimum; `token_type_ids` go in where the model has several types."""
    types = ("token_type_ids",) if config.type_vocab_size > 1 else ()
    choices = ("num_choices",) if head == "multiple_choice" else ()
    return Signature(
        inputs=("input_ids", "attention_mask", *types),
        axes=("batch_size", *choices, "sequence_length"),
        outputs=OUTPUTS.get(head, ("logits",)),
        limit=config.max_position_embeddings if config.position_encoding == "learned" else None,
    )


class Traced(nn.Module):
    """A model with named tensors in, named tensors out, and nothing else."""

    def __init__(self, model, outputs: tuple[str, ...]):
        super().__init__()
        self.model = model
        self.outputs = outputs

    def forward(self, input_ids, attention_mask, token_type_ids=None):
        given = {"input_ids": input_ids, "attention_mask": attention_mask, "token_type_ids": token_type_ids}
        found = self.model(**given, return_dict=True)
        return {name: found[name] for name in self.outputs}


def random_batch(config, signature: Signature, sizes: tuple[int, int], generator) -> dict[str, torch.Tensor]:
    """Token ids, types and padding with holes, drawn at random, (B, N) or (B, choices, N).

    The last of several rows is all padding.
    """
    batch, length = sizes
    choices = (batch % 3 + 1,) if "num_choices" in signature.axes else ()
    shape = (batch, *choices, min(length, signature.limit or length))
    mask = torch.rand(shape, generator=generator) < 0.8
    mask[..., -1] = True
    if batch > 1:
        mask[-1] = False
    drawn = {
        "input_ids": torch.randint(config.vocab_size, shape, generator=generator),
        "attention_mask": mask.long(),
        "token_type_ids": torch.randint(max(config.type_vocab_size, 1), shape, generator=generator),
    }
    return {name: drawn[name] for name in signature.inputs}


def make_batches(config, signature: Signature, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    """Batches of other sizes than the traced one: one token, one row, one column, longer than every window."""
    beyond = sees_all(config)
    longest = max(64, 0 if math.isinf(beyond) else beyond + 17)
    generator = torch.Generator().manual_seed(seed)
    sizes = [(1, 1), (1, 9), (4, 1), (5, 23), (2, longest)]
    return [random_batch(config, signature, of_batch, generator) for of_batch in sizes]


@torch.no_grad()
def outputs_of(model, signature: Signature, batches) -> list[dict[str, torch.Tensor]]:
    """What the model itself gives for each batch."""
    run = Traced(model, signature.outputs)
    return [run(**batch) for batch in batches]


@torch.no_grad()
def trace(model, config, signature: Signature) -> torch.export.ExportedProgram:
    """The program of a forward, every axis of its inputs free."""
    example = random_batch(config, signature, (2, 11), torch.Generator().manual_seed(0))
    dims = {i: torch.export.Dim(name, min=1) for i, name in enumerate(signature.axes)}
    if signature.limit is not None:
        dims[len(dims) - 1] = torch.export.Dim(signature.axes[-1], min=1, max=signature.limit)
    program = torch.export.export(
        Traced(model, signature.outputs),
        (),
        example,
        dynamic_shapes=dict.fromkeys(example, dims),
        strict=False,
        # torch 2.11 else refuses shared key/value heads: it wants to have it proven that min(6 N, 12 N) is 6 N.
        prefer_deferred_runtime_asserts_over_guards=True,
    )
    for module in program.graph_module.modules():
        for node in module.graph.nodes:
            node.meta.pop("stack_trace", None)  # the paths of source files here are nobody's business
    return program


def write_pt2(program: torch.export.ExportedProgram, path, signature: Signature) -> None:
    """As torch saves it."""
    torch.export.save(program, path)


def run_pt2(path):
    """batch -> outputs by name."""
    return torch.export.load(path).module()


def write_onnx(program: torch.export.ExportedProgram, path, signature: Signature, opset: int) -> None:
    """One file, or above ONE_FILE with the weights beside it in `<path>_data`."""
    import onnx_ir
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass

    with _quiet():
        converted = torch.onnx.export(
            program,
            (),
            dynamo=True,
            verbose=False,
            opset_version=opset,
            output_names=list(signature.outputs),
            dynamic_shapes={name: dict(enumerate(signature.axes)) for name in signature.inputs},
        ).model
    ClearMetadataAndDocStringPass()(converted)  # stack traces
    size = sum(value.const_value.nbytes for value in converted.graph.initializers.values())
    onnx_ir.save(converted, path, external_data=f"{path.name}_data" if size > ONE_FILE else None)


@contextlib.contextmanager
def _quiet():
    """Without the exporter's warnings: of missing torchvision, of two inputs with the same axes, of its own code."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def run_onnx(path):
    """batch -> outputs by name, by onnxruntime on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]

    def run(**batch):
        found = session.run(names, {name: tensor.numpy() for name, tensor in batch.items()})
        return dict(zip(names, map(torch.from_numpy, found), strict=True))

    return run


@torch.no_grad()
def largest_difference(run, batches, expected) -> float:
    """The largest of |difference| / max(1, |value|) over batches and outputs.

    Raises:
        ValueError: where it is above TOLERANCE, or no number.
    """
    largest = 0.0
    for batch, right in zip(batches, expected, strict=True):
        found = run(**batch)
        for name, value in right.items():
            if found[name].shape != value.shape:
                error = math.inf
            else:
                error = float(((found[name] - value).abs() / value.abs().clamp(min=1)).max())
            if not error <= TOLERANCE:
                raise ValueError(
                    f"Nothing was written: the graph is not the model. {name} of a batch of shape "
                    f"{tuple(batch['input_ids'].shape)} differs by {error:.3g} times max(1, |value|), and "
                    f"{TOLERANCE:g} is allowed. Try another kernel, opset or format, and please report it with the "
                    "config.json."
                )
            largest = max(largest, error)
    return largest
