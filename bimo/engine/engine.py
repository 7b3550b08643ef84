"""The generator of tokens: requests in, increments of text out, one step at a time.

    engine = Engine(ModelRunner(model, num_blocks=512, block_size=16), tokenizer, EngineConfig(context_length=8192))
    engine.add(Request(prompt_token_ids=ids, sampling=SamplingParams(max_tokens=20)))
    while engine.has_work:
        for output in engine.step():
            print(output.text, end="")

Single-threaded and synchronous on purpose: threads and asyncio are the backend's business (backends.local).
"""

from __future__ import annotations

import random
import secrets
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from bimo.engine.admission import Limits
from bimo.engine.cache import BlockPool
from bimo.engine.drafting import DraftModelProposer
from bimo.engine.fused import FusedDecoder
from bimo.engine.multistep import several_steps
from bimo.engine.request import FinishReason, Output, Request, TokenLogprob, Usage
from bimo.engine.runner import ModelRunner, StepResult
from bimo.engine.sampling import token_logprobs
from bimo.engine.scheduler import Scheduled, Scheduler
from bimo.engine.search import BeamSearch, Child, ContrastiveSearch, Hypothesis
from bimo.engine.sequence import Gang, Sequence, Source
from bimo.engine.speculation import NgramProposer, Speculation
from bimo.engine.stopping import finish_text, stop_reason_of, update_after_token, would_end
from bimo.engine.verify import Turn, choose, turns_of
from bimo.errors import UsageError
from bimo.tokenizer.load import Tokenizer
from bimo.tokenizer.stream import TextStream

if TYPE_CHECKING:
    from bimo.models.decoder import Decoder

__all__ = ["Engine", "EngineConfig", "EngineStats"]

_SCORED_AT_ONCE = 64  # prompt positions; a vocabulary of 49,152 in float32 takes 12 MB for them


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Limits of one engine; all numbers count tokens, except max_batch, which counts sequences."""

    context_length: int  # prompt and answer together
    max_batch: int = 64
    max_step_tokens: int = 512  # larger: faster prefill, longer pauses for those who are streaming
    max_prefill_tokens: int = 1024  # the same while nobody is streaming
    speculation: Literal["ngram", "off"] = "ngram"  # drafts from the text so far; a draft model takes its place
    stream_interval: float = 0.03  # seconds; greedy answers may come in pieces that took so long (see multistep.py)
    first_token_id: int | None = None  # every answer begins with it (forced_bos_token_id)
    banned_token_ids: tuple[int, ...] = ()  # no answer has them
    max_draft_rows: int = 16  # a lone sequence's step is filled with drafts up to so many tokens, others up to half

    def __post_init__(self) -> None:
        if self.speculation not in ("ngram", "off"):
            raise UsageError(f'speculation is "ngram" or "off", not {self.speculation!r}', "speculation")


@dataclass(slots=True)
class EngineStats:
    """Counters since the start."""

    steps: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generation_tokens: int = 0
    drafted_tokens: int = 0  # verified in a step of their own sequence
    accepted_tokens: int = 0  # of these, found true


@dataclass(eq=False, slots=True)
class _Live:
    """A request being worked on."""

    request: Request
    sequences: list[Sequence]
    truncated: int
    num_done: int = 0
    completion_tokens: int = 0
    held: list[Sequence] = field(default_factory=list)  # best_of: finished, to be ranked at the end


class Engine:
    """Requests, their sequences, the scheduler and the runner."""

    def __init__(
        self,
        runner: ModelRunner,
        tokenizer: Tokenizer,
        config: EngineConfig,
        draft_model: Decoder | FusedDecoder | None = None,
    ) -> None:
        """`draft_model` is a smaller decoder of the same vocabulary (see drafting.py), to be used for speculation."""
        self.runner, self.tokenizer, self.config = runner, tokenizer, config
        self.pool = BlockPool(runner.cache.num_blocks, runner.cache.block_size)
        self.scheduler = Scheduler(
            self.pool,
            max_batch=config.max_batch,
            max_step_tokens=config.max_step_tokens,
            max_prefill_tokens=config.max_prefill_tokens,
        )
        self.speculation: Speculation | None = None
        if config.speculation != "off" and runner.model.can_speculate:
            proposer = DraftModelProposer(draft_model, runner) if draft_model else NgramProposer()
            max_rows = min(config.max_draft_rows, config.max_step_tokens)
            self.speculation = Speculation(proposer, self.scheduler.reserve, max_rows)
        elif draft_model:
            raise UsageError(
                "a draft model has no effect while speculation is off: leave one of them out", "speculation"
            )
        self.start_token_id: int | None = runner.model.start_token_id
        reads_source = self.start_token_id is not None
        # A lone sequence must always fit, or it would wait for ever; beside a source at least a block of it.
        num_tokens = (self.pool.num_blocks - reads_source) * self.pool.block_size
        self.context_length = min(config.context_length, num_tokens)
        self.limits = Limits(
            context_length=self.context_length,
            vocab_size=runner.model.config.vocab_size,
            max_batch=config.max_batch,
            num_blocks=self.pool.num_blocks,
            block_size=self.pool.block_size,
            reads_source=reads_source,
            adapters=runner.model.adapters,
        )
        self.stats = EngineStats()
        self._live: dict[str, _Live] = {}
        self._copies: list[tuple[int, int]] = []
        self._arrivals = 0

    @property
    def has_work(self) -> bool:
        """Whether `step` would do anything."""
        return bool(self._live)

    def check(self, request: Request) -> tuple[list[int], int, int]:
        """The prompt as it fits, the tokens cut off its front, and the room for new ones. Changes nothing, so any
        thread may call it. Raises ContextLengthError or UsageError."""
        return self.limits.check(request)

    def add(self, request: Request) -> None:
        """Queue a request. Raises ContextLengthError or UsageError; nothing is queued then."""
        prompt, truncated, max_tokens = self.check(request)
        if request.request_id in self._live:
            raise UsageError(f"request id {request.request_id!r} is in use", "request_id")
        sampling = request.sampling
        base_seed = sampling.seed if sampling.seed is not None else secrets.randbits(63)
        search = sampling.num_beams > 1 or sampling.penalty_alpha > 0
        count = 1 if search else sampling.best_of or sampling.n
        source = None
        if self.start_token_id is not None:
            source, prompt = Source(prompt), [self.start_token_id]
            self.stats.prompt_tokens += len(source.token_ids)
        sequences: list[Sequence] = []
        for index in range(count):
            self._arrivals += 1
            sequence = Sequence(
                request=request,
                index=index,
                arrival=self._arrivals,
                token_ids=list(prompt),
                num_prompt=len(prompt),
                source=source,
                max_tokens=max_tokens,
                adapter=self.limits.adapters.index(request.adapter) + 1 if request.adapter else 0,
                forced_token_id=self.config.first_token_id,
                banned_token_ids=self.config.banned_token_ids,
                eos_token_ids=frozenset() if sampling.ignore_eos else frozenset(self.tokenizer.eos_token_ids),
                leader=sequences[0] if sequences else None,
                text=TextStream(self.tokenizer, sampling.stop, sampling.include_stop, sampling.min_tokens),
                constraint=request.constraint() if request.constraint else None,
                rng=random.Random(base_seed + index),
            )
            sequences.append(sequence)
        if search:
            sequences[0].gang = self._gang(sequences[0])
        self._live[request.request_id] = _Live(request, sequences, truncated)
        for sequence in sequences:
            self.scheduler.add(sequence)

    def abort(self, request_id: str) -> list[Output]:
        """Stop a request; its unfinished sequences end with reason "abort". Unknown ids are ignored."""
        live = self._live.get(request_id)
        return self._end(live, "abort") if live else []

    def refuse(self, request: Request, message: str) -> list[Output]:
        """The outputs of a request that could not be started."""
        usage = Usage(len(request.prompt_token_ids), 0)
        return [
            Output(request.request_id, i, finish_reason="error", error=message, usage=usage if i == n - 1 else None)
            for n in [request.sampling.n]
            for i in range(n)
        ]

    def fail(self, message: str) -> list[Output]:
        """End everything with reason "error"; for a backend whose step raised."""
        outputs = []
        for live in list(self._live.values()):
            outputs += self._end(live, "error", message)
        self._copies.clear()
        return outputs

    def step(self) -> list[Output]:
        """Compute one batch and return what became known. The engine's whole life is this method."""
        plan = self.scheduler.schedule()
        if self.speculation:
            plan = self.speculation.extend(plan)
        more = None
        if self.runner.model.can_go_on and self.config.stream_interval > 0:
            more = several_steps(plan, self.scheduler, self.speculation, self.config.stream_interval)
        result = self.runner.run(plan, self._copies, more)
        self._copies = []
        self.scheduler.complete(plan)
        if more and self.speculation:
            self.speculation.skip(plan, result.steps)
        self.stats.steps += result.steps
        self._note_prompts(plan, result)
        return self._sample(result) + self._advance_gangs(result)

    def interrupt(self) -> None:
        """From another thread: a `step` that would take several of the model's ends after the one it is at."""
        self.runner.model.interrupt()

    def settle(self) -> None:
        """Do what the start left for a quiet moment."""
        self.runner.model.settle()

    def check_integrity(self) -> None:
        """Assert the invariants of engine, scheduler and cache; tests call it after every step."""
        self.scheduler.check_integrity()
        queued = set(self.scheduler.running) | set(self.scheduler.waiting)
        expected = set()
        for live in self._live.values():
            for sequence in live.sequences:
                if sequence.finish_reason is None:
                    expected |= set(sequence.gang.members) if sequence.gang else {sequence}
        assert queued == expected, "queues differ from live requests"

    # -- adding ------------------------------------------------------------------------------------------------------

    def _gang(self, root: Sequence) -> Gang:
        sampling = root.sampling

        def ending(sequence: Sequence, token: int) -> FinishReason | None:
            return would_end(sequence, token, self.tokenizer)

        if sampling.num_beams > 1:
            num_ends = len(root.eos_token_ids | set(sampling.stop_token_ids))
            beam = BeamSearch(sampling, num_ends, ending)
            return Gang(sampling.num_beams, beam, [root])
        return Gang(sampling.top_k, ContrastiveSearch(sampling, ending), [root])

    # -- after a step ------------------------------------------------------------------------------------------------

    def _note_prompts(self, plan: list[Scheduled], result: StepResult) -> None:
        """Count prompt tokens, and keep prompt log-probabilities for those who asked."""
        for work in plan:
            sequence = work.sequence
            if sequence.source is None:
                self.stats.prompt_tokens += max(0, min(work.start + work.count, sequence.num_prompt) - work.start)
            if work.start == sequence.num_cached and sequence.num_output == 0:
                self.stats.cached_tokens += sequence.num_cached
            rows = result.prompt_hidden.get(sequence)
            if rows is None:
                continue
            if not sequence.prompt_logprobs:
                sequence.prompt_logprobs.append(None)  # nothing predicts the first token
            done = len(sequence.prompt_logprobs)  # position whose log-probability is next
            last = min(work.start + work.count, sequence.num_prompt - 1)
            targets = sequence.token_ids[done : last + 1]  # row i predicts token i + 1; recomputed rows are skipped
            rows = rows[done - 1 - work.start : last - work.start]
            top = sequence.sampling.prompt_logprobs or 0
            for start in range(0, len(targets), _SCORED_AT_ONCE):
                part = targets[start : start + _SCORED_AT_ONCE]
                logits = self.runner.logits(rows[start : start + _SCORED_AT_ONCE])
                sequence.prompt_logprobs += token_logprobs(logits, part, [top] * len(part))

    def _sample(self, result: StepResult) -> list[Output]:
        """Choose the next tokens of every sequence that is not part of a search."""
        outputs: list[Output] = []
        turns = turns_of(result)
        while turns:
            outputs += self._ask_constraints(turns)
            turns = [turn for turn in turns if turn.sequence.finish_reason is None]
            choose(turns, result.logits, result.best)
            for turn in turns:
                if turn.sequence.finish_reason is None:  # else its request failed a moment ago
                    outputs += self._append(turn)
            turns = [turn for turn in turns if not turn.done]
        return outputs

    def _ask_constraints(self, turns: list[Turn]) -> list[Output]:
        """Fetch each constraint's mask; one that fails (a grammar too complex) ends its own request only."""
        outputs: list[Output] = []
        for sequence in [turn.sequence for turn in turns]:
            if sequence.constraint is not None and sequence.finish_reason is None:
                try:
                    sequence.allowed_mask = sequence.constraint.allowed_mask()
                except Exception as error:
                    outputs += self._end(self._live[sequence.request.request_id], "error", str(error))
        return outputs

    def _append(self, turn: Turn) -> list[Output]:
        """Append a turn's tokens, up to the one that ends the sequence; what there is to show when the turn is done."""
        sequence = turn.sequence
        for i, token in enumerate(turn.chosen):
            try:
                turn.text += update_after_token(sequence, token)
            except Exception as error:  # of its constraint
                return self._end(self._live[sequence.request.request_id], "error", str(error))
            turn.tokens.append(token)
            if turn.logprobs:
                sequence.sum_logprobs += turn.logprobs[i].logprob
                sequence.logprobs.append(turn.logprobs[i])
            if sequence.finish_reason is not None:
                turn.done = True
                break
        return self._show(turn) if turn.done else []

    def _show(self, turn: Turn) -> list[Output]:
        sequence, num_tokens = turn.sequence, len(turn.tokens)
        live = self._live[sequence.request.request_id]
        self.stats.generation_tokens += num_tokens
        live.completion_tokens += num_tokens
        if turn.drafts or not turn.guessed:
            self.scheduler.settle(sequence)
        if turn.drafts and turn.guessed:
            self._note_drafts(turn)
        output = Output(live.request.request_id, sequence.index, turn.text, turn.tokens)
        if sequence.sampling.logprobs is not None:
            output.logprobs = sequence.logprobs[-num_tokens:]
        if sequence.num_output == num_tokens and sequence.prompt_logprobs:
            output.prompt_logprobs = sequence.prompt_logprobs
        if sequence.finish_reason is not None:
            self.scheduler.finish(sequence)
            live.num_done += 1
            output.finish_reason, output.stop_reason = sequence.finish_reason, sequence.stop_reason
        if live.request.sampling.best_of is not None:
            live.held += [sequence] if sequence.finish_reason else []
            return self._rank(live) if live.num_done == len(live.sequences) else []
        if live.num_done == len(live.sequences):
            output.usage = self._close(live)
        return [output]

    def _note_drafts(self, turn: Turn) -> None:
        assert turn.sequence.pace is not None
        turn.sequence.pace.note(len(turn.drafts), turn.num_accepted)
        self.stats.drafted_tokens += len(turn.drafts)
        self.stats.accepted_tokens += turn.num_accepted

    def _rank(self, live: _Live) -> list[Output]:
        """best_of: the n sequences of highest mean log-probability, renumbered from the best."""
        ranked = sorted(live.held, key=lambda s: s.sum_logprobs / s.num_output, reverse=True)
        best = ranked[: live.request.sampling.n]
        usage = self._close(live)
        return [self._whole(s, i, usage if i == len(best) - 1 else None) for i, s in enumerate(best)]

    def _whole(self, sequence: Sequence, index: int, usage: Usage | None) -> Output:
        """Everything about a finished sequence in one Output."""
        return Output(
            sequence.request.request_id,
            index,
            finish_text(sequence, self.tokenizer),
            sequence.output_ids,
            sequence.logprobs if sequence.sampling.logprobs is not None else None,
            sequence.finish_reason,
            sequence.stop_reason,
            usage,
            sequence.prompt_logprobs or None,
        )

    def _advance_gangs(self, result: StepResult) -> list[Output]:
        outputs: list[Output] = []
        place = result.first_rows
        for gang in {id(s.gang): s.gang for s in result.sequences if s.gang}.values():
            members = gang.members
            rows = [place[m] for m in members]  # the scheduler computes them together
            children = gang.search.advance(members, result.logits[rows], result.hidden[rows])
            self.stats.generation_tokens += len(children)
            if children:
                self._replace_members(gang, children)
            else:
                outputs += self._finish_search(gang)
        return outputs

    def _replace_members(self, gang: Gang, children: list[Child]) -> None:
        """The first child of a parent takes its place; others are forks that share its blocks; a parent without
        children ends. Ends come first, for the blocks they free."""
        kept = {child.parent for child in children}
        for i, member in enumerate(gang.members):
            if i not in kept:
                self.scheduler.finish(member)
        heirs: dict[int, Sequence] = {}
        new: list[tuple[Sequence, int]] = []
        for parent, token in children:
            origin = gang.members[parent]
            sequence = origin
            if parent in heirs:
                sequence = self._clone(origin)
                if copy := self.scheduler.fork(origin, sequence):
                    self._copies.append(copy)
            heirs.setdefault(parent, sequence)
            new.append((sequence, token))
        gang.members = [sequence for sequence, _ in new]
        for sequence, token in new:
            sequence.append(token)

    def _clone(self, origin: Sequence) -> Sequence:
        self._arrivals += 1
        return Sequence(
            request=origin.request,
            index=origin.index,
            arrival=origin.arrival,  # as old as its parent: whoever preempts one preempts the gang
            token_ids=list(origin.token_ids),
            num_prompt=origin.num_prompt,
            source=origin.source,
            max_tokens=origin.max_tokens,
            adapter=origin.adapter,
            forced_token_id=origin.forced_token_id,
            banned_token_ids=origin.banned_token_ids,
            eos_token_ids=origin.eos_token_ids,
            gang=origin.gang,
            num_cached=origin.num_cached,
            output_counts=origin.output_counts.copy(),
            hidden=origin.hidden,
        )

    def _finish_search(self, gang: Gang) -> list[Output]:
        first = gang.members[0]
        live = self._live[first.request.request_id]
        for member in gang.members:
            self.scheduler.finish(member)
        found: list[Hypothesis] = gang.search.finished
        live.completion_tokens = sum(len(h.token_ids) for h in found)
        live.sequences[0].finish_reason = "stop"
        usage = self._close(live)
        outputs = []
        for index, hypothesis in enumerate(found):
            sequence = self._clone(first)
            sequence.token_ids = [*first.token_ids[: first.num_prompt], *hypothesis.token_ids]
            sequence.logprobs = [
                TokenLogprob(t, p) for t, p in zip(hypothesis.token_ids, hypothesis.token_logprobs, strict=True)
            ]
            sequence.finish_reason = hypothesis.finish_reason
            sequence.stop_reason = stop_reason_of(sequence)
            outputs.append(self._whole(sequence, index, usage if index == len(found) - 1 else None))
        return outputs

    def _end(self, live: _Live, reason: FinishReason, message: str | None = None) -> list[Output]:
        """End what is unfinished of a request: one last Output for each of the n that had none."""
        for sequence in live.sequences:
            if sequence.finish_reason is None:
                for member in list(sequence.gang.members) if sequence.gang else [sequence]:
                    self.scheduler.finish(member)
        told: set[int] = set()
        if len(live.sequences) == live.request.sampling.n and live.request.sampling.best_of is None:
            told = {s.index for s in live.sequences if s.finish_reason is not None}
        for sequence in live.sequences:
            sequence.finish_reason = sequence.finish_reason or reason
        untold = [i for i in range(live.request.sampling.n) if i not in told]
        outputs = [Output(live.request.request_id, i, finish_reason=reason, error=message) for i in untold]
        outputs[-1].usage = self._close(live)
        return outputs

    def _close(self, live: _Live) -> Usage:
        del self._live[live.request.request_id]
        first = live.sequences[0]
        num_prompt = len(first.source.token_ids) if first.source else first.num_prompt
        return Usage(num_prompt, live.completion_tokens, first.num_cached, live.truncated)
