"""What a model has to beat on a task: the commonest answer, and words counted without order."""

import re
from collections import Counter, defaultdict
from itertools import chain
from types import SimpleNamespace

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression

from .labels import names_in
from .scoring import METRICS, check_metric, score

IDEOGRAPHS = re.compile("[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]")


def majority_prediction(train_labels):
    """The commonest training label."""
    values, counts = np.unique(train_labels, return_counts=True)
    return values[counts.argmax()]


def tfidf_predictions(train_texts, train_labels, texts):
    """Labels of `texts` by logistic regression on TF-IDF of words and word pairs.

    Of characters up to triples in Chinese, Japanese, Korean. scikit-learn's defaults apart from sublinear counts and
    C = 10, which suits tf-idf's small values.
    """
    sample = "".join(train_texts[:200])
    by_character = len(IDEOGRAPHS.findall(sample)) > 0.2 * max(len(sample), 1)
    grams = {"analyzer": "char", "ngram_range": (1, 3)} if by_character else {"ngram_range": (1, 2)}
    vectorizer = TfidfVectorizer(sublinear_tf=True, min_df=2 if len(train_texts) > 1000 else 1, **grams)
    classifier = LogisticRegression(C=10, max_iter=1000)
    classifier.fit(vectorizer.fit_transform(train_texts), train_labels)
    return classifier.predict(vectorizer.transform(texts))


def baselines_of_task(task, train, validation, metric):
    """{name: score} of what a model has to beat on a task (of finetune.py), by the same metric.

    Labels of texts: the commonest, and logistic regression on TF-IDF. Numbers for pairs: the cosine of their TF-IDF
    vectors (not trained). Labels of words: the commonest, and the commonest of each word. Others have none.

    Raises:
        ValueError: the metric is none of a task with such labels.
    """
    several = getattr(task, "multi_label", False) or getattr(task, "is_chunks", False)
    check_metric(metric, METRICS[task.name][several], f"the labels of this {task.name}")
    if task.name == "text-classification" and not task.multi_label:
        labels, wanted = np.array(task.targets(train)), np.array(task.targets(validation))
        texts, others = (_joined(task, rows) for rows in (train, validation))
        predictions = {
            "majority": np.full(len(wanted), majority_prediction(labels)),
            "tfidf_logistic_regression": tfidf_predictions(texts, labels, others),
        }
        compute = task.compute_metrics(validation, {"example": np.arange(len(wanted))})
        one_hot = np.eye(len(task.label_names))
        return {name: compute(SimpleNamespace(predictions=one_hot[p]))[metric] for name, p in predictions.items()}
    if task.name == "text-regression" and len(task.text_columns) == 2:
        vectorizer = TfidfVectorizer(sublinear_tf=True).fit(list(task.texts(train)))
        sides = [vectorizer.transform([text or "" for text in validation[column]]) for column in task.text_columns]
        cosine = np.asarray(sides[0].multiply(sides[1]).sum(1)).reshape(-1)
        return {"tfidf_cosine": score(metric, cosine, task.targets(validation))[metric]}
    if task.name == "token-classification":
        return _word_baselines(task, train, validation, metric)
    return {}


def _joined(task, rows):
    return [" ".join(str(row[column] or "") for column in task.text_columns) for row in rows]


def _word_baselines(task, train, validation, metric):
    def labelled(rows):
        return [list(zip(*row, strict=True)) for row in zip(rows[task.word_column], names_in(rows, task.label_column),
                                                            strict=True)]  # fmt: skip

    of_word, overall = defaultdict(Counter), Counter()
    for word, label in chain.from_iterable(labelled(train)):
        of_word[word][label] += 1
        overall[label] += 1
    commonest = overall.most_common(1)[0][0]
    best = {word: counts.most_common(1)[0][0] for word, counts in of_word.items()}
    rows = labelled(validation)
    answers = {
        "majority": [[commonest for _ in row] for row in rows],
        "commonest_of_each_word": [[best.get(word, commonest) for word, _ in row] for row in rows],
    }
    return {name: task.score(tags, validation)[metric] for name, tags in answers.items()}
