"""`bimo tune RECIPE`: the settings that suit best, found by trying.

    bimo tune recipe.toml --workers 2
    bimo tune recipe.toml --storage postgresql://me:secret@host/searches      # on as many machines as one likes

Each worker takes a trial, trains, and takes the next one. Run it again and it goes on where it stopped.
"""

from __future__ import annotations

import json
import multiprocessing
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bimo.cli.options import Out, Overrides, RecipeArgument

if TYPE_CHECKING:
    from rich.table import Table

    from bimo.recipe import Recipe
    from bimo.training.search import Search, Trial

__all__ = ["tune"]

SHOWN = 12  # trials in the table while it runs
POLL = 0.5  # seconds between looks at the other processes
BIAS = "this very score chose among {count} trials, so it is a little too good: measure the result on other text"


def tune(
    recipe: RecipeArgument,
    trials: Annotated[int | None, typer.Option(min=1, help="How many trials; as --set search.trials=N.")] = None,
    workers: Annotated[int, typer.Option(min=1, help="Trials at the same time on this machine.")] = 1,
    storage: Annotated[
        str | None,
        typer.Option(metavar="URL", help="The search's database, for several machines; else search.db in the folder."),
    ] = None,
    overrides: Overrides = None,
    out: Out = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as one JSON object.")] = False,
) -> None:
    """Search for the best settings: train a recipe many times, as its [search] says, and compare on validation text."""
    from bimo.cli.follow import interruptible, note
    from bimo.cli.stages import run_folder
    from bimo.cli.terminal import progress_display
    from bimo.cli.trials import Trials, searched_stage
    from bimo.errors import TrainingError, UsageError
    from bimo.runtime import Ranks, ranks

    if ranks().world_size > 1:
        raise UsageError("bimo tune starts its processes itself: use --workers, and leave torchrun out", "workers")
    wishes = [*(overrides or []), *([] if trials is None else [f"search.trials={trials}"])]
    loaded = _Order(recipe, tuple(wishes), Path(), storage).recipe()
    searched_stage(loaded)
    order = _Order(recipe, tuple(wishes), run_folder(loaded, out), storage)
    search = order.open()
    for text in search.notes:
        note(f"warning: {text}")
    with interruptible(Ranks()) as interrupted:
        runner = Trials(search, interrupted=interrupted, tell=note)
        with progress_display() as progress:
            runner.prepare(progress)
        try:
            with _board(search) as show:
                while search.waiting() or search.running():
                    if workers == 1:
                        search.work(runner, show)
                    else:
                        _share_out(order, search, workers, show, interrupted)
                    if search.running():  # on other machines, where they may be killed
                        if interrupted():
                            raise KeyboardInterrupt
                        show()
                        time.sleep(POLL)
                        search.refill()
                show()
        except KeyboardInterrupt:
            done = sum(trial.state not in ("waiting", "running") for trial in search.trials())
            note(f"stopped, {done} of {search.num_trials} trials are done: the same command goes on from there")
            raise
    result = _result(order, search)
    if search.best is None:
        failed = next((trial for trial in search.trials() if trial.reason), None)
        why = f", trial {failed.number} because {failed.reason}" if failed else ""
        raise TrainingError(f"none of the {search.num_trials} trials came to its end{why}: {result['report']} lists "
                            f"them all; mend the recipe and name another --out")  # fmt: skip
    if as_json:
        typer.echo(json.dumps(result, ensure_ascii=False))
    else:
        _print(result)


@dataclass(frozen=True)
class _Order:
    """What a worker needs to know."""

    file: Path
    overrides: tuple[str, ...]
    folder: Path
    storage: str | None

    def recipe(self, more: Sequence[str] = ()) -> Recipe:
        from bimo.recipe import load_recipe

        return load_recipe(self.file, [*self.overrides, *more])

    def open(self) -> Search:
        from bimo.training.search import Search

        root = self.file.absolute().parent
        return Search.open(self.recipe(), self.folder, self.recipe, storage=self.storage, root=root)


# --- several processes ------------------------------------------------------------------------------------------------


def _share_out(
    order: _Order, search: Search, workers: int, show: Callable[[], None], interrupted: Callable[[], bool]
) -> None:
    """Until nothing is waiting: so many processes take trials. One that was killed is replaced."""
    from bimo.errors import DataError

    context = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
    errors = context.SimpleQueue()
    processes: dict[int, Any] = {}  # by their number, from 0 to workers - 1
    deaths = 0
    try:
        while True:
            for number, process in list(processes.items()):
                if not process.is_alive():
                    deaths += process.exitcode != 0
                    del processes[number]
            if not errors.empty():
                raise DataError(errors.get())
            if deaths > 3 * search.num_trials:
                raise DataError("processes are killed again and again (out of memory?): use fewer --workers")
            search.refill()
            waiting = search.waiting()
            if not waiting and not processes:
                return
            if interrupted():
                raise KeyboardInterrupt
            for number in range(min(workers, waiting + search.running()) if waiting else 0):
                if number not in processes:
                    processes[number] = context.Process(target=_work, args=(order, number, workers, errors))
                    processes[number].start()
            show()
            time.sleep(POLL)
    finally:
        for process in processes.values():
            process.terminate()  # it writes a checkpoint
        for process in processes.values():
            process.join()


def _work(order: _Order, number: int, workers: int, errors: Any) -> None:
    """A process of several: takes trials until there are none, or until who started it is gone."""
    from bimo.cli.follow import interruptible, note
    from bimo.runtime import Ranks, cpu_threads

    parent = multiprocessing.parent_process()
    with interruptible(Ranks()) as pressed:
        try:
            import torch

            from bimo.cli.trials import Trials

            torch.set_num_threads(max(1, cpu_threads() // workers))
            ranks = Ranks(local_rank=number % max(1, torch.cuda.device_count()))
            search = order.open()
            alive: Callable[[], bool] = parent.is_alive if parent else lambda: True
            search.work(Trials(search, interrupted=lambda: pressed() or not alive(), tell=note, ranks=ranks))
        except KeyboardInterrupt:
            sys.exit(130)
        except Exception as error:
            errors.put(str(error) or type(error).__name__)
            sys.exit(1)


# --- what is shown ----------------------------------------------------------------------------------------------------


@contextmanager
def _board(search: Search) -> Iterator[Callable[[], None]]:
    """A table of the trials on a terminal; elsewhere a line for each that is done."""
    from rich.console import Console
    from rich.live import Live

    console = Console(stderr=True)
    told = {trial.number for trial in search.trials() if trial.state not in ("waiting", "running")}

    def lines() -> None:
        for trial in search.trials():
            if trial.state not in ("waiting", "running") and trial.number not in told:
                told.add(trial.number)
                best = search.best
                mark = "  (best)" if best and best.number == trial.number else ""
                console.print(f"trial {trial.number}: {_outcome(trial)}{mark}  {' '.join(trial.overrides)}",
                              markup=False, highlight=False, soft_wrap=True)  # fmt: skip

    if not sys.stderr.isatty():
        yield lines
        return
    with Live(_table(search), console=console, transient=True, auto_refresh=False) as live:
        yield lambda: live.update(_table(search), refresh=True)


def _table(search: Search) -> Table:
    from rich.table import Table
    from rich.text import Text

    trials, best = search.trials(), search.best
    done = sum(trial.state not in ("waiting", "running") for trial in trials)
    head = f"{done} of {len(trials)} trials" + (f", best {best.loss:.4f} (trial {best.number})" if best else "")
    table = Table("trial", "validation loss", *search.wish.space, title=head, title_justify="left", box=None)
    for trial in [trial for trial in trials if trial.state != "waiting"][-SHOWN:]:
        style = "bold" if best and trial.number == best.number else ""
        values = [Text(_shown(trial.settings.get(key, ""))) for key in search.wish.space]
        table.add_row(str(trial.number), Text(_outcome(trial)), *values, style=style)
    return table


def _outcome(trial: Trial) -> str:
    loss = "" if trial.loss is None else f"{trial.loss:.4f}"
    at = f" at step {trial.curve[-1][0]}" if trial.curve else ""
    match trial.state:
        case "complete":
            return loss + (f", as trial {trial.same_as}" if trial.same_as is not None else "")
        case "failed":
            return f"failed: {trial.reason}"
        case state:
            return f"{loss}{at} {state}".strip()


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _result(order: _Order, search: Search) -> dict[str, Any]:
    """What came of it, with best.toml and search.html."""
    from bimo.evaluation.search_report import write_search_report
    from bimo.recipe import save_recipe
    from bimo.training.search_storage import storage_name

    trials, best, importance = search.trials(), search.best, search.importance()
    result: dict[str, Any] = {"run": str(order.folder), "metric": search.metric, "method": search.wish.method}
    if order.storage:
        result["storage"] = storage_name(order.storage)
    if best is not None:
        file = order.folder / "best.toml"
        save_recipe(order.recipe(best.overrides).model_copy(update={"search": None}), file)
        model = order.folder / "trials" / f"{best.number:03}" / "model"
        found = {"trial": best.number, "loss": best.loss, "settings": best.settings, "set": best.overrides}
        result["best"] = found | {"recipe": str(file)} | ({"model": str(model)} if model.is_dir() else {})
    result["importance"] = importance
    result["trials"] = [
        {
            "trial": trial.number,
            "state": trial.state,
            "loss": trial.loss,
            "settings": trial.settings,
            "curve": trial.curve,
            "seconds": trial.seconds,
            **({"reason": trial.reason} if trial.reason else {}),
            **({"same_as": trial.same_as} if trial.same_as is not None else {}),
        }
        for trial in trials
    ]
    result["notes"] = [*search.notes, BIAS.format(count=len(trials))]
    report = write_search_report(order.folder, search.recipe, trials, search.metric, importance, result["notes"])
    return result | {"report": str(report)}


def _print(result: dict[str, Any]) -> None:
    best, metric = result["best"], result["metric"].replace("_", " ")
    states = [trial["state"] for trial in result["trials"]]
    counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    typer.echo(f"trials     {len(states)}: {counts}")
    typer.echo(f"best       trial {best['trial']}: {best['loss']:.4f} {metric} of validation text")
    typer.echo(f"settings   {' '.join(f'--set {shlex.quote(wish)}' for wish in best['set'])}")
    if importance := result["importance"]:
        typer.echo(f"matters    {', '.join(f'{key} {share:.0%}' for key, share in importance.items())}")
    if model := best.get("model"):
        typer.echo(f"model      {model}")
    typer.echo(f"report     {result['report']}")
    typer.echo(f"note: {result['notes'][-1]}")
    typer.echo(f"recipe with these settings: {best['recipe']}")
