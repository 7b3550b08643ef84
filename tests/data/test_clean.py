"""Each step mends what it is for, leaves alone what looks like it, and takes time in proportion to the text."""

from __future__ import annotations

import time

import pytest

from bimo.data.clean import REWRITES, full_width, markup, mojibake, simplified, unicode

FAMILY = "👨‍👩‍👧"
SCOTLAND = "🏴\U000e0067\U000e0062\U000e0073\U000e0063\U000e0074\U000e007f"
PROSE = (
    "他说：“你好……”——‘是’，《论语》有云：「学而时习之，不亦说乎？」价格（约３％）下跌。",
    "She said “it’s naïve”, e.g. café — 5° × 2 ≠ 3 · Привет, Ünïcode; a < b && c > d.",
)


@pytest.mark.parametrize(
    ("text", "encoding"),
    [
        ("你好，世界。今天天气很好", "latin-1"),
        ("naïve café “quoted” – Größe", "latin-1"),
        ("naïve café – Größe und Übermut", "cp1252"),
        ("Привет, мир", "latin-1"),
    ],
)
def test_utf8_that_was_read_in_a_western_encoding_is_mended_beside_good_lines(text: str, encoding: str) -> None:
    broken = text.encode().decode(encoding)
    assert mojibake(f"前面一行是好的。\n{broken}") == f"前面一行是好的。\n{text}"


def test_utf8_that_was_read_as_gbk_is_mended() -> None:
    text = "今天天气很好我们都在这里"
    broken = text.encode().decode("gb18030")
    assert broken != text
    assert mojibake(f"title: {broken} end") == f"title: {text} end"


@pytest.mark.parametrize("text", [*PROSE, "涓涓细流，汇成大海", "浣纱溪上，鐵馬冰河", FAMILY, "שלום עולם مرحبا"])
def test_good_text_is_no_mojibake(text: str) -> None:
    assert mojibake(text) == text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a\r\nb\rc\x85d\u2028e\fg", "a\nb\nc\nd\ne\ng"),
        ("\ufeff零\u200b宽\u00ad字\x00符\x1b。", "零宽字符。"),
        ("行尾空格  \n　\n\n\n\n第二段\t\n", "行尾空格\n\n第二段"),
        ("e\u0301e\u200b\u0301", "éé"),
        ("ad\u200dmin 你\u200c好", "admin 你好"),
        ("x\U000e0068\U000e0069y", "xy"),  # hidden text in tag characters
        ("\u202egnp.exe", "gnp.exe"),
    ],
)
def test_unicode_has_one_spelling(text: str, expected: str) -> None:
    assert unicode(text) == expected


@pytest.mark.parametrize(
    "text", [FAMILY, SCOTLAND, "❤️‍🔥", "می‌خواهم", "क्‍ष", "  indented\n\ttab", "　　段首缩进", *PROSE]
)
def test_unicode_keeps_what_has_a_meaning(text: str) -> None:
    assert unicode(text) == text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<b>粗体</b>和<i class='x'>斜体</i>", "粗体和斜体"),
        ("第一行<br/>第二行", "第一行\n第二行"),
        ("<ul><li>甲</li><li>乙</li></ul><p>段</p><p>落</p>", "甲\n乙\n\n段\n\n落"),
        ("one<script>if (a < b) { x() }</script> two<!-- <b> -->", "one two"),
        ("Tom &amp; Jerry&nbsp;&#169;&hellip; AT&T; &lt;b&gt;", "Tom & Jerry ©… AT&T; <b>"),
        ('see <a href="https://example.org/?a=1&b=2">here</a>', "see here"),
    ],
)
def test_tags_and_entities_go(text: str, expected: str) -> None:
    assert markup(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "a < b 且 c > d，爱你 <3",
        "List<String> names; Map<K, V> m; Vec<a> v; vector<i> w;",
        "用 `<b>` 标签：\n\n```html\n<b>粗</b> &amp;\n```",
        "写法：\n\n    <p>&lt;</p>",
        "x <- y; if (a<b) p = &x;",
        "<thinking> and <unknown-tag>",
    ],
)
def test_what_only_looks_like_markup_stays(text: str) -> None:
    assert markup(text) == text


@pytest.mark.parametrize(
    "notice",
    [
        "首页 > 新闻 > 国内",
        "Home » Docs » API",
        "版权所有 © 2020 某某公司",
        "© 2021 Example Inc.",
        "Copyright 2020 Example. All rights reserved.",
        "京ICP备12345678号",
        "We use cookies to improve your experience.",
        "本网站使用 cookie 以提升体验",
        "上一篇：好消息",
        "返回顶部",
        "登录 | 注册",
        "Privacy Policy | Terms of Use",
        "Please enable JavaScript to continue.",
    ],
)
def test_lines_of_the_page_go(notice: str) -> None:
    assert markup(f"正文 text\n{notice}\n更多 more") == "正文 text\n更多 more"
    assert markup(notice) == notice  # nothing else is left: not ours to empty a document


@pytest.mark.parametrize(
    "line",
    [
        "版权所有者应当注意期限",
        "Copyright law is old.",
        "Home is where the heart is",
        "登录后请修改密码",
        "广告业在增长",
        "1/2 首页不见了",
    ],
)
def test_sentences_about_such_things_stay(line: str) -> None:
    assert line in markup(f"一\n{line}\n三").split("\n")


def test_full_width_letters_and_digits_become_ascii_and_punctuation_stays() -> None:
    text = "ＡＢＣａｂｃ０１２　３．１４％ ａ＠ｂ．ｃｏｍ，。！？：；（）「」《》、"
    assert full_width(text) == "ABCabc012 3.14% a@b.com，。！？：；（）「」《》、"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("頭髮長，發展快，後來乾淨了", "头发长，发展快，后来干净了"),
        ("皇后與乾隆皇帝", "皇后与乾隆皇帝"),
        ("简体不变 and English", "简体不变 and English"),
        ("東京の図書館で漢字を学ぶ\n東京都", "東京の図書館で漢字を学ぶ\n東京都"),
        (
            "這裡說明日語詞彙的寫法和讀音，還有許多例子\n図書館の",
            "这里说明日语词汇的写法和读音，还有许多例子\n図書館の",
        ),
        ("韓國 한국어", "韓國 한국어"),
    ],
)
def test_traditional_becomes_simplified_but_japanese_and_korean_stay(text: str, expected: str) -> None:
    assert simplified(text) == expected


HOSTILE = [
    "",
    "a",
    "<",
    "&",
    "<!--",
    "<p ",
    "<script>",
    "`",
    "```\n",
    "    ",
    " ",
    "\x00",
    FAMILY,
    "\u200d",
    "\u0301",
    "浣",
]
HOSTILE += ["Ã", "é", "\n", "Ａ", "１．", "首页>", "登录", "Home > ", "\ufeff", "עברית", "```\n<", "~~~ x\n <"]


@pytest.mark.parametrize("piece", HOSTILE)
def test_hostile_texts_take_linear_time(piece: str) -> None:
    text = piece * (200_000 // max(1, len(piece)))
    for rewrite in REWRITES.values():
        start = time.perf_counter()
        assert isinstance(rewrite(text), str)
        assert time.perf_counter() - start < 5  # quadratic would be minutes


def test_steps_run_in_the_order_of_the_recipe() -> None:
    assert list(REWRITES) == ["mojibake", "unicode", "markup", "full_width", "simplified"]
