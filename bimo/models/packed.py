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

from bimo.models.attention import causal_mask

__all__ = ["SHORT_ROW", "PackedRows"]

# Tokens of a row up to which plain products are faster than torch's blocked kernel on a CPU, forward and backward
# together: 3.4 ms instead of 11 for 16 rows of 128 with 3 heads, 11 instead of 16 for 8 of 256; from 512 on nothing.
SHORT_ROW = 256


class PackedRows:
    """segments (B, T): which document of its row each token belongs to. Built once a batch, called once a layer."""

    def __init__(self, segments: Tensor, dtype: torch.dtype) -> None:
        self.segments, self.dtype = segments, dtype
        self._masks: dict[int | None, Tensor] = {}

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, scale: float, window: int | None) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, H or K, T, E)
        if q.shape[2] <= SHORT_ROW and q.device.type == "cpu":
            out = self._short(q * scale, k, v, self._mask(window))
        else:
            shared = k.shape[1] != q.shape[1]
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=self._mask(window), scale=scale, enable_gqa=shared)
        return out.transpose(1, 2)

    def _short(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        """softmax(q kᵀ + mask) v; the heads that share a key head are rows of one product."""
        batch, heads, num_tokens, width = q.shape
        grouped = (batch, k.shape[1], -1, width)
        scores = (q.reshape(grouped) @ k.transpose(-1, -2)).view(batch, heads, num_tokens, num_tokens)
        weights = torch.softmax(scores + mask, -1).view(batch, k.shape[1], -1, num_tokens)
        return (weights @ v).view(q.shape)

    def _mask(self, window: int | None) -> Tensor:
        """Additive (B, 1, T, T). Numbers and not booleans, which every layer would turn into numbers again."""
        if window not in self._masks:
            num_tokens = self.segments.shape[1]
            visible = causal_mask(num_tokens, num_tokens, window, self.segments.device)
            visible = visible & (self.segments[:, :, None] == self.segments[:, None, :])
            mask = torch.zeros(visible.shape, dtype=self.dtype, device=self.segments.device)
            self._masks[window] = mask.masked_fill_(~visible, -torch.inf)[:, None]
        return self._masks[window]
