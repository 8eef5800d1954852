"""Which column holds the labels, what their names are, and whether evaluation asks for one that training never saw."""

from collections import Counter

from datasets import ClassLabel

from .recipes import nearest
from .sources import check_columns

LABEL_COLUMNS = ("label", "labels")


def element(feature):
    """The feature of a list's elements, or None for what is no list."""
    inner = getattr(feature, "feature", None)
    return inner if inner is not None and not isinstance(feature, dict) else None


def is_list(feature):
    return element(feature) is not None


def find_label_column(rows, name, candidates, what="the labels"):
    """`name` if given, else `label` or `labels`, else the only candidate; refused where that is not clear.

    Args:
        candidates: columns that could hold labels of this task, judged by their type.
    """
    if name is not None:
        check_columns(rows, [name], "--label_column")
        return name
    usual = [column for column in LABEL_COLUMNS if column in rows.column_names]
    found = usual[:1] or candidates
    if len(found) != 1:
        raise ValueError(
            f"Which column holds {what} is not clear. Columns there: {', '.join(rows.column_names)}. "
            f"Pass --label_column with one of them."
        )
    return found[0]


def names_in(rows, column):
    """The label of each row as a name (a list of names where the column holds lists); None where there is no label."""
    feature = rows.features[column]
    inner = element(feature) or feature

    def name(value):
        if value is None or (isinstance(inner, ClassLabel) and value < 0):
            return None
        return inner.int2str(value) if isinstance(inner, ClassLabel) else str(value)

    if is_list(feature):
        return [None if values is None else [name(value) for value in values] for values in rows[column]]
    return [name(value) for value in rows[column]]


def flat(names):
    for name in names:
        if isinstance(name, list):
            yield from name
        else:
            yield name


def label_names(rows, column):
    """The names of all labels, in the order of their ids: as the data set gives them, else sorted.

    Raises:
        ValueError: a training row without a label, or one label alone.
    """
    feature = rows.features[column]
    inner = element(feature) or feature
    present = Counter(flat(names_in(rows, column)))
    if None in present:
        raise ValueError(
            f"{present[None]} labels in column {column!r} of the training data are empty (null or -1). "
            f"Remove these rows, or pass another --label_column."
        )
    if isinstance(inner, ClassLabel):
        names = list(inner.names)
    else:
        numbers = all(name.lstrip("-").isdigit() for name in present)
        names = sorted(present, key=(lambda name: (int(name), name)) if numbers else None)
    if len(names) < 2:
        raise ValueError(
            f"A classifier needs two labels or more, column {column!r} of the training data has {names}. "
            f"Pass another --label_column."
        )
    if len(names) > 1000 and len(names) > len(rows) // 2:
        raise ValueError(
            f"Column {column!r} has {len(names):,} different values in {len(rows):,} rows, which are no labels. "
            f"Pass another --label_column, or --task text-regression for numbers."
        )
    return names


def check_unseen(train, other, column, split="validation"):
    """Refuse labels in `other` that no training row has: no model could get them right, and scores would be wrong."""
    seen = set(flat(names_in(train, column)))
    there = Counter(flat(names_in(other, column)))
    if None in there:
        raise ValueError(
            f"{there[None]} labels in column {column!r} of the {split} data are empty (null or -1), so nothing can be "
            f"measured on them. Pass labelled data as --{split}_file or --{split}_split."
        )
    unseen = {name: count for name, count in there.items() if name not in seen}
    if unseen:
        shown = ", ".join(f"{name!r} ({count}x){nearest(name, seen)}" for name, count in sorted(unseen.items())[:10])
        raise ValueError(
            f"The {split} data has labels that the training data never has: {shown}. Training labels: "
            f"{', '.join(sorted(seen)[:20])}. Correct or remove these rows, or add training rows with these labels."
        )
