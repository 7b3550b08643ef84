"""Rows become examples: which layout they have, what is asked in them and what is answered.

    form = layout({"instruction": "翻译", "input": "笔", "output": "brush"})      # "alpaca"
    example = read_example(row, task)            # Example(messages=(...), label="", text="")

Recognised are OpenAI's messages, ShareGPT's conversations, Alpaca's instruction/input/output, prompt/completion,
question/answer, chosen layouts of pairs (source/target, title/text), text/label and plain text. A task may name its
fields itself. All rows of a file have one layout: a file that mixes them is most often two files by mistake.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from bimo.data.parsers import TURNS, BadRow, dialogue, fill
from bimo.data.records import Message
from bimo.recipe import SourceRecipe, TaskRecipe

__all__ = ["Example", "dressed", "layout", "path_label", "read_example"]

# name -> (fields of the question, fields of the answer); a row has one of each
PAIRS = {
    "prompt": (("prompt",), ("completion", "response", "answer", "output", "chosen")),
    "question": (("question", "query", "input", "source"), ("answer", "response", "output", "target")),
    "pairs": (("title", "anchor"), ("passage", "positive", "body")),
}
NAMES = {"user": "question", "assistant": "answer"}
LABELS = ("label", "class", "category")


class Example(NamedTuple):
    """messages: of a dialogue. label, text: of a text that has a class, or is learned as it is."""

    messages: tuple[Message, ...] = ()
    label: str = ""
    text: str = ""


def layout(row: Mapping[str, Any]) -> str | None:
    """What kind of row it is; None for none that is known."""
    if any(isinstance(row.get(name), list) for name in TURNS):
        return "messages"
    if "instruction" in row and "output" in row:
        return "alpaca"
    for name, (questions, answers) in PAIRS.items():
        if any(field in row for field in questions) and any(field in row for field in answers):
            return name
    if "text" in row:
        return "labels" if any(field in row for field in LABELS) else "text"
    return None


def read_example(row: Mapping[str, Any], task: TaskRecipe) -> tuple[str, Example]:
    """The row's layout and what it says. Raises BadRow, which says what such rows lack."""
    if task.prompt is not None and task.answer is not None:
        return "fields", _asked(fill(task.prompt, row), fill(task.answer, row))
    if task.label is not None or task.kind == "labels":
        return "labels", _labelled(row, task.text, task.label)
    if task.kind == "text" or task.text != "text":
        return "text", Example(text=fill(task.text, row))
    match layout(row):
        case "messages":
            return "messages", Example(_checked(_with_system(row, dialogue(row))))
        case "alpaca":
            return "alpaca", Example(_checked(_with_system(row, _alpaca(row))))
        case "labels":
            return "labels", _labelled(row, task.text, None)
        case "text":
            return "text", Example(text=fill("text", row))
        case None:
            there = ", ".join(str(name) for name in list(row)[:8])
            raise BadRow(f"rows in no known layout (they have {there!r:.200}): name the fields by prompt and answer")
        case name:
            questions, answers = PAIRS[name]
            question = next(field for field in questions if field in row)
            answer = next(field for field in answers if field in row and field != question)
            return name, _asked(fill(question, row), fill(answer, row))


def dressed(messages: tuple[Message, ...], task: TaskRecipe) -> tuple[Message, ...]:
    """The dialogue with the task's instruction around its first question and its system message before it."""
    if task.instruction is not None:
        first = next((place for place, message in enumerate(messages) if message.role == "user"), None)
        if first is not None:
            asked = Message("user", task.instruction.replace("{prompt}", messages[first].content))
            messages = (*messages[:first], asked, *messages[first + 1 :])
    if task.system is not None and messages[0].role != "system":
        messages = (Message("system", task.system), *messages)
    return messages


def path_label(name: str, source: SourceRecipe) -> str | None:
    """The class that a file's path tells; "" where it is not asked for one, None where it has none."""
    pattern = source.label_path if isinstance(source, TaskRecipe) else None
    if pattern is None:
        return ""
    found = re.search(pattern, f"/{name}")
    return found[1] if found else None


def _asked(question: str, answer: str) -> Example:
    return Example(_checked((Message("user", question), Message("assistant", answer))))


def _labelled(row: Mapping[str, Any], text: str, label: str | None) -> Example:
    field = label or next((name for name in LABELS if name in row), "label")
    value = row.get(field)
    if (
        isinstance(value, bool)
        or value is None
        or value != value
        or isinstance(value, (list, Mapping))
        or not str(value).strip()
    ):
        raise BadRow(f"rows without a class in the field {field!r}")
    content = fill(text, row)
    if not content.strip():
        raise BadRow(f"rows whose field {text!r} is empty")
    return Example(label=str(value).strip(), text=content)


def _alpaca(row: Mapping[str, Any]) -> tuple[Message, ...]:
    """instruction, then its input where there is one; `history` is a list of earlier questions and answers."""
    messages: list[Message] = []
    history = row.get("history") or []
    if not isinstance(history, list) or any(not isinstance(pair, list) or len(pair) != 2 for pair in history):
        raise BadRow("rows whose history is no list of pairs")
    for question, answer in history:
        messages += [Message("user", str(question)), Message("assistant", str(answer))]
    question = fill("instruction", row)
    if row.get("input"):
        question = f"{question}\n\n{fill('input', row)}" if question.strip() else fill("input", row)
    return (*messages, Message("user", question), Message("assistant", fill("output", row)))


def _with_system(row: Mapping[str, Any], messages: tuple[Message, ...]) -> tuple[Message, ...]:
    system = row.get("system")
    if isinstance(system, str) and system.strip() and messages and messages[0].role != "system":
        return (Message("system", system), *messages)
    return messages


def _checked(messages: tuple[Message, ...]) -> tuple[Message, ...]:
    """A dialogue that can be learned from: questions and answers in turn, the last is an answer, none is empty."""
    turns = [message for message in messages if message.role != "system"]
    for message in messages:
        if not message.content.strip():
            raise BadRow(f"rows whose {NAMES.get(message.role, 'system text')} is empty")
    if not any(message.role == "assistant" for message in turns):
        raise BadRow("rows without an answer (a turn of the assistant)")
    if turns[0].role != "user":
        raise BadRow("rows whose first turn is the assistant's: there is no question it answers")
    if turns[-1].role != "assistant":
        raise BadRow("rows whose last turn is the user's: nothing answers it")
    return messages
