"""Encoder-decoders behind the engine: greedy and beam answers equal transformers', and everything that decoders can do
(batches, preemption, aborts, speculation, penalties) works with sources of different lengths in one step."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from bimo.engine.cache import BlockPool
from bimo.engine.engine import Engine, EngineConfig
from bimo.engine.request import Request, SamplingParams
from bimo.engine.runner import ModelRunner
from bimo.engine.scheduler import Scheduled
from bimo.engine.sequence import Source
from bimo.errors import ContextLengthError, UsageError
from bimo.formats.huggingface import load_model
from bimo.models.seq2seq import EncoderDecoder
from bimo.tokenizer.load import Tokenizer

from .conftest import Answer, play, run

IDS = {"pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 0}
BART = {
    "vocab_size": 97, "d_model": 48, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 3,
    "decoder_attention_heads": 3, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "max_position_embeddings": 64,
    "init_std": 0.3, "forced_eos_token_id": None, **IDS,
}  # fmt: skip
T5 = {
    "vocab_size": 97, "d_model": 48, "d_kv": 12, "d_ff": 64, "num_layers": 2, "num_heads": 4, "n_positions": 64,
    "relative_attention_num_buckets": 8, "relative_attention_max_distance": 16, "initializer_factor": 3.0, **IDS,
}  # fmt: skip
FAMILIES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "marian": (transformers.MarianConfig, transformers.MarianMTModel, BART | {"scale_embedding": True}),
    "bart": (
        transformers.BartConfig,
        transformers.BartForConditionalGeneration,
        BART | {"pad_token_id": 1, "decoder_start_token_id": 2, "forced_bos_token_id": 5},
    ),
    "t5": (transformers.T5Config, transformers.T5ForConditionalGeneration, T5),
    "t5-gated": (
        transformers.T5Config,
        transformers.T5ForConditionalGeneration,
        T5 | {"feed_forward_proj": "gated-gelu", "num_heads": 3},
    ),
}
SOURCES = ((7,), (11, 12, 13), tuple(range(20, 57)), (90, 8, 90, 8, 90, 8, 90), tuple(range(60, 77)))
MODES: tuple[dict[str, Any], ...] = (
    {"temperature": 0},
    {"temperature": 1.0, "top_k": 20},
    {"temperature": 0.8, "repetition_penalty": 1.2, "n": 2},
    {"num_beams": 3, "n": 2},
    {"penalty_alpha": 0.5, "top_k": 3},
)
Make = Callable[..., Engine]


@pytest.fixture(scope="module", params=list(FAMILIES))
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any, EncoderDecoder]:
    """Its name, a random transformers model whose answers depend on all of the source, and bimo's."""
    config, architecture, settings = FAMILIES[request.param]
    torch.manual_seed(3)
    reference = architecture(config(**settings))
    with torch.no_grad():
        for name, tensor in reference.named_parameters():
            if name.endswith(("fc2.weight", "encoder_attn.out_proj.weight")):
                tensor.mul_(12)  # else the residual path wins, and every answer repeats one word
            if name.endswith(("EncDecAttention.o.weight", "wo.weight")):
                tensor.mul_(5)
    directory: Path = tmp_path_factory.mktemp("seq2seq") / request.param
    reference.save_pretrained(directory)
    model = load_model(directory, torch.float32)
    assert isinstance(model, EncoderDecoder)
    return request.param, reference.eval(), model


@pytest.fixture(scope="module")
def make(family: tuple[str, Any, EncoderDecoder], tiny_tokenizer: Tokenizer) -> Make:
    """An engine with its own cache; the start and the padding are never chosen, and BART's first token is forced."""
    name, _, model = family
    config = model.config
    banned = {config.pad_token_id, config.decoder_start_token_id} - {config.eos_token_id}
    rules: dict[str, Any] = {
        "banned_token_ids": tuple(banned),
        "first_token_id": FAMILIES[name][2].get("forced_bos_token_id"),
    }

    def make(num_blocks: int = 128, block_size: int = 4, context_length: int = 64, **limits: Any) -> Engine:
        runner = ModelRunner(model, num_blocks=num_blocks, block_size=block_size)
        return Engine(runner, tiny_tokenizer, EngineConfig(context_length=context_length, **rules, **limits))

    return make


def ask(source: int, mode: int = 0, max_tokens: int = 12, **more: Any) -> Request:
    """The tiny tokenizer's end token is 2, as the models'."""
    sampling = SamplingParams(max_tokens=max_tokens, **{"seed": source, **MODES[mode], **more})
    return Request(prompt_token_ids=list(SOURCES[source]), sampling=sampling)


def expected(family: tuple[str, Any, EncoderDecoder], source: int, max_tokens: int, **settings: Any) -> list[list[int]]:
    """transformers' answers, without the start token, each up to its end."""
    name, reference, model = family
    rows = reference.generate(
        torch.tensor([SOURCES[source]]),
        attention_mask=torch.ones(1, len(SOURCES[source]), dtype=torch.long),
        do_sample=False,
        max_new_tokens=max_tokens,
        bad_words_ids=[[model.config.pad_token_id]],
        forced_bos_token_id=FAMILIES[name][2].get("forced_bos_token_id"),
        **settings,
    )
    answers = []
    for row in rows[:, 1:].tolist():
        end = row.index(2) + 1 if 2 in row else max_tokens
        answers.append(row[:end])
    return answers


def test_greedy_answers_equal_transformers(make: Make, family: tuple[str, Any, EncoderDecoder]) -> None:
    answers = run(make(), [ask(source, max_tokens=20) for source in range(len(SOURCES))])
    for source, answer in enumerate(answers):
        assert answer.tokens == expected(family, source, 20)
        assert answer.usage.prompt_tokens == len(SOURCES[source])
        assert answer.usage.completion_tokens == len(answer.tokens[0])
    found = [answer.tokens[0] for answer in answers]
    assert len({tuple(tokens) for tokens in found}) >= 4, "the source does not show in the answer"
    assert max(len(set(tokens)) for tokens in found) >= 3, "answers of one word compare nothing"


@pytest.mark.parametrize(
    "settings",
    [
        {"num_beams": 2},
        {"num_beams": 4, "n": 4, "length_penalty": 2.0},
        {"num_beams": 3, "n": 3, "length_penalty": -1.0},
        {"num_beams": 3, "early_stopping": True},
    ],
    ids=str,
)
def test_beam_search_equals_transformers(
    make: Make, family: tuple[str, Any, EncoderDecoder], settings: dict[str, Any]
) -> None:
    requests = [
        Request(prompt_token_ids=list(source), sampling=SamplingParams(max_tokens=14, **settings)) for source in SOURCES
    ]
    wanted = {key: value for key, value in settings.items() if key != "n"}
    for source, answer in enumerate(run(make(), requests)):
        assert answer.tokens == expected(family, source, 14, num_return_sequences=settings.get("n", 1), **wanted)


@pytest.fixture(scope="module")
def alone(make: Make) -> Callable[..., Answer]:
    """The answer from an engine of its own."""

    @cache
    def compute(source: int, mode: int, max_tokens: int) -> Answer:
        return run(make(), [ask(source, mode, max_tokens)])[0]

    return compute


def test_a_batch_is_the_same_as_alone(make: Make, alone: Callable[..., Answer]) -> None:
    jobs = [(source, mode, 10) for source in range(len(SOURCES)) for mode in range(len(MODES))]
    for answer, job in zip(run(make(num_blocks=400), [ask(*job) for job in jobs]), jobs, strict=True):
        assert answer.tokens == alone(*job).tokens, job


def test_arrivals_aborts_and_a_cache_that_is_too_small(make: Make, alone: Callable[..., Answer]) -> None:
    """`play` checks the engine's integrity after every step, and that no block is lost."""
    arrivals = [
        ((i % len(SOURCES), i * 2 % len(MODES), 6 + i % 5), i % 3, 4 if i in (2, 7, 8) else None) for i in range(20)
    ]
    engine = make(num_blocks=24, max_batch=6, max_step_tokens=12)
    for answer, job in play(engine, arrivals, ask):
        for tokens, reason, whole in zip(answer.tokens, answer.reasons, alone(*job).tokens, strict=True):
            assert tokens == (whole[: len(tokens)] if reason == "abort" else whole)


def test_preempted_answers_are_read_and_written_again(make: Make, alone: Callable[..., Answer]) -> None:
    engine = make(num_blocks=14, max_batch=8)
    jobs = [(0, 0, 12), (1, 0, 12), (3, 1, 12), (0, 0, 12), (1, 3, 8)]
    for answer, job in zip(run(engine, [ask(*job) for job in jobs]), jobs, strict=True):
        assert answer.tokens == alone(*job).tokens, job
    assert engine.scheduler.num_preemptions > 0
    assert engine.pool.num_free == engine.pool.num_blocks


def test_samples_and_beams_read_their_source_once(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make()
    read: list[int] = []
    encode = engine.runner.model.model.encode

    def count(ids: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        read.append(len(ids))
        return encode(ids, mask)

    monkeypatch.setattr(engine.runner.model.model, "encode", count)
    run(engine, [ask(2, mode=1, n=5), ask(1, mode=3)])
    assert sum(read) == 2
    assert engine.pool.num_free == engine.pool.num_blocks


def test_blocks_of_different_sources_are_never_mixed(make: Make, alone: Callable[..., Answer]) -> None:
    """The same answer so far, forced token by token, behind two sources: equal blocks of tokens, different content."""
    engine = make(block_size=1)
    first, second, third = (run(engine, [ask(source)])[0] for source in (2, 4, 2))
    assert first.tokens == third.tokens == alone(2, 0, 12).tokens
    assert second.tokens == alone(4, 0, 12).tokens
    pool = BlockPool(4, 2)
    pool.name(pool.allocate(), b"x")
    one, other = Source([5, 6]), Source([5, 7])
    assert one.name != other.name != b""
    assert Source([5, 6]).name == one.name


def test_the_same_seed_gives_the_same_sample(make: Make) -> None:
    tokens = [run(make(), [ask(2, mode=1, seed=seed)])[0].tokens for seed in (1, 1, 2)]
    assert tokens[0] == tokens[1] != tokens[2]


def test_drafts_change_nothing(make: Make, alone: Callable[..., Answer]) -> None:
    """A proposer that guesses right, wrong and beyond: rows of drafts look at the source as others do."""
    engine = make()
    whole = alone(2, 0, 12).tokens[0]
    assert engine.speculation is not None

    class Proposer:
        price = 0.0

        def propose(self, wishes: Any, room: int, reserve: Any) -> Any:
            found = {}
            for sequence, count in wishes.items():
                done = sequence.num_output
                guess = [*whole[done : done + 2], 96][: min(count, room)]
                found[sequence] = guess[: reserve(sequence, len(guess))]
            return found

    engine.speculation.proposer = Proposer()
    assert run(engine, [ask(2)])[0].tokens[0] == whole
    assert engine.stats.accepted_tokens > 0


def test_logprobs_are_the_model_s(make: Make, family: tuple[str, Any, EncoderDecoder]) -> None:
    _, _, model = family
    answer = run(make(), [ask(1, logprobs=3, max_tokens=6)])[0]
    start = model.config.decoder_start_token_id
    ids = torch.tensor([[start, *answer.tokens[0]]])
    with torch.no_grad():
        scores = model.logits(model(torch.tensor([SOURCES[1]]), ids)).log_softmax(-1)[0]
    for place, found in enumerate(answer.logprobs[0]):
        assert found.logprob == pytest.approx(float(scores[place, found.token_id]), abs=1e-3)
        assert len(found.top) == 3


def test_a_stream_s_pieces_make_the_answer(make: Make, alone: Callable[..., Answer]) -> None:
    engine, request = make(), ask(2)
    engine.add(request)
    pieces = [output.token_ids for _ in range(50) if engine.has_work for output in engine.step()]
    assert len(pieces) > 1
    assert [token for piece in pieces for token in piece] == alone(2, 0, 12).tokens[0]


@pytest.mark.parametrize(
    ("prompt", "settings", "error", "words"),
    [
        ([], {}, UsageError, "prompt is empty"),
        ([-1], {}, UsageError, "from 0 to 96"),
        ([97], {}, UsageError, "from 0 to 96"),
        ([5] * 65, {}, ContextLengthError, "65 tokens, the context holds 64: shorten"),
        ([5], {"prompt_logprobs": 0}, UsageError, "leave prompt_logprobs out"),
        ([5] * 8, {"num_beams": 16, "max_tokens": 60}, UsageError, "KV cache"),
    ],
    ids=["empty", "negative", "beyond", "long", "prompt_logprobs", "beams"],
)
def test_what_cannot_be_answered_is_refused(
    make: Make, prompt: list[int], settings: dict[str, Any], error: type[Exception], words: str
) -> None:
    engine = make()
    with pytest.raises(error, match=words):
        engine.add(Request(prompt_token_ids=prompt, sampling=SamplingParams(**settings)))
    assert not engine.has_work


def test_source_and_answer_have_a_context_each(make: Make) -> None:
    longest = Request(prompt_token_ids=[5] * 64, sampling=SamplingParams(ignore_eos=True, temperature=0))
    answer = run(make(), [longest])[0]
    assert (len(answer.tokens[0]), answer.reasons) == (63, ["length"])
    cut = Request(prompt_token_ids=[9] + [5] * 64, sampling=SamplingParams(max_tokens=4), truncate_prompt=True)
    assert run(make(), [cut])[0].usage.truncated_tokens == 1
    tight = make(num_blocks=6)  # 24 tokens: 20 of a source leave a block for the answer
    answer = run(tight, [Request(prompt_token_ids=[5] * 20, sampling=SamplingParams(ignore_eos=True))])[0]
    assert len(answer.tokens[0]) == 3
    with pytest.raises(ContextLengthError, match="context holds 20"):
        tight.add(Request(prompt_token_ids=[5] * 21))


def test_a_source_is_read_even_when_the_step_is_full(make: Make) -> None:
    """Its tokens count against the step that reads it, and are never cut in pieces."""
    engine = make(max_batch=4, max_step_tokens=4, max_prefill_tokens=4)
    engine.add(ask(2))
    engine.add(ask(2, seed=1))
    plan: list[Scheduled] = engine.scheduler.schedule()
    assert [work.count for work in plan] == [1]
    assert [len(s.source.holders) for s in engine.scheduler.running if s.source] == [1]
