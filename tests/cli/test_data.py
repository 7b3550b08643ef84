"""`bimo data` as a user meets it: tables, --json, overrides, exit codes, and errors of one line."""

from __future__ import annotations

import json
import random
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


# --- leaks ------------------------------------------------------------------------------------------------------------

POEM = "昔人已乘黄鹤去，此地空余黄鹤楼。黄鹤一去不复返，白云千载空悠悠。"
TRADITIONAL = "昔人已乘黃鶴去，此地空餘黃鶴樓。黃鶴一去不復返，白雲千載空悠悠。"


@pytest.fixture
def sets(tmp_path: Path) -> Path:
    questions = [
        {"question": POEM},
        {"question": "Who wrote it?"},
        {"question": ENGLISH.format("７")},
        {"question": CHINESE.format("九")},
    ]
    rows = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in questions)
    (tmp_path / "考试.jsonl").write_text(rows, encoding="utf-8")
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "诗.txt").write_text(f"崔颢《黄鹤楼》\n{TRADITIONAL}\n晴川历历汉阳树", encoding="utf-8")
    (tmp_path / "texts" / "en.txt").write_text(ENGLISH.format("7").upper(), encoding="utf-8")
    (tmp_path / "texts" / "short.txt").write_text("Who wrote it? Nobody knows.")
    (tmp_path / "texts" / "broken.parquet").write_bytes(b"PAR1")
    return tmp_path


def test_leaks_are_named_and_fail(sets: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["data", "leaks", str(sets / "考试.jsonl"), str(sets / "texts"), "--text", "question"]
    assert main(arguments) == 1
    shown = capsys.readouterr()
    first, _, *rest = shown.out.splitlines()
    assert first == f"2 of 4 documents of {sets / '考试.jsonl'} stand in {sets / 'texts'} (3 documents)"
    assert rest == [
        "考试.jsonl/考试.jsonl#0: 100% of it stands in texts/诗.txt",
        f"  {POEM}",
        "",
        "考试.jsonl/考试.jsonl#2: the whole text stands in texts/en.txt",
        f"  {ENGLISH.format('７')[:120]}",
    ]
    assert "not read: texts/broken.parquet cannot be read" in shown.err
    assert "error" not in shown.err
    assert main([*arguments, "--warn"]) == 0


def test_leaks_as_json_and_of_other_lengths(sets: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["data", "leaks", str(sets / "考试.jsonl"), str(sets / "texts"), "--text", "{question}", "--json"]
    assert main([*arguments, "--n", "3"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert (found["num_checked"], found["num_others"], found["words"]) == (4, 3, 3)
    assert [leak["id"].rpartition("#")[2] for leak in found["leaks"]] == ["0", "1", "2"]
    assert found["leaks"][1] == {
        "id": "考试.jsonl/考试.jsonl#1",
        "kind": "passages",
        "share": 1.0,
        "found_in": "texts/short.txt",
        "text": "Who wrote it?",
    }
    assert [damage["id"] for damage in found["damages"]] == ["texts/broken.parquet"]


def test_leaks_of_prepared_runs(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    assert main(["data", "prepare", str(recipe), "--out", str(run), "--set", "data.validation=0.4"]) == 0
    capsys.readouterr()
    assert main(["data", "leaks", f"{run}:validation", str(run), "--json"]) == 0
    apart = json.loads(capsys.readouterr().out)
    assert apart["num_checked"] > 0 and apart["num_checked"] + apart["num_others"] == 8
    assert main(["data", "leaks", str(run / "data"), str(tmp_path / "texts"), "--json"]) == 1
    inside = json.loads(capsys.readouterr().out)
    assert len(inside["leaks"]) == inside["num_checked"] == apart["num_others"]
    assert {leak["kind"] for leak in inside["leaks"]} == {"text"}


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["texts", "texts"], 2, "both sets are the same"),
        (["missing.txt", "texts"], 2, "there is no file or folder"),
        (["texts:validation", "考试.jsonl"], 2, "is no folder that `bimo data prepare` has finished"),
        (["考试.jsonl", "texts"], 1, "rows without the field 'text' (they have 'question')"),
        (["texts", "empty.txt"], 1, "there is no document in"),
        (["texts", "考试.jsonl", "--n", "1"], 2, "--n"),
    ],
)
def test_leaks_of_nothing(
    sets: Path, arguments: list[str], code: int, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (sets / "empty.txt").write_text("")
    places = [str(sets / each) if "--" not in each and each != "1" else each for each in arguments]
    assert main(["data", "leaks", *places]) == code
    shown = capsys.readouterr()
    assert shown.out == ""
    assert words in shown.err
    assert shown.err.splitlines()[-1].startswith("error: ")
