"""Two translators that need no network, learned from pairs: what a trained model must beat.

    memory = TranslationMemory.learn(training_pairs)      # the translation of the most similar sentence it knows
    lexicon = WordLexicon.learn(training_pairs)           # word by word, by a dictionary that it learned
    memory(["Save the file."]), lexicon(["Save the file."])

**Translation memory**: sentences as vectors of tf-idf, cosine similarity (Salton and Buckley 1988).

    weight(w, s) = (1 + ln count(w, s)) ln((1 + N) / (1 + sentences with w)) + 1),  each sentence's length 1

**Word lexicon**: IBM Model 1 (Brown et al. 1993, "The mathematics of statistical machine translation"), by EM:

    p(f | e) ∝ Σ over pairs, f in target, of  t(f | e) / Σ_(e' in source or NULL) t(f | e')

Words are runs of letters, single signs, and what jieba cuts Chinese into; upper and lower case are one in the source.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bimo.evaluation.pairs import Pair
from bimo.objectives.masked import HAN_TEXT

__all__ = ["TranslationMemory", "WordLexicon", "join_words", "split_words"]

MAX_WORDS = 100  # of a sentence that Model 1 reads
MAX_CELLS = 12_000_000  # source words x target words, over all pairs: 0.7 GB while learning
ITERATIONS = 5  # of EM; more sharpen rare words' accidents

RUNS = re.compile(rf"{HAN_TEXT.pattern}|(?:(?!{HAN_TEXT.pattern})\w)+|[^\w\s]")
CLOSING, OPENING = set(",.;:!?%)]}，。；：！？、）》」』”’"), set("([{（《「『“‘")  # no space before, none behind

Ints = NDArray[np.int64]


def split_words(text: str) -> list[str]:
    """The words and signs of a text, in order; a sign is one character, white space is none."""
    import jieba  # type: ignore[import-untyped]

    jieba.setLogLevel("WARNING")
    words: list[str] = []
    for run in RUNS.findall(text):
        if len(run) > 1 and HAN_TEXT.match(run):
            words += jieba.cut(run, HMM=False)  # its guesses at unknown words take seconds for one 哈哈哈... of a page
        else:
            words.append(run)
    return words


def join_words(words: Iterable[str]) -> str:
    """Words as a sentence: a space between two, but none beside Chinese, before a comma, and between two signs."""
    text = ""
    for word in words:
        before, after = text[-1:], word[:1]
        beside_han = HAN_TEXT.match(before) or HAN_TEXT.match(after)
        signs = not before.isalnum() and not after.isalnum()
        if text and not (beside_han or signs or before in OPENING or after in CLOSING):
            text += " "
        text += word
    return text


@dataclass(frozen=True)
class TranslationMemory:
    """Postings by word: `ends[w - 1]` to `ends[w]` of `sentences` (which have it) and `weights` (how much).

    vocabulary: numbers of the words. rarities (W,): idf. targets: the answers.
    """

    vocabulary: dict[str, int]
    rarities: NDArray[np.float64]
    begins: Ints
    sentences: NDArray[np.int32]
    weights: NDArray[np.float32]
    targets: tuple[str, ...]

    @classmethod
    def learn(cls, pairs: Sequence[Pair]) -> TranslationMemory:
        vocabulary: dict[str, int] = {}
        words, sentences, counts = [], [], []
        for number, pair in enumerate(pairs):
            for word, count in _counted(pair.source).items():
                words.append(vocabulary.setdefault(word, len(vocabulary)))
                sentences.append(number)
                counts.append(count)
        word_ids, sentence_ids = np.array(words, np.int64), np.array(sentences, np.int32)
        num_having = np.bincount(word_ids, minlength=len(vocabulary))
        rarities = np.log((1 + len(pairs)) / (1 + num_having)) + 1
        weights = (1 + np.log(np.array(counts, np.float64))) * rarities[word_ids]
        lengths = np.sqrt(np.bincount(sentence_ids, weights**2, minlength=len(pairs)))
        weights /= lengths[sentence_ids]
        order = np.argsort(word_ids, kind="stable")
        return cls(
            vocabulary,
            rarities,
            np.concatenate(([0], np.cumsum(num_having))).astype(np.int64),
            sentence_ids[order],
            weights[order].astype(np.float32),
            tuple(pair.target for pair in pairs),
        )

    def __call__(self, sources: Sequence[str]) -> list[str]:
        """Of each, the target of the most similar source (of several, the first), "" where no word is known."""
        return ["" if best is None else self.targets[best] for best in map(self.most_similar, sources)]

    def most_similar(self, source: str) -> int | None:
        """The number of the pair."""
        cosines = np.zeros(len(self.targets))
        for word, count in _counted(source).items():
            number = self.vocabulary.get(word)
            if number is not None:
                part = slice(self.begins[number], self.begins[number + 1])
                cosines[self.sentences[part]] += (1 + np.log(count)) * self.rarities[number] * self.weights[part]
        best = int(cosines.argmax()) if len(cosines) else 0
        # the first among equals, whatever the sums were rounded to
        best = int(np.flatnonzero(cosines >= cosines[best] * (1 - 1e-6))[0]) if len(cosines) else 0
        return best if len(cosines) and cosines[best] > 0 else None


@dataclass(frozen=True)
class WordLexicon:
    """entries: the likeliest translation of each word of the training pairs."""

    entries: dict[str, str]

    @classmethod
    def learn(cls, pairs: Sequence[Pair]) -> WordLexicon:
        """Of more pairs than `MAX_CELLS` allows, those at even distances are read; of a sentence `MAX_WORDS`."""
        sources, targets = _Vocabulary(), _Vocabulary()
        null = sources.number("")  # for target words that come from none: articles, particles
        left, right = [], []
        for pair in pairs:
            left.append([null, *map(sources.number, _lowered(pair.source)[:MAX_WORDS])])
            right.append([*map(targets.number, split_words(pair.target)[:MAX_WORDS])])
        num_cells = sum(len(e) * len(f) for e, f in zip(left, right, strict=True))
        if num_cells > MAX_CELLS:
            kept = np.linspace(0, len(pairs) - 1, max(1, len(pairs) * MAX_CELLS // num_cells)).astype(int)
            left, right = [left[n] for n in kept], [right[n] for n in kept]
        if not any(right):
            return cls({})
        # a cell is one source word beside one target word in one pair; a slot is one target word in one pair
        e_ids = np.concatenate([np.tile(e, len(f)) for e, f in zip(left, right, strict=True)]).astype(np.int64)
        f_ids = np.concatenate([np.repeat(f, len(e)) for e, f in zip(left, right, strict=True)]).astype(np.int64)
        widths = np.concatenate([np.full(len(f), len(e)) for e, f in zip(left, right, strict=True)]).astype(np.int64)
        slots = np.repeat(np.arange(len(widths), dtype=np.int32), widths)
        keys, entries = np.unique(e_ids * len(targets.words) + f_ids, return_inverse=True)
        del e_ids, f_ids
        e_of, f_of = keys // len(targets.words), keys % len(targets.words)
        chances = np.ones(len(keys))  # t(f | e)
        for _ in range(ITERATIONS):
            expected = chances[entries]
            expected /= np.bincount(slots, expected)[slots]
            counts = np.bincount(entries, expected)
            chances = counts / np.bincount(e_of, counts)[e_of]
        best = np.lexsort((f_of, -chances, e_of))  # by source word, the likeliest translation first
        first = best[np.unique(e_of[best], return_index=True)[1]]
        return cls({sources.words[e_of[n]]: targets.words[f_of[n]] for n in first if e_of[n] != null})

    def __call__(self, sources: Sequence[str]) -> list[str]:
        """Word by word; a word never seen stays as it is."""
        return [join_words(self._translated(source)) for source in sources]

    def _translated(self, source: str) -> list[str]:
        return [self.entries.get(word.lower(), word) for word in split_words(source)]


class _Vocabulary:
    """Numbers for words, in the order in which they come."""

    def __init__(self) -> None:
        self.numbers: dict[str, int] = {}
        self.words: list[str] = []

    def number(self, word: str) -> int:
        found = self.numbers.setdefault(word, len(self.words))
        if found == len(self.words):
            self.words.append(word)
        return found


def _lowered(text: str) -> list[str]:
    return [word.lower() for word in split_words(text)]


def _counted(text: str) -> Counter[str]:
    return Counter(_lowered(text))
