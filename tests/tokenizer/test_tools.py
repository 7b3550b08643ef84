"""Tool calls: read back the same however the text is cut, told to models that have no words for them, checked."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import jsonschema_rs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bimo.errors import UsageError
from bimo.tokenizer.tools import (
    TOOL_CALL_CLOSE,
    TOOL_CALL_OPEN,
    ToolCallStream,
    fold_messages,
    parse_tool_calls,
    tool_call_schema,
    tool_prompt,
    validate_tool_choice,
    validate_tools,
)


def tool(name: str, parameters: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    function = {"name": name, "description": "说明", **({} if parameters is None else {"parameters": parameters})}
    return {"type": "function", "function": function | more}


def block(name: str, **arguments: Any) -> str:
    body = json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False)
    return f"{TOOL_CALL_OPEN}\n{body}\n{TOOL_CALL_CLOSE}"


def read(text: str) -> tuple[str, list[tuple[str, Any]]]:
    content, calls = parse_tool_calls(text)
    return content, [(call.name, json.loads(call.arguments)) for call in calls]


def stream(pieces: list[str]) -> tuple[str, list[tuple[str, Any]]]:
    parser = ToolCallStream()
    deltas = [parser.push(piece) for piece in pieces] + [parser.flush()]
    calls = [pair for delta in deltas for pair in delta.calls]
    assert [place for place, _ in calls] == list(range(len(calls)))
    return "".join(d.content for d in deltas), [(call.name, json.loads(call.arguments)) for _, call in calls]


CALL = ("get_weather", {"city": "上海 🌆"})
TEXT = block("get_weather", city="上海 🌆")
LIST = '<tool_call>{"name": "f", "arguments": [1]}</tool_call>'
NAN = '<tool_call>{"name": "f", "arguments": {"x": NaN}}</tool_call>'


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", ("", [])),
        ("  just text 你好 \n", ("  just text 你好 \n", [])),
        (TEXT, ("", [CALL])),
        (f"\n\n{TEXT}\n", ("", [CALL])),
        (f"我查一下。\n{TEXT}", ("我查一下。", [CALL])),
        (f"{TEXT}\n{TEXT}", ("", [CALL, CALL])),
        (f"a {TEXT} b", ("a b", [CALL])),
        (TEXT.removesuffix(TOOL_CALL_CLOSE), ("", [CALL])),
        (TEXT[:-30], (TEXT[:-30], [])),
        ("<tool_call>not json</tool_call>", ("<tool_call>not json</tool_call>", [])),
        (f"x <tool_call> 🎉 {TEXT}", ("x <tool_call> 🎉", [CALL])),
        ('<tool_call>{"arguments": {}}</tool_call>', ('<tool_call>{"arguments": {}}</tool_call>', [])),
        ('<tool_call>{"name": "f"}</tool_call>', ("", [("f", {})])),
        ('<tool_call>{"name": "f", "parameters": {"a": 1}}</tool_call>', ("", [("f", {"a": 1})])),
        ('<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>', ("", [("f", {"a": 1})])),
        (LIST, (LIST, [])),
        (NAN, (NAN, [])),
        (block("f", x="</tool_call> <tool_call>"), ("", [("f", {"x": "</tool_call> <tool_call>"})])),
        ("a < b <tool", ("a < b <tool", [])),
        ('<tool_call>{"name": "f</tool_call>' + TEXT, ('<tool_call>{"name": "f</tool_call>', [CALL])),
    ],
)  # fmt: skip
def test_reading_a_whole_answer(text: str, expected: tuple[str, list[Any]]) -> None:
    assert read(text) == expected
    assert stream(list(text)) == expected


PARTS = [
    TEXT,
    block("f"),
    block("f", x="</tool_call>"),
    TOOL_CALL_OPEN,
    TOOL_CALL_CLOSE,
    '{"name": "f", "arguments": {}}',
    '{"name": "f',
    " ",
    "\n",
    "你好🧑‍🚀",
    "<tool",
    "<",
    "text",
]


@given(parts=st.lists(st.sampled_from(PARTS), max_size=7), cuts=st.lists(st.integers(0, 400), max_size=12))
@settings(deadline=None, max_examples=250)
def test_a_streamed_answer_equals_the_whole_one(parts: list[str], cuts: list[int]) -> None:
    text = "".join(parts)
    edges = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    assert stream([text[a:b] for a, b in pairwise(edges)]) == read(text)
    assert stream(list(text)) == read(text)


def test_text_is_shown_as_soon_as_it_is_certain() -> None:
    parser = ToolCallStream()
    assert parser.push("你好").content == "你好"
    assert parser.push(" <tool").content == ""
    assert parser.push("ing>").content == " <tooling>"
    assert parser.push("\n" + TEXT[:-1]).calls == ()
    ((place, call),) = parser.push(">").calls
    assert (place, call.name) == (0, "get_weather")
    assert parser.num_calls == 1


def test_long_arguments_cost_linear_work() -> None:
    class Counted(str):
        """Counts the characters that `find` has to look at."""

        looked = 0

        def find(self, wanted: str, start: int = 0) -> int:  # type: ignore[override]
            Counted.looked += len(self) - start
            return str.find(self, wanted, start)

        def __add__(self, other: str) -> Counted:
            return Counted(str.__add__(self, other))

        def __getitem__(self, key: Any) -> Counted:
            return Counted(str.__getitem__(self, key))

    parser = ToolCallStream()
    parser._text = Counted("")
    body = json.dumps({"name": "f", "arguments": {"text": "长" * 20_000}}, ensure_ascii=False)
    calls = [c for piece in [TOOL_CALL_OPEN, *body, TOOL_CALL_CLOSE] for c in parser.push(piece).calls]
    assert len(calls) == 1
    assert Counted.looked < 30 * len(body)


def test_ids_are_unique_and_the_message_is_openais() -> None:
    _, calls = parse_tool_calls(TEXT * 3)
    assert len({call.id for call in calls}) == 3
    assert calls[0].to_dict() == {
        "id": calls[0].id,
        "type": "function",
        "function": {"name": "get_weather", "arguments": '{"city": "上海 🌆"}'},
    }


def test_what_cannot_be_sent_is_escaped() -> None:
    _, (call,) = parse_tool_calls('<tool_call>{"name": "f", "arguments": {"x": "\\ud800"}}</tool_call>')
    assert call.arguments == '{"x": "\\ud800"}'
    assert call.arguments.encode()


def test_hostile_json_is_text() -> None:
    for body in ("[" * 100_000, '{"name": "f", "arguments": ' + "9" * 5000 + "}", '{"name": ' * 3):
        text = f"<tool_call>{body}</tool_call>"
        assert read(text) == (text, [])


# --- telling -------------------------------------------------------------------------------------------------------


def test_the_prompt_holds_every_tool_as_json() -> None:
    tools = [tool("a"), tool("b", {"type": "object"}, description="查询 🔍")]
    prompt = tool_prompt(tools)
    lines = prompt[prompt.index("<tools>\n") + 8 : prompt.index("\n</tools>")].splitlines()
    assert [json.loads(line) for line in lines] == tools
    assert "查询 🔍" in prompt


def test_folding_is_read_back_as_what_was_folded() -> None:
    message = {
        "role": "assistant",
        "content": "好",
        "tool_calls": [{"function": {"name": CALL[0], "arguments": CALL[1]}}] * 2,
    }
    (folded,) = fold_messages([message], [], calls=True, results=True)
    assert read(folded["content"]) == ("好", [CALL, CALL])


def test_results_become_one_user_message() -> None:
    results = [{"role": "tool", "content": "晴"}, {"role": "tool", "content": "雨"}, {"role": "user", "content": "?"}]
    folded = fold_messages(results, [], calls=True, results=True)
    assert [m["role"] for m in folded] == ["user", "user"]
    assert folded[0] == {
        "role": "user",
        "content": "<tool_response>\n晴\n</tool_response>\n<tool_response>\n雨\n</tool_response>",
    }
    assert fold_messages(results, [], calls=False, results=False) == results


# --- forcing -------------------------------------------------------------------------------------------------------

CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TREE = {
    "$defs": {"node": {"type": "object", "properties": {"next": {"$ref": "#/$defs/node"}}}},
    "type": "object",
    "properties": {"root": {"$ref": "#/$defs/node"}},
    "required": ["root"],
}


def test_a_schema_only_when_a_call_is_forced() -> None:
    tools = [tool("a"), tool("b")]
    assert tool_call_schema(tools, None) is tool_call_schema(tools, "auto") is tool_call_schema(tools, "none") is None


def test_required_allows_any_tool_and_a_name_only_that() -> None:
    tools = [tool("weather", CITY), tool("walk", TREE), tool("now")]
    any_ = jsonschema_rs.validator_for(tool_call_schema(tools, "required"))
    named = jsonschema_rs.validator_for(tool_call_schema(tools, {"type": "function", "function": {"name": "weather"}}))
    weather = {"name": "weather", "arguments": {"city": "上海"}}
    walk = {"name": "walk", "arguments": {"root": {"next": {"next": {}}}}}
    assert any_.is_valid(weather) and any_.is_valid(walk) and any_.is_valid({"name": "now", "arguments": {}})
    assert named.is_valid(weather) and not named.is_valid(walk)
    for wrong in (
        {"name": "weather", "arguments": {}},
        {"name": "walk", "arguments": {"root": {"next": 3}}},
        {"name": "other", "arguments": {}},
        {"name": "now"},
    ):
        assert not any_.is_valid(wrong)


def test_equal_names_in_two_tools_schemas_do_not_mix() -> None:
    one = {"definitions": {"x": {"const": "一"}}, "properties": {"v": {"$ref": "#/definitions/x"}}, "required": ["v"]}
    two = {"$defs": {"x": {"const": "二"}}, "properties": {"v": {"$ref": "#/$defs/x"}}, "required": ["v"]}
    validator = jsonschema_rs.validator_for(tool_call_schema([tool("one", one), tool("two", two)], "required"))
    assert validator.is_valid({"name": "one", "arguments": {"v": "一"}})
    assert validator.is_valid({"name": "two", "arguments": {"v": "二"}})
    assert not validator.is_valid({"name": "one", "arguments": {"v": "二"}})


@pytest.mark.parametrize(
    ("tools", "match"),
    [
        ("x", "must be a list"),
        ([3], r"tools\[0\] must be"),
        ([{"type": "retrieval"}], r"tools\[0\] must be"),
        ([{"type": "function"}], "must be an object with a name"),
        ([tool("天气")], "must be 1 to 64"),
        ([tool("")], "must be 1 to 64"),
        ([tool("a\n")], "must be 1 to 64"),
        ([tool("a"), tool("a")], "there twice"),
        ([tool("a", description=3)], "description must be text"),
        ([tool("a", parameters=[1])], "must be a JSON schema"),
        ([tool(f"t{i}") for i in range(129)], "at most 128"),
    ],
)
def test_wrong_tools_are_named(tools: Any, match: str) -> None:
    with pytest.raises(UsageError, match=match) as caught:
        validate_tools(tools)
    assert caught.value.param == "tools"


@pytest.mark.parametrize(
    ("choice", "match"),
    [
        ("always", "must be"),
        (3, "must be"),
        ({"type": "function"}, "must be"),
        ({"type": "function", "function": {"name": "b"}}, "not among the tools: a"),
    ],
)
def test_wrong_choices_are_named(choice: Any, match: str) -> None:
    with pytest.raises(UsageError, match=match) as caught:
        validate_tool_choice(choice, [tool("a")])
    assert caught.value.param == "tool_choice"
    with pytest.raises(UsageError, match="needs at least one tool"):
        validate_tool_choice("required", [])
