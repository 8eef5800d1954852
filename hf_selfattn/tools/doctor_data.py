"""Labels and data: checks of the doctor, each (Examination) -> Findings."""

from collections import Counter

from datasets import ClassLabel

from .doctor_examination import error, note, warning
from .labels import element, flat

CLASSIFIERS = ("sequence_classification", "token_classification")
WITHOUT_LABEL = (None, -100)


def check_label_names(examination):
    """id2label and label2id name each class once, and are each other's inverse."""
    config = examination.config
    if examination.head not in CLASSIFIERS:
        return
    names, numbers, count = config.id2label, config.label2id, config.num_labels
    correct = "Write both into config.json: id2label {number: name}, label2id {name: number}."
    if sorted(names) != list(range(count)):
        yield error(f"id2label names the classes {sorted(names)[:8]}, and there are 0 to {count - 1}.", correct)
    twice = [name for name, times in Counter(names.values()).items() if times > 1]
    if twice:
        yield error(f"id2label gives {twice[0]!r} to more than one class.", correct)
    elif numbers != {name: number for number, name in names.items()}:
        wrong = next(iter({*numbers.items()} ^ {(name, number) for number, name in names.items()}))
        yield error(
            f"label2id is not the inverse of id2label: {wrong[0]!r} is {numbers.get(wrong[0])} in label2id, and "
            f"{[n for n, name in names.items() if name == wrong[0]]} in id2label.",
            correct,
        )
    if count > 1 and config.problem_type != "regression" and all(n == f"LABEL_{i}" for i, n in names.items()):
        yield note(
            f"The {count} classes have no names (LABEL_0, …): pipelines answer with these.",
            "Set id2label and label2id in config.json.",
        )


def _labels(examination, split):
    """The labels of the rows as they stand in the data, lists flattened; ClassLabel numbers by their names."""
    rows = examination.data[split]
    feature = rows.features[examination.label_column]
    inner = element(feature) or feature
    values = list(flat(rows[examination.label_column][:]))
    if isinstance(inner, ClassLabel):
        return [inner.int2str(v) if v is not None and v >= 0 else None for v in values]
    return values


def check_labels(examination):
    """Each label of the data is one of the model's classes, each class occurs, and no label is missing."""
    if examination.head not in CLASSIFIERS:
        return
    config, column = examination.config, examination.label_column
    regression = config.problem_type == "regression" or (config.num_labels == 1 and config.problem_type is None)
    for split in examination.data:
        values = _labels(examination, split)
        labelled = [v for v in values if v not in WITHOUT_LABEL]
        if not labelled:
            yield error(
                f"No row of the {split} data has a label: column {column!r} is empty or -100 throughout.",
                "Pass another label column, or label the data.",
            )
            continue
        if regression:
            continue
        if any(isinstance(v, float) for v in labelled) and config.problem_type != "multi_label_classification":
            yield error(
                f"Labels in column {column!r} of the {split} data are fractions, and the model tells classes apart.",
                "Convert them to class numbers, or set problem_type to 'regression' with num_labels 1.",
            )
            continue
        known = {*config.label2id, *(str(number) for number in config.id2label)}
        if config.problem_type != "multi_label_classification":
            outside = Counter(str(v) for v in labelled if str(v) not in known)
            if outside:
                value, count = outside.most_common(1)[0]
                yield error(
                    f"{sum(outside.values())} labels of the {split} data are none of the model's "
                    f"{config.num_labels} classes, as {value!r} ({count} times).",
                    "Set num_labels, id2label and label2id to those of the data, or correct the labels.",
                )
            never = set(config.id2label.values()) - {config.id2label.get(v, v) for v in labelled}
            never -= {name for number, name in config.id2label.items() if str(number) in map(str, labelled)}
            if never and not outside:
                yield warning(
                    f"No row of the {split} data has the class "
                    f"{sorted(never)[0]!r}{f' (nor {len(never) - 1} others)' if len(never) > 1 else ''}.",
                    "Add such rows, or leave the class out of the model: nothing is learned or measured for it.",
                )


def check_texts(examination):
    """Texts are there, and not the same ones again and again."""
    for split in examination.data:
        texts = examination.texts(split)
        empty = sum(not text.strip() for text in texts)
        if empty > 0.01 * len(texts):
            yield warning(f"{empty} of {len(texts)} texts of the {split} data are empty.", "Remove these rows.")
        times = Counter(text for text in texts if text.strip())
        again = sum(times.values()) - len(times)
        if again > 0.05 * len(texts):
            text, count = times.most_common(1)[0]
            yield warning(
                f"{again} of {len(texts)} texts of the {split} data stand there before, as {text[:40]!r} ({count} "
                "times).",
                "Keep each text once, or know why not.",
            )


def check_overlap(examination):
    """What is measured was not trained on."""
    if not {"train", "validation"} <= set(examination.data):
        return
    seen, texts = set(examination.texts("train")), examination.texts("validation")
    both = sum(text in seen for text in texts if text.strip())
    if both > 0.01 * len(texts):
        yield (error if both > 0.1 * len(texts) else warning)(
            f"{both} of {len(texts)} validation texts are in the training data too: the score is better than the "
            "model.",
            "Remove them from the training data, or split again with equal texts on one side.",
        )


def check_contradictions(examination):
    """Equal texts have equal labels."""
    if examination.head != "sequence_classification" or not examination.label_column:
        return
    labels = {}
    for text, label in zip(
        examination.texts("train"), examination.data["train"][examination.label_column][:], strict=True
    ):
        labels.setdefault(text, set()).add(str(label))
    unclear = [text for text, found in labels.items() if len(found) > 1]
    if len(unclear) > 0.01 * len(labels):
        yield warning(
            f"{len(unclear)} training texts have several labels, as {unclear[0][:40]!r}.",
            "Keep one label for each, or remove these rows.",
        )


def check_truncation(examination):
    """Most texts fit into a row."""
    recipe, limit = examination.recipe, examination.tokenizer.model_max_length
    if recipe is not None and (recipe.long_texts != "truncate" or recipe.length is None):
        return
    room = min(limit, examination.positions or limit) if recipe is None else recipe.length
    rows = examination.tokenizer(examination.sample_texts(), verbose=False)["input_ids"]
    cut = sum(len(row) > room for row in rows)
    if cut > 0.5 * len(rows):
        lost = sum(max(0, len(row) - room) for row in rows) / sum(map(len, rows))
        yield warning(
            f"{cut / len(rows):.0%} of the texts have more than {room} tokens, and what stands beyond is never read "
            f"({lost:.0%} of all tokens).",
            "Use longer rows, or cut long texts into windows (long_texts: split).",
        )
