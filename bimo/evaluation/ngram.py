"""What counting alone achieves: an n-gram model with modified Kneser-Ney smoothing, the measure of every neural one.

    model = NgramModel.train([TokenFile.open(folder)], vocab_size=tokenizer.vocab_size, order=5)
    model.score(TokenFile.open(held_out), bytes_of_tokens(tokenizer), length=512).bits_per_byte

Interpolated, with three discounts an order (Chen and Goodman 1999, "An empirical study of smoothing techniques for
language modeling", section 4.1.6; counts at the beginning of a document as in KenLM, Heafield et al. 2013):

    p_k(w | c) = (a(c w) - D_k(a(c w))) / Σ_v a(c v)  +  γ(c) p_(k-1)(w | c without its first token)
    γ(c)       = Σ_v D_k(a(c v)) / Σ_v a(c v)           p_0 = 1 / vocab_size;  a context never seen: p_k = p_(k-1)
    a(g)       = how often g was seen, for the highest order; below it how many different tokens came before g, and
                 one for each document that begins with g
    Y = n_1 / (n_1 + 2 n_2),  D_k(j) = j - (j + 1) Y n_(j+1) / n_j  for j = 1, 2 and 3 (or more);  n_j = #{g: a(g) = j}

No n-gram reaches over a document's border, and a document's first token is never predicted, as in training. KenLM's
compiler and the text files of other tools are not needed for this: an n-gram is the number of its context and a token
in one int64, and counting is sorting:

    order 1   0 1 2 ... V-1                       a token is its own number
    order k   sorted keys: number(context) V + w  so the continuations of a context stand together

Training on 3 million tokens takes 2 seconds; memory is at most 120 bytes a token, then 16 an n-gram.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bimo.data.shards import TokenFile
from bimo.errors import DataError, UsageError
from bimo.training.validation import Score

__all__ = ["NgramModel"]

DEFAULT_ORDER = 5
DEFAULT_TOKENS = 20_000_000  # of the training text: 2.4 GB while counting
CHUNK = 1 << 20  # tokens scored at once
LIMITS = {"order": 9, "vocab_size": 1 << 24, "max_tokens": 1 << 31}  # numbers and keys fit their integers
FALLBACK = (0.5, 1.0, 1.5)  # discounts where counts of counts are too few to estimate them (KenLM's)

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class _Level:
    """The n-grams of one order. keys (M,) int64, sorted; alphas (M,): the discounted part of p."""

    keys: Ints
    alphas: NDArray[np.float32]
    discounts: tuple[float, float, float]

    def find(self, wanted: Ints) -> Ints:
        """The number of each key, -1 where there is none such."""
        if not len(self.keys):
            return np.full(len(wanted), -1)
        places = np.minimum(np.searchsorted(self.keys, wanted), len(self.keys) - 1)
        return np.where(self.keys[places] == wanted, places, -1)


@dataclass(frozen=True)
class NgramModel:
    """A trained model. levels[k - 1]: n-grams of order k. gammas[k]: what a context of k tokens leaves to shorter ones.

    num_tokens: of the text it was counted on.
    """

    vocab_size: int
    num_tokens: int
    levels: tuple[_Level, ...]
    gammas: tuple[NDArray[np.float32], ...]

    @property
    def order(self) -> int:
        return len(self.levels)

    @property
    def num_ngrams(self) -> int:
        return sum(len(level.keys) for level in self.levels)

    @classmethod
    def train(
        cls,
        files: Sequence[TokenFile],
        *,
        vocab_size: int,
        order: int = DEFAULT_ORDER,
        max_tokens: int = DEFAULT_TOKENS,
    ) -> NgramModel:
        """Count `files`. Of more than `max_tokens` tokens, documents at even distances are taken, of every file alike.

        Raises UsageError (order, vocab_size, max_tokens: see `LIMITS`), DataError (a token outside the vocabulary).
        """
        for name, value in (("order", order), ("vocab_size", vocab_size), ("max_tokens", max_tokens)):
            if not 1 <= value <= LIMITS[name]:
                raise UsageError(f"{name} of an n-gram model must be from 1 to {LIMITS[name]}, not {value}", name)
        tokens, starts = _documents(files, vocab_size, max_tokens)
        depths = np.arange(len(tokens)) - _last_start(starts, len(tokens))  # tokens before this one in its document
        depths = np.minimum(depths, order).astype(np.int8)
        levels: list[_Level] = []
        gammas: list[NDArray[np.float32]] = []
        keys, numbers, num_contexts = np.arange(vocab_size), tokens, 1  # numbers: of the n-grams that end at a token
        counts = np.bincount(tokens[depths > 0], minlength=vocab_size)
        for k in range(1, order + 1):
            if k < order:
                # the next order is counted first: what came before an n-gram is what its adjusted count is made of
                ends = np.flatnonzero(depths >= k)
                wanted = numbers[ends - 1].astype(np.int64) * vocab_size + tokens[ends]
                longer, longer_numbers, longer_counts, samples = _unique(wanted)
                del wanted
                counts = np.bincount(numbers[ends[samples]], minlength=len(keys))
                if k > 1:
                    counts += np.bincount(numbers[depths == k - 1], minlength=len(keys))
            level, gamma = _smooth(keys, keys // vocab_size, counts, num_contexts)
            levels.append(level)
            gammas.append(gamma)
            if k < order:
                num_contexts, keys, counts = len(keys), longer, longer_counts
                numbers = np.full(len(tokens), -1, np.int32)
                numbers[ends] = longer_numbers
        return cls(vocab_size, len(tokens), tuple(levels), tuple(gammas))

    def score(self, file: TokenFile, sizes: Ints, *, length: int, max_tokens: int | None = None) -> Score:
        """Nats, tokens and bytes of exactly the tokens that `training.validation.validate` predicts.

        Args:
            sizes: (vocab_size,) bytes of each token, `bytes_of_tokens`.
            length: of the rows; the tokens after the last whole row are left out.
            max_tokens: of the file's beginning, in whole rows; None: all of it.

        A file shorter than one row scores nothing: Score(0, 0, 0). Raises DataError for a token outside the vocabulary.
        """
        rows = max(0, len(file.tokens) - 1) // length
        if max_tokens is not None:
            rows = min(rows, max(1, max_tokens // length))
        score = Score(0.0, 0, 0)
        for begin in range(1, rows * length + 1, CHUNK):
            end = min(begin + CHUNK, rows * length + 1)
            first = max(0, begin - self.order + 1)
            tokens = _checked(file, first, end, self.vocab_size)
            depths = np.arange(first, end) - _last_start(_starts(file.ends), end, first)
            scored = np.flatnonzero(depths[begin - first :] > 0) + begin - first
            probabilities = self._probabilities(tokens, depths)[scored]
            num_bytes = int(sizes[tokens[scored]].sum())
            score += Score(-float(np.log(probabilities).sum()), len(scored), num_bytes)
        return score

    def probabilities(self, history: Sequence[int]) -> NDArray[np.float64]:
        """p(w | history) of every token w, (vocab_size,). `history`: the document so far, from its first token on."""
        tokens = np.asarray(history[max(0, len(history) - self.order + 1) :], np.int64)
        if len(tokens) and not 0 <= tokens.min() <= tokens.max() < self.vocab_size:
            raise UsageError(f"a token of the history is outside the vocabulary of {self.vocab_size} tokens", "history")
        result = np.full(self.vocab_size, 1 / self.vocab_size)
        for k in range(1, min(self.order, len(tokens) + 1) + 1):
            context = self._number(tokens[len(tokens) - k + 1 :])
            if context < 0:
                break
            keys = self.levels[k - 1].keys
            begin, end = np.searchsorted(keys, [context * self.vocab_size, (context + 1) * self.vocab_size])
            result *= self.gammas[k - 1][context]
            result[keys[begin:end] % self.vocab_size] += self.levels[k - 1].alphas[begin:end]
        return result

    def _number(self, tokens: Ints) -> int:
        """The number of one n-gram, -1 where it was never seen; 0 for the empty one."""
        number = 0
        for level, token in zip(self.levels, tokens, strict=False):
            number = int(level.find(np.array([number * self.vocab_size + token]))[0])
            if number < 0:
                break
        return number

    def _probabilities(self, tokens: NDArray[np.int32], depths: Ints) -> NDArray[np.float64]:
        """p of each token after those before it, (T,); `depths`: how many of these are of its document."""
        result = np.full(len(tokens), 1 / self.vocab_size)
        contexts = np.zeros(len(tokens), np.int64)  # the number of the k - 1 tokens before each; -1: never seen
        for k, (level, gamma) in enumerate(zip(self.levels, self.gammas, strict=True), 1):
            known = np.flatnonzero((contexts >= 0) & (depths >= k - 1))
            wanted = contexts[known] * self.vocab_size + tokens[known]
            numbers = level.find(wanted)
            seen = numbers >= 0
            result[known] *= gamma[contexts[known]]
            result[known[seen]] += level.alphas[numbers[seen]]
            contexts = np.full(len(tokens), -1)
            after = known[:-1] if len(known) and known[-1] == len(tokens) - 1 else known
            contexts[after + 1] = numbers[: len(after)]
        return result


def _documents(files: Sequence[TokenFile], vocab_size: int, max_tokens: int) -> tuple[NDArray[np.int32], Ints]:
    """The tokens to count, (N,), and where their documents start."""
    total = sum(len(file.tokens) for file in files)
    share = min(1.0, max_tokens / max(1, total))
    parts: list[NDArray[np.int32]] = []
    starts: list[Ints] = []
    size = 0
    for file in files:
        for begin, end in _spans(file.ends, share):
            end = min(end, begin + max_tokens - size)
            if begin == end:
                continue
            parts.append(_checked(file, begin, end, vocab_size))
            inside = file.ends[np.searchsorted(file.ends, begin, "right") : np.searchsorted(file.ends, end, "left")]
            starts.append(np.concatenate(([size], inside - begin + size)))
            size += end - begin
    if not parts:
        return np.zeros(0, np.int32), np.zeros(0, np.int64)
    return np.concatenate(parts), np.concatenate(starts)


def _spans(ends: Ints, share: float) -> Iterator[tuple[int, int]]:
    """Runs of the tokens to take: everything, or about `share` of the documents, the first among them."""
    starts = _starts(ends)
    if share >= 1:
        yield (0, int(ends[-1]) if len(ends) else 0)
        return
    steps = np.ceil(np.arange(len(ends) + 1) * share)
    for document in np.flatnonzero(np.diff(steps)):
        yield int(starts[document]), int(ends[document])


def _starts(ends: Ints) -> Ints:
    return np.concatenate(([0], ends[:-1])) if len(ends) else np.zeros(1, np.int64)


def _last_start(starts: Ints, end: int, begin: int = 0) -> Ints:
    """Where the document of each of the tokens [begin, end) starts."""
    return starts[np.searchsorted(starts, np.arange(begin, end), "right") - 1]


def _checked(file: TokenFile, begin: int, end: int, vocab_size: int) -> NDArray[np.int32]:
    tokens = np.asarray(file.tokens[begin:end]).astype(np.int32)
    if len(tokens) and tokens.max() >= vocab_size:
        raise DataError(
            f"{file.folder} holds the token {tokens.max()}, the vocabulary has {vocab_size}: encode the text with the "
            "tokenizer whose vocabulary this is"
        )
    return tokens


def _unique(keys: Ints) -> tuple[Ints, NDArray[np.int32], Ints, Ints]:
    """(sorted unique keys, the number of each key given, how often each occurs, a place where each occurs).

    `np.unique` sorts stably for the last of these, which takes several times as long.
    """
    order = np.argsort(keys)
    ranked = keys[order]
    first = np.ones(len(keys), bool)
    np.not_equal(ranked[1:], ranked[:-1], out=first[1:])
    begins = np.flatnonzero(first)
    numbers = np.empty(len(keys), np.int32)
    numbers[order] = np.cumsum(first, dtype=np.int32) - 1
    return ranked[begins], numbers, np.diff(np.append(begins, len(keys))), order[begins]


def _smooth(keys: Ints, contexts: Ints, counts: Ints, num_contexts: int) -> tuple[_Level, NDArray[np.float32]]:
    """(the level, γ of each context) from the adjusted counts of an order's n-grams."""
    discounts = _discounts(counts)
    taken = np.array([0.0, *discounts])[np.minimum(counts, 3)]
    totals = np.bincount(contexts, counts, minlength=num_contexts)
    left = np.bincount(contexts, taken, minlength=num_contexts)
    divisors = np.maximum(totals, 1)
    gamma = np.where(totals > 0, left / divisors, 1.0)
    alphas = (counts - taken) / divisors[contexts]
    return _Level(keys, alphas.astype(np.float32), discounts), gamma.astype(np.float32)


def _discounts(counts: Ints) -> tuple[float, float, float]:
    """D(1), D(2), D(3 and more); fixed ones where text is so little, or so odd, that the estimate is none."""
    ones, twos, threes, fours = (float(np.count_nonzero(counts == j)) for j in (1, 2, 3, 4))
    if not (ones and twos and threes):
        return FALLBACK
    y = ones / (ones + 2 * twos)
    found = (1 - 2 * y * twos / ones, 2 - 3 * y * threes / twos, 3 - 4 * y * fours / threes)
    return found if all(0 < discount < j for j, discount in enumerate(found, 1)) else FALLBACK
