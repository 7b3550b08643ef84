"""Folders of known contents through the whole pipeline: what comes out is what was planted, however it is run."""

from __future__ import annotations

import errno
import gzip
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
import pytest

from bimo.cli.main import main
from bimo.data import pipeline
from bimo.data.documents import read_documents
from bimo.data.pipeline import Prepared, prepare
from bimo.data.records import Document
from bimo.errors import DataError
from bimo.recipe import DataRecipe

WORDS = re.findall(
    "[a-z]+",
    """the of and to in that was for with as his on be at by had not are but from or have an they which one you were her
    all she there would their we him been has when who will more no if out so said what up its about into than them can
    only harbour window letter river market summer garden teacher engine paper silver mountain question answer""",
)
HAN = (
    "的一是在不了有和人这中大为上个国我以要他时来用们生到作地于出就分对成会可主发年动同工也能下过子说产种面而方后多定行学法所"
    "民得经十三之进着等部度家电力里如水化高自二理起小物现实加量都两体制机当使点从业本去把性好应开它合还因由其些然前外天政四日"
)
DOCX = {
    "[Content_Types].xml": (
        '<Types xmlns="http://schemas.openxmlformats.org/package/2006/content-types"><Default Extension="rels" '
        'ContentType="application/vnd.openxmlformats-package.relationships+xml"/>'
        '<Override PartName="/word/document.xml" '
        'ContentType="application/vnd.openxmlformats-officedocument.wordprocessingml.document.main+xml"/></Types>'
    ),
    "_rels/.rels": (
        '<Relationships xmlns="http://schemas.openxmlformats.org/package/2006/relationships"><Relationship Id="r" '
        'Type="http://schemas.openxmlformats.org/officeDocument/2006/relationships/officeDocument" '
        'Target="word/document.xml"/></Relationships>'
    ),
    "word/document.xml": (
        '<w:document xmlns:w="http://schemas.openxmlformats.org/wordprocessingml/2006/main"><w:body><w:p><w:r><w:t>{}'
        "</w:t></w:r></w:p></w:body></w:document>"
    ),
}
BIMO = [sys.executable, "-m", "bimo.cli.main"]


def english(seed: object, words: int = 60) -> str:
    chosen = random.Random(f"en {seed}").choices(WORDS, k=words)
    return " ".join(chosen).capitalize() + "."


def chinese(seed: object, characters: int = 90) -> str:
    chosen = random.Random(f"zh {seed}").choices(HAN, k=characters)
    return "，".join("".join(chosen[place : place + 15]) for place in range(0, characters, 15)) + "。"


def make(path: Path, content: str | bytes | list[dict[str, str]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, list):
        content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in content)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def recipe(*paths: Path, clean: dict[str, Any] | None = None, source: dict[str, Any] | None = None, **data: Any) -> Any:
    sources = [{"name": path.stem, "path": str(path), **(source or {})} for path in paths]
    return DataRecipe.model_validate({"sources": sources, "clean": clean or {}, **data})


def documents(prepared: Prepared, split: str = "train") -> list[Document]:
    return list(read_documents(prepared.files(split)))


def totals(prepared: Prepared, what: str) -> dict[str, int]:
    """{step: documents}, over all sources and languages."""
    found: Counter[str] = Counter()
    for row in prepared.manifest["counts"]:
        if row["what"] == what:
            found[row["step"]] += row["documents"]
    return {step: count for step, count in found.items() if count}


def contents(folder: Path) -> dict[str, bytes]:
    """All that a run leaves, byte by byte, without its workshop."""
    files = [*folder.glob("documents/*"), folder / "manifest.json", folder / "manifest.html"]
    return {file.name: file.read_bytes() for file in files}


def finished(folder: Path) -> dict[str, int]:
    """When each unit was finished."""
    return {file.parent.name: file.stat().st_mtime_ns for file in folder.glob("work/*/cleaned.json")}


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """What is in it is said by `test_what_was_planted_comes_out`."""
    folder = tmp_path / "mixed"
    make(folder / "a.txt", english("a"))
    make(folder / "b.md", f"# A title\n\n{english('b')}\n")
    make(folder / "c.jsonl", [{"text": english("c0")}, {"text": chinese("c1")}])
    make(folder / "d.csv", f'id,text\n1,"{english("d0")}"\n2,"{chinese("d1")}"\n')
    make(folder / "e.html", f"<html><title>Page</title><body><nav>Home</nav><p>{english('e')}</p></body></html>")
    make(folder / "f.txt.gz", gzip.compress(chinese("f").encode()))
    make(folder / "g.txt", chinese("g").encode("gbk"))
    with zipfile.ZipFile(folder / "h.docx", "w") as archive:
        for name, text in DOCX.items():
            archive.writestr(name, text.format(chinese("h")) if "{}" in text else text)
    make(folder / "moji.txt", english("moji") + " cafÃ© crÃ¨me, naÃ¯ve rÃ´le")
    make(folder / "traditional.txt", chinese("trad") + "頭髮發現後來說話")
    make(folder / "wide.txt", chinese("wide") + "电话Ａ１２３")
    make(folder / "mail.txt", english("mail") + " Write to zhang.san@example.com")
    make(folder / "markup.txt", english("markup") + "<br><b>bold</b> words &amp; more")
    make(folder / "control.txt", english("con") + "\u200b\x07" + english("trol"))
    make(folder / "short.txt", "太短了")
    make(folder / "symbols.txt", "-> ## ** ~~ %% @! ?> <| {} [] () // \\\\ ab cd")
    make(folder / "zero.txt", "\u200b\u200c\ufeff" * 20)
    make(folder / "x-copy.txt", english("a").upper().replace(" ", "  "))
    make(folder / "x-near.txt", chinese("f")[:60] + "龙" + chinese("f")[61:])
    make(folder / "y-cut.txt.gz", gzip.compress(english("cut", 2000).encode())[:12])
    make(folder / "y-torn.parquet", b"PAR1 and nothing more")
    make(folder / "y-empty.txt", "")
    make(folder / "y-unknown.xyz", "text")
    return folder


def test_what_was_planted_comes_out(mixed: Path, tmp_path: Path) -> None:
    prepared = prepare(recipe(mixed, validation=0), tmp_path / "out")
    found = {document.id.removeprefix("mixed/"): document for document in documents(prepared)}
    text = {name: document.text for name, document in found.items()}
    assert text == {
        "a.txt": english("a"),
        "b.md": f"# A title\n\n{english('b')}",
        "c.jsonl#0": english("c0"),
        "c.jsonl#1": chinese("c1"),
        "d.csv#0": english("d0"),
        "d.csv#1": chinese("d1"),
        "e.html": english("e"),
        "f.txt.gz": chinese("f"),
        "g.txt": chinese("g"),
        "h.docx": chinese("h"),
        "moji.txt": english("moji") + " café crème, naïve rôle",
        "traditional.txt": chinese("trad") + "头发发现后来说话",
        "wide.txt": chinese("wide") + "电话A123",
        "mail.txt": english("mail") + " Write to [EMAIL]",
        "markup.txt": english("markup") + "\nbold words & more",
        "control.txt": english("con") + english("trol"),
    }
    assert found["b.md"].title == "A title"
    assert {name: document.language for name, document in found.items()} == {
        name: "zh" if re.search("[一-龥]", document.text) else "en" for name, document in found.items()
    }
    assert {document.source for document in found.values()} == {"mixed"}

    assert totals(prepared, "read") == {"read": 21}
    assert totals(prepared, "kept") == {"train": 16}
    assert totals(prepared, "dropped") == {
        "empty": 1, "min_chars": 1, "quality": 1, "exact_duplicates": 1, "near_duplicates": 1,
    }  # fmt: skip
    assert totals(prepared, "changed") == {
        "mojibake": 1, "unicode": 2, "markup": 1, "full_width": 1, "simplified": 1, "personal_data": 1,
    }  # fmt: skip
    damages = {damage["id"]: damage["reason"] for damage in prepared.manifest["damages"]}
    assert list(damages) == [f"mixed/y-{name}" for name in ("cut.txt.gz", "empty.txt", "torn.parquet", "unknown.xyz")]
    for name, words in {"cut.txt.gz": "cut short", "empty.txt": "empty", "unknown.xyz": "unknown kind"}.items():
        assert words in damages[f"mixed/y-{name}"]
    assert prepared.manifest["num_damages"] == 4


def test_the_page_and_the_manifest_agree(mixed: Path, tmp_path: Path) -> None:
    prepared = prepare(recipe(mixed, validation=0.3), tmp_path / "out")
    assert json.loads((tmp_path / "out" / "manifest.json").read_text(encoding="utf-8")) == prepared.manifest
    page = (tmp_path / "out" / "manifest.html").read_text(encoding="utf-8")
    for what in ("read", "changed", "dropped", "kept"):
        for step, count in totals(prepared, what).items():
            assert f'<td>{what}<td>{step}<td class="n">{count}<' in page
    for damage in prepared.manifest["damages"]:
        assert f"<td>{damage['id']}<td>" in page
    for row in prepared.manifest["reasons"]:
        assert f'<td>{row["step"]}<td>{row["reason"]}<td class="n">{row["documents"]}<' in page
    # the share that was kept, of each language: from the counts, as it stands in the page
    for language in ("zh", "en"):
        sums = Counter[str]()
        for row in prepared.manifest["counts"]:
            if row["language"] == language:
                sums[row["what"]] += row["characters"]
        share = f"{sums['kept'] / sums['read']:.1%}"
        assert re.search(rf"<td>mixed<td>{language}<td.*{re.escape(share)}", page)
    assert "<b>bold</b>" not in page  # examples are shown, not rendered
    assert "&lt;b&gt;bold&lt;/b&gt;" in page


def test_ten_examples_of_each_step_and_of_every_source(tmp_path: Path) -> None:
    sources = [
        make(tmp_path / f"{name}.jsonl", [{"text": f"{name} {place}"} for place in range(40)])
        for name in ("one", "two")
    ]
    manifest = prepare(recipe(*sources), tmp_path / "out", workers=1).manifest
    assert {row["reason"]: row["documents"] for row in manifest["reasons"]} == {"too few characters": 80}
    ids = [example["id"] for example in manifest["examples"]["min_chars"]]
    assert ids == [f"{name}/{name}.jsonl#{place}" for place in range(5) for name in ("one", "two")]


@pytest.fixture
def many(tmp_path: Path) -> list[Path]:
    """Three sources of 40 documents each, half of them Chinese."""
    return [
        make(
            tmp_path / f"s{number}.jsonl",
            [{"text": (chinese if place % 2 else english)(f"{number}-{place}")} for place in range(40)],
        )
        for number in range(3)
    ]


def test_validation_is_a_part_that_does_not_change(many: list[Path], tmp_path: Path) -> None:
    prepared = prepare(recipe(*many, validation=0.25), tmp_path / "all", workers=1)
    train, validation = ({d.text for d in documents(prepared, split)} for split in ("train", "validation"))
    assert len(train) + len(validation) == 120
    assert not train & validation
    assert 15 <= len(validation) <= 45
    assert prepared.manifest["leaks"] == {"num_checked": len(validation), "leaked": []}
    # of fewer sources, in another order, under another name: the same documents
    other = many[2].rename(tmp_path / "other.jsonl")
    again = prepare(recipe(other, many[0], validation=0.25), tmp_path / "some", workers=1)
    assert {d.text for d in documents(again, "validation")} == {
        d.text for d in documents(prepared, "validation") if d.source != "s1"
    }
    for share, split in ((0.0, "train"), (1.0, "validation")):
        whole = prepare(recipe(many[1], validation=share), tmp_path / f"all-{split}", workers=1)
        assert totals(whole, "kept") == {split: 40}


@pytest.fixture
def leaky(tmp_path: Path) -> Path:
    """30 short documents, each of them quoted whole in a long one."""
    rows = [{"text": english(place, 40)} for place in range(30)]
    rows += [{"text": f"{english(f'l{place}', 100)} {english(place, 40)} {chinese(place)}"} for place in range(30)]
    return make(tmp_path / "leaky.jsonl", rows)


@pytest.mark.parametrize("leaks", ["drop", "warn", "stop"])
def test_leaks(leaky: Path, tmp_path: Path, leaks: str) -> None:
    prepared = prepare(recipe(leaky, validation=0.3, leaks=leaks), tmp_path / "out")
    free = prepare(recipe(leaky, validation=0.3, leaks="warn"), tmp_path / "free")
    validation, training = documents(free, "validation"), "\n".join(d.text for d in documents(free))
    planted = [d.id for d in validation if d.text in training]
    assert 3 <= len(planted) < len(validation)
    assert prepared.manifest["leaks"] == {"num_checked": len(validation), "leaked": planted}
    left = [d.id for d in documents(prepared, "validation")]
    if leaks == "drop":
        assert left == [d.id for d in validation if d.id not in planted]
        assert totals(prepared, "dropped") == {"leaks": len(planted)}
        shown = {example["id"] for example in prepared.manifest["examples"]["kept: validation"]}
        assert not shown & set(planted)
    else:
        assert left == [d.id for d in validation]
    assert totals(prepared, "kept") == {"train": len(documents(prepared)), "validation": len(left)}
    counted = {part["split"]: part["documents"] for part in prepared.manifest["parts"]}
    assert counted == totals(prepared, "kept")
    assert f"{len(planted)} of {len(validation)}" in (tmp_path / "out" / "manifest.html").read_text(encoding="utf-8")


def test_any_number_of_workers_gives_the_same(mixed: Path, many: list[Path], tmp_path: Path) -> None:
    wanted = recipe(mixed, *many, validation=0.2, passage_chars=50)
    for workers in (1, 2):
        prepare(wanted, tmp_path / f"out{workers}", workers=workers)
    one = contents(tmp_path / "out1")
    assert one == contents(tmp_path / "out2")
    assert len(one) == 2 + 2 * 4
    # a second run does nothing
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "out1").rglob("*") if path.name != ".lock"}
    prepare(wanted, tmp_path / "out1", workers=2)
    assert times == {path: path.stat().st_mtime_ns for path in times}


def test_settings_that_come_back_do_not_bring_other_files_with_them(many: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    first, second = recipe(*many, validation=0), recipe(*many, validation=0, passage_chars=30)
    prepare(first, out, workers=1)
    wanted = contents(out)

    def stop(label: str, done: int, total: int) -> None:
        if label == "writing" and done == total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(second, out, workers=1, progress=stop)
    assert {d.text for d in documents(prepare(first, out, workers=1))} == {
        d.text for d in documents(Prepared(out, json.loads(wanted["manifest.json"])))
    }
    assert contents(out) == wanted


def test_a_file_that_changed_is_done_again_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, out = tmp_path / "texts", tmp_path / "out"
    for place in range(60):
        make(folder / f"{place:02}.txt", english(place))
    monkeypatch.setattr(pipeline, "UNIT_BYTES", 3000)
    prepare(recipe(folder, validation=0), out, workers=1)
    before = finished(out)
    assert len(before) >= 5
    make(folder / "30.txt", english("another", 90))
    (folder / "07.txt").unlink()
    make(folder / "00a.txt", english("new"))
    prepared = prepare(recipe(folder, validation=0), out, workers=1)
    after = finished(out)
    kept = {name for name in before if before[name] == after.get(name)}
    assert len(before) - 4 <= len(kept) < len(before)
    texts = {d.text for d in documents(prepared)}
    assert {english("another", 90), english("new")} <= texts
    assert not {english(30), english(7)} & texts
    assert len(texts) == 60
    # what later steps do with units is no reason to make them again
    clean = {"near_duplicates": 1.0, "exact_duplicates": False}
    prepare(recipe(folder, clean=clean, source={"weight": 3.0}, validation=0.5), out, workers=1)
    assert finished(out) == after


def test_a_list_of_words_that_changed_counts(tmp_path: Path) -> None:
    words = make(tmp_path / "words.txt", "harbour\n")
    source = make(tmp_path / "a.jsonl", [{"text": "harbour " * 2 + english(1)}, {"text": english(2)}])
    wanted = recipe(source, clean={"toxic": 0.01, "toxic_words": [str(words)]}, validation=0)
    assert totals(prepare(wanted, tmp_path / "out"), "dropped")["toxic"] >= 1
    make(words, "nosuchword\n")
    assert totals(prepare(wanted, tmp_path / "out"), "dropped") == {}


OFF: dict[str, Any] = {
    **dict.fromkeys(
        ("mojibake", "unicode", "markup", "full_width", "simplified", "quality", "exact_duplicates"), False
    ),
    "min_chars": 0,
    "personal_data": "keep",
    "near_duplicates": 1.0,
}
RAW = {
    "mojibake": "cafÃ© " + english(1),
    "unicode": "e\u0301te\u200b " + english(2),
    "markup": "<p>one</p> " + english(3),
    "full_width": "１２３，" + chinese(4),
    "simplified": "頭髮 " + chinese(5),
    "personal_data": "a@example.com " + english(6),
    "min_chars": "短",
    "quality": "！" * 30,
    "exact_duplicates": english(7),
}


def test_every_step_can_be_switched_off(tmp_path: Path) -> None:
    source = make(tmp_path / "a.jsonl", [{"text": text} for text in (*RAW.values(), RAW["exact_duplicates"])])
    prepared = prepare(recipe(source, clean=OFF, validation=0), tmp_path / "off")
    assert [d.text for d in documents(prepared)] == [*RAW.values(), RAW["exact_duplicates"]]
    assert totals(prepared, "changed") == totals(prepared, "dropped") == {}


@pytest.mark.parametrize("step", RAW)
def test_every_step_works_alone(tmp_path: Path, step: str) -> None:
    rows = [{"text": text} for text in (*RAW.values(), RAW["exact_duplicates"])]
    source = make(tmp_path / "a.jsonl", rows)
    on = {"min_chars": 5, "personal_data": "mask"}.get(step, True)
    prepared = prepare(recipe(source, clean={**OFF, step: on}, validation=0), tmp_path / "out", workers=1)
    done = {**totals(prepared, "changed"), **totals(prepared, "dropped")}
    assert done == {step: 1}
    left = [d.text for d in documents(prepared)]
    if step == "exact_duplicates":
        assert left == list(RAW.values())
    else:
        assert RAW[step] not in left
        assert [text for name, text in RAW.items() if name != step and text not in left] == []


def test_long_documents_become_passages(tmp_path: Path) -> None:
    long = "\n\n".join([english("p1", 100), chinese("p2", 300), english("p3", 100)])
    source = make(tmp_path / "a.jsonl", [{"text": long, "title": "标题"}, {"text": english("short", 20)}])
    prepared = prepare(recipe(source, validation=0, passage_chars=200), tmp_path / "out")
    *pieces, short = documents(prepared)
    assert "".join(piece.text for piece in pieces) == long
    assert all(len(piece.text) <= 200 for piece in pieces)
    assert [piece.id for piece in pieces] == [f"a/a.jsonl#0/{place}" for place in range(len(pieces))]
    assert {piece.title for piece in pieces} == {"标题"}
    assert short.text == english("short", 20)
    assert totals(prepared, "changed") == {"passages": 1}
    assert totals(prepared, "kept") == {"train": len(pieces) + 1}


def test_dialogues_keep_their_turns(tmp_path: Path) -> None:
    rows = [
        {"q": "你好，我的邮箱是 a@example.com", "a": "好的，<b>知道</b>了"},
        {"q": "八仙過海", "a": "各顯神通"},
        {"q": english("q", 100), "a": "Yes."},
    ]
    source = make(tmp_path / "talk.jsonl", rows)
    wanted = recipe(source, source={"prompt": "{q}", "answer": "{a}"}, validation=0, passage_chars=50)
    found = documents(prepare(wanted, tmp_path / "out"))
    assert [document.messages for document in found] == [
        (("user", "你好，我的邮箱是 [EMAIL]"), ("assistant", "好的，知道了")),
        (("user", "八仙过海"), ("assistant", "各显神通")),
        (("user", english("q", 100)), ("assistant", "Yes.")),
    ]
    assert all(document.text == "\n".join(turn.content for turn in document.messages) for document in found)


def page(rows: dict[str, str]) -> str:
    return "<html><body>" + "".join(f'<p id="{key}">{text}</p>' for key, text in rows.items()) + "</body></html>"


@pytest.fixture
def translated(tmp_path: Path) -> Path:
    """200 pages in two languages; on each five sentences of its own, one of all pages, and one that nobody translated.
    Pages 3 and 4 have a sentence in common, which they translate differently."""
    for number in range(200):
        own = {f"p{place}": (english((number, place), 8), chinese((number, place), 12)) for place in range(5)}
        rows = own | {"all": ("Click OK.", "单击“确定”。"), "same": (f"=SUM({number})", f"「=SUM({number})」")}
        if number in (3, 4):
            rows["both"] = ("Opens a window.", ("打开窗口。", "开启一扇视窗。")[number - 3])
        make(tmp_path / "en-US" / f"{number}.html", page({key: one for key, (one, _) in rows.items()}))
        make(tmp_path / "zh-CN" / f"{number}.html", page({key: other for key, (_, other) in rows.items()}))
    return tmp_path


def pairs(folder: Path, **data: Any) -> Any:
    twin = {"path": str(folder), "replace": ["en-US", "zh-CN"]}
    source = {"files": ["en-US/*.html"], "language": "zh", "parallel": twin}
    return recipe(folder, source=source, **data)


def test_pairs_of_a_page_stay_together(translated: Path, tmp_path: Path) -> None:
    prepared = prepare(pairs(translated, validation=0.2, leaks="drop"), tmp_path / "run", workers=1)
    train, validation = documents(prepared), documents(prepared, "validation")
    groups = [{document.group for document in part} for part in (train, validation)]
    assert not groups[0] & groups[1]
    assert len(groups[0] | groups[1]) == 200
    assert 20 <= len(groups[1]) <= 60
    assert totals(prepared, "dropped")["untranslated"] == 200
    assert totals(prepared, "dropped")["exact_duplicates"] == 199
    assert sum(document.prompt == "Click OK." for document in train + validation) == 1
    assert len(train) + len(validation) == 1000 + 1 + 2 - totals(prepared, "dropped").get("leaks", 0)
    assert prepared.manifest["num_damages"] == 0
    for document in train + validation:
        question, answer = document.messages
        assert document.text == f"{question.content}\n{answer.content}"
        assert document.language == "zh"


def test_a_pair_whose_source_stands_in_training_leaves_validation(translated: Path, tmp_path: Path) -> None:
    """Of pages 3 and 4, one is for validation at some share."""
    for share in range(5, 100, 5):
        prepared = prepare(pairs(translated, validation=share / 100, leaks="warn"), tmp_path / "run", workers=1)
        held_out = {document.group.rpartition("/")[2] for document in documents(prepared, "validation")}
        if len(held_out & {"3.html", "4.html"}) == 1:
            break
    leaked = prepared.manifest["leaks"]["leaked"]
    assert [name.rpartition("#")[2] for name in leaked] == ["both"]
    dropped = prepare(pairs(translated, validation=share / 100, leaks="drop"), tmp_path / "other", workers=1)
    assert totals(dropped, "dropped")["leaks"] == 1
    assert "Opens a window." not in {document.prompt for document in documents(dropped, "validation")}


def test_the_same_question_is_not_divided(tmp_path: Path) -> None:
    rows = [{"question": f"问题{n // 4}：{chinese(n // 4, 8)}", "answer": chinese(("a", n), 20)} for n in range(800)]
    file = make(tmp_path / "qa.jsonl", rows)
    asked = {"prompt": "{question}", "answer": "{answer}"}
    prepared = prepare(recipe(file, source=asked, validation=0.3), tmp_path / "run", workers=1)
    train, validation = documents(prepared), documents(prepared, "validation")
    assert len(train) + len(validation) == 800
    assert 30 <= len({document.prompt for document in validation}) <= 90
    assert not {document.prompt for document in train} & {document.prompt for document in validation}
    assert prepared.manifest["leaks"]["leaked"] == []


def test_a_twin_that_changed_is_read_again(translated: Path, tmp_path: Path) -> None:
    settings = pairs(translated, validation=0)
    before = {document.id: document.text for document in documents(prepare(settings, tmp_path / "run", workers=1))}
    changed = chinese("another", 12)
    make(translated / "zh-CN" / "7.html", page({"p0": changed}))
    prepared = prepare(settings, tmp_path / "run", workers=1)
    after = {document.id: document.text for document in documents(prepared)}
    assert {name for name in before if name not in after} == {
        f"{translated.name}/en-US/7.html#p{n}" for n in (1, 2, 3, 4)
    }
    assert [after[name].split("\n")[1] for name in after if after[name] != before[name]] == [changed]
    assert prepared.manifest["num_damages"] == 1


@pytest.mark.parametrize(
    ("language", "expected"), [("zh", "学习电脑设定"), ("ja", "學習電腦設定"), (None, "学习电脑设定")]
)
def test_only_chinese_becomes_simplified(tmp_path: Path, language: str | None, expected: str) -> None:
    file = make(tmp_path / "a.jsonl", [{"text": "學習電腦設定"}])
    source = {"language": language} if language else {}
    prepared = prepare(recipe(file, source=source, clean={"min_chars": 2}, validation=0), tmp_path / "run", workers=1)
    assert [document.text for document in documents(prepared)] == [expected]


def test_tags_that_a_page_shows_stay(tmp_path: Path) -> None:
    text = "Write &lt;br&gt; for a new line, and &amp;eacute; for an accent; it stands in the text of the page."
    make(tmp_path / "a" / "1.html", f"<body><p>{text}</p><p>Back to top</p></body>")
    make(
        tmp_path / "a" / "2.txt",
        "<p>Of a plain text the <b>tags</b> are left over, and go with all that they hold.</p>",
    )
    prepared = prepare(recipe(tmp_path / "a", validation=0), tmp_path / "run", workers=1)
    assert [document.text for document in documents(prepared)] == [
        "Write <br> for a new line, and &eacute; for an accent; it stands in the text of the page.",
        "Of a plain text the tags are left over, and go with all that they hold.",
    ]


def test_mojibake_is_mended_before_its_language_is_found(tmp_path: Path) -> None:
    broken = chinese("m").encode().decode("latin-1")
    source = make(tmp_path / "a.jsonl", [{"text": broken}])
    (found,) = documents(prepare(recipe(source, clean={"languages": ["zh"]}, validation=0), tmp_path / "out"))
    assert (found.text, found.language) == (chinese("m"), "zh")


def test_a_file_that_vanishes_after_it_was_listed(tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    kept, gone = make(folder / "a.txt", english("a")), make(folder / "b.txt", english("b"))

    def vanish(label: str, done: int, total: int) -> None:
        if label == "cleaning":
            gone.unlink(missing_ok=True)

    prepared = prepare(recipe(folder, validation=0), tmp_path / "out", workers=1, progress=vanish)
    assert [d.text for d in documents(prepared)] == [kept.read_text()]
    (damage,) = prepared.manifest["damages"]
    assert damage["id"] == "texts/b.txt"
    assert "gone" in damage["reason"]


@pytest.mark.parametrize("place", ["os.replace", "pyarrow.parquet.ParquetWriter.write_table"])
def test_a_full_disk_is_one_sentence_and_work_goes_on_afterwards(
    many: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    import pyarrow.parquet

    wanted, out = recipe(*many, validation=0.2), tmp_path / "out"
    prepare(wanted, tmp_path / "whole", workers=1)
    owner: Any = {"os.replace": os, "pyarrow.parquet.ParquetWriter.write_table": pyarrow.parquet.ParquetWriter}[place]
    name = place.rpartition(".")[2]
    calls, real = 0, getattr(owner, name)

    def full(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, full)
        with pytest.raises(DataError, match=r"cannot be written \(No space left on device\): free some space"):
            prepare(wanted, out, workers=1)
    done = finished(out)
    assert len(done) == 2
    assert not (out / "manifest.json").exists()
    prepare(wanted, out, workers=1)
    assert {name: finished(out)[name] for name in done} == done
    assert contents(out) == contents(tmp_path / "whole")


@pytest.fixture
def small_disk(tmp_path: Path) -> Any:
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(place)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small disk needs root")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


def test_a_disk_that_is_really_full(small_disk: Path, tmp_path: Path) -> None:
    rows = [{"text": (chinese if place % 2 else english)(place)} for place in range(1500)]
    sources = [make(tmp_path / f"s{part}.jsonl", rows[part * 500 : part * 500 + 500]) for part in range(3)]
    wanted = recipe(*sources, validation=0.1)
    with pytest.raises(DataError, match=r"No space left on device.*free some space") as caught:
        prepare(wanted, small_disk / "out", workers=2)
    assert "\n" not in str(caught.value)
    assert not (small_disk / "out" / "manifest.json").exists()
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    prepare(wanted, small_disk / "out", workers=2)
    prepare(wanted, tmp_path / "out", workers=1)
    assert contents(small_disk / "out") == contents(tmp_path / "out")


@pytest.mark.parametrize("workers", [1, 2])
def test_a_run_that_was_killed_goes_on(tmp_path: Path, workers: int) -> None:
    lines = ['name = "killed"\n[data]\nvalidation = 0.1']
    for number in range(6):
        rows = [{"text": (chinese if place % 2 else english)(f"{number}-{place}")} for place in range(400)]
        file = make(tmp_path / f"s{number}.jsonl", rows)
        lines.append(f'[[data.sources]]\nname = "s{number}"\npath = "{file.name}"')
    file = make(tmp_path / "recipe.toml", "\n".join(lines))
    command = [*BIMO, "data", "prepare", str(file), "--workers", str(workers), "--out"]
    out = tmp_path / "killed" / "data"
    process = subprocess.Popen([*command, str(out.parent)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while len(finished(out)) < 2 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    family = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGKILL)
    process.wait()
    _, alive = psutil.wait_procs(family, timeout=20)
    assert not alive, "its processes outlive it"
    done = finished(out)
    assert 2 <= len(done) < 6
    assert not (out / "manifest.json").exists()

    for folder in (out.parent, tmp_path / "whole"):
        assert main([*command[len(BIMO) :], str(folder), "--workers", "1"]) == 0
    after = finished(out)
    assert len(after) == 6
    assert {name: after[name] for name in done} == done
    assert not [place.name for place in (out / "work").iterdir() if place.name.startswith(".") and place.is_dir()]
    assert contents(out) == contents(tmp_path / "whole" / "data")


@pytest.mark.parametrize("name", ["work/*/documents.parquet", "work/*/signatures.bin", "documents/train-00000.parquet"])
def test_a_torn_file_is_made_again(many: list[Path], tmp_path: Path, name: str) -> None:
    out = tmp_path / "out"
    prepare(recipe(*many), out, workers=1)
    whole = contents(out)
    file = sorted(out.glob(name))[0]
    file.write_bytes(file.read_bytes()[:-20])
    if name.startswith("work"):
        (out / "manifest.json").unlink()
    prepare(recipe(*many), out, workers=1)
    assert contents(out) == whole


def test_two_runs_over_one_folder_wait_for_each_other(many: list[Path], tmp_path: Path) -> None:
    import threading

    out, said = tmp_path / "out", []
    wanted = recipe(*many)
    second = threading.Thread(
        target=lambda: prepare(wanted, out, workers=1, progress=lambda *step: said.append(step[0]))
    )

    def first(label: str, done: int, total: int) -> None:
        if label == "cleaning" and not done:
            second.start()
            while not said:
                time.sleep(0.001)

    prepare(wanted, out, workers=1, progress=first)
    second.join(30)
    assert said == ["waiting for another run over the same folder"]


def test_hostile_names_and_texts(tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    make(folder / "a b#'\"<i>.txt", english(1))
    Path(os.fsdecode(os.fsencode(folder) + b"/\xff\xfe.parquet")).write_bytes(b"PAR1")
    make(folder / "深/层/文.txt", chinese(2) + "\x07\u202e👨‍👩‍👧")
    make(folder / "huge.txt", english("huge", 250_000))
    prepared = prepare(recipe(folder, clean={"quality": False, "near_duplicates": 1}, validation=0), tmp_path / "out")
    found = {document.id: document.text for document in documents(prepared)}
    assert found["texts/a b#'\"<i>.txt"] == english(1)
    assert found["texts/深/层/文.txt"] == chinese(2) + "👨‍👩‍👧"
    assert sum(len(text) for name, text in found.items() if "huge" in name) >= 1_000_000
    assert prepared.manifest["num_damages"] == 1
    assert "<i>.txt" not in (tmp_path / "out" / "manifest.html").read_text(encoding="utf-8")


def test_nothing_at_all(tmp_path: Path) -> None:
    source = make(tmp_path / "a.txt", "")
    prepared = prepare(recipe(source), tmp_path / "out")
    assert documents(prepared) == documents(prepared, "validation") == []
    assert prepared.manifest["num_damages"] == 1
    shutil.rmtree(tmp_path / "out" / "work")
    assert prepare(recipe(source), tmp_path / "out").manifest == prepared.manifest
