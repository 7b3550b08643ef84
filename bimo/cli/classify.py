"""`bimo classify MODEL TEXT...`: the classes that a trained encoder tells."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Iterator
from typing import Annotated

import typer

from bimo.cli import options

__all__ = ["classify"]

AT_ONCE = 256  # lines of standard input: texts of similar length are computed together
SHOWN = 60  # characters of a text


def classify(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=f"An encoder with classes. {options.MODEL_HELP}")],
    texts: Annotated[
        list[str] | None, typer.Argument(metavar="TEXT...", help="Texts; without any, a line of standard input each.")
    ] = None,
    task: Annotated[str | None, typer.Option(metavar="NAME", help="Of a model of several; else all of them.")] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print a JSON object for each text and task: text, task, label, probability.")
    ] = False,
) -> None:
    """Tell the class of each text, and how likely that is."""
    from bimo.cli.terminal import progress_display
    from bimo.evaluation.classification import Classifier

    rows = iter([options.checked_text(text, "text") for text in texts]) if texts else _lines()
    with progress_display() as progress:
        classifier = Classifier(model, progress=progress)
    classifier.labels.of(task or classifier.labels.tasks[0])  # a wrong name is said before anything is read
    tasks = [task] if task else list(dict.fromkeys(classifier.labels.tasks))
    while some := list(itertools.islice(rows, AT_ONCE)):
        told = [classifier(some, name or None) for name in tasks]
        for place, text in enumerate(some):
            for name, answers in zip(tasks, told, strict=True):
                label, probability = answers[place]
                if as_json:
                    row = {"text": text, "task": name or None, "label": label, "probability": round(probability, 4)}
                    typer.echo(json.dumps(row, ensure_ascii=False))
                else:
                    which = f"{name}: " if len(tasks) > 1 else ""
                    typer.echo(f"{probability:6.1%} {which}{label}  {' '.join(text.split())[:SHOWN]}")
    if classifier.num_cut:
        typer.echo(f"note: of {classifier.num_cut // len(tasks):,} texts only the first {classifier.max_tokens} tokens "
                   f"were read", err=True)  # fmt: skip


def _lines() -> Iterator[str]:
    """Standard input, a text a line; empty lines are none. Raises UsageError where it is not UTF-8."""
    from bimo.errors import UsageError

    if sys.stdin is None or sys.stdin.isatty():
        raise UsageError("no text: name some behind the model, or pipe them in, one a line", "text")
    for number, line in enumerate(sys.stdin.buffer, 1):
        try:
            text = line.decode("utf-8-sig").strip()
        except UnicodeDecodeError:
            raise UsageError(f"line {number} of standard input is not valid UTF-8: convert it first, e.g. with "
                             f"iconv -t utf-8", "text") from None  # fmt: skip
        if text:
            yield text
