import pytest

from hf_selfattn.tools.baselines import majority_prediction, tfidf_predictions


def test_majority():
    assert majority_prediction([0, 1, 1, 2]) == 1


@pytest.mark.parametrize(
    ("train", "texts"),
    [
        (["good film", "bad film", "very good", "so bad"] * 5, ["good", "bad day", "bad"]),
        (["这个很好吃", "太差了真难吃", "很好", "真差"] * 5, ["很好吃的", "难吃太差", "差"]),
    ],
)
def test_tfidf_learns_words_and_characters(train, texts):
    assert tfidf_predictions(train, [1, 0, 1, 0] * 5, texts).tolist() == [1, 0, 0]
