"""A backend that says what a test wants to hear: answers no tiny random model gives, moments that must be held.

It keeps the protocol's promises (every submitted request ends, `abort` ends it early, outputs in order from a thread
of its own) with the real tokenizer and the real `TextStream`, so the server does with it what it does with a model.
"""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Callable

from bimo.backends.base import BackendInfo, BackendStats, OutputSink
from bimo.engine.request import Output, Request, TokenLogprob, Usage
from bimo.errors import ContextLengthError
from bimo.tokenizer.load import Tokenizer
from bimo.tokenizer.stream import TextStream

__all__ = ["ScriptedBackend"]


class ScriptedBackend:
    """answer: prompt's text -> answer's text. gate: tokens flow only while it is set. fail_after: tokens until the
    "engine" breaks; None: never."""

    def __init__(
        self, tokenizer: Tokenizer, answer: Callable[[str], str], *, fail_after: int | None = None, gated: bool = False
    ) -> None:
        self.tokenizer = tokenizer
        self.gate = threading.Event()
        if not gated:
            self.gate.set()
        self.requests: list[Request] = []
        self._answer = answer
        self._fail_after = fail_after
        self._stats = BackendStats()
        self._aborted: dict[str, threading.Event] = {}
        self._lock = threading.Lock()

    def info(self) -> BackendInfo:
        return BackendInfo(
            model="scripted",
            architecture="none",
            num_parameters=0,
            context_length=2048,
            vocab_size=self.tokenizer.vocab_size,
            dtype="float32",
            device="cpu",
            kv_cache_tokens=512,
            created=1_700_000_000,
        )

    def stats(self) -> BackendStats:
        return self._stats

    def submit(self, request: Request, sink: OutputSink) -> None:
        if len(request.prompt_token_ids) >= self.info().context_length:
            raise ContextLengthError(len(request.prompt_token_ids), self.info().context_length)
        with self._lock:
            self.requests.append(request)
            self._aborted[request.request_id] = threading.Event()
            self._stats.running += request.sampling.n
            self._stats.prompt_tokens += len(request.prompt_token_ids)
        threading.Thread(target=self._run, args=(request, sink), daemon=True).start()

    def _run(self, request: Request, sink: OutputSink) -> None:
        text = self._answer(self.tokenizer.decode(request.prompt_token_ids, skip_special_tokens=False))
        ids = [*self.tokenizer.encode(text, add_special_tokens=False), self.tokenizer.eos_token_ids[0]]
        completed = 0
        for index in range(request.sampling.n):
            completed += self._speak(request, index, ids, sink, completed)
            with self._lock:
                self._stats.running -= 1

    def _speak(self, request: Request, index: int, ids: list[int], sink: OutputSink, before: int) -> int:
        aborted = self._aborted[request.request_id]
        sampling = request.sampling
        stream = TextStream(self.tokenizer, sampling.stop, sampling.include_stop)
        for count, token_id in enumerate(ids, 1):
            while not self.gate.wait(0.01) and not aborted.is_set():
                pass
            output = Output(request.request_id, index, token_ids=[token_id])
            if aborted.is_set():
                sink(Output(request.request_id, index, finish_reason="abort"))
                return count
            if self._fail_after is not None and count > self._fail_after:
                sink(Output(request.request_id, index, finish_reason="error", error="secret internals"))
                return count
            ended = token_id in self.tokenizer.eos_token_ids
            output.text = "" if ended else stream.push(token_id)
            if sampling.logprobs is not None:
                top = tuple((token_id + k, -0.5 - k) for k in range(sampling.logprobs))
                output.logprobs = [TokenLogprob(token_id, -0.5, top)]
            if ended or stream.stopped is not None:
                output.finish_reason, output.stop_reason = "stop", stream.stopped
            elif count == sampling.max_tokens:
                output.finish_reason = "length"
            if output.finish_reason is not None:
                output.text += stream.flush()
                if index == sampling.n - 1:
                    output.usage = Usage(len(request.prompt_token_ids), before + count)
            with self._lock:
                self._stats.generation_tokens += 1
            sink(output)
            if output.finish_reason is not None:
                return count
        raise AssertionError("the script ends with an end token")

    def generate(self, request: Request) -> AsyncIterator[Output]:
        raise NotImplementedError("the server submits")

    def abort(self, request_id: str) -> None:
        if request_id in self._aborted:
            self._aborted[request_id].set()

    def close(self) -> None:
        for event in self._aborted.values():
            event.set()
