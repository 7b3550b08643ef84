"""What the server answers, as pydantic models, for /openapi.json and for tests that hold real answers against it.

Answers themselves are built as dicts (a model per token would cost more than the token's transport); the models are
closed, so a field added to an answer and not here fails the schema test.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

__all__ = [
    "ChatCompletion",
    "ChatCompletionChunk",
    "Completion",
    "Detokenized",
    "EmbeddingList",
    "ErrorAnswer",
    "Health",
    "ModelCard",
    "ModelList",
    "Tokenized",
    "Version",
]


class Closed(BaseModel):
    model_config = ConfigDict(extra="forbid")


class ErrorDetail(Closed):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(Closed):
    """Every refusal."""

    error: ErrorDetail


class PromptTokensDetails(Closed):
    """`cached_tokens` came from the prefix cache; `truncated_tokens` were cut off, where that was asked for."""

    cached_tokens: int
    truncated_tokens: int = 0


class UsageAnswer(Closed):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class FunctionAnswer(Closed):
    name: str
    arguments: str


class ToolCallAnswer(Closed):
    id: str
    type: Literal["function"]
    function: FunctionAnswer


class ToolCallDeltaAnswer(ToolCallAnswer):
    index: int


class TopLogprob(Closed):
    token: str
    logprob: float
    bytes: list[int]


class TokenLogprobAnswer(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(Closed):
    content: list[TokenLogprobAnswer]
    refusal: None


FinishReason = Literal["stop", "length", "tool_calls"]


class AnswerMessage(Closed):
    role: Literal["assistant"]
    content: str | None
    refusal: None
    tool_calls: list[ToolCallAnswer] = []


class ChatAnswerChoice(Closed):
    """`stop_reason`: the stop string or stop token id that ended the answer, if one did."""

    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason
    stop_reason: str | int | None


class ChatCompletion(Closed):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatAnswerChoice]
    usage: UsageAnswer


class Delta(Closed):
    role: Literal["assistant"] = "assistant"
    content: str = ""
    tool_calls: list[ToolCallDeltaAnswer] = []


class ChatChunkChoice(Closed):
    index: int
    delta: Delta
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None
    stop_reason: str | int | None = None


class ChatCompletionChunk(Closed):
    """The data of one server-sent event; the last event's data is `[DONE]`."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChunkChoice]
    usage: UsageAnswer | None = None


class CompletionLogprobs(Closed):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionAnswerChoice(Closed):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"] | None
    stop_reason: str | int | None


class Completion(Closed):
    """Whole, or the data of one server-sent event; `finish_reason` and `usage` are null until the end."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionAnswerChoice]
    usage: UsageAnswer | None = None


class EmbeddingAnswer(Closed):
    """`embedding`: numbers of length 1, or with encoding_format base64 their bytes as little-endian float32."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class EmbeddingUsage(Closed):
    prompt_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class EmbeddingList(Closed):
    object: Literal["list"]
    data: list[EmbeddingAnswer]
    model: str
    usage: EmbeddingUsage


class ModelCard(Closed):
    """`max_model_len`: the context in tokens, prompt and answer together. `parent`: an adapter's base."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int
    parent: str | None = None


class ModelList(Closed):
    object: Literal["list"]
    data: list[ModelCard]


class Health(Closed):
    status: Literal["ok"]
    model: str


class Version(Closed):
    version: str


class Tokenized(Closed):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] = []


class Detokenized(Closed):
    prompt: str
