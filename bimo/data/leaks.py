"""Do texts stand in other texts? Evaluation or validation text that was trained on, training text that is retrieved.

    index = LeakIndex()
    for text in validation: index.add(text)
    index.share(document)        # 0.0: nothing of it is in there ... 1.0: all of it

The rule is GPT-3's (arXiv:2005.14165, appendix C): 13 words in a row, lower-cased, punctuation aside, are no accident.
A Chinese character counts as a word, as does one of any script that writes no spaces. (13 characters are two lines and
more of a Tang poem; shorter rules find idioms.) Texts of fewer than 13 words are found only as a whole.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from bimo.data.dedup import exact_key
from bimo.data.language import FIRST_SINGLE, HAN, KANA, OTHER, SINGLES, SPACE, code_points, kinds

__all__ = ["GRAM", "LeakIndex", "grams"]

GRAM = 13  # words
UNSIGNED = np.uint64
RANDOM = np.random.default_rng(20_050_614_165).integers(0, 2**63, GRAM + 2, dtype=UNSIGNED) * UNSIGNED(2) + UNSIGNED(1)
UNSPACED = frozenset(("th", "lo", "my", "km", "bo"))
NO_SPACES = (HAN, KANA, *(FIRST_SINGLE + place for place, (code, *_) in enumerate(SINGLES) if code in UNSPACED))
IS_SINGLE = np.isin(np.arange(256), NO_SPACES)  # by kind: each character is a word
IS_INSIDE = ~np.isin(np.arange(256), (SPACE, OTHER))  # part of a word
FILTER_BITS = 24  # of the table that tells most words that are not in the index without a search: 16 MB
BUFFER = 1 << 20  # hashes that wait to be sorted in


def grams(text: str) -> NDArray[np.uint64]:
    """A hash of each GRAM words in a row; empty for a shorter text."""
    points = code_points(text.lower())
    kind = kinds(points)
    single, inside = IS_SINGLE[kind], IS_INSIDE[kind]
    starts = inside & (single | ~np.r_[False, (inside & ~single)[:-1]])
    first = np.flatnonzero(starts)
    if len(first) < GRAM:
        return np.empty(0, UNSIGNED)
    # A word's hash is the sum of its mixed characters, each times a power of an odd number that counts from the word's
    # start. All words at once: a running sum of the powers from the text's start, divided by the power at each start.
    # (Odd numbers have inverses modulo 2**64.)
    powers, inverses = _powers(1 << len(points).bit_length())
    terms = np.where(inside, _mix(points.astype(UNSIGNED) + RANDOM[GRAM + 1]), UNSIGNED(0)) * powers[: len(points)]
    words = _mix(np.add.reduceat(terms, first) * inverses[first])
    count = len(words) - GRAM + 1
    hashes = words[:count] * RANDOM[0]
    for place in range(1, GRAM):
        hashes += words[place : place + count] * RANDOM[place]
    return _mix(hashes)


@lru_cache(maxsize=4)
def _powers(count: int) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """The first powers of an odd number, and of its inverse."""
    odd = int(RANDOM[GRAM])
    rows = np.ones((2, count), UNSIGNED)
    rows[0, 1:], rows[1, 1:] = odd, pow(odd, -1, 2**64)
    np.multiply.accumulate(rows, axis=1, out=rows)
    return rows[0], rows[1]


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    values = values * RANDOM[0]
    values ^= values >> UNSIGNED(32)
    values *= RANDOM[1]
    values ^= values >> UNSIGNED(29)
    return values


class LeakIndex:
    """A set of texts, as the hashes of their word sequences: 8 bytes a word, and 16 MB once. Pickles small enough to be
    handed to worker processes; the texts themselves are not kept."""

    def __init__(self) -> None:
        self._keys: set[int] = set()
        self._sorted: NDArray[np.uint64] = np.empty(0, UNSIGNED)
        self._waiting: list[NDArray[np.uint64]] = []
        self._num_waiting = 0
        self._filter = np.zeros(1 << FILTER_BITS, np.bool_)

    def __len__(self) -> int:
        """How many different texts were added."""
        return len(self._keys)

    def add(self, text: str) -> None:
        """Put a text into the index; a blank one adds nothing, for it stands in every text and in none."""
        if not text.strip():
            return
        self._keys.add(exact_key(text))
        hashes = grams(text)
        if len(hashes):
            self._filter[hashes >> UNSIGNED(64 - FILTER_BITS)] = True
            self._waiting.append(hashes)
            self._num_waiting += len(hashes)
            if self._num_waiting > max(BUFFER, len(self._sorted)):  # doubling: each hash is sorted a few times only
                self._merge()

    def share(self, text: str) -> float:
        """The share of the text's word sequences that the index holds; 1.0 for a text that was added."""
        if exact_key(text) in self._keys:
            return 1.0
        hashes = grams(text)
        if not len(hashes):
            return 0.0
        self._merge()
        likely = hashes[self._filter[hashes >> UNSIGNED(64 - FILTER_BITS)]]
        if not len(likely):
            return 0.0
        places = np.searchsorted(self._sorted, likely)
        places[places == len(self._sorted)] = 0
        return int((self._sorted[places] == likely).sum()) / len(hashes)

    def _merge(self) -> None:
        if self._waiting:
            self._sorted = np.unique(np.concatenate([self._sorted, *self._waiting]))
            self._waiting, self._num_waiting = [], 0
