"""What machine this is: cache folder, device, number type, threads, ranks, seeds. The only module that reads the
environment.

Torch is imported inside functions, so that `bimo --help` stays fast.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import mmap
import os
import platform
import sys
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import ModuleType

from bimo.errors import UsageError

__all__ = [
    "KERNELS_INTERFACE",
    "CpuInfo",
    "Ranks",
    "api_key",
    "available_memory",
    "cache_home",
    "cpu_info",
    "cpu_threads",
    "dtype_name",
    "keep_freed_memory",
    "kernels_wanted",
    "lazy_memory",
    "load_kernels",
    "measure_read_bandwidth",
    "peak_memory",
    "ranks",
    "return_free_memory",
    "seed_all",
    "tame_openmp",
]

DTYPES = ("float32", "bfloat16", "float16")
KERNELS_INTERFACE = 11  # of the kernels package; raised with every change of what its functions take or give
log = logging.getLogger(__name__)


def cache_home() -> Path:
    """Folder for fetched models: $BIMO_HOME, else $XDG_CACHE_HOME/bimo, else ~/.cache/bimo."""
    if home := os.environ.get("BIMO_HOME"):
        return Path(home).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "bimo"


def api_key() -> str | None:
    """The server's bearer key from $BIMO_API_KEY, if set."""
    return os.environ.get("BIMO_API_KEY") or None


def kernels_wanted() -> bool:
    """Whether the C++ kernels may be used: unless $BIMO_KERNELS is 0."""
    return os.environ.get("BIMO_KERNELS") != "0"


@lru_cache
def load_kernels() -> ModuleType | None:
    """The optional C++ loops (`kernels/`, package bimo-kernels); None where they were not built or are not wanted."""
    if not kernels_wanted():
        return None
    try:
        import bimo_kernels
    except ImportError:  # not built: no compiler at set-up
        return None
    if (found := getattr(bimo_kernels, "INTERFACE", 0)) != KERNELS_INTERFACE:
        log.warning(
            "the kernels package speaks interface %s, this bimo %s: it is not used; build it again with `make setup`",
            found,
            KERNELS_INTERFACE,
        )
        return None
    return bimo_kernels


@dataclass(frozen=True)
class Ranks:
    """Which of several processes that train together this one is; local_rank: on its machine."""

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1

    @property
    def is_main(self) -> bool:
        """The one that prints and writes."""
        return self.rank == 0


def ranks() -> Ranks:
    """From $RANK, $LOCAL_RANK and $WORLD_SIZE, which torchrun sets; one process where they are not.

    Slurm's own variables are not read: they are set in every shell of an allocation, also where one process runs alone.
    """
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
    given = {name: value for name in names if (value := os.environ.get(name))}
    if not all(value.isdecimal() for value in given.values()):
        raise UsageError(f"{', '.join(names)} must be numbers, not {given}: start with torchrun, or unset them")
    rank, local_rank, world_size = (int(given.get(name, default)) for name, default in zip(names, "001", strict=True))
    if rank >= world_size:
        raise UsageError(f"RANK {rank} must be less than WORLD_SIZE {world_size}: start with torchrun, or unset them")
    return Ranks(rank, local_rank, world_size)


@dataclass(frozen=True)
class CpuInfo:
    """The processor as the kernel reports it."""

    name: str
    flags: frozenset[str]

    @property
    def fast_bfloat16(self) -> bool:
        """Whether bf16 dot products run in hardware (AVX-512 BF16, AMX or Arm BF16)."""
        return bool(self.flags & {"avx512_bf16", "amx_bf16", "bf16"})


@lru_cache
def cpu_info() -> CpuInfo:
    """Name and instruction flags from /proc/cpuinfo; other systems report a name and no flags."""
    fields: dict[str, str] = {}
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            fields.setdefault(key.strip(), value.strip())
    except OSError:
        pass
    flags = (fields.get("flags") or fields.get("Features") or "").split()
    return CpuInfo(fields.get("model name") or platform.processor() or platform.machine(), frozenset(flags))


def cpu_threads() -> int:
    """Cores this process may use (containers and taskset counted)."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not Linux
        return os.cpu_count() or 1


def available_memory() -> int | None:
    """Bytes that can be allocated without swapping, or None where the system does not say."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None


def peak_memory() -> float | None:
    """MB that this process took at most so far; None where the system does not tell (Windows)."""
    try:
        import resource
    except ImportError:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)


def tame_openmp() -> None:
    """Let OpenMP's idle threads spin briefly instead of long; call before torch is imported, $GOMP_SPINCOUNT wins.

    A parallel product ends when its last thread does. Threads that spin between products use up their time slice, and
    are then paused by the system just when the next one begins: beside one other busy program the products of a decode
    step took 100-1100 ms instead of 13. With a short spin they sleep, and are woken at once: 30-50 ms. A spin that is
    too short costs an idle machine its speed: 500 took a third of it, 10000 nothing.
    """
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")


def return_free_memory() -> None:
    """Give memory that was freed but kept by the allocator back to the system (glibc; elsewhere nothing happens).

    After loading a model that is a third of what the process holds: 230 MB of 880 for smollm2.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def keep_freed_memory() -> None:
    """From now on the allocator keeps what is freed, for the next use (glibc; elsewhere nothing happens).

    A training step frees hundreds of large tensors, and the next one asks for the same again: given back to the system
    and zeroed anew, their pages were up to a tenth of a step. What is free now is given back first: learning a
    tokenizer leaves a gigabyte and more behind, which a training would hold to its end.
    """
    return_free_memory()
    no_mmap, no_trim = (-4, 0), (-1, -1)  # M_MMAP_MAX, M_TRIM_THRESHOLD of malloc.h
    with contextlib.suppress(OSError, AttributeError):
        for parameter, value in (no_mmap, no_trim):
            ctypes.CDLL(None).mallopt(parameter, value)


def lazy_memory(num_bytes: int) -> mmap.mmap:
    """Zeros whose pages exist once they are written. With huge pages (which NumPy asks for) the first token of a cache
    would touch them all: it writes to every layer and head, each 2 MB apart."""
    # private: a forked process must not write into its parent's
    private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
    memory = mmap.mmap(-1, num_bytes, **private)
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        memory.madvise(mmap.MADV_NOHUGEPAGE)
    return memory


def dtype_name(name: str | None, device: str = "cpu") -> str:
    """The number type to compute in. None: bfloat16 where the hardware multiplies it, float32 elsewhere."""
    if name in (None, "auto"):
        return "float32" if device == "cpu" and not cpu_info().fast_bfloat16 else "bfloat16"
    if name not in DTYPES:
        raise UsageError(f"dtype must be one of auto, {', '.join(DTYPES)}, not {name!r}", "dtype")
    return name


def measure_read_bandwidth(num_bytes: int = 256 << 20) -> float:
    """Bytes a second that all cores read from memory: the best of several sums over an array no cache holds."""
    import time

    import torch

    numbers, seconds = torch.ones(num_bytes // 4), []
    for _ in range(6):
        begun = time.perf_counter()
        numbers.sum()
        seconds.append(time.perf_counter() - begun)
    return numbers.nbytes / min(seconds)


def seed_all(seed: int) -> None:
    """Seed Python's, NumPy's and torch's global generators."""
    import random

    import numpy
    import torch

    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)
