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

__all__ = ["PackedRows"]


class PackedRows:
    """segments (B, T): which document of its row each token belongs to. Built once a batch, called once a layer."""

    def __init__(self, segments: Tensor, dtype: torch.dtype) -> None:
        self.segments, self.dtype = segments, dtype
        self._masks: dict[int | None, Tensor] = {}

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, scale: float, window: int | None) -> Tensor:
        out = F.scaled_dot_product_attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            attn_mask=self._mask(window),
            scale=scale,
            enable_gqa=k.shape[2] != q.shape[2],
        )
        return out.transpose(1, 2)

    def _mask(self, window: int | None) -> Tensor:
        """Additive (B, 1, T, T). Numbers and not booleans, which every layer would turn into numbers again."""
        if window not in self._masks:
            num_tokens = self.segments.shape[1]
            visible = causal_mask(num_tokens, num_tokens, window, self.segments.device)
            visible = visible & (self.segments[:, :, None] == self.segments[:, None, :])
            mask = torch.zeros(visible.shape, dtype=self.dtype, device=self.segments.device)
            self._masks[window] = mask.masked_fill_(~visible, -torch.inf)[:, None]
        return self._masks[window]
