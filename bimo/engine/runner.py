"""Runs the model on a scheduler's plan: owns the KV memory, returns what is needed. Torch only for a model that is
torch's.

Only rows whose logits somebody will read go through the vocabulary projection: with 49,152 words and 512 prompt
tokens that saves 512 of 513 rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from bimo.engine.fused import FusedDecoder
from bimo.engine.multistep import MultiStep
from bimo.engine.scheduler import Scheduled
from bimo.engine.sequence import Sequence

if TYPE_CHECKING:
    from torch import nn

__all__ = ["ModelRunner", "StepResult"]

Array = NDArray[Any]


@dataclass(slots=True)
class StepResult:
    """What one step computed.

    sequences: those that reached their last token.
    drafts: for each of them the tokens that were computed beyond it.
    steps: of the model.
    guessed: the drafts; if not, they are the words that the model itself went on with.
    logits: (R, V) float32, 1 + len(drafts) rows a sequence, in order: after its last token, and after each draft;
        none where nobody wants them.
    best: the likeliest word of each row, where the step found it on its way.
    hidden: (R, D) float32, the hidden states they come from; (R, 0) where no sequence asks for them.
    prompt_hidden: for sequences that asked for prompt_logprobs: (count, D), the computed chunk's hidden states.
    """

    sequences: list[Sequence]
    drafts: list[tuple[int, ...]]
    logits: Array
    best: list[int] | None
    hidden: Array
    prompt_hidden: dict[Sequence, Array]
    steps: int = 1
    guessed: bool = True

    @property
    def first_rows(self) -> dict[Sequence, int]:
        """Each sequence's first row."""
        rows = accumulate((1 + len(drafts) for drafts in self.drafts), initial=0)
        return dict(zip(self.sequences, rows, strict=False))


class ModelRunner:
    """The model and its cache memory."""

    def __init__(self, model: nn.Module | FusedDecoder, *, num_blocks: int, block_size: int) -> None:
        """`model`: a decoder, an encoder-decoder or a recurrent language model (see bimo.models)."""
        self.model: Any = model if isinstance(model, FusedDecoder) else _on_torch(model)
        self.cache = self.model.make_cache(num_blocks, block_size)

    def run(self, plan: list[Scheduled], copies: list[tuple[int, int]], more: MultiStep | None = None) -> StepResult:
        """Compute a plan. `copies` are block copies owed to sequences forked since the last step; `more`: the
        steps that single tokens may take at once, for a model that `can_go_on`."""
        self.cache.copy_blocks(copies)
        if more:
            return self._run_steps(plan, more)
        plan = sorted(plan, key=lambda work: work.count > 1)  # single tokens first; stable
        ends = list(accumulate(work.count for work in plan))
        scored = [row for work, end in zip(plan, ends, strict=True) for row in range(end - work.num_scored, end)]
        hidden, logits, best = self.model.run(plan, scored)
        prompt_hidden: dict[Sequence, Array] = {}
        for work, end in zip(plan, ends, strict=True):
            sequence = work.sequence
            if sequence.sampling.penalty_alpha:
                rows = hidden[end - work.count : end]
                sequence.hidden = rows if sequence.hidden is None else np.concatenate((sequence.hidden, rows))
            if sequence.sampling.prompt_logprobs is not None and work.start < sequence.num_prompt:
                prompt_hidden[sequence] = hidden[end - work.count : end]
        reached = [work for work in plan if work.num_scored]
        sequences, drafts = [work.sequence for work in reached], [work.drafts for work in reached]
        scored_hidden = hidden if len(scored) == len(hidden) else hidden[scored]
        return StepResult(sequences, drafts, logits, best, scored_hidden, prompt_hidden)

    def _run_steps(self, plan: list[Scheduled], more: MultiStep) -> StepResult:
        hidden, logits, words = self.model.run(plan, list(range(len(plan))), more)
        answers = [words[row :: len(plan)] for row in range(len(plan))]  # they came a step after the other
        drafts = [tuple(answer[:-1]) for answer in answers]
        best = [word for answer in answers for word in answer]
        return StepResult([work.sequence for work in plan], drafts, logits, best, hidden, {}, len(answers[0]), False)

    def logits(self, hidden: Array) -> Array:
        """(N, D) -> (N, V) float32."""
        return self.model.logits(hidden)


def _on_torch(model: nn.Module) -> Any:
    """The loops that compute a step of a torch module."""
    from bimo.engine.eager import EagerDecoder
    from bimo.engine.recurrent import RecurrentDecoder
    from bimo.engine.seq2seq import EagerEncoderDecoder
    from bimo.models.decoder import Decoder
    from bimo.models.recurrent import LSTMLanguageModel
    from bimo.models.seq2seq import EncoderDecoder

    kinds: dict[type, Any] = {
        Decoder: EagerDecoder,
        EncoderDecoder: EagerEncoderDecoder,
        LSTMLanguageModel: RecurrentDecoder,
    }
    kind = next((kinds[base] for base in type(model).__mro__ if base in kinds), None)
    if kind is None:
        raise TypeError(f"no loops for {type(model).__name__}: expected one of {[k.__name__ for k in kinds]}")
    return kind(model)
