"""A collection of documents as a user names it, to be read as often as needed.

texts = Collection("eval/questions.jsonl", text="{question}")
for document in texts.documents(): ...         # texts.damages: what could not be read, after the last document

a file, a folder, a pattern of files, a package ("pypi:name==1.0")     read as a recipe's source is
a folder that `bimo run` or `bimo data prepare` made                   its training documents
such a folder and ":validation"                                        its validation documents
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path

from bimo.data.documents import read_documents
from bimo.data.pipeline import Prepared
from bimo.data.readers import read_file
from bimo.data.records import Damage, Document
from bimo.data.sources import SourceFile, files_of
from bimo.errors import DataError, UsageError
from bimo.recipe import SourceRecipe
from bimo.registries.packages import is_package
from bimo.registries.trouble import Progress

__all__ = ["Collection"]

SPLITS = ("train", "validation")


class Collection:
    """text: a field or a template for rows of files, as of a source; without effect on prepared documents.

    Raises UsageError when there are no such files, DataError when a prepared folder is not whole.
    """

    def __init__(self, place: str, *, text: str = "text", progress: Progress | None = None) -> None:
        self.place, self.damages = place, list[Damage]()
        self._prepared: list[Path] | None = _prepared(place)
        self._files: list[SourceFile] = []
        if self._prepared is None:
            name = re.sub(r"[^\w.-]+", "-", Path(place).name).strip("-") or "documents"
            self._source = SourceRecipe(name=name, path=place, text=text)
            self._files = files_of(self._source, progress or (lambda label, done, total: None))

    def documents(self) -> Iterator[Document]:
        """All of them, in order. Raises DataError if there is none, and says why."""
        self.damages, empty = [], True
        for item in self._read():
            if isinstance(item, Damage):
                self.damages.append(item)
            else:
                empty = False
                yield item
        if empty:
            why = next((f": {damage.id} {damage.reason}" for damage in self.damages), "")
            raise DataError(f"there is no document in {self.place}{why}")

    def _read(self) -> Iterator[Document | Damage]:
        if self._prepared is not None:
            yield from read_documents(self._prepared)
            return
        for file in self._files:
            yield from read_file(file, self._source)


def _prepared(place: str) -> list[Path] | None:
    """The Parquet files of a prepared folder; None if `place` is something else."""
    named, colon, split = place.rpartition(":")
    if is_package(place):
        return None
    if colon and split in SPLITS and not Path(place).exists():
        folder = Path(named)
    else:
        folder, split = Path(place), "train"
    for data in (folder, folder / "data"):
        with contextlib.suppress(DataError):
            return Prepared.open(data).files(split)
    if split in SPLITS and colon and folder != Path(place):
        raise UsageError(f"{named} is no folder that `bimo data prepare` has finished, so it has no {split} documents")
    return None
