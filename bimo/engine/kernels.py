"""The optional C++ loops (`kernels/`, package bimo-kernels), where they were built and fit; else torch does it.

`$BIMO_KERNELS=0` switches them off: the same tests pass on both.
"""

from __future__ import annotations

import logging
from functools import lru_cache
from types import ModuleType

import torch

from bimo.runtime import kernels_wanted

__all__ = ["INTERFACE", "attention_kernels", "load_kernels"]

INTERFACE = 4  # raised with every change of what the package's functions take or give
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
    """The kernels, if decode attention of this kind is among them."""
    kernels = load_kernels()
    if kernels is None or device.type != "cpu" or dtype not in (torch.float32, torch.bfloat16):
        return None
    return kernels if head_dim in kernels.HEAD_DIMS else None
