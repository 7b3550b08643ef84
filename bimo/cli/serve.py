"""`bimo serve`: the OpenAI-compatible server and the chat page."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from bimo import runtime
from bimo.cli import options
from bimo.cli.terminal import progress_display, show_cursor

if TYPE_CHECKING:
    from bimo.backends.base import Backend

__all__ = ["serve"]


def serve(
    model: Annotated[str, typer.Argument(metavar="[MODEL]", help=options.MODEL_HELP)] = "smollm2",
    host: Annotated[str, typer.Option(help="Address to bind; any but this machine's own needs a key.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0: any free one.")] = 8000,
    api_key: Annotated[
        str | None, typer.Option(metavar="KEY", help="Key that clients must send; else $BIMO_API_KEY, else none.")
    ] = None,
    model_name: Annotated[str | None, typer.Option(metavar="NAME", help="The model's name for clients.")] = None,
    max_queue: Annotated[int | None, typer.Option(min=1, help="Sequences at most, waiting ones too; then 429.")] = None,
    max_batch: Annotated[int | None, typer.Option(min=1, help="Sequences computed at once.")] = None,
    kv_cache_tokens: Annotated[int | None, typer.Option(min=16, help="Tokens the key/value cache holds.")] = None,
    context_length: Annotated[int | None, typer.Option(min=16, help="Shorter context than the model's own.")] = None,
    allowed_host: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Answer to this host name only; may be repeated.")
    ] = None,
    cors_origin: Annotated[
        list[str] | None, typer.Option(metavar="ORIGIN", help="Web page allowed to call the API; may be repeated.")
    ] = None,
    dtype: options.Dtype = None,
    quant: options.Quant = None,
    kv_cache_dtype: options.KvCacheDtype = None,
    speculation: options.Speculation = None,
    draft_model: options.DraftModel = None,
) -> None:
    """Serve the chat page and the OpenAI-compatible API."""
    from bimo.serving.app import serve as run

    limits = options.given(
        dtype=dtype,
        quant=quant,
        kv_cache_dtype=kv_cache_dtype,
        speculation=speculation,
        draft_model=draft_model,
        max_batch=max_batch,
        kv_cache_tokens=kv_cache_tokens,
        context_length=context_length,
    )
    settings = options.given(
        model_name=model_name, max_queue=max_queue, allowed_hosts=allowed_host, cors_origins=cors_origin
    )

    def load() -> Backend:
        from bimo.backends.local import LocalBackend

        with progress_display() as progress:
            return LocalBackend.load(model, progress=progress, **limits)

    def ready(address: str) -> None:
        typer.echo(f"{model} is ready: chat at {address}, OpenAI-compatible API at {address}/v1 (Ctrl-C stops)")

    try:
        code = run(
            load,
            host,
            port,
            api_key or runtime.api_key(),
            on_listen=lambda address: typer.echo(f"loading {model} to answer at {address}", err=True),
            on_ready=ready,
            **settings,
        )
    finally:
        show_cursor()  # a bar that was cut short had hidden it
    raise typer.Exit(code)
