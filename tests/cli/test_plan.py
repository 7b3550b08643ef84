"""`bimo plan`: what it counts, what it says, what it refuses."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path

import pytest

import bimo.training.plan as planning
from bimo import runtime
from bimo.cli.main import main
from bimo.cli.plan import bytes_per_token, data_size
from bimo.errors import UsageError
from bimo.recipe import SourceRecipe, load_recipe

TEXTS = Path(__file__).parents[2] / "benchmarks" / "texts"
RECIPE = """
name = "{name}"
[[data.sources]]
name = "texts"
path = "texts"
[tokenizer]
vocab_size = 500
[model]
hidden_size = 64
num_layers = 2
context_length = 64
[training]
steps = 100
batch_tokens = 1024
"""


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A measurement that takes no time, in an empty folder."""
    monkeypatch.setattr(planning, "PROBES", ((64, 1), (128, 1)))
    monkeypatch.setattr(planning, "PROBE_TOKENS", 512)
    monkeypatch.setattr(planning, "PROBE_SECONDS", 0.01)
    monkeypatch.setattr(runtime, "measure_read_bandwidth", lambda: 2e10)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "诗.txt").write_text("床前明月光，疑是地上霜。\n" * 1000, encoding="utf-8")
    file = tmp_path / "small.toml"
    file.write_text(RECIPE.format(name="small"), encoding="utf-8")
    return file


def asked(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict:
    assert main(["plan", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["plan", *arguments]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert said[-1].startswith("error: ")
    return said[-1]


def sized(path: Path) -> tuple[int | None, str]:
    size = data_size([SourceRecipe(name="x", path=str(path))])
    return size.tokens, size.how


# --- how much text --------------------------------------------------------------------------------------------------


def test_chinese_and_english_bytes() -> None:
    assert bytes_per_token(iter([b"The sea is wide. " * 50])) == pytest.approx(3.5)
    assert bytes_per_token(iter([("海很宽，海也很深。" * 50).encode()])) == pytest.approx(3.0)
    assert bytes_per_token(iter([("海很宽，海也很深。" * 50).encode("gb18030")])) == pytest.approx(2.0)
    mixed = ("海很宽" * 50 + "The sea! " * 50).encode()
    assert 3.0 < bytes_per_token(iter([mixed])) < 3.5
    assert bytes_per_token(iter([mixed[:-1], ("海" * 20).encode()[:-1]])) > 3.0  # cut within a character
    assert bytes_per_token(iter([])) == 3.5


def test_a_folder_is_counted_by_its_bytes(tmp_path: Path) -> None:
    folder = tmp_path / "文"
    (folder / "deep").mkdir(parents=True)
    (folder / "a.txt").write_text("海" * 1000, encoding="utf-8")
    (folder / "deep" / "b.jsonl").write_text("海" * 1000, encoding="utf-8")
    (folder / ".hidden.txt").write_text("x" * 9999)
    (folder / "a.txt~").write_text("x" * 9999)
    (folder / "photo.png").write_bytes(b"x" * 9999)
    assert sized(folder)[0] == 2000
    (folder / "c.pdf").write_bytes(b"x" * 9999)
    (folder / "d.txt.gz").write_bytes(gzip.compress(b"x" * 9999))
    tokens, how = sized(folder)
    assert tokens == 2000
    assert "6.0 kB at 3.0 bytes a token" in how and how.endswith(".gz, pdf not counted")
    assert sized(folder / "a.txt")[0] == 1000


def test_a_real_text(tmp_path: Path) -> None:
    for name, least, most in (("en", 3.4, 3.5), ("zh", 3.0, 3.2)):
        file = TEXTS / f"{name}.txt"
        tokens, _ = sized(file)
        assert tokens is not None
        assert least <= file.stat().st_size / tokens <= most + 0.01


def test_large_files_are_counted_whole(tmp_path: Path) -> None:
    file = tmp_path / "large.txt"
    with file.open("wb") as stream:  # listed in parts of 64 MB
        stream.write(b"The sea is wide.\n" * 1000)
        stream.truncate(150 << 20)
    # zeros and not text: what matters is that every part counts once
    sizes = sized(file)[0]
    assert sizes is not None and (150 << 20) / 3.6 < sizes < (150 << 20) / 3.4


def test_folders_without_text_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "papers").mkdir()
    (tmp_path / "papers" / "a.pdf").write_bytes(b"x")
    said = refused(capsys, "--data", "papers")
    assert "holds no plain text" in said and "(pdf not counted): give --tokens" in said
    assert "there is no file or folder" in refused(capsys, "--data", "没有")
    (tmp_path / "empty.txt").touch()
    with pytest.raises(UsageError, match="holds no plain text"):
        sized(tmp_path / "empty.txt")


# --- what is said ---------------------------------------------------------------------------------------------------


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    report = asked(capsys, "--hours", "10", "--tokens", "1000000000")
    assert set(report) == {
        *("machine", "vocab_size", "context_length", "hours", "loss", "data", "plans", "fragment", "notes")
    }
    assert set(report["machine"]) == {"threads", "free_memory", "dtype", "measured"}
    assert len(report["machine"]["measured"]) == 2
    assert report["hours"] == 10 and report["loss"] is None
    assert report["data"] == {"tokens": 10**9, "how": "as --tokens says"}
    assert {"advised", "larger"} <= set(report["plans"]) <= {"smaller", "advised", "larger"}
    assert set(report["plans"]["advised"]) == {
        *("num_parameters", "num_embedding", "tokens", "epochs", "flops", "seconds", "expected_loss", "memory", "fits"),
        *("hidden_size", "num_layers", "steps", "batch_tokens", "micro_batch", "learning_rate"),
        "activation_checkpointing",
    }
    assert {"arXiv:2203.15556", "arXiv:2404.10102", "arXiv:2401.02954"} <= {
        word.strip("(),;") for note in report["notes"] for word in note.split()
    }


def test_the_page(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["plan", "--hours", "1"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("measured   training in ")
    rows = {line.split()[0]: line.split() for line in shown.splitlines() if line.startswith(("advised", "larger"))}
    assert set(rows) == {"advised", "larger"}
    assert "stretched far below that here" in shown
    fragment = shown[shown.index("[model]\n") :]
    (tmp_path / "r.toml").write_text('name = "r"\n[[data.sources]]\nname = "s"\npath = "p"\n' + fragment)
    assert rows["advised"][2] == str(load_recipe(tmp_path / "r.toml").model.hidden_size)


def test_little_text_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    notes = asked(capsys, "--hours", "5", "--tokens", "200000")["notes"]
    assert any(note.startswith("too little text: even this model should see") for note in notes)
    assert any(note.startswith("epochs: text read again, up to 4 times") for note in notes)
    assert any(note.startswith("loss -:") for note in notes)
    assert any(note.startswith("vocabulary: ") for note in notes)
    short = asked(capsys, "--hours", "0.0001")["notes"]
    assert any(note.startswith("too short: even this model") for note in short)


def test_to_a_loss(capsys: pytest.CaptureFixture[str]) -> None:
    report = asked(capsys, "--loss", "5")
    assert report["hours"] is None and report["loss"] == 5
    assert report["plans"]["advised"]["expected_loss"] == pytest.approx(5, abs=0.01)
    assert "below what the law says any model reaches" in refused(capsys, "--loss", "1.7")


def test_a_recipe_is_planned_for(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = asked(capsys, str(recipe), "--hours", "0.01")
    assert (report["vocab_size"], report["context_length"]) == (500, 64)
    assert report["data"]["tokens"] == pytest.approx(12 * 1000, rel=0.05)
    own = report["plans"]["recipe"]
    assert (own["hidden_size"], own["steps"], own["tokens"]) == (64, 100, 102_400)
    assert asked(capsys, str(recipe), "--set", "training.steps=50")["plans"]["recipe"]["tokens"] == 51_200
    assert asked(capsys, str(recipe), "--tokens", "77")["data"]["tokens"] == 77


def test_a_prepared_recipe_is_counted_exactly(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from bimo.data.shards import write_tokens

    for name, count in (("train-texts", 700), ("train-more", 34), ("validation-zh", 99)):
        write_tokens(Path("runs/small/tokens") / name, [("x", [1] * count)], vocab_size=500, mark="")
    data = asked(capsys, str(recipe))["data"]
    assert data["tokens"] == 734 and data["how"] == f"counted in {Path('runs/small/tokens')}"
    (Path("runs/small/tokens/train-more") / "about.json").write_text("{}")
    assert asked(capsys, str(recipe))["data"]["how"].startswith("estimated")


def test_packages_are_not_fetched(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    package = '[[data.sources]]\nname = "words"\npath = "pypi:no-such-package==9"\n'
    mixed = recipe.read_text(encoding="utf-8").replace("[tokenizer]", package + "[tokenizer]")
    recipe.write_text(mixed, encoding="utf-8")
    assert asked(capsys, str(recipe))["data"]["how"].endswith("; without the packages words")
    only = asked(capsys, str(recipe), "--set", "data.sources.0.path=pypi:nothing==1")["data"]
    assert only["tokens"] is None and "packages texts, words" in only["how"]


def test_a_recipe_too_large_is_refused(
    recipe: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runtime, "available_memory", lambda: 10**9)
    said = refused(capsys, str(recipe), "--set", "model.hidden_size=2048", "--set", "model.num_layers=16")
    assert "parameters needs about" in said and "1.00 GB are free" in said and "take a smaller model (hidden" in said
    monkeypatch.setattr(runtime, "available_memory", lambda: None)
    report = asked(capsys, str(recipe), "--set", "model.hidden_size=2048")
    assert report["machine"]["free_memory"] is None and report["plans"]["recipe"]["fits"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--hours", "0"], "--hours takes a time above 0"),
        (["--hours", "nan"], "--hours takes a time above 0"),
        (["--hours", "inf"], "--hours takes a time above 0"),
        (["--loss", "-1"], "--loss takes nats a token above 0"),
        (["--tokens", "0"], "--tokens takes a count above 0"),
        (["--hours", "1", "--loss", "4"], "give one of them"),
        (["--data", "x", "--tokens", "5"], "give one of them"),
        (["--set", "training.steps=5"], "--set changes a recipe"),
        (["没有.toml"], "cannot be read"),
        (["--serve", "gpt2", "--hours", "2"], "hours has no effect"),
        (["--serve", "hf:Qwen/Qwen3-0.6B"], "a plan fetches nothing"),
        (["--serve", "minilm"], "minilm makes embeddings"),
    ],
)
def test_wrong_wishes(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert said in refused(capsys, *arguments)


# --- serving --------------------------------------------------------------------------------------------------------


def test_serving_a_name_a_size_and_a_directory(tiny_model_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for model, parameters in (("smollm2", 134_515_008), ("gpt2-xl", 1_557_611_200), (str(tiny_model_dir), None)):
        report = asked(capsys, "--serve", model)
        assert set(report) == {"model", "num_parameters", "dtype", "free_memory", "read_bandwidth", "serving"}
        assert parameters in (None, report["num_parameters"])
        rows = report["serving"]
        assert {row["quant"] for row in rows} == {"none", "int8", "int4"}
        assert set(rows[0]) == {
            *("quant", "context", "weights", "kv_cache", "memory", "read", "fits", "tokens_per_second")
        }
        assert all(row["tokens_per_second"] == pytest.approx(2e10 / row["read"], abs=0.01) for row in rows)
        by_context = [row["tokens_per_second"] for row in rows if row["quant"] == "int8"]
        assert by_context == sorted(by_context, reverse=True)


def test_serving_page_says_it_is_a_bound(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "available_memory", lambda: 3 * 10**9)
    assert main(["plan", "--serve", "mistral-7b"]) == 0
    shown = capsys.readouterr().out
    assert "An upper bound" in shown and "more than is free" in shown and "20.0 GB a second, measured" in shown


def test_unknown_models_and_configs_that_came_without_weights(
    tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", "--serve", "smolm2"]) == 1
    assert "did you mean smollm2" in capsys.readouterr().err
    assert main(["plan", "--serve", "什么都没有"]) == 1
    assert "no model" in capsys.readouterr().err
    folder = tmp_path / "模型"
    folder.mkdir()
    (folder / "config.json").write_bytes((tiny_model_dir / "config.json").read_bytes())
    assert asked(capsys, "--serve", str(folder))["num_parameters"] > 0
    (folder / "config.json").write_text('{"model_type": "bert"}')
    assert main(["plan", "--serve", str(folder)]) == 1
    assert capsys.readouterr().err.startswith("error: ")


def test_the_command_itself() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "bimo.cli.main", "plan", "--hours", "-1"], capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 2
    assert result.stderr.splitlines() == ["error: --hours takes a time above 0 such as 0.5 or 48, not -1"]
