"""How a model answers what it was tuned for: the answers it writes, and ROUGE-L against those of people.

    answers = write_answers(model, dialogues, max_tokens=128)
    score = rouge_l(answers, references)              # RougeScore(mean=0.31, interval=0.04)

ROUGE-L (Lin 2004) by rouge-score, the reference implementation: F1 of the longest common subsequence. Its own tokenizer
knows ASCII only, so Chinese is cut into characters here, as is usual; English words stay words.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bimo.backends.facade import Model
from bimo.data.records import Message
from bimo.registries.trouble import Progress

__all__ = ["RougeScore", "rouge_l", "write_answers"]

PIECES = re.compile(r"[a-z0-9]+|[\u3400-\u9fff\uf900-\ufaff]")
SAMPLES, SEED = 1000, 12345  # of the bootstrap


@dataclass(frozen=True)
class RougeScore:
    """0 to 1. interval: half of the 95 % interval of bootstrap samples of the answers. each: (N,)."""

    mean: float
    interval: float
    each: tuple[float, ...]


class _Pieces:
    """Lower-case words of letters and digits, and single Chinese characters."""

    def tokenize(self, text: str) -> list[str]:
        return PIECES.findall(text.lower())


def rouge_l(answers: Sequence[str], references: Sequence[str]) -> RougeScore:
    """Of each answer against its reference, and on average."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], tokenizer=_Pieces())
    pairs = zip(references, answers, strict=True)
    each = np.array([scorer.score(reference, answer)["rougeL"].fmeasure for reference, answer in pairs])
    if not len(each):
        return RougeScore(0.0, 0.0, ())
    drawn = np.random.default_rng(SEED).integers(0, len(each), (SAMPLES, len(each)))
    low, high = np.percentile(each[drawn].mean(1), (2.5, 97.5))
    return RougeScore(float(each.mean()), float(high - low) / 2, tuple(each.tolist()))


def write_answers(
    model: Model, dialogues: Sequence[Sequence[Message]], *, max_tokens: int, progress: Progress, label: str
) -> list[str]:
    """The model's greedy answer to each dialogue (its last turn is the user's), computed together."""

    async def write() -> list[str]:
        done = 0

        async def one(messages: Sequence[Message]) -> str:
            nonlocal done
            answer: Any = await model.achat([m._asdict() for m in messages], max_tokens=max_tokens, temperature=0)
            done += 1
            progress(label, done, len(dialogues))
            return str(answer.text).strip()

        return list(await asyncio.gather(*(one(messages) for messages in dialogues)))

    progress(label, 0, len(dialogues))
    return asyncio.run(write())
