"""The README's tables of choices, written from the code that they describe.

    python -m hf_selfattn.tools.tables README.md       # puts the tables between their markers

A table stands between `<!-- table: NAME -->` and `<!-- end of table -->`.
"""

import functools
import inspect
import re
import sys
from collections.abc import Callable
from pathlib import Path

from hf_selfattn import KERNELS, PATTERNS, POSITIONS, SCORES, SelfAttnConfig, unsupported_reasons

OPTIONS = {
    "learned": {"max_position_embeddings": 512},
    "sliding_window": {"window_radius": 64},
    "longformer": {"window_radius": 64},
}
"""What a choice cannot do without."""

CHOICES = {"score_function": SCORES, "attention_pattern": PATTERNS, "position_encoding": POSITIONS}

EXTRAS = {
    "logit_softcap": {"logit_softcap": 50.0},
    "attention_sink": {"attention_sink": True},
    "attention_dropout in training": {"attention_dropout": 0.1},
    "training on a CPU": {},
}


def choices_table(choice: str) -> str:
    """One row for each entry of a table of choices: its name, what it is, its options and where it is from."""
    rows = [f"| `{choice}` | what it is | options | source |", "|---|---|---|---|"]
    for name, cls in CHOICES[choice].items():
        text = inspect.getdoc(cls)
        first = " ".join(text.split("\n\n")[0].split()).split(" Source:")[0]
        papers = re.findall(r"([A-Z][\w&. ]+? \d{4}),\s+arXiv:([\d.]+)", " ".join(text.split()))
        papers = [(re.sub(r"^.*Source: ", "", authors), number) for authors, number in papers]
        source = "; ".join(f"[{authors}](https://arxiv.org/abs/{number})" for authors, number in papers)
        needed = (f"`{option}`" for option in (*OPTIONS.get(name, {}), *cls.options))
        first = first.replace("|", "\\|")
        rows.append(f"| `{name}` | {first} | {', '.join(dict.fromkeys(needed))} | {source} |")
    return "\n".join(rows)


def kernels_table() -> str:
    """What each kernel refuses, as `unsupported_reasons` says; a choice that every kernel takes has no row."""
    rows = [f"| | {' | '.join(f'`{name}`' for name in KERNELS)} |", "|---" * (len(KERNELS) + 1) + "|"]
    for choice, table in CHOICES.items():
        for name in table:
            rows.append(_kernel_row(f"`{choice}='{name}'`", {choice: name, **OPTIONS.get(name, {})}))
    for name, options in EXTRAS.items():
        words = {"device_type": "cpu"} if "CPU" in name else {}
        rows.append(_kernel_row(name, options, training="training" in name, **words))
    return "\n".join(row for row in rows if row is not None)


def _kernel_row(label: str, options: dict, **known) -> str | None:
    config = SelfAttnConfig(**options)
    found = [unsupported_reasons(config, kernel, **known) for kernel in KERNELS]
    cells = ("; ".join(reason.split(", and ")[0].split(" (")[0] for reason in x) if x else "✓" for x in found)
    return f"| {label} | {' | '.join(cells)} |" if any(found) else None


TABLES = {**{choice: functools.partial(choices_table, choice) for choice in CHOICES}, "kernels": kernels_table}


def write_tables(text: str, tables: dict[str, Callable[[], str]] = TABLES) -> str:
    """The text with its marked tables made anew; those that are not among `tables` stay as they are."""

    def table(match: re.Match) -> str:
        return f"{match[1]}\n{tables[match[2]]()}{match[3]}" if match[2] in tables else match[0]

    return re.sub(r"(<!-- table: (\w+) -->).*?(\n<!-- end of table -->)", table, text, flags=re.DOTALL)


if __name__ == "__main__":
    for path in map(Path, sys.argv[1:]):
        path.write_text(write_tables(path.read_text(encoding="utf-8")), encoding="utf-8")
