"""A training as people follow it: a bar, lines, Ctrl-C; for all commands that train.

follow(train_run(...), job.training.steps, ranks)
"""

from __future__ import annotations

import contextlib
import signal
import sys
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from bimo.runtime import Ranks
    from bimo.training.loop import StepInfo
    from bimo.training.session import Evaluation

__all__ = ["by_figure", "follow", "interruptible", "listed", "note"]

EVERY = 10.0  # seconds between lines where there is no terminal


def follow(events: Generator[StepInfo | Evaluation, None, None], steps: int, ranks: Ranks) -> None:
    """Do all `steps` of a training, and show them on the main process. Raises KeyboardInterrupt when interrupted, with
    a checkpoint."""
    from bimo.training.distributed import anywhere

    display = _display(steps) if ranks.is_main else contextlib.nullcontext(lambda event: None)
    with display as show, interruptible(ranks) as interrupted, contextlib.closing(events):
        for event in events:
            show(event)
            if anywhere(ranks, interrupted()):
                events.close()  # writes a checkpoint
                if ranks.is_main:
                    note(f"stopped after step {event.step}: the same command goes on from there")
                raise KeyboardInterrupt


def by_figure(scores: Mapping[str, Mapping[str, float]]) -> dict[str, str]:
    """{"bits_per_byte": "zh 2.069, en 1.667"} of figures by language."""
    names = dict.fromkeys(name for figures in scores.values() for name in figures)
    return {
        name: listed({language: figures[name] for language, figures in scores.items() if name in figures})
        for name in names
    }


def listed(values: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.3f}" for name, value in values.items())


def note(text: str) -> None:
    typer.echo(text, err=True)


@contextmanager
def interruptible(ranks: Ranks) -> Iterator[Callable[[], bool]]:
    """Ctrl-C and SIGTERM (Slurm, Kubernetes) are noted, so that the step in hand can end well. A second one ends at
    once; not under torchrun, which hands on a Ctrl-C that the terminal has sent already."""
    pressed = False

    def press(number: int, frame: Any) -> None:
        nonlocal pressed
        pressed = True
        if ranks.world_size == 1:
            signal.signal(number, before[signal.Signals(number)])

    before = {number: signal.signal(number, press) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: pressed
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _display(steps: int) -> Iterator[Any]:
    """A bar on a terminal, a line every ten seconds elsewhere; a line for every evaluation."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from bimo.training.session import Evaluation

    console = Console(stderr=True)
    columns = (
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )
    bar = Progress(*columns, console=console, transient=True, disable=not sys.stderr.isatty())
    task, told = bar.add_task("", total=steps), time.monotonic()
    average: float | None = None

    def show(event: StepInfo | Evaluation) -> None:
        nonlocal told, average
        if isinstance(event, Evaluation):
            figures = by_figure({name: score.figures for name, score in event.scores.items()})
            shown = "; ".join(f"{name.replace('_', ' ')} {value}" for name, value in figures.items())
            console.print(f"step {event.step}: validation {shown}{'  (best)' if event.best else ''}")
            return
        average = event.loss if average is None else 0.95 * average + 0.05 * event.loss
        words = f"loss {average:.3f}  {event.num_tokens / event.seconds:,.0f} tokens/s"
        bar.update(task, completed=event.step, description=words)
        if bar.disable and time.monotonic() - told > EVERY:
            told = time.monotonic()
            console.print(f"step {event.step} of {steps}: {words}")

    with bar:
        yield show
