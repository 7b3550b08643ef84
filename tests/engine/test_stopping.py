"""Where answers end and what is reported: stop strings and tokens, lengths, n, best_of, seeds, log-probabilities."""

from __future__ import annotations

import pytest
import torch

from bimo.engine.request import Request, SamplingParams

from .conftest import run

TEXT = "从前有一个小小的模型，Once upon a time 🦊"


def ask(engine, *, text=TEXT, constraint=None, **sampling):
    request = Request(
        prompt_token_ids=engine.tokenizer.encode(text), sampling=SamplingParams(**sampling), constraint=constraint
    )
    return run(engine, [request])[0]


@pytest.fixture(scope="module")
def plain(make_engine):
    """Forty greedy tokens and their text."""
    return ask(make_engine(), temperature=0, max_tokens=40, ignore_eos=True)


def test_stop_string_cuts_the_text_and_is_named(make_engine, plain) -> None:
    text = plain.text[0]
    for start, length in ((5, 1), (8, 4), (len(text) // 2, 6)):
        stop = text[start : start + length]
        answer = ask(make_engine(), temperature=0, max_tokens=40, ignore_eos=True, stop=(stop, "never said"))
        assert answer.text[0] == text[: text.index(stop)]
        assert (answer.reasons[0], answer.stops[0]) == ("stop", stop)
        kept = ask(make_engine(), temperature=0, max_tokens=40, ignore_eos=True, stop=(stop,), include_stop=True)
        assert kept.text[0] == text[: text.index(stop)] + stop


def test_stop_strings_count_only_after_min_tokens(make_engine, plain) -> None:
    stop = plain.text[0][:2]
    answer = ask(make_engine(), temperature=0, max_tokens=40, min_tokens=40, ignore_eos=True, stop=(stop,))
    assert (answer.text, answer.reasons) == (plain.text, ["length"])


def test_stop_token_ends_without_its_text(make_engine, plain) -> None:
    token = plain.tokens[0][6]
    first = plain.tokens[0].index(token)
    answer = ask(make_engine(), temperature=0, max_tokens=40, ignore_eos=True, stop_token_ids=(token,))
    assert answer.tokens[0] == plain.tokens[0][: first + 1]
    assert (answer.reasons[0], answer.stops[0]) == ("stop", token)
    assert plain.text[0].startswith(answer.text[0])


def test_end_token_stops_unless_ignored(make_engine, plain) -> None:
    engine = make_engine()
    bias = {engine.tokenizer.eos_token_ids[0]: 100.0}
    ended = ask(engine, temperature=0, max_tokens=5, logit_bias=bias)
    assert (ended.reasons, ended.text, len(ended.tokens[0]), ended.stops) == (["stop"], [""], 1, [None])
    later = ask(engine, temperature=0, max_tokens=5, min_tokens=3, logit_bias=bias)
    assert len(later.tokens[0]) == 4 and later.tokens[0][:3] == plain.tokens[0][:3]
    ignored = ask(engine, temperature=0, max_tokens=5, logit_bias=bias, ignore_eos=True)
    assert (ignored.reasons, len(ignored.tokens[0])) == (["length"], 5)


def test_pieces_of_text_are_whole_characters(make_engine) -> None:
    engine = make_engine()
    request = Request(
        prompt_token_ids=engine.tokenizer.encode("🦊🦊你好"),
        sampling=SamplingParams(max_tokens=200, temperature=2.0, seed=3, ignore_eos=True),
    )
    engine.add(request)
    tokens, text = [], ""
    while engine.has_work:
        for output in engine.step():
            text += output.text
            tokens += output.token_ids
            if output.finish_reason is None:
                assert engine.tokenizer.decode(tokens).startswith(text)
    assert text == engine.tokenizer.decode(tokens)


def test_seed_repeats_and_sequences_differ(make_engine) -> None:
    def texts(**sampling):
        return ask(make_engine(), temperature=1.5, max_tokens=12, ignore_eos=True, **sampling).tokens

    assert texts(seed=5, n=3) == texts(seed=5, n=3) != texts(seed=6, n=3)
    assert len({tuple(tokens) for tokens in texts(seed=5, n=3)}) == 3
    assert texts(seed=5)[0] == texts(seed=5, n=3)[0]
    assert texts() != texts()


def test_best_of_returns_the_likeliest(make_engine) -> None:
    settings = {"temperature": 1.5, "max_tokens": 8, "seed": 2, "ignore_eos": True, "logprobs": 0}
    everything = ask(make_engine(), n=6, **settings)
    best = ask(make_engine(), n=2, best_of=6, **settings)

    def mean(logprobs):
        return sum(p.logprob for p in logprobs) / len(logprobs)

    order = sorted(range(6), key=lambda i: -mean(everything.logprobs[i]))
    assert best.tokens == [everything.tokens[i] for i in order[:2]]
    assert best.usage.completion_tokens == 48


def test_logprobs_of_answer_and_prompt_agree_with_the_model(make_engine, tiny_decoder, device) -> None:
    for step in (512, 64):  # whole prompt, and in chunks
        engine = make_engine(max_step_tokens=step, max_batch=8)
        answer = ask(engine, text=TEXT * 8, temperature=0, max_tokens=6, logprobs=2, prompt_logprobs=1)
        prompt = engine.tokenizer.encode(TEXT * 8)
        ids = torch.tensor([prompt + answer.tokens[0]], device=device)
        log_probs = tiny_decoder.logits(tiny_decoder(ids)).log_softmax(-1)[0]
        expected = log_probs[:-1].gather(1, ids[0, 1:, None]).flatten()
        assert answer.prompt_logprobs[0] is None and len(answer.prompt_logprobs) == len(prompt)
        found = [p.logprob for p in answer.prompt_logprobs[1:] + answer.logprobs[0]]
        torch.testing.assert_close(torch.tensor(found), expected.cpu(), atol=2e-4, rtol=1e-3)
        assert all(len(p.top) == 2 and p.top[0][0] == p.token_id for p in answer.logprobs[0])
        assert all(len(p.top) == 1 for p in answer.prompt_logprobs[1:])


def test_constraint_decides_and_ends_the_answer(make_engine, tiny_tokenizer) -> None:
    from bimo.engine.constrain import choice

    options = ["是", "否", "yes 🦊"]
    answer = ask(make_engine(), n=4, seed=1, temperature=2.0, constraint=choice(tiny_tokenizer, options))
    assert set(answer.text) <= set(options)
    assert answer.reasons == ["stop"] * 4


def test_usage_counts_all_sequences(make_engine) -> None:
    answer = ask(make_engine(), n=3, max_tokens=7, ignore_eos=True)
    assert answer.usage.completion_tokens == 21
    assert answer.usage.total_tokens == 21 + answer.usage.prompt_tokens


def test_constraint_that_fails_ends_its_own_request_only(make_engine, tiny_tokenizer) -> None:
    from bimo.engine.constrain import choice

    class Broken:
        def __init__(self, where: str) -> None:
            self.real, self.where = choice(tiny_tokenizer, ["是是是", "否否否"])(), where

        def __getattr__(self, name: str):
            if name == self.where:
                raise RuntimeError("grammar too complex")
            return getattr(self.real, name)

    engine = make_engine()
    prompt = engine.tokenizer.encode(TEXT)
    for where in ("allowed_mask", "accept"):
        bad = Request(prompt_token_ids=prompt, constraint=lambda where=where: Broken(where))
        good = Request(prompt_token_ids=prompt, sampling=SamplingParams(max_tokens=3, ignore_eos=True))
        failed, fine = run(engine, [bad, good])
        assert failed.reasons == ["error"] and len(fine.tokens[0]) == 3


def test_constraint_goes_before_min_tokens(make_engine, tiny_tokenizer) -> None:
    from bimo.engine.constrain import choice

    answer = ask(make_engine(), min_tokens=30, max_tokens=40, constraint=choice(tiny_tokenizer, ["是"]))
    assert answer.text == ["是"]
