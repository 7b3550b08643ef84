"""The optional C++ loops (`kernels/`, package bimo-kernels), where they were built and fit; else torch does it.

`$BIMO_KERNELS=0` switches them off: the same tests pass on both.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

from bimo.runtime import KERNELS_INTERFACE, load_kernels

if TYPE_CHECKING:
    import torch

__all__ = ["INTERFACE", "attention_kernels", "load_kernels"]

INTERFACE = KERNELS_INTERFACE  # files of packed weights name it


def attention_kernels(dtype: torch.dtype, device: torch.device, head_dim: int) -> ModuleType | None:
    """The loops for models on torch, if decode attention of this kind is among them."""
    if load_kernels() is None or device.type != "cpu" or str(dtype) not in ("torch.float32", "torch.bfloat16"):
        return None
    tensors = import_module("bimo_kernels.tensors")
    return tensors if head_dim in tensors.HEAD_DIMS else None
