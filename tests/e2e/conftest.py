"""What the page's tests share: a real server with the real model, a real Chromium, and a page that reports its errors.

The server is `bimo serve smollm2` in a process of its own, once a test session. The browser is Debian's Chromium,
once a module: Playwright's event loop must be gone before another module runs asyncio tests in the same process.

Each test gets a fresh browser profile (`open_page`). A test that only looks at how a text is shown says what the model
"answered" with `answer_with`; every other test reads the model's own words.
"""

from __future__ import annotations

import json
import os
import queue
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, BrowserContext, ConsoleMessage, Page, Route, expect, sync_playwright

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-dev-shm-usage"]
MAX_QUEUE = 2  # sequences at once: the third gets a 429
SHORT = {"temperature": 0, "max_tokens": 12, "repetition_penalty": 1}  # settings for an answer that comes soon

PATIENCE = 60_000  # ms; what a page waits for comes at once on a quiet machine, and late on a busy one

OpenPage = Callable[..., Page]

expect.set_options(timeout=PATIENCE)


@pytest.fixture(scope="session")
def server_url(smollm2_dir: Path) -> Iterator[str]:
    """Address of `bimo serve smollm2` on a free port."""
    command = [sys.executable, "-c", "from bimo.cli.main import main; main()", "serve", "smollm2", "--port", "0"]
    command += ["--max-queue", str(MAX_QUEUE)]
    # One thread: the browser needs the other core, and two threads that wait for each other on a busy one crawl.
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment, text=True, encoding="utf-8"
    )
    assert process.stdout is not None
    lines: queue.Queue[str] = queue.Queue()
    seen: list[str] = []

    def read() -> None:  # to the end of the server's life: a full pipe would stop it
        for line in process.stdout:  # type: ignore[union-attr]
            lines.put(line)
        lines.put("")

    threading.Thread(target=read, daemon=True).start()
    try:
        while True:
            line = lines.get(timeout=240)
            seen.append(line)
            if not line:
                pytest.fail(f"the server did not start:\n{''.join(seen)}")
            if match := re.search(r"chat at (http://\S+:\d+)", line):
                break
        yield match.group(1)
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Chromium; the tests that need it are skipped, each by name, where it is not installed."""
    if CHROMIUM is None:
        pytest.skip("Chromium is not installed: apt-get install chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


class Troubles:
    """What a page complained about: uncaught exceptions, console errors, and requests that left for another host."""

    def __init__(self, page: Page, home: str, tolerate: str) -> None:
        self.errors: list[str] = []
        self.foreign: list[str] = []
        self._home = home
        self._tolerate = tolerate
        page.on("pageerror", lambda error: self.errors.append(f"{error.name}: {error.message}"))
        page.on("console", self._heard)
        page.on("request", lambda request: self._left(request.url))

    def _heard(self, message: ConsoleMessage) -> None:
        # Chromium writes a line for each HTTP error; the tests of errors cause them on purpose.
        if message.type != "error" or message.text.startswith("Failed to load resource"):
            return
        if not self._tolerate or self._tolerate not in message.text:
            self.errors.append(message.text)

    def _left(self, url: str) -> None:
        if not url.startswith((self._home, "data:", "blob:")):
            self.foreign.append(url)


@pytest.fixture
def open_page(browser: Browser, request: pytest.FixtureRequest) -> Iterator[OpenPage]:
    """`open_page(locale="zh-CN", settings={...}, width=360)` -> a page in a fresh profile, ready for input.

    The test fails at its end if the page had an uncaught error or asked another host for anything; console errors with
    `tolerate` in them are let pass.
    """
    contexts: list[BrowserContext] = []
    troubles: list[Troubles] = []

    def open_(
        *,
        url: str | None = None,
        settings: dict[str, Any] | None = None,
        width: int = 1200,
        height: int = 800,
        before: Callable[[Page], object] | None = None,
        tolerate: str = "",
        **options: Any,
    ) -> Page:
        address = url or request.getfixturevalue("server_url")
        options = {"locale": "en-US", "permissions": ["clipboard-read", "clipboard-write"]} | options
        context = browser.new_context(viewport={"width": width, "height": height}, **options)
        context.set_default_timeout(PATIENCE)
        contexts.append(context)
        # only where nothing is stored yet: a reload must find what the page itself has stored
        stored = json.dumps(json.dumps(SHORT | (settings or {})))
        context.add_init_script(f"try {{ localStorage['bimo.settings'] ??= {stored} }} catch {{}}")
        page = context.new_page()
        troubles.append(Troubles(page, address, tolerate))
        if before:
            before(page)
        page.goto(address)
        page.wait_for_selector("#composer-text")
        return page

    yield open_
    for context in contexts:
        context.close()
    for trouble in troubles:
        assert not trouble.errors, f"the page had errors: {trouble.errors}"
        assert not trouble.foreign, f"the page asked other hosts: {trouble.foreign}"


def ask(page: Page, text: str) -> None:
    """Type a question and send it."""
    page.fill("#composer-text", text)
    page.press("#composer-text", "Enter")


def wait_idle(page: Page, after: str = "") -> None:
    """Wait until no answer is on its way in the conversation on screen, and the last one is not `after`."""
    page.wait_for_function(
        """(after) => {
            const last = [...document.querySelectorAll("article.assistant")].at(-1);
            const idle = document.querySelector(".send[type=submit]");
            return idle && last && last.ariaBusy === "false" && last.dataset.id !== after;
        }""",
        arg=after,
    )


def answer_id(page: Page) -> str:
    """Id of the last answer, "" when there is none; `wait_idle(page, after=...)` then waits for a newer one."""
    answers = page.locator("article.assistant")
    return (answers.last.get_attribute("data-id") or "") if answers.count() else ""


def ask_and_wait(page: Page, text: str) -> str:
    """Ask, wait for the end of the answer, return its text."""
    before = answer_id(page)
    ask(page, text)
    wait_idle(page, after=before)
    return last_answer(page)


def last_answer(page: Page) -> str:
    """The text of the last answer, "" when it has none."""
    prose = page.locator("article.assistant").last.locator(".prose")
    return prose.inner_text() if prose.count() else ""


def answer_with(page: Page, text: str, finish: str = "stop") -> None:
    """Let the next answers be `text`, in pieces of a few characters, as if a model had written it."""

    def event(delta: dict[str, Any], finish_reason: str | None = None) -> str:
        chunk = {"id": "x", "choices": [{"index": 0, "delta": delta, "finish_reason": finish_reason}]}
        return f"data: {json.dumps(chunk)}\n\n"

    def fulfil(route: Route) -> None:
        pieces = [event({"content": text[start : start + 7]}) for start in range(0, len(text), 7)]
        body = "".join([event({"role": "assistant"}), *pieces, event({}, finish), "data: [DONE]\n\n"])
        route.fulfill(status=200, content_type="text/event-stream", body=body)

    page.unroute("**/v1/chat/completions")
    page.route("**/v1/chat/completions", fulfil)


def never_ending(page: Page, max_tokens: int = 4000) -> None:
    (
        """Let the model go on until it is stopped, or for just `max_tokens`: the page's requests, with `ignore_eos`.

    Greedy: a sampled answer may begin with its end, and then nothing that can be seen need come.
    """
        ""
    )

    def fulfil(route: Route) -> None:
        body = route.request.post_data_json | {"ignore_eos": True, "max_tokens": max_tokens, "temperature": 0}
        route.continue_(post_data=json.dumps(body))

    page.route("**/v1/chat/completions", fulfil)


def request_bodies(page: Page) -> list[dict[str, Any]]:
    """A list that fills with the bodies of the chat requests the page sends."""
    bodies: list[dict[str, Any]] = []

    def note(request: Any) -> None:
        if request.url.endswith("/v1/chat/completions"):
            bodies.append(request.post_data_json)

    page.on("request", note)
    return bodies
