"""An LSTM behind `ModelRunner`: the same scheduler, prefix cache, beams and preemption as for attention.

All that a recurrent model remembers of a text is its state after the last token. So where a decoder's block of the
cache holds keys and values of its tokens, here it holds one state: that after the last of the block's tokens computed
so far. A full block's is the one to go on from, whoever shares the block; a part-filled block is copied with its state
when a sequence forks.

    tokens   [ 0 ............ 15 | 16 ........... 31 | 32 33 ]
    states                  s15                  s31      s33       one place a block, 2 x num_layers x D numbers

Legend: B pieces computed together, T tokens of each, D hidden_size, L num_layers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bimo.engine.eager import EagerDecoder, padded_rows
from bimo.engine.paged import lazy_zeros
from bimo.engine.scheduler import Scheduled
from bimo.models.config import LSTMConfig
from bimo.models.recurrent import LSTMLanguageModel

__all__ = ["RecurrentDecoder", "StateCache"]


class StateCache:
    """A hidden and a cell state a block."""

    def __init__(
        self, config: LSTMConfig, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.config, self.num_blocks, self.block_size = config, num_blocks, block_size
        self.dtype, self.device = str(dtype).removeprefix("torch."), str(device)
        shape = (2, config.num_layers, num_blocks, config.hidden_size)
        self.states = lazy_zeros(shape, dtype).to(device)

    def copy_blocks(self, copies: list[tuple[int, int]]) -> None:
        """Copy the states of blocks, (source, destination) each; for forked sequences."""
        if copies:
            self.states[:, :, [d for _, d in copies]] = self.states[:, :, [s for s, _ in copies]]


class RecurrentDecoder(EagerDecoder):
    """The model behind `ModelRunner`, as its base is for attention. A token that was computed cannot be taken back,
    since the state before it is gone: no speculation."""

    can_speculate = False

    model: LSTMLanguageModel
    config: LSTMConfig

    def __init__(self, model: LSTMLanguageModel) -> None:
        super().__init__(model)

    def make_cache(self, num_blocks: int, block_size: int) -> StateCache:  # type: ignore[override]
        """The memory of states, where the model is."""
        self.states = StateCache(self.config, num_blocks, block_size, self.weight.dtype, self.weight.device)
        return self.states

    def _hidden(self, plan: list[Scheduled]) -> Tensor:
        """Hidden states (T, D) of a plan's tokens, block by block; pieces of equal length are computed together."""
        size = self.states.block_size
        num_tokens = sum(work.count for work in plan)
        hidden = self.weight.new_zeros(padded_rows(num_tokens), self.config.hidden_size)
        rows, row = [], 0
        for work in plan:
            rows.append(row - work.start)  # + position = row
            row += work.count
        places = [work.start for work in plan]
        ends = [work.start + work.count for work in plan]
        while open_works := [i for i, place in enumerate(places) if place < ends[i]]:
            by_length: dict[int, list[int]] = {}
            for i in open_works:
                length = min(ends[i], places[i] // size * size + size) - places[i]
                by_length.setdefault(length, []).append(i)
            for length, members in by_length.items():
                found = self._read([plan[i] for i in members], [places[i] for i in members], length)
                for i, values in zip(members, found, strict=False):
                    first = rows[i] + places[i]
                    hidden[first : first + length] = values
                    places[i] += length
        return hidden

    def _read(self, works: list[Scheduled], places: list[int], length: int) -> Tensor:
        """Read `length` tokens of each sequence from its place on, within one block: hidden states (B, T, D), and
        rows of padding after them."""
        size, states = self.states.block_size, self.states.states
        blocks = [work.sequence.blocks for work in works]
        ids = [work.sequence.token_ids[p : p + length] for work, p in zip(works, places, strict=True)]
        padding = padded_rows(len(works)) - len(works)
        before = torch.tensor([b[(p - 1) // size] if p else 0 for b, p in zip(blocks, places, strict=True)])
        state = states[:, :, before.to(states.device)]  # (2, L, B, D), a copy
        state[:, :, [i for i, place in enumerate(places) if place == 0]] = 0
        state = torch.cat((state, state.new_zeros(*state.shape[:2], padding, state.shape[3])), dim=2)
        input_ids = torch.tensor(ids + [[0] * length] * padding, device=states.device)
        out, (h, c) = self.model.advance(input_ids, (state[0].contiguous(), state[1].contiguous()))
        after = torch.tensor([b[p // size] for b, p in zip(blocks, places, strict=True)], device=states.device)
        states[:, :, after] = torch.stack((h, c))[:, :, : len(works)]
        return out
