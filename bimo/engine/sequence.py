"""`Sequence`: the one mutable record of the engine; what is known about one continuation of one request. No torch.

    token_ids:  [ prompt ............ | output ......... ]
                  0 .. num_prompt-1     num_prompt ..
    computed:   [ keys and values in `blocks` | not yet  ]
                  0 .. num_computed-1

The engine creates and ends sequences, the scheduler owns `blocks` and `num_computed`, the sampler appends tokens.
"""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from bimo.engine.cache import hash_block
from bimo.engine.request import Constraint, FinishReason, Request, SamplingParams, TokenLogprob
from bimo.tokenizer.stream import TextStream

if TYPE_CHECKING:
    from bimo.engine.search import Search
    from bimo.engine.speculation import NgramIndex, Pace

__all__ = ["Gang", "Sequence", "Source"]


@dataclass(eq=False, slots=True)
class Source:
    """What an encoder-decoder reads: one a request, shared by all sequences that answer it.

    The scheduler owns `holders` and `blocks`: while anybody runs, the cache holds the keys and values by which the
    decoder looks at the source, one place for each of its tokens; `encoded` says whether they are there.
    """

    token_ids: list[int]
    name: bytes = b""  # of its content; first link in the chain of an answer's block names
    blocks: list[int] = field(default_factory=list)
    encoded: bool = False
    holders: set[Sequence] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.name = hash_block(b"source", self.token_ids)


@dataclass(eq=False, slots=True)
class Gang:
    """Sequences of one search (beam, contrastive) that advance together: `members` are computed in the same step.

    `width` places in the batch are kept free for it from the start.
    """

    width: int
    search: Search
    members: list[Sequence] = field(default_factory=list)


@dataclass(eq=False, slots=True, kw_only=True)
class Sequence:
    """One continuation. Identity matters (eq=False): two may hold the same tokens."""

    request: Request
    index: int
    arrival: int  # order of admission; older sequences are served first and preempted last
    token_ids: list[int]
    num_prompt: int
    source: Source | None = None  # an encoder-decoder's; the prompt is then the token that starts an answer
    max_tokens: int  # output tokens at most, context counted in
    adapter: int = 0  # number of the one it is computed with; 0: the base alone
    eos_token_ids: frozenset[int] = frozenset()
    leader: Sequence | None = None  # same prompt, computed first; this one then finds it in the prefix cache
    gang: Gang | None = None
    text: TextStream | None = None
    constraint: Constraint | None = None
    forced_token_id: int | None = None  # the first new token, whatever the model says
    banned_token_ids: tuple[int, ...] = ()  # never chosen
    rng: random.Random = field(default_factory=random.Random)
    # the scheduler's
    num_computed: int = 0
    num_cached: int = 0  # prompt tokens found in the prefix cache when first admitted
    admitted: bool = False  # was running at least once
    blocks: list[int] = field(default_factory=list)
    block_names: list[bytes] = field(default_factory=list)
    # the speculation's
    pace: Pace | None = None
    ngrams: NgramIndex | None = None
    num_drafted: int = 0  # tokens whose keys and values the draft model's cache holds
    # the sampler's
    unused_draws: list[float] = field(default_factory=list)  # made for drafts that were refused; they come first
    allowed_mask: Any = None  # the constraint's answer for the next token
    output_counts: Counter[int] = field(default_factory=Counter)
    sum_logprobs: float = 0.0
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob | None] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    hidden: Any = None  # contrastive search: hidden states of the computed tokens, (num_computed, D)

    @property
    def sampling(self) -> SamplingParams:
        return self.request.sampling

    @property
    def output_ids(self) -> list[int]:
        """Tokens generated so far."""
        return self.token_ids[self.num_prompt :]

    @property
    def num_output(self) -> int:
        return len(self.token_ids) - self.num_prompt

    @property
    def remaining(self) -> int:
        """Tokens whose keys and values are still to be computed; 1 while decoding."""
        return len(self.token_ids) - self.num_computed

    @property
    def root(self) -> bytes:
        """What the names of its blocks begin with: keys and values depend on the source, where there is one, and on
        the adapter."""
        if self.adapter:
            return hash_block(b"adapter", [self.adapter])
        return self.source.name if self.source else b""

    @property
    def width(self) -> int:
        """Places in the batch to keep for this sequence."""
        return self.gang.width if self.gang else 1

    @property
    def shares_prefix(self) -> bool:
        """Whether cached prefixes may be used: not where every prompt position's output is needed."""
        return self.sampling.prompt_logprobs is None and not self.sampling.penalty_alpha

    def draw(self) -> float:
        """A uniform number from [0, 1): one decides one token."""
        return self.unused_draws.pop(0) if self.unused_draws else self.rng.random()

    def append(self, token_id: int) -> None:
        """Add a generated token."""
        self.token_ids.append(token_id)
        self.output_counts[token_id] += 1
