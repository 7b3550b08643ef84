"""`bimo data select`: what is written to be labelled, what is left out, and errors of one line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from bimo.cli.main import main
from bimo.data.selection import rank
from bimo.evaluation.classification import Classifier
from tests.encoders import TEXTS, make_encoder

ALL = [text for some in TEXTS.values() for text in some]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_encoder(tmp_path_factory.mktemp("encoder") / "tiny", labels=("好", "bad"))


@pytest.fixture
def pool(tmp_path: Path) -> Path:
    file = tmp_path / "未标注.jsonl"
    rows = [*ALL, ALL[0], "  ", ALL[3] + " "]
    file.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in rows), encoding="utf-8")
    return file


def test_the_chosen_are_written_in_order_to_be_labelled(
    model: Path, pool: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "todo.jsonl"
    arguments = ["data", "select", str(model), str(pool), "--count", "4"]
    assert main([*arguments, "--out", str(out), "--json", "--method", "margin"]) == 0
    shown = json.loads(capsys.readouterr().out)
    rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert rows == shown["selected"]
    classifier = Classifier(model)
    chances = classifier.probabilities(ALL)
    order = rank(chances, None, 4, "margin")
    assert [row["text"] for row in rows] == [ALL[place] for place in order]
    assert [row["label"] for row in rows] == [""] * 4
    assert [row["guess"] for row in rows] == [classifier.labels.names[chances[place].argmax()] for place in order]
    assert np.allclose([row["probability"] for row in rows], chances[order].max(1), atol=1e-5)
    assert all(row["id"].startswith("未标注.jsonl/") for row in rows)
    assert shown["num_texts"] == 10 and shown["skipped"]["copies"] == 2 and shown["num_cut"] == 0

    # next time the same are left out
    assert main([*arguments, "--without", str(out), "--json"]) == 0
    later = json.loads(capsys.readouterr().out)
    assert later["num_texts"] == 6 and later["skipped"]["known"] >= 4 and later["method"] == "uncertainty+diversity"
    assert not {row["text"] for row in later["selected"]} & {row["text"] for row in rows}


def test_the_table(model: Path, pool: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "select", str(model), str(pool), "--count", "3"]) == 0
    first, *rows = capsys.readouterr().out.splitlines()
    assert first.startswith("3 of 10 texts by uncertainty+diversity (") and "2 copies left out" in first
    assert len(rows) == 3 and all("%" in row for row in rows)


def test_labels_are_not_written_over(
    model: Path, pool: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "labelled.jsonl"
    out.write_text("an afternoon of work")
    assert main(["data", "select", str(model), str(pool), "--count", "1", "--out", str(out)]) == 2
    assert "may have been labelled" in capsys.readouterr().err and out.read_text() == "an afternoon of work"


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--count", "11"], 2, "--count 11 is more than the 10 texts there are to label"),
        (["--count", "0"], 2, "--count"),
        (["--count", "1", "--method", "luck"], 2, "--method is one of"),
        (["--count", "1", "--task", "x"], 2, "no task 'x'"),
        (["--count", "1", "--text", "body"], 1, "rows without the field 'body'"),
        (["--count", "1", "--out", "/nowhere/x.jsonl"], 1, "cannot be written"),
    ],
)
def test_an_error_is_one_line(
    model: Path, pool: Path, arguments: list[str], code: int, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["data", "select", str(model), str(pool), *arguments]) == code
    shown = capsys.readouterr()
    assert shown.out == "" and words in shown.err and shown.err.splitlines()[-1].startswith("error: ")


def test_a_model_without_classes(tmp_path: Path, pool: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = make_encoder(tmp_path / "plain")
    assert main(["data", "select", str(plain), str(pool), "--count", "1"]) == 2
    assert "encoder without classes" in capsys.readouterr().err
