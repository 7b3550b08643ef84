"""Every file of a source is listed once, in the same order, under a readable name; nothing is left out silently."""

from __future__ import annotations

import gzip
import os
import zipfile
from pathlib import Path

import pytest

from bimo.data import sources
from bimo.data.readers import read_file
from bimo.data.records import Damage, Document
from bimo.data.sources import SourceFile, files_of
from bimo.errors import UsageError
from bimo.recipe import SourceRecipe


def silent(label: str, done: int, total: int) -> None:
    """No progress."""


def source(path: Path | str, **settings: object) -> SourceRecipe:
    return SourceRecipe.model_validate({"name": "诗", "path": str(path), **settings})


def names(recipe: SourceRecipe) -> list[str]:
    return [file.name for file in files_of(recipe, silent)]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    root = tmp_path / "数据 [1]"  # brackets are no pattern when there is such a folder
    for name in ("唐/7.json", "唐/10.json", "宋/词.txt", "读我.md", ".git/config.txt", "宋/.hidden.txt", "宋/词.txt~"):
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("[]", encoding="utf-8")
    with zipfile.ZipFile(root / "宋" / "歇后语.zip", "w") as archive:
        archive.writestr("里面/歇后语.txt", "一丈厚的烧饼\t吃不透\n")
        archive.writestr("__MACOSX/._歇后语.txt", "x")
        archive.writestr("表.csv", "text\nx\n")
    return root


def test_a_folder(tree: Path) -> None:
    everything = names(source(tree))
    inside = "宋/歇后语.zip"
    assert everything == sorted(
        [
            "唐/10.json",
            "唐/7.json",
            "宋/词.txt",
            "宋/词.txt~",
            "读我.md",
            f"{inside}/里面/歇后语.txt",
            f"{inside}/表.csv",
        ]
    )


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("**/*.txt", ["宋/歇后语.zip/里面/歇后语.txt", "宋/词.txt"]),
        ("唐/*", ["唐/10.json", "唐/7.json"]),
        ("*", ["读我.md"]),
        ("宋/歇后语.zip", ["宋/歇后语.zip/表.csv", "宋/歇后语.zip/里面/歇后语.txt"]),
        ("宋/歇后语.zip/*", ["宋/歇后语.zip/表.csv"]),
        ("**/*.zip", ["宋/歇后语.zip/表.csv", "宋/歇后语.zip/里面/歇后语.txt"]),
        ("唐/[0-9].json", ["唐/7.json"]),
        ("**/词.tx?", ["宋/词.txt"]),
    ],
)
def test_patterns_of_files(tree: Path, pattern: str, expected: list[str]) -> None:
    assert names(source(tree, files=[pattern])) == sorted(expected)


def test_two_patterns_do_not_list_a_file_twice(tree: Path) -> None:
    assert names(source(tree, files=["唐/*", "**/*.json"])) == ["唐/10.json", "唐/7.json"]


def test_a_file_a_pattern_and_an_archive_as_path(tree: Path) -> None:
    assert names(source(tree / "读我.md")) == ["读我.md"]
    plain = tree.rename(tree.parent / "plain")
    assert names(source(plain / "**" / "*.json")) == ["唐/10.json", "唐/7.json"]
    assert names(source(plain / "宋" / "*.zip" / "**" / "*.csv")) == ["歇后语.zip/表.csv"]
    archive = plain / "宋" / "歇后语.zip"
    assert names(source(archive, files=["**/*.txt"])) == ["歇后语.zip/里面/歇后语.txt"]


def test_settings_without_effect_and_sources_without_files(tree: Path) -> None:
    for recipe, words in (
        (source(tree / "读我.md", files=["*.txt"]), "files has no effect"),
        (source(tree, sha256="0" * 64), "sha256 is for packages"),
        (source(tree, files=["**/*.pdf"]), r"no file that matches \*\*/\*\.pdf in"),
        (source(tree.parent / "nothing"), "no file or folder"),
        (source(tree.parent / "nothing" / "*.txt"), "no file or folder"),
        (source(tree.parent / "*.pdf"), "no file"),
    ):
        with pytest.raises(UsageError, match=words):
            files_of(recipe, silent)


def test_what_cannot_be_read_is_listed_and_says_why(tmp_path: Path) -> None:
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    (tmp_path / "notes").write_text("x")
    (tmp_path / "draft.txt~").write_text("x")
    (tmp_path / "gone.txt").symlink_to(tmp_path / "nowhere.txt")
    (tmp_path / "broken.zip").write_bytes(b"PK\x03\x04 cut")
    with zipfile.ZipFile(tmp_path / "empty.zip", "w"):
        pass
    os.mkfifo(tmp_path / "pipe.txt")
    recipe = source(tmp_path)
    reasons = {}
    for file in files_of(recipe, silent):
        (damage,) = read_file(file, recipe)
        assert isinstance(damage, Damage)
        assert damage.id == f"诗/{file.name}"
        reasons[file.name] = damage.reason
    assert "unknown kind of file .png" in reasons.pop("picture.png")
    assert "no ending" in reasons.pop("notes")
    assert "backup" in reasons.pop("draft.txt~")
    assert "gone" in reasons.pop("gone.txt")
    assert "damaged" in reasons.pop("broken.zip")
    assert "without files" in reasons.pop("empty.zip")
    assert "pipe" in reasons.pop("pipe.txt")
    assert not reasons


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read anything")
def test_a_folder_and_a_file_that_may_not_be_read(tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0)
    (tmp_path / "closed.txt").touch(mode=0)
    recipe = source(tmp_path)
    for file in files_of(recipe, silent):
        (damage,) = read_file(file, recipe)
        assert isinstance(damage, Damage)
        assert "permission denied" in damage.reason
    (tmp_path / "closed").chmod(0o700)


def test_links_in_a_circle_end(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.txt").write_text("x")
    (tmp_path / "a" / "up").symlink_to(tmp_path)
    assert names(source(tmp_path)) == ["a/x.txt"]


def test_names_in_gbk(tmp_path: Path) -> None:
    """On a disk of Chinese Windows, and in its archives, which do not say that they are."""
    raw = os.fsencode(tmp_path) + b"/" + "静夜思.txt".encode("gbk")
    with open(raw, "w") as file:
        file.write("x")
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("placeholder.txt", "君不见黄河之水天上来")
    whole = (tmp_path / "a.zip").read_bytes()
    (tmp_path / "a.zip").write_bytes(whole.replace(b"placeholder.txt", "李白/将进酒.txt".encode("gbk")))
    recipe = source(tmp_path)
    files = files_of(recipe, silent)
    assert [file.name for file in files] == ["a.zip/李白/将进酒.txt", "静夜思.txt"]
    texts = [item.text for file in files for item in read_file(file, recipe) if isinstance(item, Document)]
    assert texts == ["君不见黄河之水天上来", "x"]


@pytest.mark.parametrize("end", ["\n", "\r\n", ""])
def test_parts_of_a_large_file_hold_every_line_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: str) -> None:
    """Whatever the border hits: within a character, at a line's end, in a line longer than a part."""
    lines = [f"{number}：{'笔墨纸砚' * (number % 7)}" for number in range(200)] + ["长" * 700] + ["尾"] * 5
    for encoding in ("utf-8", "gb18030"):
        (tmp_path / "a.txt").write_bytes(("\n".join(lines) + end).replace("\n", end or "\n").encode(encoding))
        for part_bytes in (97, 256, 1000):
            monkeypatch.setattr(sources, "PART_BYTES", part_bytes)
            recipe = source(tmp_path, encoding=encoding)
            files = files_of(recipe, silent)
            assert len(files) > 5
            assert sum(file.num_bytes for file in files) == (tmp_path / "a.txt").stat().st_size
            documents = [item for file in files for item in read_file(file, recipe)]
            assert all(isinstance(document, Document) for document in documents)
            assert "\n".join(document.text for document in documents).split("\n") == lines  # type: ignore[union-attr]
            assert len({document.id for document in documents}) == len(documents)


def test_what_cannot_be_cut_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "PART_BYTES", 100)
    text = "床前明月光，疑是地上霜。\n" * 100
    (tmp_path / "a.csv").write_text(text, encoding="utf-8")
    (tmp_path / "b.jsonl").write_bytes(gzip.compress(os.urandom(500)))
    (tmp_path / "c.txt").write_bytes(text.encode("utf-16"))
    (tmp_path / "d.txt").write_bytes(text.encode("utf-16-le"))
    with zipfile.ZipFile(tmp_path / "e.zip", "w") as archive:
        archive.writestr("e.txt", text)
    files = files_of(source(tmp_path), silent)
    assert [(file.name, file.is_part) for file in files] == [
        (name, False) for name in ("a.csv", "b.jsonl", "c.txt", "d.txt", "e.zip/e.txt")
    ]


def test_the_same_list_in_every_run(tree: Path) -> None:
    first = files_of(source(tree), silent)
    assert first == files_of(source(tree), silent)
    assert all(isinstance(file, SourceFile) and hash(file) for file in first)


def parallel(root: Path, twins: Path, replace: list[str] | None = None, **settings: object) -> SourceRecipe:
    return source(root, parallel={"path": str(twins), "replace": replace}, **settings)


@pytest.fixture
def languages(tmp_path: Path) -> Path:
    for name in ("docs/en/a.html", "docs/en/b.html", "docs/zh/a.html", "docs/zh/文/c.html"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("<p id=x>x</p>")
    return tmp_path


def test_twins_are_found_by_name(languages: Path) -> None:
    recipe = parallel(languages, languages, ["/en/", "/zh/"], files=["docs/en/*"])
    found = {file.name: file.twin and file.twin.name for file in files_of(recipe, silent)}
    assert found == {"docs/en/a.html": "docs/zh/a.html", "docs/en/b.html": None}
    files = files_of(parallel(languages / "docs/en", languages / "docs/zh"), silent)
    assert [file.twin is not None for file in files] == [True, False]


def test_twins_inside_an_archive(languages: Path) -> None:
    with zipfile.ZipFile(languages / "zh.zip", "w") as archive:
        archive.write(languages / "docs/zh/a.html", "a.html")
    first, second = files_of(parallel(languages, languages, ["docs/en", "zh.zip"], files=["docs/en/*"]), silent)
    assert first.twin is not None and first.twin.member == "a.html"
    assert second.twin is None


def test_a_replacement_that_fits_nothing_is_explained(languages: Path) -> None:
    with pytest.raises(UsageError, match=r"no file's path holds 'en-US', the first is docs/en/a.html: replace names"):
        files_of(parallel(languages, languages, ["en-US", "zh"]), silent)
    with pytest.raises(UsageError, match=r"none of its files has a twin in .*: docs/zh-CN/a.html is looked for, there"):
        files_of(parallel(languages, languages, ["en", "zh-CN"], files=["docs/en/*"]), silent)
    with pytest.raises(UsageError, match="there is no file or folder"):
        files_of(parallel(languages, languages / "missing", ["en", "zh"]), silent)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"format": "txt", "parallel": {"path": "x"}}, "parallel documents are HTML pages"),
        ({"prompt": "{a}", "answer": "{b}", "parallel": {"path": "x"}}, "have no effect beside parallel"),
        ({"parallel": {"path": "x", "replace": ["", "zh"]}}, "replace names a part of"),
        ({"parallel": {"replace": ["a", "b"]}}, "path"),
        ({"line": "(?P<a>.)"}, 'write format = "txt" beside it'),
        ({"format": "txt", "line": "(?P<a>"}, "line is not a regular expression"),
        ({"format": "txt", "line": "a.*"}, "line names no field"),
    ],
)
def test_settings_that_do_not_go_together(settings: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        SourceRecipe.model_validate({"name": "a", "path": "b", **settings})
