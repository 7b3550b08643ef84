"""What was written is read back, whatever strings there are; a damaged file is named."""

from __future__ import annotations

from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bimo.data import documents
from bimo.data.documents import COLUMNS, DocumentWriter, read_documents
from bimo.data.records import Document, Message
from bimo.errors import DataError

HOSTILE = [
    "",
    "\x00",
    "\r\n\u2028",
    "\ufeff\u202e",
    "👨‍👩‍👧",
    "e\u0301",
    "\U0010ffff\ufffe",
    "，" * 10_000,
    '"\\{}\t',
    "龘",
]
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=50)
messages = st.lists(st.builds(Message, st.sampled_from(["system", "user", "assistant"]), texts), max_size=3).map(tuple)
made = st.builds(Document, texts, texts, texts, texts, texts, messages, texts)


def write(file: Path, rows: list[Document]) -> Path:
    with DocumentWriter(file) as writer:
        for row in rows:
            writer.write(row)
    assert (writer.num_documents, writer.num_characters) == (len(rows), sum(len(row.text) for row in rows))
    return file


def test_hostile_strings_come_back(tmp_path: Path) -> None:
    rows = [
        Document(text, f"id {text}", "源", "zh", text, (Message("user", text),) * (len(text) % 3)) for text in HOSTILE
    ]
    file = write(tmp_path / "文 档.parquet", rows)
    assert list(read_documents([file, file])) == rows * 2


@given(st.lists(made, max_size=5))
def test_any_documents_come_back(tmp_path_factory: pytest.TempPathFactory, rows: list[Document]) -> None:
    assert list(read_documents([write(tmp_path_factory.mktemp("any") / "a.parquet", rows)])) == rows


def test_other_tools_read_the_columns(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", [Document("text", "a#1", "a", "en", "T", (Message("user", "hi"),))])
    table = pyarrow.parquet.read_table(tmp_path / "a.parquet")
    assert tuple(table.column_names) == COLUMNS
    assert table.to_pylist()[0]["messages"] == [{"role": "user", "content": "hi"}]


def test_both_ways_are_streams(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Long documents are in groups of a few, and reading holds one group: a batch never spans several."""
    monkeypatch.setattr(documents, "GROUP_CHARACTERS", 10_000)
    file = write(tmp_path / "a.parquet", [Document("x" * 3000, str(place), "s") for place in range(40)])
    with pyarrow.parquet.ParquetFile(file) as parquet:
        assert parquet.num_row_groups == 10
    file.write_bytes(file.read_bytes())
    asked = []
    real = pyarrow.parquet.ParquetFile.iter_batches

    def counted(self: object, size: int, groups: list[int], columns: list[str], **settings: object) -> object:
        asked.append(groups)
        return real(self, size, groups, columns, **settings)

    monkeypatch.setattr(pyarrow.parquet.ParquetFile, "iter_batches", counted)
    stream = read_documents([file])
    assert [next(stream).id for _ in range(4)] == ["0", "1", "2", "3"]
    assert asked == [[0]]
    assert len(list(stream)) == 36


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: b"not parquet at all",
        lambda content: content[:-9],
        lambda content: content[: len(content) // 2],
        lambda content: content[:4] + b"\x00" * (len(content) // 2) + content[4 + len(content) // 2 :],
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, damage: object) -> None:
    file = write(tmp_path / "torn.parquet", [Document(f"text {place}" * 50, str(place), "s") for place in range(200)])
    file.write_bytes(damage(file.read_bytes()))  # type: ignore[operator]
    with pytest.raises(DataError, match=r"torn\.parquet is not a readable file of documents .*remove it") as caught:
        list(read_documents([file]))
    assert "\n" not in str(caught.value)


def test_a_file_of_something_else_and_none_are_named(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a"]}), tmp_path / "other.parquet")
    for name in ("other.parquet", "none.parquet"):
        with pytest.raises(DataError, match=name):
            list(read_documents([tmp_path / name]))


def test_an_error_while_writing_is_not_hidden_by_closing(tmp_path: Path) -> None:
    with pytest.raises(KeyError, match="mine"), DocumentWriter(tmp_path / "a.parquet") as writer:
        writer.write(Document("a", "b", "c"))
        writer._file.close()
        raise KeyError("mine")
