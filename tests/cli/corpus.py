"""A small corpus in both languages, as a folder of JSON lines."""

from __future__ import annotations

import json
from pathlib import Path

TEXTS = Path(__file__).parents[2] / "benchmarks" / "texts"


def write_texts(folder: Path) -> None:
    """en.jsonl and zh.jsonl, a paragraph a line."""
    folder.mkdir()
    for name in ("en", "zh"):
        paragraphs = [p for p in (TEXTS / f"{name}.txt").read_text(encoding="utf-8").split("\n") if p.strip()]
        rows = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in paragraphs)
        (folder / f"{name}.jsonl").write_text(rows, encoding="utf-8")
