"""`bimo serve`: the OpenAI-compatible server and the chat page."""

from __future__ import annotations

from typing import Annotated

import typer

from bimo import runtime
from bimo.cli import options
from bimo.cli.terminal import progress_display

__all__ = ["serve"]


def serve(
    model: Annotated[str, typer.Argument(metavar="[MODEL]", help=options.MODEL_HELP)] = "smollm2",
    host: Annotated[
        str, typer.Option(help="Address to bind; anything but this machine's own needs --api-key.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0: any free one.")] = 8000,
    api_key: Annotated[
        str | None, typer.Option(help="Clients must send this bearer key; else $BIMO_API_KEY, else no key.")
    ] = None,
    max_batch: Annotated[int | None, typer.Option(min=1, help="Sequences computed at once.")] = None,
    kv_cache_tokens: Annotated[int | None, typer.Option(min=16, help="Tokens the key/value cache holds.")] = None,
    dtype: options.Dtype = None,
) -> None:
    """Serve a model: chat page, OpenAI-compatible API, metrics."""
