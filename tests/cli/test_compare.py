"""`bimo compare`: variants and seeds are trained apart, figures come together, and what is done stays done."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from bimo.cli.main import main
from tests.cli.test_train_kinds import STAGE, write_notes
from tests.encoders import make_encoder

COMPARE = """
[compare]
seeds = 1
[compare.variants]
plain = []
noisy = ["stage.0.robust.neftune=5", "stage.0.training.steps=4"]
"""


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    file = tmp_path / "recipe.toml"
    stage = (
        STAGE.replace("noise = 0.3", "")
        .replace("BASE", str(make_encoder(tmp_path / "base")))
        .replace("steps = 40", "steps = 8")
    )
    file.write_text(stage + COMPARE, encoding="utf-8")
    write_notes(tmp_path / "notes.jsonl", 6)
    monkeypatch.chdir(tmp_path)
    return file


def test_figures_of_all_variants_and_seeds(recipe: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", str(recipe), "--json"]) == 0, capfd.readouterr().err
    result: dict[str, Any] = json.loads(capfd.readouterr().out)
    plain, noisy = result["variants"]["plain"], result["variants"]["noisy"]
    assert len(plain) == len(noisy) == 1
    assert plain[0]["loss, notes"] != noisy[0]["loss, notes"]
    assert set(result["references"]) == {"before", "linear"}
    assert all(cost["seconds"] > 0 and cost["peak_memory"] > 50 for cost in result["costs"]["plain"])
    page = Path(result["report"]).read_text(encoding="utf-8")
    assert "noisy" in page and "差值" in page and "<svg" in page
    folder = Path("runs/kinds/variants")
    assert (folder / "plain" / "0" / "stage" / "model").is_dir()

    # one more seed: only that is trained
    assert main(["compare", str(recipe), "--set", "compare.seeds=2"]) == 0
    told = capfd.readouterr()
    assert told.err.count("seed 1 (") == 2 and "seed 0 (" not in told.err
    assert "MEAN OF 2" in told.out and "±" in told.out
    first, second = (json.loads((folder / "plain" / seed / "compared.json").read_text())["stages"][0] for seed in "01")
    assert first["figures"]["loss"] != second["figures"]["loss"]
    assert not list(folder.glob("*/1/stage/model")) and not list(folder.glob("*/*/stage/checkpoints"))

    # a training that fails keeps what is done
    wish = 'compare.variants={plain = [], gone = ["stage.0.length=100000"]}'
    assert main(["compare", str(recipe), "--set", wish]) == 1
    told = capfd.readouterr()
    assert "more than the base reads" in told.err and "what is done stays done" in told.err
    assert "plain, seed" not in told.err and (folder / "plain" / "0" / "compared.json").is_file()

    # other examples: it is trained anew
    write_notes(Path("notes.jsonl"), 7)
    assert main(["compare", str(recipe), "--json", "--set", "compare.variants={plain = []}"]) == 0
    told = capfd.readouterr()
    assert told.err.count("seed 0 (") == 1
    assert json.loads(told.out)["variants"]["plain"][0]["loss, notes"] != plain[0]["loss, notes"]


def test_interrupted_it_goes_on(recipe: Path, capfd: pytest.CaptureFixture[str]) -> None:
    wishes = ["--set", "stage.0.training.steps=4000", "--set", "compare.variants={plain = []}"]
    command = [sys.executable, "-m", "bimo.cli.main", "compare", str(recipe), *wishes]
    with Path("log").open("wb") as log:
        process = subprocess.Popen(command, stderr=log)
    deadline = time.monotonic() + 120
    metrics = Path("runs/kinds/variants/plain/0/stage/metrics.jsonl")
    while not (metrics.is_file() and metrics.read_text().count('"loss"') > 3) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 130
    assert list(Path("runs").glob("kinds/variants/plain/0/stage/checkpoints/step-*"))
    assert "the same command goes on from there" in Path("log").read_text()
    wishes[1] = "stage.0.training.steps=2"  # what was half done belongs to another recipe now
    assert main(["compare", str(recipe), *wishes]) == 0
    assert not [pid for pid in os.listdir("/proc") if pid.isdigit() and _reads(pid, str(recipe))]


def _reads(pid: str, file: str) -> bool:
    try:
        return file.encode() in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


@pytest.mark.parametrize(
    ("wish", "told"),
    [
        ("compare.variants={}", "compare.variants"),
        ('compare.variants={"a b" = []}', "a variant is called by letters"),
        ('compare.variants={a = ["stage.0.dropout"]}', "is a list of settings"),
        ('compare.variants={a = ["seed=3"]}', "compare.seeds gives the seeds"),
        ('compare.variants={a = [], b = ["stage.0.dropuot=1"]}', "did you mean dropout"),
        ("compare.seeds=0", "compare.seeds"),
    ],
)
def test_wrong_wishes_are_told_before_anything_is_trained(
    recipe: Path, wish: str, told: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["compare", str(recipe), "--set", wish]) == 2
    assert told in capfd.readouterr().err
    assert not Path("runs/kinds/variants").exists()


def test_a_recipe_that_compares_nothing(recipe: Path, capfd: pytest.CaptureFixture[str]) -> None:
    recipe.write_text(recipe.read_text().replace(COMPARE, ""), encoding="utf-8")
    assert main(["compare", str(recipe)]) == 2
    assert "add [compare.variants]" in capfd.readouterr().err
