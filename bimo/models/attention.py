"""Self-attention, and the protocol by which a KV cache, a causal or a padding mask takes part in it.

The block computes q, k, v; *where keys and values live, and who sees whom* is the business of an `Attend` object:
`FullSequence` (a decoder's training and scoring: causal, no cache) and `Bidirectional` (encoders) here, the engine's
paged cache in `engine.paged`.
Shapes: B batch, T tokens, H query heads, K key/value heads, E head_dim.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bimo.models.config import TransformerConfig
from bimo.models.layers import RMSNorm, rotate

__all__ = ["Attend", "Attention", "Bidirectional", "FullSequence", "causal_mask"]


class Attend(Protocol):
    """Attention over whatever context the caller keeps.

    In an encoder-decoder one such object serves the decoder's self-attention and another its cross-attention. Where
    scores depend on distance (T5), whoever keeps the keys knows their positions and adds `EncoderDecoder.decoder_bias`.

    One that can do a layer's rotation and attention in a single pass has a method `jointly` (see models.packed).
    """

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, scale: float, window: int | None) -> Tensor:
        """q (B, T, H, E), k and v (B, T, K, E), already rotated -> (B, T, H, E).

        May store k and v for `layer`; must let token t see itself, and only its own sequence's tokens; in a decoder
        only those before it, within `window`. Cross-attention: k and v are the source's, (B, S, K, E), or empty
        (S = 0) when the object has them already.
        """


def causal_mask(num_queries: int, num_keys: int, window: int | None, device: torch.device | None = None) -> Tensor:
    """Boolean (num_queries, num_keys), True = visible; the last query stands at the last key.

    A window of w shows a token itself and the w - 1 before it.
    """
    offset = num_keys - num_queries
    distance = torch.arange(num_queries, device=device)[:, None] + offset - torch.arange(num_keys, device=device)
    mask = distance >= 0
    return mask if window is None else mask & (distance < window)


class FullSequence:
    """No cache: every row of the batch is one sequence from position 0, all rows equally long.

    bias: (H, T, T) added to the scores, the same in every layer. dropout: share of the attention weights to drop.
    """

    def __init__(self, bias: Tensor | None = None, dropout: float = 0.0) -> None:
        self.dropout = dropout
        self.mask: Tensor | None = None
        if bias is not None:
            visible = causal_mask(bias.shape[-2], bias.shape[-1], None, bias.device)
            self.mask = bias.masked_fill(~visible, -torch.inf)[None]

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, scale: float, window: int | None) -> Tensor:
        num_tokens = q.shape[1]
        mask = self.mask
        if window is not None and window < num_tokens:
            assert mask is None, "a layer has a window or a bias"
            mask = causal_mask(num_tokens, num_tokens, window, q.device)
        out = F.scaled_dot_product_attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            attn_mask=mask,
            dropout_p=self.dropout,
            is_causal=mask is None,
            scale=scale,
            enable_gqa=k.shape[2] != q.shape[2],
        )
        return out.transpose(1, 2)


class Bidirectional:
    """Every token sees every token of its row, or of the source beside it (cross-attention), that is not padding.

    mask: (B, T) boolean, False = padding; None: there is none. dropout: share of the attention weights to drop.
    bias: (H, T, T) added to the scores, the same in every layer.
    """

    def __init__(self, mask: Tensor | None = None, dropout: float = 0.0, bias: Tensor | None = None) -> None:
        # A row of padding alone would have a softmax over nothing, NaN in some kernels: let it see itself.
        self.mask = None if mask is None else (mask | ~mask.any(-1, keepdim=True))[:, None, None]  # (B, 1, 1, T)
        if bias is not None:
            self.mask = bias[None] if self.mask is None else bias.masked_fill(~self.mask, -torch.inf)  # (B, H, T, T)
        self.dropout = dropout

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, scale: float, window: int | None) -> Tensor:
        assert window is None, "layers that look both ways have no window"
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask, dropout_p=self.dropout, scale=scale)
        return out.transpose(1, 2)


class Attention(nn.Module):
    """Multi-head attention with grouped key/value heads (arXiv:2305.13245): softmax(q kᵀ · scale) v, then out_proj.

    q, k and v come from one matrix (rows: all q heads, all k heads, all v heads): one GEMM instead of three. With
    `cross` the keys and values are the source's, so q has a matrix of its own, and k and v share one.
    """

    def __init__(self, config: TransformerConfig, layer: int, *, cross: bool = False) -> None:
        super().__init__()
        self.layer, self.cross = layer, cross
        self.num_heads, self.num_kv_heads, self.head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        self.scale, self.window = config.scale, config.window(layer)
        q_rows, kv_rows = config.num_heads * config.head_dim, 2 * config.num_kv_heads * config.head_dim
        if cross:
            self.q_proj = nn.Linear(config.hidden_size, q_rows, config.qkv_bias)
            self.kv_proj = nn.Linear(config.hidden_size, kv_rows, config.qkv_bias)
        else:
            self.qkv_proj = nn.Linear(config.hidden_size, q_rows + kv_rows, config.qkv_bias)
        self.out_proj = nn.Linear(config.num_heads * config.head_dim, config.hidden_size, config.attention_out_bias)
        self.q_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else None

    def forward(
        self, x: Tensor, rope: tuple[Tensor, Tensor] | None, attend: Attend, memory: Tensor | None = None
    ) -> Tensor:
        """x (B, T, D), rope = cos and sin (B, T, 1, E) or None -> (B, T, D).

        Cross-attention reads memory (B, S, D); None there: `attend` has the keys and values, from `keys_values`.
        """
        if self.cross:
            q = self.q_proj(x).unflatten(-1, (-1, self.head_dim))
            k, v = (q[:, :0], q[:, :0]) if memory is None else self.keys_values(memory)
            return self.out_proj(attend(self.layer, q, k, v, scale=self.scale, window=self.window).flatten(-2))
        qkv = self.qkv_proj(x)
        if self.q_norm is None and (jointly := getattr(attend, "jointly", None)) is not None:
            out = jointly(qkv, rope, self.num_heads, self.num_kv_heads, scale=self.scale, window=self.window)
            if out is not None:
                return self.out_proj(out)
        heads = qkv.unflatten(-1, (-1, self.head_dim))  # (B, T, H + 2K, E)
        qk, v = heads.split_with_sizes((self.num_heads + self.num_kv_heads, self.num_kv_heads), -2)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = qk.split_with_sizes((self.num_heads, self.num_kv_heads), -2)
            qk = torch.cat((self.q_norm(q), self.k_norm(k)), dim=-2)
        if rope is not None:
            qk = rotate(qk, *rope)
        q, k = qk.split_with_sizes((self.num_heads, self.num_kv_heads), -2)
        out = attend(self.layer, q, k, v, scale=self.scale, window=self.window)  # (B, T, H, E)
        return self.out_proj(out.flatten(-2))

    def keys_values(self, memory: Tensor) -> tuple[Tensor, Tensor]:
        """Cross-attention only: memory (B, S, D) -> k and v (B, S, K, E), which stay the same for a whole target."""
        heads = self.kv_proj(memory).unflatten(-1, (-1, self.head_dim))
        k, v = heads.split_with_sizes((self.num_kv_heads, self.num_kv_heads), -2)
        return k, v
