"""From logits to the next token: penalties and masks, then the filters, then the draw; and log-probabilities.

Each sequence draws with its own generator, and its row is never mixed with another's, so that its tokens do not depend
on who else is in the batch. A row is a pass or two over the vocabulary and some work on the few candidates that are
left: 20-80 us for 49,152 words. Legend: N rows (sequences), V vocabulary, C candidates of a row.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from bimo.engine.request import SamplingParams, TokenLogprob
from bimo.engine.sequence import Sequence
from bimo.errors import EngineError

__all__ = [
    "best_ids",
    "choose_tokens",
    "chooses_best",
    "depends_on_output",
    "distribution",
    "keeps_best",
    "log_softmax",
    "process_logits",
    "token_logprobs",
]

Array = NDArray[Any]

# (256, 8): what each byte of a constraint's mask adds to the scores of its eight tokens
_BYTE_SCORES = np.where(np.arange(256)[:, None] >> np.arange(8) & 1, 0, -np.inf).astype(np.float32)
_BLOCK = 128  # scores looked at together
_ONE = np.float32(1).view(np.int32)


def process_logits(logits: Array, sequences: list[Sequence]) -> Array:
    """Apply constraint, logit_bias, penalties and min_tokens; (N, V) float32 -> (N, V), a copy if anything changes.

    Also applies to log-probabilities (beam search), as in transformers.
    """
    touched = [i for i, s in enumerate(sequences) if _needs_processing(s)]
    if not touched:
        return logits
    logits = logits.copy()
    for i in touched:
        _process_row(logits[i], sequences[i])
    return logits


def _needs_processing(sequence: Sequence) -> bool:
    """Whether the model's scores are changed before a token is chosen from them."""
    return bool(sequence.sampling.logit_bias or sequence.banned_token_ids) or depends_on_output(sequence)


def depends_on_output(sequence: Sequence) -> bool:
    """Whether what may come next, or its score, depends on the tokens so far by more than the model."""
    return sequence.constraint is not None or _changes_scores(sequence)


def keeps_best(sequence: Sequence, best: int) -> bool:
    """Whether `best`, the likeliest word by the model's own scores, is what `choose_tokens` would choose. Nearly always
    so for a constrained answer, too: the model writes what it is asked for, and the mask need not be applied."""
    p, mask = sequence.sampling, sequence.allowed_mask
    if not p.greedy or p.logit_bias or sequence.banned_token_ids or _changes_scores(sequence):
        return False
    return sequence.constraint is None or (best < 32 * len(mask) and bool(mask[best >> 5] >> (best & 31) & 1))


def chooses_best(sequence: Sequence) -> bool:
    """Whether the likeliest word by the model's own scores is always what comes next, and nobody wants the scores."""
    p = sequence.sampling
    plain = p.greedy and not p.logit_bias and not sequence.banned_token_ids and p.logprobs is None and p.best_of is None
    return plain and not depends_on_output(sequence)


def _changes_scores(sequence: Sequence) -> bool:
    p = sequence.sampling
    return bool(
        (sequence.forced_token_id is not None and not sequence.num_output)
        or p.repetition_penalty != 1
        or p.presence_penalty
        or p.frequency_penalty
        or (sequence.num_output < p.min_tokens and (sequence.eos_token_ids or p.stop_token_ids))
    )


def _process_row(row: Array, sequence: Sequence) -> None:
    """In place, row (V,)."""
    p = sequence.sampling
    if sequence.constraint is not None:
        scores = np.take(_BYTE_SCORES, sequence.allowed_mask.view(np.uint8), axis=0).reshape(-1)[: len(row)]
        row[: len(scores)] += scores
        row[len(scores) :] = -np.inf  # logits may be wider than the tokenizer's vocabulary
    if p.logit_bias:
        row[list(p.logit_bias)] += np.array(list(p.logit_bias.values()), row.dtype)
    if p.repetition_penalty != 1:  # divides positive scores, multiplies negative ones (CTRL, arXiv:1909.05858)
        index = sorted(set(sequence.token_ids))
        scores = row[index]
        row[index] = np.where(scores < 0, scores * p.repetition_penalty, scores / p.repetition_penalty)
    if (p.presence_penalty or p.frequency_penalty) and sequence.output_counts:
        counts = np.array(list(sequence.output_counts.values()), row.dtype)
        row[list(sequence.output_counts)] -= p.presence_penalty + p.frequency_penalty * counts
    if sequence.num_output < p.min_tokens:
        ends = sorted(sequence.eos_token_ids | set(p.stop_token_ids))
        before = row[ends]
        row[ends] = -np.inf
        if sequence.constraint is not None and not (row > -np.inf).any():
            row[ends] = before  # the constraint allows nothing but the end: it comes first
    if sequence.banned_token_ids:
        row[list(sequence.banned_token_ids)] = -np.inf
    if sequence.forced_token_id is not None and not sequence.num_output:
        row[:] = -np.inf
        row[sequence.forced_token_id] = 0


def choose_tokens(logits: Array, sequences: list[Sequence], draws: list[float] | None = None) -> list[int]:
    """One token a row from processed logits (N, V); a sequence may have several rows. `draws` are the rows' uniform
    numbers, by default the next of each sequence's own."""
    chosen = []
    for i, (row, sequence) in enumerate(zip(logits, sequences, strict=True)):
        if sequence.sampling.greedy:
            chosen.append(int(row.argmax()))
        else:
            uniform = sequence.draw() if draws is None else draws[i]
            chosen.append(_draw(*distribution(row, sequence.sampling), uniform))
    return chosen


def _draw(probabilities: Array, ids: Array | None, uniform: float) -> int:
    """Inverse of the cumulative distribution at `uniform`: one number decides, so a seed gives the same tokens."""
    starts = np.arange(0, len(probabilities), _BLOCK)
    sums = np.add.reduceat(probabilities, starts, dtype=np.float64).cumsum()  # at the end of each block
    block, target = _place(sums, uniform * sums[-1])
    start = block * _BLOCK
    inner = probabilities[start : start + _BLOCK].cumsum(dtype=np.float64)
    place, _ = _place(inner, target - (sums[block - 1] if block else 0))
    return start + place if ids is None else int(ids[start + place])


def _place(cumulative: Array, target: float) -> tuple[int, float]:
    """The first place whose cumulative sum exceeds the target, which rounding must not bring to the whole."""
    target = min(target, np.nextafter(cumulative[-1], 0))
    return min(int(np.searchsorted(cumulative, target, side="right")), len(cumulative) - 1), target


def distribution(row: Array, p: SamplingParams) -> tuple[Array, Array | None]:
    """Unnormalised probabilities (C,) after temperature, top_k, top_p, min_p and typical_p, in this order, and the
    token ids they belong to; or None for ids when C = V in vocabulary order.

    top_p: arXiv:1904.09751; min_p: arXiv:2407.01082; typical_p: arXiv:2202.00666.
    """
    ids = best_ids(row, p.top_k) if p.top_k and p.top_k < len(row) else None
    scores = row if ids is None else row[ids]
    peak = scores.max()
    if np.isnan(peak):
        raise EngineError("the model's scores are not numbers: its weights are damaged, or need a wider number type")
    weights = np.exp((scores - peak) / np.float32(p.temperature))  # the likeliest word's is 1
    if p.top_p < 1:
        # Words below this bound have less than 1 - top_p together, so they are not needed; the half is for rounding.
        total = weights.sum(dtype=np.float64)
        places = np.flatnonzero(weights >= total * (1 - p.top_p) / (2 * len(weights)))
        weights = weights[places]
        kept = _fewest(_ONE - weights.view(np.int32), weights, p.top_p * total)
        weights, places = weights[kept], places[kept]
        ids = places if ids is None else ids[places]
    if p.min_p:
        weights = np.where(weights < p.min_p * weights.max(), 0, weights)
    if p.typical_p < 1:
        probabilities = weights / weights.sum(dtype=np.float64)
        with np.errstate(divide="ignore", invalid="ignore"):
            surprise = -np.log(probabilities)
            distance = np.abs(surprise - np.nansum(probabilities * surprise)).astype(np.float32)
        kept = _fewest(distance.view(np.int32), weights, p.typical_p * weights.sum(dtype=np.float64))
        weights, ids = weights[kept], kept if ids is None else ids[kept]
    return weights, ids


def _fewest(keys: Array, weights: Array, wanted: float) -> Array:
    """Places of the fewest words, taken by rising key (of equals the first), that weigh `wanted` together.

    keys: int32, not negative. As such the bits of positive numbers are in the numbers' order, and their first 15 bits
    count them in classes of 1 % width. Nothing is sorted but the last class: a flat distribution has tens of thousands
    of candidates, and sorting them takes milliseconds.
    """
    classes = keys >> 17
    mass = np.bincount(classes, weights)
    sums = mass.cumsum()
    last = min(int(np.searchsorted(sums, wanted)), len(mass) - 1)
    edge = np.flatnonzero(classes == last)
    edge = edge[np.argsort(keys[edge], kind="stable")]
    before = sums[last] - mass[last] + weights[edge].cumsum(dtype=np.float64) - weights[edge]
    count = max(int(np.searchsorted(before, wanted)), 1)
    return np.concatenate((np.flatnonzero(classes < last), edge[:count]))


def best_ids(row: Array, count: int) -> Array:
    """Ids of the `count` highest scores of (V,), best first, of equals the first; all of them when there are fewer.

    Not by partitioning all scores, which takes half a millisecond: `count` of the blocks' best scores reach a bound
    that at least as many scores reach, and not many more.
    """
    count = min(count, len(row))
    blocks = len(row) // _BLOCK
    if count <= blocks:
        peaks = row[: blocks * _BLOCK].reshape(blocks, _BLOCK).max(axis=1)
        bound = np.partition(peaks, blocks - count)[blocks - count]
    else:
        bound = np.partition(row, len(row) - count)[len(row) - count]
    ids = np.flatnonzero(~(row < bound))  # with NaN, if there is any
    if len(ids) > 4 * count and bound == -np.inf:  # most is forbidden: keep what is not, and fill up
        allowed = np.flatnonzero(row > bound)
        ids = np.concatenate((allowed, np.setdiff1d(ids, allowed)[: max(count - len(allowed), 0)]))
    return ids[np.argsort(-row[ids], kind="stable")[:count]]


def log_softmax(logits: Array) -> Array:
    """(N, V) -> (N, V) float32."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True, dtype=np.float64)).astype(np.float32)


def token_logprobs(logits: Array, token_ids: list[int], num_top: list[int]) -> list[TokenLogprob]:
    """Log-probabilities under the model itself (raw logits (N, V), before any setting), with alternatives."""
    found = []
    for row, token_id, count in zip(log_softmax(logits), token_ids, num_top, strict=True):
        top = best_ids(row, count) if count else np.empty(0, int)
        found.append(
            TokenLogprob(token_id, float(row[token_id]), tuple(zip(top.tolist(), row[top].tolist(), strict=True)))
        )
    return found
