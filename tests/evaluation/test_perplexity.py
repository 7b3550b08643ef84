"""Perplexity equals transformers' on the same windows; every token counts once; little is under way at a time."""

from __future__ import annotations

import math
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import bimo
from bimo.backends.local import LocalBackend
from bimo.engine.request import Output, Request
from bimo.errors import EngineError, UsageError
from bimo.evaluation.perplexity import MAX_IN_FLIGHT, Perplexity, check_windows, perplexity, windows

ENGLISH = "The quick brown fox jumps over the lazy dog. Once upon a time there was a small model. " * 9
CHINESE = "从前有一个小小的模型，它学会了写字。床前明月光，疑是地上霜。举头望明月，低头思故乡。\n" * 9
EMOJI = "🦊 jumps over 🐶 — naïve café, 1,234.56 € 😀👍🏽 \r\n\t\0" * 12
TEXTS = {"english": ENGLISH, "chinese": CHINESE, "emoji": EMOJI, "short": "好a", "spaces": " \n" * 40}


@pytest.fixture(scope="module")
def backend(tiny_model_dir: Path) -> Iterator[LocalBackend]:
    with LocalBackend.load(str(tiny_model_dir), dtype="float32", kv_cache_tokens=2048) as backend:
        yield backend


def reference(directory: Path, text: str, window: int, stride: int) -> tuple[float, int]:
    """(nats, scored tokens) by transformers, as its guide on perplexity computes them."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    ids = torch.tensor(AutoTokenizer.from_pretrained(directory)(text).input_ids)
    nats, count, end = 0.0, 0, 1
    for begin in range(0, len(ids), stride):
        before, end = end, min(begin + window, len(ids))
        with torch.no_grad():
            logprobs = model(ids[None, begin:end]).logits[0].double().log_softmax(-1)
        targets = ids[before:end]
        nats -= logprobs[before - begin - 1 : -1].gather(1, targets[:, None]).sum().item()
        count += len(targets)
        if end == len(ids):
            break
    return nats, count


@pytest.mark.parametrize("sizes", [(None, None), (64, 32), (33, 7), (128, 127), (100, None), (2, 1)])
@pytest.mark.parametrize("name", TEXTS)
def test_equals_transformers(
    name: str, sizes: tuple[int | None, int | None], backend: LocalBackend, tiny_model_dir: Path
) -> None:
    text = TEXTS[name]
    result = perplexity(backend, text, window=sizes[0], stride=sizes[1])
    assert result.window == sizes[0] or (sizes[0] is None and result.window == 511)  # 512 less the engine's one
    assert result.stride == sizes[1] or (sizes[1] is None and result.stride == result.window // 2)
    nats, count = reference(tiny_model_dir, text, result.window, result.stride)
    assert result.num_tokens == count == len(backend.tokenizer.encode(text)) - 1
    assert result.nats == pytest.approx(nats, rel=1e-5)
    assert result.perplexity == pytest.approx(math.exp(nats / count), rel=1e-4)
    assert result.bits_per_byte == pytest.approx(nats / math.log(2) / len(text.encode()), rel=1e-4)


def test_smollm2_equals_transformers(smollm2_dir: Path) -> None:
    text = (ENGLISH[:300] + CHINESE[:60] + EMOJI[:40]) * 2
    with bimo.load("smollm2", dtype="float32") as model:
        result = perplexity(model.backend, text, window=128, stride=64)
    nats, count = reference(smollm2_dir, text, 128, 64)
    assert result.num_tokens == count > 128
    assert result.perplexity == pytest.approx(math.exp(nats / count), rel=1e-4)


def test_one_window_is_as_good_as_any_that_holds_the_text(backend: LocalBackend) -> None:
    length = len(backend.tokenizer.encode(ENGLISH))
    assert 100 < length < 500
    sizes = [(length, 1), (length, length - 1), (length + 1, 5), (500, 250)]
    nats = [perplexity(backend, ENGLISH, window=window, stride=stride).nats for window, stride in sizes]
    assert nats == pytest.approx([nats[0]] * 4, rel=1e-6)
    assert perplexity(backend, ENGLISH, window=length - 1, stride=length - 2).nats != nats[0]


@given(num_tokens=st.integers(1, 300), window=st.integers(2, 80), stride=st.integers(1, 79), first=st.integers(1, 4))
def test_every_token_is_scored_once_with_enough_context(num_tokens: int, window: int, stride: int, first: int) -> None:
    stride = min(stride, window - 1)
    parts = list(windows(num_tokens, window, stride, first))
    assert [token for part in parts for token in range(part.scored, part.end)] == list(range(first, num_tokens))
    for part in parts:
        assert 0 <= part.begin < part.scored < part.end <= part.begin + window
        if part.begin:
            assert part.scored - part.begin >= window - stride


class Counting:
    """A backend that counts the requests under way, and may change what comes out."""

    def __init__(self, backend: LocalBackend) -> None:
        self.backend, self.tokenizer = backend, backend.tokenizer
        self.info, self.abort = backend.info, backend.abort
        self.under_way: set[str] = set()
        self.peak = self.total = self.longest = 0

    def submit(self, request: Request, sink) -> None:
        def counted(output: Output) -> None:
            if output.usage is not None:
                self.under_way.discard(request.request_id)
            sink(self.changed(output))

        self.under_way.add(request.request_id)
        self.peak, self.total = max(self.peak, len(self.under_way)), self.total + 1
        self.longest = max(self.longest, len(request.prompt_token_ids))
        self.backend.submit(request, counted)

    def changed(self, output: Output) -> Output:
        return output


@pytest.mark.parametrize(("window", "places"), [(256, 8), (64, 32), (8, MAX_IN_FLIGHT)])
def test_windows_are_batched_and_few_are_under_way(window: int, places: int, backend: LocalBackend) -> None:
    """A text ten times as long has ten times the windows, and no more of them in memory (a KV cache of 2,048)."""
    before, preempted = backend.stats().steps, backend.stats().preemptions
    short, long = Counting(backend), Counting(backend)
    perplexity(short, CHINESE * 4, window=window)
    perplexity(long, CHINESE * 40, window=window)
    assert long.total > 9 * short.total
    assert short.peak <= long.peak == places
    assert long.longest == window
    assert not long.under_way
    assert backend.stats().preemptions == preempted
    assert backend.stats().steps - before < (short.total + long.total) / 2


def test_arrival_order_changes_nothing(backend: LocalBackend) -> None:
    class Slow(Counting):
        """Hands out the first window's result after all others."""

        def submit(self, request: Request, sink) -> None:
            if self.total:
                super().submit(request, sink)
            else:
                super().submit(request, lambda output: threading.Timer(0.2, sink, [output]).start())

    assert perplexity(Slow(backend), CHINESE, window=64) == perplexity(backend, CHINESE, window=64)


def test_progress_counts_to_the_end(backend: LocalBackend) -> None:
    told: list[tuple[int, int]] = []
    result = perplexity(backend, CHINESE, window=32, progress=lambda done, total: told.append((done, total)))
    assert len(told) > 5
    assert told == sorted(told)
    assert told[-1] == (result.num_tokens, result.num_tokens)


def test_leaving_early_stops_the_engine(backend: LocalBackend) -> None:
    expected = perplexity(backend, CHINESE, window=32)

    def leave(done: int, total: int) -> None:
        raise KeyboardInterrupt

    counting = Counting(backend)
    with pytest.raises(KeyboardInterrupt):
        perplexity(counting, CHINESE * 50, window=32, progress=leave)
    assert perplexity(backend, CHINESE, window=32) == expected  # behind the aborts in the engine's queue
    assert not counting.under_way
    assert counting.total < 2 * MAX_IN_FLIGHT


@pytest.fixture
def framed_dir(tiny_model_dir: Path, tmp_path: Path) -> Path:
    """The tiny model with a tokenizer that puts a BOS before and an EOS behind."""
    from tokenizers import Tokenizer, processors

    directory = tmp_path / "framed"
    shutil.copytree(tiny_model_dir, directory)
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A <|im_end|>", special_tokens=[("<|im_start|>", 1), ("<|im_end|>", 2)]
    )
    tokenizer.save(str(directory / "tokenizer.json"))
    return directory


def test_a_bos_is_context_and_an_eos_is_nothing(framed_dir: Path, tiny_model_dir: Path) -> None:
    with LocalBackend.load(str(framed_dir), dtype="float32") as framed:
        result = perplexity(framed, CHINESE, window=64)
        plain = framed.tokenizer.encode(CHINESE, add_special_tokens=False)
        one = perplexity(framed, "好")
        assert one.num_tokens == len(framed.tokenizer.encode("好", add_special_tokens=False))
        with pytest.raises(UsageError, match="empty"):
            perplexity(framed, "")
    assert result.num_tokens == len(plain)
    nats, count = reference(tiny_model_dir, "<|im_start|>" + CHINESE, 64, 32)
    assert (result.num_tokens, result.nats) == (count, pytest.approx(nats, rel=1e-5))


def test_the_formulas() -> None:
    result = Perplexity(nats=30 * math.log(7), num_tokens=30, num_bytes=90, window=8, stride=4)
    assert result.nats_per_token == pytest.approx(math.log(7))
    assert result.perplexity == pytest.approx(7)
    assert result.bits_per_byte == pytest.approx(math.log2(7) / 3)


@pytest.mark.parametrize(
    ("text", "settings", "words"),
    [
        ("", {}, "empty"),
        ("a", {}, "a single token"),
        ("bad \ud800 half", {}, "lone surrogate"),
        (ENGLISH, {"window": 1}, "at least 2 tokens and at most 511"),
        (ENGLISH, {"window": 512}, "at most 511"),
        (ENGLISH, {"window": 64, "stride": 64}, "less than the window of 64"),
        (ENGLISH, {"window": 64, "stride": 65}, "less than the window of 64"),
        (ENGLISH, {"stride": 0}, "at least 1"),
        (ENGLISH, {"stride": -3}, "at least 1"),
    ],
)
def test_what_cannot_be_measured(text: str, settings: dict[str, int], words: str, backend: LocalBackend) -> None:
    with pytest.raises(UsageError, match=words):
        perplexity(backend, text, **settings)


def test_check_windows_before_a_model_is_there() -> None:
    check_windows(2, 1)
    check_windows(10**9, 1)
    with pytest.raises(UsageError, match="stride"):
        check_windows(8, 8)


def test_failures_of_the_backend(backend: LocalBackend, tiny_model_dir: Path) -> None:
    class Mute(Counting):
        def changed(self, output: Output) -> Output:
            output.prompt_logprobs = None
            return output

    class Failing(Counting):
        def changed(self, output: Output) -> Output:
            output.finish_reason, output.error = "error", "out of luck"
            return output

    with pytest.raises(EngineError, match="cannot score"):
        perplexity(Mute(backend), CHINESE)
    with pytest.raises(EngineError, match="out of luck"):
        perplexity(Failing(backend), CHINESE)
    closed = LocalBackend.load(str(tiny_model_dir), dtype="float32")
    with pytest.raises(EngineError, match="load the model again"):
        perplexity(closed, CHINESE * 30, window=32, progress=lambda done, total: closed.close())


def test_weights_that_are_no_numbers(tiny_model_dir: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    directory = tmp_path / "broken"
    shutil.copytree(tiny_model_dir, directory)
    weights = load_file(directory / "model.safetensors")
    weights["model.norm.weight"][3] = math.nan
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    with LocalBackend.load(str(directory), dtype="float32") as broken, pytest.raises(EngineError, match="damaged"):
        perplexity(broken, CHINESE)
