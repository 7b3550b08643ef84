"""Which language a text is in, from its script first; and what kinds of characters it is made of.

    identify("床前明月光")            -> "zh"
    count_kinds(text)[HAN]            how many of its characters are Han; one pass of NumPy, about 10 ns a character

The script settles Chinese, Japanese, Korean and every language with a script of its own. Only for scripts that many
languages share (Latin, Cyrillic, Arabic, Devanagari) a model is asked: py3langid (langid.py's naive Bayes over byte
n-grams, Lui and Baldwin 2012), 5 MB. Lingua is better at single words, but 96 MB large and 7 times slower.
"""

from __future__ import annotations

import re
import unicodedata
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "DIGIT",
    "FIRST_SINGLE",
    "HAN",
    "HANGUL",
    "KANA",
    "LATIN",
    "OTHER",
    "SINGLES",
    "SPACE",
    "code_points",
    "count_kinds",
    "identify",
    "kinds",
]

OTHER = 0  # punctuation and symbols
SPACE = 1
DIGIT = 2
LATIN = 3
HAN = 4
KANA = 5
HANGUL = 6
CYRILLIC = 7
ARABIC = 8
DEVANAGARI = 9
LETTER = 10  # of a script that is not listed here
FIRST_SINGLE = 11  # from here on: SINGLES

SHARED = (  # scripts of many languages, or settled by rules: kind, first, last
    (LATIN, 0x41, 0x24F),
    (LATIN, 0x1E00, 0x1EFF),
    (LATIN, 0xFF21, 0xFF5A),
    (KANA, 0x3041, 0x30FF),
    (KANA, 0x31F0, 0x31FF),
    (KANA, 0xFF66, 0xFF9F),
    (HAN, 0x3005, 0x3007),
    (HAN, 0x3400, 0x9FFF),
    (HAN, 0xF900, 0xFAFF),
    (HAN, 0x20000, 0x323AF),
    (HANGUL, 0x1100, 0x11FF),
    (HANGUL, 0x3131, 0x318E),
    (HANGUL, 0xAC00, 0xD7A3),
    (CYRILLIC, 0x400, 0x52F),
    (ARABIC, 0x600, 0x6FF),
    (ARABIC, 0x750, 0x77F),
    (ARABIC, 0x8A0, 0x8FF),
    (ARABIC, 0xFB50, 0xFEFC),
    (DEVANAGARI, 0x900, 0x97F),
)
SINGLES = (  # scripts that all but name the language
    ("el", 0x370, 0x3FF),
    ("hy", 0x530, 0x58F),
    ("he", 0x590, 0x5FF),
    ("bn", 0x980, 0x9FF),
    ("pa", 0xA00, 0xA7F),
    ("gu", 0xA80, 0xAFF),
    ("or", 0xB00, 0xB7F),
    ("ta", 0xB80, 0xBFF),
    ("te", 0xC00, 0xC7F),
    ("kn", 0xC80, 0xCFF),
    ("ml", 0xD00, 0xD7F),
    ("si", 0xD80, 0xDFF),
    ("th", 0xE00, 0xE7F),
    ("lo", 0xE80, 0xEFF),
    ("bo", 0xF00, 0xFFF),
    ("my", 0x1000, 0x109F),
    ("ka", 0x10A0, 0x10FF),
    ("am", 0x1200, 0x139F),
    ("km", 0x1780, 0x17FF),
)
SAMPLE = 1000  # characters that are looked at
MODEL_SAMPLE = 500  # of them, what the model reads: 0.2 ms
# Words that are frequent in English and are no words elsewhere: a third of running text, and cheaper than the model.
ENGLISH = frozenset(
    re.findall("[a-z]+", "the and that with this from which you are have your their what would they been were there")
)


@lru_cache(maxsize=1)
def _table() -> NDArray[np.uint8]:
    """Kind of every code point; letters and the marks on them only, so that a script's own punctuation is OTHER."""
    table = np.zeros(0x110000, np.uint8)
    for point in range(0x32400):  # nothing above is a letter
        category = unicodedata.category(chr(point))
        if category[0] in "LM":
            table[point] = LETTER
        elif category == "Nd":
            table[point] = DIGIT
        elif chr(point).isspace():
            table[point] = SPACE
    letters = table == LETTER
    letters[[0x3006, 0x3007]] = True  # 〆 and 〇, the latter a number to Unicode
    scripts = (*SHARED, *((FIRST_SINGLE + place, *span) for place, (_, *span) in enumerate(SINGLES)))
    for kind, first, last in scripts:
        table[first : last + 1][letters[first : last + 1]] = kind
    table[0xFE00:0xFE10] = table[0xE0100:0xE01F0] = OTHER  # variation selectors say nothing
    return table


def code_points(text: str) -> NDArray[np.uint32]:
    """The text as an array (len(text),), read-only."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)


def kinds(points: NDArray[np.uint32]) -> NDArray[np.uint8]:
    """The kind of each character: OTHER, SPACE, DIGIT, LATIN, HAN, ..."""
    return _table()[points]


def count_kinds(text: str) -> NDArray[np.intp]:
    """How many characters of each kind a text has; index with OTHER, SPACE, DIGIT, LATIN, HAN, ..."""
    return np.bincount(kinds(code_points(text)), minlength=FIRST_SINGLE + len(SINGLES))


def identify(text: str) -> str:
    """ISO 639-1 code of the main language, "zh" for classical and traditional Chinese too; "" without any letters."""
    sample = text[:SAMPLE]
    counts = count_kinds(sample)
    if not counts[LATIN:].any() and len(text) > SAMPLE:
        sample = text
        counts = count_kinds(text)  # a text may begin with a long rule or a table
    # a Chinese character says about as much as four letters: texts on technology are half English words
    weights = {
        "zh": 4 * (counts[HAN] + counts[KANA]),
        "ko": 2 * counts[HANGUL],
        "latin": counts[LATIN],
        "cyrillic": counts[CYRILLIC],
        "arabic": counts[ARABIC],
        "devanagari": counts[DEVANAGARI],
        "letter": counts[LETTER],
    }
    single = int(counts[FIRST_SINGLE:].argmax())
    weights[SINGLES[single][0]] = counts[FIRST_SINGLE + single]
    best = max(weights, key=weights.__getitem__)
    if not weights[best]:
        return ""
    if best == "zh":  # Japanese has a third and more of kana; a の on a shop's sign does not make a text Japanese
        return "ja" if 10 * counts[KANA] > counts[HAN] + counts[KANA] else "zh"
    if best == "latin":
        return _latin(sample, int(counts[LATIN]))
    return _ask_model(sample) if best in ("cyrillic", "arabic", "devanagari", "letter") else best


def _latin(sample: str, letters: int) -> str:
    words = sample.lower().split()
    if 12 * sum(word in ENGLISH for word in words) >= len(words):
        return "en"
    if letters < 10 and sample.isascii():
        return "en"  # too little for any model ("OK" is Afrikaans to one and Zulu to another)
    return _ask_model(sample)


CHINESE = ("wuu", "yue")  # what the model hears in a page of technical Chinese that is mostly Latin letters


def _ask_model(sample: str) -> str:
    code = str(_model().classify(sample[:MODEL_SAMPLE])[0])
    return "zh" if code in CHINESE else code


@lru_cache(maxsize=1)
def _model() -> Any:
    import py3langid  # type: ignore[import-untyped]  # half a second, hence not before it is needed

    return py3langid
