"""The README's Python runs as written, and its tables are those of the code."""

import re
from pathlib import Path

from hf_selfattn import PATTERNS
from hf_selfattn.tools.tables import write_tables

README = Path(__file__).parent.parent / "README.md"


def test_snippets_run_in_order(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(PATTERNS, "even_odd", raising=False)
    names = {"__name__": "readme"}
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(blocks) >= 4
    for block in blocks:
        exec(compile(block, str(README), "exec"), names)
    PATTERNS.pop("even_odd")


def test_tables_are_those_of_the_code():
    text = README.read_text(encoding="utf-8")
    assert write_tables(text) == text, "run: python -m hf_selfattn.tools.tables README.md"
