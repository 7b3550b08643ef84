"""`bimo train`: from examples to a tuned model, a report of before and after, and a clear word for what is wrong."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from bimo.cli.main import main
from bimo.training.session import read_metrics

RECIPE = """
name = "helper"
[[stage]]
name = "chat"
base = "BASE"
validation = 0.1
replay = { source = { name = "general", path = "general" } }
[stage.training]
steps = 12
batch_tokens = 512
micro_batch = 2
eval_every = 6
learning_rate = 1e-3
dtype = "float32"
trackers = []
[[stage.task]]
name = "sums"
path = "sums.jsonl"
[[stage.task]]
name = "words"
path = "words.csv"
prompt = "en"
answer = "zh"
instruction = "Chinese: {prompt}"
weight = 2.0
[report]
pairs = 0
"""


@pytest.fixture
def recipe(tmp_path: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    sums = [{"conversations": [{"from": "human", "value": f"{n}加{n}？"}, {"from": "gpt", "value": f"等于{2 * n}。"}]}
            for n in range(120)]  # fmt: skip
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in sums), "utf-8")
    words = "en,zh\n" + "".join(f"word {n},第{n}个词 🦊\n" for n in range(90))
    (tmp_path / "words.csv").write_text(words, encoding="utf-8")
    (tmp_path / "general").mkdir()
    for number in range(40):
        (tmp_path / "general" / f"{number}.txt").write_text(f"General text {number}. 第{number}段通用的文字。", "utf-8")
    file = tmp_path / "helper.toml"
    file.write_text(RECIPE.replace("BASE", str(tiny_model_dir)), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return file


def run(recipe: Path, capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main(["train", str(recipe), "--json", *arguments]) == 0, capsys.readouterr().err
    result: dict[str, Any] = json.loads(capsys.readouterr().out)["stages"][0]
    return result


def test_from_examples_to_a_model_that_answers_better(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = run(recipe, capsys, "--set", "report.pairs=1", "--set", "report.max_tokens=4")
    loss = result["figures"]["loss"]
    assert set(loss) == {"sums", "words", "general"}
    assert all(loss[name]["after"] < 0.9 * loss[name]["before"] for name in ("sums", "words"))
    assert set(result["figures"]["rouge_l"]) == {"sums", "words"}
    folder = Path("runs/helper/chat")
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "加" in page and "ROUGE-L" in page and "之前" in page
    lineage = json.loads((folder / "model" / "bimo.json").read_text(encoding="utf-8"))
    assert lineage["stage"] == "chat" and lineage["scores"].keys() == loss.keys()
    before = (folder / "model" / "model.safetensors").stat().st_mtime_ns
    run(recipe, capsys)  # nothing is done twice
    assert (folder / "model" / "model.safetensors").stat().st_mtime_ns == before


def test_an_adapter_is_merged_by_convert_and_a_stage_goes_on_from_it(
    recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import bimo

    result = run(recipe, capsys, "--no-report", "--set", "stage.0.adapter.kind=lora", "--set", "stage.0.adapter.rank=4")
    question = [{"role": "user", "content": "7加7？"}]
    for target in ("merged", "merged.gguf"):
        assert main(["convert", result["model"], target]) == 0
        with bimo.load(result["model"], dtype="float32") as adapted, bimo.load(target, dtype="float32") as merged:
            answers = [str(model.chat(question, max_tokens=12, temperature=0)) for model in (adapted, merged)]
        assert answers[0] == answers[1] != ""
    capsys.readouterr()
    on = f"stage.0.base={Path(result['model']).absolute()}"
    goes_on = run(recipe, capsys, "--set", on, "--set", "stage.0.replay.share=0", "--out", "on", "--no-report")
    before = json.loads(Path(result["model"], "bimo.json").read_text())["scores"]
    rows = read_metrics(Path("on/chat/metrics.jsonl"))  # it begins where the adapter ended
    first = next(row for row in rows if "validation/sums/loss" in row)
    last = [row for row in read_metrics(Path("runs/helper/chat/metrics.jsonl")) if "validation/sums/loss" in row][-1]
    assert first["validation/sums/loss"] == pytest.approx(last["validation/sums/loss"], rel=1e-3) and before
    assert Path("on/chat/base/model.safetensors").is_file() and goes_on["scores"]


@pytest.mark.parametrize("wishes", [("stage.0.adapter.kind=lora",), ("stage.0.training.parallel=fsdp",)])
def test_two_processes_learn_what_one_does(
    recipe: Path, wishes: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--no-report", "--json", "--set", "stage.0.training.batch_tokens=1024"]
    options += [part for wish in wishes for part in ("--set", wish)]
    run(recipe, capsys, "--out", "one", *options)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launcher, "-m", "bimo.cli.main", "train", str(recipe), "--out", "two", *options]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert shown.returncode == 0, shown.stderr
    assert json.loads(shown.stdout)["stages"][0]["kind"] == "answers"  # one process speaks
    one, two = ([row["loss"] for row in read_metrics(Path(name) / "chat" / "metrics.jsonl") if "loss" in row]
                for name in ("one", "two"))  # fmt: skip
    assert len(one) == 12 and two == pytest.approx(one, rel=1e-3)


def test_a_killed_training_goes_on_to_the_same_end(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--no-report", "--set", "stage.0.training.checkpoint_minutes=0"]
    run(recipe, capsys, *options, "--out", "whole")
    command = [sys.executable, "-m", "bimo.cli.main", "train", str(recipe), "--out", "killed", *options]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    place = Path("killed/chat")
    while not list(place.glob("checkpoints/step-*")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert list(place.glob("checkpoints/step-*"))
    run(recipe, capsys, *options, "--out", "killed")
    ends = [{row["step"]: row["loss"] for row in read_metrics(Path(name) / "chat" / "metrics.jsonl") if "loss" in row}
            for name in ("whole", "killed")]  # fmt: skip
    assert ends[0] == ends[1] and len(ends[0]) == 12


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("sums.jsonl", '{"prompt": "a", "completion": "b"}\n{broken\n', "that are not JSON: 1, the first is number 2"),
        ("sums.jsonl", '{"prompt": "a", "completion": ""}\n', "answer is empty: 1, the first is number 1"),
        ("sums.jsonl", '{"prompt": "a"}\n', "no known layout"),
        ("sums.jsonl", "", "is empty"),
        ("words.csv", "en,de\nword,Wort\n", "without the field 'zh'"),
    ],
)  # fmt: skip
def test_bad_rows_stop_until_the_user_says_so(
    recipe: Path, capsys: pytest.CaptureFixture[str], name: str, content: str, told: str
) -> None:
    Path(name).write_text(content, encoding="utf-8")
    assert main(["train", str(recipe)]) == 1
    error = capsys.readouterr().err
    assert told in error and 'bad_rows = "skip"' in error


def test_good_rows_are_used_when_the_user_says_so(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Path("sums.jsonl").open("a", encoding="utf-8") as file:
        file.write("{broken\n")
    options = ["--no-report", "--set", "stage.0.bad_rows=skip", "--set", "stage.0.training.steps=1"]
    run(recipe, capsys, *options, "--set", "stage.0.replay.share=0")
    manifest = json.loads(Path("runs/helper/chat/data/manifest.json").read_text(encoding="utf-8"))
    assert manifest["num_damages"] == 1
    assert main(["train", str(recipe), *options[1:], "--set", "stage.0.replay.share=0"]) == 0
    assert "rows are left out: sums/sums.jsonl has" in capsys.readouterr().err
    assert "未用" in Path("runs/helper/chat/report.html").read_text(encoding="utf-8")


def test_an_answer_longer_than_a_row_is_named(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Path("words.csv").open("a", encoding="utf-8") as file:
        file.write("long," + "很长的回答" * 300 + "\n")
    assert main(["train", str(recipe), "--set", "stage.0.replay.share=0"]) == 1
    error = capsys.readouterr().err
    assert "words/words.csv#90 has" in error and "answer alone has" in error and 'too_long = "skip"' in error
    options = ["--no-report", "--set", "stage.0.replay.share=0", "--set", "stage.0.training.steps=1"]
    assert main(["train", str(recipe), *options, "--set", "stage.0.too_long=skip"]) == 0
    assert "1 example is left out: words/words.csv#90 has" in capsys.readouterr().err
    assert main(["train", str(recipe), *options[1:], "--set", "stage.0.too_long=skip", "--set", "report.pairs=0"]) == 0
    assert "1 example is left out" in capsys.readouterr().err  # told again, and in the report
    page = Path("runs/helper/chat/report.html").read_text(encoding="utf-8")
    assert "未用" in page and "words/words.csv#90" in page
    options[-1] = "stage.0.training.steps=1"
    assert main(["train", str(recipe), *options, "--set", "stage.0.length=512", "--out", "full"]) == 1
    assert "raise length" not in (error := capsys.readouterr().err) and "shorten them, or set" in error


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("stage.0.base=no-such-model", "no model 'no-such-model'"),
        ("stage.0.length=100000", "more than the base reads"),
        ("stage.0.objective=classes", "told by an encoder"),
        ("stage.0.r_drop=1.0", "set dropout = 0.1"),
        ("stage.0.tasks=1", "there is no key stage.0.tasks; did you mean task?"),
        ("stage.0.adapter.knid=lora", "did you mean kind?"),
        ("stage.0.task.0.instruction=Say it", "{prompt}"),
        ("stage.0.adapter.rank=100000", "should be less than or equal to 65536"),
        ("stage.0.dropout=1.0", "should be less than 1"),
        ("stage.0.passage_chars=5", "passages have 50 characters or more"),
        ('stage.0.task.0.augment={synonyms = 0.1, synonym_files = ["没有.txt"]}', "没有.txt is not there"),
    ],
)
def test_wrong_recipes_are_refused(recipe: Path, capsys: pytest.CaptureFixture[str], override: str, told: str) -> None:
    assert main(["train", str(recipe), "--set", override, "--set", "stage.0.replay.share=0"]) in (1, 2)
    assert told in capsys.readouterr().err


def test_the_preview_marks_what_is_learned(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "preview", str(recipe), "--count", "1"]) == 0
    shown = capsys.readouterr().out
    assert "«等于" in shown and "tokens are trained" in shown and "Chinese: word" in shown
    assert main(["data", "preview", str(recipe), "--task", "words", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    altered = "stage.0.task.1.augment={typos = 0.5, copies = 2}"
    assert main(["data", "preview", str(recipe), "--task", "words", "--json", "--set", altered]) == 0
    more = json.loads(capsys.readouterr().out)
    assert more[:2] == rows and [row["id"] for row in more[2:]] == [
        f"{row['id']}+typos{copy}" for row in rows for copy in ("", "2")
    ]
    assert main(["data", "preview", str(recipe), "--set", "stage.0.length=100000"]) == 2
    assert "more than the base reads" in capsys.readouterr().err
    assert {row["task"] for row in rows} == {"words"} and all(0 < sum(row["trained"]) < len(row["ids"]) for row in rows)


def test_a_finished_model_is_not_overwritten_by_another_recipe(
    recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--set", "stage.0.replay.share=0", "--no-report"]
    result = run(recipe, capsys, *options, "--set", "stage.0.training.steps=2")
    weights = Path(result["model"], "model.safetensors")
    before = weights.read_bytes()
    assert main(["train", str(recipe), *options, "--set", "stage.0.training.steps=3"]) == 2
    error = capsys.readouterr().err
    assert "another recipe, where training.steps was 2 and not 3" in error and "remove runs/helper/chat/model" in error
    with Path("words.csv").open("a", encoding="utf-8") as file:
        file.write("one more,又一个\n")
    assert main(["train", str(recipe), *options, "--set", "stage.0.training.steps=2"]) == 2
    assert "was made with other texts" in capsys.readouterr().err
    assert weights.read_bytes() == before


def test_two_do_not_train_in_one_folder(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("runs/helper").mkdir(parents=True)
    with FileLock("runs/helper/.training.lock"):
        assert main(["train", str(recipe)]) == 2
    assert "another process trains in runs/helper just now" in capsys.readouterr().err
    Path("runs/helper/.training.lock").unlink()
    Path("runs/helper/.training.lock").mkdir()
    assert main(["train", str(recipe)]) == 1
    assert "runs/helper cannot be written (Is a directory)" in capsys.readouterr().err


def test_wishes_without_effect_are_told(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wishes = ("stage.0.training.steps=1", "stage.0.replay.share=0", "stage.0.adapter.kind=lora",
              "stage.0.adapter.width=8", "stage.0.robust.steps=5", "data.validation=0.5",
              "report.noise=0.5")  # fmt: skip
    options = [part for wish in wishes for part in ("--set", wish)]
    assert main(["train", str(recipe), "--no-report", *options]) == 0
    told = capsys.readouterr().err
    for key in ("adapter.width of stage chat", "robust.steps of stage chat", "[data]", "report.noise"):
        assert f"{key} has no effect" in told


def test_a_prefix_is_trained_reported_and_answers(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wishes = ("stage.0.adapter.kind=prefix", "stage.0.adapter.tokens=5", "stage.0.training.learning_rate=0.05",
              "stage.0.replay.share=0", "report.pairs=1", "report.max_tokens=4")  # fmt: skip
    result = run(recipe, capsys, *(part for wish in wishes for part in ("--set", wish)))
    assert all(row["after"] < row["before"] for row in result["figures"]["loss"].values())
    assert set(result["figures"]["rouge_l"]) == {"sums", "words"}
    assert main(["generate", result["model"], "--prompt", "7加7？", "--chat", "--max-tokens", "3"]) == 0


def test_stages_need_a_base(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "r.toml"
    file.write_text('name = "r"\n[[stage]]\n[[stage.task]]\nname = "a"\npath = "a.jsonl"\n', encoding="utf-8")
    assert main(["train", str(file)]) == 2
    assert "stage.0.base names the model to begin with" in capsys.readouterr().err
    file.write_text('name = "r"\n', encoding="utf-8")
    assert main(["train", str(file)]) == 2
    assert "there is nothing to do" in capsys.readouterr().err


def test_an_adapter_learns_and_answers(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--set", "stage.0.adapter.kind=lora", "--set", "stage.0.training.learning_rate=0.02"]
    result = run(recipe, capsys, *options, "--set", "report.pairs=1", "--set", "report.max_tokens=4")
    loss = result["figures"]["loss"]
    assert all(loss[name]["after"] < 0.9 * loss[name]["before"] for name in ("sums", "words"))
    folder = Path(result["model"])
    assert (folder / "adapter_model.safetensors").is_file() and not (folder / "model.safetensors").exists()
    assert main(["generate", str(folder), "--prompt", "一", "--max-tokens", "3"]) == 0
