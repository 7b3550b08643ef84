"""A download that dies is gone on with: real pip against an index on this machine that counts what it sends."""

from __future__ import annotations

import hashlib
import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from bimo.errors import DownloadError
from bimo.formats import hub
from tests.formats.test_hub import home, is_loadable, make_wheel, nothing_half_left

__all__ = ["home"]

RANGE = re.compile(r"bytes=(\d+)-")


class Index:
    """A package index of one wheel. `stall_after` bytes, the first answers wait until their reader has gone."""

    def __init__(self, wheel: Path, ranges: bool = True) -> None:
        self.wheel, self.body, self.ranges = wheel, wheel.read_bytes(), ranges
        self.sha256 = hashlib.sha256(self.body).hexdigest()
        self.etag = '"one"'
        self.stall_after: int | None = None
        self.sent: list[tuple[int, int]] = []  # first byte, bytes sent, of every answer for the wheel
        self.reached = threading.Event()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.answer(self)

            def log_message(self, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        if not handler.path.endswith(".whl"):
            page = f'<a href="/{self.wheel.name}#sha256={self.sha256}">{self.wheel.name}</a>'.encode()
            handler.send_response(200)
            handler.send_header("Content-Type", "text/html")
            handler.send_header("Content-Length", str(len(page)))
            handler.end_headers()
            handler.wfile.write(page)
            return
        wanted = RANGE.fullmatch(handler.headers.get("Range") or "")
        same = handler.headers.get("If-Range", self.etag) == self.etag
        first = int(wanted[1]) if wanted and same and self.ranges else 0
        handler.send_response(206 if first else 200)
        if first:
            handler.send_header("Content-Range", f"bytes {first}-{len(self.body) - 1}/{len(self.body)}")
        handler.send_header("Content-Length", str(len(self.body) - first))
        handler.send_header("ETag", self.etag)
        handler.end_headers()
        stall, sent, block = self.stall_after, first, 1 << 14
        try:
            while sent < len(self.body):
                if stall is not None and sent >= stall:
                    self.reached.set()
                    time.sleep(0.05)
                    block = 1  # keeps asking whether the reader is there
                sent += handler.wfile.write(self.body[sent : sent + block])
        except OSError:
            pass
        self.sent.append((first, sent - first))


@pytest.fixture
def index(tmp_path: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Index]:
    members: dict[str, bytes | Path] = {f"big/m/{file.name}": file for file in tiny_model_dir.iterdir()}
    members["big/filler.bin"] = os.urandom(3_000_000)
    made = Index(make_wheel(tmp_path, "big", "1.0", members))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    for name in ("PIP_FIND_LINKS", "PIP_NO_INDEX", "PIP_EXTRA_INDEX_URL", "http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_INDEX_URL", made.url + "/simple")
    yield made
    made.server.shutdown()
    made.server.server_close()


def start() -> subprocess.Popen[bytes]:
    code = """
        import os, signal
        from bimo.formats.hub import resolve
        os.setsid()
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs inherit it ignored
        resolve("pypi:big==1.0")
    """
    return subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stderr=subprocess.DEVNULL)


def stop(index: Index, child: subprocess.Popen[bytes], kept: Path, number: int) -> int:
    """Kill the process and its pip when the index stalls; the bytes that stayed."""
    assert index.reached.wait(120)
    time.sleep(0.3)  # pip writes out what it has
    os.killpg(child.pid, number)
    child.wait(60)
    deadline = time.monotonic() + 60
    while not index.sent and time.monotonic() < deadline:  # until the index has seen the reader go
        time.sleep(0.05)
    return sum(file.stat().st_size for file in kept.glob("*.part"))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_download_goes_on_where_it_stopped(home: Path, index: Index, number: int) -> None:
    kept = home / "fetching" / "big-1.0"
    index.stall_after = 2_000_000
    arrived = stop(index, start(), kept, number)
    assert 1_500_000 < arrived < len(index.body)
    assert not (home / "models" / "big-1.0").exists()
    index.stall_after = None
    index.sent.clear()
    assert is_loadable(hub.resolve("pypi:big==1.0"))
    # the first request's answer is put aside (a few buffers were on their way); the second asks for the rest only
    assert [first for first, _ in index.sent if first] == [arrived]
    assert not kept.exists() and nothing_half_left(home)


@pytest.mark.parametrize("change", ["another file of that name", "an index that knows no ranges"])
def test_what_cannot_be_gone_on_with_starts_over(home: Path, index: Index, change: str) -> None:
    kept = home / "fetching" / "big-1.0"
    index.stall_after = 2_000_000
    assert stop(index, start(), kept, signal.SIGKILL)
    index.stall_after = None
    index.sent.clear()
    if change.startswith("another"):
        index.etag = '"two"'
    else:
        index.ranges = False
    assert is_loadable(hub.resolve("pypi:big==1.0"))
    assert not any(first for first, _ in index.sent)
    assert not kept.exists() and nothing_half_left(home)


def test_what_arrived_damaged_is_not_kept(home: Path, index: Index) -> None:
    """A disk that lost a block: the index's sha256 finds it, and the try after that is whole."""
    kept = home / "fetching" / "big-1.0"
    index.stall_after = 2_000_000
    assert stop(index, start(), kept, signal.SIGKILL)
    (part,) = kept.glob("*.part")
    with part.open("r+b") as file:
        file.seek(1_000_000)
        file.write(b"\0" * 4096)
    index.stall_after = None
    with pytest.raises(DownloadError):
        hub.resolve("pypi:big==1.0")
    assert not kept.exists()
    assert is_loadable(hub.resolve("pypi:big==1.0"))


def test_a_connection_that_drops_is_resumed_at_once(home: Path, index: Index) -> None:
    answer, calls = index.answer, []

    def drop(handler: BaseHTTPRequestHandler) -> None:
        if handler.path.endswith(".whl") and not calls:
            calls.append(handler.path)
            handler.send_response(200)
            handler.send_header("Content-Length", str(len(index.body)))
            handler.send_header("ETag", index.etag)
            handler.end_headers()
            handler.wfile.write(index.body[:2_500_000])
            handler.close_connection = True
        else:
            answer(handler)

    index.answer = drop  # type: ignore[method-assign]
    assert is_loadable(hub.resolve("pypi:big==1.0"))
    assert [first for first, _ in index.sent] == [2_500_000]
    assert not (home / "fetching" / "big-1.0").exists()
