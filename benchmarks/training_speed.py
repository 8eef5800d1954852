"""A training step of a masked language model: ours, and the built-in encoders with their defaults and at their best.

    OMP_NUM_THREADS=1 python benchmarks/training_speed.py                             # the tables, all settings
    OMP_NUM_THREADS=1 python benchmarks/training_speed.py --settings even --repeats 20
    OMP_NUM_THREADS=1 python benchmarks/training_speed.py --search BERT --settings even   # a peer's fastest flags

A step is forward, loss, backward, fused AdamW and zero_grad, at 4 layers x 256 and 8,192 words (models.py) on the
batches of batches.py. One thread, all models in turn in one process, medians, no dropout. Every model starts at a loss
of ln(8192), checked here. Tokens are real ones, without padding.
"""

import itertools
import math
import statistics
from dataclasses import replace

import torch
from batches import LONGEST, VOCABULARY, describe, make_batches
from comparison import run_benchmark
from measure import alternate, medians
from models import (
    GATED,
    LAYERS,
    WIDTH,
    Flags,
    count_parameters,
    inputs,
    make_model,
    precision,
    prepare,
    run,
)

HALF = Flags("eager", "bf16", sparse=True, compiled=True)
X_HALF, TORCH_HALF = replace(HALF, attention="eager, half"), replace(HALF, attention="math")
BERT_HALF = Flags("eager", "bf16")
BEST: dict[str, dict[tuple[str, str], Flags]] = {
    "even": {
        ("BERT", "best"): BERT_HALF,
        ("ModernBERT", "best"): replace(HALF, windows=False),
        ("nn.TransformerEncoder", "best"): TORCH_HALF,
        ("x-transformers", "best"): X_HALF,
    },
    "real128": {
        ("BERT", "best, padded"): BERT_HALF,
        ("BERT", "best"): replace(BERT_HALF, rows="packed"),
        ("ModernBERT", "best, padded"): HALF,
        ("ModernBERT", "best"): replace(HALF, rows="packed"),
        ("nn.TransformerEncoder", "best"): replace(TORCH_HALF, rows="packed"),
        ("x-transformers", "best, padded"): X_HALF,
        ("x-transformers", "best"): replace(X_HALF, rows="packed"),
    },
}
BEST["real512"] = BEST["real128"]
"""The fastest flags of each peer in each setting, as `--search` found them on one core with AMX (torch 2.13,
transformers 5.23, x-transformers 2.31). SDPA loses everywhere, by its bf16 backward. torch.compile gains 1.1 to 1.5
times, but nothing for BERT, half of whose step is logits and their loss. "packed" rows, with a mask of blocks that no
peer makes itself, gain 1.75 times over padded ones. 'real512' was not searched.
"""

LAYERS_COMPILED = Flags("selfattn", "bf16", compiled="layers")
OURS: dict[str, Flags] = {
    "ours, autocast": Flags("selfattn", "autocast"),
    "ours, autocast, compiled": replace(LAYERS_COMPILED, precision="autocast"),
    "ours, bf16": Flags("selfattn", "bf16"),
    "ours, bf16, compiled": LAYERS_COMPILED,
    "ours, bf16, compiled, SwiGLU": replace(LAYERS_COMPILED, options=(("hidden_act", "silu"),)),
}
"""Ours; documents are given padded, and once more in one row without padding."""


class Training:
    """A model, its optimizer and its batches; calling it does one step."""

    def __init__(self, name: str, flags: Flags, setting: str):
        self.name, self.flags = name, flags
        batches = make_batches(setting, flags.rows)
        model = make_model(name, flags, LONGEST[setting])
        self.parameters = count_parameters(model)
        self.first_loss = self._exact_loss(model, batches[0])
        self.model = prepare(model.train(), flags)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
        self.count = len(batches)
        self.batches = itertools.cycle([inputs(name, flags, batch) for batch in batches])
        self.loss = None

    def __call__(self):
        with precision(self.flags):
            self.loss = run(self.model, self.flags, next(self.batches))
            self.loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()

    @torch.no_grad()
    def _exact_loss(self, model, batch) -> float:
        exact = replace(self.flags, precision="fp32")
        return run(model, exact, inputs(self.name, exact, batch)).item()


def check(trainings: list[Training]) -> None:
    """The models are of one size and solve one task.

    Raises:
        RuntimeError: if they do not.
    """
    losses = [training.first_loss for training in trainings]
    if max(abs(loss - math.log(VOCABULARY)) for loss in losses) > 1e-2 or max(losses) - min(losses) > 1e-2:
        raise RuntimeError(f"All losses must be ln({VOCABULARY}) = {math.log(VOCABULARY):.4f} at first, got {losses}.")
    sizes = [training.parameters for training in trainings]
    if max(sizes) > 1.05 * min(sizes):
        raise RuntimeError(f"Parameters must be within 5 % of each other, got {sizes}.")


def gemm_rate() -> float:
    """FLOP/s of this core in bf16 at 4096 x 256 x 1024, the median of 50."""
    left, right = (torch.randn(shape).bfloat16() for shape in ((4096, 256), (256, 1024)))
    samples = alternate({"gemm": lambda: left @ right}, 50, warmup=10)["gemm"]
    return 2 * 4096 * 256 * 1024 / statistics.median(samples)


def useful_flops(data: dict, lengths: list[list[int]]) -> float:
    """Of a step, on average over its batches: GEMMs over real tokens and labelled tokens, and full attention."""
    tokens, labelled = statistics.mean(data["real_tokens"]), statistics.mean(data["labelled_tokens"])
    pairs = statistics.mean(sum(n * n for n in batch) for batch in lengths)
    layers = 2 * LAYERS * (4 * WIDTH * WIDTH + 3 * WIDTH * GATED) * tokens + 4 * LAYERS * WIDTH * pairs
    return 3 * (layers + 2 * (WIDTH * WIDTH + WIDTH * VOCABULARY) * labelled)


def measure(setting: str, runs: dict[str, tuple[str, Flags]], repeats: int, clock: str) -> dict:
    """Alternates the models and prints their table."""
    trainings = {key: Training(name, flags, setting) for key, (name, flags) in runs.items()}
    check(list(trainings.values()))
    # Every batch has another number of labels: compiled models meet all of them before the clock runs.
    samples = alternate(trainings, repeats, warmup=2 * trainings[next(iter(runs))].count, clock=clock)
    padded = make_batches(setting, "padded")
    data = describe(setting, padded)
    flops, rate, tokens = useful_flops(data, [b.lengths for b in padded]), gemm_rate(), data["real_tokens"]
    found = medians(samples)
    best_peer = min((s for key, s in found.items() if not key.startswith("ours")), default=None)
    rows = {}
    for key, seconds in found.items():
        training = trainings[key]
        rows[key] = {
            "flags": training.flags.as_dict(),
            "parameters": training.parameters,
            "first_loss": training.first_loss,
            "last_loss": training.loss.item(),
            "ms": seconds * 1000,
            "tokens_per_second": statistics.mean(tokens) / seconds,
            "to_best_peer": best_peer / seconds if best_peer else None,
            "share_of_gemm_rate": flops / seconds / rate,
        }
    print(f"\n{setting}: {statistics.mean(tokens):.0f} real tokens a step, {flops / 1e9:.1f} useful GFLOP, ", end="")
    print(f"GEMM {rate / 1e12:.2f} TFLOP/s")
    print(f"{'model':32} {'flags':44} {'ms':>7} {'tokens/s':>9} {'x best peer':>11} {'of GEMM':>8}")
    for key, row in sorted(rows.items(), key=lambda item: item[1]["ms"]):
        flags, ratio = str(trainings[key].flags), row["to_best_peer"]
        print(f"{key if key != flags else '':32} {flags:44} {row['ms']:7.1f} {row['tokens_per_second']:9.0f} ", end="")
        print(f"{ratio or math.nan:11.2f} {row['share_of_gemm_rate']:8.1%}", flush=True)
    return {"samples": samples, "table": rows, "data": data, "gemm_flops": rate}


if __name__ == "__main__":
    run_benchmark(__doc__, "training", measure, BEST, OURS, repeats=20, compile_top=6)
