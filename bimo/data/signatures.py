"""MinHash signatures of a corpus on disk, read like an array: what `dedup.find_duplicates` asks for, in flat memory.

    with tempfile.TemporaryFile() as columns:
        signatures = SignatureFile([folder / "signatures.bin", ...], counts, columns)
        signatures[:, 3]         # one minimum of all documents
        signatures[[17, 4]]      # all minima of two documents

Written by the workers of data.pipeline, one file a unit.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from bimo.data.dedup import NUM_MINIMA

__all__ = ["SignatureFile"]

CHUNK = 1 << 13  # signatures turned round at once: 4 MB, twice


class SignatureFile:
    """(N, NUM_MINIMA) uint32 of several files, `counts` documents each.

    Mapped they would be the largest thing in memory: a column touches every page. So they are turned round once, into
    `columns`, an open file without a name, in which a column is one piece.
    """

    def __init__(self, files: list[Path], counts: list[int], columns: IO[bytes]) -> None:
        self._files = files
        self._starts = np.cumsum([0, *counts])
        self.shape = (int(self._starts[-1]), NUM_MINIMA)
        self._columns = columns
        for file, start, count in zip(files, self._starts.tolist(), counts, strict=False):
            for begin in range(0, count, CHUNK):
                size = min(CHUNK, count - begin) * NUM_MINIMA
                rows = np.fromfile(file, np.uint32, size, offset=begin * 4 * NUM_MINIMA).reshape(-1, NUM_MINIMA)
                for column, values in enumerate(np.ascontiguousarray(rows.T)):
                    os.pwrite(columns.fileno(), values, 4 * (column * len(self) + start + begin))

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, wanted: Any) -> NDArray[np.uint32]:
        if isinstance(wanted, tuple):
            size = 4 * len(self)
            return np.frombuffer(os.pread(self._columns.fileno(), size, wanted[1] * size), np.uint32)
        rows = np.empty((len(wanted), NUM_MINIMA), np.uint32)
        units = np.searchsorted(self._starts, wanted, "right") - 1
        for unit in np.unique(units):
            with self._files[unit].open("rb", buffering=0) as file:
                for place in np.flatnonzero(units == unit).tolist():
                    os.preadv(file.fileno(), [rows[place]], int(wanted[place] - self._starts[unit]) * 4 * NUM_MINIMA)
        return rows
