"""/v1/embeddings with the official client against a live server, alone and beside a model that writes; wrong bodies."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from starlette.testclient import TestClient

from bimo.backends.embedding import Embedder
from bimo.backends.local import LocalBackend
from bimo.cli.main import main
from bimo.errors import UsageError
from bimo.serving import answers
from bimo.serving.app import create_app
from tests.encoders import TEXTS, make_encoder
from tests.serving.live import LiveServer, live, until

BOTH = [*TEXTS["zh"], *TEXTS["en"], "🦊"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_encoder(tmp_path_factory.mktemp("served") / "encoder")


@pytest.fixture(scope="module")
def embedder(folder: Path) -> Iterator[Embedder]:
    with Embedder.load(str(folder), dtype="float32") as embedder:
        yield embedder


@pytest.fixture(scope="module")
def beside(backend: LocalBackend, embedder: Embedder) -> Iterator[LiveServer]:
    """The tiny model and the encoder."""
    with live(create_app(backend, model_name="tiny", embedder=embedder)) as server:
        yield server


@pytest.fixture(scope="module")
def client(beside: LiveServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{beside.url}/v1", api_key="unused", max_retries=0) as client:
        yield client


def vectors(answer: Any) -> np.ndarray:
    assert [item.index for item in answer.data] == list(range(len(answer.data)))
    return np.array([item.embedding for item in answer.data], np.float32)


# --- what it answers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", BOTH)
def test_one_text(client: openai.OpenAI, embedder: Embedder, text: str) -> None:
    answer = client.embeddings.create(model="encoder", input=text)  # base64, as the client asks
    expected = embedder.embed([text])
    assert np.array_equal(vectors(answer), expected.vectors)
    assert answer.model == "encoder" and answer.object == "list" and answer.data[0].object == "embedding"
    assert answer.usage.prompt_tokens == answer.usage.total_tokens == expected.num_tokens


def test_lists_formats_and_token_ids_are_the_same(client: openai.OpenAI, embedder: Embedder) -> None:
    expected = embedder.embed(BOTH).vectors
    rows = [ids.tolist() for ids in embedder.encode(BOTH)]
    asked: list[dict[str, Any]] = [
        {"input": BOTH},
        {"input": BOTH, "encoding_format": "float"},
        {"input": BOTH, "encoding_format": "base64"},
        {"input": rows},
        {"input": rows, "encoding_format": "float"},
    ]
    for body in asked:
        answer = client.embeddings.create(model="encoder", **body)
        if body.get("encoding_format") == "base64" and isinstance(answer.data[0].embedding, str):
            found = np.stack([np.frombuffer(base64.b64decode(item.embedding), "<f4") for item in answer.data])
        else:
            found = vectors(answer)
        assert np.array_equal(found, expected) and answer.usage.prompt_tokens == sum(map(len, rows))
    one = client.embeddings.create(model="encoder", input=rows[3])
    assert np.abs(vectors(one) - expected[3]).max() < 1e-6


def test_the_answer_has_its_documented_shape(beside: LiveServer) -> None:
    for encoding, kind in ((None, list), ("float", list), ("base64", str)):
        body = {"input": ["好", "a"], "encoding_format": encoding, "user": "某人"}
        answer = httpx.post(f"{beside.url}/v1/embeddings", json=body)
        assert answer.status_code == 200 and answer.headers["cache-control"] == "no-store"
        parsed = answers.EmbeddingList.model_validate(answer.json())
        assert all(isinstance(item.embedding, kind) for item in parsed.data)


@pytest.mark.parametrize("dimensions", [1, 7, 32])
def test_fewer_dimensions_have_length_one_again(client: openai.OpenAI, embedder: Embedder, dimensions: int) -> None:
    found = vectors(client.embeddings.create(model="encoder", input=BOTH, dimensions=dimensions))
    first = embedder.embed(BOTH).vectors[:, :dimensions].astype(np.float64)
    assert found.shape == (len(BOTH), dimensions)
    assert np.abs(found - first / np.linalg.norm(first, axis=1, keepdims=True)).max() < 1e-6


def test_two_thousand_texts(client: openai.OpenAI, embedder: Embedder) -> None:
    texts = [f"{text} {number}" for number, text in enumerate((BOTH * 200)[:2048])]
    found = vectors(client.embeddings.create(model="encoder", input=texts))
    for place in (0, 1000, 2047):
        assert np.abs(found[place] - embedder.embed([texts[place]]).vectors[0]).max() < 1e-5


def test_long_texts_are_refused_or_cut_and_counted(client: openai.OpenAI, embedder: Embedder) -> None:
    long = "墨" * 100
    with pytest.raises(openai.BadRequestError, match="input 1 has 102 tokens, the model reads 64") as caught:
        client.embeddings.create(model="encoder", input=["好", long])
    assert caught.value.code == "context_length_exceeded" and caught.value.param == "input"
    answer = client.embeddings.create(model="encoder", input=["好", long], extra_body={"truncate": True})
    assert np.array_equal(vectors(answer), embedder.embed(["好", long]).vectors)
    assert answer.usage.prompt_tokens == 3 + 64
    assert answer.usage.model_dump()["prompt_tokens_details"] == {"cached_tokens": 0, "truncated_tokens": 38}


def test_both_models_are_listed_and_each_does_its_own(client: openai.OpenAI, beside: LiveServer) -> None:
    assert [model.id for model in client.models.list()] == ["tiny", "encoder"]
    assert client.models.retrieve("encoder").model_dump()["max_model_len"] == 64
    assert client.completions.create(model="tiny", prompt="从前", max_tokens=2).usage is not None
    with pytest.raises(openai.NotFoundError, match="'tiny' makes no embeddings here; this server has 'encoder'"):
        client.embeddings.create(model="tiny", input="好")
    with pytest.raises(openai.NotFoundError, match="no model 'encoder' here; this server has 'tiny'"):
        client.completions.create(model="encoder", prompt="好")
    with pytest.raises(openai.NotFoundError, match="this server has 'tiny' and 'encoder'"):
        client.models.retrieve("别的")
    assert httpx.get(f"{beside.url}/health").json() == {"status": "ok", "model": "tiny"}
    schemas = httpx.get(f"{beside.url}/openapi.json").json()["components"]["schemas"]
    for body, name in (("EmbeddingRequest", "encoder"), ("ChatRequest", "tiny")):
        assert schemas[body]["properties"]["model"]["anyOf"][0] == {"const": name}


def test_an_encoder_alone(embedder: Embedder) -> None:
    with live(create_app(None, embedder=embedder)) as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0)
        assert [model.id for model in client.models.list()] == ["encoder"]
        assert vectors(client.embeddings.create(model="encoder", input="你好")).shape == (1, 32)
        assert httpx.get(f"{server.url}/health").json() == {"status": "ok", "model": "encoder"}
        for path, body in (
            ("/v1/chat/completions", {"messages": [{"role": "user", "content": "好"}]}),
            ("/v1/completions", {"prompt": "好"}),
            ("/tokenize", {"prompt": "好"}),
        ):
            answer = httpx.post(server.url + path, json=body)
            assert answer.status_code == 404 and "'encoder' makes embeddings" in answer.json()["error"]["message"]
        assert "bimo_requests_running 0.0" in httpx.get(f"{server.url}/metrics").text


def test_no_encoder(server: LiveServer) -> None:
    answer = httpx.post(f"{server.url}/v1/embeddings", json={"input": "好"})
    assert answer.status_code == 404 and "--embeddings" in answer.json()["error"]["message"]


def test_two_models_of_one_name_are_refused(backend: LocalBackend, embedder: Embedder) -> None:
    with pytest.raises(UsageError, match="both models would be called 'encoder'"):
        create_app(backend, model_name="encoder", embedder=embedder)


# --- many, and those who leave ----------------------------------------------------------------------------------------


async def test_many_clients_beside_a_chat(beside: LiveServer, embedder: Embedder) -> None:
    expected = embedder.embed(BOTH).vectors
    async with openai.AsyncOpenAI(base_url=f"{beside.url}/v1", api_key="unused", max_retries=0) as client:
        chat = client.completions.create(model="tiny", prompt="从前", max_tokens=60, extra_body={"ignore_eos": True})
        asked = [client.embeddings.create(model="encoder", input=BOTH[n % 11 :]) for n in range(30)]
        written, *found = await asyncio.gather(chat, *asked)
    assert written.usage is not None and written.usage.completion_tokens == 60
    for n, answer in enumerate(found):
        assert np.abs(vectors(answer) - expected[n % 11 :]).max() < 1e-5


@pytest.fixture
def gate(embedder: Embedder, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[threading.Event, list[int]]]:
    """Batches are computed while the event is set; how many rows each had."""
    open_, computed, compute = threading.Event(), list[int](), embedder._compute

    def gated(rows: Any) -> Any:
        computed.append(len(rows))
        assert open_.wait(30)
        return compute(rows)

    monkeypatch.setattr(embedder, "_compute", gated)
    yield open_, computed
    open_.set()


def test_computing_stops_when_the_client_leaves(beside: LiveServer, gate: tuple[threading.Event, list[int]]) -> None:
    open_, computed = gate
    service = beside.app.state.service  # type: ignore[attr-defined]
    connection = beside.post_raw("/v1/embeddings", {"input": ["水" * 50] * 2000})
    until(lambda: computed)
    connection.close()
    open_.set()
    until(lambda: service.embeddings.inside == 0)
    assert sum(computed) < 200


def test_a_full_queue_says_so_and_a_short_request_need_not_wait_for_a_long_one(
    embedder: Embedder, gate: tuple[threading.Event, list[int]]
) -> None:
    open_, computed = gate
    order: list[str] = []
    with live(create_app(None, embedder=embedder, max_queue=2)) as server:
        service = server.app.state.service  # type: ignore[attr-defined]

        def ask(name: str, body: Any) -> None:
            assert httpx.post(f"{server.url}/v1/embeddings", json={"input": body}, timeout=60).status_code == 200
            order.append(name)

        threads = [threading.Thread(target=ask, args=("long", ["水" * 50] * 1000))]
        threads[0].start()
        until(lambda: computed)
        threads.append(threading.Thread(target=ask, args=("short", "好")))
        threads[1].start()
        until(lambda: service.embeddings.inside == 2)
        refused = httpx.post(f"{server.url}/v1/embeddings", json={"input": "好"})
        assert refused.status_code == 429 and refused.headers["retry-after"]
        open_.set()
        for thread in threads:
            thread.join()
    assert order == ["short", "long"]


# --- wrong bodies -----------------------------------------------------------------------------------------------------

WRONG: list[tuple[Any, str | None, str]] = [
    ([], None, "invalid_type"),
    ({}, "input", "missing_required_parameter"),
    ({"input": None}, "input", "invalid_type"),
    ({"input": 5}, "input", "invalid_type"),
    ({"input": {}}, "input", "invalid_type"),
    ({"input": ""}, "input", "invalid_value"),
    ({"input": []}, "input", "invalid_value"),
    ({"input": ["好", ""]}, "input[1]", "invalid_value"),
    ({"input": ["好", None]}, "input[1]", "invalid_type"),
    ({"input": ["好", 7]}, "input[1]", "invalid_type"),
    ({"input": ["好", ["a"]]}, "input[1]", "invalid_type"),
    ({"input": [[]]}, "input[0]", "invalid_value"),
    ({"input": [[1], []]}, "input[1]", "invalid_value"),
    ({"input": [1, "a"]}, "input[1]", "invalid_type"),
    ({"input": [1.5]}, "input[0]", "invalid_type"),
    ({"input": [True]}, "input[0]", "invalid_type"),
    ({"input": [-1]}, "input[0]", "invalid_value"),
    ({"input": [5, 1 << 20]}, "input", "invalid_value"),
    ({"input": [[5], [1 << 20]]}, "input[1]", "invalid_value"),
    ({"input": [5] * 65}, "input", "context_length_exceeded"),
    ({"input": ["a"] * 2049}, "input", "invalid_value"),
    ({"input": [[1]] * 2049}, "input", "invalid_value"),
    ({"input": "好", "encoding_format": "hex"}, "encoding_format", "invalid_value"),
    ({"input": "好", "dimensions": 0}, "dimensions", "invalid_value"),
    ({"input": "好", "dimensions": 33}, "dimensions", "invalid_value"),
    ({"input": "好", "dimensions": 2.5}, "dimensions", "invalid_type"),
    ({"input": "好", "dimensions": "2"}, "dimensions", "invalid_type"),
    ({"input": "好", "truncate": 1}, "truncate", "invalid_type"),
    ({"input": "好", "model": 5}, "model", "invalid_type"),
    ({"input": "好", "inputs": "x"}, "inputs", "unknown_parameter"),
    ({"input": "好", "stream": True}, "stream", "unknown_parameter"),
]


@pytest.fixture(scope="module")
def bodies(embedder: Embedder) -> TestClient:
    return TestClient(create_app(None, embedder=embedder, max_body_bytes=100_000))


@pytest.mark.parametrize(("body", "param", "code"), WRONG, ids=lambda value: json.dumps(value, ensure_ascii=False)[:40])
def test_wrong_bodies(bodies: TestClient, body: Any, param: str | None, code: str) -> None:
    answer = bodies.post("/v1/embeddings", json=body)
    error = answer.json()["error"]
    assert answer.status_code == 400 and (error["param"], error["code"]) == (param, code), error
    assert error["type"] == "invalid_request_error" and len(error["message"]) < 400


@pytest.mark.parametrize(
    ("content", "kind", "status"),
    [
        (b"", "application/json", 400),
        (b'{"input": "\xff"}', "application/json", 400),
        (b'{"input": "\\ud83e"}', "application/json", 400),
        (b'{"input": [NaN]}', "application/json", 400),
        (b'{"input": "a"}', "text/plain", 415),
        (b'{"input": "' + b"a" * 200_000 + b'"}', "application/json", 413),
    ],
)
def test_bodies_that_are_none(bodies: TestClient, content: bytes, kind: str, status: int) -> None:
    answer = bodies.post("/v1/embeddings", content=content, headers={"content-type": kind})
    assert answer.status_code == status and answer.json()["error"]["message"]
    assert bodies.post("/v1/embeddings", json={"input": "好"}).status_code == 200


def test_a_key_is_asked_for(embedder: Embedder) -> None:
    client = TestClient(create_app(None, embedder=embedder, api_key="钥匙".encode().hex()))
    assert client.post("/v1/embeddings", json={"input": "好"}).status_code == 401


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_chat", [False, True])
def test_bimo_serve(folder: Path, tiny_model_dir: Path, with_chat: bool) -> None:
    models = [str(tiny_model_dir), "--embeddings", str(folder)] if with_chat else [str(folder)]
    command = [sys.executable, "-m", "bimo.cli.main", "serve", *models, "--port", "0"]
    environment = {name: value for name, value in os.environ.items() if name != "BIMO_API_KEY"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert ("chat at http" if with_chat else "embeddings at http") in line
        address = line.split("API at ")[1].split("/v1")[0]
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="unused")
        assert [model.id for model in client.models.list()] == (["tiny-llama"] if with_chat else []) + ["encoder"]
        assert vectors(client.embeddings.create(model="encoder", input=["你好", "Hello"])).shape == (2, 32)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 130 and "Traceback" not in errors
    finally:
        process.kill()
        process.wait()


def test_options_without_effect_on_an_encoder_are_refused(
    folder: Path, tiny_model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for options, said in (
        (["--quant", "int8"], "--quant has no effect"),
        (["--embeddings", "minilm"], "--embeddings has no effect"),
    ):
        assert main(["serve", str(folder), "--port", "0", *options]) == 2
        assert said in capsys.readouterr().err
    assert main(["serve", str(folder), "--port", "0", "--embeddings", str(tiny_model_dir)]) == 2
    capsys.readouterr()
    assert main(["serve", str(tiny_model_dir), "--port", "0", "--embeddings", str(tiny_model_dir)]) == 1
    assert "embeddings are made by an encoder" in capsys.readouterr().err
