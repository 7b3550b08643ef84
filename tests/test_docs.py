"""The documents quote lines of code: each quoted line must still be there, in both languages alike."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
QUOTE = re.compile(r"`((?:bimo|kernels)/[\w/]+\.\w+)` › `([^`]+)`")


def quotes(document: Path) -> list[tuple[str, str]]:
    return QUOTE.findall(document.read_text(encoding="utf-8"))


@pytest.mark.parametrize("language", ["en", "zh"])
def test_quoted_lines_exist(language: str) -> None:
    found = quotes(ROOT / "docs" / language / "mathematics.md") + quotes(ROOT / "docs" / language / "speed.md")
    assert len(found) > 17
    for file, line in found:
        assert line in (ROOT / file).read_text(encoding="utf-8"), f"{file} no longer has: {line}"


def test_both_languages_quote_the_same_lines() -> None:
    for name in ("mathematics", "speed"):
        assert quotes(ROOT / f"docs/en/{name}.md") == quotes(ROOT / f"docs/zh/{name}.md")


def test_every_document_exists_in_both_languages() -> None:
    names = [{file.name for file in (ROOT / "docs" / language).glob("*.md")} for language in ("en", "zh")]
    assert names[0] == names[1]
