"""The forward of the base model (hidden states, no gradient): ours, and the built-in encoders at their best.

    OMP_NUM_THREADS=1 python benchmarks/inference_speed.py                            # the tables, all settings
    OMP_NUM_THREADS=1 python benchmarks/inference_speed.py --settings even --repeats 40
    OMP_NUM_THREADS=1 python benchmarks/inference_speed.py --search BERT --settings even   # a peer's fastest flags

4 layers x 256 (models.py) on the batches of batches.py, in inference mode. One thread, all models in turn in one
process, medians. Tokens are real ones, without padding.
"""

import argparse
import itertools
import statistics
from dataclasses import replace
from pathlib import Path

import torch
from batches import LONGEST, describe, make_batches
from measure import CLOCKS, alternate, keep_memory, medians, write_result
from models import (
    PEERS,
    PRECISIONS,
    Flags,
    combinations,
    count_parameters,
    inputs,
    make_model,
    precision,
    prepare,
    run,
)

RESULTS = Path("benchmarks/results")

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


def search(peer: str, setting: str, arguments: argparse.Namespace) -> None:
    """Measures all of a peer's flags, then the fastest of them compiled, and writes them in order."""

    def compare(flags: list[Flags]) -> dict:
        return measure(setting, {str(f): (peer, f) for f in flags}, arguments.repeats, arguments.clock)

    plain = combinations(peer, setting != "even", head=False, precisions=arguments.precisions)
    found = compare(plain)
    order = sorted(plain, key=lambda flags: found["table"][str(flags)]["ms"])
    tops = [flags for flags in order if flags.precision != "fp32" and flags.attention != "fused"][
        : arguments.compile_top
    ]
    compiled = compare([order[0], *(replace(flags, compiled=True) for flags in tops)])
    config = {"peer": peer, "data": found["data"], "repeats": arguments.repeats, "clock": arguments.clock}
    samples = {**found["samples"], **compiled["samples"]}
    table = {**found["table"], **compiled["table"]}
    name = peer.replace(".", "_")
    write_result(RESULTS / f"inference_search_{name}_{setting}.json", config, samples, table=table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", nargs="+", choices=LONGEST, default=["even", "real128"])
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: where others use the machine too")
    parser.add_argument("--models", nargs="+", help="only models whose name begins so")
    parser.add_argument("--search", nargs="+", choices=PEERS, metavar="PEER", help=", ".join(PEERS))
    parser.add_argument("--compile_top", type=int, default=4)
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=PRECISIONS, help="of a search")
    parser.add_argument("--output", type=Path, default=RESULTS / "inference_speed.json")
    arguments = parser.parse_args()
    keep_memory()
    if arguments.search:
        for setting, peer in itertools.product(arguments.settings, arguments.search):
            search(peer, setting, arguments)
        return

    results = {}
    for setting in arguments.settings:
        runs = {f"{peer}, defaults": (peer, Flags()) for peer in PEERS[:2]}
        runs |= {f"{peer}, {what}": (peer, flags) for (peer, what), flags in BEST[setting].items()}
        runs |= {name: (name, flags) for name, flags in OURS.items()}
        if setting != "even":
            runs |= {f"{name}, documents": (name, replace(f, rows="documents")) for name, f in OURS.items()}
        if arguments.models:
            runs = {key: run for key, run in runs.items() if key.startswith(tuple(arguments.models))}
        results[setting] = measure(setting, runs, arguments.repeats, arguments.clock)
    config = {"repeats": arguments.repeats, "clock": arguments.clock, "settings": arguments.settings}
    samples = {f"{key} | {setting}": s for setting, r in results.items() for key, s in r.pop("samples").items()}
    write_result(arguments.output, config, samples, results=results)


if __name__ == "__main__":
    main()
