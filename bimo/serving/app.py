"""`create_app`: a backend as an OpenAI-compatible HTTP application with a web page. `serve`: the same, running.

    app = create_app(LocalBackend.load("smollm2"), api_key="...")        # and embedder=Embedder.load("minilm")
    exit_code = serve(lambda: LocalBackend.load("smollm2"), port=8000, on_ready=print)

Layers, outermost first: Observer (id, log, metrics, headers, the last except) - CORS (only when asked for) - Guard
(host, key) - routes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from bimo.backends.base import Backend
from bimo.errors import CapacityError, ModelNotFoundError, UsageError
from bimo.serving.errors import ApiError, error_response, json_response
from bimo.serving.limits import LOOPBACK_HOSTS, Guard, check_bind, is_loopback
from bimo.serving.observe import Observer
from bimo.serving.pages import SECURITY_HEADERS, page_routes
from bimo.serving.routes import api_router, openapi_document
from bimo.serving.server import bracketed, open_socket, run
from bimo.serving.service import Service

if TYPE_CHECKING:
    from bimo.backends.embedding import Embedder

__all__ = ["MAX_BODY_BYTES", "MAX_QUEUE", "create_app", "serve"]

MAX_BODY_BYTES = 4 << 20  # a context of 256k tokens as text is about 1 MB
MAX_QUEUE = 256  # sequences inside at once, running and waiting
KEEP_ALIVE = 15.0  # seconds; proxies cut silent connections at 30 or 60


def create_app(
    backend: Backend | None,
    *,
    api_key: str | None = None,
    model_name: str | None = None,
    max_body_bytes: int = MAX_BODY_BYTES,
    max_queue: int = MAX_QUEUE,
    cors_origins: Sequence[str] = (),
    allowed_hosts: Sequence[str] | None = None,
    keep_alive: float = KEEP_ALIVE,
    embedder: Embedder | None = None,
) -> FastAPI:
    """The application; `app.state.service.attach(backend)` makes one created with None answer.

    backend        what writes; None beside an embedder: only embeddings are served
    api_key        the bearer key everything but the page and /health needs; None: no key
    model_name     the name clients use; None: the last part of the reference the model was loaded from
    max_body_bytes larger bodies get 413; max_queue: sequences inside at once, more get 429
    cors_origins   web origins that may call the API from a browser; none by default
    allowed_hosts  Host headers answered, without ports ("[::1]" for IPv6); None: any
    keep_alive     seconds of silence in a stream after which a comment is sent
    embedder       what /v1/embeddings asks
    """
    app = FastAPI(title="bimo", openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False)
    app.state.service = Service(
        model_name=model_name, max_queue=max_queue, max_body_bytes=max_body_bytes, keep_alive=keep_alive
    )
    if models := [model for model in (backend, embedder) if model is not None]:
        app.state.service.attach(*models)
    app.include_router(api_router())

    async def openapi(http: HttpRequest) -> Response:
        service = app.state.service
        names = (model_name, None) if not service.ready else service.names
        return json_response(
            openapi_document(
                app,
                with_key=api_key is not None,
                model_name=names[0],
                embedder_name=names[1],
                adapters=service.adapters,
            )
        )

    app.add_route("/openapi.json", openapi, include_in_schema=False)
    app.routes.extend(page_routes())
    for kind in (ApiError, UsageError, CapacityError, ModelNotFoundError, HTTPException):
        app.add_exception_handler(kind, _refuse)
    app.add_middleware(Guard, api_key=api_key, allowed_hosts=allowed_hosts)
    if cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(cors_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["authorization", "content-type", "x-request-id"],
            expose_headers=["x-request-id", "retry-after"],
        )
    app.add_middleware(Observer, metrics=app.state.service.metrics, headers=SECURITY_HEADERS)
    return app


async def _refuse(_: HttpRequest, error: Exception) -> Response:
    return error_response(error)


def serve(
    backend_factory: Callable[[], Backend | Embedder],
    host: str = "127.0.0.1",
    port: int = 8000,
    api_key: str | None = None,
    *,
    on_ready: Callable[[str], None] | None = None,
    on_listen: Callable[[str], None] | None = None,
    allowed_hosts: Sequence[str] | None = None,
    grace: float = 5.0,
    embedder_factory: Callable[[], Embedder] | None = None,
    **settings: Any,
) -> int:
    """Serve until a signal; returns the exit code: 0 after SIGTERM, 130 after SIGINT (Ctrl-C).

    backend_factory  makes the backend, or an embedder, which is then served alone; called in a thread while the socket
                     already answers
    embedder_factory makes the embedder that is served beside the backend
    port             0 takes any free one
    on_listen, on_ready  get the address, e.g. "http://127.0.0.1:8000", when the socket is open, and when the model is
                     loaded (called on the loading thread)
    allowed_hosts    None: on a loopback address only loopback names (against DNS rebinding), else any
    grace            seconds that answers under way may take after the first signal; a second signal ends it
    settings         the rest of `create_app`'s: model_name, max_body_bytes, max_queue, cors_origins, keep_alive

    Raises UsageError for an address that cannot be bound, and whatever `backend_factory` raises.
    """
    check_bind(host, api_key)
    if allowed_hosts is None and is_loopback(host):
        allowed_hosts = sorted(LOOPBACK_HOSTS | {bracketed(host)})
    app = create_app(None, api_key=api_key, allowed_hosts=allowed_hosts, **settings)
    listener = open_socket(host, port)
    address = f"http://{bracketed(host)}:{listener.getsockname()[1]}"

    def tell(whom: Callable[[str], None] | None) -> None:
        if whom is not None:
            whom(address)

    return run(
        app,
        app.state.service,
        [backend_factory, *([embedder_factory] if embedder_factory else [])],
        listener,
        on_listen=lambda: tell(on_listen),
        on_ready=lambda: tell(on_ready),
        grace=grace,
    )
