"""From a step's logits to each sequence's next tokens: one, or several where drafts turn out to be true.

    logits of a sequence with drafts d1 d2 d3, one row after x, d1, d2 and d3 each:
    row 0 -> t1 = d1    row 1 -> t2 = d2    row 2 -> t3 != d3    row 3 stands on a wrong token: not used
    tokens: t1 t2 t3

Rows may be processed together only where they do not depend on the token that came from the row before: penalties,
min_tokens and constraints do, and their sequences take one row after the other, as long as their drafts are true.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from bimo.engine.request import TokenLogprob
from bimo.engine.runner import StepResult
from bimo.engine.sampling import choose_tokens, depends_on_output, keeps_best, process_logits, token_logprobs
from bimo.engine.sequence import Sequence

__all__ = ["Turn", "choose", "turns_of"]


@dataclass(eq=False, slots=True)
class Turn:
    """One sequence's part of a step."""

    sequence: Sequence
    row: int  # the next row of logits
    drafts: tuple[int, ...]  # what the rows after the first stand on
    tokens: list[int] = field(default_factory=list)  # appended to the sequence so far
    text: str = ""  # to show for them
    chosen: list[int] = field(default_factory=list)  # to be appended now
    logprobs: list[TokenLogprob] = field(default_factory=list)  # of `chosen`, where the request wants them
    guessed: bool = True  # the drafts; if not, they are the model's own words
    done: bool = False  # after `chosen` no row of this step is of use

    @property
    def num_accepted(self) -> int:
        """Drafts that were the tokens chosen."""
        return sum(token == draft for token, draft in zip(self.tokens, self.drafts, strict=False))


def turns_of(result: StepResult) -> list[Turn]:
    """The turns of all sequences of a step that are not part of a search."""
    first_rows = result.first_rows
    drafted = zip(result.sequences, result.drafts, strict=True)
    return [
        Turn(sequence, first_rows[sequence], drafts, guessed=result.guessed)
        for sequence, drafts in drafted
        if sequence.gang is None
    ]


def choose(turns: list[Turn], logits: NDArray[np.float32], best: list[int] | None = None) -> None:
    """Set each turn's `chosen`: the tokens of as many rows as can be processed now, up to the first that is not the
    draft the next row stands on. logits: (R, V) of the whole step, not yet processed; best: each row's likeliest word,
    where it is known."""
    widths = [_width(turn) if turn.drafts else 1 for turn in turns]
    owners = [turn.sequence for turn, width in zip(turns, widths, strict=True) for _ in range(width)]
    if len(owners) < len(logits):
        rows = [turn.row + i for turn, width in zip(turns, widths, strict=True) for i in range(width)]
        logits, best = logits[rows], [best[row] for row in rows] if best else None
    draws = None
    if len(owners) > len(turns):  # several rows of one sequence: not all will be used
        draws = [0.0 if owner.sampling.greedy else owner.draw() for owner in owners]
    tokens = [-1] * len(owners) if best is None else list(best)
    open_rows = [i for i, owner in enumerate(owners) if best is None or not keeps_best(owner, best[i])]
    if open_rows:
        part = [owners[i] for i in open_rows]
        scores = process_logits(logits[open_rows] if len(part) < len(owners) else logits, part)
        chosen = choose_tokens(scores, part, None if draws is None else [draws[i] for i in open_rows])
        for i, token in zip(open_rows, chosen, strict=True):
            tokens[i] = token
    first = 0
    scored: list[tuple[Turn, int]] = []  # with rows whose log-probabilities are wanted
    for turn, width in zip(turns, widths, strict=True):
        used = _num_used(turn, tokens[first : first + width]) if turn.drafts else 1
        end = first + used
        turn.row += used
        turn.chosen = tokens[first:end]
        num_tokens = len(turn.tokens) + used
        turn.done = num_tokens > len(turn.drafts) or turn.chosen[-1] != turn.drafts[num_tokens - 1]
        p = turn.sequence.sampling
        if used < width and not p.greedy:
            assert draws is not None
            turn.sequence.unused_draws[:0] = draws[end : first + width]
        if p.logprobs is not None or p.best_of:
            turn.logprobs = []
            scored += [(turn, row) for row in range(first, end)]
        first += width
    if scored:
        rows = [row for _, row in scored]
        tops = [turn.sequence.sampling.logprobs or 0 for turn, _ in scored]
        found = token_logprobs(logits[rows], [tokens[row] for row in rows], tops)
        for (turn, _), logprob in zip(scored, found, strict=True):
            turn.logprobs.append(logprob)


def _width(turn: Turn) -> int:
    """Rows that can be processed now."""
    return 1 if depends_on_output(turn.sequence) else 1 + len(turn.drafts) - len(turn.tokens)


def _num_used(turn: Turn, tokens: list[int]) -> int:
    """How many of the tokens chosen from a turn's next rows stand on true drafts."""
    drafts = turn.drafts[len(turn.tokens) :]
    used = 1
    while used < len(tokens) and tokens[used - 1] == drafts[used - 1]:
        used += 1
    return used
