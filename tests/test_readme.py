"""The README's Python runs as written, and its tables are those of the code."""

import shutil
from pathlib import Path

from hf_selfattn.tools.tables import write_tables

from .hub_server import Hub
from .test_hub import USER, run
from .train_scripts import ROOT, tiny_model_folder

README = Path(__file__).parent.parent / "README.md"


def python_of(text: str) -> tuple[str, int]:
    """(all Python blocks as one script, each line where it stands in the text; how many blocks there are)."""
    lines, inside, blocks = [], False, 0
    for line in text.splitlines():
        if line.startswith("```"):
            inside = line == "```python"
            blocks += inside
            line = ""
        lines.append(line if inside else "")
    return "\n".join(lines), blocks


def test_snippets_that_open_a_model_register_it():
    """Each is copied alone."""
    text = README.read_text(encoding="utf-8")
    blocks = [part.split("```")[0] for part in text[text.index("## Share") :].split("```python\n")[1:]]
    assert len(blocks) >= 8
    for block in blocks:
        assert "import hf_selfattn" in block or "from hf_selfattn" in block, block


def test_snippets_run_in_order(tmp_path):
    """In one process, beside a `runs/quickstart`, with a Hub that knows `you`."""
    code, blocks = python_of(README.read_text(encoding="utf-8"))
    assert blocks >= 10
    shutil.copytree(tiny_model_folder(), tmp_path / USER / "runs" / "quickstart")
    (tmp_path / USER / "readme.py").write_text(code, encoding="utf-8")
    hub = Hub({"hf_of_you": "you"})
    with hub.serve() as endpoint:
        run(["readme.py"], endpoint, tmp_path, PYTHONPATH=str(ROOT), HF_TOKEN="hf_of_you")
    assert {"config.json", "model.safetensors", "modeling_selfattn.py", "tokenizer.json"} <= set(
        hub.repositories["you/your-encoder"].files("main")
    )


def test_tables_are_those_of_the_code():
    text = README.read_text(encoding="utf-8")
    assert write_tables(text) == text, "run: python -m hf_selfattn.tools.tables README.md"


def test_an_empty_table_does_not_take_what_follows():
    text = "<!-- table: a -->\n<!-- end of table -->\nkept\n<!-- table: b -->\nold\n<!-- end of table -->\n"
    written = write_tables(text, {"a": lambda: "one", "b": lambda: "two"})
    assert written == text.replace("a -->\n", "a -->\none\n").replace("old", "two")
