"""The training loop: a generator of steps. Everything else (logs, checkpoints, evaluation, stopping) reads its stream.

    state = TrainingState(model, make_optimizers(model, recipe), loader)
    for info in train(state, causal_loss, recipe):
        print(info.step, info.loss)

`TrainingState` is all that a step changes; `training.checkpoint` writes it down, and a loop that starts from what was
written makes the very same steps.

Several processes (training.distributed) take their rows of one batch and divide by the targets of all of it, so their
steps are those of one process but for the order of sums.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from bimo.data.loader import RowLoader
from bimo.errors import TrainingError
from bimo.objectives.causal import Loss
from bimo.recipe import RobustRecipe, TrainingRecipe
from bimo.runtime import Ranks, dtype_name, keep_freed_memory
from bimo.training.distributed import accumulate, from_every, summed, whole
from bimo.training.optim import learning_rate
from bimo.training.robust import passes

__all__ = ["Objective", "Regulariser", "StepInfo", "TrainingState", "autocast", "current_stage", "train"]

Objective = Callable[..., Loss]  # (model, batch, label_smoothing=...) -> Loss
EXPLODED = 3.0  # times the average loss of the last steps
MEMORY = 0.98  # of that average


class Regulariser(Protocol):
    """What an adapter has to say in every step."""

    def penalty(self) -> Tensor | None:
        """Added to the step's loss, once; not to the loss that is told. None: nothing."""

    def after_backward(self, step: int, total_steps: int) -> None:
        """Gradients are whole and clipped, and the loss is known to be good; weights are still those that were computed
        with. step: 1 is the first."""


@dataclass
class TrainingState:
    """A training in progress. step: how many are done. ema: averaged weights by name, where the recipe wants them; of
    those that are trained."""

    model: Any
    optimizers: list[Optimizer]
    loader: RowLoader
    step: int = 0
    tokens: int = 0
    average_loss: float | None = None
    ema: dict[str, Tensor] = field(default_factory=dict)
    ranks: Ranks = field(default_factory=Ranks)


@dataclass(frozen=True)
class StepInfo:
    """One optimiser step, over all processes. loss: nats a token. grad_norm: before clipping. seconds: it took. step: 1
    is the first."""

    step: int
    loss: float
    grad_norm: float
    learning_rate: float
    num_tokens: int
    seconds: float


def autocast(recipe: TrainingRecipe, device: torch.device) -> AbstractContextManager[Any]:
    """Products in bfloat16 where the recipe or the hardware wants them."""
    if dtype_name(recipe.dtype, device.type) == "bfloat16":
        return torch.autocast(device.type, torch.bfloat16)
    return nullcontext()


def current_stage(step: int, recipe: TrainingRecipe, context_length: int) -> tuple[int, int]:
    """Tokens of a row at this step, and the step at which the curriculum's stage ends; without one the whole context,
    to the end."""
    reached = 0.0
    for share, length in recipe.curriculum:
        reached += share
        if step < (end := round(reached * recipe.steps)):
            return min(length, context_length), end
    return context_length, recipe.steps


def train(
    state: TrainingState,
    objective: Objective,
    recipe: TrainingRecipe,
    *,
    stop_at: int | None = None,
    robust: RobustRecipe = RobustRecipe(),
    regulariser: Regulariser | None = None,
) -> Iterator[StepInfo]:
    """Steps from where `state` stands to `stop_at`, else the recipe's last. robust: see training.robust; the loss that
    is told is that of the text as it is.

    Raises TrainingError, naming the documents of the batch, when the loss or its gradient is not a number or explodes.
    """
    model, loader, ranks = state.model, state.loader, state.ranks
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    model.train()
    keep_freed_memory()
    num_rows = max(1, recipe.batch_tokens // loader.row_tokens)
    share_of_rows = -(-num_rows // ranks.world_size)  # others may have a row less, but compute as many parts
    micro = min(share_of_rows, recipe.micro_batch)
    last = min(recipe.steps, recipe.steps if stop_at is None else stop_at)
    while state.step < last:
        begun = time.perf_counter()
        rate = learning_rate(state.step, recipe)
        for optimizer in state.optimizers:
            optimizer.zero_grad(set_to_none=True)
            for group in optimizer.param_groups:
                group["lr"] = rate
        batch = loader.next_batch(num_rows, rank=ranks.rank, world_size=ranks.world_size)
        num_targets = summed(ranks, batch.num_targets)[0] / ranks.world_size  # of a process: gradients get averaged
        # before the parts, whose gradients it joins: averaged over the processes, which all have the same, it stays
        if regulariser is not None and (penalty := regulariser.penalty()) is not None:
            penalty.backward()
        loss = 0.0
        for start in range(0, share_of_rows, micro):
            share = partial(_share, objective, model, batch.rows(slice(start, start + micro)), recipe, num_targets)
            with accumulate(objective) if start + micro < share_of_rows else nullcontext():
                for number, (each, weight) in enumerate(passes(share, model, robust, partial(accumulate, objective))):
                    (each * weight).backward()
                    loss += 0.0 if number else float(each.detach())
        norm = float(whole(nn.utils.clip_grad_norm_(weights, recipe.clip or torch.inf)))
        own, loss = loss, summed(ranks, loss)[0] / ranks.world_size
        _check(state, batch, loss, norm, own)
        if regulariser is not None:
            regulariser.after_backward(state.step + 1, recipe.steps)
        for optimizer in state.optimizers:
            optimizer.step()
        _update_ema(state, recipe.ema)
        state.step += 1
        num_tokens = num_rows * loader.row_tokens
        state.tokens += num_tokens
        yield StepInfo(state.step, loss, norm, rate, num_tokens, time.perf_counter() - begun)


def _share(objective: Objective, model: Any, part: Any, recipe: TrainingRecipe, num_targets: float) -> Tensor:
    """What a part of a batch adds to the step's loss."""
    with autocast(recipe, next(model.parameters()).device):
        return objective(model, part, label_smoothing=recipe.label_smoothing).total / num_targets


def _check(state: TrainingState, batch: Any, loss: float, norm: float, own: float) -> None:
    """Stop before a bad step is taken: the weights are still good. own: this process's part of the loss."""
    average = state.average_loss
    state.average_loss = loss if average is None else MEMORY * average + (1 - MEMORY) * loss
    if loss - loss == 0 and norm - norm == 0 and (average is None or loss < EXPLODED * average + 1):
        return
    # every process comes here alike; the text of the one whose own loss is the worst
    shares = from_every(state.ranks, (own, state.loader.provenance(batch)))
    worst = max(shares, key=lambda share: (share[0] - share[0] != 0, share[0]))[1]
    shown = "; ".join(worst[:4]) + (f" and {len(worst) - 4} rows more" if len(worst) > 4 else "")
    what = "exploded" if loss - loss == 0 and norm - norm == 0 else "is not a number"
    raise TrainingError(
        f"the loss {what} at step {state.step + 1} (loss {loss:.4g}, gradient norm {norm:.4g}, average "
        f"{average or loss:.4g}), nothing of this step was kept; its text came from {shown}: look at that text, or "
        f"lower training.learning_rate (in a new run: --out)"
    )


@torch.no_grad()
def _update_ema(state: TrainingState, decay: float) -> None:
    if not decay:
        return
    decay = min(decay, (1 + state.step) / (10 + state.step))  # early averages should not remember the start
    for name, weight in state.model.named_parameters():
        if name in state.ema:
            state.ema[name].lerp_(weight, 1 - decay)
        elif weight.requires_grad:
            state.ema[name] = weight.detach().clone()
