"""Contrastive learning of embeddings: each query shall be nearest to its own passage among all passages of the batch.

    loss, make_loader = embedding_objective(recipe.embedding)
    batch = make_loader([TokenFile.open(folder)], length=256, seed=0).next_batch(32)
    loss(encoder, batch).total.backward()

    s_ij = cos(q_i, p_j) / temperature
    L = -Σ_i log softmax_j(s_ij)[i] / number of pairs

InfoNCE (arXiv:1807.03748) with in-batch negatives (arXiv:1705.00652), sentence-transformers'
MultipleNegativesRankingLoss with scale = 1 / temperature; `symmetric` averages it with the same over the columns, where
each passage looks for its query.

A passage that is in the batch twice, or belongs to the same query twice, is no negative: such pairs are left out of
each other's sums.

Negatives are those of one micro-batch, so training.micro_batch, not batch_tokens, says how many there are; one of a
single pair teaches nothing. Many negatives in little memory: `rows_at_once` texts are computed at a time, and once more
on the way back, which gives the very same gradient (GradCache, arXiv:2101.06983) for a third more time.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from bimo.data.embedding_pairs import EmbeddingBatch, EmbeddingPairLoader
from bimo.models.encoder import Encoder
from bimo.objectives.causal import Loss
from bimo.recipe import EmbeddingRecipe

__all__ = ["contrastive_loss", "embedding_loss", "embedding_objective"]


def embedding_objective(
    recipe: EmbeddingRecipe,
) -> tuple[Callable[..., Loss], Callable[..., EmbeddingPairLoader]]:
    """The loss as the recipe wants it, and the loader of its batches (as `objectives.kinds.make_objective`)."""
    settings: dict[str, Any] = {"temperature": recipe.temperature, "symmetric": recipe.symmetric}
    return partial(embedding_loss, rows_at_once=recipe.rows_at_once, **settings), EmbeddingPairLoader


def embedding_loss(
    model: Encoder,
    batch: EmbeddingBatch,
    *,
    temperature: float = 0.05,
    symmetric: bool = False,
    rows_at_once: int = 0,
    label_smoothing: float = 0.0,
) -> Loss:
    """The loss of a batch on the model's device, summed over its pairs.

    While the model is not in training also `in_batch_recall`: how often the nearest passage is the right one (ties do
    not count). It falls with the number of pairs in a batch: compare it between runs of one micro_batch only.

    rows_at_once: texts computed together, 0: all. label_smoothing: share of the target that is spread evenly over a
    query's passages (arXiv:1512.00567).
    """
    device = model.embed_tokens.weight.device
    queries = _embed(model, batch.query_ids, batch.query_mask, rows_at_once)
    passages = _embed(model, batch.passage_ids, batch.passage_mask, rows_at_once)
    related = _same_text(batch.query_ids, batch.query_mask) | _same_text(batch.passage_ids, batch.passage_mask)
    count = batch.num_targets
    if not count:  # an idle row: its vectors take part, so that every weight has a gradient
        return Loss((queries.sum() + passages.sum()) * 0, count)
    with torch.autocast(device.type, enabled=False):  # a score of 20 in bfloat16 is off by 0.1
        scores = queries @ passages.T / temperature
        total = contrastive_loss(scores, related.to(device), symmetric=symmetric, label_smoothing=label_smoothing)
    means = {} if model.training else {"in_batch_recall": (float(_hits(scores, related.to(device))), count)}
    return Loss(total, count, means)


def contrastive_loss(
    scores: Tensor, related: Tensor, *, symmetric: bool = False, label_smoothing: float = 0.0
) -> Tensor:
    """-Σ_i log softmax(scores_i)[i] over what is not `related` to i; float32.

    scores (B, B) of queries and passages; related (B, B) bool, symmetric: pairs that are not each other's negatives,
    whatever its diagonal says.
    """
    if symmetric:
        both = (contrastive_loss(side, related, label_smoothing=label_smoothing) for side in (scores, scores.T))
        return torch.stack(tuple(both)).mean()
    own = torch.eye(len(scores), dtype=torch.bool, device=scores.device)
    hidden = related & ~own
    log_p = scores.float().masked_fill(hidden, -torch.inf).log_softmax(1)
    loss = -log_p.diagonal().sum()
    if not label_smoothing:
        return loss
    spread = log_p.masked_fill(hidden, 0).sum(1) / (~hidden).sum(1)
    return (1 - label_smoothing) * loss - label_smoothing * spread.sum()


def _embed(model: Encoder, ids: NDArray[Any], mask: NDArray[Any], rows_at_once: int) -> Tensor:
    """(B, D) float32 of length 1."""
    device = model.embed_tokens.weight.device
    input_ids, attention_mask = torch.from_numpy(ids).to(device), torch.from_numpy(mask).to(device)

    def embed(some_ids: Tensor, some_mask: Tensor) -> Tensor:
        return model.embedding(model(some_ids, some_mask), some_mask)

    if not rows_at_once or len(ids) <= rows_at_once:
        return embed(input_ids, attention_mask)
    parts = zip(input_ids.split(rows_at_once), attention_mask.split(rows_at_once), strict=True)
    if not torch.is_grad_enabled():
        return torch.cat([embed(*part) for part in parts])
    return torch.cat([checkpoint(embed, *part, use_reentrant=False) for part in parts])


def _same_text(ids: NDArray[Any], mask: NDArray[Any]) -> Tensor:
    """(B, B) bool: which rows have the same tokens."""
    places: dict[bytes, int] = {}
    number = torch.tensor(
        [places.setdefault(row[used].tobytes(), len(places)) for row, used in zip(ids, mask, strict=True)]
    )
    return number[:, None] == number


def _hits(scores: Tensor, related: Tensor) -> Tensor:
    """How many rows have their highest score on the diagonal, and nowhere else that counts."""
    others = scores.masked_fill(related, -torch.inf)
    return (scores.diagonal() > others.amax(1)).sum()
