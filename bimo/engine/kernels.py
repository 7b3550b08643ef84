"""The optional C++ loops (`kernels/`, package bimo-kernels), where they were built and fit; else torch does it.

`$BIMO_KERNELS=0` switches them off: the same tests pass on both.
"""

from __future__ import annotations

import logging
from functools import lru_cache
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

from bimo.runtime import kernels_wanted

if TYPE_CHECKING:
    import torch

__all__ = ["INTERFACE", "attention_kernels", "load_kernels"]

INTERFACE = 9  # raised with every change of what the package's functions take or give
log = logging.getLogger(__name__)


@lru_cache
def load_kernels() -> ModuleType | None:
    """The module, or None where it was not built or is not wanted."""
    if not kernels_wanted():
        return None
    try:
        import bimo_kernels
    except ImportError:  # not built: no compiler at set-up
        return None
    if (found := getattr(bimo_kernels, "INTERFACE", 0)) != INTERFACE:
        log.warning(
            "the kernels package speaks interface %s, this bimo %s: it is not used; build it again with `make setup`",
            found,
            INTERFACE,
        )
        return None
    return bimo_kernels


def attention_kernels(dtype: torch.dtype, device: torch.device, head_dim: int) -> ModuleType | None:
    """The loops for models on torch, if decode attention of this kind is among them."""
    if load_kernels() is None or device.type != "cpu" or str(dtype) not in ("torch.float32", "torch.bfloat16"):
        return None
    tensors = import_module("bimo_kernels.tensors")
    return tensors if head_dim in tensors.HEAD_DIMS else None
