"""Between OpenAI's words and the engine's: sampling settings, constraints, usage."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from bimo.engine.request import Constraint, SamplingParams, Usage
from bimo.serving.schema import (
    JsonObjectFormat,
    JsonSchemaFormat,
    ResponseFormat,
    SamplingFields,
    StructuredOutputs,
    combination,
)
from bimo.tokenizer.load import Tokenizer

__all__ = ["constraint", "sampling_params", "usage_json"]

# fields that mean the same on both sides, under the same name
_SAME = (
    "temperature", "top_p", "n", "seed", "presence_penalty", "frequency_penalty", "top_k", "min_p", "typical_p",
    "repetition_penalty", "min_tokens", "ignore_eos", "num_beams", "num_beam_groups", "diversity_penalty",
    "length_penalty", "early_stopping", "penalty_alpha",
)  # fmt: skip


def sampling_params(body: SamplingFields, **more: Any) -> SamplingParams:
    """The engine's settings; fields left out keep its neutral defaults. Raises UsageError naming the field.

    `more` adds what the two APIs call differently: max_tokens, logprobs, prompt_logprobs, best_of, stop.
    """
    settings = {name: value for name in _SAME if (value := getattr(body, name)) is not None}
    if body.stop is not None:
        settings["stop"] = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop)
    if body.stop_token_ids:
        settings["stop_token_ids"] = tuple(body.stop_token_ids)
    if body.logit_bias:
        settings["logit_bias"] = {int(token): bias for token, bias in body.logit_bias.items()}
    if body.include_stop_str_in_output:
        settings["include_stop"] = True
    settings["stop"] = settings.get("stop", ()) + more.pop("stop", ())
    return SamplingParams(**settings, **more)


def constraint(
    tokenizer: Tokenizer, response_format: ResponseFormat | None, outputs: StructuredOutputs | None
) -> Callable[[], Constraint] | None:
    """What the answer must be shaped like, compiled; None for free text. Raises UsageError for what cannot be held.

    Takes milliseconds to seconds for large schemas: run it off the event loop.
    """
    from bimo.engine import constrain

    match response_format:
        case JsonObjectFormat():
            return constrain.json_object(tokenizer)
        case JsonSchemaFormat(json_schema=schema):
            return constrain.json_schema(tokenizer, schema.schema_)
    if outputs is None:
        return None
    if sum(getattr(outputs, name) is not None for name in ("json_", "regex", "choice", "grammar")) != 1:
        raise combination("structured_outputs", "structured_outputs needs exactly one of json, regex, choice, grammar")
    param = "structured_outputs"
    if outputs.json_ is not None:
        return constrain.json_schema(tokenizer, outputs.json_, param=param)
    if outputs.regex is not None:
        return constrain.regex(tokenizer, outputs.regex, param=param)
    if outputs.choice is not None:
        return constrain.choice(tokenizer, outputs.choice, param=param)
    assert outputs.grammar is not None
    return constrain.grammar(tokenizer, outputs.grammar, param=param)


def usage_json(usage: Usage) -> dict[str, Any]:
    """OpenAI's `usage`; a truncated prompt is reported beside the cached tokens."""
    details = {"cached_tokens": usage.cached_tokens}
    if usage.truncated_tokens:
        details["truncated_tokens"] = usage.truncated_tokens
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.total_tokens,
        "prompt_tokens_details": details,
    }
