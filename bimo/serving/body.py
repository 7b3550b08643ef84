"""From the bytes of a request to a checked model: bounded reading, strict JSON, messages that name the field.

Two parsers look at every body. `pydantic_core.from_json` (Rust) refuses bad UTF-8, lone surrogates, NaN, trailing text
and nesting deeper than about 200; Python's `json` then sees what the first cannot: a name given twice, a number beyond
a double.
"""

from __future__ import annotations

import asyncio
import difflib
import json
import math
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails, from_json
from starlette.requests import ClientDisconnect, Request

from bimo.serving.errors import ApiError

__all__ = ["parse_json", "read_body", "read_model", "validate"]

READ_TIMEOUT = 60.0  # seconds a client may take to send a body
MAX_QUOTE = 80  # characters of the client's own input repeated in a message

Model = TypeVar("Model", bound=BaseModel)


async def read_body(request: Request, limit: int) -> bytes:
    """The whole body, at most `limit` bytes of it, also when no Content-Length was announced.

    Raises ApiError 413 (too large), 408 (too slow), 400 (left early); the 413 closes the connection, so that the
    rest of the body is not read as a next request.
    """
    too_large = ApiError(
        413,
        f"the body may have {limit} bytes: send less, or start the server with a larger limit",
        headers={"Connection": "close"},
    )
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and int(announced[:20]) > limit:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(READ_TIMEOUT):
            async for chunk in request.stream():
                body += chunk
                if len(body) > limit:
                    raise too_large
    except TimeoutError:
        raise ApiError(
            408, f"the body did not arrive within {READ_TIMEOUT:g} seconds", headers={"Connection": "close"}
        ) from None
    except ClientDisconnect:
        raise ApiError(400, "the client left before its request was complete", code="invalid_json") from None
    return bytes(body)


def check_content_type(request: Request) -> None:
    """Only JSON in UTF-8. Refusing text/plain and forms also keeps foreign web pages from posting to a local server:
    a browser sends application/json across sites only after asking, and the answer is no.
    """
    given = request.headers.get("content-type", "")
    kind, *settings = [part.strip().lower() for part in given.split(";")]
    if kind != "application/json" and not (kind.startswith("application/") and kind.endswith("+json")):
        raise ApiError(415, f"the body must be sent as Content-Type: application/json, not {given[:MAX_QUOTE]!r}")
    for setting in settings:
        name, _, value = setting.partition("=")
        if name.strip() == "charset" and value.strip().strip('"') not in ("utf-8", "utf8"):
            raise ApiError(415, f"the body must be UTF-8, not {value[:MAX_QUOTE]!r}")


def parse_json(body: bytes) -> Any:
    """The JSON value in `body`, or ApiError 400 with code invalid_json saying where it went wrong."""
    if not body:
        raise ApiError(400, "the body is empty: send a JSON object", code="invalid_json")
    try:
        from_json(body, allow_inf_nan=False)
        return json.loads(body, object_pairs_hook=_unique_names, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is not valid JSON in UTF-8: {error}", code="invalid_json") from None


def _unique_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in value if names.count(name) > 1)
        raise ValueError(f"the name {twice[:MAX_QUOTE]!r} is given twice in one object")
    return value


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"the number {text[:MAX_QUOTE]} is beyond a double's range")
    return number


def validate(model: type[Model], value: Any) -> Model:
    """`value` as a checked `model`; ApiError 400 about the first thing wrong, naming the field and its neighbour."""
    if not isinstance(value, dict):
        raise ApiError(400, f"the body must be a JSON object, not {_kind(value)}", code="invalid_type")
    try:
        return model.model_validate(value)
    except ValidationError as error:
        problems = error.errors(include_url=False, include_context=True)
        raise _explain(model, value, min(problems, key=_rank)) from None


async def read_model(request: Request, model: type[Model], limit: int) -> Model:
    """Read, parse and check the request's body."""
    check_content_type(request)
    return validate(model, parse_json(await read_body(request, limit)))


def _rank(problem: ErrorDetails) -> int:
    """What explains the rest comes first: a wrong `type` its unknown fields, an unknown name the missing one."""
    if problem["type"] == "literal_error" and problem["loc"][-1] == "type":
        return 0
    return 1 if problem["type"] == "extra_forbidden" else 2


def _explain(model: type[BaseModel], value: Any, problem: ErrorDetails) -> ApiError:
    kind, given = problem["type"], problem.get("input")
    param = _path(value, problem["loc"], missing=kind == "missing")
    if kind == "extra_forbidden":
        name = str(problem["loc"][-1])
        near = difflib.get_close_matches(name, _names(model), n=1) if len(problem["loc"]) == 1 else []
        hint = f"; did you mean {near[0]!r}?" if near else ""
        message = f"unknown field {param[:MAX_QUOTE]!r}: nothing here understands it, so it is not ignored either{hint}"
        return ApiError(400, message, param=param, code="unknown_parameter")
    if kind == "missing":
        return ApiError(400, f"the field {param!r} is required", param=param, code="missing_required_parameter")
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        return _explain_tag(param, problem)
    if kind == "none_required":
        message = f"{param} is not supported and may only be null, not {_quote(given)}"
        return ApiError(400, message, param=param, code="unsupported_value")
    if kind == "literal_error" and ".content[" in param:
        part = param.removesuffix(".type")
        message = f"{part} is a part of type {_quote(given)}: this model reads parts of type 'text' only"
        return ApiError(400, message, param=part, code="unsupported_value")
    code = "invalid_type" if kind.endswith("_type") else "invalid_value"
    message = problem["msg"][:1].lower() + problem["msg"][1:]
    came = "" if ", not " in message else f", not {_quote(given)}"
    return ApiError(400, f"{param}: {message}{came}", param=param, code=code)


def _explain_tag(param: str, problem: ErrorDetails) -> ApiError:
    context = problem.get("ctx", {})
    name = str(context.get("discriminator", "")).strip("'")
    given, expected = context.get("tag"), context.get("expected_tags", "")
    if name.endswith("()"):  # a choice by shape: a string or a list, not by a field
        return ApiError(400, f"{param}: a string or a list was expected, not {_kind(problem.get('input'))}",
                        param=param, code="invalid_type")  # fmt: skip
    param = f"{param}.{name}"
    if given is None:
        return ApiError(400, f"the field {param!r} is required", param=param, code="missing_required_parameter")
    return ApiError(400, f"{param}: expected {expected}, not {_quote(given)}", param=param, code="unsupported_value")


def _path(value: Any, location: tuple[int | str, ...], *, missing: bool = False) -> str:
    """`("messages", 0, "user", "content")` as `messages[0].content`: steps that are pydantic's names for the members of
    a union, not the client's, are found by walking along in what the client sent.
    """
    path = ""
    for index, step in enumerate(location):
        if isinstance(value, list) and isinstance(step, int):
            path, value = f"{path}[{step}]", value[step]
        elif isinstance(value, dict) and (step in value or (missing and index == len(location) - 1)):
            path, value = f"{path}.{step}" if path else str(step), value.get(step)
    return path


def _names(model: type[BaseModel]) -> list[str]:
    return [field.alias or name for name, field in model.model_fields.items()]


def _quote(value: Any) -> str:
    text = repr(value) if isinstance(value, int | float | str | bool | None) else _kind(value)
    return text if len(text) <= MAX_QUOTE else text[: MAX_QUOTE - 3] + "..."


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", int: "a number", float: "a number"}
    return names.get(type(value), "null")
