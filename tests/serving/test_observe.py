"""Request ids, the log, the metrics, the page's files."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families
from starlette.applications import Starlette
from starlette.testclient import TestClient

from bimo.serving.app import create_app
from bimo.serving.pages import page_routes
from bimo.tokenizer.load import Tokenizer
from tests.serving.live import LiveServer
from tests.serving.scripted import ScriptedBackend

SECRET = "我的密码是 hunter2"
CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": SECRET}]}


@pytest.fixture
def scripted(tokenizer: Tokenizer) -> TestClient:
    return TestClient(create_app(ScriptedBackend(tokenizer, lambda _: "好的 hunter2"), api_key="sk-key"))


def test_request_ids(scripted: TestClient) -> None:
    for path in ("/health", "/nowhere", "/v1/models", "/"):
        made = scripted.get(path).headers["x-request-id"]
        assert len(made) == 32 and made != scripted.get(path).headers["x-request-id"]
        assert scripted.get(path, headers={"x-request-id": "trace-1:a.b_c"}).headers["x-request-id"] == "trace-1:a.b_c"
        for bad in ("a b", "x" * 129, "a\tb", "日志", ""):
            assert scripted.get(path, headers={"x-request-id": bad.encode()}).headers["x-request-id"] != bad


def test_one_log_line_a_request_and_no_text(scripted: TestClient, caplog: pytest.LogCaptureFixture) -> None:
    headers = {"authorization": "Bearer sk-key", "x-request-id": "abc"}
    with caplog.at_level(logging.DEBUG):
        for stream in (False, True):
            scripted.post("/v1/chat/completions", json=CHAT | {"stream": stream, "user": SECRET}, headers=headers)
        scripted.post("/v1/chat/completions", json=CHAT | {"nonsense": SECRET}, headers=headers)
        scripted.get(f"/{SECRET}?{SECRET}", headers=headers)
    lines = [record for record in caplog.records if record.name == "bimo.access"]
    assert [line.request["status"] for line in lines] == [200, 200, 400, 404]  # type: ignore[attr-defined]
    for line in lines[:2]:
        assert line.getMessage().startswith("id=abc method=POST route=/v1/chat/completions status=200 prompt_tokens=")
        assert line.request["completion_tokens"] > 0 and line.request["prompt_tokens"] > 0  # type: ignore[attr-defined]
    assert lines[3].request["route"] == "unmatched"  # type: ignore[attr-defined]
    logged = "\n".join(record.getMessage() for record in caplog.records if record.name.startswith("bimo"))
    assert "hunter2" not in logged and "sk-key" not in logged


def test_an_exception_is_logged_and_not_told(
    scripted: TestClient, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken() -> None:
        raise ZeroDivisionError("internal detail")

    monkeypatch.setattr(scripted.app.state.service.metrics, "exposition", broken)  # type: ignore[attr-defined]
    response = scripted.get("/metrics", headers={"authorization": "Bearer sk-key", "x-request-id": "abc"})
    assert response.status_code == 500 and response.json()["error"]["code"] == "internal_error"
    assert "ZeroDivision" not in response.text and "internal detail" not in response.text
    assert any(record.exc_info and "abc" in record.getMessage() for record in caplog.records)


def metrics_of(server: LiveServer) -> dict[str, float]:
    text = httpx.get(f"{server.url}/metrics").text
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    return {
        sample.name + "".join(f" {value}" for _, value in sorted(sample.labels.items())): sample.value
        for sample in samples
        if "le" not in sample.labels
    }


def test_metrics(server: LiveServer, client: openai.OpenAI) -> None:
    before = metrics_of(server)
    messages: Any = [{"role": "user", "content": "数一数 🦊"}]
    usage = client.chat.completions.create(model="tiny", messages=messages, max_tokens=5, n=2).usage
    for _ in client.chat.completions.create(model="tiny", messages=messages, max_tokens=5, stream=True):
        pass
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(model="tiny", messages=messages, max_tokens=0)
    after = metrics_of(server)

    def grown(name: str) -> float:
        return after[name] - before.get(name, 0)

    assert usage is not None and grown("bimo_generation_tokens_total") == usage.completion_tokens + 5
    computed, cached = grown("bimo_prompt_tokens_total"), grown("bimo_cached_tokens_total")
    assert computed + cached == 3 * usage.prompt_tokens and cached > 0, "the prompt came three times"
    assert grown("bimo_engine_steps_total") > 0
    assert grown("bimo_http_requests_total POST /v1/chat/completions 200") == 2
    assert grown("bimo_http_requests_total POST /v1/chat/completions 400") == 1
    assert grown("bimo_time_to_first_token_seconds_count") == 2
    assert grown("bimo_request_seconds_count") == 2 and grown("bimo_inter_token_seconds_count") > 0
    assert after["bimo_requests_running"] == after["bimo_requests_waiting"] == 0
    assert after["bimo_kv_cache_total_tokens"] > 0 and after["process_resident_memory_bytes"] > 0


def test_the_page_and_its_headers(tmp_path: Path, scripted: TestClient) -> None:
    (tmp_path / "index.html").write_text("<!doctype html><title>笔墨</title>", encoding="utf-8")
    (tmp_path / "app.js").write_text("export const a = 1;", encoding="utf-8")
    (tmp_path / "en.json").write_text("{}", encoding="utf-8")
    (tmp_path.parent / "secret.txt").write_text("secret")
    client = TestClient(Starlette(routes=page_routes(tmp_path)))
    page = client.get("/")
    assert "笔墨" in page.content.decode() and page.headers["content-type"] == "text/html; charset=utf-8"
    for path, kind in (("/static/app.js", "text/javascript"), ("/static/en.json", "application/json")):
        first = client.get(path)
        assert first.headers["content-type"].startswith(kind) and first.headers["cache-control"] == "no-cache"
        assert client.get(path, headers={"if-none-match": first.headers["etag"]}).status_code == 304
        assert client.head(path).status_code == 200
    for path in (
        "/static/../secret.txt",
        "/static/%2e%2e/secret.txt",
        "/static/..%2fsecret.txt",
        "/static//etc/passwd",
    ):
        assert client.get(path).status_code == 404
    for path in ("/", "/static/nothing.js", "/health", "/v1/models", "/nowhere"):
        headers = scripted.get(path).headers
        policy = headers["content-security-policy"]
        for rule in ("default-src 'self'", "script-src 'self'", "frame-ancestors 'none'", "base-uri 'none'"):
            assert rule in policy
        assert "unsafe" not in policy
        assert headers["x-content-type-options"] == "nosniff" and headers["referrer-policy"] == "no-referrer"
    assert scripted.get("/static/nothing.js").json()["error"]["code"] == "not_found"
