"""A learning curve: what is labelled when, and that choosing beats chance where it should."""

from __future__ import annotations

import numpy as np
import pytest

from bimo.errors import UsageError
from bimo.evaluation.classification import Readings
from bimo.evaluation.learning_curve import CurvePoint, Trained, curve_lines, learning_curve

NUM_TEXTS = 400
DRAWS = np.random.default_rng(0)
POINTS = DRAWS.normal(size=(NUM_TEXTS + 400, 2)) + np.array([1.2, 0])
CLASSES = (POINTS[:, 0] > 0).astype(int)


def regression(chosen: np.ndarray, seed: int) -> Trained:
    """scikit-learn's logistic regression on the plane, where only points near the border say where it is."""
    from sklearn.linear_model import LogisticRegression

    if len(set(CLASSES[chosen].tolist())) < 2:
        return Trained(0.5, lambda rows: Readings(np.full((len(rows), 2), 0.5, np.float32), POINTS[rows]))
    model = LogisticRegression(C=1000).fit(POINTS[chosen], CLASSES[chosen])
    held_out = slice(NUM_TEXTS, None)
    score = float(model.score(POINTS[held_out], CLASSES[held_out]))
    return Trained(score, lambda rows: Readings(model.predict_proba(POINTS[rows]), POINTS[rows]))


def test_rounds_grow_and_begin_alike() -> None:
    calls: list[tuple[int, list[int]]] = []

    def train(chosen: np.ndarray, seed: int) -> Trained:
        calls.append((seed, chosen.tolist()))
        return regression(chosen, seed)

    points = learning_curve(train, NUM_TEXTS, (10, 15, 40), ("random", "margin"), (0, 1))
    assert [(point.method, point.count, point.seed) for point in points] == [
        (method, count, seed) for seed in (0, 1) for method in ("random", "margin") for count in (10, 15, 40)
    ]
    assert [len(chosen) for _, chosen in calls] == [10, 15, 40, 15, 40] * 2  # the beginning is trained once
    for first in (0, 5):
        begin, *later = (set(chosen) for _, chosen in calls[first : first + 5])
        for small, large in zip(later[::2], later[1::2], strict=True):
            assert begin < small < large <= set(range(NUM_TEXTS))
    assert calls[0][1] != calls[5][1] and calls[1][1] != calls[3][1]
    assert points == learning_curve(regression, NUM_TEXTS, (10, 15, 40), ("random", "margin"), (0, 1))


def test_choosing_beats_chance_where_borders_are_rare() -> None:
    points = learning_curve(regression, NUM_TEXTS, (8, 14, 20), ("random", "margin", "uncertainty+diversity"), range(8))
    mean = {
        method: np.mean([point.score for point in points if (point.method, point.count) == (method, 20)])
        for method in ("random", "margin", "uncertainty+diversity")
    }
    assert mean["margin"] > mean["random"] and mean["uncertainty+diversity"] > mean["random"]


def test_the_table_has_means_and_intervals() -> None:
    points = [CurvePoint("random", 5, seed, score) for seed, score in enumerate((0.5, 0.6, 0.7))]
    lines = curve_lines([*points, CurvePoint("margin", 5, 0, 0.9)])
    assert lines[0].split() == ["TEXTS", "random", "margin"]
    assert lines[1].split() == ["5", "0.6000", "±0.2483", "0.9000"]  # 4.30 · 0.1 / √3


@pytest.mark.parametrize(
    ("counts", "methods", "said"),
    [
        ((), ("random",), "counts must ascend from 1 to 400"),
        ((5, 5), ("random",), "counts must ascend"),
        ((9, 3), ("random",), "counts must ascend"),
        ((0, 3), ("random",), "counts must ascend"),
        ((5, 401), ("random",), "counts must ascend"),
        ((5,), ("lucky",), "not 'lucky'"),
    ],
)
def test_mistakes_are_named(counts: tuple[int, ...], methods: tuple[str, ...], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        learning_curve(regression, NUM_TEXTS, counts, methods, (0,))
