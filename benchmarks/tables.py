"""Writes the tables of the pages in docs and of README.md from the results.

    python benchmarks/tables.py
    python benchmarks/tables.py --take runs/scores/evaluation.json blimp_en      # what evaluate_models.py found, first

Each table stands between `<!-- table: NAME -->` and `<!-- end of table -->`.
"""

import argparse
import functools
import json
from pathlib import Path

from learning_tables import EVALUATIONS, WHOLE_TEXT, ablations, evaluated, overlap, stock_search, take, ten_minutes

from hf_selfattn.tools.tables import write_tables

RESULTS = Path("benchmarks/results")
PAGES = (*map(Path, ("docs/performance.md", "docs/recipes.md", "docs/results.md")), Path("README.md"))
LINEAR = ("Longformer, window", "ours, window", "ours, window, learned", "BigBird", "ours, bigbird", "ours, full")
LONG = ("BERT, sdpa", "ModernBERT, window", *LINEAR)


def read(name: str) -> dict:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def flags_of(row: dict) -> str:
    flags = row["flags"]
    compiled = {True: "compiled", "layers": "layers compiled"}.get(flags["compiled"], "")
    parts = (flags["attention"], flags["precision"], compiled, "sparse" if flags["sparse"] else "")
    more = [f"{name}={value}" for name, value in flags["options"]]
    return ", ".join([part for part in (*parts, *more) if part])


def called(key: str, row: dict) -> str:
    """The model's name, and how its documents came."""
    name = key.split(", best")[0].split(", defaults")[0]
    name = "ours" if name.startswith("ours") else name
    how = {"packed": " (packed by hand)", "documents": " (packed)"}.get(row["flags"]["rows"], "")
    return f"**{name}**{how}" if name == "ours" else name + how


def by_setting(name: str) -> str:
    """A table for each setting, the fastest first."""
    found, lines = read(name)["results"], []
    titles = {"even": "even", "real128": "real lengths", "real512": "real lengths to 512"}
    for setting, result in found.items():
        rate = result.get("gemm_flops")
        lines += ["", f"| {titles[setting]} | flags | ms | tokens/s |" + (" of the GEMM rate |" if rate else "")]
        lines.append("|---|---|---:|---:|" + ("---:|" if rate else ""))
        for key, row in sorted(result["table"].items(), key=lambda item: item[1]["ms"]):
            share = f" {row['share_of_gemm_rate']:.0%} |" if rate else ""
            lines.append(
                f"| {called(key, row)} | {flags_of(row)} | {row['ms']:.0f} | {row['tokens_per_second']:,.0f} |{share}"
            )
    return "\n".join(lines[1:])


def training_short() -> str:
    """The fastest of each model where documents come padded, and the built-in encoders' defaults."""
    results = read("training_speed")["results"]
    lines = ["| | 32 rows of 128, ms | tokens/s | real lengths, padded, ms | tokens/s |", "|---|---:|---:|---:|---:|"]
    found: dict[str, dict[str, dict]] = {}
    for setting, result in results.items():
        for key, row in result["table"].items():
            if row["flags"]["rows"] == "padded":
                name = called(key, row) + (", defaults" if "defaults" in key else ", its fastest flags")
                name = "**ours**" if key.startswith("ours") else name
                best = found.setdefault(name, {}).get(setting)
                if best is None or row["ms"] < best["ms"]:
                    found[name][setting] = row
    for name, rows in sorted(found.items(), key=lambda item: item[1]["even"]["ms"]):
        if len(rows) == len(results):
            cells = " | ".join(f"{rows[s]['ms']:,.0f} | {rows[s]['tokens_per_second']:,.0f}" for s in results)
            lines.append(f"| {name} | {cells} |")
    return "\n".join(lines)


def attention() -> str:
    """Ours, SDPA and plain products, by shape and type."""
    medians = read("attention_speed")["medians"]
    lines = ["| (B, H, N, d) | | ours | SDPA | plain | SDPA / ours |", "|---|---|---:|---:|---:|---:|"]
    cases = dict.fromkeys(tuple(key.split(" | ")[1:]) for key in medians)
    for what, shape, dtype in cases:
        ms = [medians[f"{who} | {what} | {shape} | {dtype}"] * 1000 for who in ("ours", "SDPA", "plain")]
        name = {"both": "forward and backward", "forward": "forward"}[what]
        times = " | ".join(f"{x:.1f}" for x in ms)
        lines.append(f"| ({shape.replace(',', ', ')}) | {dtype}, {name} | {times} | {ms[1] / ms[0]:.2f} |")
    return "\n".join(lines)


def scaling() -> str:
    """Milliseconds of a step by length and type."""
    result = read("scaling")
    medians, lengths = result["medians"], result["config"]["lengths"]
    names = [name.replace("ours", "**ours**") for name in LONG]
    lines = ["| tokens | | " + " | ".join(names) + " |", "|---:|---|" + "---:|" * len(LONG)]
    for length in lengths:
        for dtype in ("fp32", "bf16"):
            times = [medians.get(f"{name} | {length} | {dtype}") for name in LONG]
            cells = " | ".join("" if x is None else f"{x * 1000:,.0f}" for x in times)
            lines.append(f"| {length:,} | {dtype} | {cells} |")
    return "\n".join(lines)


TABLES = {
    "training_short": training_short,
    "training": lambda: by_setting("training_speed"),
    "inference": lambda: by_setting("inference_speed"),
    "attention": attention,
    "scaling": scaling,
    "ablations": ablations,
    "stock_search": stock_search,
    "overlap": overlap,
    "ten_minutes_en": lambda: ten_minutes("en"),
    "ten_minutes_whole_text": lambda: ten_minutes("en", WHOLE_TEXT),
    "ten_minutes_zh": lambda: ten_minutes("zh"),
    **{name: functools.partial(evaluated, name) for name in EVALUATIONS},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--take", nargs=2, metavar=("FILE", "TABLE"), help=f"TABLE: {', '.join(EVALUATIONS)}")
    arguments = parser.parse_args()
    if arguments.take:
        source, name = arguments.take
        if name not in EVALUATIONS:
            parser.error(f"--take knows no table {name!r}. There are {', '.join(EVALUATIONS)}.")
        print(f"written: {take(Path(source), name)}")
    for page in filter(Path.is_file, PAGES):
        page.write_text(write_tables(page.read_text(encoding="utf-8"), TABLES), encoding="utf-8")
        print(f"written: {page}")


if __name__ == "__main__":
    main()
