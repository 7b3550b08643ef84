"""From a model's tensors to the kernels' weights: each is rounded (bimo.quant) and packed when it comes, so that at
most one is held twice. Needs torch; a model that was packed once is read back without (backends.packed)."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from bimo.engine.fused import FusedWeights, Parts
from bimo.engine.kernels import load_kernels
from bimo.engine.low_rank import Change, joined, matrix_shapes
from bimo.models.config import DecoderConfig
from bimo.models.layers import rope_frequencies
from bimo.quant.weights import QuantisedWeight, quantise8, quantise_rows8, round_weight

__all__ = ["fuse_weights", "pack_change"]

Weight = Tensor | QuantisedWeight
_PARTS = {"qkv_proj": "qkv", "out_proj": "out", "gate_up_proj": "up", "up_proj": "up", "down_proj": "down"}


def fuse_weights(config: DecoderConfig, weights: Iterable[tuple[str, Weight]], quant: str) -> FusedWeights:
    """Round weights to `quant` ("int8", "int4", "file": as they are) and pack them."""
    fuser = _Fuser(config, quant)
    for name, weight in weights:
        fuser.take(name, weight)
    return fuser.finish()


def pack_change(config: DecoderConfig, change: Change, weights: FusedWeights) -> Parts:
    """An adapter (checked: low_rank.check_change) as the kernels add it to a model of these weights.

    A and B are rounded to 8 bits, and A meets the activations that the matrix meets, rounded as they are for it: what
    an adapter adds is off by a percent or two of itself, as the matrix's own results are. A row of A is divided by its
    largest number first, B's column takes it: so that one scale does for a row of B.
    """
    kernels = load_kernels()
    assert kernels is not None
    arena, parts = kernels.Arena(), {}
    for name, shape in matrix_shapes(config).items():  # in the order in which a step reads them
        if name not in change:
            continue
        found = joined(change[name], shape)
        down, up = torch.from_numpy(found[0]), torch.from_numpy(found[1])
        peaks = down.abs().amax(dim=1)
        peaks = torch.where(peaks > 0, peaks, 1)
        down, up = down / peaks[:, None], up * peaks
        if (index := _row_order(config, name)) is not None:
            up = torch.where(index[:, None] < 0, 0, up[index.clamp_min(0)])
        rounded = quantise_rows8(down) if weights.matrices[name].format == "row8" else quantise8(down)
        packed = kernels.pack(rounded.format, rounded.codes.numpy(), rounded.scales.numpy(), None, arena)
        _, layer, _, matrix = name.split(".")
        parts[int(layer), _PARTS[matrix]] = kernels.low_rank(packed, up.numpy(), arena)
    return parts


def _row_order(config: DecoderConfig, name: str) -> Tensor | None:
    """For the MLP's first matrix: rows of the gate and of up in turns of 16, or of up alone, filled up (-1) to whole
    groups of columns of the second. None: as they are."""
    if not name.endswith(("mlp.gate_up_proj", "mlp.up_proj")):
        return None
    kernels = load_kernels()
    assert kernels is not None
    inner, group = config.intermediate_size, kernels.GROUP
    rows = torch.arange(-(-inner // group) * group)
    rows[inner:] = -1
    if not config.gated_mlp:
        return rows
    up = torch.where(rows < 0, rows, rows + inner)
    return torch.stack((rows.view(-1, 16), up.view(-1, 16)), dim=1).flatten()


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
            if (index := _row_order(self.config, name)) is not None:
                bias = torch.where(index < 0, 0, bias[index.clamp_min(0)])
            self.found.matrices[name] = self.found.matrices[name].with_bias(bias.numpy())
        config = self.config
        if config.position == "rotary":
            frequencies, factor = rope_frequencies(config.head_dim, config.rope, config.max_positions)
            self.found.vectors["frequencies"], self.found.rope_factor = frequencies.float().numpy(), factor
        return self.found

    def _pack(self, name: str, weight: QuantisedWeight) -> None:
        if (index := _row_order(self.config, name)) is not None:
            weight = weight.rows(index)
        minima = None if weight.minima is None else weight.minima.numpy()
        assert self.kernels is not None
        self.found.matrices[name] = self.kernels.pack(
            weight.format, weight.codes.numpy(), weight.scales.numpy(), minima, self.arena
        )
