"""A text as words that may be altered, and what stands between them and must not be.

    pieces = cut("Open `git log` 打开文件 at https://example.org, 3 times")
    [pieces.parts[place] for place in pieces.words]      # ["Open", "打开", "文件", "at", "times"]
    "".join(pieces.parts)                                # the text again

Left alone are control tokens (<|im_end|>), tags, placeholders ([EMAIL], {name}), URLs, addresses, paths, code, numbers
(三百 too) and whatever has digits or signs inside, such as GPT-4 or read_file: what they mean hangs on each character.
Chinese is cut by jieba, whose dictionary takes about a second and 70 MB, once per process.
"""

from __future__ import annotations

import re
from collections.abc import Container
from functools import lru_cache
from typing import Any, NamedTuple

__all__ = ["Pieces", "cut", "kept"]

CJK = r"\p{Han}\p{Hiragana}\p{Katakana}\u3000-\u303f\uff00-\uffef“”‘…—"
# Of a chunk that stands between spaces: a digit, an underscore, signs between letters, aCapitalInside, a call().
CODE = r"\d|_|[\p{L})\]][./\\@:=&~+]+[\p{L}(\[]|\p{Ll}\p{Lu}|\(\)|^[@#$%~/\\]\p{L}|^-{1,2}\p{L}"
WORD = r"[\p{L}\p{M}]+(?:['’-][\p{L}\p{M}]+)*"
UNSPACED = r"[\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}\p{Tibetan}\p{Hiragana}\p{Katakana}]"  # nothing tells their words
NUMBER = re.compile(  # 三百, 第二, 三百个, but not 一般 and 万一
    "第?[〇零一二两三四五六七八九十百千万亿壹贰叁肆伍陆柒捌玖拾佰仟兩萬億]+[个個只条张本次年月日天位名件家台岁元块点分秒号楼层种倍]?"
)
LONGEST = 6  # words that are tried as one, which a list may know


class Pieces(NamedTuple):
    """parts: joined they are the text. spaced, chinese: which of them are words, of scripts with spaces and of Chinese;
    ascending."""

    parts: list[str]
    spaced: list[int]
    chinese: list[int]

    @property
    def words(self) -> list[int]:
        return sorted(self.spaced + self.chinese)


class _Patterns(NamedTuple):
    tokens: Any
    code: Any
    word: Any
    unspaced: Any


@lru_cache(maxsize=1)
def _patterns() -> _Patterns:
    import regex  # type: ignore[import-untyped]  # knows scripts by name

    tokens = (
        r"(?P<keep>```.*?(?:```|\Z)|`[^`\n]*`|<[^\s<>][^<>\n]{0,80}>|\{\{.{0,80}?\}\}|\{[^{}\n]{0,80}\}"
        r"|\[/?[A-Z][A-Z0-9_ ]{0,40}\]|【[A-Z_]{1,40}】|(?:https?|ftp|file)://[!-~]+|www\.[!-~]+)"
        rf"|(?P<han>\p{{Han}}+)|(?P<chunk>[^\s{CJK}][^\s{CJK}`<{{\[]*)"
    )
    return _Patterns(
        regex.compile(tokens, regex.DOTALL), regex.compile(CODE), regex.compile(WORD), regex.compile(UNSPACED)
    )


def cut(text: str, known: Container[str] = ()) -> Pieces:
    """The pieces of a text, in time proportional to its length.

    known: Chinese words that stay whole although jieba would divide them.
    """
    patterns = _patterns()
    pieces = Pieces([], [], [])
    place = 0
    for token in patterns.tokens.finditer(text):
        if token["han"]:
            found = [(start, end, pieces.chinese) for start, end in _han(token["han"], known)]
        elif token["chunk"] and not patterns.code.search(token["chunk"]):
            found = [(*word.span(), pieces.spaced) for word in patterns.word.finditer(token["chunk"])
                     if not patterns.unspaced.search(word[0])]  # fmt: skip
        else:
            continue
        for start, end, words in found:
            start, end = token.start() + start, token.start() + end
            if start > place:
                pieces.parts.append(text[place:start])
            words.append(len(pieces.parts))
            pieces.parts.append(text[start:end])
            place = end
    if place < len(text):
        pieces.parts.append(text[place:])
    return pieces


def kept(text: str) -> list[str]:
    """What is left alone, in order: a copy in other words still has to say all of it."""
    patterns = _patterns()
    found = []
    for token in patterns.tokens.finditer(text):
        if token["keep"]:
            found.append(token["keep"].rstrip(".,;:!?"))
        elif token["chunk"] and patterns.code.search(token["chunk"]):
            found.append(token["chunk"].strip(".,;:!?()'\""))
    return found


def _han(run: str, known: Container[str]) -> list[tuple[int, int]]:
    """The words of a run of Chinese as (start, end), numbers aside."""
    import jieba  # type: ignore[import-untyped]

    jieba.setLogLevel("WARNING")
    # its guesses at unknown words (HMM) take seconds for one 哈哈哈... of a page
    cut_words = jieba.lcut(run, HMM=False) if len(run) > 1 else [run]
    spans: list[tuple[int, int]] = []
    place = index = 0
    while index < len(cut_words):
        count = 1
        for longer in range(min(LONGEST, len(cut_words) - index), 1, -1):
            if "".join(cut_words[index : index + longer]) in known:
                count = longer
                break
        word = "".join(cut_words[index : index + count])
        if not NUMBER.fullmatch(word):
            spans.append((place, place + len(word)))
        place, index = place + len(word), index + count
    return spans
