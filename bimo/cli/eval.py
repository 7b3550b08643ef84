"""`bimo eval`: how well a model predicts texts (perplexity, bits per byte), translates pairs (BLEU, chrF), or, as an
encoder, finds the target of each pair among all (recall, MRR, nDCG)."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bimo.cli import options

if TYPE_CHECKING:
    from bimo.backends.facade import Model
    from bimo.evaluation.pairs import Pair
    from bimo.evaluation.perplexity import Perplexity
    from bimo.evaluation.translation import TranslationTable

__all__ = ["evaluate"]

PATIENCE = 2.0  # seconds a text may take before a bar is shown
COLUMNS = ("PERPLEXITY", "BITS/BYTE", "NATS/TOKEN", "TOKENS", "BYTES")
UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")


def evaluate(
    model: options.ModelArgument,
    text: Annotated[
        list[str] | None, typer.Option(metavar="FILE", help="A text in UTF-8, - for standard input; may be repeated.")
    ] = None,
    window: Annotated[
        int | None, typer.Option(help="Tokens read at once; else 1024, or what the context holds.")
    ] = None,
    stride: Annotated[
        int | None, typer.Option(help="New tokens scored in each window; else half of it. Less: slower, more context.")
    ] = None,
    pairs: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help='Translate instead of reading a text: lines of {"source": ..., "target": ...}.'
        ),
    ] = None,
    source: Annotated[str | None, typer.Option(metavar="CODE", help="The language of the sources, en or zh.")] = None,
    target: Annotated[str | None, typer.Option(metavar="CODE", help="Of the targets; else both are found out.")] = None,
    train_pairs: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Pairs for two baselines to learn from: a translation memory, a lexicon."),
    ] = None,
    beams: Annotated[int, typer.Option(min=1, help="Translate by beam search with so many beams.")] = 1,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="Of a translation; else by the length of its source.")
    ] = None,
    prompt: Annotated[
        str | None,
        typer.Option(metavar="TEXT", help="What the model is sent, with {source}; else as suits the kind of model."),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first so many pairs.")] = None,
    dtype: options.Dtype = None,
    quant: options.Quant = None,
    kv_cache_dtype: options.KvCacheDtype = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Measure how well a model predicts texts (perplexity, bits per byte), translates pairs (BLEU, chrF), or, as an
    encoder, finds the target of each pair among all (recall, MRR, nDCG)."""
    from bimo.errors import UsageError

    if bool(text) == bool(pairs):
        raise UsageError("give one of the two: --text FILE to predict, or --pairs FILE to translate", "text")
    reading = options.given(window=window, stride=stride)
    translating = options.given(
        source=source, target=target, train_pairs=train_pairs, max_tokens=max_tokens, prompt=prompt, limit=limit,
        beams=beams if beams > 1 else None,
    )  # fmt: skip
    for name in reading if pairs else translating:
        other = "--text" if pairs else "--pairs"
        raise UsageError(f"--{name.replace('_', '-')} has an effect with {other} only: leave it out", name)
    precision = options.given(dtype=dtype, quant=quant, kv_cache_dtype=kv_cache_dtype)
    if pairs:
        _translate(model, pairs, translating, precision, as_json)
    else:
        _predict(model, text or [], reading, precision, as_json)


def _translate(model: str, pairs: Path, settings: dict[str, Any], precision: dict[str, Any], as_json: bool) -> None:
    """BLEU and chrF over pairs; of an encoder, how well it finds them."""
    from bimo.errors import UsageError
    from bimo.evaluation.pairs import check_language, languages_of, read_pairs
    from bimo.evaluation.translation import ModelTranslator, check_prompt, evaluate_translation

    given = {name: check_language(settings[name], name) for name in ("source", "target") if name in settings}
    prompt = settings.get("prompt")
    if prompt is not None:
        check_prompt(options.checked_text(prompt, "prompt"))
    held_out = read_pairs(pairs, limit=settings.get("limit"))
    training = read_pairs(settings["train_pairs"], param="train-pairs") if "train_pairs" in settings else []
    found = languages_of(held_out)
    languages = given.get("source", found[0]), given.get("target", found[1])

    if _is_encoder(model):
        for name in {**settings, **precision}.keys() - {"limit"}:
            raise UsageError(
                f"{model} is an encoder, which looks for the targets: leave --{name.replace('_', '-')} out", name
            )
        _search(model, held_out, as_json)
        return
    loaded = options.load_model(model, **precision)
    try:
        with _bar(pairs.name, "sentences") as report:
            translate = ModelTranslator(
                loaded.backend,
                languages=languages,
                beams=settings.get("beams", 1),
                prompt=prompt,
                max_tokens=settings.get("max_tokens"),
                progress=report,
            )
            table = evaluate_translation(
                translate, held_out, name=model, training_pairs=training,
                source_language=languages[0], target_language=languages[1],
            )  # fmt: skip
        about = _about(loaded)
    finally:
        loaded.close()
    if as_json:
        typer.echo(
            json.dumps({**about, **_table_as_dict(table), "too_long": translate.num_too_long}, ensure_ascii=False)
        )
        return
    known = f", {table.num_known} of them in the training pairs" if training else ""
    typer.echo(f"{about['model']}, {about['dtype']} on {about['device']}")
    typer.echo(f"{table.num_pairs} pairs{known}, {table.source_language or '?'} to {table.target_language or '?'}")
    for line in table.lines():
        typer.echo(line)
    if translate.num_too_long:
        typer.echo(
            f"note: {translate.num_too_long} sources did not fit into the context and count as not translated", err=True
        )


def _is_encoder(model: str) -> bool:
    from bimo.backends.adapters import find_model
    from bimo.cli.terminal import progress_display
    from bimo.formats.huggingface import read_model_config
    from bimo.models.config import EncoderConfig

    with progress_display() as progress:
        return isinstance(read_model_config(find_model(model, progress=progress).directory), EncoderConfig)


def _search(model: str, pairs: list[Pair], as_json: bool) -> None:
    """Recall, reciprocal rank and nDCG: each source looks for its target among all of them."""
    from bimo.backends.embedding import Embedder
    from bimo.evaluation.retrieval import Bm25, dense, evaluate_retrieval

    with Embedder.load(model) as embedder:
        table = evaluate_retrieval({"bm25": Bm25, model: dense(embedder)}, pairs)
    if as_json:
        scores = [
            {"name": score.name, "language": score.language, "queries": score.num_queries,
             **{name: interval._asdict() for name, interval in score.metrics.items()}}
            for score in table.scores
        ]  # fmt: skip
        typer.echo(json.dumps({"model": model, "passages": table.num_passages, "scores": scores}, ensure_ascii=False))
        return
    for line in table.lines():
        typer.echo(line)


def _table_as_dict(table: TranslationTable) -> dict[str, Any]:
    about = dataclasses.asdict(table)
    return {name.removeprefix("num_"): list(value) if name == "scores" else value for name, value in about.items()}


def _about(loaded: Model) -> dict[str, Any]:
    info = loaded.backend.info()
    return {name: getattr(info, name) for name in ("model", "dtype", "quant", "cache_dtype", "device")}


def _predict(model: str, names: list[str], settings: dict[str, int], precision: dict[str, Any], as_json: bool) -> None:
    """Perplexity and bits per byte of texts."""
    from bimo.evaluation.perplexity import check_windows, perplexity

    if settings:
        check_windows(settings.get("window", sys.maxsize), settings.get("stride", 1))
    texts = {name: _read(name) for name in dict.fromkeys(names)}

    loaded = options.load_model(model, **precision)
    try:
        about = _about(loaded)
        width = max(len(name) for name in ("TEXT", *texts))
        if not as_json:
            typer.echo(f"{about['model']}, {about['dtype']} on {about['device']}")
            typer.echo("  ".join(["TEXT".ljust(width), *(column.rjust(10) for column in COLUMNS)]))
        results = {}
        for name, content in texts.items():
            with _bar(name, "tokens") as report:
                result = perplexity(loaded.backend, content, **settings, progress=report)
            results[name] = result
            if not as_json:
                typer.echo("  ".join([name.ljust(width), *_cells(result)]))
    finally:
        loaded.close()
    if as_json:
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
def _bar(name: str, unit: str) -> Iterator[Callable[[int, int], None]]:
    """A rich bar on a terminal, once the work has taken longer than `PATIENCE`; gone when it is done."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TextColumn(unit))
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
