import sys
from collections import Counter

import pytest
from huggingface_hub import constants

from hf_selfattn.tools import docstrings
from hf_selfattn.tools.docstrings import document_hash, hide_names, load_docstrings, packages_apart, read_documents

MODULE = '''
"""Tools of {name} for reading numbered things, number {number}."""

class Reader:
    """Reads what {name} has written, item {letters}, and returns it to the caller."""

    def read(self):
        """Return the next item of the {name} stream in the order {letters} of arrival."""

    def short(self):
        """Too short."""
'''
SHARED = '"""A licence text that several packages carry in the very same words."""\n'


@pytest.fixture
def roots(tmp_path):
    """A folder of three packages and a standard library, 4 to 8 modules each."""
    site, stdlib = tmp_path / "site", tmp_path / "stdlib"
    for folder, name, count in ((site, "alpha", 8), (site, "beta", 6), (site, "gamma", 4), (stdlib, "os_like", 5)):
        (folder / name / "tests").mkdir(parents=True)
        for number in range(count):
            letters = "".join(chr(97 + (number * 7 + i) % 26) for i in range(number + 2))
            (folder / name / f"m{number}.py").write_text(MODULE.format(name=name, number=number, letters=letters))
        (folder / name / "shared.py").write_text(SHARED)
        (folder / name / "tests" / "test_x.py").write_text(
            '"""This one belongs to the tests and is not documentation."""'
        )
    (site / "alpha" / "broken.py").write_text('"""A docstring in a file that does not parse as Python.""" def')
    (site / "alpha" / "table.py").write_text('"""' + "0x12 0x34 " * 20 + '"""')
    (site / "single.py").write_text('"""A module that is a file and no folder, with its own text."""\n')
    return {str(site): None, str(stdlib): docstrings.STANDARD_LIBRARY}


def test_documents_are_read_once_each(roots):
    documents = read_documents(roots, progress=False)
    counts = Counter(package for _, package, _ in documents)
    # the module docstrings of a package differ in their number alone, so they are one document
    assert counts == {"alpha": 8 * 2 + 2, "beta": 6 * 2 + 1, "gamma": 4 * 2 + 1, "python": 5 * 2 + 1, "single": 1}
    texts = [text for _, _, text in documents]
    assert len(set(texts)) == len(texts)
    assert sum("licence" in text for text in texts) == 1
    assert not any("belongs to the tests" in text or "does not parse" in text or "0x12" in text for text in texts)
    assert documents == sorted(documents, key=lambda document: document[0])


def test_the_split_depends_on_the_text_alone(roots, monkeypatch):
    monkeypatch.setattr(docstrings, "VALIDATION_SHARE", 0.5)
    everything = read_documents(roots, progress=False)
    fewer = [document for document in everything if document[1] != "alpha"]
    whole, part = docstrings.as_splits(everything), docstrings.as_splits(fewer)
    for split in ("train", "validation"):
        assert set(part[split]["text"]) <= set(whole[split]["text"])
    assert not set(whole["train"]["text"]) & set(whole["validation"]["text"])
    assert document_hash("Returns  x 12.\n") == document_hash("returns X 7")


def test_the_cache_is_read_the_second_time(roots, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(docstrings, "installed_roots", lambda: roots)
    monkeypatch.setattr(docstrings, "VALIDATION_SHARE", 0.3)
    first = load_docstrings()
    assert first["train"].column_names == ["text", "package"]
    monkeypatch.setattr(docstrings, "read_documents", None)
    second = load_docstrings()
    assert first["train"][:] == second["train"][:]
    assert first["validation"][:] == second["validation"][:]
    assert len(list((tmp_path / "home" / "hf_selfattn").iterdir())) == 1


def test_packages_apart_is_balanced_and_hides_the_names(roots, monkeypatch):
    monkeypatch.setattr(docstrings, "VALIDATION_SHARE", 0.3)
    splits = docstrings.as_splits(read_documents(roots, progress=False))
    largest = {name for name, _ in Counter(splits["train"]["package"]).most_common(3)}
    apart = packages_apart(splits, 3)
    for split in ("train", "validation"):
        counts = Counter(apart[split]["package"])
        assert set(counts) == largest
        assert len(set(counts.values())) == 1
        assert not any(name in text.lower() for text in apart[split]["text"] for name in largest)
    with pytest.raises(ValueError, match="99-packages: from 2 to"):
        packages_apart(splits, 99)


def test_names_are_hidden_as_words():
    text = "import numpy as np; a NumPy array, numpy_like, _numpy.x, mynumpy"
    assert hide_names(text, {"numpy", "np"}) == (
        "import package as package; a package array, package_like, _package.x, mynumpy"
    )


def test_no_documentation_is_an_empty_data_set(tmp_path):
    with pytest.raises(ValueError, match="The data set is empty: 0 docstrings were found"):
        docstrings.as_splits(read_documents({str(tmp_path): None}, progress=False))


def test_the_real_roots_are_this_environments():
    roots = docstrings.installed_roots()
    assert docstrings.STANDARD_LIBRARY in roots.values()
    assert any(path in sys.path for path in roots)
