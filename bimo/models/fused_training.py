"""Training on a CPU in bfloat16: what stands between a block's products, each part in one pass over memory.

    x, normed = add_norm(x, delta, norm)       # x + delta, and its norm
    hidden = swiglu(gate_up)                   # silu(gate) * up
    out = packed_attention(qkv, rope, starts, ...)

A chain of torch operators reads and writes the same rows several times, casts between them, and copies for every
transposition: beside fast bfloat16 products that was 40 % of a small model's step, and is 20 % now. The C++ loops of
`kernels/` do each chain at once, and so do their gradients here. They round once where the chain rounds in between, so
results differ in the last bits. `loops_for` says whether they can be used; elsewhere the callers use plain torch, with
the same formulas. Float32 training is left to torch: products take nearly all of its time.

Shapes: B batch, T tokens, D hidden_size, F intermediate_size, H query heads, K key/value heads, E head_dim.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from bimo.runtime import load_kernels

__all__ = ["add", "add_norm", "available", "can_attend", "loops_for", "packed_attention", "swiglu"]


def _loops() -> Any:
    return None if load_kernels() is None else _fastest()


@lru_cache
def _fastest() -> Any:
    return import_module("bimo_kernels.training").TrainingLoops()


def available() -> bool:
    """Whether training in bfloat16 on this machine's CPU uses the loops."""
    return _loops() is not None


def loops_for(*tensors: Tensor) -> Any:
    """The loops, if these tensors are on a CPU in bfloat16 autocast and the kernels are built, else None.

    None as well while torch.compile traces: it makes loops of its own, and cannot see into these.
    """
    if torch.compiler.is_compiling():
        return None
    if any(tensor.device.type != "cpu" or type(tensor) not in (Tensor, nn.Parameter) for tensor in tensors):
        return None
    if not torch.is_autocast_enabled("cpu") or torch.get_autocast_dtype("cpu") != torch.bfloat16:
        return None
    return _loops()


# --- the MLP's inner product -----------------------------------------------------------------------------------------


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up, (..., 2 F) bfloat16 -> (..., F); only where there are `loops_for` it."""
    return _SwiGLU.apply(gate_up)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        gate_up = gate_up.contiguous()
        ctx.save_for_backward(gate_up)
        out: Tensor = _loops().swiglu(gate_up.flatten(0, -2))
        return out.view(*gate_up.shape[:-1], gate_up.shape[-1] // 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        d_out = grads[0].contiguous()
        d_gate_up: Tensor = _loops().swiglu_backward(gate_up.flatten(0, -2), d_out.flatten(0, -2))
        return d_gate_up.view(gate_up.shape)


# --- the residual path -----------------------------------------------------------------------------------------------


def add_norm(x: Tensor, delta: Tensor | None, norm: nn.Module) -> tuple[Tensor, Tensor]:
    """x + delta (x itself without it), and the norm of that: what a pre-norm block does before each of its parts.

    x (..., D), delta like x. Where there are loops for it the norm is in bfloat16, as the products after it want it.
    """
    if not _is_residual(x, delta) or not _is_rms(norm):
        total = x if delta is None else add(x, delta)
        return total, norm(total)
    return _AddNorm.apply(x, delta, norm.weight, norm.eps)


def add(x: Tensor, delta: Tensor) -> Tensor:
    """x + delta."""
    return _Add.apply(x, delta) if _is_residual(x, delta) else x + delta


def _is_residual(x: Tensor, delta: Tensor | None) -> bool:
    """Whether x is float32 and what is added bfloat16, and there are loops for them."""
    if x.dtype != torch.float32 or not x.is_contiguous():
        return False
    if delta is None:
        return loops_for(x) is not None
    same = delta.dtype == torch.bfloat16 and delta.shape == x.shape and delta.is_contiguous()
    return same and loops_for(x, delta) is not None


def _is_rms(norm: nn.Module) -> bool:
    weight = getattr(norm, "weight", None)
    plain = weight is not None and weight.dtype == torch.float32 and loops_for(weight) is not None
    return plain and hasattr(norm, "eps") and not hasattr(norm, "bias")


class _AddNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        width = x.shape[-1]
        rows = None if delta is None else delta.view(-1, width)
        total, normed, scales = _loops().add_norm(x.view(-1, width), rows, weight, eps)
        total = x if delta is None else total.view(x.shape)
        ctx.save_for_backward(total, weight, scales)
        ctx.with_delta = delta is not None
        ctx.set_materialize_grads(False)
        return total, normed.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        total, weight, scales = ctx.saved_tensors
        d_total, d_normed = grads
        if d_normed is None:  # the norm was not used
            assert d_total is not None
            return d_total, d_total.bfloat16() if ctx.with_delta else None, None, None
        shape, rows = total.shape, (-1, total.shape[-1])
        d_x, d_delta, d_weight = _loops().add_norm_backward(
            total.view(rows), weight, scales, None if d_total is None else d_total.contiguous().view(rows),
            d_normed.contiguous().view(rows), ctx.with_delta,
        )  # fmt: skip
        return d_x.view(shape), None if d_delta is None else d_delta.view(shape), d_weight, None


class _Add(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, delta: Tensor) -> Tensor:
        total: Tensor = _loops().add(x, delta)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        return grads[0], _loops().round(grads[0].contiguous())


# --- attention -------------------------------------------------------------------------------------------------------


def can_attend(qkv: Tensor, rope: tuple[Tensor, Tensor] | None) -> bool:
    """Whether `packed_attention` takes these."""
    if qkv.dtype != torch.bfloat16 or loops_for(qkv) is None:
        return False
    shape = qkv.shape[:2]
    return all(x.dtype == torch.float32 and x.is_contiguous() and x.shape[:2] == shape for x in rope or ())


def packed_attention(
    qkv: Tensor,
    rope: tuple[Tensor, Tensor] | None,
    starts: Tensor,
    *,
    num_heads: int,
    num_kv_heads: int,
    scale: float,
    block: int,
) -> Tensor:
    """Rotation, then softmax(q kᵀ · scale) v of each token over those of its row from `starts` to itself.

    Products are of `block` queries at a time, each with the keys up to its end; heads that share a key head are rows of
    one product. The weights, T * T / 2 of them a head, are kept for the way back.

    Args:
        qkv: (B, T, (H + 2 K) E) bfloat16, all heads of q, then of k, then of v.
        rope: cos and sin (B, T, 1, E) float32 from `layers.rope_angles`.
        starts: (B, T) int32, the first token that each sees.

    Returns: (B, T, H E).
    """
    return _PackedAttention.apply(qkv, rope, starts, num_heads, num_kv_heads, scale, block)


class _PackedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        qkv: Tensor,
        rope: tuple[Tensor, Tensor] | None,
        starts: Tensor,
        heads: int,
        kv: int,
        scale: float,
        block: int,
    ) -> Tensor:
        loops = _loops()
        batch, num_tokens, _ = qkv.shape
        rows = qkv.contiguous().unflatten(-1, (heads + 2 * kv, -1))  # (B, T, H + 2K, E)
        dim = rows.shape[-1]
        q, k, v = (qkv.new_empty(batch * n * num_tokens * dim) for n in (heads, kv, kv))
        loops.to_blocks(rows[:, :, :heads], q, block, rope, scale)
        loops.to_blocks(rows[:, :, heads : heads + kv], k, num_tokens, rope)
        loops.to_blocks(rows[:, :, heads + kv :], v, num_tokens, None)
        k, v = (x.view(batch * kv, num_tokens, dim) for x in (k, v))
        out, weights = torch.empty_like(q), []
        blocks = (_blocks(x, k, heads // kv, block) for x in (q, out))
        for (start, end, queries), (_, _, part) in zip(*blocks, strict=True):
            scores = torch.bmm(queries, k[:, :end].transpose(1, 2))  # (B K, H / K * block, end)
            loops.softmax(scores.view(batch, heads, end - start, end), starts, start)
            torch.bmm(scores, v[:, :end], out=part)
            weights.append(scores)
        result = qkv.new_empty(batch, num_tokens, heads, dim)
        loops.from_blocks(out, result, block, None)
        ctx.save_for_backward(q, k, v, starts, *weights, *(rope or ()))
        ctx.heads, ctx.kv, ctx.scale, ctx.block = heads, kv, scale, block
        return result.flatten(-2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        loops, heads, kv, block = _loops(), ctx.heads, ctx.kv, ctx.block
        q, k, v, starts, *rest = ctx.saved_tensors
        (batch, num_tokens), dim = starts.shape, k.shape[-1]
        count = -(-num_tokens // block)
        weights, rope = rest[:count], tuple(rest[count:]) or None
        d_out, d_q, d_k, d_v = (torch.empty_like(x) for x in (q, q, k, v))
        loops.to_blocks(grads[0].contiguous().unflatten(-1, (heads, dim)), d_out, block, None)
        blocks = [list(_blocks(x, k, heads // kv, block)) for x in (q, d_out, d_q)]
        # The last block first: its keys are all there are, so that what the others add to is written already.
        for (start, end, queries), (_, _, d_part), (_, _, d_queries), weight in reversed(
            list(zip(*blocks, weights, strict=True))
        ):
            d_scores = torch.bmm(d_part, v[:, :end].transpose(1, 2))
            four = (batch, heads, end - start, end)
            loops.softmax_backward(weight.view(four), d_scores.view(four), starts, start)
            torch.bmm(d_scores, k[:, :end], out=d_queries)
            for total, left, right in ((d_v, weight, d_part), (d_k, d_scores, queries)):
                if end == num_tokens:
                    torch.bmm(left.transpose(1, 2), right, out=total)
                else:
                    total[:, :end].baddbmm_(left.transpose(1, 2), right)
        d_qkv = q.new_empty(batch, num_tokens, heads + 2 * kv, dim)
        loops.from_blocks(d_q, d_qkv[:, :, :heads], block, rope, ctx.scale)
        loops.from_blocks(d_k.view(-1), d_qkv[:, :, heads : heads + kv], num_tokens, rope)
        loops.from_blocks(d_v.view(-1), d_qkv[:, :, heads + kv :], num_tokens, None)
        return d_qkv.flatten(-2), None, None, None, None, None, None


def _blocks(flat: Tensor, k: Tensor, group: int, block: int) -> Iterator[tuple[int, int, Tensor]]:
    """First token, end and rows (B K, H / K * tokens, E) of each block of queries; k (B K, T, E), group = H / K."""
    pairs, num_tokens, dim = k.shape
    for start in range(0, num_tokens, block):
        end = min(num_tokens, start + block)
        each = pairs * group * dim
        yield start, end, flat[start * each : end * each].view(pairs, group * (end - start), dim)
