"""What this machine could do at most, measured in the same run: memory read, matrix-vector and matrix-matrix products.

From them the most tokens a second a workload could reach: each decode step reads every weight once, each token of a
prompt costs two operations a weight, plus attention.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

from bimo.models.config import DecoderConfig

__all__ = ["Limits", "gemv_rate", "measure_limits"]

BYTES_A_WEIGHT = {"int8": 1.0, "bf16": 2.0, "f32": 4.0}
REPEATS = 7


@dataclass(frozen=True)
class Limits:
    """Rates of this machine."""

    read_bytes: float  # bytes/s, a torch sum over 512 MB
    gemv_bytes: float | None  # bytes/s, an int8 matrix-vector product over the model's size; None without the kernels
    gemv_best: float | None  # the same at the best of times
    gemm_bf16: float  # operations/s, a torch product of 2048 x 2048 matrices
    gemm_int8: float | None  # the same in int8, None where torch has none

    def to_dict(self) -> dict[str, float | None]:
        return asdict(self)

    def decode(self, config: DecoderConfig, weights: str, file_bytes: int | None) -> float | None:
        """Tokens/s of one request: how often all weights can be read in a second. None where that is not known."""
        if weights == "4-bit":
            size = file_bytes
        else:
            lookup_only = 0 if config.tied_embeddings else config.vocab_size * config.hidden_size
            size = int((config.num_parameters - lookup_only) * BYTES_A_WEIGHT[weights])
        return (self.gemv_bytes or self.read_bytes) / size if size else None

    def prefill(self, config: DecoderConfig, weights: str, length: int) -> float:
        """Prompt tokens/s at the rate of the weights' type; the head is computed for the last token only."""
        rate = self.gemm_int8 if weights in ("int8", "4-bit") and self.gemm_int8 else self.gemm_bf16
        heads = config.vocab_size * config.hidden_size * (1 if config.tied_embeddings else 2)
        products = 2 * (config.num_parameters - heads)
        attention = 4 * (length / 2) * config.num_heads * config.head_dim * config.num_layers
        return rate / (products + attention)

    def __str__(self) -> str:
        gemv = "not measured (without the kernels)"
        if self.gemv_bytes and self.gemv_best:
            gemv = f"{self.gemv_bytes / 1e9:.1f} GB/s (median; at best {self.gemv_best / 1e9:.1f})"
        int8 = f", in int8 {self.gemm_int8 / 1e9:,.0f}" if self.gemm_int8 else ""
        return (
            f"reading {self.read_bytes / 1e9:.1f} GB/s, int8 matrix-vector {gemv}, "
            f"bf16 matrix-matrix {self.gemm_bf16 / 1e9:,.0f} GFLOP/s{int8}"
        )


def measure_limits(num_bytes: int) -> Limits:
    """The best of some repeats of each; of matrix-vector products also the median, to be measured again beside each
    round of generation (`gemv_rate`), as memory's pace doubles and halves within minutes on a shared machine.
    `num_bytes` is the size of the model's int8 weights."""
    import torch

    from bimo.runtime import cpu_threads

    torch.set_num_threads(cpu_threads())
    block = torch.ones(128 << 20)  # 512 MB of float32
    read = block.numel() * block.element_size() / _fastest(block.sum)
    del block
    size = 2048
    left, right = (torch.randn(size, size).to(torch.bfloat16) for _ in range(2))
    bf16 = 2 * size**3 / _fastest(lambda: left @ right)
    small = torch.ones(size, size, dtype=torch.int8)
    try:
        int8 = 2 * size**3 / _fastest(lambda: torch._int_mm(small, small))
    except (AttributeError, RuntimeError):
        int8 = None
    rates = [rate for _ in range(REPEATS) if (rate := gemv_rate(num_bytes))]
    median, best = (statistics.median(rates), max(rates)) if rates else (None, None)
    return Limits(read_bytes=read, gemv_bytes=median, gemv_best=best, gemm_bf16=bf16, gemm_int8=int8)


def gemv_rate(num_bytes: int) -> float | None:
    """Bytes/s of an int8 matrix-vector product now; None without the kernels."""
    try:
        import bimo_kernels
    except ImportError:
        return None
    return bimo_kernels.gemv_rate(num_bytes)


def _fastest(call: Callable[[], object]) -> float:
    """Seconds of the fastest repeat."""
    best = float("inf")
    for _ in range(REPEATS):
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
    return best
