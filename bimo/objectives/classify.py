"""Classification: which class a text has, by the encoder's first token.

    loss, make_loader = class_objective(Labels(model.config.labels))
    batch = make_loader([TokenFile.open(folder)], length=256, seed=0).next_batch(32)
    loss(encoder, batch).total.backward()

    L = -Σ log softmax(scores of the text's own task)[class] / number of texts

Several tasks share one head (data.labels). A text's probabilities are over the classes of its own task, as if each had
a head of its own; of several tasks L is the joint loss Σ_i w_i L_i / Σ_i w_i of each task's own average.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from bimo.data.labels import LabelBatch, LabelLoader, Labels
from bimo.data.loader import IGNORED
from bimo.data.shards import TokenFile
from bimo.models.encoder import Encoder
from bimo.objectives.causal import Loss

__all__ = ["class_costs", "class_factors", "class_logits", "class_loss", "class_objective"]

FORBIDDEN = -1e4  # the score of another task's class: no chance, and finite, so that differences of scores are, too


def class_objective(
    labels: Labels, loss_weights: Mapping[str, float] | None = None
) -> tuple[Callable[..., Loss], Callable[..., LabelLoader]]:
    """The loss, and the loader of its batches (as `objectives.kinds.make_objective`). loss_weights: by the names of the
    token files' folders; 1 if not given."""
    weights = loss_weights or {}

    def make_loader(files: list[TokenFile], **order: Any) -> LabelLoader:
        return LabelLoader(
            files, labels=labels, loss_weights=[weights.get(file.folder.name, 1.0) for file in files], **order
        )

    return class_loss, make_loader


def class_loss(model: Encoder, batch: LabelBatch, *, label_smoothing: float = 0.0) -> Loss:
    """The loss of a batch on the model's device, summed over its texts. While the model is not in training also
    `accuracy`. label_smoothing: share of the target that is spread evenly over the task's classes (arXiv:1512.00567).
    """
    logits, classes = class_logits(model, batch)
    weights = torch.from_numpy(batch.weights).to(logits.device)
    total = (class_costs(logits, classes, label_smoothing=label_smoothing) * weights).sum()
    count = batch.num_targets
    means = {} if model.training else {"accuracy": (float((logits.argmax(-1) == classes).sum()), count)}
    return Loss(total, count, means)


def class_logits(model: Encoder, batch: LabelBatch) -> tuple[Tensor, Tensor]:
    """(B, C) float32 scores, FORBIDDEN for other tasks' classes, and (B,) classes, or IGNORED."""
    device = model.embed_tokens.weight.device
    input_ids, mask, classes, allowed = (
        torch.from_numpy(array).to(device) for array in (batch.input_ids, batch.mask, batch.targets, batch.allowed)
    )
    logits = model.class_logits(model(input_ids, mask)).float()
    return logits.masked_fill(~allowed, FORBIDDEN), classes


def class_costs(logits: Tensor, classes: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
    """The cross-entropy of each text, (B,), of what `class_logits` gives; 0 for IGNORED."""
    log_p = logits.log_softmax(-1)
    nats = -log_p.gather(1, classes.clamp(min=0)[:, None])[:, 0]
    if label_smoothing:  # torch's would spread it over the other tasks' classes, too
        allowed = logits > FORBIDDEN
        spread = -log_p.masked_fill(~allowed, 0).sum(1) / allowed.sum(1)
        nats = torch.lerp(nats, spread, label_smoothing)
    return nats * (classes != IGNORED)


def class_factors(batch: LabelBatch, count: int, device: torch.device) -> Tensor:
    """(count,) by what the loss of each text with a class counts."""
    factors = torch.from_numpy(batch.weights[batch.targets != IGNORED])
    assert len(factors) == count
    return factors.to(device)
