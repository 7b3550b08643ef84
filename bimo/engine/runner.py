"""Runs the model on a scheduler's plan: builds the step's row of tokens, owns the KV memory, returns what is needed.

Only rows whose logits somebody will read go through the vocabulary projection: with 49,152 words and 512 prompt
tokens that saves 512 of 513 rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from bimo.engine.fused import FusedDecoder
from bimo.engine.paged import PagedCache, StepAttention
from bimo.engine.sampling import most_likely
from bimo.engine.scheduler import Scheduled
from bimo.engine.sequence import Sequence
from bimo.models.decoder import Decoder

__all__ = ["ModelRunner", "StepResult", "padded_rows"]


_RESCORED = 16  # words of each row whose scores are computed again in float32


def padded_rows(count: int) -> int:
    """The number of rows to compute for `count`: one of a few dozen sizes.

    oneDNN generates code for every number of rows it meets and keeps it: 130 MB after ten rounds of mixed traffic, and
    milliseconds at each first meeting. Up to 16 rows a product costs nearly the same; above, at most a third is added.
    """
    for step, limit in ((4, 16), (16, 64), (32, 128), (64, 1 << 62)):
        if count <= limit:
            return count if count <= 2 else -(-count // step) * step
    raise AssertionError


@dataclass(slots=True)
class StepResult:
    """What one step computed.

    sequences: those that reached their last token.
    drafts: for each of them the tokens that were computed beyond it.
    logits: (R, V) float32, 1 + len(drafts) rows a sequence, in order: after its last token, and after each draft.
    best: the likeliest word of each row, where the step found it on its way.
    hidden: (R, D) the hidden states they come from.
    prompt_hidden: for sequences that asked for prompt_logprobs: (count, D), the computed chunk's hidden states.
    """

    sequences: list[Sequence]
    drafts: list[tuple[int, ...]]
    logits: Tensor
    best: list[int] | None
    hidden: Tensor
    prompt_hidden: dict[Sequence, Tensor]

    @property
    def first_rows(self) -> dict[Sequence, int]:
        """Each sequence's first row."""
        rows = accumulate((1 + len(drafts) for drafts in self.drafts), initial=0)
        return dict(zip(self.sequences, rows, strict=False))


class ModelRunner:
    """The model and its cache memory."""

    def __init__(self, model: Decoder | FusedDecoder, *, num_blocks: int, block_size: int) -> None:
        self.model = model
        if isinstance(model, FusedDecoder):  # it keeps keys and values in an order of its own
            self.cache = model.make_cache(num_blocks, block_size)
        else:
            weight = model.eval().embed_tokens.weight
            self.cache = PagedCache(model.config, num_blocks, block_size, weight.dtype, weight.device)

    @torch.inference_mode()
    def run(self, plan: list[Scheduled], copies: list[tuple[int, int]]) -> StepResult:
        """Compute a plan. `copies` are block copies owed to sequences forked since the last step."""
        self.cache.copy_blocks(copies)
        plan = sorted(plan, key=lambda work: work.count > 1)  # single tokens first; stable
        ends = list(accumulate(work.count for work in plan))
        scored = [row for work, end in zip(plan, ends, strict=True) for row in range(end - work.num_scored, end)]
        best = None
        if isinstance(self.model, FusedDecoder):
            hidden, logits, best = self.model.run(plan, scored)
            scored_hidden = _rows_of(hidden, scored)
        else:
            hidden = self._hidden(self.model, plan)
            scored_hidden, logits = self._scored(hidden, scored)
        prompt_hidden: dict[Sequence, Tensor] = {}
        for work, end in zip(plan, ends, strict=True):
            sequence = work.sequence
            if sequence.sampling.penalty_alpha:
                rows = hidden[end - work.count : end]
                sequence.hidden = rows if sequence.hidden is None else torch.cat((sequence.hidden, rows))
            if sequence.sampling.prompt_logprobs is not None and work.start < sequence.num_prompt:
                prompt_hidden[sequence] = hidden[end - work.count : end]
        reached = [work for work in plan if work.num_scored]
        sequences, drafts = [work.sequence for work in reached], [work.drafts for work in reached]
        return StepResult(sequences, drafts, logits, best, scored_hidden, prompt_hidden)

    def _hidden(self, model: Decoder, plan: list[Scheduled]) -> Tensor:
        """The hidden states (T, D) of a plan's tokens, in its order; rows beyond them are padding."""
        token_ids = [token for work in plan for token in work.token_ids]
        positions = [place for work in plan for place in range(work.start, work.start + work.count)]
        padding = [0] * (padded_rows(len(token_ids)) - len(token_ids))
        device = self.cache.keys.device
        return model(
            torch.tensor([token_ids + padding], device=device),
            torch.tensor([positions + padding], device=device),
            StepAttention(self.cache, plan),
        )[0]

    def _scored(self, hidden: Tensor, scored: list[int]) -> tuple[Tensor, Tensor]:
        """The rows of `hidden` (T, D) that are asked for, and their logits."""
        if not scored:
            return hidden[:0], hidden.new_zeros(0, 0)
        count = len(scored)
        width = padded_rows(count)
        rows = hidden[:width] if scored[-1] == count - 1 and width <= len(hidden) else None  # the usual decode step
        if rows is None:
            rows = _rows_of(hidden, scored + [0] * (width - count))
        return rows[:count], self.logits(rows)[:count]

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """(N, D) -> (N, V) float32, with the most likely words' scores computed in float32.

        A product of bf16 matrices ends in bf16, whose steps are 0.125 for scores around 20: the first places are often
        tied, and the first in the alphabet wins. Scoring 16 words again costs a hundredth of a step. Only with tied
        embeddings, where the plain weights are at hand.
        """
        logits = self.model.logits(hidden).float()
        if isinstance(self.model, Decoder) and hidden.dtype != torch.float32 and self.model.config.tied_embeddings:
            best = most_likely(logits, min(_RESCORED, logits.shape[-1]))  # (N, 16)
            weight = self.model.embed_tokens.weight[best].float()  # (N, 16, D)
            logits.scatter_(1, best, (weight @ hidden.float()[:, :, None])[:, :, 0])
        return logits


def _rows_of(hidden: Tensor, rows: list[int]) -> Tensor:
    """(T, D) -> (len(rows), D); a view where they are the first ones."""
    if rows == list(range(len(rows))):
        return hidden[: len(rows)]
    return hidden[torch.tensor(rows, dtype=torch.long, device=hidden.device)]
