"""Adapters over HTTP, by the official client: a model name each, one batch, and words for a name that is not there."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from bimo.backends.local import LocalBackend
from bimo.errors import UsageError
from bimo.serving.app import create_app
from tests.backends.test_adapters import greedy, write_random_adapter
from tests.serving.live import LiveServer, live

PROMPTS = ["从前有一个小小的模型，它", "Once upon a time there was"]
NAMES = ["tiny", "support", "客服"]
GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 12, "extra_body": {"ignore_eos": True}}


@pytest.fixture(scope="module")
def folders(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    home = tmp_path_factory.mktemp("adapters")
    return {
        name: write_random_adapter(home / name, tiny_model_dir, seed)
        for seed, name in enumerate(("support", "客服"), start=10)
    }


@pytest.fixture(scope="module")
def adapted(tiny_model_dir: Path, folders: dict[str, Path]) -> Iterator[LocalBackend]:
    with LocalBackend.load(str(tiny_model_dir), adapters=folders, dtype="float32", kv_cache_tokens=4096) as backend:
        yield backend


@pytest.fixture(scope="module")
def address(adapted: LocalBackend) -> Iterator[LiveServer]:
    with live(create_app(adapted, model_name="tiny")) as server:
        yield server


@pytest.fixture(scope="module")
def asker(address: LiveServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{address.url}/v1", api_key="unused", max_retries=0) as client:
        yield client


def test_the_base_and_its_adapters_are_listed(asker: openai.OpenAI, address: LiveServer) -> None:
    cards = asker.models.list().data
    assert [card.id for card in cards] == NAMES
    assert [getattr(card, "parent", None) for card in cards] == [None, "tiny", "tiny"]
    assert asker.models.retrieve("support").id == "support"
    document = httpx.get(f"{address.url}/openapi.json").json()
    model = document["components"]["schemas"]["ChatRequest"]["properties"]["model"]
    assert {"enum": NAMES} in model["anyOf"]


def test_each_request_is_answered_by_the_model_it_names_also_together(
    asker: openai.OpenAI, tiny_model_dir: Path, folders: dict[str, Path], adapted: LocalBackend
) -> None:
    jobs = [(name, prompt) for prompt in PROMPTS for name in NAMES]
    found: dict[tuple[str, str], Any] = {}

    def complete(name: str, prompt: str) -> None:
        found[name, prompt] = asker.completions.create(model=name, prompt=prompt, **GREEDY)

    threads = [threading.Thread(target=complete, args=job) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for name, prompt in jobs:
        answer = found[name, prompt]
        tokens = greedy(tiny_model_dir, folders.get(name), prompt)
        assert answer.model == name
        assert answer.choices[0].text == adapted.tokenizer.decode(tokens)
    assert len({answer.choices[0].text for answer in found.values()}) == len(jobs)


@pytest.mark.parametrize("name", NAMES)
def test_a_chat_and_its_stream_name_the_adapter_and_say_the_same(asker: openai.OpenAI, name: str) -> None:
    messages: list[Any] = [{"role": "user", "content": "你好 hello 🦊"}]
    whole = asker.chat.completions.create(model=name, messages=messages, **GREEDY)
    chunks = list(asker.chat.completions.create(model=name, messages=messages, stream=True, **GREEDY))
    assert whole.model == name and {chunk.model for chunk in chunks} == {name}
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.choices[0].message.content
    again = asker.chat.completions.create(model=name, messages=messages, **GREEDY)
    assert again.choices[0].message.content == whole.choices[0].message.content


def test_without_a_model_s_name_the_base_answers(
    address: LiveServer, tiny_model_dir: Path, adapted: LocalBackend
) -> None:
    body = {"prompt": PROMPTS[0], "temperature": 0, "max_tokens": 12, "ignore_eos": True}
    answer = httpx.post(f"{address.url}/v1/completions", json=body).json()
    assert answer["model"] == "tiny"
    assert answer["choices"][0]["text"] == adapted.tokenizer.decode(greedy(tiny_model_dir, None, PROMPTS[0]))


@pytest.mark.parametrize("name", ["suport", "客", "support ", "x" * 5000, ""])
def test_an_unknown_name_gets_a_404_that_lists_those_there_are(address: LiveServer, name: str) -> None:
    bodies = {
        "/v1/chat/completions": {"messages": [{"role": "user", "content": "你好"}]},
        "/v1/completions": {"prompt": "你好"},
        "/tokenize": {"prompt": "你好"},
    }
    for path, body in bodies.items():
        answer = httpx.post(f"{address.url}{path}", json=body | {"model": name})
        assert answer.status_code == 404, path
        error = answer.json()["error"]
        assert error["code"] == "model_not_found" and error["param"] == "model"
        assert "'tiny' and 'support' and '客服'" in error["message"] and len(error["message"]) < 600


def test_a_client_that_leaves_takes_nobody_along(
    asker: openai.OpenAI, tiny_model_dir: Path, folders: dict[str, Path], adapted: LocalBackend
) -> None:
    endless: dict[str, Any] = GREEDY | {"max_tokens": 400}
    stream = asker.completions.create(model="support", prompt=PROMPTS[1], stream=True, **endless)
    next(iter(stream))
    stream.close()
    answer = asker.completions.create(model="客服", prompt=PROMPTS[0], **GREEDY)
    tokens = greedy(tiny_model_dir, folders["客服"], PROMPTS[0])
    assert answer.choices[0].text == adapted.tokenizer.decode(tokens)


def test_two_of_one_name_are_refused(adapted: LocalBackend) -> None:
    with pytest.raises(UsageError, match="the name that its base is served under"):
        create_app(adapted, model_name="客服")


def test_the_command_line_s_pairs() -> None:
    from bimo.cli.options import named_folders

    assert named_folders(["support=runs/a/model", "客服=路径/b=c"], "adapter") == {
        "support": "runs/a/model",
        "客服": "路径/b=c",
    }
    for pairs, words in [
        (["support"], "NAME=DIR"),
        (["=a"], "NAME=DIR"),
        (["a="], "NAME=DIR"),
        (["a=1", "a=2"], "twice"),
    ]:
        with pytest.raises(UsageError, match=words) as refused:
            named_folders(pairs, "adapter")
        assert refused.value.param == "adapter"
