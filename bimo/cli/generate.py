"""`bimo generate`: continue one text and print what the model adds; an encoder-decoder answers it."""

from __future__ import annotations

import dataclasses
import json
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bimo.cli import options

if TYPE_CHECKING:
    from bimo.backends.facade import Completion

__all__ = ["generate"]

DEFAULT_MAX_TOKENS = 256


def generate(
    model: options.ModelArgument,
    prompt: Annotated[
        str | None, typer.Option(metavar="TEXT", help="Text to continue or answer; else standard input.")
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Send the prompt as a chat message, through the model's template.")
    ] = False,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="A system message; means --chat.")] = None,
    max_tokens: options.MaxTokens = DEFAULT_MAX_TOKENS,
    min_tokens: options.MinTokens = None,
    temperature: options.Temperature = None,
    top_k: options.TopK = None,
    top_p: options.TopP = None,
    min_p: options.MinP = None,
    typical_p: options.TypicalP = None,
    repetition_penalty: options.RepetitionPenalty = None,
    presence_penalty: options.PresencePenalty = None,
    frequency_penalty: options.FrequencyPenalty = None,
    seed: options.Seed = None,
    stop: options.Stop = None,
    n: Annotated[int | None, typer.Option("--n", "-n", help="So many answers.")] = None,
    best_of: options.BestOf = None,
    beams: Annotated[int | None, typer.Option(help="Beam search with so many beams.")] = None,
    beam_groups: Annotated[int | None, typer.Option(help="Diverse beam search: groups of beams.")] = None,
    diversity_penalty: Annotated[float | None, typer.Option(help="How much groups of beams shun each other.")] = None,
    length_penalty: Annotated[float | None, typer.Option(help="Above 1: beam search prefers longer answers.")] = None,
    penalty_alpha: Annotated[float | None, typer.Option(help="Contrastive search, with --top-k of 2 or more.")] = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on after the end-of-text token.")] = False,
    logprobs: Annotated[
        int | None, typer.Option(metavar="K", help="With --json: log-probability of each token and K alternatives.")
    ] = None,
    truncate: options.Truncate = False,
    dtype: options.Dtype = None,
    quant: options.Quant = None,
    kv_cache_dtype: options.KvCacheDtype = None,
    speculation: options.Speculation = None,
    draft_model: options.DraftModel = None,
    stream: Annotated[
        bool | None, typer.Option("--stream/--no-stream", help="Show text as it comes; the default on a terminal.")
    ] = None,
    as_json: Annotated[
        bool,
        typer.Option(
            "--json",
            help="Print one JSON object: text, tokens, finish_reason, usage, timings; "
            "with more than one answer also the list `completions`.",
        ),
    ] = False,
) -> None:
    """Continue a text, or answer it: with --chat, or by an encoder-decoder (a translation, a summary)."""
    from bimo.errors import UsageError

    prompt = options.checked_text(prompt, "prompt") if prompt is not None else options.read_stdin("prompt")
    if system is not None:
        system = options.checked_text(system, "system")
    several = (n or 1) > 1
    if stream and (several or as_json):
        raise UsageError(f"--stream shows one answer as it comes: leave out {'--json' if as_json else '--n'}", "stream")
    if logprobs is not None and not as_json:
        raise UsageError("--logprobs shows in the JSON object only: add --json", "logprobs")
    sampling = options.given(
        max_tokens=max_tokens,
        min_tokens=min_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        typical_p=typical_p,
        repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        seed=seed,
        stop=stop,
        n=n,
        best_of=best_of,
        num_beams=beams,
        num_beam_groups=beam_groups,
        diversity_penalty=diversity_penalty,
        length_penalty=length_penalty,
        penalty_alpha=penalty_alpha,
        ignore_eos=ignore_eos,
        logprobs=logprobs,
        truncate_prompt=truncate,
    )
    options.check_sampling(sampling)
    messages = [{"role": "system", "content": system}] if system is not None else []
    messages.append({"role": "user", "content": prompt})
    as_chat = chat or system is not None

    loaded = options.load_model(
        model, dtype=dtype, quant=quant, kv_cache_dtype=kv_cache_dtype, speculation=speculation, draft_model=draft_model
    )
    try:
        if stream or (stream is None and not several and not as_json and sys.stdout.isatty()):
            for piece in loaded.stream(messages if as_chat else prompt, **sampling):
                typer.echo(piece, nl=False)
            typer.echo()
            return
        answer = loaded.chat(messages, **sampling) if as_chat else loaded.generate(prompt, **sampling)
    finally:
        loaded.close()
    completions = answer if isinstance(answer, list) else [answer]
    if as_json:
        typer.echo(json.dumps(_report(completions), ensure_ascii=False))
        return
    for index, completion in enumerate(completions):
        if several:
            typer.echo(f"--- {index + 1} of {len(completions)} ({completion.finish_reason}) ---")
        typer.echo(completion.text)
    usage = completions[0].usage
    if usage and (cut := usage.truncated_tokens):
        typer.echo(f"note: the first {cut} tokens of the prompt were cut off to fit the context", err=True)


def _report(completions: list[Completion]) -> dict[str, Any]:
    """The one JSON object: the first answer's fields, and all answers when there are several."""
    answers = [_as_dict(completion) for completion in completions]
    return answers[0] if len(answers) == 1 else {**answers[0], "completions": answers}


def _as_dict(completion: Completion) -> dict[str, Any]:
    usage = completion.usage
    fields = {
        "text": completion.text,
        "tokens": list(completion.tokens),
        "finish_reason": completion.finish_reason,
        "usage": {**_plain(usage), "total_tokens": usage.total_tokens} if usage else None,
        "timings": _plain(completion.timings),
    }
    if completion.logprobs is not None:
        fields["logprobs"] = [_plain(entry) for entry in completion.logprobs]
    return fields


def _plain(value: Any) -> Any:
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) and not isinstance(value, type) else value
