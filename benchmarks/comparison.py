"""The command line that the speed benchmarks share: models side by side, or a search for a peer's fastest flags."""

import argparse
import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from batches import LONGEST
from measure import CLOCKS, write_result
from models import PEERS, PRECISIONS, Flags, combinations

from hf_selfattn.tools.fast_defaults import keep_memory

RESULTS = Path("benchmarks/results")


def search(what: str, measure: Callable, peer: str, setting: str, arguments: argparse.Namespace) -> None:
    """Measures all of a peer's flags, then the fastest of them compiled, and writes them in order."""

    def compare(flags: list[Flags]) -> dict:
        return measure(setting, {str(f): (peer, f) for f in flags}, arguments.repeats, arguments.clock)

    plain = combinations(peer, setting != "even", head=what == "training", precisions=arguments.precisions)
    found = compare(plain)
    order = sorted(plain, key=lambda flags: found["table"][str(flags)]["ms"])
    tops = [flags for flags in order if flags.precision != "fp32" and flags.attention != "fused"]
    compiled = compare([order[0], *(replace(flags, compiled=True) for flags in tops[: arguments.compile_top])])
    config = {"peer": peer, "data": found["data"], "repeats": arguments.repeats, "clock": arguments.clock}
    samples = {**found["samples"], **compiled["samples"]}
    table = {**found["table"], **compiled["table"]}
    name = peer.replace(".", "_")
    write_result(RESULTS / f"{what}_search_{name}_{setting}.json", config, samples, table=table)


def run_benchmark(
    description: str, what: str, measure: Callable, best: dict, ours: dict[str, Flags], repeats: int, compile_top: int
) -> None:
    """Reads the command line, measures and writes `what`_speed.json.

    Args:
        description: of the command line's help.
        what: "training" or "inference".
        measure: (setting, runs, repeats, clock) -> {"samples", "table", "data", ...}.
        best: for each setting the fastest flags of each peer, by (peer, how).
        ours: our flags by name.
        repeats, compile_top: defaults of the options of that name.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", nargs="+", choices=LONGEST, default=["even", "real128"])
    parser.add_argument("--repeats", type=int, default=repeats)
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: where others use the machine too")
    parser.add_argument("--models", nargs="+", help="only models whose name begins so")
    parser.add_argument("--search", nargs="+", choices=PEERS, metavar="PEER", help=", ".join(PEERS))
    parser.add_argument("--compile_top", type=int, default=compile_top)
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=PRECISIONS, help="of a search")
    parser.add_argument("--output", type=Path, default=RESULTS / f"{what}_speed.json")
    arguments = parser.parse_args()
    keep_memory()
    if arguments.search:
        for setting, peer in itertools.product(arguments.settings, arguments.search):
            search(what, measure, peer, setting, arguments)
        return

    results = {}
    for setting in arguments.settings:
        runs = {f"{peer}, defaults": (peer, Flags()) for peer in PEERS[:2]}
        runs |= {f"{peer}, {how}": (peer, flags) for (peer, how), flags in best[setting].items()}
        runs |= {name: (name, flags) for name, flags in ours.items()}
        if setting != "even":
            runs |= {f"{name}, documents": (name, replace(f, rows="documents")) for name, f in ours.items()}
        if arguments.models:
            runs = {key: run for key, run in runs.items() if key.startswith(tuple(arguments.models))}
        results[setting] = measure(setting, runs, arguments.repeats, arguments.clock)
    config = {"repeats": arguments.repeats, "clock": arguments.clock, "settings": arguments.settings}
    samples = {f"{key} | {setting}": s for setting, r in results.items() for key, s in r.pop("samples").items()}
    write_result(arguments.output, config, samples, results=results)
