"""`import bimo` as a user writes it."""

from __future__ import annotations

import asyncio

import pytest

import bimo
from bimo.errors import ContextLengthError, UsageError


@pytest.fixture(scope="module")
def model(tiny_model_dir):
    with bimo.load(str(tiny_model_dir), dtype="float32", kv_cache_tokens=4096) as model:
        yield model


def test_generate_gives_a_completion_or_a_list(model) -> None:
    one = model.generate("从前有", max_tokens=6, seed=1)
    assert isinstance(one, bimo.Completion) and one.text == str(one)
    assert one.finish_reason in ("stop", "length") and one.usage.completion_tokens == len(one.tokens)
    assert one.timings.total >= one.timings.time_to_first_token > 0
    five = model.generate("从前有", max_tokens=50, min_tokens=0, temperature=1.0, top_p=0.9, top_k=100, n=5, seed=1)
    assert [type(c) for c in five] == [bimo.Completion] * 5


def test_chat_takes_messages_or_a_text(model) -> None:
    messages = [{"role": "system", "content": "用中文回答"}, {"role": "user", "content": "你好 🦊"}]
    assert (
        model.chat(messages, temperature=0, max_tokens=8).tokens
        == model.chat(messages, temperature=0, max_tokens=8).tokens
    )
    assert model.chat("你好 🦊", temperature=0, max_tokens=8).usage.completion_tokens <= 8


@pytest.mark.parametrize("prompt", ["Once upon", [{"role": "user", "content": "讲个故事"}]])
def test_stream_joins_to_the_whole(model, prompt) -> None:
    whole = model.generate if isinstance(prompt, str) else model.chat
    assert (
        "".join(model.stream(prompt, temperature=0, max_tokens=20)) == whole(prompt, temperature=0, max_tokens=20).text
    )


async def test_async_calls_are_one_batch(model) -> None:
    steps = model.backend.stats().steps
    texts = ["Once", "从前", "def", "🦊"]
    answers = await asyncio.gather(
        *(model.agenerate(text, temperature=0, max_tokens=16, ignore_eos=True) for text in texts),
        model.achat("你好", temperature=0, max_tokens=16, ignore_eos=True),
    )
    assert model.backend.stats().steps - steps < 3 * 16
    for text, answer in zip(texts, answers, strict=False):
        assert answer.text == model.generate(text, temperature=0, max_tokens=16, ignore_eos=True).text
    pieces = [piece async for piece in model.astream("Once", temperature=0, max_tokens=16, ignore_eos=True)]
    assert "".join(pieces) == answers[0].text


def test_logprobs_follow_the_tokens(model) -> None:
    answer = model.generate("Once", max_tokens=5, logprobs=2)
    assert [p.token_id for p in answer.logprobs] == answer.tokens
    assert model.generate("Once", max_tokens=5).logprobs is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_token": 5}, "did you mean max_tokens"),
        ({"temprature": 1}, "did you mean temperature"),
        ({"temperature": -1}, "between 0 and 100"),
        ({"beams": 2}, "num_beams"),
    ],
)
def test_wrong_arguments_are_named(model, arguments, message) -> None:
    with pytest.raises(UsageError, match=message):
        model.generate("Once", **arguments)


def test_lone_surrogates_and_long_prompts_are_refused(model) -> None:
    with pytest.raises(UsageError):
        model.generate("broken \ud800")
    with pytest.raises(ContextLengthError, match="512"):
        model.generate("你好" * 1000)
    truncated = model.generate("你好" * 1000, truncate_prompt=True, max_tokens=4)
    assert truncated.usage.truncated_tokens > 0
    with pytest.raises(UsageError, match="n must be 1"):
        list(model.stream("Once", n=2))


def test_public_names() -> None:
    assert set(bimo.__all__) == {"BimoError", "Completion", "Model", "SamplingParams", "__version__", "load"}
    for name in bimo.__all__:
        assert getattr(bimo, name) is not None
    with pytest.raises(AttributeError):
        _ = bimo.nonsense
