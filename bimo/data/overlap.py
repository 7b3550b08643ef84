"""Which validation documents stand in the training data: read both once, in flat memory.

    report = find_leaks(validation, training)       # (id, text) pairs, texts
    report.num_checked, report.leaked

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

__all__ = ["LEAKED", "LeakReport", "find_leaks"]

LEAKED = 0.8


@dataclass(frozen=True)
class LeakReport:
    """leaked: ids of documents."""

    num_checked: int
    leaked: tuple[str, ...]


def find_leaks(validation: Iterable[tuple[str, str]], training: Iterable[str]) -> LeakReport:
    """Memory: 8 bytes a validation word."""
    ids: list[str] = []
    keys: list[int] = []
    sequences: list[NDArray[np.uint64]] = []
    for name, text in validation:
        ids.append(name)
        keys.append(exact_key(text))
        sequences.append(grams(text))
    known = np.unique(np.concatenate([np.empty(0, np.uint64), *sequences]))
    ticked = np.zeros(len(known), np.bool_)
    wanted, seen = set(keys), set[int]()
    for text in training if ids else ():
        if (key := exact_key(text)) in wanted:
            seen.add(key)
        hashes = grams(text)
        if len(hashes) and len(known):
            places = np.searchsorted(known, hashes)
            places[places == len(known)] = 0
            ticked[places[known[places] == hashes]] = True
    leaked = [
        name
        for name, key, own in zip(ids, keys, sequences, strict=True)
        if key in seen or (len(own) and ticked[np.searchsorted(known, own)].mean() >= LEAKED)
    ]
    return LeakReport(len(ids), tuple(leaked))
