"""Which documents are dropped, and why: language, quality, personal data, toxic words.

    for name, reason_to_drop in make_filters(recipe.data.clean):
        if reason := reason_to_drop(document):
            dropped[name, reason] += 1

The quality rules are those of C4 (arXiv:1910.10683), Gopher (arXiv:2112.11446) and FineWeb (arXiv:2406.17557), where
they hold for text without spaces between words; the others are put in terms of characters. Repetition is measured
by compression: one rule for repeated words, lines and passages in every language. Poems, definitions and dialogues are
short and full of line breaks, so no rule asks for length of lines or for full stops.
"""

from __future__ import annotations

import re
import zlib
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from bimo.data.language import DIGIT, HAN, KANA, LATIN, OTHER, SPACE, count_kinds, identify
from bimo.data.privacy import find
from bimo.data.records import Document
from bimo.errors import UsageError
from bimo.recipe import CleanRecipe

__all__ = ["Filter", "base_code", "make_filters", "untranslated"]

Filter = Callable[[Document], str | None]
"""Gives the reason to drop a document (a fixed phrase, to be counted), or None."""

COMPRESSED = 100_000  # characters that are compressed: 1 ms of English, 3 of Chinese
MIN_COMPRESSED = 100  # bytes; shorter texts say nothing by their compression
# Compressed to plain bytes: prose has .45 to .55, a verse sung three times .27, "buy now! " again and again .05.
MIN_RATIO = 0.18
PLACEHOLDERS = ("lorem ipsum dolor", "your text goes here", "请在此处输入", "請在此處輸入")
NO_SCRIPT = re.compile(
    r"javascript (?:is (?:disabled|not enabled|required)|must be enabled)|(?:enable|启用|开启) ?javascript"
)
NOTICE_CHARS = 1000  # a text longer than this is about JavaScript, not for want of it
# Gopher's rule asks for two of its stop words; without any, English is a list or nonsense. Classical words are among
# the Chinese ones.
STOP_EN = frozenset(re.findall("[a-z]+", "the be to of and that have with a in is for it on as are was i you he this"))
STOP_ZH = frozenset("的是了不在有我他这个们一人上也而之其以者为与于無为無這個們為與於曰乃则")
MIN_WORDS, MIN_HAN = 100, 300  # from which length on the rule holds


def make_filters(clean: CleanRecipe) -> list[tuple[str, Filter]]:
    """The filters a recipe asks for, in the order to run them, with the recipe's names; they can be pickled.

    Raises UsageError for a list of words that cannot be read.
    """
    filters: list[tuple[str, Filter]] = []
    if clean.min_chars:
        filters.append(("min_chars", partial(_too_short, clean.min_chars)))
    if clean.languages:
        codes = frozenset(base_code(code) for code in clean.languages)
        filters.append(("languages", partial(_other_language, codes)))
    if clean.quality:
        filters.append(("quality", _poor))
    if clean.personal_data == "drop":
        filters.append(("personal_data", _personal))
    if clean.toxic < 1:
        filters.append(("toxic", partial(_toxic, _automaton(clean.toxic_words), clean.toxic)))
    return filters


def base_code(code: str) -> str:
    """The language that a code names: "zh" for "zh-Hant" and "zh_CN"."""
    return re.split("[-_]", code.lower(), maxsplit=1)[0]


def _too_short(min_chars: int, document: Document) -> str | None:
    """A dialogue may be as short as "Hi" and "Hello!", but nobody may have said nothing."""
    if document.messages:
        return None if all(message.content.strip() for message in document.messages) else "an empty message"
    return "too few characters" if len(document.text.strip()) < min_chars else None


def _other_language(codes: frozenset[str], document: Document) -> str | None:
    code = base_code(document.language) or identify(document.text)
    return None if code in codes else "another language" if code else "no language"


def _poor(document: Document) -> str | None:
    text = document.text
    counts = count_kinds(text)
    visible = len(text) - int(counts[SPACE])
    letters = visible - int(counts[OTHER]) - int(counts[DIGIT])
    if letters + counts[DIGIT] == 0:
        return "no letters"
    if _repeats(text):
        return "repeats itself"
    if document.messages:
        return None  # "42" and "OK :-)" are good answers
    if text.count("\ufffd") > 0.01 * visible:
        return "undecodable characters"
    # A Chinese character weighs as two letters: words are short, and half of a dictionary is punctuation.
    weight = int(counts[HAN] + counts[KANA])
    if letters + weight < 0.5 * (visible + weight):
        return "mostly digits" if counts[DIGIT] > counts[OTHER] else "mostly symbols"
    lowered = text.lower()
    if any(phrase in lowered for phrase in PLACEHOLDERS):
        return "placeholder text"
    if len(text) < NOTICE_CHARS and "javascript" in lowered and NO_SCRIPT.search(lowered):
        return "a notice about JavaScript"
    return _poor_lines(text) or _poor_words(
        lowered, int(counts[LATIN]), int(counts[HAN]), int(counts[KANA]), document.language
    )


def untranslated(document: Document) -> str | None:
    """Of a source of translations: whether both turns are the same text, letters and digits compared."""
    first, *others = ("".join(filter(str.isalnum, message.content.lower())) for message in document.messages)
    return "both languages have the same text" if first in others else None


def _repeats(text: str) -> bool:
    plain = text[:COMPRESSED].encode("utf-8", "replace")
    return len(plain) >= MIN_COMPRESSED and len(zlib.compress(plain, 1)) < MIN_RATIO * len(plain)


def _poor_lines(text: str) -> str | None:
    """Gopher's rules on lines, for texts of ten and more: half of a refrain's lines are repeated too."""
    if text.count("\n") < 9:
        return None
    lines = [line for raw in text.split("\n") if (line := raw.strip())]
    counted = Counter(lines)
    repeated = sum(len(line) * (times - 1) for line, times in counted.items() if times > 1)
    if repeated > 0.4 * sum(map(len, lines)):
        return "repeated lines"
    if sum(line.endswith(("...", "…")) for line in lines) > 0.3 * len(lines):
        return "lines that are cut off"
    return None


def _poor_words(text: str, latin: int, han: int, kana: int, language: str) -> str | None:
    if han >= MIN_HAN and han > latin and not kana:
        return None if len(STOP_ZH.intersection(text)) >= 2 else "no function words"
    if latin < 200 or latin < 4 * han:
        return None
    words = text.split()
    if not 2.5 <= latin / len(words) <= 15:  # Gopher's 3 to 10, wider for German, Finnish and code
        return "words of an odd length"
    if (
        len(words) >= MIN_WORDS
        and len(STOP_EN.intersection(words)) < 2
        and (base_code(language) or identify(text)) == "en"
    ):
        return "no function words"
    return None


def _personal(document: Document) -> str | None:
    return "personal data" if find(document.text) else None


def _automaton(files: tuple[str, ...]) -> Any:
    import ahocorasick

    if not files:
        raise UsageError("toxic drops documents by their words: name files of them in toxic_words", "toxic_words")
    words = {word for file in files for line in _read(file).splitlines() if (word := " ".join(line.lower().split()))}
    if not words:
        raise UsageError(f"there are no words in {', '.join(files)}: one on each line is expected", "toxic_words")
    automaton = ahocorasick.Automaton()
    for word in words:
        automaton.add_word(word, word)
    automaton.make_automaton()
    return automaton


def _read(file: str) -> str:
    try:
        return Path(file).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"the list of words {file} cannot be read as UTF-8 text ({error})", "toxic_words") from None


def _toxic(automaton: Any, limit: float, document: Document) -> str | None:
    text = document.text.lower()
    found: list[tuple[int, int, int]] = []  # start, longest first, words
    for last, word in automaton.iter(text):
        start = last - len(word) + 1
        if _is_whole(text, start, last + 1, word):
            found.append((start, -(last + 1), _num_words(word)))
    if not found:
        return None
    found.sort()
    toxic = covered = 0
    for _, end, words in found:  # a word inside of a longer one is not counted again
        if -end > covered:
            toxic += words
            covered = -end
    return "toxic words" if toxic > limit * max(1, _num_words(text)) else None


def _is_whole(text: str, start: int, end: int, word: str) -> bool:
    """Where the word begins or ends in a letter of a script with spaces, the text must not go on with another."""
    before, after = text[start - 1 : start], text[end : end + 1]
    return not ((_spaced(word[0]) and before and _spaced(before)) or (_spaced(word[-1]) and after and _spaced(after)))


def _spaced(char: str) -> bool:
    return char.isalnum() and char < "\u2e80"


SPACED_WORD = re.compile("[^\\W_\u2e80-\U0010ffff]+")


def _num_words(text: str) -> int:
    """Words, and characters of Chinese, Japanese and Korean."""
    counts = count_kinds(text)
    return len(SPACED_WORD.findall(text)) + int(counts[HAN] + counts[KANA])
