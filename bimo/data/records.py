"""What flows through data preparation: documents, and what could not become one.

readers ── Document | Damage ──► cleaning ──► duplicates ──► passages ──► prepared documents (Parquet)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

__all__ = ["Damage", "Document", "Message"]


class Message(NamedTuple):
    """One turn of a dialogue; role is "system", "user" or "assistant"."""

    role: str
    content: str


@dataclass(slots=True)
class Document:
    """One text. It is valid Unicode (no lone surrogates).

    id: where it comes from, unique in a recipe and the same in every run: "poems/tang/7.json#17".
    source: the recipe's name for its source.
    language: "zh", "en", another ISO 639-1 code, or "" while unknown.
    messages: of a dialogue; `text` is then their contents, one a line, for the steps that only look.
    group: what must not be divided between training and validation, such as a page's pairs; "": it stands alone.
    label: the class it has, of texts that are learned to be told apart.
    """

    text: str
    id: str
    source: str
    language: str = ""
    title: str = ""
    messages: tuple[Message, ...] = ()
    group: str = ""
    label: str = ""

    @property
    def pair(self) -> tuple[str, str] | None:
        """Of a dialogue, its last answer and the question before it, as (question, answer); else None."""
        last = self.messages[-2:]
        if [message.role for message in last] != ["user", "assistant"]:
            return None
        return last[0].content, last[1].content

    @property
    def prompt(self) -> str:
        """Of a dialogue, what comes before its last message, one a line; else ""."""
        return "\n".join(content for _, content in self.messages[:-1])


@dataclass(slots=True)
class Damage:
    """Input that could not be read: counted and shown in the manifest, never silently lost.

    reason: one sentence. bytes: how much input it concerns, as far as known.
    """

    id: str
    source: str
    reason: str
    bytes: int = 0
