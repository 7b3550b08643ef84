"""The guess without reading: counts, accuracy and nats by hand, on what masking really hides."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from bimo.data.shards import TokenFile, write_tokens
from bimo.errors import DataError, UsageError
from bimo.evaluation import masked
from bimo.evaluation.masked import Unigrams
from bimo.objectives.masked import IGNORED, mask_tokens
from bimo.training.validation import Score

SPECIAL = [0, 1]


def accuracy(score: Score) -> float:
    return score.figures["masked_accuracy"]


def write(folder: Path, ids: list[int], vocab_size: int = 300) -> TokenFile:
    return write_tokens(folder, [("d", ids)], vocab_size=vocab_size, mark="m")


def test_accuracy_and_nats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(masked, "CHUNK", 3)
    text = "的猫的狗的猫🦊"  # bytes of UTF-8 stand for tokens; the special ones are most frequent of all
    files = [write(tmp_path / "a", [0] * 50 + [2 + byte for byte in text.encode()]), write(tmp_path / "b", [5, 5])]
    unigrams = Unigrams.count(files, vocab_size=300, special_ids=SPECIAL)
    assert unigrams.counts.sum() == len(text.encode()) + 2
    best = 2 + "的".encode()[0]
    assert unigrams.most_frequent(1).tolist() == [best]  # E7, of 的, 猫, 狗 alike
    targets = [[IGNORED, best, 5], [best, 7, IGNORED]]
    chance = {token: (unigrams.counts[token] + 1) / (unigrams.counts.sum() + 300) for token in (best, 5, 7)}
    nats = -sum(math.log(chance[token]) for token in (best, 5, best, 7))
    for given in (np.array(targets), torch.tensor(targets)):
        score = unigrams.score(given)
        assert score.means == {"masked_accuracy": (2, 4)} and score.num_tokens == 4
        assert score.figures == {"masked_accuracy": 0.5}  # no bits per byte: hidden words make up no text
        assert score.nats == pytest.approx(nats)
        assert score.nats_per_token == pytest.approx(nats / 4)
    assert accuracy(unigrams.score(np.array(targets), num_guesses=300)) == 1
    twice = unigrams.score(np.array(targets)) + unigrams.score(np.array([best, 7]))
    assert twice.means == {"masked_accuracy": (3, 6)} and twice.num_tokens == 6


def test_agrees_with_the_share_of_the_word_in_the_text(tmp_path: Path) -> None:
    """Over much text, the accuracy of the best guess is its word's share of the words that may be hidden."""
    generator = np.random.default_rng(0)
    ids = generator.choice([0, 2, 3, 4], size=20_000, p=[0.4, 0.1, 0.3, 0.2])
    unigrams = Unigrams.count([write(tmp_path / "a", ids.tolist())], vocab_size=6, special_ids=SPECIAL)
    _, labels = mask_tokens(
        torch.from_numpy(ids).view(-1, 100), special_ids=SPECIAL, mask_id=1, vocab_size=6,
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    score = unigrams.score(labels)
    assert accuracy(score) == pytest.approx(0.5, abs=0.03)
    entropy = -sum(p * math.log(p) for p in (1 / 6, 1 / 2, 1 / 3))
    assert score.nats_per_token == pytest.approx(entropy, abs=0.03)


def test_nothing_to_count_and_nothing_asked(tmp_path: Path) -> None:
    empty = Unigrams.count([write_tokens(tmp_path / "e", [], vocab_size=9, mark="m")], vocab_size=9)
    assert empty.score([]) == Score(0.0, 0, means={"masked_accuracy": (0, 0)})
    assert accuracy(empty.score([IGNORED])) == 0
    guess = empty.score([4, 0])
    assert guess.nats == pytest.approx(2 * math.log(9)) and accuracy(guess) == 0.5  # all alike: the lowest id


def test_what_does_not_belong_together(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="the token 70, the vocabulary has 9"):
        Unigrams.count([write(tmp_path / "a", [1, 70])], vocab_size=9)
    for wrong in ([9], [-1], [-101]):
        with pytest.raises(UsageError, match="from 0 to 8"):
            Unigrams.count([], vocab_size=9).score(wrong)
