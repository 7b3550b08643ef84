"""Denoising: parts of a text are taken out, and the model writes them (T5) or all of it (BART).

    text       今 天 天 气 很 好 我 们 出 去          15 % of the tokens, in spans of 3 on average

    spans      source  今 天 <0> 好 我 们 出 去 <end>       target  <0> 天 气 很 <end>         arXiv:1910.10683, 3.1.4
    infilling  source  今 天 <mask> 好 我 们 出 去 <end>    target  all of the text <end>      arXiv:1910.13461, 2.2

<0>, <1>, ... are T5's sentinels, <extra_id_0> and on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bimo.data.loader import Origin, RowLoader
from bimo.data.pairs import PairBatch, pair_batch
from bimo.data.shards import TokenFile
from bimo.errors import UsageError

__all__ = ["DenoisingLoader", "infill", "noise_spans", "replace_spans"]

Ids = NDArray[Any]


def noise_spans(
    length: int, share: float, mean_span: float, draws: np.random.Generator, most: int | None = None
) -> NDArray[np.bool_]:
    """Which of `length` tokens are taken out, (length,): about `share` of them, in spans of `mean_span` on average,
    with at least one token kept between them. most: spans at most.

    T5's own code begins with what is kept and ends with a span, always; here all places are nearly as likely.
    """
    if length < 2:
        return np.zeros(length, bool)
    num_noise = min(max(round(length * share), 1), length - 1)
    num_spans = min(max(round(num_noise / mean_span), 1), num_noise, length - num_noise, most or length)
    noise = _parts(num_noise, num_spans, draws)
    kept = _parts(length - num_noise + 2, num_spans + 1, draws)
    kept[[0, -1]] -= 1  # before the first and after the last span there may be nothing
    lengths = np.empty(2 * num_spans + 1, np.int64)
    lengths[::2], lengths[1::2] = kept, noise
    return np.repeat(np.arange(len(lengths)) % 2 == 1, lengths)


def _parts(total: int, count: int, draws: np.random.Generator) -> NDArray[np.int64]:
    """`total` as a sum of `count` numbers of at least 1, every such sum equally likely."""
    cuts = np.sort(draws.choice(total - 1, count - 1, replace=False)) + 1
    return np.diff(np.concatenate(([0], cuts, [total])))


def replace_spans(tokens: Ids, noise: NDArray[np.bool_], sentinels: Sequence[int]) -> tuple[Ids, Ids]:
    """(source, target): each span is replaced by the next sentinel; the target is every sentinel and what it hides."""
    begins = noise & ~np.concatenate(([False], noise[:-1]))
    number = np.cumsum(begins) - 1
    marks = np.asarray(sentinels, np.int64)
    source = np.where(begins, marks[number], tokens)[~noise | begins]
    target: list[Ids] = []
    for span in range(int(begins.sum())):
        target += [marks[span : span + 1], tokens[noise & (number == span)]]
    return source, np.concatenate(target) if target else tokens[:0]


def infill(tokens: Ids, noise: NDArray[np.bool_], mask_id: int) -> tuple[Ids, Ids]:
    """(source, target): each span is replaced by one mask, whatever its length; the target is the whole text."""
    begins = noise & ~np.concatenate(([False], noise[:-1]))
    return np.where(begins, mask_id, tokens)[~noise | begins], tokens


class DenoisingLoader(RowLoader):
    """Rows are `length` - 1 consecutive tokens, damaged anew in every epoch, the same way whenever it is asked.

    sentinels: ids of T5's, the first first; empty: infilling with `mask_id`. end_id: after source and target.
    start_id: what a decoder begins with.
    """

    def __init__(
        self,
        files: Sequence[TokenFile],
        *,
        length: int,
        share: float,
        mean_span: float,
        sentinels: Sequence[int] = (),
        mask_id: int | None = None,
        end_id: int,
        start_id: int,
        **order: Any,
    ) -> None:
        if not sentinels and mask_id is None:
            raise UsageError("denoising needs sentinels or a mask token: learn the tokenizer with this recipe")
        self.share, self.mean_span, self.sentinels, self.mask_id = share, mean_span, tuple(sentinels), mask_id
        self.end_id, self.start_id = end_id, start_id
        super().__init__(files, length=length, **order)

    def rows_in(self, file: TokenFile) -> int:
        return len(file.tokens) // (self.length - 1)

    def span(self, file: TokenFile, row: int) -> tuple[int, int]:
        return row * (self.length - 1), (row + 1) * (self.length - 1)

    def batch(self, origins: Sequence[Origin]) -> PairBatch:
        sources, targets = [], []
        for origin in origins:
            file = self.files[origin.file]
            start, end = self.span(file, origin.row)
            tokens = file.tokens[start:end].astype(np.int64)
            noise = noise_spans(
                len(tokens), self.share, self.mean_span, self.draws(origin), len(self.sentinels) or None
            )
            if self.sentinels:
                source, target = replace_spans(tokens, noise, self.sentinels)
            else:
                assert self.mask_id is not None
                source, target = infill(tokens, noise, self.mask_id)
            sources.append(np.append(source, self.end_id))
            targets.append(np.append(target, self.end_id))
        return pair_batch(sources, targets, self.start_id, origins, is_text=False)
