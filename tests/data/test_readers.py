"""What files say becomes documents, in any encoding and format; what is broken is counted, the rest is still read."""

from __future__ import annotations

import csv
import gzip
import io
import json
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import pytest

from bimo.data.readers import MAX_CHARS, read_file
from bimo.data.records import Damage, Document
from bimo.data.sources import SourceFile, files_of
from bimo.errors import UsageError
from bimo.recipe import SourceRecipe

POEM = "床前明月光，疑是地上霜。\n举头望明月，低头思故乡。\n"
MODERN = "他说，人工智能的发展需要大量的数据，也需要更好的方法。今天的天气很好，我们一起去公园散步吧！\n"
TRADITIONAL = "他說，人工智慧的發展需要大量的資料，也需要更好的方法。今天的天氣很好，我們一起去公園散步吧！\n"


def read(path: Path, **settings: Any) -> tuple[list[Document], list[Damage]]:
    recipe = SourceRecipe.model_validate({"name": "源", "path": str(path), **settings})
    items = [item for file in files_of(recipe, lambda *step: None) for item in read_file(file, recipe)]
    documents = [item for item in items if isinstance(item, Document)]
    for document in documents:
        document.text.encode()
        assert document.id.startswith("源/")
        assert document.source == "源"
    return documents, [item for item in items if isinstance(item, Damage)]


def texts(path: Path, **settings: Any) -> list[str]:
    documents, damages = read(path, **settings)
    assert not damages
    return [document.text for document in documents]


def reason(path: Path, **settings: Any) -> str:
    documents, (damage,) = read(path, **settings)
    assert not documents
    return damage.reason


@pytest.fixture
def file(tmp_path: Path) -> Any:
    def write(name: str, content: bytes | str | object) -> Path:
        path = tmp_path / name
        if not isinstance(content, (bytes, str)):
            content = json.dumps(content, ensure_ascii=False)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


# --- encodings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "encoding"),
    [
        (MODERN, "utf-8"),
        (MODERN, "utf-8-sig"),
        (MODERN, "gbk"),
        (MODERN, "gb18030"),
        (POEM, "gbk"),
        ("李白\n杜甫\n", "gbk"),
        (TRADITIONAL, "big5"),
        ("蘇軾\n陸游\n辛棄疾\n", "big5"),
        (TRADITIONAL, "gbk"),
        (MODERN, "utf-16"),
        (MODERN, "utf-16-le"),
        (MODERN, "utf-16-be"),
        ("The naïve café in the old town serves crème brûlée.\n" * 20, "cp1252"),
        ("plain ASCII\n", "ascii"),
    ],
)
def test_the_encoding_is_found(file: Any, text: str, encoding: str) -> None:
    assert texts(file("a.txt", text.encode(encoding))) == [text.strip()]


def test_every_border_between_blocks_may_cut_a_character(file: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import bimo.data.readers as readers

    for encoding in ("utf-8", "gb18030", "utf-16"):
        for block in (1, 2, 3, 5):
            monkeypatch.setattr(readers, "BLOCK", block)
            assert texts(file("a.txt", (MODERN + "𠀀😀\r\n" + POEM).encode(encoding))) == [
                (MODERN + "𠀀😀\n" + POEM).strip()
            ]


def test_gbk_after_a_megabyte_of_ascii(file: Any) -> None:
    assert texts(file("a.txt", b"ascii line\n" * 60_000 + MODERN.encode("gbk")))[-1].endswith(MODERN.strip())


def test_an_encoding_that_is_named(file: Any) -> None:
    path = file("a.txt", "かな漢字".encode("shift_jis"))
    assert texts(path, encoding="shift_jis") == ["かな漢字"]
    with pytest.raises(UsageError, match="no encoding 'utf-9'"):
        read(path, encoding="utf-9")
    with pytest.raises(UsageError, match="no encoding"):
        read(path, encoding="base64")


def test_a_few_broken_bytes_are_replaced_many_are_damage(file: Any) -> None:
    whole = MODERN.encode() * 500
    assert texts(file("a.txt", whole + b"\xff\n" + whole))[0].count("\ufffd") == 1
    assert "unreadable as gb18030" in reason(file("a.txt", b"caf\xe9 " * 20), encoding="gbk")
    mixed = b"".join(MODERN.encode() + MODERN.encode("gbk") for _ in range(20))
    assert "unreadable" in reason(file("b.txt", mixed))


def test_binary_is_not_text(file: Any) -> None:
    assert "is not text" in reason(file("a.txt", bytes(range(256)) * 50))
    assert "is not text" in reason(file("b.jsonl", b"\0" * 1000 + b"\x01\0\0\x02" * 100))


# --- running text -----------------------------------------------------------------------------------------------------


def test_a_text_is_one_document_until_it_is_too_long(file: Any) -> None:
    documents, _ = read(file("短.txt", "短\n\n" * 10))
    assert [document.id for document in documents] == ["源/短.txt"]
    paragraph = "句子。" * 1000
    documents, damages = read(file("长.txt", "\n\n".join([paragraph] * 1000)))
    assert not damages
    assert [document.id for document in documents] == [f"源/长.txt#{number}" for number in range(4)]
    assert all(len(document.text) <= MAX_CHARS for document in documents)
    assert all(set(document.text.split("\n\n")) == {paragraph} for document in documents)
    assert sum(document.text.count(paragraph) for document in documents) == 1000


@pytest.mark.parametrize(
    ("unit", "ending"),
    [("一行字\n", "字"), ("一句话。”", "。”"), ("One sentence. ", ". "), ("word ", " "), ("无", "无")],
)
def test_borders_without_paragraphs(file: Any, unit: str, ending: str) -> None:
    whole = unit * (2_100_000 // len(unit))
    pieces = texts(file("a.txt", whole))
    assert len(pieces) == 3
    assert all(len(piece) <= MAX_CHARS and piece.endswith(ending) for piece in pieces[:-1])
    assert "".join(pieces).replace("\n", "") == whole.replace("\n", "")


@pytest.mark.parametrize("ending", ["txt", "jsonl", "json", "csv", "txt.gz"])
def test_memory_is_flat(tmp_path: Path, ending: str) -> None:
    """A line of 30 MB, or as many bytes of rows. (As one string it would take 20 MB, as bytes and string 50.)"""
    path = tmp_path / f"a.{ending}"
    text = "一句很长的话，没有行" * 100
    row = {"jsonl": f'{{"text": "{text}"}}\n', "json": f'{{"text": "{text}"}},', "csv": f'"{text}"\n'}
    block = (row.get(ending, text) * 100).encode()
    with gzip.open(path, "wb", 1) if ending.endswith("gz") else path.open("wb") as stream:
        stream.write({"json": b"[", "csv": b"text\n"}.get(ending, b""))
        for _ in range(30_000_000 // len(block)):
            stream.write(block)
        stream.write(b"]" if ending == "json" else b"")
    source = SourceRecipe(name="a", path="a")
    next(iter(read_file(SourceFile(path, path.name), source)))  # imports
    tracemalloc.start()
    characters = 0
    for item in read_file(SourceFile(path, path.name), source):
        assert isinstance(item, Document)
        characters += len(item.text)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert characters > 9_000_000
    assert peak < 14_000_000


def test_markdown_without_front_matter(file: Any) -> None:
    page = '---\ntitle: "笔墨"\ntags: [a]\n---\n# 标题\n\n正文\n\n---\n\n再来\n'
    (document,), _ = read(file("a.md", page))
    assert (document.title, document.text) == ("笔墨", "# 标题\n\n正文\n\n---\n\n再来")
    (document,), _ = read(file("b.md", "# Title\ntext"))
    assert (document.title, document.text) == ("Title", "# Title\ntext")


# --- rows -------------------------------------------------------------------------------------------------------------


def test_jsonl_counts_what_is_broken(file: Any) -> None:
    lines = [
        '{"text": "一\u2028二"}',
        "{broken",
        "",
        '{"text": "\\ud800"}',
        '{"other": 1}',
        '{"text": null}',
        "[" * 9999,
    ]
    documents, damages = read(file("a.jsonl", "\n".join([*lines, "{broken", '{"text": "三"}'])))
    assert [(document.id, document.text) for document in documents] == [
        ("源/a.jsonl#0", "一\u2028二"),
        ("源/a.jsonl#8", "三"),
    ]
    reasons = "\n".join(damage.reason for damage in damages)
    assert "not JSON: 3, the first is number 2" in reasons
    assert "lone surrogate): 1, the first is number 4" in reasons
    assert "without the field 'text' (they have 'other'): 1, the first is number 5" in reasons
    assert "without text: 1" in reasons
    assert len(damages) == 4
    assert all(damage.id == "源/a.jsonl" for damage in damages)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ([{"text": "一"}, {"text": "二"}], ["一", "二"]),
        ({"text": "一"}, ["一"]),
        ({"version": 1, "data": [{"text": "一"}, {"text": "二"}]}, ["一", "二"]),
        (["一", "二"], ["一", "二"]),
        ('{"text": "一"}\n{"text": "二"}\n', ["一", "二"]),  # JSON lines under another name
        ([{"text": ["床前明月光", "疑是地上霜"], "title": "静夜思"}], ["床前明月光\n疑是地上霜"]),
        ([{"text": 7}], ["7"]),
    ],
)
def test_shapes_of_json(file: Any, value: object, expected: list[str]) -> None:
    assert texts(file("a.json", value)) == expected


@pytest.mark.parametrize("block", [1, 7, 1 << 20])
def test_json_lists_are_read_item_by_item(file: Any, monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    import bimo.data.readers as readers

    monkeypatch.setattr(readers, "BLOCK", block)
    rows: list[object] = [{"text": f"第{number}首，“引号\\” [1] {{}} \n"} for number in range(30)]
    path = file("a.json", json.dumps([*rows, 12345, "x"], indent=1))
    documents, (damage,) = read(path)
    assert [document.text for document in documents] == [row["text"] for row in rows] + ["x"]  # type: ignore[index]
    assert "no named fields: 1, the first is number 31" in damage.reason
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    documents, damages = read(path)
    assert 10 < len(documents) < 20
    assert f"not JSON after {len(documents)} rows" in damages[0].reason


def test_templates_replace_fields_and_nothing_else(file: Any) -> None:
    row = {"word": "笔", "meaning": ["写字的用具", "笔画"], "a.b": "点", "{x}": "y"}
    path = file("a.jsonl", row)
    assert texts(path, text="{word}：{meaning}") == ["笔：写字的用具\n笔画"]
    assert texts(path, text="{a.b} %s $word {} }{") == ["点 %s $word {} }{"]
    assert texts(path, text="word") == ["笔"]
    assert "without the field 'word.__class__'" in reason(path, text="{word.__class__}")
    injected = file("b.jsonl", {"word": "{meaning}", "meaning": "x"})
    assert texts(injected, text="{word}") == ["{meaning}"]


@pytest.mark.parametrize("field", ["messages", "conversations"])
def test_dialogues_are_recognised(file: Any, field: str) -> None:
    openai = [
        {"role": "system", "content": "你是助手"},
        {"role": "user", "content": [{"type": "text", "text": "你好"}]},
    ]
    sharegpt = [{"from": "human", "value": "你好"}, {"from": "gpt", "value": "您好！"}]
    lines = [{field: openai}, {field: sharegpt}, {field: [{"role": "tool", "content": "x"}]}, {field: []}]
    documents, damages = read(file("a.jsonl", "\n".join(json.dumps(line) for line in lines)))
    assert [tuple(map(tuple, document.messages)) for document in documents] == [
        (("system", "你是助手"), ("user", "你好")),
        (("user", "你好"), ("assistant", "您好！")),
    ]
    assert documents[1].text == "你好\n您好！"
    assert "a turn by 'tool'" in damages[0].reason
    assert "an empty dialogue" in damages[1].reason
    assert len(damages) == 2


def test_prompt_and_answer(file: Any) -> None:
    path = file("谜.tsv", '一丈厚的烧饼\t吃不透\t多\n一个"世纪\t百年大计\n缺\n空\t\n')
    documents, damages = read(path, columns=["q", "a"], prompt="歇后语：{q}", answer="a")
    assert [document.text for document in documents] == ["歇后语：一丈厚的烧饼\n吃不透", '歇后语：一个"世纪\n百年大计']
    assert documents[0].messages[1].role == "assistant"
    assert sorted(damage.reason.split(" (")[0] for damage in damages) == [
        "has rows with an empty turn: 1, the first is number 4",
        "has rows without the field 'a'",
    ]


def test_csv(file: Any) -> None:
    table = '\ufefftitle,text\r\n静夜思,"床前明月光，\r\n疑是""地上""霜"\r\n\r\n多,了,一格\r\n"未闭合\r\n'
    (document,), damages = read(file("a.csv", table))
    assert (document.id, document.title, document.text) == ("源/a.csv#0", "静夜思", '床前明月光，\n疑是"地上"霜')
    assert [damage.reason.split(": ")[1] for damage in damages] == [
        "1, the first is number 2",
        "1, the first is number 3",
    ]
    assert texts(file("b.csv", (MODERN.replace("，", "；") + "\n").encode("gbk")), columns=["text"]) == [
        MODERN.replace("，", "；").strip()
    ]


def test_a_quote_that_is_never_closed_does_not_take_the_whole_file(file: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import bimo.data.readers as readers

    monkeypatch.setattr(readers, "MAX_FIELD", 100)
    limit = csv.field_size_limit()
    documents, damages = read(file("a.csv", 'text\na\n"b\n' + "c\n" * 200))
    assert csv.field_size_limit() == limit  # it is of the whole process
    assert documents[0].text == "a"
    assert len(documents) > 100
    assert len(damages) == 1


def test_chatterbot_yaml(file: Any) -> None:
    corpus = "categories:\n- 问候\nconversations:\n- - 你好\n  - 您好\n- - 1984\n  - yes\n- bad\n"
    documents, (damage,) = read(file("a.yml", corpus))
    assert [tuple(map(tuple, document.messages)) for document in documents] == [
        (("user", "你好"), ("assistant", "您好")),
        (("user", "1984"), ("assistant", "yes")),
    ]
    assert documents[1].id == "源/a.yml#1"
    assert damage.reason.startswith("has rows")
    assert "cannot be read" in reason(file("b.yml", "a: [1\nb: }"))


def test_parquet(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path / "a.parquet"
    rows = [f"第{number}行" for number in range(5000)]
    talks = [[{"role": "user", "content": text}, {"role": "assistant", "content": "好"}] for text in rows]
    pq.write_table(pa.table({"text": rows, "n": range(5000)}), path, row_group_size=500)
    documents, damages = read(path)
    assert ([document.text for document in documents], damages) == (rows, [])
    assert documents[4999].id == "源/a.parquet#4999"
    assert "has no column 'body' (there are 'text, n')" in reason(path, text="body")
    assert texts(path, text="{n}/{text}")[7] == "7/第7行"
    whole = bytearray(path.read_bytes())
    path.write_bytes(whole[:-100])
    assert "cannot be read" in reason(path)
    whole[len(whole) // 2 : len(whole) // 2 + 3000] = b"\xff" * 3000
    path.write_bytes(whole)
    documents, (damage,) = read(path)
    assert 100 < len(documents) < 5000
    assert "cannot be read" in damage.reason
    pq.write_table(pa.table({"messages": talks}), path)
    with zipfile.ZipFile(tmp_path / "b.zip", "w") as archive:
        archive.write(path, "inner.parquet")
    assert read(tmp_path / "b.zip")[0][3].messages[0].content == "第3行"


# --- pages ------------------------------------------------------------------------------------------------------------

PAGE = """<!DOCTYPE html><html><head><title>笔墨 &amp; 纸砚</title>
<meta charset="{}"><script>var x = "不";</script></head>
<body><header><a>首页</a></header><nav><ul><li>菜单</li></ul></nav><div id="main"><h1>文房
四宝</h1><p>笔、墨、<b>纸</b>、砚，
是书房的工具。<br>They are   <i>tools</i>.</p>tail<ul><li>一</li><li>二</li></ul>
<table><tr><td>甲</td><td>乙</td></tr></table>
<pre>if x:
    y</pre><p hidden>藏</p></div><footer>版权所有</footer></body></html>"""
PAGE_TEXT = "文房四宝\n笔、墨、纸、砚，是书房的工具。\nThey are tools.\ntail\n一\n二\n甲 乙\nif x:\n    y"


@pytest.mark.parametrize("encoding", ["utf-8", "gb2312", "gbk", "big5"])
def test_html(file: Any, encoding: str) -> None:
    page = PAGE if encoding != "big5" else PAGE.translate(str.maketrans("笔纸砚书", "筆紙硯書"))
    for simplified, traditional in zip("笔纸砚书", "筆紙硯書", strict=True):
        page = page if encoding != "big5" else page.replace(simplified, traditional)
    page = page if encoding != "big5" else "".join(c for c in page if c.encode("big5", "ignore"))
    (document,), damages = read(file("a.html", page.format(encoding).encode(encoding)))
    assert not damages
    if encoding != "big5":
        assert (document.text, document.title) == (PAGE_TEXT, "笔墨 & 纸砚")
    else:
        assert document.title == "筆墨 & 紙硯"


def test_html_that_is_broken_or_hostile(file: Any) -> None:
    assert texts(file("a.html", "<p>未闭合<div>二<table><td>三")) == ["未闭合\n二\n三"]
    deep = "<div>" * 20_000 + "深" + "</div>" * 20_000
    documents, damages = read(file("b.html", deep))
    assert [document.text for document in documents] == ["深"] or damages
    assert "holds no text" in reason(file("c.html", "<html><script>x</script></html>"))


def make_pdf(text: str) -> bytes:
    """One page whose font maps glyph n to the text's character n, as Chinese PDFs do."""
    glyphs = "".join(f"{number + 1:04x}" for number in range(len(text)))
    maps = "".join(f"<{number + 1:04x}> <{ord(c):04x}>\n" for number, c in enumerate(text))
    content = f"BT /F1 12 Tf 50 700 Td <{glyphs}> Tj ET"
    cmap = (
        "/CIDInit /ProcSet findresource begin 12 dict begin begincmap /CMapName /X def\n1 begincodespacerange\n"
        f"<0000> <ffff>\nendcodespacerange\n{len(text)} beginbfchar\n{maps}endbfchar\nendcmap end end"
    )
    bodies = [
        "<< /Type /Catalog /Pages 2 0 R >>",
        "<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
        "<< /Type /Page /Parent 2 0 R /MediaBox [0 0 600 800] "
        "/Contents 4 0 R /Resources << /Font << /F1 5 0 R >> >> >>",
        f"<< /Length {len(content)} >>\nstream\n{content}\nendstream",
        "<< /Type /Font /Subtype /Type0 /BaseFont /X /Encoding /Identity-H "
        "/DescendantFonts [6 0 R] /ToUnicode 7 0 R >>",
        "<< /Type /Font /Subtype /CIDFontType2 /BaseFont /X /CIDSystemInfo << /Registry (Adobe) /Ordering (Identity) "
        "/Supplement 0 >> >>",
        f"<< /Length {len(cmap)} >>\nstream\n{cmap}\nendstream",
    ]
    out, places = io.BytesIO(b"%PDF-1.4\n"), []
    out.seek(0, 2)
    for number, body in enumerate(bodies, 1):
        places.append(out.tell())
        out.write(f"{number} 0 obj\n{body}\nendobj\n".encode())
    start = out.tell()
    out.write(f"xref\n0 {len(bodies) + 1}\n0000000000 65535 f \n".encode())
    out.writelines(f"{place:010} 00000 n \n".encode() for place in places)
    out.write(f"trailer << /Size {len(bodies) + 1} /Root 1 0 R >>\nstartxref\n{start}\n%%EOF".encode())
    return out.getvalue()


def test_pdf(file: Any) -> None:
    whole = make_pdf("笔墨纸砚 ink")
    assert texts(file("a.pdf", whole)) == ["笔墨纸砚 ink"]
    assert "cannot be read" in reason(file("b.pdf", b"%PDF-1.4 not really"))
    documents, damages = read(file("c.pdf", whole[: len(whole) // 2]))
    assert len(damages) == 1 or documents[0].text == "笔墨纸砚 ink"


def make_docx(body: str) -> bytes:
    word = "http://schemas.openxmlformats.org/wordprocessingml/2006/main"
    office = "http://schemas.openxmlformats.org/officeDocument/2006/relationships/officeDocument"
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(
            "_rels/.rels",
            '<Relationships xmlns="http://schemas.openxmlformats.org/package/2006/relationships">'
            f'<Relationship Id="r1" Type="{office}" Target="word/document.xml"/></Relationships>',
        )
        archive.writestr(
            "[Content_Types].xml",
            '<Types xmlns="http://schemas.openxmlformats.org/package/2006/content-types">'
            '<Default Extension="xml" ContentType="application/xml"/></Types>',
        )
        archive.writestr("word/document.xml", f'<w:document xmlns:w="{word}"><w:body>{body}</w:body></w:document>')
    return out.getvalue()


def test_docx(file: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    paragraph = "<w:p><w:r><w:t>{}</w:t></w:r></w:p>"
    cells = "".join(f"<w:tc>{paragraph.format(cell)}</w:tc>" for cell in "甲乙")
    whole = make_docx(
        paragraph.format("第一段 &lt;b&gt;") + f"<w:tbl><w:tr>{cells}</w:tr></w:tbl>" + paragraph.format("末")
    )
    assert texts(file("a.docx", whole)) == ["第一段 <b>\n甲\n乙\n末"]
    assert "damaged" in reason(file("b.docx", whole[:-30]))
    import bimo.data.parsers as parsers

    monkeypatch.setattr(parsers, "MAX_DOCX_BYTES", 100_000)
    assert "unpacks to more than" in reason(file("c.docx", make_docx("<w:p/>" * 100_000)))


# --- damage -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "ending", ["txt", "md", "jsonl", "json", "csv", "tsv", "yaml", "html", "pdf", "docx", "eml", "parquet"]
)
def test_empty_files(file: Any, ending: str) -> None:
    assert reason(file(f"空.{ending}", b"")) == "is empty"


def test_what_was_read_before_the_damage_is_kept(file: Any) -> None:
    rows = "".join(json.dumps({"text": f"{number} {'字' * (number % 50)}"}) + "\n" for number in range(20_000))
    packed = gzip.compress(rows.encode())
    documents, (damage,) = read(file("a.jsonl.gz", packed[: len(packed) // 2]))
    assert 5000 < len(documents) < 15_000
    assert "damaged or cut short" in damage.reason
    packed = gzip.compress((MODERN * 9000).encode() + bytes(range(128)) * 9)
    (document,), (damage,) = read(file("b.txt.gz", packed[:-40]))
    assert document.text.startswith(MODERN * 1000)
    assert "damaged or cut short" in damage.reason


def test_members_of_archives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import bimo.data.sources as sources

    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("1.txt", MODERN.encode("gbk"))
        archive.writestr("2.jsonl.gz", gzip.compress('{"text": "二"}\n'.encode()))
        archive.writestr("3.txt", "x" * 5000)
        archive.writestr("4.zip", b"PK")
    monkeypatch.setattr(sources, "MAX_MEMBER_BYTES", 4000)
    documents, damages = read(path)
    assert [document.text for document in documents] == [MODERN.strip(), "二"]
    assert [(damage.id, damage.bytes) for damage in damages] == [("源/a.zip/3.txt", 5000), ("源/a.zip/4.zip", 2)]
    assert "unpacks to more than" in damages[0].reason
    assert "unknown kind" in damages[1].reason
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("1.txt", "good text here")
        archive.writestr("2.txt", "other text")
    path.write_bytes(path.read_bytes().replace(b"good text", b"evil text", 1))
    documents, (damage,) = read(path)
    assert [document.text for document in documents] == ["other text"]
    assert "damaged" in damage.reason


def test_a_file_that_vanishes(file: Any) -> None:
    path = file("a.txt", POEM)
    recipe = SourceRecipe(name="源", path=str(path))
    (listed,) = files_of(recipe, lambda *step: None)
    path.unlink()
    (damage,) = read_file(listed, recipe)
    assert isinstance(damage, Damage)
    assert "is gone" in damage.reason
    (damage,) = read_file(SourceFile(path.parent / "x.zip", "x.zip/a.txt", "a.txt"), recipe)
    assert isinstance(damage, Damage)
    assert "is gone" in damage.reason


def test_a_format_that_is_named_wins(file: Any) -> None:
    assert texts(file("poem.dat", POEM.encode("gbk")), format="txt") == [POEM.strip()]
    assert texts(file("rows.log", '{"text": "一"}\n'), format="jsonl") == ["一"]
    assert texts(file("poem.txt.gz", gzip.compress(POEM.encode()))) == [POEM.strip()]


# --- lines with fields, parallel pages --------------------------------------------------------------------------------


def test_lines_that_a_pattern_parts(file: Any) -> None:
    wordnet = (
        "  1 This software and database is being provided to you\n"
        "00001740 03 n 01 entity 0 003 ~ 00001930 n 0000 | that which is perceived\n"
        "\n"
        "00001930 03 n 01 river 0 001 @ 00001740 n 0000 | 河流 | a stream\n"
        "broken"
    )
    settings = {
        "format": "txt",
        "line": r"^(?P<number>\d{8}) .*? \| (?P<gloss>.*)",
        "text": "{number}: {gloss}",
    }
    documents, (damage,) = read(file("data.noun", wordnet), **settings)
    assert [(document.id, document.text) for document in documents] == [
        ("源/data.noun#1", "00001740: that which is perceived"),
        ("源/data.noun#3", "00001930: 河流 | a stream"),
    ]
    assert damage.reason == "has lines that the source's `line` does not fit: 2, the first is number 1"
    assert reason(file("blank.noun", "\n\n"), **settings) == "holds no text"


ENGLISH_PAGE = """<html><title>Keys</title><body><nav><p id="n">Home</p></nav>
<h1 id="hd_1"><a name="x"></a>Shortcut
   keys</h1><p id="p1">Press <b>Ctrl</b>, or <span><i hidden>Command</i><i hidden>Alt</i></span>.</p>
<ul><li id="li1"><p id="p2">First</p></li><li id="li2">Second &lt;b&gt;</li></ul>
<p id="p3">Only English</p><p id="p4">  </p><p>No id</p><p id="twice">one</p><p id="twice">two</p></body></html>"""
CHINESE_PAGE = """<html><body><nav><p id="n">首页</p></nav>
<p id="p2">第一</p><h1 id="hd_1">快捷
键</h1><p id="p1">按 <b>Ctrl</b> 或 <span><i hidden>Command</i><i hidden>Alt</i></span>。</p>
<p id="li2">第二 &lt;b&gt;</p><p id="p4">多余</p><p id="twice">一</p><p id="twice">二</p></body></html>"""


@pytest.fixture
def pages(tmp_path: Path) -> Path:
    for name, page in (("en/a/1.html", ENGLISH_PAGE), ("zh/a/1.html", CHINESE_PAGE)):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(page, encoding="utf-8")
    return tmp_path


def test_paragraphs_with_the_same_id_are_pairs(pages: Path) -> None:
    documents, damages = read(pages / "en", language="zh", parallel={"path": str(pages / "zh")})
    found = {document.id: tuple(message.content for message in document.messages) for document in documents}
    assert found == {
        "源/a/1.html#hd_1": ("Shortcut keys", "快捷键"),
        "源/a/1.html#p1": ("Press Ctrl, or Alt.", "按 Ctrl 或 Alt。"),
        "源/a/1.html#p2": ("First", "第一"),
        "源/a/1.html#li2": ("Second <b>", "第二 <b>"),
        "源/a/1.html#twice": ("one", "一"),
        "源/a/1.html#twice@2": ("two", "二"),
    }
    first = documents[0]
    assert [message.role for message in first.messages] == ["user", "assistant"]
    assert (first.text, first.language, first.title) == ("Shortcut keys\n快捷键", "zh", "Keys")
    assert {document.group for document in documents} == {"源/a/1.html"}
    assert [damage.reason for damage in damages] == [
        "has paragraphs whose id the twin has not: 1, the first is number 5",
        "has in its twin paragraphs whose id it has not: 1, the first is number 5",
    ]


def test_twins_that_are_missing_or_broken_are_counted(pages: Path) -> None:
    (pages / "en/b.html").write_text(ENGLISH_PAGE, encoding="utf-8")
    (pages / "en/c.html").write_text(ENGLISH_PAGE, encoding="utf-8")
    (pages / "zh/c.html").write_bytes(bytes(range(256)) * 50)
    (pages / "en/d.html").write_text("")
    (pages / "zh/d.html").write_text(CHINESE_PAGE, encoding="utf-8")
    (pages / "en/e.txt").write_text("no page")
    documents, damages = read(pages / "en", parallel={"path": str(pages / "zh")})
    assert {document.group for document in documents} == {"源/a/1.html"}
    reasons = {damage.id: damage.reason for damage in damages if "a/1" not in damage.id}
    assert reasons == {
        "源/b.html": f"has no twin in {pages / 'zh'}",
        "源/c.html": "has a twin that is not text",
        "源/d.html": "is empty",
        "源/e.txt": "is no HTML page: parallel documents are",
    }


def test_of_hidden_alternatives_the_last_is_shown(file: Any) -> None:
    page = "<body><p>Choose <span><b hidden>Preferences</b> <b hidden>Options</b></span>.</p><p hidden>x</p>{}</body>"
    assert texts(file("a.html", page.format(""))) == ["Choose Options."]
    with_text = page.format("<div>text <i hidden>a</i><i hidden>b</i></div>")
    assert texts(file("b.html", with_text)) == ["Choose Options.\ntext"]
