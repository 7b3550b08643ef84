"""Personal data in a text: e-mail addresses, telephone numbers, identity numbers, bank cards, IP addresses.

    find("打 13812345678 给我")      -> [Span(2, 13, "PHONE")]
    mask("打 13812345678 给我")      -> ("打 [PHONE] 给我", 1)

Cheap patterns propose, check digits and numbering plans decide: resident ids by ISO 7064 and birthday, cards by Luhn
and issuer, telephone numbers by the plan of their country. Dates, prices, ISBNs and version numbers are none of these.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable
from typing import NamedTuple

__all__ = ["Span", "find", "mask"]


class Span(NamedTuple):
    """text[start:end] is of `kind`: EMAIL, PHONE, ID, CARD or IP."""

    start: int
    end: int
    kind: str


EMAIL = re.compile(
    r"(?<![A-Za-z0-9._%+-])[A-Za-z0-9_%+-][A-Za-z0-9._%+-]{0,63}@"
    r"(?:[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?\.){1,8}[A-Za-z]{2,24}(?![A-Za-z0-9])"
)
# Seven digits with little between them: all numbers have them, most texts have none.
DIGITS = re.compile(r"[0-9](?:[^\w\n]{0,3}[0-9]){6}")
EDGE = r"(?<![A-Za-z0-9_.])(?<![0-9][-/,:])"
END = r"(?![A-Za-z0-9_])(?![.,/][0-9])"
# What is no number to call: amounts, and what a text itself names as something else.
UNIT = r"(?![-.]?[0-9])(?!\s?(?:元|美元|万|亿|円|年|个|人|次|米|吨|公里|USD|RMB|CNY|bytes?\b|%))"
NUMBER = re.compile(
    rf"""(?P<ID>{EDGE}[1-9]\d{{5}}[ ]?(?:18|19|20)\d\d(?:0[1-9]|1[0-2])(?:0[1-9]|[12]\d|3[01])[ ]?\d{{3}}[\dXx]{END})
    |(?P<SSN>{EDGE}(?!000|666|9)\d{{3}}-(?!00)\d\d-(?!0000)\d{{4}}{END})
    |(?P<CARD>{EDGE}(?:(?:[2-6]\d{{3}})(?:[ -]\d{{4}}){{2,3}}(?:[ -]\d{{1,3}})?
        |3\d{{3}}[ -]\d{{6}}[ -]\d{{4,5}}|[2-6]\d{{11,18}}|1800\d{{11}}){END})
    |(?P<MOBILE>(?<![A-Za-z0-9_.])(?:(?:\+|00)?86[- ]?|\((?:\+|00)?86\)[ ]?|\+86[ ]?)?1[3-9]\d(?:[- ]?\d{{4}}){{2}}
        {END}{UNIT})
    |(?P<PLUS>(?<![A-Za-z0-9_+])\+[1-9](?:[ ().-]{{0,2}}\d){{6,14}}(?:[ ]?(?:x|ext\.?)[ ]?\d{{1,6}})?(?![0-9]))
    |(?P<LANDLINE>{EDGE}(?:(?:\+|00)?86[- ])?(?:[（(]0\d{{2,3}}[)）][- ]?|0(?:10|2\d|[3-9]\d\d)[- ]?)
        [2-9]\d{{2,3}}[- ]?\d{{4}}(?:(?:-|转)\d{{1,5}})?{END}{UNIT})
    |(?P<HOTLINE>{EDGE}[48]00-\d{{3,4}}-?\d{{3,4}}{END})
    |(?P<NANP>{EDGE}(?:(?:\+|00)?1[-. ])?(?:\([2-9]\d\d\)[ -]?|[2-9]\d\d[-.])[2-9]\d\d[-.]\d{{4}}
        (?:[ ]?(?:x|ext\.?[ ]?)\d{{1,6}})?{END})
    |(?P<SPACED>{EDGE}(?:1[ ])?[2-9]\d\d[ ][2-9]\d\d[ ]\d{{4}}{END}{UNIT})
    |(?P<PLAIN>{EDGE}[2-9]\d\d[2-9]\d{{6}}(?:x\d{{1,6}})?{END}{UNIT})
    """,
    re.VERBOSE | re.ASCII,
)
INTEGERS = frozenset(str(2**bits + more) for bits in (31, 32, 33) for more in (-1, 0, 1))
NAMED = re.compile(r"(?:ISBN|ISSN|DOI|QQ|单号|编号|订单|流水号|[$¥￥€£#＃№])[-\w]{0,4}[:： ]{0,2}\Z", re.IGNORECASE)
ISSUERS = re.compile(
    r"4(?:\d{12}|\d{15}|\d{18})|(?:5[1-5]\d\d|222[1-9]|22[3-9]\d|2[3-6]\d\d|27[01]\d|2720)\d{12}|3[47]\d{13}|3(?:0[0-5]|[689]\d)\d{11}"
    r"|(?:6011|65\d\d|64[4-9]\d|35\d\d)\d{12}|(?:2131|1800)\d{11}|62\d{14,17}|(?:50[0-9]{2}|5[6-8]\d\d|6[037]\d\d)\d{8,15}"
)
IP = re.compile(
    r"(?<![\w.])(?<!==)(?<!\w-)(?:(?:25[0-5]|2[0-4]\d|1\d\d|[1-9]?\d)\.){3}(?:25[0-5]|2[0-4]\d|1\d\d|[1-9]?\d)(?![\w.]*\d)",
    re.ASCII,
)
IP_HINT = re.compile(r"[0-9]\.[0-9]{1,3}\.[0-9]{1,3}\.[0-9]")
VERSION = re.compile(
    r"(?:\bv(?:er(?:sion)?)?|release|版本号?|版|section|§|第|章节?|小节)[.:：]?\s?(?:为|是|号|is\s)?\s?\Z",
    re.IGNORECASE,
)
# "LibreOffice 7.4.1.2", "iOS 14.2.1.3": a name before small numbers; names of what has an address, and words that a
# sentence begins with, are none.
PRODUCT = re.compile(
    r"(?<![A-Za-z])(?!(?i:IP|IPv4|DNS|NTP|DHCP|TCP|UDP|LAN|WAN|VPN|SSH|FTP|HTTP|URL|ping|from|to|at|via|is|on|for|by|use|"
    r"try|and|or|the|my|your|our|their|log|port|user|block|ban|allow|deny|telnet|curl)\b|(?i:\w*(?:addr|server|host|node|"
    r"gateway|router|proxy|peer|client|device|machine|subnet|network|domain|remote|local|source|dest|connect)))"
    r"(?=\w*[A-Z])[A-Za-z][A-Za-z0-9+]*[ ]\Z",
    re.ASCII,
)
COUNTED = re.compile(r"\s?(?:节|章|版|小节|条)")
IP6_HINT = re.compile(r"::|(?::[0-9A-Fa-f]{1,4}){7}")
IP6 = re.compile(r"(?<![\w:.])(?=[0-9A-Fa-f:]{0,4}:)[0-9A-Fa-f:]{6,39}(?![\w:])", re.ASCII)
LEAD, LONGEST = 4, 80  # characters of a number before the first of its DIGITS, and after the seventh
NAME = 24  # the same for what a version is of
BEFORE = 12  # characters that are looked at for what a number is called


def find(text: str) -> list[Span]:
    """All personal data in the text, in order, without overlaps."""
    spans: list[Span] = []
    if "@" in text:
        spans += (Span(*match.span(), "EMAIL") for match in EMAIL.finditer(text))
    spans += _numbers(text)
    if IP_HINT.search(text):
        spans += (Span(*match.span(), "IP") for match in IP.finditer(text) if not _is_version(text, *match.span()))
    if ("::" in text or text.count(":") >= 7) and IP6_HINT.search(text):
        spans += (Span(*match.span(), "IP") for match in IP6.finditer(text) if _is_ip6(match[0]))
    spans.sort()
    kept: list[Span] = []
    for span in spans:
        if not kept or span.start >= kept[-1].end:
            kept.append(span)
    return kept


def _is_version(text: str, start: int, end: int) -> bool:
    if VERSION.search(text[max(0, start - BEFORE) : start]) or COUNTED.match(text, end):
        return True
    first, *others = map(int, text[start:end].split("."))
    return max(first, *others) < 50 and first != 10 and bool(PRODUCT.search(text[max(0, start - NAME) : start]))


def mask(text: str) -> tuple[str, int]:
    """The text with [EMAIL], [PHONE], [ID], [CARD], [IP] in the place of personal data, and how many there were."""
    spans = find(text)
    if not spans:
        return text, 0
    parts: list[str] = []
    start = 0
    for span in spans:
        parts += (text[start : span.start], f"[{span.kind}]")
        start = span.end
    return "".join(parts) + text[start:], len(spans)


def _numbers(text: str) -> list[Span]:
    """Looked for only around DIGITS: a fifth of the time that it takes all over the text."""
    found: list[Span] = []
    start = 0
    for near in DIGITS.finditer(text):
        start = _numbers_near(text, max(start, near.start() - LEAD), near.end(), found)
    return found


def _numbers_near(text: str, start: int, end: int, found: list[Span]) -> int:
    """Add the numbers that begin in text[start:end] to `found`; where to go on."""
    while start < end and (match := NUMBER.search(text, start, end + LONGEST)) and match.start() < end:
        kind, check = CHECKS[str(match.lastgroup)]
        before = text[max(0, match.start() - BEFORE) : match.start()]
        if check(match[0]) and not NAMED.search(before):
            found.append(Span(*match.span(), kind))
            start = match.end()
        else:  # the same digits may be a number of another kind, that begins a little later
            start = match.start() + 1
            while start < len(text) and text[start] in "0123456789":
                start += 1
    return start


def _is_resident_id(number: str) -> bool:
    from stdnum.iso7064 import mod_11_2

    return bool(mod_11_2.is_valid(number.replace(" ", "").upper()))


def _is_card(number: str) -> bool:
    from stdnum import luhn

    digits = re.sub(r"[ -]", "", number)
    return bool(ISSUERS.fullmatch(digits)) and len(set(digits)) > 1 and bool(luhn.is_valid(digits))


def _is_valid(region: str | None) -> Callable[[str], bool]:
    def check(number: str) -> bool:
        import phonenumbers

        try:
            return phonenumbers.is_valid_number(phonenumbers.parse(number.partition("转")[0], region))
        except phonenumbers.NumberParseException:
            return False

    return check


def _is_plain(number: str) -> bool:
    """Ten digits in a row may be the largest integer of so many bits."""
    return number not in INTEGERS and _is_valid("US")(number)


def _is_written_as_one(number: str) -> bool:
    return True  # the pattern's punctuation says enough


def _is_international(number: str) -> bool:
    """Possible is enough with a plus before it: numbering plans change, and nothing else is written so."""
    import phonenumbers

    try:
        return phonenumbers.is_possible_number(phonenumbers.parse(number, None))
    except phonenumbers.NumberParseException:
        return False


CHECKS: dict[str, tuple[str, Callable[[str], bool]]] = {
    "ID": ("ID", _is_resident_id),
    "SSN": ("ID", _is_written_as_one),
    "CARD": ("CARD", _is_card),
    "MOBILE": ("PHONE", _is_written_as_one),
    "PLUS": ("PHONE", _is_international),
    "LANDLINE": ("PHONE", _is_valid("CN")),
    "HOTLINE": ("PHONE", _is_written_as_one),
    "NANP": ("PHONE", _is_written_as_one),
    "SPACED": ("PHONE", _is_valid("US")),
    "PLAIN": ("PHONE", _is_plain),
}


def _is_ip6(text: str) -> bool:
    groups = [group for group in text.split(":") if group]
    if (len(groups) < 8 and (len(groups) < 2 or len(groups[0]) < 3)) or not any(char.isdigit() for char in text):
        return False  # "::1", "a::b" and "12::30" are no one's address
    try:
        ipaddress.IPv6Address(text)
    except ValueError:
        return False
    return True
