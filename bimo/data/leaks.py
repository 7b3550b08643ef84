"""Texts as their sequences of words, to find one in another: evaluation text that was trained on, and the like.

    grams("床前明月光，疑是地上霜。举头望明月，低头思故乡。")      # (8,): 20 characters have 8 sequences of 13
    np.isin(grams(one), grams(other)).mean()              # how much of one stands in the other

The rule is GPT-3's (arXiv:2005.14165, appendix C): 13 words in a row, lower-cased, punctuation aside, are no accident.
A Chinese character counts as a word, as does one of any script that writes no spaces. (13 characters are two lines and
more of a Tang poem; shorter rules find idioms.) Texts of fewer than 13 words are found only as a whole.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from bimo.data.language import FIRST_SINGLE, HAN, KANA, OTHER, SINGLES, SPACE, code_points, kinds

__all__ = ["GRAM", "grams"]

GRAM = 13  # words
UNSIGNED = np.uint64
SEED = 20_050_614_165
UNSPACED = frozenset(("th", "lo", "my", "km", "bo"))
NO_SPACES = (HAN, KANA, *(FIRST_SINGLE + place for place, (code, *_) in enumerate(SINGLES) if code in UNSPACED))
IS_SINGLE = np.isin(np.arange(256), NO_SPACES)  # by kind: each character is a word
IS_INSIDE = ~np.isin(np.arange(256), (SPACE, OTHER))  # part of a word


@lru_cache
def _odd(seed: int, count: int) -> NDArray[np.uint64]:
    """Random odd numbers, the same in every run: products with them lose nothing modulo 2**64."""
    return np.random.default_rng(seed).integers(0, 2**63, count, dtype=UNSIGNED) * UNSIGNED(2) + UNSIGNED(1)


FIRST, SECOND, SALT, BASE = _odd(SEED, 4)


def grams(text: str, size: int = GRAM) -> NDArray[np.uint64]:
    """A hash of each `size` words in a row; empty for a shorter text."""
    points = code_points(text.lower())
    kind = kinds(points)
    single, inside = IS_SINGLE[kind], IS_INSIDE[kind]
    starts = inside & (single | ~np.r_[False, (inside & ~single)[:-1]])
    first = np.flatnonzero(starts)
    if len(first) < size:
        return np.empty(0, UNSIGNED)
    # A word's hash is the sum of its mixed characters, each times a power of an odd number that counts from the word's
    # start. All words at once: a running sum of the powers from the text's start, divided by the power at each start.
    # (Odd numbers have inverses modulo 2**64.)
    powers, inverses = _powers(1 << len(points).bit_length())
    terms = np.where(inside, _mix(points.astype(UNSIGNED) + SALT), UNSIGNED(0)) * powers[: len(points)]
    words = _mix(np.add.reduceat(terms, first) * inverses[first])
    count = len(words) - size + 1
    hashes = np.zeros(count, UNSIGNED)
    for place, multiplier in enumerate(_odd(SEED + size, size)):
        hashes += words[place : place + count] * multiplier
    return _mix(hashes)


@lru_cache(maxsize=4)
def _powers(count: int) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """The first powers of an odd number, and of its inverse."""
    odd = int(BASE)
    rows = np.ones((2, count), UNSIGNED)
    rows[0, 1:], rows[1, 1:] = odd, pow(odd, -1, 2**64)
    np.multiply.accumulate(rows, axis=1, out=rows)
    return rows[0], rows[1]


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    values = values * FIRST
    values ^= values >> UNSIGNED(32)
    values *= SECOND
    values ^= values >> UNSIGNED(29)
    return values
