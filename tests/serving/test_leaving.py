"""Clients that leave, answers that break, models that are silent, servers that stop."""

from __future__ import annotations

import asyncio
import json
import logging
from typing import Any

import httpx
import openai
import pytest

from bimo.backends.local import LocalBackend
from bimo.serving.app import create_app
from bimo.serving.streaming import _Doorbell
from bimo.tokenizer.load import Tokenizer
from tests.serving.live import LiveServer, live, until
from tests.serving.scripted import ScriptedBackend

CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "讲个故事 🦊"}]}
LONG = "从前有一个小小的模型。" * 40


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
@pytest.mark.parametrize("stream", [False, True])
def test_computing_stops_when_the_client_leaves(
    server: LiveServer, backend: LocalBackend, path: str, stream: bool
) -> None:
    body: dict[str, Any] = {"max_tokens": 1900, "ignore_eos": True, "stream": stream, "n": 4}
    body |= CHAT if "chat" in path else {"prompt": "从前"}
    before = backend.stats().generation_tokens
    connection = server.post_raw(path, body)
    if stream:
        assert connection.recv(15) == b"HTTP/1.1 200 OK"
    until(lambda: backend.stats().running == 4)
    connection.close()
    until(lambda: backend.stats().running == backend.stats().waiting == 0)
    assert backend.stats().generation_tokens - before < 4 * 1900, "it was left, not finished"
    until(lambda: server.app.state.service.admission.inside == 0)  # type: ignore[attr-defined]


def test_a_client_that_leaves_while_sending(server: LiveServer, backend: LocalBackend) -> None:
    head = (
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 1000\r\n"
    )
    server.connect(head + b'\r\n{"messages": ').close()
    assert httpx.get(f"{server.url}/health").status_code == 200 and backend.stats().running == 0


def test_the_log_says_that_a_client_left(tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture) -> None:
    backend = ScriptedBackend(tokenizer, lambda _: LONG, gated=True)
    with caplog.at_level(logging.INFO, "bimo.access"), live(create_app(backend)) as server:
        connection = server.post_raw("/v1/chat/completions", CHAT)
        until(lambda: backend.stats().running == 1)
        connection.close()
        until(lambda: backend.stats().running == 0 and caplog.records)
        assert "status=499" in caplog.records[0].getMessage()


@pytest.mark.parametrize("fail_after", [0, 3])
def test_a_failure_in_the_engine(tokenizer: Tokenizer, fail_after: int) -> None:
    app = create_app(ScriptedBackend(tokenizer, lambda _: LONG, fail_after=fail_after))
    with live(app) as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0)
        with pytest.raises(openai.InternalServerError) as whole:
            client.chat.completions.create(model="scripted", **CHAT)
        assert "secret internals" not in whole.value.message
        with pytest.raises(openai.APIError) as streamed:
            for _ in client.chat.completions.create(model="scripted", **CHAT, stream=True):
                pass
        assert "the model failed" in streamed.value.message and "secret internals" not in streamed.value.message
        text = httpx.post(f"{server.url}/v1/chat/completions", json={**CHAT, "stream": True}).text
        assert text.endswith("data: [DONE]\n\n") and json.loads(text.split("\n\n")[-3][6:])["error"]["type"]
        until(lambda: app.state.service.admission.inside == 0)


def test_silence_is_filled(tokenizer: Tokenizer) -> None:
    backend = ScriptedBackend(tokenizer, lambda _: "好", gated=True)
    with live(create_app(backend, keep_alive=0.05)) as server:
        for path, body in (("/v1/chat/completions", CHAT), ("/v1/completions", {"prompt": "甲"})):
            backend.gate.clear()
            with httpx.stream("POST", server.url + path, json={**body, "stream": True}) as response:
                assert response.headers["content-type"].startswith("text/event-stream")
                assert response.headers["cache-control"] == "no-cache" and response.headers["x-accel-buffering"] == "no"
                comments = 0
                for line in response.iter_lines():
                    comments += line == ": keep-alive"
                    if comments == 2:
                        backend.gate.set()
                assert comments >= 2 and line == ""
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0)
        backend.gate.clear()
        stream = client.chat.completions.create(model="scripted", **CHAT, stream=True)
        assert next(stream).choices[0].delta.role == "assistant", "the role comes before the model speaks"
        backend.gate.set()
        assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == "好"


def test_a_stopping_server_says_so(tokenizer: Tokenizer) -> None:
    backend = ScriptedBackend(tokenizer, lambda _: LONG, gated=True)
    app = create_app(backend)
    with live(app) as server:
        with httpx.stream("POST", f"{server.url}/v1/chat/completions", json={**CHAT, "stream": True}) as response:
            lines = response.iter_lines()
            assert "assistant" in next(lines)
            app.state.service.stop()
            rest = list(lines)
            assert rest[-2] == "data: [DONE]" and "shutting_down" in rest[-4]
        until(lambda: backend.stats().running == 0)
        refused = httpx.post(f"{server.url}/v1/chat/completions", json=CHAT)
        assert refused.status_code == 503 and refused.json()["error"]["code"] == "shutting_down"
        assert httpx.get(f"{server.url}/health").status_code == 503


async def test_a_model_that_is_still_loading(tokenizer: Tokenizer) -> None:
    app = create_app(None)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:
        posts = [("/v1/chat/completions", CHAT), ("/tokenize", {"prompt": "甲"})]
        waiting = [await client.get(path) for path in ("/health", "/v1/models", "/v1/models/x")]
        waiting += [await client.post(path, json=body) for path, body in posts]
        for response in waiting:
            assert response.status_code == 503 and response.headers["retry-after"] == "1"
            assert response.json()["error"]["code"] == "model_loading"
        for path in ("/version", "/openapi.json", "/metrics"):
            assert (await client.get(path)).status_code == 200
        app.state.service.attach(ScriptedBackend(tokenizer, lambda _: "好"))
        assert (await client.get("/health")).json() == {"status": "ok", "model": "scripted"}
        assert (await client.post("/v1/chat/completions", json=CHAT)).json()["choices"][0]["message"]["content"] == "好"


def test_one_call_into_the_loop_wakes_all_readers() -> None:
    """With 64 streams the engine's thread would make 64 system calls between two steps."""

    async def ring_all() -> None:
        loop, calls = asyncio.get_running_loop(), []
        schedule = loop.call_soon_threadsafe
        loop.call_soon_threadsafe = lambda *work: (calls.append(work), schedule(*work))[1]
        readers = [asyncio.Event() for _ in range(64)]
        for _ in range(3):
            for reader in readers:
                reader.clear()
                _Doorbell.here().ring(reader)
            await asyncio.gather(*(asyncio.wait_for(reader.wait(), 60) for reader in readers))
        assert len(calls) == 3
        for reader in readers:  # from another thread, while the loop answers
            reader.clear()
        bell = _Doorbell.here()
        await asyncio.gather(*(asyncio.to_thread(bell.ring, reader) for reader in readers))
        await asyncio.gather(*(asyncio.wait_for(reader.wait(), 60) for reader in readers))

    asyncio.run(ring_all())
