"""A decoder of torch modules behind `ModelRunner`, on any device; what FusedDecoder (fused.py) is for the kernels.

Scores leave as NumPy arrays: on a CPU they are the tensor's own memory, from a GPU the rows that are asked for are
copied (12 MB for 64 rows of 49,152 words).
"""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bimo.engine.adapted import AdapterRows
from bimo.engine.paged import PagedCache, StepAttention
from bimo.engine.scheduler import Scheduled

__all__ = ["EagerDecoder", "padded_rows"]

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


class EagerDecoder:
    """Builds a step's row of tokens, and runs the model on it, a step at a time."""

    can_go_on = False  # several steps in one call (multistep.py)
    can_speculate = True  # tokens that were computed can be taken back (speculation.py)
    start_token_id: int | None = None  # an encoder-decoder's: the prompt is its source, an answer starts with this

    def __init__(self, model: Any) -> None:
        self.model, self.config = model.eval(), model.config
        self.weight = model.embed_tokens.weight
        self.adapter_rows: AdapterRows | None = getattr(model, "adapter_rows", None)
        self.adapters = self.adapter_rows.names if self.adapter_rows else ()  # numbered from 1 on

    def make_cache(self, num_blocks: int, block_size: int) -> PagedCache:
        """The memory of keys and values, where the model is."""
        self.cache = PagedCache(self.config, num_blocks, block_size, self.weight.dtype, self.weight.device)
        return self.cache

    @torch.inference_mode()
    def run(self, plan: list[Scheduled], scored: list[int]) -> tuple[NDArray[Any], NDArray[Any], None]:
        """Hidden states (T, D) float32 of a plan's tokens, one sequence after the other, or (T, 0) where no sequence
        asks for them; and the logits (N, V) of the rows `scored`. The likeliest words are not looked for."""
        hidden, num_tokens = self._hidden(plan), sum(work.count for work in plan)
        wishes = (work.sequence.sampling for work in plan)
        wanted = any(wish.penalty_alpha or wish.prompt_logprobs is not None for wish in wishes)
        kept = hidden[:num_tokens] if wanted else hidden.new_empty(num_tokens, 0)
        return _array(kept), _array(self._scored(hidden, scored)), None

    def interrupt(self) -> None:
        """There is but one step to wait for."""

    def settle(self) -> None:
        """Nothing was left for later."""

    @torch.inference_mode()
    def logits(self, hidden: NDArray[np.float32]) -> NDArray[np.float32]:
        """(N, D) -> (N, V) float32."""
        return _array(self._logits(torch.from_numpy(hidden).to(self.weight)))

    def _hidden(self, plan: list[Scheduled]) -> Tensor:
        """The hidden states (T, D); rows beyond the plan's tokens are padding."""
        token_ids = [token for work in plan for token in work.token_ids]
        positions = [place for work in plan for place in range(work.start, work.start + work.count)]
        padding = [0] * (padded_rows(len(token_ids)) - len(token_ids))
        device = self.weight.device
        rows = torch.tensor([token_ids + padding], device=device), torch.tensor([positions + padding], device=device)
        return self._compute(*rows, plan)[0]

    def _compute(self, input_ids: Tensor, positions: Tensor, plan: list[Scheduled]) -> Tensor:
        """The model on a step's row of tokens, (1, T) each -> (1, T, D)."""
        if self.adapter_rows:
            ends = list(accumulate(work.count for work in plan))
            spans = [(w.sequence.adapter, end - w.count, end) for w, end in zip(plan, ends, strict=True)]
            self.adapter_rows.select(spans)
        return self.model(input_ids, positions, StepAttention(self.cache, plan))

    def _scored(self, hidden: Tensor, scored: list[int]) -> Tensor:
        """The logits of the rows of `hidden` (T, D) that are asked for."""
        if not scored:
            return hidden.new_zeros(0, self.config.vocab_size)
        count = len(scored)
        width = padded_rows(count)
        if scored[-1] == count - 1 and width <= len(hidden):  # the usual decode step
            rows = hidden[:width]
        else:
            rows = hidden[torch.tensor(scored + [0] * (width - count), device=hidden.device)]
        return self._logits(rows)[:count]

    def _logits(self, hidden: Tensor) -> Tensor:
        """(N, D) -> (N, V) float32, with the most likely words' scores computed in float32.

        A product of bf16 matrices ends in bf16, whose steps are 0.125 for scores around 20: the first places are often
        tied, and the first in the alphabet wins. Scoring 16 words again costs a hundredth of a step. Only with tied
        embeddings, where the plain weights are at hand.
        """
        logits = self.model.logits(hidden).float()
        if hidden.dtype != torch.float32 and self.config.tied_embeddings:
            best = _most_likely(logits, min(_RESCORED, logits.shape[-1]))  # (N, 16)
            logits.scatter_(1, best, self._score(hidden.float(), best))
        return logits

    def _score(self, hidden: Tensor, words: Tensor) -> Tensor:
        """Logits of some words of each row in float32, (N, D) and ids (N, C) -> (N, C)."""
        return (self.weight[words].float() @ hidden[:, :, None])[:, :, 0]


def _most_likely(logits: Tensor, count: int) -> Tensor:
    """Ids of the `count` highest scores of each row, (N, V) -> (N, count).

    In two steps, because torch's reductions with an index are not vectorised: first the best of each 128 scores, then
    the best within the best of those. 16 rows of 49,152: 0.11 ms instead of 0.69 for one, 0.29 instead of 0.68 for 32.
    """
    rows, num_vocab = logits.shape
    if num_vocab % 128 or num_vocab < 128 * max(count, 2):
        return logits.topk(count, dim=-1).indices
    groups = logits.view(rows, -1, 128)
    found = groups.amax(dim=-1).topk(count, dim=-1).indices  # (N, count)
    inner = groups.gather(1, found[:, :, None].expand(-1, -1, 128)).flatten(1)  # (N, count * 128)
    places = inner.topk(count, dim=-1).indices
    return found.gather(1, places // 128) * 128 + places % 128


def _array(values: Tensor) -> NDArray[Any]:
    return values.float().cpu().numpy()
