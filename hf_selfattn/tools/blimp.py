"""BLiMP: does a model find the good sentence of a minimal pair more likely? (Warstadt et al. 2020, arXiv:1912.00582)

67 paradigms of 1,000 pairs in 12 phenomena. A masked language model's likelihood is the pseudo-log-likelihood: the sum
of the log-probabilities of a sentence's tokens, each masked in turn, the others seen, special tokens left out (Salazar
et al. 2020, arXiv:1910.14659). A pair is right if that of the good sentence is strictly greater. The accuracy of a
phenomenon is the mean over its paradigms, the overall accuracy the mean over all paradigms, as in the authors' tables.
"""

import numpy as np
from datasets import concatenate_datasets, get_dataset_config_names, load_dataset

from .evaluation import answers, longest_row, questions_of_length
from .sources import check_columns

COLUMNS = ("sentence_good", "sentence_bad", "UID", "linguistics_term")

SAME_PHENOMENON = {"s-selection": "argument_structure"}
"""The data files name two paradigms of argument structure otherwise than the authors' tables do."""


def load_blimp(name="nyu-mll/blimp"):
    """All pairs of a data set on the Hub (all of its configurations) or in a local folder, as one Dataset.

    Raises:
        FileNotFoundError: there is no such folder or data set.
        ValueError: a column is not there.
    """
    try:
        configs = get_dataset_config_names(name)
    except OSError as error:  # offline, too
        raise FileNotFoundError(
            f"--blimp {name!r} is not a folder here, and the Hub does not give it ({error}). Pass a folder with its "
            "files, or a name on the Hub."
        ) from error
    parts = [part for config in configs for part in load_dataset(name, config).values()]
    for part in parts:
        check_columns(part, COLUMNS, "--blimp")
    return concatenate_datasets([part.select_columns(list(COLUMNS)) for part in parts])


def pseudo_log_likelihoods(model, tokenizer, sentences, progress=None, **how):
    """(S,) nats: for each sentence the sum of its tokens' log-probabilities, each masked in turn.

    Equal sentences, and equal rows of different sentences (a pair with its only differing token masked), are computed
    once.

    Args:
        model, tokenizer: of `evaluation.open_masked_lm`.
        sentences: list of strings.
        how: for `evaluation.answers`.

    Raises:
        ValueError: a sentence has more tokens than the model's positions.
    """
    distinct, inverse = np.unique(np.asarray(sentences, dtype=object), return_inverse=True)
    encoded = tokenizer(distinct.tolist(), return_special_tokens_mask=True, verbose=False)
    lengths = np.array([len(ids) for ids in encoded["input_ids"]])
    limit = longest_row(tokenizer, model.config)
    if lengths.max() > limit:
        raise ValueError(
            f"The model reads rows of at most {limit} tokens, and {distinct[lengths.argmax()]!r} has {lengths.max()}. "
            "Evaluate a model with more positions, or one whose tokenizer cuts texts into fewer pieces."
        )
    questions, of_question = [], []
    for length in np.unique(lengths)[::-1]:
        chosen = np.flatnonzero(lengths == length)
        ids = np.array([encoded["input_ids"][i] for i in chosen], dtype=np.int32)
        special = np.array([encoded["special_tokens_mask"][i] for i in chosen], dtype=bool)
        sentence, place = (~special).nonzero()
        rows, row = ids[sentence], np.arange(len(sentence))
        rows[row, place] = tokenizer.mask_token_id
        number = row + sum(map(len, of_question))
        questions.append(questions_of_length(rows, row, place, ids[sentence, place], number))
        of_question.append(chosen[sentence])
    log_probabilities, _ = answers(model, questions, progress=progress, **how)
    return np.bincount(np.concatenate(of_question), log_probabilities, len(distinct))[inverse]


def first_of_each_paradigm(pairs, count):
    """The first `count` pairs of each paradigm; all where None."""
    if count is None:
        return pairs
    if count < 1:
        raise ValueError(f"A paradigm has at least one pair, got --max_pairs_per_paradigm {count}. Leave it out.")
    names = np.asarray(pairs["UID"][:], dtype=str)
    kept = np.concatenate([np.flatnonzero(names == name)[:count] for name in np.unique(names)])
    return pairs.select(np.sort(kept))


def blimp_metrics(model, tokenizer, pairs, progress="BLiMP", **how):
    """Accuracies of a masked language model on minimal pairs.

    Args:
        model, tokenizer: of `evaluation.open_masked_lm`.
        pairs: Dataset of `load_blimp`.
        how: for `evaluation.answers`.

    Returns:
        `accuracy` (mean of the paradigms), `phenomena` and `paradigms` (name -> accuracy), `pairs`, and `ties`: pairs
        of equal likelihood, which count as wrong (a tokenizer that cannot tell two sentences apart makes such).
    """
    good, bad = pairs["sentence_good"][:], pairs["sentence_bad"][:]
    likelihoods = pseudo_log_likelihoods(model, tokenizer, [*good, *bad], progress=progress, **how)
    of_good, of_bad = np.split(likelihoods, 2)
    paradigm_of_pair = np.asarray(pairs["UID"][:], dtype=str)
    terms = dict(zip(pairs["UID"][:], pairs["linguistics_term"][:], strict=True))
    paradigms, phenomena = {}, {}
    for name in sorted(terms):
        paradigms[name] = float((of_good > of_bad)[paradigm_of_pair == name].mean())
        phenomenon = SAME_PHENOMENON.get(terms[name], terms[name])
        phenomena.setdefault(phenomenon, []).append(paradigms[name])
    return {
        "accuracy": float(np.mean(list(paradigms.values()))),
        "phenomena": {name: float(np.mean(values)) for name, values in sorted(phenomena.items())},
        "paradigms": paradigms,
        "pairs": len(pairs),
        "ties": int((of_good == of_bad).sum()),
    }
