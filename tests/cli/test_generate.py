"""`bimo generate` on a tiny model: what is printed is what the library answers."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from bimo.cli.main import main

PROMPTS = ["The quick brown fox", "床前明月光，", "🦊 jumps over", "def add(a: int"]


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["generate", *arguments]) == 0
    return capsys.readouterr().out


def run_json(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    shown = run(capsys, *arguments, "--json")
    assert shown.count("\n") == 1  # one object, one line
    answer = json.loads(shown)
    assert isinstance(answer, dict)
    return answer


def pipe(monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    """Make `data` the process's standard input."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8"))


@pytest.mark.parametrize("prompt", PROMPTS)
def test_the_text_is_the_library_s(prompt: str, tiny_model_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import bimo

    with bimo.load(str(tiny_model_dir), dtype="float32") as model:
        expected = model.generate(prompt, max_tokens=20, temperature=0)
    options = ["--prompt", prompt, "--max-tokens", "20", "--temperature", "0", "--dtype", "float32"]
    assert run(capsys, str(tiny_model_dir), *options) == expected.text + "\n"
    assert run(capsys, str(tiny_model_dir), *options, "--stream") == expected.text + "\n"
    answer = run_json(capsys, str(tiny_model_dir), *options)
    assert answer["text"] == expected.text
    assert answer["tokens"] == expected.tokens


def test_the_json_object(tiny_model_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answer = run_json(capsys, str(tiny_model_dir), "--prompt", "你好", "--max-tokens", "5", "--ignore-eos")
    assert set(answer) == {"text", "tokens", "finish_reason", "usage", "timings"}
    assert answer["finish_reason"] == "length"
    assert len(answer["tokens"]) == 5
    usage = answer["usage"]
    assert usage["completion_tokens"] == 5
    assert usage["total_tokens"] == usage["prompt_tokens"] + 5
    assert answer["timings"]["total"] >= answer["timings"]["time_to_first_token"] > 0


def test_several_answers(tiny_model_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--prompt", "从前", "--max-tokens", "8", "--seed", "7", "--n", "3"]
    answer = run_json(capsys, str(tiny_model_dir), *options)
    assert len(answer["completions"]) == 3
    assert answer["text"] == answer["completions"][0]["text"]
    assert len({tuple(completion["tokens"]) for completion in answer["completions"]}) > 1
    shown = run(capsys, str(tiny_model_dir), *options)
    assert "--- 1 of 3 (" in shown
    assert all(completion["text"] in shown for completion in answer["completions"])


def test_a_seed_repeats(tiny_model_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--prompt", "Once", "--max-tokens", "16", "--temperature", "1.5", "--ignore-eos"]
    texts = [run_json(capsys, str(tiny_model_dir), *options, "--seed", seed)["tokens"] for seed in ("1", "1", "2")]
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize(
    "options",
    [
        ["--beams", "4", "--length-penalty", "0.5"],
        ["--beams", "4", "--beam-groups", "2", "--diversity-penalty", "0.5", "--n", "2"],
        ["--penalty-alpha", "0.6", "--top-k", "4"],
        ["--top-k", "5", "--top-p", "0.9", "--min-p", "0.01", "--typical-p", "0.95"],
        ["--repetition-penalty", "1.3", "--presence-penalty", "0.5", "--frequency-penalty", "0.5", "--min-tokens", "3"],
        ["--best-of", "3"],
    ],
)
def test_every_option_reaches_the_engine(
    options: list[str], tiny_model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answer = run_json(capsys, str(tiny_model_dir), "--prompt", "床前明月光", "--max-tokens", "6", *options)
    assert answer["tokens"]


def test_stop_strings(tiny_model_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--prompt", "Hello, world", "--max-tokens", "30", "--temperature", "0", "--ignore-eos"]
    whole = run_json(capsys, str(tiny_model_dir), *options)["text"]
    middle = whole[len(whole) // 2 : len(whole) // 2 + 2]
    answer = run_json(capsys, str(tiny_model_dir), *options, "--stop", "从不出现", "--stop", middle)
    assert answer["text"] == whole[: whole.index(middle)]
    assert answer["finish_reason"] == "stop"


def test_logprobs(tiny_model_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--prompt", "Hello", "--max-tokens", "4", "--temperature", "0", "--ignore-eos", "--logprobs", "2"]
    answer = run_json(capsys, str(tiny_model_dir), *options)
    assert [entry["token_id"] for entry in answer["logprobs"]] == answer["tokens"]
    assert all(len(entry["top"]) == 2 and entry["logprob"] <= 0 for entry in answer["logprobs"])


def test_the_prompt_from_standard_input(
    tiny_model_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["--max-tokens", "8", "--temperature", "0"]
    expected = run(capsys, str(tiny_model_dir), *options, "--prompt", "你好，世界！\n🦊")
    for data in ("你好，世界！\n🦊\n", "你好，世界！\n🦊", "\ufeff你好，世界！\n🦊"):
        pipe(monkeypatch, data.encode())
        assert run(capsys, str(tiny_model_dir), *options) == expected


@pytest.mark.parametrize("data", [b"\xff\xfe\x00", b"half a character \xe4\xbd"])
def test_standard_input_that_is_not_utf8(
    data: bytes, tiny_model_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe(monkeypatch, data)
    assert main(["generate", str(tiny_model_dir)]) == 2
    assert "not valid UTF-8" in capsys.readouterr().err


def test_a_prompt_that_is_too_long(tiny_model_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = [str(tiny_model_dir), "--prompt", "敏捷的棕色狐狸 " * 400, "--max-tokens", "4"]
    assert main(["generate", *options]) == 2
    message = capsys.readouterr().err
    assert "512" in message
    assert message.count("\n") == 1
    assert main(["generate", *options, "--truncate"]) == 0
    assert "were cut off" in capsys.readouterr().err
    assert run_json(capsys, *options, "--truncate")["usage"]["truncated_tokens"] > 0


def test_chat_uses_the_template(tiny_model_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--prompt", "你好", "--max-tokens", "8", "--temperature", "0", "--top-p", "1"]
    plain = run_json(capsys, str(tiny_model_dir), *options)
    chat = run_json(capsys, str(tiny_model_dir), *options, "--chat")
    system = run_json(capsys, str(tiny_model_dir), *options, "--system", "你是一只猫 🐱")
    counts = [answer["usage"]["prompt_tokens"] for answer in (plain, chat, system)]
    assert counts == sorted(set(counts))


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--temperature", "-1"),
        ("--temperature", "inf"),
        ("--top-p", "0"),
        ("--top-p", "nan"),
        ("--n", "0"),
        ("--n", "100000"),
        ("--max-tokens", "0"),
        ("--seed", "99999999999999999999999"),
        ("--stop", ""),
        ("--beams", "-1"),
    ],
)
def test_values_out_of_range(option: str, value: str, tiny_model_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", str(tiny_model_dir), "--prompt", "x", option, value]) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith("error: ")
    assert shown.err.count("\n") == 1
