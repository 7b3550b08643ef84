"""The page's files, read as files: words, imports, policy, vendored code. No browser."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import pytest

import bimo

WEB = Path(bimo.__file__).parent / "web"
VENDOR = WEB / "vendor"
SCRIPTS = sorted(WEB.glob("*.js"))
MODULES = [file for file in SCRIPTS if file.name != "boot.js"]
STYLES = sorted(WEB.glob("*.css"))
MAX_LINES = 500
MAX_VENDOR_BYTES = 600_000
IMPORT = re.compile(r"""(?:^|[;}])\s*(?:import|export)\b(?:[^;"'()]*?\bfrom)?\s*["']([^"']+)["']""", re.M)
LICENCES = {"MIT", "Apache-2.0", "BSD-3-Clause", "Apache-2.0 (of Apache-2.0 OR MPL-2.0)"}


def read(file: Path) -> str:
    return file.read_text(encoding="utf-8")


def words(language: str) -> dict[str, str | list[list[str]]]:
    return json.loads(read(WEB / "locales" / f"{language}.json"))


def test_both_languages_have_the_same_keys_and_blanks() -> None:
    english, chinese = words("en"), words("zh")
    assert list(english) == list(chinese)  # the same order, too: they are read side by side
    for key, text in english.items():
        assert text and chinese[key], f"{key} is empty"
        assert blanks(text) == blanks(chinese[key]), f"{key} fills in other blanks"
    raw = read(WEB / "locales" / "zh.json")
    keys = re.findall(r'^  "([^"]+)":', raw, re.M)
    assert len(keys) == len(set(keys)), "a key stands twice"


def blanks(text: object) -> set[str]:
    return set(re.findall(r"\{(\w+)\}", str(text)))


def test_chinese_is_chinese() -> None:
    same = {"settings.language.zh", "settings.language.en", "settings.top_p", "settings.top_k", "settings.min_p"}
    for key, text in words("zh").items():
        assert key in same or re.search(r"[\u4e00-\u9fff]", str(text)), f"{key} is not translated"


def test_every_word_is_used_and_every_used_word_exists() -> None:
    known = set(words("en"))
    bases = {re.sub(r"\.(one|other)$", "", key) for key in known}
    source = "\n".join(read(file) for file in MODULES)
    used = set(re.findall(r"""\b(?:t|list)\(\s*"([\w.]+)\"""", source))
    used |= set(re.findall(r'"([a-z]+(?:\.[a-z_]+)+)"', source))  # keys chosen by a condition
    prefixes = set(re.findall(r"`([a-z]+\.(?:[a-z]+\.)?)\$\{", source))  # t(`error.${kind}`)
    missing = {key for key in re.findall(r"""\bt\(\s*"([\w.]+)\"""", source) if key not in bases}
    assert missing == set()
    unused = {key for key in bases if key not in used and not key.startswith(tuple(prefixes))}
    assert unused == set()


def test_index_has_nothing_inline_and_nothing_foreign() -> None:
    html = re.sub(r"<!--.*?-->", "", read(WEB / "index.html"), flags=re.S)
    assert not re.search(r"<style|\sstyle=|\son\w+=|importmap|javascript:", html, re.I)
    assert not re.search(r"<script(?![^>]*\ssrc=)", html)
    for address in re.findall(r'(?:src|href)="([^"]+)"', html):
        assert address.startswith("/static/"), address
        assert (WEB / address.removeprefix("/static/")).is_file(), f"{address} does not exist"


@pytest.mark.parametrize("file", [*MODULES, *VENDOR.glob("*.js")], ids=lambda file: file.name)
def test_imports_are_relative_and_exist(file: Path) -> None:
    for name in imports(file):
        assert name.startswith("./"), f"{file.name} imports {name}: a bare name needs an import map, which is inline"
        assert (file.parent / name).is_file(), f"{file.name} imports {name}"


def imports(file: Path) -> list[str]:
    """What a module imports at its start; dynamic imports are not among them."""
    return IMPORT.findall(read(file))


def test_preloads_are_the_modules_that_the_start_needs() -> None:
    needed: set[Path] = set()
    queue = [WEB / "app.js"]
    for file in queue:
        if file in needed:
            continue
        needed.add(file)
        queue += [(file.parent / name).resolve() for name in imports(file)]
    listed = re.findall(r'modulepreload" href="/static/([^"]+)"', read(WEB / "index.html"))
    preloaded = {WEB / name for name in listed}
    assert preloaded == needed - {WEB / "app.js"}
    assert {file for file in MODULES if file not in needed} == set(), "a module that nothing imports"


@pytest.mark.parametrize("file", SCRIPTS, ids=lambda file: file.name)
def test_scripts_set_no_markup_and_run_no_strings(file: Path) -> None:
    source = re.sub(r"^\s*//.*$|/\*.*?\*/", "", read(file), flags=re.M | re.S)
    found = re.findall(r"\w*(?:innerHTML|outerHTML|AdjacentHTML|document\.write|eval\(|new Function)", source, re.I)
    assert found == []
    hosts = set(re.findall(r"https?://[\w.-]+", source))
    assert hosts == set(), f"{file.name} names another host"


@pytest.mark.parametrize("file", [*SCRIPTS, *STYLES], ids=lambda file: file.name)
def test_files_have_a_head_and_a_size(file: Path) -> None:
    text = read(file)
    assert text.startswith(("//", "/*")), "its first lines say what it is"
    assert text.count("\n") <= MAX_LINES


def test_styles_load_nothing() -> None:
    for file in STYLES:
        css = read(file)
        assert "@import" not in css and "url(" not in css
        assert css.count("{") == css.count("}")


def test_vendored_files_are_the_listed_ones() -> None:
    readme = read(VENDOR / "README.md")
    listed = {name: digest for digest, name in re.findall(r"^([0-9a-f]{64})  (\S+)$", readme, re.M)}
    present = {file.relative_to(VENDOR).as_posix(): file for file in VENDOR.rglob("*.js")}
    assert listed.keys() == present.keys()
    for name, file in present.items():
        assert hashlib.sha256(file.read_bytes()).hexdigest() == listed[name], f"{name} was changed"
        assert "sourceMappingURL" not in read(file)
    rows = [[cell.strip(" `") for cell in row.split("|")[1:-1]] for row in readme.splitlines() if row.startswith("| `")]
    for name, _, version, _, licence, text in rows:
        assert re.fullmatch(r"\d+\.\d+\.\d+", version), name
        assert licence in LICENCES, name
        assert len(read(VENDOR / text)) > 500, name
    covered = {name for name, *_ in rows}
    assert {file.name for file in VENDOR.glob("*.js")} == {name for name in covered if "/" not in name}
    assert sum(file.stat().st_size for file in VENDOR.rglob("*") if file.is_file()) < MAX_VENDOR_BYTES


def test_each_grammar_is_known_to_the_highlighter() -> None:
    source = read(WEB / "highlight.js")
    block = re.search(r"LANGUAGES = new Set\(\[(.*?)\]\)", source, re.S)
    assert block
    assert set(re.findall(r'"(\w+)"', block[1])) == {file.stem for file in (VENDOR / "languages").glob("*.js")}
