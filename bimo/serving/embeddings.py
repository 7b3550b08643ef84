"""POST /v1/embeddings, as OpenAI has it: texts or token ids become vectors.

The official client asks for base64, which is a third of the size of numbers in JSON. Requests take turns batch by
batch, so that one text does not wait for two thousand; what nobody waits for any more is not computed.
"""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from bimo.serving.body import read_model
from bimo.serving.errors import ApiError, to_json
from bimo.serving.observe import ClientGone, record_of
from bimo.serving.schema import EmbeddingRequest
from bimo.serving.service import Service, service_of

if TYPE_CHECKING:
    from bimo.backends.embedding import Embedder, Ids

__all__ = ["create_embeddings"]


async def create_embeddings(http: HttpRequest) -> Response:
    """The handler: check, encode, compute batch by batch, answer in the inputs' order."""
    service = service_of(http)
    embedder = service.embedder
    service.embeddings.check(0)
    body = await read_model(http, EmbeddingRequest, service.max_body_bytes)
    _check(service, embedder, body)
    service.embeddings.enter(1)
    try:
        given = await service.off_loop(_size(body), lambda: _encode(service, embedder, body))
        num_cut = _excess(embedder, given, allowed=bool(body.truncate))
        rows = embedder.cut(given)
        vectors = await _compute(http, service, embedder, rows)
        if body.dimensions is not None:
            vectors = [_shortened(vector, body.dimensions) for vector in vectors]
        num_tokens = record_of(http.scope).prompt_tokens = sum(map(len, rows))
        tail = {
            "model": service.embedder_name,
            "usage": {
                "prompt_tokens": num_tokens,
                "total_tokens": num_tokens,
                "prompt_tokens_details": {"cached_tokens": 0, "truncated_tokens": num_cut},
            },
        }
        as_text = body.encoding_format == "base64"
        content = await service.off_loop(
            len(vectors) * len(vectors[0]), lambda: _written(vectors, tail, as_text=as_text)
        )
    finally:
        service.embeddings.leave(1)
    return Response(content, headers={"cache-control": "no-store"}, media_type="application/json")


def _check(service: Service, embedder: Embedder, body: EmbeddingRequest) -> None:
    name, info = service.embedder_name, embedder.info()
    if body.model is not None and body.model != name:
        raise ApiError(404, f"{body.model[:200]!r} makes no embeddings here; this server has {name!r} for them",
                       param="model", code="model_not_found")  # fmt: skip
    if body.dimensions is not None and body.dimensions > info.dimensions:
        raise ApiError(400, f"dimensions: {name!r} has {info.dimensions}, not {body.dimensions}",
                       param="dimensions", code="invalid_value")  # fmt: skip


def _size(body: EmbeddingRequest) -> int:
    given = body.input if isinstance(body.input, list) else [body.input]
    return sum(len(one) if isinstance(one, str | list) else 1 for one in given)


def _encode(service: Service, embedder: Embedder, body: EmbeddingRequest) -> Sequence[Ids]:
    """The inputs as ids, however long."""
    given: Any = body.input
    if isinstance(given, str):
        return embedder.encode([given])
    if isinstance(given[0], str):
        return embedder.encode(given)
    several = isinstance(given[0], list)
    lists, size = (given if several else [given]), embedder.info().vocab_size
    for number, ids in enumerate(lists):
        service.check_token_ids(ids, f"input[{number}]" if several else "input", size)
    return list(lists)


def _excess(embedder: Embedder, rows: Sequence[Ids], *, allowed: bool) -> int:
    """How many tokens are beyond the context; ApiError 400 unless that is `allowed`."""
    limit = embedder.info().context_length
    for number, row in enumerate(rows):
        if len(row) > limit and not allowed:
            raise ApiError(
                400,
                f"input {number} has {len(row)} tokens, the model reads {limit}: shorten it, or ask for its beginning "
                "(truncate=true)",
                param="input",
                code="context_length_exceeded",
            )
    return sum(max(0, len(row) - limit) for row in rows)


async def _compute(http: HttpRequest, service: Service, embedder: Embedder, rows: Sequence[Any]) -> list[Any]:
    """A vector (D,) of each; ClientGone when the client left, ApiError 503 when the server stops."""
    vectors: list[Any] = [None] * len(rows)
    for places in embedder.batches(rows):
        if await http.is_disconnected():
            raise ClientGone
        service.check_ready()
        found: asyncio.Future[Any] = asyncio.wrap_future(embedder.submit([rows[place] for place in places]))
        for place, vector in zip(places, await found, strict=True):
            vectors[place] = vector
    return vectors


def _shortened(vector: Any, dimensions: int) -> Any:
    """The first numbers, scaled to length 1 again (arXiv:2205.13147 trains models for this)."""
    kept = vector[:dimensions]
    length = float(kept @ kept) ** 0.5
    return kept / length if length else kept


def _written(vectors: Sequence[Any], tail: dict[str, Any], *, as_text: bool) -> bytes:
    """The body of the answer, vector by vector: a million numbers in one call would hold the interpreter for a second,
    and with it everybody's streams."""
    data = [
        to_json({
            "object": "embedding",
            "index": index,
            "embedding": base64.b64encode(vector.astype("<f4").tobytes()).decode() if as_text else vector.tolist(),
        })
        for index, vector in enumerate(vectors)
    ]  # fmt: skip
    return b'{"object":"list","data":[' + b",".join(data) + b"]," + to_json(tail)[1:]
