"""The language of texts as people write them, mixed and short ones included."""

from __future__ import annotations

import time

import pytest

from bimo.data.language import DIGIT, HAN, LATIN, SPACE, count_kinds, identify


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("今天天气很好，我们去公园散步。", "zh"),
        ("學而時習之，不亦說乎？", "zh"),
        ("床前明月光", "zh"),
        ("使用 TensorFlow 的 Keras API 训练模型", "zh"),
        (
            "至框架\nAnchors the object to a surrounding frame.\n要访问此命令...\n"
            "Choose Format - Anchor - To Frame.\n相关主题\nAnchor",
            "zh",
        ),
        ("奶茶の店铺非常有名，我们都喜欢去那里喝奶茶", "zh"),
        ("東京の図書館に行きました", "ja"),
        ("안녕하세요, 만나서 반갑습니다", "ko"),
        ("It is a truth universally acknowledged, that a single man must be in want of a wife.", "en"),
        ("a financial institution that accepts deposits", "en"),
        ("The character 漢 is found in many words", "en"),
        ("OK", "en"),
        ("Guten Morgen, wie geht es Ihnen heute?", "de"),
        ("Je ne sais pas ce que c'est.", "fr"),
        ("Hola, ¿cómo estás hoy?", "es"),
        ("Xin chào, bạn khỏe không?", "vi"),
        ("Привет, как у тебя дела?", "ru"),
        ("مرحبا بالعالم، كيف حالك اليوم", "ar"),
        ("שלום עולם", "he"),
        ("Γειά σου Κόσμε", "el"),
        ("สวัสดีชาวโลก", "th"),
    ],
)
def test_languages(text: str, language: str) -> None:
    assert identify(text) == language


@pytest.mark.parametrize("text", ["", " \n", "123 456", "😀👨‍👩‍👧", "\x00", "！？。……", "=" * 5000])
def test_text_without_letters_has_none(text: str) -> None:
    assert identify(text) == ""


def test_letters_that_come_late_count() -> None:
    assert identify("=" * 5000 + "\n今天天气很好") == "zh"


@pytest.mark.parametrize("text", ["a" * 10**6, "中" * 10**6, "\u0301" * 10**6, "\ud800x", "\u202eabc"])
def test_hostile_text_is_no_trouble(text: str) -> None:
    start = time.perf_counter()
    assert isinstance(identify(text), str)
    assert time.perf_counter() - start < 2


def test_kinds_of_characters() -> None:
    counts = count_kinds("汉字 abc 12，〇")
    assert [counts[kind] for kind in (HAN, LATIN, DIGIT, SPACE)] == [3, 3, 2, 2]
