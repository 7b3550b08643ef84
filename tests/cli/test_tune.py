"""`bimo tune`: from a recipe with a [search] to the settings that suit best; whatever is killed, it goes on."""

from __future__ import annotations

import json
import os
import re
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from bimo.cli.main import main
from bimo.recipe import load_recipe
from bimo.training.session import read_metrics
from tests.cli.corpus import write_texts

RECIPE = """
name = "small"
[[data.sources]]
name = "texts"
path = "texts"
[data]
validation = 0.1
leaks = "drop"
[tokenizer]
vocab_size = 400
[model]
hidden_size = 16
num_layers = 1
num_heads = 1
context_length = 32
[training]
steps = 8
batch_tokens = 128
eval_every = 4
eval_tokens = 512
dtype = "float32"
trackers = []
[search]
method = "grid"
prune = false
[search.space]
"training.learning_rate" = [1e-5, 3e-2]
"model.hidden_size" = [16, 32]
"""


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_texts(tmp_path / "texts")
    file = tmp_path / "small.toml"
    file.write_text(RECIPE, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return file


def tune(recipe: Path, capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main(["tune", str(recipe), "--json", *arguments]) == 0, capsys.readouterr().err
    result: dict[str, Any] = json.loads(capsys.readouterr().out)
    return result


def soon(condition: Callable[[], Any], act: Callable[[], None]) -> threading.Thread:
    """Once the condition holds, act."""

    def wait() -> None:
        deadline = time.monotonic() + 60
        while not condition() and time.monotonic() < deadline:
            time.sleep(0.02)
        act()

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


def test_the_better_settings_are_found_and_told(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = tune(recipe, capsys)
    assert result["metric"] == "bits_per_byte" and [trial["state"] for trial in result["trials"]] == ["complete"] * 4
    best = result["best"]
    assert best["settings"]["training.learning_rate"] == 3e-2
    assert best["loss"] == min(trial["loss"] for trial in result["trials"])
    assert best["set"][0] == "training.learning_rate=0.03"
    folder = Path(result["run"])
    assert folder == Path("runs/small") and [path.parent.name for path in folder.glob("trials/*/model")] == [
        f"{best['trial']:03}"
    ]
    assert {path.name for path in folder.glob("trials/*/[!.]*")} == {
        "metrics.jsonl",
        "losses.json",
        "model",
    }  # data: shared
    # the loss is that of the model that is there
    lineage = json.loads((Path(best["model"]) / "bimo.json").read_text(encoding="utf-8"))
    figures = [score["bits_per_byte"] for score in lineage["scores"].values()]
    assert min(figures) <= best["loss"] <= max(figures)
    written = load_recipe(Path(best["recipe"]))
    assert written == load_recipe(recipe, best["set"]).model_copy(update={"search": None})
    page = (folder / "search.html").read_text(encoding="utf-8")
    assert page.count("<svg") == 6 and "<script" not in page and "超参数搜索" in page and "a little too good" in page
    assert f"{best['loss']:.4f}" in page and "<details open>" in page

    before = {path: path.stat().st_mtime_ns for path in folder.glob("trials/**/*") if path.is_file()}
    assert tune(recipe, capsys) == result  # nothing is trained again
    assert all(path.stat().st_mtime_ns == changed for path, changed in before.items())
    assert main(["tune", str(recipe)]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"settings +--set training.learning_rate=0.03 --set model.hidden_size=", shown)
    assert re.search(r"best +trial \d: [\d.]+ bits per byte of validation text", shown)


def test_ctrl_c_keeps_every_step(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    metrics = Path("runs/small/trials/000/metrics.jsonl")
    wishes = ["--set", "training.steps=60", "--set", "search.method=random", "--trials", "1"]
    soon(lambda: len(read_metrics(metrics)) > 5, lambda: os.kill(os.getpid(), signal.SIGINT))
    assert main(["tune", str(recipe), *wishes]) == 130
    assert "stopped, 0 of 1 trials are done: the same command goes on from there" in capsys.readouterr().err
    steps = len([row for row in read_metrics(metrics) if "loss" in row])
    (saved,) = Path("runs/small/trials/000/checkpoints").glob("step-*")
    assert saved.name == f"step-{steps:08}" and steps < 60
    rows = metrics.read_text(encoding="utf-8").splitlines()
    result = tune(recipe, capsys, *wishes)
    assert metrics.read_text(encoding="utf-8").splitlines()[: len(rows)] == rows  # taken up, not begun again
    (trial,) = result["trials"]
    assert trial["state"] == "complete" and [step for step, _ in trial["curve"]] == list(range(4, 61, 4))


def test_a_killed_worker_is_replaced_and_its_trial_taken_up(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def worker() -> list[psutil.Process]:
        children = psutil.Process().children()
        return [child for child in children if "spawn_main" in " ".join(child.cmdline())]

    killed: list[int] = []

    def kill() -> None:
        for child in worker()[:1]:
            child.kill()
            killed.append(child.pid)

    begun = soon(
        lambda: any(len(read_metrics(path)) > 2 for path in Path("runs").glob("*/trials/*/metrics.jsonl")), kill
    )
    result = tune(
        recipe, capsys, "--workers", "2", "--set", "training.steps=40", "--set", "search.method=random", "--trials=3"
    )
    begun.join()
    assert killed and [trial["state"] for trial in result["trials"]] == ["complete"] * 3
    for folder in Path("runs/small/trials").iterdir():
        steps = [row["step"] for row in read_metrics(folder / "metrics.jsonl") if "loss" in row]
        assert steps == list(range(1, 41))


def test_a_vocabulary_of_its_own(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = RECIPE.replace('"model.hidden_size" = [16, 32]', '"tokenizer.vocab_size" = [300, 400]')
    recipe.write_text(text.replace("[1e-5, 3e-2]", "[3e-2]"), encoding="utf-8")
    result = tune(recipe, capsys)
    places = sorted(
        path.parent.relative_to("runs/small").as_posix() for path in Path("runs/small").rglob("tokenizer.json")
    )
    assert [place for place in places if "model" not in place] == ["tokenizer", "trials/000/tokenizer"]
    assert Path("runs/small/data").is_dir() and not list(Path("runs/small/trials").glob("*/data"))
    assert len({trial["loss"] for trial in result["trials"]}) == 2


def test_settings_of_a_stage(
    tmp_path: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [{"question": f"{n}加{n}？", "answer": f"等于{2 * n}。"} for n in range(60)]
    Path("sums.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    file = tmp_path / "helper.toml"
    file.write_text(
        f'name = "helper"\n[[stage]]\nname = "chat"\nbase = "{tiny_model_dir}"\nvalidation = 0.2\nreplay.share = 0\n'
        '[stage.training]\nsteps = 6\nbatch_tokens = 256\neval_every = 3\ntrackers = []\ndtype = "float32"\n'
        '[[stage.task]]\nname = "算术"\npath = "sums.jsonl"\n'
        '[search]\nmethod = "grid"\n[search.space]\n"stage.0.training.learning_rate" = [1e-7, 1e-3]\n',
        encoding="utf-8",
    )
    result = tune(file, capsys)
    assert result["best"]["settings"] == {"stage.0.training.learning_rate": 1e-3}
    assert [step for step, _ in result["trials"][0]["curve"]] == [3, 6]
    assert Path("runs/helper/chat/tokens").is_dir() and not list(Path("runs/helper/trials").glob("*/tokens"))
    assert Path(result["best"]["model"], "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("change", "arguments", "code", "said"),
    [
        ("", ["--set", "training.stepz=3"], 2, "did you mean steps?"),
        ("model.hidden_size=>model.hidden_sizes", [], 2, "did you mean hidden_size?"),
        ('[search]\nmethod = "grid"\nprune = false\n[search.space]=>[report]', [], 2, "there is no key report"),
        ("", ["--set", "data.validation=0"], 2, "there is none: raise data.validation"),
        ("", ["--set", "search.method=hunt"], 2, "search.method"),
        ("", ["--trials", "3"], 2, "a grid of 4 combinations is more than search.trials 3"),
        ("", ["--workers", "0"], 2, "--workers"),
        ("", ["--storage", "redis"], 2, "--storage takes a URL"),
        ("model.hidden_size=>stage.0.length", [], 2, "names stage.0, and the recipe has no [[stage]]"),
        (
            "[1e-5, 3e-2]=>[1e30, 1e35]",
            ["--set", "training.clip=0"],
            1,
            "none of the 4 trials came to its end, trial 0",
        ),
    ],
)
def test_mistakes_are_one_line(
    recipe: Path, capsys: pytest.CaptureFixture[str], change: str, arguments: list[str], code: int, said: str
) -> None:
    old, _, new = change.partition("=>")
    recipe.write_text(RECIPE.replace(old, new) if old else RECIPE, encoding="utf-8")
    assert main(["tune", str(recipe), *arguments]) == code
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(errors) == 1 and said in errors[0]


def test_two_trainings_are_searched_one_after_the_other(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stages = '[[stage]]\nname = "chat"\n[[stage.task]]\nname = "sums"\npath = "sums.jsonl"\n'
    searched = RECIPE.replace('"model.hidden_size" = [16, 32]', '"stage.0.length" = [16, 32]')
    recipe.write_text(searched + stages, encoding="utf-8")
    assert main(["tune", str(recipe)]) == 2
    assert "names stage.0 and training.learning_rate: search one after the other" in capsys.readouterr().err
    masked = RECIPE.replace('"model.hidden_size" = [16, 32]', '"tokenizer.vocab_size" = [300, 400]')
    recipe.write_text(masked.replace("[model]", '[model]\nkind = "encoder"'), encoding="utf-8")
    assert main(["tune", str(recipe), "--set", "tokenizer.kind=wordpiece"]) == 2
    assert "cannot be compared between vocabularies" in capsys.readouterr().err


def test_other_texts_are_another_search(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tune(recipe, capsys, "--trials", "1", "--set", 'search.method="random"')
    lines = (file := Path("texts/zh.jsonl")).read_text(encoding="utf-8").splitlines(keepends=True)
    file.write_text("".join(lines[::2]), encoding="utf-8")
    assert main(["tune", str(recipe), "--trials", "2", "--set", 'search.method="random"']) == 2
    assert "the texts, or the base, have changed since the search in runs/small began" in capsys.readouterr().err
