"""`bimo data prepare`: from a recipe's sources to clean documents."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from bimo.cli.options import Out, Overrides, RecipeArgument

__all__ = ["Executor", "Workers", "app"]

app = typer.Typer(help="Prepare text: read, clean, remove copies, divide.", no_args_is_help=True, rich_markup_mode=None)

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
