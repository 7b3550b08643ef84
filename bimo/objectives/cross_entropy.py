"""Cross-entropy straight from hidden states, without ever holding all the logits.

logits = h Wᵀ of 4,096 tokens and 49,152 words are 800 MB in float32, and again as much for their gradient. Here a slice
of tokens at a time goes forward and, in the same place, backward: d loss / d logits = softmax(logits) - target, so the
gradients for h and W are two more products. Same idea as Liger's fused kernel (arXiv:2410.10989).

Slices are of two sizes: float32 scores of a few rows at a time, which stay near the cache, and their differences in the
number type of the products for many rows, because every product for W's gradient adds to all of it (113 MB for 49,152
words of 576 numbers: a tenth of a step when it was done every 170 rows).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bimo.data.loader import IGNORED
from bimo.models import fused_training

__all__ = ["linear_cross_entropy"]

LOGITS_AT_ONCE = 1 << 23  # 32 MB in float32
SLOPES_AT_ONCE = 1 << 27  # 256 MB in bfloat16


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, label_smoothing: float = 0.0, factors: Tensor | None = None
) -> Tensor:
    """-Σ factor · log softmax(hidden weightᵀ)[target], a float32 scalar; hidden (N, D), weight (V, D), targets (N,)
    int64, or IGNORED; factors (N,) float32, 1 if not given.

    Products are computed in hidden's number type; the weight's gradient is summed in float32 and has the weight's type.
    With smoothing s the target is (1 - s) of the word and s / V of every word (as torch's cross_entropy). A weight that
    is not trained costs no product.
    """
    return _LinearCrossEntropy.apply(hidden, weight, targets, label_smoothing, factors)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, smoothing: float, factors: Tensor | None
    ) -> Tensor:
        needed = any(ctx.needs_input_grad)
        total = torch.zeros((), device=hidden.device)
        d_hidden = torch.empty_like(hidden) if needed else None
        d_weight = torch.zeros(weight.shape, device=weight.device) if ctx.needs_input_grad[1] else None
        stored, weight = weight.dtype, weight.to(hidden.dtype)
        for start in range(0, len(hidden), rows := max(16, SLOPES_AT_ONCE // len(weight))):
            part, words = hidden[start : start + rows], targets[start : start + rows]
            losses, slopes = _differences(part, weight, words, smoothing, needed)
            if factors is not None:
                each = factors[start : start + rows]
                losses = losses * each
                slopes = slopes.mul_(each[:, None]) if needed else slopes
            total += losses.sum()
            if d_hidden is not None:
                torch.mm(slopes, weight, out=d_hidden[start : start + rows])
            if d_weight is not None:
                d_weight += slopes.t() @ part
        ctx.save_for_backward(d_hidden, d_weight)
        ctx.dtype = stored
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        d_hidden, d_weight = ctx.saved_tensors
        d_weight = None if d_weight is None else d_weight.mul_(grads[0]).to(ctx.dtype)
        return d_hidden * grads[0], d_weight, None, None, None


def _differences(
    hidden: Tensor, weight: Tensor, targets: Tensor, smoothing: float, needed: bool
) -> tuple[Tensor, Tensor]:
    """The loss of each row, (N,) float32, and softmax(logits) - target, (N, V), where it is `needed`."""
    ignored, targets = (targets == IGNORED).nonzero().squeeze(1), targets.clamp(min=0)
    if hidden.dtype == torch.bfloat16 and (loops := fused_training.loops_for(hidden, weight)):
        logits = hidden @ weight.t()  # where their differences are written, too
        losses = loops.cross_entropy(logits, targets, smoothing, needed)
        losses[ignored], logits[ignored] = 0, 0
        return losses, logits
    losses = hidden.new_empty(len(hidden), dtype=torch.float32)
    slopes = hidden.new_empty((len(hidden), len(weight)) if needed else (0, 0))
    step = max(16, LOGITS_AT_ONCE // len(weight))
    for start in range(0, len(hidden), step):
        words = targets[start : start + step, None]
        log_p = torch.log_softmax(hidden[start : start + step] @ weight.t(), 1, dtype=torch.float32)  # (n, V)
        scores = log_p.gather(1, words)
        losses[start : start + step] = -scores[:, 0]
        if smoothing:
            losses[start : start + step].lerp_(-log_p.mean(1), smoothing)
        if not needed:
            continue
        log_p.exp_()
        if smoothing:
            log_p -= smoothing / len(weight)
        log_p.scatter_add_(1, words, torch.full_like(scores, smoothing - 1))
        slopes[start : start + step] = log_p
    losses[ignored], slopes[ignored if needed else ignored[:0]] = 0, 0
    return losses, slopes
