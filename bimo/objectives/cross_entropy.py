"""Cross-entropy straight from hidden states, without ever holding all the logits.

logits = h Wᵀ of 4,096 tokens and 49,152 words are 800 MB in float32, and again as much for their gradient. Here a slice
of tokens at a time goes forward and, in the same place, backward: d loss / d logits = softmax(logits) - target, so the
gradients for h and W are two more products, done while the slice is in the cache. Same idea as Liger's fused kernel
(arXiv:2410.10989).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["linear_cross_entropy"]

LOGITS_AT_ONCE = 1 << 23  # 32 MB in float32


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """-Σ log softmax(hidden weightᵀ)[target], a float32 scalar; hidden (N, D), weight (V, D), targets (N,) int64.

    With smoothing s the target is (1 - s) of the word and s / V of every word (as torch's cross_entropy).
    """
    return _LinearCrossEntropy.apply(hidden, weight, targets, label_smoothing)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, smoothing: float) -> Tensor:
        needed = any(ctx.needs_input_grad)
        total = torch.zeros((), device=hidden.device)
        d_hidden = torch.empty_like(hidden) if needed else None
        d_weight = torch.zeros(weight.shape, device=weight.device) if needed else None
        step = max(16, LOGITS_AT_ONCE // len(weight))
        for start in range(0, len(hidden), step):
            part, words = hidden[start : start + step], targets[start : start + step, None]
            log_p = torch.log_softmax(part @ weight.t(), 1, dtype=torch.float32)  # (n, V)
            scores = log_p.gather(1, words)
            total -= (1 - smoothing) * scores.sum()
            if smoothing:
                total -= smoothing * log_p.mean(1).sum()
            if d_hidden is None or d_weight is None:
                continue
            slopes = log_p.exp_()
            if smoothing:
                slopes -= smoothing / len(weight)
            slopes.scatter_add_(1, words, torch.full_like(scores, smoothing - 1))
            slopes = slopes.to(hidden.dtype)
            d_hidden[start : start + step] = slopes @ weight
            d_weight += slopes.t() @ part
        ctx.save_for_backward(d_hidden, d_weight)
        ctx.dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        d_hidden, d_weight = ctx.saved_tensors
        return d_hidden * grads[0], (d_weight * grads[0]).to(ctx.dtype), None, None
