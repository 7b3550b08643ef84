"""Optimisers and the learning rate's way.

adamw   decoupled weight decay on matrices only (arXiv:1711.05101), torch's fused kernel
muon    momentum made orthogonal by Newton-Schulz (Jordan 2024, arXiv:2502.16982) for the matrices inside the
        blocks; adamw for embeddings, head and vectors
sgd     with Nesterov momentum
"""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.optim import Optimizer

from bimo.errors import UsageError
from bimo.recipe import TrainingRecipe

__all__ = ["learning_rate", "make_optimizers"]

DECAY_SHARE = 0.2  # of the steps, at the end of "wsd"


def make_optimizers(model: nn.Module, recipe: TrainingRecipe) -> list[Optimizer]:
    """One optimiser, or Muon's two. Vectors (norms, biases) are not decayed. Raises UsageError: Muon without blocks."""
    named = [(name, weight) for name, weight in model.named_parameters() if weight.requires_grad]
    matrices = [(name, weight) for name, weight in named if weight.ndim >= 2]
    vectors = [weight for _, weight in named if weight.ndim < 2]
    rate, decay = recipe.learning_rate, recipe.weight_decay
    if recipe.optimizer == "muon":
        inner = [weight for name, weight in matrices if "layers." in name]
        outer = [weight for name, weight in matrices if "layers." not in name]
        if not inner:
            raise UsageError(
                'training.optimizer = "muon" is for the matrices of Transformer blocks, and this model has none: use '
                '"adamw"',
                "training.optimizer",
            )
        # its update has AdamW's usual size, so that one learning rate serves both
        muon = torch.optim.Muon(inner, lr=rate, weight_decay=decay, adjust_lr_fn="match_rms_adamw")
        return [muon, _adamw(outer, vectors, recipe)]
    weights = [weight for _, weight in matrices]
    if recipe.optimizer == "adamw":
        return [_adamw(weights, vectors, recipe)]
    groups = [{"params": weights, "weight_decay": decay}, {"params": vectors, "weight_decay": 0.0}]
    return [torch.optim.SGD(groups, lr=rate, momentum=recipe.betas[0], nesterov=recipe.betas[0] > 0)]


def _adamw(weights: list[nn.Parameter], vectors: list[nn.Parameter], recipe: TrainingRecipe) -> Optimizer:
    groups = [{"params": weights, "weight_decay": recipe.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=recipe.betas, fused=True)


def learning_rate(step: int, recipe: TrainingRecipe) -> float:
    """For the step with this number (the first is 0)."""
    peak, last = recipe.learning_rate, recipe.learning_rate * recipe.final_learning_rate
    warmup = round(recipe.warmup * recipe.steps)
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / max(1, recipe.steps - warmup)  # 0 .. 1
    match recipe.schedule:
        case "constant":
            return peak
        case "linear":
            left = 1 - done
        case "wsd":
            left = min(1.0, (1 - done) / DECAY_SHARE)
        case _:
            left = 0.5 * (1 + math.cos(math.pi * done))
    return last + (peak - last) * left
