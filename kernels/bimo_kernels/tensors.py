"""The loops for models that run on torch, as functions on tensors: attention of single queries over a paged cache, its
stores, and RMSNorm. Apart from the rest of the package, which needs no torch.

Shapes: S sequences, H query heads, K key/value heads, E head_dim; see src/kernels.cpp.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bimo_kernels import _kernels

__all__ = ["HEAD_DIMS", "decode_attention", "rms_norm", "store"]

HEAD_DIMS = frozenset({16, 32, 64, 80, 96, 128, 256})  # sizes that `decode_attention` was compiled for


def decode_attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    table: Tensor,
    lengths: Tensor,
    *,
    block_size: int,
    scale: float,
    window: int | None,
) -> Tensor:
    """Attention of one query token a sequence over its blocks; float32 inside.

    Args:
        q: (S, H, E) float32 or bfloat16.
        keys, values: (K, slots, E) pools of the same type, contiguous.
        table: (S, W) int64, each sequence's blocks. lengths: (S,) int64, tokens each sees, at least 1.

    Returns: (S, H, E) like q.
    """
    num_sequences, num_heads, dim = q.shape
    num_kv, num_slots, _ = keys.shape
    assert q.dtype in (torch.float32, torch.bfloat16) and q.dtype == keys.dtype == values.dtype
    assert keys.is_contiguous() and values.is_contiguous() and table.is_contiguous()
    assert table.dtype == lengths.dtype == torch.int64
    q = q.contiguous()
    out = torch.empty_like(q)
    _kernels.decode_attention(
        q.dtype == torch.bfloat16, q.data_ptr(), keys.data_ptr(), values.data_ptr(), table.data_ptr(),
        lengths.data_ptr(), out.data_ptr(), num_sequences, num_kv, num_heads // num_kv, dim, num_slots, block_size,
        table.shape[1], window or 0, scale,
    )  # fmt: skip
    return out


def store(rows: Tensor, slots: Tensor, pool: Tensor) -> None:
    """pool[:, slots] = rows: rows (T, K, E), of which the last two dimensions lie together; pool (K, num_slots, E)."""
    num_kv, num_slots, dim = pool.shape
    assert rows.dtype == pool.dtype and rows.stride()[1:] == (dim, 1) and pool.is_contiguous()
    assert slots.dtype == torch.int64 and slots.is_contiguous() and len(slots) == len(rows)
    size = rows.element_size()
    _kernels.store_rows(
        rows.data_ptr(), slots.data_ptr(), pool.data_ptr(), len(rows), num_kv, rows.stride(0) * size, dim * size,
        num_slots,
    )  # fmt: skip


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last dimension, bfloat16, x (..., D), weight (D,)."""
    assert x.dtype == weight.dtype == torch.bfloat16 and weight.is_contiguous()
    x = x.contiguous()
    y = torch.empty_like(x)
    size = x.shape[-1]
    _kernels.rms_norm(x.data_ptr(), weight.data_ptr(), y.data_ptr(), x.numel() // size, size, eps)
    return y
