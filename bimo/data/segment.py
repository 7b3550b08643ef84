"""Cut texts into sentences and passages, Chinese and English alike, without losing a character.

    sentences("他说：“走吧。我累了。”然后 Dr. Wu left. It rained.")
        -> ["他说：“走吧。我累了。”", "然后 Dr. Wu left. ", "It rained."]
    passages(article, max_chars=2000)    cut at a paragraph, else a sentence, else a clause, else between two characters

"".join of the parts is the text again; the time is linear in its length, whatever it holds.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence

from bimo.errors import UsageError

__all__ = ["best_border", "passages", "sentences"]

CLOSER = {"“": "”", "‘": "’", "「": "」", "『": "』", "《": "》", "（": "）", "【": "】"}
AFTER = "”’」』》）】\"')\\]"  # belong to the sentence they follow
# Everything at which something may happen: a quotation opens, a sentence ends, a line ends.
EVENT = re.compile(
    rf"(?P<open>[“「『《（【])|(?P<end>[。！？!?…．｡]+[。！？!?…．.｡]*|\.+(?![\w.])|\.(?=[\u3400-\u9fff]))(?P<after>[{AFTER}]*)"
    rf"(?P<space>[^\S\n]*)|(?P<line>\n(?:[^\S\n]*\n)*)"
)
# In Chinese a quotation is one piece with its sentence, however many full stops it has. Longer ones are speeches.
MAX_QUOTATION = 300
GOES_ON = frozenset("，、；：。！？…,;:）】》」』”’%")
# A name or a number follows these, no new sentence.
TITLES = """mr mrs ms dr prof sr jr st mt rev hon gen col lt capt sgt rep sen gov pres fr messrs mme mlle vs v cf e.g
    i.e eg ie viz al ca approx fig figs eq eqs sec ch vol vols p pp ed eds ref refs no nos art op jan feb mar apr jun
    jul aug sept sep oct nov dec mon tue wed thu fri"""
MAYBE = "inc ltd co corp llc etc univ dept est min max bros"  # and all with a full stop inside: U.S, p.m, Ph.D
# After MAYBE only these begin a sentence.
STARTERS = """the a an this that these those it he she they we you i there then but and or so however in on at as if
    when while after before for his her its their our my what who why how where"""
TITLE_SET, MAYBE_SET, STARTER_SET = (frozenset(words.split()) for words in (TITLES, MAYBE, STARTERS))
LAST_WORD = re.compile(r"[^\W\d_](?:[^\W\d_]|\.(?=[^\W\d_]))*\Z")
NEXT_WORD = re.compile(r"[\"'“‘(\[]*([^\W\d_]*)")
WORD = 24  # characters that are looked at before a full stop
CLAUSE = re.compile(r"[，、；：]+[”’」』）]*|[,;:]+[\"')]*\s+|\s+")
PARAGRAPH = re.compile(r"\n(?:[^\S\n]*\n)+")


def sentences(text: str) -> list[str]:
    """The sentences of a text, in order, each with the quotes, brackets and white space that follow it.

    A line's end ends a sentence, unless the next line goes on in lower case (wrapped English).
    """
    cuts = _cuts(text)
    return [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True) if start < end]


def _cuts(text: str) -> list[int]:
    """Where a sentence ends and a next one begins."""
    cuts: list[int] = []
    closes: dict[str, int] = {}  # where the next closing mark of each kind stands: found once, not for each opening one
    start = inside = straight = counted = (
        0  # begin of the sentence, end of the quotation, straight quotes counted up to
    )
    for event in EVENT.finditer(text):
        place, end = event.span()
        kind = event.lastgroup
        if kind == "open":
            if place >= inside:
                inside = max(inside, _closing(text, place, closes))
            continue
        if kind == "line":
            straight, counted = 0, end  # a quote that was never closed confuses its own line only
            if "\n" in event[0][1:] or not _wrapped(text, place, end):
                cuts.append(end)
                start, inside = end, 0
            continue
        marks, after = event["end"], event["after"]
        body = place + len(marks)
        if '"' in after:  # opens the next sentence, if there is an even number of them before it in this one
            straight += text.count('"', counted, body)
            counted = body
            if straight % 2 == 0:
                after = after[: after.index('"')]
                end = body + len(after)
        if body < inside and body + len(after) < inside:
            continue
        if _ends(text, start, place, marks, after, body + len(after), end):
            if inside > end:  # the closing mark is a part of `after`, so the quotation is over
                inside = 0
            cuts.append(end)
            start = end
    return cuts


def _closing(text: str, place: int, closes: dict[str, int]) -> int:
    """End of the quotation that opens at `place`, or `place` if it has none on this line or is long."""
    mark = CLOSER[text[place]]
    close = closes.get(mark, -1)
    if close < place:
        close = text.find(mark, place)
        closes[mark] = close if close >= 0 else len(text) + MAX_QUOTATION  # never: do not search again
    if close < place or close - place > MAX_QUOTATION or "\n" in text[place:close]:
        return place
    return close + 1


def _wrapped(text: str, place: int, end: int) -> bool:
    before, next_char = text[place - 1 : place], text[end : end + 1]
    return next_char.islower() and (before.isalnum() or before in (",", ";", "-", ")")) and not _is_cjk(before)


def _is_cjk(char: str) -> bool:
    return char >= "\u2e80"


def _ends(text: str, start: int, place: int, marks: str, after: str, closed: int, end: int) -> bool:
    """Whether the marks at `place` end the sentence begun at `start`; `closed` is after quotes, `end` after spaces."""
    next_char = text[end : end + 1]
    if not next_char or next_char == "\n":
        return False  # the text or the line ends there anyway
    if next_char in GOES_ON:
        return False
    if marks[0] in "。！？．｡":
        return True
    if marks[0] == "…":  # a stammer, "我……我不知道", is no end
        return text[place - 1 : place] != next_char and not next_char.islower()
    if end == closed and not _is_cjk(next_char):
        return False  # "3.14", "a.b", "what?x=1": no space, no end
    if next_char.islower():
        return False
    if marks[0] != "." or after:
        return True
    if len(marks) > 1:
        return True  # an ellipsis before a capital letter
    return not _abbreviated(text, start, place, end)


def _abbreviated(text: str, start: int, place: int, end: int) -> bool:
    """Whether the full stop at `place` belongs to the word before it."""
    word = LAST_WORD.search(text[max(start, place - WORD) : place])
    if word is None:  # "1. First", a numbered item, is no sentence; "in 1999. Then" is one
        return place - start <= 3 and text[start:place].strip().isdigit()
    known = word[0].lower()
    following = text[end : end + WORD]
    if (len(known) == 1 and word[0].isupper()) or known in TITLE_SET:
        if known in ("no", "art", "sec", "mar", "may", "p", "ch"):  # words too: "I said no. He left."
            return following[:1].isdigit()
        return known != "i"
    if known in MAYBE_SET or "." in known:
        next_word = NEXT_WORD.match(following)
        return next_word is None or next_word[1].lower() not in STARTER_SET
    return False


def passages(text: str, max_chars: int) -> list[str]:
    """The text in pieces of at most `max_chars` characters, as few as filling them in order gives.

    Paragraphs stay whole where they fit, else sentences, else clauses. A piece without any of these is cut between two
    characters as a reader sees them (grapheme clusters), unless one of them alone is longer than `max_chars`.
    """
    if max_chars < 1:
        raise UsageError(f"a passage has at least one character, max_chars cannot be {max_chars}", "passage_chars")
    if len(text) <= max_chars:
        return [text] if text else []
    ends: list[int] = []
    start = last = 0  # the passage so far is text[start:last]
    for piece in _pieces(text, max_chars, (_split_at(PARAGRAPH), sentences, _split_at(CLAUSE))):
        if last - start + len(piece) > max_chars:
            ends.append(last)
            start = last
        last += len(piece)
    return [text[start:end] for start, end in zip([0, *ends], [*ends, len(text)], strict=True)]


def _pieces(text: str, max_chars: int, splits: Sequence[Callable[[str], list[str]]]) -> Iterator[str]:
    """Pieces that fit, by the first of `splits` where that is enough."""
    if len(text) <= max_chars:
        yield text
    elif splits:
        for part in splits[0](text):
            yield from _pieces(part, max_chars, splits[1:])
    else:
        yield from _graphemes(text, max_chars)


def _split_at(pattern: re.Pattern[str]) -> Callable[[str], list[str]]:
    def split(text: str) -> list[str]:
        cuts = [match.end() for match in pattern.finditer(text)]
        return [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True) if start < end]

    return split


def _graphemes(text: str, max_chars: int) -> Iterator[str]:
    import regex  # type: ignore[import-untyped]  # its \X knows flags, families, Hangul and Indic syllables

    start = end = 0
    for cluster in regex.finditer(r"\X", text):
        if cluster.end() - start > max_chars:
            if end > start:
                yield text[start:end]
            start = end
            while cluster.end() - start > max_chars:
                yield text[start : start + max_chars]
                start += max_chars
        end = cluster.end()
    if end > start:
        yield text[start:end]


def best_border(text: str, limit: int) -> int:
    """Where to cut a text that is too long: after a paragraph, else a line, a sentence, a word, in its second half."""
    for ends in (("\n\n",), ("\n",), ("。", "！", "？", "…", "!", "?", ". "), (" ", "　")):
        found = [at + len(end) for end in ends if (at := text.rfind(end, limit // 2, limit)) >= 0]
        if found:
            cut = max(found)
            while cut < limit and text[cut] in '”’」』）)》"':
                cut += 1
            return cut
    return limit
