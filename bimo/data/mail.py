"""What a mail says: who writes, its subject and its text, without the headers of its way and without attachments.

    text, subject = mail_text(iter([data]))     # of an .eml file, RFC 5322 and MIME

Mails are written by all kinds of programs: a header or a character set that is none is read as well as it can be.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from email.errors import MessageError
from email.header import decode_header, make_header
from email.message import Message
from email.parser import BytesFeedParser

from bimo.data.parsers import MAX_WHOLE, find_encoding, html_text

__all__ = ["mail_text"]


def mail_text(blocks: Iterable[bytes]) -> tuple[str, str]:
    """("From: " and the sender, the subject and the text, with empty lines between them; the subject). The text is the
    plain part, where there is one, else that of the HTML part. Raises ValueError for one too large for memory."""
    parser, size = BytesFeedParser(), 0
    for block in blocks:
        if (size := size + len(block)) > MAX_WHOLE:
            raise ValueError(f"it has more than {MAX_WHOLE >> 20} million bytes, and must be read as a whole")
        parser.feed(block)
    message = parser.close()
    plain: list[str] = []
    pages: list[str] = []
    for part in message.walk():
        if part.is_multipart() or part.get_filename() or part.get_content_disposition() == "attachment":
            continue
        if (kind := part.get_content_type()) == "text/plain":
            plain.append(_content(part))
        elif kind == "text/html":
            pages.append(html_text(_content(part))[0])
    body = "\n\n".join(text.strip() for text in plain if text.strip()) or "\n\n".join(pages).strip()
    subject = _header(message.get("subject"))
    said = "\n\n".join(filter(None, (subject, body)))
    sender = _header(message.get("from")) if said else ""  # a name alone says nothing
    return f"From: {sender}\n\n{said}" if sender else said, subject


def _content(part: Message) -> str:
    payload = part.get_payload(decode=True)
    if not isinstance(payload, bytes):
        return ""
    for name in (part.get_content_charset(), find_encoding(lambda: iter([payload]), "auto")[0]):
        try:
            return payload.decode(name or "ascii").replace("\r\n", "\n")
        except (LookupError, UnicodeDecodeError):
            continue
    return payload.decode("utf-8", "replace").replace("\r\n", "\n")


def _header(raw: object) -> str:
    """=?utf-8?b?5L2g5aW9?= is 你好; what cannot be decoded stays as it is."""
    text = "" if raw is None else str(raw)
    with contextlib.suppress(MessageError, LookupError, ValueError):
        text = str(make_header(decode_header(text)))
    return " ".join(text.encode("utf-8", "replace").decode().split())
