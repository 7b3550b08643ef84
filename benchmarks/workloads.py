"""What is measured: each workload does one measurement on one engine and returns its numbers.

`LIVE` workloads use a worker that stays loaded; `FRESH` ones start a process for each measurement; `SERVED` ones send
HTTP to a running server. The first number of a workload is the one that engines are ranked by.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.http_load import Outcome
from benchmarks.processes import Worker
from benchmarks.prompts import Prompts

__all__ = ["FRESH", "LIVE", "SERVED", "WORKLOADS", "Workload", "served_numbers"]

PROMPT_TOKENS = 50
NEW_TOKENS = 100
HISTORY_TOKENS = 2000
SEQUENCE_TOKENS = 1000  # of the memory workload: prompt and answer

Numbers = dict[str, float]


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A row of the goals."""

    about: str
    unit: str  # of the first number
    more_is_better: bool = True


def single(worker: Worker, prompts: Prompts, salt: int) -> Numbers:
    seconds, _ = worker.ask(prompts.questions(1, PROMPT_TOKENS, salt), NEW_TOKENS)
    return {"tokens/s": NEW_TOKENS / seconds}


def repeat(worker: Worker, prompts: Prompts, salt: int) -> Numbers:
    calls = [worker.ask([prompt], NEW_TOKENS)[0] for prompt in prompts.repeats(salt)]
    return {"tokens/s": NEW_TOKENS * len(calls) / sum(calls)}


def batch(worker: Worker, prompts: Prompts, salt: int) -> Numbers:
    seconds, answers = worker.ask(prompts.questions(16, PROMPT_TOKENS, salt), NEW_TOKENS)
    return {"tokens/s": NEW_TOKENS * len(answers) / seconds}


def prefill(length: int) -> Callable[[Worker, Prompts, int], Numbers]:
    def measure(worker: Worker, prompts: Prompts, salt: int) -> Numbers:
        seconds, _ = worker.ask(prompts.texts(1, length, salt), 1)
        return {"tokens/s": length / seconds}

    return measure


def history(worker: Worker, prompts: Prompts, salt: int) -> Numbers:
    """A new turn after 2,000 tokens: once with the earlier ones computed just before, once out of nowhere."""
    known, unknown = (prompts.texts(1, HISTORY_TOKENS, 2 * salt + i)[0] for i in range(2))
    turn = prompts.questions(1, PROMPT_TOKENS, salt)[0]
    _, answers = worker.ask([known], 1)
    warm, _ = worker.ask([known + answers[0] + turn], 1)
    cold, _ = worker.ask([unknown + turn[:1] + turn], 1)
    return {"warm/cold": warm / cold, "warm s": warm, "cold s": cold}


def memory(start: Callable[[], Worker], prompts: Prompts, salt: int) -> Numbers:
    with start() as worker:
        worker.ask(prompts.texts(16, SEQUENCE_TOKENS - NEW_TOKENS, salt), NEW_TOKENS)
        found = worker.memory()
    return {"MB": found["resident"] / 1e6, "MB at peak": found["peak"] / 1e6}


def cold(start: Callable[[], Worker], prompts: Prompts, salt: int) -> Numbers:
    begun = time.perf_counter()
    with start() as worker:
        worker.ask(prompts.questions(1, PROMPT_TOKENS, salt), 1)
        return {"s": time.perf_counter() - begun}


def served_numbers(outcome: Outcome) -> Numbers:
    return {
        "tokens/s": outcome.tokens / outcome.seconds,
        "p50 s": outcome.quantile(0.5),
        "p99 s": outcome.quantile(0.99),
    }


LIVE = {
    "single": single,
    "single-file": single,
    "repeat": repeat,
    "batch16": batch,
    "prefill1000": prefill(1000),
    "prefill4000": prefill(4000),
    "history": history,
}
FRESH = {"cold": cold, "memory": memory}
SERVED = {"http64": 64}  # requests at once

WORKLOADS = {
    "single": Workload(about="1 request, 50 tokens of prompt, 100 new", unit="tokens/s"),
    "single-file": Workload(about="the same with the file's own 4-bit weights", unit="tokens/s"),
    "repeat": Workload(about="4 requests whose answers repeat the prompt, one after another, 100 new", unit="tokens/s"),
    "batch16": Workload(about="16 requests at once, 50 tokens of prompt, 100 new", unit="tokens/s"),
    "prefill1000": Workload(about="a prompt of 1,000 tokens, 1 new", unit="tokens/s"),
    "prefill4000": Workload(about="a prompt of 4,000 tokens, 1 new", unit="tokens/s"),
    "history": Workload(
        about="first token of a chat turn after 2,000 tokens, earlier ones cached / not",
        unit="warm/cold",
        more_is_better=False,
    ),
    "cold": Workload(about="process start to first token, model already converted", unit="s", more_is_better=False),
    "memory": Workload(about="resident after 16 sequences of 1,000 tokens", unit="MB", more_is_better=False),
    "http64": Workload(about="64 streaming chat requests over HTTP, 100 new each", unit="tokens/s"),
}
