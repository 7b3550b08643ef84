"""How much worse a model gets when people make mistakes: any score, over text with typos, homophones, dropped words.

    def score(documents):                                      # of a classifier, a chat model, anything
        return {"accuracy": sum(classify(d.text) == d.label for d in documents) / len(documents)}

    table = noisy_scores(score, documents, shares=(0, 0.05, 0.1, 0.2), seeds=3)
    print("\\n".join(table.lines()))

"±" is half of the 95 % interval of the mean over the seeds of the noise (Student's t); that over trainings is another
one: train with several seeds, and `mean_interval` their scores. The same seed makes the same mistakes for every model,
so that two models are compared on the same texts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from bimo.data.noise import KINDS, Kind, Noise, question_of
from bimo.data.records import Document
from bimo.errors import UsageError
from bimo.registries.trouble import Progress

__all__ = ["Interval", "NoiseRow", "NoiseTable", "Score", "mean_interval", "noisy_scores"]

Score = Callable[[Sequence[Document]], dict[str, float]]
"""Documents -> figures by name. Of a dialogue the user's last turn has the noise, the last answer is as it was."""

SHARES = (0.0, 0.05, 0.1, 0.2)


@dataclass(frozen=True)
class Interval:
    """mean ± half, the 95 % interval; half is nan for a single value."""

    mean: float
    half: float

    def __str__(self) -> str:
        return f"{self.mean:.4f} " + ("        " if math.isnan(self.half) else f"±{self.half:.4f}".rjust(8))


@dataclass(frozen=True, kw_only=True)
class NoiseRow:
    """kind, share: of the noise; "clean" and 0 without. changed: the share of documents that it altered (1 is all): a
    kind that does not suit the language alters none, and then says nothing about the model. scores: by name."""

    kind: str
    share: float
    changed: float
    scores: dict[str, Interval]


@dataclass(frozen=True, kw_only=True)
class NoiseTable:
    """The first row is that without noise, where it was asked for."""

    rows: tuple[NoiseRow, ...]
    num_documents: int
    num_seeds: int

    def lines(self) -> list[str]:
        """For people: a head and a line a row."""
        names = list(self.rows[0].scores)
        widths = [max(len(name), 15) for name in names]
        columns = "  ".join(name.rjust(width) for name, width in zip(names, widths, strict=True))
        lines = [f"{'NOISE':<10}  WORDS  CHANGED  {columns}".rstrip()]
        for row in self.rows:
            values = [str(row.scores[name]).rjust(width) for name, width in zip(names, widths, strict=True)]
            lines.append(f"{row.kind:<10}  {row.share:5.0%}  {row.changed:7.0%}  {'  '.join(values)}".rstrip())
        return lines


def mean_interval(values: Sequence[float]) -> Interval:
    """The mean and half of its 95 % interval, t * s / sqrt(n), of independent runs."""
    if not values:
        raise UsageError("a mean needs at least one value, there are none", "values")
    mean = float(np.mean(values))
    if len(values) == 1:
        return Interval(mean, math.nan)
    from scipy.stats import t

    spread = float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return Interval(mean, float(t.ppf(0.975, len(values) - 1)) * spread)


def noisy_scores(
    score: Score,
    documents: Sequence[Document],
    *,
    shares: Sequence[float] = SHARES,
    kinds: Sequence[Kind] = KINDS,
    seeds: int = 3,
    seed: int = 0,
    progress: Progress = lambda label, done, total: None,
) -> NoiseTable:
    """Score the documents with noise of each kind in each share of their words.

    Args:
        score: called 1 + len(kinds) * len(nonzero shares) * seeds times.
        shares: 0 among them is the documents as they are, scored once.
        seeds: how many times noise is drawn anew; the first one is `seed`.
        progress: called with ("noise", scorings done, scorings in all).
    """
    if not documents:
        raise UsageError("there are no documents to score under noise: give at least one", "documents")
    if seeds < 2:
        raise UsageError(f"an interval needs noise drawn at least twice, seeds cannot be {seeds}", "seeds")
    if not shares or (any(shares) and not kinds):
        raise UsageError("name at least one share of words, and one kind of noise for those above 0", "shares")
    wanted = [(kind, share) for kind in dict.fromkeys(kinds) for share in sorted(set(shares)) if share]
    noises = [[Noise(kind, share, seed + number, progress) for number in range(seeds)] for kind, share in wanted]
    total, done = seeds * len(wanted) + (0 in shares), 0
    rows: list[NoiseRow] = []
    names: list[str] | None = None

    def scored(some: Sequence[Document]) -> dict[str, float]:
        nonlocal done, names
        progress("noise", done, total)
        figures = score(some)
        names = names or list(figures)
        if not figures or list(figures) != names:
            raise UsageError(
                f"score gives the same figures for all documents, got {list(figures)} after {names}: give at least "
                f"one, always of the same names",
                "score",
            )
        done += 1
        return figures

    if 0 in shares:
        clean = scored(documents)
        rows.append(NoiseRow(kind="clean", share=0.0, changed=0.0, scores=_intervals([clean])))
    for (kind, share), draws in zip(wanted, noises, strict=True):
        figures, changed = [], 0
        for noise in draws:
            noisy = [noise.document(document) for document in documents]
            changed += sum(map(_differs, documents, noisy))
            figures.append(scored(noisy))
        rows.append(
            NoiseRow(kind=kind, share=share, changed=changed / seeds / len(documents), scores=_intervals(figures))
        )
    progress("noise", total, total)
    return NoiseTable(rows=tuple(rows), num_documents=len(documents), num_seeds=seeds)


def _differs(document: Document, noisy: Document) -> bool:
    return question_of(document) != question_of(noisy)


def _intervals(figures: Sequence[dict[str, float]]) -> dict[str, Interval]:
    return {name: mean_interval([figure[name] for figure in figures]) for name in figures[0]}
