"""Searches: strategies that keep several sequences of one request alive and choose among them together.

The engine computes all `members` of a gang in one step, then asks the search to `advance`: it answers with the next
members, each as (parent's place, token). The engine forks, shares and frees cache blocks accordingly.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from bimo.engine.request import FinishReason, SamplingParams
from bimo.engine.sampling import best_ids, log_softmax, process_logits
from bimo.engine.sequence import Sequence

__all__ = ["BeamSearch", "Child", "ContrastiveSearch", "Hypothesis", "Search"]

Array = NDArray[np.float32]
Ending = Callable[[Sequence, int], FinishReason | None]  # would this token, appended now, end the sequence?


class Child(NamedTuple):
    """The next step's member: members[parent] continued by `token`."""

    parent: int
    token: int


class Hypothesis(NamedTuple):
    """A finished answer. Higher scores are better."""

    score: float
    token_ids: list[int]
    token_logprobs: list[float]
    finish_reason: FinishReason


class Search(Protocol):
    """One request's search. `finished` holds the results once `advance` returns []."""

    @property
    def finished(self) -> list[Hypothesis]: ...

    def advance(self, members: list[Sequence], logits: Array, hidden: Array) -> list[Child]:
        """members (m), their raw logits (m, V) and last hidden states (m, D) -> the next members, or [] at the end."""


@dataclass
class _Group:
    """One group of diverse beam search (plain beam search has one)."""

    scores: list[float]  # of the running beams, sums of log-probabilities
    finished: list[Hypothesis] = field(default_factory=list)
    done: bool = False


class BeamSearch:
    """Beam search with length penalty (score = sum of log-probabilities / length ** length_penalty), with the same
    stopping rules as transformers; with groups, diverse beam search (arXiv:1610.02424): each group avoids the words
    that earlier groups chose in the same step, at `diversity_penalty` a time."""

    def __init__(self, sampling: SamplingParams, num_ends: int, ending: Ending) -> None:
        self.sampling, self.ending = sampling, ending
        self.size = sampling.num_beams // sampling.num_beam_groups
        # So many candidates that enough remain even if every end token is among the best of every beam.
        self.num_candidates = max(2, 1 + num_ends) * self.size
        self.groups = [_Group([0.0]) for _ in range(sampling.num_beam_groups)]
        self.member_logprobs: list[list[float]] = [[]]
        self.places: list[list[int]] = [[0] for _ in self.groups]  # each group's members

    @property
    def finished(self) -> list[Hypothesis]:
        """Best first, n of them."""
        found = sorted((h for g in self.groups for h in g.finished), key=lambda h: h.score, reverse=True)
        return found[: self.sampling.n]

    def advance(self, members: list[Sequence], logits: Array, hidden: Array) -> list[Child]:
        log_probs = process_logits(log_softmax(logits), members)
        length = members[0].num_output + 1
        children: list[Child] = []
        logprobs: list[list[float]] = []
        chosen: Counter[int] = Counter()
        for number, group in enumerate(self.groups):
            running = []
            if not group.done:
                picks = self._candidates(group, self.places[number], log_probs, chosen)
                running = self._split(group, members, picks, length)
                group.done = self._is_done(group, [score for score, _, _ in running], length)
            if group.done:
                self.places[number] = []
                continue
            group.scores = [score for score, _, _ in running]
            self.places[number] = list(range(len(children), len(children) + len(running)))
            for _, parent, token in running:
                chosen[token] += 1
                children.append(Child(parent, token))
                logprobs.append([*self.member_logprobs[parent], float(log_probs[parent, token])])
        self.member_logprobs = logprobs
        return children

    def _candidates(
        self, group: _Group, places: list[int], log_probs: Array, chosen: Counter[int]
    ) -> list[tuple[float, int, int, float]]:
        """The best (score, parent, token, log-probability) over the group's beams, best first."""
        rows = log_probs[places]
        if chosen and self.sampling.diversity_penalty:
            rows[:, list(chosen)] -= self.sampling.diversity_penalty * np.array(list(chosen.values()), rows.dtype)
        scores = (rows + np.array(group.scores, rows.dtype)[:, None]).reshape(-1)
        picks = []
        for place in best_ids(scores, self.num_candidates).tolist():
            score, (row, token) = float(scores[place]), divmod(place, rows.shape[1])
            if score > -np.inf:
                picks.append((score, places[row], token, float(log_probs[places[row], token])))
        return picks

    def _split(
        self, group: _Group, members: list[Sequence], picks: list[tuple[float, int, int, float]], length: int
    ) -> list[tuple[float, int, int]]:
        """Candidates that end go to `finished` (only from the best `size`); the best others run on."""
        running = []
        for rank, (score, parent, token, logprob) in enumerate(picks):
            reason = self.ending(members[parent], token)
            if reason is None:
                running.append((score, parent, token))
            elif rank < self.size:
                group.finished.append(
                    Hypothesis(
                        score / length**self.sampling.length_penalty,
                        [*members[parent].output_ids, token],
                        [*self.member_logprobs[parent], logprob],
                        reason,
                    )
                )
        group.finished.sort(key=lambda h: h.score, reverse=True)
        del group.finished[self.size :]
        return running[: self.size]

    def _is_done(self, group: _Group, running_scores: list[float], length: int) -> bool:
        """Stop when nothing runs, when enough are finished (early_stopping), or when none can still win."""
        if not running_scores:
            return True
        if len(group.finished) < self.size:
            return False
        best_possible = running_scores[0] / length**self.sampling.length_penalty
        return self.sampling.early_stopping or best_possible <= group.finished[-1].score


class ContrastiveSearch:
    """Contrastive search (arXiv:2202.06417): of the k most likely tokens take the one with the best
    (1 - alpha) * probability - alpha * (greatest cosine similarity of its hidden state with any earlier one)."""

    def __init__(self, sampling: SamplingParams, ending: Ending) -> None:
        self.sampling, self.ending = sampling, ending
        self._found: list[Hypothesis] = []
        self.probabilities: Array | None = None  # of the candidates being computed
        self.logprobs: list[float] = []

    @property
    def finished(self) -> list[Hypothesis]:
        """The one answer, once there is one."""
        return self._found

    def advance(self, members: list[Sequence], logits: Array, hidden: Array) -> list[Child]:
        best = 0
        if self.probabilities is not None:
            best = self._choose(members, hidden)
            self.logprobs.append(float(np.log(self.probabilities[best])))
            if self._ended(members[best]):
                return []
        row = process_logits(logits[best : best + 1], [members[best]])[0]
        tokens = best_ids(row, self.sampling.top_k)
        self.probabilities = np.exp(log_softmax(row[None])[0, tokens])
        return [Child(best, token) for token in tokens.tolist()]

    def _choose(self, members: list[Sequence], hidden: Array) -> int:
        assert self.probabilities is not None
        context = members[0].hidden[:-1]  # the same for all candidates: they differ in the last token only
        penalty = (_directions(hidden) @ _directions(context).T).max(axis=-1)  # over (k, context)
        alpha = self.sampling.penalty_alpha
        return int(((1 - alpha) * self.probabilities - alpha * penalty).argmax())

    def _ended(self, sequence: Sequence) -> bool:
        """The candidate's token is already appended: ask about the sequence before it."""
        token = sequence.token_ids.pop()
        reason = self.ending(sequence, token)
        sequence.token_ids.append(token)
        if reason is not None:
            self._found = [Hypothesis(sum(self.logprobs), sequence.output_ids, self.logprobs, reason)]
        return reason is not None


def _directions(vectors: Array) -> Array:
    """(N, D) -> (N, D) of length 1."""
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)
