"""Recall on what faker makes, in both languages; and ordinary texts full of numbers, in which nothing may be found."""

from __future__ import annotations

import time

import pytest
from faker import Faker

from bimo.data.privacy import Span, find, mask

MADE = {
    "EMAIL": ["email", "company_email"],
    "PHONE": ["phone_number"],
    "ID": ["ssn"],
    "CARD": ["credit_card_number"],
    "IP": ["ipv4", "ipv6", "ipv4_private"],
}
FRAMES = {"zh_CN": ("联系方式：{}，谢谢。", "请打{}找我"), "en_US": ("You can reach me at {}, thanks.", "It is {}.")}


@pytest.mark.parametrize("locale", FRAMES)
@pytest.mark.parametrize("kind", MADE)
def test_recall_on_made_up_people(locale: str, kind: str) -> None:
    faker = Faker(locale)
    faker.seed_instance(20240601)
    made = [getattr(faker, MADE[kind][i % len(MADE[kind])])() for i in range(400)]
    found = 0
    for i, value in enumerate(made):
        frame = FRAMES[locale][i % 2]
        found += mask(frame.format(value)) == (frame.format(f"[{kind}]"), 1)
    assert found >= 0.95 * len(made)


ORDINARY = [
    "会议定于2024-01-15 10:30:00举行，2023/12/31截止，2024年1月15日至2025年2月16日有效。",
    "ISBN 978-7-111-54742-6，ISBN：7302423288，ISSN 1234-5679",
    "价格是1,234,567.00元，营收13800138000元，约￥18612345678",
    "版本 1.2.3.4 与 v10.2.3.4，version 1.2.3.4，见第 3.2.1.4 节",
    "圆周率3.14159265358979323846，经度116.4074，北纬39.9042",
    "1999-2000年，2020 2021 2022，人口 1400000000 人，比分 3-2 110-98 102-99",
    "订单号：2024011512304567890，QQ：2345678901",
    "The years 1914-1918 and 1939-1945 cost $12,345,678.90 and 3 000 000 000 lives.",
    "std::string a::b at 12:30:45, commit 1a2b3c4d5e6f7890, sha 20240115123045",
    "Timestamps 1700000000 and 1705312245123; x = 1234567890123456; numpy==1.26.4.1; doi:10.1145/3297858.3304013",
    "Call 911 or 555-1234, room 12-34-56; @user wrote a@b; 1/2/2023-3/4/2024",
    "床前明月光，疑是地上霜。第12回 二〇二四年",
    "身份证号 11010519491231002Y 写错了，110105194912310021 校验位也不对",
    "card 4111111111111112 fails its check digit",
    "Long integers range from -2147483648 to 2147483647, unsigned ones to 4294967295.",
    "长整数变量的范围从 -2147483648 到 2147483647。",
    "'LibreOffice 7.4.1.2 (Debian)', iOS 14.2.1.3；使用 LibreOffice 24.2.1.2 或更新的",
]


@pytest.mark.parametrize("text", ORDINARY)
def test_no_false_alarm_on_ordinary_text(text: str) -> None:
    assert find(text) == []
    assert mask(text) == (text, 0)


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("身份证11010519491231002X，手机+86 138-1234-5678。", "身份证[ID]，手机[PHONE]。"),
        ("座机010-62345678转123，或(021)62345678", "座机[PHONE]，或[PHONE]"),
        ("卡号 4111 1111 1111 1111，邮箱:zhang.san@qq.com.", "卡号 [CARD]，邮箱:[EMAIL]."),
        ("13812345678 13912345678", "[PHONE] [PHONE]"),
        ("Call (212) 555-0123 x12 or +44 20 7946 0958 today", "Call [PHONE] or [PHONE] today"),
        ("server 192.168.1.1:8080 and 2001:db8::8a2e:370:7334", "server [IP]:8080 and [IP]"),
        ("ssn 123-45-6789", "ssn [ID]"),
        ("call 2147483646", "call [PHONE]"),  # the neighbours of a round number are numbers to call
        ("Server 10.20.30.40, WebServer 1.2.3.4, Host 8.8.4.4", "Server [IP], WebServer [IP], Host [IP]"),
        ("From 1.2.3.4 via Router 9.8.7.6; Alice 81.2.69.142", "From [IP] via Router [IP]; Alice [IP]"),
    ],
)
def test_masks_stand_where_the_data_stood(text: str, masked: str) -> None:
    assert mask(text)[0] == masked
    assert mask(masked) == (masked, 0)


def test_spans_are_places_in_the_text() -> None:
    assert find("😀打 13812345678 给 a@b.cn") == [Span(3, 14, "PHONE"), Span(17, 23, "EMAIL")]


@pytest.mark.parametrize(
    "piece",
    [
        "",
        "1",
        "1 ",
        "a",
        "@",
        "a@",
        "a@a.",
        "1.",
        ":",
        "1:",
        "+1",
        "(1)",
        "١",
        "138 ",
        "\x00",
        "👨‍👩‍👧",
        "\u0301",
        "א1",
    ],
)
def test_hostile_text_takes_linear_time(piece: str) -> None:
    text = piece * (300_000 // max(1, len(piece)))
    start = time.perf_counter()
    assert isinstance(find(text), list)
    assert time.perf_counter() - start < 4
