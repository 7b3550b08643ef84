"""The server as a process: loading, signals, exit codes; and what importing it costs."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from bimo.tokenizer.load import Tokenizer

ROOT = Path(__file__).parents[2]
CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "讲个故事 🦊"}]}


@contextmanager
def process(tokenizer: Tokenizer, gate: Path | str) -> Iterator[subprocess.Popen[str]]:
    """`served.py` in a process of its own."""
    command = [sys.executable, "-m", "tests.serving.served", str(tokenizer.directory), str(gate)]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, encoding="utf-8"
    ) as running:
        try:
            yield running
        finally:
            running.kill()


def ended(running: subprocess.Popen[str]) -> tuple[int, str]:
    """Exit code and everything said to stderr."""
    _, errors = running.communicate(timeout=60)
    return running.returncode, errors


def listening(running: subprocess.Popen[str]) -> str:
    assert running.stdout is not None
    address = running.stdout.readline().strip()
    assert address.startswith("http://127.0.0.1:")
    return address


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 0)])
def test_a_life(tokenizer: Tokenizer, tmp_path: Path, number: int, code: int) -> None:
    """503 while loading, 200 after, an answer under way at the signal is finished, no traceback."""
    gate = tmp_path / "gate"
    with process(tokenizer, gate) as running:
        url = listening(running)
        early = httpx.get(f"{url}/health")
        assert early.status_code == 503 and early.json()["error"]["code"] == "model_loading"
        assert httpx.post(f"{url}/v1/chat/completions", json=CHAT).status_code == 503
        gate.touch()
        assert listening(running) == url and httpx.get(f"{url}/health").status_code == 200
        assert httpx.get(f"{url}/health", headers={"host": "evil.example"}).status_code == 421
        body = CHAT | {"stream": True, "max_tokens": 60}
        with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=60) as response:
            lines = response.iter_lines()
            while "content" not in (line := next(lines)) or '"role"' in line:
                pass
            running.send_signal(number)
            rest = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
        assert rest[-1]["choices"][0]["finish_reason"] == "length", "it was allowed to end"
        assert ended(running) == (code, "")


def test_answers_longer_than_the_grace_are_given_up(tokenizer: Tokenizer, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    gate.touch()
    with process(tokenizer, gate) as running:
        url = listening(running)
        listening(running)
        body = CHAT | {"stream": True, "n": 20}
        with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=60) as response:
            lines = response.iter_lines()
            next(lines)
            running.send_signal(signal.SIGTERM)
            rest = [line for line in lines if line]
        assert "shutting_down" in rest[-2] and rest[-1] == "data: [DONE]"
        assert ended(running) == (0, "")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 0)])
def test_a_signal_while_loading(tokenizer: Tokenizer, tmp_path: Path, number: int, code: int) -> None:
    with process(tokenizer, tmp_path / "never") as running:
        listening(running)
        running.send_signal(number)
        assert ended(running) == (code, "")


def test_a_model_that_cannot_be_loaded(tokenizer: Tokenizer) -> None:
    with process(tokenizer, "broken") as running:
        assert ended(running) == (1, "model.safetensors is half of a file: fetch it again\n")


def test_serving_imports_no_torch() -> None:
    """The page is up and /health answers while torch is still being imported by the loading thread."""
    check = "import sys, bimo.serving.app; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], cwd=ROOT).returncode == 0
