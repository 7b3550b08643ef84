"""Which validation documents stand in the training data: read both once, in flat memory.

    report = find_leaks(validation, training)       # (id, text) pairs, texts

or with the training texts shared out among processes:

    check = LeakCheck(validation)
    check.add(*tick(check.known, check.keys, some_training_texts))     # as often as there are shares; `tick` elsewhere
    check.report().num_checked, check.report().leaked

The validation texts' 13-word sequences (see data.leaks) are kept as sorted hashes, the training texts stream past and
tick off those that they hold. A document counts as leaked when 80 % of its sequences were ticked (the line that Llama 2
draws, arXiv:2307.09288, appendix A.6), or when the very same text was seen; single sentences that recur are no leak.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bimo.data.dedup import exact_key
from bimo.data.leaks import grams

__all__ = ["LEAKED", "LeakCheck", "LeakReport", "find_leaks", "tick"]

LEAKED = 0.8


@dataclass(frozen=True)
class LeakReport:
    """leaked: ids of documents."""

    num_checked: int
    leaked: tuple[str, ...]


def find_leaks(validation: Iterable[tuple[str, str]], training: Iterable[str]) -> LeakReport:
    """Memory: 8 bytes a validation word, twice."""
    check = LeakCheck(validation)
    check.add(*tick(check.known, check.keys, training))
    return check.report()


class LeakCheck:
    """known (K,): hashes of all sequences of the validation texts, sorted; keys: of the texts as a whole."""

    def __init__(self, validation: Iterable[tuple[str, str]]) -> None:
        self._documents = [(name, exact_key(text), grams(text)) for name, text in validation]
        sequences = [own for _, _, own in self._documents]
        self.known: NDArray[np.uint64] = np.unique(np.concatenate([np.empty(0, np.uint64), *sequences]))
        self.keys = frozenset(key for _, key, _ in self._documents)
        self._ticked = np.zeros(len(self.known), np.bool_)
        self._seen = set[int]()

    def add(self, ticked: NDArray[np.bool_], seen: set[int]) -> None:
        """What `tick` found in some of the training texts."""
        self._ticked |= ticked
        self._seen |= seen

    def report(self) -> LeakReport:
        """Of all that was added."""
        leaked = [
            name
            for name, key, own in self._documents
            if key in self._seen or (len(own) and self._ticked[np.searchsorted(self.known, own)].mean() >= LEAKED)
        ]
        return LeakReport(len(self._documents), tuple(leaked))


def tick(
    known: NDArray[np.uint64], keys: frozenset[int], training: Iterable[str]
) -> tuple[NDArray[np.bool_], set[int]]:
    """Which of the known sequences stand in the training texts (K,), and which of the keys."""
    ticked, seen = np.zeros(len(known), np.bool_), set[int]()
    for text in training if keys else ():
        if (key := exact_key(text)) in keys:
            seen.add(key)
        hashes = grams(text)
        if len(hashes) and len(known):
            places = np.searchsorted(known, hashes)
            places[places == len(known)] = 0
            ticked[places[known[places] == hashes]] = True
    return ticked, seen
