"""Copies: the same text again, and nearly the same text again, over a corpus that does not fit into memory.

In every worker, for each document, 8 + 512 bytes:
    key, signature = exact_key(text), signature(text)
Then once, over all of them (the signatures may be a memory-mapped file):
    copy_of = find_duplicates(keys, signatures, threshold=0.8)      # (N,), -1 where a document stays

Near copies are found by MinHash (Broder 1997) over 5-character shingles, with locality-sensitive hashing in bands
(Leskovec, Rajaraman, Ullman, Mining of Massive Datasets, ch. 3): two documents are compared when a band of rows agrees.
Characters rather than words, for Chinese has no words between spaces. The minima are rensa's (Rust): 5 us for 3,000
shingles, where NumPy takes 200.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from bimo.data.language import code_points
from bimo.errors import UsageError

__all__ = ["NUM_MINIMA", "SHINGLE", "bands", "exact_key", "find_duplicates", "signature"]

NUM_MINIMA = 128  # the estimate's standard deviation is then at most 0.044
SHINGLE = 5  # characters
SEED = 20_240_601
UNSIGNED = np.uint64
# odd and random: one multiplier for each place of a shingle
MULTIPLIERS = np.random.default_rng(SEED).integers(0, 2**63, SHINGLE, dtype=UNSIGNED) * UNSIGNED(2) + UNSIGNED(1)
CHUNK = 1 << 13  # pairs whose signatures are compared at once: 8 MB


def exact_key(text: str) -> int:
    """64 bits, equal for equal texts, case and white space aside; the same in every run and on every machine."""
    plain = "".join(text.lower().split()).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(plain, digest_size=8).digest(), "little")


def signature(text: str) -> NDArray[np.uint32]:
    """MinHash of the text's shingles (NUM_MINIMA,); two texts agree in as many places as they are similar (Jaccard).

    All zeros for a text shorter than one shingle: it has no near copies, only exact ones.
    """
    from rensa import RMinHash  # type: ignore[import-untyped]

    points = code_points(" ".join(text.lower().split())).astype(UNSIGNED)
    count = len(points) - SHINGLE + 1
    if count < 1:
        return np.zeros(NUM_MINIMA, np.uint32)
    hashes = points[:count] * MULTIPLIERS[0]
    for place in range(1, SHINGLE):
        hashes += points[place : place + count] * MULTIPLIERS[place]
    hashes ^= hashes >> UNSIGNED(32)  # the low bits of a sum of products depend on low bits only: mix the high ones in
    hashes *= MULTIPLIERS[0]
    hashes ^= hashes >> UNSIGNED(29)
    matrix = RMinHash.digest_matrix_from_flat_token_hashes(hashes, (0, count), NUM_MINIMA, SEED)
    return np.array(matrix.to_rows()[0], np.uint32)


@lru_cache
def bands(threshold: float, num_minima: int = NUM_MINIMA) -> tuple[int, int]:
    """(bands, rows) for a threshold: the fewest comparisons that miss next to nothing above it.

    A pair of similarity s is compared with probability 1 - (1 - s^rows)^bands. The most rows are taken for which a pair
    at the threshold is missed with a probability of at most 2 %; wrong candidates cost only time, they are checked.
    """
    for rows in range(num_minima, 1, -1):
        if (1 - threshold**rows) ** (num_minima // rows) <= 0.02:
            return num_minima // rows, rows
    return num_minima, 1


def find_duplicates(
    keys: NDArray[np.uint64], signatures: NDArray[np.uint32], threshold: float
) -> NDArray[np.int64]:  # (N,), (N, P) -> (N,)
    """For each document the index of the first document of its group of copies, or -1 for that first and all others.

    A group holds what is connected: where A is like B and B like C, only A stays, even if A and C differ.
    With a threshold of 1 only equal keys count. Memory beside the arguments: some 100 bytes a document, and 8 MB.
    """
    if not 0 < threshold <= 1:
        raise UsageError(f"a similarity from which texts are copies lies in (0, 1], not {threshold}", "near_duplicates")
    count = len(keys)
    first = np.arange(count)  # a forest: each document points to an earlier one of its group, or to itself
    if count:
        _join(first, *_neighbours(keys))
    if count and threshold < 1:
        distinct = first == np.arange(count)  # the exact copies of a text add nothing to it
        num_bands, rows = bands(threshold, signatures.shape[1])
        multipliers = np.random.default_rng(SEED).integers(0, 2**63, rows, dtype=UNSIGNED) * UNSIGNED(2) + UNSIGNED(1)
        for band in range(num_bands):
            hashes = _band_hashes(signatures, band * rows, multipliers)
            members = np.flatnonzero(distinct & (hashes != 0))  # texts without shingles have zeros
            left, right = (members[side] for side in _neighbours(hashes[members]))
            for start in range(0, len(left), CHUNK):
                a, b = left[start : start + CHUNK], right[start : start + CHUNK]
                # of a pair of groups that a chunk before this one has joined, nothing new can come
                apart = first[a] != first[b]
                a, b = a[apart], b[apart]
                alike = (signatures[a] == signatures[b]).mean(axis=1) >= threshold
                _join(first, a[alike], b[alike])
    return np.where(first == np.arange(count), -1, first)


def _band_hashes(signatures: NDArray[np.uint32], start: int, multipliers: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """One number for the rows of a band (N,); 0 for signatures of zeros."""
    hashes = np.zeros(len(signatures), UNSIGNED)
    for row, multiplier in enumerate(multipliers):
        hashes += signatures[:, start + row].astype(UNSIGNED) * multiplier
    return hashes


def _neighbours(values: NDArray[np.uint64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Pairs of places that hold equal values: the first place of each value with each of its others, and each with
    the next. Both, for a bucket's first document may by chance be the one that is not like the others."""
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    starts = np.flatnonzero(np.r_[len(order) > 0, ordered[1:] != ordered[:-1]])
    head = np.repeat(order[starts], np.diff(np.r_[starts, len(order)]))
    inner = np.flatnonzero(order != head)
    left = np.concatenate([head[inner], order[inner - 1]])
    right = np.concatenate([order[inner], order[inner]])
    return left, right


def _join(first: NDArray[np.int64], left: NDArray[np.int64], right: NDArray[np.int64]) -> None:
    """Union-find over arrays, in place: hang each group onto the earlier one, until all pairs agree, then flatten."""
    while True:
        a, b = first[left], first[right]
        apart = a != b
        if not apart.any():
            return
        left, right, a, b = left[apart], right[apart], a[apart], b[apart]
        np.minimum.at(first, np.maximum(a, b), np.minimum(a, b))
        while True:  # pointer doubling: the depth halves each time
            further = first[first]
            if np.array_equal(further, first):
                break
            first[:] = further
