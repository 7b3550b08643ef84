"""Which documents stand in other documents, such as validation or evaluation text in the training data: read both once,
in flat memory.

    report = find_leaks(validation, training)       # two streams of documents
    for leak in report.leaks: leak.id, leak.kind, leak.share, leak.found_in

or, where it is enough which ones, with the training documents shared out among processes:

    check = LeakCheck(validation)
    check.add(*tick(check.known, check.keys, some_training_documents))     # as often as there are shares; elsewhere too
    check.leaked()

The checked documents' sequences of 13 words (see data.leaks) are kept as sorted hashes, the others stream past and tick
off those that they hold. A document leaks when 80 % of its sequences were ticked (the line that Llama 2 draws,
arXiv:2307.09288, appendix A.6), or when the very same text was seen; single sentences that recur are no leak. A
dialogue also leaks when the same turns were seen before another answer: who has learned one translation of a sentence,
or one answer to a question, is no longer asked something new.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bimo.data.dedup import exact_key
from bimo.data.leaks import GRAM, grams
from bimo.data.records import Document

__all__ = ["LEAKED", "Leak", "LeakCheck", "LeakReport", "find_leaks", "tick"]

LEAKED = 0.8
KINDS = ("text", "prompt", "passages")


@dataclass(frozen=True)
class Leak:
    """kind: "text", the whole stands there; "prompt", a dialogue's turns before the answer; "passages", most of it.

    share: of its word sequences. found_in: the other document with most of it (of several alike the first).
    """

    id: str
    kind: str
    share: float
    found_in: str


@dataclass(frozen=True)
class LeakReport:
    """Of all documents of both sides."""

    num_checked: int
    num_others: int
    leaks: tuple[Leak, ...]


def keys_of(document: Document) -> tuple[int, ...]:
    """Of the text, and of a dialogue's turns before the last: equal where these are, case and white space aside."""
    whole = exact_key(document.text)
    return (whole, exact_key(f"\0{document.prompt}")) if document.prompt.strip() else (whole,)


class LeakCheck:
    """known (K,): hashes of all sequences of the checked documents, sorted; keys: of their texts and prompts.

    Memory: 16 bytes a word of theirs, 32 while it is made. size: how many words a sequence has.
    """

    def __init__(self, documents: Iterable[Document], size: int = GRAM) -> None:
        self.size = size
        self.documents = [(each.id, keys_of(each), grams(each.text, size)) for each in documents if each.text.strip()]
        sequences = [own for _, _, own in self.documents]
        self.known: NDArray[np.uint64] = np.unique(np.concatenate([np.empty(0, np.uint64), *sequences]))
        self.keys = frozenset(key for _, keys, _ in self.documents for key in keys)
        self._ticked = np.zeros(len(self.known), np.bool_)
        self._seen = set[int]()

    def add(self, ticked: NDArray[np.bool_], seen: set[int]) -> None:
        """What `tick` found in some of the other documents."""
        self._ticked |= ticked
        self._seen |= seen

    def see(self, document: Document) -> tuple[NDArray[np.intp], list[int]]:
        """Add one of the other documents. Where in `known` its sequences stand, and which of the keys it has."""
        places, keys = _held(self.known, self.keys, document, self.size)
        self._ticked[places] = True
        self._seen.update(keys)
        return places, keys

    def leaked(self) -> list[str]:
        """The ids, of all that was added."""
        return [name for name, keys, own in self.documents if self.kind(keys, own)]

    def kind(self, keys: tuple[int, ...], own: NDArray[np.uint64]) -> str:
        """How a document leaks, or ""."""
        seen = [key in self._seen for key in keys]
        if any(seen):
            return KINDS[seen.index(True)]
        return KINDS[2] if self.share(own) >= LEAKED else ""

    def share(self, own: NDArray[np.uint64]) -> float:
        """How many of a document's sequences were ticked."""
        return float(self._ticked[np.searchsorted(self.known, own)].mean()) if len(own) else 0.0


def tick(
    known: NDArray[np.uint64], keys: frozenset[int], documents: Iterable[Document], size: int = GRAM
) -> tuple[NDArray[np.bool_], set[int]]:
    """Which of the known sequences stand in the documents (K,), and which of the keys."""
    ticked, seen = np.zeros(len(known), np.bool_), set[int]()
    for document in documents if keys else ():
        places, found = _held(known, keys, document, size)
        ticked[places] = True
        seen.update(found)
    return ticked, seen


def _held(
    known: NDArray[np.uint64], keys: frozenset[int], document: Document, size: int
) -> tuple[NDArray[np.intp], list[int]]:
    """Where in `known` the document's sequences stand, and which of the keys are its own."""
    hashes = grams(document.text, size) if len(known) else known
    places = np.searchsorted(known, hashes)
    places[places == len(known)] = 0
    return places[known[places] == hashes], [key for key in keys_of(document) if key in keys]


def find_leaks(documents: Iterable[Document], others: Iterable[Document], size: int = GRAM) -> LeakReport:
    """Which documents stand in the others, and in which of them."""
    check = LeakCheck(documents, size)
    owner = np.zeros(len(check.known), np.int64)  # of sequences that several documents have, the first
    for number in reversed(range(len(check.documents))):
        owner[np.searchsorted(check.known, check.documents[number][2])] = number
    by_sequences: dict[int, tuple[int, str]] = {}
    by_key: dict[int, str] = {}
    num_others = 0
    for document in others:
        num_others += 1
        places, seen = check.see(document)
        for key in seen:
            by_key.setdefault(key, document.id)
        held, counts = np.unique(owner[np.unique(places)], return_counts=True)
        for number, count in zip(held.tolist(), counts.tolist(), strict=True):
            if count > by_sequences.get(number, (0, ""))[0]:
                by_sequences[number] = (count, document.id)
    leaks = []
    for name, keys, own in check.documents:
        if kind := check.kind(keys, own):
            owners = np.unique(owner[np.searchsorted(check.known, own)]).tolist()
            alike = max((by_sequences[number] for number in owners if number in by_sequences), default=(0, ""))[1]
            found = next((by_key[key] for key in keys if key in by_key), alike)
            leaks.append(Leak(name, kind, 1.0 if kind == KINDS[0] else check.share(own), found))
    return LeakReport(len(check.documents), num_others, tuple(leaks))
