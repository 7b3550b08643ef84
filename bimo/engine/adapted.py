"""Adapters beside each other by plain torch, on any device: the same sums as the kernels' (kernels/src/low_rank.h).

    attach_changes(decoder, {"support": change})    # before the linear layers are packed
    decoder.adapter_rows.select([(1, 0, 3), ...])   # before a step: rows 0 to 3 are the first adapter's

Every matrix that some adapter changes becomes an `AdaptedLinear`, whose `base` is the matrix as it was.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bimo.engine.low_rank import Change, Piece, matrix_shapes
from bimo.models.decoder import Decoder
from bimo.models.layers import MLP

__all__ = ["AdaptedLinear", "AdapterRows", "attach_changes"]


class AdapterRows:
    """Which rows of the step that is being computed belong to which adapter. One a model, its layers look here."""

    def __init__(self, names: tuple[str, ...], device: torch.device) -> None:
        self.names, self.device = names, device
        self.groups: list[tuple[int, Tensor]] = []  # number of the adapter, from 1 on; its rows

    def select(self, spans: list[tuple[int, int, int]]) -> None:
        """spans: (number of the adapter, first row, row after the last)."""
        rows: dict[int, list[int]] = {}
        for number, first, end in spans:
            if number:
                rows.setdefault(number, []).extend(range(first, end))
        self.groups = [(number, torch.tensor(found, device=self.device)) for number, found in rows.items()]


class AdaptedLinear(nn.Module):
    """base(x) + B (A x), in each row by its adapter's A and B; inference only."""

    def __init__(self, base: nn.Linear, pieces: dict[int, list[Piece]], rows: AdapterRows) -> None:
        """pieces: by the number of the adapter."""
        super().__init__()
        self.base, self.rows = base, rows
        self.pieces = {
            number: [(start, end, _like(base.weight, down), _like(base.weight, up)) for start, end, down, up in found]
            for number, found in pieces.items()
        }

    def forward(self, x: Tensor) -> Tensor:
        """x (1, T, columns) -> (1, T, rows)."""
        y = self.base(x)
        for number, rows in self.rows.groups:
            if number in self.pieces:
                part = x[0, rows]
                for start, end, down, up in self.pieces[number]:
                    y[0, rows, start:end] += (part @ down.T) @ up.T
        return y


def _like(weight: Tensor, values: object) -> Tensor:
    return torch.as_tensor(values).to(weight)


def attach_changes(model: Decoder, changes: dict[str, Change]) -> None:
    """Make the model compute adapters beside each other; numbered from 1 on, in order. Changes it in place."""
    rows = AdapterRows(tuple(changes), model.embed_tokens.weight.device)
    model.adapter_rows = rows  # type: ignore[assignment]  # no part of the module, a note on it
    changed = {matrix for change in changes.values() for matrix in change}
    for name in matrix_shapes(model.config):
        parent_name, _, child = name.rpartition(".")
        parent = model.get_submodule(parent_name)
        # an MLP is packed as a whole, or both of its matrices one by one
        beside = isinstance(parent, MLP) and any(other.startswith(f"{parent_name}.") for other in changed)
        if name in changed or beside:
            pieces = {i: change[name] for i, change in enumerate(changes.values(), start=1) if name in change}
            setattr(parent, child, AdaptedLinear(getattr(parent, child), pieces, rows))
