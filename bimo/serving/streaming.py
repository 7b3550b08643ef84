"""From the backend's thread to the client: generations as batches of outputs, and server-sent events.

    with service.start(requests, record) as generation:    # admitted and submitted, or refused, before any answer
        generation.watch(receive)                          # leaving clients abort it from now on
        async for batch in generation.batches():           # [(which request, Output), ...]
            ...

The same loop serves whole and streamed answers, so they cannot differ. Outputs that pile up while a client reads
slowly are merged, one per sequence, so a slow reader costs fewer and larger events and never a queue of tokens.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import weakref
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from functools import partial
from types import TracebackType
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from bimo.backends.base import Backend
from bimo.engine.request import Output, Request, Usage
from bimo.serving.errors import ApiError, describe, error_body, to_json
from bimo.serving.observe import ClientGone, Metrics, RequestRecord, record_of

__all__ = ["EventStream", "Generation", "collect", "event"]

LOG = logging.getLogger("bimo.serving")
DONE = b"data: [DONE]\n\n"

Batch = list[tuple[int, Output]]


class _Doorbell:
    """Wakes the readers of one event loop from the backend's thread. One call into the loop stands for all that ring
    before it is answered: with 64 streams a call for each took 2 % of the engine's time."""

    _by_loop: ClassVar[WeakKeyDictionary[asyncio.AbstractEventLoop, _Doorbell]] = WeakKeyDictionary()

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = weakref.ref(loop)
        self._waiting: deque[asyncio.Event] = deque()
        self._rung = False

    @classmethod
    def here(cls) -> _Doorbell:
        """The running loop's."""
        loop = asyncio.get_running_loop()
        return cls._by_loop.setdefault(loop, cls(loop))

    def ring(self, reader: asyncio.Event) -> None:
        """Set `reader` in its loop, soon; from any thread."""
        self._waiting.append(reader)
        if not self._rung and (loop := self._loop()) is not None:
            self._rung = True
            with contextlib.suppress(RuntimeError):  # the loop is closed: the server has gone, nobody reads this
                loop.call_soon_threadsafe(self._answer)

    def _answer(self) -> None:
        self._rung = False  # before the readers are taken: who comes later rings again
        while self._waiting:
            self._waiting.popleft().set()


class Generation:
    """Requests given to the backend together and watched until each of their sequences has ended.

    Made and used on the event loop; only `_sink` runs on the backend's thread. Leaving the `with` block aborts what
    still runs. `usage` is the sum over all requests, complete when `batches` has ended.
    """

    def __init__(
        self,
        backend: Backend,
        requests: Sequence[Request],
        *,
        record: RequestRecord,
        metrics: Metrics,
        on_end: Callable[[Generation], None],
    ) -> None:
        self.usage = Usage(0, 0)
        self._backend = backend
        self._requests = requests
        self._record = record
        self._metrics = metrics
        self._on_end = on_end
        self._doorbell = _Doorbell.here()
        self._wake = asyncio.Event()
        self._inbox: deque[tuple[int, Output]] = deque()
        self._signalled = False
        self._running = {(n, index) for n, request in enumerate(requests) for index in range(request.sampling.n)}
        self._last_token: dict[tuple[int, int], float] = {}  # when each sequence last spoke
        self._ended = False
        self._refusal: Exception | None = None  # why it ended early
        self._watcher: asyncio.Task[None] | None = None

    def submit(self) -> None:
        """Hand everything to the backend; what it refuses is raised here, after taking back what it had accepted."""
        try:
            for number, request in enumerate(self._requests):
                self._backend.submit(request, partial(self._sink, number))
        except BaseException:
            self.end()
            raise

    def _sink(self, number: int, output: Output) -> None:
        """Called from the backend's thread. One wake-up stands for all outputs that arrive before it is answered."""
        self._inbox.append((number, output))
        if not self._signalled:
            self._signalled = True
            self._doorbell.ring(self._wake)

    def watch(self, receive: Receive) -> None:
        """Abort when the client leaves. The request's body must have been read."""

        async def wait() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            self.end(ClientGone())

        self._watcher = asyncio.create_task(wait())

    def end(self, refusal: Exception | None = None) -> None:
        """Stop computing whatever still runs; `batches` then raises `refusal`. Harmless when all is over."""
        if self._ended:
            return
        self._ended = True
        self._refusal = refusal
        if self._watcher is not None:
            self._watcher.cancel()
        if self._running:
            for request in self._requests:
                self._backend.abort(request.request_id)
        self._wake.set()
        self._on_end(self)

    @property
    def width(self) -> int:
        """Sequences computed at once, for admission: n, or the candidates behind them."""
        settings = [request.sampling for request in self._requests]
        return sum(max(params.n, params.best_of or 1, params.num_beams) for params in settings)

    def __enter__(self) -> Generation:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.end()

    async def batches(self, keep_alive: float | None = None) -> AsyncIterator[Batch]:
        """Outputs in order, in batches; an empty batch after `keep_alive` seconds of silence.

        Raises ClientGone when the client left, ApiError 500 or 503 when the backend gave up.
        """
        loop = asyncio.get_running_loop()
        spoke, timer = loop.time(), None
        try:
            while self._running:
                if keep_alive is not None and timer is None:  # one for many waits: making and undoing one takes 10 us
                    timer = loop.call_at(spoke + keep_alive, self._wake.set)
                await self._wake.wait()
                self._wake.clear()
                self._signalled = False  # before the inbox is read: what comes later wakes again
                if self._refusal is not None:
                    raise self._refusal
                batch, now = self._drain(), loop.time()
                if timer is not None and now >= timer.when():
                    timer = None
                if batch or (keep_alive is not None and now - spoke >= keep_alive):
                    yield batch
                    spoke = loop.time()
        finally:
            if timer is not None:
                timer.cancel()
        self._metrics.whole.observe(self._record.seconds())
        self.end()

    def _drain(self) -> Batch:
        merged: dict[tuple[int, int], Output] = {}
        while self._inbox:
            number, output = self._inbox.popleft()
            key = (number, output.index)
            if output.finish_reason in ("abort", "error"):
                raise self._failure(output)
            self._note(key, output)
            if key in merged:
                _merge(merged[key], output)
            else:
                merged[key] = output
        return [(number, output) for (number, _), output in merged.items()]

    def _note(self, key: tuple[int, int], output: Output) -> None:
        now = time.perf_counter()
        if output.token_ids:
            if key in self._last_token:
                self._metrics.inter_token.observe((now - self._last_token[key]) / len(output.token_ids))
            elif not self._last_token:
                self._metrics.first_token.observe(self._record.seconds())
            self._last_token[key] = now
        if output.finish_reason is not None:
            self._running.discard(key)
        if output.usage is not None:
            self.usage = _add(self.usage, output.usage)
            self._record.prompt_tokens = self.usage.prompt_tokens
            self._record.completion_tokens = self.usage.completion_tokens

    def _failure(self, output: Output) -> ApiError:
        if output.finish_reason == "abort":
            return ApiError(503, "the server is stopping and gave this answer up; ask again", code="shutting_down")
        LOG.error("request %s: the backend failed: %s", self._record.request_id, output.error)
        return ApiError(500, "the model failed while answering; the server's log says why under the x-request-id")


async def collect(generation: Generation, receive: Receive, take: Callable[[Batch], None]) -> Usage:
    """Give `take` every batch until the generation ends; ClientGone when the client leaves before."""
    with generation:
        generation.watch(receive)
        async for batch in generation.batches():
            take(batch)
    return generation.usage


def _merge(into: Output, later: Output) -> None:
    into.text += later.text
    into.token_ids = into.token_ids + later.token_ids
    if later.logprobs is not None:
        into.logprobs = (into.logprobs or []) + later.logprobs
    into.finish_reason, into.stop_reason = later.finish_reason, later.stop_reason
    into.usage = later.usage or into.usage


def _add(one: Usage, other: Usage) -> Usage:
    return Usage(
        one.prompt_tokens + other.prompt_tokens,
        one.completion_tokens + other.completion_tokens,
        one.cached_tokens + other.cached_tokens,
        one.truncated_tokens + other.truncated_tokens,
    )


def event(value: Any) -> bytes:
    """One server-sent event. JSON escapes line ends, so one `data:` line holds it."""
    return b"data: " + to_json(value) + b"\n\n"


class EventStream(Response):
    """A generation as server-sent events: those of `events`, then `[DONE]`. Empty events become keep-alive comments.

    A failure after the first byte can only be told inside the stream: as an event `{"error": ...}`, which the official
    client raises. (sse-starlette does the same job, with four tasks a stream and a patch of uvicorn's signal handler;
    here one loop waits for outputs and silence alike.)
    """

    media_type = "text/event-stream"

    def __init__(self, generation: Generation, events: AsyncIterator[bytes]) -> None:
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._generation = generation
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def body(data: bytes, more: bool = True) -> None:
            await send({"type": "http.response.body", "body": data, "more_body": more})

        with self._generation as generation:
            generation.watch(receive)
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            try:
                async for data in self._events:
                    await body(data or b": keep-alive\n\n")
            except ClientGone:
                raise
            except Exception as error:
                if not isinstance(error, ApiError):
                    LOG.exception("request %s failed in mid-stream", record_of(scope).request_id)
                await body(event(error_body(describe(error))))
            await body(DONE, more=False)
