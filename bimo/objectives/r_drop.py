"""R-Drop (arXiv:2106.14448): two passes with different dropout shall say the same.

    loss = with_r_drop(causal_loss, weight=1.0)

    L = (L₁ + L₂) / 2 + weight · (KL(p₁ ‖ p₂) + KL(p₂ ‖ p₁)) / 4

The paper sums both losses and takes weight / 2 of the divergences' sum; halved, the loss without the divergence is
that of one pass, and learning rate and curves stay comparable. A step costs two passes, and holds all scores of the
predicted words of a micro-batch twice.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from bimo.data.loader import IGNORED
from bimo.objectives.causal import Loss, causal_logits, causal_loss
from bimo.objectives.masked_rows import bert_loss, masked_word_logits
from bimo.objectives.seq2seq import seq2seq_loss, target_logits

__all__ = ["symmetric_divergence", "with_r_drop"]

# What gives the scores that a loss is made of: (model, batch) -> (N, V) logits and (N,) words, or IGNORED.
LOGITS: dict[Callable[..., Loss], Callable[..., tuple[Tensor, Tensor]]] = {
    causal_loss: causal_logits,
    bert_loss: masked_word_logits,
    seq2seq_loss: target_logits,
}


def with_r_drop(loss: Callable[..., Loss], weight: float) -> Callable[..., Loss]:
    """`loss` with the divergence added while the model is in training; as it is for a weight of 0."""
    if not weight:
        return loss
    logits_of = LOGITS[loss]

    def regularised(model: Any, batch: Any, *, label_smoothing: float = 0.0) -> Loss:
        if not model.training:
            return loss(model, batch, label_smoothing=label_smoothing)
        first, words = logits_of(model, batch)
        second, _ = logits_of(model, batch)
        kept = words != IGNORED
        first, second, words = first[kept], second[kept], words[kept]
        totals = (
            F.cross_entropy(logits.float(), words, reduction="sum", label_smoothing=label_smoothing)
            for logits in (first, second)
        )
        return Loss(sum(totals) / 2 + weight * symmetric_divergence(first, second) / 4, len(words))

    return regularised


def symmetric_divergence(first: Tensor, second: Tensor) -> Tensor:
    """KL(p ‖ q) + KL(q ‖ p) in nats, summed over the rows of two (N, V) logits."""
    log_p, log_q = (logits.float().log_softmax(-1) for logits in (first, second))
    return ((log_p.exp() - log_q.exp()) * (log_p - log_q)).sum()
