"""How well a model predicts a text: perplexity, bits per byte, nats per token.

    with bimo.load("smollm2") as model:
        result = perplexity(model.backend, Path("novel.txt").read_text(encoding="utf-8"))
    print(result.perplexity, result.bits_per_byte)

Every log-probability comes out of the backend like any answer does, so a quantised or fused model is measured as it
serves. A text longer than the window is read in overlapping ones, and each token is scored in exactly one of them:

    window 1   [ scored ..................... ]
    window 2              [ context | scored  ]          context = window - stride
    window 3                         [ context | scored  ]

as in "Perplexity of fixed-length models" (Hugging Face's guide). The first token has nothing before it and is not
scored, unless the tokenizer puts something in front (a BOS); what the tokenizer adds is never scored itself.

    nats = -Σ log p(token | tokens before it in its window)
    nats_per_token = nats / scored tokens      perplexity = exp(nats_per_token)
    bits_per_byte = nats / ln 2 / bytes of the text in UTF-8

Perplexities compare only between models with one tokenizer; bits per byte compare between all.
"""

from __future__ import annotations

import math
import queue
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from bimo.backends.base import Backend
from bimo.engine.request import Output, Request, SamplingParams
from bimo.errors import EngineError, UsageError
from bimo.tokenizer.load import Tokenizer

__all__ = ["Perplexity", "Window", "check_windows", "perplexity", "windows"]

DEFAULT_WINDOW = 1024  # tokens; longer ones cost more and change little
TOKENS_IN_FLIGHT = 8192  # of the windows submitted at one time: enough to fill a step, whatever the text's length
MAX_IN_FLIGHT = 64  # windows; more would not fit into one batch
IMPOSSIBLE = 700.0  # nats a token; a vocabulary's worth of pure guessing is 8 to 13, and exp(710) overflows

Progress = Callable[[int, int], None]  # tokens scored, tokens to score


@dataclass(frozen=True, kw_only=True)
class Perplexity:
    """What was measured. `nats` is the whole text's."""

    nats: float
    num_tokens: int  # scored
    num_bytes: int  # of the text in UTF-8
    window: int
    stride: int

    @property
    def nats_per_token(self) -> float:
        return self.nats / self.num_tokens

    @property
    def perplexity(self) -> float:
        return math.exp(self.nats_per_token)

    @property
    def bits_per_byte(self) -> float:
        return self.nats / math.log(2) / self.num_bytes


@dataclass(frozen=True, slots=True)
class Window:
    """Tokens [begin, end) are read, those of [scored, end) are scored."""

    begin: int
    scored: int
    end: int


def windows(num_tokens: int, window: int, stride: int, first: int = 1) -> Iterator[Window]:
    """The windows over `num_tokens` tokens; each token from `first` on is scored once, with a token before it."""
    begin, scored = 0, first
    while scored < num_tokens:
        end = min(begin + window, num_tokens)
        if scored < end:
            yield Window(begin, scored, end)
        begin, scored = begin + stride, max(scored, end)


def check_windows(window: int, stride: int, longest: int | None = None) -> None:
    """UsageError unless every window has room to score, and some context for it. `longest`: what the model takes."""
    if window < 2 or (longest is not None and window > longest):
        limit = "" if longest is None else f" and at most {longest}, the model's context less one"
        raise UsageError(f"the window must be at least 2 tokens{limit}, not {window}", "window")
    if not 1 <= stride < window:
        raise UsageError(
            f"the stride must be at least 1 and less than the window of {window} tokens, so that every token has some "
            f"context, not {stride}",
            "stride",
        )


def perplexity(
    backend: Backend,
    text: str,
    *,
    window: int | None = None,
    stride: int | None = None,
    progress: Progress | None = None,
) -> Perplexity:
    """Measure the model behind `backend` on `text`.

    Args:
        window: tokens read at once; None: 1024, or what the context holds.
        stride: tokens scored in each window after the first; None: half the window. Less is slower and more exact.
        progress: called after every window, in the caller's thread.

    Raises UsageError (a text of less than two tokens, windows that cannot be), CapacityError, EngineError.
    """
    longest = backend.info().context_length - 1  # the engine keeps room for one new token
    window = min(DEFAULT_WINDOW, longest) if window is None else window
    stride = max(window // 2, 1) if stride is None else stride
    check_windows(window, stride, longest)
    if not text:
        raise UsageError("the text is empty: give one of at least two tokens", "text")
    ids, first = _encode(backend.tokenizer, text)
    total = len(ids) - first
    if total < 1:
        raise UsageError("the text is a single token, and nothing comes before it: give a longer one", "text")
    nats: list[float] = []  # of each window
    done = 0
    for scored in _scores(backend, ids, windows(len(ids), window, stride, first), window):
        nats.append(-math.fsum(scored))
        done += len(scored)
        if progress is not None:
            progress(done, total)
    if done != total:
        raise EngineError(f"the backend gave {done} log-probabilities for {total} tokens: it cannot score a text")
    result = Perplexity(
        nats=math.fsum(nats), num_tokens=total, num_bytes=len(text.encode("utf-8")), window=window, stride=stride
    )
    if not result.nats_per_token < IMPOSSIBLE:  # also for NaN
        raise EngineError(
            f"the model's probabilities are no numbers to measure by ({result.nats_per_token} nats a token): its "
            "weights are damaged, or float16 is too small for them; try float32"
        )
    return result


def _encode(tokenizer: Tokenizer, text: str) -> tuple[list[int], int]:
    """Token ids with what the tokenizer puts in front (nothing behind), and the place of the first to be scored."""
    plain = tokenizer.encode(text, add_special_tokens=False)
    whole = tokenizer.encode(text)
    added = len(whole) - len(plain)
    front = next((n for n in range(added + 1) if whole[n : n + len(plain)] == plain), 0)
    return whole[:front] + plain, max(front, 1)


def _scores(backend: Backend, ids: list[int], parts: Iterator[Window], window: int) -> Iterator[list[float]]:
    """Log-probabilities of each window's scored tokens, as windows are finished; few are under way at a time."""
    sampling = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0)
    places = max(1, min(MAX_IN_FLIGHT, min(TOKENS_IN_FLIGHT, backend.info().kv_cache_tokens) // window))
    outputs: queue.SimpleQueue[Output] = queue.SimpleQueue()
    under_way: dict[str, Window] = {}
    try:
        while True:
            while len(under_way) < places and (part := next(parts, None)) is not None:
                request = Request(prompt_token_ids=ids[part.begin : part.end], sampling=sampling)
                backend.submit(request, outputs.put)
                under_way[request.request_id] = part
            if not under_way:
                return
            output = outputs.get()
            if output.finish_reason in ("error", "abort"):
                raise EngineError(output.error or "the engine was closed while it measured: load the model again")
            if output.prompt_logprobs is not None:
                part = under_way[output.request_id]
                scored = output.prompt_logprobs[part.scored - part.begin :]  # the rest is context, scored elsewhere
                yield [entry.logprob for entry in scored if entry is not None]
            if output.usage is not None:
                del under_way[output.request_id]
    finally:
        for request_id in under_way:
            backend.abort(request_id)
