"""Drafts from a smaller model of the same vocabulary (arXiv:2211.17192, arXiv:2302.01318): its likeliest tokens.

The draft model's keys and values lie in a cache of the same shape as the engine's and under the same block numbers,
so a sequence's blocks serve both and nothing is allocated twice. It computes a sequence's tokens only once drafts are
wanted for it:

    tokens:  [ computed by the draft model | catching up, some in each step | d1 d2 d3 ]
              0 .. num_drafted-1                                             in the blocks reserved for them
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from bimo.engine.fused import FusedDecoder
from bimo.engine.runner import ModelRunner
from bimo.engine.scheduler import Scheduled
from bimo.engine.sequence import Sequence
from bimo.engine.speculation import ROW_PRICE, Reserve, divide
from bimo.errors import UsageError
from bimo.tokenizer.load import Tokenizer

if TYPE_CHECKING:
    from bimo.models.decoder import Decoder

__all__ = ["DraftModelProposer", "check_vocabularies"]

_CAUGHT_UP_AT_ONCE = 256  # tokens of a step; the streams wait meanwhile


def check_vocabularies(tokenizer: Tokenizer, draft: Tokenizer) -> None:
    """Raise UsageError unless both give the same ids to the same words: a draft is a list of ids."""
    ours, theirs = tokenizer.backend.get_vocab(), draft.backend.get_vocab()
    if ours != theirs:
        different = sum(theirs.get(word) != i for word, i in ours.items()) or len(theirs) - len(ours)
        raise UsageError(
            f"the draft model's vocabulary differs from the model's in {different} of {len(ours)} words: choose a "
            "smaller model of the same family",
            "draft_model",
        )


class DraftModelProposer:
    """Greedy drafts of a small decoder. Its memory: its weights, and a cache of as many tokens as the engine's."""

    def __init__(self, model: Decoder | FusedDecoder, target: ModelRunner) -> None:
        """`model` has the target's vocabulary (see `check_vocabularies`; the number of rows may differ by padding)."""
        self.runner = ModelRunner(model, num_blocks=target.cache.num_blocks, block_size=target.cache.block_size)
        self.num_words = min(model.config.vocab_size, target.model.config.vocab_size)
        self.max_positions = model.config.max_positions
        self.price = ROW_PRICE + model.config.num_parameters / target.model.config.num_parameters
        self._names: dict[int, bytes] = {}  # block -> name of what the draft model computed into it

    def propose(self, wishes: dict[Sequence, int], room: int, reserve: Reserve) -> dict[Sequence, list[int]]:
        drafts: dict[Sequence, list[int]] = {}
        plan: list[Scheduled] = []
        budget = _CAUGHT_UP_AT_ONCE
        wishes = {s: n for s, n in wishes.items() if len(s.token_ids) + n <= self.max_positions}
        for sequence, count in divide(wishes, room).items():
            start = self._num_known(sequence)
            missing = sequence.token_ids[start : start + budget]
            if not missing or max(missing) >= self.num_words:
                continue
            budget -= len(missing)
            plan.append(Scheduled(sequence, start, len(missing)))
            if start + len(missing) == len(sequence.token_ids) and (count := reserve(sequence, count)):
                drafts[sequence] = []
                wishes[sequence] = count
        while plan:
            result = self.runner.run(plan, [])
            self._note(plan)
            plan = []
            if not result.sequences:
                break
            tokens = result.logits[:, : self.num_words].argmax(axis=-1).tolist()
            for sequence, token in zip(result.sequences, tokens, strict=True):
                if sequence not in drafts:
                    continue  # caught up, but there is no room
                drafts[sequence].append(token)
                if len(drafts[sequence]) < wishes[sequence]:
                    place = len(sequence.token_ids) + len(drafts[sequence]) - 1
                    plan.append(Scheduled(sequence, place, 1, (token,)))
        return drafts

    def _num_known(self, sequence: Sequence) -> int:
        """How many of a sequence's tokens the draft model has computed, what others left in shared blocks included."""
        size = self.runner.cache.block_size
        if not sequence.num_drafted:  # new to us, or back after preemption with other blocks
            for block, name in zip(sequence.blocks, sequence.block_names, strict=False):
                if self._names.get(block) != name:
                    break
                sequence.num_drafted += size
        known = sequence.num_drafted // size
        self._names.update(zip(sequence.blocks[:known], sequence.block_names, strict=False))
        return sequence.num_drafted

    def _note(self, plan: list[Scheduled]) -> None:
        """What was computed; blocks written to have no known content until their sequence says so again."""
        size = self.runner.cache.block_size
        for work in plan:
            end = work.start + work.count
            work.sequence.num_drafted = end
            for block in work.sequence.blocks[work.start // size : -(-end // size)]:
                self._names.pop(block, None)
