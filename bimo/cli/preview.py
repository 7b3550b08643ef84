"""`bimo data preview RECIPE`: examples as the model will see them, and which of their tokens are learned."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import islice
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bimo.cli.options import Out, Overrides, RecipeArgument

if TYPE_CHECKING:
    from collections.abc import Iterable

    from bimo.cli.tuning import StageData
    from bimo.data.records import Document

__all__ = ["preview"]

HALVES = {"pairs": ("reads", "writes"), "embeddings": ("query", "passage")}  # an example of these is two texts


def preview(
    recipe: RecipeArgument,
    out: Out = None,
    overrides: Overrides = None,
    stage: Annotated[str | None, typer.Option(metavar="NAME", help="A stage; else the first.")] = None,
    task: Annotated[str | None, typer.Option(metavar="NAME", help="A task; else all.")] = None,
    count: Annotated[int, typer.Option("--count", min=1, help="Examples of each task.")] = 2,
    as_json: Annotated[bool, typer.Option("--json", help="Print ids, texts and masks as JSON.")] = False,
) -> None:
    """Show what a stage learns: trained tokens are green (in «» where there are no colours), the others dim. Altered
    copies come behind what they are copies of."""
    from rich.console import Console

    from bimo.cli.stages import run_folder
    from bimo.cli.terminal import progress_display
    from bimo.cli.tuning import StageData, altered, open_stage_base, prepare_stage, stage_folder, task_documents
    from bimo.errors import UsageError
    from bimo.recipe import load_recipe
    from bimo.tokenizer.chat import preview_mask
    from bimo.training.stage_checks import check_stage

    loaded = load_recipe(recipe, overrides or [])
    stages = {one.name: one for one in loaded.stage}
    if not stages:
        raise UsageError(f"{recipe} has no [[stage]] whose examples could be shown", "recipe")
    if stage is not None and stage not in stages:
        raise UsageError(f"{recipe} has no stage {stage}, there are {', '.join(stages)}", "stage")
    chosen = stages[stage] if stage else loaded.stage[0]
    names = [one.name for one in chosen.task]
    if task is not None and task not in names:
        raise UsageError(f"stage {chosen.name} has no task {task}, there are {', '.join(names)}", "task")
    folder = run_folder(loaded, out)
    place = stage_folder(folder, chosen)
    rows: list[dict[str, Any]] = []
    with progress_display() as progress:
        base = open_stage_base(loaded, chosen, folder, progress)
        check_stage(chosen, base.config)
        prepared = prepare_stage(chosen, place, workers=None, progress=progress)
        data = StageData(loaded, chosen, place, base, prepared, progress)
        for one in chosen.task:
            if task in (None, one.name):
                some = list(islice(task_documents(prepared, "train", one), count))
                documents = [*some, *altered(one, data, lambda some=some: some)]  # type: ignore[misc]
                rows += ({"task": one.name, **row} for row in _encoded(data, documents))
    tokenizer, console = base.tokenizer, Console()
    if as_json:
        for row in rows:
            row["tokens"] = [tokenizer.token_text(token) for token in row["ids"]]
        typer.echo(json.dumps(rows, ensure_ascii=False))
        return
    for row in rows:
        console.print(f"\n{row['task']}: {row['id']}", style="bold", markup=False, highlight=False)
        start = 0
        for name, end in row["parts"].items():
            part = slice(start, start := end)
            shown = preview_mask(tokenizer, row["ids"][part], row["trained"][part], marks=not console.is_terminal)
            if len(row["parts"]) > 1 or "class" in row:
                shown = shown[: shown.plain.rindex("\n")]  # what is learned is said below, or of the whole
                console.print(f"{name}: ", end="", style="bold")
            console.print(shown)
        if "class" in row:
            console.print(f"class: {row['class']}", style="bold green", markup=False, highlight=False)


def _encoded(data: StageData, documents: Iterable[Document]) -> Iterator[dict[str, Any]]:
    """Each example as it is learned: ids, their mask, and where its parts end; the class of a text that has one."""
    kind = data.kind.name
    found = iter(data.kind.encode(documents, data.length, _refused))
    for name, ids, *masks in found:
        row: dict[str, Any] = {"id": name, "kind": kind, "ids": [int(token) for token in ids]}
        first = len(ids)
        if kind in HALVES:
            _, others, *_ = next(found)
            row["ids"] += [int(token) for token in others]
            row["parts"] = dict(zip(HALVES[kind], (first, len(row["ids"])), strict=True))
        elif kind == "classes":
            _, number, *_ = next(found)
            row |= {"parts": {"reads": first}, "class": data.kind.classes[int(number[0])]}
        else:
            row["parts"] = {"text": first}
        written = range(first, len(row["ids"])) if kind == "pairs" else ()
        row["trained"] = list(masks[0]) if masks else [int(place in written) for place in range(len(row["ids"]))]
        yield row


def _refused(document: str, reason: str) -> None:
    typer.echo(f"refused: {document} {reason}", err=True)
