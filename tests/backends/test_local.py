"""The engine behind threads and asyncio: many callers, early leavers, failures, closing."""

from __future__ import annotations

import asyncio
import threading

import pytest

from bimo.backends.local import LocalBackend
from bimo.engine.request import Output, Request, SamplingParams
from bimo.errors import CapacityError, ContextLengthError, EngineError, UsageError


@pytest.fixture
def backend(tiny_model_dir):
    with LocalBackend.load(str(tiny_model_dir), dtype="float32", kv_cache_tokens=2048) as backend:
        yield backend


def make_request(number: int = 0, **sampling) -> Request:
    settings = {"max_tokens": 10, "temperature": 0, "ignore_eos": True, **sampling}
    return Request(prompt_token_ids=[5 + number, 6, 7], sampling=SamplingParams(**settings))


def tokens_of(outputs) -> list[int]:
    return [token for output in outputs for token in output.token_ids]


async def collect(backend: LocalBackend, request: Request) -> list[Output]:
    return [output async for output in backend.generate(request)]


async def until_idle(backend: LocalBackend) -> None:
    """Wait for the engine's thread to notice; bounded by pytest's own time limit."""
    while backend.stats().running or backend.stats().waiting:
        await asyncio.sleep(0.01)


async def test_many_coroutines_share_batches(backend) -> None:
    alone = [tokens_of(await collect(backend, make_request(i))) for i in range(12)]
    steps = backend.stats().steps
    together = await asyncio.gather(*(collect(backend, make_request(i)) for i in range(12)))
    assert [tokens_of(outputs) for outputs in together] == alone
    assert backend.stats().steps - steps < 12 * 10 / 3, "they were computed one after the other"


async def test_a_loop_is_woken_once_a_step_however_many_wait(backend) -> None:
    loop = asyncio.get_running_loop()
    calls = 0
    wake = loop.call_soon_threadsafe

    def counting(*args, **named):
        nonlocal calls
        calls += 1
        return wake(*args, **named)

    loop.call_soon_threadsafe = counting
    steps = backend.stats().steps

    found = await asyncio.gather(*(collect(backend, make_request(i, max_tokens=20)) for i in range(8)))
    assert [len(tokens_of(outputs)) for outputs in found] == [20] * 8
    assert 0 < calls <= backend.stats().steps - steps


def test_threads_get_their_own_answers(backend) -> None:
    expected = [tokens_of(backend.iterate(make_request(i))) for i in range(8)]
    found: dict[int, list[int]] = {}
    threads = [
        threading.Thread(target=lambda i=i: found.update({i: tokens_of(backend.iterate(make_request(i)))}))
        for i in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[i] for i in range(8)] == expected


async def test_leaving_early_stops_the_computation(backend) -> None:
    stream = backend.generate(make_request(max_tokens=400))
    await anext(stream)
    await stream.aclose()
    await until_idle(backend)
    assert backend.stats().generation_tokens < 400
    assert backend.stats().kv_used_tokens == 0


async def test_cancelled_task_stops_the_computation(backend) -> None:
    task = asyncio.create_task(collect(backend, make_request(max_tokens=400)))
    while not backend.stats().running:
        await asyncio.sleep(0.001)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await until_idle(backend)
    assert backend.stats().generation_tokens < 400


def test_wrong_requests_are_refused_before_they_are_queued(backend) -> None:
    with pytest.raises(ContextLengthError):
        backend.submit(Request(prompt_token_ids=[5] * 600), lambda _: None)
    request = make_request(max_tokens=300)
    backend.submit(request, lambda _: None)
    with pytest.raises(UsageError, match="in use"):
        backend.submit(request, lambda _: None)
    backend.max_waiting = 1
    with pytest.raises(CapacityError):
        backend.submit(make_request(), lambda _: None)
    backend.abort(request.request_id)


def test_a_failing_step_is_told_and_the_next_request_works(backend, monkeypatch, caplog) -> None:
    expected = tokens_of(backend.iterate(make_request()))
    with monkeypatch.context() as patch:
        patch.setattr(backend.engine.runner, "run", lambda *_: 1 / 0)
        outputs = list(backend.iterate(make_request(n=2)))
    assert [output.finish_reason for output in outputs] == ["error", "error"]
    assert "division by zero" in outputs[0].error
    assert tokens_of(backend.iterate(make_request())) == expected


def test_a_failing_constraint_is_told(backend, caplog) -> None:
    request = make_request()
    request.constraint = lambda: 1 / 0
    outputs = list(backend.iterate(request))
    assert outputs[-1].finish_reason == "error" and outputs[-1].usage is not None
    backend.engine.check_integrity()


def test_a_sink_that_raises_ends_its_request_only(backend, caplog) -> None:
    def gone(output: Output) -> None:
        raise RuntimeError("event loop is closed")

    backend.submit(make_request(max_tokens=400), gone)
    assert len(tokens_of(backend.iterate(make_request(1)))) == 10
    backend.engine.check_integrity()
    assert backend.stats().generation_tokens < 400


def test_closing_ends_what_runs(backend) -> None:
    ended = threading.Event()
    reasons: list[str | None] = []

    def sink(output: Output) -> None:
        reasons.append(output.finish_reason)
        if output.usage is not None:
            ended.set()

    backend.submit(make_request(max_tokens=400), sink)
    backend.close()
    assert ended.wait(10) and reasons[-1] == "abort"
    with pytest.raises(EngineError, match="closed"):
        backend.submit(make_request(), sink)


def test_closing_ends_what_was_not_even_started(backend, monkeypatch) -> None:
    """Requests that arrive while a step is under way, the last before closing, are told as well."""
    outputs: list[Output] = []
    real, under_way, go_on = backend.engine.step, threading.Event(), threading.Event()

    def slow_step() -> list[Output]:
        under_way.set()
        go_on.wait(30)
        return real()

    monkeypatch.setattr(backend.engine, "step", slow_step)
    backend.submit(make_request(max_tokens=400), lambda _: None)
    assert under_way.wait(30)
    backend.submit(make_request(1), outputs.append)
    closing = threading.Thread(target=backend.close)
    closing.start()
    while not backend._closed:
        pass
    go_on.set()
    closing.join(30)
    assert [output.finish_reason for output in outputs] == ["abort"]


def test_memory_asked_for_beyond_the_machine_is_refused_with_numbers(tiny_model_dir) -> None:
    with pytest.raises(UsageError, match=r"needs \d+ MB, \d+ MB are free"):
        LocalBackend.load(str(tiny_model_dir), kv_cache_tokens=1 << 40)
