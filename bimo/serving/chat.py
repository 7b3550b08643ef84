"""POST /v1/chat/completions: a conversation in, an answer, tool calls or a stream of both out.

    body -> messages through the model's chat template -> ids -> Generation -> `ChatChoice` per answer -> JSON or events

`ChatChoice` makes deltas out of outputs, and the whole answer is what its deltas add up to: one path, two forms.
A tool the client insists on (`tool_choice` required or named) is called by construction: the prompt already ends in
`<tool_call>` and decoding is held to that tool's JSON schema.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from bimo.engine.request import Constraint, Output, Request
from bimo.errors import ContextLengthError
from bimo.serving.body import read_model
from bimo.serving.errors import ApiError, json_response
from bimo.serving.observe import record_of
from bimo.serving.schema import ChatRequest, NamedTool, combination
from bimo.serving.service import Service, service_of
from bimo.serving.streaming import Batch, EventStream, Generation, collect, event
from bimo.serving.translate import constraint, sampling_params, usage_json
from bimo.serving.vocabulary import Vocabulary
from bimo.tokenizer.chat import chat_stop, encode_chat
from bimo.tokenizer.tools import (
    TOOL_CALL_CLOSE,
    TOOL_CALL_OPEN,
    ToolCall,
    ToolCallDelta,
    ToolCallStream,
    tool_call_schema,
    validate_tools,
)

__all__ = ["ChatChoice", "create_chat_completion", "message_dicts"]

FORCED = TOOL_CALL_OPEN + "\n"


async def create_chat_completion(http: HttpRequest) -> Response:
    """The handler. Everything that can be refused is refused before the first byte of an answer."""
    service = service_of(http)
    service.check_open()
    body = await read_model(http, ChatRequest, service.max_body_bytes)
    body.check()
    service.check_model(body.model)
    plan = await service.off_loop(_size(body), lambda: _plan(service, body))
    with_logprobs = service.vocabulary if body.logprobs else None
    choices = [ChatChoice(index, with_logprobs, plan) for index in range(plan.request.sampling.n)]
    head = {
        "id": f"chatcmpl-{uuid.uuid4().hex}",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": plan.request.adapter or service.model_name,
        "system_fingerprint": service.fingerprint,
    }
    try:
        generation = service.start([plan.request], record_of(http.scope))
    except ContextLengthError as error:
        raise ApiError(400, str(error), param="messages", code="context_length_exceeded") from None
    if body.stream:
        with_usage = bool(body.stream_options and body.stream_options.include_usage)
        return EventStream(generation, _events(generation, choices, head, with_usage, service.keep_alive))

    def take(batch: Batch) -> None:
        for _, output in batch:
            choices[output.index].push(output)

    usage = await collect(generation, http.receive, take)
    return json_response(head | {"choices": [choice.whole() for choice in choices], "usage": usage_json(usage)})


async def _events(
    generation: Generation, choices: list[ChatChoice], head: dict[str, Any], with_usage: bool, keep_alive: float
) -> AsyncIterator[bytes]:
    """Chunks: every choice's role at once, then deltas as they come, then, when asked for, the usage."""
    head = head | {"object": "chat.completion.chunk"}
    tail = {"usage": None} if with_usage else {}
    for choice in choices:
        yield event(head | {"choices": [choice.first()]} | tail)
    async for batch in generation.batches(keep_alive):
        if not batch:
            yield b""
        for _, output in batch:
            for piece in choices[output.index].push(output):
                yield event(head | {"choices": [piece]} | tail)
    if with_usage:
        yield event(head | {"choices": [], "usage": usage_json(generation.usage)})


# --- from the body to the engine's request -------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class ToolReading:
    """How an answer's text is read for tool calls."""

    forced: bool = False  # the prompt ends in <tool_call>, the answer begins inside it
    single: bool = False  # parallel_tool_calls=false: generation stops at the first call's end
    include_stop: bool = False  # the engine leaves the stop string in the text


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What to ask the engine, and how to read its answer (`tools` None: as plain text)."""

    request: Request
    tools: ToolReading | None
    own_stops: frozenset[str]  # stop strings that are our way of ending, not the client's


def message_dicts(messages: list[Any]) -> list[dict[str, Any]]:
    """The body's messages as the chat renderer takes them: absent fields left out."""
    return [message.model_dump(exclude_none=True, exclude={"annotations"}) for message in messages]


def _size(body: ChatRequest) -> int:
    """Characters to render and encode, roughly; a constraint or tools always count as much."""
    if body.tools or body.response_format is not None or body.structured_outputs is not None:
        return 1 << 20
    contents = [message.content for message in body.messages]
    return sum(len(c) if isinstance(c, str) else sum(len(part.text) for part in c or ()) for c in contents)


def _plan(service: Service, body: ChatRequest) -> Plan:
    tokenizer = service.backend.tokenizer
    if service.backend.info().reads_source:
        message = (
            "this model is an encoder-decoder, which answers one text and not a conversation: POST /v1/completions"
        )
        raise ApiError(400, message, param="model")
    tools = [tool.model_dump(exclude_none=True) for tool in body.tools or ()]
    choice: Any = body.tool_choice.model_dump() if isinstance(body.tool_choice, NamedTool) else body.tool_choice
    reading, schema = None, None
    shape: Callable[[], Constraint] | None
    if tools and choice != "none":
        schema = tool_call_schema(validate_tools(tools), choice)
        if schema is not None and body.continue_final_message:
            raise combination("tool_choice", "a tool call cannot be forced into a message that is continued")
        single = body.parallel_tool_calls is False and schema is None
        reading = ToolReading(forced=schema is not None, single=single,
                              include_stop=bool(body.include_stop_str_in_output))  # fmt: skip
    ids = encode_chat(
        tokenizer,
        message_dicts(body.messages),
        tools=tools if reading else None,
        add_generation_prompt=_prompts_answer(body.add_generation_prompt, body.continue_final_message),
        continue_final=bool(body.continue_final_message),
        variables=body.chat_template_kwargs,
    )
    stop = chat_stop(tokenizer)
    if schema is not None:
        from bimo.engine.constrain import json_schema

        ids = ids + tokenizer.encode(FORCED, add_special_tokens=False)
        shape = json_schema(tokenizer, schema, param="tools")
    else:
        shape = constraint(tokenizer, body.response_format, body.structured_outputs)
        if reading and reading.single:
            stop += (TOOL_CALL_CLOSE,)
    sampling = sampling_params(
        body,
        max_tokens=body.max_completion_tokens if body.max_tokens is None else body.max_tokens,
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        stop=stop,
    )
    request = Request(
        prompt_token_ids=ids,
        sampling=sampling,
        truncate_prompt=bool(body.truncate_prompt),
        constraint=shape,
        adapter=service.adapter(body.model),
    )
    asked = {body.stop} if isinstance(body.stop, str) else set(body.stop or ())
    return Plan(request=request, tools=reading, own_stops=frozenset(stop) - asked)


def _prompts_answer(asked: bool | None, continues: bool | None) -> bool:
    """Whether the template opens an answer: by default, unless the last message is to be continued."""
    return not continues if asked is None else asked


# --- from outputs to choices ---------------------------------------------------------------------------------------


class ChatChoice:
    """One answer growing. `push` gives the chunks an output makes; `whole` is their sum.

    vocabulary: given when log-probabilities were asked for.
    """

    def __init__(self, index: int, vocabulary: Vocabulary | None, plan: Plan) -> None:
        self.index = index
        self.content = ""
        self.calls: list[ToolCall] = []
        self.logprobs: list[dict[str, Any]] = []
        self.finish_reason: str | None = None
        self.stop_reason: int | str | None = None
        self._vocabulary = vocabulary
        self._own_stops = plan.own_stops
        self._tools = plan.tools
        self._stream = ToolCallStream() if plan.tools else None
        if self._stream and plan.tools and plan.tools.forced:
            self._stream.push(FORCED)

    def first(self) -> dict[str, Any]:
        """The chunk before anything is known: who speaks."""
        return self._chunk({"role": "assistant", "content": ""}, [])

    def push(self, output: Output) -> list[dict[str, Any]]:
        """Take an output in; the chunks it makes, the last one with the finish reason when it is the end."""
        entries: list[dict[str, Any]] = []
        if self._vocabulary is not None:
            scores = output.logprobs or []
            shown = len(scores) - self._vocabulary.ends(output)
            entries = [self._vocabulary.chat_entry(token) for token in scores[:shown]]
        content, calls = self._read(output)
        self.content += content
        self.calls += [call for _, call in calls]
        self.logprobs += entries
        deltas: list[dict[str, Any]] = [{"content": content}] if content else []
        deltas += [{"tool_calls": [{"index": number, **call.to_dict()}]} for number, call in calls]
        if entries and not deltas:  # tokens whose text is held back
            deltas = [{"content": ""}]
        chunks = [self._chunk(delta, [] if place else entries) for place, delta in enumerate(deltas)]
        if output.finish_reason is not None:
            stopped = output.finish_reason == "stop"
            self.finish_reason = "tool_calls" if stopped and self.calls else output.finish_reason
            self.stop_reason = None if output.stop_reason in self._own_stops else output.stop_reason
            chunks.append(self._chunk({}, []) | {"finish_reason": self.finish_reason, "stop_reason": self.stop_reason})
        return chunks

    def _read(self, output: Output) -> tuple[str, list[tuple[int, ToolCall]]]:
        """The output's text as content and calls."""
        if self._stream is None or self._tools is None:
            return output.text, []
        deltas: list[ToolCallDelta] = [self._stream.push(output.text)]
        if output.finish_reason is not None:
            if self._closes(output):
                deltas.append(self._stream.push(TOOL_CALL_CLOSE))
            deltas.append(self._stream.flush())
        content = "".join(delta.content for delta in deltas)
        return content, [call for delta in deltas for call in delta.calls]

    def _closes(self, output: Output) -> bool:
        """Whether the text lacks a closing tag that decoding implied: of a forced call, or taken as a stop string."""
        assert self._tools is not None
        if self._tools.forced:
            return output.finish_reason == "stop"
        return self._tools.single and output.stop_reason == TOOL_CALL_CLOSE and not self._tools.include_stop

    def _chunk(self, delta: dict[str, Any], entries: list[dict[str, Any]]) -> dict[str, Any]:
        logprobs = {"content": entries, "refusal": None} if entries else None
        return {"index": self.index, "delta": delta, "logprobs": logprobs, "finish_reason": None}

    def whole(self) -> dict[str, Any]:
        """The complete choice."""
        message: dict[str, Any] = {"role": "assistant", "content": self.content or (None if self.calls else "")}
        message["refusal"] = None
        if self.calls:
            message["tool_calls"] = [call.to_dict() for call in self.calls]
        return {
            "index": self.index,
            "message": message,
            "logprobs": None if self._vocabulary is None else {"content": self.logprobs, "refusal": None},
            "finish_reason": self.finish_reason,
            "stop_reason": self.stop_reason,
        }
