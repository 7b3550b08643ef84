"""One block of the Transformer, for decoders and encoders: attention, then an MLP, each beside a residual path.

In the decoder of an encoder-decoder an attention to the source stands between the two (`cross=True`).

Where the norm stands is the config's `norm_first`: before each part (GPT-2 and everything since; the residual path
runs through untouched, which keeps deep models trainable) or after the sum (the original Transformer and BERT).
The names of the parts are the same in both, so that one key map serves either.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from bimo.models.attention import Attend, Attention
from bimo.models.config import TransformerConfig
from bimo.models.fused_training import add, add_norm
from bimo.models.layers import MLP, make_norm

__all__ = ["Block"]


class Block(nn.Module):
    """Pre-norm: x + attention(norm(x)), then x + mlp(norm(x)). Post-norm: norm(x + attention(x)), norm(x + mlp(x))."""

    def __init__(self, config: TransformerConfig, layer: int, *, cross: bool = False) -> None:
        super().__init__()
        self.attention_norm = make_norm(config)
        self.attention = Attention(config, layer)
        if cross:
            self.cross_attention_norm = make_norm(config)
            self.cross_attention = Attention(config, layer, cross=True)
        self.mlp_norm = make_norm(config)
        self.mlp = MLP(config)
        self.norm_first = config.norm_first
        self.dropout = config.dropout

    def forward(
        self,
        x: Tensor,
        rope: tuple[Tensor, Tensor] | None,
        attend: Attend,
        memory: Tensor | None = None,
        cross: Attend | None = None,
    ) -> Tensor:
        """x (B, T, D) -> (B, T, D); with `cross`, also attention to memory (B, S, D), see `Attention.forward`."""
        if self.norm_first:
            x, normed = add_norm(x, None, self.attention_norm)
            delta = self._drop(self.attention(normed, rope, attend))
            if cross is not None:
                x, normed = add_norm(x, delta, self.cross_attention_norm)
                delta = self._drop(self.cross_attention(normed, None, cross, memory))
            x, normed = add_norm(x, delta, self.mlp_norm)
            return add(x, self._drop(self.mlp(normed)))
        x = self.attention_norm(x + self._drop(self.attention(x, rope, attend)))
        if cross is not None:
            x = self.cross_attention_norm(x + self._drop(self.cross_attention(x, None, cross, memory)))
        return self.mlp_norm(x + self._drop(self.mlp(x)))

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout) if self.training and self.dropout else x
