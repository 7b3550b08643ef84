"""Several steps in one call of the model, where nothing has to be decided between them.

    step by step     x -> logits -> Python chooses t1 -> t1 -> logits -> Python chooses t2 -> ...
    several steps    x -> t1 -> t2 -> t3                                 Python sees three tokens at once

A greedy answer goes on with its likeliest word, which the kernels find on their way. Between steps Python takes a few
tenths of a millisecond, with its code out of the caches that the weights went through: 7 % of a lone request's time.
What comes back has the form of drafts that turned out to be true (speculation.py), so that the rest of the engine does
not know the difference: tokens after the end of an answer are dropped, blocks that were not needed go back.
"""

from __future__ import annotations

from dataclasses import dataclass

from bimo.engine.sampling import chooses_best
from bimo.engine.scheduler import Scheduled, Scheduler
from bimo.engine.speculation import Speculation

__all__ = ["MultiStep", "several_steps"]

_MOST = 16  # steps of one call
_FEW = 16  # sequences; each of more is so slow that three times as long a wait is a word or two


@dataclass(frozen=True, slots=True)
class MultiStep:
    """Go on for so many `steps` at most (1 or more), while `seconds` last, until a word is one of `ends`. Nobody wants
    the scores."""

    steps: int
    seconds: float
    ends: tuple[int, ...]


def several_steps(
    plan: list[Scheduled], scheduler: Scheduler, speculation: Speculation | None, seconds: float
) -> MultiStep | None:
    """What the plan's sequences, all of them, may do without being asked, with the blocks for it given to them; None
    where one of them has more than a token to compute, or is not sure to take its likeliest word."""
    steps = _MOST if speculation is None else min(_MOST, speculation.steps_without(plan))
    ends: set[int] = set()
    for work in plan:
        sequence = work.sequence
        if work.count > 1 or not work.num_scored or sequence.gang or not chooses_best(sequence):
            return None
        if sequence.sampling.prompt_logprobs is not None and work.start < sequence.num_prompt:
            return None  # a prompt of one token, or the last of it, whose hidden state is asked for
        steps = min(steps, sequence.max_tokens - sequence.num_output)
        ends |= sequence.eos_token_ids
        ends.update(sequence.sampling.stop_token_ids)
    steps = scheduler.reserve_steps([work.sequence for work in plan], steps)
    if len(plan) > _FEW:
        seconds *= 3
    return MultiStep(max(steps, 1), seconds, tuple(ends))
