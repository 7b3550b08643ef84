"""Pairs of sentences from JSON lines: what comes in, and how what cannot is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bimo.errors import UsageError
from bimo.evaluation.pairs import Pair, check_language, languages_of, read_pairs

GOOD = '{"source": "Save the file.", "target": "保存文件。"}'


def write(path: Path, *lines: str | bytes) -> Path:
    path.write_bytes(b"\n".join(line if isinstance(line, bytes) else line.encode() for line in lines))
    return path


def test_pairs_come_as_they_are(tmp_path: Path) -> None:
    rows = [("Save the file.", "保存文件。"), ("🦊\u2028 \ttab", " naïve 👍🏽\n"), ("x" * 1_000_000, "长" * 300_000)]
    lines = [json.dumps({"source": a, "target": b, "id": 7}, ensure_ascii=n == 1) for n, (a, b) in enumerate(rows)]
    file = write(tmp_path / "p.jsonl", b"\xef\xbb\xbf" + lines[0].encode() + b"\r", "", " \t", *lines[1:], "")
    assert read_pairs(file) == [Pair(*row) for row in rows]


def test_the_limit_ends_the_reading(tmp_path: Path) -> None:
    file = write(tmp_path / "p.jsonl", GOOD, GOOD, "broken")
    assert len(read_pairs(file, limit=2)) == 2
    assert len(read_pairs(file, limit=1)) == 1
    with pytest.raises(UsageError, match="line 3"):
        read_pairs(file, limit=3)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "line 3 is no JSON"),
        (GOOD[:-8], "no JSON"),
        ("[" * 100_000, "no JSON"),
        ("1" * 5000, "no JSON"),
        ('["a", "b"]', "no object but list"),
        ("null", "no object but NoneType"),
        ('{"source": "a"}', "no target"),
        ('{"target": "甲"}', "no source"),
        ('{"source": "a", "target": ""}', 'the target ""'),
        ('{"source": "  ", "target": "甲"}', 'the source "  "'),
        ('{"source": "a", "target": null}', "the target null"),
        ('{"source": 5, "target": "甲"}', "the source 5"),
        ('{"source": ["a"], "target": "甲"}', "the source"),
        ('{"source": "\\ud83e", "target": "甲"}', "half a character"),
        (b'{"source": "a", "target": "\xb1\xa3"}', "not valid UTF-8 (byte 27)"),
        ("a\tb", "no JSON"),
    ],
)
def test_broken_lines_are_named(line: str | bytes, words: str, tmp_path: Path) -> None:
    file = write(tmp_path / "对.jsonl", GOOD, "", line, GOOD)
    with pytest.raises(UsageError) as caught:
        read_pairs(file, param="train-pairs")
    message = str(caught.value)
    assert f"{file}, line 3" in message
    assert words in message
    assert len(message) < 600 + len(str(file))
    assert caught.value.param == "train-pairs"


@pytest.mark.parametrize("content", [b"", b"\n\n \n", b"\xef\xbb\xbf"])
def test_files_without_pairs(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "p").write_bytes(content)
    with pytest.raises(UsageError, match="has no pairs: give a file of lines"):
        read_pairs(tmp_path / "p")


def test_files_that_are_none(tmp_path: Path) -> None:
    for path, words in ((tmp_path / "none", "No such file"), (tmp_path, "Is a directory")):
        with pytest.raises(UsageError, match=words):
            read_pairs(path)


def test_languages() -> None:
    pairs = [Pair("Save the file before you close the window.", "在关闭窗口之前保存文件。")] * 3
    assert languages_of(pairs) == ("en", "zh")
    assert languages_of([Pair(b, a) for a, b in pairs]) == ("zh", "en")
    assert languages_of([Pair("1", "🦊")]) == ("", "")
    for code in ("zh", "ZH", "zh-CN", "zh_Hans_CN", "zho", "cmn"):
        assert check_language(code, "target") == "zh"
    assert check_language("en-US", "source") == "en"
    for wrong in ("", "Chinese", "中文", "-", "z", "12"):
        with pytest.raises(UsageError, match="such as en or zh"):
            check_language(wrong, "target")
