"""Attention alone: the kernel 'selfattn', PyTorch's SDPA and plain products, forward and forward with backward.

    OMP_NUM_THREADS=1 python benchmarks/attention_speed.py
    OMP_NUM_THREADS=1 python benchmarks/attention_speed.py --shapes 32,4,128,64 --dtypes bf16

One thread, in turn, each once more before its clock starts, medians; no mask, no dropout. Each gets its own best
layout: SDPA and the plain products (B, H, N, d), contiguous, ours (B, N, H, d), its mask made outside of the timing.
That all agree is checked here.
"""

import argparse
import itertools
from pathlib import Path

import torch
from measure import CLOCKS, alternate, medians, write_result
from torch.nn import functional as F

from hf_selfattn.kernels import KERNELS
from hf_selfattn.packing import read_batch
from hf_selfattn.patterns import Full
from hf_selfattn.scores import Scoring
from hf_selfattn.tools.fast_defaults import keep_memory

SHAPES = ["32,4,128,64", "32,8,128,32", "8,4,512,64", "2,4,2048,64"]
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
TOLERANCES = {"bf16": 2e-2, "fp32": 1e-5}


def plain(query, key, value):
    """bmm, softmax, bmm."""
    scores = torch.matmul(query * query.shape[-1] ** -0.5, key.transpose(-1, -2))
    return torch.matmul(torch.softmax(scores, dim=-1), value)


def make_ours(batch: int, heads: int, length: int, width: int):
    """The kernel with its mask, over (B, N, H, d)."""
    packing = read_batch(batch, length, torch.device("cpu"))
    kernel, scoring = KERNELS["selfattn"], Scoring("scaled_dot_product", (width**-0.5,))
    mask = kernel.mask(Full(), packing.tokens, packing.tokens, packing, range(heads), None)
    return lambda query, key, value: kernel.attend(query, key, value, mask, scoring)[0]


def make_steps(shape: tuple[int, int, int, int], dtype: str) -> dict:
    """Functions to time, by 'who | forward' and 'who | both'.

    Raises:
        AssertionError: if they do not compute the same.
    """
    torch.manual_seed(0)
    drawn = [torch.randn(shape, dtype=DTYPES[dtype]) for _ in range(4)]
    functions = {"ours": make_ours(*shape), "SDPA": F.scaled_dot_product_attention, "plain": plain}
    steps, expected = {}, None
    for name, function in functions.items():
        *inputs, grad = (x.transpose(1, 2).contiguous() if name == "ours" else x.clone() for x in drawn)
        inputs = [x.requires_grad_() for x in inputs]

        def forward(function=function, inputs=inputs):
            with torch.no_grad():
                return function(*inputs)

        def both(function=function, inputs=inputs, grad=grad):
            output = function(*inputs)
            return (output, *torch.autograd.grad(output, inputs, grad))

        found = [x.transpose(1, 2) if name == "ours" else x for x in both()]
        expected = expected or found
        torch.testing.assert_close(found, expected, atol=TOLERANCES[dtype], rtol=TOLERANCES[dtype])
        steps |= {f"{name} | forward": forward, f"{name} | both": both}
    return steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=SHAPES, metavar="B,H,N,d")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: where others use the machine too")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/attention_speed.json"))
    arguments = parser.parse_args()
    keep_memory()

    samples, ratios = {}, {}
    columns = ("ours", "SDPA", "plain", "SDPA/ours", "plain/ours")
    print(f"{'(B, H, N, d), ms':34}" + "".join(f"{column:>11}" for column in columns))
    for shape, dtype in itertools.product(arguments.shapes, arguments.dtypes):
        steps = make_steps(tuple(int(x) for x in shape.split(",")), dtype)
        found = alternate(steps, arguments.repeats, warmup=3, clock=arguments.clock, rehearse=True)
        samples |= {f"{name} | {shape} | {dtype}": seconds for name, seconds in found.items()}
        seconds = medians(found)
        for what in ("forward", "both"):
            ours, sdpa, products = (seconds[f"{name} | {what}"] for name in ("ours", "SDPA", "plain"))
            ratios[f"{shape} | {dtype} | {what}"] = {"SDPA": sdpa / ours, "plain": products / ours}
            print(f"{shape + ' ' + dtype + ', ' + what:34}", end="")
            print("".join(f"{x * 1000:11.2f}" for x in (ours, sdpa, products)), end="")
            print(f"{sdpa / ours:11.2f}{products / ours:11.2f}", flush=True)
    config = {
        "shapes": arguments.shapes,
        "dtypes": arguments.dtypes,
        "repeats": arguments.repeats,
        "clock": arguments.clock,
    }
    write_result(arguments.output, config, samples, ratios=ratios)


if __name__ == "__main__":
    main()
