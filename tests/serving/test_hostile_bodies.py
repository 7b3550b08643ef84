"""Bodies nobody should send: each gets a 4xx in OpenAI's shape that says what is wrong, and the server lives on."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
from starlette.testclient import TestClient

from bimo.serving.app import create_app
from bimo.tokenizer.load import Tokenizer
from tests.serving.scripted import ScriptedBackend

USER = {"role": "user", "content": "你好 🦊"}
CHAT = {"messages": [USER]}


@pytest.fixture(scope="module")
def client(tokenizer: Tokenizer) -> TestClient:
    app = create_app(ScriptedBackend(tokenizer, lambda _: "好"), max_body_bytes=100_000)
    return TestClient(app, raise_server_exceptions=True)


def refused(response: httpx.Response, status: int = 400) -> dict[str, Any]:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json" and response.headers["x-request-id"]
    assert set(response.json()) == {"error"}
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["message"] and error["type"] and error["code"]
    assert "Traceback" not in error["message"] and len(error["message"]) < 1000
    return error


def post(client: TestClient, body: bytes, path: str = "/v1/chat/completions", kind: str = "application/json"):
    return client.post(path, content=body, headers={"content-type": kind})


NOT_JSON = {
    "nothing": b"",
    "half": b'{"messages": [',
    "trailing": json.dumps(CHAT).encode() + b"x",
    "two values": b"{} {}",
    "broken UTF-8": b'{"messages": [{"role": "user", "content": "\xff\xfe"}]}',
    "half a character": '{"messages": [{"role": "user", "content": "好"}]}'.encode()[:-6] + b'"}]}',
    "UTF-16": json.dumps(CHAT).encode("utf-16"),
    "a byte order mark": b"\xef\xbb\xbf" + json.dumps(CHAT).encode(),
    "a lone surrogate": b'{"messages": [{"role": "user", "content": "\\ud83e"}]}',
    "a lone low surrogate": b'{"messages": [{"role": "user", "content": "\\udd8a!"}]}',
    "surrogates the wrong way round": b'{"messages": [{"role": "user", "content": "\\udd8a\\ud83e"}]}',
    "a surrogate in a name": b'{"\\ud83e": 1}',
    "NaN": b'{"messages": [], "temperature": NaN}',
    "Infinity": b'{"messages": [], "temperature": -Infinity}',
    "1e999": b'{"messages": [], "temperature": 1e999}',
    "1e999 inside metadata": b'{"messages": [], "metadata": {"a": [1e999]}}',
    "an integer of 5000 digits": b'{"max_tokens": ' + b"9" * 5000 + b"}",
    "a name given twice": b'{"messages": [], "n": 1, "n": 2}',
    "a name given twice, inside": b'{"messages": [{"role": "user", "role": "system", "content": ""}]}',
    "nested lists": b'{"metadata": ' + b"[" * 5000 + b"]" * 5000 + b"}",
    "nested objects": b'{"metadata": ' + b'{"a":' * 5000 + b"1" + b"}" * 5000 + b"}",
    "a control character": b'{"messages": [{"role": "user", "content": "a\x00b"}]}',
    "comments": b'{"messages": [] /* none */}',
    "single quotes": b"{'messages': []}",
}


@pytest.mark.parametrize("name", NOT_JSON)
def test_not_json(client: TestClient, name: str) -> None:
    assert refused(post(client, NOT_JSON[name]))["code"] == "invalid_json"


# body or changes to a good one -> (param, code)
WRONG: list[tuple[Any, str | None, str]] = [
    ([], None, "invalid_type"),
    ("文字", None, "invalid_type"),
    (None, None, "invalid_type"),
    (7, None, "invalid_type"),
    ({"messages": None}, "messages", "invalid_type"),
    ({"messages": []}, "messages", "invalid_value"),
    ({"messages": "你好"}, "messages", "invalid_type"),
    ({"messages": [USER] * 1025}, "messages", "invalid_value"),
    ({"messages": ["你好"]}, "messages[0]", "invalid_type"),
    ({"messages": [{"role": "user"}]}, "messages[0].content", "missing_required_parameter"),
    ({"messages": [{"content": "x"}]}, "messages[0].role", "missing_required_parameter"),
    ({"messages": [{"role": "机器人", "content": "x"}]}, "messages[0].role", "unsupported_value"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content", "invalid_type"),
    ({"messages": [{"role": "user", "content": []}]}, "messages[0].content", "invalid_value"),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text",
     "missing_required_parameter"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
     "messages[0].content[0]", "unsupported_value"),
    ({"messages": [USER, {"role": "assistant"}]}, "messages[1].content", "missing_required_parameter"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].tool_call_id", "missing_required_parameter"),
    ({"messages": [USER | {"mood": "good"}]}, "messages[0].mood", "unknown_parameter"),
    ({"模型": "x"}, "模型", "unknown_parameter"),
    ({"max_token": 5}, "max_token", "unknown_parameter"),
    ({"🦊": "x" * 5000}, "🦊", "unknown_parameter"),
    ({"reasoning_effort": "high"}, "reasoning_effort", "unknown_parameter"),
    ({"functions": []}, "functions", "unknown_parameter"),
    ({"model": 5}, "model", "invalid_type"),
    ({"max_tokens": "5"}, "max_tokens", "invalid_type"),
    ({"max_tokens": 5.5}, "max_tokens", "invalid_type"),
    ({"max_tokens": 0}, "max_tokens", "invalid_value"),
    ({"max_tokens": -1}, "max_tokens", "invalid_value"),
    ({"max_tokens": 10**400}, "max_tokens", "invalid_value"),
    ({"max_tokens": True}, "max_tokens", "invalid_type"),
    ({"max_tokens": 4, "max_completion_tokens": 5}, "max_tokens", "unsupported_combination"),
    ({"max_tokens": 4, "min_tokens": 5}, "min_tokens", "invalid_value"),
    ({"temperature": -0.1}, "temperature", "invalid_value"),
    ({"temperature": 2.1}, "temperature", "invalid_value"),
    ({"temperature": "0"}, "temperature", "invalid_type"),
    ({"temperature": 10**400}, "temperature", "invalid_type"),
    ({"top_p": 0}, "top_p", "invalid_value"),
    ({"n": 0}, "n", "invalid_value"),
    ({"n": 129}, "n", "invalid_value"),
    ({"seed": 2**64}, "seed", "invalid_value"),
    ({"stream": "yes"}, "stream", "invalid_type"),
    ({"stop": ""}, "stop", "invalid_value"),
    ({"stop": ["好", ""]}, "stop[1]", "invalid_value"),
    ({"stop": ["好"] * 17}, "stop", "invalid_value"),
    ({"stop": "好" * 1025}, "stop", "invalid_value"),
    ({"stop": 5}, "stop", "invalid_type"),
    ({"logit_bias": {"五": 1}}, "logit_bias.五", "invalid_value"),
    ({"logit_bias": {"5": 101}}, "logit_bias.5", "invalid_value"),
    ({"logit_bias": {str(i): 1 for i in range(301)}}, "logit_bias", "invalid_value"),
    ({"stop_token_ids": [-1]}, "stop_token_ids[0]", "invalid_value"),
    ({"stream_options": {"include_usage": True}}, "stream_options", "unsupported_combination"),
    ({"top_logprobs": 2}, "top_logprobs", "unsupported_combination"),
    ({"logprobs": 2}, "logprobs", "invalid_type"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "invalid_value"),
    ({"tool_choice": "auto"}, "tool_choice", "unsupported_combination"),
    ({"parallel_tool_calls": True}, "parallel_tool_calls", "unsupported_combination"),
    ({"tools": [{"type": "web_search"}]}, "tools[0].type", "invalid_value"),
    ({"tools": [{"type": "function", "function": {"name": "天气"}}]}, "tools[0].function.name", "invalid_value"),
    ({"tools": [{"type": "function", "function": {"name": "f", "parameters": "{}"}}]},
     "tools[0].function.parameters", "invalid_type"),
    ({"tools": [{"type": "function", "function": {"name": "f"}}] * 2}, "tools", "invalid_value"),
    ({"tools": [{"type": "function", "function": {"name": "f"}}],
      "tool_choice": {"type": "function", "function": {"name": "g"}}}, "tool_choice", "invalid_value"),
    ({"tools": [{"type": "function", "function": {"name": "f"}}], "tool_choice": "maybe"}, "tool_choice",
     "invalid_value"),
    ({"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "not": {}}}}],
      "tool_choice": "required"}, "tools", "invalid_value"),
    ({"tools": [{"type": "function", "function": {"name": "f"}}], "response_format": {"type": "json_object"}},
     "response_format", "unsupported_combination"),
    ({"response_format": {"type": "xml"}}, "response_format.type", "unsupported_value"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "missing_required_parameter"),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "对象"}}}},
     "response_format", "invalid_value"),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"uniqueItems": True}}}},
     "response_format", "invalid_value"),
    ({"structured_outputs": {}}, "structured_outputs", "unsupported_combination"),
    ({"structured_outputs": {"regex": "(["}}, "structured_outputs", "invalid_value"),
    ({"num_beams": 2, "penalty_alpha": 0.5, "top_k": 4}, "penalty_alpha", "invalid_value"),
    ({"length_penalty": 1.5}, "length_penalty", "unsupported_combination"),
    ({"continue_final_message": True}, "continue_final_message", "unsupported_combination"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "param", "code"), WRONG, ids=[str(change)[:60] for change, *_ in WRONG])
def test_wrong_fields(client: TestClient, change: Any, param: str | None, code: str) -> None:
    body = CHAT | change if isinstance(change, dict) else change
    error = refused(post(client, json.dumps(body).encode()))
    assert (error["param"], error["code"]) == (param, code), error["message"]


WRONG_COMPLETIONS: list[tuple[Any, str | None, str]] = [
    ({}, "prompt", "missing_required_parameter"),
    ({"prompt": []}, "prompt", "invalid_value"),
    ({"prompt": ["好"] * 257}, "prompt", "invalid_value"),
    ({"prompt": [[]]}, "prompt[0]", "invalid_value"),
    ({"prompt": [1, "好"]}, "prompt[1]", "invalid_type"),
    ({"prompt": [10**9]}, "prompt", "invalid_value"),
    ({"prompt": [-1]}, "prompt[0]", "invalid_value"),
    ({"prompt": {"好": 1}}, "prompt", "invalid_type"),
    ({"prompt": "好", "suffix": "end"}, "suffix", "unsupported_value"),
    ({"prompt": "好", "logprobs": True}, "logprobs", "invalid_type"),
    ({"prompt": "好", "max_tokens": 0}, "max_tokens", "unsupported_combination"),
    ({"prompt": "好", "best_of": 2, "stream": True}, "best_of", "unsupported_combination"),
    ({"prompt": "好", "best_of": 1, "n": 2}, "best_of", "unsupported_combination"),
    ({"prompt": "好", "messages": []}, "messages", "unknown_parameter"),
    ({"prompt": [5], "add_special_tokens": False}, "add_special_tokens", "unsupported_combination"),
    ({"prompt": "好", "echo": True, "truncate_prompt": True}, "truncate_prompt", "unsupported_combination"),
]


@pytest.mark.parametrize(
    ("body", "param", "code"), WRONG_COMPLETIONS, ids=[str(body)[:60] for body, *_ in WRONG_COMPLETIONS]
)
def test_wrong_completions(client: TestClient, body: Any, param: str | None, code: str) -> None:
    error = refused(post(client, json.dumps(body).encode(), "/v1/completions"))
    assert (error["param"], error["code"]) == (param, code), error["message"]


def test_wrong_tokens(client: TestClient) -> None:
    assert refused(client.post("/tokenize", json={}))["param"] == "prompt"
    assert refused(client.post("/tokenize", json={"prompt": "好", "messages": [USER]}))["param"] == "prompt"
    assert refused(client.post("/tokenize", json={"prompt": "好", "tools": []}))["param"] == "tools"
    assert refused(client.post("/detokenize", json={"tokens": [1, 10**9]}))["param"] == "tokens"
    assert refused(client.post("/detokenize", json={"tokens": "好"}))["param"] == "tokens"


@pytest.mark.parametrize(
    "kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "", "文"]
)
def test_other_content_types(client: TestClient, kind: str) -> None:
    headers = {"content-type": kind.encode()}
    response = client.post("/v1/chat/completions", content=json.dumps(CHAT), headers=headers)
    assert refused(response, 415)["code"] == "unsupported_media_type"


def test_other_encodings(client: TestClient) -> None:
    body = json.dumps(CHAT)
    assert post(client, body.encode("utf-16"), kind="application/json; charset=utf-16").status_code == 415
    assert post(client, body.encode(), kind='application/json; charset="UTF-8"').status_code == 200
    assert post(client, body.encode(), kind="application/vnd.chat+json").status_code == 200


def test_too_large(client: TestClient) -> None:
    body = json.dumps({"messages": [{"role": "user", "content": "好" * 50_000}]}, ensure_ascii=False).encode()
    error = refused(post(client, body), 413)
    assert error["code"] == "body_too_large" and "100000" in error["message"]


def test_harmless_and_odd_but_right(client: TestClient) -> None:
    """What must not be refused."""
    good: list[dict[str, Any]] = [
        {"user": "甲", "metadata": {"a": [1, None]}, "store": True, "service_tier": "flex", "prompt_cache_key": "k"},
        {"max_tokens": 5.0, "temperature": 1, "n": 2, "seed": -1},
        {"stop": None, "stream": None, "tools": [], "response_format": {"type": "text"}, "logit_bias": {}},
        {"messages": [{"role": "user", "content": "\u0000\u200b🦊 \U0010ffff"}]},
        {"messages": [{"role": "user", "content": ""}]},
        {"messages": [USER, {"role": "assistant", "content": "好", "refusal": None, "audio": None}, USER]},
    ]
    for change in good:
        response = client.post("/v1/chat/completions", json=CHAT | change)
        assert response.status_code == 200, response.text
    escaped = json.dumps({"messages": [{"role": "user", "content": "🦊"}]}, ensure_ascii=True).encode()
    assert b"\\ud83e\\udd8a" in escaped and post(client, escaped).status_code == 200, "pairs of surrogates are fine"


def test_addresses_and_methods(client: TestClient) -> None:
    assert refused(client.get("/v1/没有"), 404)["code"] == "not_found"
    assert refused(client.post("/v1/chat/completions/", json=CHAT), 404)["code"] == "not_found"
    wrong = client.delete("/v1/chat/completions")
    assert refused(wrong, 405)["code"] == "method_not_allowed" and wrong.headers["allow"] == "POST"
    assert refused(client.get("/v1/models/%ff%00"), 404)["code"] == "model_not_found"
