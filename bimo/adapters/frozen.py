"""A matrix of the base that stays as it is, and the product that adapters are built on.

    layer = FrozenLinear(linear, dtype=torch.bfloat16)      # the same name, weights and results, less memory
    y = layer(x)

It is kept in the number type of the products (half the memory, and no cast in every step) or in 8 or 4 bits. The
product is an autograd function of its own, for three reasons. A matrix in bits is widened for one product and
forgotten, on the way back too, where autograd would keep the widened one of every layer. The change of low rank is
added to the base's product in place, part by part: one product with all parts' B in a block-diagonal matrix took twice
as long. And nothing is computed for the gradient of what is frozen: of a step's three large products two are left.

Shapes: N tokens (all leading dimensions), D columns, O rows, R rank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from bimo.quant.weights import QuantisedWeight, round_weight

__all__ = ["FrozenLinear", "LowRankPart", "product"]


class FrozenLinear(nn.Module):
    """y = x Wᵀ + bias. Takes the place of `linear` and keeps the names of its weights.

    dtype: of the matrix. quant: "none", "int8" or "int4", rounded as quant.weights does for serving; the matrix is then
    no parameter. name: for errors (CorruptModelError: a weight is not a number).
    """

    weight: nn.Parameter | None
    bias: nn.Parameter | None
    quantised: QuantisedWeight | None

    def __init__(
        self, linear: nn.Linear, *, dtype: torch.dtype = torch.float32, quant: str = "none", name: str = ""
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach(), requires_grad=False)
        self.weight, self.quantised = None, None
        if quant == "none":
            self.weight = nn.Parameter(linear.weight.detach().to(dtype), requires_grad=False)
            return
        rounded = round_weight(f"{name}.weight", linear.weight.detach(), quant, tied=False)
        assert isinstance(rounded, QuantisedWeight)
        self.quantised = rounded

    def matrix(self, dtype: torch.dtype) -> Tensor:
        """What is multiplied with, (O, D)."""
        if self.quantised is not None:
            return self.quantised.dequantise(dtype)
        assert self.weight is not None
        return self.weight.to(dtype)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> FrozenLinear:
        """Bits are no buffers, which DDP would send around in every step and `.bfloat16()` would round: they follow to
        another device only."""
        super()._apply(fn, recurse)
        if (bits := self.quantised) is not None:
            device = fn(bits.codes).device
            codes, scales, minima = (
                None if part is None else part.to(device) for part in (bits.codes, bits.scales, bits.minima)
            )
            assert codes is not None and scales is not None
            self.quantised = QuantisedWeight(bits.format, codes, scales, minima)
        return self

    def forward(self, x: Tensor) -> Tensor:
        return product(self, x)

    def linear(self, weight: Tensor) -> nn.Linear:
        """A plain layer of this shape and bias."""
        found = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        found.weight, found.bias = nn.Parameter(weight, requires_grad=False), self.bias  # type: ignore[assignment]
        return found


@dataclass(frozen=True)
class LowRankPart:
    """Rows `start` to `end` of a matrix change by scale B A. Its B stands from row `first` of the stacked B."""

    start: int
    end: int
    first: int
    scale: float

    @property
    def rows(self) -> slice:
        """Of the stacked B."""
        return slice(self.first, self.first + self.end - self.start)


def product(
    base: FrozenLinear,
    x: Tensor,
    low: Tensor | None = None,
    a: Tensor | None = None,
    b: Tensor | None = None,
    parts: tuple[LowRankPart, ...] = (),
    *,
    bias: bool = True,
) -> Tensor:
    """x Wᵀ + bias, and to the rows of each part scale (low Aᵀ) Bᵀ, in the number type of products.

    Args:
        x: (..., D) -> (..., O).
        low: what the change reads instead of x (dropout); None: x.
        a: (len(parts) R, D), one below the other, so that all parts are one product.
        b: (rows of all parts, R).
    """
    result: Tensor = _Product.apply(x, low, a, b, base, parts, bias)
    return result


def _number_type(x: Tensor) -> torch.dtype:
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        low: Tensor | None,
        a: Tensor | None,
        b: Tensor | None,
        base: FrozenLinear,
        parts: tuple[LowRankPart, ...],
        with_bias: bool,
    ) -> Tensor:
        dtype = _number_type(x)
        rows = x.reshape(-1, base.in_features).to(dtype)
        bias = base.bias.to(dtype) if with_bias and base.bias is not None else None
        y = F.linear(rows, base.matrix(dtype), bias)
        ctx.base, ctx.parts, ctx.dtype, ctx.shape = base, parts, dtype, x.shape
        ctx.types = [None if tensor is None else tensor.dtype for tensor in (x, low, a, b)]
        if a is not None and b is not None:
            read = rows if low is None else low.reshape(-1, base.in_features).to(dtype)
            inner = read @ a.to(dtype).t()  # (N, len(parts) R)
            for part, each in zip(parts, inner.split(b.shape[1], dim=1), strict=True):
                y[:, part.start : part.end].addmm_(each, (b[part.rows] * part.scale).to(dtype).t())
            ctx.save_for_backward(read, inner, a, b)
        return y.view(*x.shape[:-1], base.out_features)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        base, dtype = ctx.base, ctx.dtype
        d_y = grads[0].reshape(-1, base.out_features).to(dtype)
        d_x = d_y @ base.matrix(dtype) if ctx.needs_input_grad[0] else None
        d_low = d_a = d_b = None
        if saved := ctx.saved_tensors:  # once: a checkpointed block has them computed again by this
            read, inner, a, b = saved
            d_inner, d_b = torch.empty_like(inner), torch.empty_like(b)
            splits = inner.split(b.shape[1], dim=1), d_inner.split(b.shape[1], dim=1)
            for part, each, d_each in zip(ctx.parts, *splits, strict=True):
                d_part = d_y[:, part.start : part.end]
                torch.mm(d_part, (b[part.rows] * part.scale).to(dtype), out=d_each)
                d_b[part.rows] = (d_part.t() @ each).to(b.dtype) * part.scale
            d_a = (d_inner.t() @ read).to(a.dtype)
            if ctx.needs_input_grad[1]:
                d_low = d_inner @ a.to(dtype)
            elif ctx.types[1] is None and d_x is not None:
                d_x.addmm_(d_inner, a.to(dtype))
        d_x, d_low = (
            None if grad is None else grad.view(ctx.shape).to(kind)
            for grad, kind in zip((d_x, d_low), ctx.types, strict=False)
        )
        return d_x, d_low, d_a, d_b, None, None, None
