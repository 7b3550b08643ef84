"""Tool calls as text: how tools are told to a model, how its calls are read back, whole or streamed.

The text form is Hermes' and Qwen's, which most open models know and any model can be asked for:

    <tool_call>
    {"name": "get_weather", "arguments": {"city": "上海"}}
    </tool_call>

A template that knows `tools` renders them in its own words; for the others `fold_messages` puts tools into the system
message, calls into the assistant's text and results into a user message. `parse_tool_calls` and `ToolCallStream` are
one parser (the first feeds the second everything at once), so a streamed answer cannot differ from a whole one.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from bimo.errors import UsageError

__all__ = [
    "TOOL_CALL_CLOSE",
    "TOOL_CALL_OPEN",
    "ToolCall",
    "ToolCallDelta",
    "ToolCallStream",
    "fold_messages",
    "parse_tool_calls",
    "tool_call_schema",
    "tool_prompt",
    "validate_tool_choice",
    "validate_tools",
]

TOOL_CALL_OPEN = "<tool_call>"
TOOL_CALL_CLOSE = "</tool_call>"
MAX_TOOLS = 128  # OpenAI's limit
_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}\Z")  # OpenAI's rule for function names


def validate_tools(tools: Any) -> list[dict[str, Any]]:
    """The tools as OpenAI defines them, checked; [] for None. Raises UsageError naming the place."""
    if tools is None:
        return []
    if not isinstance(tools, Sequence) or isinstance(tools, str | bytes):
        raise UsageError(f"tools must be a list of tools, not {type(tools).__name__}", "tools")
    if len(tools) > MAX_TOOLS:
        raise UsageError(f"at most {MAX_TOOLS} tools, got {len(tools)}", "tools")
    seen: set[str] = set()
    for place, tool in enumerate(tools):
        where = f"tools[{place}]"
        if not isinstance(tool, Mapping) or tool.get("type") != "function":
            raise UsageError(f'{where} must be {{"type": "function", "function": {{...}}}}', "tools")
        function = tool.get("function")
        if not isinstance(function, Mapping):
            raise UsageError(f"{where}.function must be an object with a name and parameters", "tools")
        name = function.get("name")
        if not isinstance(name, str) or not _NAME.match(name):
            raise UsageError(f"{where}.function.name must be 1 to 64 of a-z, A-Z, 0-9, _ and -, not {name!r}", "tools")
        if name in seen:
            raise UsageError(f"{where}.function.name {name!r} is there twice: names must be unique", "tools")
        seen.add(name)
        if not isinstance(function.get("description", ""), str | None):
            raise UsageError(f"{where}.function.description must be text", "tools")
        if not isinstance(function.get("parameters") or {}, Mapping):
            raise UsageError(f"{where}.function.parameters must be a JSON schema (an object)", "tools")
    return [dict(tool) for tool in tools]


def validate_tool_choice(tool_choice: Any, tools: Sequence[Mapping[str, Any]]) -> str | None:
    """ "none", "auto", "required", or the name of the one function that must be called.

    Accepts OpenAI's forms; None means "auto" when there are tools. A named function is returned as "function:NAME".
    """
    if tool_choice is None:
        return "auto" if tools else "none"
    if isinstance(tool_choice, str):
        if tool_choice not in ("none", "auto", "required"):
            raise UsageError(
                f'tool_choice must be "none", "auto", "required" or a function, not {tool_choice!r}', "tool_choice"
            )
        if tool_choice == "required" and not tools:
            raise UsageError('tool_choice "required" needs at least one tool in tools', "tool_choice")
        return tool_choice
    function = tool_choice.get("function") if isinstance(tool_choice, Mapping) else None
    if not isinstance(function, Mapping) or tool_choice.get("type") != "function":
        raise UsageError('tool_choice must be {"type": "function", "function": {"name": ...}}', "tool_choice")
    name = function.get("name")
    names = [tool["function"]["name"] for tool in tools]
    if name not in names:
        raise UsageError(f"tool_choice names {name!r}, which is not among the tools: {', '.join(names)}", "tool_choice")
    return f"function:{name}"


def tool_call_schema(tools: Sequence[Mapping[str, Any]], tool_choice: Any) -> dict[str, Any] | None:
    """JSON schema of the object inside one `<tool_call>`, for constrained decoding; None when nothing is forced.

    "required" allows any of the tools, a named function only that one. Arguments follow the tool's own `parameters`,
    or are any object when it has none. `$ref`s inside parameters keep working: each schema's `$defs` move to the root
    under the tool's name.
    """
    choice = validate_tool_choice(tool_choice, tools)
    if choice in ("none", "auto", None):
        return None
    wanted = [t["function"] for t in tools if choice == "required" or choice == f"function:{t['function']['name']}"]
    definitions: dict[str, Any] = {}
    branches = []
    for function in wanted:
        parameters = dict(function.get("parameters") or {"type": "object"})
        parameters.setdefault("type", "object")
        parameters = _rebase(parameters, function["name"])
        for key in ("$defs", "definitions"):
            for name, definition in (parameters.pop(key, None) or {}).items():
                definitions[f"{function['name']}.{name}"] = definition
        parameters.pop("$schema", None)
        branches.append(
            {
                "type": "object",
                "properties": {"name": {"const": function["name"]}, "arguments": parameters},
                "required": ["name", "arguments"],
                "additionalProperties": False,
            }
        )
    schema: dict[str, Any] = branches[0] if len(branches) == 1 else {"anyOf": branches}
    return schema | ({"$defs": definitions} if definitions else {})


def _rebase(node: Any, tool: str) -> Any:
    """Point `#/$defs/X` (and `#/definitions/X`) of a tool's schema at the place they move to."""
    if isinstance(node, Mapping):
        out = {key: _rebase(value, tool) for key, value in node.items()}
        if isinstance(ref := out.get("$ref"), str):
            out["$ref"] = re.sub(r"^#/(?:\$defs|definitions)/", f"#/$defs/{tool}.", ref)
        return out
    if isinstance(node, list):
        return [_rebase(value, tool) for value in node]
    return node


# --- telling a model about tools -----------------------------------------------------------------------------------


def tool_prompt(tools: Sequence[Mapping[str, Any]]) -> str:
    """What a system message says about the tools, for templates that have no words of their own (Qwen's wording)."""
    lines = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
    return (
        "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
        f"You are provided with function signatures within <tools></tools> XML tags:\n<tools>\n{lines}\n</tools>\n\n"
        "For each function call, return a json object with function name and arguments within "
        f"{TOOL_CALL_OPEN}{TOOL_CALL_CLOSE} XML tags:\n{TOOL_CALL_OPEN}\n"
        '{"name": <function-name>, "arguments": <args-json-object>}\n'
        f"{TOOL_CALL_CLOSE}"
    )


def call_text(calls: Sequence[Mapping[str, Any]]) -> str:
    """An assistant message's `tool_calls` as the text a model would have written."""
    texts = []
    for call in calls:
        function = call["function"]
        body = json.dumps({"name": function["name"], "arguments": function["arguments"]}, ensure_ascii=False)
        texts.append(f"{TOOL_CALL_OPEN}\n{body}\n{TOOL_CALL_CLOSE}")
    return "\n".join(texts)


def fold_messages(
    messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]], *, calls: bool, results: bool
) -> list[dict[str, Any]]:
    """Express tools in plain messages for a template that cannot.

    tools: put into the system message when not empty; calls: fold assistant `tool_calls` into content; results: turn
    `tool` messages into user messages (neighbours into one, since many templates insist on alternating roles).
    """
    folded: list[dict[str, Any]] = []
    for message in messages:
        message = dict(message)
        if calls and message.get("tool_calls"):
            text = call_text(message.pop("tool_calls"))
            message["content"] = f"{message['content']}\n{text}" if message.get("content") else text
        if results and message["role"] == "tool":
            text = f"<tool_response>\n{message['content']}\n</tool_response>"
            if folded and folded[-1].get("role") == "user" and folded[-1].pop("_results", False):
                message = folded.pop()
                text = f"{message['content']}\n{text}"
            message = {"role": "user", "content": text, "_results": True}
        folded.append(message)
    for message in folded:
        message.pop("_results", None)
    if tools:
        prompt = tool_prompt(tools)
        if folded and folded[0]["role"] == "system":
            folded[0] = folded[0] | {"content": f"{folded[0]['content']}\n\n{prompt}"}
        else:
            folded.insert(0, {"role": "system", "content": prompt})
    return folded


# --- reading a model's calls ---------------------------------------------------------------------------------------


@dataclass
class ToolCall:
    """One call. `arguments` is JSON text, as OpenAI sends it."""

    name: str
    arguments: str
    id: str = field(default_factory=lambda: f"call_{secrets.token_hex(12)}")

    def to_dict(self) -> dict[str, Any]:
        """OpenAI's `message.tool_calls[]` entry."""
        return {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": self.arguments}}


@dataclass(frozen=True)
class ToolCallDelta:
    """What became known: text to show, and calls that are complete, with their place in the answer."""

    content: str = ""
    calls: tuple[tuple[int, ToolCall], ...] = ()


class ToolCallStream:
    """Incremental parser: `push` pieces of text, `flush` at the end. Its result does not depend on the pieces.

    Outside calls text passes through, except what may be the beginning of `<tool_call>` and whitespace, which is
    dropped when a call (or, after a call, the end) follows and shown when text does. Inside, everything is held until
    `</tool_call>` and then parsed. What turns out to be no call (not JSON, no name, cut off) is text after all, so
    nothing is lost.
    """

    def __init__(self) -> None:
        self.num_calls = 0
        self._text = ""  # not yet decided on; begins with the open tag when inside
        self._space = ""  # whitespace before `_text`, not yet decided on
        self._inside = False
        self._scanned = 0  # where to go on looking for the close tag, so that long arguments cost O(n)
        self._after_call = False  # nothing but whitespace has come since a call

    def push(self, text: str) -> ToolCallDelta:
        """Read some text; returns what is certain now."""
        self._text += text
        return self._advance(final=False)

    def flush(self) -> ToolCallDelta:
        """The end of the text; returns the rest."""
        return self._advance(final=True)

    def _advance(self, *, final: bool) -> ToolCallDelta:
        content: list[str] = []
        calls: list[tuple[int, ToolCall]] = []
        while True:
            if not self._inside:
                start = self._text.find(TOOL_CALL_OPEN)
                if start < 0:
                    kept = 0 if final else _overlap(self._text, TOOL_CALL_OPEN)
                    content.append(self._show(self._text[: len(self._text) - kept]))
                    self._text = self._text[len(self._text) - kept :]
                    break
                content.append(self._show(self._text[:start]))
                self._text = self._text[start:]
                self._inside, self._scanned = True, len(TOOL_CALL_OPEN)
            end = self._text.find(TOOL_CALL_CLOSE, self._scanned)
            if end < 0 and not final:
                self._scanned = max(self._scanned, len(self._text) - len(TOOL_CALL_CLOSE) + 1)
                break
            call = _parse_call(self._text[len(TOOL_CALL_OPEN) : end if end >= 0 else None])
            if call == "unterminated" and end >= 0:  # the close tag stands inside a string: look for the next
                self._scanned = end + len(TOOL_CALL_CLOSE)
                continue
            self._inside = False
            if isinstance(call, ToolCall):
                calls.append((self.num_calls, call))
                self.num_calls += 1
                self._space, self._after_call = "", True
                self._text = self._text[end + len(TOOL_CALL_CLOSE) :] if end >= 0 else ""
            else:
                content.append(self._show(TOOL_CALL_OPEN))
                self._text = self._text[len(TOOL_CALL_OPEN) :]
        if final and not self._after_call:
            content.append(self._space)
        return ToolCallDelta("".join(content), tuple(calls))

    def _show(self, text: str) -> str:
        """`text` is content: all of it but the whitespace at its end, which waits for what follows."""
        shown = text.rstrip()
        if not shown:
            self._space += text
            return ""
        before, self._space = self._space, text[len(shown) :]
        self._after_call = False
        return before + shown


def parse_tool_calls(text: str) -> tuple[str, list[ToolCall]]:
    """A whole answer's content and its calls; ("", calls) when there is nothing but calls."""
    stream = ToolCallStream()
    first, rest = stream.push(text), stream.flush()
    return first.content + rest.content, [call for _, call in first.calls + rest.calls]


def _overlap(text: str, tag: str) -> int:
    """Length of the longest suffix of `text` that `tag` begins with (and is not all of it)."""
    return next((n for n in range(min(len(tag) - 1, len(text)), 0, -1) if text.endswith(tag[:n])), 0)


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _parse_call(body: str) -> ToolCall | str:
    """The call in a `<tool_call>` block, or why there is none: "unterminated" (inside a string) or "malformed"."""
    try:
        value = json.loads(body, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        return "unterminated" if error.msg.startswith("Unterminated string") else "malformed"
    except (ValueError, RecursionError):  # NaN; integers of thousands of digits; nesting without end
        return "malformed"
    if not isinstance(value, dict) or not isinstance(name := value.get("name"), str) or not name:
        return "malformed"
    arguments = value.get("arguments", value.get("parameters", {}))
    if isinstance(arguments, str):  # some models write the arguments as JSON inside a string
        try:
            arguments = json.loads(arguments, parse_constant=_refuse_constant)
        except (ValueError, RecursionError):
            return "malformed"
    if not isinstance(arguments, dict):
        return "malformed"
    text = json.dumps(arguments, ensure_ascii=False)
    if not (name + text).isprintable() and any("\ud800" <= char <= "\udfff" for char in name + text):
        text = json.dumps(arguments)  # a lone surrogate cannot be sent as UTF-8, its escape can
        name = name.encode("utf-8", "replace").decode()
    return ToolCall(name, text)
