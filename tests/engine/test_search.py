"""Beam search against transformers; diverse beam and contrastive search against their definitions, written plainly."""

from __future__ import annotations

import logging
from collections import Counter

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from bimo.engine.request import Request, SamplingParams

from .conftest import run

PROMPTS = ("Once upon a time", "床前明月光，", "def add(", "🦊")


@pytest.fixture(scope="module")
def reference(tiny_model_dir):
    logging.getLogger("transformers").setLevel(logging.ERROR)
    return AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32).eval()


def search(engine, text: str, **sampling):
    request = Request(prompt_token_ids=engine.tokenizer.encode(text), sampling=SamplingParams(**sampling))
    return run(engine, [request])[0]


@pytest.mark.parametrize("text", PROMPTS)
@pytest.mark.parametrize(
    "settings",
    [
        {"num_beams": 2},
        {"num_beams": 5, "n": 5},
        {"num_beams": 4, "n": 2, "length_penalty": 2.0},
        {"num_beams": 4, "n": 4, "length_penalty": -1.0},
        {"num_beams": 3, "n": 3, "early_stopping": True},
        {"num_beams": 3, "n": 3, "repetition_penalty": 1.5},
        {"num_beams": 3, "min_tokens": 8},
    ],
    ids=str,
)
def test_beam_search_equals_transformers(make_engine, reference, text, settings) -> None:
    """End tokens are made likely, so that beams end at different lengths."""
    engine = make_engine()
    ends = [2, 300, 301, 302, 303]
    prompt = engine.tokenizer.encode(text)
    stop = tuple(ends[1:])
    answer = search(engine, text, max_tokens=12, stop_token_ids=stop, **settings)
    expected = reference.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        do_sample=False,
        max_new_tokens=12,
        eos_token_id=ends,
        pad_token_id=0,
        num_beams=settings["num_beams"],
        num_return_sequences=settings.get("n", 1),
        length_penalty=settings.get("length_penalty", 1.0),
        early_stopping=settings.get("early_stopping", False),
        repetition_penalty=settings.get("repetition_penalty", 1.0),
        min_new_tokens=settings.get("min_tokens"),
    )
    for tokens, row in zip(answer.tokens, expected[:, len(prompt) :].tolist(), strict=True):
        assert tokens == row[: len(tokens)]
        assert all(token == 0 for token in row[len(tokens) :])


def next_log_probs(reference, ids: list[int]) -> np.ndarray:
    with torch.no_grad():
        return reference(torch.tensor([ids])).logits[0, -1].log_softmax(-1).double().numpy()


def test_diverse_beam_search_by_definition(make_engine, reference) -> None:
    """Groups in turn; each takes its beams' best continuations after paying for words earlier groups chose now."""
    engine, groups, size, penalty, steps = make_engine(), 3, 2, 1.5, 6
    prompt = engine.tokenizer.encode(PROMPTS[0])
    beams = [[([], 0.0)] for _ in range(groups)]
    for _ in range(steps):
        chosen: Counter[int] = Counter()
        for g in range(groups):
            candidates = []
            for tokens, score in beams[g]:
                log_probs = next_log_probs(reference, prompt + tokens)
                for token, log_prob in enumerate(log_probs):
                    candidates.append((score + log_prob - penalty * chosen[token], [*tokens, token]))
            best = sorted(candidates, key=lambda c: -c[0])[:size]
            beams[g] = [(tokens, score) for score, tokens in best]
            chosen.update(tokens[-1] for tokens, _ in beams[g])
    expected = [tokens for tokens, _ in sorted((b for g in beams for b in g), key=lambda b: -b[1])]
    answer = search(
        engine,
        PROMPTS[0],
        num_beams=groups * size,
        n=groups * size,
        num_beam_groups=groups,
        diversity_penalty=penalty,
        max_tokens=steps,
        ignore_eos=True,
        length_penalty=0.0,
    )
    assert answer.tokens == expected
    assert len({tokens[0] for tokens in answer.tokens}) >= groups


@pytest.mark.parametrize("text", PROMPTS)
def test_contrastive_search_by_definition(make_engine, reference, text) -> None:
    engine, alpha, k, steps = make_engine(), 0.6, 4, 8
    ids = engine.tokenizer.encode(text)
    num_prompt = len(ids)
    for _ in range(steps):
        probabilities = np.exp(next_log_probs(reference, ids))
        best = None
        for token in np.argsort(-probabilities)[:k]:
            with torch.no_grad():
                hidden = reference.model(torch.tensor([[*ids, int(token)]])).last_hidden_state[0].double().numpy()
            hidden /= np.linalg.norm(hidden, axis=-1, keepdims=True)
            score = (1 - alpha) * probabilities[token] - alpha * (hidden[:-1] @ hidden[-1]).max()
            best = max(best or (-np.inf, 0), (score, int(token)))
        ids = [*ids, best[1]]
    answer = search(engine, text, penalty_alpha=alpha, top_k=k, max_tokens=steps, ignore_eos=True)
    assert answer.tokens[0] == ids[num_prompt:]


def test_beams_end_at_stop_strings_and_report_logprobs(make_engine, reference) -> None:
    engine = make_engine()
    plain = search(engine, PROMPTS[0], num_beams=3, max_tokens=10, ignore_eos=True, logprobs=0)
    text = plain.text[0]
    stop = text[len(text) // 2 :][:2]
    stopped = search(engine, PROMPTS[0], num_beams=3, max_tokens=10, ignore_eos=True, stop=(stop,), n=3)
    assert all(stop not in text for text in stopped.text)
    ids = engine.tokenizer.encode(PROMPTS[0])
    for found in plain.logprobs[0]:
        assert found.logprob == pytest.approx(next_log_probs(reference, ids)[found.token_id], abs=1e-4)
        ids.append(found.token_id)
