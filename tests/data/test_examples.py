"""Rows of all layouts become dialogues, labelled texts or texts; what cannot is named, and the rest is kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bimo.data.examples import layout, read_example
from bimo.data.parsers import BadRow
from bimo.data.readers import read_file
from bimo.data.records import Damage, Document, Message
from bimo.data.sources import files_of
from bimo.recipe import TaskRecipe

ASKED = (Message("user", "笔墨是什么？"), Message("assistant", "是写字的用具。"))
OPENAI = {"messages": [{"role": "user", "content": "笔墨是什么？"}, {"role": "assistant", "content": "是写字的用具。"}]}
SHAREGPT = {"conversations": [{"from": "human", "value": "笔墨是什么？"}, {"from": "gpt", "value": "是写字的用具。"}]}


def task(**settings: Any) -> TaskRecipe:
    return TaskRecipe(name="t", path="x", **settings)


def read(file: Path, **settings: Any) -> tuple[list[Document], list[Damage]]:
    source = TaskRecipe(name="t", path=str(file), **settings)
    items = [item for one in files_of(source, lambda *_: None) for item in read_file(one, source)]
    damages = [item for item in items if isinstance(item, Damage)]
    return [item for item in items if isinstance(item, Document)], damages


def write(folder: Path, rows: list[Any], name: str = "a.jsonl") -> Path:
    file = folder / name
    lines = (row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows)
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("messages", OPENAI),
        ("messages", SHAREGPT),
        ("alpaca", {"instruction": "笔墨是什么？", "input": "", "output": "是写字的用具。"}),
        ("prompt", {"prompt": "笔墨是什么？", "completion": "是写字的用具。"}),
        ("question", {"question": "笔墨是什么？", "answer": "是写字的用具。"}),
        ("question", {"source": "笔墨是什么？", "target": "是写字的用具。"}),
        ("pairs", {"title": "笔墨是什么？", "passage": "是写字的用具。"}),
    ],
)
def test_layouts_of_dialogues(name: str, row: dict[str, Any]) -> None:
    form, example = read_example(row, task())
    assert form == name == layout(row) and example.messages == ASKED


def test_alpaca_with_input_history_and_system() -> None:
    row = {
        "instruction": "Translate",
        "input": "笔",
        "output": "pen",
        "system": "Be short.",
        "history": [["墨", "ink"]],
    }
    _, example = read_example(row, task())
    assert [tuple(message) for message in example.messages] == [
        ("system", "Be short."), ("user", "墨"), ("assistant", "ink"),
        ("user", "Translate\n\n笔"), ("assistant", "pen"),
    ]  # fmt: skip


def test_labels_and_texts() -> None:
    assert read_example({"text": "买一送一！", "label": "spam"}, task()) == ("labels", ((), "spam", "买一送一！"))
    assert read_example({"mail": "hi", "kind": 0}, task(text="mail", label="kind")) == ("labels", ((), "0", "hi"))
    assert read_example({"text": "一段话"}, task()) == ("text", ((), "", "一段话"))


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"messages": []}, "empty dialogue"),
        ({"messages": [{"role": "user", "content": "问"}]}, "without an answer"),
        ({"messages": [*OPENAI["messages"], {"role": "user", "content": "再问"}]}, "last turn is the user's"),
        ({"messages": [{"role": "assistant", "content": "答"}]}, "first turn is the assistant's"),
        ({"prompt": "问", "completion": " \n"}, "answer is empty"),
        ({"prompt": "", "completion": "答"}, "question is empty"),
        ({"text": "x", "label": None}, "without a class"),
        ({"text": "x", "label": ["a"]}, "without a class"),
        ({"text": "x", "label": float("nan")}, "without a class"),
        ({"prompt": "x", "completion": float("nan")}, "answer is empty"),
        ({"foo": 1}, "no known layout"),
        ({"instruction": "a", "output": "b", "history": "c"}, "history is no list"),
    ],
)
def test_rows_that_teach_nothing_say_why(row: dict[str, Any], reason: str) -> None:
    with pytest.raises(BadRow, match=reason):
        read_example(row, task())


def test_instruction_and_system_dress_the_question(tmp_path: Path) -> None:
    file = write(tmp_path, [{"prompt": "笔", "completion": "brush"}])
    documents, _ = read(file, instruction="译成英文：{prompt}", system="你是翻译。")
    assert [tuple(message) for message in documents[0].messages] == [
        ("system", "你是翻译。"), ("user", "译成英文：笔"), ("assistant", "brush"),
    ]  # fmt: skip
    assert documents[0].text == "你是翻译。\n译成英文：笔\nbrush"


def test_bad_rows_are_named_and_the_good_ones_kept(tmp_path: Path) -> None:
    file = write(
        tmp_path,
        [
            OPENAI,
            "{not json",
            {"messages": OPENAI["messages"][:1]},
            SHAREGPT,
            '{"prompt": "a", "completion": "\\ud800"}',
        ],
    )
    documents, damages = read(file)
    assert len(documents) == 2
    reasons = " | ".join(f"{damage.id} {damage.reason}" for damage in damages)
    assert "t/a.jsonl has rows that are not JSON: 1, the first is number 2" in reasons
    assert "without an answer (a turn of the assistant): 1, the first is number 3" in reasons


def test_mixed_layouts_are_named(tmp_path: Path) -> None:
    file = write(tmp_path, [OPENAI, {"instruction": "a", "output": "b"}, {"instruction": "c", "output": "d"}])
    documents, damages = read(file)
    assert len(documents) == 1
    assert "laid out as alpaca, where the first is laid out as messages: divide the file: 2, the first is number 2" in (
        damages[0].reason
    )


def test_gbk_and_csv_and_parquet(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    table = "question,answer\n" + "".join(f"第{n}个问题是什么内容？,这是第{n}个问题的答案。\n" for n in range(40))
    (tmp_path / "a.csv").write_bytes(table.encode("gbk"))
    documents, damages = read(tmp_path / "a.csv")
    assert not damages and documents[3].messages[1].content == "这是第3个问题的答案。"
    rows = {"instruction": ["译"], "input": ["墨"], "output": ["ink"], "other": [1]}
    pyarrow.parquet.write_table(pyarrow.table(rows), tmp_path / "b.parquet")
    documents, damages = read(tmp_path / "b.parquet")
    assert not damages and documents[0].messages[0].content == "译\n\n墨"


def test_a_page_becomes_title_and_steps(tmp_path: Path) -> None:
    page = "<html><head><title>打印</title></head><body><p>第一步：打开文件。</p><p>Then print it.</p></body></html>"
    (tmp_path / "a.html").write_text(page, encoding="utf-8")
    documents, damages = read(tmp_path / "a.html", prompt="怎样{title}？", answer="{text}")
    assert not damages and documents[0].messages[0].content == "怎样打印？"
    assert "第一步：打开文件。" in documents[0].messages[1].content
