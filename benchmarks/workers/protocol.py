"""How a worker is talked to: a line of JSON in, a line of JSON out. Standard library only, for it runs everywhere.

Start:  python -m benchmarks.workers.ENGINE '{"model": "/path", "threads": 2}'      Out: {"loaded": 1.9}
In:     {"prompts": [[1, 2, 3]], "new_tokens": 100}    Out: {"seconds": 1.7, "answers": [[4, 5, ...]]}

A worker that cannot load says {"failed": why} and ends; a call that fails answers {"failed": why} and the worker stays.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

__all__ = ["Generate", "run"]

# prompts as token ids, new tokens for each -> the new ids of each, exactly that many, the end token ignored
Generate = Callable[[list[list[int]], int], list[list[int]]]


def run(load: Callable[..., Generate]) -> None:
    """Load with the settings of the command line, say so, then measure one call a line until stdin ends."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what engines print is no reply

    def reply(**message: Any) -> None:
        replies.write(json.dumps(message) + "\n")
        replies.flush()

    start = time.perf_counter()
    try:
        generate = load(**json.loads(sys.argv[1]))
    except Exception as error:
        reply(failed=_said(error))
        raise
    reply(loaded=time.perf_counter() - start)
    for line in sys.stdin:
        call = json.loads(line)
        start = time.perf_counter()
        try:
            answers = generate(call["prompts"], call["new_tokens"])
        except Exception as error:
            reply(failed=_said(error))
            continue
        reply(seconds=time.perf_counter() - start, answers=answers)


def _said(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
