"""Scores under noise are those of the noisy documents, with the interval a textbook gives."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
from scipy import stats

from bimo.data.noise import Noise, question_of
from bimo.data.records import Document, Message
from bimo.errors import UsageError
from bimo.evaluation.robustness import Interval, mean_interval, noisy_scores

ENGLISH = [
    Document(f"please open the large window of house number {n} now", f"en{n}", "s", label="x") for n in range(20)
]
CHINESE = [
    Document("", f"zh{n}", "s", messages=(Message("user", "请问今天的天气怎么样"), Message("assistant", "很好")))
    for n in range(4)
]


def length(documents: Sequence[Document]) -> dict[str, float]:
    texts = [question_of(document) for document in documents]
    return {"words": float(np.mean([len(text.split()) for text in texts])), "chars": float(np.mean([*map(len, texts)]))}


def test_rows_are_the_scores_of_noisy_documents() -> None:
    shares = (0.2, 0, 0.1)
    table = noisy_scores(length, ENGLISH, shares=shares, kinds=("dropped", "typos"), seeds=4, seed=7)
    assert [(row.kind, row.share) for row in table.rows] == [
        ("clean", 0), ("dropped", 0.1), ("dropped", 0.2), ("typos", 0.1), ("typos", 0.2)
    ]  # fmt: skip
    clean, first, *_ = table.rows
    assert clean.scores["words"].mean == 10 and math.isnan(clean.scores["words"].half) and clean.changed == 0
    runs = [length([Noise("dropped", 0.1, seed).document(d) for d in ENGLISH])["words"] for seed in range(7, 11)]
    low, high = stats.t.interval(0.95, 3, np.mean(runs), stats.sem(runs))
    assert first.scores["words"].mean == pytest.approx(np.mean(runs))
    assert first.scores["words"].half == pytest.approx((high - low) / 2)
    assert 0.5 < first.changed <= 1
    assert table.rows[2].scores["words"].mean < first.scores["words"].mean < 10
    assert table.rows[4].scores["words"] == Interval(10.0, 0.0)  # typos lose no words
    assert table == noisy_scores(length, ENGLISH, shares=shares, kinds=("dropped", "typos"), seeds=4, seed=7)


def test_noise_that_does_not_suit_is_seen_in_the_table() -> None:
    table = noisy_scores(length, CHINESE, shares=[0.5], kinds=["typos", "dropped"], seeds=2)
    typos, lost = table.rows
    assert typos.changed == 0 and lost.changed == 1
    assert lost.scores["chars"].mean < typos.scores["chars"].mean == 10


def test_lines_are_a_table() -> None:
    def score(documents: Sequence[Document]) -> dict[str, float]:
        return {"accuracy": 0.75, "f1": float("nan")}

    lines = noisy_scores(score, ENGLISH, shares=(0, 0.2), kinds=["typos"], seeds=2).lines()
    assert lines[0].split() == ["NOISE", "WORDS", "CHANGED", "accuracy", "f1"]
    assert lines[1].split() == ["clean", "0%", "0%", "0.7500", "nan"]
    assert lines[2].split() == ["typos", "20%", "100%", "0.7500", "±0.0000", "nan"]
    assert {line.index("0.7500") for line in lines[1:]} == {lines[1].index("0.7500")}


def test_progress_counts_every_scoring() -> None:
    seen: list[tuple[int, int]] = []
    noisy_scores(
        length, ENGLISH[:2], kinds=["typos"], seeds=2, progress=lambda label, done, total: seen.append((done, total))
    )
    assert seen == [(done, 7) for done in range(8)]


def test_intervals_are_students() -> None:
    values = [0.81, 0.79, 0.84]
    low, high = stats.t.interval(0.95, 2, np.mean(values), stats.sem(values))
    assert mean_interval(values).half == pytest.approx((high - low) / 2)
    assert mean_interval([0.5]).mean == 0.5 and math.isnan(mean_interval([0.5]).half)
    with pytest.raises(UsageError, match="at least one value"):
        mean_interval([])


def test_what_cannot_be_measured_is_told() -> None:
    with pytest.raises(UsageError, match="no documents"):
        noisy_scores(length, [])
    with pytest.raises(UsageError, match="at least twice, seeds cannot be 1"):
        noisy_scores(length, ENGLISH, seeds=1)
    with pytest.raises(UsageError, match="at least one share"):
        noisy_scores(length, ENGLISH, shares=())
    with pytest.raises(UsageError, match="from 0 to 1"):
        noisy_scores(length, ENGLISH, shares=(2,))
    with pytest.raises(UsageError, match=r"got \[\] after \[\]"):
        noisy_scores(lambda documents: {}, ENGLISH)
    names = iter(["a", "b"])
    with pytest.raises(UsageError, match=r"got \['b'\] after \['a'\]"):
        noisy_scores(lambda documents: {next(names): 1.0}, ENGLISH)
