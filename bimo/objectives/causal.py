"""Causal language modelling: predict each token from those before it in its document.

    L = -Σ_t log p(x_t | x_<t) / number of predicted tokens

Rows hold several documents; attention and targets stop at their borders, so the loss of a packed batch is that of its
documents one by one (a test says so).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bimo.data.loader import IGNORED, Batch
from bimo.models.decoder import Decoder
from bimo.models.packed import LONGEST_IN_BLOCKS, PackedRows
from bimo.objectives.cross_entropy import linear_cross_entropy

__all__ = ["Loss", "causal_loss"]


@dataclass(frozen=True)
class Loss:
    """`total` is what to differentiate: nats, summed over the `num_targets` predicted tokens."""

    total: Tensor
    num_targets: int


def causal_loss(model: Decoder, batch: Batch, *, label_smoothing: float = 0.0) -> Loss:
    """The loss of a batch on the model's device. label_smoothing: arXiv:1512.00567."""
    weight = model.embed_tokens.weight
    input_ids, targets, positions, segments = (
        torch.from_numpy(array).to(weight.device)
        for array in (batch.input_ids, batch.targets, batch.positions, batch.segments)
    )
    mixed = torch.is_autocast_enabled(weight.device.type)
    dtype = torch.get_autocast_dtype(weight.device.type) if mixed else weight.dtype
    packed = batch.segments.any() or batch.input_ids.shape[1] <= LONGEST_IN_BLOCKS
    attend = PackedRows(segments, dtype) if packed else None
    hidden = model(input_ids, positions, attend)
    kept = targets.flatten() != IGNORED
    head = weight if model.lm_head is None else model.lm_head.get_parameter("weight")
    total = linear_cross_entropy(
        hidden.flatten(0, 1)[kept].to(dtype), head.to(dtype), targets.flatten()[kept], label_smoothing
    )
    return Loss(total, int(kept.sum()))
