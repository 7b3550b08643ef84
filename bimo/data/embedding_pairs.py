"""Pairs of texts that belong together, for an encoder: a title and its passage, a question and its answer.

    encoded = encode_embedding_pairs(documents, tokenizer, max_tokens=256, refuse=print)
    file = write_tokens(folder, encoded, vocab_size=tokenizer.vocab_size, mark="")
    batch = EmbeddingPairLoader([file], length=256, seed=0).next_batch(32)          # EmbeddingBatch

In a token file a pair is two documents, each as the encoder reads it alone:

    tokens:   | [CLS] title [SEP] | [CLS] passage [SEP] | [CLS] title ...

Some models were trained with an instruction before each text ("query: " and "passage: " of e5, arXiv:2212.03533); such
prefixes belong to the text, in training and afterwards alike.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from bimo.data.loader import IGNORED, Origin
from bimo.data.pairs import PairLoader, pad_rows, width_of
from bimo.data.records import Document
from bimo.data.shards import TokenFile
from bimo.errors import UsageError
from bimo.tokenizer.bulk import BulkEncode, bulk_encoder
from bimo.tokenizer.load import Tokenizer

__all__ = ["EmbeddingBatch", "EmbeddingPairLoader", "cut_text", "encode_embedding_pairs", "text_encoder"]

AT_ONCE = 512  # pairs handed to the tokenizer together


@dataclass(frozen=True)
class EmbeddingBatch:
    """B pairs, S tokens of the longest query, T of the longest passage.

    query_ids (B, S), passage_ids (B, T) int64, 0 in padding; query_mask (B, S), passage_mask (B, T) bool, False =
    padding. A pair without a token in its query is none.
    """

    query_ids: NDArray[np.int64]
    query_mask: NDArray[np.bool_]
    passage_ids: NDArray[np.int64]
    passage_mask: NDArray[np.bool_]
    origins: tuple[Origin, ...] = ()

    is_text: ClassVar[bool] = False

    def __len__(self) -> int:
        return len(self.query_ids)

    def rows(self, part: slice) -> EmbeddingBatch:
        """Some of its pairs, without most of the columns that are padding in all of them."""
        queries, passages = self.query_mask[part], self.passage_mask[part]
        query, passage = width_of(queries), width_of(passages)
        return EmbeddingBatch(
            self.query_ids[part, :query],
            queries[:, :query],
            self.passage_ids[part, :passage],
            passages[:, :passage],
            self.origins[part],
        )

    @property
    def targets(self) -> NDArray[np.int64]:
        """(B,) the passage that each query looks for, or IGNORED where there is no pair."""
        return np.where(self.query_mask.any(1), np.arange(len(self)), IGNORED)

    @property
    def num_targets(self) -> int:
        return int(self.query_mask.any(1).sum())

    def idle(self) -> EmbeddingBatch:
        """One row that is no pair."""
        one = np.zeros((1, 1), np.int64)
        return EmbeddingBatch(one, one != 0, one, one != 0)


class EmbeddingPairLoader(PairLoader):
    """Rows are pairs; a batch has them by length, so that its parts have little padding, and so that a passage's length
    alone gives little away. `length` is only what a text may have at most, which `encode_embedding_pairs` has seen to.
    """

    def __init__(self, files: Sequence[TokenFile], *, length: int, **order: Any) -> None:
        super().__init__(files, length=length, start_id=0, **order)  # no decoder starts here

    def batch(self, origins: Sequence[Origin]) -> EmbeddingBatch:  # type: ignore[override]  # pairs of another kind
        queries, passages = [], []
        for number, row, _ in origins:
            file = self.files[number]
            start, end = self.span(file, row)
            middle = int(file.ends[2 * row])
            queries.append(file.tokens[start:middle])
            passages.append(file.tokens[middle:end])
        return EmbeddingBatch(*_padded(queries, self.length), *_padded(passages, self.length), tuple(origins))


def _padded(rows: Sequence[NDArray[Any]], most: int) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    ids = pad_rows(rows, 0)[:, : max(most, *map(len, rows))]  # not past what the encoder reads
    return ids, np.arange(ids.shape[1]) < np.array([len(row) for row in rows])[:, None]


def text_encoder(tokenizer: Tokenizer) -> BulkEncode:
    """Texts -> uint32 ids as an encoder reads them, [CLS] text [SEP], however long; serving and training share it.

    Text that spells a control token gets it in ordinary tokens. Raises UsageError for a tokenizer that puts nothing
    around a text, and for lone surrogates.
    """
    around = tokenizer.encode("")
    if len(around) != 2:
        raise UsageError(
            f"{tokenizer.directory} puts {len(around)} tokens around a text, an encoder's tokenizer puts [CLS] before "
            'and [SEP] behind it: take a BERT, or learn a tokenizer of kind "wordpiece"',
            "tokenizer",
        )
    first, last = (np.array([token], np.uint32) for token in around)
    encode = bulk_encoder(tokenizer)
    return lambda texts: [np.concatenate((first, ids, last)) for ids in encode(texts)]


def cut_text(ids: Sequence[int] | NDArray[np.uint32], max_tokens: int) -> NDArray[np.uint32]:
    """At most `max_tokens` (2 or more) of [CLS] text [SEP]: the text's beginning, with both ends around it."""
    ids = np.asarray(ids, np.uint32)
    return ids if len(ids) <= max_tokens else np.append(ids[: max_tokens - 1], ids[-1:])


def encode_embedding_pairs(
    documents: Iterable[Document],
    tokenizer: Tokenizer,
    *,
    max_tokens: int,
    refuse: Callable[[str, str], None],
    shorten: Callable[[str, str], None] | None = None,
    query_prefix: str = "",
    passage_prefix: str = "",
) -> Iterator[tuple[str, NDArray[np.uint32]]]:
    """(id, token ids) of the query and then the passage of every pair: a dialogue's last answer and what was asked for
    it, or a document's title and its text.

    Args:
        refuse: told the id of what cannot be used, and why: no pair, an empty half, more than `max_tokens` tokens.
        shorten: with it long texts are cut instead, and it is told which.
        query_prefix, passage_prefix: put before every text, e.g. "query: " and "passage: ".
    """
    encode = text_encoder(tokenizer)
    rows = iter(documents)
    while some := list(itertools.islice(rows, AT_ONCE)):
        found = []
        for document in some:
            query, passage = document.pair or (document.title, document.text)
            if query.strip() and passage.strip():
                found.append((document.id, query_prefix + query, passage_prefix + passage))
            else:
                refuse(document.id, "is no pair: it needs a question and an answer, or a title and a text")
        ids = iter(encode([half for _, *halves in found for half in halves]))
        for name, halves in zip((name for name, *_ in found), zip(ids, ids, strict=True), strict=True):
            longest = max(map(len, halves))
            if longest > max_tokens:
                why = f"has {longest} tokens, {max_tokens} are read"
                if shorten is None:
                    refuse(name, why)
                    continue
                shorten(name, why)
            for half in halves:
                yield name, cut_text(half, max_tokens)
