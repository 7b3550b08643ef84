"""What a client may send, as pydantic models: the check and the documentation (/openapi.json) are the same lines.

A field is here only if it has its effect. Those in `Harmless` concern OpenAI's bookkeeping, change no answer, and
are accepted because every client library sends them; any other name is refused (see `body.validate`).
Settings that only make sense beside another are checked by `check()`, which `handlers` call first.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag, WithJsonSchema

from bimo.engine.request import MAX_LOGPROBS, MAX_SEQUENCES
from bimo.serving.errors import ApiError

__all__ = [
    "AssistantMessage",
    "ChatRequest",
    "CompletionRequest",
    "DetokenizeRequest",
    "EmbeddingRequest",
    "Message",
    "ResponseFormat",
    "SamplingFields",
    "StructuredOutputs",
    "TokenizeRequest",
    "ToolChoice",
    "ToolSpec",
]

MAX_MESSAGES = 1024
MAX_PARTS = 64
MAX_PROMPTS = 256
MAX_STOPS = 16
MAX_STOP_CHARACTERS = 1024
MAX_TOOLS = 128
MAX_BIASES = 300
MAX_TOKENS = 1 << 24  # far above any context; the context's own limit is the engine's
MAX_TOKEN_ID = (1 << 31) - 1
MAX_CHOICES = 1024
MAX_INPUTS = 2048  # OpenAI's
MAX_INPUT_TOKENS = 1 << 20  # the context's own limit comes after it
MAX_DIMENSIONS = 1 << 20


class Strict(BaseModel):
    """Unknown names, numbers in strings, NaN and infinity are refused."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, hide_input_in_errors=True)


def _integral(value: Any) -> Any:
    """JSON has one kind of number: 1.0 is the integer 1 (JSON Schema says so too)."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _shape(value: Any) -> str | None:
    """Which member of a union a value means, by its JSON kind, so that an error speaks of that member alone."""
    match value:
        case str():
            return "as_word"
        case dict():
            return "as_object"
        case [int() | float(), *_]:
            return "as_ids"
        case [list(), *_]:
            return "as_id_lists"
        case list():
            return "as_list"
    return None


WHOLE = BeforeValidator(_integral)  # after Field in an Annotated, so that the bounds reach the document
TokenId = Annotated[int, Field(ge=0, le=MAX_TOKEN_ID), WHOLE]
Stop = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARACTERS)]
Stops = Annotated[
    Annotated[Stop, Tag("as_word")] | Annotated[list[Stop], Field(max_length=MAX_STOPS), Tag("as_list")],
    Discriminator(_shape),
]
Bias = Annotated[float, Field(ge=-100, le=100)]
LogitBias = Annotated[
    dict[Annotated[str, Field(pattern=r"^[0-9]{1,10}$")], Bias],
    Field(max_length=MAX_BIASES),
    WithJsonSchema(
        {
            "type": "object",
            "propertyNames": {"pattern": "^[0-9]{1,10}$"},
            "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
            "maxProperties": MAX_BIASES,
        }
    ),
]
FunctionName = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]


class TextPart(Strict):
    """A piece of a message. Text is the only kind these models read."""

    type: Literal["text"]
    text: str


class Function(Strict):
    """The function an assistant called; `arguments` is JSON in a string, as the model wrote it."""

    name: str
    arguments: str


class ToolCall(Strict):
    id: str
    type: Literal["function"] = "function"
    function: Function


Parts = Annotated[list[TextPart], Field(min_length=1, max_length=MAX_PARTS)]
Content = Annotated[Annotated[str, Tag("as_word")] | Annotated[Parts, Tag("as_list")], Discriminator(_shape)]


class SystemMessage(Strict):
    role: Literal["system", "developer"]
    content: Content
    name: str | None = None


class UserMessage(Strict):
    role: Literal["user"]
    content: Content
    name: str | None = None


class AssistantMessage(Strict):
    """An earlier answer. The fields after `tool_calls` are what clients send back of answers; they must be empty."""

    role: Literal["assistant"]
    content: Content | None = None
    name: str | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=MAX_TOOLS)] | None = None
    refusal: None = None
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None
    audio: None = None
    function_call: None = None


class ToolMessage(Strict):
    """The result of a tool call, under the id the call had."""

    role: Literal["tool"]
    content: Content
    tool_call_id: str
    name: str | None = None


Message = Annotated[SystemMessage | UserMessage | AssistantMessage | ToolMessage, Field(discriminator="role")]
Messages = Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]


class FunctionSpec(Strict):
    """A function the model may call; `parameters` is a JSON schema of its arguments."""

    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ToolSpec(Strict):
    type: Literal["function"]
    function: FunctionSpec


class NamedFunction(Strict):
    name: FunctionName


class NamedTool(Strict):
    type: Literal["function"]
    function: NamedFunction


ToolChoice = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("as_word")] | Annotated[NamedTool, Tag("as_object")],
    Discriminator(_shape),
]
Tools = Annotated[list[ToolSpec], Field(max_length=MAX_TOOLS)]


class TextFormat(Strict):
    type: Literal["text"]


class JsonObjectFormat(Strict):
    type: Literal["json_object"]


class JsonSchema(Strict):
    """`strict` changes nothing: the schema is always enforced while decoding."""

    name: FunctionName
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class JsonSchemaFormat(Strict):
    type: Literal["json_schema"]
    json_schema: JsonSchema


ResponseFormat = Annotated[TextFormat | JsonObjectFormat | JsonSchemaFormat, Field(discriminator="type")]


class StructuredOutputs(Strict):
    """Constraints OpenAI's API has no name for (the name and fields are vLLM's); exactly one may be set."""

    json_: dict[str, Any] | None = Field(None, alias="json")
    regex: Annotated[str, Field(min_length=1, max_length=65536)] | None = None
    choice: Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1, max_length=MAX_CHOICES)] | None = (
        None
    )
    grammar: Annotated[str, Field(min_length=1, max_length=65536)] | None = None


class StreamOptions(Strict):
    include_usage: bool | None = None


class Harmless(Strict):
    """OpenAI's bookkeeping: accepted, without effect on the answer."""

    user: Any = None
    metadata: Any = None
    store: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None


class SamplingFields(Harmless):
    """Settings both kinds of completion share; the names after `logit_bias` are extensions, as in `SamplingParams`."""

    model: str | None = Field(None, description="a name from /v1/models; the served model when absent")
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_SEQUENCES), WHOLE] | None = None
    stop: Stops | None = None
    seed: Annotated[int, Field(ge=-(1 << 63), le=(1 << 63) - 1), WHOLE] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: LogitBias | None = None
    top_k: Annotated[int, Field(ge=0, le=1 << 24, description="0: off"), WHOLE] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    typical_p: Annotated[float, Field(gt=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    min_tokens: Annotated[int, Field(ge=0, le=MAX_TOKENS), WHOLE] | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=MAX_BIASES)] | None = None
    ignore_eos: bool | None = None
    include_stop_str_in_output: bool | None = None
    num_beams: Annotated[int, Field(ge=1, le=MAX_SEQUENCES), WHOLE] | None = None
    num_beam_groups: Annotated[int, Field(ge=1, le=MAX_SEQUENCES), WHOLE] | None = None
    diversity_penalty: Annotated[float, Field(ge=0, le=100)] | None = None
    length_penalty: Annotated[float, Field(ge=-10, le=10)] | None = None
    early_stopping: bool | None = None
    penalty_alpha: Annotated[float, Field(ge=0, le=1, description="contrastive search, with top_k")] | None = None
    truncate_prompt: bool | None = Field(None, description="cut the front of a prompt that is too long, and report it")
    structured_outputs: StructuredOutputs | None = None

    def check(self) -> None:
        """Settings without effect are errors: ApiError 400, code unsupported_combination."""
        if self.stream_options is not None and not self.stream:
            raise combination("stream_options", "stream_options describe a stream: set stream to true")
        if self.num_beams is None or self.num_beams == 1:
            for name in ("num_beam_groups", "diversity_penalty", "length_penalty", "early_stopping"):
                if getattr(self, name) is not None:
                    raise combination(name, f"{name} belongs to beam search: set num_beams to 2 or more")


class ChatRequest(SamplingFields):
    """POST /v1/chat/completions."""

    messages: Messages
    max_tokens: Annotated[int, Field(ge=1, le=MAX_TOKENS), WHOLE] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, le=MAX_TOKENS), WHOLE] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS), WHOLE] | None = None
    response_format: ResponseFormat | None = None
    tools: Tools | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = Field(None, description="values for the model's own chat template")

    def check(self) -> None:
        super().check()
        limits = (self.max_tokens, self.max_completion_tokens)
        if None not in limits and limits[0] != limits[1]:
            raise combination("max_tokens", "max_tokens and max_completion_tokens mean the same: send one of them")
        if self.top_logprobs is not None and not self.logprobs:
            raise combination("top_logprobs", "top_logprobs needs logprobs: set logprobs to true")
        for name in ("tool_choice", "parallel_tool_calls"):
            if getattr(self, name) is not None and not self.tools:
                raise combination(name, f"{name} needs tools: send the list of tools, or leave {name} out")
        formatted = self.response_format is not None and self.response_format.type != "text"
        if formatted and self.structured_outputs is not None:
            raise combination("structured_outputs", "response_format and structured_outputs both shape the answer: "
                              "send one of them")  # fmt: skip
        if (formatted or self.structured_outputs is not None) and self.tools and self.tool_choice != "none":
            name = "response_format" if formatted else "structured_outputs"
            raise combination(name, f"{name} cannot hold for an answer that may call tools: send no tools, or "
                              "tool_choice none")  # fmt: skip
        self._check_messages()

    def _check_messages(self) -> None:
        for index, message in enumerate(self.messages):
            if isinstance(message, AssistantMessage) and message.content is None and not message.tool_calls:
                raise ApiError(400, f"messages[{index}]: an assistant's message needs content or tool_calls",
                               param=f"messages[{index}].content", code="missing_required_parameter")  # fmt: skip
        if self.continue_final_message:
            last = self.messages[-1]
            if self.add_generation_prompt:
                raise combination("add_generation_prompt", "continue_final_message continues the last message, "
                                  "add_generation_prompt begins another: set one of them")  # fmt: skip
            if not isinstance(last, AssistantMessage) or last.tool_calls:
                raise combination("continue_final_message", "continue_final_message needs the last message to be an "
                                  "assistant's text")  # fmt: skip


TokenLists = Annotated[list[Annotated[list[TokenId], Field(min_length=1)]], Field(min_length=1, max_length=MAX_PROMPTS)]
Prompt = Annotated[
    Annotated[str, Tag("as_word")]
    | Annotated[list[TokenId], Field(min_length=1), Tag("as_ids")]
    | Annotated[TokenLists, Tag("as_id_lists")]
    | Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS), Tag("as_list")],
    Discriminator(_shape),
]


class CompletionRequest(SamplingFields):
    """POST /v1/completions. `max_tokens` 0 is for scoring a prompt: with echo and logprobs."""

    prompt: Prompt
    max_tokens: Annotated[int, Field(ge=0, le=MAX_TOKENS), WHOLE] | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS), WHOLE] | None = None
    best_of: Annotated[int, Field(ge=1, le=MAX_SEQUENCES), WHOLE] | None = None
    suffix: None = Field(None, description="not supported: these models continue text, they do not fill gaps")
    add_special_tokens: bool | None = None

    def check(self) -> None:
        super().check()
        if self.max_tokens == 0 and not self.echo:
            raise combination("max_tokens", "max_tokens 0 only makes sense with echo: nothing would be answered")
        if self.best_of is not None and self.stream:
            raise combination("best_of", "best_of chooses after all candidates are complete and cannot be streamed")
        if self.best_of is not None and self.best_of < (self.n or 1):
            raise combination("best_of", f"best_of {self.best_of} must be at least n {self.n}")
        if self.echo and self.truncate_prompt:
            raise combination("truncate_prompt", "echo repeats the whole prompt, truncate_prompt cuts it: set one")
        if self.add_special_tokens is not None and not isinstance(first_prompt(self.prompt), str):
            raise combination("add_special_tokens", "add_special_tokens has no effect on a prompt of token ids")


EmbeddedIds = Annotated[list[TokenId], Field(min_length=1, max_length=MAX_INPUT_TOKENS)]
EmbeddedText = Annotated[str, Field(min_length=1)]
EmbeddingInput = Annotated[
    Annotated[EmbeddedText, Tag("as_word")]
    | Annotated[EmbeddedIds, Tag("as_ids")]
    | Annotated[list[EmbeddedIds], Field(min_length=1, max_length=MAX_INPUTS), Tag("as_id_lists")]
    | Annotated[list[EmbeddedText], Field(min_length=1, max_length=MAX_INPUTS), Tag("as_list")],
    Discriminator(_shape),
]


class EmbeddingRequest(Harmless):
    """POST /v1/embeddings. Token ids are what the model reads, its [CLS] and [SEP] among them."""

    model: str | None = Field(None, description="a name from /v1/models; the model that makes embeddings when absent")
    input: EmbeddingInput
    encoding_format: Literal["float", "base64"] | None = Field(None, description="base64: of little-endian float32")
    dimensions: Annotated[int, Field(ge=1, le=MAX_DIMENSIONS), WHOLE] | None = Field(
        None, description="only the first so many numbers, scaled to length 1"
    )
    truncate: bool | None = Field(None, description="cut the end of an input that is too long, and report it")


class TokenizeRequest(Strict):
    """POST /tokenize: a text (`prompt`) or a conversation (`messages`), as vLLM has it."""

    model_config = ConfigDict(json_schema_extra={"oneOf": [{"required": ["prompt"]}, {"required": ["messages"]}]})

    model: str | None = None
    prompt: str | None = None
    messages: Messages | None = None
    tools: Tools | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    return_token_strs: bool | None = None

    def check(self) -> None:
        """Exactly one of the two inputs, and only settings that concern it."""
        if (self.prompt is None) == (self.messages is None):
            raise combination("prompt", "send either prompt (a text) or messages (a conversation)")
        if self.prompt is not None:
            for name in ("tools", "add_generation_prompt", "continue_final_message"):
                if getattr(self, name) is not None:
                    raise combination(name, f"{name} belongs to a conversation: send messages")
        elif self.add_special_tokens is not None:
            raise combination("add_special_tokens", "the chat template decides on special tokens; leave it out")


class DetokenizeRequest(Strict):
    """POST /detokenize."""

    model: str | None = None
    tokens: list[TokenId]


def first_prompt(prompt: str | list[int] | list[str] | list[list[int]]) -> str | int | list[int]:
    """What kind of prompt it is: the string itself or the first member of the list."""
    return prompt if isinstance(prompt, str) else prompt[0]


def combination(param: str, message: str) -> ApiError:
    """A setting that cannot stand beside, or without, another."""
    return ApiError(400, message, param=param, code="unsupported_combination")
