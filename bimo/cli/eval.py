"""`bimo eval`: how well a model predicts texts, as perplexity and bits per byte."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bimo.cli import options

if TYPE_CHECKING:
    from bimo.evaluation.perplexity import Perplexity

__all__ = ["evaluate"]

PATIENCE = 2.0  # seconds a text may take before a bar is shown
COLUMNS = ("PERPLEXITY", "BITS/BYTE", "NATS/TOKEN", "TOKENS", "BYTES")
UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")


def evaluate(
    model: options.ModelArgument,
    text: Annotated[
        list[str], typer.Option(metavar="FILE", help="A text in UTF-8, - for standard input; may be repeated.")
    ],
    window: Annotated[
        int | None, typer.Option(help="Tokens read at once; else 1024, or what the context holds.")
    ] = None,
    stride: Annotated[
        int | None, typer.Option(help="New tokens scored in each window; else half of it. Less: slower, more context.")
    ] = None,
    dtype: options.Dtype = None,
    quant: options.Quant = None,
    kv_cache_dtype: options.KvCacheDtype = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Measure how well a model predicts texts: perplexity, bits per byte."""
    from bimo.evaluation.perplexity import check_windows, perplexity

    if window is not None or stride is not None:
        check_windows(sys.maxsize if window is None else window, 1 if stride is None else stride)
    texts = {name: _read(name) for name in dict.fromkeys(text)}

    loaded = options.load_model(model, dtype=dtype, quant=quant, kv_cache_dtype=kv_cache_dtype)
    try:
        info = loaded.backend.info()
        width = max(len(name) for name in ("TEXT", *texts))
        if not as_json:
            typer.echo(f"{info.model}, {info.dtype} on {info.device}")
            typer.echo("  ".join(["TEXT".ljust(width), *(column.rjust(10) for column in COLUMNS)]))
        results = {}
        for name, content in texts.items():
            with _bar(name) as report:
                result = perplexity(loaded.backend, content, window=window, stride=stride, progress=report)
            results[name] = result
            if not as_json:
                typer.echo("  ".join([name.ljust(width), *_cells(result)]))
    finally:
        loaded.close()
    if as_json:
        about = {name: getattr(info, name) for name in ("model", "dtype", "quant", "cache_dtype", "device")}
        rows = [{"text": name, **_as_dict(result)} for name, result in results.items()]
        typer.echo(json.dumps({**about, "texts": rows}, ensure_ascii=False))


def _read(name: str) -> str:
    """A file's text, exactly, less a byte order mark; UsageError when there is none to read."""
    from bimo.errors import UsageError

    shown = "standard input" if name == "-" else name
    try:
        data = Path(name).read_bytes() if name != "-" else sys.stdin.buffer.read() if sys.stdin else b""
    except OSError as error:
        raise UsageError(f"{shown} cannot be read ({error.strerror}): give a text file", "text") from None
    try:
        content = data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        encoding = "utf-16" if data.startswith(UTF16_MARKS) else "gb18030"
        raise UsageError(
            f"{shown} is not valid UTF-8 (byte {error.start}): convert it first, from its own encoding, e.g. with "
            f"iconv -f {encoding} -t utf-8",
            "text",
        ) from None
    if not content:
        raise UsageError(f"{shown} is empty: give a text of at least two tokens", "text")
    return content


def _cells(result: Perplexity) -> list[str]:
    """One row of the table: what stands under `COLUMNS`."""
    numbers = (result.perplexity, result.bits_per_byte, result.nats_per_token)
    cells = [f"{number:.4f}" for number in numbers] + [str(result.num_tokens), str(result.num_bytes)]
    return [cell.rjust(10) for cell in cells]


def _as_dict(result: Perplexity) -> dict[str, float]:
    return {
        "perplexity": result.perplexity,
        "bits_per_byte": result.bits_per_byte,
        "nats_per_token": result.nats_per_token,
        "tokens": result.num_tokens,
        "bytes": result.num_bytes,
        "window": result.window,
        "stride": result.stride,
    }


@contextmanager
def _bar(name: str) -> Iterator[Callable[[int, int], None]]:
    """A rich bar of tokens on a terminal, once a text has taken longer than `PATIENCE`; gone when it is done."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TextColumn("tokens"))
    console = Console(stderr=True)
    bar = Bar(*columns, TimeRemainingColumn(), console=console, transient=True, disable=not sys.stderr.isatty())
    task, begun = bar.add_task(name, total=None), time.monotonic()

    def report(done: int, total: int) -> None:
        bar.update(task, completed=done, total=total)
        if time.monotonic() - begun > PATIENCE:
            bar.start()  # nothing more when it is shown already

    try:
        yield report
    finally:
        if bar.live.is_started:
            bar.stop()
