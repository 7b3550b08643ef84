"""Runs the model on a scheduler's plan: builds the step's row of tokens, owns the KV memory, returns what is needed.

Only rows whose logits somebody will read go through the vocabulary projection: with 49,152 words and 512 prompt
tokens that saves 512 of 513 rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

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

    logits: (N, V) float32 for the N sequences that reached their last token, in `sequences` order.
    hidden: (N, D) their last hidden states.
    prompt_hidden: for sequences that asked for prompt_logprobs: (count, D), the computed chunk's hidden states.
    """

    sequences: list[Sequence]
    logits: Tensor
    hidden: Tensor
    prompt_hidden: dict[Sequence, Tensor]


class ModelRunner:
    """The model and its cache memory."""

    def __init__(self, model: Decoder, *, num_blocks: int, block_size: int) -> None:
        self.model = model.eval()
        weight = model.embed_tokens.weight
        self.cache = PagedCache(model.config, num_blocks, block_size, weight.dtype, weight.device)
        self.step_attention = getattr(model, "step_attention", StepAttention)  # a fused model brings its own

    @torch.inference_mode()
    def run(self, plan: list[Scheduled], copies: list[tuple[int, int]]) -> StepResult:
        """Compute a plan. `copies` are block copies owed to sequences forked since the last step."""
        self.cache.copy_blocks(copies)
        plan = sorted(plan, key=lambda work: work.count > 1)  # single tokens first; stable
        device = self.cache.keys.device
        token_ids: list[int] = []
        positions: list[int] = []
        ends: list[int] = []
        for work in plan:
            end = work.start + work.count
            token_ids += work.sequence.token_ids[work.start : end]
            positions += range(work.start, end)
            ends.append(len(token_ids))
        padding = [0] * (padded_rows(len(token_ids)) - len(token_ids))
        hidden = self.model(
            torch.tensor([token_ids + padding], device=device),
            torch.tensor([positions + padding], device=device),
            self.step_attention(self.cache, plan),
        )[0]  # (T, D)
        prompt_hidden: dict[Sequence, Tensor] = {}
        for work, end in zip(plan, ends, strict=True):
            rows = hidden[end - work.count : end]
            sequence = work.sequence
            if sequence.sampling.penalty_alpha:
                sequence.hidden = rows if sequence.hidden is None else torch.cat((sequence.hidden, rows))
            if sequence.sampling.prompt_logprobs is not None and work.start < sequence.num_prompt:
                prompt_hidden[sequence] = rows
        last = [end - 1 for work, end in zip(plan, ends, strict=True) if work.is_last]
        last += [0] * (padded_rows(len(last)) - len(last)) if last else []
        hidden = hidden[torch.tensor(last, dtype=torch.long, device=device)]
        logits = self.logits(hidden) if last else hidden.new_zeros(0, 0)
        sequences = [work.sequence for work in plan if work.is_last]
        return StepResult(sequences, logits[: len(sequences)], hidden[: len(sequences)], prompt_hidden)

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """(N, D) -> (N, V) float32, with the most likely words' scores computed in float32.

        A product of bf16 matrices ends in bf16, whose steps are 0.125 for scores around 20: the first places are often
        tied, and the first in the alphabet wins. Scoring 16 words again costs a hundredth of a step. Only with tied
        embeddings, where the plain weights are at hand.
        """
        logits = self.model.logits(hidden).float()
        if hidden.dtype != torch.float32 and self.model.config.tied_embeddings:
            best = most_likely(logits, min(_RESCORED, logits.shape[-1]))  # (N, 16)
            weight = self.model.embed_tokens.weight[best].float()  # (N, 16, D)
            logits.scatter_(1, best, (weight @ hidden.float()[:, :, None])[:, :, 0])
        return logits
