"""`bimo data prepare` as a user meets it: the table, --json, overrides, and errors of one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bimo.cli.main import main

ENGLISH = (
    "The committee met on Tuesday to discuss the plan for the harbour, number {}, and most of them were in favour."
)
CHINESE = "委员会在星期二开会，讨论第{}号港口的规划，大多数成员表示赞成，但有两位要求多一些时间。"


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    folder = tmp_path / "texts"
    folder.mkdir()
    words = [f"{number} {'abcdefgh'[number] * 6} {'春夏秋冬东南西北'[number] * 6}" for number in range(8)]
    for number, word in enumerate(words):
        (folder / f"{number}.txt").write_text((CHINESE if number % 2 else ENGLISH).format(word * 8), encoding="utf-8")
    (folder / "8.txt").write_text(CHINESE.format(words[1] * 8), encoding="utf-8")
    (folder / "9.xyz").write_text("?")
    file = tmp_path / "小食谱.toml"
    source = '[[data.sources]]\nname = "texts"\npath = "texts"\n'
    file.write_text(f'name = "small"\n{source}[data]\nvalidation = 0\n', encoding="utf-8")
    return file


def test_the_table(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["data", "prepare", str(recipe), "--out", str(tmp_path / "run")]
    assert main(arguments) == 0
    shown = capsys.readouterr()
    rows = {tuple(row.split()[:2]): row.split()[2] for row in shown.out.splitlines()[1:-2]}
    assert rows == {("read", "read"): "9", ("dropped", "exact_duplicates"): "1", ("kept", "train"): "8"}
    assert "could not be read: 1" in shown.out
    assert str(tmp_path / "run" / "data" / "manifest.html") in shown.out
    assert "error" not in shown.err
    assert main(arguments) == 0  # the second time all is done, and shown again
    assert capsys.readouterr().out == shown.out


def test_json(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["data", "prepare", str(recipe), "--out", str(tmp_path / "run"), "--json", "--workers", "1"]
    assert (
        main([*arguments, "--set", "data.clean.exact_duplicates=false", "--set", "data.clean.near_duplicates=1"]) == 0
    )
    manifest = json.loads(capsys.readouterr().out)
    assert manifest == json.loads((tmp_path / "run" / "data" / "manifest.json").read_text(encoding="utf-8"))
    assert sum(part["documents"] for part in manifest["parts"]) == 9


def test_without_out_the_run_is_named_after_the_recipe(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["data", "prepare", str(recipe)]) == 0
    assert (tmp_path / "runs" / "small" / "data" / "manifest.html").is_file()


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--executor", "slurm"], 2, "--executor is one of local, ray, not 'slurm'"),
        (["--workers", "0"], 2, "--workers"),
        (["--set", "data.validation=2"], 2, "data.validation"),
        (["--set", "data.clean.simplifed=false"], 2, "did you mean simplified"),
        (["--set", "data.validation"], 2, "--set takes key=value"),
        (["--set", "data.sources.3.path=x"], 2, "no '3'"),
        (["--set", "data.sources.0.path=nowhere"], 2, "no file or folder"),
        (["--set", "data.sources.0.encoding=utf-9"], 2, "there is no encoding 'utf-9'"),
        (["--set", "data.clean.toxic=0.1"], 2, "toxic_words"),
        (["--set", "data.clean.min_chars=99999"], 1, "no document was left"),
        (["--out", "/dev/null/run"], 1, "cannot be written"),
    ],
)
def test_an_error_is_one_line(
    recipe: Path, tmp_path: Path, arguments: list[str], code: int, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["data", "prepare", str(recipe), "--out", str(tmp_path / "run"), "--workers", "1", *arguments]
    assert main(given) == code
    shown = capsys.readouterr()
    assert shown.out == ""
    *progress, error = shown.err.splitlines()
    assert error.startswith("error: ")
    assert words in error
    assert all(line.endswith(" ...") for line in progress)


def test_a_recipe_that_is_not_there_or_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bad.toml").write_text("name = ")
    for name, words in (("none.toml", "cannot be read"), ("bad.toml", "is not TOML")):
        assert main(["data", "prepare", str(tmp_path / name)]) == 2
        shown = capsys.readouterr()
        assert shown.err.startswith("error: ")
        assert words in shown.err
    assert not (tmp_path / "runs").exists()


def test_leaks_stop_drop_or_warn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Sayings stand in the training text as well: whole, in longer documents."""
    import random

    han = "的一是在不了有和人这中大为上个国我以要他时来用们生到作地于出就分对成会可主发年动同工也能下过子说产种面"
    made = ["".join(random.Random(number).choices(han, k=60)) for number in range(90)]
    rows = [{"text": text} for text in made[:30]] + [{"text": "".join(made[n : n + 90 : 30])} for n in range(30)]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (tmp_path / "a.jsonl").write_text(lines, encoding="utf-8")
    file = tmp_path / "recipe.toml"
    source = '[[data.sources]]\nname = "a"\npath = "a.jsonl"\n'
    file.write_text(f'name = "leaky"\n{source}[data]\nvalidation = 0.3\n', encoding="utf-8")
    arguments = ["data", "prepare", str(file), "--out", str(tmp_path / "run")]
    assert main(arguments) == 1
    shown = capsys.readouterr().err
    assert "stand in the training data as well" in shown
    assert '"drop"' in shown and '"warn"' in shown
    assert main([*arguments, "--set", "data.leaks=warn"]) == 0
    assert "dropped" not in capsys.readouterr().out
    assert main([*arguments, "--set", "data.leaks=drop"]) == 0
    assert "dropped  leaks" in capsys.readouterr().out
