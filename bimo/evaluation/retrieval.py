"""How well the right passage is found among all: recall, reciprocal rank and nDCG, language by language.

    pairs = read_pairs(Path("held-out.jsonl"))                    # a title and its passage, a question and its answer
    with Embedder.load("runs/embed/model") as after, Embedder.load("runs/bert/model") as before:
        table = evaluate_retrieval({"bm25": Bm25, "before": dense(before), "after": dense(after)}, pairs)
    print("\\n".join(table.lines()))
    table.gain("before", "after", "zh", "recall@5")               # and its interval, over the same queries

    recall@k = relevant passages among the first k / relevant passages
    MRR      = 1 / rank of the first relevant passage
    nDCG@10  = Σ 1 / log2(1 + rank) over relevant passages of rank <= 10 / the best such sum

each a mean over queries. All passages are the pool of every query, those of other languages too. A passage ranks behind
the others of its score, so a model for which all texts are alike finds nothing. Intervals are of 95 %, by bootstrap of
the queries.

Anything that scores passages is measured alike: given all passages, it returns what maps queries to scores (Q, P).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from bimo.backends.embedding import Embedder
from bimo.data.language import identify
from bimo.errors import UsageError
from bimo.evaluation.pairs import Pair
from bimo.evaluation.translation_baselines import split_words

__all__ = ["METRICS", "Bm25", "Interval", "Ranker", "RetrievalScore", "RetrievalTable", "dense", "evaluate_retrieval"]

RECALLS, DEPTH = (1, 5, 10), 10
METRICS = (*(f"recall@{k}" for k in RECALLS), "MRR", f"nDCG@{DEPTH}")
NUM_BOOTSTRAP, SEED = 1000, 12345
SCORES_AT_ONCE = 1 << 23  # 32 MB in float32

Scores = NDArray[np.float32]
Scorer = Callable[[Sequence[str]], Scores]  # queries -> (Q, P)
Ranker = Callable[[Sequence[str]], Scorer]  # all passages -> their scorer


class Interval(NamedTuple):
    """A mean and its 95 % interval."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class RetrievalScore:
    """Of one ranker, over the queries of one language. metrics: by the names of METRICS, 0 to 1, higher is better.
    each: (Q, metrics), a query's own."""

    name: str
    language: str
    num_queries: int
    metrics: Mapping[str, Interval]
    each: NDArray[np.float64] = field(repr=False, compare=False)


@dataclass(frozen=True, kw_only=True)
class RetrievalTable:
    """All rankers over the same queries. languages: those of the queries, the most frequent first."""

    scores: tuple[RetrievalScore, ...]
    languages: tuple[str, ...]
    num_passages: int

    def score(self, name: str, language: str) -> RetrievalScore:
        """Raises KeyError for what was not measured."""
        return {(score.name, score.language): score for score in self.scores}[name, language]

    def gain(self, before: str, after: str, language: str, metric: str) -> Interval:
        """By how much `after` is better, query by query: the interval is narrower than those of both would say."""
        column = METRICS.index(metric)
        first, second = (self.score(name, language).each[:, column] for name in (before, after))
        return _intervals((second - first)[:, None])[0]

    def lines(self) -> list[str]:
        """For people: a head, a line a language and ranker."""
        width = max(len("RANKER"), *(len(score.name) for score in self.scores))
        head = "  ".join(["LANGUAGE", "QUERIES", "RANKER".ljust(width), *(name.rjust(17) for name in METRICS)])
        rows = []
        for score in self.scores:
            cells = (f"{value.mean:.3f} {value.low:.2f}-{value.high:.2f}".rjust(17) for value in score.metrics.values())
            start = [score.language.ljust(8), str(score.num_queries).rjust(7), score.name.ljust(width)]
            rows.append("  ".join([*start, *cells]))
        return [head, *rows, f"among {self.num_passages} passages"]


def evaluate_retrieval(
    rankers: Mapping[str, Ranker], pairs: Sequence[Pair], *, passages: Sequence[str] = ()
) -> RetrievalTable:
    """Ask for every source of `pairs`; its targets are what should be found.

    A text counts once, as a query and as a passage: a source of several pairs has several relevant passages. passages:
    more of them, which nobody asks for. The language is that of a query with its first passage (a title alone is often
    too short to tell). Raises UsageError for no pairs, no rankers, and scores that are not numbers.
    """
    if not pairs or not rankers:
        raise UsageError(f"there are no {'rankers' if pairs else 'pairs'}: give at least one", "pairs")
    places: dict[str, int] = {}
    relevant: dict[str, set[int]] = {}
    for query, passage in pairs:
        relevant.setdefault(query, set()).add(places.setdefault(passage, len(places)))
    for passage in passages:
        places.setdefault(passage, len(places))
    pool, queries = list(places), list(relevant)
    spoken = np.array([identify(f"{query}\n{pool[min(found)]}") for query, found in relevant.items()])
    names, counts = np.unique(spoken, return_counts=True)
    languages = tuple(str(name) for name in names[np.argsort(-counts, kind="stable")])
    wanted = list(relevant.values())
    each = {name: _measure(name, ranker(pool), queries, wanted, len(pool)) for name, ranker in rankers.items()}
    scores = []
    for language in languages:
        for name, values in each.items():
            own = values[spoken == language]
            metrics = dict(zip(METRICS, _intervals(own), strict=True))
            scores.append(RetrievalScore(name=name, language=language, num_queries=len(own), metrics=metrics, each=own))
    return RetrievalTable(scores=tuple(scores), languages=languages, num_passages=len(pool))


def dense(embedder: Embedder, *, query_prefix: str = "", passage_prefix: str = "") -> Ranker:
    """Cosines of embeddings; texts longer than the model reads are cut. The prefixes are those it was trained with."""

    def ranker(passages: Sequence[str]) -> Scorer:
        vectors = embedder.embed(passages, prefix=passage_prefix).vectors
        return lambda queries: embedder.embed(queries, prefix=query_prefix).vectors @ vectors.T

    return ranker


class Bm25:
    """Words in common, rare ones and those of short passages first (Robertson and Zaragoza 2009); no model at all.

        Σ over the query's words  idf(w) · tf · (k1 + 1) / (tf + k1 · (1 - b + b · length / mean length))
        idf(w) = ln(1 + (P - df + 0.5) / (df + 0.5))

    Words are lower-case runs of letters and digits, and what jieba cuts Chinese into.
    """

    def __init__(self, passages: Sequence[str], *, k1: float = 1.5, b: float = 0.75) -> None:
        from sklearn.feature_extraction.text import CountVectorizer

        self._counter = CountVectorizer(analyzer=_words)
        try:
            counts = self._counter.fit_transform(passages).astype(np.float64).tocsr()
        except ValueError:  # not one word in all of them
            counts = self._counter.fit([*passages, "word"]).transform(passages).astype(np.float64).tocsr()
        lengths = np.asarray(counts.sum(1)).ravel()
        frequency = np.bincount(counts.indices, minlength=counts.shape[1])
        idf = np.log1p((len(passages) - frequency + 0.5) / (frequency + 0.5))
        norm = k1 * (1 - b + b * lengths / max(1e-9, lengths.mean()))
        rows = np.repeat(np.arange(len(passages)), np.diff(counts.indptr))
        counts.data *= (k1 + 1) / (counts.data + norm[rows]) * idf[counts.indices]
        self._weights = counts

    def __call__(self, queries: Sequence[str]) -> Scores:
        found: Scores = (self._counter.transform(queries) @ self._weights.T).toarray().astype(np.float32)
        return found


def _words(text: str) -> list[str]:
    return [word for word in split_words(text.lower()) if any(map(str.isalnum, word))]


def _measure(
    name: str, scorer: Scorer, queries: Sequence[str], relevant: Sequence[set[int]], num_passages: int
) -> NDArray[np.float64]:
    """(Q, metrics)."""
    step, found = max(1, SCORES_AT_ONCE // num_passages), []
    for start in range(0, len(queries), step):
        scores = scorer(queries[start : start + step])
        if not np.isfinite(scores).all():
            raise UsageError(f"{name} gives scores that are not numbers: look at its model", "rankers")
        found += [_figures(row, sorted(right)) for row, right in zip(scores, relevant[start:], strict=False)]
    return np.array(found)


def _figures(scores: Scores, relevant: list[int]) -> list[float]:
    """Of one query: its scores (P,), and the passages that belong to it."""
    own = np.sort(scores[relevant])[::-1]
    others = np.sort(np.delete(scores, relevant))
    before = len(others) - np.searchsorted(others, own, side="left")  # those of equal score, too
    ranks = before + np.arange(1, len(own) + 1)
    gains = 1 / np.log2(1 + ranks[ranks <= DEPTH])
    best = 1 / np.log2(1 + np.arange(1, min(len(own), DEPTH) + 1))
    recalls = [float((ranks <= k).mean()) for k in RECALLS]
    return [*recalls, float(1 / ranks[0]), float(gains.sum() / best.sum())]


def _intervals(each: NDArray[np.float64]) -> list[Interval]:
    """Of each column of (Q, metrics)."""
    draws = np.random.default_rng(SEED)
    means = np.array([each[draws.integers(0, len(each), len(each))].mean(0) for _ in range(NUM_BOOTSTRAP)])
    low, high = np.percentile(means, (2.5, 97.5), axis=0)
    return [Interval(*map(float, column)) for column in zip(each.mean(0), low, high, strict=True)]
