"""OpenAI's chat messages: checked, and made as plain as chat templates want them.

messages = validate_messages(body["messages"])      # UsageError naming the message and what is wrong with it
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from bimo.errors import UsageError
from bimo.tokenizer.load import check_text

__all__ = ["ROLES", "check_strings", "strings", "validate_messages"]

ROLES = ("system", "developer", "user", "assistant", "tool")


def validate_messages(messages: Any) -> list[dict[str, Any]]:
    """OpenAI's messages, checked and made plain: content is text (parts joined by line breaks) and absent fields are
    left out, tool calls' arguments are objects. Raises UsageError naming the message."""
    if not isinstance(messages, Sequence) or isinstance(messages, str | bytes):
        raise UsageError(f"messages must be a list of messages, not {type(messages).__name__}", "messages")
    if not messages:
        raise UsageError("messages must hold at least one message", "messages")
    plain = []
    for place, message in enumerate(messages):
        where = f"messages[{place}]"
        if not isinstance(message, Mapping):
            raise UsageError(f"{where} must be an object with role and content, not {message!r:.80}", "messages")
        role = message.get("role")
        if role not in ROLES:
            raise UsageError(f"{where}.role must be one of {', '.join(ROLES)}, not {role!r:.80}", "messages")
        copy = {str(key): value for key, value in message.items() if value is not None}
        if "tool_calls" in copy:
            if role != "assistant":
                raise UsageError(f"{where}: only an assistant message has tool_calls", "messages")
            copy["tool_calls"] = _plain_calls(copy["tool_calls"], where)
            if not copy["tool_calls"]:
                del copy["tool_calls"]
        content = _plain_content(copy.get("content"), where)
        if content is None and "tool_calls" not in copy:
            raise UsageError(f"{where} has no content", "messages")
        if content is not None:
            copy["content"] = content
        check_strings(copy, where)
        plain.append(copy)
    return plain


def _plain_content(content: Any, where: str) -> str | None:
    if content is None or isinstance(content, str):
        return content
    if not isinstance(content, Sequence) or isinstance(content, bytes):
        raise UsageError(f"{where}.content must be text or a list of text parts", "messages")
    texts = []
    for place, part in enumerate(content):
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind != "text":
            raise UsageError(
                f"{where}.content[{place}] must be a part of type text; {kind!r:.40} cannot be read by this model",
                "messages",
            )
        if not isinstance(part.get("text"), str):
            raise UsageError(f"{where}.content[{place}].text must be text", "messages")
        texts.append(part["text"])
    return "\n".join(texts)


def _plain_calls(calls: Any, where: str) -> list[dict[str, Any]]:
    """Arguments as objects: templates write them with `tojson`, which would quote OpenAI's JSON text again."""
    if not isinstance(calls, Sequence) or isinstance(calls, str | bytes):
        raise UsageError(f"{where}.tool_calls must be a list", "messages")
    plain = []
    for place, call in enumerate(calls):
        function = call.get("function") if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise UsageError(f"{where}.tool_calls[{place}] must have a function with a name", "messages")
        arguments = function.get("arguments", {})
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments or "{}")
            except (ValueError, RecursionError):
                raise UsageError(f"{where}.tool_calls[{place}].function.arguments is not JSON", "messages") from None
        if not isinstance(arguments, Mapping):
            raise UsageError(f"{where}.tool_calls[{place}].function.arguments must be an object", "messages")
        plain.append({**call, "type": "function", "function": {**function, "arguments": dict(arguments)}})
    return plain


def check_strings(value: Any, where: str, param: str = "messages") -> None:
    """UsageError if any text in a JSON value is not valid Unicode."""
    for text in strings(value):
        try:
            check_text(text, param)
        except UsageError as error:
            raise UsageError(f"{where}: {error}", param) from None


def strings(value: Any) -> Iterable[str]:
    """Every text in a JSON value, keys included; without recursion, since the caller chooses the depth."""
    stack = [value]
    while stack:
        value = stack.pop()
        if isinstance(value, str):
            yield value
        elif isinstance(value, Mapping):
            stack.extend(value.keys())
            stack.extend(value.values())
        elif isinstance(value, Sequence) and not isinstance(value, bytes):
            stack.extend(value)
