"""Settings reach the request, are explained, survive a reload and go back to their defaults; theme and language too."""

from __future__ import annotations

from playwright.sync_api import Page, expect

from tests.e2e.conftest import OpenPage, ask_and_wait, request_bodies


def open_settings(page: Page) -> None:
    page.get_by_role("button", name="Settings").click()
    expect(page.get_by_role("dialog", name="Settings")).to_be_visible()


def close_settings(page: Page) -> None:
    page.keyboard.press("Escape")
    expect(page.get_by_role("dialog", name="Settings")).to_have_count(0)


def test_settings_reach_the_request(open_page: OpenPage) -> None:
    page = open_page()
    bodies = request_bodies(page)
    open_settings(page)
    values = {
        "system": "Answer in one word. 简短。",
        "temperature": "0.35",
        "top_p": "0.8",
        "top_k": "40",
        "min_p": "0.05",
        "repetition_penalty": "1.2",
        "max_tokens": "12",
        "seed": "7",
        "stop": "###\n完",
    }
    for name, value in values.items():
        page.fill(f"#setting-{name}", value)
    close_settings(page)
    ask_and_wait(page, "Hello")
    assert bodies[-1] == {
        "model": "smollm2",
        "messages": [{"role": "system", "content": "Answer in one word. 简短。"}, {"role": "user", "content": "Hello"}],
        "stream": True,
        "stream_options": {"include_usage": True},
        "temperature": 0.35,
        "top_p": 0.8,
        "top_k": 40,
        "min_p": 0.05,
        "repetition_penalty": 1.2,
        "max_tokens": 12,
        "seed": 7,
        "stop": ["###", "完"],
    }

    page.reload()  # kept
    ask_and_wait(page, "Again")
    assert {name: bodies[-1][name] for name in ("temperature", "seed", "stop")} == {
        "temperature": 0.35,
        "seed": 7,
        "stop": ["###", "完"],
    }

    open_settings(page)
    page.get_by_role("button", name="Reset Temperature to its default").click()
    expect(page.locator("#setting-temperature")).to_have_value("0.7")
    page.get_by_role("button", name="Reset all").click()
    expect(page.locator("#setting-seed")).to_have_value("")
    page.fill("#setting-max_tokens", "8")
    close_settings(page)
    ask_and_wait(page, "Once more")
    # what does nothing is not sent: other servers may not know its name
    sent = {name for name in bodies[-1] if name not in ("model", "messages", "stream", "stream_options")}
    assert sent == {"temperature", "top_p", "repetition_penalty", "max_tokens"}


def test_a_value_out_of_range_is_shown_as_what_is_used(open_page: OpenPage) -> None:
    page = open_page()
    open_settings(page)
    for name, typed, used in [
        ("temperature", "9", "2"),
        ("temperature", "-1", "0"),
        ("top_k", "2.6", "3"),
        ("max_tokens", "", ""),
        ("top_p", "", "0.9"),
    ]:
        page.fill(f"#setting-{name}", typed)
        page.press(f"#setting-{name}", "Tab")
        expect(page.locator(f"#setting-{name}")).to_have_value(used)


def test_slider_and_number_are_one_value(open_page: OpenPage) -> None:
    page = open_page()
    open_settings(page)
    slider = page.get_by_role("slider", name="Temperature")
    slider.focus()
    slider.press("End")
    expect(page.locator("#setting-temperature")).to_have_value("2")
    page.fill("#setting-temperature", "0.5")
    page.press("#setting-temperature", "Tab")
    expect(slider).to_have_value("0.5")


def test_broken_stored_settings_do_no_harm(open_page: OpenPage) -> None:
    def spoil(page: Page) -> None:
        page.add_init_script(
            """localStorage["bimo.settings"] = '{"temperature": "hot", "stop": 5, "seed": 1e99, "system": null}';
            localStorage["bimo.preferences"] = '[1';"""
        )

    page = open_page(before=spoil)
    open_settings(page)
    expect(page.locator("#setting-temperature")).to_have_value("0.7")
    expect(page.locator("#setting-stop")).to_have_value("")


def background(page: Page) -> str:
    return page.evaluate("getComputedStyle(document.body).backgroundColor")


def test_theme_follows_the_system_or_the_user(open_page: OpenPage) -> None:
    page = open_page(color_scheme="dark")
    dark = background(page)
    page.emulate_media(color_scheme="light")
    light = background(page)
    assert dark != light
    open_settings(page)
    page.get_by_role("radio", name="Dark").check(force=True)
    assert background(page) == dark
    page.reload()
    page.wait_for_selector("#composer-text")
    assert background(page) == dark
    page.get_by_role("button", name="Switch to light").click()
    assert background(page) == light


def test_theme_is_there_at_the_first_paint(open_page: OpenPage) -> None:
    """boot.js runs before the body exists: a dark page must not flash white while modules load."""
    page = open_page()
    page.evaluate("""localStorage["bimo.preferences"] = '{"theme":"dark","language":"zh"}'""")
    page.route("**/static/app.js", lambda route: route.abort())
    page.reload()
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"
    assert page.evaluate("document.documentElement.lang") == "zh-CN"


def test_language_follows_the_browser_or_the_user(open_page: OpenPage) -> None:
    page = open_page(locale="zh-TW")
    expect(page.get_by_role("button", name="新对话")).to_be_visible()
    page.get_by_role("button", name="English").click()
    expect(page.get_by_role("button", name="New chat")).to_be_visible()
    assert page.evaluate("document.documentElement.lang") == "en"
    page.reload()
    expect(page.get_by_role("button", name="New chat")).to_be_visible()
    open_settings(page)
    page.get_by_role("radio", name="Browser").check(force=True)
    expect(page.get_by_role("dialog", name="设置")).to_be_visible()


def test_messages_on_screen_follow_the_language(open_page: OpenPage) -> None:
    page = open_page()
    ask_and_wait(page, "Hi")
    page.get_by_role("button", name="中文").click()
    expect(page.get_by_role("button", name="换一个回答")).to_be_visible()
    expect(page.locator(".stats")).to_contain_text("个 token")
