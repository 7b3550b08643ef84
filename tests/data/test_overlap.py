"""Validation texts that stand in training texts are found: whole, quoted in longer ones, in pieces; others are not."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

from bimo.data.overlap import LEAKED, find_leaks

WORDS = [f"word{number}" for number in range(3000)]
HAN = [chr(0x4E00 + 7 * number) for number in range(2500)]


def english(seed: int, count: int = 60) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=count))


def chinese(seed: int, count: int = 60) -> str:
    return "".join(random.Random(seed).choices(HAN, k=count))


def leaked(validation: str, *training: str) -> bool:
    report = find_leaks([("it", validation), ("other", english(999))], training)
    assert report.num_checked == 2
    assert report.leaked in ((), ("it",))
    return bool(report.leaked)


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


def test_many_at_once_and_in_one_pass() -> None:
    validation = [(f"v{place}", (chinese if place % 2 else english)(place)) for place in range(300)]
    planted = {f"v{place}" for place in range(0, 300, 7)}

    def training() -> Iterator[str]:
        for place in range(2000):
            quoted = validation[place][1] if place < 300 and f"v{place}" in planted else ""
            yield f"{english(10_000 + place)} {quoted} {chinese(20_000 + place)}"

    report = find_leaks(iter(validation), training())
    assert report.num_checked == 300
    assert list(report.leaked) == [name for name, _ in validation if name in planted]


def test_nothing_to_check() -> None:
    def never() -> Iterator[str]:
        raise AssertionError("read for nothing")
        yield ""

    assert find_leaks([], never()).num_checked == 0
    assert find_leaks([("a", "x")], []).leaked == ()


@pytest.mark.parametrize("text", ["", "\x00", "👨‍👩‍👧 " * 30, "\u0301" * 40, "。" * 50, "ab" * 5000])
def test_hostile_texts(text: str) -> None:
    assert leaked(text, english(1), text)
    assert not leaked(text + english(2), english(1), text)
