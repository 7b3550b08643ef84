"""What is mistaken for what: Chinese characters that sound or look alike, English keys that lie side by side.

    sets = confusions(progress)
    sets.homophones["在"]            # "再载哉..."
    sets.shapes["未"]                # "末..."
    typo("window", random)           # "widnow", "windw", "winndow", "wimdow"

The sets are pycorrector's (about 3,500 and 2,400 simplified characters; 0.2 MB, read in 10 ms, once per process). The
package is unpacked, none of its code is run. Traditional characters have no sets. Typos are as in arXiv:1905.11268.
"""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import Path
from random import Random
from typing import NamedTuple

from bimo.errors import DataError
from bimo.registries.packages import fetch_package
from bimo.registries.trouble import Progress

__all__ = ["PYCORRECTOR", "PYCORRECTOR_SHA256", "Confusions", "confusions", "read_confusions", "typable", "typo"]

PYCORRECTOR = "pypi:pycorrector==1.1.4"
PYCORRECTOR_SHA256 = "62fba7a2573ff011b4c57f1fff301a7015cab339c567991aa0bb6ff53248b322"
LATIN = re.compile("[A-Za-z\u00c0-\u024f]")
ROWS = ("qwertyuiop", "asdfghjkl", "zxcvbnm")
MIN_LETTERS = 3  # of a word with a typo; two letters with one wrong are another word


class Confusions(NamedTuple):
    """A character -> those it is mistaken for, as a string."""

    homophones: dict[str, str]
    shapes: dict[str, str]


def confusions(progress: Progress) -> Confusions:
    """The sets, fetched on first use. Raises DownloadError where they cannot be."""
    return read_confusions(fetch_package(PYCORRECTOR, PYCORRECTOR_SHA256, progress) / "pycorrector" / "data")


@lru_cache(maxsize=1)
def read_confusions(folder: Path) -> Confusions:
    """same_pinyin.txt ("在, its homophones, those of another tone", by tabs) and same_stroke.txt (alike, by tabs)."""
    homophones: dict[str, dict[str, None]] = {}
    for first, *others in _rows(folder / "same_pinyin.txt"):
        homophones.setdefault(first, {}).update(dict.fromkeys("".join(others)))
    shapes: dict[str, dict[str, None]] = {}
    for row in _rows(folder / "same_stroke.txt"):
        for char in row:
            shapes.setdefault(char, {}).update(dict.fromkeys(row))
    return Confusions(_strings(homophones), _strings(shapes))


def _rows(file: Path) -> list[list[str]]:
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{file} cannot be read ({error}): remove the folder {file.parents[2]} to fetch it again"
        ) from None
    return [line.strip().split("\t") for line in lines if line.strip() and not line.startswith("#")]


def _strings(sets: dict[str, dict[str, None]]) -> dict[str, str]:
    return {
        char: others
        for char, alike in sets.items()
        if len(char) == 1 and (others := "".join(other for other in alike if len(other) == 1 and other != char))
    }


def typable(word: str) -> bool:
    """Whether a word has letters enough, of a Latin script, for a typo."""
    return len(LATIN.findall(word)) >= MIN_LETTERS


def typo(word: str, random: Random) -> str:
    """The word with one mistake behind its first letter: two letters change places, one is lost, doubled, or the key
    beside it was hit. It differs from the word, if that is `typable`."""
    places = [place for place, char in enumerate(word) if place and LATIN.match(char)]
    if not places:
        return word
    place = random.choice(places)
    letter, before, after = word[place], word[:place], word[place + 1 :]
    kinds = [before + after, before + letter + word[place:]]
    if after and LATIN.match(after) and after[0].lower() != letter.lower():
        kinds.append(before + after[0] + letter + after[1:])
    if beside := _neighbours().get(letter.lower()):
        key = random.choice(beside)
        kinds.append(before + (key.upper() if letter.isupper() else key) + after)
    return random.choice(kinds)


@lru_cache(maxsize=1)
def _neighbours() -> dict[str, str]:
    """Letter -> the keys around it; each row is shifted by about half a key against the one above."""
    beside: dict[str, str] = {}
    for number, row in enumerate(ROWS):
        for place, letter in enumerate(row):
            near = row[max(0, place - 1) : place] + row[place + 1 : place + 2]
            if number:
                near += ROWS[number - 1][place : place + 2]
            if number + 1 < len(ROWS):
                near += ROWS[number + 1][max(0, place - 1) : place + 1]
            beside[letter] = near
    return beside
