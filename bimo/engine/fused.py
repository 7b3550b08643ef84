"""A decoder whose whole step is one call into the C++ kernels, on weights of 8 or 4 bits; what `models.decoder.Decoder`
is for plain torch. Same formulas, same parameter names; the runner does not know the difference.

    weights (name, tensor) ──► quantise, pack in panels (fusing.py) ──► FusedWeights ──► FusedModel (kernels/)

Keys and values lie in the engine's blocks, in an order of their own inside each (see kernels/src/attention.h). No torch
here: importing it takes longer than all the rest of a start, and 200 MB.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bimo.engine.kernels import load_kernels
from bimo.engine.multistep import MultiStep
from bimo.engine.scheduler import Scheduled
from bimo.models.config import DecoderConfig
from bimo.runtime import available_memory, lazy_memory

__all__ = ["FusedCache", "FusedDecoder", "FusedWeights", "Parts", "can_fuse"]

BLOCK = 16  # tokens of a cache block
Array = NDArray[Any]
Parts = dict[tuple[int, str], Any]  # an adapter: bimo_kernels.LowRank by layer and matrix ("qkv", "out", "up", "down")


def can_fuse(config: DecoderConfig) -> str | None:
    """None when the kernels can run this model, else why not."""
    kernels = load_kernels()
    if kernels is None:
        return "the kernels package is not installed"
    if config.head_dim % 16 or config.head_dim > 256:
        return f"a head of {config.head_dim} is not 16, 32, ... 256 wide"
    if config.hidden_size % 16:
        return f"hidden_size {config.hidden_size} is not a multiple of 16"
    if config.num_heads // config.num_kv_heads > 24:
        return f"{config.num_heads // config.num_kv_heads} query heads share a key head, 24 at most can"
    return None


@dataclass
class FusedWeights:
    """A decoder's weights as the kernels read them.

    matrices: bimo_kernels.PackedMatrix by the parameter's name without ".weight"; a tied head is "embed_tokens".
    vectors: norms, positions and the rotary "frequencies" in float32; "embed_tokens", where the head is not tied or of
        4 bits, in bfloat16 (as uint16).
    rope_factor: on cos and sin.
    mapped: they lie in a file that is mapped (backends.packed).
    """

    matrices: dict[str, Any] = field(default_factory=dict)
    vectors: dict[str, Array] = field(default_factory=dict)
    rope_factor: float = 1.0
    mapped: bool = False

    def copied(self, arena: Any) -> FusedWeights:
        """The same in an arena of the kernels."""

        def copy(matrix: Any) -> Any:
            bias = None if matrix.bias is None else arena.copy_of(matrix.bias)
            return replace(matrix, codes=arena.copy_of(matrix.codes), scales=arena.copy_of(matrix.scales), bias=bias)

        matrices = {name: copy(matrix) for name, matrix in self.matrices.items()}
        vectors = {name: arena.copy_of(vector) for name, vector in self.vectors.items()}
        return FusedWeights(matrices, vectors, self.rope_factor)


class FusedCache:
    """Keys and values in bfloat16 (as uint16), or in int8 with one float32 scale a token and head: half the memory.
    Pages are zeroed lazily by the system, so a large pool costs memory only as it fills."""

    device = "cpu"

    def __init__(self, config: DecoderConfig, num_blocks: int, dtype: str) -> None:
        self.config, self.num_blocks, self.block_size, self.dtype = config, num_blocks, BLOCK, dtype
        slots = (config.num_layers, config.num_kv_heads, num_blocks * BLOCK)
        number = np.int8 if dtype == "int8" else np.uint16
        self.keys, self.values = (_lazy_zeros((*slots, config.head_dim), number) for _ in range(2))
        self.scales = (_lazy_zeros(slots, np.float32), _lazy_zeros(slots, np.float32)) if dtype == "int8" else None

    def copy_blocks(self, copies: list[tuple[int, int]]) -> None:
        """Copy whole blocks, (source, destination) each; for forked sequences."""
        for source, target in copies:
            for pool in (self.keys, self.values, *(self.scales or ())):
                blocks = pool.reshape(*pool.shape[:2], self.num_blocks, -1)
                blocks[:, :, target] = blocks[:, :, source]


def _lazy_zeros(shape: tuple[int, ...], dtype: Any) -> Array:
    count = math.prod(shape)
    return np.frombuffer(lazy_memory(count * np.dtype(dtype).itemsize), dtype).reshape(shape)


class FusedDecoder:
    """The model behind `ModelRunner`, as EagerDecoder (eager.py) is for torch."""

    can_go_on = True
    can_speculate = True
    start_token_id: int | None = None

    def __init__(
        self,
        config: DecoderConfig,
        weights: FusedWeights,
        *,
        adapters: dict[str, Parts] | None = None,
        cache_dtype: str = "bfloat16",
        instruction_set: str = "",
    ) -> None:
        """adapters: what each adds to the model's matrices (fusing.pack_change), by its name."""
        assert cache_dtype in ("bfloat16", "int8")
        self.config, self.cache_dtype, self.instruction_set = config, cache_dtype, instruction_set
        self.changes = adapters or {}
        self.adapters = tuple(self.changes)  # numbered from 1 on
        self.fused = self._build(weights)
        self._mapped = weights if weights.mapped else None

    def settle(self) -> None:
        """Copy weights that lie in a mapped file into memory of huge pages, where reading them all is 3 % faster (20 %
        where the file system keeps its files in small pages). A start has no time for that: 20 to 300 ms."""
        weights, self._mapped = self._mapped, None
        free = available_memory()
        if weights is None or (free is not None and 2 * self.fused.weight_bytes > free):
            return
        kernels = load_kernels()
        assert kernels is not None
        self.fused = self._build(weights.copied(kernels.Arena()))
        self._lend(self.cache)

    def make_cache(self, num_blocks: int, block_size: int) -> FusedCache:
        """The memory of keys and values; the step writes and reads it where it lies."""
        assert block_size == BLOCK, "the kernels' blocks have a token for each lane"
        self.cache = FusedCache(self.config, num_blocks, self.cache_dtype)
        self._lend(self.cache)
        return self.cache

    def run(
        self, plan: list[Scheduled], scored: list[int], more: MultiStep | None = None
    ) -> tuple[Array, Array, list[int]]:
        """Hidden states (T, D) float32 of a plan's tokens, one sequence after the other; of the rows `scored` the
        logits (N, V) float32, which the next step overwrites, and the likeliest words; of several steps (`more`)
        the words alone, a step after the other."""
        token_ids = [token for work in plan for token in work.token_ids]
        spans = [(work.start, work.count, work.sequence.blocks) for work in plan]
        adapters = [work.sequence.adapter for work in plan] if self.adapters else ()
        if more is None:
            return self.fused.step(token_ids, spans, scored, adapters=adapters)
        several = {"want_logits": False, "steps": more.steps, "seconds": more.seconds, "ends": more.ends}
        return self.fused.step(token_ids, spans, scored, adapters=adapters, **several)

    def interrupt(self) -> None:
        """From another thread: somebody waits, do not go on after the step that is being computed."""
        self.fused.interrupt()

    def logits(self, hidden: Array) -> Array:
        """(N, D) -> (N, V) float32."""
        return self.fused.logits(hidden)

    def _lend(self, cache: FusedCache) -> None:
        self.fused.set_cache(cache.keys, cache.values, cache.scales, cache.num_blocks)

    def _build(self, weights: FusedWeights) -> Any:
        """A FusedModel of the kernels."""
        kernels = load_kernels()
        assert kernels is not None
        config, matrices, vectors = self.config, weights.matrices, weights.vectors
        fused = kernels.FusedModel(
            hidden=config.hidden_size,
            heads=config.num_heads,
            kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            inner=config.intermediate_size,
            vocabulary=config.vocab_size,
            norm_eps=config.norm_eps,
            attention_scale=config.scale,
            activation=config.activation,
            layer_norm=config.norm == "layer",
            gated=config.gated_mlp,
            rope_factor=weights.rope_factor,
            instruction_set=self.instruction_set,
        )

        def norm(name: str) -> tuple[Array, Array | None]:
            return vectors[f"{name}.weight"], vectors.get(f"{name}.bias")

        for i in range(config.num_layers):
            base = f"layers.{i}"
            fused.add_layer(
                attention_norm=norm(f"{base}.attention_norm"),
                mlp_norm=norm(f"{base}.mlp_norm"),
                qkv=matrices[f"{base}.attention.qkv_proj"],
                out=matrices[f"{base}.attention.out_proj"],
                up=matrices[f"{base}.mlp.{'gate_up_proj' if config.gated_mlp else 'up_proj'}"],
                down=matrices[f"{base}.mlp.down_proj"],
                q_norm=vectors.get(f"{base}.attention.q_norm.weight"),
                k_norm=vectors.get(f"{base}.attention.k_norm.weight"),
                window=config.window(i),
            )
        fused.set_ends(
            final_norm=norm("final_norm"),
            head=matrices["embed_tokens" if config.tied_embeddings else "lm_head"],
            embedding=vectors.get("embed_tokens"),
            positions=vectors.get("embed_positions.weight"),
            frequencies=vectors.get("frequencies"),
        )
        for parts in self.changes.values():
            fused.add_adapter(parts)
        return fused
