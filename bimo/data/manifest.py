"""What preparation did, in numbers and examples: the ledger that every step writes into, and the page made of it.

    ledger.read(document, before) · ledger.changed(document, "simplified", before, after)
    ledger.dropped("quality", document, "...") · ledger.kept("train", document) · ledger.damaged(damage)

Counts are of documents and characters, by step, source and language; of documents that were cut, what is kept are
passages. Ledgers of many processes are merged; each step shows ten examples, of each source in turn, taken where they
first occur, so the same data shows the same ones.
"""

from __future__ import annotations

import itertools
import json
from collections import defaultdict
from importlib.resources import files
from pathlib import Path
from typing import Any

from bimo.data.records import Damage, Document

__all__ = ["Ledger"]

EXAMPLES = 10  # of each step
SHOWN = 240  # characters of an example
DAMAGES = 200  # listed one by one; all are counted


class Ledger:
    """counts: {(what, step, source, language): [documents, characters]}; examples: {step: {source: examples}}."""

    def __init__(self) -> None:
        self.counts: dict[tuple[str, str, str, str], list[int]] = defaultdict(lambda: [0, 0])
        self.reasons: dict[tuple[str, str], int] = defaultdict(int)
        self.examples: dict[str, dict[str, list[dict[str, str]]]] = defaultdict(lambda: defaultdict(list))
        self.damages: list[dict[str, Any]] = []
        self.num_damages = 0

    def read(self, document: Document, before: str) -> None:
        """before: its text as it was read."""
        self._count("read", "read", document, before)

    def kept(self, split: str, document: Document) -> None:
        self._count("kept", split, document, document.text)
        self._example(f"kept: {split}", document, "", document.text[:SHOWN])

    def changed(self, document: Document, step: str, before: str, after: str) -> None:
        self._count("changed", step, document, after)
        if len(self.examples[step][document.source]) < EXAMPLES:
            old, new = _around_first_difference(before, after)
            self._example(step, document, "", new, before=old)

    def cut(self, document: Document) -> None:
        """It became several passages."""
        self._count("changed", "passages", document, document.text)

    def dropped(self, step: str, document: Document, reason: str) -> None:
        self._count("dropped", step, document, document.text)
        self.reasons[step, reason] += 1
        self._example(step, document, reason, document.text[:SHOWN])

    def leaked(self, split: str, document: Document) -> None:
        """It was counted as kept, and is dropped after all."""
        count = self.counts["kept", split, document.source, document.language]
        count[0] -= 1
        count[1] -= len(document.text)
        shown = self.examples[f"kept: {split}"][document.source]
        shown[:] = [example for example in shown if example["id"] != document.id]
        self.dropped("leaks", document, f"{split} text that stands in the training text")

    def damaged(self, damage: Damage) -> None:
        self.num_damages += 1
        if len(self.damages) < DAMAGES:
            self.damages.append(
                {"id": damage.id, "source": damage.source, "reason": damage.reason, "bytes": damage.bytes}
            )

    def merge(self, other: Ledger) -> None:
        """Add another's counts; its examples where there is room."""
        for key, (documents, characters) in other.counts.items():
            self.counts[key][0] += documents
            self.counts[key][1] += characters
        for reason, count in other.reasons.items():
            self.reasons[reason] += count
        for step, sources in other.examples.items():
            for source, examples in sources.items():
                mine = self.examples[step][source]
                mine += examples[: EXAMPLES - len(mine)]
        self.damages += other.damages[: DAMAGES - len(self.damages)]
        self.num_damages += other.num_damages

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; `from_dict` reads it back."""
        names = ("what", "step", "source", "language", "documents", "characters")
        return {
            "counts": [dict(zip(names, (*key, *value), strict=True)) for key, value in sorted(self.counts.items())],
            "reasons": [{"step": s, "reason": r, "documents": n} for (s, r), n in sorted(self.reasons.items())],
            "examples": {step: shown for step, by in sorted(self.examples.items()) if (shown := _in_turn(by))},
            "damages": self.damages,
            "num_damages": self.num_damages,
        }

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> Ledger:
        ledger = cls()
        for row in raw["counts"]:
            key = (row["what"], row["step"], row["source"], row["language"])
            ledger.counts[key] = [row["documents"], row["characters"]]
        for row in raw["reasons"]:
            ledger.reasons[row["step"], row["reason"]] = row["documents"]
        for step, examples in raw["examples"].items():
            for example in examples:
                ledger.examples[step][example["source"]].append(example)
        ledger.damages, ledger.num_damages = list(raw["damages"]), raw["num_damages"]
        return ledger

    def write(self, folder: Path, manifest: dict[str, Any]) -> None:
        """folder/manifest.html, and last folder/manifest.json, so that a folder with it is finished."""
        import jinja2

        template = files("bimo.data").joinpath("manifest.html.jinja").read_text(encoding="utf-8")
        environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
        page = environment.from_string(template).render(manifest=manifest, table=self.table(), languages=self.shares())
        (folder / "manifest.html").write_text(page, encoding="utf-8", errors="replace")
        partial = folder / ".manifest.json"
        partial.write_text(json.dumps(manifest, ensure_ascii=False, indent=1), encoding="utf-8", errors="replace")
        partial.replace(folder / "manifest.json")

    def table(self) -> list[dict[str, Any]]:
        """One row a step: what it did to documents and characters, over all sources."""
        rows: dict[tuple[str, str], dict[str, Any]] = {}
        for (what, step, _, _), (documents, characters) in self.counts.items():
            row = rows.setdefault((what, step), {"what": what, "step": step, "documents": 0, "characters": 0})
            row["documents"] += documents
            row["characters"] += characters
        order = ("read", "changed", "dropped", "kept")
        return sorted(rows.values(), key=lambda row: order.index(row["what"]))

    def shares(self) -> list[dict[str, Any]]:
        """The share of characters kept, by source and language."""
        rows: dict[tuple[str, str], dict[str, Any]] = {}
        for (what, _, source, language), (documents, characters) in self.counts.items():
            if what in ("read", "kept"):
                row = rows.setdefault((source, language), {"read": 0, "kept": 0, "documents": 0, "kept_documents": 0})
                row[what] += characters
                row["documents" if what == "read" else "kept_documents"] += documents
        return [
            {"source": source, "language": language, **row, "share": row["kept"] / max(1, row["read"])}
            for (source, language), row in sorted(rows.items())
        ]

    def _count(self, what: str, step: str, document: Document, text: str) -> None:
        count = self.counts[what, step, document.source, document.language]
        count[0] += 1
        count[1] += len(text)

    def _example(self, step: str, document: Document, reason: str, text: str, **shown: str) -> None:
        examples = self.examples[step][document.source]
        if len(examples) < EXAMPLES:
            about = {"id": document.id, "source": document.source, "language": document.language, "reason": reason}
            examples.append({**about, "text": text, **shown})


def _in_turn(sources: dict[str, list[dict[str, str]]]) -> list[dict[str, str]]:
    """Ten examples, one of each source, then the next of each."""
    rounds = itertools.zip_longest(*sources.values())
    return [example for one in rounds for example in one if example is not None][:EXAMPLES]


def _around_first_difference(before: str, after: str) -> tuple[str, str]:
    """The part of both texts where they begin to differ."""
    place = next((i for i, (one, other) in enumerate(zip(before, after, strict=False)) if one != other), 0)
    start = max(0, place - 40)
    return before[start : start + SHOWN], after[start : start + SHOWN]
