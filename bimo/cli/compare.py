"""`bimo compare RECIPE`: what each choice bought. The same recipe, trained in several variants with several seeds.

    bimo compare recipes/topics.toml

folder/variants/NAME/SEED/   a whole `bimo train`, its data shared where it is the same
       compare.html          means, intervals and differences           (evaluation.comparison)
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bimo.cli.options import Out, Overrides, RecipeArgument

if TYPE_CHECKING:
    from collections.abc import Callable

    from bimo.recipe import Recipe, SourceRecipe

__all__ = ["compare"]

SHARED = ("data", "replay", "tokens")  # of a stage; each is made again where its mark says that it must
POLL = 0.2  # seconds


def compare(
    recipe: RecipeArgument,
    out: Out = None,
    overrides: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as one JSON object.")] = False,
) -> None:
    """Compare choices: train a recipe's stages in the variants of its [compare], with several seeds, and tell what each
    bought. Run it again and it goes on where it stopped."""
    from bimo.cli.follow import interruptible, note
    from bimo.cli.stages import run_folder
    from bimo.errors import UsageError
    from bimo.evaluation.comparison import Comparison, costs, write_comparison
    from bimo.recipe import load_recipe
    from bimo.runtime import Ranks

    wishes = overrides or []
    loaded = load_recipe(recipe, wishes)
    if loaded.compare is None:
        raise UsageError('the recipe does not say what to compare: add [compare.variants] with lines such as plain = '
                         '[] and lora = ["stage.0.adapter.kind=lora"]', "recipe")  # fmt: skip
    if not loaded.stage:
        raise UsageError(f"{recipe} has no [[stage]], and stages are what is compared", "recipe")
    seeds = range(loaded.seed, loaded.seed + loaded.compare.seeds)
    marks: dict[str, str] = {}
    orders = {  # all are read before the first is trained
        (name, seed): _Run(recipe, [*wishes, *settings, f"seed={seed}"], marks)
        for seed in seeds
        for name, settings in loaded.compare.variants.items()
    }
    for run in orders.values():
        run.read()  # a file or a base that is not there is said now, too
    folder, first = run_folder(loaded, out), None
    results: dict[str, list[list[dict[str, Any]]]] = {name: [] for name in loaded.compare.variants}
    with interruptible(Ranks()) as interrupted:
        for number, ((name, seed), run) in enumerate(orders.items(), 1):
            place = folder / "variants" / name / str(seed)
            if (result := run.finished(place)) is None:
                note(f"{name}, seed {seed} ({number} of {len(orders)})")
                run.begin(place)
                if first is not None:
                    _share(first, place, run.recipe)
                result = run.train(place, interrupted, keep_model=seed == loaded.seed)
            results[name].append(result)
            first = first or place

    figures = {name: [_figures(run) for run in runs] for name, runs in results.items()}
    references = {who: found for who, found in figures[next(iter(figures))][0].items() if who != "after"}
    comparison = Comparison(
        {name: [run.get("after", {}) for run in runs] for name, runs in figures.items()},
        references,
        {name: [costs(run[-1]) for run in runs] for name, runs in results.items()},
    )
    report = write_comparison(folder, loaded.name, comparison)
    if as_json:
        typer.echo(json.dumps({
            "run": str(folder), "report": str(report), "variants": comparison.variants, "references": references,
            "costs": comparison.costs,
        }, ensure_ascii=False))  # fmt: skip
        return
    for line in comparison.lines():
        typer.echo(line)
    typer.echo(f"report     {report}")


def _figures(stages: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """{who: {what was measured: value}} of one training, with the stage's name before it if there are several."""
    from bimo.evaluation.comparison import measured

    rows: dict[str, dict[str, float]] = {}
    for stage in stages:
        start = f"{stage['stage']}: " if len(stages) > 1 else ""
        for who, found in measured(stage["figures"]).items():
            rows.setdefault(who, {}).update({start + name: value for name, value in found.items()})
    return rows


class _Run:
    """One training, in a process of its own: its memory is its own, and what it leaves behind goes with it."""

    def __init__(self, file: Path, overrides: list[str], marks: dict[str, str]) -> None:
        """marks: of sources and bases, which runs share."""
        from bimo.recipe import load_recipe

        self.file, self.overrides, self.marks = file, overrides, marks
        self.recipe = load_recipe(file, overrides).model_copy(update={"compare": None, "search": None})
        self.what = self.recipe.model_dump(mode="json")

    def read(self) -> list[str]:
        """Changes with the files that are read, and with the bases."""
        marks = []
        for stage in self.recipe.stage:
            beside = (stage.replay.source, stage.pseudo_labels.source if stage.pseudo_labels else None)
            for one in (*stage.task, *beside, stage.base):
                if one is not None:
                    key = one if isinstance(one, str) else one.model_dump_json()
                    self.marks[key] = self.marks.get(key) or _mark(one)
                    marks.append(self.marks[key])
        return marks

    def finished(self, place: Path) -> list[dict[str, Any]] | None:
        """What came of it, if it was done before, by this very recipe, from the same examples and bases."""
        try:
            found = json.loads((place / "compared.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        same = found.get("recipe") == self.what and found.get("read") == self.read()
        return list(found["stages"]) if same else None

    def begin(self, place: Path) -> None:
        """What another recipe left is in the way, and this folder is a comparison's own."""
        about, what = place / "begun.json", json.dumps([self.what, self.read()], ensure_ascii=False)
        if not about.is_file() or about.read_text(encoding="utf-8") != what:
            for left in [*place.rglob("checkpoints"), *place.rglob("model")]:
                shutil.rmtree(left, ignore_errors=True)
            for left in place.rglob("metrics.jsonl"):
                left.unlink()
            place.mkdir(parents=True, exist_ok=True)
            about.write_text(what, encoding="utf-8")

    def train(self, place: Path, interrupted: Callable[[], bool], *, keep_model: bool) -> list[dict[str, Any]]:
        """Raises TrainingError when it fails, whose reason it has told; KeyboardInterrupt when interrupted, with a
        checkpoint."""
        from bimo.errors import TrainingError

        command = [sys.executable, "-m", "bimo.cli.main", "train", str(self.file), "--out", str(place), "--json"]
        output = place / "train.json"
        with output.open("wb") as stream:
            process = subprocess.Popen([*command, *(f"--set={wish}" for wish in self.overrides)], stdout=stream)
            told = False
            while process.poll() is None:
                if interrupted() and not told:
                    process.terminate()  # it writes a checkpoint; a Ctrl-C it has had already
                    told = True
                time.sleep(POLL)
        if told or interrupted():
            raise KeyboardInterrupt
        if process.returncode:
            raise TrainingError(f"the training in {place} ended with an error, told above: mend it and run the same "
                                f"command again, what is done stays done")  # fmt: skip
        stages: list[dict[str, Any]] = json.loads(output.read_text(encoding="utf-8"))["stages"]
        for stage in stages:  # of ten trainings of smollm2 they would be 20 GB
            shutil.rmtree(place / stage["stage"] / "checkpoints", ignore_errors=True)
            if not keep_model:
                shutil.rmtree(place / stage["stage"] / "model", ignore_errors=True)
        about = {"recipe": self.what, "read": self.read(), "stages": stages}
        (place / "compared.json").write_text(json.dumps(about, ensure_ascii=False), encoding="utf-8")
        output.unlink()
        return stages


def _mark(read: SourceRecipe | str) -> str:
    """Changes with a source's files, or with a base's weights."""
    from bimo.backends.adapters import find_model
    from bimo.cli.terminal import progress_display
    from bimo.data.pipeline import source_mark

    with progress_display() as progress:
        if isinstance(read, str):
            return find_model(read, progress=progress).mark
        return source_mark(read, progress)


def _share(first: Path, place: Path, recipe: Recipe) -> None:
    """What the first training read, for another one that may read the same."""
    for stage in recipe.stage:
        for name in SHARED:
            source, target = first / stage.name / name, place / stage.name / name
            if source.is_dir() and not target.exists():
                shutil.copytree(source, target)
