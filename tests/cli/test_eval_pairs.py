"""`bimo eval --pairs`: the library's figures; wrong files and options are one clear line before a model is loaded."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from bimo.cli import eval as command
from bimo.cli.main import main

PAIRS = [("The cat sat on the mat.", "猫坐在垫子上。"), ("Open the file.", "打开文件。"), ("🦊 3", "🦊 三")] * 2


def write(path: Path, rows: list[tuple[str, str]]) -> str:
    lines = [json.dumps({"source": source, "target": target}, ensure_ascii=False) for source, target in rows]
    path.write_text("\n".join(lines), encoding="utf-8")
    return str(path)


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    return {"held": write(tmp_path / "对.jsonl", PAIRS), "train": write(tmp_path / "train.jsonl", PAIRS[:2])}


def run_json(capsys: pytest.CaptureFixture[str], model: Path, *arguments: str) -> dict[str, Any]:
    assert main(["eval", str(model), "--dtype", "float32", "--max-tokens", "8", *arguments, "--json"]) == 0
    shown = capsys.readouterr()
    assert shown.out.count("\n") == 1
    assert shown.err == ""
    return json.loads(shown.out)


@pytest.mark.parametrize("beams", [1, 2])
def test_the_json_object_is_the_library_s(
    beams: int, files: dict[str, str], tiny_model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import bimo
    from bimo.evaluation.pairs import Pair
    from bimo.evaluation.translation import ModelTranslator, evaluate_translation

    report = run_json(
        capsys, tiny_model_dir, "--pairs", files["held"], "--train-pairs", files["train"], "--limit", "5",
        "--beams", str(beams),
    )  # fmt: skip
    with bimo.load(str(tiny_model_dir), dtype="float32") as model:
        expected = evaluate_translation(
            ModelTranslator(model.backend, languages=("en", "zh"), beams=beams, max_tokens=8),
            [Pair(*row) for row in PAIRS[:5]],
            name=str(tiny_model_dir),
            training_pairs=[Pair(*row) for row in PAIRS[:2]],
        )
    assert (report["model"], report["dtype"]) == (str(tiny_model_dir), "float32")
    assert (report["pairs"], report["known"], report["too_long"]) == (5, 4, 0)
    assert (report["source_language"], report["target_language"]) == ("en", "zh")
    assert report["bleu_signature"] == expected.bleu_signature
    for row, score in zip(report["scores"], expected.scores, strict=True):
        assert row == {name: getattr(score, name) for name in row}
        assert set(row) == {"name", "bleu", "bleu_interval", "chrf", "chrf_interval"}


def test_the_table(files: dict[str, str], tiny_model_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["eval", str(tiny_model_dir), "--max-tokens", "4", "--dtype", "float32", "--pairs", files["held"]]
    assert main([*arguments, "--train-pairs", files["train"]]) == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    about, counts, head, mine, memory, lexicon, bleu, chrf = shown.out.splitlines()
    assert about == f"{tiny_model_dir}, float32 on cpu"
    assert counts == "6 pairs, 4 of them in the training pairs, en to zh"
    assert head.split() == ["TRANSLATOR", "BLEU", "CHRF"]
    assert mine.startswith(str(tiny_model_dir))
    assert memory.startswith("translation memory")
    assert lexicon.startswith("word by word")
    assert "tok:zh" in bleu
    assert chrf.startswith("chrF: nrefs:1")
    assert main([*arguments, "--target", "en-GB", "--source", "zh"]) == 0
    shown = capsys.readouterr()
    assert len(shown.out.splitlines()) == 6
    assert "6 pairs, zh to en" in shown.out
    assert "tok:13a" in shown.out


def test_the_prompt_reaches_the_model(
    files: dict[str, str], tiny_model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import bimo

    with bimo.load(str(tiny_model_dir), dtype="float32") as model:
        answer = model.chat("译 Open the file.", temperature=0, max_tokens=8).text.strip()
    assert answer
    file = Path(files["held"]).with_name("one.jsonl")
    write(file, [("Open the file.", answer)])
    report = run_json(capsys, tiny_model_dir, "--pairs", str(file), "--prompt", "译 {source}")
    assert report["scores"][0]["chrf"] == pytest.approx(100)


def test_huge_sources_are_told_of(
    files: dict[str, str], tiny_model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(Path(files["held"]).with_name("huge.jsonl"), [("猫" * 5000, "cat"), ("猫", "cat")])
    assert main(["eval", str(tiny_model_dir), "--max-tokens", "2", "--pairs", file]) == 0
    assert capsys.readouterr().err == "note: 1 sources did not fit into the context and count as not translated\n"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "No such file"),
        ("", "has no pairs"),
        ('{"source": "a", "target": "甲"}\n{"source": "a"}', "line 2 has no target"),
        ('{"source": "a", "target": "甲"}\n\nsource,target', "line 3 is no JSON"),
    ],
)
@pytest.mark.parametrize("option", ["--pairs", "--train-pairs"])
def test_broken_files(
    content: str | None, words: str, option: str, files: dict[str, str], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    file = tmp_path / "broken.jsonl"
    if content is not None:
        file.write_text(content, encoding="utf-8")
    others = ["--pairs", files["held"]] if option == "--train-pairs" else []
    assert main(["eval", "no-such-model", option, str(file), *others]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith(f"error: {file}")
    assert shown.err.count("\n") == 1
    assert words in shown.err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], "--text FILE to predict, or --pairs FILE"),
        (["--text", "HELD", "--pairs", "HELD"], "one of the two"),
        (["--text", "HELD", "--beams", "3"], "--beams has an effect with --pairs only"),
        (["--text", "HELD", "--train-pairs", "HELD"], "--train-pairs has an effect with --pairs only"),
        (["--text", "HELD", "--limit", "3"], "--limit has an effect with --pairs only"),
        (["--pairs", "HELD", "--window", "64"], "--window has an effect with --text only"),
        (["--pairs", "HELD", "--limit", "0"], "--limit"),
        (["--pairs", "HELD", "--beams", "0"], "--beams"),
        (["--pairs", "HELD", "--max-tokens", "0"], "--max-tokens"),
        (["--pairs", "HELD", "--prompt", "translate"], "must hold {source}"),
        (["--pairs", "HELD", "--prompt", ""], "must hold {source}"),
        (["--pairs", "HELD", "--target", "Chinese"], "target must be the code of a language"),
        (["--pairs", "HELD", "--source", ""], "source must be the code of a language"),
    ],
)
def test_wrong_options(
    options: list[str], words: str, files: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Refused before a model is looked for."""
    assert main(["eval", "no-such-model", *(files["held"] if word == "HELD" else word for word in options)]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.count("\n") == 1
    assert words in shown.err


def test_a_bar_of_sentences(
    files: dict[str, str], tiny_model_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "PATIENCE", -1)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "240")
    assert main(["eval", str(tiny_model_dir), "--max-tokens", "2", "--pairs", files["held"]]) == 0
    shown = capsys.readouterr()
    assert "sentences" in shown.err
    assert "\x1b" not in shown.out
