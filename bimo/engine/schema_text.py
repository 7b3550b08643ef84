"""How JSON Schema describes texts, in the words of llguidance: regular expressions and formats.

JSON Schema takes its regular expressions from ECMAScript, llguidance from Rust: `rust_pattern` translates what both
can write but mean differently. llguidance's formats are laxer than those who read the answer: they take 29 February
of any year, second 60, a hostname of any length. `STRICTER` has the patterns to add.
"""

from __future__ import annotations

import re
from typing import Any

__all__ = ["ENFORCED_FORMATS", "NUMBER_FORMATS", "STRICTER", "rust_pattern"]

# \s of ECMAScript: Rust's has U+0085 and lacks U+FEFF
_SPACES = r"\t\n\x0b\x0c\r \u00a0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000\ufeff"
_ANY = r"[^\n\r\u2028\u2029]"  # the dot
# an escape, the beginning of a class (a "]" right behind it ends it in ECMAScript), or one character
_PIECE = re.compile(r"\\.|\[\^?|.", re.DOTALL)


def rust_pattern(pattern: str) -> str:
    """An ECMAScript regular expression with Rust's spelling of what it means."""
    out: list[str] = []
    inside = False  # of a class
    for match in _PIECE.finditer(pattern):
        piece = match.group()
        if piece == r"\s":
            piece = _SPACES if inside else f"[{_SPACES}]"
        elif piece == r"\S":
            piece = f"[^{_SPACES}]"
        elif inside:
            if piece == "]":
                inside = False
            elif (
                piece[0] == "[" or piece in "&~" or (piece == "-" and out[-1] == "-")
            ):  # Rust: a class within the class
                piece = "\\" + piece
        elif piece[0] == "[":
            inside = True
            if pattern[match.end() : match.end() + 1] == "]":  # [] matches nothing, [^] everything
                piece += r"\s\S" if piece == "[" else ""
                piece = r"[^\s\S" if piece == r"[\s\S" else r"[\s\S"
        elif piece == ".":
            piece = _ANY
        out.append(piece)
    return "".join(out)


ENFORCED_FORMATS = (
    "date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri",
)  # fmt: skip

_YEAR = "(0[0-9]{2}[1-9]|0[0-9][1-9]0|0[1-9]00|[1-9][0-9]{3})"  # from 0001
_FOURTH = "(0[48]|[2468][048]|[13579][26])"
_LEAP_YEAR = f"([0-9]{{2}}{_FOURTH}|{_FOURTH}00)"
_DATE = f"({_LEAP_YEAR}-02-29|{_YEAR}-02-([01][0-9]|2[0-8])|{_YEAR}-(0[13-9]|1[0-2])-[0-9]{{2}})"
_TIME = r"[0-9]{2}:[0-9]{2}:[0-5][0-9](\.[0-9]{1,9})?(Z|[+-][0-9:]+)"
_LABEL = "[a-zA-Z0-9]+(-[a-zA-Z0-9]+)*"  # of a hostname; a double hyphen announces an encoding
_HOST = rf"{_LABEL}(\.{_LABEL})*"
STRICTER: dict[str, tuple[str, ...]] = {
    "date": (f"^{_DATE}$",),
    "time": (f"^{_TIME}$",),
    "date-time": (f"^{_DATE}T{_TIME}$",),
    "duration": (r"^([A-Z]|[0-9]{1,6}[A-Z])*$",),
    "hostname": (f"^{_HOST}$", r"^[^.]{1,63}(\.[^.]{1,63}){0,2}$"),
    "email": (rf"^[^@\[\]]+@{_HOST}$", r"^[^@]{1,64}@[^.]{1,63}(\.[^.]{1,63}){0,2}$"),
}
# OpenAPI's, for type number and integer; all numbers of 18 digits fit int64, uint64 from 0, and double
NUMBER_FORMATS: dict[str, dict[str, Any]] = {
    "int8": {"minimum": -(2**7), "maximum": 2**7 - 1},
    "int16": {"minimum": -(2**15), "maximum": 2**15 - 1},
    "int32": {"minimum": -(2**31), "maximum": 2**31 - 1},
    "int64": {},
    "uint8": {"minimum": 0, "maximum": 2**8 - 1},
    "uint16": {"minimum": 0, "maximum": 2**16 - 1},
    "uint32": {"minimum": 0, "maximum": 2**32 - 1},
    "uint64": {"minimum": 0},
    "float": {},
    "double": {},
}
