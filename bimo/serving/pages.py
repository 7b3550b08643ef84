"""The web page: the files of `bimo/web` at / and /static, with headers that let nothing foreign in.

The files need no key; the page asks its user for it. They are revalidated by ETag on every visit (`no-cache`), since
their names carry no version: an update shows at once and an unchanged file costs a 304.
"""

from __future__ import annotations

import mimetypes
from pathlib import Path

from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.routing import BaseRoute, Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

import bimo

__all__ = ["SECURITY_HEADERS", "WEB_DIRECTORY", "page_routes"]

WEB_DIRECTORY = Path(bimo.__file__).parent / "web"

# Sent with every response, so that an API answer opened in a browser is as inert as the page is.
SECURITY_HEADERS = {
    "content-security-policy": (
        "default-src 'self'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
        "object-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
}

# The system's table may lack or misname these, and a module script of the wrong type does not run.
_TYPES = {".js": "text/javascript", ".mjs": "text/javascript", ".css": "text/css", ".json": "application/json",
          ".svg": "image/svg+xml", ".woff2": "font/woff2", ".webmanifest": "application/manifest+json"}  # fmt: skip


class Pages(StaticFiles):
    """Static files that browsers ask about each time."""

    async def get_response(self, path: str, scope: Scope) -> Response:
        response = await super().get_response(path, scope)
        response.headers["cache-control"] = "no-cache"
        return response


def page_routes(directory: Path = WEB_DIRECTORY) -> list[BaseRoute]:
    """Routes for / (index.html), /favicon.ico (favicon.svg) and /static/* (everything in `directory`)."""
    for suffix, kind in _TYPES.items():
        mimetypes.add_type(kind, suffix)
    pages = Pages(directory=directory, check_dir=False)

    async def index(http: HttpRequest) -> Response:
        return await pages.get_response("index.html", http.scope)

    async def favicon(http: HttpRequest) -> Response:
        return await pages.get_response("favicon.svg", http.scope)

    return [Route("/", index), Route("/favicon.ico", favicon), Mount("/static", pages)]
