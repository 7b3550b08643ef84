"""The engine under arrival orders, aborts and cache sizes made by hypothesis: nothing lost, nothing mixed up, and in
float32 the same tokens as alone."""

from __future__ import annotations

import subprocess
import sys
from functools import cache

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bimo.engine.engine import Engine
from bimo.engine.request import Request, SamplingParams
from bimo.errors import ContextLengthError, UsageError

from .conftest import Answer, play, run

TEXTS = (
    "The quick brown fox jumps over the lazy dog.",
    "从前有一个小小的模型，它学会了写字。",
    "def add(a: int, b: int) -> int:\n    return",
    "🦊 jumps over 🐶",
    "床前明月光，疑是地上霜。举头望明月，低头思故乡。" * 3,
    "Hello",
)
SAMPLING = (
    {"temperature": 0},
    {"temperature": 1.0, "top_k": 20},
    {"temperature": 0.8, "top_p": 0.9, "repetition_penalty": 1.2},
    {"temperature": 1.3, "min_p": 0.02, "n": 2},
    {"num_beams": 3, "n": 2},
    {"penalty_alpha": 0.5, "top_k": 3},
)


@pytest.fixture(scope="module")
def alone(make_engine):
    """The answer to (text, sampling, max_tokens) from an engine of its own."""

    @cache
    def compute(text: int, sampling: int, max_tokens: int) -> Answer:
        engine = make_engine()
        return run(engine, [make_request(engine, text, sampling, max_tokens)])[0]

    return compute


def make_request(engine: Engine, text: int, sampling: int, max_tokens: int) -> Request:
    params = SamplingParams(max_tokens=max_tokens, seed=text, ignore_eos=True, **SAMPLING[sampling])
    return Request(prompt_token_ids=engine.tokenizer.encode(TEXTS[text]), sampling=params)


jobs = st.tuples(st.integers(0, len(TEXTS) - 1), st.integers(0, len(SAMPLING) - 1), st.integers(1, 12))


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.tuples(jobs, st.integers(0, 3), st.none() | st.integers(0, 10)), min_size=1, max_size=10),
    st.integers(50, 100),
    st.sampled_from([(4, 4), (6, 8), (16, 64), (64, 512)]),
)
def test_any_arrivals_aborts_and_cache_sizes(make_engine, alone, arrivals, num_blocks, limits) -> None:
    """Requests arrive `gap` steps after each other; some are aborted `life` steps after they arrived."""
    engine = make_engine(num_blocks=num_blocks, max_batch=limits[0], max_step_tokens=limits[1])
    answers = play(engine, arrivals, lambda *job: make_request(engine, *job))
    for answer, job in answers:
        assert answer.usage is not None
        expected = alone(*job)
        for i, reason in enumerate(answer.reasons):
            if reason == "abort":
                assert answer.tokens[i] == expected.tokens[i][: len(answer.tokens[i])]
            else:
                assert answer.tokens[i] == expected.tokens[i]
                assert answer.text[i] == expected.text[i]


def test_sixteen_at_once_are_the_same_as_alone(make_engine, alone) -> None:
    combinations = [(text, sampling, 10) for text in range(4) for sampling in range(4)]
    engine = make_engine(num_blocks=400)
    answers = run(engine, [make_request(engine, *job) for job in combinations])
    assert [a.tokens for a in answers] == [alone(*job).tokens for job in combinations]


def test_second_request_finds_the_prefix_and_says_so(make_engine, alone) -> None:
    engine = make_engine()
    first, second = (run(engine, [make_request(engine, 4, 0, 8)])[0] for _ in range(2))
    num_prompt = len(engine.tokenizer.encode(TEXTS[4]))
    assert first.usage.cached_tokens == 0
    assert second.usage.cached_tokens == (num_prompt - 1) // 4 * 4
    assert first.tokens == second.tokens == alone(4, 0, 8).tokens
    assert engine.stats.prompt_tokens == 2 * num_prompt - second.usage.cached_tokens


def test_sequences_of_one_request_compute_their_prompt_once(make_engine) -> None:
    engine = make_engine()
    prompt = engine.tokenizer.encode(TEXTS[4])
    sampling = SamplingParams(n=8, max_tokens=4, seed=1, ignore_eos=True)
    run(engine, [Request(prompt_token_ids=prompt, sampling=sampling)])
    assert engine.stats.prompt_tokens <= len(prompt) + 7 * 4  # each sibling recomputes less than a block


def test_long_prompt_does_not_stop_the_others(make_engine) -> None:
    engine = make_engine(max_batch=4, max_step_tokens=8)
    short = Request(prompt_token_ids=[5, 6, 7], sampling=SamplingParams(max_tokens=30, ignore_eos=True))
    long = Request(prompt_token_ids=[9] * 150, sampling=SamplingParams(max_tokens=2, ignore_eos=True))
    engine.add(short)
    engine.step()
    engine.add(long)
    for _ in range(15):  # the long prompt takes 20 steps and more
        assert [o.request_id for o in engine.step()] == [short.request_id]
    engine.abort(short.request_id)
    engine.abort(long.request_id)


def test_full_cache_preempts_the_newest_and_loses_nothing(make_engine, alone) -> None:
    engine = make_engine(num_blocks=24, max_batch=8)
    jobs = [(text, 0, 12) for text in (0, 1, 2, 0, 1)]
    answers = run(engine, [make_request(engine, *job) for job in jobs])
    assert engine.scheduler.num_preemptions > 0
    assert [a.tokens for a in answers] == [alone(*job).tokens for job in jobs]


def test_prompt_too_long_is_refused_with_both_numbers_or_truncated_and_reported(make_engine) -> None:
    engine = make_engine(context_length=32)
    prompt = list(range(3, 43))
    with pytest.raises(ContextLengthError, match=r"40 tokens.*holds 32"):
        engine.add(Request(prompt_token_ids=prompt))
    request = Request(prompt_token_ids=prompt, sampling=SamplingParams(max_tokens=8), truncate_prompt=True)
    answer = run(engine, [request])[0]
    assert (answer.usage.prompt_tokens, answer.usage.truncated_tokens) == (24, 16)
    kept = run(engine, [Request(prompt_token_ids=prompt[16:], sampling=SamplingParams(max_tokens=8, temperature=0))])[0]
    again = Request(prompt_token_ids=prompt, sampling=SamplingParams(max_tokens=8, temperature=0), truncate_prompt=True)
    assert run(engine, [again])[0].tokens == kept.tokens


def test_answer_ends_where_the_context_ends(make_engine) -> None:
    engine = make_engine(context_length=32)
    answer = run(engine, [Request(prompt_token_ids=[5] * 20, sampling=SamplingParams(ignore_eos=True))])[0]
    assert len(answer.tokens[0]) == 12
    assert answer.reasons == ["length"]


@pytest.mark.parametrize("prompt", [[], [-1], [10**9], ["a"], [1.5]])
def test_bad_prompts_are_refused(make_engine, prompt) -> None:
    engine = make_engine()
    with pytest.raises(UsageError):
        engine.add(Request(prompt_token_ids=prompt))
    assert not engine.has_work


def test_beams_that_cannot_fit_are_refused(make_engine) -> None:
    engine = make_engine(num_blocks=8)
    with pytest.raises(UsageError, match="KV cache"):
        engine.add(Request(prompt_token_ids=[1, 2], sampling=SamplingParams(num_beams=4, max_tokens=20)))
    with pytest.raises(UsageError, match="batch of 2"):
        make_engine(max_batch=2).add(Request(prompt_token_ids=[1], sampling=SamplingParams(num_beams=4, max_tokens=2)))


def test_failure_ends_every_request(make_engine, monkeypatch) -> None:
    engine = make_engine()
    for _ in range(3):
        engine.add(Request(prompt_token_ids=[5, 6], sampling=SamplingParams(n=2)))
    engine.step()
    outputs = engine.fail("out of ink")
    assert [o.finish_reason for o in outputs] == ["error"] * 6
    assert sum(o.usage is not None for o in outputs) == 3
    engine.check_integrity()
    assert engine.pool.num_free == engine.pool.num_blocks


def test_scheduler_needs_no_torch() -> None:
    code = "import sys, bimo.engine.scheduler; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
