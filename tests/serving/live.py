"""A real server in a thread, and ways to talk to it below the level of HTTP clients."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn
from starlette.types import ASGIApp

from bimo.serving.server import open_socket

__all__ = ["LiveServer", "events_of", "live", "until"]


class LiveServer:
    """`url` answers until the `live` block ends."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        self._socket = open_socket("127.0.0.1", 0)
        self.port: int = self._socket.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        config = uvicorn.Config(app, log_config=None, access_log=False, lifespan="off", timeout_graceful_shutdown=5)
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [self._socket]}, daemon=True)

    def start(self) -> None:
        self._thread.start()
        until(lambda: self._server.started)

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join(20)
        assert not self._thread.is_alive(), "the server did not stop"

    def connect(self, request: bytes) -> socket.socket:
        """A raw connection on which `request` was sent."""
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=30)
        connection.sendall(request)
        return connection

    def post_raw(self, path: str, body: Any) -> socket.socket:
        """A raw connection on which a JSON body was posted; close it to leave early."""
        data = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        return self.connect(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)


@contextmanager
def live(app: ASGIApp) -> Iterator[LiveServer]:
    """The application on a free port of this machine."""
    server = LiveServer(app)
    server.start()
    try:
        yield server
    finally:
        server.stop()


def until(condition: Callable[[], Any], seconds: float = 60.0) -> None:
    """Wait for something another thread does; the limit only keeps a broken test from hanging."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.005)


def events_of(text: str) -> list[Any]:
    """The JSON of each server-sent event; the last must be [DONE]."""
    datas = [line.removeprefix("data: ") for line in text.split("\n\n") if line.startswith("data: ")]
    assert datas and datas[-1] == "[DONE]", text[-300:]
    return [json.loads(data) for data in datas[:-1]]
