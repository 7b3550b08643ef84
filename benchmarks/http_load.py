"""Many streaming chat requests at once against one server, over plain sockets: the client must not be what is measured.

outcome = run_load(port, bodies)         # tokens/s of all together, seconds to the first token of each
"""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.processes import EngineFailed

__all__ = ["Outcome", "Refused", "chat_body", "free_port", "is_ready", "run_load"]

PATIENCE = 600.0  # seconds for all requests together
PROBE_PATIENCE = 60.0
HOST = "127.0.0.1"


class Refused(EngineFailed):
    """The server answered with another status than 200."""

    def __init__(self, status: int, said: str) -> None:
        super().__init__(f"its server answered {status}: {said[:200]}")
        self.status = status


@dataclass(frozen=True)
class Outcome:
    """What the clients saw."""

    seconds: float  # from the first request to the last token
    tokens: int
    first_token: list[float]  # seconds, in rising order

    def quantile(self, share: float) -> float:
        """Seconds within which that share of the requests had its first token (nearest rank)."""
        return self.first_token[max(-(-len(self.first_token) * round(share * 100) // 100) - 1, 0)]


def chat_body(question: str, new_tokens: int, end_token: str, end_ids: Sequence[int]) -> dict[str, Any]:
    """A chat request of exactly `new_tokens` greedy tokens, in the words this server knows."""
    body: dict[str, Any] = {
        "model": "bench",
        "messages": [{"role": "user", "content": question}],
        "max_tokens": new_tokens,
        "temperature": 0,
        "stream": True,
    }
    if end_token == "logit_bias":
        return body | {"logit_bias": {str(token): -100 for token in end_ids}}
    return body | {"ignore_eos": True, "stream_options": {"include_usage": True}}


def run_load(port: int, bodies: Sequence[dict[str, Any]]) -> Outcome:
    """Send all at once and read every stream to its end. Raises EngineFailed if a request does not give its tokens."""

    async def all_of_them() -> Outcome:
        start = time.perf_counter()
        calls = (_stream(port, body, start) for body in bodies)
        found = await asyncio.wait_for(asyncio.gather(*calls), PATIENCE)
        end = time.perf_counter()
        return Outcome(end - start, sum(tokens for _, tokens in found), sorted(first for first, _ in found))

    try:
        return asyncio.run(all_of_them())
    except TimeoutError:
        raise EngineFailed(f"its server did not answer {len(bodies)} requests in {PATIENCE:.0f} seconds") from None
    except (OSError, ValueError, LookupError) as error:
        raise EngineFailed(f"its server broke off: {error}") from None


def is_ready(port: int, body: dict[str, Any]) -> bool:
    """Whether the server answers a request. Raises Refused when it never will, since it does not like the request."""
    try:
        asyncio.run(asyncio.wait_for(_stream(port, body, time.perf_counter()), PROBE_PATIENCE))
    except Refused as error:
        if 400 <= error.status < 500 and error.status not in (404, 429):
            raise
        return False
    except (OSError, ValueError, LookupError, TimeoutError, EngineFailed):
        return False
    return True


def free_port() -> int:
    """A port nobody listens on now."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return probe.getsockname()[1]


async def _stream(port: int, body: dict[str, Any], start: float) -> tuple[float, int]:
    """Seconds from `start` to the first piece of text, and the number of tokens."""
    reader, writer = await asyncio.open_connection(HOST, port, limit=1 << 20)
    try:
        content = json.dumps(body).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {HOST}:{port}\r\nContent-Type: application/json\r\n"
        head += f"Content-Length: {len(content)}\r\nConnection: close\r\n\r\n"
        writer.write(head.encode() + content)
        status = int((await reader.readline()).split()[1])
        if status != 200:
            raise Refused(status, (await reader.read(2000)).decode(errors="replace").split("\r\n\r\n")[-1])
        first, pieces, counted, finish = 0.0, 0, None, None
        async for line in reader:
            if not line.startswith(b"data:"):
                continue
            data = line[5:].strip()
            if data == b"[DONE]":
                break
            event = json.loads(data)
            counted = (event.get("usage") or {}).get("completion_tokens", counted)
            for choice in event.get("choices") or ():
                finish = choice.get("finish_reason") or finish
                if choice["delta"].get("content"):
                    first = first or time.perf_counter() - start
                    pieces += 1
    finally:
        writer.close()
    if counted is None:  # a server that does not say: it stopped at the limit, or each piece is a token at least
        counted = body["max_tokens"] if finish == "length" else pieces
    if not first or counted != body["max_tokens"]:
        raise EngineFailed(f"its server made {counted} of {body['max_tokens']} tokens")
    return first, counted
