"""What a linear model makes of the same texts: the baseline beside any classifier, in seconds and without a GPU.

    linear = LinearClassifier.fit(texts, classes)
    told = linear(["win a prize now", "明天见"])           # [Told(label="spam", probability=0.97), ...]

TF-IDF and logistic regression (scikit-learn). Features are words and pairs of neighbouring words; of Chinese, which has
no spaces, the words that jieba finds and all pairs of characters, so that a word it cut wrongly still counts. Texts of
both languages need no setting.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bimo.errors import UsageError
from bimo.evaluation.classification import Told
from bimo.objectives.masked import HAN_TEXT

__all__ = ["LinearClassifier", "features"]

RUNS = re.compile(rf"{HAN_TEXT.pattern}|\w+|[^\w\s]")
STRENGTHS = (1.0, 10.0, 100.0)  # C, how freely the weights may follow the texts
FOLDS = 3


class LinearClassifier:
    """labels: the classes, in the order of the probabilities. strength: C of the regression."""

    def __init__(self, vectorizer: Any, regression: Any, strength: float) -> None:
        self._vectorizer, self._regression, self.strength = vectorizer, regression, strength
        self.labels: tuple[str, ...] = tuple(map(str, regression.classes_))

    @classmethod
    def fit(cls, texts: Sequence[str], classes: Sequence[str], *, seed: int = 0) -> LinearClassifier:
        """Learn from texts and their classes. The strength is the best of three by cross-validation, where every class
        has enough texts for it. Raises UsageError for fewer than two classes, and texts without a word."""
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.linear_model import LogisticRegression
        from sklearn.model_selection import GridSearchCV, StratifiedKFold

        if len(texts) != len(classes):
            raise UsageError(f"{len(texts)} texts have {len(classes)} classes: each needs one")
        counts = Counter(classes)
        if len(counts) < 2:
            raise UsageError(f"texts of two classes or more are needed, these have {len(counts)}")
        vectorizer = TfidfVectorizer(analyzer=features, sublinear_tf=True, dtype=np.float32)
        try:
            rows = vectorizer.fit_transform(texts)
        except ValueError:  # an empty vocabulary
            raise UsageError("the texts have no words to learn from: they are all empty") from None
        regression, strength = LogisticRegression(C=STRENGTHS[1], max_iter=1000), STRENGTHS[1]
        if min(counts.values()) >= FOLDS:
            folds = StratifiedKFold(FOLDS, shuffle=True, random_state=seed)
            search = GridSearchCV(regression, {"C": STRENGTHS}, cv=folds, scoring="accuracy").fit(rows, classes)
            regression, strength = search.best_estimator_, float(search.best_params_["C"])
        else:
            regression.fit(rows, classes)
        return cls(vectorizer, regression, strength)

    def probabilities(self, texts: Iterable[str]) -> NDArray[np.float64]:
        """(N, C), a row sums to 1."""
        texts = list(texts)
        if not texts:
            return np.zeros((0, len(self.labels)))
        return np.asarray(self._regression.predict_proba(self._vectorizer.transform(texts)), np.float64)

    def __call__(self, texts: Iterable[str]) -> list[Told]:
        """The likeliest class of each text."""
        chances = self.probabilities(texts)
        return [Told(self.labels[row.argmax()], float(row.max())) for row in chances]


def features(text: str) -> list[str]:
    """What a text is counted by, see above; signs too, as spam has many of them."""
    import jieba  # type: ignore[import-untyped]

    jieba.setLogLevel("WARNING")
    words: list[str] = []
    pairs: list[str] = []
    for run in RUNS.findall(text.casefold()):
        if HAN_TEXT.fullmatch(run):
            words += jieba.lcut(run, HMM=False)
            pairs += [f"{one}+{two}" for one, two in pairwise(run)]
        else:
            words.append(run)
    return words + pairs + [f"{one} {two}" for one, two in pairwise(words)]
