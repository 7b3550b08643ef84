"""`bimo convert`: write any model bimo can read as a Hugging Face directory or as one GGUF file."""

from __future__ import annotations

import tempfile
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Literal

import typer

from bimo.cli import options
from bimo.cli.terminal import human_bytes, progress_display

__all__ = ["GgufKind", "convert"]


class GgufKind(StrEnum):
    """Number types a .gguf file can be written with."""

    f16 = "f16"
    q8_0 = "q8_0"


def convert(
    model: options.ModelArgument,
    target: Annotated[Path, typer.Argument(metavar="DIR_OR_FILE", help="A new directory, or a file ending in .gguf.")],
    kind: Annotated[
        GgufKind | None, typer.Option("--type", help="Number type of a .gguf file; f16 unless given.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a file or a model directory that exists.")] = False,
) -> None:
    """Write a model as a directory or a .gguf file; an adapter is merged into its base."""
    from bimo.backends.adapters import find_model, write_model
    from bimo.errors import UsageError
    from bimo.registries.trouble import storage_errors

    to_gguf = target.suffix == ".gguf"
    if kind is not None and not to_gguf:
        raise UsageError(f"--type is for .gguf files, and {target} is a directory: leave it out", "type")
    if to_gguf and target.is_dir():
        raise UsageError(f"{target} is a directory: give the name of a file", "target")
    if not to_gguf and target.is_file():
        raise UsageError(f"{target} is a file: give the name of a directory, or of a file ending in .gguf", "target")
    if target.exists() and not force and (to_gguf or any(target.iterdir())):
        raise UsageError(f"{target} exists: give another name, or --force to replace it", "target")
    with progress_display() as progress, storage_errors(target.parent):
        found = find_model(model, progress=progress)
        source = found.adapter or found.directory
        if target.exists() and target.resolve() == source.resolve():
            raise UsageError(f"{target} is the model itself: give another name", "target")
        target.parent.mkdir(parents=True, exist_ok=True)
        if to_gguf:
            from bimo.formats.gguf import write_gguf

            number_type: Literal["f16", "q8_0"] = "q8_0" if kind == GgufKind.q8_0 else "f16"
            if found.adapter is None:
                write_gguf(source, target, number_type)
            else:
                with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as merged:
                    write_model(found, Path(merged) / target.stem, model)
                    write_gguf(Path(merged) / target.stem, target, number_type)
        else:
            write_model(found, target, model)
    written = [target] if to_gguf else [path for path in target.rglob("*") if path.is_file()]
    typer.echo(f"{target}: {human_bytes(sum(path.stat().st_size for path in written))}")
