"""Bottleneck adapters (Houlsby et al., arXiv:1902.00751): small layers behind attention and behind the MLP.

    y + up(gelu(down(y)))           y: what attention or MLP gives to the residual path; up is 0 at first

They are computed one after the other with the base and so cannot be merged. PEFT has no such method: the files are two
of its layout with `"peft_type": "BIMO_BOTTLENECK"`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bimo.adapters.base import Adapter
from bimo.adapters.frozen import FrozenLinear
from bimo.models.parts import Part

__all__ = ["Bottleneck", "BottleneckLinear"]

SPREAD = 0.02  # of down's first values


class BottleneckLinear(FrozenLinear):
    """The last matrix of attention or MLP, and the bottleneck behind it."""

    def __init__(self, linear: nn.Linear, width: int, generator: torch.Generator, **frozen: Any) -> None:
        super().__init__(linear, **frozen)
        device = linear.weight.device
        self.down = nn.Linear(self.out_features, width, device=device)
        self.up = nn.Linear(width, self.out_features, device=device)
        with torch.no_grad():
            values = torch.empty(self.down.weight.shape).normal_(0, SPREAD, generator=generator)
            self.down.weight.copy_(values)
            for weight in (self.down.bias, self.up.weight, self.up.bias):
                weight.zero_()

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        change: Tensor = self.up(F.gelu(self.down(y)))
        return y + change


class Bottleneck(Adapter):
    """A bottleneck of the recipe's width behind every attention and every MLP. `targets` have no effect on it."""

    def layer(
        self, name: str, linear: nn.Linear, parts: tuple[Part, ...], saved: Mapping[str, Tensor] | None, **frozen: Any
    ) -> FrozenLinear:
        if {"o", "down"} & {part.name for part in parts}:
            return BottleneckLinear(linear, self.recipe.width, self.generator, name=name, **frozen)
        return super().layer(name, linear, parts, saved, **frozen)
