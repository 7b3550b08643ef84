"""Pairs of texts, of which the second is to be written when the first is read: translations, questions and answers.

    write_tokens(folder, encode_pairs(documents, tokenizer, max_tokens=128, refuse=print), ...)
    loader = PairLoader([TokenFile.open(folder)], length=128, seed=0)
    batch = loader.next_batch(32)          # PairBatch, padded to its longest

In a token file a pair is two documents, the source and the target, each with the end of text after it:

    tokens:   | s1 s1 s1 <end> | t1 t1 <end> | s2 ... |
    batch:    source_ids  s1 s1 s1 <end>      input_ids  <start> t1 t1      targets  t1 t1 <end>
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bimo.data.loader import IGNORED, Origin, RowLoader
from bimo.data.records import Document
from bimo.data.shards import TokenFile
from bimo.tokenizer.bulk import bulk_encoder
from bimo.tokenizer.load import Tokenizer

__all__ = ["PairBatch", "PairLoader", "encode_pairs", "pad_rows", "pair_batch", "width_of"]

COLUMNS = 16  # lengths are rounded up to it, see objectives.rows


@dataclass(frozen=True)
class PairBatch:
    """B pairs, S tokens of the longest source, T of the longest target. int64.

    source_ids (B, S), source_mask (B, S) bool, False = padding; input_ids (B, T) what the decoder reads; targets (B, T)
    the token after each, or IGNORED.
    """

    source_ids: NDArray[np.int64]
    source_mask: NDArray[np.bool_]
    input_ids: NDArray[np.int64]
    targets: NDArray[np.int64]
    origins: tuple[Origin, ...] = ()
    is_text: bool = True  # the targets are all of a text, so that bits per byte can be told

    def __len__(self) -> int:
        return len(self.input_ids)

    def rows(self, part: slice) -> PairBatch:
        """Some of its rows, without most of the columns that are padding in all of them."""
        mask, targets = self.source_mask[part], self.targets[part]
        source, target = width_of(mask), width_of(targets != IGNORED)
        return PairBatch(
            self.source_ids[part, :source],
            mask[:, :source],
            self.input_ids[part, :target],
            targets[:, :target],
            self.origins[part],
            self.is_text,
        )

    @property
    def num_targets(self) -> int:
        return int((self.targets != IGNORED).sum())

    def idle(self) -> PairBatch:
        """One pair of which nothing is predicted."""
        one = np.zeros((1, 1), np.int64)
        return PairBatch(one, one == 0, one, one + IGNORED)


def width_of(mask: NDArray[np.bool_]) -> int:
    """Columns of (B, T) that the longest row needs, rounded up."""
    longest = int(mask.sum(1).max(initial=0))
    return min(mask.shape[1], max(1, -(-longest // COLUMNS)) * COLUMNS)


def pad_rows(rows: Sequence[NDArray[Any]], value: int) -> NDArray[np.int64]:
    """(B, longest, rounded up), `value` behind the shorter ones."""
    longest = max(map(len, rows), default=1)
    padded = np.full((len(rows), -(-longest // COLUMNS) * COLUMNS), value, np.int64)
    for place, row in zip(padded, rows, strict=True):
        place[: len(row)] = row
    return padded


def pair_batch(
    sources: Sequence[NDArray[Any]],
    targets: Sequence[NDArray[Any]],
    start_id: int,
    origins: Sequence[Origin],
    is_text: bool = True,
) -> PairBatch:
    """Sources and targets, both with their ends, as a batch; `start_id` is what the decoder reads first."""
    source_ids, wanted = pad_rows(sources, 0), pad_rows(targets, IGNORED)
    lengths = np.array([len(source) for source in sources])
    mask = np.arange(source_ids.shape[1]) < lengths[:, None]
    before = np.concatenate((np.full((len(targets), 1), start_id), wanted[:, :-1]), 1)
    return PairBatch(source_ids, mask, np.where(before == IGNORED, 0, before), wanted, tuple(origins), is_text)


class PairLoader(RowLoader):
    """Rows are pairs. `length` is only what a pair's halves may have at most, which `encode_pairs` has seen to.

    start_id: the token a decoder begins with.
    """

    def __init__(self, files: Sequence[TokenFile], *, length: int, start_id: int, **order: Any) -> None:
        self.start_id = start_id
        super().__init__(files, length=length, **order)

    @property
    def row_tokens(self) -> int:
        """The average of source and target together."""
        return max(1, round(sum(len(file.tokens) for file in self.files) / max(1, sum(self.num_rows))))

    def rows_in(self, file: TokenFile) -> int:
        return len(file.ends) // 2

    def span(self, file: TokenFile, row: int) -> tuple[int, int]:
        return int(file.ends[2 * row - 1]) if row else 0, int(file.ends[2 * row + 1])

    def arrange(self, origins: list[Origin]) -> list[Origin]:
        """By length, so that parts of a batch have little padding."""

        def size(origin: Origin) -> int:
            start, end = self.span(self.files[origin.file], origin.row)
            return end - start

        return sorted(origins, key=size)

    def batch(self, origins: Sequence[Origin]) -> PairBatch:
        sources, targets = [], []
        for number, row, _ in origins:
            file = self.files[number]
            start, end = self.span(file, row)
            middle = int(file.ends[2 * row])
            sources.append(file.tokens[start:middle])
            targets.append(file.tokens[middle:end])
        return pair_batch(sources, targets, self.start_id, origins)


def encode_pairs(
    documents: Iterable[Document], tokenizer: Tokenizer, *, max_tokens: int, refuse: Callable[[str], None]
) -> Iterator[tuple[str, list[int]]]:
    """(id, token ids) of the source and then the target of every dialogue: the last answer, and the question before it.

    `refuse` is told what cannot be used: documents without a question and an answer, and pairs of which a half has more
    than `max_tokens` tokens. Text that spells a control token gets it in ordinary tokens.
    """
    encode, end = bulk_encoder(tokenizer), tokenizer.eos_token_ids[:1]
    for document in documents:
        if document.pair is None:
            refuse("no question and answer")
            continue
        halves = [[*ids.tolist(), *end] for ids in encode(document.pair)]
        if max(map(len, halves)) > max_tokens:
            refuse(f"longer than {max_tokens} tokens")
            continue
        for half in halves:
            yield document.id, half
