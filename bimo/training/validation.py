"""How well the model predicts text it was not trained on: nats a token, bits per byte, language by language.

    bits_per_byte = Σ -log2 p(token) / bytes of the predicted tokens

Perplexities compare between models of one tokenizer only, bits per byte between all.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from bimo.data.loader import IGNORED, PackedLoader
from bimo.data.shards import TokenFile
from bimo.recipe import TrainingRecipe
from bimo.tokenizer.load import Tokenizer
from bimo.training.distributed import reshard, summed
from bimo.training.loop import Objective, TrainingState, autocast

__all__ = ["Score", "bytes_of_tokens", "validate"]


@dataclass(frozen=True)
class Score:
    """Of one text: sums over its predicted tokens."""

    nats: float
    num_tokens: int
    num_bytes: int

    @property
    def nats_per_token(self) -> float:
        return self.nats / max(1, self.num_tokens)

    @property
    def bits_per_byte(self) -> float:
        return self.nats / math.log(2) / max(1, self.num_bytes)

    def __add__(self, other: Score) -> Score:
        return Score(self.nats + other.nats, self.num_tokens + other.num_tokens, self.num_bytes + other.num_bytes)


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
) -> dict[str, Score]:
    """Scores by the keys of `files`; the first `recipe.eval_tokens` tokens of each, in rows of `length`."""
    model, ranks, scores = state.model, state.ranks, {}
    model.eval()
    _swap(state)
    for name, file in files.items():
        rows = (len(file.tokens) - 1) // length
        if rows < 1:
            continue
        loader = PackedLoader([file], length=length, shuffle=False)
        left = min(rows, max(1, recipe.eval_tokens // length))
        score = Score(0.0, 0, 0)
        while left > 0:
            num_rows = min(left, recipe.micro_batch * ranks.world_size)
            batch = loader.next_batch(num_rows, rank=ranks.rank, world_size=ranks.world_size)
            left -= num_rows
            with autocast(recipe, next(model.parameters()).device):
                loss = objective(model, batch)
            targets = batch.targets[batch.targets != IGNORED]
            score += Score(float(loss.total), loss.num_targets, int(sizes[targets].sum()))
        nats, num_tokens, num_bytes = summed(ranks, score.nats, score.num_tokens, score.num_bytes)
        scores[name] = Score(nats, int(num_tokens), int(num_bytes))
    reshard(objective)
    _swap(state)
    model.train()
    return scores


def _swap(state: TrainingState) -> None:
    """The averaged weights into the model and its own out of it, and the second time back: what is scored is what is
    saved."""
    for name, average in state.ema.items():
        weight = state.model.get_parameter(name)
        kept = weight.clone()
        weight.copy_(average)  # in place: fsdp knows its part by its memory
        average.copy_(kept)
