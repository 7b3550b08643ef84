"""Progress on standard error: a bar on a terminal, a line per stage elsewhere; nothing for what takes no time.

    with progress_display() as progress:
        model = bimo.load("smollm2", progress=progress)

`progress(label, done, total)` may be called as often as one likes, from one thread.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from bimo.formats.integrity import Progress

__all__ = ["human_bytes", "human_count", "progress_display", "show_cursor"]

PATIENCE = 0.5  # seconds a stage may take before it is worth a line in a log
FEW = 100_000  # what is counted up to here is texts or rows: so few bytes take no time


def human_bytes(count: float) -> str:
    """Bytes as people read them: 98.4 MB."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def human_count(count: float) -> str:
    """Parameters as people read them: 135M, 1.2B."""
    return f"{count / 1e9:.1f}B" if count >= 1e9 else f"{count / 1e6:.0f}M"


def show_cursor() -> None:
    """Bring back the terminal's cursor after a progress bar that could not end properly."""
    if sys.stderr.isatty():
        sys.stderr.write("\x1b[?25h")
        sys.stderr.flush()


@contextmanager
def progress_display() -> Iterator[Progress]:
    """A callable (label, done, total) that shows where things are until the block ends."""
    if sys.stderr.isatty():
        with _bar() as report:
            yield report
    else:
        yield _lines()


def _lines() -> Progress:
    """One line for each stage that goes on for longer than `PATIENCE`, for logs and pipes."""
    started: dict[str, float] = {}
    told: set[str] = set()

    def report(label: str, done: int, total: int) -> None:
        now = time.monotonic()
        begun = started.setdefault(label, now)
        if label not in told and (now - begun > PATIENCE or not total):
            told.add(label)
            print(f"{label}{f' ({_amount(total, total)})' if total else ''} ...", file=sys.stderr, flush=True)

    return report


def _amount(count: float, total: float) -> str:
    """Of a total in bytes "98.4 MB"; of one that is too small for bytes "64"."""
    return f"{count:,.0f}" if total < FEW else human_bytes(count)


@contextmanager
def _bar() -> Iterator[Progress]:
    """A rich bar with what is done, speed and time left; gone when the work is done."""
    from rich.console import Console
    from rich.progress import BarColumn, ProgressColumn, Task, TaskID, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar
    from rich.text import Text

    class Amount(ProgressColumn):
        def render(self, task: Task) -> Text:
            total = task.total or 0
            speed = f"  {_amount(task.speed, total)}/s" if task.speed and total else ""
            return Text(f"{_amount(task.completed, total)}/{_amount(total, total)}{speed}" if total else "")

    columns = (TextColumn("{task.description}"), BarColumn(), Amount(), TimeRemainingColumn())
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        tasks: dict[str, TaskID] = {}

        def report(label: str, done: int, total: int) -> None:
            if label not in tasks:
                for task in tasks.values():
                    bar.update(task, visible=False)
                tasks[label] = bar.add_task(label, total=total or None)
            bar.update(tasks[label], completed=done, total=total or None)

        yield report
