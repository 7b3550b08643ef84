"""What can go wrong is said in one sentence, with a way on; nothing that was written or received is lost."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Page, expect

from bimo.serving.app import create_app
from tests.e2e.conftest import (
    MAX_QUEUE,
    OpenPage,
    answer_id,
    answer_with,
    ask,
    ask_and_wait,
    last_answer,
    never_ending,
    wait_idle,
)
from tests.serving.live import live


def test_a_key_is_asked_for_and_kept_in_the_tab(open_page: OpenPage) -> None:
    with live(create_app(None, api_key="geheim-123")) as server:  # it has a key but no model yet
        page = open_page(url=server.url)
        expect(page.get_by_role("alert")).to_contain_text("asks for an API key")
        page.get_by_label("API key").fill("wrong")
        page.get_by_role("button", name="Use key").click()
        expect(page.get_by_role("alert")).to_contain_text("did not accept the API key")
        page.get_by_label("API key").fill("geheim-123")
        page.get_by_role("button", name="Use key").click()
        expect(page.get_by_role("alert")).to_contain_text("still loading")  # let in; 503 while there is no model
        kept = page.evaluate("[sessionStorage['bimo.key'], localStorage['bimo.key'] ?? null]")
        assert kept == ["geheim-123", None]
        page.get_by_role("button", name="Settings").click()
        page.get_by_role("button", name="Forget the key").click()
        assert page.evaluate("sessionStorage['bimo.key'] ?? null") is None


def test_a_question_to_a_locked_server_is_answered_after_the_key(open_page: OpenPage) -> None:
    with live(create_app(None, api_key="geheim-123")) as server:
        page = open_page(url=server.url)
        ask(page, "hello?")
        answer = page.locator("article.assistant")
        expect(answer.get_by_role("alert")).to_contain_text("asks for an API key")
        answer.get_by_label("API key").fill("密钥")  # cannot travel in a header
        answer.get_by_role("button", name="Use key").click()
        expect(answer.get_by_role("alert")).to_contain_text("asks for an API key")
        answer.get_by_label("API key").fill("geheim-123")
        answer.get_by_label("Remember on this device").check()
        answer.get_by_role("button", name="Use key").click()
        expect(answer.get_by_role("alert")).to_contain_text("still loading")
        assert page.evaluate("localStorage['bimo.key']") == "geheim-123"
        expect(page.locator(".bubble")).to_have_text("hello?")


def test_a_full_queue_says_when_to_try_again(open_page: OpenPage, server_url: str) -> None:
    page = open_page()
    body = {"model": "smollm2", "stream": True, "ignore_eos": True, "max_tokens": 4000}
    body["messages"] = [{"role": "user", "content": "Count."}]
    streams = []
    try:
        for _ in range(MAX_QUEUE):
            request = urllib.request.Request(f"{server_url}/v1/chat/completions", json.dumps(body).encode())
            request.add_header("Content-Type", "application/json")
            streams.append(urllib.request.urlopen(request, timeout=60))
            streams[-1].readline()  # it is being answered
        ask(page, "hello")
        alert = page.locator("article.assistant").get_by_role("alert")
        expect(alert).to_contain_text("The server is busy. Please try again in 1 second.")
    finally:
        for stream in streams:
            stream.close()
    wait_until_free(server_url)
    alert.get_by_role("button", name="Try again").click()
    page.wait_for_selector("article.assistant .prose")
    assert page.locator("article.assistant").count() == 1
    assert page.locator(".versions").count() == 0  # the failed answer left no version behind


def wait_until_free(server_url: str) -> None:
    """Wait until the server has noticed that its clients are gone."""
    messages = [{"role": "user", "content": "x"}]
    body = json.dumps({"model": "smollm2", "max_tokens": 1, "n": MAX_QUEUE, "messages": messages})
    pause = threading.Event()
    while True:
        request = urllib.request.Request(f"{server_url}/v1/chat/completions", body.encode())
        request.add_header("Content-Type", "application/json")
        try:
            with urllib.request.urlopen(request, timeout=60):
                return
        except urllib.error.HTTPError as error:
            assert error.code == 429
            pause.wait(0.2)


def test_a_conversation_too_long_says_both_numbers(open_page: OpenPage) -> None:
    page = open_page()
    answer_with(page, "ok")
    ask_and_wait(page, "word " * 9000)
    assert len(page.locator(".bubble").inner_text()) < 2000  # folded
    page.unroute("**/v1/chat/completions")
    ask(page, "One more question")
    alert = page.locator("article.assistant").last.get_by_role("alert")
    expect(alert).to_contain_text("tokens, the model can read 8,192")
    alert.get_by_role("button", name="Ask in a new chat").click()
    expect(page.locator(".greeting")).to_be_visible()
    expect(page.locator("#composer-text")).to_have_value("One more question")
    expect(page.locator("#composer-text")).to_be_focused()
    page.press("#composer-text", "Enter")
    wait_idle(page)
    assert last_answer(page)
    expect(page.locator(".conversation")).to_have_count(2)


def test_a_refused_setting_shows_the_servers_sentence(open_page: OpenPage) -> None:
    page = open_page()

    def spoil(route) -> None:  # type: ignore[no-untyped-def]
        route.continue_(post_data=json.dumps(route.request.post_data_json | {"top_p": 7}))

    page.route("**/v1/chat/completions", spoil)
    ask(page, "hello")
    alert = page.locator("article.assistant").get_by_role("alert")
    expect(alert).to_contain_text("did not accept the request")
    expect(alert).to_contain_text("top_p")


class Cable:
    """A TCP relay to the server, which can be cut: what a lost network is to a connection that is open."""

    def __init__(self, target: str) -> None:
        self._target = urlsplit(target)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._ends: list[socket.socket] = []
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                near, _ = self._listener.accept()
                far = socket.create_connection((self._target.hostname, self._target.port))
                self._ends += [near, far]
                for source, sink in ((near, far), (far, near)):
                    threading.Thread(target=self._carry, args=(source, sink), daemon=True).start()

    def _carry(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)

    def cut(self) -> None:
        """Break every open connection; new ones work."""
        for end in self._ends:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()
        self._ends.clear()

    def close(self) -> None:
        self._listener.close()
        self.cut()


@pytest.fixture
def cable(server_url: str) -> Iterator[Cable]:
    cable = Cable(server_url)
    yield cable
    cable.close()


def test_a_network_drop_keeps_the_part(open_page: OpenPage, cable: Cable) -> None:
    page = open_page(url=cable.url, before=never_ending)
    ask(page, "Tell me everything about the sea.")
    page.wait_for_selector("article.assistant .prose")
    cable.cut()
    alert = page.locator("article.assistant").get_by_role("alert")
    expect(alert).to_contain_text("What had arrived is kept")
    kept = last_answer(page)
    assert kept
    page.unroute("**/v1/chat/completions")
    before = answer_id(page)
    alert.get_by_role("button", name="Try again").click()
    wait_idle(page, after=before)
    page.get_by_role("button", name="Previous version").click()
    assert last_answer(page) == kept


def test_a_server_that_is_gone_and_comes_back(open_page: OpenPage) -> None:
    page = open_page(locale="zh-CN")
    page.context.set_offline(True)
    ask(page, "在吗？")
    expect(page.locator("article.assistant").get_by_role("alert")).to_contain_text("连不上服务器，它还在运行吗？")
    expect(page.locator(".banner")).to_contain_text("页面会不断重试")
    page.context.set_offline(False)
    expect(page.locator(".banner")).to_have_count(0)  # by itself
    before = answer_id(page)
    page.locator("article.assistant").get_by_role("button", name="重试").click()
    wait_idle(page, after=before)
    assert last_answer(page)


def forbid_storage(page: Page) -> None:
    page.add_init_script(
        """for (const name of ["indexedDB", "localStorage", "sessionStorage"]) {
            Object.defineProperty(window, name, { get() { throw new DOMException("denied", "SecurityError"); } });
        }"""
    )


def test_a_browser_that_stores_nothing_still_chats(open_page: OpenPage) -> None:
    page = open_page(before=forbid_storage)
    expect(page.locator(".banner")).to_contain_text("does not let the page store anything")
    assert ask_and_wait(page, "What is two plus two?")
    page.get_by_role("button", name="New chat").click()
    page.locator(".conversation a").click()
    expect(page.locator(".bubble")).to_have_text("What is two plus two?")


def fill_storage(page: Page) -> None:
    page.add_init_script(
        """IDBObjectStore.prototype.put = function () { throw new DOMException("full", "QuotaExceededError"); };
        Storage.prototype.setItem = function () { throw new DOMException("full", "QuotaExceededError"); };"""
    )


def test_a_full_disk_is_said_and_the_chat_goes_on(open_page: OpenPage) -> None:
    page = open_page(before=fill_storage)
    answer_with(page, "**still here**")
    ask_and_wait(page, "hello")
    expect(page.locator(".banner")).to_contain_text("storage is full")
    page.get_by_role("button", name="New chat").click()
    page.locator(".conversation a").click()
    expect(page.locator(".prose strong")).to_have_text("still here")
