"""The addresses of the API, each with what it takes and answers; /openapi.json is made from these lines.

Handlers read and check bodies themselves (`body.read_model`), because refusals must have OpenAI's shape, name the field
and be bounded in size before parsing; so the request schemas are put into the document here.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from fastapi import APIRouter, FastAPI
from fastapi.openapi.utils import get_openapi
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from bimo import __version__
from bimo.serving import answers
from bimo.serving.chat import create_chat_completion
from bimo.serving.completions import create_completion
from bimo.serving.embeddings import create_embeddings
from bimo.serving.errors import ApiError, json_response
from bimo.serving.schema import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    EmbeddingRequest,
    TokenizeRequest,
)
from bimo.serving.service import service_of
from bimo.serving.tokens import detokenize, tokenize

__all__ = ["api_router", "openapi_document"]

Handler = Callable[[HttpRequest], Awaitable[Response]]
_WRITING: list[type[BaseModel]] = [ChatRequest, CompletionRequest, TokenizeRequest, DetokenizeRequest]
_REFERENCE = "#/components/schemas/{model}"
_NULL = {"type": "null"}
_REFUSALS = {
    400: "the request is wrong; `param` names the field",
    401: "no key, or a wrong one",
    404: "no such model",
    408: "the body came too slowly",
    413: "the body is too large",
    415: "the body is not application/json in UTF-8",
    421: "the Host header is not this server's",
    429: "the queue is full; Retry-After says when to try again",
    500: "the server's fault; its log has the x-request-id",
    503: "the model is loading, or the server is stopping",
}


async def health(http: HttpRequest) -> Response:
    """200 when requests are answered, 503 before and after."""
    service = service_of(http)
    service.check_ready()
    return json_response({"status": "ok", "model": service.model_name})


async def version(http: HttpRequest) -> Response:
    """bimo's version."""
    return json_response({"version": __version__})


async def metrics(http: HttpRequest) -> Response:
    """Prometheus' text format; `observe` lists the names."""
    return Response(service_of(http).metrics.exposition(), headers={"content-type": CONTENT_TYPE_LATEST})


async def list_models(http: HttpRequest) -> Response:
    """What is served."""
    return json_response({"object": "list", "data": service_of(http).cards()})


async def get_model(http: HttpRequest) -> Response:
    """One model by its name."""
    name, cards = http.path_params["model"], service_of(http).cards()
    for card in cards:
        if card["id"] == name:
            return json_response(card)
    served = " and ".join(repr(card["id"]) for card in cards)
    raise ApiError(404, f"no model {name[:200]!r} here; this server has {served}",
                   param="model", code="model_not_found")  # fmt: skip


def api_router() -> APIRouter:
    """All routes of the API."""
    router = APIRouter(redirect_slashes=False)

    def post(
        path: str,
        handler: Handler,
        body: type[BaseModel],
        answer: type[BaseModel],
        chunk: type[BaseModel] | None = None,
        *,
        limited: bool = False,
    ) -> None:
        content = {"text/event-stream": {"itemSchema": _event_schema(chunk)}} if chunk else {}
        statuses = [400, 401, 404, 408, 413, 415, 421, *([429] if chunk or limited else []), 500, 503]
        schema = {"$ref": _REFERENCE.format(model=body.__name__)}
        router.add_api_route(
            path,
            handler,
            methods=["POST"],
            response_model=None,
            responses={200: {"model": answer, "content": content, "description": "the answer"}, **_refusals(statuses)},
            openapi_extra={"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}},
        )

    def get(path: str, handler: Handler, answer: type[BaseModel] | None, statuses: list[int], **extra: Any) -> None:
        ok: dict[str, Any] = {"description": "the answer"} | ({"model": answer} if answer else {})
        if answer is None:
            ok["content"] = {"text/plain": {"schema": {"type": "string"}}}
        router.add_api_route(
            path,
            handler,
            methods=["GET"],
            response_model=None,
            response_class=Response,
            responses={200: ok, **_refusals(statuses)},
            openapi_extra=extra or None,
        )

    post(
        "/v1/chat/completions", create_chat_completion, ChatRequest, answers.ChatCompletion, answers.ChatCompletionChunk
    )
    post("/v1/completions", create_completion, CompletionRequest, answers.Completion, answers.Completion)
    post("/v1/embeddings", create_embeddings, EmbeddingRequest, answers.EmbeddingList, limited=True)
    post("/tokenize", tokenize, TokenizeRequest, answers.Tokenized)
    post("/detokenize", detokenize, DetokenizeRequest, answers.Detokenized)
    get("/v1/models", list_models, answers.ModelList, [401, 421, 500, 503])
    name = {"name": "model", "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
    get("/v1/models/{model:path}", get_model, answers.ModelCard, [401, 404, 421, 500, 503], parameters=[name])
    get("/health", health, answers.Health, [421, 500, 503])
    get("/version", version, answers.Version, [421, 500])
    get("/metrics", metrics, None, [401, 421, 500])
    return router


def _event_schema(chunk: type[BaseModel]) -> dict[str, Any]:
    """One server-sent event (OpenAPI 3.2's `itemSchema`): a chunk or an error as JSON, at last `[DONE]`."""
    kinds = [{"$ref": _REFERENCE.format(model=model.__name__)} for model in (chunk, answers.ErrorAnswer)]
    data = {"type": "string", "contentMediaType": "application/json", "contentSchema": {"anyOf": kinds}}
    return {
        "type": "object",
        "properties": {"data": {"anyOf": [{"const": "[DONE]"}, data]}},
        "required": ["data"],
    }


def _refusals(statuses: list[int]) -> dict[int | str, dict[str, Any]]:
    return {status: {"model": answers.ErrorAnswer, "description": _REFUSALS[status]} for status in statuses}


def openapi_document(
    app: FastAPI,
    *,
    with_key: bool,
    model_name: str | None,
    embedder_name: str | None = None,
    adapters: Sequence[str] = (),
) -> dict[str, Any]:
    """/openapi.json: what FastAPI knows of the routes, the request bodies with the models that are served (None: not
    there, or still loading), and the key when one is set."""
    document = get_openapi(
        title="bimo",
        version=__version__,
        description="An OpenAI-compatible server. Unknown fields are refused by name, never ignored.",
        routes=app.routes,
    )
    models: list[Any] = [(model, "validation") for model in (*_WRITING, EmbeddingRequest)]
    models.append((answers.ChatCompletionChunk, "serialization"))
    _, schemas = models_json_schema(models, ref_template=_REFERENCE)
    components = document.setdefault("components", {})
    components.setdefault("schemas", {}).update(schemas["$defs"])
    writing, embedding = [model_name, *adapters], [embedder_name]
    for names, bodies in ((writing, _WRITING), (embedding, [EmbeddingRequest])):
        for body in bodies if names[0] is not None else ():
            which = {"const": names[0]} if len(names) == 1 else {"enum": names}
            components["schemas"][body.__name__]["properties"]["model"] |= {"anyOf": [which, _NULL]}
    if with_key:
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        for operations in document["paths"].values():
            for operation in operations.values():
                if "401" in operation["responses"]:
                    operation["security"] = [{"key": []}]
    return document
