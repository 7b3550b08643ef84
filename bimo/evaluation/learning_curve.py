"""What another labelled text is worth, and whether choosing it is better than chance (active learning).

    def train_and_score(chosen, seed):                     # the pool's numbers; trains anew, scores on a held-out set
        classifier = ...
        return Trained(score, lambda numbers: classifier.read([texts[n] for n in numbers]))

    points = learning_curve(train_and_score, len(texts), (50, 100, 200), ("random", "uncertainty+diversity"), (0, 1, 2))
    print("\\n".join(curve_lines(points)))

All methods begin with the same random texts of a seed; then each model ranks what is left of the pool (data.selection),
the first are labelled, and a new model learns from all. Nothing of the held-out set is ever ranked.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from bimo.data.selection import METHODS, rank
from bimo.errors import UsageError
from bimo.evaluation.classification import Readings

__all__ = ["CurvePoint", "Trained", "curve_lines", "learning_curve"]

# Student's t for an interval of 95 %, by degrees of freedom; beyond them the normal distribution's is near enough.
T95 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)

Numbers = NDArray[np.int64]


class Trained(NamedTuple):
    """What came of a training. score: on the held-out set. read: (probabilities, embeddings) of texts of the pool."""

    score: float
    read: Callable[[Numbers], Readings]


@dataclass(frozen=True)
class CurvePoint:
    """The score with `count` texts that were chosen by `method`, of one seed."""

    method: str
    count: int
    seed: int
    score: float


def learning_curve(
    train_and_score: Callable[[Numbers, int], Trained],
    pool: int,
    counts: Sequence[int],
    methods: Sequence[str],
    seeds: Sequence[int],
) -> list[CurvePoint]:
    """A point for every seed, method and count.

    Args:
        train_and_score: (numbers of labelled texts of the pool, seed) -> what came of it.
        pool: how many texts there are. counts: labelled in each round, ascending.

    Raises UsageError for unknown methods, and counts that do not ascend or are more than the pool has.
    """
    if not counts or list(counts) != sorted(set(counts)) or not 0 < counts[0] <= counts[-1] <= pool:
        raise UsageError(f"counts must ascend from 1 to {pool}, the texts there are, not {list(counts)}", "counts")
    if unknown := [method for method in methods if method not in METHODS]:
        raise UsageError(f"methods are {', '.join(METHODS)}, not {unknown[0]!r}", "methods")
    points = []
    for seed in seeds:
        begin = np.sort(np.random.default_rng(seed).permutation(pool)[: counts[0]])
        first = train_and_score(begin, seed)
        for method in methods:
            chosen, trained = begin, first
            points.append(CurvePoint(method, counts[0], seed, trained.score))
            for count in counts[1:]:
                rest = np.setdiff1d(np.arange(pool), chosen)
                order = rank(*trained.read(rest), count - len(chosen), method, seed=seed)
                chosen = np.sort(np.concatenate((chosen, rest[order])))
                trained = train_and_score(chosen, seed)
                points.append(CurvePoint(method, count, seed, trained.score))
    return points


def curve_lines(points: Sequence[CurvePoint]) -> list[str]:
    """A table: for each count the mean over the seeds of each method, and half of its 95 % interval."""
    methods = list(dict.fromkeys(point.method for point in points))
    widths = [max(16, len(method)) for method in methods]
    lines = ["  ".join(["TEXTS".rjust(7), *(f"{name:>{width}}" for name, width in zip(methods, widths, strict=True))])]
    for count in sorted({point.count for point in points}):
        cells = [f"{count:7,}"]
        for method, width in zip(methods, widths, strict=True):
            found = [point.score for point in points if (point.method, point.count) == (method, count)]
            cells.append(f"{_with_interval(found):>{width}}")
        lines.append("  ".join(cells))
    return lines


def _with_interval(scores: Sequence[float]) -> str:
    if len(scores) < 2:
        return f"{scores[0]:.4f}" if scores else ""
    factor = T95[len(scores) - 2] if len(scores) - 2 < len(T95) else 1.96
    return f"{np.mean(scores):.4f} ±{factor * np.std(scores, ddof=1) / math.sqrt(len(scores)):.4f}"
