"""64 clients at once, some of which leave: none lost, none mixed up, the server alive, memory flat.

Memory is measured with a scripted backend: under a real one, oneDNN's cache of kernels grows with every new batch size
until it has seen them all, which hides what the server itself keeps.
"""

from __future__ import annotations

import asyncio
import gc
from typing import Any

import httpx
import psutil

from bimo.backends.base import Backend
from bimo.backends.local import LocalBackend
from bimo.serving.app import create_app
from bimo.tokenizer.load import Tokenizer
from tests.serving.live import LiveServer, events_of, live, until
from tests.serving.scripted import ScriptedBackend

NUM_CLIENTS = 64
NUM_TOKENS = 24
TOPICS = ("狐狸 🦊", "the lazy dog", "明月光", "def add(a, b):", "naïve café", "笔墨纸砚", "once upon a time", "👍🏽")


def body_of(client: int) -> dict[str, Any]:
    """A prompt of its own length and kind for each client."""
    text = f"{client}: {TOPICS[client % len(TOPICS)]} " * (1 + client % 5)
    return {
        "messages": [{"role": "user", "content": text}],
        "max_tokens": NUM_TOKENS,
        "temperature": 0,
        "stream": client % 3 != 0,
    }


async def ask(http: httpx.AsyncClient, client: int) -> str | None:
    """The answer's text. Every fourth client leaves after a few events, or at once when it does not stream."""
    body, leaves = body_of(client), client % 4 == 1
    if not body["stream"]:
        if leaves:
            task = asyncio.create_task(http.post("/v1/chat/completions", json=body))
            await asyncio.sleep(0.02)
            task.cancel()
            return None
        response = await http.post("/v1/chat/completions", json=body)
        assert response.status_code == 200, response.text
        return response.json()["choices"][0]["message"]["content"]
    async with http.stream("POST", "/v1/chat/completions", json=body) as response:
        assert response.status_code == 200
        if leaves:
            seen = 0
            async for _ in response.aiter_lines():
                seen += 1
                if seen == 5:
                    return None
        text = (await response.aread()).decode()
    choices = [choice for event in events_of(text) for choice in event["choices"]]
    assert choices[-1]["finish_reason"] in ("length", "stop")
    return "".join(choice["delta"].get("content", "") for choice in choices)


async def one_round(url: str) -> list[str | None]:
    limits = httpx.Limits(max_connections=NUM_CLIENTS)
    async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as http:
        return await asyncio.gather(*(ask(http, client) for client in range(NUM_CLIENTS)))


def idle(server: LiveServer, backend: Backend) -> bool:
    stats = backend.stats()
    return stats.running == stats.waiting == server.app.state.service.admission.inside == 0  # type: ignore[attr-defined]


def test_none_lost_none_mixed(server: LiveServer, backend: LocalBackend) -> None:
    alone = {}
    with httpx.Client(base_url=server.url, timeout=120) as http:
        for client in range(NUM_CLIENTS):
            answer = http.post("/v1/chat/completions", json=body_of(client) | {"stream": False}).json()
            alone[client] = answer["choices"][0]["message"]["content"]
    assert len(set(alone.values())) > NUM_CLIENTS // 2, "the prompts must tell their answers apart"
    for _ in range(3):
        answers = asyncio.run(one_round(server.url))
        for client, answer in enumerate(answers):
            assert answer == (None if client % 4 == 1 else alone[client])
        until(lambda: idle(server, backend))
    backend.engine.check_integrity()
    assert httpx.get(f"{server.url}/health").status_code == 200


def test_memory_is_flat(tokenizer: Tokenizer) -> None:
    scripted = ScriptedBackend(tokenizer, lambda prompt: "从前 🦊 " * 10)
    sizes = []
    with live(create_app(scripted)) as server:
        for _ in range(8):
            asyncio.run(one_round(server.url))
            until(lambda: idle(server, scripted))
            scripted.requests.clear()
            gc.collect()
            sizes.append(psutil.Process().memory_info().rss)
    assert max(sizes[4:]) - max(sizes[:4]) < 8 << 20, [size >> 20 for size in sizes]


def test_more_clients_than_places(backend: LocalBackend) -> None:
    """Who finds the queue full is told so and gets the right answer on another try."""
    with live(create_app(backend, model_name="tiny", max_queue=8)) as server:

        async def insist(http: httpx.AsyncClient, client: int) -> tuple[str, int]:
            refusals = 0
            while True:
                response = await http.post("/v1/chat/completions", json=body_of(client) | {"stream": False})
                if response.status_code == 200:
                    return response.json()["choices"][0]["message"]["content"], refusals
                assert response.status_code == 429 and response.headers["retry-after"]
                refusals += 1
                await asyncio.sleep(0.05)

        async def crowd() -> list[tuple[str, int]]:
            async with httpx.AsyncClient(base_url=server.url, timeout=120) as http:
                return await asyncio.gather(*(insist(http, client) for client in range(32)))

        answers = asyncio.run(crowd())
        assert sum(refusals for _, refusals in answers) > 0
        again = httpx.post(f"{server.url}/v1/chat/completions", json=body_of(5) | {"stream": False}).json()
        assert answers[5][0] == again["choices"][0]["message"]["content"]
        until(lambda: idle(server, backend))
