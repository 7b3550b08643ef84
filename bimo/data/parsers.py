"""What is inside a file: its encoding, the rows of JSON, the turns of a dialogue, the text of web pages, PDF and Word.

    encoding, bad = find_encoding(blocks, "auto")                           # ("gb18030", 0.0)
    fill("{word}：{meaning}", {"word": "笔", "meaning": "写字的用具"})          # "笔：写字的用具"
    text, title = html_text("<title>笔墨</title><nav>…</nav><p>正文</p>")

Each library was chosen for one reason: selectolax reads HTML as browsers do, fast, and brings no other package
(trafilatura brings a dozen); pypdf is plain Python with limits against hostile files; mammoth knows Word's headings,
tables and footnotes and brings one small package; charset-normalizer is what requests uses.
"""

from __future__ import annotations

import codecs
import contextlib
import importlib
import itertools
import json
import logging
import math
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping
from typing import IO, Any

from bimo.data.records import Message
from bimo.errors import MissingDependencyError, UsageError

__all__ = [
    "DECODER",
    "FIELD",
    "MAX_BAD",
    "MAX_LINE",
    "MAX_WHOLE",
    "TURNS",
    "BadRow",
    "dialogue",
    "docx_text",
    "fill",
    "find_encoding",
    "html_encoding",
    "html_paragraphs",
    "html_text",
    "json_rows",
    "needed",
    "pdf_pages",
    "rows_of",
    "text_decoder",
]

MAX_BAD = 0.001  # share of characters that may be unreadable before a text counts as damaged
SAMPLE = 1 << 16
MAX_DOCX_BYTES = 256 << 20  # of its parts, unpacked: XML of that size takes some GB as a tree
BOMS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",  # before UTF-16: it begins with the same bytes
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
# What calls itself by the old name is in practice written with the larger set.
SUPERSETS = {"gb2312": "gb18030", "gbk": "gb18030", "cp936": "gb18030", "big5": "big5hkscs", "cp950": "big5hkscs"}
SUPERSETS |= {"ascii": "utf-8", "iso8859-1": "cp1252"}
# Encoding, and the lead and trail bytes of its punctuation and its everyday characters (GB 2312's first level, 3,755;
# Big5's first level, 5,401). Text in one, read as the other, is full of rare characters.
CHINESE = {"gb18030": ((0xA1, 0xD7), (0xA1, 0xFE)), "big5hkscs": ((0xA1, 0xC6), (0x40, 0xFE))}
EVERYDAY = 0.6
USUAL = re.compile("[\\t\\n\\r -~\u00a0-\u04ff\u2010-\u2027\u3000-\u30ff\u4e00-\u9fff\uac00-\ud7a3\uff00-\uffef]")


def needed(module: str, package: str, purpose: str) -> Any:
    """Import an optional library; MissingDependencyError has the install command."""
    try:
        return importlib.import_module(module)
    except ImportError:
        raise MissingDependencyError(package, purpose) from None


# --- encodings --------------------------------------------------------------------------------------------------------


def find_encoding(blocks: Callable[[], Iterator[bytes]], wanted: str, hint: str | None = None) -> tuple[str, float]:
    """The encoding of a text, and the share of its characters that cannot be read in it (1.0: it is no text).

    blocks: begins anew at each call; the text is read once if it is UTF-8, some times if not. wanted: "auto", or the
    encoding to use. hint: what the text says of itself. Raises UsageError for an encoding that does not exist.
    """
    if wanted != "auto":
        encoding = _known(wanted)
        if encoding is None:
            raise UsageError(
                f"there is no encoding {wanted!r}: write auto, utf-8, gb18030, big5 or the like", "encoding"
            )
        return encoding, _bad_share(blocks, encoding)[0]
    first = next(blocks(), b"")
    for bom, encoding in BOMS.items():
        if first.startswith(bom):
            return encoding, _bad_share(blocks, encoding)[0]
    if first.count(0) > MAX_BAD * len(first):
        encoding = _utf16(first[: SAMPLE // 2 * 2])
        return (encoding, _bad_share(blocks, encoding)[0]) if encoding else ("binary", 1.0)
    sample = _not_utf8(blocks())
    if sample is None:
        return "utf-8", 0.0
    bad, other = _bad_share(blocks, "utf-8")
    if bad <= MAX_BAD and other > 10 * bad:  # UTF-8 with a few broken bytes; ASCII with a few é is something else
        return "utf-8", bad
    guess = _guess(sample, hint)
    guess_bad = _bad_share(blocks, guess)[0] if guess else 1.0
    return (guess, guess_bad) if guess and guess_bad < bad else ("utf-8", bad)


def text_decoder(encoding: str) -> codecs.IncrementalDecoder:
    """Turns bytes that come in blocks into text; what cannot be read becomes U+FFFD."""
    return codecs.getincrementaldecoder(encoding)("replace")


def _known(name: str) -> str | None:
    """The codec's name, or that of the set it is part of; None if there is none for text."""
    try:
        b"a".decode(name, "replace")
        codec = codecs.lookup(name).name
    except (LookupError, UnicodeError, ValueError, TypeError):
        return None
    return SUPERSETS.get(codec, codec)


def _utf16(sample: bytes) -> str | None:
    """Which UTF-16 without its mark the sample is: read the wrong way round, text falls into rare scripts."""
    orders = ("utf-16-le", "utf-16-be")
    usual = {order: len(USUAL.findall(sample.decode(order, "replace"))) for order in orders}
    best = max(orders, key=usual.__getitem__)
    return best if usual[best] >= 0.9 * len(sample) / 2 else None


def _not_utf8(blocks: Iterator[bytes]) -> bytes | None:
    """None for UTF-8; else the bytes around the first that are not, from the beginning of a line."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    earlier = b""
    for block in blocks:
        held = len(decoder.getstate()[0])
        try:
            decoder.decode(block)
        except UnicodeDecodeError as error:
            whole = earlier + block
            at = len(earlier) - held + error.start
            for more in blocks:
                if len(whole) >= at + SAMPLE:
                    break
                whole += more
            start = whole.rfind(b"\n", 0, at) + 1
            return whole[max(start, at - SAMPLE) :][: 2 * SAMPLE]
        earlier = (earlier + block)[-SAMPLE:]
    return earlier if decoder.getstate()[0] else None


def _bad_share(blocks: Callable[[], Iterator[bytes]], encoding: str) -> tuple[float, float]:
    """Shares of the characters: not readable, and readable ones outside ASCII."""
    decoder, bad, ascii_, total = text_decoder(encoding), 0, 0, 0
    for block in itertools.chain(blocks(), [b""]):
        text = decoder.decode(block, not block)
        bad += text.count("\ufffd")
        ascii_ += len(text.encode("ascii", "ignore"))
        total += len(text)
    return bad / max(total, 1), (total - ascii_ - bad) / max(total, 1)


def _guess(sample: bytes, hint: str | None) -> str | None:
    if (told := _known(hint or "")) and sample.decode(told, "replace")[:-1].count("\ufffd") <= MAX_BAD * len(sample):
        return told
    scores = {encoding: _everyday_share(sample, encoding) for encoding in CHINESE}
    best = max(scores, key=scores.__getitem__)
    if scores[best] >= EVERYDAY:
        return best
    detector = needed("charset_normalizer", "charset-normalizer", "finding out an encoding")
    matches = detector.from_bytes(sample)
    if not (first := matches.best()):
        return None
    western = any(match.encoding in ("cp1252", "latin_1") and match.chaos <= first.chaos for match in matches)
    return "cp1252" if western else _known(first.encoding)


def _everyday_share(sample: bytes, encoding: str) -> float:
    (lead_low, lead_high), (trail_low, trail_high) = CHINESE[encoding]
    text = re.sub(r"[\x00-\x7f]", "", sample.decode(encoding, "replace")[:-1])  # the last may be cut
    pairs = [character.encode(encoding, "ignore") for character in text]
    good = sum(len(p) == 2 and lead_low <= p[0] <= lead_high and trail_low <= p[1] <= trail_high for p in pairs)
    return good / max(len(pairs), 1)


# --- rows -------------------------------------------------------------------------------------------------------------

FIELD = re.compile(r"\{([^{}]+)\}")
DECODER = json.JSONDecoder(strict=False)  # raw tabs and line ends inside texts are common and harmless
BETWEEN_ITEMS = re.compile(r"[\s,]*")
TURNS = ("messages", "conversations", "conversation")
MAX_LINE = 1 << 26  # characters of a row; of a longer one the rest is dropped, and it counts as broken
MAX_WHOLE = 1 << 28  # characters of a file that can only be read as a whole
ROLES = {
    **dict.fromkeys(["user", "human", "prompter"], "user"),
    **dict.fromkeys(["assistant", "gpt", "chatgpt", "bot", "model"], "assistant"),
    "system": "system",
}


class BadRow(Exception):
    """A row that does not become a document; says what such rows are, in the plural."""


def rows_of(value: Any, fields: set[str]) -> list[Any]:
    """The rows in a whole JSON or YAML value: a list, an object with one list of objects, or one object."""
    if isinstance(value, Mapping) and not fields & value.keys():
        talks = value.get("conversations")
        if isinstance(talks, list) and any(isinstance(talk, list) for talk in talks):
            return [{"conversations": talk} for talk in talks]  # the layout of ChatterBot's corpus
        lists = [v for v in value.values() if isinstance(v, list) and v and isinstance(v[0], (dict, list))]
        if len(lists) == 1 and not any(name in value for name in TURNS):
            value = lists[0]
    return value if isinstance(value, list) else [value]


def json_rows(texts: Iterator[str], fields: set[str]) -> Iterator[Any]:
    """The items of the list that the file is, one at a time; else the rows of its values (JSON lines are often called
    .json). Raises JSONDecodeError where the text stops to be JSON."""
    buffer = ""
    for text in texts:
        buffer = (buffer + text).lstrip()
        if buffer:
            break
    listed = buffer.startswith("[")
    at, more = int(listed), True
    while True:
        at = BETWEEN_ITEMS.match(buffer, at).end()  # type: ignore[union-attr]
        if at < len(buffer):
            if listed and buffer[at] == "]":
                return
            try:
                item, end = DECODER.raw_decode(buffer, at)
            except json.JSONDecodeError as error:
                # only what breaks off at the end of the buffer may be mended by reading on
                if not more or (error.pos < len(buffer) - 16 and not error.msg.startswith("Unterminated")):
                    raise
            else:
                if end < len(buffer) or not more:  # else a number may go on
                    yield from [item] if listed else rows_of(item, fields)
                    at = end
                    continue
        if not more:
            if listed:
                raise json.JSONDecodeError("its list has no end", buffer, at)
            return
        parts, size = [buffer[at:]], 0
        if len(parts[0]) > MAX_WHOLE:
            raise ValueError("one value in it is too large for memory: save it as jsonl")
        while size <= len(parts[0]):  # twice as much each time, so that a long item is not scanned too often
            text = next(texts, "")
            if not text:
                more = False
                break
            parts.append(text)
            size += len(text)
        buffer, at = "".join(parts), 0


def fill(template: str, row: Mapping[str, Any]) -> str:
    """The field of that name, else the template with {field} replaced; nothing else in it means anything."""
    if template in row:
        return _as_text(row[template], template)
    names = FIELD.findall(template)
    if missing := [name for name in names if name not in row] or ([] if names else [template]):
        there = ", ".join(str(name) for name in list(row)[:8])
        raise BadRow(f"rows without the field {missing[0]!r} (they have {there!r:.200})")
    return FIELD.sub(lambda match: _as_text(row[match[1]], match[1]), template)


def _as_text(value: Any, field: str) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, (int, float)) and not math.isnan(value):
        return str(value)
    if isinstance(value, list) and all(isinstance(line, str) for line in value):
        return "\n".join(value)
    if value is None or isinstance(value, float):  # a table's word for an empty cell is NaN
        return ""
    raise BadRow(f"rows whose field {field!r} is not text")


def dialogue(row: Mapping[str, Any]) -> tuple[Message, ...]:
    """The turns of a row in OpenAI's, ShareGPT's or ChatterBot's layout; () if it is no dialogue."""
    turns: list[Any] = next((row[name] for name in TURNS if isinstance(row.get(name), list)), [])
    messages = []
    for number, turn in enumerate(turns):
        if isinstance(turn, str):
            turn = {"role": ("user", "assistant")[number % 2], "content": turn}
        if not isinstance(turn, Mapping):
            raise BadRow("rows whose turns are not objects")
        role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
        if isinstance(content, list):  # of typed parts; pictures and sounds are not for a language model
            content = "\n".join(
                str(p.get("text")) for p in content if isinstance(p, Mapping) and p.get("type") == "text"
            )
        if not isinstance(role, str) or role not in ROLES:
            raise BadRow(f"rows with a turn by {role!r:.40} (known are {', '.join(ROLES)})")
        if not isinstance(content, str):
            raise BadRow("rows with a turn without text")
        messages.append(Message(ROLES[role], content))
    if not messages and "text" not in row and any(name in row for name in TURNS):
        raise BadRow("rows with an empty dialogue")
    return tuple(messages)


# --- pages ------------------------------------------------------------------------------------------------------------

NOT_TEXT = (
    "script, style, noscript, template, nav, header, footer, aside, form, button, select, svg, iframe, object, "
    "[hidden], [aria-hidden=true], [role=navigation], [role=banner], [role=contentinfo], [role=search]"
)
BLOCKS = (
    "address, article, blockquote, body, center, dd, details, dialog, div, dl, dt, fieldset, figcaption, figure, "
    "h1, h2, h3, h4, h5, h6, hr, li, main, ol, p, pre, section, summary, table, tr, ul, caption, br"
)
PARAGRAPHS = "p, h1, h2, h3, h4, h5, h6, li, dt, dd, td, th, caption, figcaption, blockquote, pre, summary"
BORDER, PRE_LINE, PRE_SPACE = "\ue000", "\ue001", "\ue002"  # private use: no text has them
BETWEEN_HAN = re.compile(r"(?<=[\u3000-\u9fff\uff00-\uffef])[ \t]*\r?\n\s*(?=[\u3000-\u9fff\uff00-\uffef])")


def html_encoding(head: bytes) -> str | None:
    """The encoding that a page names in its first bytes."""
    found = re.search(rb"""charset\s*=\s*["']?\s*([\w.:-]+)""", head[:4096], re.IGNORECASE)
    return found[1].decode("ascii", "replace") if found else None


def html_paragraphs(html: str) -> tuple[dict[str, str], str]:
    """(texts by id, title): the page's paragraphs, headings, list entries and cells that have an id, each on one line.

    Of those inside of others the inner ones count. What repeats an id is "id@2", "id@3", ... White space is one space.
    """
    root, name = _page(html)
    if root is None:
        return {}, name
    texts: dict[str, str] = {}
    times: dict[str, int] = {}
    for node in root.css(PARAGRAPHS):
        key = node.id
        if not key or any(inner.id and inner != node for inner in node.css(PARAGRAPHS)):
            continue
        if text := " ".join(BETWEEN_HAN.sub("", node.text()).split()):
            times[key] = times.get(key, 0) + 1
            texts[key if times[key] == 1 else f"{key}@{times[key]}"] = text
    return texts, name


def html_text(html: str) -> tuple[str, str]:
    """(main text, title) of a page: each heading, paragraph, list entry and row of a table on its own line.

    Navigation, headers, footers, side columns, forms and scripts are left out.
    """
    root, name = _page(html)
    if root is None:
        return "", name
    for node in root.css("pre"):
        lines = node.text().strip("\n").replace("\n", PRE_LINE)
        node.replace_with(BORDER + re.sub(r"[ \t]", PRE_SPACE, lines) + BORDER)
    for node in root.css(BLOCKS):
        node.insert_before(BORDER)
        node.insert_after(BORDER)
    for node in root.css("td, th"):
        node.insert_after(" ")
    lines = (" ".join(BETWEEN_HAN.sub("", line).split()) for line in root.text().split(BORDER))
    text = "\n".join(line for line in lines if line)
    return text.replace(PRE_LINE, "\n").replace(PRE_SPACE, " "), name


def _page(html: str) -> tuple[Any, str]:
    """(the node with the main text, title) of a page, without what is not text; (None, title) if it has no body."""
    lexbor = needed("selectolax.lexbor", "selectolax", "reading HTML")
    tree = lexbor.LexborHTMLParser(re.sub(f"[{BORDER}-{PRE_SPACE}\0]", "", html))
    title = tree.css_first("title")
    heading = tree.css_first("h1")
    name = " ".join(
        next((node.text() for node in (title, heading) if node is not None and node.text().strip()), "").split()
    )
    if tree.body is None:
        return None, name
    for node in tree.body.css("[hidden] + [hidden]:last-child"):
        if _is_default(node):
            del node.attrs["hidden"]
    for node in tree.body.css(NOT_TEXT):
        # an article has a header of its own, with its heading
        if node.tag != "header" or node.css_first("h1") is None:
            node.decompose()
    mains = [node for node in tree.body.css("main, [role=main]") if node.text().strip()]
    return mains[0] if len(mains) == 1 else tree.body, name


def _is_default(node: Any) -> bool:
    """Whether nothing stands beside it but hidden elements: a script shows the one that fits the reader, and the last
    of them is for all whom no other fits."""
    return all(
        "hidden" in sibling.attributes if sibling.is_element_node else not sibling.text().strip()
        for sibling in node.parent.iter(include_text=True)
    )


def pdf_pages(stream: IO[bytes], report: Callable[[str, int], None]) -> tuple[Iterator[str], str]:
    """(the pages' texts, title). Of pages that cannot be read `report` is told what they are, and each one's number.

    Raises the library's errors for a file that is no PDF, or needs a password.
    """
    pypdf = needed("pypdf", "pypdf", "reading PDF")
    logging.getLogger("pypdf").setLevel(logging.CRITICAL)  # its warnings on every oddity say nothing to a user
    reader = pypdf.PdfReader(stream, strict=False)
    if reader.is_encrypted and not reader.decrypt(""):
        raise ValueError("it needs a password")
    title = ""
    with contextlib.suppress(Exception):
        title = str(reader.metadata.title or "") if reader.metadata else ""

    def pages() -> Iterator[str]:
        for number in range(len(reader.pages)):
            try:
                text = reader.pages[number].extract_text()
            except Exception:
                report("pages that cannot be read", number)
                continue
            # fonts with a broken table of characters give halves of pairs
            yield text.encode("utf-16", "surrogatepass").decode("utf-16", "replace") + "\n"

    return pages(), title


def docx_text(stream: IO[bytes]) -> tuple[str, str]:
    """(text, title) of a Word file, with tables and footnotes. Raises the library's errors for a file that is none."""
    mammoth = needed("mammoth", "mammoth", "reading Word files")
    with zipfile.ZipFile(stream) as archive:
        if sum(info.file_size for info in archive.infolist() if "/media/" not in info.filename) > MAX_DOCX_BYTES:
            raise ValueError(f"its text unpacks to more than {MAX_DOCX_BYTES >> 20} MB")
    stream.seek(0)
    no_image = mammoth.images.img_element(lambda image: {})
    return html_text(mammoth.convert_to_html(stream, convert_image=no_image, external_file_access=False).value)
