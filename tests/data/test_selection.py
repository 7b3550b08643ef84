"""Ranking of unlabelled texts: each method against its definition written out, copies, hostile numbers, large pools."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from bimo.data.selection import METHODS, rank
from bimo.errors import UsageError


def some(count: int, classes: int = 3, width: int = 5, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    draws = np.random.default_rng(seed)
    return draws.dirichlet(np.full(classes, 0.5), count), draws.normal(size=(count, width))


@pytest.mark.parametrize("method", METHODS)
def test_every_method_gives_different_rows_and_the_same_again(method: str) -> None:
    chances, vectors = some(40)
    order = rank(chances, vectors, 40, method, seed=3)
    assert order.dtype == np.int64 and sorted(order.tolist()) == list(range(40))
    assert rank(chances, vectors, 12, method, seed=3).tolist() == order[:12].tolist()
    assert rank(chances, vectors, 0, method).tolist() == []


def test_uncertainty_is_by_its_formula() -> None:
    chances, _ = some(50)
    ordered = np.sort(chances, 1)
    margins = (ordered[:, -1] - ordered[:, -2]).argsort(kind="stable")
    assert rank(chances, None, 9, "margin").tolist() == margins[:9].tolist()
    entropies = (-(chances * np.log(chances)).sum(1)).argsort(kind="stable")[::-1]
    assert rank(chances, None, 9, "entropy").tolist() == entropies[:9].tolist()
    sure = np.array([[1.0, 0.0], [0.5, 0.5], [0.0, 1.0]])
    assert rank(sure, None, 1, "entropy").tolist() == rank(sure, None, 1, "margin").tolist() == [1]


def test_k_centre_is_farthest_first() -> None:
    chances, vectors = some(60)
    order = [int(((vectors - vectors.mean(0)) ** 2).sum(1).argmin())]
    while len(order) < 10:
        distances = [min(float(((vectors[row] - vectors[one]) ** 2).sum()) for one in order) for row in range(60)]
        order.append(int(np.argmax(distances)))
    assert rank(chances, vectors, 10, "diversity").tolist() == order


def test_badge_is_k_means_plus_plus_over_gradients_written_out() -> None:
    chances, vectors = some(30)
    slopes = chances.copy()
    slopes[np.arange(30), chances.argmax(1)] -= 1
    gradients = np.einsum("nc,nd->ncd", slopes, vectors).reshape(30, -1)
    draws = np.random.default_rng(7)
    order = [int((gradients**2).sum(1).argmax())]
    while len(order) < 8:
        distances = ((gradients[:, None] - gradients[order]) ** 2).sum(-1).min(1)
        order.append(int(np.searchsorted(np.cumsum(distances), draws.random() * distances.sum(), side="right")))
    assert rank(chances, vectors, 8, seed=7).tolist() == order


def test_badge_prefers_the_unsure_and_takes_no_copies() -> None:
    """Three in four texts are sure, and all come in ten copies. Gradients of sure texts are alike, as all are nearly 0:
    one may stand for them."""
    vectors = np.repeat(np.random.default_rng(0).normal(size=(20, 4)), 10, 0)
    chances = np.tile([0.999, 0.001], (200, 1))
    chances[:50] = [0.55, 0.45]
    order = rank(chances, vectors, 5)
    assert (order < 50).sum() >= 4 and len(set((order // 10).tolist())) == 5
    assert len(set((rank(chances, vectors, 5, "margin") // 10).tolist())) == 1


@pytest.mark.parametrize("method", METHODS)
def test_when_all_are_the_same_there_are_still_different_rows(method: str) -> None:
    order = rank(np.full((7, 2), 0.5), np.ones((7, 3)), 7, method)
    assert sorted(order.tolist()) == list(range(7))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"method": "best"}, r"method is one of uncertainty\+diversity, margin, .* not 'best'"),
        ({"count": 5}, "count must be from 0 to 4"),
        ({"count": -1}, "count must be from 0 to 4"),
        ({"probabilities": np.full((4, 2), np.nan)}, "sum to 1"),
        ({"probabilities": np.full((4, 2), 0.9)}, "sum to 1"),
        ({"probabilities": np.array([[1.5, -0.5]] * 4)}, "sum to 1"),
        ({"probabilities": np.ones((4, 1))}, "two classes or more"),
        ({"embeddings": None}, "there are none"),
        ({"embeddings": np.ones((3, 2))}, "there are 3"),
        ({"embeddings": np.full((4, 2), np.inf)}, "finite"),
    ],
)
def test_mistakes_are_named(change: dict[str, object], said: str) -> None:
    given = {"probabilities": np.full((4, 2), 0.5), "embeddings": np.ones((4, 2)), "count": 2, **change}
    with pytest.raises(UsageError, match=said):
        rank(**given)  # type: ignore[arg-type]


def test_an_empty_pool_is_ranked_as_nothing() -> None:
    assert rank(np.zeros((0, 2)), np.zeros((0, 3)), 0).tolist() == []


def test_a_hundred_thousand_texts_take_memory_of_their_own_size() -> None:
    chances, vectors = some(100_000, 4, 32)
    tracemalloc.start()
    assert len(set(rank(chances, vectors, 20).tolist())) == 20
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * vectors.nbytes  # gradients, 4 x 32 numbers a text, or all distances would be more
