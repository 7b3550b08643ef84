"""Each setting against transformers' processors, or a plain NumPy statement of its definition."""

from __future__ import annotations

import random
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from bimo.engine.request import Request, SamplingParams
from bimo.engine.sampling import (
    best_ids,
    choose_tokens,
    distribution,
    keeps_best,
    process_logits,
    token_logprobs,
)
from bimo.engine.sequence import Sequence
from bimo.errors import EngineError, UsageError

VOCAB = 3000  # more than the candidates that are sorted at first


def make_logits(rows: int, seed: int = 0, scale: float = 3.0) -> np.ndarray:
    return (torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * scale).numpy()


def make_sequence(prompt=(1, 2, 3), output=(), eos=(7,), seed=0, constraint=None, **sampling) -> Sequence:
    request = Request(prompt_token_ids=list(prompt), sampling=SamplingParams(**sampling))
    sequence = Sequence(
        request=request,
        index=0,
        arrival=0,
        token_ids=list(prompt),
        num_prompt=len(prompt),
        max_tokens=100,
        eos_token_ids=frozenset(eos),
        rng=random.Random(seed),
        constraint=constraint,
    )
    for token in output:
        sequence.append(token)
    return sequence


def full(row: np.ndarray, params: SamplingParams) -> np.ndarray:
    """`distribution` spread over the vocabulary and normalised, (V,)."""
    weights, ids = distribution(row, params)
    spread = np.zeros(len(row))
    spread[slice(None) if ids is None else ids] = weights
    return spread / spread.sum()


SETTINGS = [
    {},
    {"temperature": 0.3},
    {"temperature": 2.5},
    {"top_k": 1},
    {"top_k": 50},
    {"top_k": 2500},
    {"top_p": 0.1},
    {"top_p": 0.9},
    {"top_p": 0.9999, "temperature": 5.0},
    {"min_p": 0.05},
    {"typical_p": 0.2},
    {"typical_p": 0.95},
    {"temperature": 0.7, "top_k": 40, "top_p": 0.8, "min_p": 0.02, "typical_p": 0.9},
]


def warped(logits: torch.Tensor, p: SamplingParams) -> np.ndarray:
    """What transformers samples from."""
    warpers = [TemperatureLogitsWarper(float(p.temperature))]
    warpers += [TopKLogitsWarper(p.top_k)] if p.top_k else []
    warpers += [TopPLogitsWarper(p.top_p)] if p.top_p < 1 else []
    warpers += [MinPLogitsWarper(p.min_p)] if p.min_p else []
    warpers += [TypicalLogitsWarper(p.typical_p)] if p.typical_p < 1 else []
    for warper in warpers:
        logits = warper(None, logits)
    return logits.softmax(-1).numpy()


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_distribution_equals_transformers(setting) -> None:
    params = SamplingParams(**setting)
    logits = make_logits(6)
    found = [full(row, params) for row in logits]
    np.testing.assert_allclose(found, warped(torch.from_numpy(logits), params), atol=1e-6, rtol=1e-4)


@settings(deadline=None, max_examples=40)
@given(
    st.lists(
        st.fixed_dictionaries(
            {},
            optional={
                "temperature": st.floats(0.2, 3),
                "top_k": st.integers(1, 60),
                "top_p": st.floats(0.05, 0.99),
                "min_p": st.floats(0.001, 0.5),
                "typical_p": st.floats(0.1, 0.9),
            },
        ),
        min_size=2,
        max_size=5,
    ),
    st.integers(0, 1000),
)
def test_a_row_does_not_depend_on_its_neighbours(rows, seed) -> None:
    """The same token from the same seed, alone and between others with other settings."""
    logits = make_logits(len(rows), seed)

    def sequences():
        return [make_sequence(seed=i, **row) for i, row in enumerate(rows)]

    together = choose_tokens(logits, sequences())
    assert together == [choose_tokens(logits[i : i + 1], [s])[0] for i, s in enumerate(sequences())]


def test_draws_follow_the_distribution() -> None:
    logits = make_logits(1, scale=2.0)
    params = SamplingParams(top_k=8)
    expected = full(logits[0], params)
    sequence = make_sequence(top_k=8)
    num = 4000
    counts = np.bincount([choose_tokens(logits, [sequence])[0] for _ in range(num)], minlength=VOCAB)
    assert set(np.flatnonzero(counts)) <= set(np.flatnonzero(expected))
    error = np.sqrt(expected * (1 - expected) / num)
    assert (np.abs(counts / num - expected) <= 4.5 * error + 1e-9).all()


def test_extreme_draws_stay_among_the_kept() -> None:
    logits = make_logits(1)
    kept = set(np.flatnonzero(full(logits[0], SamplingParams(top_p=0.5))))
    for uniform in (0.0, 0.5, 1 - 2**-53):
        sequence = make_sequence(top_p=0.5)
        sequence.rng = SimpleNamespace(random=lambda uniform=uniform: uniform)
        assert choose_tokens(logits, [sequence])[0] in kept


def test_greedy_takes_the_most_likely() -> None:
    logits = make_logits(3)
    assert choose_tokens(logits, [make_sequence(temperature=0)] * 3) == logits.argmax(-1).tolist()


@pytest.mark.parametrize("num_vocab", [100, 257, 4096, 3000])
@pytest.mark.parametrize("count", [1, 2, 16, 150])
def test_best_ids_equal_torch_s(num_vocab, count) -> None:
    logits = torch.randn(6, num_vocab, generator=torch.Generator().manual_seed(1))
    logits[1], logits[2, 7] = -torch.inf, torch.inf
    logits[1, 3] = 0.0
    logits[5] = logits[5].round()  # ties
    for row in logits:
        found = best_ids(row.numpy(), count)
        assert row[found].tolist() == row.topk(min(count, num_vocab)).values.tolist()
        by_score = sorted(range(num_vocab), key=lambda i, row=row: -float(row[i]))  # of equals the first
        assert found.tolist() == by_score[:count] or row[found[-1]] == -torch.inf


@pytest.mark.parametrize("penalty", [0.7, 1.3])
def test_repetition_penalty_equals_transformers(penalty) -> None:
    logits = make_logits(1)
    sequence = make_sequence(prompt=(1, 5, 5, 9), output=(11, 5), repetition_penalty=penalty)
    expected = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([sequence.token_ids]), torch.tensor(logits))
    np.testing.assert_allclose(process_logits(logits, [sequence]), expected.numpy(), rtol=1e-6)


def test_presence_and_frequency_penalties_by_definition() -> None:
    """OpenAI's: logits[j] -= count[j] * frequency + (count[j] > 0) * presence, over the output only."""
    logits = make_logits(1)
    sequence = make_sequence(prompt=(4, 4), output=(11, 5, 11, 11), presence_penalty=0.5, frequency_penalty=-0.25)
    expected = logits[0].copy()
    counts = np.bincount([11, 5, 11, 11], minlength=VOCAB)
    expected -= counts * -0.25 + (counts > 0) * 0.5
    np.testing.assert_allclose(process_logits(logits, [sequence])[0], expected, rtol=1e-6)


def test_logit_bias_is_added_and_raw_logits_are_untouched() -> None:
    logits = make_logits(2)
    before = logits.copy()
    sequence = make_sequence(temperature=0, logit_bias={17: 100.0, 18: -100.0})
    changed = process_logits(logits, [make_sequence(), sequence])
    assert np.array_equal(logits, before)
    assert np.array_equal(changed[0], before[0])
    assert changed[1, 17] == before[1, 17] + 100 and changed[1, 18] == before[1, 18] - 100
    assert choose_tokens(changed, [make_sequence(temperature=0), sequence])[1] == 17


def test_no_end_before_min_tokens() -> None:
    logits = make_logits(1)
    for output, ended in (((), True), ((5, 6), False)):
        sequence = make_sequence(output=output, min_tokens=2, stop_token_ids=(9,), eos=(7,))
        row = process_logits(logits, [sequence])[0]
        assert (row[7] == -torch.inf) == ended and (row[9] == -torch.inf) == ended


def test_constraint_leaves_only_what_it_allows() -> None:
    """The mask covers the tokenizer's words; logits may have more rows, which are never allowed."""
    mask = np.zeros(2900 // 32, dtype=np.int32)
    for token in (3, 31, 32, 2800):
        mask.view(np.uint32)[token // 32] |= np.uint32(1 << token % 32)
    sequence = make_sequence(constraint=object())
    sequence.allowed_mask = mask
    row = process_logits(make_logits(1), [sequence])[0]
    assert np.flatnonzero(row > -np.inf).tolist() == [3, 31, 32, 2800]


@pytest.mark.parametrize(
    "sampling", [{}, {"repetition_penalty": 1.3}, {"logit_bias": {5: 1.0}}, {"min_tokens": 3}], ids=str
)
def test_the_step_s_own_best_is_taken_only_where_it_would_be_chosen(sampling) -> None:
    """With a constraint, too: its mask is applied to the scores only for a word that it forbids."""
    taken = 0
    for seed in range(40):
        logits = make_logits(1, seed)
        best = int(logits[0].argmax())
        sequence = make_sequence(output=(5,), temperature=0, constraint=object(), **sampling)
        mask = np.random.default_rng(seed).integers(-(2**31), 2**31, 2976 // 32, dtype=np.int32)
        sequence.allowed_mask = mask
        allowed = best < 2976 and bool(np.unpackbits(mask.view(np.uint8), bitorder="little")[best])
        keeps = keeps_best(sequence, best)
        taken += keeps
        assert keeps == (allowed and not sampling)
        assert not keeps or choose_tokens(process_logits(logits, [sequence]), [sequence]) == [best]
    assert (taken > 10) == (not sampling)
    assert keeps_best(make_sequence(temperature=0), 3) and not keeps_best(make_sequence(), 3)


def test_scores_that_are_no_numbers_are_said() -> None:
    logits = make_logits(1)
    logits[0, 100] = np.nan
    with pytest.raises(EngineError, match="not numbers"):
        choose_tokens(logits, [make_sequence(top_p=0.9)])


def test_logprobs_are_the_models_own() -> None:
    logits = make_logits(2)
    found = token_logprobs(logits, [5, 6], [3, 0])
    expected = torch.from_numpy(logits).log_softmax(-1)
    assert found[0].logprob == pytest.approx(float(expected[0, 5]))
    assert found[1].logprob == pytest.approx(float(expected[1, 6])) and found[1].top == ()
    values, ids = expected[0].topk(3)
    assert [t for t, _ in found[0].top] == ids.tolist()
    assert [p for _, p in found[0].top] == pytest.approx(values.tolist())


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -1},
        {"temperature": float("nan")},
        {"temperature": "hot"},
        {"temperature": True},
        {"top_p": 0},
        {"top_p": 1.5},
        {"top_k": -1},
        {"top_k": 2.5},
        {"min_p": 2},
        {"n": 0},
        {"n": 10**9},
        {"max_tokens": 0},
        {"min_tokens": 5, "max_tokens": 2},
        {"presence_penalty": 3},
        {"logit_bias": {5: 101}},
        {"logit_bias": {-5: 1}},
        {"stop": ("",)},
        {"seed": 1 << 70},
        {"logprobs": 21},
        {"num_beams": 4, "num_beam_groups": 3},
        {"diversity_penalty": 1.0},
        {"num_beams": 2, "penalty_alpha": 0.5, "top_k": 4},
        {"penalty_alpha": 0.5, "top_k": 1},
        {"penalty_alpha": 0.5, "top_k": 4, "n": 2},
        {"length_penalty": 2.0},
        {"early_stopping": True},
        {"num_beams": 2, "n": 3},
        {"num_beams": 2, "best_of": 2},
        {"num_beams": 2, "top_p": 0.5},
        {"n": 3, "best_of": 2},
    ],
    ids=str,
)
def test_wrong_settings_are_refused_by_name(wrong) -> None:
    with pytest.raises(UsageError) as caught:
        SamplingParams(**wrong)
    assert caught.value.param in wrong and caught.value.param in str(caught.value)


def test_no_module_imports_transformers_here() -> None:
    """The reference is for tests: the engine's own source never names it."""
    import bimo.engine

    for file in Path(bimo.engine.__file__).parent.glob("*.py"):
        assert "import transformers" not in file.read_text(encoding="utf-8")
