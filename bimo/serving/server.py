"""Running the application: the socket, the model, the signals; from the command to the last answered request.

bind (a wide bind needs a key) -> listen, /health says 503 -> load the model in a thread -> 200
SIGINT or SIGTERM -> no new connections -> answers under way may end for some seconds -> given up -> return
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import TYPE_CHECKING, Union

import uvicorn
from starlette.types import ASGIApp

from bimo.backends.base import Backend
from bimo.errors import UsageError
from bimo.serving.service import Service

if TYPE_CHECKING:
    from bimo.backends.embedding import Embedder

__all__ = ["bracketed", "open_socket", "run"]

Factory = Callable[[], Union[Backend, "Embedder"]]


def run(
    app: ASGIApp,
    service: Service,
    factories: Sequence[Factory],
    listener: socket.socket,
    *,
    on_listen: Callable[[], None],
    on_ready: Callable[[], None],
    grace: float,
) -> int:
    """Run `app` on `listener` until a signal, loading the models meanwhile; see `app.serve`."""
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        server_header=False,
        lifespan="off",
        ws="none",
        timeout_keep_alive=30,
        timeout_graceful_shutdown=int(grace) + 5,
    )
    server = Server(config, service, grace)
    loader = _Loader(factories, service, server, on_ready)
    with server.handling_signals():
        try:
            loader.start()
            on_listen()
            server.run(sockets=[listener])
        finally:
            service.stopping = True
            listener.close()
            loader.release()
    if loader.failure is not None and not server.signals:
        raise loader.failure
    return 128 + signal.SIGINT if signal.SIGINT in server.signals else 0


def open_socket(host: str, port: int) -> socket.socket:
    """A listening socket; UsageError with the mend when the address cannot be had."""
    if not 0 <= port <= 65535:
        raise UsageError(f"a port is between 0 (any free one) and 65535, not {port}", param="port")
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise UsageError(f"{host!r} is no address of this machine ({error.strerror or error}): try 127.0.0.1",
                         param="host") from None  # fmt: skip
    family, kind, protocol, _, where = min(found, key=lambda entry: entry[0] != socket.AF_INET)
    listener = socket.socket(family, kind, protocol)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(where)
        listener.listen(2048)
    except OSError as error:
        listener.close()
        raise _bind_error(error, host, port) from None
    return listener


def _bind_error(error: OSError, host: str, port: int) -> UsageError:
    match error.errno:
        case errno.EADDRINUSE:
            problem = f"port {port} is taken by another program: choose another with --port, or --port 0 for a free one"
        case errno.EACCES:
            problem = f"port {port} needs special rights: choose one above 1023 with --port"
        case errno.EADDRNOTAVAIL:
            return UsageError(f"{host!r} is no address of this machine: try 127.0.0.1", param="host")
        case _:
            problem = f"port {port} of {host} cannot be opened ({error.strerror}): choose another with --port"
    return UsageError(problem, param="port")


def bracketed(host: str) -> str:
    """The host as URLs and Host headers write it."""
    return f"[{host}]" if ":" in host else host


class Server(uvicorn.Server):
    """uvicorn, with signals that end in a return instead of being raised again, and answers given up after a while."""

    def __init__(self, config: uvicorn.Config, service: Service, grace: float) -> None:
        super().__init__(config)
        self.signals: list[int] = []
        self._service = service
        self._grace = grace

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """uvicorn's own, which raises the signals again when all is done: nothing here."""
        yield

    @contextlib.contextmanager
    def handling_signals(self) -> Iterator[None]:
        """Handle SIGINT and SIGTERM (in the main thread; elsewhere signals cannot be handled)."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {kind: signal.signal(kind, self.handle_exit) for kind in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for kind, handler in before.items():
                signal.signal(kind, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """First signal: begin to stop. Second: give up what is left."""
        self.signals.append(sig)
        if self.should_exit:
            self._service.stopping = True
            self.force_exit = True
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop accepting, let answers end, give up those that take longer than the grace."""
        loop = asyncio.get_running_loop()
        giving_up = loop.call_later(self._grace, self._service.stop)
        try:
            await super().shutdown(sockets)
        finally:
            giving_up.cancel()
            self._service.stop()


class _Loader(threading.Thread):
    """Makes the models while the server already listens. A daemon: a Ctrl-C does not wait for a download."""

    def __init__(
        self, factories: Sequence[Factory], service: Service, server: Server, on_ready: Callable[[], None]
    ) -> None:
        super().__init__(name="bimo-load", daemon=True)
        self.failure: BaseException | None = None
        self._factories = factories
        self._service = service
        self._server = server
        self._on_ready = on_ready
        self._models: list[Backend | Embedder] = []
        self._released = False
        self._lock = threading.Lock()

    def run(self) -> None:
        try:
            for factory in self._factories:
                model = factory()
                with self._lock:
                    if kept := not self._released:
                        self._models.append(model)
                if not kept:
                    model.close()
                    return
            self._service.attach(*self._models)
            self._on_ready()
        except BaseException as error:  # told by serve(), in the main thread
            self.failure = error
            self._server.should_exit = True

    def release(self) -> None:
        """Close the models now, or as soon as they are made."""
        with self._lock:
            self._released = True
        for model in self._models:
            model.close()
