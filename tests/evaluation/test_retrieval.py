"""Retrieval against scikit-learn and the formulas written out; copies, ties, several right answers, two languages."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import ndcg_score

from bimo.backends.embedding import Embedder
from bimo.errors import UsageError
from bimo.evaluation.pairs import Pair
from bimo.evaluation.retrieval import METRICS, Bm25, Ranker, dense, evaluate_retrieval
from tests.encoders import TEXTS, make_encoder

PAIRS = [
    Pair("How are ink sticks used?", TEXTS["en"][1]),
    Pair("Which paper drinks the ink?", TEXTS["en"][2]),
    Pair("What are seals pressed in?", TEXTS["en"][3]),
    Pair("毛笔怎么做？", TEXTS["zh"][0]),
    Pair("研磨墨条要用什么？", TEXTS["zh"][1]),
    Pair("宣纸为什么要快写？", TEXTS["zh"][2]),
    Pair("印章用什么颜色的印泥？", TEXTS["zh"][3]),
]


def fixed(scores: Sequence[Sequence[float]]) -> Ranker:
    """These scores, whatever the texts; queries are asked in their order."""
    rows = iter(scores)
    return lambda passages: lambda queries: np.array([next(rows) for _ in queries], np.float32)


def random_scores(num_queries: int, num_passages: int) -> np.ndarray:
    return np.random.default_rng(0).permuted(
        np.tile(np.arange(num_passages, dtype=np.float32), (num_queries, 1)), axis=1
    )


def test_figures_are_scikit_learns_and_the_formulas() -> None:
    """40 queries, 30 passages, one to three of them right."""
    draws = np.random.default_rng(1)
    right = [sorted(draws.choice(30, size=1 + n % 3, replace=False).tolist()) for n in range(40)]
    names = [f"第{n}段 passage {n}" for n in range(30)]
    pairs = [Pair(f"问 {n}", names[place]) for n, places in enumerate(right) for place in places]
    order = list(dict.fromkeys(pair.target for pair in pairs))  # the pool's
    pool = [*order, *(name for name in names if name not in order)]
    places = [[pool.index(names[place]) for place in some] for some in right]
    scores = random_scores(40, 30)
    table = evaluate_retrieval({"x": fixed(scores.tolist())}, pairs, passages=names)
    (language,) = table.languages
    found = table.score("x", language)
    assert table.num_passages == 30 and found.num_queries == 40
    ranks = [sorted(1 + sum(row > row[place]) for place in some) for row, some in zip(scores, places, strict=True)]
    for k in (1, 5, 10):
        expected = np.mean([sum(rank <= k for rank in some) / len(some) for some in ranks])
        assert found.metrics[f"recall@{k}"].mean == pytest.approx(expected)
    assert found.metrics["MRR"].mean == pytest.approx(np.mean([1 / some[0] for some in ranks]))
    truth = np.zeros((40, 30))
    for row, some in enumerate(places):
        truth[row, some] = 1
    assert found.metrics["nDCG@10"].mean == pytest.approx(ndcg_score(truth, scores, k=10))
    assert all(value.low <= value.mean <= value.high for value in found.metrics.values())


def test_intervals_are_those_of_a_share() -> None:
    """Of 400 queries half are found first: 0.5 ± 1.96 · sqrt(0.25 / 400)."""
    pairs = [Pair(f"问 {n}", f"段 {n}") for n in range(400)]
    scores = np.where(np.arange(400)[:, None] % 2 == 0, np.eye(400), 1 - np.eye(400))
    value = evaluate_retrieval({"x": fixed(scores.tolist())}, pairs).scores[0].metrics["recall@1"]
    assert value.mean == 0.5
    assert value.high - value.mean == pytest.approx(1.96 * math.sqrt(0.25 / 400), rel=0.15)
    assert value.mean - value.low == pytest.approx(1.96 * math.sqrt(0.25 / 400), rel=0.15)


def test_a_model_for_which_all_is_alike_finds_nothing() -> None:
    table = evaluate_retrieval({"alike": lambda passages: lambda queries: np.ones((len(queries), len(passages)))}, [
        Pair(f"问 {n}", f"段 {n}") for n in range(20)])  # fmt: skip
    found = {name: value.mean for name, value in table.scores[0].metrics.items()}
    assert found == pytest.approx({**dict.fromkeys(METRICS, 0.0), "MRR": 1 / 20})


def test_copies_count_once_and_a_query_may_have_several_passages() -> None:
    pairs = [Pair("笔", "竹"), Pair("笔", "毛"), Pair("墨", "黑"), Pair("墨", "黑")]
    table = evaluate_retrieval({"x": fixed([[3, 1, 2, 0], [0, 1, 2, 3]])}, pairs, passages=["黑", "纸"])
    score = table.scores[0]
    assert (score.num_queries, table.num_passages) == (2, 4)
    assert score.each[:, METRICS.index("recall@1")].tolist() == [0.5, 0.0]
    assert score.each[:, METRICS.index("MRR")].tolist() == [1.0, 0.5]
    assert score.each[0, METRICS.index("nDCG@10")] == pytest.approx((1 + 1 / 2) / (1 + 1 / math.log2(3)))


def test_bm25_is_the_formula() -> None:
    passages = ["the brush and the ink", "ink, Ink: INK!", "毛笔和墨水", "墨水写字，墨水画画", "", "🦊 !?"]
    queries = ["Ink brush brush", "墨水画画", "unseen 未见", "", "🦊"]
    words = [
        ["the", "brush", "and", "the", "ink"],
        ["ink"] * 3,
        ["毛笔", "和", "墨水"],
        ["墨水", "写字", "墨水", "画画"],
        [],
        [],
    ]
    asked = [["ink", "brush", "brush"], ["墨水", "画画"], [], [], []]
    mean = sum(map(len, words)) / len(words)
    expected = [
        [
            sum(
                math.log(1 + (6 - df + 0.5) / (df + 0.5))
                * some.count(word) * 2.5 / (some.count(word) + 1.5 * (0.25 + 0.75 * len(some) / mean))
                for word in query
                if (df := sum(word in other for other in words))
            )
            for some in words
        ]
        for query in asked
    ]  # fmt: skip
    np.testing.assert_allclose(Bm25(passages)(queries), expected, rtol=1e-5, atol=1e-6)
    assert not Bm25(["", "🦊"])(["word", "🦊"]).any()


def test_two_languages_apart_and_two_models_compared(tmp_path: Path) -> None:
    folder = make_encoder(tmp_path / "encoder")
    with Embedder.load(str(folder), dtype="float32") as embedder:
        table = evaluate_retrieval(
            {"bm25": Bm25, "encoder": dense(embedder), "prefixed": dense(embedder, query_prefix="query: ")},
            PAIRS,
            passages=[*TEXTS["en"], *TEXTS["zh"]],
        )
        vectors = [
            embedder.embed([pair[side] for pair in PAIRS if pair.target in TEXTS["zh"]]).vectors for side in (0, 1)
        ]
        pool = embedder.embed([*TEXTS["en"], *TEXTS["zh"]]).vectors
    assert table.languages == ("zh", "en") and table.num_passages == 10
    assert table.score("bm25", "en").metrics["recall@1"].mean == 1.0
    assert table.score("bm25", "zh").metrics["recall@5"].mean == 1.0
    own = (vectors[0] * vectors[1]).sum(1, keepdims=True)
    ranks = 1 + (vectors[0] @ pool.T > own + 1e-6).sum(1)
    assert table.score("encoder", "zh").metrics["MRR"].mean == pytest.approx((1 / ranks).mean())
    gain = table.gain("encoder", "bm25", "zh", "MRR")
    means = [table.score(name, "zh").metrics["MRR"].mean for name in ("encoder", "bm25")]
    assert gain.mean == pytest.approx(means[1] - means[0]) and gain.low <= gain.mean <= gain.high
    assert table.gain("bm25", "bm25", "en", "recall@1") == (0, 0, 0)
    lines = table.lines()
    assert len(lines) == 1 + 2 * 3 + 1 and "recall@5" in lines[0] and lines[1].startswith("zh")
    assert len({len(line) for line in lines[:-1]}) == 1
    with pytest.raises(KeyError):
        table.score("encoder", "de")


@pytest.mark.parametrize(
    ("rankers", "pairs", "said"),
    [
        ({"x": Bm25}, [], "no pairs"),
        ({}, PAIRS, "no rankers"),
        ({"x": lambda passages: lambda queries: np.full((len(queries), len(passages)), np.nan)}, PAIRS, "not numbers"),
    ],
)
def test_what_cannot_be_measured(rankers: dict[str, Ranker], pairs: list[Pair], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        evaluate_retrieval(rankers, pairs)
