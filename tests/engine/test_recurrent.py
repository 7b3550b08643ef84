"""The LSTM behind the engine: answers equal a plain loop, and its states follow blocks through prefix cache, forks,
preemption and aborts."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch

from bimo.engine.engine import Engine, EngineConfig
from bimo.engine.request import Request, SamplingParams
from bimo.engine.runner import ModelRunner
from bimo.errors import ContextLengthError, UsageError
from bimo.models.config import LSTMConfig
from bimo.models.recurrent import LSTMLanguageModel
from bimo.tokenizer.load import Tokenizer

from .conftest import Answer, play, run

TEXTS = (
    "The quick brown fox",
    "从前有一个小小的模型，它学会了写字。" * 3,
    "🦊",
    "def add(a: int, b: int)",
    "床前明月光，" * 6,
)
MODES: tuple[dict[str, Any], ...] = (
    {"temperature": 0},
    {"temperature": 1.0, "top_k": 20},
    {"temperature": 0.8, "top_p": 0.9, "repetition_penalty": 1.2, "n": 2},
    {"num_beams": 3, "n": 2, "length_penalty": 1.5},
    {"penalty_alpha": 0.5, "top_k": 3},
)
Make = Callable[..., Engine]


@pytest.fixture(scope="module")
def model(tiny_tokenizer: Tokenizer) -> LSTMLanguageModel:
    torch.manual_seed(0)
    model = LSTMLanguageModel(LSTMConfig(vocab_size=tiny_tokenizer.vocab_size, hidden_size=48, max_positions=256))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.5)  # large, so that what was read long ago shows
    return model.eval()


@pytest.fixture(scope="module")
def make(model: LSTMLanguageModel, tiny_tokenizer: Tokenizer) -> Make:
    def make(num_blocks: int = 128, block_size: int = 4, context_length: int = 256, **limits: Any) -> Engine:
        runner = ModelRunner(model, num_blocks=num_blocks, block_size=block_size)
        return Engine(runner, tiny_tokenizer, EngineConfig(context_length=context_length, **limits))

    return make


def ask(engine: Engine, text: int, mode: int = 0, max_tokens: int = 12, **more: Any) -> Request:
    sampling = SamplingParams(**{"max_tokens": max_tokens, "seed": text, "ignore_eos": True, **MODES[mode], **more})
    return Request(prompt_token_ids=engine.tokenizer.encode(TEXTS[text]), sampling=sampling)


@pytest.fixture(scope="module")
def alone(make: Make) -> Callable[..., Answer]:
    """The answer from an engine of its own."""

    @cache
    def compute(text: int, mode: int, max_tokens: int) -> Answer:
        engine = make()
        return run(engine, [ask(engine, text, mode, max_tokens)])[0]

    return compute


@torch.no_grad()
def plain_loop(model: LSTMLanguageModel, prompt: list[int], count: int) -> list[int]:
    """Greedy, by reading the whole text again for every token."""
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(model.logits(model(torch.tensor([ids])))[0, -1].argmax()))
    return ids[len(prompt) :]


def test_greedy_answers_equal_a_plain_loop(make: Make, model: LSTMLanguageModel) -> None:
    engine = make()
    answers = run(engine, [ask(engine, text, max_tokens=24) for text in range(len(TEXTS))])
    for text, answer in zip(TEXTS, answers, strict=True):
        assert answer.tokens[0] == plain_loop(model, engine.tokenizer.encode(text), 24)
    assert len({tuple(answer.tokens[0]) for answer in answers}) == len(TEXTS)


def test_beams_are_the_likeliest(make: Make, model: LSTMLanguageModel) -> None:
    """With as many beams as there are beginnings worth keeping, by definition: a step keeps the best of all."""
    engine = make()
    prompt = engine.tokenizer.encode(TEXTS[0])
    beams: list[tuple[float, list[int]]] = [(0.0, [])]
    for _ in range(5):
        grown = []
        for score, tokens in beams:
            with torch.no_grad():
                scores = model.logits(model(torch.tensor([prompt + tokens])))[0, -1].log_softmax(-1)
            best = scores.topk(4)
            found = zip(best.values.tolist(), best.indices.tolist(), strict=True)
            grown += [(score + value, [*tokens, token]) for value, token in found]
        beams = sorted(grown, reverse=True)[:4]
    answer = run(engine, [ask(engine, 0, max_tokens=5, temperature=1, num_beams=4, n=4)])[0]
    assert answer.tokens == [tokens for _, tokens in beams]


def test_a_batch_is_the_same_as_alone(make: Make, alone: Callable[..., Answer]) -> None:
    jobs = [(text, mode, 10) for text in range(len(TEXTS)) for mode in range(len(MODES))]
    engine = make(num_blocks=500)
    for answer, job in zip(run(engine, [ask(engine, *job) for job in jobs]), jobs, strict=True):
        assert answer.tokens == alone(*job).tokens, job


def test_a_known_prefix_is_not_read_again(make: Make, alone: Callable[..., Answer]) -> None:
    engine = make()
    first, second = (run(engine, [ask(engine, 1)])[0] for _ in range(2))
    assert first.tokens == second.tokens == alone(1, 0, 12).tokens
    assert first.usage.cached_tokens == 0
    assert second.usage.cached_tokens == (second.usage.prompt_tokens - 1) // 4 * 4
    whole = engine.tokenizer.encode(TEXTS[1])
    for cut in (9, 12, 15):  # within a block, and at its end
        request = Request(prompt_token_ids=[*whole[:cut], 9], sampling=ask(engine, 0).sampling)
        again = Request(prompt_token_ids=[*whole[:cut], 9], sampling=ask(engine, 0).sampling)
        assert run(engine, [request])[0].tokens == run(make(), [again])[0].tokens


def test_arrivals_aborts_and_a_cache_that_is_too_small(make: Make, alone: Callable[..., Answer]) -> None:
    """`play` checks the engine's integrity after every step, and that no block is lost."""
    engine = make(num_blocks=44, max_batch=6, max_step_tokens=10, max_prefill_tokens=10)
    jobs = [(i % len(TEXTS), i * 2 % len(MODES), 6 + i % 6) for i in range(16)]
    arrivals = [(job, i % 2, 5 if i in (3, 8, 9) else None) for i, job in enumerate(jobs)]
    for answer, played in play(engine, arrivals, lambda *wish: ask(engine, *wish)):
        for tokens, reason, whole in zip(answer.tokens, answer.reasons, alone(*played).tokens, strict=True):
            assert tokens == (whole[: len(tokens)] if reason == "abort" else whole)


def test_preempted_texts_are_read_again(make: Make, alone: Callable[..., Answer]) -> None:
    engine = make(num_blocks=24, max_batch=8)
    jobs = [(text, 0, 20) for text in (0, 2, 3, 0, 2)]
    assert [a.tokens for a in run(engine, [ask(engine, *job) for job in jobs])] == [alone(*job).tokens for job in jobs]
    assert engine.scheduler.num_preemptions > 0


def test_the_same_seed_gives_the_same_sample(make: Make) -> None:
    engine = make()
    tokens = [run(engine, [ask(engine, 0, 1, seed=seed)])[0].tokens for seed in (1, 1, 2)]
    assert tokens[0] == tokens[1] != tokens[2]


def test_probabilities_of_prompt_and_answer_are_the_model_s(make: Make, model: LSTMLanguageModel) -> None:
    engine = make(max_step_tokens=8, max_batch=4)
    answer = run(engine, [ask(engine, 1, max_tokens=4, logprobs=0, prompt_logprobs=0)])[0]
    ids = engine.tokenizer.encode(TEXTS[1]) + answer.tokens[0]
    with torch.no_grad():
        scores = model.logits(model(torch.tensor([ids])))[0].log_softmax(-1)
    found = [*answer.prompt_logprobs[1:], *answer.logprobs[0]]
    assert [p.token_id for p in found] == ids[1:]
    for place, entry in enumerate(found):
        assert entry.logprob == pytest.approx(float(scores[place, ids[place + 1]]), abs=1e-3)


def test_a_stop_string_ends_a_stream(make: Make, alone: Callable[..., Answer]) -> None:
    engine = make()
    text = alone(0, 0, 12).text[0]
    stop = text[len(text) // 2 :][:2]
    answer = run(engine, [ask(engine, 0, stop=(stop,))])[0]
    assert answer.text[0] == text[: text.index(stop)]
    assert answer.stops == [stop]


def test_nothing_is_guessed_and_much_is_refused(make: Make) -> None:
    engine = make()
    assert engine.speculation is None  # "ngram" is the default: a state cannot be taken back
    for prompt, error in (([], UsageError), ([10**6], UsageError), ([5] * 256, ContextLengthError)):
        with pytest.raises(error):
            engine.add(Request(prompt_token_ids=prompt))
    assert not engine.has_work


def test_memory_is_a_state_a_block(make: Make, model: LSTMLanguageModel) -> None:
    from bimo.engine.cache import bytes_per_block

    cache = make(num_blocks=10).runner.cache
    assert cache.states.numel() * 4 == 10 * bytes_per_block(model.config, "float32", 4) == 10 * 2 * 2 * 48 * 4
