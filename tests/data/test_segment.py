"""Sentences and passages, as a reader of Chinese and English would cut them; and nothing is ever lost."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bimo.data.segment import passages, sentences
from bimo.errors import UsageError

FAMILY = "👨‍👩‍👧"


@pytest.mark.parametrize(
    "parts",
    [
        ["今天天气很好。", "我们去公园！", "你去吗？", "好的……", "走吧。"],
        ["他说：“走吧。我累了。”", "然后他走了。"],
        ["「真的嗎？」", "她問。"],
        ["“你好，”他说，“我走了。”", "她没有回答。"],
        ["（他来了。她没来。）", "我们也走。"],
        ["我……我不知道。", "你呢？"],
        ['他问："你好吗？"', '她说："很好。"', "然后走了。"],
        ["真的吗？！", "是的。"],
        ["我用了 Python 3.11 和 v1.2.3。", "It is fast. ", "很快。"],
        ["Dr. Wu met Mr. Smith in the U.S. in 1999. ", "He paid $3.14, e.g. for a toy. ", "Well."],
        ["She lives in the U.S. ", "The weather is fine there."],
        ["J. K. Rowling wrote it. ", "See Fig. 3 and No. 5. ", "We left at 5 p.m. ", "It rained."],
        ['"Really?" she asked. ', '"Yes." ', "He smiled."],
        ["Wait... what? ", "I don't know... ", "Go (now!). ", "Is it yahoo.com? ", "Yes."],
        ["I said no. ", "He left."],
        ["第一行\n", "第二行\n\n", "  第三段"],
        ["wrapped text goes\non here. ", "New one\n", "Next line"],
        ["“没有结束。", "还在说。\n", "新的一段。", "又一句。"],
    ],
)
def test_sentences(parts: list[str]) -> None:
    assert sentences("".join(parts)) == parts


@given(st.text(st.sampled_from("a.B 1。！？“”\"'「」（）()…\n我\u0301\u200d😀 ")), st.integers(1, 20))
def test_nothing_is_lost_and_nothing_too_long(text: str, max_chars: int) -> None:
    assert "".join(sentences(text)) == text
    assert all(sentences(text))
    cut = passages(text, max_chars)
    assert "".join(cut) == text
    assert all(0 < len(passage) <= max_chars for passage in cut)


def test_passages_end_at_the_best_place_there_is() -> None:
    text = "第一段。很短。\n\n第二段有两句。这是第二句，它长一些。\n\n第三段。"
    assert passages(text, 100) == [text]
    assert passages(text, 30) == ["第一段。很短。\n\n第二段有两句。这是第二句，它长一些。\n\n", "第三段。"]
    assert passages(text, 15) == ["第一段。很短。\n\n", "第二段有两句。", "这是第二句，它长一些。\n\n", "第三段。"]
    assert passages("一二三四，五六七八，九十", 6) == ["一二三四，", "五六七八，", "九十"]
    assert passages("one two three four", 9) == ["one two ", "three ", "four"]
    assert passages("", 5) == []


@pytest.mark.parametrize("cluster", [FAMILY, "e\u0301\u0302", "🇨🇳", "각", "क्षि"])
def test_a_cut_never_goes_through_a_character(cluster: str) -> None:
    cut = passages(cluster * 50, 2 * len(cluster) + 1)
    assert all(passage == cluster * (len(passage) // len(cluster)) for passage in cut)


def test_a_character_longer_than_a_passage_is_cut_all_the_same() -> None:
    assert [len(passage) for passage in passages("a" + "\u0301" * 10, 4)] == [4, 4, 3]


def test_passages_of_nothing_are_refused() -> None:
    with pytest.raises(UsageError, match="at least one character"):
        passages("文", 0)


@pytest.mark.parametrize(
    "piece",
    ["a", "“", "”", ".", "。”", "a. ", '."', " ", "\n", "\n ", "“「", "\u0301", "A.B.", "「。", "\x00", FAMILY, "א. "],
)
def test_hostile_text_takes_linear_time(piece: str) -> None:
    text = piece * (300_000 // len(piece)) + "”」"
    start = time.perf_counter()
    assert "".join(sentences(text)) == text
    assert "".join(passages(text, 1000)) == text
    assert time.perf_counter() - start < 5


def test_a_megabyte_without_punctuation() -> None:
    text = "字" * 10**6
    assert sentences(text) == [text]
    assert {len(passage) for passage in passages(text, 1000)} == {1000}
