"""What the handlers share: the backend, the names it is served under, the limits, the generations under way."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from pathlib import PurePath
from typing import TypeVar

from starlette.requests import Request as HttpRequest

from bimo import __version__
from bimo.backends.base import Backend, BackendStats
from bimo.engine.request import Request
from bimo.serving.errors import ApiError
from bimo.serving.limits import Admission
from bimo.serving.observe import Metrics, RequestRecord
from bimo.serving.streaming import Generation
from bimo.serving.vocabulary import Vocabulary

__all__ = ["Service", "service_of"]

OFF_LOOP = 4096  # characters; encoding fewer takes less time than handing them to a thread
Result = TypeVar("Result")


class Service:
    """One backend as seen by HTTP. Made while the model may still load: until `attach`, requests get a 503."""

    def __init__(self, *, model_name: str | None, max_queue: int, max_body_bytes: int, keep_alive: float) -> None:
        self.max_body_bytes = max_body_bytes
        self.keep_alive = keep_alive
        self.admission = Admission(max_queue)
        self.metrics = Metrics(self._stats)
        self.stopping = False
        self._model_name = model_name
        self._backend: Backend | None = None
        self._vocabulary: Vocabulary | None = None
        self._generations: set[Generation] = set()

    def attach(self, backend: Backend) -> None:
        """The model is loaded: answer from now on. Safe to call from any thread."""
        self._vocabulary = Vocabulary(backend.tokenizer)
        self._backend = backend

    @property
    def ready(self) -> bool:
        return self._backend is not None and not self.stopping

    @property
    def backend(self) -> Backend:
        """The backend, or ApiError 503."""
        if self.stopping:
            raise ApiError(503, "the server is stopping", code="shutting_down")
        if self._backend is None:
            wait = {"Retry-After": "1"}
            raise ApiError(503, "the model is still loading; ask again in a moment", code="model_loading", headers=wait)
        return self._backend

    def check_open(self) -> None:
        """ApiError 503 or CapacityError for what would be refused whatever is in its body: before reading it."""
        _ = self.backend
        self.admission.check(0)

    @property
    def vocabulary(self) -> Vocabulary:
        """Tokens as OpenAI shows them."""
        assert self._vocabulary is not None, "ask for the backend first"
        return self._vocabulary

    @property
    def model_name(self) -> str:
        """The name clients use: the one given, or the reference's last part (a server does not tell its paths)."""
        if self._model_name is not None:
            return self._model_name
        kind, colon, name = self.backend.info().model.partition(":")
        return name if colon and len(kind) > 1 else PurePath(kind).name  # "hf:org/name", or a name or path

    @property
    def fingerprint(self) -> str:
        """What else an answer depends on, OpenAI's `system_fingerprint`."""
        return f"bimo-{__version__}-{self.backend.info().dtype}"

    def check_model(self, name: str | None) -> None:
        """ApiError 404 unless `name` is the served model's (or absent)."""
        served = self.model_name
        if name is not None and name != served:
            raise ApiError(404, f"no model {name[:200]!r} here; this server has {served!r}",
                           param="model", code="model_not_found")  # fmt: skip

    def check_token_ids(self, ids: Sequence[int], param: str) -> None:
        """ApiError 400 for an id the model has no token for."""
        size = self.backend.info().vocab_size
        if ids and max(ids) >= size:
            raise ApiError(400, f"{param}: {max(ids)} is no token id, this model has {size} (0 to {size - 1})",
                           param=param, code="invalid_value")  # fmt: skip

    async def off_loop(self, size: int, work: Callable[[], Result]) -> Result:
        """Run `work` on `size` characters: in a thread when it would hold up everybody else's streams."""
        return await asyncio.to_thread(work) if size > OFF_LOOP else work()

    def start(self, requests: Sequence[Request], record: RequestRecord) -> Generation:
        """Admit and submit; CapacityError, ContextLengthError or UsageError when refused."""
        backend = self.backend
        generation = Generation(backend, requests, record=record, metrics=self.metrics, on_end=self._ended)
        self.admission.enter(generation.width)
        self._generations.add(generation)
        generation.submit()
        return generation

    def _ended(self, generation: Generation) -> None:
        self._generations.discard(generation)
        self.admission.leave(generation.width)

    def stop(self) -> None:
        """Give up every answer under way; their clients are told."""
        self.stopping = True
        for generation in list(self._generations):
            generation.end(ApiError(503, "the server is stopping and gave this answer up", code="shutting_down"))

    def _stats(self) -> BackendStats | None:
        return None if self._backend is None else self._backend.stats()


def service_of(request: HttpRequest) -> Service:
    """The service behind this request's application."""
    service = request.app.state.service
    assert isinstance(service, Service)
    return service
