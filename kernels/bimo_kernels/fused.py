"""A whole decoder step as one call on quantised weights: packing their codes, and `FusedModel`, which owns the memory.
Arrays are NumPy's; bfloat16 numbers are handed over as the uint16 of their bits.

The layouts are those of src/model.h: panels of 16 output rows, so that 16 results come side by side out of one pass.
Sizes and indices are checked in C++ (src/fused.cpp), where they are used.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bimo_kernels import _kernels

__all__ = [
    "FORMATS",
    "GROUP",
    "PARTS",
    "Arena",
    "FusedModel",
    "LowRank",
    "PackedMatrix",
    "gemv_rate",
    "instruction_sets",
    "low_rank",
    "pack",
    "parallel_regions",
    "product",
]

LANES = 16
GROUP = 32  # columns that share a scale
FORMATS = {"block8": 0, "block4": 1, "row8": 2}
PARTS = ("qkv", "out", "up", "down")  # a layer's matrices
_KEPT_ROWS = 64
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu")

Array = NDArray[Any]


def instruction_sets() -> list[str]:
    """What this processor can run, fastest first: of "avx512bf16", "avx512", "avx2", "portable"."""
    return _kernels.instruction_sets()


@dataclass(frozen=True)
class PackedMatrix:
    """A weight in the kernels' layout. rows and columns are the plain matrix's."""

    format: str
    rows: int
    columns: int
    codes: Array  # uint8
    scales: Array  # float16
    bias: Array | None = None  # float32, rows padded to a whole panel

    @property
    def nbytes(self) -> int:
        """Bytes read for one product."""
        return self.codes.nbytes + self.scales.nbytes

    def with_bias(self, bias: Array | None) -> PackedMatrix:
        """The same with a bias (rows,), or None, added to each result."""
        return replace(self, bias=None if bias is None else np.pad(bias.astype(np.float32), (0, -self.rows % LANES)))

    def fields(self) -> tuple[Any, ...]:
        if self.bias is not None and self.bias.size != -(-self.rows // LANES) * LANES:
            raise ValueError(f"a bias of {self.bias.size} numbers for {self.rows} rows")
        return (
            FORMATS[self.format], self.rows, self.columns, self.codes.ctypes.data, self.codes.nbytes,
            self.scales.ctypes.data, self.scales.nbytes, 0 if self.bias is None else self.bias.ctypes.data,
        )  # fmt: skip


def pack(format: str, codes: Array, scales: Array, minima: Array | None, arena: Arena | None = None) -> PackedMatrix:
    """Lay a quantised weight out in panels.

    Args:
        format: "block8" (w = scale (q - 128)), "row8" (the same, of a weight whose every 64 columns were multiplied
            by a Hadamard matrix) or "block4" (w = scale q + minimum).
        codes: (rows, columns) uint8, for 4 bits below 16.
        scales: (rows, columns / 32 rounded up) float16, of "row8" (rows, 1). minima: like scales, for "block4".
        arena: where to lay it; one for all weights of a model.
    """
    copy_of = (arena or Arena()).copy_of
    rows, columns = codes.shape
    codes = np.pad(codes, ((0, -rows % LANES), (0, -columns % GROUP)))
    panels, groups = codes.shape[0] // LANES, codes.shape[1] // GROUP
    assert scales.dtype == np.float16 and scales.shape == (rows, 1 if format == "row8" else groups)
    fours = codes.view(np.uint32)  # four columns at a time
    if format == "block4":
        assert minima is not None and minima.dtype == np.float16 and minima.shape == scales.shape
        halves = fours.reshape(panels, LANES, groups, 2, 4)  # row, group, half, part
        low, high = (halves[:, :, :, i].transpose(0, 2, 3, 1) for i in (0, 1))
        packed = copy_of(low | high << 4)
        scales = np.stack((_by_panel(scales, panels), _by_panel(minima, panels)), axis=2)
    else:
        packed = copy_of(fours.reshape(panels, LANES, -1).transpose(0, 2, 1))
        scales = _by_panel(scales, panels)
    return PackedMatrix(format, rows, columns, packed.reshape(-1).view(np.uint8), copy_of(scales))


@dataclass(frozen=True)
class LowRank:
    """What an adapter adds to a matrix's results: y += B (A x)."""

    down: PackedMatrix  # A
    first: list[int]  # for each panel of B: the 16 columns it begins with
    count: list[int]  # and how often 16 there are; the others are zero
    up: Array  # of all panels: 16 scales in float32, then codes (count, 4, 16, 4)

    def fields(self) -> tuple[Any, ...]:
        return self.down.fields(), self.first, self.count, self.up.ctypes.data, self.up.nbytes


def low_rank(down: PackedMatrix, up: Array, arena: Arena | None = None) -> LowRank:
    """Lay out an adapter's part.

    Args:
        down: A, (r, columns), packed like the matrix it changes: "row8" if that is, else "block8".
        up: B, (rows, r) float32, rows as the matrix has them; rounded to 8 bits, a scale a row. Every 16 columns that
            are zero in all rows of a panel cost nothing: of parts of a matrix side by side each reads its own.
    """
    rows, rank = up.shape
    assert rank == down.rows
    up = np.pad(up, ((0, -rows % LANES), (0, -rank % LANES)))
    scales = np.abs(up).max(axis=1).astype(np.float32) / 127
    codes = (np.round(up / np.where(scales > 0, scales, 1)[:, None]) + 128).astype(np.uint8)
    codes = codes.reshape(-1, LANES, up.shape[1] // LANES, 4, 4).transpose(
        0, 2, 3, 1, 4
    )  # (panels, sixteens, 4, 16, 4)
    used = (codes != 128).any(axis=(2, 3, 4))
    first = np.where(used.any(axis=1), used.argmax(axis=1), 0)
    end = np.where(used.any(axis=1), used.shape[1] - used[:, ::-1].argmax(axis=1), 0)
    numbers = []
    for panel, own, a, b in zip(codes, scales.reshape(-1, LANES), first, end, strict=True):
        numbers += [own.view(np.uint8), panel[a:b].reshape(-1)]
    packed = (arena or Arena()).copy_of(np.concatenate(numbers))
    return LowRank(down, first.tolist(), (end - first).tolist(), packed)


def _by_panel(values: Array, panels: int) -> Array:
    """(rows, groups) -> (panels, groups, 16)."""
    values = np.pad(values, ((0, panels * LANES - values.shape[0]), (0, 0)))
    return values.reshape(panels, LANES, -1).transpose(0, 2, 1)


class Arena:
    """Memory for packed weights, in pieces of 32 MB or more that the system may back with huge pages: matrices of a
    megabyte each would get none, and a pass over all weights would look up 35,000 small pages."""

    def __init__(self) -> None:
        self._memory: mmap.mmap | None = None
        self._used = 0

    def empty(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        """A contiguous array, at first of zeros, that starts at a multiple of 4,096 bytes."""
        count = math.prod(shape)
        size = max(count * dtype.itemsize, 1)
        if self._memory is None or self._used + size > len(self._memory):
            self._memory, self._used = _new_memory(max(size, 1 << 25)), 0
        array = np.frombuffer(self._memory, dtype, count, self._used)
        self._used += -(-size // 4096) * 4096
        return array.reshape(shape)

    def copy_of(self, values: Array) -> Array:
        """A contiguous copy."""
        copy = self.empty(values.shape, values.dtype)
        np.copyto(copy, values)
        return copy


def _new_memory(size: int) -> mmap.mmap:
    # private: a shared mapping has small pages only, and a forked process would write into its parent's
    private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
    memory = mmap.mmap(-1, size, **private)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


class FusedModel:
    """A decoder of packed matrices, and the cache it attends over. Everything handed in is kept alive here."""

    def __init__(
        self,
        *,
        hidden: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        inner: int,
        vocabulary: int,
        norm_eps: float,
        attention_scale: float,
        activation: str,
        layer_norm: bool = False,
        gated: bool = True,
        rope_factor: float = 1.0,
        instruction_set: str = "",
    ) -> None:
        sizes = {
            "hidden": hidden, "heads": heads, "kv_heads": kv_heads, "head_dim": head_dim, "inner": inner,
            "vocabulary": vocabulary, "norm_eps": norm_eps, "attention_scale": attention_scale,
            "activation": ACTIVATIONS.index(activation), "layer_norm": int(layer_norm), "gated": int(gated),
            "rope_factor": rope_factor,
        }  # fmt: skip
        self._fused = _kernels.Fused(instruction_set, sizes)
        self._kept: list[Any] = []
        self.hidden, self.head_dim, self.vocabulary = hidden, head_dim, vocabulary
        self._logits = np.empty((0, vocabulary), np.float32)
        self.weight_bytes = 0  # read by a step of one token

    @property
    def instruction_set(self) -> str:
        """Which copy of the loops runs."""
        return self._fused.instruction_set

    def add_layer(
        self,
        *,
        attention_norm: tuple[Array, Array | None],
        mlp_norm: tuple[Array, Array | None],
        qkv: PackedMatrix,
        out: PackedMatrix,
        up: PackedMatrix,
        down: PackedMatrix,
        q_norm: Array | None = None,
        k_norm: Array | None = None,
        window: int | None = None,
    ) -> None:
        """Append a layer. `up` of a gated MLP: 16 rows of the gate, 16 of up, and so on (see `interleave`)."""
        for matrix in (qkv, out, up, down):
            self._keep(matrix)
        self._fused.add_layer(
            self._norm(*attention_norm), self._norm(*mlp_norm), qkv.fields(), out.fields(), up.fields(), down.fields(),
            self._floats(q_norm, self.head_dim), self._floats(k_norm, self.head_dim), window or 0,
        )  # fmt: skip

    def set_ends(
        self,
        *,
        final_norm: tuple[Array, Array | None],
        head: PackedMatrix,
        embedding: Array | None,
        positions: Array | None,
        frequencies: Array | None,
    ) -> None:
        """The embeddings (None: the head's own rows), positions learned or rotary, final norm and head."""
        if embedding is not None:
            if embedding.dtype != np.uint16 or embedding.shape != (self.vocabulary, self.hidden):
                raise ValueError(f"embeddings of shape {embedding.shape} for {self.vocabulary} words")
            embedding = np.ascontiguousarray(embedding)
            self._kept.append(embedding)
        self._keep(head)
        count = 0 if positions is None else len(positions)
        self._fused.set_ends(
            self._norm(*final_norm), head.fields(), 0 if embedding is None else embedding.ctypes.data,
            self._floats(positions, count * self.hidden), count, self._floats(frequencies, self.head_dim // 2),
        )  # fmt: skip

    def add_adapter(self, parts: dict[tuple[int, str], LowRank]) -> int:
        """What one adapter changes: by layer and matrix (of PARTS). Returns its number, from 1 on, for `step`."""
        self._kept.append(parts)
        return self._fused.add_adapter(
            [(layer, PARTS.index(part), *change.fields()) for (layer, part), change in parts.items()]
        )

    def set_cache(self, keys: Array, values: Array, scales: tuple[Array, Array] | None, num_blocks: int) -> None:
        """Pools of (layers, K, num_blocks * 16, E) uint16 (bfloat16); or int8, with scales (layers, K, num_blocks * 16)
        float32."""
        assert keys.flags.c_contiguous and values.flags.c_contiguous and keys.shape == values.shape
        assert keys.dtype == values.dtype == (np.uint16 if scales is None else np.int8)
        assert keys.shape[2] == num_blocks * LANES
        self._cache = (keys, values, scales)
        key_scales, value_scales = (0, 0) if scales is None else (pool.ctypes.data for pool in scales)
        self._fused.set_cache(
            scales is not None, keys.ctypes.data, values.ctypes.data, key_scales, value_scales, num_blocks
        )

    def step(
        self,
        token_ids: list[int],
        spans: list[tuple[int, int, list[int]]],
        scored: list[int],
        *,
        adapters: Sequence[int] = (),
        want_logits: bool = True,
        steps: int = 1,
        seconds: float = 0.0,
        ends: Sequence[int] = (),
    ) -> tuple[Array, Array, list[int]]:
        """Hidden states after the final norm, (T, D) float32, of sequences' tokens one after the other; of the rows
        `scored` the logits (N, V) float32, in memory that the next step uses again, and the likeliest words.

        want_logits: if not, (0, V): of 64 rows of 49,152 words they are 12 MB to be written.
        spans: (position of the first token, number of tokens, cache blocks) of each sequence.
        adapters: the number of each sequence's adapter, 0: none; empty: nobody has one.
        steps: of single tokens, each sequence can go on with its likeliest word for so many steps at most, while
            `seconds` last, until one of them is in `ends` or `interrupt` is called. Then the words of all steps are
            returned, a step after the other; hidden states and logits are the last one's.
        """
        hidden = np.empty((len(token_ids), self.hidden), np.float32)
        logits = self._rows_for(len(scored) if want_logits else 0)
        best = self._fused.forward(
            token_ids,
            spans,
            list(adapters),
            hidden.ctypes.data,
            scored,
            logits.ctypes.data if want_logits else 0,
            steps,
            seconds,
            list(ends),
        )
        return hidden, logits, best

    def interrupt(self) -> None:
        """End a `step` of several steps that another thread is in, or else the next, after the step it is at."""
        self._fused.interrupt()

    def logits(self, hidden: Array) -> Array:
        """(N, D) -> (N, V) float32."""
        assert hidden.dtype == np.float32 and hidden.shape[1] == self.hidden
        hidden, out = np.ascontiguousarray(hidden), np.empty((len(hidden), self.vocabulary), np.float32)
        if len(hidden):
            self._fused.logits(hidden.ctypes.data, len(hidden), out.ctypes.data)
        return out

    def _rows_for(self, count: int) -> Array:
        """Memory for a step's logits (count, V), kept up to 64 rows: fresh memory for 16 rows of 49,152 words is 800
        pages to map and unmap, half a millisecond a step."""
        if count > _KEPT_ROWS:
            return np.empty((count, self.vocabulary), np.float32)
        if count > len(self._logits):
            self._logits = np.empty((count, self.vocabulary), np.float32)
        return self._logits[:count]

    def _keep(self, matrix: PackedMatrix) -> None:
        self._kept.append(matrix)
        self.weight_bytes += matrix.nbytes

    def _floats(self, values: Array | None, size: int) -> int:
        """The address of `size` numbers; 0 for None."""
        if values is None:
            return 0
        if values.size != size:
            raise ValueError(f"a vector of {values.size} numbers where the model needs {size}")
        values = np.ascontiguousarray(values, np.float32)
        self._kept.append(values)
        return values.ctypes.data

    def _norm(self, weight: Array, bias: Array | None) -> tuple[int, int]:
        return self._floats(weight, self.hidden), self._floats(bias, self.hidden)


def product(matrix: PackedMatrix, x: Array, instruction_set: str = "") -> Array:
    """x Wᵀ + b: (N, columns) float32 -> (N, rows), by the named copy of the loops."""
    assert x.dtype == np.float32 and x.shape[1] == matrix.columns
    x, y = np.ascontiguousarray(x), np.empty((len(x), matrix.rows), np.float32)
    _kernels.product(instruction_set, matrix.fields(), x.ctypes.data, len(x), y.ctypes.data)
    return y


def parallel_regions() -> int:
    """How many parallel regions were computed so far: one a step."""
    return _kernels.parallel_regions()


def gemv_rate(num_bytes: int, seconds: float = 0.5) -> float:
    """Bytes a second at which this machine reads `num_bytes` of weights for the plainest int8 product: the limit. The
    median of as many passes as `seconds` allow, as generation is measured: on a shared machine the best is a matter of
    luck, and twice the median."""
    import statistics
    import time

    codes = Arena().empty((num_bytes // 256 * 256,), np.dtype(np.uint8))
    codes.fill(1)
    passes, end = [], time.perf_counter() + seconds
    while time.perf_counter() < end or not passes:
        begun = time.perf_counter()
        _kernels.read_codes(codes.ctypes.data, codes.nbytes)
        passes.append(time.perf_counter() - begun)
    return codes.nbytes / statistics.median(passes)
