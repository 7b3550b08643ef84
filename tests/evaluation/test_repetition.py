"""Repetition and listed words, in Chinese and English."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bimo.errors import UsageError
from bimo.evaluation.repetition import listed_rate, pieces, repetition


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("go 去哪儿?", ["go", "去", "哪", "儿", "?"]),
        ("It's Größe 12", ["It", "'", "s", "Größe", "12"]),
        ("好🧑好", ["好", "🧑", "好"]),
        ("haha" * 11, ["h", "a", "h", "a"] * 11),
        ("  \n", []),
    ],
)
def test_pieces(text: str, expected: list[str]) -> None:
    assert pieces(text) == expected


@pytest.mark.parametrize(
    ("text", "n", "expected"),
    [
        ("a b c d e f g", 4, 0),
        ("no no no no no no", 4, 2 / 3),  # three 4-grams, one of them different
        ("好好好好好好", 4, 2 / 3),
        ("今天天气很好，今天天气很好，", 4, 4 / 11),  # 14 characters: 11 of them, 7 different
        ("the cat sat, the cat sat", 2, 2 / 6),
        ("too short", 4, 0),
        ("", 4, 0),
        ("e" * 100, 1, 0.99),
    ],
)
def test_repetition(text: str, n: int, expected: float) -> None:
    assert repetition([text], n) == pytest.approx(expected)


def test_it_is_an_average_over_texts() -> None:
    assert repetition(["a b c d e", "no no no no no no"]) == pytest.approx(1 / 3)


@given(st.lists(st.text(), min_size=1, max_size=4), st.integers(1, 5))
def test_it_is_a_share_of_any_text(texts: list[str], n: int) -> None:
    assert 0 <= repetition(texts, n) < 1
    assert repetition([f"{text} {text}" for text in texts], n) >= 0


@pytest.mark.parametrize(
    ("text", "word", "found"),
    [
        ("They sold a Bomb.", "bomb", True),
        ("make a\n bomb", "make a bomb", True),
        ("bombastic", "bomb", False),
        ("grape", "rape", False),
        ("吸毒品的人", "毒品", True),
        ("买bomb吗", "bomb", True),  # no letter of a script with spaces beside it
        ("C++ 很好", "c++", True),
        ("毒 品", "毒品", False),
        ("a.b", "a+b", False),  # a word is no pattern
        ("👍🏽", "👍", True),
    ],
)
def test_listed_words(text: str, word: str, found: bool) -> None:
    assert listed_rate([text], [word]) == found
    assert listed_rate([text, "好 fine"], ["nothing", word]) == found / 2


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: repetition([]), "list of texts"),
        (lambda: repetition("one text"), "list of texts"),
        (lambda: repetition(["a"], 0), "at least 1"),
        (lambda: listed_rate([], ["a"]), "list of texts"),
        (lambda: listed_rate(["a"], []), "list of words"),
        (lambda: listed_rate(["a"], ["a", " "]), "list of words"),
    ],
)
def test_what_cannot_be_measured_is_said(call: object, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        call()  # type: ignore[operator]
