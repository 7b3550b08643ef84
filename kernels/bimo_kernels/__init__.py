"""bimo's C++ loops. `import bimo_kernels` fails where they were not built: callers then use torch.

The fused step works on NumPy arrays and needs no torch, which takes longer to import than such a model to load; the
loops for models that run on torch are in `bimo_kernels.tensors`, those of training in `bimo_kernels.training`.
"""

from __future__ import annotations

import ctypes
from importlib.util import find_spec
from pathlib import Path

# The extension must share torch's OpenMP team, whichever of both is imported first: a second copy of the runtime would
# bring a second team of threads to the same cores. What is loaded first, and globally, is what the extension is bound
# to.
_torch = find_spec("torch")
if _torch is not None and _torch.origin:
    for _library in (Path(_torch.origin).parent / "lib").glob("libgomp*"):
        ctypes.CDLL(str(_library), mode=ctypes.RTLD_GLOBAL)

from bimo_kernels import _kernels  # noqa: E402, F401
from bimo_kernels.fused import (  # noqa: E402
    GROUP,
    Arena,
    FusedModel,
    LowRank,
    PackedMatrix,
    gemv_rate,
    instruction_sets,
    low_rank,
    pack,
    parallel_regions,
    product,
)

__all__ = [
    "GROUP",
    "INTERFACE",
    "Arena",
    "FusedModel",
    "LowRank",
    "PackedMatrix",
    "gemv_rate",
    "instruction_sets",
    "low_rank",
    "pack",
    "parallel_regions",
    "product",
]

INTERFACE = 11  # what bimo.runtime asks for; raised with every change of what is taken or given
