"""The official client against a real server with the tiny model: streamed and whole answers are the same answer."""

from __future__ import annotations

import asyncio
import json
import re
from typing import Any

import httpx
import openai
import pytest

from bimo.backends.local import LocalBackend
from tests.serving.live import LiveServer

MESSAGES: list[dict[str, Any]] = [
    {"role": "system", "content": "You are bimo (笔墨)."},
    {"role": "user", "content": [{"type": "text", "text": "你好，世界！"}, {"type": "text", "text": "Hi 🦊"}]},
]
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "今天天气",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["上海", "北京"]}, "days": {"type": "integer", "minimum": 1, "maximum": 7}},
            "required": ["city", "days"],
            "additionalProperties": False,
        },
    },
}
SAY = {"type": "function", "function": {"name": "say", "parameters": {"type": "object", "maxProperties": 0}}}


class Streamed:
    """A chat stream added up, choice by choice."""

    def __init__(self, stream: Any) -> None:
        self.text: dict[int, str] = {}
        self.logprobs: dict[int, list[Any]] = {}
        self.calls: dict[int, list[Any]] = {}
        self.finish: dict[int, str] = {}
        self.usage: Any = None
        for chunk in stream:
            if chunk.usage is not None:
                assert self.usage is None and not chunk.choices, "usage comes once, last, and alone"
                self.usage = chunk.usage
            for choice in chunk.choices:
                self.add(choice)

    def add(self, choice: Any) -> None:
        assert self.usage is None
        if choice.index not in self.text:
            assert choice.delta.role == "assistant", "the role comes first"
            self.text[choice.index], self.logprobs[choice.index], self.calls[choice.index] = "", [], []
        assert choice.index not in self.finish, "nothing comes after the finish reason"
        self.text[choice.index] += choice.delta.content or ""
        self.logprobs[choice.index] += choice.logprobs.content if choice.logprobs else []
        self.calls[choice.index] += choice.delta.tool_calls or []
        if choice.finish_reason is not None:
            self.finish[choice.index] = choice.finish_reason


def both(client: openai.OpenAI, **settings: Any) -> tuple[Any, Streamed]:
    """The same request whole and streamed."""
    settings = {"model": "tiny", "messages": MESSAGES, "temperature": 0, "max_tokens": 40, **settings}
    whole = client.chat.completions.create(**settings)
    streamed = Streamed(client.chat.completions.create(**settings, stream=True, stream_options={"include_usage": True}))
    assert streamed.usage.completion_tokens == whole.usage.completion_tokens
    assert streamed.usage.prompt_tokens == whole.usage.prompt_tokens
    for choice in whole.choices:
        assert streamed.text[choice.index] == (choice.message.content or "")
        assert streamed.finish[choice.index] == choice.finish_reason
        names = [(call.function.name, call.function.arguments) for call in choice.message.tool_calls or ()]
        assert [(call.function.name, call.function.arguments) for call in streamed.calls[choice.index]] == names
    assert len(streamed.text) == len(whole.choices)
    return whole, streamed


def test_text(client: openai.OpenAI, backend: LocalBackend) -> None:
    whole, _ = both(client)
    assert whole.model == "tiny" and whole.object == "chat.completion" and whole.id.startswith("chatcmpl-")
    assert whole.choices[0].message.role == "assistant"
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
    again = client.chat.completions.create(model="tiny", messages=MESSAGES, temperature=0, max_completion_tokens=40)
    assert again.choices[0].message.content == whole.choices[0].message.content
    assert again.usage.prompt_tokens_details.cached_tokens > 0, "the prompt was just computed"


def test_stop_strings_are_never_shown(client: openai.OpenAI) -> None:
    text = both(client)[0].choices[0].message.content
    for stop in (text[10:12], text[5:6], text[20:25]):
        whole, _ = both(client, stop=["never said, 从不", stop])
        assert whole.choices[0].message.content == text[: text.index(stop)]
        assert whole.choices[0].finish_reason == "stop" and whole.choices[0].stop_reason == stop
    kept, _ = both(client, stop=text[10:12], extra_body={"include_stop_str_in_output": True})
    assert kept.choices[0].message.content == text[: text.index(text[10:12]) + 2]


def test_logprobs(client: openai.OpenAI) -> None:
    whole, streamed = both(client, logprobs=True, top_logprobs=3)
    entries = whole.choices[0].logprobs.content
    assert streamed.logprobs[0] == entries
    data = b"".join(bytes(entry.bytes) for entry in entries)
    assert data.decode("utf-8", "replace") == whole.choices[0].message.content
    for entry in entries:
        assert len(entry.top_logprobs) == 3
        assert entry.top_logprobs[0].token == entry.token, "temperature 0 takes the likeliest"
        assert entry.logprob == entry.top_logprobs[0].logprob <= 0
    alone, _ = both(client, logprobs=True)
    assert [entry.top_logprobs for entry in alone.choices[0].logprobs.content] == [[]] * len(entries)


def test_several_answers_and_seeds(client: openai.OpenAI) -> None:
    whole, _ = both(client, n=3, temperature=1, seed=7, top_p=0.95, presence_penalty=0.5, frequency_penalty=0.2)
    texts = [choice.message.content for choice in whole.choices]
    assert len(set(texts)) == 3 and [choice.index for choice in whole.choices] == [0, 1, 2]
    again, _ = both(client, n=3, temperature=1, seed=7, top_p=0.95, presence_penalty=0.5, frequency_penalty=0.2)
    assert [choice.message.content for choice in again.choices] == texts


def test_extensions_have_their_effect(client: openai.OpenAI) -> None:
    plain = both(client)[0]
    first = client.post("/../tokenize", body={"prompt": plain.choices[0].message.content}, cast_to=object)["tokens"][0]  # type: ignore[index]
    banned, _ = both(client, logit_bias={str(first): -100})
    assert banned.choices[0].message.content != plain.choices[0].message.content
    ended, _ = both(client, extra_body={"stop_token_ids": [first]})
    assert ended.choices[0].message.content == "" and ended.choices[0].stop_reason == first
    assert both(client, temperature=1, extra_body={"top_k": 1})[0].choices[0].message == plain.choices[0].message
    beams, _ = both(client, extra_body={"num_beams": 3, "length_penalty": 0.5}, n=2, max_tokens=8)
    assert len({choice.message.content for choice in beams.choices}) == 2
    contrastive, _ = both(client, extra_body={"penalty_alpha": 0.6, "top_k": 4}, max_tokens=8)
    assert contrastive.choices[0].finish_reason == "length"
    every, _ = both(
        client,
        max_tokens=12,
        extra_body={"min_p": 0.1, "typical_p": 0.9, "repetition_penalty": 1.1, "min_tokens": 12, "ignore_eos": True},
    )
    assert every.usage.completion_tokens == 12


def test_json(client: openai.OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"城市": {"enum": ["上海", "🦊"]}, "n": {"type": "integer", "minimum": 0, "maximum": 9}},
        "required": ["城市", "n"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "place", "strict": True, "schema": schema}}
    for temperature in (0, 1):
        whole, _ = both(client, response_format=form, max_tokens=300, temperature=temperature, seed=3)
        value = json.loads(whole.choices[0].message.content)
        assert value["城市"] in ("上海", "🦊") and value["n"] in range(10) and whole.choices[0].finish_reason == "stop"
    answer = client.chat.completions.create(
        model="tiny", messages=MESSAGES, response_format={"type": "json_object"}, max_tokens=60, seed=1
    )
    assert answer.choices[0].message.content.lstrip().startswith("{")
    choice, _ = both(client, extra_body={"structured_outputs": {"choice": ["是的", "不 🦊"]}})
    assert choice.choices[0].message.content in ("是的", "不 🦊")
    digits, _ = both(client, extra_body={"structured_outputs": {"regex": "[0-9]{3}-[一二三]"}})
    assert digits.choices[0].message.content[3] == "-"


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "get_weather"}}])
def test_tools_that_must_be_called(client: openai.OpenAI, choice: Any) -> None:
    whole, _ = both(client, tools=[WEATHER, SAY], tool_choice=choice, max_tokens=300, temperature=1, seed=11)
    answer = whole.choices[0]
    assert answer.finish_reason == "tool_calls" and answer.message.content is None
    call = answer.message.tool_calls[0]
    arguments = json.loads(call.function.arguments)
    assert call.type == "function" and call.id
    if call.function.name == "get_weather":
        assert arguments["city"] in ("上海", "北京") and arguments["days"] in range(1, 8)
    else:
        assert choice == "required" and arguments == {}
    result = {"role": "tool", "tool_call_id": call.id, "content": "晴 ☀️"}
    after = client.chat.completions.create(
        model="tiny", messages=[*MESSAGES, answer.message, result], tools=[WEATHER, SAY], max_tokens=4
    )
    assert after.usage.prompt_tokens > whole.usage.prompt_tokens


def test_continue_final_message(client: openai.OpenAI) -> None:
    text = both(client)[0].choices[0].message.content
    begun = [*MESSAGES, {"role": "assistant", "content": "从前有一个"}]
    answer = client.chat.completions.create(
        model="tiny", messages=begun, temperature=0, max_tokens=40, extra_body={"continue_final_message": True}
    )
    assert answer.choices[0].message.content != text


def test_completions(client: openai.OpenAI, server: LiveServer) -> None:
    settings: dict[str, Any] = {"model": "tiny", "temperature": 0, "max_tokens": 12}
    prompts = ["从前有一个", "Once upon 🦊", "def add("]
    alone = [client.completions.create(prompt=prompt, **settings).choices[0].text for prompt in prompts]
    together = client.completions.create(prompt=prompts, n=2, **settings)
    assert [choice.text for choice in together.choices] == [text for text in alone for _ in range(2)]
    assert [choice.index for choice in together.choices] == list(range(6))
    ids = [httpx.post(f"{server.url}/tokenize", json={"prompt": prompt}).json()["tokens"] for prompt in prompts]
    assert [choice.text for choice in client.completions.create(prompt=ids, **settings).choices] == alone
    assert client.completions.create(prompt=ids[0], **settings).choices[0].text == alone[0]
    streamed = ["", "", ""]
    for chunk in client.completions.create(prompt=prompts, stream=True, **settings):
        for choice in chunk.choices:
            streamed[choice.index] += choice.text
    assert streamed == alone
    best = client.completions.create(prompt=prompts[0], best_of=4, n=2, model="tiny", max_tokens=6, seed=5, logprobs=0)
    means = [sum(choice.logprobs.token_logprobs) / len(choice.logprobs.token_logprobs) for choice in best.choices]
    assert len(means) == 2 and means[0] >= means[1]
    assert best.usage.completion_tokens > 12, "all candidates are paid for"


@pytest.mark.parametrize("stream", [False, True])
def test_scoring(client: openai.OpenAI, server: LiveServer, stream: bool) -> None:
    """What lm-eval does: the log-probabilities of a prompt's own tokens, with echo."""
    prompt = "床前明月光 🦊 naïve"
    ids = httpx.post(f"{server.url}/tokenize", json={"prompt": prompt}).json()["tokens"]

    def score(**settings: Any) -> tuple[str, dict[str, list[Any]], str]:
        body = {"model": "tiny", "prompt": ids, "echo": True, "logprobs": 2, "temperature": 0, **settings}
        if not stream:
            choice = client.completions.create(**body).choices[0]
            return choice.text, choice.logprobs.to_dict(), choice.finish_reason
        text, sums, finish = "", {}, ""
        for chunk in client.completions.create(**body, stream=True):
            choice = chunk.choices[0]
            text, finish = text + choice.text, choice.finish_reason or finish
            for name, values in choice.logprobs.to_dict().items():
                sums.setdefault(name, []).extend(values)
        return text, sums, finish

    text, scores, finish = score(max_tokens=0)
    assert text == prompt and finish == "length"
    assert [len(values) for values in scores.values()] == [len(ids)] * 4
    assert scores["token_logprobs"][0] is None and scores["top_logprobs"][0] is None
    for token, logprob, top in list(
        zip(scores["tokens"], scores["token_logprobs"], scores["top_logprobs"], strict=True)
    )[1:]:
        assert top[token] == logprob <= 0 and 2 <= len(top) <= 3
    for token, offset in zip(scores["tokens"], scores["text_offset"], strict=True):
        assert token.startswith("bytes:") or text[offset:].startswith(token)
    text, longer, _ = score(max_tokens=5)
    assert text.startswith(prompt) and len(longer["tokens"]) == len(ids) + 5
    assert longer["token_logprobs"][1 : len(ids)] == pytest.approx(scores["token_logprobs"][1:], abs=1e-4)
    best = max(longer["top_logprobs"][-1], key=longer["top_logprobs"][-1].get)
    assert best == longer["tokens"][-1], "temperature 0 takes the likeliest"


def test_models_and_tokens(client: openai.OpenAI, server: LiveServer) -> None:
    models = list(client.models.list())
    assert [model.id for model in models] == ["tiny"]
    assert client.models.retrieve("tiny") == models[0]
    with pytest.raises(openai.NotFoundError) as unknown:
        client.models.retrieve("org/其他")
    assert unknown.value.code == "model_not_found" and "'tiny'" in unknown.value.message
    text = "你好 🦊 hello"
    found = httpx.post(f"{server.url}/tokenize", json={"prompt": text, "return_token_strs": True}).json()
    assert found["count"] == len(found["tokens"]) == len(found["token_strs"]) and found["max_model_len"] == 2048
    back = httpx.post(f"{server.url}/detokenize", json={"tokens": found["tokens"], "model": "tiny"}).json()
    assert back == {"prompt": text}
    chat = httpx.post(f"{server.url}/tokenize", json={"messages": MESSAGES}).json()
    whole = client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=1)
    assert chat["count"] == whole.usage.prompt_tokens


def test_errors_are_the_clients_own(client: openai.OpenAI) -> None:
    def error(kind: type[openai.APIStatusError], **settings: Any) -> openai.APIStatusError:
        with pytest.raises(kind) as raised:
            client.chat.completions.create(**{"model": "tiny", "messages": MESSAGES, "max_tokens": 2, **settings})
        return raised.value

    unknown = error(openai.NotFoundError, model="gpt-5")
    assert (unknown.code, unknown.param) == ("model_not_found", "model") and "'tiny'" in unknown.message
    assert error(openai.BadRequestError, temperature=3).param == "temperature"
    typo = error(openai.BadRequestError, extra_body={"temprature": 1})
    assert typo.code == "unknown_parameter" and typo.param == "temprature" and "'temperature'" in typo.message
    long = error(openai.BadRequestError, messages=[{"role": "user", "content": "好 " * 3000}])
    assert long.code == "context_length_exceeded" and long.param == "messages"
    prompt, context = (int(number) for number in re.findall(r"\d{2,}", long.message)[-2:])
    assert prompt > 3000 and context == 2048, "both numbers are said"
    refused = error(openai.BadRequestError, stream=True, messages=[{"role": "user", "content": "好 " * 3000}])
    assert refused.code == "context_length_exceeded", "refused with a status, before any stream begins"
    accepted = client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": "好 " * 3000}],
        max_tokens=2,
        user="someone",
        metadata={"a": "b"},
        store=False,
        service_tier="auto",
        extra_body={"truncate_prompt": True},
    )
    assert accepted.usage.prompt_tokens_details.truncated_tokens > 0


async def test_async_clients_share_the_batch(server: LiveServer, client: openai.OpenAI) -> None:
    alone = both(client)[0].choices[0].message.content
    async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0) as shared:

        async def ask(streamed: bool) -> str:
            settings: dict[str, Any] = {"model": "tiny", "messages": MESSAGES, "temperature": 0, "max_tokens": 40}
            if not streamed:
                return (await shared.chat.completions.create(**settings)).choices[0].message.content
            stream = await shared.chat.completions.create(stream=True, **settings)
            return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

        assert await asyncio.gather(*(ask(i % 2 == 0) for i in range(8))) == [alone] * 8
