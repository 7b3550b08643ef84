"""`bimo data select MODEL TEXTS --count N`: which unlabelled texts teach a classifier most (active learning)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bimo.cli.options import MODEL_HELP

if TYPE_CHECKING:
    from bimo.data.records import Document

__all__ = ["select"]

SHOWN = 60  # characters of a text


def select(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=f"An encoder with classes. {MODEL_HELP}")],
    texts: Annotated[
        str, typer.Argument(metavar="TEXTS", help="A file, folder, pattern or package; a prepared run's folder.")
    ],
    count: Annotated[int, typer.Option("--count", min=1, help="So many texts.")],
    method: Annotated[
        str, typer.Option(help="uncertainty+diversity, margin, entropy, diversity or random.")
    ] = "uncertainty+diversity",
    out: Annotated[
        Path | None, typer.Option(metavar="FILE.jsonl", help="Write them here, with an empty label to fill in.")
    ] = None,
    without: Annotated[
        list[str] | None, typer.Option(metavar="TEXTS", help="Leave out what stands here; may be repeated.")
    ] = None,
    task: Annotated[str | None, typer.Option(metavar="NAME", help="Of a model of several tasks.")] = None,
    text: Annotated[str, typer.Option(help="The field, or a template such as {question}, of rows in files.")] = "text",
    seed: Annotated[int, typer.Option(help="Other draws.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Rank unlabelled texts by how unsure a trained classifier is of them, and how unlike each other they are."""
    from bimo.cli.terminal import progress_display
    from bimo.data.collection import Collection
    from bimo.data.selection import METHODS, rank
    from bimo.errors import DataError, UsageError
    from bimo.evaluation.classification import Classifier

    if method not in METHODS:
        raise UsageError(f"--method is one of {', '.join(METHODS)}, not {method!r}", "method")
    if out is not None and out.exists():  # it may hold an afternoon of labelling
        raise UsageError(f"{out} exists, and may have been labelled: name another file", "out")
    with progress_display() as progress:
        pool = Collection(texts, text=text, progress=progress)
        known = {
            document.text.strip()
            for place in without or []
            for document in Collection(place, text=text, progress=progress).documents()
        }
        classifier = Classifier(model, progress=progress)
        numbers = classifier.labels.of(task)
        seen = _Distinct(known)
        progress(f"reading {texts}", 0, 0)
        chances, vectors = classifier.read((document.text for document in seen.of(pool.documents())), task)
        if count > len(chances):
            raise UsageError(
                f"--count {count} is more than the {len(chances)} texts there are to label ({seen.about}): lower it",
                "count",
            )
        order = rank(chances, vectors, count, method, seed=seed).tolist()
        places = {row: place for place, row in enumerate(order)}
        rows: list[dict[str, Any]] = [{}] * count
        for row, document in enumerate(_Distinct(known).of(pool.documents())):
            if (place := places.get(row)) is not None:
                best = int(chances[row].argmax())
                guess = {"guess": classifier.labels.plain[numbers[best]], "probability": float(chances[row, best])}
                rows[place] = {"id": document.id, "text": document.text, "label": "", **guess}
    for damage in pool.damages:
        typer.echo(f"not read: {damage.id} {damage.reason}", err=True)
    if out is not None:
        try:
            out.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        except OSError as error:
            raise DataError(f"{out} cannot be written ({error.strerror}): name another file") from None
    if as_json:
        about = {"method": method, "num_texts": len(chances), "num_cut": classifier.num_cut, "skipped": seen.skipped}
        typer.echo(json.dumps({**about, "selected": rows}, ensure_ascii=False))
        return
    typer.echo(f"{count:,} of {len(chances):,} texts by {method} ({seen.about})")
    for found in rows if out is None else rows[:5]:
        typer.echo(f"{found['probability']:6.1%} {found['guess']}  {' '.join(found['text'].split())[:SHOWN]}")
    if out is not None:
        typer.echo(f"fill in the labels: {out}")


class _Distinct:
    """Texts worth a look: none that is empty, known, or came before. skipped: how many were which."""

    def __init__(self, known: set[str]) -> None:
        self.known, self.skipped = known, {"empty": 0, "copies": 0, "known": 0}

    @property
    def about(self) -> str:
        return ", ".join(f"{count:,} {what} left out" for what, count in self.skipped.items() if count) or "no copies"

    def of(self, documents: Iterator[Document]) -> Iterator[Document]:
        seen: set[int] = set()  # hashes: a corpus of texts would not fit
        for document in documents:
            text = document.text.strip()
            if not text:
                self.skipped["empty"] += 1
            elif text in self.known:
                self.skipped["known"] += 1
            elif hash(text) in seen:
                self.skipped["copies"] += 1
            else:
                seen.add(hash(text))
                yield document
