"""Speculative decoding: guess the next tokens cheaply, verify all guesses in one step, keep the true ones.

    plan       [ x ]            one decoding sequence's last token x, as the scheduler planned it
    extend     [ x d1 d2 d3 ]   a proposer's drafts behind it: the step computes 4 rows instead of 1
    verify       t1 t2 t3 t4    the token chosen after each row; t1 = d1, t2 = d2, t3 != d3: t1 t2 t3 are kept

A step's time is spent on reading the weights, so few more rows cost little. A row's token is chosen exactly as without
drafts (same processed distribution, same random number), and is used only if all drafts before it were the tokens
chosen. So whatever a proposer says, the answer is the one that would have been given without it: the rejection sampling
of arXiv:2211.17192 and arXiv:2302.01318 for a proposal q that puts all its mass on the draft d. They accept d with
probability min(1, p(d) / q(d)) = p(d), else draw from (p - q)+ = p without d, renormalised; drawing t from p and
comparing it with d is the same: P(t = d) = p(d), and P(t | t != d) = p(t) / (1 - p(d)).

Proposers: `NgramProposer` (below; as in arXiv:2304.04487 and prompt lookup decoding) and `DraftModelProposer`
(drafting.py). `Speculation` decides how many drafts a sequence may have, by counting which were true. No torch here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

from bimo.engine.scheduler import Scheduled
from bimo.engine.sequence import Sequence

__all__ = ["NgramIndex", "NgramProposer", "Pace", "Proposer", "Reserve", "Speculation", "divide"]

ROW_PRICE = 0.08  # of one more row, in steps of one: measured 4 rows 1.1-1.3, 8 rows 1.35-1.45, 16 rows 1.8-2.4
FIRST_WIDTH, MAX_WIDTH = 3, 15  # drafts of a sequence: 4, 8 and 16 rows with its last token
MAX_LOSS = 0.01  # of the time, for a text whose drafts never come true
NOTHING_FOUND = 4  # steps until drafts are looked for again; a copy that begins meanwhile goes on for longer
_CANDIDATES = 8  # earlier places compared; 1 finds a tenth less, 64 nothing more
_LONGEST = 32  # tokens compared at each

Reserve = Callable[[Sequence, int], int]  # Scheduler.reserve: asked for room for drafts, says for how many


class Proposer(Protocol):
    """Where drafts come from. A wrong one costs time, never a wrong answer."""

    price: float  # of one draft, verification included, in steps of one row

    def propose(self, wishes: dict[Sequence, int], room: int, reserve: Reserve) -> dict[Sequence, list[int]]:
        """Up to `wishes[s]` tokens that may follow s, `room` in all; not more for each than `reserve` gave."""
        ...


def divide(wishes: dict[Sequence, int], room: int) -> dict[Sequence, int]:
    """Share `room` evenly; what one does not need goes to the others. Nobody who gets nothing is in the result."""
    shares = {}
    by_size = sorted(wishes, key=wishes.__getitem__)
    for place, sequence in enumerate(by_size):
        share = min(wishes[sequence], room // (len(by_size) - place))
        if share > 0:
            shares[sequence] = share
            room -= share
    return shares


class NgramIndex:
    """Where each pair of tokens of a growing list occurred: each place points to the pair's place before it.

    A token costs one insertion, a question at most _CANDIDATES * _LONGEST comparisons, however long the list.
    """

    __slots__ = ("_before", "_last", "_token_ids")

    def __init__(self, token_ids: list[int]) -> None:
        """Keeps the list itself and reads what was appended when asked."""
        self._token_ids = token_ids
        self._last: dict[int, int] = {}  # pair -> where it ended last
        self._before: list[int] = []  # for each place: where the pair that ends there ended before, or -1

    def continuation(self, count: int) -> list[int]:
        """The `count` tokens that followed the longest earlier occurrence of the list's end (of equals the latest).

        At least two tokens must agree; [] otherwise. An occurrence so near that it runs into the end is a loop, and
        goes on as one.
        """
        ids = self._token_ids
        self._update()
        end, best, most = len(ids) - 1, -1, 0
        place = self._before[end]
        for _ in range(_CANDIDATES):
            if place < 0:
                break
            length = 2
            while length < _LONGEST and length <= place and ids[place - length] == ids[end - length]:
                length += 1
            if length > most:
                best, most = place, length
            place = self._before[place]
        if best < 0:
            return []
        found = ids[best + 1 : best + 1 + count]
        period = end - best
        while len(found) < count:
            found.append(found[-period])
        return found

    def _update(self) -> None:
        ids, last, before = self._token_ids, self._last, self._before
        previous = ids[len(before) - 1] if before else -1
        for place in range(len(before), len(ids)):
            token = ids[place]
            pair = (previous << 32) | token
            before.append(last.get(pair, -1))
            last[pair] = place
            previous = token


class NgramProposer:
    """Drafts copied from the sequence itself: what followed the same words before, in the prompt or in the answer.
    Summaries, corrections, code edits and answers from documents repeat their prompt; loops repeat themselves."""

    price = ROW_PRICE

    def propose(self, wishes: dict[Sequence, int], room: int, reserve: Reserve) -> dict[Sequence, list[int]]:
        found: dict[Sequence, list[int]] = {}
        for sequence, count in wishes.items():
            if sequence.ngrams is None:
                sequence.ngrams = NgramIndex(sequence.token_ids)
            if drafts := sequence.ngrams.continuation(count):
                found[sequence] = drafts
        shares = divide({sequence: len(drafts) for sequence, drafts in found.items()}, room)
        return {sequence: found[sequence][: reserve(sequence, count)] for sequence, count in shares.items()}


@dataclass(slots=True)
class Pace:
    """How many drafts one sequence may have: more while all come true, none for a while when they do not pay.

    A draft pays when more tokens come true than it costs. After a failure comes a pause and then a single draft as a
    probe; pauses double up to the one at which failing always costs MAX_LOSS.
    """

    price: float
    width: int = FIRST_WIDTH
    rest: int = 0  # steps to go without drafts
    next_rest: int = 1

    def wish(self) -> int:
        """Drafts for the step that is being planned."""
        if self.rest:
            self.rest -= 1
            return 0
        return self.width

    def note(self, drafted: int, accepted: int) -> None:
        """Learn from a verified draft."""
        if accepted == drafted:
            self.width = max(self.width, min(2 * drafted + 1, MAX_WIDTH))
            self.next_rest = 1
        elif accepted > self.price * drafted:
            self.width = max(min(FIRST_WIDTH, self.width), self.width // 2)
            if 2 * accepted >= drafted:
                self.next_rest = 1
        else:
            self.width = 1
            self.rest = self.next_rest
            self.next_rest = min(2 * self.next_rest, round(self.price / MAX_LOSS))


class Speculation:
    """Puts drafts into plans, with as many rows as cost little; learns for each sequence whether they pay."""

    def __init__(self, proposer: Proposer, reserve: Reserve, max_rows: int) -> None:
        """A lone sequence's steps are filled up to `max_rows` tokens, those of several up to half as many: beyond the
        knee of the cost (8 rows), a draft pays only if it is as good as certain, as in a copy that goes on and on."""
        self.proposer, self.reserve, self.max_rows = proposer, reserve, max_rows

    def steps_without(self, plan: list[Scheduled]) -> int:
        """For how many steps no drafts would be made, this one counted in, now that `extend` has made none."""
        paces = [work.sequence.pace for work in plan if work.sequence.pace is not None]
        if len(plan) > self.max_rows // 2 or not paces:
            return 1 << 30
        return min(pace.rest + 1 if pace.rest else NOTHING_FOUND for pace in paces)

    def skip(self, plan: list[Scheduled], steps: int) -> None:
        """So many steps were taken without asking for drafts, but for the first."""
        for work in plan:
            if work.sequence.pace is not None:
                work.sequence.pace.rest = max(0, work.sequence.pace.rest - (steps - 1))

    def extend(self, plan: list[Scheduled]) -> list[Scheduled]:
        """The plan, with drafts for sequences that are decoding."""
        room = (self.max_rows if len(plan) == 1 else self.max_rows // 2) - sum(work.count for work in plan)
        if room <= 0:
            return plan
        wishes: dict[Sequence, int] = {}
        for work in plan:
            sequence = work.sequence
            if work.count > 1 or not work.num_scored or sequence.gang:
                continue
            if sequence.pace is None:
                sequence.pace = Pace(self.proposer.price)
            # the row after the last draft gives a token too
            if count := min(sequence.pace.wish(), room, sequence.max_tokens - sequence.num_output - 1):
                wishes[sequence] = count
        found = self.proposer.propose(wishes, room, self.reserve) if wishes else {}
        return [_with_drafts(work, found[work.sequence]) if found.get(work.sequence) else work for work in plan]


def _with_drafts(work: Scheduled, drafts: list[int]) -> Scheduled:
    return replace(work, count=work.count + len(drafts), drafts=tuple(drafts))
