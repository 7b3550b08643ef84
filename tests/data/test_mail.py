"""Mails as programs of all kinds write them; Chinese ones; broken ones."""

from __future__ import annotations

from email.message import EmailMessage
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bimo.data.collection import Collection
from bimo.data.mail import mail_text

MEETING = "今天下午开会，请准时参加。"


def test_the_plain_part_without_headers_and_attachments() -> None:
    mail = EmailMessage()
    mail["Subject"] = "发票 📎 und Grüße"
    mail["Received"] = "from localhost by example.org"
    mail.set_content("您好，\n发票见附件。\n")
    mail.add_alternative("<p>您好，<b>发票</b>见附件。</p>", subtype="html")
    mail.add_attachment("secret,1\n", filename="a.csv")
    text, subject = mail_text([bytes(mail)])
    assert subject == "发票 📎 und Grüße"
    assert text == f"{subject}\n\n您好，\n发票见附件。"


def test_html_alone_is_read_as_a_page() -> None:
    mail = EmailMessage()
    mail["Subject"] = "win"
    mail.set_content("<html><style>p{}</style><p>Click <a href='x'>here</a> &amp; win</p></html>", subtype="html")
    assert mail_text([bytes(mail)])[0] == "win\n\nClick here & win"


@pytest.mark.parametrize(
    ("headers", "body", "expected"),
    [
        (b"Content-Type: text/plain; charset=gb2312\n", MEETING.encode("gbk"), MEETING),
        (b"Content-Type: text/plain; charset=us-ascii\n", MEETING.encode("gbk"), MEETING),
        (b"Content-Type: text/plain; charset=nonsense-7\n", "Grüße".encode(), "Grüße"),
        (b"Content-Transfer-Encoding: base64\n", b"5L2g5aW9", "你好"),
        (b"Content-Transfer-Encoding: base64\n", b"*** not base64 at all", None),
        (b"Content-Type: multipart/mixed; boundary=\n", b"no boundary", None),
        (b"Subject: =?utf-8?b?5L2g5aW9?=\n", b"", "你好"),
        (b"Subject: =?utf-9?x?!!?=\n", b"text", "=?utf-9?x?!!?=\n\ntext"),
        (b"", b"", ""),
    ],
)  # fmt: skip
def test_what_senders_get_wrong(headers: bytes, body: bytes, expected: str | None) -> None:
    text, _ = mail_text([headers, b"\n", body])
    assert expected is None or text == expected


def test_who_writes_stands_before_it() -> None:
    mail = EmailMessage()
    mail["From"] = "王小明 <xm@example.org>"
    mail["Subject"] = "会议"
    mail.set_content(MEETING)
    assert mail_text([bytes(mail)]) == (f"From: 王小明 <xm@example.org>\n\n会议\n\n{MEETING}", "会议")
    assert mail_text([b"From: a@b.org\nReceived: x\n\n"]) == ("", "")


@given(
    st.binary(max_size=300), st.sampled_from([b"", b"Subject: ", b"Content-Type: multipart/mixed; boundary=a\n\n--a\n"])
)
def test_any_bytes_are_read(data: bytes, start: bytes) -> None:
    text, _ = mail_text([start + data])
    text.encode("utf-8")  # no halves of characters


def test_a_mail_that_would_fill_the_memory_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bimo.data.mail.MAX_WHOLE", 1 << 20)
    with pytest.raises(ValueError, match="more than 1 million bytes"):
        mail_text(b"x" * 1000 for _ in range(2000))


def test_a_folder_of_mails(tmp_path: Path) -> None:
    (tmp_path / "a.eml").write_bytes(b"Subject: one\nReceived: from x\n\nHello.\n")
    (tmp_path / "empty.eml").write_bytes(b"")
    mails = Collection(str(tmp_path))
    assert [(document.title, document.text) for document in mails.documents()] == [("one", "one\n\nHello.")]
    assert [damage.reason for damage in mails.damages] == ["is empty"]
