"""What a stage's examples become, by what its base learns: how they are encoded, the loss, the loader, new heads.

kind = stage_kind(stage, base, lambda: documents("train"), lambda: documents("validation"), seed=0)
encoded = kind.encode(documents, max_tokens, refuse)
model = kind.with_heads(model)
loss, make_loader = kind.loss, kind.make_loader

answers      a decoder writes what stands after the question           objectives.answers, data.example_loader
pairs        an encoder-decoder writes one text from another           objectives.seq2seq, data.pairs
classes      an encoder tells which class a text has                   objectives.classify, data.labels
embeddings   an encoder puts texts that belong together side by side   objectives.embed, data.embedding_pairs
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from bimo.data.embedding_pairs import encode_embedding_pairs
from bimo.data.example_loader import ExampleLoader
from bimo.data.example_tokens import Refuse, encode_examples
from bimo.data.labels import encode_labelled, label_set
from bimo.data.loader import RowLoader
from bimo.data.pairs import PairLoader, encode_pairs
from bimo.data.records import Document
from bimo.data.shards import EncodedDocument, EncodedExample, TokenFile
from bimo.models.config import Seq2SeqConfig
from bimo.objectives.answers import answer_loss
from bimo.objectives.causal import Loss
from bimo.objectives.classify import class_objective
from bimo.objectives.embed import embedding_objective
from bimo.objectives.r_drop import with_r_drop
from bimo.objectives.seq2seq import seq2seq_loss
from bimo.objectives.unlikelihood import with_penalty
from bimo.recipe import StageRecipe
from bimo.training.build import with_classes
from bimo.training.finetune import Base, objective_kind, pseudo_folder
from bimo.training.replay import NAME as REPLAY

__all__ = ["STAGE_KINDS", "StageKind", "stage_kind"]

Documents = Callable[[], Iterable[Document]]
Encoded = Iterator[EncodedDocument | EncodedExample]
Encode = Callable[[Iterable[Document], int, Refuse], Encoded]  # (documents, most tokens, refuse)


def _same(model: Any) -> Any:
    return model


@dataclass(frozen=True)
class StageKind:
    """mark: changes with what `encode` makes of the same documents. can_replay: the base can learn any text. classes:
    by their numbers."""

    name: str
    encode: Encode
    loss: Callable[..., Loss]
    make_loader: Callable[..., RowLoader]
    with_heads: Callable[[Any], Any] = _same
    mark: str = ""
    can_replay: bool = False
    classes: tuple[str, ...] = ()


def stage_kind(stage: StageRecipe, base: Base, train: Documents, validation: Documents, *, seed: int) -> StageKind:
    """train, validation: the stage's documents, to be read as often as needed. Raises DataError for labels that only
    validation has, UsageError for what the base cannot learn."""
    return STAGE_KINDS[objective_kind(stage, base.config)](stage, base, train, validation, seed)


def _answers(stage: StageRecipe, base: Base, train: Documents, validation: Documents, seed: int) -> StageKind:
    def encode(documents: Iterable[Document], most: int, refuse: Refuse) -> Encoded:
        return encode_examples(documents, base.tokenizer, max_tokens=most + 1, refuse=refuse)

    weights = _loss_weights(stage)

    def make_loader(files: list[TokenFile], **order: Any) -> RowLoader:
        return ExampleLoader(files, loss_weights=[weights.get(file.folder.name, 1.0) for file in files], **order)

    loss = with_penalty(with_r_drop(answer_loss, stage.r_drop), stage.penalty, base.tokenizer)
    return StageKind("answers", encode, loss, make_loader, can_replay=True)


def _pairs(stage: StageRecipe, base: Base, train: Documents, validation: Documents, seed: int) -> StageKind:
    assert isinstance(base.config, Seq2SeqConfig)

    def encode(documents: Iterable[Document], most: int, refuse: Refuse) -> Encoded:
        current = ""

        def named() -> Iterator[Document]:
            nonlocal current
            for document in documents:
                current = document.id
                yield document

        # pairs are read one by one, so whoever is refused was read last
        return encode_pairs(named(), base.tokenizer, max_tokens=most, refuse=lambda reason: refuse(current, reason))

    loader = partial(PairLoader, start_id=base.config.decoder_start_token_id)
    return StageKind("pairs", encode, with_r_drop(seq2seq_loss, stage.r_drop), loader)


def _classes(stage: StageRecipe, base: Base, train: Documents, validation: Documents, seed: int) -> StageKind:
    labels = label_set(train(), validation())

    def encode(documents: Iterable[Document], most: int, refuse: Refuse) -> Encoded:
        shorten = _cut if stage.too_long == "cut" else None
        return encode_labelled(documents, base.tokenizer, labels, max_tokens=most, refuse=refuse, shorten=shorten)

    loss, loader = class_objective(labels, _loss_weights(stage))
    heads = partial(with_classes, labels=labels.names, seed=seed)
    mark = repr(labels.names)
    return StageKind("classes", encode, with_r_drop(loss, stage.r_drop), loader, heads, mark, classes=labels.plain)


def _embeddings(stage: StageRecipe, base: Base, train: Documents, validation: Documents, seed: int) -> StageKind:
    wish = stage.embedding

    def encode(documents: Iterable[Document], most: int, refuse: Refuse) -> Encoded:
        return encode_embedding_pairs(
            documents,
            base.tokenizer,
            max_tokens=most,
            refuse=refuse,
            shorten=_cut if stage.too_long == "cut" else None,
            query_prefix=wish.query_prefix,
            passage_prefix=wish.passage_prefix,
        )

    loss, loader = embedding_objective(wish)
    return StageKind("embeddings", encode, loss, loader, mark=f"{wish.query_prefix}|{wish.passage_prefix}")


def _cut(document: str, reason: str) -> None:
    """The stage says that the beginning of a long text is enough."""


def _loss_weights(stage: StageRecipe) -> dict[str, float]:
    """w of each file in the joint loss, by its folder's name; replay's makes up its share of it."""
    weights = {f"train-{task.name}": task.loss_weight for task in stage.task}
    if (wish := stage.pseudo_labels) is not None:
        weights |= {pseudo_folder(number): wish.loss_weight for number in range(wish.rounds)}
    share = min(stage.replay.share, 0.99)
    return weights | {f"train-{REPLAY}": sum(weights.values()) * share / (1 - share) or 1.0}


STAGE_KINDS: dict[str, Callable[[StageRecipe, Base, Documents, Documents, int], StageKind]] = {
    "answers": _answers,
    "pairs": _pairs,
    "classes": _classes,
    "embeddings": _embeddings,
}
