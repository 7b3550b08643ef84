"""The one protocol between those who want tokens (server, tasks, evaluation, CLI) and those who make them.

`local` is bimo's own engine; `vllm` and replicas are others. Nobody above this folder knows which one it has.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Protocol

from bimo.engine.request import Output, Request
from bimo.tokenizer.load import Tokenizer

__all__ = ["Backend", "BackendInfo", "BackendStats", "EmbedderInfo", "OutputSink"]

OutputSink = Callable[[Output], None]  # called from the backend's own thread; must return at once


@dataclass(frozen=True, kw_only=True)
class BackendInfo:
    """What is being served. `context_length` counts tokens, prompt and answer together; of a model that
    `reads_source` (an encoder-decoder), each of the two."""

    model: str  # the reference the user gave, e.g. "smollm2"
    architecture: str  # Hugging Face model_type
    num_parameters: int
    context_length: int
    vocab_size: int
    dtype: str  # what is computed with, for people: "int8", "bfloat16", "the file's own bits", ...
    device: str
    kv_cache_tokens: int
    quant: str = "none"  # "int8" | "int4" | "file" | "none"
    cache_dtype: str = ""  # of keys and values
    reads_source: bool = False  # an encoder-decoder: an answer is made of the prompt, not put behind it
    adapters: tuple[str, ...] = ()  # that a request may choose (Request.adapter)
    created: int = field(default_factory=lambda: int(time.time()))  # unix seconds


@dataclass(frozen=True, kw_only=True)
class EmbedderInfo:
    """What is being served. context_length: tokens of a text, [CLS] and [SEP] among them. dimensions: of a vector."""

    model: str  # the reference the user gave
    architecture: str  # Hugging Face model_type
    num_parameters: int
    context_length: int
    dimensions: int
    vocab_size: int
    dtype: str
    device: str
    pooling: str  # "mean" or "cls"
    created: int = field(default_factory=lambda: int(time.time()))  # unix seconds


@dataclass(kw_only=True)
class BackendStats:
    """Counters since start and gauges of now; the server's /metrics is a view of these."""

    running: int = 0
    waiting: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generation_tokens: int = 0
    steps: int = 0
    preemptions: int = 0
    drafted_tokens: int = 0  # guessed by speculation
    accepted_tokens: int = 0  # of these, found true
    kv_used_tokens: int = 0
    kv_total_tokens: int = 0


class Backend(Protocol):
    """A stream of tokens for a request. All methods are safe to call from any thread.

    `submit` raises ContextLengthError, UsageError or CapacityError before anything is queued; failures after that
    arrive as an Output with finish_reason "error". Every submitted request ends: with a finish_reason for each of
    its sequences, also after `abort` (reason "abort") and `close`.
    """

    tokenizer: Tokenizer

    def info(self) -> BackendInfo: ...

    def stats(self) -> BackendStats: ...

    def submit(self, request: Request, sink: OutputSink) -> None: ...

    def generate(self, request: Request) -> AsyncIterator[Output]:
        """`submit` for asyncio. Leaving the iteration early (break, cancel) aborts the request."""
        ...

    def abort(self, request_id: str) -> None:
        """Stop computing a request; unknown ids are ignored (it may just have finished)."""
        ...

    def close(self) -> None: ...
