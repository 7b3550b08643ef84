"""The parts of a Transformer block that are not attention: norms, MLP, rotary tables.

Legend for shapes in comments: B batch, T tokens, D hidden_size, F intermediate_size, H heads, K key/value heads,
E head_dim. Any number of leading dimensions is accepted where only the last one matters.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bimo.models import fused_training
from bimo.models.config import RopeConfig, TransformerConfig

__all__ = ["ACTIVATIONS", "MLP", "RMSNorm", "make_norm", "rope_angles", "rope_frequencies", "rotate"]


class RMSNorm(nn.Module):
    """x / rms(x) * weight (arXiv:1910.07467), computed in float32 and rounded before the product, as Llama does."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == torch.float32:
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)  # one pass, no float32 copy of x
        scale = (norm.square() / x.shape[-1] + self.eps).rsqrt()
        return (x * scale).to(x.dtype) * self.weight


def make_norm(config: TransformerConfig) -> nn.Module:
    """The configured norm over hidden_size."""
    if config.norm == "rms":
        return RMSNorm(config.hidden_size, config.norm_eps)
    return nn.LayerNorm(config.hidden_size, config.norm_eps)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


class MLP(nn.Module):
    """down(activation(up(x))), or gated (SwiGLU, arXiv:2002.05202): down(activation(gate(x)) * up(x)).

    Gate and up share one matrix, gate rows first: one GEMM instead of two.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        hidden, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gated = config.gated_mlp
        if self.gated:
            self.gate_up_proj = nn.Linear(hidden, 2 * inner, bias)
        else:
            self.up_proj = nn.Linear(hidden, inner, bias)
        self.down_proj = nn.Linear(inner, hidden, bias)
        self.activation = ACTIVATIONS[config.activation]
        self.dropout = config.activation_dropout

    def forward(self, x: Tensor) -> Tensor:
        if self.gated:
            gate_up = self.gate_up_proj(x)  # (..., 2 F)
            if self.activation is F.silu and fused_training.loops_for(gate_up):
                inner = fused_training.swiglu(gate_up)
            else:
                gate, up = gate_up.chunk(2, dim=-1)
                inner = self.activation(gate) * up
        else:
            inner = self.activation(self.up_proj(x))
        if self.training and self.dropout:
            inner = F.dropout(inner, self.dropout)
        return self.down_proj(inner)


def rope_frequencies(head_dim: int, rope: RopeConfig, max_positions: int) -> tuple[Tensor, float]:
    """Angular frequencies (head_dim / 2,) in float32, and the factor on cos and sin ("yarn" only, else 1).

    default: theta^(-2i/d). linear divides all by `factor`. llama3 divides long wavelengths only, with a ramp between.
    yarn (arXiv:2309.00071, section 3.2) blends between both by dimension and warms the attention temperature.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    frequencies = 1.0 / (rope.theta**exponents)
    if rope.kind == "default":
        return frequencies, 1.0
    if rope.kind == "linear":
        return frequencies / rope.factor, 1.0
    original = rope.original_max_positions or max_positions
    if rope.kind == "llama3":
        wavelengths = 2 * math.pi / frequencies
        low, high = original / rope.low_freq_factor, original / rope.high_freq_factor
        ramp = (original / wavelengths - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
        blended = (1 - ramp) * frequencies / rope.factor + ramp * frequencies
        scaled = torch.where(wavelengths > low, frequencies / rope.factor, blended)
        return torch.where(wavelengths < high, frequencies, scaled), 1.0
    return _yarn(frequencies, head_dim, rope, original)


def _yarn(frequencies: Tensor, head_dim: int, rope: RopeConfig, original: int) -> tuple[Tensor, float]:
    def dimension(rotations: float) -> float:
        return head_dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    ramp = (torch.arange(head_dim // 2, dtype=torch.float32) - low) / max(high - low, 0.001)
    keep = 1 - ramp.clamp(0, 1)  # 1: high frequency, left as it was; 0: fully interpolated
    blended = frequencies / rope.factor * (1 - keep) + frequencies * keep

    def warmth(scale: float, mscale: float = 1.0) -> float:
        return 0.1 * mscale * math.log(scale) + 1.0 if scale > 1 else 1.0

    attention_factor = rope.attention_factor
    if attention_factor is None:
        if rope.mscale and rope.mscale_all_dim:
            attention_factor = warmth(rope.factor, rope.mscale) / warmth(rope.factor, rope.mscale_all_dim)
        else:
            attention_factor = warmth(rope.factor)
    return blended, attention_factor


def rope_angles(positions: Tensor, frequencies: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    """cos and signed sin of every position's angles, (B, T, 1, E) float32 each, for `rotate`.

    positions (B, T), frequencies (E / 2,). Float32 whatever the weights are, because bf16 angles lose far positions.
    Computed for a step's tokens only: a table for a context of 1M would take a gigabyte.
    """
    angles = positions[..., None, None].float() * frequencies  # (B, T, 1, E / 2)
    cos, sin = angles.cos() * factor, angles.sin() * factor
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (a, b) = (x_i, x_{i + E/2}) by its position's angle: (a cos - b sin, b cos + a sin).

    x (B, T, H, E); cos and signed sin (B, T, 1, E) from `rope_angles`: the first half of sin is negated there.
    """
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)
