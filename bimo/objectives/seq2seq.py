"""Supervised sequence to sequence: the target, word by word, given the whole source.

    L = -Σ_t log p(y_t | y_<t, x) / number of predicted tokens

with the target's own words before it as the decoder's input (teacher forcing). Source and target may be a pair of texts
(data.pairs) or a text and its ruins (objectives.denoising).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from bimo.data.loader import IGNORED
from bimo.data.pairs import PairBatch
from bimo.models.seq2seq import EncoderDecoder
from bimo.objectives.causal import Loss
from bimo.objectives.rows import chosen_rows

__all__ = ["seq2seq_loss", "target_logits"]


def seq2seq_loss(model: EncoderDecoder, batch: PairBatch, *, label_smoothing: float = 0.0) -> Loss:
    """The loss of a batch on the model's device; while the model is not in training also how often the likeliest word
    is the right one. label_smoothing: arXiv:1512.00567, 0.1 in arXiv:1706.03762."""
    logits, targets = target_logits(model, batch)
    total = F.cross_entropy(
        logits.float(), targets, ignore_index=IGNORED, reduction="sum", label_smoothing=label_smoothing
    )
    count = batch.num_targets
    means = {} if model.training else {"accuracy": (float((logits.argmax(-1) == targets).sum()), count)}
    return Loss(total, count, means)


def target_logits(model: EncoderDecoder, batch: PairBatch) -> tuple[Tensor, Tensor]:
    """(N, V) scores and (N,) words of the targets that are predicted, and some that are IGNORED."""
    device = next(model.parameters()).device
    source_ids, source_mask, input_ids, targets = (
        torch.from_numpy(array).to(device)
        for array in (batch.source_ids, batch.source_mask, batch.input_ids, batch.targets)
    )
    hidden, words = chosen_rows(model(source_ids, input_ids, source_mask), targets)
    return model.logits(hidden), words
