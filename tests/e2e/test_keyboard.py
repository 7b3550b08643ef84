"""Everything without a mouse, and typing Chinese without accidents."""

from __future__ import annotations

import pytest
from playwright.sync_api import CDPSession, Page, expect

from tests.e2e.conftest import OpenPage, answer_id, answer_with, ask, ask_and_wait, last_answer, never_ending, wait_idle


def focused(page: Page) -> str:
    """The accessible name (or id) of what has the focus."""
    return page.evaluate(
        "(({ ariaLabel, innerText, id }) => ariaLabel || innerText?.trim() || id)(document.activeElement)"
    )


def tab_to(page: Page, name: str, limit: int = 60) -> None:
    """Press Tab until the control called `name` has the focus, and check that the focus can be seen."""
    passed: list[str] = []
    for _ in range(limit):
        page.keyboard.press("Tab")
        passed.append(focused(page))
        if passed[-1] == name:
            outline = page.evaluate("getComputedStyle(document.activeElement).outline")
            assert "solid" in outline and " 0px" not in outline, f"{name} has the focus and does not show it: {outline}"
            return
    pytest.fail(f"Tab does not reach {name!r}, but stays at {passed[-12:]}")


def test_a_whole_session_without_a_mouse(open_page: OpenPage) -> None:
    page = open_page()
    expect(page.locator("#composer-text")).to_be_focused()
    page.keyboard.type("First line")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("second line")
    page.keyboard.press("Enter")
    wait_idle(page)
    assert page.locator(".bubble").inner_text() == "First line\nsecond line"
    expect(page.locator("#composer-text")).to_be_focused()
    expect(page.locator("#composer-text")).to_have_value("")

    before = answer_id(page)
    tab_to(page, "Another answer")
    page.keyboard.press("Enter")
    wait_idle(page, after=before)
    tab_to(page, "Previous version")
    page.keyboard.press("Space")
    expect(page.locator(".assistant .versions")).to_contain_text("1/2")
    assert focused(page) == "Previous version"  # the version changed under it

    tab_to(page, "Settings", limit=80)
    page.keyboard.press("Enter")
    expect(page.get_by_role("dialog")).to_be_visible()
    tab_to(page, "Close")
    page.keyboard.press("Enter")
    expect(page.get_by_role("dialog")).to_be_hidden()
    tab_to(page, "New chat", limit=80)
    page.keyboard.press("Enter")
    expect(page.locator(".greeting")).to_be_visible()
    expect(page.locator("#composer-text")).to_be_focused()


def test_arrow_up_edits_the_last_question(open_page: OpenPage) -> None:
    page = open_page()
    answer_with(page, "ok")
    ask_and_wait(page, "typo")
    page.keyboard.press("ArrowUp")
    expect(page.get_by_label("Edit your message")).to_be_focused()
    page.keyboard.press("Escape")
    expect(page.locator("#composer-text")).to_be_focused()
    expect(page.locator(".bubble")).to_have_text("typo")


def test_escape_stops_and_hands_the_focus_back(open_page: OpenPage) -> None:
    page = open_page(before=never_ending)
    ask(page, "Count to a million.")
    page.wait_for_selector("article.assistant .prose")
    page.keyboard.press("Escape")
    wait_idle(page)
    assert last_answer(page)
    expect(page.locator("#composer-text")).to_be_focused()


def test_shortcuts(open_page: OpenPage) -> None:
    page = open_page()
    answer_with(page, "ok")
    ask_and_wait(page, "one")
    page.keyboard.press("Control+k")
    expect(page.get_by_label("Search")).to_be_focused()
    page.keyboard.press("Control+Shift+O")
    expect(page.locator(".greeting")).to_be_visible()
    expect(page.locator("#composer-text")).to_be_focused()
    page.keyboard.press("Shift+Tab")
    page.keyboard.press("/")
    expect(page.locator("#composer-text")).to_be_focused()
    expect(page.locator("#composer-text")).to_have_value("")
    page.keyboard.type("a/b")
    expect(page.locator("#composer-text")).to_have_value("a/b")
    page.reload()  # what was not sent is still there
    expect(page.locator("#composer-text")).to_have_value("a/b")


def test_the_skip_link_is_first(open_page: OpenPage) -> None:
    page = open_page()
    tab_to(page, "Skip to the message box")
    first = page.evaluate("document.querySelector('a[href], button, input, select, textarea').className")
    assert first == "skip"
    page.keyboard.press("Enter")
    expect(page.locator("#composer-text")).to_be_focused()


def test_the_settings_keep_the_focus_and_hand_it_back(open_page: OpenPage) -> None:
    page = open_page()
    page.get_by_role("button", name="Settings").focus()
    page.keyboard.press("Enter")
    expect(page.get_by_role("dialog")).to_be_visible()
    for _ in range(40):
        page.keyboard.press("Tab")
        inside = page.evaluate("document.activeElement === document.body || !!document.activeElement.closest('dialog')")
        assert inside, "Tab left the open dialog"
    page.keyboard.press("Escape")
    expect(page.get_by_role("button", name="Settings")).to_be_focused()


def test_deleting_moves_the_focus_to_a_neighbour(open_page: OpenPage) -> None:
    page = open_page()
    answer_with(page, "ok")
    for title in ("one", "two"):
        page.get_by_role("button", name="New chat").click()
        ask_and_wait(page, title)
    page.get_by_role("button", name="Delete “two”").focus()
    page.keyboard.press("Enter")
    expect(page.get_by_role("button", name="Delete “one”")).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.get_by_role("button", name="New chat")).to_be_focused()


def compose(session: CDPSession, text: str) -> None:
    """What an input method shows while it waits for the user's choice."""
    session.send("Input.imeSetComposition", {"text": text, "selectionStart": len(text), "selectionEnd": len(text)})


def test_enter_in_an_input_method_does_not_send(open_page: OpenPage) -> None:
    page = open_page(locale="zh-CN")
    session = page.context.new_cdp_session(page)
    events = page.evaluate_handle(
        """() => {
            const seen = [];
            document.addEventListener("keydown", (e) => seen.push([e.key, e.isComposing]), true);
            return seen;
        }"""
    )
    page.focus("#composer-text")
    compose(session, "ni hao")
    page.keyboard.press("Enter")  # picks the word
    assert ["Enter", True] in events.json_value(), "the browser did not compose: this test proves nothing"
    assert page.locator(".bubble").count() == 0
    compose(session, "ni")
    page.keyboard.press("Escape")  # cancels the word
    assert page.locator(".bubble").count() == 0
    session.send("Input.insertText", {"text": "你好"})  # commits
    page.keyboard.press("Enter")
    wait_idle(page)
    assert "你好" in page.locator(".bubble").inner_text()


def test_the_enter_that_safari_sends_after_composing(open_page: OpenPage) -> None:
    """Safari ends the composition first, and reports the key as 229."""
    page = open_page()
    page.fill("#composer-text", "你好")
    page.evaluate(
        """() => {
            const event = new KeyboardEvent("keydown", { key: "Enter", keyCode: 229, bubbles: true, cancelable: true });
            document.getElementById("composer-text").dispatchEvent(event);
        }"""
    )
    assert page.locator(".bubble").count() == 0
    expect(page.locator("#composer-text")).to_have_value("你好")


def test_renaming_with_an_input_method(open_page: OpenPage) -> None:
    page = open_page(locale="zh-CN")
    answer_with(page, "好")
    ask_and_wait(page, "旧")
    session = page.context.new_cdp_session(page)
    page.get_by_role("button", name="重命名“旧”").focus()
    page.keyboard.press("Enter")
    expect(page.get_by_label("新标题")).to_be_focused()
    compose(session, "xin")
    page.keyboard.press("Enter")
    expect(page.get_by_label("新标题")).to_be_visible()  # still naming
    session.send("Input.insertText", {"text": "新"})
    page.keyboard.press("Enter")
    expect(page.locator(".conversation-title")).to_contain_text("新")
