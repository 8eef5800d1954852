"""The forward of the base model (hidden states, no gradient): ours, and the built-in encoders at their best.

    OMP_NUM_THREADS=1 python benchmarks/inference_speed.py                            # the tables, all settings
    OMP_NUM_THREADS=1 python benchmarks/inference_speed.py --settings even --repeats 40
    OMP_NUM_THREADS=1 python benchmarks/inference_speed.py --search BERT --settings even   # a peer's fastest flags

4 layers x 256 (models.py) on the batches of batches.py, in inference mode. One thread, all models in turn in one
process, medians. Tokens are real ones, without padding.
"""

import itertools
import statistics
from dataclasses import replace

import torch
from batches import LONGEST, describe, make_batches
from comparison import run_benchmark
from measure import alternate, medians
from models import (
    PEERS,
    Flags,
    count_parameters,
    inputs,
    make_model,
    precision,
    prepare,
    run,
)

HALF = {peer: Flags("sdpa", "bf16", compiled=True, windows=peer != "ModernBERT") for peer in PEERS}
PACKED = {peer: replace(flags, rows="packed") for peer, flags in HALF.items()}
BEST: dict[str, dict[tuple[str, str], Flags]] = {
    "even": {(peer, "best"): flags for peer, flags in HALF.items()},
    "real128": {(peer, "best, padded"): flags for peer, flags in HALF.items()}
    | {(peer, "best"): flags for peer, flags in PACKED.items()},
}
BEST["real512"] = BEST["real128"]
"""The fastest flags of each peer in each setting, as `--search` found them on one core with AMX (torch 2.13,
transformers 5.23, x-transformers 2.31): the same for all. Frozen weights are part of `compile`, see
`models.prepare`. PyTorch's fused layer reaches 0.8 of it where nothing is padded. 'real512' was not searched.
"""

OURS: dict[str, Flags] = {
    "ours, fp32": Flags("selfattn", "fp32"),
    "ours, bf16": Flags("selfattn", "bf16"),
    "ours, bf16, compiled": Flags("selfattn", "bf16", compiled="layers"),
    "ours, sdpa, bf16, compiled": Flags("sdpa", "bf16", compiled=True),
}
"""Ours; documents are given padded, and once more in one row without padding."""


class Inference:
    """A model and its batches; calling it does one forward."""

    def __init__(self, name: str, flags: Flags, setting: str):
        self.flags = flags
        batches = make_batches(setting, flags.rows)
        model = make_model(name, flags, LONGEST[setting], head=False)
        self.parameters = count_parameters(model)
        self.model = prepare(model.eval(), flags)
        self.batches = itertools.cycle([inputs(name, flags, batch, head=False) for batch in batches])

    @torch.inference_mode()
    def __call__(self):
        with precision(self.flags):
            return run(self.model, self.flags, next(self.batches))


def measure(setting: str, runs: dict[str, tuple[str, Flags]], repeats: int, clock: str) -> dict:
    """Alternates the models and prints their table."""
    forwards = {key: Inference(name, flags, setting) for key, (name, flags) in runs.items()}
    samples = alternate(forwards, repeats, warmup=8, clock=clock)
    data = describe(setting, make_batches(setting, "padded"))
    tokens, found, rows = statistics.mean(data["real_tokens"]), medians(samples), {}
    best_peer = min((s for key, s in found.items() if not key.startswith("ours")), default=None)
    print(f"\n{setting}: {tokens:.0f} real tokens a forward")
    print(f"{'model':32} {'flags':44} {'ms':>7} {'tokens/s':>9} {'x best peer':>11}")
    for key, seconds in sorted(found.items(), key=lambda item: item[1]):
        ratio = best_peer / seconds if best_peer else None
        rows[key] = {
            "flags": forwards[key].flags.as_dict(),
            "parameters": forwards[key].parameters,
            "ms": seconds * 1000,
            "tokens_per_second": tokens / seconds,
            "to_best_peer": ratio,
        }
        flags = str(forwards[key].flags)
        print(f"{key if key != flags else '':32} {flags:44} {seconds * 1000:7.1f} {tokens / seconds:9.0f} ", end="")
        print(f"{ratio or float('nan'):11.2f}", flush=True)
    return {"samples": samples, "table": rows, "data": data}


if __name__ == "__main__":
    run_benchmark(__doc__, "inference", measure, BEST, OURS, repeats=30, compile_top=4)
