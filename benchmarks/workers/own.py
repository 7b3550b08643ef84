"""bimo through its Python interface, the server's own path below HTTP."""

from __future__ import annotations

import asyncio
from typing import Any

from benchmarks.workers.protocol import Generate, run


def load(model: str, threads: int, **settings: Any) -> Generate:
    """`settings` are arguments of `bimo.load`, such as quant; threads come from the environment."""
    import bimo

    loaded = bimo.load(model, **settings)

    def generate(prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
        async def answer_all() -> list[Any]:
            sampling = {"temperature": 0, "max_tokens": new_tokens, "min_tokens": new_tokens, "ignore_eos": True}
            return await asyncio.gather(*(loaded.agenerate(prompt, **sampling) for prompt in prompts))

        return [completion.tokens for completion in asyncio.run(answer_all())]

    return generate


if __name__ == "__main__":
    run(load)
