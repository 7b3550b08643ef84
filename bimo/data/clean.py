"""Steps that rewrite a text; each is `(str) -> str`, takes nothing away that a reader would miss.

    for name, rewrite in REWRITES.items():
        text = rewrite(text)            # in this order: each builds on what the one before it mended

All are guarded by a test that costs next to nothing, since most texts need most steps not at all. What counts as a
Chinese text's own (curly quotes, full-width punctuation, indentation) is left alone.
"""

from __future__ import annotations

import html
import re
import unicodedata
from collections.abc import Callable
from functools import lru_cache
from html.entities import html5
from typing import Any

__all__ = ["REWRITES", "Rewrite", "full_width", "markup", "mojibake", "notices", "simplified", "unicode"]

Rewrite = Callable[[str], str]

# UTF-8 read as Latin-1, Windows-1252, Mac Roman, ... always holds one of these; ftfy's own test is 20 times slower.
FOREIGN = re.compile("[\u0080-\u058f]")
# UTF-8 read as GBK: what "，", "、", "的", "一", "你", "可", "在" begin with turns into these, rare otherwise.
GBK_MARKS = re.compile("[锛銆鐨涓浣鍙鍦鎴杩濂]")
GBK_RUN = re.compile("[^\\x00-\\x7f]+(?:\\?[^\\x00-\\x7f]*)*")


def mojibake(text: str) -> str:
    """Undo a decoding with the wrong encoding, line by line: "cafÃ©" -> "café", "浣犲ソ" -> "你好"."""
    if text.isascii():
        return text
    if FOREIGN.search(text):
        import ftfy
        from ftfy.badness import is_bad

        lines = text.split("\n")
        text = "\n".join(ftfy.fix_encoding(line) if FOREIGN.search(line) and is_bad(line) else line for line in lines)
    if GBK_MARKS.search(text):
        text = GBK_RUN.sub(_from_gbk, text)
    return text


def _from_gbk(run: re.Match[str]) -> str:
    """The run as UTF-8, if its GBK bytes are that: three or more characters of Chinese by accident never are."""
    if len(run[0]) < 3 or not GBK_MARKS.search(run[0]):
        return run[0]
    try:
        return run[0].encode("gb18030").decode("utf-8")
    except UnicodeError:
        return run[0]


INVISIBLE = (
    "\x00-\x08\x0b-\x1f\x7f-\x9f\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180e\u200b-\u200f\u2028-\u202e"
    "\u2060-\u206f\u3164\ufeff\uffa0\ufff0-\ufffb\U000e0000-\U000e007f"
)
TO_CLEAN = re.compile(f"[{INVISIBLE}]")
LINE_ENDS = re.compile("\r\n?|[\x0b\x0c\x85\u2028\u2029]")
# Joiners make letters of Arabic, Indic, Mongolian and Khmer script, and one emoji out of several.
JOINED = "\u0600-\u08ff\u0900-\u0dff\u0f00-\u109f\u1780-\u18af\ufb50-\ufdff\ufe70-\ufefc"
EMOJI = "\u00a9\u00ae\u203c\u2049\u2122\u2139\u2190-\u2bff\u3030\u303d\u3297\u3299\ufe0f\U0001f000-\U0001faff"
REMOVED = re.compile(
    f"(?P<flag>\U0001f3f4[\U000e0061-\U000e007a\U000e0030-\U000e0039]{{1,8}}\U000e007f)|(?<=[{JOINED}])(?P<joiner>[\u200c\u200d])"
    f"|(?<=[{EMOJI}])(?P<emoji>\u200d)(?=[{EMOJI}])|[{INVISIBLE}]"
)
BLANK_LINES = re.compile("\n{3,}")
TRAILING = re.compile("[^\\S\n]\n")


def unicode(text: str) -> str:
    """NFC, line ends as \\n, no control and zero-width characters, no spaces at line ends, at most one empty line.

    Joiners stay where they join: between emoji, and after letters of scripts that need them.
    """
    if not text.isascii() and not unicodedata.is_normalized("NFC", text):
        text = unicodedata.normalize("NFC", text)
    if TO_CLEAN.search(text):
        text = LINE_ENDS.sub("\n", text)
        text = REMOVED.sub(lambda match: match[0] if match.lastgroup else "", text)
        text = unicodedata.normalize("NFC", text)  # what stood between a letter and its accent is gone
    if TRAILING.search(text):
        text = "\n".join(line.rstrip() for line in text.split("\n"))
    if "\n\n\n" in text:
        text = BLANK_LINES.sub("\n\n", text)
    return text.lstrip("\n").rstrip()


BLOCKS = (
    "p|div|br|hr|li|ul|ol|dl|dt|dd|tr|table|tbody|thead|tfoot|h[1-6]|"
    "section|article|header|footer|nav|aside|blockquote|pre|form|center"
)
INLINE = (
    "a|b|i|u|s|em|strong|span|font|small|big|sub|sup|del|ins|strike|code|kbd|tt|img|td|th|input|button|label|main|abbr|cite|"
    "mark|figure|figcaption|iframe|wbr|html|body|head|meta|link|title|script|style|noscript|svg|path|caption|col|colgroup"
)
TAG = re.compile(rf"<(/?)({BLOCKS}|{INLINE})(?=[\s/>])([^<>]{{0,2000}})>", re.IGNORECASE)
IS_BLOCK = re.compile(BLOCKS)
ROWS = frozenset(("li", "tr", "dt", "dd"))  # one below the other, no empty line between
VOID = frozenset(("br", "hr", "img", "input", "wbr", "meta", "link", "col"))
HIDDEN = re.compile(r"<(?:!--|(script|style)(?=[\s>])[^<>]{0,2000}>)", re.IGNORECASE)
ENTITY = re.compile(r"&(?:#[0-9]{1,7}|#[xX][0-9a-fA-F]{1,6}|[A-Za-z][A-Za-z0-9]{1,30});")
CODE = re.compile(
    r"(^(?:```|~~~).*(?:\n.*)*?(?:\n(?:```|~~~)[^\S\n]*$|\Z)|`[^`\n]{1,500}`|^(?: {4}|\t).*$)", re.MULTILINE
)

# Whole lines that belong to a page, not to its text. Each alternative starts with a literal, so most lines cost little.
NOTICE = re.compile(
    r"""^[^\S\n]*(?:
      (?:©|\(c\)[ ]|copyright[ ](?:©|\(c\)|\d{4})|版[权權]所有(?![^\s:：,，(（©/|])|著作权[ ]?©)[^\n]{0,150}
    | all[ ]rights[ ]reserved\.?
    | [^\n]{0,60}[京沪粤浙苏闽川鲁豫湘鄂](?:ICP[备证]|公网安备)[^\n]{0,60}
    | (?:we|this[ ](?:web)?site|our[ ](?:web)?site)[ ]uses?[ ]cookies\b[^\n]{0,300}
    | (?:accept|reject|manage)[ ](?:all[ ])?cookies(?:[ ]settings)?
    | (?:本网站|本站|我们)(?:会)?使用[ ]?cookies?[^\n]{0,150}
    | skip[ ]to[ ](?:main[ ])?(?:content|navigation) | back[ ]to[ ]top
    | (?:click[ ]here[ ]to[ ])?(?:read|load|show)[ ]more(?:\.\.\.|…)?
    | (?:home|首页|主页)(?:[ ]?[>»›|/][ ]?[^\n>»›|/]{1,40}){1,8}
    | (?:上一篇|下一篇|上一页|下一页|上一章|下一章|相关阅读|相关文章|延伸阅读)(?:[:：][^\n]{0,100})?
    | (?:返回|回到)(?:顶部|首页|目录|上一页) | (?:点击)?(?:查看|阅读|加载)(?:更多|全文)(?:…|\.\.\.)?
    | (?:分享到|扫一扫|扫码关注|微信扫码|关注我们的公众号)[^\n]{0,40}
    | share[ ](?:this|on)(?:[ ](?:facebook|twitter|x|linkedin|post|article|page))*
    | (?:subscribe|sign[ ]up)[ ](?:to|for)[ ](?:our|the)[ ]newsletter[^\n]{0,60}
    | (?:(?:privacy[ ]policy|terms[ ]of[ ](?:use|service)|contact[ ]us|about[ ]us|sitemap
       |log[ ]?in|sign[ ](?:in|up)|register|隐私政策|使用条款|服务条款|联系我们|关于我们|网站地图|免责声明|登录|注册)
       (?:[ ]?[|·/\-][ ]?|[^\S\n]*(?=\n|\Z))){1,12}
    | (?:please[ ]enable|you[ ](?:need|have)[ ]to[ ]enable)[ ]javascript[^\n]{0,150}
    | javascript[ ]is[ ](?:disabled|not[ ]enabled)[^\n]{0,150}
    | (?:请(?:先)?(?:启用|开启|打开)|您的浏览器(?:不支持|未启用|禁用了))[ ]?javascript[^\n]{0,100}
    | advertisement | 广告
    )[^\S\n]*(?:\n|\Z)""",
    re.IGNORECASE | re.MULTILINE | re.VERBOSE,
)


def markup(text: str) -> str:
    """Left-over HTML tags, comments, scripts and entities go, and lines of navigation, copyright and cookie notices.

    Only names HTML has are tags, so "a < b", "<3" and List<String> stay; `Vec<a>` too, for nothing closes it. Markdown
    code (fenced, indented, in backquotes) is not touched. A text of nothing but notices stays: filters may drop it.
    """
    if "<" in text or "&" in text:
        if "`" in text or "~~~" in text or "    " in text or "\t" in text:
            parts = CODE.split(text)  # odd places are code
            untagged = "".join(part if place % 2 else _untag(part) for place, part in enumerate(parts))
        else:
            untagged = _untag(text)
        if untagged != text:
            text = BLANK_LINES.sub("\n\n", untagged).strip("\n")
    return notices(text)


def notices(text: str) -> str:
    """What `markup` does to texts of web pages and Word files: a parser took their tags, those left are meant."""
    without = NOTICE.sub("", text)
    if without == text or not without.strip():
        return text
    return without.strip("\n")


def _untag(text: str) -> str:
    if "<" in text:
        text = _cut_hidden(text)
        if TAG.search(text):
            closed = {match[2].lower() for match in TAG.finditer(text) if match[1]}

            def replaced(tag: re.Match[str]) -> str:
                name = tag[2].lower()
                if not (tag[1] or name in closed or name in VOID or "=" in tag[3]) and not IS_BLOCK.fullmatch(name):
                    return tag[0]
                if IS_BLOCK.fullmatch(name):
                    return "" if tag[1] and name in ROWS else "\n"
                return " " if name in ("td", "th") else ""

            text = TAG.sub(replaced, text)
    if "&" in text:  # last: "&lt;b&gt;" is a writer's way to show a tag, and stays one
        text = ENTITY.sub(_character, text)
    return text


def _cut_hidden(text: str) -> str:
    """Without comments, scripts and styles, what is in them included; one that never ends stays."""
    kept, start = [], 0
    ends: dict[str, int] = {}
    lowered = ""
    for opening in HIDDEN.finditer(text):
        if opening.start() < start:
            continue
        closing = f"</{opening[1].lower()}>" if opening[1] else "-->"
        lowered = lowered or text.lower()
        if len(lowered) != len(text):  # "İ" is two characters in lower case
            lowered = text
        if ends.get(closing, -1) < opening.end():
            found = lowered.find(closing, opening.end())
            ends[closing] = found if found >= 0 else len(text)
        if ends[closing] < len(text):
            kept.append(text[start : opening.start()])
            start = ends[closing] + len(closing)
    return "".join([*kept, text[start:]]) if start else text


def _character(entity: re.Match[str]) -> str:
    if entity[0][1] != "#" and entity[0][1:] not in html5:
        return entity[0]
    character = html.unescape(entity[0])
    if character == "\xa0":
        return " "
    return entity[0] if TO_CLEAN.search(character) or "\ud800" <= character <= "\udfff" else character


WIDE = {wide: wide - 0xFEE0 for wide in range(0xFF01, 0xFF5F)}
WIDE_RUN = re.compile("[０-９Ａ-Ｚａ-ｚ]+(?:[．／＋－＠＿＆＝＃：][０-９Ａ-Ｚａ-ｚ]+)*％?")
HAS_WIDE = re.compile("[０-９Ａ-Ｚａ-ｚ]")


def full_width(text: str) -> str:
    """Full-width letters, digits and spaces become ASCII, with the signs inside numbers and addresses ("３．１４％").

    Chinese punctuation stays: ，。！？：；（）「」《》.
    """
    if text.isascii():
        return text
    text = text.replace("\u3000", " ")
    return WIDE_RUN.sub(lambda run: run[0].translate(WIDE), text) if HAS_WIDE.search(text) else text


NOT_CHINESE = re.compile("[ぁ-んァ-ヺ\u1100-\u11ff가-힣]")


def simplified(text: str) -> str:
    """Traditional Chinese becomes simplified (OpenCC t2s: 發 and 髮 by their words). Lines with kana or hangul stay.

    A text with more than a tenth of kana is Japanese and stays whole: its kanji-only lines too.
    """
    if text.isascii():
        return text
    foreign = NOT_CHINESE.search(text)
    if not foreign:
        return str(_converter().convert(text))  # 200 MB/s: a test whether it is needed would be slower
    if 10 * len(NOT_CHINESE.findall(text)) > len(text):
        return text
    lines = text.split("\n")
    return "\n".join(line if NOT_CHINESE.search(line) else str(_converter().convert(line)) for line in lines)


@lru_cache(maxsize=1)
def _converter() -> Any:
    import opencc

    return opencc.OpenCC("t2s")


REWRITES: dict[str, Rewrite] = {
    "mojibake": mojibake,
    "unicode": unicode,
    "markup": markup,
    "full_width": full_width,
    "simplified": simplified,
}
