"""POST /tokenize and /detokenize, in vLLM's shapes: what a text or a conversation is to the model."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from bimo.serving.body import read_model
from bimo.serving.chat import message_dicts
from bimo.serving.errors import json_response
from bimo.serving.schema import DetokenizeRequest, TokenizeRequest
from bimo.serving.service import service_of
from bimo.tokenizer.chat import encode_chat

__all__ = ["detokenize", "tokenize"]


async def tokenize(http: HttpRequest) -> Response:
    """The ids of a prompt or of messages under the model's template, their number, and the context's length."""
    service = service_of(http)
    backend = service.backend
    body = await read_model(http, TokenizeRequest, service.max_body_bytes)
    body.check()
    service.check_model(body.model)

    def encode() -> list[int]:
        if body.prompt is not None:
            return backend.tokenizer.encode(body.prompt, add_special_tokens=body.add_special_tokens is not False)
        assert body.messages is not None
        asked = body.add_generation_prompt
        return encode_chat(
            backend.tokenizer,
            message_dicts(body.messages),
            tools=[tool.model_dump(exclude_none=True) for tool in body.tools] if body.tools else None,
            add_generation_prompt=not body.continue_final_message if asked is None else asked,
            continue_final=bool(body.continue_final_message),
        )

    ids = await service.off_loop(len(body.prompt) if body.prompt is not None else 1 << 20, encode)
    answer: dict[str, Any] = {"count": len(ids), "max_model_len": backend.info().context_length, "tokens": ids}
    if body.return_token_strs:
        answer["token_strs"] = [backend.tokenizer.token_spelling(token_id) for token_id in ids]
    return json_response(answer)


async def detokenize(http: HttpRequest) -> Response:
    """The text of token ids, control tokens included; half characters at the edges show as U+FFFD."""
    service = service_of(http)
    backend = service.backend
    body = await read_model(http, DetokenizeRequest, service.max_body_bytes)
    service.check_model(body.model)
    service.check_token_ids(body.tokens, "tokens")
    return json_response({"prompt": backend.tokenizer.decode(body.tokens, skip_special_tokens=False)})
