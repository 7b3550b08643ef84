"""POST /v1/completions: text continued as it stands, scored (`echo` with `logprobs`), in lists, from text or token ids.

`logprobs` have the form evaluation harnesses read: `tokens`, `token_logprobs`, `top_logprobs`, `text_offset`, with the
prompt's tokens first when echoed (the very first has no log-probability: null). Offsets count characters of `text`.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from bimo.engine.request import Output, Request, TokenLogprob
from bimo.serving.body import read_model
from bimo.serving.errors import ApiError, json_response
from bimo.serving.observe import record_of
from bimo.serving.schema import CompletionRequest
from bimo.serving.service import Service, service_of
from bimo.serving.streaming import Batch, EventStream, Generation, collect, event
from bimo.serving.translate import constraint, sampling_params, usage_json
from bimo.serving.vocabulary import Vocabulary
from bimo.tokenizer.load import Tokenizer

__all__ = ["CompletionChoice", "create_completion"]

DEFAULT_MAX_TOKENS = 16  # OpenAI's


async def create_completion(http: HttpRequest) -> Response:
    """The handler; see `chat.create_chat_completion` for the order of things."""
    service = service_of(http)
    service.check_open()
    body = await read_model(http, CompletionRequest, service.max_body_bytes)
    body.check()
    service.check_model(body.model)
    plan = await service.off_loop(_size(body), lambda: _plan(service, body))
    n = body.n or 1
    vocabulary = None if body.logprobs is None else service.vocabulary
    scores_only = body.max_tokens == 0
    choices = [
        CompletionChoice(number * n + index, prompt if body.echo else None, vocabulary, scores_only=scores_only)
        for number, prompt in enumerate(plan.prompts)
        for index in range(n)
    ]
    head = {
        "id": f"cmpl-{uuid.uuid4().hex}",
        "object": "text_completion",
        "created": int(time.time()),
        "model": service.adapter(body.model) or service.model_name,
        "system_fingerprint": service.fingerprint,
    }
    generation = service.start(plan.requests, record_of(http.scope))
    if body.stream:
        with_usage = bool(body.stream_options and body.stream_options.include_usage)
        events = _events(generation, choices, head, n, with_usage, scores_only, service.keep_alive)
        return EventStream(generation, events)

    def take(batch: Batch) -> None:
        for number, output in batch:
            choices[number * n + output.index].push(output)

    await collect(generation, http.receive, take)
    usage = _usage(generation, scores_only)
    return json_response(head | {"choices": [choice.whole() for choice in choices], "usage": usage})


async def _events(
    generation: Generation,
    choices: list[CompletionChoice],
    head: dict[str, Any],
    n: int,
    with_usage: bool,
    scores_only: bool,
    keep_alive: float,
) -> AsyncIterator[bytes]:
    tail = {"usage": None} if with_usage else {}
    async for batch in generation.batches(keep_alive):
        if not batch:
            yield b""
        for number, output in batch:
            if piece := choices[number * n + output.index].push(output):
                yield event(head | {"choices": [piece]} | tail)
    if with_usage:
        yield event(head | {"choices": [], "usage": _usage(generation, scores_only)})


def _usage(generation: Generation, scores_only: bool) -> dict[str, Any]:
    """The client's usage: the one token the engine made to score a prompt was not asked for."""
    usage = usage_json(generation.usage)
    if scores_only:
        usage |= {"completion_tokens": 0, "total_tokens": usage["prompt_tokens"]}
    return usage


# --- from the body to the engine's requests ------------------------------------------------------------------------


@dataclass(frozen=True)
class Prompt:
    """One prompt as text (what `echo` repeats) and as ids."""

    text: str
    ids: list[int]


@dataclass(frozen=True)
class Plan:
    prompts: list[Prompt]
    requests: list[Request]


def _size(body: CompletionRequest) -> int:
    if body.structured_outputs is not None:
        return 1 << 20
    prompts = body.prompt if isinstance(body.prompt, list) else [body.prompt]
    return sum(len(prompt) if isinstance(prompt, str | list) else 1 for prompt in prompts)


def _plan(service: Service, body: CompletionRequest) -> Plan:
    tokenizer = service.backend.tokenizer
    prompts = _prompts(service, tokenizer, body)
    max_tokens = DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens
    sampling = sampling_params(
        body,
        max_tokens=max(max_tokens, 1),  # the engine generates at least one; for 0 it is dropped
        logprobs=body.logprobs,
        prompt_logprobs=body.logprobs if body.echo else None,
        best_of=body.best_of,
    )
    shape = constraint(tokenizer, None, body.structured_outputs)
    requests = [
        Request(
            prompt_token_ids=p.ids,
            sampling=sampling,
            truncate_prompt=bool(body.truncate_prompt),
            constraint=shape,
            adapter=service.adapter(body.model),
        )
        for p in prompts
    ]
    return Plan(prompts, requests)


def _prompts(service: Service, tokenizer: Tokenizer, body: CompletionRequest) -> list[Prompt]:
    given = body.prompt
    if isinstance(given, str):
        given = [given]
    lists: list[Any] = [given] if isinstance(given[0], int) else list(given)
    prompts = []
    for prompt in lists:
        if isinstance(prompt, str):
            ids = tokenizer.encode(prompt, add_special_tokens=body.add_special_tokens is not False)
            prompts.append(Prompt(prompt, ids or _beginning(tokenizer)))
        else:
            service.check_token_ids(prompt, "prompt")
            prompts.append(Prompt(tokenizer.decode(prompt), prompt))
    return prompts


def _beginning(tokenizer: Tokenizer) -> list[int]:
    """What stands before a text that begins with nothing: a model needs some token to continue."""
    ids = [tokenizer.bos_token_id, *tokenizer.eos_token_ids]
    if (first := next((token_id for token_id in ids if token_id is not None), None)) is None:
        raise ApiError(400, "the prompt is empty and this model has no token to begin with: send some text",
                       param="prompt", code="invalid_value")  # fmt: skip
    return [first]


# --- from outputs to choices ---------------------------------------------------------------------------------------


class CompletionChoice:
    """One continuation growing: `push` gives the chunk an output makes, `whole` the sum of all chunks.

    echo: the prompt to repeat in front. scores_only: the prompt alone is wanted (max_tokens 0).
    """

    def __init__(
        self, index: int, echo: Prompt | None, vocabulary: Vocabulary | None, *, scores_only: bool = False
    ) -> None:
        self._index = index
        self._echo = echo
        self._vocabulary = vocabulary
        self._scores_only = scores_only
        self._begun = False
        self._characters = 0  # in front of the next token
        self._text = ""
        self._logprobs: dict[str, list[Any]] = _no_logprobs()
        self._end: dict[str, Any] = {"finish_reason": None, "stop_reason": None}

    def push(self, output: Output) -> dict[str, Any] | None:
        """Take an output in; the chunk it makes, None when it shows nothing new."""
        text, logprobs = "", _no_logprobs()
        if not self._begun:
            self._begun = True
            if self._echo is not None:
                text = self._echo.text
                self._score(logprobs, self._echo.ids, output.prompt_logprobs or [])
        if not self._scores_only:
            text += output.text
            self._score(logprobs, output.token_ids, output.logprobs or [])
        if output.finish_reason is not None:
            reason = "length" if self._scores_only else output.finish_reason
            self._end = {"finish_reason": reason, "stop_reason": None if self._scores_only else output.stop_reason}
        elif not text and not logprobs["tokens"]:
            return None
        self._text += text
        for name, values in logprobs.items():
            self._logprobs[name] += values
        return self._choice(text, logprobs)

    def _score(self, into: dict[str, list[Any]], ids: list[int], scores: Sequence[TokenLogprob | None]) -> None:
        if self._vocabulary is None:
            return
        for token_id, score, width in zip(ids, scores, self._vocabulary.count_characters(ids), strict=True):
            into["tokens"].append(self._vocabulary.name(token_id))
            into["token_logprobs"].append(None if score is None else self._vocabulary.finite(score.logprob))
            into["top_logprobs"].append(None if score is None else self._vocabulary.top(score))
            into["text_offset"].append(self._characters)
            self._characters += width

    def whole(self) -> dict[str, Any]:
        """The complete choice."""
        return self._choice(self._text, self._logprobs)

    def _choice(self, text: str, logprobs: dict[str, list[Any]]) -> dict[str, Any]:
        shown = None if self._vocabulary is None else logprobs
        return {"index": self._index, "text": text, "logprobs": shown, **self._end}


def _no_logprobs() -> dict[str, list[Any]]:
    return {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
