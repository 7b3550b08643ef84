"""The linear baseline: what it counts of Chinese and English, that it learns, and what it refuses."""

from __future__ import annotations

import numpy as np
import pytest

from bimo.errors import UsageError
from bimo.evaluation.linear import LinearClassifier, features

SPAM = [
    "Win a FREE prize now!",
    "恭喜您中奖，点击领取",
    "Claim your cash prize!!",
    "免费领取大奖，立即点击",
    "FREE entry, text WIN",
]
HAM = [
    "See you at lunch tomorrow",
    "明天下午开会别迟到",
    "Can you call me later?",
    "我到家了，晚上吃什么",
    "Thanks for the notes",
]


def test_words_signs_pairs_and_chinese_characters_count() -> None:
    assert features("Win now! Now") == ["win", "now", "!", "now", "win now", "now !", "! now"]
    found = features("毛笔很好")
    assert {"毛笔", "毛+笔", "笔+很", "很+好"} <= set(found)
    assert features("") == features(" \n") == []
    assert features("🦊") == ["🦊"]


def test_it_learns_both_languages_and_says_how_sure_it_is() -> None:
    texts, classes = SPAM * 2 + HAM * 2, ["垃圾"] * 10 + ["ham"] * 10
    linear = LinearClassifier.fit(texts, classes)
    told = linear(["claim a free prize", "点击领取大奖", "call me tomorrow", "明天晚上吃什么", ""])
    assert [one.label for one in told[:4]] == ["垃圾", "垃圾", "ham", "ham"]
    chances = linear.probabilities(["claim a free prize", "点击领取大奖"])
    assert linear.labels == ("ham", "垃圾") and np.allclose(chances.sum(1), 1)
    assert [one.probability for one in told[:2]] == pytest.approx(chances[:, 1].tolist())
    again = LinearClassifier.fit(texts, classes)
    assert again.strength == linear.strength and np.array_equal(again.probabilities(texts), linear.probabilities(texts))
    assert linear([]) == []


def test_it_is_scikit_learns_own_pipeline() -> None:
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    texts, classes = [*SPAM, *HAM[:2], "third"], ["a"] * 5 + ["b"] * 2 + ["c"]
    linear = LinearClassifier.fit(texts, classes)
    assert linear.strength == 10  # classes of one or two texts cannot be divided
    vectorizer = TfidfVectorizer(analyzer=features, sublinear_tf=True, dtype=np.float32)
    theirs = make_pipeline(vectorizer, LogisticRegression(C=10, max_iter=1000)).fit(texts, classes)
    assert np.allclose(linear.probabilities(HAM), theirs.predict_proba(HAM))


@pytest.mark.parametrize(
    ("texts", "classes", "said"),
    [
        (["a", "b"], ["x", "x"], "two classes or more are needed, these have 1"),
        ([], [], "these have 0"),
        (["a"], ["x", "y"], "1 texts have 2 classes"),
        (["", " "], ["x", "y"], "no words to learn from"),
    ],
)
def test_mistakes_are_named(texts: list[str], classes: list[str], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        LinearClassifier.fit(texts, classes)
