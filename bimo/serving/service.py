"""What the handlers share: the backend, the names it is served under, the limits, the generations under way."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from pathlib import PurePath
from typing import TYPE_CHECKING, Any, TypeGuard, TypeVar

from starlette.requests import Request as HttpRequest

from bimo import __version__
from bimo.backends.base import Backend, BackendInfo, BackendStats, EmbedderInfo
from bimo.engine.request import Request
from bimo.errors import UsageError
from bimo.serving.errors import ApiError
from bimo.serving.limits import Admission
from bimo.serving.observe import Metrics, RequestRecord
from bimo.serving.streaming import Generation
from bimo.serving.vocabulary import Vocabulary

if TYPE_CHECKING:
    from bimo.backends.embedding import Embedder  # it needs NumPy, for which the open port shall not wait

__all__ = ["Service", "service_of"]

OFF_LOOP = 4096  # characters; encoding fewer takes less time than handing them to a thread
Result = TypeVar("Result")


class Service:
    """A backend, an embedder, or both, as seen by HTTP. Made while they may still load: until `attach`, requests get a
    503."""

    def __init__(self, *, model_name: str | None, max_queue: int, max_body_bytes: int, keep_alive: float) -> None:
        self.max_body_bytes = max_body_bytes
        self.keep_alive = keep_alive
        self.admission = Admission(max_queue)
        self.embeddings = Admission(max_queue)  # requests: their texts take turns, and hold up no answer
        self.metrics = Metrics(self._stats)
        self.stopping = False
        self._model_name = model_name
        self._backend: Backend | None = None
        self._embedder: Embedder | None = None
        self._vocabulary: Vocabulary | None = None
        self._generations: set[Generation] = set()

    def attach(self, *models: Backend | Embedder) -> None:
        """The models are loaded: answer from now on. Safe to call from any thread.

        Raises UsageError for two models of one name.
        """
        writing: list[Any] = [model for model in models if not _makes_embeddings(model)]
        backend: Backend | None = next(iter(writing), None)
        embedder = next((model for model in models if _makes_embeddings(model)), None)
        if backend is not None and embedder is not None:
            name = self._model_name or _short_name(backend.info().model)
            if name == _short_name(embedder.info().model):
                raise UsageError(f"both models would be called {name!r}: give the one that writes another name with "
                                 "--model-name", "model_name")  # fmt: skip
        if backend is not None and (self._model_name or _short_name(backend.info().model)) in backend.info().adapters:
            raise UsageError("an adapter has the name that its base is served under: give one of them another name",
                             "adapters")  # fmt: skip
        self._vocabulary = None if backend is None else Vocabulary(backend.tokenizer)
        self._backend, self._embedder = backend, embedder

    @property
    def ready(self) -> bool:
        return (self._backend is not None or self._embedder is not None) and not self.stopping

    def check_ready(self) -> None:
        """ApiError 503 before the models are loaded, and while the server stops."""
        if self.stopping:
            raise ApiError(503, "the server is stopping", code="shutting_down")
        if not self.ready:
            wait = {"Retry-After": "1"}
            raise ApiError(503, "the model is still loading; ask again in a moment", code="model_loading", headers=wait)

    @property
    def backend(self) -> Backend:
        """What writes, or ApiError: 503 while it is not there, 404 where only embeddings are served."""
        self.check_ready()
        if self._backend is None:
            raise ApiError(404, f"{self.model_name!r} makes embeddings and writes no text: ask at /v1/embeddings, "
                           "or serve a model that writes", param="model", code="model_not_found")  # fmt: skip
        return self._backend

    @property
    def embedder(self) -> Embedder:
        """What makes embeddings, or ApiError 503 or 404."""
        self.check_ready()
        if self._embedder is None:
            raise ApiError(404, "no model here makes embeddings: start the server with --embeddings and an encoder, "
                           "such as minilm", param="model", code="model_not_found")  # fmt: skip
        return self._embedder

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
        self.check_ready()
        return _short_name((self._backend or self.embedder).info().model)

    @property
    def embedder_name(self) -> str:
        """The name clients use for the model that makes embeddings."""
        return self.model_name if self._backend is None else _short_name(self.embedder.info().model)

    @property
    def names(self) -> tuple[str | None, str | None]:
        """Of what writes and of what makes embeddings, where there is one."""
        self.check_ready()
        return self.model_name if self._backend else None, self.embedder_name if self._embedder else None

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names that requests may give instead of the model's, to have an answer by an adapter of it."""
        return () if self._backend is None else self._backend.info().adapters

    def adapter(self, name: str | None) -> str | None:
        """The adapter that a request names as its model; None: the model as it is. Check the name first."""
        return name if name in self.adapters else None

    def cards(self) -> list[dict[str, Any]]:
        """What /v1/models lists, the model that writes first, with its adapters."""
        self.check_ready()
        cards = [_card(self.model_name, self._backend.info())] if self._backend else []
        cards += [cards[0] | {"id": name, "parent": self.model_name} for name in self.adapters]
        return cards + ([_card(self.embedder_name, self._embedder.info())] if self._embedder else [])

    @property
    def fingerprint(self) -> str:
        """What else an answer depends on, OpenAI's `system_fingerprint`."""
        return f"bimo-{__version__}-{self.backend.info().dtype}"

    def check_model(self, name: str | None) -> None:
        """ApiError 404 unless `name` is the served model's or an adapter's (or absent)."""
        served = (self.model_name, *self.adapters)
        if name is not None and name not in served:
            raise ApiError(404, f"no model {name[:200]!r} here; this server has {' and '.join(map(repr, served))}",
                           param="model", code="model_not_found")  # fmt: skip

    def check_token_ids(self, ids: Sequence[int], param: str, size: int | None = None) -> None:
        """ApiError 400 for an id the model has no token for; `size`: of a vocabulary that is not the backend's."""
        size = self.backend.info().vocab_size if size is None else size
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


def _makes_embeddings(model: Backend | Embedder) -> TypeGuard[Embedder]:
    return isinstance(model.info(), EmbedderInfo)


def _card(name: str, info: BackendInfo | EmbedderInfo) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": info.created,
        "owned_by": "bimo",
        "max_model_len": info.context_length,
    }


def _short_name(reference: str) -> str:
    kind, colon, name = reference.partition(":")
    return name if colon and len(kind) > 1 else PurePath(kind).name  # "hf:org/name", or a name or path


def service_of(request: HttpRequest) -> Service:
    """The service behind this request's application."""
    service = request.app.state.service
    assert isinstance(service, Service)
    return service
