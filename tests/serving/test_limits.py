"""Who may come in, and how many."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from starlette.testclient import TestClient

from bimo.errors import UsageError
from bimo.serving.app import create_app, serve
from bimo.tokenizer.load import Tokenizer
from tests.serving.live import live, until
from tests.serving.scripted import ScriptedBackend

CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "你好 🦊"}]}
KEY = "sk-very-secret"


def scripted(tokenizer: Tokenizer, **settings: Any) -> ScriptedBackend:
    return ScriptedBackend(tokenizer, lambda _: "好的 🦊", **settings)


def everything(connection: socket.socket) -> bytes:
    """What the server says until it hangs up."""
    data = b""
    while more := connection.recv(65536):
        data += more
    return data


def test_a_key_opens_everything_but_the_page(tokenizer: Tokenizer) -> None:
    client = TestClient(create_app(scripted(tokenizer), api_key=KEY))
    for path in ("/health", "/version", "/openapi.json"):
        assert client.get(path).status_code == 200
    wrong = [None, "", "Bearer", "Bearer ", f"Bearer {KEY}x", f"Bearer {KEY[:-1]}", f"Basic {KEY}", KEY, "Bearer 密钥"]
    for path in ("/v1/models", "/v1/chat/completions", "/metrics", "/tokenize", "/detokenize", "/v1/anything", "/x"):
        for given in wrong:
            headers = {} if given is None else {"authorization": given.encode()}
            response = client.get(path, headers=headers)
            assert response.status_code == 401 and response.headers["www-authenticate"] == "Bearer"
            assert response.json()["error"]["code"] == "invalid_api_key" and KEY not in response.text
    assert client.get("/v1/models", headers={"authorization": f"bearer {KEY}"}).status_code == 200
    schema = client.get("/openapi.json").json()
    assert schema["paths"]["/v1/models"]["get"]["security"] == [{"key": []}]
    assert "security" not in schema["paths"]["/health"]["get"]


def test_the_official_client_with_a_wrong_key(tokenizer: Tokenizer) -> None:
    with live(create_app(scripted(tokenizer), api_key=KEY)) as server:
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=f"{server.url}/v1", api_key="sk-guess").models.list()
        right = openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY)
        answer = right.chat.completions.create(model="scripted", **CHAT)
        assert answer.choices[0].message.content == "好的 🦊"


def test_foreign_host_names_are_refused(tokenizer: Tokenizer) -> None:
    """DNS rebinding: a page of evil.example, resolved to 127.0.0.1, sends its own name."""
    hosts = ["localhost", "127.0.0.1", "[::1]"]
    client = TestClient(create_app(scripted(tokenizer), allowed_hosts=hosts), base_url="http://localhost:8000")
    for host in ("localhost", "LOCALHOST:1234", "127.0.0.1:8000", "[::1]:8000", "[::1]"):
        assert client.get("/health", headers={"host": host}).status_code == 200
    for host in ("evil.example", "localhost.evil.example:8000", "127.0.0.1.evil.example", "[::2]:80", "0.0.0.0"):
        response = client.get("/health", headers={"host": host})
        assert response.status_code == 421 and response.json()["error"]["code"] == "host_not_allowed"


def test_other_origins_only_when_asked_for(tokenizer: Tokenizer) -> None:
    ask = {"origin": "https://app.example", "access-control-request-method": "POST"}
    closed = TestClient(create_app(scripted(tokenizer), api_key=KEY))
    assert "access-control-allow-origin" not in closed.get("/health", headers=ask).headers
    assert "access-control-allow-origin" not in closed.options("/v1/models", headers=ask).headers
    opened = TestClient(create_app(scripted(tokenizer), api_key=KEY, cors_origins=["https://app.example"]))
    preflight = opened.options("/v1/chat/completions", headers=ask)
    assert preflight.status_code == 200 and preflight.headers["access-control-allow-origin"] == "https://app.example"
    assert "access-control-allow-origin" not in opened.get("/health", headers={"origin": "https://b.example"}).headers


def test_a_wide_bind_needs_a_key(tokenizer: Tokenizer) -> None:
    for host in ("0.0.0.0", "::", "192.168.1.5", "example.com", "127.evil.example"):
        with pytest.raises(UsageError, match="needs a key") as refusal:
            serve(lambda: scripted(tokenizer), host=host)
        assert refusal.value.param == "host"
    with pytest.raises(UsageError, match="printable ASCII"):
        serve(lambda: scripted(tokenizer), api_key="密钥")


def test_an_address_that_cannot_be_had(tokenizer: Tokenizer) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(UsageError, match=r"is taken.*--port"):
        serve(lambda: scripted(tokenizer), port=taken.getsockname()[1])
    with pytest.raises(UsageError, match="between 0"):
        serve(lambda: scripted(tokenizer), port=65536)
    with pytest.raises(UsageError, match="no address of this machine"):
        serve(lambda: scripted(tokenizer), host="203.0.113.7", api_key=KEY)


def test_a_full_queue(tokenizer: Tokenizer) -> None:
    backend = scripted(tokenizer, gated=True)
    with live(create_app(backend, max_queue=2)) as server:
        inside = [server.post_raw("/v1/chat/completions", CHAT | {"stream": i == 0}) for i in range(2)]
        until(lambda: backend.stats().running == 2)
        for path, body in (("/v1/chat/completions", CHAT), ("/v1/completions", {"prompt": ["甲", "乙"]})):
            refused = httpx.post(server.url + path, json=body)
            assert refused.status_code == 429 and int(refused.headers["retry-after"]) >= 1
            assert refused.json()["error"]["code"] == "queue_full"
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0)
        with pytest.raises(openai.RateLimitError):
            client.chat.completions.create(model="scripted", **CHAT)
        assert httpx.get(f"{server.url}/health").status_code == 200, "full is not dead"
        backend.gate.set()
        for connection in inside:
            assert connection.recv(12) == b"HTTP/1.1 200"
            connection.close()
        until(lambda: server.app.state.service.admission.inside == 0)  # type: ignore[attr-defined]
        assert httpx.post(f"{server.url}/v1/chat/completions", json=CHAT | {"n": 8}).status_code == 200, "alone it fits"


def test_a_list_too_long_for_what_is_left_leaves_nothing_behind(tokenizer: Tokenizer) -> None:
    """The last prompt of the list is refused by the backend: those before it are taken back."""
    backend = scripted(tokenizer, gated=True)
    app = create_app(backend)
    response = TestClient(app).post("/v1/completions", json={"prompt": ["甲", "乙", "丙 " * 2000]})
    assert response.status_code == 400 and response.json()["error"]["code"] == "context_length_exceeded"
    until(lambda: backend.stats().running == 0)
    assert app.state.service.admission.inside == 0


def test_a_body_that_does_not_come(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bimo.serving.body.READ_TIMEOUT", 0.05)
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 50\r\n"
    with live(create_app(scripted(tokenizer))) as server, server.connect(head + b"\r\n{") as connection:
        answer = everything(connection)
        assert answer.startswith(b"HTTP/1.1 408") and b'"request_timeout"' in answer


def test_bodies_without_a_length_are_bounded_too(tokenizer: Tokenizer) -> None:
    with live(create_app(scripted(tokenizer), max_body_bytes=100_000)) as server:

        def endless() -> Iterator[bytes]:
            yield b'{"messages": [{"role": "user", "content": "'
            while True:
                yield b"x" * 10_000

        try:
            response = httpx.post(
                f"{server.url}/v1/chat/completions", content=endless(), headers={"content-type": "application/json"}
            )
            assert response.status_code == 413 and response.json()["error"]["code"] == "body_too_large"
        except httpx.WriteError:
            pass  # the server hung up on the rest, which is as good
        head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        with server.connect(head + b"Content-Length: 99999999999\r\n\r\n") as connection:
            answer = everything(connection)
            assert answer.startswith(b"HTTP/1.1 413") and b"connection: close" in answer.lower()
        assert httpx.post(f"{server.url}/v1/chat/completions", json=CHAT).status_code == 200
