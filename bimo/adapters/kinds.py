"""The kinds of adapters, and how a model gets one.

    adapter = attach(model, AdapterRecipe(kind="lora", rank=16), seed=0, base="smollm2")
    adapter = load_adapter(model, read_adapter(folder))             # formats.peft: of an adapter's directory
    adapter_of(model).merge()

A kind is a file here and a line in ADAPTERS. Files are read and written by formats.peft; what serves or exports a
change of low rank needs its matrices only, which formats.merging has.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from bimo.adapters.adalora import AdaLoRA
from bimo.adapters.base import Adapter
from bimo.adapters.bottleneck import Bottleneck
from bimo.adapters.frozen import FrozenLinear
from bimo.adapters.lora import LoRA
from bimo.adapters.prefix import Prefix
from bimo.errors import UsageError
from bimo.recipe import AdapterRecipe

__all__ = ["ADAPTERS", "SavedAdapter", "adapter_of", "attach", "load_adapter", "num_weights"]

ADAPTERS: dict[str, type[Adapter]] = {
    "lora": LoRA,
    "adalora": AdaLoRA,
    "bottleneck": Bottleneck,
    "prefix": Prefix,
}


class SavedAdapter(Protocol):
    """An adapter's directory (formats.peft.AdapterFile)."""

    @property
    def base(self) -> str:
        """What its base is called."""

    def read(self, config: Any) -> tuple[AdapterRecipe, Mapping[str, Tensor]]:
        """What it is, and its tensors as `Adapter.to_file` gives them, for a base of `config`."""


def attach(
    model: Any, recipe: AdapterRecipe, seed: int, *, base: str = "", dtype: str | torch.dtype = torch.float32
) -> Adapter:
    """Freeze the model and give it an adapter, which is then `model.adapter`. Its change is nothing at first (a
    prefix's: little). Before anything is made of the model's parameters.

    base: what the model is called. dtype: that products are computed in, the frozen matrices are kept in it; with
    recipe.quant in 8 or 4 bits. Raises UsageError for a recipe that does not suit the model.
    """
    return _attach(model, recipe, seed, base, dtype, None)


def load_adapter(model: Any, saved: SavedAdapter, dtype: str | torch.dtype = torch.float32) -> Adapter:
    """Give the model an adapter that was trained. Raises ModelError where it is of another base."""
    recipe, tensors = saved.read(model.config)
    adapter = _attach(model, recipe, 0, saved.base, dtype, tensors)
    with torch.no_grad():
        for name, tensor in adapter.from_file(tensors).items():
            model.get_parameter(name).copy_(tensor)
    return adapter


def adapter_of(model: Any) -> Adapter | None:
    """The model's adapter."""
    adapter = getattr(model, "adapter", None)
    return adapter if isinstance(adapter, Adapter) else None


def num_weights(model: nn.Module) -> int:
    """All of a model's weights; those of a base in 8 or 4 bits are no parameters, and count as well."""
    packed = (part.quantised for part in model.modules() if isinstance(part, FrozenLinear))
    return sum(weight.numel() for weight in model.parameters()) + sum(one.codes.numel() for one in packed if one)


def _attach(
    model: Any,
    recipe: AdapterRecipe,
    seed: int,
    base: str,
    dtype: str | torch.dtype,
    tensors: Mapping[str, Tensor] | None,
) -> Adapter:
    if adapter_of(model) is not None:
        raise UsageError("the model has an adapter, and takes one only: merge it first", "adapter")
    kind: torch.dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    adapter = ADAPTERS[recipe.kind](model, recipe, seed, base=base, dtype=kind, saved=tensors)
    model.adapter = adapter
    return adapter
