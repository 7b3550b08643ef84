"""How much texts repeat themselves, and how many of them say what is listed.

    repetition(["the cat sat on the mat", "好 好 好 好 好 好"])        # seq-rep-4, 0 to 1
    listed_rate(answers, ["make a bomb", "毒品"])                     # share of the answers with one of them

What unlikelihood (objectives.unlikelihood) is measured by. Pieces of a text are words where a script has spaces between
them, characters of Chinese and its like, and signs.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from bimo.errors import UsageError

__all__ = ["listed_rate", "pieces", "repetition"]

SPACED = "[^\\W_\u2e80-\U0010ffff]"  # a letter or digit of a script with spaces
PIECE = re.compile(f"{SPACED}+|\\S")
LONGEST = 40  # letters of a word: hahahaha... without an end repeats itself, too


def pieces(text: str) -> list[str]:
    """Words, characters and signs, in order: "go 去哪儿?" -> ["go", "去", "哪", "儿", "?"]; the letters of what is too
    long to be a word."""
    return [piece for run in PIECE.findall(text) for piece in ([run] if len(run) <= LONGEST else run)]


def repetition(texts: Sequence[str], n: int = 4) -> float:
    """seq-rep-n (arXiv:1908.04319): 1 - different n-grams / n-grams, of each text, on average.

    A text of less than n pieces repeats nothing. Raises UsageError without texts, and for n < 1.
    """
    _check(texts)
    if n < 1:
        raise UsageError(f"n is how many pieces are looked at together, at least 1, not {n}", "n")
    return sum(_repeated(pieces(text), n) for text in texts) / len(texts)


def _repeated(found: list[str], n: int) -> float:
    grams = list(zip(*(found[start:] for start in range(n)), strict=False))
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def listed_rate(texts: Sequence[str], words: Sequence[str]) -> float:
    """The share of texts in which one of `words` stands, large or small; as a whole word where a script has spaces, so
    that "grape" holds no "rape".

    Raises UsageError without texts or words, and for a word of nothing.
    """
    _check(texts)
    if not words or not all(word.strip() for word in words):
        raise UsageError("a list of words to look for is expected, none of them empty", "words")
    listed = re.compile("|".join(_whole(word) for word in words), re.IGNORECASE)
    return sum(bool(listed.search(text)) for text in texts) / len(texts)


def _whole(word: str) -> str:
    parts = word.split()
    before = f"(?<!{SPACED})" if re.match(SPACED, parts[0]) else ""
    after = f"(?!{SPACED})" if re.match(SPACED, parts[-1][-1]) else ""
    return before + r"\s+".join(map(re.escape, parts)) + after


def _check(texts: Sequence[str]) -> None:
    if isinstance(texts, str) or not texts:
        raise UsageError("a list of texts is expected, with at least one in it", "texts")
