"""Texts with classes, for an encoder that learns to tell them apart; and texts that a trained one labels itself.

    labels = label_set(train, validation)                        # Labels(names=("ham", "spam"))
    encoded = encode_labelled(train, tokenizer, labels, max_tokens=256, refuse=print)
    file = write_tokens(folder, encoded, vocab_size=tokenizer.vocab_size, mark="")
    batch = LabelLoader([file], labels=labels, length=256, seed=0).next_batch(32)         # LabelBatch

A document's `label` is its class and its `source` the task. In a token file an example is two documents, the text as
the encoder reads it and one id, the number of its class:

    tokens:   | [CLS] text [SEP] | 1 | [CLS] text [SEP] | 0 | ...

Several tasks share one head. Classes of one task have plain names; those of several are written "task::class", so that
a model directory says by itself which classes stand beside each other, and none of another task is ever predicted.
Tasks are kept apart even where their classes have the same names: 1 is not the same in spam and in sentiment.
"""

from __future__ import annotations

import dataclasses
import difflib
import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from bimo.data.embedding_pairs import AT_ONCE, cut_text, text_encoder
from bimo.data.loader import IGNORED, Origin
from bimo.data.pairs import PairLoader, pad_rows, width_of
from bimo.data.records import Document
from bimo.data.shards import TokenFile
from bimo.errors import DataError, UsageError
from bimo.tokenizer.load import Tokenizer

__all__ = [
    "LabelBatch",
    "LabelLoader",
    "Labels",
    "PseudoTally",
    "TellsClasses",
    "check_labels",
    "encode_labelled",
    "label_set",
    "pseudo_labels",
]

SEPARATOR = "::"  # a task's name has no colon
SHOWN = 5


@dataclass(frozen=True)
class Labels:
    """The classes of a model, in the order of its scores. names: as in its config."""

    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.names)

    @cached_property
    def tasks(self) -> tuple[str, ...]:
        """Of each class; "" where there is one task without a name."""
        return tuple(task for task, _ in self._pairs)

    @cached_property
    def plain(self) -> tuple[str, ...]:
        """Each class as its own task calls it."""
        return tuple(label for _, label in self._pairs)

    @cached_property
    def together(self) -> NDArray[np.bool_]:
        """(C, C): whether two classes are of one task."""
        tasks = np.array(self.tasks)
        return np.asarray(tasks[:, None] == tasks)

    @cached_property
    def _pairs(self) -> tuple[tuple[str, str], ...]:
        if not all(SEPARATOR in name for name in self.names):
            return tuple(("", name) for name in self.names)
        cut = (name.partition(SEPARATOR) for name in self.names)
        return tuple((task, label) for task, _, label in cut)

    @cached_property
    def _numbers(self) -> dict[tuple[str, str], int]:
        return {pair: number for number, pair in enumerate(self._pairs)}

    def number(self, task: str, label: str) -> int | None:
        """Of a task's class; None if it has no such class. Where there is one task, any name is its name."""
        return self._numbers.get((task if len(set(self.tasks)) > 1 else self.tasks[0], label))

    def of(self, task: str | None = None) -> list[int]:
        """The numbers of a task's classes. Raises UsageError when there are several and none is named."""
        there = list(dict.fromkeys(self.tasks))
        if task is None and len(there) > 1:
            raise UsageError(f"this model tells the classes of {', '.join(there)} apart: say which task", "task")
        if task is not None and task not in there:
            names = ", ".join(filter(None, there)) or "none by name: leave the task out"
            raise UsageError(f"this model has no task {task!r}, it has {names}", "task")
        return [number for number, its in enumerate(self.tasks) if task is None or its == task]


def label_set(documents: Iterable[Document], validation: Iterable[Document] = ()) -> Labels:
    """The classes of training documents, by task (`source`) and alphabet.

    Raises DataError for a document without a class, a task with fewer than two, and classes that only `validation` has.
    """
    found: dict[str, set[str]] = {}
    for document in documents:
        if not document.label.strip():
            raise DataError(f"{document.id} has no class: give it a label, or take it out")
        found.setdefault(document.source, set()).add(document.label)
    if not found:
        raise DataError("there is no labelled text to learn from: each needs a text and a label")
    for task, classes in found.items():
        if len(classes) < 2:
            raise DataError(
                f"all training texts of {task} are {next(iter(classes))!r}, so there is nothing to tell apart: add "
                f"texts of another class"
            )
    if len(found) == 1 and not any(SEPARATOR in label for classes in found.values() for label in classes):
        names = sorted(next(iter(found.values())))
    else:
        names = [f"{task}{SEPARATOR}{label}" for task in sorted(found) for label in sorted(found[task])]
    labels = Labels(tuple(names))
    check_labels(validation, labels)
    return labels


def check_labels(documents: Iterable[Document], labels: Labels) -> None:
    """Raises DataError that names the classes of validation documents which no training text has, and where."""
    unseen: dict[tuple[str, str], list[str]] = {}
    for document in documents:
        if labels.number(document.source, document.label) is None:
            unseen.setdefault((document.source, document.label), []).append(document.id)
    if not unseen:
        return
    shown = [
        f"{what[1]!r} ({places[0]}{f' and {len(places) - 1} more' if len(places) > 1 else ''}{_near(*what, labels)})"
        for what, places in itertools.islice(unseen.items(), SHOWN)
    ]
    many = f"{len(unseen)} classes stand" if len(unseen) > 1 else "a class stands"
    raise DataError(
        f"{many} in validation only: {', '.join(shown)}{', ...' if len(unseen) > SHOWN else ''}; correct the label, or "
        f"add training texts of it"
    )


def _near(task: str, label: str, labels: Labels) -> str:
    alone = len(set(labels.tasks)) == 1
    own = [name for name, its in zip(labels.plain, labels.tasks, strict=True) if alone or its == task]
    near = difflib.get_close_matches(label.casefold(), [name.casefold() for name in own], 1, cutoff=0.7)
    meant = next((name for name in own if near and name.casefold() == near[0]), None)
    return f", did you mean {meant!r}?" if meant else ""


def encode_labelled(
    documents: Iterable[Document],
    tokenizer: Tokenizer,
    labels: Labels,
    *,
    max_tokens: int,
    refuse: Callable[[str, str], None],
    shorten: Callable[[str, str], None] | None = None,
) -> Iterator[tuple[str, NDArray[np.uint32]]]:
    """(id, token ids) of the text and then the number of its class, of every document.

    Args:
        refuse: told the id of what cannot be used, and why: no text, a class that `labels` does not have, more than
            `max_tokens` tokens.
        shorten: with it long texts are cut instead, and it is told which.
    """
    if len(labels) > tokenizer.vocab_size:
        raise UsageError(f"{len(labels)} classes are more than the vocabulary's {tokenizer.vocab_size} tokens", "label")
    encode = text_encoder(tokenizer)
    rows = iter(documents)
    while some := list(itertools.islice(rows, AT_ONCE)):
        found = []
        for document in some:
            number = labels.number(document.source, document.label)
            if not document.text.strip():
                refuse(document.id, "has no text")
            elif number is None:
                near = _near(document.source, document.label, labels)
                refuse(document.id, f"is {document.label!r}, which no training text is{near}")
            else:
                found.append((document.id, document.text, number))
        texts = encode([text for _, text, _ in found])
        for (name, _, number), ids in zip(found, texts, strict=True):
            if len(ids) > max_tokens:
                why = f"has {len(ids)} tokens, {max_tokens} are read"
                if shorten is None:
                    refuse(name, why)
                    continue
                shorten(name, why)
            yield name, cut_text(ids, max_tokens)
            yield name, np.array([number], np.uint32)


@dataclass(frozen=True)
class LabelBatch:
    """B texts of T tokens, C classes.

    input_ids (B, T) int64, 0 in padding; mask (B, T) bool, False = padding; targets (B,) int64, the number of the
    class, or IGNORED; allowed (B, C) bool, the classes of the text's own task; weights (B,) float32, by which factor
    its loss counts: 1 for all where there is one task.
    """

    input_ids: NDArray[np.int64]
    mask: NDArray[np.bool_]
    targets: NDArray[np.int64]
    allowed: NDArray[np.bool_]
    weights: NDArray[np.float32]
    origins: tuple[Origin, ...] = ()

    is_text: ClassVar[bool] = False

    def __len__(self) -> int:
        return len(self.input_ids)

    def rows(self, part: slice) -> LabelBatch:
        """Some of its rows, without most of the columns that are padding in all of them."""
        mask = self.mask[part]
        width = width_of(mask)
        return LabelBatch(
            self.input_ids[part, :width],
            mask[:, :width],
            self.targets[part],
            self.allowed[part],
            self.weights[part],
            self.origins[part],
        )

    @property
    def num_targets(self) -> int:
        return int((self.targets != IGNORED).sum())

    def idle(self) -> LabelBatch:
        """One row that asks for nothing."""
        one = np.zeros((1, 1), np.int64)
        every = np.ones((1, self.allowed.shape[1]), np.bool_)
        return LabelBatch(one, one != 0, one[0] + IGNORED, every, np.ones(1, np.float32))


class LabelLoader(PairLoader):
    """Rows are texts with their classes; a batch has them by length. `length` is only what a text may have at most,
    which `encode_labelled` has seen to.

    loss_weights: w of each file's task in the joint loss Σ w L / Σ w of a step, where L is an average over the texts of
    the file; 1 if not given.
    """

    def __init__(
        self,
        files: Sequence[TokenFile],
        *,
        labels: Labels,
        length: int,
        loss_weights: Sequence[float] | None = None,
        **order: Any,
    ) -> None:
        self.labels = labels
        self.loss_weights = list(loss_weights or [1.0] * len(files))
        super().__init__(files, length=length, start_id=0, **order)  # no decoder starts here

    def next_batch(self, num_rows: int, *, rank: int = 0, world_size: int = 1) -> LabelBatch:
        origins = self.arrange([self._next_origin() for _ in range(num_rows)])
        batch = self.batch(origins[rank::world_size])
        counts = Counter(origin.file for origin in origins)
        total = sum(self.loss_weights[number] for number in counts)
        for place, origin in enumerate(batch.origins):
            batch.weights[place] = self.loss_weights[origin.file] * num_rows / (counts[origin.file] * total)
        return batch

    def batch(self, origins: Sequence[Origin]) -> LabelBatch:  # type: ignore[override]  # its pairs are of another kind
        texts, classes = [], np.zeros(len(origins), np.int64)
        for place, (number, row, _) in enumerate(origins):
            file = self.files[number]
            start, end = self.span(file, row)
            texts.append(file.tokens[start : end - 1])
            classes[place] = file.tokens[end - 1]
            if classes[place] >= len(self.labels):
                raise DataError(
                    f"{file.folder} has the class number {classes[place]}, there are {len(self.labels)} classes: "
                    f"remove the folder and run the same command again"
                )
        lengths = np.array([len(text) for text in texts], np.int64)
        # a position behind the last that the model knows would be an error, also in padding
        input_ids = pad_rows(texts, 0)[:, : max(self.length, lengths.max(initial=0))]
        mask = np.arange(input_ids.shape[1]) < lengths[:, None]
        ones = np.ones(len(texts), np.float32)
        return LabelBatch(input_ids, mask, classes, self.labels.together[classes], ones, tuple(origins))


class TellsClasses(Protocol):
    """What pseudo-labels need of a classifier (`evaluation.classification.Classifier` is one)."""

    labels: Labels

    def probabilities(self, texts: Sequence[str], task: str | None = None) -> NDArray[np.float32]:
        """(N, C) of each text's classes, those of `labels.of(task)`."""
        ...


@dataclass
class PseudoTally:
    """What became of unlabelled texts. kept: by class. unsure: whose class was not likely enough. empty: no text."""

    kept: Counter[str] = field(default_factory=Counter)
    unsure: int = 0
    empty: int = 0


def pseudo_labels(
    classifier: TellsClasses,
    documents: Iterable[Document],
    threshold: float,
    *,
    tally: PseudoTally,
    task: str | None = None,
) -> Iterator[Document]:
    """The documents whose class has at least the probability `threshold`, with that class and the id "ID+pseudo"
    (semi-supervised learning by pseudo-labels, Lee 2013); memory stays flat.

    Look at `tally` afterwards: where one class is nearly all that was kept, the model only learns its own opinion.

    Args:
        task: whose classes are told, of a model of several; it becomes the documents' source.
    """
    numbers = classifier.labels.of(task)
    names = [classifier.labels.plain[number] for number in numbers]
    rows = iter(documents)
    while found := list(itertools.islice(rows, AT_ONCE)):
        some = [document for document in found if document.text.strip()]
        tally.empty += len(found) - len(some)
        chances = classifier.probabilities([document.text for document in some], task)
        for document, chance in zip(some, chances, strict=True):
            best = int(chance.argmax())
            if not chance[best] >= threshold:  # NaN is not sure
                tally.unsure += 1
                continue
            tally.kept[names[best]] += 1
            yield dataclasses.replace(
                document, id=f"{document.id}+pseudo", source=task or document.source, label=names[best]
            )
