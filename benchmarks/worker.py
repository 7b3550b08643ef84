"""One engine in one process, told by lines on stdin what to measure: `python -m benchmarks.worker bimo smollm2`.

In:  {"workload": "single"}            Out: {"seconds": 1.7, "tokens": 100}
A process each, because two engines in one process share threads, allocators and primitive caches.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable
from typing import Any

__all__ = ["PROMPT_TOKENS", "WORKLOADS", "main"]

PROMPT_TOKENS = 32
# name -> requests at once, prompt tokens, new tokens
WORKLOADS = {
    "single": (1, PROMPT_TOKENS, 100),
    "batch16": (16, PROMPT_TOKENS, 100),
    "prefill1000": (1, 1000, 1),
    "prefill4000": (1, 4000, 1),
}


def make_prompts(tokenizer_encode: Callable[[str], list[int]], count: int, length: int, salt: int) -> list[list[int]]:
    """Different prompts of exactly `length` tokens; `salt` makes every round's new, so that no cache helps."""
    prompts = []
    for number in range(count):
        text = f"Round {salt}, story {number}. " + "The old clock in the hall struck nine, and nobody came. " * 400
        prompts.append(tokenizer_encode(text)[:length])
    return prompts


class Bimo:
    """bimo through its Python interface, the server's own path below HTTP."""

    def __init__(self, reference: str) -> None:
        import bimo

        self.model = bimo.load(reference)
        self.encode = self.model.tokenizer.encode

    def run(self, prompts: list[list[int]], new_tokens: int) -> int:
        import asyncio

        async def all_of_them() -> list[Any]:
            calls = (
                self.model.agenerate(p, temperature=0, max_tokens=new_tokens, min_tokens=new_tokens, ignore_eos=True)
                for p in prompts
            )
            return await asyncio.gather(*calls)

        return sum(len(c.tokens) for c in asyncio.run(all_of_them()))


class Transformers:
    """Hugging Face transformers' `generate` in bfloat16, the same model directory."""

    def __init__(self, reference: str, dtype: str = "bfloat16") -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.utils import logging

        from bimo.formats.hub import resolve

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        directory = resolve(reference)
        tokenizer = AutoTokenizer.from_pretrained(directory)
        self.model = AutoModelForCausalLM.from_pretrained(directory, dtype=getattr(torch, dtype)).eval()
        self.encode = lambda text: tokenizer(text).input_ids

    def run(self, prompts: list[list[int]], new_tokens: int) -> int:
        import torch

        ids = torch.tensor(prompts)
        out = self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            pad_token_id=0,
        )
        return (out.shape[1] - ids.shape[1]) * len(prompts)


ENGINES = {
    "bimo": Bimo,
    "transformers-bf16": Transformers,
    "transformers-f32": lambda reference: Transformers(reference, "float32"),
}


def main() -> None:
    """Load, say so, then answer one measurement a line until stdin ends."""
    name, reference = sys.argv[1:3]
    start = time.perf_counter()
    engine = ENGINES[name](reference)
    print(json.dumps({"loaded": time.perf_counter() - start}), flush=True)
    for salt, line in enumerate(sys.stdin):
        count, length, new_tokens = WORKLOADS[json.loads(line)["workload"]]
        prompts = make_prompts(engine.encode, count, length, salt)
        start = time.perf_counter()
        tokens = engine.run(prompts, new_tokens)
        seconds = time.perf_counter() - start
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(json.dumps({"seconds": seconds, "tokens": tokens, "peak_bytes": peak}), flush=True)


if __name__ == "__main__":
    main()
