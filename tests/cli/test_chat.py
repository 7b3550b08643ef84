"""`bimo chat`: the conversation's commands, piped and typed at a terminal."""

from __future__ import annotations

import io
import json
import os
import pty
import select
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bimo.cli import chat
from bimo.cli.chat import Conversation
from bimo.cli.main import main
from bimo.errors import UsageError


class Parrot:
    """A model that repeats the last message, piece by piece; `interrupt` is raised after the first piece."""

    def __init__(self, interrupt: BaseException | None = None) -> None:
        self.interrupt = interrupt
        self.seen: list[list[dict[str, str]]] = []

    def stream(self, messages: list[dict[str, str]], **sampling: Any) -> Iterator[str]:
        self.seen.append([dict(message) for message in messages])
        yield messages[-1]["content"][:1]
        if self.interrupt is not None:
            raise self.interrupt
        yield messages[-1]["content"][1:]


def test_commands(tmp_path: Path) -> None:
    said: list[str] = []
    conversation = Conversation("你是一只猫 🐱")
    conversation.messages.append({"role": "user", "content": "喵？"})
    assert conversation.command("/help", said.append)
    assert "/reset" in said[-1]
    assert conversation.command(f"/save {tmp_path / '对话.json'}", said.append)
    saved = json.loads((tmp_path / "对话.json").read_text(encoding="utf-8"))
    assert saved == {"messages": [{"role": "system", "content": "你是一只猫 🐱"}, {"role": "user", "content": "喵？"}]}
    assert conversation.command("/reset", said.append)
    assert conversation.messages == [{"role": "system", "content": "你是一只猫 🐱"}]
    assert conversation.command("/system", said.append)
    assert said[-1] == "你是一只猫 🐱"
    assert conversation.command("/system 你是一只狗", said.append)
    assert conversation.system == "你是一只狗"
    assert not conversation.command("/exit", said.append)
    for wrong in ("/save", "/nonsense", "/", f"/save {tmp_path}/no/such/folder/x"):
        with pytest.raises(UsageError):
            conversation.command(wrong, said.append)


def test_the_history_is_sent(capsys: pytest.CaptureFixture[str]) -> None:
    parrot, conversation = Parrot(), Conversation("简短。")
    for message in ("你好", "🦊 fox"):
        chat._answer(parrot, conversation, message, {})  # type: ignore[arg-type]
    assert capsys.readouterr().out == "你好\n🦊 fox\n"
    assert [message["role"] for message in parrot.seen[1]] == ["system", "user", "assistant", "user"]
    assert conversation.messages[-1] == {"role": "assistant", "content": "🦊 fox"}


def test_ctrl_c_keeps_what_was_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    terminal = io.StringIO()
    terminal.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr(sys, "stdin", terminal)
    conversation = Conversation()
    chat._answer(Parrot(KeyboardInterrupt()), conversation, "你好", {})  # type: ignore[arg-type]
    assert capsys.readouterr().out == "你 [stopped]\n"
    assert conversation.messages[-1] == {"role": "assistant", "content": "你"}


def test_a_failed_message_is_not_kept() -> None:
    conversation = Conversation()
    with pytest.raises(UsageError):
        chat._answer(Parrot(UsageError("too long")), conversation, "x", {})  # type: ignore[arg-type]
    assert conversation.messages == []


def piped(monkeypatch: pytest.MonkeyPatch, text: bytes, *arguments: str) -> int:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text), encoding="utf-8"))
    return main(["chat", *arguments])


def test_piped_messages(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "对话.json"
    text = f'你好\n\n"""several\nlines 🦊\n"""\n/save {file}\n/exit\nnever read\n'
    options = ["--max-tokens", "6", "--seed", "1", "--system", "你是笔墨"]
    assert piped(monkeypatch, text.encode(), str(tiny_model_dir), *options) == 0
    messages = json.loads(file.read_text(encoding="utf-8"))["messages"]
    assert [message["role"] for message in messages] == ["system", "user", "assistant", "user", "assistant"]
    assert messages[1]["content"] == "你好"
    assert messages[3]["content"] == "several\nlines 🦊"
    shown = capsys.readouterr()
    assert messages[2]["content"] in shown.out
    assert "saved 5 messages" in shown.err  # answers alone go to standard output


@pytest.mark.parametrize(("text", "words"), [(b"\xff\n", "line 1"), (b"/nonsense\n", "/help")])
def test_piped_errors_end_it(
    text: bytes, words: str, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert piped(monkeypatch, text, str(tiny_model_dir)) == 2
    assert words in capsys.readouterr().err


def test_a_terminal(tiny_model_dir: Path) -> None:
    """A real pseudo-terminal: prompt, Chinese input, a wrong command that does not end it, Ctrl-D."""
    master, slave = pty.openpty()
    command = [sys.executable, "-m", "bimo.cli.main", "chat", str(tiny_model_dir), "--max-tokens", "5", "--seed", "1"]
    environment = {**os.environ, "TERM": "dumb", "LC_ALL": "C.UTF-8"}
    process = subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave, env=environment, close_fds=True)
    os.close(slave)
    shown = b""

    def until_prompt() -> bytes:
        nonlocal shown
        begin = len(shown)
        while b">>> " not in shown[begin:]:
            ready, _, _ = select.select([master], [], [], 120)
            assert ready, shown.decode(errors="replace")
            shown += os.read(master, 4096)
        return shown[begin:]

    try:
        assert b"/help lists the commands" in until_prompt()
        os.write(master, "你好 🦊\n".encode())
        assert "你好 🦊".encode() in until_prompt()
        os.write(master, b"/nonsense\n")
        assert b"error: no command /nonsense" in until_prompt()
        os.write(master, b"\x04")
        assert process.wait(timeout=60) == 0
        assert b"Traceback" not in shown
    finally:
        process.kill()
        process.wait()
        os.close(master)
