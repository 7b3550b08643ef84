"""`bimo run RECIPE`: from raw text to a model and a report of it, by one command.

    torchrun --standalone --nproc-per-node 2 -m bimo.cli.main run RECIPE

trains on several processes. The first one does the rest, prints and writes; the others wait.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from bimo.cli.data import Executor, Workers
from bimo.cli.follow import by_figure, follow, listed, note
from bimo.cli.options import Out, Overrides, RecipeArgument

if TYPE_CHECKING:
    from bimo.recipe import Recipe
    from bimo.runtime import Ranks
    from bimo.training.session import Texts

__all__ = ["run"]

Stage = Literal["data", "tokenizer", "training", "report"]
NEXT = {"decoder": "talk to it: bimo chat", "lstm": "go on with it: bimo generate", "seq2seq": "use it: bimo generate"}


def run(
    recipe: RecipeArgument,
    out: Out = None,
    overrides: Overrides = None,
    until: Annotated[Stage, typer.Option(help="The last stage to run.")] = "report",
    workers: Workers = None,
    executor: Executor = "local",
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as one JSON object.")] = False,
) -> None:
    """Do all that a recipe says: data, tokenizer, training, report. Run it again and it goes on where it stopped."""
    from bimo.cli.stages import alone_in, run_folder
    from bimo.data.executors import EXECUTORS
    from bimo.errors import UsageError
    from bimo.recipe import load_recipe
    from bimo.runtime import ranks as ranks_of_process

    if executor not in EXECUTORS:
        raise UsageError(f"--executor is one of {', '.join(EXECUTORS)}, not {executor!r}", "executor")
    loaded = load_recipe(recipe, overrides or [])
    if not loaded.data.sources:
        raise UsageError(
            f"{recipe} has only stages, which begin with a model that exists: bimo train {recipe}", "recipe"
        )
    wordpiece = loaded.tokenizer.kind == "wordpiece"
    if until in ("training", "report") and wordpiece != (loaded.model.kind == "encoder"):
        fits = "wordpiece" if loaded.model.kind == "encoder" else "bpe or unigram"
        raise UsageError(
            f"a model of kind {loaded.model.kind} needs tokenizer.kind {fits}, not {loaded.tokenizer.kind}", "tokenizer"
        )
    folder, ranks = run_folder(loaded, out), ranks_of_process()
    prepare = partial(_prepare, loaded, folder, until, workers, executor)
    with _together(ranks), alone_in(folder, ranks):
        texts = prepare() if ranks.world_size == 1 else _from_first(prepare, ranks)
        trained = _train(loaded, folder, texts, ranks) if texts else {}
        result: dict[str, Any] = {"run": str(folder), "manifest": str(folder / "data" / "manifest.html"), **trained}
        if until == "report":
            if ranks.is_main:
                result |= _report(loaded, folder)
            if loaded.stage:
                from bimo.cli.train import run_stages

                result["stages"] = run_stages(loaded, folder, workers=workers, ranks=ranks)
    if not ranks.is_main:
        return
    if as_json:
        typer.echo(json.dumps(result, ensure_ascii=False))
        return
    scores, stages = result.pop("scores", {}), result.pop("stages", [])
    for key, value in result.items():
        if not isinstance(value, dict):
            typer.echo(f"{key:10} {value}")
    for name, shown in by_figure(scores).items():
        typer.echo(f"{name.replace('_', ' ')} of validation text: {shown}")
    if unigrams := result.get("unigram_accuracy"):
        typer.echo(f"the most frequent word, always: {listed(unigrams)}")
    if ngrams := result.get("ngram_bits_per_byte"):
        typer.echo(f"bits per byte of an n-gram model: {listed(ngrams)}")
    for name, figures in result.get("translation", {}).items():
        typer.echo(f"held-out pairs, {name}: BLEU {figures['bleu']:.1f}, chrF {figures['chrf']:.1f}")
    if until in ("training", "report") and (hint := NEXT.get(loaded.model.kind)):
        typer.echo(f"{hint} {result['model']}")
    if stages:
        from bimo.cli.train import show_stage

        for stage in stages:
            show_stage(stage)


def _prepare(recipe: Recipe, folder: Path, until: Stage, workers: int | None, executor: str) -> Texts | None:
    """The stages before training, as far as `until`; the texts, if it goes so far."""
    from bimo.cli.stages import make_tokenizer, make_tokens, prepare_data
    from bimo.cli.terminal import progress_display

    with progress_display() as progress:
        prepared = prepare_data(recipe, folder, workers=workers, executor=executor, progress=progress)
        if until == "data":
            return None
        tokenizer = make_tokenizer(recipe, folder, prepared, progress)
        return None if until == "tokenizer" else make_tokens(recipe, folder, prepared, tokenizer, progress)


def _together(ranks: Ranks) -> AbstractContextManager[None]:
    if ranks.world_size == 1:
        return nullcontext()
    from bimo.training.distributed import process_group

    return process_group(ranks)


def _from_first(prepare: Callable[[], Texts | None], ranks: Ranks) -> Texts | None:
    """Of several processes the first one prepares, the others open what it made."""
    from bimo.data.shards import TokenFile
    from bimo.tokenizer.load import Tokenizer
    from bimo.training.distributed import from_main
    from bimo.training.session import Texts

    def places() -> tuple[Path, dict[str, Path], dict[str, Path]] | None:
        if (texts := prepare()) is None:
            return None
        parts = (texts.train, texts.validation)
        train, validation = ({name: file.folder for name, file in part.items()} for part in parts)
        return texts.tokenizer.directory, train, validation

    if (made := from_main(ranks, places)) is None:
        return None
    tokenizer, *parts = made
    train, validation = ({name: TokenFile.open(place) for name, place in part.items()} for part in parts)
    return Texts(train, validation, Tokenizer.from_directory(tokenizer))


def _train(recipe: Recipe, folder: Path, texts: Texts, ranks: Ranks) -> dict[str, Any]:
    """The training stage; nothing to do when the model is there and was made by this recipe from these texts."""
    from bimo.objectives.kinds import make_objective
    from bimo.recipe import save_recipe
    from bimo.training.build import build_model, model_config
    from bimo.training.distributed import from_main, training_device
    from bimo.training.session import Job, finished, train_run

    tell: Callable[[str], None] = note if ranks.is_main else lambda text: None
    job = Job.of(recipe)
    lineage = from_main(ranks, lambda: finished(job, folder, texts))
    if lineage is None:
        objective, make_loader = make_objective(recipe, texts.tokenizer)
        config = model_config(recipe.model, recipe.objective, texts.tokenizer)
        model = build_model(config, recipe.seed).to(training_device(ranks))
        tokens = sum(len(file.tokens) for file in texts.train.values())
        size = sum(weight.numel() for weight in model.parameters())
        tell(f"{size / 1e6:.1f}M parameters, {tokens / 1e6:.2f}M tokens of text, "
             f"{recipe.training.steps} steps of {recipe.training.batch_tokens} tokens"
             + (f", {ranks.world_size} processes" if ranks.world_size > 1 else ""))  # fmt: skip
        events = train_run(job, folder, model, objective, texts, tell, ranks, make_loader)
        follow(events, recipe.training.steps, ranks)
        lineage = from_main(ranks, lambda: finished(job, folder, texts)) or {}
    if ranks.is_main:
        save_recipe(recipe, folder / "recipe.toml")
    return {"model": str(folder / "model"), "scores": lineage.get("scores", {})}


def _report(recipe: Recipe, folder: Path) -> dict[str, Any]:
    """report.html: curves, scores, samples, simpler models beside it. Its path, and the figures of those."""
    from bimo.cli.results import gather
    from bimo.cli.terminal import progress_display
    from bimo.evaluation.run_report import write_report

    with progress_display() as progress:
        results = gather(recipe, folder, progress)
    return {"report": str(write_report(folder, recipe, results.samples, results.tables)), **results.figures}
