"""Adversarial training and noise: a text is learned as it is, and with its embedding moved to where the loss grows.

    for loss, weight in passes(share, model, RobustRecipe(kind="fgm"), waiting):
        (loss * weight).backward()          # before the next is asked for: its move follows from this gradient

x are the embeddings of a row's tokens, (T, D), and d a move of them with ‖d‖ ≤ ε ‖x‖, both over the whole row:

    fgm      (L(x) + L(x + d)) / 2, d = ε ‖x‖ g / ‖g‖, g = ∂L/∂x                arXiv:1605.07725    2 passes
    pgd      the same, d after K such steps, each of s ε ‖x‖, back into the ball    arXiv:1706.06083    K + 1
    freelb   (L(x) + L(x + d₁) + ... + L(x + d₍K₋₁₎)) / K on pgd's way              arXiv:1909.11764    K
    neftune  x + u, u uniform within ± α / √(T D), in every pass                    arXiv:2310.05914    costs nothing

The first loss is always the plain text's, and what the loop reports. The weights of the losses sum to 1, so that a
learning rate and a clip stay right, and FreeLB starts from the text instead of from noise (neftune adds noise). All
passes of a part see the same dropout and the same noise: a gradient says nothing of another network (FreeLB, 3.3).

Embeddings are moved by a hook on the embedding, so models know nothing of it. Frozen ones are moved as well. A row is
what it is in the batch: of examples that are packed into one, the move may spend its length on some of them, and α is
divided by the row's T. Places that no loss depends on, such as padding, are not moved, nor does ‖x‖ count them. An
encoder-decoder's source is moved, its target is not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from bimo.models.seq2seq import EncoderDecoder
from bimo.recipe import RobustRecipe

__all__ = ["passes"]


def passes(
    share: Callable[[], Tensor],
    model: Any,
    robust: RobustRecipe,
    waiting: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Iterator[tuple[Tensor, float]]:
    """Losses and their weights, each to be propagated before the next is asked for. share: computes the loss of a part
    of a batch by `model`; it is called once a pass. waiting: is entered around all but the last of them, backward too,
    as gradients need not travel between processes until then."""
    text = _Text(model, robust)
    if robust.kind == "none":
        with text.read_along():
            loss = share()
        yield loss, 1.0
        return
    num_moves = {"fgm": 1, "pgd": robust.steps, "freelb": robust.steps - 1}[robust.kind]
    num_losses = robust.steps if robust.kind == "freelb" else 2
    step = 1.0 if robust.kind == "fgm" else robust.step_size
    for move in range(num_moves + 1):
        is_last = move == num_moves
        with nullcontext() if is_last else waiting():
            with text.read_along(), nullcontext() if is_last else text.same_draws():
                loss = share()
            if move == 0 or is_last or robust.kind == "freelb":
                yield loss, 1 / num_losses
            else:  # its gradient is for the move alone, the weights get none
                text.slopes(loss)
        if not is_last:
            text.move(robust.epsilon, step)


class _Text:
    """The embeddings of one part of a batch. moves: float32 (B, T, D) leaves, one for every reading of a pass: R-Drop
    reads a text twice, a contrastive loss reads two texts. lengths (B, T, 1): of the embeddings, by reading."""

    def __init__(self, model: Any, robust: RobustRecipe) -> None:
        self.embedding: nn.Module = model.embed_tokens
        self.stride = 2 if isinstance(model, EncoderDecoder) else 1  # it embeds source, target, source, ...
        self.alpha, self.is_moved = robust.neftune, robust.kind != "none"
        self.moves: list[Tensor] = []
        self.lengths: list[Tensor] = []
        self.calls = 0

    @contextmanager
    def read_along(self) -> Iterator[None]:
        """Within it, what the model embeds is moved; nowhere else, so evaluation between steps is not."""
        self.calls = 0
        if not self.alpha and not self.is_moved:
            yield
            return
        handle = self.embedding.register_forward_hook(self._moved)
        try:
            yield
        finally:
            handle.remove()

    @contextmanager
    def same_draws(self) -> Iterator[None]:
        """Random numbers drawn in it come again behind it."""
        device = next(self.embedding.parameters()).device
        with torch.random.fork_rng([] if device.type == "cpu" else [device]):
            yield

    def _moved(self, embedding: nn.Module, inputs: Any, x: Tensor) -> Tensor:
        reading, is_target = divmod(self.calls, self.stride)
        self.calls += 1
        if is_target:
            return x
        if self.is_moved and reading == len(self.moves):
            self.moves.append(torch.zeros_like(x, dtype=torch.float32, requires_grad=True))
            self.lengths.append(torch.linalg.vector_norm(x.detach(), dim=-1, keepdim=True, dtype=torch.float32))
        if self.alpha:
            most = self.alpha / (x.shape[-2] * x.shape[-1]) ** 0.5
            x = x + torch.empty_like(x, requires_grad=False).uniform_(-most, most)
        return x + self.moves[reading].to(x.dtype) if self.is_moved else x

    def slopes(self, loss: Tensor) -> None:
        """The gradient of `loss` for the moves, and nothing else."""
        found = torch.autograd.grad(loss, self.moves, allow_unused=True)
        for move, slope in zip(self.moves, found, strict=True):
            move.grad = slope

    @torch.no_grad()
    def move(self, epsilon: float, step: float) -> None:
        """One step uphill, and back into the ball."""
        assert any(move.grad is not None for move in self.moves), "a loss was not propagated"
        for number, (move, lengths) in enumerate(zip(self.moves, self.lengths, strict=True)):
            slope = torch.zeros_like(move) if move.grad is None else move.grad
            counts = (slope != 0).any(-1, keepdim=True)  # (B, T, 1)
            radius = epsilon * _norm(lengths * counts)
            moved = move * counts + step * radius * slope / _norm(slope)
            moved *= (radius / _norm(moved)).clamp(max=1)
            self.moves[number] = moved.requires_grad_()


def _norm(x: Tensor) -> Tensor:
    """Of each row of (B, T, D), (B, 1, 1), never 0."""
    return torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True).clamp(min=torch.finfo(x.dtype).tiny)
