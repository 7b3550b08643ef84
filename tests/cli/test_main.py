"""The command as a user meets it: help, exit codes, one-line errors, pipes, Ctrl-C."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from bimo.cli.main import main

BIMO = [sys.executable, "-m", "bimo.cli.main"]
COMMANDS = ["chat", "generate", "serve", "models", "convert", "doctor", "bench", "eval"]


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(command in shown for command in COMMANDS)
    assert main([]) == 0  # no command: the same help
    assert capsys.readouterr().out == shown


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    assert "Usage: bimo" in capsys.readouterr().out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    import bimo

    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"bimo {bimo.__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["nonsense"], 2, "nonsense"),
        (["generate"], 2, "MODEL"),
        (["generate", "smolm2", "--prompt", "hi"], 1, "did you mean smollm2"),
        (["generate", "smollm2", "--prompt", "hi", "--top-q", "1"], 2, "--top-q"),
        (["generate", "smollm2", "--prompt", "hi", "--max-tokens", "many"], 2, "--max-tokens"),
        (["generate", "smollm2", "--prompt", "hi", "--dtype", "int3"], 2, "dtype must be one of"),
        (["generate", "smollm2", "--prompt", "hi", "--temperature", "-1"], 2, "temperature must be between"),
        (["chat", "smollm2", "--top-p", "2"], 2, "top_p must be between"),
        (["generate", "smollm2", "--prompt", "hi", "--stream", "--json"], 2, "--json"),
        (["generate", "smollm2", "--prompt", "hi", "--logprobs", "2"], 2, "--json"),
        (["generate", "/没有/这个", "--prompt", "hi"], 1, "no such file or directory"),
        (["generate", "smollm2", "--prompt", "bad \udcff byte"], 2, "not valid UTF-8"),
        (["serve", "smollm2", "--host", "0.0.0.0"], 2, "key"),
        (["serve", "smollm2", "--port", "70000"], 2, "65535"),
        (["models", "--remove", "../.."], 1, "none of that name"),
        (["convert", "smollm2", "somewhere", "--type", "q8_0"], 2, ".gguf"),
        (["bench", "smollm2", "--requests", "1,x"], 2, "--requests"),
    ],
)
def test_an_error_is_one_line(
    arguments: list[str], code: int, words: str, capsys: pytest.CaptureFixture[str], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("BIMO_HOME", str(tmp_path / "empty"))
    monkeypatch.delenv("BIMO_API_KEY", raising=False)
    assert main(arguments) == code
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("error: ")
    assert shown.err.count("\n") == 1
    assert words in shown.err


@pytest.mark.parametrize("place", [0, 1, 4])
def test_debug_shows_the_traceback(place: int) -> None:
    arguments = ["generate", "smolm2", "--prompt", "hi"]
    arguments.insert(place, "--debug")
    result = subprocess.run([*BIMO, *arguments], capture_output=True, text=True, timeout=120)
    assert result.returncode == 1
    assert "Traceback" in result.stderr
    assert "ModelNotFoundError" in result.stderr


def test_an_unexpected_error_is_one_line_too(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from bimo.formats import hub

    def broken() -> list[hub.ModelInfo]:
        raise RuntimeError("first line\nsecond line")

    monkeypatch.setattr(hub, "list_models", broken)
    assert main(["models"]) == 1
    shown = capsys.readouterr().err
    assert shown.startswith("error: RuntimeError: first line second line (this is a bug")
    assert shown.count("\n") == 1


def test_a_reader_that_leaves(tmp_path: Path) -> None:
    script = f"{sys.executable} -m bimo.cli.main models 2> {tmp_path}/stderr | head -c 1"
    result = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=120)
    assert result.stdout == "N"
    assert (tmp_path / "stderr").read_text() == ""


def test_a_terminal_without_chinese(tiny_model_dir: Path) -> None:
    import os

    environment = {**os.environ, "PYTHONIOENCODING": "latin-1", "PYTHONUTF8": "0"}
    command = [*BIMO, "generate", str(tiny_model_dir), "--prompt", "你好", "--max-tokens", "20", "--temperature", "0"]
    result = subprocess.run(command, env=environment, capture_output=True, timeout=120)
    assert result.returncode == 0, result.stderr


def test_ctrl_c_ends_cleanly(tiny_model_dir: Path) -> None:
    """An endless answer (the model is asked again and again) is stopped with one SIGINT."""
    script = (
        "import signal, sys; from pathlib import Path; from bimo.backends.facade import Model\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell's background jobs inherit it ignored
        "once = Model.stream\n"
        "def forever(self, prompt, **sampling):\n"
        "    while True: yield from once(self, prompt, **sampling)\n"
        "Model.stream = forever\n"
        "from bimo.cli.main import main; sys.exit(main(sys.argv[1:]))\n"
    )
    command = [sys.executable, "-c", script, "generate", str(tiny_model_dir), "--prompt", "小猫", "--stream"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.read(50)
    process.send_signal(signal.SIGINT)
    process.stdout.close()
    _, errors = process.communicate(timeout=60)
    assert b"Traceback" not in errors
    assert process.returncode == 130
