"""`bimo bench`: how fast a model is on this machine, in a minute. Comparisons with peers are `make bench`."""

from __future__ import annotations

import json
import queue
import random
import statistics
import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bimo.cli import options

if TYPE_CHECKING:
    from bimo.backends.base import Backend

__all__ = ["bench", "measure"]

PATIENCE = 600.0  # seconds without a token before a measurement is given up


def bench(
    model: Annotated[str, typer.Argument(metavar="[MODEL]", help=options.MODEL_HELP)] = "smollm2",
    requests: Annotated[str, typer.Option(help="How many requests at once, several measures by commas.")] = "1,16",
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Length of the prompt for prefill.")] = 1000,
    max_tokens: Annotated[int, typer.Option(min=2, help="New tokens for each request.")] = 64,
    repeat: Annotated[int, typer.Option(min=1, help="Runs of each measure; the median is shown.")] = 3,
    dtype: options.Dtype = None,
    quant: options.Quant = None,
    kv_cache_dtype: options.KvCacheDtype = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Measure a model's speed on this machine."""
    from bimo.errors import UsageError

    try:
        counts = [int(part) for part in requests.split(",")]
    except ValueError:
        counts = [0]
    if any(count < 1 for count in counts):
        raise UsageError(f"--requests takes numbers above 0 such as 1,16, not {requests}", "requests")

    loaded = options.load_model(model, dtype=dtype, quant=quant, kv_cache_dtype=kv_cache_dtype)
    try:
        backend, info = loaded.backend, loaded.backend.info()
        prompt_tokens = min(prompt_tokens, info.context_length - 1)
        max_tokens = min(max_tokens, info.context_length - 16)
        measure(backend, 1, 16, 4)  # the first steps allocate
        results: dict[str, Any] = {"model": info.model, "dtype": info.dtype, "device": info.device}
        results["prefill"] = _median(
            [prompt_tokens / measure(backend, 1, prompt_tokens, 1)["first_token_s"] for _ in range(repeat)]
        )
        results["decode"] = {
            str(count): _median([measure(backend, count, 8, max_tokens)["tokens_per_s"] for _ in range(repeat)])
            for count in counts
        }
    finally:
        loaded.close()
    if as_json:
        typer.echo(json.dumps(results))
        return
    typer.echo(f"{info.model}, {info.dtype} on {info.device}; tokens per second, median of {repeat} (min-max)")
    typer.echo(f"prefill of {prompt_tokens} tokens   {_shown(results['prefill'])}")
    for count in counts:
        label = f"decode, {count} request{'s' if count > 1 else ''}"
        typer.echo(f"{label.ljust(24)} {_shown(results['decode'][str(count)])}")


def measure(backend: Backend, num_requests: int, prompt_tokens: int, max_tokens: int) -> dict[str, float]:
    """Send `num_requests` different random prompts at once and wait for all of them.

    Returns seconds to the first token (of the slowest request) and new tokens per second after every request had its
    first. Raises EngineError when a request fails or nothing comes for `PATIENCE` seconds.
    """
    from bimo.engine.request import Output, Request, SamplingParams
    from bimo.errors import EngineError

    ordinary = sorted(set(range(backend.info().vocab_size)) - set(backend.tokenizer.special_ids))
    sampling = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
    arrivals: queue.SimpleQueue[tuple[float, Output]] = queue.SimpleQueue()
    start = time.perf_counter()
    for _ in range(num_requests):
        # random prompts, so that the prefix cache has nothing to give
        request = Request(prompt_token_ids=random.choices(ordinary, k=prompt_tokens), sampling=sampling)
        backend.submit(request, lambda output: arrivals.put((time.perf_counter(), output)))
    first: dict[str, float] = {}
    tokens_since, running, now = 0, num_requests, start
    while running:
        try:
            now, output = arrivals.get(timeout=PATIENCE)
        except queue.Empty:
            raise EngineError(f"no token came for {PATIENCE:.0f} seconds: the machine is too slow or stuck") from None
        if output.finish_reason == "error":
            raise EngineError(f"a request failed: {output.error}")
        if len(first) == num_requests:
            tokens_since += len(output.token_ids)
        elif output.token_ids:
            first.setdefault(output.request_id, now)
        running -= output.finish_reason is not None
    begun = max(first.values())
    return {"first_token_s": begun - start, "tokens_per_s": tokens_since / (now - begun) if now > begun else 0.0}


def _median(values: list[float]) -> dict[str, float]:
    return {
        "median": round(statistics.median(values), 1),
        "min": round(min(values), 1),
        "max": round(max(values), 1),
    }


def _shown(result: dict[str, float]) -> str:
    return f"{result['median']:.0f} ({result['min']:.0f}-{result['max']:.0f})"
