"""A trained encoder as a classifier, and how right a classifier is.

    classifier = Classifier("runs/spam/spam/model")
    told = classifier(["win a prize now", "明天见"])                    # [Told(label="spam", probability=0.98), ...]
    scores = score_classes(truth, [one.label for one in told], [one.probability for one in told], positive="spam")
    print("\\n".join(scores.lines()))

    F1 of a class     2 tp / (2 tp + fp + fn)
    macro F1          its mean over the classes that are true or told of some text
    micro F1          2 Σ tp / Σ (2 tp + fp + fn), which is the accuracy where a text has one class
    ECE               Σ_b n_b / N |accuracy_b - mean probability_b| over 15 bins of the probability (arXiv:1706.04599):
                      0 where 90 % of what is told with 0.9 is right

The metrics are scikit-learn's, but for ECE, which it does not have. Intervals are of 95 %, by bootstrap: N texts drawn
with replacement are a multinomial draw from the table of (true, told) pairs, which costs nothing.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from bimo.backends.adapters import FoundModel, attach_adapter, find_model, is_mergeable
from bimo.data.embedding_pairs import cut_text, text_encoder
from bimo.data.labels import Labels
from bimo.data.pairs import pad_rows
from bimo.errors import UnsupportedModelError, UsageError
from bimo.formats.huggingface import load_encoder, read_model_config
from bimo.formats.peft import read_adapter
from bimo.models.config import EncoderConfig
from bimo.models.encoder import Encoder
from bimo.registries.trouble import Progress
from bimo.tokenizer.load import Tokenizer
from bimo.training.build import with_classes

__all__ = ["ClassScores", "Classifier", "Readings", "Told", "calibration_error", "score_classes"]

AT_ONCE = 1024  # texts sorted by length together
BINS = 15
CORNER = "TRUE \\ TOLD"
SHOWN_CLASSES = 12  # of which the table of (true, told) pairs is shown
Interval = tuple[float, float]


class Told(NamedTuple):
    """The class a text is taken to have, and how likely that is thought to be."""

    label: str
    probability: float


class Readings(NamedTuple):
    """Of N texts: probabilities (N, C) float32, and embeddings (N, D) float32, what the head reads."""

    probabilities: NDArray[np.float32]
    embeddings: NDArray[np.float32]


class Classifier:
    """The encoder in a model directory, or with the adapter in one; texts of similar length are computed together.

    max_tokens: longer texts are cut, and counted by num_cut; None: what the model reads. rows: of a batch.
    Raises UsageError for an encoder without classes, UnsupportedModelError where a text has several, or a number.
    """

    def __init__(
        self,
        reference: str | os.PathLike[str],
        *,
        max_tokens: int | None = None,
        rows: int = 32,
        device: str = "cpu",
        progress: Progress | None = None,
    ) -> None:
        found = find_model(reference, progress=progress)
        if not isinstance(kind := read_model_config(found.directory), EncoderConfig):
            raise UsageError(f"{reference} is no encoder ({kind.family}), so it tells no classes", "model")
        self.model = _load(found).to(device)
        config = self.model.config
        if not config.labels:
            raise UsageError(
                f"{reference} is an encoder without classes: train it with labelled texts first (bimo train)", "model"
            )
        if config.problem_type not in (None, "single_label_classification"):
            raise UnsupportedModelError(f"{reference} does {config.problem_type}, a classifier tells one class of many")
        self.labels = Labels(config.labels)
        self.tokenizer = Tokenizer.from_directory(found.tokenizer)
        self.max_tokens = min(max_tokens or config.max_positions, config.max_positions)
        self.rows, self.num_cut = rows, 0
        self._encode = text_encoder(self.tokenizer)

    def __call__(self, texts: Iterable[str], task: str | None = None) -> list[Told]:
        """The likeliest class of each text. task: of a model of several."""
        names = [self.labels.plain[number] for number in self.labels.of(task)]
        told = []
        for part in self.stream(texts, task):
            best = part.probabilities.argmax(1)
            told += [Told(names[b], float(row[b])) for row, b in zip(part.probabilities, best, strict=True)]
        return told

    def probabilities(self, texts: Iterable[str], task: str | None = None) -> NDArray[np.float32]:
        """(N, C) of each text's classes, those of `labels.of(task)`; a row sums to 1."""
        return self.read(texts, task).probabilities

    def read(self, texts: Iterable[str], task: str | None = None) -> Readings:
        """Probabilities and embeddings of all texts."""
        parts = list(self.stream(texts, task))
        if not parts:
            shapes = (0, len(self.labels.of(task))), (0, self.model.config.hidden_size)
            return Readings(*(np.zeros(shape, np.float32) for shape in shapes))
        return Readings(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))

    def stream(self, texts: Iterable[str], task: str | None = None) -> Iterator[Readings]:
        """The same in order, some texts at a time, in flat memory."""
        numbers = self.labels.of(task)
        rows = iter(texts)
        while some := list(itertools.islice(rows, AT_ONCE)):
            yield self._read(some, numbers)

    @torch.inference_mode()
    def _read(self, texts: Sequence[str], numbers: list[int]) -> Readings:
        ids = self._encode(texts)
        self.num_cut += sum(len(row) > self.max_tokens for row in ids)
        order = sorted(range(len(texts)), key=lambda place: len(ids[place]))
        device = self.model.embed_tokens.weight.device
        chances = np.empty((len(texts), len(numbers)), np.float32)
        vectors = np.empty((len(texts), self.model.config.hidden_size), np.float32)
        for start in range(0, len(order), self.rows):
            places = order[start : start + self.rows]
            cut = [cut_text(ids[place], self.max_tokens) for place in places]
            padded = pad_rows(cut, 0)[:, : self.model.config.max_positions]
            mask = np.arange(padded.shape[1]) < np.array([len(row) for row in cut])[:, None]
            hidden = self.model(torch.from_numpy(padded).to(device), torch.from_numpy(mask).to(device))
            logits = self.model.class_logits(hidden)[:, numbers]
            chances[places] = logits.softmax(-1).cpu().numpy()
            vectors[places] = self.model.pooled(hidden).cpu().numpy()
        return Readings(chances, vectors)


def _load(found: FoundModel) -> Encoder:
    """In float32, with its adapter and the adapter's head."""
    model = load_encoder(found.directory, torch.float32)
    if found.adapter is not None:
        file = read_adapter(found.adapter)
        if file.labels:
            model = with_classes(model, file.labels, seed=0)
        attach_adapter(model, found.adapter, torch.float32, merge=is_mergeable(found.adapter))
    return model


@dataclass(frozen=True, kw_only=True)
class ClassScores:
    """How right classes are; JSON-ready by dataclasses.asdict.

    f1: by class. positive, precision, recall, positive_f1: of the one class that is looked for, if one was named.
    calibration_error: None without probabilities. confusion: rows are true, columns told, as in `labels`.
    """

    labels: tuple[str, ...]
    num_texts: int
    accuracy: float
    accuracy_interval: Interval
    macro_f1: float
    macro_f1_interval: Interval
    micro_f1: float
    f1: dict[str, float]
    positive: str | None
    precision: float | None
    recall: float | None
    positive_f1: float | None
    positive_f1_interval: Interval | None
    calibration_error: float | None
    confusion: tuple[tuple[int, ...], ...]

    def lines(self) -> list[str]:
        """For people: the figures with their intervals, and which classes are taken for which."""
        found = [
            f"accuracy {_shown(self.accuracy, self.accuracy_interval)}  macro F1 "
            f"{_shown(self.macro_f1, self.macro_f1_interval)}  {self.num_texts:,} texts"
        ]
        if self.positive_f1 is not None and self.positive_f1_interval is not None:
            found.append(
                f"{self.positive}: F1 {_shown(self.positive_f1, self.positive_f1_interval)}  precision "
                f"{self.precision:.4f}  recall {self.recall:.4f}"
            )
        if self.calibration_error is not None:
            found.append(f"calibration error {self.calibration_error:.4f}")
        if len(self.labels) <= SHOWN_CLASSES:
            first = max(map(len, (CORNER, *self.labels)))
            widths = [max(7, len(label)) for label in self.labels]
            heads = (f"{label:>{width}}" for label, width in zip(self.labels, widths, strict=True))
            found.append("  ".join([f"{CORNER:{first}}", *heads]))
            for label, row in zip(self.labels, self.confusion, strict=True):
                cells = (f"{count:>{width},}" for count, width in zip(row, widths, strict=True))
                found.append("  ".join([f"{label:{first}}", *cells]))
        return found


def score_classes(
    truth: Sequence[str],
    told: Sequence[str],
    probabilities: Sequence[float] | NDArray[np.floating] | None = None,
    *,
    positive: str | None = None,
    resamples: int = 2000,
    seed: int = 0,
) -> ClassScores:
    """The scores of what was `told` of texts whose classes are the `truth`.

    Args:
        probabilities: (N,) of each told class.
        positive: the class whose own F1 matters, such as "spam".

    Raises UsageError for nothing, for lists that do not belong together, and for a `positive` that no text has.
    """
    from sklearn.metrics import f1_score, precision_recall_fscore_support

    if not truth or len(truth) != len(told):
        raise UsageError(
            f"{len(truth)} texts have a true class and {len(told)} a told one: as many are needed, and one"
        )
    labels = sorted({*truth, *told})
    if positive is not None and positive not in truth:
        raise UsageError(f"no text is {positive!r}: the classes are {', '.join(sorted(set(truth)))}", "positive")
    hits = np.array([right == found for right, found in zip(truth, told, strict=True)])
    each = dict(zip(labels, f1_score(truth, told, labels=labels, average=None, zero_division=0).tolist(), strict=True))
    precision = recall = None
    if positive is not None:
        exact = precision_recall_fscore_support(truth, told, labels=[positive], average=None, zero_division=0)
        precision, recall = float(exact[0][0]), float(exact[1][0])
    numbers = {label: number for number, label in enumerate(labels)}
    confusion = np.zeros((len(labels), len(labels)), np.int64)
    for right, found in zip(truth, told, strict=True):
        confusion[numbers[right], numbers[found]] += 1
    draws = _resampled(confusion, resamples, seed)
    f1_draws = _f1(draws)
    return ClassScores(
        labels=tuple(labels),
        num_texts=len(truth),
        accuracy=float(hits.mean()),
        accuracy_interval=_interval(np.einsum("rcc->r", draws) / len(truth)),
        macro_f1=float(f1_score(truth, told, labels=labels, average="macro", zero_division=0)),
        macro_f1_interval=_interval(np.nanmean(f1_draws, axis=1)),
        micro_f1=float(f1_score(truth, told, labels=labels, average="micro", zero_division=0)),
        f1=each,
        positive=positive,
        precision=precision,
        recall=recall,
        positive_f1=None if positive is None else each[positive],
        positive_f1_interval=None if positive is None else _interval(f1_draws[:, labels.index(positive)]),
        calibration_error=None if probabilities is None else calibration_error(probabilities, hits),
        confusion=tuple(map(tuple, confusion.tolist())),
    )


def calibration_error(
    probabilities: Sequence[float] | NDArray[np.floating], hits: Sequence[bool] | NDArray[np.bool_], bins: int = BINS
) -> float:
    """ECE of (N,) probabilities of what was told, and whether it was right; bins are of equal width."""
    chances, right = np.asarray(probabilities, np.float64), np.asarray(hits, np.float64)
    if chances.shape != right.shape or not len(chances) or not ((chances >= 0) & (chances <= 1 + 1e-6)).all():
        raise UsageError(f"calibration needs a probability from 0 to 1 for each of {len(right)} texts", "probabilities")
    numbers = np.clip(np.ceil(chances * bins).astype(np.int64) - 1, 0, bins - 1)  # a bin has its upper edge
    gaps = np.bincount(numbers, right, bins) - np.bincount(numbers, chances, bins)
    return float(np.abs(gaps).sum() / len(chances))


def _resampled(confusion: NDArray[np.int64], resamples: int, seed: int) -> NDArray[np.int64]:
    """(R, C, C): tables of as many texts, drawn with replacement."""
    counts = confusion.ravel()
    draws = np.random.default_rng(seed).multinomial(counts.sum(), counts / counts.sum(), resamples)
    return np.asarray(draws.reshape(resamples, *confusion.shape))


def _f1(tables: NDArray[np.int64]) -> NDArray[np.float64]:
    """(R, C) of (R, C, C) tables; NaN for a class that is neither true nor told of any text."""
    both = tables.sum(1) + tables.sum(2)
    hits = np.einsum("rcc->rc", tables)
    return np.divide(2.0 * hits, both, out=np.full(both.shape, np.nan), where=both > 0)


def _interval(values: NDArray[np.float64]) -> Interval:
    low, high = np.nanpercentile(values, (2.5, 97.5))
    return float(low), float(high)


def _shown(value: float, interval: Interval) -> str:
    return f"{value:.4f} [{interval[0]:.4f}, {interval[1]:.4f}]"
