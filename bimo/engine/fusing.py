"""From a model's tensors to the kernels' weights: each is rounded (bimo.quant) and packed when it comes, so that at
most one is held twice. Needs torch; a model that was packed once is read back without (backends.packed)."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from bimo.engine.fused import FusedWeights
from bimo.engine.kernels import load_kernels
from bimo.models.config import DecoderConfig
from bimo.models.layers import rope_frequencies
from bimo.quant.weights import QuantisedWeight, round_weight

__all__ = ["fuse_weights"]

Weight = Tensor | QuantisedWeight


def fuse_weights(config: DecoderConfig, weights: Iterable[tuple[str, Weight]], quant: str) -> FusedWeights:
    """Round weights to `quant` ("int8", "int4", "file": as they are) and pack them."""
    fuser = _Fuser(config, quant)
    for name, weight in weights:
        fuser.take(name, weight)
    return fuser.finish()


class _Fuser:
    def __init__(self, config: DecoderConfig, quant: str) -> None:
        self.config, self.quant = config, quant
        self.kernels = load_kernels()
        assert self.kernels is not None
        self.arena = self.kernels.Arena()
        self.biases: dict[str, Tensor] = {}  # of matrices
        self.found = FusedWeights()

    def take(self, name: str, weight: Weight) -> None:
        weight = round_weight(name, weight, self.quant, tied=self.config.tied_embeddings)
        coarse = isinstance(weight, QuantisedWeight) and weight.minima is not None
        if name == "embed_tokens.weight" and (not self.config.tied_embeddings or coarse):
            # the step reads words from a tied head of 8 bits only
            plain = weight.dequantise() if isinstance(weight, QuantisedWeight) else weight
            self.found.vectors["embed_tokens"] = plain.to(torch.bfloat16).contiguous().view(torch.uint16).numpy()
            if not self.config.tied_embeddings:
                return
        if isinstance(weight, QuantisedWeight):
            self._pack(name.removesuffix(".weight"), weight)
        elif name.endswith("proj.bias"):
            self.biases[name.removesuffix(".bias")] = weight.float()
        else:
            self.found.vectors[name] = weight.float().numpy().copy()

    def finish(self) -> FusedWeights:
        for name, bias in self.biases.items():
            if (index := self._order(name)) is not None:
                bias = torch.where(index < 0, 0, bias[index.clamp_min(0)])
            self.found.matrices[name] = self.found.matrices[name].with_bias(bias.numpy())
        config = self.config
        if config.position == "rotary":
            frequencies, factor = rope_frequencies(config.head_dim, config.rope, config.max_positions)
            self.found.vectors["frequencies"], self.found.rope_factor = frequencies.float().numpy(), factor
        return self.found

    def _pack(self, name: str, weight: QuantisedWeight) -> None:
        if (index := self._order(name)) is not None:
            weight = weight.rows(index)
        minima = None if weight.minima is None else weight.minima.numpy()
        assert self.kernels is not None
        self.found.matrices[name] = self.kernels.pack(
            weight.format, weight.codes.numpy(), weight.scales.numpy(), minima, self.arena
        )

    def _order(self, name: str) -> Tensor | None:
        """For the MLP's first matrix: rows of the gate and of up in turns of 16, or of up alone, filled up to whole
        groups of columns of the second. None: as they are."""
        if not name.endswith(("mlp.gate_up_proj", "mlp.up_proj")):
            return None
        assert self.kernels is not None
        inner, group = self.config.intermediate_size, self.kernels.GROUP
        rows = torch.arange(-(-inner // group) * group)
        rows[inner:] = -1
        if not self.config.gated_mlp:
            return rows
        up = torch.where(rows < 0, rows, rows + inner)
        return torch.stack((rows.view(-1, 16), up.view(-1, 16)), dim=1).flatten()
