"""Mistakes that people make, put into text: to measure how well a model bears them, and to train it on them.

    noise = Noise("mixed", 0.1, seed=1)
    noise("今天的天气很好, isn't it wonderful?")    # "今天的天汽很好, isn't it wondreful?"

A share of the words is changed: English words by typos, Chinese ones by a character that sounds alike, either by being
dropped. The same seed changes the same text in the same way, whatever came before it, so two models are measured on
the same mistakes. What `words.cut` keeps (numbers, URLs, placeholders, code) stays.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from hashlib import blake2b
from random import Random
from typing import Literal, get_args

from bimo.data.confusions import confusions, typable, typo
from bimo.data.records import Document, Message
from bimo.data.words import Pieces, cut
from bimo.errors import UsageError
from bimo.registries.trouble import Progress

__all__ = ["KINDS", "Edit", "Kind", "Noise", "confused", "dropped", "how_many", "misspelt", "question_of", "random_of",
           "with_question"]  # fmt: skip

Kind = Literal["typos", "homophones", "dropped", "mixed"]
KINDS: tuple[Kind, ...] = get_args(Kind)

Edit = Callable[[Pieces, float, Random, int], str]
"""(pieces, share of the words, random, how many words at least) -> the altered text, or the text itself."""


def random_of(*parts: object) -> Random:
    """Random numbers that hang on these parts alone, in any process."""
    return Random(blake2b("\0".join(map(str, parts)).encode("utf-8", "surrogatepass"), digest_size=16).digest())


def how_many(share: float, count: int, random: Random, least: int) -> int:
    """share * count as a whole number that on average is right: 0.1 of 5 words is one word in half of the cases."""
    return min(count, max(least, int(share * count + random.random())))


def misspelt(pieces: Pieces, share: float, random: Random, least: int = 0) -> str:
    """A typo in a share of the words of Latin script."""
    count = how_many(share, len(pieces.spaced), random, least)
    return _each(pieces, [place for place in pieces.spaced if typable(pieces.parts[place])], count, random, typo)


def confused(sets: Mapping[str, str], pieces: Pieces, share: float, random: Random, least: int = 0) -> str:
    """A share of the Chinese words has one character replaced by one of its set."""
    count = how_many(share, len(pieces.chinese), random, least)
    able = [place for place in pieces.chinese if any(char in sets for char in pieces.parts[place])]
    return _each(pieces, able, count, random, lambda word, random: _swapped(sets, word, random))


def dropped(pieces: Pieces, share: float, random: Random, least: int = 0) -> str:
    """A share of the words is left out, with the space behind each; one word always stays."""
    words = pieces.words
    count = min(how_many(share, len(words), random, least), len(words) - 1)
    return _without(pieces.parts, set(random.sample(words, count))) if count > 0 else "".join(pieces.parts)


def mixed(sets: Mapping[str, str], pieces: Pieces, share: float, random: Random, least: int = 0) -> str:
    """A share of the words, each dropped (one in three) or misspelt in the way of its script."""
    words, parts, lost = pieces.words, list(pieces.parts), set[int]()
    chinese = set(pieces.chinese)
    for place in random.sample(words, how_many(share, len(words), random, least)):
        word = parts[place]
        if random.random() < 1 / 3 and len(lost) < len(words) - 1:
            lost.add(place)
        elif place in chinese:
            parts[place] = _swapped(sets, word, random)
        elif typable(word):
            parts[place] = typo(word, random)
    return _without(parts, lost)


class Noise:
    """Text -> text with mistakes in `share` of its words, of one kind.

    A kind that does not suit the text's script (homophones in English) changes nothing. Raises UsageError for an
    unknown kind or a share outside of 0 to 1, and with the first Chinese text DownloadError where the sets of
    characters cannot be fetched.
    """

    def __init__(
        self, kind: Kind, share: float, seed: int, progress: Progress = lambda label, done, total: None
    ) -> None:
        if kind not in KINDS:
            raise UsageError(f"noise is {', '.join(KINDS)}, not {kind!r}", "kind")
        if not 0 <= share <= 1:
            raise UsageError(f"share is how many of the words are changed, from 0 to 1, not {share}", "share")
        self.kind, self.share, self.seed = kind, share, seed
        self._progress = progress

    def __call__(self, text: str) -> str:
        if not self.share:
            return text
        pieces, random = cut(text), random_of(self.kind, self.seed, text)
        if self.kind == "typos":
            return misspelt(pieces, self.share, random)
        if self.kind == "dropped":
            return dropped(pieces, self.share, random)
        sets = confusions(self._progress).homophones if pieces.chinese else {}
        return (confused if self.kind == "homophones" else mixed)(sets, pieces, self.share, random)

    def document(self, document: Document) -> Document:
        """The document with noise in what a model is asked: a dialogue's last question, else the text."""
        question = question_of(document)
        altered = self(question)
        return document if altered == question else with_question(document, altered)


def question_of(document: Document) -> str:
    """What may be altered without making the answer wrong: of a dialogue the user's last turn ("" without one), else
    the text."""
    if not document.messages:
        return document.text
    return next((content for role, content in reversed(document.messages) if role == "user"), "")


def with_question(document: Document, question: str) -> Document:
    """A copy of the document with another `question_of`."""
    if not document.messages:
        return replace(document, text=question)
    messages = list(document.messages)
    last = max(place for place, message in enumerate(messages) if message.role == "user")
    messages[last] = Message("user", question)
    return replace(document, messages=tuple(messages), text="\n".join(message.content for message in messages))


def _each(pieces: Pieces, places: list[int], count: int, random: Random, change: Callable[[str, Random], str]) -> str:
    parts = list(pieces.parts)
    for place in random.sample(places, min(count, len(places))):
        parts[place] = change(parts[place], random)
    return "".join(parts)


def _swapped(sets: Mapping[str, str], word: str, random: Random) -> str:
    places = [place for place, char in enumerate(word) if char in sets]
    if not places:
        return word
    place = random.choice(places)
    return word[:place] + random.choice(sets[word[place]]) + word[place + 1 :]


def _without(parts: list[str], lost: set[int]) -> str:
    """The parts without those at `lost`; of the spaces on both sides of one, one stays."""
    text: list[str] = []
    gap = False
    for place, part in enumerate(parts):
        if place in lost:
            gap = True
            continue
        if gap and part.startswith(" ") and (not text or text[-1][-1].isspace()):
            part = part[1:]
        elif gap and part[0] in ",.;:!?" and text and text[-1] == " ":
            text.pop()
        if part:
            text.append(part)
            gap = False
    joined = "".join(text)
    return joined.rstrip(" ") if gap and not parts[-1].endswith(" ") else joined
