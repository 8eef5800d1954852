"""A program on the standard library alone: paths of Python files in, one JSON list of docstrings a line out.

`docstrings.py` runs several of it beside each other. (A multiprocessing pool would import the caller's main module and
the libraries it needs in each worker, and cannot be started from a notebook or an unguarded script.)
"""

import ast
import json
import sys
import warnings
from pathlib import Path

MIN_CHARACTERS = 40  # shorter ones are mostly "Return self.x."
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def is_prose(text):
    """More than half letters and blanks, and storable as UTF-8: leaves out tables of numbers and of code points."""
    letters = sum(character.isalpha() or character.isspace() for character in text)
    return 2 * letters > len(text) and not any(0xD800 <= ord(character) <= 0xDFFF for character in text)


def docstrings_of_file(path):
    """The docstrings of a Python file in the order of `ast.walk`; none where it cannot be parsed."""
    try:
        source = Path(path).read_bytes()
        if b'"""' not in source and b"'''" not in source:
            return []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # SyntaxWarning of invalid escapes in other people's files
            tree = ast.parse(source)
        texts = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, DOCUMENTED)]
    except (OSError, SyntaxError, ValueError, RecursionError, MemoryError):
        return []
    return [text.strip() for text in texts if text and len(text.strip()) >= MIN_CHARACTERS and is_prose(text)]


if __name__ == "__main__":
    for line in sys.stdin:
        print(json.dumps(docstrings_of_file(json.loads(line))))
