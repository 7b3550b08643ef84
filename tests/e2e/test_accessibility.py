"""Names, contrast, landmarks, what a screen reader hears, a page as narrow as a phone: plain checks of plain rules."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Page, expect

import bimo
from tests.e2e.conftest import OpenPage, answer_with, ask, ask_and_wait, wait_idle

STYLE = Path(bimo.__file__).parent / "web" / "style.css"
LONG_CODE = "x = '" + "很长的一行 wide " * 30 + "'"
WIDE_TABLE = "| " + "a long heading | " * 12 + "\n|" + "---|" * 12 + "\n| " + "值值值值值值 | " * 12
RICH = f"""# Title

Text with `code` and a [link](https://ok.example).

```python
{LONG_CODE}
```

{WIDE_TABLE}

{"A" * 300}

{"汉" * 300}
"""

# Every control that can be seen and has no accessible name, by the rules of accname that this page uses.
NAMELESS = """() => {
    const kinds = "button, a[href], input, select, textarea, [role=region], nav, aside, dialog";
    const controls = document.querySelectorAll(kinds);
    const text = (id) => document.getElementById(id)?.textContent.trim() ?? "";
    const name = (e) =>
        e.ariaLabel || (e.getAttribute("aria-labelledby") ?? "").split(" ").map(text).join("") ||
        [...(e.labels ?? [])].map((label) => label.textContent.trim()).join("") ||
        (["BUTTON", "A"].includes(e.tagName) ? e.textContent.trim() : "");
    return [...controls]
        .filter((e) => e.checkVisibility() && e.getAttribute("aria-hidden") !== "true" && !name(e))
        .map((e) => e.outerHTML.slice(0, 120));
}"""


def check_names(page: Page) -> None:
    assert page.evaluate(NAMELESS) == []
    duplicates = page.evaluate(
        """() => {
            const ids = [...document.querySelectorAll("[id]")].map((e) => e.id);
            return ids.filter((id, index) => ids.indexOf(id) !== index);
        }"""
    )
    assert duplicates == []
    dangling = page.evaluate(
        """() => [...document.querySelectorAll("[aria-describedby], [aria-labelledby], label[for]")].filter((e) =>
            `${e.getAttribute("aria-describedby") ?? ""} ${e.getAttribute("aria-labelledby") ?? ""} ${e.htmlFor ?? ""}`
                .split(" ").some((id) => id && !document.getElementById(id))).map((e) => e.outerHTML.slice(0, 120))"""
    )
    assert dangling == []


@pytest.mark.parametrize("locale", ["en-US", "zh-CN"])
def test_every_control_has_a_name(open_page: OpenPage, locale: str) -> None:
    page = open_page(locale=locale)
    check_names(page)
    answer_with(page, RICH)
    ask_and_wait(page, "show me")
    check_names(page)
    page.locator("article.user").hover()
    page.locator(".user .icon-button").first.click()  # the editor
    check_names(page)
    page.keyboard.press("Escape")
    page.locator(".sidebar-bottom button").first.click()  # the settings
    expect(page.locator("dialog.sheet")).to_be_visible()
    check_names(page)


def test_landmarks_and_headings(open_page: OpenPage) -> None:
    page = open_page()
    answer_with(page, "# One\n\n## Two")
    ask_and_wait(page, "outline")
    for role in ("main", "complementary", "navigation", "search", "log"):
        expect(page.get_by_role(role)).to_have_count(1)  # type: ignore[arg-type]
    levels = page.evaluate(
        "[...document.querySelectorAll('main :is(h1,h2,h3,h4,h5,h6)')].map((e) => Number(e.tagName[1]))"
    )
    assert levels == [1, 2, 2, 3, 4]


def test_a_screen_reader_hears_the_answer_in_sentences(open_page: OpenPage) -> None:
    page = open_page(settings={"max_tokens": 40})
    page.evaluate(
        """() => {
            window.said = [];
            const live = document.querySelector(".offscreen[role=status]");
            new MutationObserver(() => window.said.push(live.textContent)).observe(live,
                { childList: true, characterData: true, subtree: true });
        }"""
    )
    assert page.get_by_role("log").count() == 0
    ask(page, "Describe a tree in three sentences.")
    wait_idle(page)
    assert page.get_by_role("log").get_attribute("aria-live") == "off"  # or each token would be read
    said = page.evaluate("window.said")
    assert said[0] == "The answer is being written."
    assert 2 <= len(said) < 30
    words = re.findall(r"\w+", page.locator(".prose").inner_text())
    assert re.findall(r"\w+", " ".join(said[1:])) == words  # all of it, once


def luminance(colour: str) -> float:
    channels = [int(colour[index : index + 2], 16) / 255 for index in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    """WCAG 2.2's contrast ratio, 1 to 21."""
    bright, dim = sorted((luminance(one), luminance(other)), reverse=True)
    return (bright + 0.05) / (dim + 0.05)


def palettes() -> dict[str, dict[str, str]]:
    css = STYLE.read_text(encoding="utf-8")
    blocks = {
        "light": re.search(r"^:root \{(.*?)^\}", css, re.S | re.M),
        "dark": re.search(r'^:root\[data-theme="dark"\] \{(.*?)^\}', css, re.S | re.M),
        "system dark": re.search(r':root:not\(\[data-theme="light"\]\) \{(.*?)^  \}', css, re.S | re.M),
    }
    return {name: dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", found[1])) for name, found in blocks.items() if found}


def test_the_two_dark_palettes_are_one() -> None:
    found = palettes()
    assert found["dark"] == found["system dark"]
    assert found["dark"].keys() == found["light"].keys()


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_contrast_is_enough(theme: str) -> None:
    colours = palettes()[theme]
    grounds = ["paper", "paper-side", "paper-deep", "surface", "code", "accent-wash"]
    pairs = [(text, ground, 4.5) for text in ("ink", "ink-soft") for ground in grounds]
    pairs += [("accent", ground, 4.5) for ground in ("paper", "paper-side", "surface", "accent-wash")]
    pairs += [("on-accent", "accent", 4.5), ("on-accent", "accent-hover", 4.5), ("paper", "ink", 4.5)]
    pairs += [(name, "code", 4.5) for name in colours if name.startswith("hl-")]
    pairs += [("line-strong", ground, 3.0) for ground in ("paper", "surface")]  # the edges of fields
    for text, ground, least in pairs:
        ratio = contrast(colours[text], colours[ground])
        assert ratio >= least, f"{text} on {ground}: {ratio:.2f}, at least {least} is needed"


def overflow(page: Page) -> Any:
    """Elements that stick out of the window to the side, other than what scrolls inside its own frame."""
    return page.evaluate(
        """() => {
            const width = document.documentElement.clientWidth;
            const frames = ".code-block pre, .table-frame, .offscreen, .sidebar:not(.shown)";
            const out = [...document.querySelectorAll("body *")].filter((e) => {
                const box = e.getBoundingClientRect();
                const sticksOut = box.width && (box.right > width + 1 || box.left < -1);
                return sticksOut && !e.closest(frames) && e.checkVisibility();
            });
            const wide = document.documentElement.scrollWidth > width;
            return { wide, out: out.map((e) => e.outerHTML.slice(0, 100)) };
        }"""
    )


@pytest.mark.parametrize("locale", ["en-US", "zh-CN"])
def test_a_phone_needs_no_sideways_scrolling(open_page: OpenPage, locale: str) -> None:
    page = open_page(locale=locale, width=360, height=640, is_mobile=True, has_touch=True, device_scale_factor=2)
    assert overflow(page) == {"wide": False, "out": []}
    answer_with(page, RICH)
    ask_and_wait(page, "W" * 200 + "汉字" * 60)
    assert overflow(page) == {"wide": False, "out": []}

    page.locator(".top .icon-button").first.tap()  # the drawer
    expect(page.get_by_role("complementary")).to_be_visible()
    page.wait_for_function("() => document.querySelector('.sidebar').getBoundingClientRect().left === 0")
    assert overflow(page) == {"wide": False, "out": []}
    assert page.evaluate("document.querySelector('main').inert")
    page.keyboard.press("Escape")
    assert not page.evaluate("document.querySelector('main').inert")

    page.locator(".top .icon-button").last.tap()  # the settings
    expect(page.locator("dialog.sheet")).to_be_visible()
    page.wait_for_function("() => document.querySelector('dialog').getAnimations().length === 0")
    assert overflow(page) == {"wide": False, "out": []}
    small = page.evaluate(
        """() => [...document.querySelectorAll("button, select, input:not([type=radio]):not([type=checkbox])")]
            .filter((e) => e.checkVisibility() && !e.matches(".link-button, .offscreen, .copy-code"))
            .map((e) => [e.outerHTML.slice(0, 80), e.getBoundingClientRect()])
            .filter(([, box]) => box.width < 24 || box.height < 24).map(([html]) => html)"""
    )
    assert small == []  # WCAG 2.2, 2.5.8: targets of at least 24 px


def test_the_drawer_takes_and_returns_the_focus(open_page: OpenPage) -> None:
    page = open_page(width=360, height=640)
    opener = page.get_by_role("button", name="Show conversations")
    opener.focus()
    page.keyboard.press("Enter")
    expect(page.locator(".close-drawer")).to_be_focused()
    page.keyboard.press("Escape")
    expect(opener).to_be_focused()
    assert page.evaluate("document.querySelector('.sidebar').inert")


def test_reduced_motion_is_respected(open_page: OpenPage) -> None:
    page = open_page(reduced_motion="reduce")
    answer_with(page, "ok")
    page.locator(".sidebar-bottom button").first.click()
    duration = page.evaluate("getComputedStyle(document.querySelector('dialog')).animationDuration")
    assert float(duration.removesuffix("s")) < 0.001


def test_text_may_be_twice_as_large(open_page: OpenPage) -> None:
    """At 200 % text the window holds half as much (WCAG 1.4.4); 1280 px wide then behaves like 640."""
    page = open_page(width=640, height=512)
    answer_with(page, RICH)
    ask_and_wait(page, "zoomed")
    assert overflow(page) == {"wide": False, "out": []}
    expect(page.locator("#composer-text")).to_be_visible()
