"""Several steps in one call change nothing but how often Python is asked: answers are those of one step at a time."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bimo.engine.constrain import regex
from bimo.engine.engine import Engine, EngineConfig
from bimo.engine.fused import FusedDecoder
from bimo.engine.fusing import fuse_weights
from bimo.engine.kernels import load_kernels
from bimo.engine.request import Request, SamplingParams
from bimo.engine.runner import ModelRunner
from bimo.formats.huggingface import load_weights, read_config

from .conftest import Answer, play, run

pytestmark = pytest.mark.skipif(load_kernels() is None, reason="the C++ kernels are not built")
FOREVER = 1e9  # seconds: only steps, ends and blocks count
TEXTS = (
    "Hello",
    "从前有一个小小的模型",
    "🦊 jumps over 🐶, 🐶 jumps over 🦊, 🦊 jumps over",
    "def add(a: int, b: int) -> int:\n",
)
SAMPLING: tuple[dict[str, Any], ...] = (
    {},
    {"stop": ("e", "的", "🐶")},
    {"n": 3},
    {"temperature": 0.8},
    {"logprobs": 2},
    {"repetition_penalty": 1.3},
    {"logit_bias": {3: 5.0}},
    {"min_tokens": 4, "ignore_eos": False},
    {"prompt_logprobs": 0},
    {"num_beams": 2},
    {"temperature": 0.7, "n": 2, "best_of": 3},
)


@pytest.fixture(scope="module")
def fused_engine(tiny_model_dir: Path, tiny_tokenizer):
    config = read_config(tiny_model_dir)
    weights = fuse_weights(config, load_weights(tiny_model_dir, config), "int8")

    def make(seconds: float = FOREVER, num_blocks: int = 64, **limits: Any) -> Engine:
        runner = ModelRunner(FusedDecoder(config, weights), num_blocks=num_blocks, block_size=16)
        limits = {"context_length": 256, "speculation": "off", **limits}
        return Engine(runner, tiny_tokenizer, EngineConfig(stream_interval=seconds, **limits))

    return make


def make_request(engine: Engine, text: int, sampling: int, max_tokens: int, **more: Any) -> Request:
    params = {"temperature": 0, "max_tokens": max_tokens, "seed": text, "ignore_eos": True, **SAMPLING[sampling]}
    params["min_tokens"] = min(params.get("min_tokens", 0), max_tokens)
    return Request(prompt_token_ids=engine.tokenizer.encode(TEXTS[text]), sampling=SamplingParams(**params), **more)


@pytest.fixture(scope="module")
def plain(fused_engine):
    """The answer of a request that is alone, a step at a time."""

    @cache
    def compute(text: int, sampling: int, max_tokens: int) -> Answer:
        engine = fused_engine(0.0)
        return run(engine, [make_request(engine, text, sampling, max_tokens)])[0]

    return compute


def count_calls(engine: Engine) -> list[int]:
    """The number of rows of each call of the model, from now on."""
    fused, rows = engine.runner.model.fused, []
    step = fused.step
    fused.step = lambda ids, *rest, **more: (rows.append(len(ids)), step(ids, *rest, **more))[1]
    return rows


def same(found: Answer, expected: Answer) -> bool:
    parts = ("text", "tokens", "reasons", "stops", "usage")
    return all(getattr(found, part) == getattr(expected, part) for part in parts)


@pytest.mark.parametrize("sampling", range(len(SAMPLING)), ids=lambda i: str(SAMPLING[i]))
@pytest.mark.parametrize("speculation", ["off", "ngram"])
def test_every_setting_gives_the_same_answer_in_as_many_steps_and_fewer_calls(
    fused_engine, plain, sampling, speculation
) -> None:
    for text in range(len(TEXTS)):
        engine = fused_engine(speculation=speculation)
        calls = count_calls(engine)
        assert same(run(engine, [make_request(engine, text, sampling, 40)])[0], plain(text, sampling, 40))
        assert engine.pool.num_free == engine.pool.num_blocks
        if SAMPLING[sampling] in ({}, {"n": 3}) and speculation == "off":
            assert engine.stats.steps >= 40
            assert (
                len(calls) <= 3 + 3
            )  # prompts (copies wait for the first), then 39 tokens at 16 a call; the last ones
        elif not SAMPLING[sampling].keys() <= {"stop", "n", "min_tokens", "ignore_eos", "prompt_logprobs"}:
            assert len(calls) == engine.stats.steps  # these have to be asked after every token


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.tuples(
            st.tuples(st.integers(0, len(TEXTS) - 1), st.integers(0, len(SAMPLING) - 1), st.integers(1, 40)),
            st.integers(0, 3),
            st.none() | st.integers(0, 4),
        ),
        min_size=1,
        max_size=8,
    ),
    st.integers(16, 32),
    st.sampled_from(["off", "ngram"]),
)
def test_any_arrivals_aborts_and_cache_sizes(fused_engine, plain, arrivals, num_blocks, speculation) -> None:
    """Also where blocks are so short that steps beyond the next have no room, or sequences are preempted."""
    engine = fused_engine(num_blocks=num_blocks, speculation=speculation, max_batch=6)
    for answer, job in play(engine, arrivals, lambda *parts: make_request(engine, *parts)):
        expected = plain(*job)
        if "abort" not in answer.reasons:
            assert same(answer, expected)
        for found, complete in zip(answer.tokens, expected.tokens, strict=True):
            assert found == complete[: len(found)]


def test_an_end_token_ends_the_call(fused_engine, plain) -> None:
    """What the model would write after its end is not computed, but for the step that is under way."""
    engine = fused_engine()
    tokens = plain(0, 0, 40).tokens[0]
    end = tokens[5]
    calls = count_calls(engine)
    sampling = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True, stop_token_ids=(end,))
    answer = run(engine, [Request(prompt_token_ids=engine.tokenizer.encode(TEXTS[0]), sampling=sampling)])[0]
    place = tokens.index(end)
    assert answer.tokens[0] == tokens[: place + 1] and answer.reasons == ["stop"]
    assert engine.stats.steps == place + 1 and len(calls) <= 2


def test_a_prompt_of_one_token_has_its_log_probabilities(fused_engine) -> None:
    sampling = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True, prompt_logprobs=1)
    found = [run(fused_engine(s), [Request(prompt_token_ids=[9], sampling=sampling)])[0] for s in (0.0, FOREVER)]
    assert found[0].prompt_logprobs == found[1].prompt_logprobs == [None]
    assert same(found[1], found[0])


def test_constrained_answers_are_asked_for_every_token(fused_engine) -> None:
    engine = fused_engine()
    calls = count_calls(engine)
    request = make_request(engine, 0, 0, 20, constraint=regex(engine.tokenizer, "[a-f]{8}"))
    answer = run(engine, [request])[0]
    assert len(answer.text[0]) == 8 and set(answer.text[0]) <= set("abcdef")
    assert len(calls) == engine.stats.steps


def test_who_waits_does_not_wait_for_several_steps(fused_engine) -> None:
    engine = fused_engine()
    engine.add(make_request(engine, 0, 0, 60))
    engine.step()
    engine.interrupt()  # as a request from another thread does
    before = engine.stats.steps
    engine.step()
    assert engine.stats.steps == before + 1
    engine.step()
    assert engine.stats.steps == before + 1 + 16
    assert fused_engine(1e-9).config.stream_interval  # time that is over after one step:
    engine = fused_engine(1e-9)
    calls = count_calls(engine)
    run(engine, [make_request(engine, 0, 0, 20)])
    assert len(calls) == engine.stats.steps == 20


def test_impossible_steps_are_refused_before_anything_is_computed(fused_engine) -> None:
    fused = fused_engine().runner.model.fused
    for ids, spans, scored in (
        ([1, 2], [(0, 2, [0])], [1]),  # a prompt
        ([1, 2], [(3, 1, [0]), (3, 1, [1])], [0]),  # a row nobody scores
        ([1, 2], [(3, 1, [0]), (3, 1, [1])], [1, 0]),  # another order
        ([1], [(12, 1, [0])], [0]),  # the fifth step has no block
    ):
        with pytest.raises(ValueError):
            fused.step(ids, spans, scored, steps=5, seconds=1.0)
    for steps in (0, -1):
        with pytest.raises(ValueError):
            fused.step([1], [(0, 1, [0])], [0], steps=steps)
    _, logits, words = fused.step([1], [(0, 1, [0])], [0], steps=5, seconds=FOREVER)
    assert len(words) == 5 and words[-1] == int(np.argmax(logits[0]))
