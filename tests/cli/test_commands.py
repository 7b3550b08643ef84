"""models, convert, doctor, bench, serve."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from bimo.cli.main import main
from bimo.cli.terminal import human_bytes, human_count, progress_display


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder."""
    monkeypatch.setenv("BIMO_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hf"))
    return tmp_path / "home"


def test_models_lists_the_catalog(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["NAME", "PARAMETERS", "ON", "DISK", "LANGUAGES", "LICENCE", "WHAT"]
    assert any(line.startswith("smollm2 ") and "135M" in line for line in lines)
    assert main(["models", "--json"]) == 0
    models = json.loads(capsys.readouterr().out)
    assert {"name", "reference", "cached", "bytes", "path", "num_parameters", "licence"} <= set(models[0])
    assert not any(model["cached"] for model in models)
    assert not home.exists()


def test_fetch_list_use_remove(
    home: Path, tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "小模型.gguf"
    assert main(["convert", str(tiny_model_dir), str(file)]) == 0
    capsys.readouterr()
    assert main(["models", "--fetch", str(file)]) == 0
    folder = Path(capsys.readouterr().out.strip())
    assert folder.parent == home / "models"
    assert main(["models", "--json"]) == 0
    model = next(entry for entry in json.loads(capsys.readouterr().out) if entry["name"] == folder.name)
    assert model["cached"]
    assert model["bytes"] > 0
    assert main(["generate", folder.name, "--prompt", "你好", "--max-tokens", "3"]) == 0
    capsys.readouterr()
    assert main(["models", "--remove", folder.name]) == 0
    assert "freed" in capsys.readouterr().out
    assert not folder.exists()


def tokens(model: Path, capsys: pytest.CaptureFixture[str]) -> list[int]:
    options = ["--prompt", "床前明月光 the fox", "--max-tokens", "12", "--temperature", "0", "--dtype", "float32"]
    assert main(["generate", str(model), *options, "--json"]) == 0
    return json.loads(capsys.readouterr().out)["tokens"]


@pytest.mark.parametrize("target", ["out", "out.gguf"])
def test_convert_and_back(
    target: str, home: Path, tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    written = tmp_path / "新" / target
    assert main(["convert", str(tiny_model_dir), str(written)]) == 0
    assert str(written) in capsys.readouterr().out
    back = tmp_path / "back"
    assert main(["convert", str(written), str(back)]) == 0
    capsys.readouterr()
    if target == "out":  # the same numbers; a float16 file may tip a close decision of a random model
        assert tokens(written, capsys) == tokens(back, capsys) == tokens(tiny_model_dir, capsys)
    else:
        assert tokens(written, capsys) == tokens(back, capsys)
    assert (back / "chat_template.jinja").read_text(encoding="utf-8").strip()


def test_convert_to_eight_bits(
    home: Path, tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    half, eighth = tmp_path / "f16.gguf", tmp_path / "q8.gguf"
    assert main(["convert", str(tiny_model_dir), str(half), "--type", "f16"]) == 0
    assert main(["convert", str(tiny_model_dir), str(eighth), "--type", "q8_0"]) == 0
    assert eighth.stat().st_size < half.stat().st_size
    capsys.readouterr()
    assert len(tokens(eighth, capsys)) > 0


def test_convert_replaces_nothing_unasked(
    home: Path, tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, folder, other = tmp_path / "x.gguf", tmp_path / "model", tmp_path / "mine"
    for target in (file, folder):
        assert main(["convert", str(tiny_model_dir), str(target)]) == 0
        assert main(["convert", str(tiny_model_dir), str(target)]) == 2
        assert "--force" in capsys.readouterr().err
        assert main(["convert", str(tiny_model_dir), str(target), "--force"]) == 0
    other.mkdir()
    (other / "notes.txt").write_text("重要")
    assert main(["convert", str(tiny_model_dir), str(other), "--force"]) == 2  # not a model: not even with --force
    assert (other / "notes.txt").read_text() == "重要"
    assert main(["convert", str(folder), str(folder), "--force"]) == 2
    assert "the model itself" in capsys.readouterr().err
    assert main(["convert", str(tiny_model_dir), str(file / "under-a-file")]) in (1, 2)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]  # no partial work


def test_doctor(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    shown = capsys.readouterr().out
    for word in ("python", "torch", "processor", "instructions", "number type", "memory", "cache", "chromium"):
        assert f"\n{word}" in f"\n{shown}"
    assert "bfloat16:" in shown or "float32:" in shown
    assert main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert {check["name"] for check in report["checks"]} >= {
        "python",
        "torch",
        "processor",
        "memory",
        "cache",
        "models",
    }
    assert report["ok"] == (not any(check["warning"] for check in report["checks"]))
    assert not home.exists()  # looking changes nothing


def test_doctor_warns_with_the_mend(
    home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from bimo import runtime
    from bimo.cli import doctor

    monkeypatch.setattr(runtime, "available_memory", lambda: 10_000_000)
    monkeypatch.setattr(runtime, "cpu_info", lambda: runtime.CpuInfo("老处理器", frozenset({"avx2"})))
    monkeypatch.setattr(doctor, "NEED_DISK", 10**18)
    assert main(["doctor"]) == 0
    shown = capsys.readouterr().out
    assert "warning: memory: " in shown
    assert "warning: cache: " in shown
    assert "BIMO_HOME" in shown
    assert "float32: this processor has no bfloat16" in shown
    assert "all is well" not in shown


def test_bench(tiny_model_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--requests", "1,3", "--prompt-tokens", "100", "--max-tokens", "8", "--repeat", "2"]
    assert main(["bench", str(tiny_model_dir), *options, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert set(report["decode"]) == {"1", "3"}
    assert report["prefill"]["min"] > 0
    assert report["decode"]["3"]["median"] > 0
    assert main(["bench", str(tiny_model_dir), *options]) == 0
    assert "decode, 3 requests" in capsys.readouterr().out


def test_serve_answers_and_stops(tiny_model_dir: Path) -> None:
    command = [sys.executable, "-m", "bimo.cli.main", "serve", str(tiny_model_dir), "--port", "0", "--model-name", "小"]
    environment = {name: value for name, value in os.environ.items() if name != "BIMO_API_KEY"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert "is ready: chat at http://127.0.0.1:" in line
        address = line.split(" chat at ")[1].split(",")[0]
        with urllib.request.urlopen(f"{address}/v1/models", timeout=60) as answer:
            assert json.load(answer)["data"][0]["id"] == "小"
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 130
        assert "Traceback" not in errors
    finally:
        process.kill()
        process.wait()


def test_serve_says_why_it_cannot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert main(["serve", str(tmp_path), "--port", port]) == 2
    assert f"port {port} is taken" in capsys.readouterr().err


def test_numbers_for_people() -> None:
    assert human_bytes(98_362_432) == "98.4 MB"
    assert human_bytes(12) == "12 bytes"
    assert human_bytes(3e12) == "3.0 TB"
    assert human_count(134_515_008) == "135M"
    assert human_count(1_235_814_400) == "1.2B"


def test_progress_in_a_log_is_a_line_a_stage(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_display() as report:
        for done in range(0, 101, 10):
            report("fetching 模型", done, 0)
        report("checking a small file", 5, 5)
    assert capsys.readouterr().err == "fetching 模型 ...\n"
