"""What the server's tests share: the tiny model behind a real server on a free port, once a session."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from bimo.backends.local import LocalBackend
from bimo.serving.app import create_app
from bimo.tokenizer.load import Tokenizer
from tests.conftest import write_tiny_tokenizer
from tests.serving.live import LiveServer, live

CONTEXT = 2048  # rotary positions have no end; the tiny model speaks nonsense anywhere


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """The tiny model's tokenizer and chat template, without the model."""
    directory: Path = tmp_path_factory.mktemp("tokenizer")
    write_tiny_tokenizer(directory)
    return Tokenizer.from_directory(directory)


@pytest.fixture(scope="session")
def backend(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalBackend]:
    """The tiny model in float32, where answers do not depend on the company in the batch; its context holds tools."""
    directory = tmp_path_factory.mktemp("served") / "tiny"
    shutil.copytree(tiny_model_dir, directory)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"max_position_embeddings": CONTEXT}))
    with LocalBackend.load(str(directory), dtype="float32", kv_cache_tokens=8 * CONTEXT) as backend:
        yield backend


@pytest.fixture(scope="session")
def server(backend: LocalBackend) -> Iterator[LiveServer]:
    """The tiny model behind a real server; its name is "tiny"."""
    with live(create_app(backend, model_name="tiny")) as server:
        yield server


@pytest.fixture(scope="session")
def client(server: LiveServer) -> Iterator[openai.OpenAI]:
    """The official client."""
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0) as client:
        yield client
