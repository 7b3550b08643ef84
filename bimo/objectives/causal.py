"""Causal language modelling: predict each token from those before it in its document.

    L = -Σ_t log p(x_t | x_<t) / number of predicted tokens

Rows hold several documents; attention and targets stop at their borders, so the loss of a packed batch is that of its
documents one by one (a test says so).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from bimo.data.loader import Batch
from bimo.models.decoder import Decoder
from bimo.models.packed import LONGEST_IN_BLOCKS, PackedRows
from bimo.models.recurrent import LSTMLanguageModel
from bimo.objectives.cross_entropy import linear_cross_entropy

__all__ = ["Loss", "causal_logits", "causal_loss", "hidden_states"]


@dataclass(frozen=True)
class Loss:
    """`total` is what to differentiate: nats, summed over the `num_targets` predicted tokens.

    means: what else is to be known of a validation text, each as (sum, count).
    """

    total: Tensor
    num_targets: int
    means: Mapping[str, tuple[float, int]] = field(default_factory=dict)


def causal_loss(model: Decoder | LSTMLanguageModel, batch: Batch, *, label_smoothing: float = 0.0) -> Loss:
    """The loss of a batch on the model's device. label_smoothing: arXiv:1512.00567."""
    hidden, targets = _predicted(model, batch)
    weight = model.embed_tokens.weight
    head = weight if model.lm_head is None else model.lm_head.get_parameter("weight")
    return Loss(linear_cross_entropy(hidden, head, targets, label_smoothing), batch.num_targets)


def causal_logits(model: Decoder | LSTMLanguageModel, batch: Batch) -> tuple[Tensor, Tensor]:
    """(N, V) scores and (N,) words of all tokens, IGNORED where none is predicted."""
    hidden, targets = _predicted(model, batch)
    return model.logits(hidden), targets


def _predicted(model: Decoder | LSTMLanguageModel, batch: Batch) -> tuple[Tensor, Tensor]:
    """Hidden states (N, D) and words (N,) or IGNORED, of all tokens: hardly any is not predicted, and sizes stay the
    same (see objectives.rows)."""
    hidden = hidden_states(model, batch)
    return hidden.flatten(0, 1), torch.from_numpy(batch.targets).to(hidden.device).flatten()


def hidden_states(model: Decoder | LSTMLanguageModel, batch: Batch) -> Tensor:
    """(B, T, D) in the number type of products, none of a document other than its own.

    A recurrent model reads a row from its start to its end, across the borders of documents: its state has no mask. The
    token a document begins with can tell it to forget.
    """
    weight = model.embed_tokens.weight
    input_ids, positions, segments = (
        torch.from_numpy(array).to(weight.device) for array in (batch.input_ids, batch.positions, batch.segments)
    )
    mixed = torch.is_autocast_enabled(weight.device.type)
    dtype = torch.get_autocast_dtype(weight.device.type) if mixed else weight.dtype
    if isinstance(model, LSTMLanguageModel):
        hidden = model(input_ids)
    else:
        hidden = model(input_ids, positions, _attend(segments, dtype))
    return hidden.to(dtype)


def _attend(segments: Tensor, dtype: torch.dtype) -> PackedRows | None:
    """None: a row of one document that is too long for attention in blocks."""
    packed = bool(segments.any()) or segments.shape[1] <= LONGEST_IN_BLOCKS
    return PackedRows(segments, dtype) if packed else None
