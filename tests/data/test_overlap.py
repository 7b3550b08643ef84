"""Validation texts that stand in training texts are found: whole, quoted in longer ones, in pieces; others are not."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator

import pytest

from bimo.data.overlap import LEAKED, LeakCheck, find_leaks, tick
from bimo.data.records import Document, Message

WORDS = [f"word{number}" for number in range(3000)]
HAN = [chr(0x4E00 + 7 * number) for number in range(2500)]


def english(seed: int, count: int = 60) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=count))


def chinese(seed: int, count: int = 60) -> str:
    return "".join(random.Random(seed).choices(HAN, k=count))


def plain(texts: Iterable[str], name: str = "train") -> Iterator[Document]:
    for number, text in enumerate(texts):
        yield Document(text, f"{name}{number}", name)


def pair(prompt: str, answer: str, name: str = "it") -> Document:
    messages = (Message("user", prompt), Message("assistant", answer))
    return Document(f"{prompt}\n{answer}", name, "pairs", "zh", "", messages)


def leaked(validation: str | Document, *training: str | Document) -> bool:
    """The same by both ways: with what is found where, and shared out."""
    it = Document(validation, "it", "v") if isinstance(validation, str) else validation
    other = Document(english(999), "other", "v")
    others = [text if isinstance(text, Document) else next(plain([text])) for text in training]
    report = find_leaks([it, other], others)
    assert report.num_others == len(others)
    assert [leak.id for leak in report.leaks] in ([], ["it"])
    check = LeakCheck([it, other])
    for each in others:
        check.add(*tick(check.known, check.keys, [each]))
    assert check.leaked() == [leak.id for leak in report.leaks]
    return bool(report.leaks)


@pytest.mark.parametrize("make", [english, chinese])
def test_what_is_a_leak(make: object) -> None:
    text, join = make(1), " " if make is english else ""  # type: ignore[operator]
    long, parts = make(2, 500), (text.split() if make is english else list(text))  # type: ignore[operator]
    assert leaked(text, text)
    assert leaked(text, make(3), join.join([long, text, long]))  # type: ignore[operator]
    assert leaked(text, text.upper().replace(" ", " - "))  # case and punctuation aside
    assert leaked(text, join.join(parts[:36]), join.join(parts[24:]))  # in two pieces that overlap
    assert not leaked(text, make(3), long)  # type: ignore[operator]
    assert not leaked(text, join.join(parts[:40]))  # two thirds of it
    assert not leaked(text, join.join(reversed(parts)))
    assert not leaked(text)


def test_the_share_decides() -> None:
    parts = english(5, 112).split()  # 100 sequences of 13 words
    enough = round(LEAKED * 100)
    assert leaked(" ".join(parts), " ".join(parts[: enough + 12]))
    assert not leaked(" ".join(parts), " ".join(parts[: enough + 11]))


def test_short_texts_leak_only_as_a_whole() -> None:
    assert leaked("八仙过海，各显神通", "八仙过海，各显神通")
    assert not leaked("八仙过海，各显神通", "人说八仙过海，各显神通，" + chinese(4))
    assert not leaked("Yes.", "No.", "")


EN, ZH = "Click the button in the toolbar.", "单击工具栏中的按钮。"


def test_pairs() -> None:
    assert leaked(pair(EN, ZH), pair(EN, ZH, "t"))
    assert leaked(pair(EN, ZH), pair(EN.upper(), " ".join(ZH), "t"))
    assert leaked(pair(EN, ZH), pair(EN, "点击工具条上的按钮。", "t"))  # another translation of the same sentence
    assert leaked(pair(EN, ZH), f"{EN} {ZH}")
    assert not leaked(pair(EN, ZH), pair("Press it.", ZH, "t"))  # another question with the same answer
    assert not leaked(pair(EN, ZH), pair(ZH, EN, "t"))
    assert not leaked(pair(EN, ZH), EN, ZH)  # plain text has no questions
    long = pair(english(1), chinese(1))
    assert leaked(long, f"{english(2)} {english(1)}", chinese(1, 60))  # both halves, and not what goes across
    assert not leaked(long, english(1))


def test_what_is_found_where() -> None:
    ours = [pair(EN, ZH, "whole"), pair("你好", "您好", "asked"), *plain([chinese(1), english(1)], "text")]
    theirs = [
        *plain([english(2), f"{english(3)} {english(1)} {english(4)}", chinese(1, 59)]),
        pair("你好", "你好呀", "other answer"),
        pair(EN, ZH, "same"),
        pair(EN, ZH, "again"),
    ]
    report = find_leaks(ours, theirs)
    assert (report.num_checked, report.num_others) == (4, 6)
    found = {leak.id: (leak.kind, leak.found_in) for leak in report.leaks}
    assert found == {
        "whole": ("text", "same"),
        "asked": ("prompt", "other answer"),
        "text0": ("passages", "train2"),
        "text1": ("passages", "train1"),
    }
    shares = {leak.id: leak.share for leak in report.leaks}
    assert shares["whole"] == shares["text1"] == 1.0
    assert shares["text0"] == pytest.approx(47 / 48)


def test_documents_that_share_their_text_are_all_found() -> None:
    ours = list(plain([chinese(1), chinese(1) + chinese(2, 4), chinese(1)], "v"))
    report = find_leaks(ours, plain([english(1), english(2) + chinese(1)]))
    assert [(leak.id, leak.found_in) for leak in report.leaks] == [(f"v{n}", "train1") for n in range(3)]


def test_other_sizes_find_shorter_passages() -> None:
    ours = [Document("八仙过海，各显神通", "a", "v")]
    theirs = ["人说八仙过海，各显神通，" + chinese(4)]
    assert not find_leaks(ours, plain(theirs)).leaks
    assert find_leaks(ours, plain(theirs), 5).leaks[0].share == 1.0


def test_many_at_once_and_in_one_pass() -> None:
    texts = [(chinese if place % 2 else english)(place) for place in range(300)]
    planted = set(range(0, 300, 7))

    def training() -> Iterator[str]:
        for place in range(2000):
            quoted = texts[place] if place in planted else ""
            yield f"{english(10_000 + place)} {quoted} {chinese(20_000 + place)}"

    report = find_leaks(plain(texts, "v"), plain(training()))
    assert (report.num_checked, report.num_others) == (300, 2000)
    assert [leak.id for leak in report.leaks] == [f"v{place}" for place in sorted(planted)]
    assert all(leak.found_in == leak.id.replace("v", "train") for leak in report.leaks)


def test_nothing_to_check() -> None:
    def never() -> Iterator[Document]:
        raise AssertionError("read for nothing")
        yield Document("", "", "")

    check = LeakCheck([])
    check.add(*tick(check.known, check.keys, never()))
    assert check.leaked() == []
    assert find_leaks([], plain(["x"])).num_checked == 0
    assert find_leaks(plain(["x", " "], "a"), []).leaks == ()


@pytest.mark.parametrize("text", ["\x00", "👨‍👩‍👧 " * 30, "\u0301" * 40, "。" * 50, "ab" * 5000])
def test_hostile_texts(text: str) -> None:
    assert leaked(text, english(1), text)
    assert not leaked(text + english(2), english(1), text)
