"""Whether a request can be answered, and how much of it: its prompt as it fits, and the room for new tokens. No torch.

    prompt, num_truncated, max_tokens = limits.check(request)

A decoder's context holds the prompt and the answer; an encoder-decoder's prompt is its source, which has a context of
its own, and lies in the same cache.
"""

from __future__ import annotations

from dataclasses import dataclass

from bimo.engine.request import Request
from bimo.errors import ContextLengthError, UsageError

__all__ = ["Limits"]


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one engine can hold. `context_length` counts tokens, the prompt's and the answer's together, or for an
    encoder-decoder (`reads_source`) each of the two."""

    context_length: int
    vocab_size: int
    max_batch: int
    num_blocks: int
    block_size: int
    reads_source: bool
    adapters: tuple[str, ...] = ()

    def check(self, request: Request) -> tuple[list[int], int, int]:
        """The prompt as it fits, the tokens cut off its front, and the room for new ones. Raises ContextLengthError or
        UsageError."""
        if request.adapter is not None and request.adapter not in self.adapters:
            there = f"there are {', '.join(self.adapters)}" if self.adapters else "none was loaded beside the model"
            raise UsageError(f"no adapter {request.adapter!r}: {there}", "adapter")
        prompt, truncated = self._fit_prompt(request)
        room = self._room(len(prompt))
        max_tokens = min(request.sampling.max_tokens or room, room)
        self._check_size(request, len(prompt), max_tokens)
        return prompt, truncated, max_tokens

    def _room(self, num_prompt: int) -> int:
        """Tokens that an answer to so long a prompt may have."""
        if not self.reads_source:
            return self.context_length - num_prompt
        left = (self.num_blocks - self._blocks(num_prompt)) * self.block_size
        return min(self.context_length, left) - 1  # the first token is the one that starts every answer

    def _blocks(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def _fit_prompt(self, request: Request) -> tuple[list[int], int]:
        prompt = request.prompt_token_ids
        if not prompt:
            raise UsageError("the prompt is empty: give at least one token", "prompt")
        if not all(isinstance(t, int) and 0 <= t < self.vocab_size for t in prompt):
            raise UsageError(f"prompt token ids must be integers from 0 to {self.vocab_size - 1}", "prompt")
        most = self.context_length if self.reads_source else self.context_length - 1
        if len(prompt) <= most:
            return prompt, 0
        if not request.truncate_prompt:
            raise ContextLengthError(len(prompt), self.context_length, for_answer=not self.reads_source)
        kept = most
        if not self.reads_source:
            kept = self.context_length - min(request.sampling.max_tokens or self.context_length // 4, most)
        return prompt[-kept:], len(prompt) - kept

    def _check_size(self, request: Request, num_prompt: int, max_tokens: int) -> None:
        sampling = request.sampling
        width = max(sampling.num_beams, sampling.top_k if sampling.penalty_alpha else 1)
        if width > self.max_batch:
            name = "num_beams" if sampling.num_beams > 1 else "top_k"
            raise UsageError(f"{name} {width} exceeds this engine's batch of {self.max_batch}", name)
        if width > 1 and request.constraint:
            raise UsageError("constrained output cannot be combined with beam or contrastive search", "num_beams")
        if any(token >= self.vocab_size for token in (*sampling.logit_bias, *sampling.stop_token_ids)):
            raise UsageError(f"logit_bias and stop_token_ids hold ids from 0 to {self.vocab_size - 1}", "logit_bias")
        if sampling.min_tokens > max_tokens:
            raise UsageError(f"min_tokens {sampling.min_tokens} exceeds the room for {max_tokens} tokens", "min_tokens")
        if self.reads_source and sampling.prompt_logprobs is not None:
            raise UsageError(
                "an encoder-decoder reads its prompt at once and gives it no probabilities: leave prompt_logprobs out",
                "prompt_logprobs",
            )
        blocks = self._blocks(num_prompt) + width * (self._blocks(max_tokens) + 2)
        if width > 1 and blocks > self.num_blocks:
            raise UsageError(
                f"{width} beams of {max_tokens} tokens need {blocks * self.block_size} tokens of KV cache, there are "
                f"{self.num_blocks * self.block_size}: lower max_tokens or the number of beams, or raise "
                "kv_cache_tokens",
                "max_tokens",
            )
