"""Causal attention over rows that hold several documents, one after the other: none sees another.

    [ d1 d1 | d2 d2 d2 ]      d1 . . . .
                              d1 d1 . . .
                              .  . d2 . .
                              .  . d2 d2 .
                              .  . d2 d2 d2

An `Attend` (see models.attention) for training. Shapes as there.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from bimo.models import fused_training
from bimo.models.attention import causal_mask

__all__ = ["LONGEST_IN_BLOCKS", "PackedRows"]

# On a CPU plain products over blocks of queries, each with the keys up to its end, take half the time of torch's own
# kernel, forward and backward together: 20 ms instead of 41 for 16 rows of 256 with 5 heads, 23 instead of 57 for 4 of
# 512 with 9, 279 instead of 574 for one of 2,048 with 16. They keep the weights for the way back, T * T / 2 of them a
# head, so longer rows go through torch's kernel, which computes them again.
BLOCK = 128
LONGEST_IN_BLOCKS = 2048  # tokens of a row


class PackedRows:
    """segments (B, T): which document of its row each token belongs to. Built once a batch, called once a layer."""

    def __init__(self, segments: Tensor, dtype: torch.dtype) -> None:
        self.segments, self.dtype = segments, dtype
        self._masks: dict[int | None, Tensor] = {}
        self._starts: dict[int | None, Tensor] = {}
        self._in_order: bool | None = None

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, scale: float, window: int | None) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, H or K, T, E)
        if q.shape[2] <= LONGEST_IN_BLOCKS and q.device.type == "cpu":
            out = self._in_blocks(q * scale, k, v, self._mask(window))
        else:
            shared = k.shape[1] != q.shape[1]
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=self._mask(window), scale=scale, enable_gqa=shared)
        return out.transpose(1, 2)

    def jointly(
        self,
        qkv: Tensor,
        rope: tuple[Tensor, Tensor] | None,
        num_heads: int,
        num_kv_heads: int,
        *,
        scale: float,
        window: int | None,
    ) -> Tensor | None:
        """The same as a call with what `qkv` (B, T, (H + 2 K) E) holds, rotated: (B, T, H E). None where it cannot be
        done in one pass: long rows, documents that come again, and what `fused_training` does not take."""
        if qkv.shape[1] > LONGEST_IN_BLOCKS or not fused_training.can_attend(qkv, rope):
            return None
        if self._in_order is None:
            self._in_order = bool((self.segments.diff(dim=1) >= 0).all())
        if not self._in_order:
            return None
        sizes = {"num_heads": num_heads, "num_kv_heads": num_kv_heads, "block": BLOCK}
        return fused_training.packed_attention(qkv, rope, self._first_seen(window), scale=scale, **sizes)

    def _first_seen(self, window: int | None) -> Tensor:
        """(B, T) int32: the first token that each token sees."""
        if window not in self._starts:
            places = torch.arange(self.segments.shape[1], device=self.segments.device)
            begins = self.segments.diff(dim=1, prepend=self.segments[:, :1] - 1) != 0
            starts = torch.where(begins, places, 0).cummax(1).values
            if window is not None:
                starts = starts.maximum(places - window + 1)
            self._starts[window] = starts.int().contiguous()
        return self._starts[window]

    def _in_blocks(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        """softmax(q kᵀ + mask) v, BLOCK queries at a time; heads that share a key head are rows of one product."""
        batch, heads, num_tokens, width = q.shape
        num_kv = k.shape[1]
        outs = []
        for start in range(0, num_tokens, BLOCK):
            end = min(num_tokens, start + BLOCK)
            rows = q[:, :, start:end].reshape(batch, num_kv, -1, width)  # (B, K, H / K * block, E)
            scores = (rows @ k[:, :, :end].transpose(-1, -2)).view(batch, heads, -1, end)
            weights = torch.softmax(scores + mask[:, :, start:end, :end], -1).view(batch, num_kv, -1, end)
            outs.append((weights @ v[:, :, :end]).view(batch, heads, -1, width))
        return outs[0] if len(outs) == 1 else torch.cat(outs, 2)

    def _mask(self, window: int | None) -> Tensor:
        """Additive (B, 1, T, T). Numbers and not booleans, which every layer would turn into numbers again."""
        if window not in self._masks:
            num_tokens = self.segments.shape[1]
            visible = causal_mask(num_tokens, num_tokens, window, self.segments.device)
            visible = visible & (self.segments[:, :, None] == self.segments[:, None, :])
            mask = torch.zeros(visible.shape, dtype=self.dtype, device=self.segments.device)
            self._masks[window] = mask.masked_fill_(~visible, -torch.inf)[:, None]
        return self._masks[window]
