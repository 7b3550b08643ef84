"""Speculation changes nothing but the number of steps: whatever is proposed, the answers are those given without it."""

from __future__ import annotations

import json
import math
import random
from collections import Counter
from functools import cache
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bimo.backends.build import load_decoder
from bimo.engine.cache import BlockPool
from bimo.engine.constrain import choice, json_schema, regex
from bimo.engine.drafting import DraftModelProposer, check_vocabularies
from bimo.engine.engine import Engine, EngineConfig
from bimo.engine.fused import FusedDecoder, can_fuse
from bimo.engine.fusing import fuse_weights
from bimo.engine.request import Request, SamplingParams
from bimo.engine.runner import ModelRunner
from bimo.engine.sampling import distribution, process_logits
from bimo.engine.scheduler import Scheduled, Scheduler
from bimo.engine.sequence import Sequence
from bimo.engine.speculation import MAX_LOSS, MAX_WIDTH, ROW_PRICE, NgramIndex, Pace, divide
from bimo.engine.verify import Turn, choose
from bimo.errors import UsageError
from bimo.formats.huggingface import load_weights, read_config
from bimo.models.decoder import Decoder
from bimo.tokenizer.load import Tokenizer
from tests.conftest import make_tiny_model

from .conftest import Answer, play, run

TEXTS = (
    "The quick brown fox jumps over the lazy dog. The quick brown fox jumps over the lazy dog. The quick",
    "从前有一个小小的模型，它学会了写字。从前有一个小小的模型，它学会了写字。从前有",
    "def add(a: int, b: int) -> int:\n    return a + b\n\ndef add(a: int, b: int) -> int:\n    return",
    "🦊 jumps over 🐶, 🐶 jumps over 🦊, 🦊 jumps over 🐶, 🐶",
    "Hello",
)
SAMPLING = (
    {"temperature": 0},
    {"temperature": 0, "repetition_penalty": 1.3},
    {"temperature": 0.8, "top_p": 0.9, "frequency_penalty": 0.3, "logprobs": 2},
    {"temperature": 0.7, "top_k": 5, "n": 3, "logprobs": 0},
    {"temperature": 0.3, "n": 2, "best_of": 3},
    {"temperature": 0.5, "min_p": 0.05, "min_tokens": 6, "logit_bias": {2: 4.0}, "ignore_eos": False},
    {"temperature": 0, "stop": ("e", "的", "🐶"), "presence_penalty": -0.5},
    {"temperature": 0, "prompt_logprobs": 0},
    {"num_beams": 3},
    {"penalty_alpha": 0.5, "top_k": 3},
)


class Oracle:
    """Drafts that are true as far as chance will have it, and nonsense from there on."""

    price = ROW_PRICE

    def __init__(self, seed: int = 0, share: float | None = None) -> None:
        self.answers: dict[str, Answer] = {}
        self.rng, self.share = random.Random(seed), share

    def propose(self, wishes, room, reserve):
        drafts = {}
        for sequence, count in divide(wishes, room).items():
            count = reserve(sequence, count)
            answer = self.answers[sequence.request.request_id]
            true = answer.tokens[sequence.index][sequence.num_output :] if sequence.index < len(answer.tokens) else []
            known = round(self.share * count) if self.share is not None else self.rng.randint(0, count)
            nonsense = [self.rng.randrange(500) for _ in range(count)]
            drafts[sequence] = (true[:known] + nonsense)[:count]
        return drafts


@pytest.fixture(scope="module")
def other_decoder(tmp_path_factory: pytest.TempPathFactory, device: str) -> Decoder:
    """The tiny model with other weights: a draft model that is nearly always wrong."""
    directory = make_tiny_model(tmp_path_factory.mktemp("other") / "tiny-other", seed=7)
    return load_decoder(directory, read_config(directory), torch.float32, device)


@pytest.fixture(scope="module")
def with_proposer(make_engine, tiny_decoder, other_decoder):
    """An engine whose drafts come from: ngram, oracle, draft (the model itself), bad draft."""

    def make(kind: str, **limits) -> Engine:
        engine = make_engine(**limits)
        proposers = {
            "ngram": lambda: engine.speculation.proposer,
            "oracle": Oracle,
            "draft": lambda: DraftModelProposer(tiny_decoder, engine.runner),
            "bad draft": lambda: DraftModelProposer(other_decoder, engine.runner),
        }
        engine.speculation.proposer = proposers[kind]()
        return engine

    return make


def make_request(tokenizer: Tokenizer, text: int, sampling: int, max_tokens: int, **more) -> Request:
    params = {"max_tokens": max_tokens, "seed": text, "ignore_eos": True, **SAMPLING[sampling], **more}
    params["min_tokens"] = min(params.get("min_tokens", 0), max_tokens)
    return Request(prompt_token_ids=tokenizer.encode(TEXTS[text]), sampling=SamplingParams(**params))


@pytest.fixture(scope="module")
def plain(make_engine):
    """The answer without speculation, and how many steps it took."""

    @cache
    def compute(text: int, sampling: int, max_tokens: int) -> tuple[Answer, int]:
        engine = make_engine(speculation="off")
        answer = run(engine, [make_request(engine.tokenizer, text, sampling, max_tokens)])[0]
        return answer, engine.stats.steps

    return compute


def assert_same(found: Answer, expected: Answer) -> None:
    assert found.tokens == expected.tokens
    assert (found.text, found.reasons, found.stops) == (expected.text, expected.reasons, expected.stops)
    assert found.usage.completion_tokens == expected.usage.completion_tokens
    assert [len(part) for part in found.logprobs] == [len(part) for part in expected.logprobs]
    for ours, theirs in zip(chain(*found.logprobs), chain(*expected.logprobs), strict=True):
        assert ours.token_id == theirs.token_id and ours.logprob == pytest.approx(theirs.logprob, abs=1e-3)
        assert [token for token, _ in ours.top] == [token for token, _ in theirs.top]


def tell(engine: Engine, request: Request, answer: Answer) -> None:
    proposer = engine.speculation and engine.speculation.proposer
    if isinstance(proposer, Oracle):
        proposer.answers[request.request_id] = answer


# -- the same answers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["ngram", "oracle", "draft", "bad draft"])
@pytest.mark.parametrize("sampling", range(len(SAMPLING)), ids=lambda i: str(SAMPLING[i]))
def test_every_setting_gives_the_same_answer(with_proposer, plain, kind, sampling) -> None:
    drafted = 0
    for text in range(len(TEXTS)):
        engine = with_proposer(kind)
        request = make_request(engine.tokenizer, text, sampling, 24)
        expected, _ = plain(text, sampling, 24)
        tell(engine, request, expected)
        assert_same(run(engine, [request])[0], expected)
        drafted += engine.stats.drafted_tokens
    searching = bool({"num_beams", "penalty_alpha"} & SAMPLING[sampling].keys())
    if kind != "ngram":
        assert (drafted == 0) == searching


jobs = st.tuples(st.integers(0, len(TEXTS) - 1), st.integers(0, len(SAMPLING) - 1), st.integers(1, 20))


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from(["ngram", "oracle", "draft", "bad draft"]),
    st.lists(st.tuples(jobs, st.integers(0, 3), st.none() | st.integers(0, 6)), min_size=1, max_size=8),
    st.integers(50, 100),
    st.sampled_from([(4, 4, 4), (6, 8, 8), (16, 64, 16), (64, 512, 512)]),
)
def test_any_arrivals_aborts_and_cache_sizes(with_proposer, plain, kind, arrivals, num_blocks, limits) -> None:
    """Requests arrive `gap` steps after each other; some are aborted `life` steps after they arrived."""
    batch, step_tokens, rows = limits
    engine = with_proposer(
        kind, num_blocks=num_blocks, max_batch=batch, max_step_tokens=step_tokens, max_draft_rows=rows
    )
    computed: list[list[Scheduled]] = []
    engine.runner.run = lambda plan, *rest, run=engine.runner.run: (computed.append(plan), run(plan, *rest))[1]

    def ask(*job: int) -> Request:
        request = make_request(engine.tokenizer, *job)
        tell(engine, request, plain(*job)[0])
        return request

    for answer, job in play(engine, arrivals, ask):
        expected, _ = plain(*job)
        if "abort" not in answer.reasons:
            assert_same(answer, expected)
        for found, complete in zip(answer.tokens, expected.tokens, strict=True):
            assert found == complete[: len(found)]
    for plan in computed:
        assert not any(work.drafts for work in plan if work.sequence.gang), "drafts in a search"
        if any(work.drafts for work in plan):
            assert sum(work.count for work in plan) <= rows
    assert engine.stats.accepted_tokens <= engine.stats.drafted_tokens


def test_prefixes_found_later_hold_true_tokens_only(with_proposer, plain) -> None:
    """A finished answer's blocks are found by the next turn of its chat; refused drafts never have a name."""
    for kind in ("ngram", "oracle", "draft"):
        engine = with_proposer(kind)
        first = make_request(engine.tokenizer, 1, 0, 40)
        tell(engine, first, plain(1, 0, 40)[0])
        answer = run(engine, [first])[0]
        prompt = first.prompt_token_ids + answer.tokens[0]
        second = Request(prompt_token_ids=[*prompt, 9], sampling=SamplingParams(temperature=0, max_tokens=12))
        tell(engine, second, answer)
        found = run(engine, [second])[0]
        assert found.usage.cached_tokens == (len(prompt) - 1) // 4 * 4
        fresh = with_proposer("draft")
        assert run(fresh, [second])[0].tokens == found.tokens


def test_seed_gives_the_same_tokens_after_refused_drafts(with_proposer, plain) -> None:
    """Numbers drawn for rows that were not used are used later: none is lost, none is used twice."""
    for share in (0.0, 0.3, 0.7, 1.0):
        engine = with_proposer("oracle")
        engine.speculation.proposer.share = share
        request = make_request(engine.tokenizer, 2, 3, 40)
        tell(engine, request, plain(2, 3, 40)[0])
        assert_same(run(engine, [request])[0], plain(2, 3, 40)[0])


def test_kernels_give_the_same_answer(tiny_model_dir, tiny_tokenizer) -> None:
    """The fused step on 8 bits computes a row the same way alone and between drafts, true ones and wrong ones."""
    config = read_config(tiny_model_dir)
    if reason := can_fuse(config):
        pytest.skip(reason)
    runner = ModelRunner(
        FusedDecoder(config, fuse_weights(config, load_weights(tiny_model_dir, config), "int8")),
        num_blocks=40,
        block_size=16,
    )
    for sampling in (0, 1, 3):
        for text in range(len(TEXTS)):
            answers = []
            for speculation in ("off", "ngram", "oracle"):
                limits = EngineConfig(context_length=512, speculation="off" if speculation == "off" else "ngram")
                engine = Engine(runner, tiny_tokenizer, limits)
                request = make_request(tiny_tokenizer, text, sampling, 40)
                if speculation == "oracle":
                    engine.speculation.proposer = Oracle()
                    tell(engine, request, answers[0])
                answers.append(run(engine, [request])[0])
            for answer in answers[1:]:
                assert_same(answer, answers[0])


# -- where an answer ends ----------------------------------------------------------------------------------------------


def ask(engine: Engine, answer: Answer, prompt: str = TEXTS[1], constraint=None, **sampling) -> Answer:
    """One request to an engine whose oracle knows a longer answer."""
    request = Request(
        prompt_token_ids=engine.tokenizer.encode(prompt), sampling=SamplingParams(**sampling), constraint=constraint
    )
    tell(engine, request, answer)
    return run(engine, [request])[0]


@pytest.fixture(scope="module")
def longer(plain):
    return plain(1, 0, 60)[0]


@pytest.fixture
def knowing(with_proposer):
    """An engine whose drafts are all true."""
    engine = with_proposer("oracle")
    engine.speculation.proposer.share = 1.0
    return engine


@pytest.mark.parametrize("end", range(1, 30))
def test_answer_ends_inside_a_draft(knowing, make_engine, longer, end) -> None:
    """At max_tokens, at a stop token, at a stop string across the tokens of a draft: as without drafts."""
    tokens, text = longer.tokens[0], longer.text[0]
    base = {"temperature": 0, "ignore_eos": True}
    same = make_engine(speculation="off")
    for setting in (
        {"max_tokens": end},
        {"max_tokens": 60, "stop_token_ids": (tokens[end],)},
        {"max_tokens": 60, "stop": (text[end : end + 5],)},
        {"max_tokens": 60, "stop": (text[end : end + 2],), "include_stop": True, "logprobs": 1},
        {"max_tokens": 60, "stop": (text[end : end + 3],), "min_tokens": end},
    ):
        found = ask(knowing, longer, **base, **setting)
        assert_same(found, ask(same, longer, **base, **setting))
    assert knowing.stats.accepted_tokens > 0
    assert knowing.stats.generation_tokens == same.stats.generation_tokens


def test_end_token_inside_a_draft(knowing, make_engine, longer) -> None:
    eos = knowing.tokenizer.eos_token_ids[0]
    answer = Answer(1)
    answer.tokens = [[*longer.tokens[0][:9], eos, *longer.tokens[0][9:]]]
    sampling = {"temperature": 0, "max_tokens": 60, "logit_bias": {eos: 100.0}, "min_tokens": 9}
    found = ask(knowing, answer, **sampling)
    assert_same(found, ask(make_engine(speculation="off"), answer, **sampling))
    assert len(found.tokens[0]) == 10 and knowing.stats.steps < 8


def test_pieces_of_several_tokens_are_whole_characters(knowing, make_engine) -> None:
    sampling = {"temperature": 2.0, "seed": 3, "max_tokens": 200, "ignore_eos": True, "logprobs": 0}
    expected = ask(make_engine(speculation="off"), None, "🦊🦊你好", **sampling)
    request = Request(prompt_token_ids=knowing.tokenizer.encode("🦊🦊你好"), sampling=SamplingParams(**sampling))
    tell(knowing, request, expected)
    knowing.add(request)
    tokens, text, pieces = [], "", 0
    while knowing.has_work:
        for output in knowing.step():
            text, tokens, pieces = text + output.text, tokens + output.token_ids, pieces + 1
            assert [entry.token_id for entry in output.logprobs] == output.token_ids
            if output.finish_reason is None:
                assert knowing.tokenizer.decode(tokens).startswith(text)
    assert (tokens, text) == (expected.tokens[0], expected.text[0])
    assert pieces < 30, "several tokens come at once"


def test_constraints_go_through_drafts_token_by_token(with_proposer, make_engine, tiny_tokenizer) -> None:
    schema = {
        "type": "object",
        "properties": {"名字": {"enum": ["小狐狸🦊", "懒狗"]}, "n": {"type": "array", "items": {"const": 1}}},
        "required": ["名字", "n"],
        "additionalProperties": False,
    }
    factories = [
        choice(tiny_tokenizer, ["是的，我知道", "是的，我不知道", "否"]),
        regex(tiny_tokenizer, "(ab|的){20}"),
        json_schema(tiny_tokenizer, schema),
    ]
    for sampling in ({"temperature": 0}, {"temperature": 1.0, "seed": 4, "n": 3, "logprobs": 1}):
        for factory in factories:
            sampling = {"max_tokens": 60, **sampling}
            expected = ask(make_engine(speculation="off"), None, constraint=factory, **sampling)
            for kind in ("ngram", "oracle", "draft"):
                engine = with_proposer(kind)
                assert_same(ask(engine, expected, constraint=factory, **sampling), expected)


def test_constraint_that_fails_behind_a_true_draft_ends_its_own_request_only(knowing, longer) -> None:
    class Broken:
        finished = False

        def __init__(self) -> None:
            self.tokens = 0

        def allowed_mask(self):
            return torch.full((100,), -1, dtype=torch.int32).numpy()

        def accept(self, token: int) -> None:
            self.tokens += 1
            if self.tokens == 12:
                raise RuntimeError("grammar too complex")

    prompt = knowing.tokenizer.encode(TEXTS[1])
    sampling = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)
    pair = SamplingParams(n=2, temperature=0, max_tokens=30, ignore_eos=True)
    bad = Request(prompt_token_ids=prompt, sampling=pair, constraint=Broken)
    good = Request(prompt_token_ids=prompt, sampling=sampling)
    for request in (bad, good):
        answer = Answer(2)
        answer.tokens = longer.tokens * 2
        tell(knowing, request, answer)
    failed, fine = run(knowing, [bad, good])
    assert failed.reasons == ["error", "error"]
    assert fine.tokens[0] == longer.tokens[0][:30]


# -- the same distribution ---------------------------------------------------------------------------------------------


def chi_square_limit(degrees: int, z: float = 4.0) -> float:
    """What a chi-square of so many degrees exceeds once in 30,000 times (Wilson and Hilferty, 1931)."""
    return degrees * (1 - 2 / (9 * degrees) + z * math.sqrt(2 / (9 * degrees))) ** 3


def chi_square(counts: Counter, probabilities: dict, total: int) -> float:
    assert counts.keys() <= {cell for cell, p in probabilities.items() if p > 0}, "an impossible outcome"
    return sum((counts[cell] - total * p) ** 2 / (total * p) for cell, p in probabilities.items() if p > 0)


def sequence_with(rng: random.Random, **sampling) -> Sequence:
    request = Request(prompt_token_ids=[1, 2], sampling=SamplingParams(**sampling))
    return Sequence(request=request, index=0, arrival=0, token_ids=[1, 2, 3], num_prompt=2, max_tokens=100, rng=rng)


def target(row: np.ndarray, sequence: Sequence) -> list[float]:
    """The distribution a row is sampled from, over the whole vocabulary."""
    weights, ids = distribution(process_logits(row[None], [sequence])[0], sequence.sampling)
    spread = np.zeros(len(row))
    spread[slice(None) if ids is None else ids] = weights
    return (spread / spread.sum()).tolist()


@pytest.mark.parametrize(
    "sampling",
    [
        {},
        {"temperature": 0.6, "top_k": 4},
        {"temperature": 1.5, "top_p": 0.8},
        {"min_p": 0.1},
        {"typical_p": 0.7},
        {"presence_penalty": 1.5, "repetition_penalty": 1.4, "frequency_penalty": 0.5},
        {"logit_bias": {0: 2.0, 5: -3.0}, "min_tokens": 3},
    ],
    ids=str,
)
@pytest.mark.parametrize("rank", [0, 2, 7], ids=["likely", "middling", "unlikely"])
def test_accepted_and_refused_drafts_follow_the_target_distribution(sampling, rank) -> None:
    """Vocabulary of 8, two drafts: the joint distribution of the first two tokens is p(t1) p(t2 | t1) wherever both
    are known, t1 alone follows p whatever was drafted, and t2's distribution sees t1 in its penalties."""
    logits = (torch.randn(3, 8, generator=torch.Generator().manual_seed(5)) * 1.2).numpy()
    first = target(logits[0], sequence_with(random.Random(0), **sampling))
    draft = sorted(range(8), key=lambda token: -first[token])[rank]
    rng, total = random.Random(11), 6000
    singles: Counter[int] = Counter()
    seconds: Counter[int] = Counter()
    for _ in range(0, total, 500):
        turns = []
        for number in range(500):
            sequence = sequence_with(random.Random(rng.randrange(1 << 60)), **sampling)
            turns.append(Turn(sequence, 3 * number, (draft, 6)))
        open_turns = turns
        while open_turns:
            choose(open_turns, np.tile(logits, (500, 1)))
            for turn in open_turns:
                for token in turn.chosen:
                    turn.sequence.append(token)
                    turn.tokens.append(token)
            open_turns = [turn for turn in open_turns if not turn.done]
        singles.update(turn.tokens[0] for turn in turns)
        seconds.update(turn.tokens[1] for turn in turns if len(turn.tokens) > 1)
        assert all((len(turn.tokens) > 1) == (turn.tokens[0] == draft) for turn in turns)
    assert chi_square(singles, dict(enumerate(first)), total) <= chi_square_limit(7)
    accepted = singles[draft]
    after = sequence_with(random.Random(0), **sampling)
    after.append(draft)
    if accepted > 200:
        assert chi_square(seconds, dict(enumerate(target(logits[1], after))), accepted) <= chi_square_limit(7)
    assert seconds.total() == accepted


@pytest.mark.parametrize("kind", ["draft", "bad draft"])
def test_whole_engine_samples_the_models_own_distribution(with_proposer, tiny_decoder, device, kind) -> None:
    """2,048 answers of three tokens from the four likeliest each: 64 outcomes against their exact probabilities."""
    engine = with_proposer(kind, num_blocks=1000, max_batch=64, max_draft_rows=512)
    prompt = engine.tokenizer.encode("从前有")
    settings = {"temperature": 0.8, "top_k": 4, "max_tokens": 3, "n": 128, "ignore_eos": True}
    requests = [Request(prompt_token_ids=prompt, sampling=SamplingParams(seed=1000 * i, **settings)) for i in range(16)]
    counts = Counter(tuple(tokens) for answer in run(engine, requests) for tokens in answer.tokens)
    assert engine.stats.drafted_tokens > 1000
    assert engine.stats.accepted_tokens < engine.stats.drafted_tokens
    assert (engine.stats.accepted_tokens > 500) == (kind == "draft")
    expected: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(3):
        grown = {}
        for tokens, p in expected.items():
            ids = torch.tensor([[*prompt, *tokens]], device=device)
            logits = tiny_decoder.logits(tiny_decoder(ids)[:, -1:])[0, 0]
            values, ids = (logits / 0.8).topk(4)
            for token, q in zip(ids.tolist(), values.softmax(-1).tolist(), strict=True):
                grown[*tokens, token] = p * q
        expected = grown
    rare = {cell for cell, p in expected.items() if p * 2048 < 5}  # together one cell
    cells = {cell: p for cell, p in expected.items() if cell not in rare}
    counts = Counter({cell: counts[cell] for cell in cells} | {"rare": sum(counts[cell] for cell in rare)})
    cells |= {"rare": 1 - sum(cells.values())}
    assert counts.total() == 2048, "an impossible answer"
    assert chi_square(counts, cells, 2048) <= chi_square_limit(len(cells) - 1)


# -- the gain, and what it costs ---------------------------------------------------------------------------------------


def test_text_that_repeats_its_prompt_takes_few_steps(make_engine, tiny_tokenizer) -> None:
    """The answer is forced to be the prompt's words again: many tokens a step once the place is found."""
    text = "敏捷的棕色狐狸跳过了懒狗。Once upon a time there was a small model that learned to write. 🦊" * 2
    sampling = {"temperature": 0, "max_tokens": 200, "constraint": choice(tiny_tokenizer, [text])}
    engine = make_engine(num_blocks=200)
    found = ask(engine, None, f"Repeat: {text} Answer: ", **sampling)
    assert found.text == [text]
    num_tokens, steps = len(found.tokens[0]), engine.stats.steps
    assert steps <= num_tokens / 4, f"{steps} steps for {num_tokens} tokens"
    assert engine.stats.accepted_tokens >= num_tokens - steps
    assert engine.stats.accepted_tokens >= 0.6 * engine.stats.drafted_tokens


def test_loops_are_taken_in_leaps(make_engine, plain) -> None:
    """A greedy model that falls into a loop: the draft goes on around it."""
    engine = make_engine()
    request = Request(prompt_token_ids=[5, 6, 7] * 6, sampling=SamplingParams(max_tokens=120, logit_bias={9: 100.0}))
    assert run(engine, [request])[0].tokens == [[9] * 120]
    assert engine.stats.steps <= 20


def test_useless_drafts_stay_few(with_proposer, plain) -> None:
    """Drafts that never come true: the rows computed for them cost about 1 % of the steps."""
    engine = with_proposer("oracle", context_length=512, num_blocks=200)
    engine.speculation.proposer.share = 0.0
    answer, steps = plain(0, 0, 400)
    request = make_request(engine.tokenizer, 0, 0, 400)
    tell(engine, request, Answer(1))
    assert run(engine, [request])[0].tokens == answer.tokens
    assert engine.stats.steps >= steps - engine.stats.accepted_tokens
    assert engine.stats.drafted_tokens * ROW_PRICE <= 1.5 * MAX_LOSS * steps


def test_text_without_repetition_is_left_alone(make_engine) -> None:
    """A sampled text in which pairs of tokens hardly ever come back."""
    engine = make_engine(num_blocks=200)
    sampling = SamplingParams(max_tokens=400, seed=5, temperature=3.0, ignore_eos=True)
    run(engine, [Request(prompt_token_ids=[5, 6, 7], sampling=sampling)])
    assert engine.stats.drafted_tokens - engine.stats.accepted_tokens <= 0.1 * 400


def test_full_batches_get_no_drafts(with_proposer, longer) -> None:
    """16 sequences fill their step; when half of them are gone there is room for a draft each."""
    knowing = with_proposer("oracle", max_draft_rows=32)
    knowing.speculation.proposer.share = 1.0
    requests = [make_request(knowing.tokenizer, 1, 0, 60) for _ in range(16)]
    for request in requests:
        tell(knowing, request, longer)
        knowing.add(request)
    for _ in range(10):
        knowing.step()
    assert knowing.stats.drafted_tokens == 0
    for request in requests[:8]:
        knowing.abort(request.request_id)
    knowing.step()
    assert knowing.stats.drafted_tokens == 8


def test_switched_off(make_engine, tiny_decoder, tiny_tokenizer) -> None:
    engine = make_engine(speculation="off")
    run(engine, [make_request(engine.tokenizer, 0, 0, 30)])
    assert (engine.stats.drafted_tokens, engine.stats.steps) == (0, 30)
    with pytest.raises(UsageError, match='speculation is "ngram" or "off"'):
        EngineConfig(context_length=8, speculation="yes")
    with pytest.raises(UsageError, match="no effect"):
        Engine(engine.runner, tiny_tokenizer, EngineConfig(context_length=8, speculation="off"), tiny_decoder)


# -- room --------------------------------------------------------------------------------------------------------------


def decoding(num_tokens: int, pool: BlockPool, scheduler: Scheduler) -> Sequence:
    request = Request(prompt_token_ids=list(range(num_tokens)), sampling=SamplingParams())
    sequence = Sequence(
        request=request, index=0, arrival=0, token_ids=list(range(num_tokens)), num_prompt=num_tokens, max_tokens=99
    )
    scheduler.add(sequence)
    scheduler.complete(scheduler.schedule())
    sequence.append(50)
    return sequence


@given(st.integers(1, 30), st.integers(0, 4), st.integers(0, 40))
def test_drafts_take_free_blocks_only_and_give_them_back(num_tokens, free, count) -> None:
    size = 4
    pool = BlockPool(-(-num_tokens // size) + 1 + free, size)
    scheduler = Scheduler(pool, max_batch=4, max_step_tokens=64)
    sequence = decoding(num_tokens, pool, scheduler)
    scheduler.schedule()
    room = (len(sequence.blocks) + pool.num_free) * size - num_tokens - 1
    granted = scheduler.reserve(sequence, count)
    assert granted == min(count, room)
    assert len(sequence.blocks) == -(-(num_tokens + 1 + granted) // size)
    assert scheduler.num_preemptions == 0
    work = Scheduled(sequence, num_tokens, 1 + granted, tuple(range(60, 60 + granted)))
    assert (work.token_ids, work.num_scored) == ([50, *work.drafts], 1 + granted)
    scheduler.complete([work])
    assert sequence.num_computed == num_tokens + 1 and len(sequence.block_names) == (num_tokens + 1) // size
    for token in (60, 61):  # of the drafts so much was true, and one more token was chosen
        sequence.append(token)
    scheduler.settle(sequence)
    assert sequence.num_computed == num_tokens + 2
    if granted:
        scheduler.check_integrity()


def test_full_cache_drops_drafts_before_anything_else(with_proposer, plain) -> None:
    """A lone sequence that fills the cache to the last token is never preempted for its own drafts."""
    engine = with_proposer("oracle", num_blocks=16, context_length=64)
    num_prompt = len(engine.tokenizer.encode(TEXTS[0]))
    request = make_request(engine.tokenizer, 0, 0, 64 - num_prompt)
    tell(engine, request, plain(0, 0, 64)[0])
    answer = run(engine, [request])[0]
    assert answer.tokens[0] == plain(0, 0, 64)[0].tokens[0][: 64 - num_prompt]
    assert engine.scheduler.num_preemptions == 0 and engine.stats.accepted_tokens > 0


@given(st.lists(st.integers(0, 20), max_size=12), st.integers(0, 40))
def test_room_is_divided_evenly(sizes, room) -> None:
    wishes = {object(): size for size in sizes}
    shares = divide(wishes, room)
    assert sum(shares.values()) == min(room, sum(sizes))
    assert all(0 < share <= wishes[key] for key, share in shares.items())
    short = [shares.get(key, 0) for key in wishes if shares.get(key, 0) < wishes[key]]
    if short:  # who got less than wished has no less than anybody, but for the rest of the division
        assert min(short) >= max(shares.values(), default=0) - 1


# -- the parts ---------------------------------------------------------------------------------------------------------


class Counting(list):
    """A list that counts how often it is looked at."""

    reads = 0

    def __getitem__(self, key):
        self.reads += 1
        return super().__getitem__(key)


def longest_earlier(ids: list[int]) -> tuple[int, int]:
    """(length, end) of the longest suffix seen before among the eight latest places of its last pair, by trying."""
    end, best = len(ids) - 1, (0, -1)
    places = [i for i in range(end - 1, 0, -1) if ids[i - 1 : i + 1] == ids[-2:]][:8]
    for place in places:
        length = 0
        while length < 32 and length <= place and ids[place - length] == ids[end - length]:
            length += 1
        best = max(best, (length, place), key=lambda found: found[0])
    return best


@given(st.lists(st.integers(0, 3), min_size=1, max_size=80), st.integers(1, 15), st.integers(1, 5))
def test_index_finds_the_longest_match_while_the_text_grows(tokens, count, stride) -> None:
    ids: list[int] = []
    index = NgramIndex(ids)
    for start in range(0, len(tokens), stride):
        ids += tokens[start : start + stride]
        length, end = longest_earlier(ids)
        expected = list(ids)
        while length and len(expected) < len(ids) + count:
            expected.append(expected[len(expected) - (len(ids) - 1 - end)])
        assert index.continuation(count) == expected[len(ids) :]


def test_index_never_reads_the_text_again() -> None:
    ids = Counting([1, 2, 3, 4] * 3000)
    index = NgramIndex(ids)
    index.continuation(8)
    for token in [1, 2, 3, 4] * 25:
        ids.append(token)
        ids.reads = 0
        assert index.continuation(8) == [(token + i) % 4 + 1 for i in range(8)]
        assert ids.reads < 1000


def test_pace_widens_rests_and_recovers() -> None:
    pace = Pace(ROW_PRICE)
    widths = []
    for _ in range(4):
        widths.append(pace.wish())
        pace.note(widths[-1], widths[-1])
    assert widths == [3, 7, 15, 15] and max(widths) == MAX_WIDTH
    pace.note(15, 4)
    assert pace.wish() == 7
    pauses = []
    for _ in range(8):
        pace.note(pace.width, 0)
        pauses.append(0)
        while not (width := pace.wish()):
            pauses[-1] += 1
        assert width == 1, "a probe"
    assert pauses == [1, 2, 4, 8, 8, 8, 8, 8]
    pace.note(1, 1)
    assert pace.wish() == 3
    pace.note(3, 0)
    assert pace.rest == 1, "one success and it is tried again soon"
    dear = Pace(1.05)  # a draft model as large as the model
    dear.note(3, 3)
    assert dear.rest == 0
    dear.note(7, 6)
    assert dear.rest > 0


# -- the draft model ---------------------------------------------------------------------------------------------------


def test_a_perfect_draft_model_is_always_right(with_proposer, plain) -> None:
    engine = with_proposer("draft")
    engine.speculation.proposer.price = ROW_PRICE
    request = make_request(engine.tokenizer, 4, 0, 100)
    assert run(engine, [request])[0].tokens == plain(4, 0, 100)[0].tokens
    assert engine.stats.accepted_tokens == engine.stats.drafted_tokens > 80
    assert engine.stats.steps <= 12


@pytest.mark.parametrize("kind", ["draft", "bad draft"])
def test_draft_model_says_what_it_would_say_alone(with_proposer, kind) -> None:
    """Its cache is right after refused drafts, shared prefixes, pauses and preemption: each draft is its own greedy
    continuation of the true text."""
    engine = with_proposer(kind, num_blocks=40, max_batch=8)
    proposer, checked = engine.speculation.proposer, Counter()
    propose, model = proposer.propose, proposer.runner.model.model

    def checking(wishes, room, reserve):
        drafts = propose(wishes, room, reserve)
        for sequence, tokens in drafts.items():
            ids = torch.tensor([sequence.token_ids + tokens])
            best = model.logits(model(ids))[0].argmax(-1).tolist()
            assert tokens == best[len(sequence.token_ids) - 1 : -1]
            checked[len(tokens)] += 1
        return drafts

    proposer.propose, proposer.price = checking, 0.0
    for round_number in range(2):
        requests = [make_request(engine.tokenizer, text, 3, 24, seed=round_number) for text in (0, 1, 0, 2, 3)]
        run(engine, requests)
    assert engine.scheduler.num_preemptions > 0
    assert (engine.stats.accepted_tokens > 0) == (kind == "draft")
    assert len(checked) > 2 and checked.total() > 100


def test_draft_model_computes_each_token_once_and_shares_prefixes(with_proposer) -> None:
    engine = with_proposer("draft")
    proposer = engine.speculation.proposer
    rows = []
    run_plan = proposer.runner.run
    proposer.runner.run = lambda plan, *rest: (rows.append(sum(w.count for w in plan)), run_plan(plan, *rest))[1]
    request = make_request(engine.tokenizer, 0, 0, 40)
    run(engine, [request])
    num_prompt = len(request.prompt_token_ids)
    assert sum(rows) <= num_prompt + 40 + engine.stats.drafted_tokens - engine.stats.accepted_tokens
    rows.clear()
    run(engine, [make_request(engine.tokenizer, 0, 0, 40)])
    assert rows[0] < 8, "the prompt's blocks were known"


def test_draft_model_catches_up_in_parts(with_proposer, plain) -> None:
    engine = with_proposer("draft", num_blocks=200)
    prompt = engine.tokenizer.encode(TEXTS[0] * 9)[:400]
    request = Request(prompt_token_ids=prompt, sampling=SamplingParams(temperature=0, max_tokens=30, ignore_eos=True))
    run(engine, [request])
    assert engine.stats.accepted_tokens > 15


def test_draft_model_with_a_shorter_context_stops_drafting(with_proposer) -> None:
    engine = with_proposer("draft")
    proposer = engine.speculation.proposer
    proposer.max_positions, proposer.price = 60, ROW_PRICE
    request = Request(prompt_token_ids=[5] * 20, sampling=SamplingParams(temperature=0, max_tokens=80, ignore_eos=True))
    answer = run(engine, [request])[0]
    assert len(answer.tokens[0]) == 80 and 0 < engine.stats.drafted_tokens <= 45


def test_ids_the_draft_model_does_not_have_are_not_shown_to_it(with_proposer) -> None:
    engine = with_proposer("draft")
    engine.speculation.proposer.num_words = 100
    request = Request(prompt_token_ids=[5, 120, 6], sampling=SamplingParams(temperature=0, max_tokens=10))
    run(engine, [request])
    assert engine.stats.drafted_tokens == 0


def test_vocabularies_must_be_the_same(tiny_tokenizer, tmp_path: Path) -> None:
    check_vocabularies(tiny_tokenizer, tiny_tokenizer)
    other = make_tiny_model(tmp_path / "other")
    content = json.loads((other / "tokenizer.json").read_text(encoding="utf-8"))
    words = content["model"]["vocab"]
    words["好"], words["a"] = words["a"], 599
    (other / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(UsageError, match="draft model's vocabulary differs"):
        check_vocabularies(tiny_tokenizer, Tokenizer.from_directory(other))
