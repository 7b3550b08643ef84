"""The memory is a plain cosine, the lexicon is nltk's IBM Model 1, and neither stumbles over odd text."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest

from bimo.evaluation import translation_baselines
from bimo.evaluation.pairs import Pair
from bimo.evaluation.translation_baselines import TranslationMemory, WordLexicon, join_words, split_words

WORDS = {"save": "保存", "the file": "文件", "open": "打开", "a window": "窗口", "close": "关闭", "print": "打印"}
PAIRS = [
    Pair("Save the file.", "保存文件。"),
    Pair("Open the file.", "打开文件。"),
    Pair("Open a window.", "打开窗口。"),
    Pair("Close a window, close the file.", "关闭窗口，关闭文件。"),
    Pair("Print the file.", "打印文件。"),
    Pair("Print a window.", "打印窗口。"),
]
BACK = [Pair(target, source) for source, target in PAIRS]
ODD = ["", " ", "🦊👍🏽", "\x00", "unknown words only", "?!", "x" * 100_000, "的" * 20_000, "ก็ naïve Ω", "\u200d"]


def test_words() -> None:
    assert split_words("Don't save 3 files_ok, 保存文件。👍 naïve") == [
        "Don", "'", "t", "save", "3", "files_ok", ",", "保存", "文件", "。", "👍", "naïve",
    ]  # fmt: skip
    for text in ("Save (the file), please. Yes!", "保存文件，打开“窗口”。", "见 3", "🦊🐶"):
        assert join_words(split_words(text)).replace(" ", "") == text.replace(" ", "")
    assert join_words(split_words("Save (the file), please. Yes!")) == "Save (the file), please. Yes!"
    assert join_words(["保存", "文件", "。"]) == "保存文件。"
    assert split_words("") == split_words(" \n") == []
    assert join_words([]) == ""


def cosines(source: str, known: list[str]) -> list[float]:
    """tf-idf as its formula is written, in dictionaries."""
    bags = [Counter(word.lower() for word in split_words(text)) for text in known]

    def vector(text: str) -> dict[str, float]:
        bag = Counter(word.lower() for word in split_words(text))
        having = {word: sum(word in other for other in bags) for word in bag}
        idf = {word: math.log((1 + len(known)) / (1 + having[word])) + 1 for word in bag}
        weights = {word: (1 + math.log(count)) * idf[word] for word, count in bag.items() if having[word]}
        length = math.sqrt(sum(weight**2 for weight in weights.values())) or 1
        return {word: weight / length for word, weight in weights.items()}

    query = vector(source)
    return [sum(query.get(word, 0) * weight for word, weight in vector(text).items()) for text in known]


@pytest.mark.parametrize("pairs", [PAIRS, BACK], ids=["en-zh", "zh-en"])
def test_the_memory_answers_with_the_most_similar(pairs: list[Pair]) -> None:
    memory = TranslationMemory.learn(pairs)
    assert memory([pair.source for pair in pairs]) == [pair.target for pair in pairs]
    known = [pair.source for pair in pairs]
    for source in ("PRINT the window", "close close close file", "打印文件吧", "关闭，打开", *known):
        expected = cosines(source, known)
        found = memory.most_similar(source)
        if max(expected) == 0:
            assert found is None
        else:
            assert found is not None
            assert expected[found] == pytest.approx(max(expected))
            assert found == next(n for n, cosine in enumerate(expected) if cosine > max(expected) * (1 - 1e-6))


def test_the_first_of_equals() -> None:
    memory = TranslationMemory.learn([Pair("same", str(n)) for n in range(50)])
    assert memory(["same", "same same", "other"]) == ["0", "0", ""]


@pytest.mark.parametrize("pairs", [PAIRS, BACK], ids=["en-zh", "zh-en"])
def test_the_lexicon_is_model_1(pairs: list[Pair]) -> None:
    from nltk.translate import AlignedSent, IBMModel1

    text = [
        AlignedSent(split_words(pair.target), [word.lower() for word in split_words(pair.source)]) for pair in pairs
    ]
    table = IBMModel1(text, translation_baselines.ITERATIONS).translation_table
    lexicon = WordLexicon.learn(pairs)
    sources = {word.lower() for pair in pairs for word in split_words(pair.source)}
    targets = {word for pair in pairs for word in split_words(pair.target)}
    assert set(lexicon.entries) == sources
    for word in sources:
        best = max(table[target][word] for target in targets)
        assert table[lexicon.entries[word]][word] == pytest.approx(best, rel=1e-9)


def test_the_lexicon_finds_the_words() -> None:
    generator = np.random.default_rng(0)
    english, chinese = [word.split()[-1] for word in WORDS], list(WORDS.values())
    pairs = []
    for _ in range(200):
        chosen = generator.permutation(len(english))[: generator.integers(2, 5)]
        pairs.append(Pair(" ".join(english[n] for n in chosen), "，".join(chinese[n] for n in chosen)))
    lexicon = WordLexicon.learn(pairs)
    assert lexicon(["Save file 🦊 OpenOffice"]) == ["保存文件🦊 OpenOffice"]
    assert [lexicon.entries[word] for word in english] == chinese


def test_more_pairs_than_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(translation_baselines, "MAX_CELLS", 100)
    monkeypatch.setattr(translation_baselines, "MAX_WORDS", 3)
    lexicon = WordLexicon.learn([Pair(f"w{n} b c d", "甲 乙 丙 丁") for n in range(100)])
    seen = sorted(int(word[1:]) for word in lexicon.entries if word.startswith("w"))
    assert "d" not in lexicon.entries
    assert 4 <= len(seen) <= 100 // 12
    assert (seen[0], seen[-1]) == (0, 99)


@pytest.mark.parametrize("learn", [TranslationMemory.learn, WordLexicon.learn], ids=["memory", "lexicon"])
def test_odd_text(learn: type) -> None:
    for pairs in ([], [Pair("🦊", "\x00")], [Pair(" ", " ")], PAIRS, [Pair(odd, odd) for odd in ODD], PAIRS[:1] * 50):
        translations = learn(pairs)(ODD)
        assert len(translations) == len(ODD)
        assert all(isinstance(text, str) for text in translations)
        assert learn(pairs)([]) == []
