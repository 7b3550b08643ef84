"""Engines on the tiny model, in float32."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from bimo.backends.build import load_decoder
from bimo.engine.engine import Engine, EngineConfig
from bimo.engine.request import Output, Request
from bimo.engine.runner import ModelRunner
from bimo.formats.huggingface import read_config
from bimo.models.decoder import Decoder
from bimo.tokenizer.load import Tokenizer

MakeEngine = Callable[..., Engine]


@pytest.fixture(scope="session")
def tiny_tokenizer(tiny_model_dir: Path) -> Tokenizer:
    return Tokenizer.from_directory(tiny_model_dir)


@pytest.fixture(scope="session")
def tiny_decoder(tiny_model_dir: Path, device: str) -> Decoder:
    return load_decoder(tiny_model_dir, read_config(tiny_model_dir), torch.float32, device)


@pytest.fixture(scope="session")
def make_engine(tiny_decoder: Decoder, tiny_tokenizer: Tokenizer) -> MakeEngine:
    """An engine with its own cache: make_engine(num_blocks=..., block_size=..., max_batch=..., max_step_tokens=...)."""

    def make(num_blocks: int = 128, block_size: int = 4, context_length: int = 512, **limits: int) -> Engine:
        runner = ModelRunner(tiny_decoder, num_blocks=num_blocks, block_size=block_size)
        return Engine(runner, tiny_tokenizer, EngineConfig(context_length=context_length, **limits))

    return make


class Answer:
    """A request's outputs put together, one entry a sequence."""

    def __init__(self, n: int) -> None:
        self.text = [""] * n
        self.tokens: list[list[int]] = [[] for _ in range(n)]
        self.logprobs: list[list] = [[] for _ in range(n)]
        self.reasons: list[str | None] = [None] * n
        self.stops: list[int | str | None] = [None] * n
        self.usage = None
        self.prompt_logprobs = None

    def add(self, output: Output) -> None:
        i = output.index
        assert self.reasons[i] is None, "output after the end of a sequence"
        assert self.usage is None, "output after the end of the request"
        self.text[i] += output.text
        self.tokens[i] += output.token_ids
        self.logprobs[i] += output.logprobs or []
        self.reasons[i] = output.finish_reason
        self.stops[i] = output.stop_reason
        self.usage = output.usage
        self.prompt_logprobs = output.prompt_logprobs or self.prompt_logprobs


def run(engine: Engine, requests: Iterable[Request], limit: int = 5000) -> list[Answer]:
    """Add all, step until done with an integrity check after every step; answers in the order of requests."""
    requests = list(requests)
    answers = {request.request_id: Answer(request.sampling.n) for request in requests}
    for request in requests:
        engine.add(request)
    for _ in range(limit):
        if not engine.has_work:
            break
        for output in engine.step():
            answers[output.request_id].add(output)
        engine.check_integrity()
    assert not engine.has_work, "the engine makes no progress"
    assert all(answer.usage is not None for answer in answers.values())
    return [answers[request.request_id] for request in requests]


def play(engine: Engine, arrivals: list[tuple[Any, int, int | None]], ask: Callable[..., Request]) -> list[Any]:
    """Let requests arrive `gap` steps after each other and some be aborted `life` steps after they arrived.

    arrivals: (job, gap, life or None); ask(*job) makes the request. The engine's integrity is checked after every step,
    and that nothing is left over. Returns (Answer, job) of each.
    """
    due: list[tuple[int, str, Request, Any]] = []
    now = 0
    for job, gap, life in arrivals:
        now += gap
        request = ask(*job)
        due.append((now, "add", request, job))
        if life is not None:
            due.append((now + life, "abort", request, job))
    due.sort(key=lambda event: event[0])
    answers: dict[str, tuple[Answer, Any]] = {}
    for step in range(4000):
        while due and due[0][0] <= step:
            _, action, request, job = due.pop(0)
            if action == "add":
                engine.add(request)
                answers[request.request_id] = (Answer(request.sampling.n), job)
            for output in engine.abort(request.request_id) if action == "abort" else []:
                answers[output.request_id][0].add(output)
            engine.check_integrity()
        if engine.has_work:
            for output in engine.step():
                answers[output.request_id][0].add(output)
            engine.check_integrity()
        elif not due:
            break
    assert not engine.has_work and not due
    assert engine.pool.num_free == engine.pool.num_blocks, "blocks leaked"
    return list(answers.values())
