"""`bimo data`: from a recipe's sources to clean documents, and whether some stand in others."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bimo.cli.options import Out, Overrides, RecipeArgument
from bimo.cli.preview import preview
from bimo.cli.select import select

if TYPE_CHECKING:
    from bimo.data.records import Document

__all__ = ["Executor", "Workers", "app"]

app = typer.Typer(help="Prepare text: read, clean, remove copies, divide.", no_args_is_help=True, rich_markup_mode=None)

PLACES = "a file, folder, pattern or package; a prepared run's folder (its training text), or that and :validation"
SHOWN_LEAKS = 10
SAMPLE = 120  # characters
KINDS = {
    "text": "the whole text stands in",
    "prompt": "its turns before the answer stand in",
    "passages": "{:.0%} of it stands in",
}

Workers = Annotated[int | None, typer.Option(min=1, help="Processes; else one a core.")]
Executor = Annotated[str, typer.Option(help="local processes, or ray: a cluster (pip install ray).")]


@app.callback()
def _group() -> None:
    """Prepare text: read, clean, remove copies, divide."""


@app.command()
def prepare(
    recipe: RecipeArgument,
    out: Out = None,
    overrides: Overrides = None,
    workers: Workers = None,
    executor: Executor = "local",
    as_json: Annotated[bool, typer.Option("--json", help="Print the manifest.")] = False,
) -> None:
    """Read a recipe's sources, clean them, remove copies; goes on where an earlier run stopped."""
    from bimo.cli.stages import prepare_data, run_folder
    from bimo.cli.terminal import progress_display
    from bimo.data.executors import EXECUTORS
    from bimo.data.manifest import Ledger
    from bimo.errors import UsageError
    from bimo.recipe import load_recipe

    if executor not in EXECUTORS:
        raise UsageError(f"--executor is one of {', '.join(EXECUTORS)}, not {executor!r}", "executor")
    loaded = load_recipe(recipe, overrides or [])
    folder = run_folder(loaded, out)
    with progress_display() as progress:
        prepared = prepare_data(loaded, folder, workers=workers, executor=executor, progress=progress)
    if as_json:
        typer.echo(json.dumps(prepared.manifest, ensure_ascii=False))
        return
    ledger = Ledger.from_dict(prepared.manifest)
    typer.echo(f"{'':8} {'STEP':16} {'DOCUMENTS':>12} {'CHARACTERS':>14}")
    for row in ledger.table():
        typer.echo(f"{row['what']:8} {row['step']:16} {row['documents']:12,} {row['characters']:14,}")
    if ledger.num_damages:
        typer.echo(f"could not be read: {ledger.num_damages}")
    typer.echo(f"samples and reasons: {Path(prepared.folder) / 'manifest.html'}")


@app.command()
def leaks(
    documents: Annotated[str, typer.Argument(metavar="DOCUMENTS", help=f"What to look for: {PLACES}.")],
    others: Annotated[str, typer.Argument(metavar="OTHERS", help="Where to look for it: the same.")],
    size: Annotated[int, typer.Option("--n", min=2, max=200, help="Words in a row that are no accident.")] = 13,
    text: Annotated[str, typer.Option(help="The field, or a template such as {question}, of rows in files.")] = "text",
    warn: Annotated[bool, typer.Option("--warn", help="Leaks are no failure: exit code 0.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print all leaks as JSON.")] = False,
) -> None:
    """Find documents that stand in others too: evaluation in training text, training in retrieved text; then it fails.

    A document leaks if its whole text stands there, if a dialogue's turns before the answer do, or 80 % of its
    sequences of 13 words (Chinese characters).
    """
    from dataclasses import asdict

    from bimo.cli.terminal import progress_display
    from bimo.data.collection import Collection
    from bimo.data.overlap import find_leaks
    from bimo.errors import UsageError

    if documents == others:
        raise UsageError("both sets are the same, each of its documents would stand in itself: name another one")
    with progress_display() as progress:
        ours = Collection(documents, text=text, progress=progress)
        theirs = Collection(others, text=text, progress=progress)
        progress(f"comparing {documents} with {others}", 0, 0)
        report = find_leaks(_alike(ours.documents()), _alike(theirs.documents()), size)
        shown = {leak.id: "" for leak in (report.leaks if as_json else report.leaks[:SHOWN_LEAKS])}
        for document in ours.documents() if shown else ():
            if document.id in shown:
                shown[document.id] = " ".join(document.text.split())[:SAMPLE]
    for damage in (*ours.damages, *theirs.damages)[:SHOWN_LEAKS]:
        typer.echo(f"not read: {damage.id} {damage.reason}", err=True)
    if as_json:
        found = [{**asdict(leak), "text": shown[leak.id]} for leak in report.leaks]
        counts = {"num_checked": report.num_checked, "num_others": report.num_others, "words": size}
        damages = [asdict(damage) for damage in (*ours.damages, *theirs.damages)]
        typer.echo(json.dumps({**counts, "leaks": found, "damages": damages}, ensure_ascii=False))
    else:
        leaked = f"{len(report.leaks):,} of {report.num_checked:,} documents of {documents}"
        typer.echo(f"{leaked} stand in {others} ({report.num_others:,} documents)")
        for leak in report.leaks[:SHOWN_LEAKS]:
            typer.echo(f"\n{leak.id}: {KINDS[leak.kind].format(leak.share)} {leak.found_in}\n  {shown[leak.id]}")
        if len(report.leaks) > SHOWN_LEAKS:
            typer.echo(f"\n{len(report.leaks) - SHOWN_LEAKS:,} more; all with --json")
    if report.leaks and not warn:
        raise typer.Exit(1)


app.command()(preview)
app.command()(select)


def _alike(documents: Iterator[Document]) -> Iterator[Document]:
    """As cleaning would have them, so that traditional or full-width characters do not hide what is the same."""
    from bimo.data.clean import full_width, simplified, unicode
    from bimo.data.records import Message

    def plain(text: str) -> str:
        return simplified(full_width(unicode(text)))

    for document in documents:
        document.text = plain(document.text)
        document.messages = tuple(Message(role, plain(content)) for role, content in document.messages)
        yield document
