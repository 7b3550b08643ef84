"""What adapters cost when several are computed in one batch: tokens a second beside the base alone.

    python -m benchmarks.adapters                  # smollm2, 8 sequences, 3 adapters of rank 16 on all matrices
    python -m benchmarks.adapters --rank 64 --sequences 16
    python -m benchmarks.adapters --quick          # that it runs; the numbers mean little

One engine, loaded once with the adapters, which are random (the numbers in them cost the same). Rounds go in turns: all
sequences by the base, by the adapters, by one adapter. Greedy, no drafts, no end: so many tokens whatever is said.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bimo.engine.engine import Engine
    from bimo.engine.low_rank import Change
    from bimo.models.config import DecoderConfig

GOAL = 0.8  # of the base's tokens a second
PROMPT_TOKENS = 32


def random_change(config: DecoderConfig, rank: int, seed: int) -> Change:
    """An adapter on every matrix, with an A each for q, k, v, gate and up, as PEFT trains them."""
    import numpy as np

    from bimo.engine.low_rank import matrix_shapes

    values = np.random.default_rng(seed)
    heads, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    change: Change = {}
    for name, (rows, columns) in matrix_shapes(config).items():
        ends = {"qkv_proj": [heads, heads + kv, rows], "gate_up_proj": [rows // 2, rows]}.get(
            name.split(".")[-1], [rows]
        )
        change[name] = [
            (
                start,
                end,
                values.normal(0, columns**-0.5, (rank, columns)).astype(np.float32),
                values.normal(0, 0.01, (end - start, rank)).astype(np.float32),
            )
            for start, end in zip([0, *ends[:-1]], ends, strict=True)
        ]
    return change


def load(model: str, quant: str | None, num_adapters: int, rank: int) -> Engine:
    from bimo.backends.build import build_runner, choose_precision, read_writer_config
    from bimo.engine.engine import Engine, EngineConfig
    from bimo.formats.hub import resolve
    from bimo.models.config import DecoderConfig
    from bimo.tokenizer.load import Tokenizer

    directory = resolve(model)
    config = read_writer_config(model, directory)
    assert isinstance(config, DecoderConfig), "a decoder"
    changes = {f"adapter-{i}": random_change(config, rank, i) for i in range(num_adapters)}
    precision = choose_precision(config, quant=quant)
    runner = build_runner(model, directory, config, precision, changes=changes)
    limits = EngineConfig(context_length=config.max_positions, speculation="off")
    return Engine(runner, Tokenizer.from_directory(directory), limits)


def measure(engine: Engine, adapters: list[str | None], num_tokens: int, salt: int) -> float:
    """Tokens a second of one batch, a sequence for each of `adapters`; the prompts are computed before."""
    from bimo.engine.request import Request, SamplingParams

    words = random.Random(salt)
    greedy = SamplingParams(temperature=0, max_tokens=num_tokens + 1, ignore_eos=True)
    for adapter in adapters:
        prompt = [words.randrange(1000, engine.limits.vocab_size) for _ in range(PROMPT_TOKENS)]
        engine.add(Request(prompt_token_ids=prompt, sampling=greedy, adapter=adapter))
    before = engine.stats.generation_tokens
    while engine.stats.generation_tokens - before < len(adapters):
        engine.step()
    begun, first = time.perf_counter(), engine.stats.generation_tokens
    while engine.has_work:
        engine.step()
    return (engine.stats.generation_tokens - first) / (time.perf_counter() - begun)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--quant", help="int8, int4, none; default: what is fastest")
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--adapters", type=int, default=3)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=128, help="new tokens of a sequence and round")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--quick", action="store_true", help="2 short rounds")
    wish = parser.parse_args()
    if wish.quick:
        wish.rounds, wish.tokens = 2, 16
    engine = load(wish.model, wish.quant, wish.adapters, wish.rank)
    names = list(engine.limits.adapters)
    batches: dict[str, list[str | None]] = {
        "base": [None] * wish.sequences,
        f"{len(names)} adapters": [names[i % len(names)] for i in range(wish.sequences)],
        "one adapter": [names[0]] * wish.sequences,
        "half base": [names[i // 2 % len(names)] if i % 2 else None for i in range(wish.sequences)],
    }
    for adapters in batches.values():  # warm up
        measure(engine, adapters, 8, 0)
    found: dict[str, list[float]] = {batch: [] for batch in batches}
    for salt in range(1, wish.rounds + 1):
        for batch, adapters in batches.items():
            found[batch].append(measure(engine, adapters, wish.tokens, salt))
    print(f"{wish.model}, {wish.sequences} sequences, rank {wish.rank} on all matrices, {wish.rounds} rounds in turns")
    for batch, rates in found.items():
        shares = [rate / base for rate, base in zip(rates, found["base"], strict=True)]
        low, high = min(shares), max(shares)
        print(
            f"  {batch:12} {statistics.median(rates):8.1f} tokens/s   {statistics.median(shares):.2f} of the base "
            f"({low:.2f} to {high:.2f})"
        )
    share = statistics.median(a / b for a, b in zip(found[f"{len(names)} adapters"], found["base"], strict=True))
    print(f"  goal: {GOAL} of the base's, {'reached' if share >= GOAL else 'missed'} ({share:.2f})")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
