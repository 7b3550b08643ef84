"""Altered copies of training examples: other words for the same, in another order, with mistakes, translated and back.

    augmenter = Augmenter.of(recipe, seed, progress)
    for document in documents:                       # of training, never of validation
        copies = list(augmenter.augment(document))   # ids "faq.csv#7+synonyms", "faq.csv#7+swap"
    copies = augmenter.back_translate(documents, to_english, to_chinese, language="zh")
    augmenter.copies, augmenter.dropped              # how many of which kind, and what came to nothing

Of a dialogue only the user's last turn is altered, so that its answer stays right; of any other document the text, and
its label stays. Each copy is altered in one way: EDA's four (arXiv:1901.11196), which gain most where examples are few;
homophones and look-alikes, the mistakes of Chinese keyboards; typos; back-translation (arXiv:1511.06709). The same seed
gives the same copies of a document, in any order and any process.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from itertools import islice, pairwise
from random import Random

from bimo.data.confusions import confusions
from bimo.data.filters import base_code
from bimo.data.language import identify
from bimo.data.noise import (
    Edit,
    confused,
    dropped,
    how_many,
    misspelt,
    question_of,
    random_of,
    with_question,
)
from bimo.data.records import Document
from bimo.data.synonyms import Synonyms
from bimo.data.words import Pieces, cut, kept
from bimo.errors import UsageError
from bimo.recipe import AugmentRecipe
from bimo.registries.trouble import Progress

__all__ = ["KINDS", "Augmenter", "Translate", "copy_kind", "insertions", "replacements", "swaps"]

Translate = Callable[[list[str]], list[str]]
"""Texts -> their translations, one of each."""

KINDS = ("synonyms", "insert", "swap", "delete", "homophones", "shapes", "typos")  # the recipe's names
STARTS = re.compile(r"(?:[.!?…。！？\n]|\A)[\s\"“‘'(*-]*\Z")  # what stands before a sentence's first word
ACRONYM = 4  # letters: shorter words in capitals are IT and US, no shouted words
COPY = re.compile(rf"\+({'|'.join((*KINDS, 'back_translation'))})\d*\Z")  # the end of an id
TRIES = 5  # of a kind whose copies are there already: a short text has few
MAX_RATIO = 3  # a translation of a translation that is so much longer is a model going round in circles


def copy_kind(identity: str) -> str | None:
    """How the document of that id was altered; None: it is no copy."""
    found = COPY.search(identity)
    return found and found.group(1)


def replacements(synonyms: Synonyms, pieces: Pieces, share: float, random: Random, least: int = 0) -> str:
    """A share of the words becomes one of their synonyms each; names and words without synonyms stay."""
    parts, words = list(pieces.parts), pieces.words
    left = how_many(share, len(words), random, least)
    for place in random.sample(words, len(words)):
        if not left:
            break
        if found := _synonyms(synonyms, pieces, place):
            parts[place] = random.choice(found)
            left -= 1
    return "".join(parts)


def insertions(synonyms: Synonyms, pieces: Pieces, share: float, random: Random, least: int = 0) -> str:
    """Synonyms of a share of the words are put before words anywhere, of the same script."""
    parts, words = list(pieces.parts), pieces.words
    chinese = set(pieces.chinese)
    left = how_many(share, len(words), random, least)
    for place in random.sample(words, len(words)):
        if not left:
            break
        if found := _synonyms(synonyms, pieces, place):
            if place in chinese:
                before = random.choice(pieces.chinese)
                parts[before] = random.choice(found) + parts[before]
            else:
                before = random.choice(pieces.spaced)
                parts[before] = f"{random.choice(found).lower()} {parts[before]}"
            left -= 1
    return "".join(parts)


def swaps(pieces: Pieces, share: float, random: Random, least: int = 0) -> str:
    """A share of the words changes places, two by two and within a script; a sentence still begins with a capital."""
    parts = list(pieces.parts)
    pools = [pool for pool in (pieces.spaced, pieces.chinese) if len({pieces.parts[place] for place in pool}) > 1]
    if not pools:
        return "".join(parts)
    for _ in range(how_many(share / 2, sum(map(len, pools)), random, least)):
        pool = random.choices(pools, [len(pool) for pool in pools])[0]
        first, second = sorted(random.sample(pool, 2))
        one, other = parts[first], parts[second]
        if _starts(parts, first) != _starts(parts, second) and (one.istitle() or other.istitle()):
            front, back = (first, second) if _starts(parts, first) else (second, first)
            if parts[front].istitle() and parts[front] != "I":
                parts[front], parts[back] = parts[back][:1].upper() + parts[back][1:], parts[front].lower()
                continue
        parts[first], parts[second] = other, one
    return "".join(parts)


class Augmenter:
    """Makes the copies a recipe asks for, and counts them.

    copies: by kind. dropped: why there is no copy, or none more: "nothing to alter" (no kind changes this text), and
    of back-translations "another language", "empty", "identical", "loses what must stay", "far longer", "too
    different".
    """

    def __init__(
        self,
        edits: dict[str, tuple[Edit, float]],
        *,
        copies: int,
        seed: int,
        synonyms: Synonyms,
        instruction: str,
        similarity: float,
    ) -> None:
        """Most callers want `Augmenter.of`. edits: name -> what it does, and to which share of the words."""
        self._edits, self._num_copies, self._seed, self._synonyms = edits, copies, seed, synonyms
        self._similarity = similarity
        self._around = instruction.split("{prompt}") if instruction.count("{prompt}") == 1 else ["", ""]
        self.copies: Counter[str] = Counter()
        self.dropped: Counter[str] = Counter()

    @classmethod
    def of(cls, recipe: AugmentRecipe, seed: int, progress: Progress, instruction: str | None = None) -> Augmenter:
        """By a recipe; what it needs is fetched, WordNet only when the first English word is looked up.

        instruction: what was put around the questions, with {prompt} in it: it stays as it is.
        Raises UsageError or DataError (a list of synonyms), DownloadError.
        """
        synonyms = Synonyms(recipe.synonym_files, progress)
        sets = confusions(progress) if recipe.homophones or recipe.shapes else None
        every: dict[str, Edit] = {
            "synonyms": partial(replacements, synonyms),
            "insert": partial(insertions, synonyms),
            "swap": swaps,
            "delete": dropped,
            "homophones": partial(confused, sets.homophones if sets else {}),
            "shapes": partial(confused, sets.shapes if sets else {}),
            "typos": misspelt,
        }
        edits = {kind: (every[kind], share) for kind in KINDS if (share := getattr(recipe, kind))}
        return cls(
            edits,
            copies=recipe.copies,
            seed=seed,
            synonyms=synonyms,
            instruction=instruction or "",
            similarity=recipe.similarity,
        )

    def augment(self, document: Document) -> Iterator[Document]:
        """The document's altered copies, at most as many as the recipe says, all different.

        The kinds take turns in an order of the document's own, those that change nothing are passed over.
        """
        if not self._edits:
            return
        before, question, after = self._opened(question_of(document))
        pieces = cut(question, self._synonyms)
        order = random_of(self._seed, document.id).sample(list(self._edits), len(self._edits))
        made, numbers = {question}, Counter[str]()
        turn = idle = 0
        while len(made) <= self._num_copies and idle < TRIES * len(order):
            kind = order[turn % len(order)]
            edit, share = self._edits[kind]
            text = edit(pieces, share, random_of(self._seed, document.id, kind, turn), 1) if pieces.words else question
            turn += 1
            if text in made or not text.strip():
                idle += 1
                continue
            idle = 0
            made.add(text)
            numbers[kind] += 1
            self.copies[kind] += 1
            yield _copy(document, before + text + after, f"{kind}{numbers[kind] if numbers[kind] > 1 else ''}")
        if len(made) == 1:
            self.dropped["nothing to alter"] += 1

    def back_translate(
        self, documents: Iterable[Document], there: Translate, back: Translate, *, language: str = "", batch: int = 64
    ) -> Iterator[Document]:
        """A copy of each document as two translators make it of its question; only the copies come.

        language: what `there` reads, such as "zh"; documents in another are passed over. "": all are read.
        batch: questions that are translated in one call. A copy without a number, address or placeholder that the
        question has is dropped: it may ask something else.
        """
        remaining = iter(documents)
        while some := list(islice(remaining, batch)):
            fitting = [(document, *self._opened(question_of(document))) for document in some]
            fitting = [row for row in fitting if self._reads(row[2], language)]
            if not fitting:
                continue
            copies = _translated(back, _translated(there, [question for _, _, question, _ in fitting]))
            for (document, before, question, after), text in zip(fitting, copies, strict=True):
                if reason := _useless(question, text, self._similarity):
                    self.dropped[reason] += 1
                else:
                    self.copies["back_translation"] += 1
                    yield _copy(document, before + text.strip() + after, "back_translation")

    def _reads(self, question: str, language: str) -> bool:
        if question.strip() and (not language or identify(question) == base_code(language)):
            return True
        self.dropped["another language" if question.strip() else "empty"] += 1
        return False

    def _opened(self, question: str) -> tuple[str, str, str]:
        """(before, the question itself, after): without the instruction around it."""
        before, after = self._around
        if len(question) >= len(before) + len(after) and question.startswith(before) and question.endswith(after):
            return before, question[len(before) : len(question) - len(after)], after
        return "", question, ""


def _copy(document: Document, question: str, kind: str) -> Document:
    return replace(with_question(document, question), id=f"{document.id}+{kind}")


def _translated(translate: Translate, texts: list[str]) -> list[str]:
    translations = translate(texts)
    if len(translations) != len(texts):
        raise UsageError(
            f'a translator gives a translation for each text, got {len(translations)} for {len(texts)}: give "" '
            f"where there is none",
            "back_translation",
        )
    return list(translations)


def _useless(question: str, text: str, similarity: float) -> str | None:
    """Why a back-translation is not worth learning."""
    if not text.strip():
        return "empty"
    if text.casefold().split() == question.casefold().split():
        return "identical"
    if Counter(kept(question)) - Counter(kept(text)):
        return "loses what must stay"
    if len(text) > MAX_RATIO * max(len(question), 10):
        return "far longer"
    return "too different" if _similarity(question, text) < similarity else None


def _similarity(one: str, other: str) -> float:
    """The share of their pairs of neighbouring characters that two texts have in common (Dice 1945)."""
    pairs, others = (Counter(pairwise(" ".join(text.casefold().split()))) for text in (one, other))
    return 2 * (pairs & others).total() / max(1, pairs.total() + others.total())


def _synonyms(synonyms: Synonyms, pieces: Pieces, place: int) -> list[str]:
    """What may stand at a place, with its capitals; nothing for names and acronyms."""
    word = pieces.parts[place]
    before = _before(pieces, place)
    if word in synonyms or word.islower():
        return synonyms.of(word, before)
    if word.isupper() and len(word) >= ACRONYM:
        return [found.upper() for found in synonyms.of(word.lower(), before)]
    if word.istitle() and _starts(pieces.parts, place):
        return [found[:1].upper() + found[1:] for found in synonyms.of(word.lower(), before)]
    return [] if word.isascii() else synonyms.of(word, before)


def _before(pieces: Pieces, place: int) -> str:
    """The word before a place, in lower case, if nothing but a space stands between them."""
    return pieces.parts[place - 2].lower() if place > 1 and pieces.parts[place - 1].isspace() else ""


def _starts(parts: list[str], place: int) -> bool:
    """Whether a sentence begins there."""
    if place == 0:
        return True
    gap = parts[place - 1]
    found = STARTS.search(gap)
    return found is not None and (place == 1 or bool(re.match(r"[.!?…。！？\n]", found[0])))
