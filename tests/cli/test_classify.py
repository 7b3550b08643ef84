"""`bimo classify`: classes of texts on the command line and of lines that are piped in."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest

from bimo.cli.main import main
from bimo.evaluation.classification import Classifier
from tests.encoders import TEXTS, make_encoder

ALL = [text for some in TEXTS.values() for text in some]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_encoder(tmp_path_factory.mktemp("encoder") / "tiny", labels=("好", "bad"))


def pipe(monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content), encoding="utf-8"))


def test_each_text_has_the_class_that_the_model_tells(
    model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    told = Classifier(model)(ALL)
    assert main(["classify", str(model), *ALL, "--json"]) == 0
    named = capsys.readouterr().out
    rows = [json.loads(line) for line in named.splitlines()]
    assert [(row["text"], row["label"]) for row in rows] == [(t, one.label) for t, one in zip(ALL, told, strict=True)]
    assert [row["probability"] for row in rows] == pytest.approx([one.probability for one in told], abs=1e-3)

    pipe(monkeypatch, ("\ufeff" + "\n\n".join(ALL) + "\r\n").encode())
    assert main(["classify", str(model), "--json"]) == 0
    assert capsys.readouterr().out == named

    assert main(["classify", str(model), "🦊 " * 2000]) == 0
    shown = capsys.readouterr()
    assert "🦊 🦊" in shown.out and "%" in shown.out and "of 1 texts only the first" in shown.err


def test_a_model_of_several_tasks_tells_all_or_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = make_encoder(tmp_path / "two", labels=("主题::a", "主题::b", "spam::no", "spam::yes"))
    assert main(["classify", str(model), "你好", "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["task"] for row in rows] == ["主题", "spam"]
    assert rows[0]["label"] in "ab" and rows[1]["label"] in ("no", "yes")
    assert main(["classify", str(model), "你好", "--task", "spam"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1


def test_what_is_wrong_is_said_in_one_line(
    model: Path,
    tiny_model_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pipe(monkeypatch, "第一行\n".encode() + "第二行".encode("gbk"))
    assert main(["classify", str(model)]) == 2
    assert "line 2 of standard input is not valid UTF-8" in capsys.readouterr().err
    assert main(["classify", str(model), "text", "--task", "主题"]) == 2
    assert "no task '主题'" in capsys.readouterr().err
    assert main(["classify", str(tiny_model_dir), "text"]) == 2
    assert "is no encoder (llama), so it tells no classes" in capsys.readouterr().err
    assert main(["classify", str(make_encoder(tmp_path / "plain")), "text"]) == 2
    assert "an encoder without classes: train it with labelled texts first" in capsys.readouterr().err
