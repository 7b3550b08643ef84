"""`bimo train RECIPE`: the stages of a recipe that make a model that exists into another one."""

from __future__ import annotations

import contextlib
import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bimo.cli.data import Workers
from bimo.cli.options import Out, Overrides, RecipeArgument

if TYPE_CHECKING:
    from bimo.recipe import Recipe, StageRecipe

__all__ = ["run_stages", "show_stage", "train", "train_stage"]


def train(
    recipe: RecipeArgument,
    out: Out = None,
    overrides: Overrides = None,
    stage: Annotated[str | None, typer.Option(metavar="NAME", help="Only this stage.")] = None,
    workers: Workers = None,
    report: Annotated[bool, typer.Option(help="Write report.html, with answers before and after.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as one JSON object.")] = False,
) -> None:
    """Fine-tune: do the [[stage]]s of a recipe. Run it again and it goes on where it stopped."""
    from bimo.cli.stages import run_folder
    from bimo.errors import UsageError
    from bimo.recipe import load_recipe
    from bimo.runtime import ranks as ranks_of_process

    loaded = load_recipe(recipe, overrides or [])
    names = [one.name for one in loaded.stage]
    if not names:
        raise UsageError(f"{recipe} has no [[stage]]: `bimo run {recipe}` trains what it describes", "recipe")
    if stage is not None and stage not in names:
        raise UsageError(f"{recipe} has no stage {stage}, there are {', '.join(names)}", "stage")
    if ranks_of_process().world_size > 1:
        raise UsageError("stages are trained by one process so far: start bimo train without torchrun", "recipe")
    results = run_stages(loaded, run_folder(loaded, out), only=stage, workers=workers, report=report)
    if as_json:
        typer.echo(json.dumps({"stages": results}, ensure_ascii=False))
        return
    for result in results:
        show_stage(result)


def run_stages(
    recipe: Recipe,
    folder: Path,
    *,
    only: str | None = None,
    workers: int | None = None,
    report: bool = True,
) -> list[dict[str, Any]]:
    """All stages in order, or the one that is named; what came of each."""
    from bimo.recipe import save_recipe

    results = []
    for stage in recipe.stage:
        if only in (None, stage.name):
            results.append(train_stage(recipe, stage, folder, workers=workers))
            if report:
                from bimo.cli.tuning_report import write_stage_report

                results[-1] |= write_stage_report(recipe, stage, folder)
    save_recipe(recipe, folder / "recipe.toml")
    return results


def train_stage(
    recipe: Recipe,
    stage: StageRecipe,
    folder: Path,
    *,
    workers: int | None = None,
) -> dict[str, Any]:
    """One stage; nothing to do when its model is there and was made by this recipe from these examples."""
    from bimo.cli.run import _display, _interruptible, _tell
    from bimo.cli.terminal import progress_display
    from bimo.cli.tuning import open_stage_base, prepare_stage, stage_folder, stage_texts
    from bimo.runtime import Ranks
    from bimo.training.distributed import training_device
    from bimo.training.finetune import check_stage, stage_job, tunable_model
    from bimo.training.session import finished, train_run

    ranks, place = Ranks(), stage_folder(folder, stage)
    place.mkdir(parents=True, exist_ok=True)
    with progress_display() as progress:
        base = open_stage_base(recipe, stage, folder, progress)
        check_stage(stage, base.config)
        prepared = prepare_stage(stage, place, workers=workers, progress=progress)
        texts, kind = stage_texts(recipe, stage, place, base, prepared, progress, _tell)
    job = stage_job(recipe, stage, base, texts, kind.make_loader)
    lineage = finished(job, place, texts)
    if lineage is None:
        device = training_device(ranks)
        model = tunable_model(base, stage, kind.with_heads, seed=recipe.seed, training=job.training, device=str(device))
        sizes = [weight.numel() for weight in model.parameters() if weight.requires_grad]
        whole = sum(weight.numel() for weight in model.parameters())
        _tell(f"{base.reference}: {sum(sizes) / 1e6:.2f}M of {whole / 1e6:.1f}M parameters are trained, "
              f"{job.training.steps} steps of {job.training.batch_tokens} tokens")  # fmt: skip
        job = replace(job, about={**job.about, "trained": sum(sizes), "parameters": whole})
        events = train_run(job, place, model, kind.loss, texts, _tell, ranks, kind.make_loader)
        with _display(job.training.steps) as show, _interruptible(ranks) as interrupted, contextlib.closing(events):
            for event in events:
                show(event)
                if interrupted():
                    events.close()  # writes a checkpoint
                    _tell(f"stopped after step {event.step}: the same command goes on from there")
                    raise KeyboardInterrupt
        lineage = finished(job, place, texts) or {}
    return {"stage": stage.name, "kind": kind.name, "model": str(place / "model"), "scores": lineage.get("scores", {})}


def show_stage(result: dict[str, Any]) -> None:
    typer.echo(f"model      {result['model']}")
    if report := result.get("report"):
        typer.echo(f"report     {report}")
    for name, line in result.get("lines", {}).items():
        typer.echo(f"{name:10} {line}")
    if result.get("kind") in ("answers", "pairs"):
        command = "chat" if result["kind"] == "answers" else "generate"
        typer.echo(f"use it: bimo {command} {result['model']}")
