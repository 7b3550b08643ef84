"""What goes into the engine and what comes out: `Request`, `SamplingParams`, `Output`, `Usage`.

No torch here: servers, tasks and tests import these freely. Validation happens once, in `SamplingParams.__post_init__`.
"""

from __future__ import annotations

import math
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal, Protocol

from bimo.errors import UsageError

__all__ = [
    "MAX_LOGPROBS",
    "MAX_SEQUENCES",
    "Constraint",
    "FinishReason",
    "Output",
    "Request",
    "SamplingParams",
    "TokenLogprob",
    "Usage",
]

FinishReason = Literal["stop", "length", "abort", "error"]
MAX_SEQUENCES = 128  # n, best_of and num_beams at most; bounds what one request can cost
MAX_LOGPROBS = 20  # alternatives per token, OpenAI's limit


class Constraint(Protocol):
    """Limits what one sequence may say next (JSON schema, regex, grammar, choice). One instance a sequence."""

    def allowed_mask(self) -> Any:
        """int32 bitmask over the vocabulary, shape (ceil(vocab/32),), 1 = allowed (numpy)."""

    def accept(self, token_id: int) -> None:
        """Advance by the token that was chosen."""

    @property
    def finished(self) -> bool:
        """True once nothing but the end may follow; the sequence then stops with reason "stop"."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """How tokens are chosen. Neutral defaults: every field at its default changes nothing.

    Order of application: constraint mask, logit_bias, repetition/presence/frequency penalties, min_tokens,
    temperature, top_k, top_p, min_p, typical_p, then the draw. `temperature=0` takes the most likely token.
    """

    max_tokens: int | None = None  # None: as many as the context holds
    min_tokens: int = 0  # no end-of-sequence token before this many
    temperature: float = 1.0
    top_k: int = 0  # 0: off
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0  # CTRL, arXiv:1909.05858: over prompt and output
    presence_penalty: float = 0.0  # OpenAI: over output only
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=lambda: MappingProxyType({}))
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    include_stop: bool = False  # keep the stop string in the text
    seed: int | None = None
    n: int = 1
    best_of: int | None = None  # sample this many, return the n of highest mean log-probability
    num_beams: int = 1
    num_beam_groups: int = 1  # > 1: diverse beam search, arXiv:1610.02424
    diversity_penalty: float = 0.0
    length_penalty: float = 1.0  # beam score = sum of logprobs / length ** length_penalty
    early_stopping: bool = False
    penalty_alpha: float = 0.0  # > 0 with top_k > 1: contrastive search, arXiv:2202.06417
    logprobs: int | None = None  # None: none; 0: the chosen token's; k: and the k most likely
    prompt_logprobs: int | None = None  # the same for the prompt's tokens (switches the prefix cache off)

    def __post_init__(self) -> None:
        def check(name: str, low: float, high: float, *, integer: bool = False) -> None:
            value = getattr(self, name)
            kinds = (int,) if integer else (int, float)
            if isinstance(value, bool) or not isinstance(value, kinds) or not math.isfinite(value):
                raise UsageError(f"{name} must be {'an integer' if integer else 'a number'}, not {value!r}", name)
            if not low <= value <= high:
                raise UsageError(f"{name} must be between {low:g} and {high:g}, not {value!r}", name)

        if self.max_tokens is not None:
            check("max_tokens", 1, 1 << 24, integer=True)
        check("min_tokens", 0, 1 << 24, integer=True)
        check("temperature", 0, 100)
        check("top_k", 0, 1 << 24, integer=True)
        for name in ("top_p", "typical_p"):
            check(name, 0, 1)
            if getattr(self, name) == 0:
                raise UsageError(f"{name} must be greater than 0 (1 switches it off)", name)
        check("min_p", 0, 1)
        check("repetition_penalty", 0.01, 100)
        check("presence_penalty", -2, 2)
        check("frequency_penalty", -2, 2)
        for name in ("n", "num_beams", "num_beam_groups"):
            check(name, 1, MAX_SEQUENCES, integer=True)
        check("diversity_penalty", 0, 100)
        check("length_penalty", -10, 10)
        check("penalty_alpha", 0, 1)
        if self.best_of is not None:
            check("best_of", self.n, MAX_SEQUENCES, integer=True)
        if self.seed is not None:
            check("seed", -(1 << 63), (1 << 64) - 1, integer=True)
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                check(name, 0, MAX_LOGPROBS, integer=True)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise UsageError(f"min_tokens {self.min_tokens} exceeds max_tokens {self.max_tokens}", "min_tokens")
        for token, bias in self.logit_bias.items():
            if not isinstance(token, int) or token < 0 or not -100 <= bias <= 100:
                raise UsageError("logit_bias maps token ids to numbers between -100 and 100", "logit_bias")
        if any(not s for s in self.stop):
            raise UsageError("stop strings must not be empty", "stop")
        self._check_search()

    def _check_search(self) -> None:
        """Beam and contrastive search are deterministic; settings without effect on them are errors."""
        searching = self.num_beams > 1 or self.penalty_alpha > 0
        if self.num_beams > 1 and self.penalty_alpha > 0:
            raise UsageError("num_beams and penalty_alpha are two different searches: choose one", "penalty_alpha")
        if self.penalty_alpha > 0 and self.top_k < 2:
            raise UsageError("contrastive search needs top_k of at least 2 candidates", "top_k")
        if self.penalty_alpha > 0 and self.n > 1:
            raise UsageError("contrastive search is deterministic and gives one answer: n must be 1", "n")
        if searching and self.best_of is not None:
            raise UsageError("best_of has no effect on beam or contrastive search", "best_of")
        if searching and (self.logprobs or 0) > 0:
            raise UsageError("beam and contrastive search give logprobs of the chosen tokens only: 0", "logprobs")
        neutral = {"temperature": (0, 1), "top_p": (1,), "min_p": (0,), "typical_p": (1,)}
        if self.num_beams > 1:
            neutral["top_k"] = (0,)
        for name, values in neutral.items():
            if searching and getattr(self, name) not in values:
                raise UsageError(f"{name} has no effect on beam or contrastive search: leave it out", name)
        if self.num_beams > 1 and self.n > self.num_beams:
            raise UsageError(f"n {self.n} exceeds num_beams {self.num_beams}", "n")
        if self.num_beams % self.num_beam_groups:
            raise UsageError("num_beams must be a multiple of num_beam_groups", "num_beam_groups")
        if self.diversity_penalty and self.num_beam_groups == 1:
            raise UsageError("diversity_penalty needs num_beam_groups of at least 2", "diversity_penalty")
        if self.num_beams == 1 and (self.early_stopping or self.length_penalty != 1):
            name = "early_stopping" if self.early_stopping else "length_penalty"
            raise UsageError(f"{name} has an effect on beam search only: set num_beams", name)

    @property
    def greedy(self) -> bool:
        """True when the most likely token is taken."""
        return self.temperature == 0


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Log-probability of one token under the model (before sampling settings), with the `top` alternatives."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()  # (token id, logprob), most likely first


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts of one request, over all its sequences."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0  # prompt tokens found in the prefix cache
    truncated_tokens: int = 0  # prompt tokens cut off at the front, only when asked for

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


@dataclass(kw_only=True, slots=True)
class Request:
    """One prompt to be continued. `constraint` makes a fresh `Constraint` for each sequence."""

    prompt_token_ids: list[int]
    sampling: SamplingParams = field(default_factory=SamplingParams)
    request_id: str = field(default_factory=lambda: uuid.uuid4().hex)
    truncate_prompt: bool = False  # cut the front of a prompt that is too long, and report it
    constraint: Callable[[], Constraint] | None = None
    adapter: str | None = None  # the name of one that was loaded beside the model; None: the model as it is


@dataclass(slots=True)
class Output:
    """One increment of one of a request's sequences, in order. Text and tokens need not end at the same place:
    text is held back while it may be half a character or the beginning of a stop string.

    A request ends when each of its n sequences has sent an Output with a `finish_reason`; `usage` comes with
    the last of them. Beam search, best_of and contrastive search send everything in that last Output.
    """

    request_id: str
    index: int  # which of the n sequences
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] | None = None  # one for each of token_ids, when asked for
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None  # the stop string or stop token id, when one ended it
    usage: Usage | None = None  # with the request's last Output
    prompt_logprobs: list[TokenLogprob | None] | None = None  # with a sequence's first Output; [0] is None
    error: str | None = None  # with finish_reason "error"
