"""Supervised fine-tuning: the answer, word by word, given the question; several tasks in one loss.

    L_i = -Σ_t log p(y_t | x, y_<t) / learned tokens of task i        on the answers only
    L   = Σ_i w_i L_i / Σ_i w_i

The scores of a word are a fifth of a small model's work, and of an example's tokens most are often the question: only
rows with a target go through the head.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bimo.data.example_loader import ExampleBatch
from bimo.data.loader import IGNORED
from bimo.models.decoder import Decoder
from bimo.models.recurrent import LSTMLanguageModel
from bimo.objectives.causal import Loss, hidden_states
from bimo.objectives.cross_entropy import linear_cross_entropy
from bimo.objectives.rows import chosen_rows

__all__ = ["answer_logits", "answer_loss", "target_factors"]


def answer_loss(model: Decoder | LSTMLanguageModel, batch: ExampleBatch, *, label_smoothing: float = 0.0) -> Loss:
    """The joint loss of a batch, times its learned tokens. label_smoothing: arXiv:1512.00567."""
    hidden, targets = _chosen(model, batch)
    weight = model.embed_tokens.weight
    head = weight if model.lm_head is None else model.lm_head.get_parameter("weight")
    factors = target_factors(batch, len(targets), weight.device)
    return Loss(linear_cross_entropy(hidden, head, targets, label_smoothing, factors), batch.num_targets)


def answer_logits(model: Decoder | LSTMLanguageModel, batch: ExampleBatch) -> tuple[Tensor, Tensor]:
    """(N, V) scores and (N,) words of the answers' tokens; IGNORED fills up."""
    hidden, targets = _chosen(model, batch)
    return model.logits(hidden), targets


def _chosen(model: Decoder | LSTMLanguageModel, batch: ExampleBatch) -> tuple[Tensor, Tensor]:
    hidden = hidden_states(model, batch)
    return chosen_rows(hidden, torch.from_numpy(batch.targets).to(hidden.device))


def target_factors(batch: Any, count: int, device: torch.device) -> Tensor | None:
    """(count,) by what each target's loss counts, in the batch's order, 1 behind them; None where all are 1, as in any
    other batch than `ExampleBatch`."""
    if not isinstance(batch, ExampleBatch):
        return None
    chosen = torch.from_numpy(batch.weights[batch.targets != IGNORED])
    if bool((chosen == 1).all()):
        return None
    return F.pad(chosen, (0, count - len(chosen)), value=1.0).to(device)
