"""`bimo train RECIPE`: the stages of a recipe that make a model that exists into another one.

    torchrun --standalone --nproc-per-node 2 -m bimo.cli.main train RECIPE

trains on several processes. The first one does the rest, prints and writes; the others wait.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from bimo.cli.data import Workers
from bimo.cli.options import Out, Overrides, RecipeArgument

if TYPE_CHECKING:
    from bimo.cli.tuning import StageData
    from bimo.recipe import Recipe, StageRecipe
    from bimo.registries.trouble import Progress
    from bimo.runtime import Ranks
    from bimo.training.session import Texts

__all__ = ["fit_stage", "run_stages", "show_stage", "train"]

T = TypeVar("T")
USES = {
    "answers": "bimo chat {}",
    "pairs": "bimo generate {}",
    "classes": 'bimo classify {} "a text"',
    "embeddings": "bimo serve {}, and ask /v1/embeddings",
}


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
    from bimo.cli.stages import alone_in, run_folder
    from bimo.errors import UsageError
    from bimo.recipe import load_recipe
    from bimo.runtime import ranks as ranks_of_process
    from bimo.training.distributed import process_group

    loaded = load_recipe(recipe, overrides or [])
    names = [one.name for one in loaded.stage]
    if not names:
        raise UsageError(f"{recipe} has no [[stage]]: `bimo run {recipe}` trains what it describes", "recipe")
    if stage is not None and stage not in names:
        raise UsageError(f"{recipe} has no stage {stage}, there are {', '.join(names)}", "stage")
    ranks = ranks_of_process()
    with process_group(ranks) if ranks.world_size > 1 else contextlib.nullcontext():
        folder = run_folder(loaded, out)
        with alone_in(folder, ranks):
            results = run_stages(loaded, folder, only=stage, workers=workers, report=report, ranks=ranks)
    if not ranks.is_main:
        return
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
    ranks: Ranks | None = None,
) -> list[dict[str, Any]]:
    """All stages in order, or the one that is named; what came of each. ranks: of several processes, which are together
    already; the first one does all but the training."""
    from bimo.errors import UsageError
    from bimo.formats.merging import MERGEABLE
    from bimo.recipe import save_recipe
    from bimo.runtime import Ranks

    for before, after in pairwise(recipe.stage if only is None else ()):
        if after.base is None and before.adapter and before.adapter.kind not in MERGEABLE:
            raise UsageError(
                f"stage {after.name} begins with what {before.name} leaves, a {before.adapter.kind} adapter, which is "
                f"no change of its base's weights: make that a lora, or name a base for {after.name}",
                "stage",
            )
    ranks, results = ranks or Ranks(), []
    for stage in recipe.stage:
        if only in (None, stage.name):
            results.append(_train_stage(recipe, stage, folder, workers, ranks))
            if report and ranks.is_main:
                from bimo.cli.tuning_report import write_stage_report

                results[-1] |= write_stage_report(recipe, stage, folder, results[-1]["kind"])
    if ranks.is_main:
        save_recipe(recipe, folder / "recipe.toml")
    return results


def _train_stage(recipe: Recipe, stage: StageRecipe, folder: Path, workers: int | None, ranks: Ranks) -> dict[str, Any]:
    """One stage; nothing to do when its model is there and was made by this recipe from these examples."""
    from bimo.cli.follow import note
    from bimo.cli.pseudo import add_pseudo_labels, prepare_unlabelled
    from bimo.cli.terminal import progress_display
    from bimo.cli.tuning import StageData, open_stage_base, prepare_stage, stage_folder, stage_texts, tell_of_bad_rows
    from bimo.training.distributed import from_main
    from bimo.training.session import read_metrics
    from bimo.training.stage_checks import check_stage, without_effect

    place = stage_folder(folder, stage)
    tell: Callable[[str], None] = note if ranks.is_main else lambda text: None

    def once(make: Callable[[Progress], T]) -> T:
        """The first process makes it, the others take up what it left."""
        made: list[T] = []

        def first() -> None:
            with progress_display() as progress:
                made.append(make(progress))

        from_main(ranks, first)
        return made[0] if made else make(lambda label, done, total: None)

    def prepared(progress: Progress) -> tuple[StageData, Texts]:
        place.mkdir(parents=True, exist_ok=True)
        base = open_stage_base(recipe, stage, folder, progress)
        check_stage(stage, base.config)
        for text in without_effect(recipe, stage, base.config):
            tell(f"note: {text}")
        examples = prepare_stage(stage, place, workers=workers, progress=progress)
        tell_of_bad_rows(examples, tell)
        if (wish := stage.pseudo_labels) is not None:  # what is wrong with them is said before the first training
            prepare_unlabelled(stage, wish, place, progress)
        data = StageData(recipe, stage, place, base, examples, progress)
        return data, stage_texts(data, tell)

    data, texts = once(prepared)
    labelled = []
    for number in range(stage.pseudo_labels.rounds if stage.pseudo_labels else 0):
        teacher = place / f"teacher-{number}"
        fit_stage(recipe, stage, teacher, data, texts, ranks)
        texts, tally = once(partial(add_pseudo_labels, data, texts, teacher / "model", number))
        tell(f"round {number + 1}: {tally['about']}")
        labelled.append(tally)
    lineage, peak = fit_stage(recipe, stage, place, data, texts, ranks)
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


def fit_stage(
    recipe: Recipe, stage: StageRecipe, place: Path, data: StageData, texts: Texts, ranks: Ranks
) -> tuple[dict[str, Any], float | None]:
    """Train place/model, if it is not there: its bimo.json, and the memory it took at most where it was trained."""
    from bimo.adapters.kinds import num_weights
    from bimo.cli.follow import follow, note
    from bimo.runtime import peak_memory
    from bimo.training.distributed import from_main, training_device
    from bimo.training.finetune import stage_job, tunable_model
    from bimo.training.session import finished, train_run

    base, kind = data.base, data.kind
    tell: Callable[[str], None] = note if ranks.is_main else lambda text: None
    job = stage_job(recipe, stage, base, texts, kind.make_loader)
    if (lineage := from_main(ranks, lambda: finished(job, place, texts))) is not None:
        return lineage, None
    device = training_device(ranks)
    model = tunable_model(base, stage, kind.with_heads, seed=recipe.seed, training=job.training, device=str(device))
    sizes = [weight.numel() for weight in model.parameters() if weight.requires_grad]
    whole = num_weights(model)
    tell(f"{base.reference}: {sum(sizes) / 1e6:.2f}M of {whole / 1e6:.2f}M parameters are trained, "
         f"{job.training.steps} steps of {job.training.batch_tokens} tokens"
         + (f", {ranks.world_size} processes" if ranks.world_size > 1 else ""))  # fmt: skip
    job = replace(job, about={**job.about, "trained": sum(sizes), "parameters": whole})
    events = train_run(job, place, model, kind.loss, texts, tell, ranks, kind.make_loader)
    follow(events, job.training.steps, ranks)
    return from_main(ranks, lambda: finished(job, place, texts)) or {}, peak_memory()


def show_stage(result: dict[str, Any]) -> None:
    typer.echo(f"model      {result['model']}")
    if report := result.get("report"):
        typer.echo(f"report     {report}")
    for name, line in result.get("lines", {}).items():
        typer.echo(f"{name:10} {line}")
    typer.echo(f"use it: {USES[result['kind']].format(result['model'])}")
