"""Words are found in Chinese, English and other scripts; what must stay is left alone; any text comes back whole."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bimo.data.words import cut, kept


def words_of(text: str, known: frozenset[str] = frozenset()) -> list[str]:
    pieces = cut(text, known)
    assert "".join(pieces.parts) == text
    assert all(pieces.parts)
    return [pieces.parts[place] for place in pieces.words]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Don't open the well-known café.", ["Don't", "open", "the", "well-known", "café"]),
        ("今天天气很好，我们去公园。", ["今天天气", "很", "好", "我们", "去", "公园"]),
        ("用Python写脚本", ["用", "Python", "写", "脚本"]),
        ("他买了三百个苹果，一般是第二天", ["他", "买", "了", "苹果", "一般", "是"]),
        ("привет мир, हिन्दी भाषा", ["привет", "мир", "हिन्दी", "भाषा"]),
        ("สวัสดีครับ こんにちは 👨‍👩‍👧 ½ ④", []),
        ("FREE MONEY!!! if a < b and c > d", ["FREE", "MONEY", "if", "a", "b", "and", "c", "d"]),
        ("", []),
        ("\ud800 \x00 \ufeff", []),
    ],
)
def test_words_are_found(text: str, words: list[str]) -> None:
    assert words_of(text) == words


@pytest.mark.parametrize(
    ("text", "stays"),
    [
        ("<|im_start|>user writes<|im_end|>", ["<|im_start|>", "<|im_end|>"]),
        ("<｜begin▁of▁sentence｜>你好", ["<｜begin▁of▁sentence｜>"]),
        (
            "write to [EMAIL], 【PHONE】 or {user name} and {{ x.y }}",
            ["[EMAIL]", "【PHONE】", "{user name}", "{{ x.y }}"],
        ),
        ("see https://example.org/a?b=1#c，谢谢", ["https://example.org/a?b=1#c"]),
        ("ask www.example.org or me@example.org.", ["www.example.org", "me@example.org"]),
        ("run (`git push`) then ```sh\nrm the file\n``` now", ["`git push`", "```sh\nrm the file\n```"]),
        ("call read_file() or setText on C:\\Users\\me", ["read_file", "setText", "C:\\Users\\me"]),
        ("GPT-4 costs $3,000.50 at 5pm, 50%", ["GPT-4", "$3,000.50", "5pm", "50%"]),
        ("press Ctrl+S, --force, @name", ["Ctrl+S", "--force", "@name"]),
        ("打开settings.json文件的第3行", ["settings.json", "3"]),
    ],
)
def test_what_must_stay_is_no_word(text: str, stays: list[str]) -> None:
    assert kept(text) == stays
    words = words_of(text)
    assert not {"im_start", "git", "force", "Users", "name", "EMAIL"}.intersection(words)
    assert not any(word in part for part in stays for word in words if len(word) > 3)


def test_words_of_a_list_stay_whole() -> None:
    assert "笔墨助手" not in words_of("请打开笔墨助手吧")
    assert "笔墨助手" in words_of("请打开笔墨助手吧", frozenset({"笔墨助手"}))


@given(st.text())
def test_no_character_is_lost(text: str) -> None:
    words_of(text)
    kept(text)


@pytest.mark.parametrize("piece", ["`", "```a ", "{", "<a", "哈", "a", "a-", "[A", "{{a ", "www.", "'", "@a", "://"])
def test_long_runs_come_back_whole(piece: str) -> None:
    words_of(piece * 20_000)  # a pattern that goes back for each start would take minutes
