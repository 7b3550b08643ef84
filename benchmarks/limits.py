"""What this machine could do at most: memory read, int8 matrix-vector and bf16 matrix-matrix, measured in the same run.

From them the most tokens a second a workload could reach: each decode step reads every weight once, each token of a
prompt costs two operations a weight, plus attention.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

from bimo.models.config import DecoderConfig

__all__ = ["Limits", "measure_limits"]

BYTES_A_WEIGHT = {"int8": 1.0, "bf16": 2.0, "f32": 4.0}
REPEATS = 7


@dataclass(frozen=True)
class Limits:
    """Rates of this machine; `gemv_bytes` is None without the kernels' own measurement."""

    read_bytes: float  # bytes/s, a torch sum over 512 MB
    gemv_bytes: float | None  # bytes/s, a plain int8 matrix-vector product over as many bytes as the model has
    gemm_flops: float  # bf16 operations/s, a torch product of 2048 x 2048 matrices

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

    def prefill(self, config: DecoderConfig, length: int) -> float:
        """Prompt tokens/s in bf16; the head is computed for the last token only. int8 products may pass this."""
        heads = config.vocab_size * config.hidden_size * (1 if config.tied_embeddings else 2)
        products = 2 * (config.num_parameters - heads)
        attention = 4 * (length / 2) * config.num_heads * config.head_dim * config.num_layers
        return self.gemm_flops / (products + attention)

    def __str__(self) -> str:
        gemv = f"{self.gemv_bytes / 1e9:.1f} GB/s" if self.gemv_bytes else "not measured (the kernels lack gemv_rate)"
        return (
            f"reading {self.read_bytes / 1e9:.1f} GB/s, int8 matrix-vector {gemv}, "
            f"bf16 matrix-matrix {self.gemm_flops / 1e9:,.0f} GFLOP/s"
        )


def measure_limits(num_bytes: int) -> Limits:
    """The best of some repeats of each; `num_bytes` is the size of the model's int8 weights."""
    import torch

    from bimo.runtime import cpu_threads

    torch.set_num_threads(cpu_threads())
    block = torch.ones(128 << 20)  # 512 MB of float32
    read = block.numel() * block.element_size() / _fastest(block.sum)
    del block
    size = 2048
    left, right = (torch.randn(size, size).to(torch.bfloat16) for _ in range(2))
    gemm = 2 * size**3 / _fastest(lambda: left @ right)
    return Limits(read_bytes=read, gemv_bytes=_gemv_rate(num_bytes), gemm_flops=gemm)


def _gemv_rate(num_bytes: int) -> float | None:
    try:
        from bimo_kernels import gemv_rate
    except ImportError:
        return None
    return max(gemv_rate(num_bytes) for _ in range(REPEATS))


def _fastest(call: Callable[[], object]) -> float:
    """Seconds of the fastest repeat."""
    best = float("inf")
    for _ in range(REPEATS):
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
    return best
