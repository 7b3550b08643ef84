"""`bimo serve`: the OpenAI-compatible server and the chat page; an encoder's embeddings, alone or beside a model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from bimo import runtime
from bimo.cli import options
from bimo.cli.terminal import progress_display, show_cursor
from bimo.errors import UsageError

if TYPE_CHECKING:
    from bimo.backends.base import Backend
    from bimo.backends.embedding import Embedder

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
    adapter: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=DIR", help="A LoRA adapter, served as model NAME beside it; may be repeated."),
    ] = None,
    embeddings: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Also serve embeddings, made by this encoder, e.g. minilm.")
    ] = None,
) -> None:
    """Serve the chat page and the OpenAI-compatible API; of an encoder, its embeddings."""
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
        adapters=options.named_folders(adapter or [], "adapter") or None,
    )
    settings = options.given(
        model_name=model_name, max_queue=max_queue, allowed_hosts=allowed_host, cors_origins=cors_origin
    )

    alone = False  # an encoder, without a model that writes

    def load() -> Backend | Embedder:
        nonlocal alone
        from bimo.backends.adapters import find_model
        from bimo.backends.local import LocalBackend
        from bimo.formats.huggingface import is_encoder

        with progress_display() as progress:
            if alone := is_encoder(find_model(model, progress=progress).directory):
                from bimo.backends.embedding import Embedder

                return Embedder.load(model, progress=progress, **_encoder_limits(model, limits, embeddings))
            return LocalBackend.load(model, progress=progress, **limits)

    def load_embedder() -> Embedder:
        from bimo.backends.embedding import Embedder

        with progress_display() as progress:
            return Embedder.load(embeddings or "", progress=progress)

    def ready(address: str) -> None:
        what = f"embeddings at {address}/v1/embeddings" if alone else f"chat at {address}"
        beside = f" (embeddings by {embeddings})" if embeddings else ""
        typer.echo(f"{model} is ready: {what}, OpenAI-compatible API at {address}/v1{beside} (Ctrl-C stops)")

    try:
        code = run(
            load,
            host,
            port,
            api_key or runtime.api_key(),
            on_listen=lambda address: typer.echo(f"loading {model} to answer at {address}", err=True),
            on_ready=ready,
            embedder_factory=load_embedder if embeddings is not None else None,
            **settings,
        )
    finally:
        show_cursor()  # a bar that was cut short had hidden it
    raise typer.Exit(code)


def _encoder_limits(model: str, limits: dict[str, Any], embeddings: str | None) -> dict[str, Any]:
    """What an encoder takes of the options; UsageError for what would have no effect on it."""
    without_effect = [*(name for name in limits if name not in ("dtype", "context_length"))]
    without_effect += ["embeddings"] if embeddings is not None else []
    if without_effect:
        name = without_effect[0].replace("adapters", "adapter")
        raise UsageError(
            f"{model} is an encoder and is served for its embeddings, --{name.replace('_', '-')} has no effect on it: "
            "leave it out",
            name,
        )
    return limits
