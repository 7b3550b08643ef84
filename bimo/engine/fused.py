"""A decoder whose whole step is one call into the C++ kernels, on weights of 8 or 4 bits; what `models.decoder.Decoder`
is for plain torch. Same formulas, same parameter names; the runner does not know the difference.

    weights (name, tensor) ──► quantise (bimo.quant) ──► pack in panels ──► FusedModel (kernels/bimo_kernels/fused.py)

Keys and values lie in the engine's blocks, in an order of their own inside each (see kernels/src/attention.h).
"""

from __future__ import annotations

from collections.abc import Iterable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from bimo.engine.kernels import load_kernels
from bimo.engine.paged import PagedCache, lazy_zeros
from bimo.engine.scheduler import Scheduled
from bimo.models.config import DecoderConfig
from bimo.models.layers import rope_frequencies
from bimo.quant.weights import QuantisedWeight, round_weight

__all__ = ["FusedDecoder", "can_fuse"]

BLOCK = 16  # tokens of a cache block
Weight = Tensor | QuantisedWeight


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


class FusedCache(PagedCache):
    """Keys and values in bfloat16, or in int8 with one float32 scale a token and head: half the memory."""

    def __init__(self, config: DecoderConfig, num_blocks: int, dtype: torch.dtype) -> None:
        super().__init__(config, num_blocks, BLOCK, dtype, torch.device("cpu"))
        self.scales: tuple[Tensor, Tensor] | None = None
        if dtype == torch.int8:
            shape = (config.num_layers, config.num_kv_heads, num_blocks * BLOCK)
            self.scales = lazy_zeros(shape, torch.float32), lazy_zeros(shape, torch.float32)
            self.pools += self.scales


class FusedDecoder:
    """Takes the weights one by one as they are read, so that at most one is held twice."""

    def __init__(
        self,
        config: DecoderConfig,
        weights: Iterable[tuple[str, Weight]],
        quant: str,
        *,
        cache_dtype: torch.dtype = torch.bfloat16,
        instruction_set: str = "",
    ) -> None:
        kernels = load_kernels()
        assert kernels is not None and cache_dtype in (torch.bfloat16, torch.int8)
        self.config, self.cache_dtype = config, cache_dtype
        frequencies, rope_factor = None, 1.0
        if config.position == "rotary":
            frequencies, rope_factor = rope_frequencies(config.head_dim, config.rope, config.max_positions)
        self.fused = kernels.FusedModel(
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
            rope_factor=rope_factor,
            instruction_set=instruction_set,
        )
        packer = _Packer(config, kernels, quant)
        for name, weight in weights:
            packer.take(name, weight)
        packer.hand_over(self.fused, frequencies)

    def make_cache(self, num_blocks: int, block_size: int) -> PagedCache:
        """The memory of keys and values; the step writes and reads it where it lies."""
        assert block_size == BLOCK, "the kernels' blocks have a token for each lane"
        cache = FusedCache(self.config, num_blocks, self.cache_dtype)
        self.fused.set_cache(cache.keys, cache.values, cache.scales, num_blocks)
        return cache

    def run(self, plan: list[Scheduled], scored: list[int]) -> tuple[Tensor, Tensor, list[int]]:
        """Hidden states (T, D) float32 of a plan's tokens, one sequence after the other; of the rows `scored` the
        logits (N, V) float32, which the next step overwrites, and the likeliest words."""
        token_ids = [token for work in plan for token in work.token_ids]
        return self.fused.step(token_ids, [(work.start, work.count, work.sequence.blocks) for work in plan], scored)

    def logits(self, hidden: Tensor) -> Tensor:
        """(N, D) -> (N, V) float32."""
        return self.fused.logits(hidden)


class _Packer:
    """Collects a model's weights, each quantised and packed when it comes."""

    def __init__(self, config: DecoderConfig, kernels: ModuleType, quant: str) -> None:
        self.config, self.kernels, self.quant = config, kernels, quant
        self.small: dict[str, Tensor] = {}  # norms, biases, positions: float32
        self.packed: dict[str, Any] = {}
        self.arena = kernels.Arena()
        self.embedding: Tensor | None = None

    def take(self, name: str, weight: Weight) -> None:
        weight = round_weight(name, weight, self.quant, tied=self.config.tied_embeddings)
        coarse = isinstance(weight, QuantisedWeight) and weight.minima is not None
        if name == "embed_tokens.weight" and (not self.config.tied_embeddings or coarse):
            # the step reads words from a tied head of 8 bits only
            plain = weight.dequantise() if isinstance(weight, QuantisedWeight) else weight
            self.embedding = plain.to(torch.bfloat16)
            if not self.config.tied_embeddings:
                return
        if isinstance(weight, Tensor):
            self.small[name] = weight.float()
            return
        if (index := self._order(name)) is not None:
            weight = weight.rows(index)
        self.packed[name] = self.kernels.pack(weight.format, weight.codes, weight.scales, weight.minima, self.arena)

    def matrix(self, name: str) -> Any:
        """A packed matrix with its bias."""
        bias, index = self.small.pop(f"{name}.bias", None), self._order(f"{name}.weight")
        if bias is not None and index is not None:
            bias = torch.where(index < 0, 0, bias[index.clamp_min(0)])
        return self.packed.pop(f"{name}.weight").with_bias(bias)

    def norm(self, name: str) -> tuple[Tensor, Tensor | None]:
        return self.small.pop(f"{name}.weight"), self.small.pop(f"{name}.bias", None)

    def _order(self, name: str) -> Tensor | None:
        """For the MLP's first matrix: rows of the gate and of up in turns of 16, or of up alone, filled up to whole
        groups of columns of the second. None: as they are."""
        if not name.endswith(("mlp.gate_up_proj.weight", "mlp.up_proj.weight")):
            return None
        inner, group = self.config.intermediate_size, self.kernels.GROUP
        rows = torch.arange(-(-inner // group) * group)
        rows[inner:] = -1
        if not self.config.gated_mlp:
            return rows
        up = torch.where(rows < 0, rows, rows + inner)
        return torch.stack((rows.view(-1, 16), up.view(-1, 16)), dim=1).flatten()

    def hand_over(self, fused: Any, frequencies: Tensor | None) -> None:
        config = self.config
        up_name = "gate_up_proj" if config.gated_mlp else "up_proj"
        for i in range(config.num_layers):
            base = f"layers.{i}"
            fused.add_layer(
                attention_norm=self.norm(f"{base}.attention_norm"),
                mlp_norm=self.norm(f"{base}.mlp_norm"),
                qkv=self.matrix(f"{base}.attention.qkv_proj"),
                out=self.matrix(f"{base}.attention.out_proj"),
                up=self.matrix(f"{base}.mlp.{up_name}"),
                down=self.matrix(f"{base}.mlp.down_proj"),
                q_norm=self.small.get(f"{base}.attention.q_norm.weight"),
                k_norm=self.small.get(f"{base}.attention.k_norm.weight"),
                window=config.window(i),
            )
        head = self.matrix("embed_tokens" if config.tied_embeddings else "lm_head")
        fused.set_ends(
            final_norm=self.norm("final_norm"),
            head=head,
            embedding=self.embedding,
            positions=self.small.get("embed_positions.weight"),
            frequencies=frequencies,
        )
