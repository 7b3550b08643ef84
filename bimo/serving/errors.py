"""Every refusal in OpenAI's shape: `{"error": {"message", "type", "param", "code"}}`.

`ApiError` is what handlers raise; `describe` turns anything raised below (the tree in `bimo.errors`, Starlette's own
HTTP errors) into one. Codes follow OpenAI's where it has one:

    400 invalid_json, unknown_parameter, missing_required_parameter, invalid_type, invalid_value, unsupported_value,
        unsupported_combination, context_length_exceeded          type invalid_request_error
    401 invalid_api_key                                           type authentication_error
    404 model_not_found, not_found · 405 method_not_allowed · 408 request_timeout
    413 body_too_large · 415 unsupported_media_type · 421 host_not_allowed
                                                                  type invalid_request_error
    429 queue_full                                                type rate_limit_error
    500 internal_error · 503 model_loading, shutting_down         type server_error
"""

from __future__ import annotations

import json
import math
from http import HTTPStatus
from typing import Any

from starlette.exceptions import HTTPException
from starlette.responses import Response

from bimo.errors import BimoError, CapacityError, ContextLengthError, ModelNotFoundError, UsageError

__all__ = ["ApiError", "describe", "error_body", "error_response", "json_response", "to_json"]

_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
_CODES = {
    404: "not_found",
    405: "method_not_allowed",
    408: "request_timeout",
    413: "body_too_large",
    415: "unsupported_media_type",
    429: "queue_full",
    500: "internal_error",
}


class ApiError(BimoError):
    """A refusal with its HTTP status; `str(error)` is the message."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code if code is not None else _CODES.get(status, "invalid_value")
        self.headers = headers or {}

    @property
    def type(self) -> str:
        """OpenAI's class of error; its clients choose the exception by status, people read this."""
        return _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")


def describe(error: BaseException) -> ApiError:
    """What to tell the client. Anything not raised on purpose is a 500 without a word of its text."""
    match error:
        case ApiError():
            return error
        case ContextLengthError():
            return ApiError(400, str(error), param=error.param, code="context_length_exceeded")
        case UsageError():
            return ApiError(400, str(error), param=error.param, code="invalid_value")
        case ModelNotFoundError():
            return ApiError(404, str(error), param="model", code="model_not_found")
        case CapacityError():
            wait = str(max(1, math.ceil(error.retry_after)))
            return ApiError(429, str(error), headers={"Retry-After": wait})
        case HTTPException():
            detail = str(error.detail)
            if detail == HTTPStatus(error.status_code).phrase:  # Starlette's own, raised without a sentence
                detail = _sentence(error.status_code)
            return ApiError(error.status_code, detail, headers=dict(error.headers or {}))
        case _:
            return ApiError(500, "the server failed to answer this request; its log says why under the x-request-id")


def _sentence(status: int) -> str:
    if status == 404:
        return "no such address; /openapi.json lists what is served"
    if status == 405:
        return "this address does not answer that method; the Allow header lists those it does"
    return HTTPStatus(status).phrase.lower()


def error_body(error: ApiError) -> dict[str, Any]:
    """The JSON object of a refusal."""
    return {"error": {"message": str(error), "type": error.type, "param": error.param, "code": error.code}}


def error_response(error: BaseException) -> Response:
    """The HTTP response of a refusal."""
    told = describe(error)
    return json_response(error_body(told), status=told.status, headers=told.headers)


def to_json(value: Any) -> bytes:
    """Compact UTF-8 JSON. An infinity, which JSON has not, is the caller's bug: ValueError."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode("utf-8", "replace")


def json_response(value: Any, *, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """A JSON response; answers are never stored by caches on the way."""
    return Response(
        to_json(value), status, headers={"cache-control": "no-store", **(headers or {})}, media_type="application/json"
    )
