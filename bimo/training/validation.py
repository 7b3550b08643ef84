"""How well the model predicts text it was not trained on, language by language: nats a token, bits per byte, and what
else its objective counts (how often a masked word was found).

    bits_per_byte = Σ -log2 p(token) / bytes of the predicted tokens

Perplexities compare between models of one tokenizer only, bits per byte between all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from bimo.data.loader import IGNORED, RowLoader
from bimo.data.shards import TokenFile
from bimo.recipe import TrainingRecipe
from bimo.runtime import Ranks
from bimo.tokenizer.load import Tokenizer
from bimo.training.distributed import reshard, summed
from bimo.training.loop import Objective, TrainingState, autocast

__all__ = ["MakeLoader", "Score", "bytes_of_tokens", "validate"]

MakeLoader = Callable[..., RowLoader]  # (files, length=, shuffle=, and for training seed=, weights=)


@dataclass(frozen=True)
class Score:
    """Of one text: sums over its predicted tokens.

    num_bytes: 0 where the words do not make up a text, as masked ones do not. means: as in `objectives.causal.Loss`.
    """

    nats: float = 0.0
    num_tokens: int = 0
    num_bytes: int = 0
    means: Mapping[str, tuple[float, float]] = field(default_factory=dict)

    @property
    def nats_per_token(self) -> float:
        return self.nats / max(1, self.num_tokens)

    @property
    def bits_per_byte(self) -> float:
        return self.nats / math.log(2) / max(1, self.num_bytes)

    @property
    def figures(self) -> dict[str, float]:
        """What is worth telling, by name."""
        text = {"bits_per_byte": self.bits_per_byte} if self.num_bytes else {}
        return text | {name: total / max(1, count) for name, (total, count) in self.means.items()}

    def __add__(self, other: Score) -> Score:
        means = dict(self.means)
        for name, (total, count) in other.means.items():
            before = means.get(name, (0.0, 0.0))
            means[name] = (before[0] + total, before[1] + count)
        sums = (self.nats + other.nats, self.num_tokens + other.num_tokens, self.num_bytes + other.num_bytes)
        return Score(*sums, means)


def bytes_of_tokens(tokenizer: Tokenizer) -> NDArray[np.int64]:
    """Bytes of each token, (vocab_size,); 0 for control tokens, which stand for no text."""
    return np.array([len(tokenizer.token_bytes(token)) for token in range(tokenizer.vocab_size)], np.int64)


@torch.no_grad()
def validate(
    state: TrainingState,
    objective: Objective,
    recipe: TrainingRecipe,
    files: Mapping[str, TokenFile],
    sizes: NDArray[np.int64],
    length: int,
    make_loader: MakeLoader,
    *,
    shuffle: bool = False,
) -> dict[str, Score]:
    """Scores by the keys of `files`; the first `recipe.eval_tokens` tokens of each, in rows of `length`.

    shuffle: of as many rows drawn from all of it, always the same: the first examples of a file may be of one class.
    """
    model, ranks, scores = state.model, state.ranks, {}
    model.eval()
    _swap(state)
    for name, file in files.items():
        loader = make_loader([file], length=length, shuffle=shuffle)
        left = min(loader.num_rows[0], max(1, recipe.eval_tokens // loader.row_tokens))
        score = Score()
        while left > 0:
            num_rows = min(left, recipe.micro_batch * ranks.world_size)
            batch = loader.next_batch(num_rows, rank=ranks.rank, world_size=ranks.world_size)
            left -= num_rows
            with autocast(recipe, next(model.parameters()).device):
                loss = objective(model, batch)
            targets = batch.targets[batch.targets != IGNORED]
            num_bytes = int(sizes[targets].sum()) if batch.is_text else 0
            score += Score(float(loss.total), loss.num_targets, num_bytes, loss.means)
        scores[name] = _together(score, ranks)
    reshard(objective)
    _swap(state)
    model.train()
    return scores


def _together(score: Score, ranks: Ranks) -> Score:
    """The sum over all processes."""
    pairs = [number for pair in score.means.values() for number in pair]
    nats, num_tokens, num_bytes, *pairs = summed(ranks, score.nats, score.num_tokens, score.num_bytes, *pairs)
    means = dict(zip(score.means, zip(pairs[::2], pairs[1::2], strict=True), strict=True))
    return Score(nats, int(num_tokens), int(num_bytes), means)


def _swap(state: TrainingState) -> None:
    """The averaged weights into the model and its own out of it, and the second time back: what is scored is what is
    saved."""
    for name, average in state.ema.items():
        weight = state.model.get_parameter(name)
        kept = weight.clone()
        weight.copy_(average)  # in place: fsdp knows its part by its memory
        average.copy_(kept)
