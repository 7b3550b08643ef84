"""Keys and values in blocks, and attention over them: the engine's `Attend` (see models.attention).

A step's tokens lie in one row of T tokens: first one token of each decoding sequence, then chunks of prompts.

    tokens:   [ d0 d1 d2 ... | chunk A ......... | chunk B .... ]
    slots:    where each token's key and value go: block * block_size + offset

Pools are (K, num_blocks * block_size, E) per layer: head-major, so that gathering a sequence's blocks gives the
(K, length, E) that attention reads without another copy. Shapes as in models.attention; S = num sequences.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from bimo.engine.kernels import attention_kernels
from bimo.engine.scheduler import Scheduled
from bimo.models.attention import causal_mask
from bimo.models.config import DecoderConfig, Seq2SeqConfig
from bimo.runtime import lazy_memory

__all__ = ["BlockAttention", "PagedCache", "StepAttention", "attend_chunk", "lazy_zeros", "slots_of"]

Bias = Callable[[Tensor, Tensor], Tensor]  # positions of queries (..., T) and keys (..., S) -> (..., H, T, S)


class PagedCache:
    """The memory: one key pool and one value pool a layer. Pages are zeroed lazily by the system, so a large pool
    costs memory only as it fills."""

    def __init__(
        self,
        config: DecoderConfig | Seq2SeqConfig,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.config, self.num_blocks, self.block_size = config, num_blocks, block_size
        self.dtype, self.device = str(dtype).removeprefix("torch."), str(device)
        num_layers = config.num_decoder_layers if isinstance(config, Seq2SeqConfig) else config.num_layers
        self.windows = {config.window(layer) for layer in range(num_layers)}
        shape = (num_layers, config.num_kv_heads, num_blocks * block_size, config.head_dim)
        self.keys, self.values = (lazy_zeros(shape, dtype).to(device) for _ in range(2))
        self.layers = list(zip(self.keys, self.values, strict=True))  # (K, slots, E) each

    def copy_blocks(self, copies: list[tuple[int, int]]) -> None:
        """Copy whole blocks, (source, destination) each; for forked sequences."""
        if not copies:
            return
        size = self.block_size
        offsets = torch.arange(size)
        source = (torch.tensor([s for s, _ in copies])[:, None] * size + offsets).flatten()
        target = (torch.tensor([d for _, d in copies])[:, None] * size + offsets).flatten()
        for pool in (self.keys, self.values):
            pool[:, :, target] = pool[:, :, source]


def lazy_zeros(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Zeros that take memory where they are written."""
    return torch.frombuffer(lazy_memory(math.prod(shape) * dtype.itemsize), dtype=dtype).view(shape)


def slots_of(blocks: list[int], length: int, size: int) -> Tensor:
    """Where the first `length` tokens of a list of blocks lie, in order: (length,)."""
    return (torch.tensor(blocks[: -(-length // size)])[:, None] * size + torch.arange(size)).flatten()[:length]


class BlockAttention:
    """One query a sequence over what its blocks hold: by the C++ kernel where there is one, else by SDPA.

    For SDPA the blocks are gathered. Query heads that share a key head become the rows of one small attention
    (K * S of them, H / K rows each): keys are read once for the group, and no head is repeated.
    """

    def __init__(
        self, cache: PagedCache, blocks: list[list[int]], lengths: list[int], bias: Bias | None = None
    ) -> None:
        """Query i sees the first lengths[i] places of blocks[i] and, for windows and `bias`, stands at the last."""
        device, config, size = cache.keys.device, cache.config, cache.block_size
        self.block_size = size
        width = -(-max(lengths) // size)  # blocks of the longest
        self.table = torch.tensor([row[:width] + [0] * (width - len(row)) for row in blocks])
        self.lengths = torch.tensor(lengths, device=device)
        self.kernels = attention_kernels(cache.keys.dtype, device, config.head_dim) if bias is None else None
        if self.kernels is not None:
            return  # they read the blocks where they are
        num_kv = config.num_kv_heads
        heads = torch.arange(num_kv)[:, None, None] * cache.num_blocks
        self.gather = (heads + self.table).flatten().to(device)  # rows of the pool seen as (K * num_blocks, size * E)
        places = torch.arange(width * size, device=device)
        distance = self.lengths[:, None] - 1 - places  # (S, length)
        self.masks: dict[int | None, Tensor] = {}
        for window in cache.windows:
            visible = distance >= 0 if window is None else (distance >= 0) & (distance < window)
            mask = torch.zeros(visible.shape, dtype=cache.keys.dtype, device=device)
            mask = mask.masked_fill_(~visible, -torch.inf).repeat(num_kv, 1)[:, None, None, :]
            if bias is not None:  # each query head has its own key head
                mask = mask + bias(self.lengths[:, None] - 1, places).transpose(0, 1).reshape(mask.shape)
            self.masks[window] = mask.expand(-1, -1, config.num_heads // num_kv, -1)  # (K * S, 1, H / K, length)

    def __call__(self, q: Tensor, keys: Tensor, values: Tensor, scale: float, window: int | None) -> Tensor:
        """q (S, H, E), a layer's pools (K, slots, E) -> (S, H, E)."""
        if self.kernels is not None:
            return self.kernels.decode_attention(
                q, keys, values, self.table, self.lengths, block_size=self.block_size, scale=scale, window=window
            )
        num_kv, _, head_dim = keys.shape
        num_sequences, row_size = len(q), self.block_size * head_dim
        shape = (num_kv * num_sequences, 1, -1, head_dim)
        k = keys.view(-1, row_size).index_select(0, self.gather).view(shape)
        v = values.view(-1, row_size).index_select(0, self.gather).view(shape)
        if num_sequences == 1:
            rows = q.view(shape)
        else:
            rows = q.view(num_sequences, num_kv, -1, head_dim).transpose(0, 1).reshape(shape)  # (K * S, 1, H/K, E)
        out = F.scaled_dot_product_attention(rows, k, v, attn_mask=self.masks[window], scale=scale)
        if num_sequences == 1:
            return out.view(q.shape)
        return out.view(num_kv, num_sequences, -1, head_dim).transpose(0, 1).reshape(q.shape)


@dataclass(slots=True)
class _Chunk:
    """Part of a prompt: its tokens in the row, and the context they see."""

    rows: slice
    slots: Tensor | None  # (length,) of the whole context in order; None when the chunk starts at position 0
    masks: dict[int | None, Tensor | None]  # window -> additive ([H,] T, length), or None for plain causal


class StepAttention:
    """Attention for one step's plan. Built once a step, called once a layer."""

    def __init__(self, cache: PagedCache, plan: list[Scheduled], bias: Bias | None = None) -> None:
        """`bias` is added to the scores of every layer (T5)."""
        self.cache, self.bias, self.plan = cache, bias, plan
        self.device = cache.keys.device
        size, dtype = cache.block_size, cache.keys.dtype
        slots: list[int] = []
        for work in plan:
            blocks = work.sequence.blocks
            slots += [blocks[p // size] * size + p % size for p in range(work.start, work.start + work.count)]
        self.slots = torch.tensor(slots, device=self.device)
        in_order = slots[-1] - slots[0] + 1 == len(slots) and slots == list(range(slots[0], slots[-1] + 1))
        self.run = slice(slots[0], slots[-1] + 1) if in_order else None
        decodes = [w for w in plan if w.count == 1]
        assert plan[: len(decodes)] == decodes, "single tokens come first"
        self.num_decodes = len(decodes)
        self.kernels = attention_kernels(dtype, self.device, cache.config.head_dim)
        if decodes:
            self.decode = BlockAttention(
                cache, [w.sequence.blocks for w in decodes], [w.start + 1 for w in decodes], bias
            )
        self.chunks: list[_Chunk] = []
        row = self.num_decodes
        for work in plan[self.num_decodes :]:
            self.chunks.append(self._prepare_chunk(work, row))
            row += work.count

    def _prepare_chunk(self, work: Scheduled, row: int) -> _Chunk:
        length, dtype = work.start + work.count, self.cache.keys.dtype
        slots = None
        if work.start:
            slots = slots_of(work.sequence.blocks, length, self.cache.block_size).to(self.device)
        masks: dict[int | None, Tensor | None] = {}
        for window in self.cache.windows:
            if slots is None and self.bias is None and (window is None or window >= length):
                masks[window] = None
                continue
            visible = causal_mask(work.count, length, window, self.device)
            empty = torch.zeros(visible.shape, dtype=dtype, device=self.device)
            mask = empty.masked_fill_(~visible, -torch.inf)
            if self.bias is not None:
                places = torch.arange(length, device=self.device)
                mask = mask + self.bias(places[work.start :], places)
            masks[window] = mask
        return _Chunk(slice(row, row + work.count), slots, masks)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, scale: float, window: int | None) -> Tensor:
        """q (1, T, H, E), k and v (1, T, K, E) -> (1, T, H, E); stores k and v first."""
        keys, values = self.cache.layers[layer]
        num_tokens = len(self.slots)  # rows after these are padding
        q, k, v = q[0], k[0], v[0]
        if len(q) > num_tokens:
            k, v = k[:num_tokens], v[:num_tokens]
        self._store(k, keys)
        self._store(v, values)
        if self.num_decodes == len(q):
            return self.decode(q, keys, values, scale, window)[None]
        k, v = k.transpose(0, 1), v.transpose(0, 1)
        parts = []
        if self.num_decodes:
            parts.append(self.decode(q[: self.num_decodes], keys, values, scale, window))
        for chunk in self.chunks:
            if chunk.slots is None:
                context = k[:, chunk.rows], v[:, chunk.rows]
            else:
                context = keys.index_select(1, chunk.slots), values.index_select(1, chunk.slots)
            mask = chunk.masks[window]
            parts.append(attend_chunk(q[chunk.rows], *context, scale, mask, is_causal=mask is None))
        if len(q) > num_tokens:
            parts.append(q.new_zeros((len(q) - num_tokens, *q.shape[1:])))
        return (parts[0] if len(parts) == 1 else torch.cat(parts))[None]

    def behind(
        self, keys: Tensor, values: Tensor, layer: int, q: Tensor, k: Tensor, v: Tensor, *, scale: float
    ) -> Tensor:
        """The same where keys and values (P, K, E) stand before every sequence, which sees them in layers
        with a window, too (prefix-tuning): one sequence after the other, without the kernels."""
        pools = self.cache.layers[layer]
        num_tokens = len(self.slots)
        parts: list[Tensor] = []
        row = 0
        for rows, pool in zip((k[0], v[0]), pools, strict=True):
            self._store(rows[:num_tokens], pool)
        window = self.cache.config.window(layer)
        for work in self.plan:
            length = work.start + work.count
            slots = slots_of(work.sequence.blocks, length, self.cache.block_size).to(self.device)
            k, v = (
                torch.cat((before.to(pool.dtype).transpose(0, 1), pool.index_select(1, slots)), dim=1)
                for before, pool in zip((keys, values), pools, strict=True)
            )
            mask = F.pad(causal_mask(work.count, length, window, self.device), (len(keys), 0), value=True)
            parts.append(attend_chunk(q[0, row : row + work.count], k, v, scale, mask, is_causal=False))
            row += work.count
        parts.append(q.new_zeros((q.shape[1] - num_tokens, *q.shape[2:])))
        return torch.cat(parts)[None]

    def _store(self, rows: Tensor, pool: Tensor) -> None:
        """Put a step's keys or values (T, K, E) into their slots of a pool (K, slots, E)."""
        if self.kernels is not None and rows.stride()[1:] == (rows.shape[2], 1):
            self.kernels.store(rows, self.slots, pool)
        elif self.run is not None:  # fresh blocks lie in order: a plain copy is three times as fast
            pool[:, self.run] = rows.transpose(0, 1)
        else:
            pool.index_copy_(1, self.slots, rows.transpose(0, 1))


def attend_chunk(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None, *, is_causal: bool) -> Tensor:
    """Several tokens of one sequence: q (T, H, E), k and v (K, length, E) -> (T, H, E)."""
    out = F.scaled_dot_product_attention(
        q.transpose(0, 1)[None],
        k[None],
        v[None],
        attn_mask=mask,
        is_causal=is_causal,
        scale=scale,
        enable_gqa=k.shape[0] != q.shape[1],
    )
    return out[0].transpose(0, 1)
