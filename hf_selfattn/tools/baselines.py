"""What a text classifier has to beat: the commonest class, and words counted without order."""

import re

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression

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
