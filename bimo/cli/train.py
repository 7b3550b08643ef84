"""`bimo train RECIPE`: the stages of a recipe that make a model that exists into another one."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bimo.cli.data import Workers
from bimo.cli.options import Out, Overrides, RecipeArgument

if TYPE_CHECKING:
    from bimo.cli.tuning import StageData
    from bimo.recipe import Recipe, StageRecipe
    from bimo.training.session import Texts

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

                results[-1] |= write_stage_report(recipe, stage, folder, results[-1]["kind"])
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
    from bimo.cli.follow import note
    from bimo.cli.pseudo import add_pseudo_labels
    from bimo.cli.terminal import progress_display
    from bimo.cli.tuning import StageData, open_stage_base, prepare_stage, stage_folder, stage_texts
    from bimo.training.finetune import check_stage
    from bimo.training.session import read_metrics

    place = stage_folder(folder, stage)
    place.mkdir(parents=True, exist_ok=True)
    with progress_display() as progress:
        base = open_stage_base(recipe, stage, folder, progress)
        check_stage(stage, base.config)
        prepared = prepare_stage(stage, place, workers=workers, progress=progress)
        data = StageData(recipe, stage, place, base, prepared, progress)
        texts = stage_texts(data, note)
    labelled = []
    for number in range(stage.pseudo_labels.rounds if stage.pseudo_labels else 0):
        teacher = place / f"teacher-{number}"
        _fit(recipe, stage, teacher, data, texts)
        with progress_display() as progress:
            texts, tally = add_pseudo_labels(data, texts, teacher / "model", number, progress)
        note(f"round {number + 1}: {tally['about']}")
        labelled.append(tally)
    lineage, peak = _fit(recipe, stage, place, data, texts)
    return {
        "stage": stage.name,
        "kind": data.kind.name,
        "model": str(place / "model"),
        "scores": lineage.get("scores", {}),
        "trained": lineage.get("trained"),
        "seconds": sum(row.get("seconds", 0) for row in read_metrics(place / "metrics.jsonl")),
        "peak_memory": peak,  # MB of this process, where it has trained
        **({"pseudo_labels": labelled} if labelled else {}),
    }


def _fit(
    recipe: Recipe, stage: StageRecipe, place: Path, data: StageData, texts: Texts
) -> tuple[dict[str, Any], float | None]:
    """Train place/model, if it is not there: its bimo.json, and the memory it took at most where it was trained."""
    from bimo.cli.follow import follow, note
    from bimo.runtime import Ranks, peak_memory
    from bimo.training.distributed import training_device
    from bimo.training.finetune import stage_job, tunable_model
    from bimo.training.session import finished, train_run

    base, kind, ranks = data.base, data.kind, Ranks()
    job = stage_job(recipe, stage, base, texts, kind.make_loader)
    if (lineage := finished(job, place, texts)) is not None:
        return lineage, None
    device = training_device(ranks)
    model = tunable_model(base, stage, kind.with_heads, seed=recipe.seed, training=job.training, device=str(device))
    sizes = [weight.numel() for weight in model.parameters() if weight.requires_grad]
    whole = sum(weight.numel() for weight in model.parameters())
    note(f"{base.reference}: {sum(sizes) / 1e6:.2f}M of {whole / 1e6:.1f}M parameters are trained, "
         f"{job.training.steps} steps of {job.training.batch_tokens} tokens")  # fmt: skip
    job = replace(job, about={**job.about, "trained": sum(sizes), "parameters": whole})
    events = train_run(job, place, model, kind.loss, texts, note, ranks, kind.make_loader)
    follow(events, job.training.steps, ranks)
    return finished(job, place, texts) or {}, peak_memory()


def show_stage(result: dict[str, Any]) -> None:
    typer.echo(f"model      {result['model']}")
    if report := result.get("report"):
        typer.echo(f"report     {report}")
    for name, line in result.get("lines", {}).items():
        typer.echo(f"{name:10} {line}")
    if result.get("kind") in ("answers", "pairs"):
        command = "chat" if result["kind"] == "answers" else "generate"
        typer.echo(f"use it: bimo {command} {result['model']}")
