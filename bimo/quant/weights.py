"""Weights in 8 or 4 bits: how they are rounded, and what they stand for.

    block8     w = scale (q - 128)         a scale every 32 columns; GGUF's Q8_0
    row8       w H = scale (q - 128)       a scale a row; H: the Hadamard matrix of every 64 columns
    block4     w = scale q + minimum       both every 32 columns; GGUF's Q4_1, Q4_0, Q4_K

Activations have outliers, a few columns in each row, which would widen the steps of all others. H spreads them: x Wᵀ =
(x H)(W H)ᵀ, as H is orthogonal and symmetric (QuaRot, arXiv:2404.00456). With it one scale a row does for weights and
activations, sums are whole numbers from end to end, products take 13 % less time, and smollm2 loses 0.1-0.4 % of
perplexity where scales every 32 columns lost 0.6 %. Matrices that do not divide into 64 columns have block8. 16 steps
cost more, and nothing when the weights came from such a file (they lie on those steps). See LOG.md for the figures.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from bimo.errors import CorruptModelError

__all__ = [
    "BLOCK",
    "HADAMARD",
    "MOST_COLUMNS",
    "QuantisedWeight",
    "hadamard",
    "join",
    "quantise4",
    "quantise8",
    "quantise_rows8",
    "round_weight",
]

BLOCK = 32  # columns that share a scale
HADAMARD = 64  # columns that are transformed together
MOST_COLUMNS = 1 << 15  # of row8: the kernels sum in 32 bits
WIDEST = 0.012  # rounding error, as a share of the weights (root mean squares): smollm2's are 0.7-0.8 %
_ROWS_AT_ONCE = 4096


@dataclass(frozen=True)
class QuantisedWeight:
    """codes (rows, columns) uint8; scales (rows, columns / 32 rounded up) float16, of "row8" (rows, 1); minima (4 bits)
    like scales."""

    format: str
    codes: Tensor
    scales: Tensor
    minima: Tensor | None = None

    def dequantise(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight that is computed with, (rows, columns)."""
        blocks = F.pad(self.codes, (0, -self.codes.shape[1] % BLOCK)).unflatten(1, (-1, BLOCK)).float()
        scales = self.scales.float()[:, :, None]
        if self.minima is None:
            blocks = (blocks - 128) * scales
        else:
            blocks = blocks * scales + self.minima.float()[:, :, None]
        weight = blocks.flatten(1)[:, : self.codes.shape[1]]
        return (hadamard(weight) if self.format == "row8" else weight).to(dtype)

    @property
    def rounding_error(self) -> float:
        """Root mean square of what rounding may have changed, as a share of the weights' own; 8 bits, a scale a row.
        Errors are spread evenly over a step, so their mean square is a twelfth of its square."""
        scales = self.scales.double().square()
        squares = (self.codes.float() - 128).square().sum(dim=1, dtype=torch.float64, keepdim=True)
        whole = float((squares * scales).sum())
        return (float(scales.sum()) * self.codes.shape[1] / 12 / whole) ** 0.5 if whole else 0.0

    def rows(self, index: Tensor) -> QuantisedWeight:
        """Its rows in another order; index -1 stands for a row of zeros."""
        missing = index < 0
        index = index.clamp_min(0)

        def pick(values: Tensor, blank: int = 0) -> Tensor:
            picked = values[index]
            picked[missing] = blank
            return picked

        minima = None if self.minima is None else pick(self.minima)
        return QuantisedWeight(self.format, pick(self.codes, 128), pick(self.scales), minima)


def hadamard(weight: Tensor) -> Tensor:
    """weight (..., columns) times Sylvester's Hadamard matrix / 8 every 64 columns, in float32; its own inverse."""
    blocks = weight.float().unflatten(-1, (-1, HADAMARD))
    for bit in range(HADAMARD.bit_length() - 1):
        one, other = blocks.unflatten(-1, (-1, 2, 1 << bit)).unbind(-2)
        blocks = torch.stack((one + other, one - other), -2).flatten(-3)
    return blocks.flatten(-2) / HADAMARD**0.5


def _blocks(weight: Tensor, width: int = BLOCK) -> Tensor:
    """(rows, columns) -> (rows, blocks, width) float32; the last block is filled up with its own first value."""
    padding = -weight.shape[1] % width
    blocks = F.pad(weight.float(), (0, padding)).unflatten(1, (-1, width))
    if padding:  # the padding must not widen the range
        blocks[:, -1, width - padding :] = blocks[:, -1, :1]
    return blocks


def quantise8(weight: Tensor) -> QuantisedWeight:
    """8 bits, symmetric: the scale is max |w| / 127 of every 32 columns.

    Raises ValueError for weights that are not numbers or too large for float16.
    """
    return _in_slices(_round8, weight)


def quantise_rows8(weight: Tensor) -> QuantisedWeight:
    """8 bits, symmetric, of `hadamard(weight)`: the scale is max |w| / 127 of a row. Raises like `quantise8`."""
    return _in_slices(lambda rows: _round8(hadamard(rows), by_row=True), weight)


def quantise4(weight: Tensor) -> QuantisedWeight:
    """4 bits, a scale and a minimum every 32 columns: the 16 steps reach from the least weight to the greatest.

    Weights that already lie on 16 such steps come back as they were (up to float16's rounding of scale and minimum).
    Raises ValueError for weights that are not numbers or too large for float16.
    """
    return _in_slices(_round4, weight)


def round_weight(name: str, weight: Tensor | QuantisedWeight, quant: str, *, tied: bool) -> Tensor | QuantisedWeight:
    """A decoder's parameter as `quant` ("int8", "int4", "file") has it; what is not rounded comes back as it is.

    Not rounded: vectors, learned positions, and embeddings that are not the head as well. The head has 8 bits in "int4"
    too, for it decides between words that are close. Raises CorruptModelError naming a weight that is not a number.
    """
    if isinstance(weight, QuantisedWeight) or weight.ndim == 1 or name == "embed_positions.weight":
        return weight
    if name == "embed_tokens.weight" and not tied:
        return weight
    is_head = name in ("embed_tokens.weight", "lm_head.weight")
    try:
        if quant == "int4" and not is_head:
            return quantise4(weight)
        if weight.shape[1] % HADAMARD or weight.shape[1] > MOST_COLUMNS:
            return quantise8(weight)
        by_row = quantise_rows8(weight)
        return by_row if by_row.rounding_error <= WIDEST else quantise8(weight)
    except ValueError as error:
        raise CorruptModelError(f"the model cannot be rounded to {quant}, {name}: {error}; fetch it again") from None


def join(parts: list[QuantisedWeight], merge: Callable[[list[Tensor]], Tensor]) -> QuantisedWeight:
    """One weight of several of the same format, whose tensors `merge` puts together (torch.cat: rows below rows)."""
    minima = [part.minima for part in parts if part.minima is not None]
    return QuantisedWeight(
        parts[0].format,
        merge([part.codes for part in parts]),
        merge([part.scales for part in parts]),
        merge(minima) if minima else None,
    )


def _in_slices(round_rows: Callable[[Tensor], QuantisedWeight], weight: Tensor) -> QuantisedWeight:
    """Some rows at a time: the float32 copies of a whole vocabulary's embedding are several times the result."""
    parts = [round_rows(rows) for rows in weight.split(_ROWS_AT_ONCE)]
    return parts[0] if len(parts) == 1 else join(parts, torch.cat)


def _round8(weight: Tensor, by_row: bool = False) -> QuantisedWeight:
    blocks = _blocks(weight, weight.shape[1] if by_row else BLOCK)
    scales = (blocks.abs().amax(dim=2) / 127).half()
    if not scales.isfinite().all():
        raise ValueError("a weight is not a number, or too large")
    inverse = torch.where(scales > 0, 1 / scales.float(), 0)
    codes = (blocks * inverse[:, :, None]).round_().clamp_(-127, 127).add_(128).to(torch.uint8)
    codes = codes.flatten(1)[:, : weight.shape[1]].contiguous()
    return QuantisedWeight("row8" if by_row else "block8", codes, scales)


def _round4(weight: Tensor) -> QuantisedWeight:
    blocks = _blocks(weight)
    least, greatest = blocks.amin(dim=2), blocks.amax(dim=2)
    scales, minima = ((greatest - least) / 15).half(), least.half()
    if not (scales.isfinite().all() and minima.isfinite().all()):
        raise ValueError("a weight is not a number, or too large")
    inverse = torch.where(scales > 0, 1 / scales.float(), 0)
    codes = ((blocks - minima.float()[:, :, None]) * inverse[:, :, None]).round_().clamp_(0, 15).to(torch.uint8)
    return QuantisedWeight("block4", codes.flatten(1)[:, : weight.shape[1]].contiguous(), scales, minima)
