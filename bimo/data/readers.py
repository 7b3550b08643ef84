"""Files become documents, a stream in flat memory; what cannot be read becomes Damage that says why.

    for item in read_file(file, source):      # Document | Damage

Ids begin with the source's name: "poems/a.txt", its pieces "poems/a.txt#0" (text of over a million characters), rows
"poems/7.json#17" (counted from 0), of a part of a large file "poems/big.jsonl@67108864#17", pairs of parallel pages
"help/1.html#par_id7". Damage of the same kind is counted, one for a file, and comes after the documents. Everything
before the first broken byte is still yielded.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import re
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import PurePosixPath
from typing import IO, Any

from bimo.data.examples import dressed, path_label, read_example
from bimo.data.mail import mail_text
from bimo.data.parsers import (
    DECODER,
    FIELD,
    MAX_BAD,
    MAX_LINE,
    MAX_WHOLE,
    TURNS,
    BadRow,
    dialogue,
    docx_text,
    fill,
    find_encoding,
    html_encoding,
    html_paragraphs,
    html_text,
    json_rows,
    needed,
    pdf_pages,
    rows_of,
    text_decoder,
)
from bimo.data.records import Damage, Document, Message
from bimo.data.segment import best_border
from bimo.data.sources import SourceFile, is_backup, kind_of, line_start, open_file
from bimo.errors import BimoError
from bimo.recipe import ParallelRecipe, SourceRecipe, TaskRecipe

__all__ = ["READERS", "read_file"]

BLOCK = 1 << 20
MAX_CHARS = 1_000_000  # of a document
MAX_FIELD = 1 << 24  # of a csv file: a quote that is never closed would take the whole file
FRONT_MATTER = re.compile(r"\A---[ \t]*\n(.*?\n)?(?:---|\.\.\.)[ \t]*(?:\n|\Z)", re.DOTALL)
TITLE = re.compile(r"""^(?:title:[ \t]*["']?(.+?)["']?|# +(.+?))[ \t]*$""", re.MULTILINE)
READ_ERRORS = (OSError, EOFError, zlib.error, zipfile.BadZipFile, KeyError, RuntimeError, NotImplementedError)


def read_file(file: SourceFile, source: SourceRecipe) -> Iterator[Document | Damage]:
    """All that is in the file. Raises only what the user must mend first: UsageError, MissingDependencyError."""
    reading = _Reading(file, source)
    kind = kind_of(file, source)
    found = False
    try:
        if is_backup(file):
            reading.fail("is an editor's backup or a left-over")
        elif _is_empty(file):
            reading.fail("is empty")
        elif reading.label is None:
            reading.fail("has no class: there is nothing in its path that label_path finds")
        elif source.parallel is not None and kind != "html":
            reading.fail("is no HTML page: parallel documents are")
        elif kind is None or (file.member is None and file.name.lower().endswith(".zip")):
            reading.fail(_unknown(file))
        else:
            for document in READERS[kind](reading):
                found = True
                yield document
    except BimoError:
        raise
    except Exception as error:  # parsers raise anything on damaged input
        reading.fail(_reason(error))
    if not found and not reading.problems and not file.is_part:
        reading.fail("holds no text")
    yield from reading.damages()


def _is_empty(file: SourceFile) -> bool:
    with open_file(file) as stream:
        return not stream.read(1)


def _unknown(file: SourceFile) -> str:
    if file.name.lower().endswith(".zip") and file.member is None:
        with open_file(file) as stream, zipfile.ZipFile(stream) as archive:
            return "is an archive " + ("without files" if not archive.infolist() else "that was not looked into")
    suffix = PurePosixPath(file.name.removesuffix(".gz")).suffix
    return f"is an unknown kind of file {suffix}: name a format" if suffix else "has no ending: name a format"


def _reason(error: BaseException) -> str:
    """Why a file could not be read (further), to follow its name."""
    if isinstance(error, FileNotFoundError):
        return "is gone: it was there when the files were listed"
    if isinstance(error, PermissionError):
        return "may not be read: permission denied"
    if isinstance(error, (EOFError, zlib.error, zipfile.BadZipFile)) or type(error).__name__ == "BadGzipFile":
        return f"is damaged or cut short ({error})"
    if isinstance(error, OSError) and error.strerror:
        return f"cannot be read: {error.strerror}"
    if isinstance(error, RecursionError):
        return "cannot be read: it is nested too deeply"
    return f"cannot be read ({type(error).__name__}: {error!s:.200})"


class _Reading:
    """One file on its way to documents: its texts, the making of documents, and the account of what went wrong."""

    def __init__(self, file: SourceFile, source: SourceRecipe) -> None:
        self.file, self.source = file, source
        self.id = f"{source.name}/{file.name}" + (f"@{file.start}" if file.is_part else "")
        self.problems: dict[str, tuple[int, int, int]] = {}  # kind of row -> how many, the first, bytes
        self.failure = ""
        self.wanted = [template for template in (source.prompt, source.answer) if template] or [source.text]
        self.fields = {name for template in self.wanted for name in (template, *FIELD.findall(template))}
        self.layout = ""  # of a task's rows, as the first one shows it
        self.label = path_label(file.name, source)

    # --- the account

    def note(self, rows: str, number: int, size: int = 0) -> None:
        """Count a row that is lost; `rows` says what such rows are."""
        count, first, total = self.problems.get(rows, (0, number, 0))
        self.problems[rows] = (count + 1, first, total + size)

    def fail(self, reason: str) -> None:
        """The rest of the file is lost. The first reason counts, others follow from it."""
        if not self.failure:
            self.failure = reason
            self.problems[""] = (1, 0, self.file.num_bytes)

    def damages(self) -> Iterator[Damage]:
        for rows, (count, first, size) in self.problems.items():
            reason = f"has {rows}: {count}, the first is number {first + 1}" if rows else self.failure
            yield Damage(self.id, self.source.name, reason, size)

    # --- bytes and texts

    def blocks(self) -> Iterator[bytes]:
        """The bytes of the file, or of the lines that begin in its part."""
        with open_file(self.file) as stream:
            left: float = float("inf")
            if self.file.is_part:
                end = self.file.end
                begin = line_start(stream, self.file.start, end)
                if end is not None:
                    left = max(line_start(stream, end, None) - begin, 0) if begin < end else 0
                stream.seek(begin)
            # read1: what was unpacked before the damage is not thrown away with it
            while left > 0 and (block := stream.read1(int(min(BLOCK, left)))):  # type: ignore[attr-defined]
                left -= len(block)
                yield block

    def _intact_blocks(self) -> Iterator[bytes]:
        with contextlib.suppress(*READ_ERRORS):
            yield from self.blocks()

    def texts(self) -> Iterator[str]:
        """The text of the file with \\n between lines, in blocks; ends where the file is damaged, which is noted."""
        head = next(self._intact_blocks(), b"")
        hint = html_encoding(head) if kind_of(self.file, self.source) == "html" else None
        encoding, bad = find_encoding(self._intact_blocks, self.source.encoding, hint)
        if encoding == "binary":
            return self.fail("is not text")
        if bad > MAX_BAD:
            return self.fail(f"is not text in a known encoding ({bad:.1%} unreadable as {encoding}): name its encoding")
        decoder = io.IncrementalNewlineDecoder(text_decoder(encoding), translate=True)
        try:
            for block in self.blocks():
                if text := decoder.decode(block):
                    yield text
        except READ_ERRORS as error:
            self.fail(_reason(error))
        if text := decoder.decode(b"", True):
            yield text

    def whole(self) -> str:
        """The whole text, of kinds that cannot be read in parts."""
        parts, size = [], 0
        for text in self.texts():
            size += len(text)
            if size > MAX_WHOLE:
                raise ValueError(f"it has more than {MAX_WHOLE >> 20} million characters, and must be read as a whole")
            parts.append(text)
        return "".join(parts)

    def lines(self) -> Iterator[str]:
        """Lines without their ends. Only \\n parts them: U+2028 and the like may stand inside a row."""
        parts: list[str] = []
        size = 0
        for text in self.texts():
            *ended, rest = text.split("\n")
            for line in ended:
                yield "".join([*parts, line]) if parts else line
                parts, size = [], 0
            if rest and size < MAX_LINE:
                parts.append(rest)
                size += len(rest)
        if parts and not self.failure:  # of a file that was cut short the last row is not whole
            yield "".join(parts)

    @contextlib.contextmanager
    def seekable(self) -> Iterator[IO[bytes]]:
        """The file for libraries that jump about in it; out of an archive it goes to a temporary file first."""
        with open_file(self.file) as stream:
            if self.file.member is None and isinstance(stream, io.BufferedReader):
                yield stream
                return
            with tempfile.TemporaryFile() as copy:
                while block := stream.read(BLOCK):
                    copy.write(block)
                copy.seek(0)
                yield copy

    # --- documents

    def document(
        self,
        text: str,
        number: int | str | None,
        title: str = "",
        messages: tuple[Message, ...] = (),
        group: str = "",
        label: str = "",
    ) -> Document:
        place = self.id if number is None else f"{self.id}#{number}"
        if messages and isinstance(self.source, TaskRecipe):
            messages = dressed(messages, self.source)
        if messages:
            text = "\n".join(message.content for message in messages)
        return Document(
            text, place, self.source.name, self.source.language or "", title, messages, group, label or self.label or ""
        )

    def pieces(self, texts: Iterator[str], title: str = "") -> Iterator[Document]:
        """One running text as a document, or as several of at most MAX_CHARS characters, cut at the best border; of a
        source with prompt and answer one row, whose fields are title and text."""
        if self.source.prompt is not None:
            yield from self.row({"title": title, "text": "".join(texts).strip("\n")}, 0)
            return
        number, rest = 0, ""
        for text in texts:
            rest += text
            while len(rest) > MAX_CHARS:
                cut = best_border(rest, MAX_CHARS)
                head, rest = rest[:cut], rest[cut:]
                if head.strip():
                    yield self.document(head.strip("\n"), number, title)
                    number += 1
        if rest.strip():
            yield self.document(rest.strip("\n"), number if number or self.file.is_part else None, title)

    def row(self, row: Any, number: int, size: int = 0) -> Iterator[Document]:
        """The row's document, or none, which is noted."""
        try:
            document = self._from_row(row, number)
            document.title.encode()
            document.text.encode()
        except BadRow as bad:
            self.note(str(bad), number, size)
        except UnicodeEncodeError:
            self.note("rows with half a character (a lone surrogate)", number, size)
        else:
            yield document

    def _from_row(self, row: Any, number: int) -> Document:
        if isinstance(row, str) and self.wanted == ["text"]:
            row = {"text": row}
        if isinstance(row, list) and self.source.columns:
            row = dict(zip(self.source.columns, row, strict=False))
        if not isinstance(row, Mapping):
            raise BadRow("rows that have no named fields")
        if isinstance(self.source, TaskRecipe):
            return self._example(row, number, self.source)
        title = row.get("title")
        title = title if isinstance(title, str) and "title" not in self.wanted else ""
        messages: tuple[Message, ...] = ()
        if self.source.prompt and self.source.answer:
            messages = (
                Message("user", fill(self.source.prompt, row)),
                Message("assistant", fill(self.source.answer, row)),
            )
        elif self.source.text == "text":
            messages = dialogue(row)
        if any(not message.content.strip() for message in messages):
            raise BadRow("rows with an empty turn")
        text = "" if messages else fill(self.source.text, row)
        if not (messages or text.strip()):
            raise BadRow("rows without text")
        return self.document(text, number, title, messages)

    def _example(self, row: Mapping[str, Any], number: int, task: TaskRecipe) -> Document:
        form, example = read_example(row, task)
        self.layout = self.layout or form
        if form != self.layout:
            raise BadRow(f"rows laid out as {form}, where the first is laid out as {self.layout}: divide the file")
        if not (example.messages or example.text.strip()):
            raise BadRow("rows without text")
        return self.document(example.text, number, "", example.messages, label=example.label)


# --- kinds ------------------------------------------------------------------------------------------------------------


def _read_txt(reading: _Reading) -> Iterator[Document]:
    if reading.source.line is None:
        yield from reading.pieces(reading.texts())
        return
    pattern = re.compile(reading.source.line)
    for number, line in enumerate(reading.lines()):
        if found := pattern.search(line):
            yield from reading.row(found.groupdict(""), number, len(line))
        elif line.strip():
            reading.note("lines that the source's `line` does not fit", number, len(line))


def _read_md(reading: _Reading) -> Iterator[Document]:
    texts = reading.texts()
    head = next(texts, "")
    front = FRONT_MATTER.match(head)
    found = (TITLE.search(front[1] or "") if front else None) or TITLE.search(head)
    body = head[front.end() :] if front else head

    def rest() -> Iterator[str]:
        yield body
        yield from texts

    return reading.pieces(rest(), (found[1] or found[2]) if found else "")


def _read_jsonl(reading: _Reading) -> Iterator[Document]:
    for number, line in enumerate(reading.lines()):
        if not line.strip():
            continue
        try:
            row = DECODER.decode(line)
        except (ValueError, RecursionError):
            reading.note("rows that are not JSON", number, len(line.encode("utf-8", "replace")))
            continue
        yield from reading.row(row, number, len(line))


def _read_json(reading: _Reading) -> Iterator[Document]:
    number = 0
    try:
        for item in json_rows(reading.texts(), reading.fields):
            yield from reading.row(item, number)
            number += 1
    except json.JSONDecodeError as error:
        reading.fail(f"is not JSON after {number} rows ({error.msg})")


def _read_csv(reading: _Reading) -> Iterator[Document]:
    yield from _read_table(reading, csv.reader((line + "\n" for line in reading.lines()), delimiter=",", strict=True))


def _read_tsv(reading: _Reading) -> Iterator[Document]:
    """Quotes mean nothing in a tsv: dictionaries are full of single ones."""
    yield from _read_table(reading, csv.reader(reading.lines(), delimiter="\t", quoting=csv.QUOTE_NONE))


def _read_table(reading: _Reading, table: Iterator[list[str]]) -> Iterator[Document]:
    names = reading.source.columns
    number = -1
    while True:
        try:
            cells = _next_row(table)
        except csv.Error:
            number += 1
            reading.note(
                "rows with a quote that is never closed, with text after one, or with a field that is too long", number
            )
            continue
        if cells is None:
            return
        if not cells:
            continue
        if names is None:
            names = tuple(cells)
            continue
        number += 1
        if len(cells) > len(names) and reading.source.columns is None:
            reading.note(f"rows with more cells than the {len(names)} names in the first line", number)
        else:
            yield from reading.row(dict(zip(names, cells, strict=False)), number)


def _next_row(table: Iterator[list[str]]) -> list[str] | None:
    """Under a field limit of ours: it is of the whole process, and others read tables too."""
    before = csv.field_size_limit(MAX_FIELD)
    try:
        return next(table, None)
    finally:
        csv.field_size_limit(before)


def _read_yaml(reading: _Reading) -> Iterator[Document]:
    yaml = needed("yaml", "pyyaml", "reading YAML")
    loader = getattr(yaml, "CBaseLoader", yaml.BaseLoader)  # plain texts: `yes` and 1984 are words here
    number = 0
    for value in yaml.load_all(reading.whole(), loader):
        for row in rows_of(value, reading.fields):
            yield from reading.row(row, number)
            number += 1


def _read_parquet(reading: _Reading) -> Iterator[Document]:
    parquet = needed("pyarrow.parquet", "pyarrow", "reading Parquet")
    with reading.seekable() as stream, parquet.ParquetFile(stream, pre_buffer=False) as file:
        names = file.schema_arrow.names
        wanted = [name for name in names if name in reading.fields or name in ("title", *TURNS)]
        if isinstance(reading.source, TaskRecipe):
            wanted = names
        elif not [name for name in wanted if name != "title" or "title" in reading.fields]:
            return reading.fail(f"has no column {reading.wanted[0]!r} (there are {', '.join(names)!r:.200}): name one")
        number = 0
        for batch in file.iter_batches(batch_size=256, columns=wanted, use_threads=False):
            for index in range(batch.num_rows):
                try:
                    row = {name: batch.column(name)[index].as_py() for name in batch.schema.names}
                except UnicodeDecodeError:
                    reading.note("rows that are not UTF-8", number)
                else:
                    yield from reading.row(row, number)
                number += 1


def _read_html(reading: _Reading) -> Iterator[Document]:
    if reading.source.parallel is not None:
        yield from _read_parallel(reading, reading.source.parallel)
        return
    text, title = html_text(reading.whole())
    yield from reading.pieces(iter([text]), title)


def _read_parallel(reading: _Reading, parallel: ParallelRecipe) -> Iterator[Document]:
    """The paragraphs of a page, each with the twin's of the same id. A page is a group."""
    if reading.file.twin is None:
        return reading.fail(f"has no twin in {parallel.path}")
    texts, title = html_paragraphs(reading.whole())
    other = _Reading(reading.file.twin, reading.source)
    twins, _ = html_paragraphs(other.whole())
    if other.failure:
        reading.fail(f"has a twin that {other.failure}")
    for number, (key, text) in enumerate(texts.items()):
        if key in twins:
            messages = (Message("user", text), Message("assistant", twins[key]))
            yield reading.document("", key, title, messages, reading.id)
        elif not other.failure:
            reading.note("paragraphs whose id the twin has not", number, len(text.encode()))
    for number, key in enumerate(twins):
        if key not in texts:
            reading.note("in its twin paragraphs whose id it has not", number, len(twins[key].encode()))


def _read_pdf(reading: _Reading) -> Iterator[Document]:
    with reading.seekable() as stream:
        yield from reading.pieces(*pdf_pages(stream, reading.note))


def _read_docx(reading: _Reading) -> Iterator[Document]:
    with reading.seekable() as stream:
        text, title = docx_text(stream)
    return reading.pieces(iter([text]), title)


def _read_eml(reading: _Reading) -> Iterator[Document]:
    text, title = mail_text(reading.blocks())
    return reading.pieces(iter([text]), title)


READERS: dict[str, Callable[[_Reading], Iterator[Document]]] = {
    "txt": _read_txt,
    "md": _read_md,
    "jsonl": _read_jsonl,
    "json": _read_json,
    "csv": _read_csv,
    "tsv": _read_tsv,
    "yaml": _read_yaml,
    "parquet": _read_parquet,
    "html": _read_html,
    "pdf": _read_pdf,
    "docx": _read_docx,
    "eml": _read_eml,
}
