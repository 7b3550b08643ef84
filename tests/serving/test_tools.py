"""Tool calls a model decides on by itself (`tool_choice` auto): streamed and whole, however the text arrives.

A tiny random model never writes one, so a scripted backend does, with the real tokenizer, token by token.
"""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
from starlette.testclient import TestClient

from bimo.serving.app import create_app
from bimo.tokenizer.load import Tokenizer
from tests.serving.live import events_of
from tests.serving.scripted import ScriptedBackend

TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
ONE = '<tool_call>\n{"name": "f", "arguments": {"城市": "上海 🦊"}}\n</tool_call>'
TWO = ONE + '\n<tool_call>{"name": "g", "arguments": "{\\"x\\": 1}"}</tool_call>'
CALL_F = ("f", {"城市": "上海 🦊"})
ANSWERS = {
    "no call": ("只是文字 🦊", "只是文字 🦊", [], "stop"),
    "only a call": (ONE, None, [CALL_F], "tool_calls"),
    "text, then a call": ("我看看。\n\n" + ONE, "我看看。", [CALL_F], "tool_calls"),
    "two calls": (TWO, None, [CALL_F, ("g", {"x": 1})], "tool_calls"),
    "almost a call": ("<tool_ca 2 < 3", "<tool_ca 2 < 3", [], "stop"),
    "broken JSON": ('<tool_call>{"name": }</tool_call>', '<tool_call>{"name": }</tool_call>', [], "stop"),
    "cut off": ('<tool_call>{"name": "f", "argum', '<tool_call>{"name": "f", "argum', [], "stop"),
    "the tag as data": (
        '<tool_call>{"name": "f", "arguments": {"a": "</tool_call>"}}</tool_call>',
        None,
        [("f", {"a": "</tool_call>"})],
        "tool_calls",
    ),
}


def ask(tokenizer: Tokenizer, answer: str, **settings: Any) -> tuple[dict[str, Any], list[Any]]:
    """A whole choice, and the chunks of the same answer streamed."""
    client = TestClient(create_app(ScriptedBackend(tokenizer, lambda _: answer)))
    body = {"messages": [{"role": "user", "content": "天气?"}], "tools": TOOLS, "logprobs": True, **settings}
    whole = client.post("/v1/chat/completions", json=body)
    assert whole.status_code == 200, whole.text
    streamed = client.post("/v1/chat/completions", json={**body, "stream": True})
    return whole.json()["choices"][0], events_of(streamed.text)


def calls_of(entries: list[Any]) -> list[tuple[str, Any]]:
    return [(entry["function"]["name"], json.loads(entry["function"]["arguments"])) for entry in entries]


@pytest.mark.parametrize("name", ANSWERS)
def test_streamed_is_whole(tokenizer: Tokenizer, name: str) -> None:
    answer, content, calls, finish = ANSWERS[name]
    whole, chunks = ask(tokenizer, answer)
    assert whole["message"]["content"] == content and whole["finish_reason"] == finish
    assert calls_of(whole["message"].get("tool_calls", [])) == calls
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    assert choices[0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(choice["delta"].get("content", "") for choice in choices) == (content or "")
    pieces = [call for choice in choices for call in choice["delta"].get("tool_calls", [])]
    assert calls_of(pieces) == calls and [piece["index"] for piece in pieces] == list(range(len(calls)))
    assert len({piece["id"] for piece in pieces}) == len(calls), "each call has its own id"
    assert [c["finish_reason"] for c in choices if c["finish_reason"]] == [finish]
    tokens = [entry for choice in choices for entry in (choice["logprobs"] or {"content": []})["content"]]
    assert tokens == whole["logprobs"]["content"], "held-back text loses no token"
    assert b"".join(bytes(entry["bytes"]) for entry in tokens).decode() == answer


@pytest.mark.parametrize("keep", [False, True])
def test_one_call_at_a_time(tokenizer: Tokenizer, keep: bool) -> None:
    whole, chunks = ask(tokenizer, TWO, parallel_tool_calls=False, include_stop_str_in_output=keep)
    assert calls_of(whole["message"]["tool_calls"]) == [CALL_F] and whole["finish_reason"] == "tool_calls"
    assert whole["stop_reason"] is None, "the closing tag is our way of stopping, not the client's"
    pieces = [call for chunk in chunks for c in chunk["choices"] for call in c["delta"].get("tool_calls", [])]
    assert calls_of(pieces) == [CALL_F]


def test_tools_are_text_when_none_may_be_called(tokenizer: Tokenizer) -> None:
    backend = ScriptedBackend(tokenizer, lambda _: ONE)
    client = TestClient(create_app(backend))
    body = {"messages": [{"role": "user", "content": "天气?"}], "tools": TOOLS, "tool_choice": "none"}
    message = client.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]
    assert message["content"] == ONE and "tool_calls" not in message
    with_tools = client.post("/v1/chat/completions", json=body | {"tool_choice": "auto"})
    assert with_tools.json()["choices"][0]["message"]["tool_calls"]
    without, told = (len(request.prompt_token_ids) for request in backend.requests)
    assert told > without, "only a model that may call tools is told of them"


def test_a_model_without_a_template_stops_before_the_next_speaker(tokenizer: Tokenizer) -> None:
    base = Tokenizer.from_directory(tokenizer.directory)
    base.chat_template = None
    client = TestClient(create_app(ScriptedBackend(base, lambda _: " 好的。\nUser: 再来")))
    body = {"messages": [{"role": "user", "content": "天气?"}]}
    choice = client.post("/v1/chat/completions", json=body).json()["choices"][0]
    assert choice["message"]["content"] == " 好的。" and choice["stop_reason"] is None
    choice = client.post("/v1/chat/completions", json=body | {"stop": "\nUser:"}).json()["choices"][0]
    assert choice["stop_reason"] == "\nUser:", "asked for, so it is told"


def test_a_conversation_with_results(tokenizer: Tokenizer) -> None:
    backend = ScriptedBackend(tokenizer, lambda _: "晴 ☀️")
    client = TestClient(create_app(backend))
    call = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": '{"城市": "上海"}'}}
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": "天气?"},
        {"role": "assistant", "content": None, "tool_calls": [call], "refusal": None, "annotations": []},
        {"role": "tool", "tool_call_id": "call_1", "content": [{"type": "text", "text": "25 °C"}]},
    ]
    answer: httpx.Response = client.post("/v1/chat/completions", json={"messages": messages, "tools": TOOLS})
    assert answer.status_code == 200, answer.text
    prompt = tokenizer.decode(backend.requests[0].prompt_token_ids)
    assert "上海" in prompt and "25 °C" in prompt and "Be brief." in prompt
