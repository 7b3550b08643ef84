"""The basics, with the real model in a real browser: ask, stream, stop, regenerate, edit, copy, keep, find, delete."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from tests.e2e.conftest import (
    OpenPage,
    answer_id,
    answer_with,
    ask,
    ask_and_wait,
    last_answer,
    never_ending,
    request_bodies,
    wait_idle,
)

# The text of all answers in the browser's database, as another page would read it.
STORED_ANSWERS = """async () => {
    const open = indexedDB.open("bimo");
    const db = await new Promise((done) => (open.onsuccess = () => done(open.result)));
    const all = db.transaction("conversations").objectStore("conversations").getAll();
    const conversations = await new Promise((done) => (all.onsuccess = () => done(all.result)));
    db.close();
    const nodes = conversations.flatMap((conversation) => Object.values(conversation.nodes));
    return nodes.filter((node) => node.role === "assistant").map((node) => node.content).join("").trim();
}"""


def watch_answer(page: Page) -> None:
    """Keep every state of the answer's text that is on screen from now on in `window.states`."""
    page.evaluate(
        """() => {
            window.states = [];
            new MutationObserver(() => {
                const text = document.querySelector("article.assistant .prose")?.textContent ?? "";
                if (text && text !== window.states.at(-1)) window.states.push(text);
            }).observe(document.body, { childList: true, subtree: true, characterData: true });
        }"""
    )


@pytest.mark.parametrize(
    ("locale", "question", "title"),
    [
        ("en-US", "What is the capital of France?", "What is the capital of France?"),
        ("zh-CN", "用一句话介绍北京 🏙️", "用一句话介绍北京 🏙️"),
    ],
)
def test_an_answer_streams(open_page: OpenPage, locale: str, question: str, title: str) -> None:
    page = open_page(locale=locale)
    watch_answer(page)
    answer = ask_and_wait(page, question)
    assert answer
    assert not any("\ufffd" in state for state in page.evaluate("window.states")), "half a character was shown"
    expect(page.locator(".bubble")).to_have_text(question)
    expect(page.locator(".conversation-title")).to_have_text(title)
    stats = page.locator(".stats").inner_text()
    assert "token" in stats
    assert ("first word after" if locale == "en-US" else "首字") in stats
    assert page.evaluate("document.documentElement.lang") == ("en" if locale == "en-US" else "zh-CN")


@pytest.mark.parametrize(("locale", "rate"), [("en-US", "tokens/s"), ("zh-CN", "每秒")])
def test_a_longer_answer_grows_and_tells_its_rate(open_page: OpenPage, locale: str, rate: str) -> None:
    # a dozen tokens may come within one frame, and faster than a clock of milliseconds can say: 300 do not
    page = open_page(locale=locale, before=lambda page: never_ending(page, max_tokens=300))
    watch_answer(page)
    ask_and_wait(page, "Tell me a long story about a dragon.")
    assert len(page.evaluate("window.states")) > 2, "the text came in one piece"
    assert rate in page.locator(".stats").inner_text()


def test_a_cut_answer_says_so_and_can_go_on(open_page: OpenPage) -> None:
    page = open_page(settings={"max_tokens": 5})
    ask_and_wait(page, "Tell me a long story about a dragon.")
    expect(page.get_by_role("note")).to_contain_text("length limit")
    cut = answer_id(page)
    page.get_by_role("button", name="Continue").click()
    wait_idle(page, after=cut)
    assert page.locator("article.assistant").count() == 2


def test_stop_keeps_what_has_come(open_page: OpenPage) -> None:
    page = open_page(before=never_ending)
    ask(page, "Count from one to one thousand in words.")
    page.wait_for_selector("article.assistant .prose")
    page.get_by_role("button", name="Stop (Esc)").click()
    wait_idle(page)
    kept = last_answer(page)
    assert kept
    expect(page.locator(".stats")).to_contain_text("Stopped")
    page.reload()
    page.wait_for_selector("article.assistant .prose")
    assert last_answer(page) == kept


def test_regenerate_keeps_both_versions(open_page: OpenPage) -> None:
    page = open_page(settings={"temperature": 1.5, "max_tokens": 10})
    first = ask_and_wait(page, "Invent a name for a cat.")
    before = answer_id(page)
    page.get_by_role("button", name="Another answer").click()
    wait_idle(page, after=before)
    second = last_answer(page)
    expect(page.locator(".assistant .versions")).to_contain_text("2/2")
    page.get_by_role("button", name="Previous version").click()
    expect(page.locator(".assistant .versions")).to_contain_text("1/2")
    assert last_answer(page) == first
    page.get_by_role("button", name="Next version").click()
    assert last_answer(page) == second
    page.reload()
    page.wait_for_selector(".versions")
    assert last_answer(page) == second
    assert page.locator("article.assistant").count() == 1


def test_edit_asks_again_without_the_old_branch(open_page: OpenPage) -> None:
    page = open_page()
    bodies = request_bodies(page)
    ask_and_wait(page, "What colour is the sky?")
    ask_and_wait(page, "And the sea?")
    page.locator("article.user").first.hover()
    page.get_by_role("button", name="Edit and ask again").first.click()
    editor = page.get_by_label("Edit your message")
    expect(editor).to_be_focused()
    editor.fill("What colour is grass?")
    before = answer_id(page)
    editor.press("Enter")
    wait_idle(page, after=before)
    assert bodies[-1]["messages"] == [{"role": "user", "content": "What colour is grass?"}]
    assert page.locator(".bubble").all_inner_texts() == ["What colour is grass?"]
    page.locator("article.user").first.hover()
    page.get_by_role("button", name="Previous version").click()
    assert page.locator(".bubble").all_inner_texts() == ["What colour is the sky?", "And the sea?"]


def test_copy_a_message_and_a_code_block(open_page: OpenPage) -> None:
    page = open_page()
    text = "看这里：\n\n```python\nprint('你好')\nx = 1\n```\n\n**done**"
    answer_with(page, text)
    ask_and_wait(page, "code please")
    page.locator(".assistant").get_by_role("button", name="Copy", exact=True).last.click()
    expect(page.get_by_role("button", name="Copied")).to_be_visible()
    assert page.evaluate("navigator.clipboard.readText()") == text
    page.locator(".copy-code").click()
    expect(page.locator(".copy-code")).to_have_text("Copied")
    assert page.evaluate("navigator.clipboard.readText()") == "print('你好')\nx = 1"
    page.wait_for_selector(".hljs-string")  # and it got its colours


def test_conversations_outlive_a_reload_and_are_found(open_page: OpenPage) -> None:
    page = open_page()
    ask_and_wait(page, "Say hello to 小明")
    first_address = page.url
    page.get_by_role("button", name="New chat").click()
    expect(page.locator(".greeting")).to_be_visible()
    ask_and_wait(page, "Name a fruit")
    page.reload()
    expect(page.locator(".bubble")).to_have_text("Name a fruit")  # the address names the conversation
    expect(page.locator(".conversation-title")).to_have_count(2)
    page.get_by_label("Search").fill("小明")
    expect(page.locator(".conversation-title")).to_have_text(["Say hello to 小明"])
    page.locator(".conversation a").click()
    expect(page.locator(".bubble")).to_have_text("Say hello to 小明")
    assert page.url == first_address
    page.go_back()
    expect(page.locator(".bubble")).to_have_text("Name a fruit")


def test_search_looks_into_messages(open_page: OpenPage) -> None:
    page = open_page()
    answer_with(page, "The capital is Ulaanbaatar.")
    ask_and_wait(page, "Mongolia?")
    page.get_by_role("button", name="New chat").click()
    answer_with(page, "Apples.")
    ask_and_wait(page, "Fruit?")
    page.get_by_label("Search").fill("ulaanBAATAR")
    expect(page.locator(".conversation-title")).to_have_text(["Mongolia?"])
    page.get_by_label("Search").fill("nothing like it")
    expect(page.locator(".conversations")).to_contain_text("Nothing found")


def test_rename_and_delete_with_undo(open_page: OpenPage) -> None:
    page = open_page()
    answer_with(page, "ok")
    ask_and_wait(page, "first title")
    line = page.locator(".conversation")
    line.hover()
    page.get_by_role("button", name="Rename “first title”").click()
    page.get_by_label("New title").fill("我的标题")
    page.get_by_label("New title").press("Enter")
    expect(page.locator(".conversation-title")).to_have_text("我的标题")
    line.hover()
    page.get_by_role("button", name="Delete “我的标题”").click()
    expect(page.locator(".conversation")).to_have_count(0)
    expect(page.locator(".greeting")).to_be_visible()
    page.get_by_role("button", name="Undo").click()
    expect(page.locator(".conversation-title")).to_have_text("我的标题")
    page.reload()
    expect(page.locator(".conversation-title")).to_have_text("我的标题")


def test_an_answer_goes_on_behind_another_conversation(open_page: OpenPage) -> None:
    page = open_page(before=lambda page: never_ending(page, max_tokens=600))
    ask(page, "Write a long text about rivers.")
    page.wait_for_selector("article.assistant .prose")
    page.get_by_role("button", name="New chat").click()
    expect(page.locator(".greeting")).to_be_visible()
    expect(page.get_by_role("img", name="Answering")).to_be_visible()
    expect(page.get_by_role("img", name="Answering")).to_have_count(0)
    page.locator(".conversation a").click()
    wait_idle(page)
    expect(page.locator(".stats")).to_contain_text("token")


def test_a_reload_in_the_middle_keeps_the_part(open_page: OpenPage) -> None:
    page = open_page(before=never_ending)
    ask(page, "Write a very long story.")
    page.wait_for_selector("article.assistant .prose")
    while not page.evaluate(STORED_ANSWERS):  # the checkpoint comes once a second
        page.wait_for_timeout(200)
    page.reload()
    expect(page.get_by_role("alert")).to_contain_text("What had arrived is kept")
    assert last_answer(page)


def test_the_page_follows_until_the_reader_scrolls_up(open_page: OpenPage) -> None:
    page = open_page(before=never_ending, width=400, height=320)  # few words fill it
    ask(page, "Write a long list of animals with a sentence about each.")
    at_end = (
        "() => { const s = document.querySelector('.thread');"
        " return s.scrollHeight > s.clientHeight + 100 && s.scrollHeight - s.clientHeight - s.scrollTop < 60; }"
    )
    page.wait_for_function(at_end)
    page.mouse.move(200, 120)
    page.mouse.wheel(0, -80)
    jump = page.get_by_role("button", name="Go to the latest message")
    expect(jump).to_be_visible()
    top = page.evaluate("document.querySelector('.thread').scrollTop")
    height = page.evaluate("document.querySelector('.thread').scrollHeight")
    page.wait_for_function("(height) => document.querySelector('.thread').scrollHeight > height + 20", arg=height)
    assert page.evaluate("document.querySelector('.thread').scrollTop") == pytest.approx(top, abs=2)
    jump.click()
    page.wait_for_function(at_end)
    expect(jump).to_have_count(0)
    page.keyboard.press("Escape")
    wait_idle(page)


def test_export_and_import(open_page: OpenPage, tmp_path: Path) -> None:
    page = open_page()
    answer_with(page, "答案 **一**")
    ask_and_wait(page, "问题一")
    page.get_by_role("button", name="Settings").click()
    with page.expect_download() as download:
        page.get_by_role("button", name="Export").click()
    file = tmp_path / "bimo.json"
    download.value.save_as(file)
    data = json.loads(file.read_text(encoding="utf-8"))
    assert data["format"] == "bimo-conversations"
    page.get_by_role("button", name="Delete all").click()
    page.get_by_role("alertdialog").get_by_role("button", name="Delete all").click()
    expect(page.locator(".conversation")).to_have_count(0)

    # what comes back must be rebuilt from known fields: a cycle, an orphan and a foreign field do not get in
    nodes = data["conversations"][0]["nodes"]
    nodes["a"] = {"id": "a", "parent": "b", "role": "user", "content": "cycle"}
    nodes["b"] = {"id": "b", "parent": "a", "role": "user", "content": "cycle"}
    next(iter(nodes.values()))["onclick"] = "alert(1)"
    data["conversations"].append({"id": "../../x", "nodes": {}})
    file.write_text(json.dumps(data), encoding="utf-8")
    import_file(page, file)
    expect(page.locator(".toast")).to_contain_text("1 conversation was imported. 1 was already here or unreadable.")
    page.locator(".conversation a").click()
    expect(page.locator(".prose strong")).to_have_text("一")
    stored = page.evaluate("import('/static/storage.js').then((s) => s.allConversations())")
    assert [node["content"] for node in stored[0]["nodes"].values()] == ["问题一", "答案 **一**"]
    assert "onclick" not in json.dumps(stored)

    file.write_text("{not json", encoding="utf-8")
    import_file(page, file)
    expect(page.locator(".toast")).to_contain_text("is not an export of bimo")


def import_file(page: Page, file: Path) -> None:
    page.get_by_role("button", name="Settings").click()
    with page.expect_file_chooser() as chooser:
        page.get_by_role("button", name="Import").click()
    chooser.value.set_files(file)


def test_a_question_quicker_than_the_list_of_models_waits_for_it(open_page: OpenPage) -> None:
    page = open_page(before=lambda page: page.route("**/v1/models", lambda route: None))  # no answer comes
    asked = request_bodies(page)
    ask(page, "Hello 你好")
    expect(page.locator(".send.stop")).to_be_visible()  # the answer is under way, and can be stopped
    assert not asked
    page.unroute("**/v1/models")  # lets what is held go on
    wait_idle(page)
    assert last_answer(page).strip() and [body["model"] for body in asked] == ["smollm2"]
