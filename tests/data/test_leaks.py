"""Sequences of words are the same wherever they stand, in both languages, and others are others."""

from __future__ import annotations

import time

import numpy as np
import pytest

from bimo.data.leaks import GRAM, grams


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a b c d e f g h i j k l m", 1),
        ("a b c d e f g h i j k l", 0),
        ("a b c d e f g h i j k l m n o", 3),
        ("床前明月光疑是地上霜举头望", 1),
        ("床前明月光，疑是地上霜。举头望明月，低头思故乡。", 8),
        ("用 Python 写 hello world 程序", 0),
        ("！？。" * 20, 0),
        ("", 0),
    ],
)
def test_a_gram_is_thirteen_words_or_characters(text: str, expected: int) -> None:
    assert len(grams(text)) == expected


def test_grams_do_not_depend_on_their_place_on_case_or_on_punctuation() -> None:
    words = "one two three four five six seven eight nine ten eleven twelve thirteen"
    assert grams(f"zero {words}")[1] == grams(words)[0]
    assert grams(words.title().replace(" ", ", "))[0] == grams(words)[0]
    assert grams("天" + "床前明月光疑是地上霜举头望")[1] == grams("床前明月光，疑是地上霜。举头望")[0]


def test_other_words_are_other_grams() -> None:
    texts = [
        "ab c d e f g h i j k l m n",
        "ba c d e f g h i j k l m n",
        "a bc d e f g h i j k l m n",
        "c ab d e f g h i j k l m n",
    ]
    assert len({int(grams(text)[0]) for text in texts}) == 4


@pytest.mark.parametrize("size", [1, 2, 5, 40])
def test_other_sizes(size: int) -> None:
    text = "床前明月光，疑是地上霜。举头望明月，低头思故乡。" * 3
    assert len(grams(text, size)) == 60 - size + 1
    assert len(np.unique(grams(text, size))) == {1: 17, 2: 19}.get(size, 20)  # 明月 stands there twice, and 头
    assert np.isin(grams(text[:30], size), grams(text, size)).all()
    assert not np.isin(grams(text, size), grams(text, size + 1)).any()


@pytest.mark.parametrize(
    "text",
    ["", " \n", "a" * 10**6, "字" * 10**6, "a " * 500_000, "👨‍👩‍👧" * 99, "עברית " * 20, "\u0301" * 50, "\x00" * 50],
)
def test_hostile_texts_are_no_trouble(text: str) -> None:
    start = time.perf_counter()
    hashes = grams(text)
    assert len(hashes) <= len(text)
    assert np.array_equal(hashes, grams(text.upper().lower()))
    assert len(grams(text, GRAM * 10)) <= len(hashes)
    assert time.perf_counter() - start < 5
