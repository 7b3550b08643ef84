"""From token files to batches: rows of a fixed length, in an order that a few numbers describe exactly.

    loader = PackedLoader([TokenFile.open(folder)], length=512, seed=0)
    batch = loader.next_batch(32)
    state = loader.state()          # goes into the checkpoint; loader.restore(state) continues with the very next row

A row is `length` + 1 consecutive tokens, so documents are packed one after the other and cut at the row's ends:

    tokens:   | ... d1 d1 | d2 d2 d2 d2 d2 | d3 d3 ...
    row:           [ d1 d1   d2 d2 d2 d2 d2   d3 ]         segments 0 0 1 1 1 1 1 2, positions 0 1 0 1 2 3 4 0

No token is predicted from another document (its target is -100), nor does attention look across (objectives.causal).
Each file's rows come in a random order of their own in every epoch; files take turns in proportion to their weights.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

from bimo.data.shards import TokenFile
from bimo.errors import UsageError

__all__ = ["IGNORED", "Batch", "Origin", "PackedLoader", "RowLoader"]

IGNORED = -100  # a target that is not predicted


class Origin(NamedTuple):
    """Where a row is from: the number of its file, its place there, and how often the file was read before."""

    file: int
    row: int
    epoch: int


@dataclass(frozen=True)
class Batch:
    """B rows of T tokens. All int64 (B, T).

    targets: the next token, or IGNORED. segments: 0, 1, ... for the documents of a row. positions: in the document.
    origins: of each row; `RowLoader.provenance` puts them into words.
    """

    input_ids: NDArray[np.int64]
    targets: NDArray[np.int64]
    positions: NDArray[np.int64]
    segments: NDArray[np.int64]
    origins: tuple[Origin, ...]

    is_text: ClassVar[bool] = True  # the targets are all of a text, so that bits per byte can be told

    def __len__(self) -> int:
        return len(self.input_ids)

    def rows(self, part: slice) -> Batch:
        """Some of its rows."""
        input_ids, targets, positions, segments = (
            array[part] for array in (self.input_ids, self.targets, self.positions, self.segments)
        )
        return Batch(input_ids, targets, positions, segments, self.origins[part])

    @property
    def num_targets(self) -> int:
        return int((self.targets != IGNORED).sum())

    def idle(self) -> Batch:
        """One row of this batch's length of which nothing is predicted."""
        zeros = np.zeros((1, self.input_ids.shape[1]), np.int64)
        return Batch(zeros, np.full_like(zeros, IGNORED), np.arange(zeros.shape[1])[None], zeros, ())


class RowLoader(ABC):
    """An endless, resumable stream of rows, the order of any loader. `shuffle=False`: in the files' order, once round
    after the other.

    A subclass says how many rows a file has (`rows_in`), which tokens are a row's (`span`), and what a batch of rows is
    (`batch`). What it draws by chance comes from `draws`, so that a row is the same whoever reads it, and another one
    in the next epoch.
    """

    def __init__(
        self,
        files: Sequence[TokenFile],
        *,
        length: int,
        seed: int = 0,
        weights: Sequence[float] | None = None,
        shuffle: bool = True,
    ) -> None:
        self.files, self.length, self.seed, self.shuffle = files, length, seed, shuffle
        self.num_rows = [self.rows_in(file) for file in files]
        weighted = np.array(weights or [1.0] * len(files)) * self.num_rows
        if not weighted.sum():
            most = max((len(file.tokens) for file in files), default=0)
            raise UsageError(f"no source has text for one row of {length} tokens, the longest has {most}: add text, or "
                             f"shorten the model's context_length", "data")  # fmt: skip
        self.shares = weighted / weighted.sum()
        self.taken = [0] * len(files)  # rows given out of each file: the whole state
        self._orders: dict[int, tuple[int, NDArray[np.int64]]] = {}

    def state(self) -> dict[str, Any]:
        return {"taken": list(self.taken)}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue after the last row that was given out when `state` was taken."""
        if len(state["taken"]) != len(self.files):
            raise UsageError(
                f"the checkpoint was made with {len(state['taken'])} sources of text, this recipe has "
                f"{len(self.files)}: go back to the recipe it was made with, or name another run"
            )
        self.taken = [int(count) for count in state["taken"]]

    @property
    def epochs(self) -> float:
        """How often the text was read so far."""
        return sum(self.taken) / max(1, sum(self.num_rows))

    @property
    def row_tokens(self) -> int:
        """Tokens of a row, on average: a step has batch_tokens / row_tokens rows."""
        return self.length

    @abstractmethod
    def rows_in(self, file: TokenFile) -> int:
        """How many rows it has."""

    @abstractmethod
    def span(self, file: TokenFile, row: int) -> tuple[int, int]:
        """The tokens [start, end) of the file that a row is made of."""

    @abstractmethod
    def batch(self, origins: Sequence[Origin]) -> Any:
        """The rows that `origins` name."""

    def next_batch(self, num_rows: int, *, rank: int = 0, world_size: int = 1) -> Any:
        """The next rows. All processes call it alike; each gets every `world_size`-th row, from `rank` on."""
        return self.batch(self.arrange([self._next_origin() for _ in range(num_rows)])[rank::world_size])

    def arrange(self, origins: list[Origin]) -> list[Origin]:
        """The order in which a batch's rows are computed."""
        return origins

    def draws(self, origin: Origin) -> np.random.Generator:
        """Random numbers of a row's own."""
        return np.random.default_rng((self.seed, *origin))

    def provenance(self, batch: Any) -> list[str]:
        """The documents a batch's rows were cut from."""
        names = []
        for origin in batch.origins:
            file = self.files[origin.file]
            start, end = self.span(file, origin.row)
            first, last = np.searchsorted(file.ends, [start, end - 1], side="right")
            shown = [file.document_id(index) for index in dict.fromkeys((int(first), int(last)))]
            names.append(" to ".join(dict.fromkeys(shown)))
        return names

    def _next_origin(self) -> Origin:
        """The file that lags most behind its share, and its next row."""
        total = sum(self.taken) + 1
        lag = [share * total - taken for share, taken in zip(self.shares, self.taken, strict=True)]
        number = max(range(len(lag)), key=lambda index: (self.shares[index] > 0, lag[index]))
        epoch, place = divmod(self.taken[number], self.num_rows[number])
        self.taken[number] += 1
        if not self.shuffle:
            return Origin(number, place, epoch)
        kept = self._orders.get(number)
        if kept is None or kept[0] != epoch:
            order = np.random.default_rng((self.seed, number, epoch)).permutation(self.num_rows[number])
            kept = self._orders[number] = (epoch, order)
        return Origin(number, int(kept[1][place]), epoch)


class PackedLoader(RowLoader):
    """Rows of `length` consecutive tokens, and the token after each."""

    def rows_in(self, file: TokenFile) -> int:
        return max(0, len(file.tokens) - 1) // self.length

    def span(self, file: TokenFile, row: int) -> tuple[int, int]:
        return row * self.length, (row + 1) * self.length + 1

    def batch(self, origins: Sequence[Origin]) -> Batch:
        input_ids, targets, positions, segments = (np.empty((len(origins), self.length), np.int64) for _ in range(4))
        for index, (number, row, _) in enumerate(origins):
            places = (input_ids[index], targets[index], positions[index], segments[index])
            self._fill(self.files[number], row * self.length, *places)
        return Batch(input_ids, targets, positions, segments, tuple(origins))

    def _fill(self, file: TokenFile, start: int, ids: Any, targets: Any, positions: Any, segments: Any) -> None:
        row = file.tokens[start : start + self.length + 1].astype(np.int64)
        ids[:], targets[:] = row[:-1], row[1:]
        # where documents begin inside the row; the row's own start counts as one
        first = int(np.searchsorted(file.ends, start, side="right"))
        last = int(np.searchsorted(file.ends, start + self.length, side="left"))
        borders = file.ends[first:last] - start
        segments[:] = np.searchsorted(borders, np.arange(self.length), side="right")
        starts = np.concatenate(([0], borders))
        positions[:] = np.arange(self.length) - starts[segments]
        targets[borders - 1] = IGNORED  # the last token of a document: what follows is another one
        if len(file.ends) > last and file.ends[last] - start == self.length:
            targets[-1] = IGNORED
