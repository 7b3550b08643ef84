"""The elementwise parts of a training step on a CPU, each in one pass, as functions on tensors (src/training.h).

    loops = TrainingLoops()
    hidden = loops.swiglu(gate_up)             # (N, 2 F) bfloat16 -> (N, F)

They run on torch's threads, as many as torch uses. No autograd: bimo.models.fused_training has the pairs of forward and
backward. Legend: N rows, V vocabulary, F intermediate_size, D hidden_size, B batch, T tokens, H heads, E head_dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bimo_kernels import _kernels

__all__ = ["TrainingLoops"]


class TrainingLoops:
    """instruction_set: one of `bimo_kernels.instruction_sets()`; "" is the fastest."""

    def __init__(self, instruction_set: str = "") -> None:
        self._loops = _kernels.Training(instruction_set)

    def cross_entropy(self, logits: Tensor, targets: Tensor, smoothing: float, slopes: bool) -> Tensor:
        """Losses (N,) float32 of logits (N, V) bfloat16, which become softmax(logits) - target if `slopes`.

        The target is (1 - smoothing) of the word and smoothing / V of every word.
        """
        _check(logits, torch.bfloat16), _check(targets, torch.int64, logits.shape[:1])
        losses = logits.new_empty(len(logits), dtype=torch.float32)
        self._loops.cross_entropy(
            logits.data_ptr(), targets.data_ptr(), losses.data_ptr(), *logits.shape, smoothing, slopes, _threads()
        )
        return losses

    def swiglu(self, gate_up: Tensor) -> Tensor:
        """silu(gate) * up: (N, 2 F) bfloat16, gate first -> (N, F)."""
        _check(gate_up, torch.bfloat16)
        rows, inner = gate_up.shape[0], gate_up.shape[1] // 2
        assert gate_up.shape[1] == 2 * inner
        out = gate_up.new_empty(rows, inner)
        self._loops.swiglu(gate_up.data_ptr(), out.data_ptr(), rows, inner, _threads())
        return out

    def swiglu_backward(self, gate_up: Tensor, d_out: Tensor) -> Tensor:
        """The gradient of gate_up, (N, 2 F), from that of `swiglu`'s result, (N, F)."""
        rows, inner = d_out.shape
        _check(gate_up, torch.bfloat16, (rows, 2 * inner)), _check(d_out, torch.bfloat16)
        d_gate_up = torch.empty_like(gate_up)
        self._loops.swiglu_backward(gate_up.data_ptr(), d_out.data_ptr(), d_gate_up.data_ptr(), rows, inner, _threads())
        return d_gate_up

    def to_blocks(
        self, rows: Tensor, blocks: Tensor, block: int, rope: tuple[Tensor, Tensor] | None, scale: float = 1.0
    ) -> None:
        """Rotate and scale heads, and lay them out as products of attention want them.

        Args:
            rows: (B, T, H, E) bfloat16; the last two dimensions lie together, rows of tokens one after the other.
            blocks: written, H * B * T * E numbers: of every `block` tokens (B, H, block, E), one after the other.
            rope: cos and sin (B, T, 1, E) float32, sin negated in its first half; None: no rotation.
        """
        self._copy_heads(True, rows, blocks, block, rope, scale)

    def from_blocks(
        self, blocks: Tensor, rows: Tensor, block: int, rope: tuple[Tensor, Tensor] | None, scale: float = 1.0
    ) -> None:
        """The way back, turned the other way: what gradients take. Writes `rows`."""
        self._copy_heads(False, rows, blocks, block, rope, scale)

    def _copy_heads(
        self,
        to_blocks: bool,
        rows: Tensor,
        blocks: Tensor,
        block: int,
        rope: tuple[Tensor, Tensor] | None,
        scale: float,
    ) -> None:
        batch, tokens, heads, dim = rows.shape
        width = rows.stride(1)
        assert (rows.dtype == torch.bfloat16 and rows.numel() == 0) or rows.stride() == (tokens * width, width, dim, 1)
        _check(blocks, torch.bfloat16)
        assert blocks.numel() == rows.numel()
        for angles in rope or ():
            _check(angles, torch.float32, (batch, tokens, 1, dim))
        cos, sin = (0, 0) if rope is None else (angles.data_ptr() for angles in rope)
        if rows.numel():
            self._loops.copy_heads(
                to_blocks, rows.data_ptr(), width, blocks.data_ptr(), batch, tokens, heads, dim, block, cos, sin, scale,
                _threads(),
            )  # fmt: skip

    def add_norm(self, x: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        """x + delta (x itself without delta), the RMSNorm of that in bfloat16, and 1 / rms of each row.

        x (N, D) float32, delta (N, D) bfloat16, weight (D,) float32 -> (N, D), (N, D), (N,).
        """
        _check(x, torch.float32), _check(weight, torch.float32, x.shape[1:])
        total, normed = x, torch.empty_like(x, dtype=torch.bfloat16)
        if delta is not None:
            _check(delta, torch.bfloat16, x.shape)
            total = torch.empty_like(x)
        scales = x.new_empty(len(x))
        self._loops.add_norm(
            x.data_ptr(), _address(delta), weight.data_ptr(), 0 if delta is None else total.data_ptr(),
            normed.data_ptr(), scales.data_ptr(), *x.shape, eps, _threads(),
        )  # fmt: skip
        return total, normed, scales

    def add_norm_backward(
        self, total: Tensor, weight: Tensor, scales: Tensor, d_total: Tensor | None, d_normed: Tensor, with_delta: bool
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """Gradients of x (N, D) float32, of delta (the same in bfloat16) if `with_delta`, and of weight (D,) float32.

        total, scales: what `add_norm` gave. d_total: the gradient of the sum, None where it has no other use.
        """
        _check(total, torch.float32), _check(weight, torch.float32, total.shape[1:])
        _check(scales, torch.float32, total.shape[:1]), _check(d_normed, torch.bfloat16, total.shape)
        if d_total is not None:
            _check(d_total, torch.float32, total.shape)
        d_x, d_weight = torch.empty_like(total), torch.empty_like(weight)
        d_delta = torch.empty_like(d_normed) if with_delta else None
        self._loops.add_norm_backward(
            total.data_ptr(), weight.data_ptr(), scales.data_ptr(), _address(d_total), d_normed.data_ptr(),
            d_x.data_ptr(), _address(d_delta), d_weight.data_ptr(), *total.shape, _threads(),
        )  # fmt: skip
        return d_x, d_delta, d_weight

    def add(self, x: Tensor, delta: Tensor) -> Tensor:
        """x (float32) + delta (bfloat16), of one shape."""
        _check(x, torch.float32), _check(delta, torch.bfloat16, x.shape)
        total = torch.empty_like(x)
        self._loops.add(x.data_ptr(), delta.data_ptr(), total.data_ptr(), x.numel(), _threads())
        return total

    def round(self, x: Tensor) -> Tensor:
        """x (float32) in bfloat16."""
        _check(x, torch.float32)
        rounded = torch.empty_like(x, dtype=torch.bfloat16)
        self._loops.round(x.data_ptr(), rounded.data_ptr(), x.numel(), _threads())
        return rounded

    def softmax(self, scores: Tensor, starts: Tensor, start: int) -> Tensor:
        """In place: the attention weights of queries `start` .. `start + N` over keys 0 .. `start + N`.

        scores (B, H, N, start + N) bfloat16, contiguous; starts (B, T) int32: the first key each token sees; the last
        is itself.
        """
        return self._softmax(None, scores, starts, start)

    def softmax_backward(self, weights: Tensor, d_weights: Tensor, starts: Tensor, start: int) -> Tensor:
        """In place: the gradient of `softmax`'s scores from that of the weights it gave."""
        _check(weights, torch.bfloat16, d_weights.shape)
        return self._softmax(weights, d_weights, starts, start)

    def _softmax(self, weights: Tensor | None, scores: Tensor, starts: Tensor, start: int) -> Tensor:
        batch, heads, count, keys = scores.shape
        _check(scores, torch.bfloat16), _check(starts, torch.int32)
        assert keys == start + count and len(starts) == batch
        if scores.numel():
            self._loops.softmax(
                _address(weights), scores.data_ptr(), starts.data_ptr(), batch, heads, starts.shape[1], start, count,
                _threads(),
            )  # fmt: skip
        return scores


def _threads() -> int:
    return torch.get_num_threads()


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _check(tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...] | torch.Size | None = None) -> None:
    assert tensor.device.type == "cpu" and tensor.dtype == dtype and tensor.is_contiguous(), tensor.dtype
    assert shape is None or tensor.shape == tuple(shape), (tensor.shape, shape)
