"""R-Drop (arXiv:2106.14448): two passes with different dropout shall say the same.

    loss = with_r_drop(causal_loss, weight=1.0)

    L = (L₁ + L₂) / 2 + weight · (KL(p₁ ‖ p₂) + KL(p₂ ‖ p₁)) / 4

The paper sums both losses and takes weight / 2 of the divergences' sum; halved, the loss without the divergence is
that of one pass, and learning rate and curves stay comparable. A step costs two passes, and holds all scores of the
predicted words of a micro-batch twice.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from bimo.data.loader import IGNORED
from bimo.objectives.answers import answer_logits, answer_loss, target_factors
from bimo.objectives.causal import Loss, causal_logits, causal_loss
from bimo.objectives.classify import class_costs, class_factors, class_logits, class_loss
from bimo.objectives.masked_rows import bert_loss, masked_word_logits
from bimo.objectives.seq2seq import seq2seq_loss, target_logits

__all__ = ["symmetric_divergence", "with_r_drop"]

# What gives the scores that a loss is made of: (model, batch) -> (N, V) logits and (N,) words, or IGNORED.
LOGITS: dict[Callable[..., Loss], Callable[..., tuple[Tensor, Tensor]]] = {
    answer_loss: answer_logits,
    causal_loss: causal_logits,
    bert_loss: masked_word_logits,
    seq2seq_loss: target_logits,
    class_loss: class_logits,
}
# Where plain cross-entropy is not the cost of each row, (logits, words, label_smoothing=) -> (N,), or rows do not count
# as `target_factors` says.
EACH: dict[Callable[..., Loss], tuple[Callable[..., Tensor], Callable[..., Tensor | None]]] = {
    class_loss: (class_costs, class_factors),
}


def with_r_drop(loss: Callable[..., Loss], weight: float) -> Callable[..., Loss]:
    """`loss` with the divergence added while the model is in training; as it is for a weight of 0."""
    if not weight:
        return loss
    logits_of = LOGITS[loss]
    cost, factors_of = EACH.get(loss, (partial(F.cross_entropy, reduction="none"), target_factors))

    def regularised(model: Any, batch: Any, *, label_smoothing: float = 0.0) -> Loss:
        if not model.training:
            return loss(model, batch, label_smoothing=label_smoothing)
        first, words = logits_of(model, batch)
        second, _ = logits_of(model, batch)
        kept = words != IGNORED
        first, second, words = first[kept], second[kept], words[kept]
        losses = (cost(logits.float(), words, label_smoothing=label_smoothing) for logits in (first, second))
        each = sum(losses) / 2 + weight * symmetric_divergence(first, second) / 4
        factors = factors_of(batch, len(words), each.device)
        return Loss(each.sum() if factors is None else (each * factors).sum(), len(words))

    return regularised


def symmetric_divergence(first: Tensor, second: Tensor) -> Tensor:
    """KL(p ‖ q) + KL(q ‖ p) in nats of each row of two (N, V) logits, (N,)."""
    log_p, log_q = (logits.float().log_softmax(-1) for logits in (first, second))
    return ((log_p.exp() - log_q.exp()) * (log_p - log_q)).sum(-1)
