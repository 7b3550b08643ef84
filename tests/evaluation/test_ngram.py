"""The n-gram model equals its formulas written plainly, sums to one, and scores what training's validation does."""

from __future__ import annotations

import math
import tracemalloc
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bimo.data.loader import IGNORED, Batch, PackedLoader
from bimo.data.shards import TokenFile, write_tokens
from bimo.errors import DataError, UsageError
from bimo.evaluation import ngram
from bimo.evaluation.ngram import FALLBACK, NgramModel

ENGLISH = ["the cat sat on the mat. ", "the dog sat on the cat. ", "a cat, a dog, a mat. ", "the cat ran. "] * 3
CHINESE = [
    "床前明月光，疑是地上霜。",
    "举头望明月，低头思故乡。",
    "从前有一个小小的模型，它学会了写字。",
    "明月，明月。",
] * 3
TEXTS = {"english": ENGLISH, "chinese": CHINESE, "both": ENGLISH + CHINESE + ["🦊明月 cat", "猫"]}
UNSEEN = 3  # tokens of the vocabulary that no text has


def token_ids(texts: Sequence[str]) -> tuple[list[list[int]], int]:
    """Documents of one token a character, between two 0; and the size of the vocabulary."""
    numbers = {character: n for n, character in enumerate(sorted(set("".join(texts))), 1)}
    return [[0, *(numbers[c] for c in text), 0] for text in texts], len(numbers) + 1 + UNSEEN


def write(folder: Path, documents: Sequence[Sequence[int]], vocab_size: int = 1000) -> TokenFile:
    rows = [(str(n), list(ids)) for n, ids in enumerate(documents)]
    return write_tokens(folder, rows, vocab_size=vocab_size, mark="m")


class Reference:
    """The formulas of Chen and Goodman word for word, over dictionaries, in float64."""

    def __init__(self, documents: Sequence[Sequence[int]], order: int, vocab_size: int) -> None:
        self.order, self.vocab_size = order, vocab_size
        counts: list[Counter[tuple[int, ...]]] = [Counter() for _ in range(order + 1)]
        before: defaultdict[tuple[int, ...], set[int]] = defaultdict(set)
        at_start: Counter[tuple[int, ...]] = Counter()
        for ids in documents:
            for end in range(2, len(ids) + 1):  # the first token is not predicted
                for k in range(1, min(order, end) + 1):
                    gram = tuple(ids[end - k : end])
                    counts[k][gram] += 1
                    if end > k:
                        before[gram].add(ids[end - k - 1])
                    else:
                        at_start[gram] += 1
        self.adjusted: list[dict[tuple[int, ...], int]] = [{}]
        for k in range(1, order):
            self.adjusted.append({gram: len(before[gram]) + at_start[gram] for gram in counts[k]})
        self.adjusted.append(dict(counts[order]))
        self.discounts = [(0.0, 0.0, 0.0), *(self.estimate(adjusted) for adjusted in self.adjusted[1:])]

    @staticmethod
    def estimate(adjusted: dict[tuple[int, ...], int]) -> tuple[float, float, float]:
        n = Counter(adjusted.values())
        if not (n[1] and n[2] and n[3]):
            return FALLBACK
        y = n[1] / (n[1] + 2 * n[2])
        d = 1 - 2 * y * n[2] / n[1], 2 - 3 * y * n[3] / n[2], 3 - 4 * y * n[4] / n[3]
        return d if 0 < d[0] < 1 and 0 < d[1] < 2 and 0 < d[2] < 3 else FALLBACK

    def probability(self, token: int, history: Sequence[int]) -> float:
        p = 1 / self.vocab_size
        for k in range(1, min(self.order, len(history) + 1) + 1):
            context = tuple(history[len(history) - k + 1 :])
            children = {gram: a for gram, a in self.adjusted[k].items() if gram[:-1] == context}
            if not children:
                break
            taken = {gram: self.discounts[k][min(a, 3) - 1] for gram, a in children.items()}
            total, gram = sum(children.values()), (*context, token)
            p = (children.get(gram, 0) - taken.get(gram, 0)) / total + sum(taken.values()) / total * p
        return p


def histories(documents: Sequence[Sequence[int]], vocab_size: int) -> list[list[int]]:
    """Seen, half seen and never seen ones, and those of a document's first tokens."""
    ids = documents[0]
    return [
        [], ids[:1], ids[:2], ids[:7], ids, documents[-1][:3], ids[2:4] + documents[-1][1:2], [vocab_size - 1],
        [vocab_size - 1, ids[1]], [ids[1], vocab_size - 1], ids[3:0:-1],
    ]  # fmt: skip


@pytest.mark.parametrize("order", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("name", TEXTS)
def test_equals_the_formulas(name: str, order: int, tmp_path: Path) -> None:
    documents, vocab_size = token_ids(TEXTS[name])
    files = [write(tmp_path / "a", documents[::2]), write(tmp_path / "b", documents[1::2])]
    model = NgramModel.train(files, vocab_size=vocab_size, order=order)
    reference = Reference(documents, order, vocab_size)
    for level, expected in zip(model.levels, reference.discounts[1:], strict=True):
        assert level.discounts == pytest.approx(expected, rel=1e-12)
    for history in histories(documents, vocab_size):
        found = model.probabilities(history)
        expected = [reference.probability(token, history) for token in range(vocab_size)]
        np.testing.assert_allclose(found, expected, rtol=2e-6)
        assert found.sum() == pytest.approx(1, abs=1e-6)
        assert found.min() > 0


def test_the_discounts_are_estimated_somewhere(tmp_path: Path) -> None:
    """Else the test above would compare the fixed ones only."""
    documents, vocab_size = token_ids(TEXTS["both"])
    model = NgramModel.train([write(tmp_path / "a", documents)], vocab_size=vocab_size, order=3)
    assert any(level.discounts != FALLBACK for level in model.levels)


@pytest.mark.parametrize("order", [2, 3, 4])
@pytest.mark.parametrize("name", ["english", "chinese"])
def test_equals_nltk(name: str, order: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With nltk's choices: one discount, and none for unigrams. In one document, since nltk knows no borders."""
    from nltk.lm import KneserNeyInterpolated

    discounts = iter([(1e-12,) * 3] + [(0.1,) * 3] * (order - 1))
    monkeypatch.setattr(ngram, "_discounts", lambda counts: next(discounts))
    ids, vocab_size = [0], 0
    for document in token_ids(TEXTS[name])[0]:
        ids += document[1:-1]
        vocab_size = max(vocab_size, *document) + 1
    model = NgramModel.train([write(tmp_path / "a", [ids])], vocab_size=vocab_size, order=order)
    reference = KneserNeyInterpolated(order, discount=0.1)
    words = [str(token) for token in ids]
    grams = [tuple(words[end - k : end]) for end in range(2, len(words) + 1) for k in range(1, min(order, end) + 1)]
    reference.fit([grams], vocabulary_text=words)
    for place in range(order, len(ids), 3):  # from `order` on, so that the history does not hold the beginning
        history = ids[place - order + 1 : place]
        found = model.probabilities(history)
        for token in {ids[place], ids[2], ids[-1]}:
            expected = reference.score(str(token), [str(before) for before in history])
            assert found[token] == pytest.approx(expected, rel=1e-5)


documents_of_few_tokens = st.lists(st.lists(st.integers(0, 5), max_size=12), max_size=12)


@given(
    training=documents_of_few_tokens,
    held_out=documents_of_few_tokens,
    order=st.integers(1, 5),
    length=st.integers(1, 9),
    chunk=st.integers(1, 9),
)
@settings(max_examples=60, deadline=None)
def test_any_documents(
    training: list[list[int]],
    held_out: list[list[int]],
    order: int,
    length: int,
    chunk: int,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """Empty documents, single tokens, one token over and over; rows, chunks and borders anywhere."""
    folder = tmp_path_factory.mktemp("any")
    model = NgramModel.train([write(folder / "a", training)], vocab_size=7, order=order)
    file = write(folder / "b", held_out)
    reference = Reference(training, order, 7)
    expected, targets = 0.0, []
    tokens = [token for ids in held_out for token in ids]
    last = (len(tokens) - 1) // length * length
    place = 0
    for ids in held_out:
        for n, token in enumerate(ids):
            if n and place <= last:
                expected -= math.log(reference.probability(token, ids[:n]))
                targets.append(token)
            place += 1
    sizes = np.arange(7)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ngram, "CHUNK", chunk)
        score = model.score(file, sizes, length=length)
    assert (score.num_tokens, score.num_bytes) == (len(targets), sum(targets))
    assert score.nats == pytest.approx(expected, rel=1e-5, abs=1e-9)


@pytest.mark.parametrize(("length", "max_tokens"), [(16, 10_000), (7, 100), (50, 1), (16, 64)])
def test_scores_the_tokens_that_validation_scores(length: int, max_tokens: int, tmp_path: Path) -> None:
    documents, vocab_size = token_ids(TEXTS["both"])
    file = write(tmp_path / "a", documents)
    sizes = np.arange(vocab_size) ** 2
    rows = min((len(file.tokens) - 1) // length, max(1, max_tokens // length))  # as in training.validation.validate
    loader = PackedLoader([file], length=length, shuffle=False)
    batch: Batch = loader.next_batch(rows)
    targets = batch.targets[batch.targets != IGNORED]
    model = NgramModel.train([file], vocab_size=vocab_size, order=1)
    score = model.score(file, sizes, length=length, max_tokens=max_tokens)
    assert score.num_tokens == len(targets)
    assert score.num_bytes == int(sizes[targets].sum())
    unigrams = model.probabilities([])
    assert score.nats == pytest.approx(-np.log(unigrams[targets]).sum(), rel=1e-6)


def test_more_context_and_more_text_predict_better(tmp_path: Path) -> None:
    """On a Markov source of second order, where the entropy is known."""
    generator = np.random.default_rng(0)
    chances = generator.dirichlet(np.full(8, 0.3), size=(8, 8))

    def sample(count: int) -> list[int]:
        ids = [0, 1]
        for draw in generator.random(count):
            ids.append(min(7, int(np.searchsorted(np.cumsum(chances[ids[-2], ids[-1]]), draw))))
        return ids

    training, held_out = sample(40_000), sample(8_000)
    entropy = -np.mean([math.log(chances[tuple(held_out[n - 2 : n + 1])]) for n in range(2, len(held_out))])
    file = write(tmp_path / "held", [held_out])

    def nats(order: int, count: int) -> float:
        model = NgramModel.train([write(tmp_path / "t", [training[:count]])], vocab_size=8, order=order)
        return model.score(file, np.ones(8, int), length=100).nats_per_token

    unigram, bigram, trigram, longest = (nats(order, 40_000) for order in (1, 2, 3, 5))
    assert unigram > bigram > trigram
    assert trigram == pytest.approx(entropy, abs=0.02)
    assert trigram < longest < trigram + 0.1  # what the noise of longer contexts costs
    assert nats(3, 1000) > trigram


def test_documents_at_even_distances(tmp_path: Path) -> None:
    files = [write(tmp_path / name, [[token] * 10 for token in range(100)]) for name in "ab"]
    model = NgramModel.train(files, vocab_size=100, order=2, max_tokens=200)
    assert model.num_tokens == 200
    seen = np.flatnonzero(model.levels[0].alphas)
    assert len(seen) == 10
    assert set(np.diff(seen)) == {10}
    cut = NgramModel.train([write(tmp_path / "c", [list(range(50)) * 4])], vocab_size=100, order=2, max_tokens=50)
    assert (cut.num_tokens, len(cut.levels[1].keys)) == (50, 49)


def test_memory_is_what_is_stated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """120 bytes a token while counting, 16 an n-gram after; scoring goes by chunks, however long the text."""
    count = 200_000
    ids = np.minimum(np.random.default_rng(0).zipf(1.3, count), 4999)
    file = write(tmp_path / "a", [row.tolist() for row in ids.reshape(-1, 200)], 5000)
    tracemalloc.start()
    try:
        model = NgramModel.train([file], vocab_size=5000)
        kept, peak = tracemalloc.get_traced_memory()
        assert peak < 120 * count
        assert kept < 16 * model.num_ngrams + 100_000
        monkeypatch.setattr(ngram, "CHUNK", 1000)
        tracemalloc.reset_peak()
        model.score(file, np.ones(5000, int), length=512)
        assert tracemalloc.get_traced_memory()[1] - kept < 500_000
    finally:
        tracemalloc.stop()


def test_no_text_at_all(tmp_path: Path) -> None:
    empty = write(tmp_path / "empty", [])
    for files in ([], [empty], [empty, write(tmp_path / "hollow", [[], []])], [write(tmp_path / "one", [[5]])]):
        model = NgramModel.train(files, vocab_size=10, order=3)
        np.testing.assert_allclose(model.probabilities([5, 5]), 0.1)
        assert model.score(empty, np.ones(10, int), length=4).num_tokens == 0
        file = write(tmp_path / "text", [[1, 2, 3, 4, 5]])
        assert model.score(file, np.ones(10, int), length=4).nats == pytest.approx(4 * math.log(10))


@pytest.mark.parametrize(
    ("wrong", "name"),
    [({"order": 0}, "order"), ({"order": -1}, "order"), ({"order": 99}, "order"), ({"vocab_size": 0}, "vocab_size"),
     ({"max_tokens": 0}, "max_tokens")],
)  # fmt: skip
def test_wrong_settings(wrong: dict[str, int], name: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=name) as caught:
        NgramModel.train([write(tmp_path / "a", [[1, 2]])], **{"vocab_size": 5, **wrong})
    assert caught.value.param == name


def test_tokens_of_another_tokenizer(tmp_path: Path) -> None:
    file = write(tmp_path / "a", [[1, 2, 900, 1, 1]])
    with pytest.raises(DataError, match="the token 900, the vocabulary has 5"):
        NgramModel.train([file], vocab_size=5)
    model = NgramModel.train([], vocab_size=5)
    with pytest.raises(DataError, match="encode the text"):
        model.score(file, np.ones(5, int), length=2)
    with pytest.raises(UsageError, match="outside the vocabulary"):
        model.probabilities([7])
