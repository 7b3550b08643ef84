"""`bimo models`: what can be fetched, what is on this machine, and how much disk it takes."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from bimo.cli.terminal import human_bytes, human_count, progress_display

__all__ = ["models"]


def models(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON list.")] = False,
    fetch: Annotated[str | None, typer.Option(metavar="MODEL", help="Fetch a model now; print its folder.")] = None,
    remove: Annotated[str | None, typer.Option(metavar="NAME", help="Delete a model from bimo's cache.")] = None,
) -> None:
    """List models, fetch one, or remove one."""
    from bimo.errors import UsageError
    from bimo.formats import hub

    if fetch and remove:
        raise UsageError("--fetch and --remove are two steps: run them one after the other", "remove")
    if fetch:
        with progress_display() as progress:
            folder = hub.resolve(fetch, progress=progress)
        typer.echo(json.dumps({"model": fetch, "path": str(folder)}, ensure_ascii=False) if as_json else str(folder))
        return
    if remove:
        freed = hub.remove_model(remove)
        typer.echo(json.dumps({"removed": remove, "bytes": freed}) if as_json else f"{human_bytes(freed)} freed")
        return
    found = hub.list_models()
    if as_json:
        typer.echo(json.dumps([model.to_dict() for model in found], ensure_ascii=False))
        return
    rows = [("NAME", "PARAMETERS", "ON DISK", "LANGUAGES", "LICENCE", "WHAT")]
    rows += [
        (
            model.name,
            human_count(model.num_parameters) if model.num_parameters else "",
            human_bytes(model.bytes) if model.cached else "-",
            " ".join(model.languages),
            model.licence,
            model.summary or model.reference,
        )
        for model in found
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]) - 1)]
    for row in rows:
        typer.echo("  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[-1]]))
