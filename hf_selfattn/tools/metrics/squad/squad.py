"""Exact match and token F1 of answers, as in SQuAD (Rajpurkar et al. 2016), each the best over a question's answers.

English is compared as the official script does: lower case, without punctuation and articles. A Chinese, Japanese or
Korean character counts as a token of its own, as in CMRC 2018 (Cui et al. 2019); English texts are not touched by it.
"""

import collections
import re
import string

import datasets
import evaluate

CJK = "\u2e80-\u9fff\uac00-\ud7af\uf900-\ufaff\U00020000-\U0003134f"
PUNCTUATION = set(string.punctuation) | set("，。：？！“”；’《》……·、（）「」『』【】〈〉—‘")


def answer_tokens(text):
    """The tokens by which answers are compared."""
    text = "".join(character for character in text.lower() if character not in PUNCTUATION)
    text = re.sub(r"\b(a|an|the)\b", " ", text)
    return re.sub(f"([{CJK}])", r" \1 ", text).split()


def exact_match(prediction, answer):
    return float(answer_tokens(prediction) == answer_tokens(answer))


def token_f1(prediction, answer):
    ours, theirs = answer_tokens(prediction), answer_tokens(answer)
    if not ours or not theirs:
        return float(ours == theirs)
    common = sum((collections.Counter(ours) & collections.Counter(theirs)).values())
    return 2 * common / (len(ours) + len(theirs))


class Squad(evaluate.Metric):
    """{'exact_match', 'f1': from 0 to 100}"""

    def _info(self):
        return evaluate.MetricInfo(
            description=__doc__,
            citation="",
            inputs_description="predictions: an answer a question; references: the list of right answers, empty where "
            "the text holds none.",
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.List(datasets.Value("string"))}
            ),
        )

    def _compute(self, predictions, references):
        totals = {"exact_match": 0.0, "f1": 0.0}
        for prediction, answers in zip(predictions, references, strict=True):
            answers = answers or [""]
            totals["exact_match"] += max(exact_match(prediction, answer) for answer in answers)
            totals["f1"] += max(token_f1(prediction, answer) for answer in answers)
        return {name: 100 * total / len(predictions) for name, total in totals.items()}
