"""What operators see: a request id on every response, one log line a request, Prometheus metrics.

Log lines go to the logger `bimo.access`, one a request, as `name=value` pairs (also attached to the record as
`record.request`); no prompt, answer, key or raw path is ever logged. Metrics, in a registry of their own:

    bimo_requests_running, bimo_requests_waiting            gauges: sequences in the engine
    bimo_prompt_tokens_total, bimo_cached_tokens_total      counters: prompt tokens computed, and found in the cache
    bimo_generation_tokens_total                            counter
    bimo_engine_steps_total, bimo_preemptions_total         counters
    bimo_drafted_tokens_total, bimo_accepted_tokens_total   counters: speculation's guesses, and those found true
    bimo_kv_cache_used_tokens, bimo_kv_cache_total_tokens   gauges
    bimo_time_to_first_token_seconds                        histogram: from the request's arrival
    bimo_inter_token_seconds                                histogram: between tokens of one sequence
    bimo_request_seconds                                    histogram: whole generations, arrival to last token
    bimo_http_requests_total{method,route,status}           counter; status 499: the client left
    process_*                                               memory, CPU, open files of the server's process
"""

from __future__ import annotations

import logging
import re
import time
import uuid
from collections.abc import Callable, Iterator, MutableMapping
from dataclasses import dataclass, field
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from bimo.backends.base import BackendStats
from bimo.serving.errors import describe, error_response

__all__ = ["ClientGone", "Metrics", "Observer", "RequestRecord", "record_of"]

ACCESS = logging.getLogger("bimo.access")
LOG = logging.getLogger("bimo.serving")
CLIENT_GONE = 499  # nginx's number for a client that left; never sent
_SANE_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_FAST = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60)
_TOKEN = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2)
_WHOLE = (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60, 120, 300, 600)


class ClientGone(Exception):
    """The client left before its answer was complete. There is nobody to tell."""


@dataclass(slots=True)
class RequestRecord:
    """What is remembered of a request while it is served; handlers add the token counts."""

    request_id: str
    method: str
    started: float = field(default_factory=time.perf_counter)  # seconds, arbitrary zero
    status: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0

    def seconds(self) -> float:
        """Since arrival."""
        return time.perf_counter() - self.started


def record_of(scope: MutableMapping[str, Any]) -> RequestRecord:
    """The record the observer made for this request."""
    record = scope["bimo.record"]
    assert isinstance(record, RequestRecord)
    return record


class Observer:
    """Outermost ASGI layer: id, safe headers, log line, counters; and the last stand against exceptions."""

    def __init__(self, app: ASGIApp, *, metrics: Metrics, headers: dict[str, str]) -> None:
        self._app = app
        self._metrics = metrics
        self._headers = headers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = next((value for name, value in scope["headers"] if name == b"x-request-id"), b"").decode("latin-1")
        record = RequestRecord(given if _SANE_ID.fullmatch(given) else uuid.uuid4().hex, scope["method"])
        scope["bimo.record"] = record

        async def send_observed(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = record.request_id
                for name, value in self._headers.items():
                    headers.setdefault(name, value)
            await send(message)

        try:
            await self._app(scope, receive, send_observed)
        except ClientGone:
            record.status = CLIENT_GONE
        except Exception as error:
            LOG.exception("request %s failed", record.request_id)
            if not record.status:
                await error_response(describe(error))(scope, receive, send_observed)
        finally:
            self._note(scope, record)

    def _note(self, scope: Scope, record: RequestRecord) -> None:
        route = getattr(scope.get("route"), "path", "unmatched")
        method = record.method if record.method in _METHODS else "other"
        self._metrics.requests.labels(method, route, str(record.status or CLIENT_GONE)).inc()
        values = {
            "id": record.request_id,
            "method": method,
            "route": route,
            "status": record.status or CLIENT_GONE,
            "prompt_tokens": record.prompt_tokens,
            "completion_tokens": record.completion_tokens,
            "ms": round(1000 * record.seconds(), 1),
        }
        ACCESS.info(" ".join(f"{name}={value}" for name, value in values.items()), extra={"request": values})


class Metrics:
    """The server's metrics. `stats` is asked at scrape time; None while the model loads."""

    def __init__(self, stats: Callable[[], BackendStats | None]) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter("bimo_http_requests", "Requests answered, by status",
                                ("method", "route", "status"), registry=self.registry)  # fmt: skip
        self.first_token = Histogram("bimo_time_to_first_token_seconds", "From arrival to the first token",
                                     buckets=_FAST, registry=self.registry)  # fmt: skip
        self.inter_token = Histogram("bimo_inter_token_seconds", "Between tokens of one sequence",
                                     buckets=_TOKEN, registry=self.registry)  # fmt: skip
        self.whole = Histogram("bimo_request_seconds", "From arrival to the last token",
                               buckets=_WHOLE, registry=self.registry)  # fmt: skip
        self.registry.register(_EngineCollector(stats))
        ProcessCollector(registry=self.registry)

    def exposition(self) -> bytes:
        """Prometheus' text format."""
        return generate_latest(self.registry)


class _EngineCollector(Collector):
    """The backend's own counters, read when someone asks, so that serving never counts twice."""

    _GAUGES = (
        ("bimo_requests_running", "running", "Sequences being computed"),
        ("bimo_requests_waiting", "waiting", "Sequences waiting for room"),
        ("bimo_kv_cache_used_tokens", "kv_used_tokens", "Tokens held in the KV cache"),
        ("bimo_kv_cache_total_tokens", "kv_total_tokens", "Tokens the KV cache has room for"),
    )
    _COUNTERS = (
        ("bimo_prompt_tokens", "prompt_tokens", "Prompt tokens computed"),
        ("bimo_cached_tokens", "cached_tokens", "Prompt tokens found in the prefix cache instead"),
        ("bimo_generation_tokens", "generation_tokens", "Tokens generated"),
        ("bimo_engine_steps", "steps", "Forward passes"),
        ("bimo_preemptions", "preemptions", "Sequences set back because the KV cache was full"),
        ("bimo_drafted_tokens", "drafted_tokens", "Tokens guessed by speculation"),
        ("bimo_accepted_tokens", "accepted_tokens", "Guessed tokens that were found true"),
    )

    def __init__(self, stats: Callable[[], BackendStats | None]) -> None:
        self._stats = stats

    def collect(self) -> Iterator[Metric]:
        stats = self._stats() or BackendStats()
        for name, key, text in self._GAUGES:
            yield GaugeMetricFamily(name, text, value=getattr(stats, key))
        for name, key, text in self._COUNTERS:
            yield CounterMetricFamily(name, text, value=getattr(stats, key))
