"""Pairs of sentences from a file of JSON lines, and the languages they are in.

pairs = read_pairs(Path("held-out.jsonl"), limit=500)         # {"source": "Save the file.", "target": "保存文件。"}
languages_of(pairs)                                           # ("en", "zh")
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from bimo.data.language import identify
from bimo.errors import UsageError

__all__ = ["Pair", "check_language", "languages_of", "read_pairs"]

SAMPLE = 200  # pairs looked at for their languages
ROW = '{"source": "...", "target": "..."}'


class Pair(NamedTuple):
    """A sentence and its translation."""

    source: str
    target: str


def read_pairs(path: Path, *, limit: int | None = None, param: str = "pairs") -> list[Pair]:
    """The pairs of a file, at most `limit` from its beginning; empty lines do not count.

    Raises UsageError, which names the line, for what is no pair of two texts; `param`: the option that named the file.
    """
    pairs: list[Pair] = []
    try:
        with path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if limit is not None and len(pairs) >= limit:
                    break
                if number == 1:
                    line = line.removeprefix(b"\xef\xbb\xbf")
                if line.strip():
                    pairs.append(_pair(line, f"{path}, line {number}", param))
    except OSError as error:
        raise UsageError(f"{path} cannot be read ({error.strerror}): give a file of lines {ROW}", param) from None
    if not pairs:
        raise UsageError(f"{path} has no pairs: give a file of lines {ROW}", param)
    return pairs


def _pair(line: bytes, where: str, param: str) -> Pair:
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{where} is not valid UTF-8 (byte {error.start}): convert the file first, e.g. with iconv -t utf-8", param
        ) from None
    except (ValueError, RecursionError) as error:
        reason = "too deeply nested" if isinstance(error, RecursionError) else error
        raise UsageError(f"{where} is no JSON ({reason}): every line is {ROW}", param) from None
    if not isinstance(row, dict):
        raise UsageError(f"{where} is no object but {type(row).__name__}: every line is {ROW}", param)
    for side in ("source", "target"):
        text = row.get(side)
        if not isinstance(text, str) or not text.strip():
            what = f"no {side}" if side not in row else f"the {side} {json.dumps(text)[:60]}"
            raise UsageError(f"{where} has {what}: every line is {ROW}, both of them texts", param)
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise UsageError(f"{where}: the {side} holds half a character (an unpaired \\ud8..): remove it", param)
    return Pair(row["source"], row["target"])


def languages_of(pairs: Sequence[Pair]) -> tuple[str, str]:
    """ISO 639-1 codes of the sources and the targets; "" where there are no letters."""
    sample = pairs[:: max(1, len(pairs) // SAMPLE)]
    return identify("\n".join(pair.source for pair in sample)), identify("\n".join(pair.target for pair in sample))


def check_language(code: str, param: str) -> str:
    """ "zh" of "zh", "zh-CN", "zh_Hans"; UsageError for what is no code."""
    base = code.lower().replace("_", "-").split("-")[0]
    if not (base.isascii() and base.isalpha() and len(base) in (2, 3)):
        raise UsageError(f"{param} must be the code of a language such as en or zh, not {code!r}", param)
    return {"zho": "zh", "chi": "zh", "cmn": "zh", "eng": "en"}.get(base, base)
