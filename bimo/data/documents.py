"""Documents on disk: Parquet files that any tool of the field reads.

    with DocumentWriter(file) as writer: writer.write(document)
    for document in read_documents([file]): ...

Both stream: a row group at a time is in memory.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from bimo.data.records import Document, Message
from bimo.errors import DataError

__all__ = ["COLUMNS", "DocumentWriter", "read_documents"]

COLUMNS = ("id", "source", "language", "title", "text", "group", "label", "messages")
GROUP_CHARACTERS = 4_000_000  # of a row group
BATCH = 512  # documents made of one at a time


def _schema() -> Any:
    import pyarrow

    message = pyarrow.struct([("role", pyarrow.string()), ("content", pyarrow.string())])
    kinds = {"messages": pyarrow.list_(message)}
    return pyarrow.schema([(name, kinds.get(name, pyarrow.string())) for name in COLUMNS])


class DocumentWriter:
    """Writes one Parquet file. num_documents and num_characters count what went in."""

    def __init__(self, path: Path) -> None:
        import pyarrow.parquet

        self.path, self.num_documents, self.num_characters = path, 0, 0
        self._rows: list[dict[str, Any]] = []
        self._size = 0
        self._schema = _schema()
        self._file = pyarrow.parquet.ParquetWriter(path, self._schema, compression="zstd")

    def write(self, document: Document) -> None:
        row: dict[str, Any] = {name: getattr(document, name) for name in COLUMNS[:-1]}
        row["messages"] = [message._asdict() for message in document.messages]
        self._rows.append(row)
        self.num_documents += 1
        self.num_characters += len(document.text)
        self._size += len(document.text) + 200
        if self._size >= GROUP_CHARACTERS:
            self._flush()

    def close(self) -> None:
        self._flush()
        self._file.close()

    def __enter__(self) -> DocumentWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if error is None:
            self.close()
            return
        with contextlib.suppress(Exception):  # on a full disk this fails too, and the first error says why
            self._file.close()

    def _flush(self) -> None:
        import pyarrow

        if self._rows:
            self._file.write_table(pyarrow.Table.from_pylist(self._rows, self._schema))
        self._rows, self._size = [], 0


def read_documents(files: Iterable[Path]) -> Iterator[Document]:
    """All documents, file by file; DataError names a file that cannot be read."""
    import pyarrow
    import pyarrow.parquet

    for path in files:
        try:
            with pyarrow.parquet.ParquetFile(path, pre_buffer=False) as file:  # no threads, whose buffers stay
                for group in range(file.num_row_groups):  # batches over several would hold more of them at once
                    for batch in file.iter_batches(BATCH, [group], list(COLUMNS), use_threads=False):
                        for row in batch.to_pylist():
                            messages = tuple(Message(**message) for message in row.pop("messages"))
                            yield Document(**row, messages=messages)
        except (OSError, pyarrow.ArrowException, KeyError, TypeError) as error:
            raise DataError(
                f"{path} is not a readable file of documents ({' '.join(str(error).split())}): remove it and run the "
                f"same command again"
            ) from None
