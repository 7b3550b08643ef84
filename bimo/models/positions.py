"""Where a token stands, for models without rotary angles: sinusoids added to embeddings, and a bias by distance.

x = embed_tokens(ids) + sinusoidal_positions(positions, hidden_size)       # the original Transformer
bias = RelativeBias(32, 128, num_heads, bidirectional=True)                # T5
scores = q @ k.mT + bias(query_positions, key_positions)                   # (H, T, S)
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

__all__ = ["RelativeBias", "relative_buckets", "sinusoidal_positions"]


def sinusoidal_positions(positions: Tensor, hidden_size: int) -> Tensor:
    """sin and cos of position / 10000^(2i / D) for i < D / 2 (arXiv:1706.03762, 3.5): (...) -> (..., D) float32.

    All sines come first, then all cosines, as in Marian and tensor2tensor; the paper's text has them in turn, which is
    the same up to the order of the features. Angles in float64: at position 1000 float32 is off by 6e-5.
    """
    exponents = torch.arange(0, hidden_size, 2, dtype=torch.float64, device=positions.device) / hidden_size
    angles = positions[..., None].double() / 10000.0**exponents
    return torch.cat((angles.sin(), angles.cos()), dim=-1).float()


def relative_buckets(distance: Tensor, num_buckets: int, max_distance: int, *, bidirectional: bool) -> Tensor:
    """Bucket 0..num_buckets-1 of each distance = key position - query position (T5, arXiv:1910.10683, 2.1); any shape.

    Looking both ways, half of the buckets are for keys after the query; otherwise those fall into bucket 0. Of each
    direction's n buckets, n / 2 are for the exact distances below n / 2, the others grow as the logarithm of the
    distance up to `max_distance`; what is farther shares the last.
    """
    offset = torch.zeros_like(distance)
    if bidirectional:
        num_buckets //= 2
        offset = (distance > 0) * num_buckets
        steps = distance.abs()
    else:
        steps = (-distance).clamp(min=0)
    exact = num_buckets // 2
    ratio = torch.log(steps.clamp(min=1).float() / exact) / math.log(max_distance / exact)
    coarse = (exact + (ratio * (num_buckets - exact)).long()).clamp(max=num_buckets - 1)
    return offset + torch.where(steps < exact, steps, coarse)


class RelativeBias(nn.Module):
    """A learned number a head for every bucket of distances, added to the attention scores of every layer."""

    def __init__(self, num_buckets: int, max_distance: int, num_heads: int, *, bidirectional: bool) -> None:
        super().__init__()
        self.num_buckets, self.max_distance, self.bidirectional = num_buckets, max_distance, bidirectional
        self.table = nn.Embedding(num_buckets, num_heads)

    def forward(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Positions of queries (..., T) and keys (..., S) -> (..., H, T, S), in the weights' number type."""
        distance = keys[..., None, :] - queries[..., :, None]
        buckets = relative_buckets(distance, self.num_buckets, self.max_distance, bidirectional=self.bidirectional)
        return self.table(buckets).movedim(-1, -3)
