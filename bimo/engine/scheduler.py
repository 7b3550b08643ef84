"""Who is computed in the next step: continuous batching, chunked prefill, preemption. Plain Python, no torch.

One step computes at most `max_step_tokens` tokens: first one token of every sequence that is decoding, then, with what
is left, chunks of prompts, oldest first; so a long prompt never stops the others' streams. While nobody streams, steps
may be larger (`max_prefill_tokens`): fewer, longer products and less attention over earlier chunks. When the cache is
full the newest sequence gives its blocks back and starts again later: its tokens are kept, only keys and values are
recomputed.
"""

from __future__ import annotations

from bisect import insort
from dataclasses import dataclass

from bimo.engine.cache import BlockPool, hash_block
from bimo.engine.sequence import Sequence

__all__ = ["Scheduled", "Scheduler"]


def _arrival(sequence: Sequence) -> int:
    return sequence.arrival


@dataclass(frozen=True, slots=True)
class Scheduled:
    """Compute tokens [start, start + count) of a sequence in this step; the last of them may be `drafts`."""

    sequence: Sequence
    start: int
    count: int
    drafts: tuple[int, ...] = ()  # guesses at the tokens after the sequence's own (see speculation.py)

    @property
    def token_ids(self) -> list[int]:
        """The tokens to compute."""
        own = self.sequence.token_ids[self.start : self.start + self.count]
        return own + list(self.drafts) if self.drafts else own

    @property
    def num_scored(self) -> int:
        """Rows after which a next token can be chosen: from the sequence's last own token on."""
        end = self.start + self.count
        return max(0, end - max(self.start, len(self.sequence.token_ids) - 1))


class Scheduler:
    """Queues `waiting` and `running`, both in order of arrival: first come, first served, also after preemption."""

    def __init__(
        self, pool: BlockPool, *, max_batch: int, max_step_tokens: int, max_prefill_tokens: int | None = None
    ) -> None:
        assert max_step_tokens >= max_batch, "every decoding sequence must fit into a step"
        self.max_prefill_tokens = max(max_prefill_tokens or 0, max_step_tokens)
        self.pool = pool
        self.max_batch, self.max_step_tokens = max_batch, max_step_tokens
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.num_preemptions = 0

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence."""
        insort(self.waiting, sequence, key=_arrival)

    def schedule(self) -> list[Scheduled]:
        """The next step's work, decoding sequences first. Empty only when nothing is queued."""
        num_waiting = len(self.waiting)
        while not (plan := self._fill_step()):
            if len(self.waiting) < num_waiting:  # a gang became complete: its members can be computed together now
                num_waiting = len(self.waiting)
            elif len(self.running) > 1:
                # Gangs may hold blocks while each waits for one more; the oldest alone always fits (the engine checks).
                self.preempt(max(self.running, key=_arrival))
                num_waiting = len(self.waiting)
            else:
                break
        return plan

    def _fill_step(self) -> list[Scheduled]:
        plan: dict[Sequence, int] = {}  # insertion order: decodes, then prefills
        decodes = [s for s in self.running if s.remaining == 1]
        budget = self.max_step_tokens if decodes else self.max_prefill_tokens
        prefills = [s for s in self.running if s.remaining > 1]
        for sequence in decodes + prefills:
            if sequence in self.running:  # else preempted a moment ago
                budget -= self._plan(sequence, budget, plan)
        self._admit(budget, plan)
        return [Scheduled(s, s.num_computed, n) for s, n in plan.items()]

    def complete(self, plan: list[Scheduled]) -> None:
        """Record that a plan was computed, and name the blocks it filled. Drafts do not count before they are true."""
        for work in plan:
            work.sequence.num_computed = work.start + work.count - len(work.drafts)
            self._name_blocks(work.sequence)

    def reserve(self, sequence: Sequence, count: int) -> int:
        """Give a decoding sequence room for up to `count` drafts behind its last token, from free blocks only; returns
        for how many there is room. Nobody is preempted for a guess."""
        num_tokens = len(sequence.token_ids)
        room = (len(sequence.blocks) + self.pool.num_free) * self.pool.block_size - num_tokens
        count = min(count, room)
        self._grow(sequence, num_tokens + count)
        return count

    def reserve_steps(self, sequences: list[Sequence], steps: int) -> int:
        """Give decoding sequences, all of them, room for `steps` tokens more; returns for how many there is room in
        free blocks, at least for the one that is planned."""
        size = self.pool.block_size
        while steps > 1:
            ends = [len(sequence.token_ids) + steps - 1 for sequence in sequences]
            missing = sum(-(-end // size) - len(s.blocks) for s, end in zip(sequences, ends, strict=True))
            if missing <= self.pool.num_free:
                for sequence, end in zip(sequences, ends, strict=True):
                    self._grow(sequence, end)
                break
            steps -= 1
        return steps

    def settle(self, sequence: Sequence) -> None:
        """After drafts were verified: all tokens but the newest are computed; blocks of refused drafts go back."""
        sequence.num_computed = len(sequence.token_ids) - 1
        sequence.num_drafted = min(sequence.num_drafted, sequence.num_computed)
        self._name_blocks(sequence)
        needed = -(-sequence.num_computed // self.pool.block_size)
        self.pool.release(sequence.blocks[needed:])
        del sequence.blocks[needed:]

    def finish(self, sequence: Sequence) -> None:
        """Remove a sequence from wherever it is and give its blocks back (named ones stay findable)."""
        if sequence in self.running:
            self.running.remove(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)
        self._release(sequence)

    def fork(self, parent: Sequence, child: Sequence) -> tuple[int, int] | None:
        """Let `child` continue from what `parent` has computed. Full blocks are shared; a part-filled last block is
        copied, and (source, destination) is returned for the runner to do it. When no block is free the child starts
        without any (its prefix will be found or recomputed)."""
        size = self.pool.block_size
        num_full = parent.num_computed // size
        copy = None
        if parent.num_computed % size:
            block = self.pool.allocate()
            if block is None:
                self.add(child)
                return None
            copy = (parent.blocks[num_full], block)
        for shared in parent.blocks[:num_full]:
            self.pool.share(shared)
        child.blocks = parent.blocks[:num_full] + ([copy[1]] if copy else [])
        child.block_names = parent.block_names[:num_full]
        child.num_computed, child.admitted = parent.num_computed, True
        self._hold_source(child)
        self.running.append(child)
        return copy

    def preempt(self, sequence: Sequence) -> None:
        """Give back a running sequence's blocks and queue it again; with it goes its whole gang."""
        members = [m for m in (sequence.gang.members if sequence.gang else [sequence]) if m in self.running]
        for member in members:
            self.running.remove(member)
            self._release(member)
            self.add(member)
        self.num_preemptions += 1

    def check_integrity(self) -> None:
        """Assert the invariants; called by tests after every step."""
        live = [*self.running, *self.waiting]
        assert len(set(map(id, live))) == len(live), "a sequence is queued twice"
        sources = {s.source for s in live if s.source is not None}
        self.pool.check_integrity([s.blocks for s in live] + [source.blocks for source in sources])
        for source in sources:
            assert source.holders == {s for s in self.running if s.source is source}, "a source held by the wrong ones"
            assert len(source.blocks) == -(-len(source.token_ids) // self.pool.block_size) * bool(source.holders)
        assert len(self.running) <= self.max_batch, "more running than the batch holds"
        for sequence in self.running:
            assert -(-sequence.num_computed // self.pool.block_size) == len(sequence.blocks), "blocks without tokens"
            assert sequence.num_computed <= len(sequence.blocks) * self.pool.block_size, "computed beyond its blocks"
            assert sequence.num_computed < len(sequence.token_ids), "nothing left to compute, yet running"
            assert len(sequence.block_names) == sequence.num_computed // self.pool.block_size, "names lag behind"
        for sequence in self.waiting:
            assert not sequence.blocks and sequence.num_computed == 0, "waiting with blocks"

    def _plan(self, sequence: Sequence, budget: int, plan: dict[Sequence, int], *, joining: bool = False) -> int:
        """Put a running sequence into the plan, making room by preemption; returns tokens planned."""
        count = self._count(sequence, budget, joining)
        while count > 0 and not self._grow(sequence, sequence.num_computed + count):
            victim = max(self.running, key=_arrival)
            gang = victim.gang.members if victim.gang else [victim]
            self.preempt(victim)
            for member in gang:
                plan.pop(member, None)
            if sequence in gang:
                return 0
        if count > 0:
            plan[sequence] = count
        return max(count, 0)

    def _count(self, sequence: Sequence, budget: int, joining: bool) -> int:
        """Tokens to compute now. A gang's last tokens wait until all members can take that step together; not when the
        last of them is `joining`, since the others were passed over in this step."""
        if sequence.gang and len(sequence.gang.members) > 1:
            together = all(m.remaining == 1 and m in self.running for m in sequence.gang.members)
            if joining or not together:
                return min(sequence.remaining - 1, budget)
        return min(sequence.remaining, budget)

    def _admit(self, budget: int, plan: dict[Sequence, int]) -> None:
        """Move waiting sequences to running while places, tokens and blocks last."""
        for sequence in list(self.waiting):
            if budget <= 0:
                break
            if self._must_wait(sequence):
                continue
            if self._places_taken() + self._places_for(sequence) > self.max_batch:
                break
            if sequence.shares_prefix:
                sequence.blocks, sequence.block_names = self.pool.match(
                    sequence.token_ids, len(sequence.token_ids) - 1, sequence.root
                )
            sequence.num_computed = len(sequence.blocks) * self.pool.block_size
            missing = -(-len(sequence.token_ids) // self.pool.block_size) - len(sequence.blocks)
            missing += self._source_blocks(sequence)
            if missing > self.pool.num_free:  # wait for the whole prompt's room, or it would be preempted at once
                self._release(sequence)
                break
            self.waiting.remove(sequence)
            budget -= self._hold_source(sequence)
            if not sequence.admitted:
                sequence.admitted, sequence.num_cached = True, sequence.num_computed
            self.running.append(sequence)
            self.running.sort(key=_arrival)
            # A source is read at once, however long it is.
            budget -= self._plan(sequence, max(budget, 1), plan, joining=True)

    def _must_wait(self, sequence: Sequence) -> bool:
        """True while another sequence is computing what this one would share."""
        leader = sequence.leader
        if leader and leader.finish_reason is None and leader.num_computed < leader.num_prompt:
            return True
        if sequence.gang:  # back after preemption: one after the other, so that they share their prefix again
            return any(m in self.running and m.remaining > 1 for m in sequence.gang.members)
        return False

    def _places_taken(self) -> int:
        gangs = {id(s.gang): s.gang for s in self.running if s.gang}
        return sum(1 for s in self.running if not s.gang) + sum(g.width for g in gangs.values())

    def _places_for(self, sequence: Sequence) -> int:
        if sequence.gang and any(m in self.running for m in sequence.gang.members):
            return 0  # its gang's places are already counted
        return sequence.width

    def _name_blocks(self, sequence: Sequence) -> None:
        """Make the blocks that were filled findable by what they hold."""
        size = self.pool.block_size
        while (len(sequence.block_names) + 1) * size <= sequence.num_computed:
            index = len(sequence.block_names)
            parent = sequence.block_names[-1] if index else sequence.root
            sequence.block_names.append(hash_block(parent, sequence.token_ids[index * size : (index + 1) * size]))
            self.pool.name(sequence.blocks[index], sequence.block_names[-1])

    def _grow(self, sequence: Sequence, num_tokens: int) -> bool:
        """Give a sequence blocks for `num_tokens`; False (and unchanged) when there are not enough."""
        missing = -(-num_tokens // self.pool.block_size) - len(sequence.blocks)
        if missing > self.pool.num_free:
            return False
        for _ in range(missing):
            block = self.pool.allocate()
            assert block is not None
            sequence.blocks.append(block)
        return True

    def _source_blocks(self, sequence: Sequence) -> int:
        """Blocks that its source would still need."""
        source = sequence.source
        return 0 if source is None or source.holders else -(-len(source.token_ids) // self.pool.block_size)

    def _hold_source(self, sequence: Sequence) -> int:
        """Keep a sequence's source in the cache; returns how many tokens of it are to be read for that."""
        source = sequence.source
        if source is None:
            return 0
        for _ in range(self._source_blocks(sequence)):
            block = self.pool.allocate()
            assert block is not None
            source.blocks.append(block)
        source.holders.add(sequence)
        return 0 if source.encoded or len(source.holders) > 1 else len(source.token_ids)

    def _release(self, sequence: Sequence) -> None:
        source = sequence.source
        if source and sequence in source.holders:
            source.holders.remove(sequence)
            if not source.holders:
                self.pool.release(source.blocks)
                source.blocks, source.encoded = [], False
        self.pool.release(sequence.blocks)
        sequence.blocks, sequence.block_names, sequence.num_computed = [], [], 0
        sequence.hidden = None
        sequence.num_drafted = 0
