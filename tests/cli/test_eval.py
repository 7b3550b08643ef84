"""`bimo eval` on a tiny model: what is printed is what the library measures, and a wrong file is one clear line."""

from __future__ import annotations

import io
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from bimo.cli import eval as command
from bimo.cli.main import main

ENGLISH = "Once upon a time there was a small model that learned to write.\n" * 12
CHINESE = "从前有一个小小的模型，它学会了写字。笔墨纸砚，文房四宝。🖌️\r\n" * 12


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    """A file for each language; the Chinese one has a Chinese name."""
    texts = {"en.txt": ENGLISH, "中文 文本.txt": CHINESE}
    for name, text in texts.items():
        (tmp_path / name).write_bytes(text.encode())
    return {name: str(tmp_path / name) for name in texts}


def run_json(capsys: pytest.CaptureFixture[str], model: Path, *arguments: str) -> dict[str, Any]:
    assert main(["eval", str(model), "--dtype", "float32", *arguments, "--json"]) == 0
    shown = capsys.readouterr()
    assert shown.out.count("\n") == 1  # one object, one line
    assert shown.err == ""
    return json.loads(shown.out)


def test_the_json_object_is_the_library_s(
    files: dict[str, str], tiny_model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import bimo
    from bimo.evaluation.perplexity import perplexity

    arguments = [argument for file in files.values() for argument in ("--text", file)]
    report = run_json(capsys, tiny_model_dir, *arguments, "--window", "40")
    about = {"model": str(tiny_model_dir), "dtype": "float32", "quant": "none", "cache_dtype": "float32"}
    assert {name: report[name] for name in report if name != "texts"} == {**about, "device": "cpu"}
    assert [row["text"] for row in report["texts"]] == list(files.values())
    with bimo.load(str(tiny_model_dir), dtype="float32") as model:
        for row, text in zip(report["texts"], (ENGLISH, CHINESE), strict=True):
            expected = perplexity(model.backend, text, window=40)
            assert row["perplexity"] == pytest.approx(expected.perplexity, rel=1e-9)
            assert row["bits_per_byte"] == pytest.approx(expected.bits_per_byte, rel=1e-9)
            assert row["nats_per_token"] == pytest.approx(expected.nats_per_token, rel=1e-9)
            assert row["tokens"] == len(model.tokenizer.encode(text)) - 1
            assert row["bytes"] == len(text.encode())  # line ends and all
            assert (row["window"], row["stride"]) == (40, 20)


def test_the_table(files: dict[str, str], tiny_model_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [argument for file in files.values() for argument in ("--text", file)]
    report = run_json(capsys, tiny_model_dir, *arguments)
    assert main(["eval", str(tiny_model_dir), *arguments, "--dtype", "float32"]) == 0
    shown = capsys.readouterr()
    about, head, *rows = shown.out.splitlines()
    assert about == f"{tiny_model_dir}, float32 on cpu"
    assert head.split() == ["TEXT", *command.COLUMNS]
    for row, expected in zip(rows, report["texts"], strict=True):
        assert row.startswith(expected["text"])
        values = [expected[name] for name in ("perplexity", "bits_per_byte", "nats_per_token", "tokens", "bytes")]
        assert [float(cell) for cell in row.split()[-5:]] == pytest.approx(values, abs=1e-4)
    assert shown.err == ""


def test_standard_input_and_byte_order_marks(
    files: dict[str, str], tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    expected = run_json(capsys, tiny_model_dir, "--text", files["中文 文本.txt"])["texts"][0]
    for mark in (b"", b"\xef\xbb\xbf"):
        (tmp_path / "marked.txt").write_bytes(mark + CHINESE.encode())
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(mark + CHINESE.encode())))
        report = run_json(capsys, tiny_model_dir, "--text", "-", "--text", str(tmp_path / "marked.txt"), "--text", "-")
        rows = report["texts"]  # a text named twice is measured once
        assert rows == [{**expected, "text": "-"}, {**expected, "text": str(tmp_path / "marked.txt")}]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (None, "No such file or directory"),
        (b"", "is empty"),
        (b"\xef\xbb\xbf", "is empty"),
        ("床前明月光".encode("gb18030"), "not valid UTF-8 (byte 0): convert it first"),
        (b"half a character \xe4\xbd", "(byte 17)"),
        (b"\xef\xbb\xbfna\xefve caf\xe9", "(byte 5)"),
        ("床前明月光".encode("utf-16"), "iconv -f utf-16 -t utf-8"),
        ("床前明月光".encode("big5"), "iconv -f gb18030 -t utf-8"),
        (bytes(range(256)) * 100, "(byte 128)"),
        (b"a\x00\xed\xa0\x80", "(byte 2)"),  # half a surrogate pair, spelled as UTF-8
    ],
)
def test_files_that_are_no_text(
    data: bytes | None, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Said before a model is looked for, of a file and of standard input alike."""
    file = tmp_path / "文本.txt"
    names = [str(file)]
    if data is not None:
        file.write_bytes(data)
        names.append("-")
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
    for name in names:
        assert main(["eval", "no-such-model", "--text", name]) == 2
        shown = capsys.readouterr()
        assert shown.out == ""
        assert shown.err.startswith("error: " + ("standard input" if name == "-" else name))
        assert shown.err.count("\n") == 1
        assert words in shown.err


def test_a_folder_is_no_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "no-such-model", "--text", str(tmp_path)]) == 2
    assert "Is a directory" in capsys.readouterr().err


def test_a_name_that_is_not_utf8(tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = os.fsencode(tmp_path) + b"/\xff\xfe.txt"
    Path(os.fsdecode(name)).write_text(ENGLISH)
    assert main(["eval", str(tiny_model_dir), "--text", os.fsdecode(name), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["texts"][0]["bytes"] == len(ENGLISH)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--window", "1"], "at least 2 tokens"),
        (["--window", "-5"], "at least 2 tokens"),
        (["--window", "32", "--stride", "33"], "less than the window of 32"),
        (["--window", "32", "--stride", "32"], "less than the window of 32"),
        (["--stride", "0"], "at least 1"),
        (["--window", "many"], "--window"),
        (["--dtype", "int3"], "dtype must be one of"),
    ],
)
def test_wrong_options(
    options: list[str], words: str, files: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Refused before a model is looked for."""
    assert main(["eval", "no-such-model", "--text", files["en.txt"], *options]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.count("\n") == 1
    assert words in shown.err


def test_a_text_is_needed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "smollm2"]) == 2
    assert "--text" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "options", "words"),
    [
        ("a", [], "a single token"),
        ("\n", [], "a single token"),
        (ENGLISH, ["--window", "512"], "at most 511"),
        (ENGLISH, ["--stride", "511"], "less than the window of 511"),
    ],
)
def test_what_only_the_model_can_tell(
    text: str, options: list[str], words: str, tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "text.txt"
    file.write_text(text)
    assert main(["eval", str(tiny_model_dir), "--text", str(file), *options]) == 2
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1
    assert words in shown


def test_a_bar_on_a_terminal_and_only_there(
    files: dict[str, str], tiny_model_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "PATIENCE", -1)
    arguments = ["eval", str(tiny_model_dir), "--text", files["en.txt"], "--window", "16"]
    assert main(arguments) == 0
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "240")  # the name of the text may be long
    assert main(arguments) == 0
    shown = capsys.readouterr()
    assert "tokens" in shown.err
    assert "\x1b[?25h" in shown.err  # the cursor is back
    assert "\x1b" not in shown.out
    monkeypatch.setattr(command, "PATIENCE", 1e9)
    assert main(arguments) == 0
    assert "tokens" not in capsys.readouterr().err
