"""`bimo data preview RECIPE`: examples as the model will see them, and which of their tokens are learned."""

from __future__ import annotations

import json
from itertools import islice
from typing import Annotated

import typer

from bimo.cli.options import Out, Overrides, RecipeArgument

__all__ = ["preview"]


def preview(
    recipe: RecipeArgument,
    out: Out = None,
    overrides: Overrides = None,
    stage: Annotated[str | None, typer.Option(metavar="NAME", help="A stage; else the first.")] = None,
    task: Annotated[str | None, typer.Option(metavar="NAME", help="A task; else all.")] = None,
    count: Annotated[int, typer.Option("--count", min=1, help="Examples of each task.")] = 2,
    as_json: Annotated[bool, typer.Option("--json", help="Print ids, texts and masks as JSON.")] = False,
) -> None:
    """Show what a stage learns: trained tokens are green (in «» where there are no colours), the others dim."""
    from rich.console import Console

    from bimo.cli.stages import run_folder
    from bimo.cli.terminal import progress_display
    from bimo.cli.tuning import open_stage_base, prepare_stage, stage_folder, task_documents
    from bimo.data.example_tokens import encode_examples
    from bimo.errors import UsageError
    from bimo.recipe import load_recipe
    from bimo.tokenizer.chat import preview_mask

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
    with progress_display() as progress:
        base = open_stage_base(loaded, chosen, folder, progress)
        prepared = prepare_stage(chosen, stage_folder(folder, chosen), workers=None, progress=progress)
    tokenizer, console, shown = base.tokenizer, Console(), []
    most = base.config.max_positions
    for one in chosen.task:
        if task not in (None, one.name):
            continue
        for document in islice(task_documents(prepared, "train", one), count):
            for name, ids, mask in encode_examples([document], tokenizer, max_tokens=most, refuse=_refused):
                if as_json:
                    tokens = [tokenizer.token_text(token) for token in ids]
                    shown.append({"task": one.name, "id": name, "ids": ids, "tokens": tokens, "trained": mask})
                else:
                    console.print(f"\n{one.name}: {name}", style="bold")
                    console.print(preview_mask(tokenizer, ids, mask, marks=not console.is_terminal))
    if as_json:
        typer.echo(json.dumps(shown, ensure_ascii=False))


def _refused(document: str, reason: str) -> None:
    typer.echo(f"refused: {document} {reason}", err=True)
