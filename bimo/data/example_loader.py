"""From example files to batches: whole examples side by side in rows of a fixed length, each task in files of its own.

    loader = ExampleLoader([support, replay], length=512, seed=0, loss_weights=[1.0, 0.1])
    batch = loader.next_batch(8)            # ExampleBatch

Examples are put into rows once, best fit first by falling length (Johnson 1974), which leaves a few in a hundred places
empty; padding each to the longest of a batch, the usual way, leaves a third to two thirds of them. An example of n
tokens takes n - 1 places: what is read, and beside each token the one to be written after it.

The joint loss of several tasks is an average of each task's own average (objectives.answers):

    L = Σ_i w_i L_i / Σ_i w_i,   L_i = -Σ log p(token) / tokens of task i in the step

so that a task with long answers does not drown one with short ones. `ExampleBatch.weights` are the factors of single
tokens by which a plain mean over all tokens becomes this L; they are the same for every process and part of a step.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bimo.data.loader import IGNORED, Batch, Origin, RowLoader
from bimo.data.shards import TokenFile

__all__ = ["ExampleBatch", "ExampleLoader", "fill_rows"]

COLUMNS = 64  # a row's tokens are rounded up to it, see objectives.rows


@dataclass(frozen=True)
class ExampleBatch(Batch):
    """weights (B, T) float32: by which factor each token's loss counts; 1 for all where there is one task."""

    weights: NDArray[np.float32]

    def rows(self, part: slice) -> ExampleBatch:
        """Some of its rows, without the columns that are empty in all of them."""
        plain = super().rows(part)
        filled = np.flatnonzero((plain.positions > 0).any(0) | (plain.targets != IGNORED).any(0))
        width = min(self.targets.shape[1], -(-(int(filled[-1]) + 1 if len(filled) else 1) // COLUMNS) * COLUMNS)
        arrays = (array[:, :width] for array in (plain.input_ids, plain.targets, plain.positions, plain.segments))
        input_ids, targets, positions, segments = arrays
        return ExampleBatch(input_ids, targets, positions, segments, plain.origins, self.weights[part, :width])

    def idle(self) -> ExampleBatch:
        """One row of which nothing is predicted."""
        plain = super().idle()
        weights = np.ones(plain.targets.shape, np.float32)
        return ExampleBatch(plain.input_ids, plain.targets, plain.positions, plain.segments, (), weights)


class ExampleLoader(RowLoader):
    """loss_weights: w of each file's task, 1 if not given."""

    def __init__(
        self,
        files: Sequence[TokenFile],
        *,
        length: int,
        loss_weights: Sequence[float] | None = None,
        seed: int = 0,
        **order: Any,
    ) -> None:
        self.loss_weights = list(loss_weights or [1.0] * len(files))
        self._rows: dict[int, list[list[int]]] = {}
        self._learned: dict[int, NDArray[np.int64]] = {}
        self.length, self.seed = length, seed
        super().__init__(files, length=length, seed=seed, **order)
        used = sum(int(file.ends[-1]) - len(file.ends) for file in files if len(file.ends))
        self._row_tokens = max(1, round(used / max(1, sum(self.num_rows))))

    @property
    def row_tokens(self) -> int:
        """Tokens that are read, on average; empty places do not count."""
        return self._row_tokens

    def rows_in(self, file: TokenFile) -> int:
        return len(self._rows_of(file))

    def span(self, file: TokenFile, row: int) -> tuple[int, int]:
        """Of the row's first example; the others lie elsewhere."""
        return _span(file, self._rows_of(file)[row][0])

    def provenance(self, batch: ExampleBatch) -> list[str]:
        """The examples of each row."""
        shown = []
        for origin in batch.origins:
            file = self.files[origin.file]
            names = [file.document_id(number) for number in self._rows_of(file)[origin.row][:3]]
            shown.append(", ".join(names))
        return shown

    def next_batch(self, num_rows: int, *, rank: int = 0, world_size: int = 1) -> ExampleBatch:
        origins = [self._next_origin() for _ in range(num_rows)]
        batch = self.batch(origins[rank::world_size])
        factors = self._factors(origins)
        for place, origin in enumerate(batch.origins):
            batch.weights[place] = factors[origin.file]
        return batch

    def batch(self, origins: Sequence[Origin]) -> ExampleBatch:
        shape = (len(origins), self.length)
        input_ids, positions, segments = (np.zeros(shape, np.int64) for _ in range(3))
        targets = np.full(shape, IGNORED, np.int64)
        for place, origin in enumerate(origins):
            file = self.files[origin.file]
            start = number = 0
            for number, example in enumerate(self._rows_of(file)[origin.row]):
                begin, end = _span(file, example)
                ids = file.tokens[begin:end].astype(np.int64)
                stop = start + len(ids) - 1
                input_ids[place, start:stop], targets[place, start:stop] = ids[:-1], ids[1:]
                if file.trained is not None:
                    targets[place, start:stop][file.trained[begin + 1 : end] == 0] = IGNORED
                positions[place, start:stop] = np.arange(stop - start)
                segments[place, start:stop] = number
                start = stop
            segments[place, start:] = number + 1
            positions[place, start:] = 0
        return ExampleBatch(input_ids, targets, positions, segments, tuple(origins), np.ones(shape, np.float32))

    def _factors(self, origins: Sequence[Origin]) -> dict[int, float]:
        """Of each file with rows in this step: w_i N / (N_i Σ w), for N learned tokens in all, N_i of this file."""
        learned: dict[int, int] = {}
        for origin in origins:
            learned[origin.file] = learned.get(origin.file, 0) + int(self._learned_of(origin.file)[origin.row])
        learned = {number: count for number, count in learned.items() if count}
        total, weights = sum(learned.values()), sum(self.loss_weights[number] for number in learned)
        factors = dict.fromkeys((origin.file for origin in origins), 0.0)
        return factors | {
            number: self.loss_weights[number] * total / (count * weights) for number, count in learned.items()
        }

    def _rows_of(self, file: TokenFile) -> list[list[int]]:
        rows = self._rows.get(id(file))
        if rows is None:
            sizes = np.diff(np.asarray(file.ends), prepend=0) - 1
            rows = self._rows[id(file)] = fill_rows(sizes, self.length)
        return rows

    def _learned_of(self, number: int) -> NDArray[np.int64]:
        """(rows,) how many tokens of each are learned."""
        counts = self._learned.get(number)
        if counts is None:
            file = self.files[number]
            starts = np.concatenate(([0], np.asarray(file.ends)[:-1]))
            trained = np.ones(len(file.tokens), np.int64) if file.trained is None else file.trained.astype(np.int64)
            before = np.concatenate(([0], np.cumsum(trained)))
            each = before[np.asarray(file.ends)] - before[starts + 1]  # nothing predicts an example's first token
            counts = self._learned[number] = np.array([each[row].sum() for row in self._rows_of(file)], np.int64)
        return counts


def fill_rows(sizes: NDArray[Any], length: int) -> list[list[int]]:
    """Numbers of the examples of each row, none more than `length` in all: the longest first, each into the fullest row
    it fits into. Examples of nothing and of more than a row are left out."""
    rows: list[list[int]] = []
    spaces: list[tuple[int, int]] = []  # (places left, row), ascending
    for number in np.argsort(-np.asarray(sizes), kind="stable").tolist():
        size = int(sizes[number])
        if not 0 < size <= length:
            continue
        at = bisect.bisect_left(spaces, (size, -1))
        if at == len(spaces):
            rows.append([number])
            left, row = length - size, len(rows) - 1
        else:
            left, row = spaces.pop(at)
            rows[row].append(number)
            left -= size
        if left:
            bisect.insort(spaces, (left, row))
    return rows


def _span(file: TokenFile, example: int) -> tuple[int, int]:
    return int(file.ends[example - 1]) if example else 0, int(file.ends[example])
