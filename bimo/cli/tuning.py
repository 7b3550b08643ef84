"""A recipe's [[stage]]s, one after the other, each taken up where an earlier run left it.

folder/NAME/data/        the stage's examples, cleaned and divided, and their manifest   (data.pipeline)
            replay/      text like what the base learned from                           (training.replay)
            tokens/      as ids, with what is learned of them                           (data.example_tokens)
            checkpoints/, metrics.jsonl, tensorboard/                                   (training.session)
            model/       an adapter in PEFT's layout, or a model directory
            report.html  before and after                                               (cli.tuning_report)
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bimo.data.documents import DocumentWriter, read_documents
from bimo.data.pipeline import Prepared, prepare
from bimo.data.records import Document
from bimo.errors import DataError, UsageError
from bimo.recipe import DataRecipe, Recipe, StageRecipe, TaskRecipe
from bimo.registries.trouble import Progress

if TYPE_CHECKING:
    from bimo.data.augment import Augmenter
    from bimo.data.shards import TokenFile
    from bimo.training.finetune import Base
    from bimo.training.session import Texts

__all__ = [
    "StageData",
    "altered",
    "augmented_copies",
    "left_out",
    "open_stage_base",
    "prepare_stage",
    "stage_folder",
    "stage_texts",
    "task_documents",
    "tell_of_bad_rows",
]

SHOWN = 5  # rows that are named one by one
LEFT_OUT = "left_out.json"  # beside the tokens: (id, reason) of each example that did not fit


def stage_folder(folder: Path, stage: StageRecipe) -> Path:
    return folder / stage.name


def open_stage_base(recipe: Recipe, stage: StageRecipe, folder: Path, progress: Progress) -> Base:
    """The model the stage begins with: the one it names, else that of the stage before, else the pretrained one. An
    adapter is worked into its base first, in folder/NAME/base."""
    from bimo.backends.adapters import find_model, is_mergeable, write_model
    from bimo.training.finetune import open_base

    def opened(reference: str) -> Base:
        found = find_model(reference, progress=progress)
        if found.adapter is None:
            return open_base(reference, found.directory)
        if not is_mergeable(found.adapter):
            raise UsageError(
                f"{reference} is an adapter that is no change of its base's weights, and a stage begins with a whole "
                f"model: train a lora instead",
                "base",
            )
        merged = stage_folder(folder, stage) / "base"
        stamp = merged / ".made-from"
        if not (stamp.is_file() and stamp.read_text(encoding="utf-8") == found.mark):
            progress(f"merging {reference} into its base", 0, 0)
            merged.parent.mkdir(parents=True, exist_ok=True)
            write_model(found, merged, reference)
            stamp.write_text(found.mark, encoding="utf-8")
        return open_base(str(merged.absolute()), merged)

    if stage.base is not None:
        return opened(stage.base)
    number = recipe.stage.index(stage)
    before = stage_folder(folder, recipe.stage[number - 1]) if number else folder
    place = before / "model"
    if not place.is_dir():
        raise UsageError(
            f"stage {stage.name} begins with {place}, which is not there yet: run what comes before it first (the same "
            f"command without --stage), or name a base",
            "base",
        )
    return opened(str(place.absolute()))


def prepare_stage(stage: StageRecipe, folder: Path, *, workers: int | None, progress: Progress) -> Prepared:
    """The tasks' examples under folder/data. Raises DataError naming rows that cannot be read, unless the stage says
    that the others are enough."""
    recipe = DataRecipe(
        sources=stage.task,
        clean=stage.clean,
        validation=stage.validation,
        leaks=stage.leaks,
        passage_chars=stage.passage_chars,
    )
    prepared = prepare(recipe, folder / "data", workers=workers, progress=progress)
    damages = prepared.manifest["damages"]
    if damages and stage.bad_rows == "stop":
        listed = "; ".join(f"{damage['id']} {damage['reason']}" for damage in damages[:SHOWN])
        more = f"; and {prepared.manifest['num_damages'] - SHOWN} more" if len(damages) > SHOWN else ""
        raise DataError(
            f'{listed}{more}: mend them, or set bad_rows = "skip" in the stage to go on with the others '
            f"({folder / 'data' / 'manifest.html'} lists all)"
        )
    leaked = (prepared.manifest.get("leaks") or {}).get("leaked") or []
    if leaked and stage.leaks == "stop":
        raise DataError(
            f"{len(leaked)} validation examples stand in the training examples as well ({', '.join(leaked[:3])}): "
            f'clean them, or set leaks to "drop" or "warn"'
        )
    if not prepared.files("train"):
        raise DataError(
            f"no example was left to learn from: {folder / 'data' / 'manifest.html'} says which step took them"
        )
    return prepared


def task_documents(prepared: Prepared, split: str, task: TaskRecipe) -> Iterator[Document]:
    """A task's examples, as its kind wants them."""
    for document in read_documents(prepared.files(split, task.name)):
        if task.kind == "text" and document.messages:
            document.messages = ()
        yield document


class StageData:
    """Token files of a stage, made or taken up. refused: (id, reason) of the examples that do not fit."""

    def __init__(
        self, recipe: Recipe, stage: StageRecipe, folder: Path, base: Base, prepared: Prepared, progress: Progress
    ) -> None:
        from bimo.backends.adapters import find_model
        from bimo.data.shards import fingerprint
        from bimo.formats.huggingface import read_model_config
        from bimo.models.config import Seq2SeqConfig
        from bimo.training.finetune import row_length
        from bimo.training.stage_kinds import stage_kind

        self.recipe, self.stage, self.folder, self.base = recipe, stage, folder, base
        self.prepared, self.progress = prepared, progress
        self.length = row_length(stage, base.config)
        self.kind = stage_kind(
            stage, base, partial(self.documents, "train"), partial(self.documents, "validation"), seed=recipe.seed
        )
        self.refused: list[tuple[str, str]] = []
        self.augmented: dict[str, Any] = {}  # of the tasks that were, how many copies of each kind
        augmented = [task.augment.model_dump() for task in stage.task if task.augment]
        lists = [Path(file) for task in stage.task if task.augment for file in task.augment.synonym_files]
        if missing := [file for file in lists if not file.is_file()]:
            raise UsageError(f"the list of synonyms {missing[0]} is not there: correct the path, which is relative to "
                             f"the recipe", "synonym_files")  # fmt: skip
        models = [model for task in stage.task if task.augment for model in task.augment.back_translation or ()]
        for model in models:
            if not isinstance(read_model_config(find_model(model, progress=progress).directory), Seq2SeqConfig):
                raise UsageError(f"back_translation needs two models that translate, encoder-decoders, and {model} is "
                                 f"none", "back_translation")  # fmt: skip
        lists += [about for model in models if (about := Path(model, "bimo.json")).is_file()]  # trained anew: another
        tokenizer = base.tokenizer.directory / "tokenizer.json"
        wishes = (self.length, stage.too_long, self.kind.mark, augmented and recipe.seed, augmented)
        self.mark = fingerprint(tokenizer, base.tokenizer.chat_template, prepared.manifest["mark"], wishes, *lists)

    def documents(self, split: str) -> Iterator[Document]:
        """All tasks' examples, as they are written by people."""
        for task in self.stage.task:
            yield from task_documents(self.prepared, split, task)

    def write(
        self, name: str, documents: Callable[[], Iterable[Document]], mark: str = "", *, chosen: bool = True
    ) -> TokenFile:
        """The token folder of that name, of `documents`, which are read only if it is not there yet.

        chosen: by people, who want to know what does not fit; of other text it is left out.
        """
        from bimo.data.shards import TokenFile, write_tokens

        place, mark = self.folder / "tokens" / name, f"{self.mark} {mark}"
        if TokenFile.is_whole(place, mark):
            self.refused += _left_out(place)
            return TokenFile.open(place)
        refused: list[tuple[str, str]] = []

        def counted() -> Iterator[Document]:
            for number, document in enumerate(documents()):
                self.progress(f"tokenising {name}", number, 0)
                yield document

        encoded = self.kind.encode(counted(), self.length, lambda document, reason: refused.append((document, reason)))
        file = write_tokens(place, encoded, vocab_size=self.base.tokenizer.vocab_size, mark=mark)
        refused = [row for row in refused if not self._dropped_copy(name, *row)]
        if chosen and refused:
            self.refused += refused
            if self.stage.too_long == "stop":
                place.joinpath("about.json").unlink()  # made again when the recipe says otherwise
            else:
                (place / LEFT_OUT).write_text(json.dumps(refused, ensure_ascii=False), encoding="utf-8")
        return file

    def _dropped_copy(self, name: str, document: str, reason: str) -> bool:
        """Whether it was an altered copy that did not fit, which nobody can shorten: it is counted as dropped."""
        from bimo.data.augment import copy_kind

        if (made := self.augmented.get(name.removeprefix("train-"))) is None or (kind := copy_kind(document)) is None:
            return False
        made["copies"][kind] -= 1
        made["dropped"][reason] = made["dropped"].get(reason, 0) + 1
        return True

    def check_refused(self, tell: Callable[[str], None]) -> None:
        """Raise DataError naming the examples that were refused, or tell how many are left out."""
        from bimo.training.finetune import longest_row

        if not self.refused:
            return
        listed = "; ".join(f"{name} {reason}" for name, reason in self.refused[:SHOWN])
        more = f"; and {len(self.refused) - SHOWN} more" if len(self.refused) > SHOWN else ""
        if self.stage.too_long == "stop":
            most = longest_row(self.stage, self.base.config)
            larger = ", raise length in the stage" if self.length < most else ""
            mend = f"shorten them{larger}" if all(" tokens" in reason for _, reason in self.refused) else "mend them"
            raise DataError(f'{listed}{more}: {mend}, or set too_long = "skip" to leave them out')
        many = "1 example is" if len(self.refused) == 1 else f"{len(self.refused):,} examples are"
        tell(f"{many} left out: {listed}{more}")


def stage_texts(data: StageData, tell: Callable[[str], None]) -> Texts:
    """Training files by task, validation files by task, replay and what shows forgetting."""
    from bimo.training.finetune import GENERAL
    from bimo.training.replay import NAME as REPLAY
    from bimo.training.session import Texts

    stage, prepared = data.stage, data.prepared
    train, validation = {}, {}
    for task in stage.task:
        train[task.name] = data.write(f"train-{task.name}", partial(_augmented, task, data))
        if (made := data.augmented.get(task.name)) is not None:
            _copies_file(data.folder, task).write_text(json.dumps(made), encoding="utf-8")
            tell(f"{task.name}: {_told(made)}")
        file = data.write(f"validation-{task.name}", partial(task_documents, prepared, "validation", task))
        if len(file.tokens):
            validation[task.name] = file
        elif stage.validation:
            tell(f"no example of {task.name} fell to validation, so it is not scored: raise the stage's validation "
                 f"({stage.validation:g})")  # fmt: skip
    data.check_refused(tell)  # before the base writes texts for minutes
    if stage.replay.share and data.kind.can_replay:
        remembered, held_out, mark = _replay(data.recipe, stage, data.folder, data.base, data.progress)
        again = data.write(f"train-{REPLAY}", remembered, mark, chosen=False)
        if len(again.tokens):
            train[REPLAY] = again
        general = data.write(f"validation-{GENERAL}", held_out, mark, chosen=False)
        if len(general.tokens):
            validation[GENERAL] = general
        else:
            tell(
                "there is no text worth remembering, so forgetting is neither held back nor measured: name a "
                "replay.source, or another"
            )
    return Texts(train, validation, data.base.tokenizer)


def _left_out(place: Path) -> list[tuple[str, str]]:
    file = place / LEFT_OUT
    return [(name, why) for name, why in json.loads(file.read_text(encoding="utf-8"))] if file.is_file() else []


def left_out(folder: Path, prepared: Prepared) -> tuple[int, list[tuple[str, str]]]:
    """In how many places, and of the first ones why, rows that cannot be read or examples that do not fit are left out.
    A place is an example, or a file with all its rows of a kind."""
    rows = [(damage["id"], damage["reason"]) for damage in prepared.manifest["damages"]]
    long = [row for place in sorted((folder / "tokens").glob("*")) for row in _left_out(place)]
    return prepared.manifest["num_damages"] + len(long), rows + long


def tell_of_bad_rows(prepared: Prepared, tell: Callable[[str], None]) -> None:
    """What cannot be read, where the stage says that the others are enough."""
    if damages := prepared.manifest["damages"]:
        listed = "; ".join(f"{damage['id']} {damage['reason']}" for damage in damages[:SHOWN])
        more = "; ..." if prepared.manifest["num_damages"] > SHOWN else ""
        tell(f"rows are left out: {listed}{more}")


def augmented_copies(folder: Path, stage: StageRecipe) -> dict[str, dict[str, dict[str, int]]]:
    """{task: {"copies": how many of each kind, "dropped": why there are no more}} of the tasks that were augmented."""
    return {
        task.name: json.loads(file.read_text(encoding="utf-8"))
        for task in stage.task
        if task.augment and (file := _copies_file(folder, task)).is_file()
    }


def _copies_file(folder: Path, task: TaskRecipe) -> Path:
    return folder / "tokens" / f"train-{task.name}" / "copies.json"  # goes when the tokens are made again


def _told(made: dict[str, dict[str, int]]) -> str:
    """Of altered copies, for people."""
    copies, dropped = (", ".join(f"{count:,} {kind}" for kind, count in row.items()) for row in made.values())
    return f"altered copies: {copies or 'none'}" + (f"; dropped: {dropped}" if dropped else "")


def _augmented(task: TaskRecipe, data: StageData) -> Iterator[Document]:
    """The task's training examples, and altered copies of them behind all."""
    documents = partial(task_documents, data.prepared, "train", task)
    yield from documents()
    yield from altered(task, data, documents)


def altered(task: TaskRecipe, data: StageData, documents: Callable[[], Iterable[Document]]) -> Iterator[Document]:
    """Altered copies of some training examples, as the task wishes; none otherwise."""
    if task.augment is None:
        return
    from bimo.data.augment import Augmenter

    augmenter = Augmenter.of(task.augment, data.recipe.seed, data.progress, instruction=task.instruction)
    for document in documents():
        yield from augmenter.augment(document)
    if task.augment.back_translation:
        yield from _back_translated(task, augmenter, documents, data.progress)
    data.augmented[task.name] = {"copies": dict(augmenter.copies), "dropped": dict(augmenter.dropped)}


def _back_translated(
    task: TaskRecipe, augmenter: Augmenter, documents: Callable[[], Iterable[Document]], progress: Progress
) -> Iterator[Document]:
    """Copies of the questions, through two translating models."""
    import bimo
    from bimo.evaluation.translation import ModelTranslator

    assert task.augment is not None and task.augment.back_translation is not None
    there, back = task.augment.back_translation
    total = sum(1 for _ in documents())

    def counted() -> Iterator[Document]:
        for number, document in enumerate(documents(), 1):
            progress("translating there and back", number, total)
            yield document

    with bimo.load(there, progress=progress) as first, bimo.load(back, progress=progress) as second:
        yield from augmenter.back_translate(
            counted(),
            ModelTranslator(first.backend),
            ModelTranslator(second.backend),
            language="" if task.parallel else task.language or "",  # of a parallel source it is that of the answers
        )


def _replay(
    recipe: Recipe, stage: StageRecipe, folder: Path, base: Base, progress: Progress
) -> tuple[Callable[[], Iterator[Document]], Callable[[], Iterator[Document]], str]:
    """What is learned again, what is kept out, and what both were made from."""
    from bimo.data.shards import fingerprint

    wish = stage.replay
    if wish.source is not None:
        source = DataRecipe(sources=(wish.source,), clean=stage.clean, validation=0.1, leaks="drop", passage_chars=1000)
        prepared = prepare(source, folder / "replay", progress=progress)
        mark = str(prepared.manifest["mark"])
        return (
            lambda: read_documents(prepared.files("train")),
            lambda: read_documents(prepared.files("validation")),
            mark,
        )
    mark = fingerprint(base.mark, wish.samples, wish.max_tokens, recipe.seed)
    file = folder / "replay" / f"written-{mark}.parquet"
    if not file.is_file():
        import bimo
        from bimo.training.replay import rehearse

        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_name(f".{file.name}")
        with bimo.load(str(base.directory), progress=progress) as model, DocumentWriter(partial) as writer:
            settings = {"samples": wish.samples, "max_tokens": wish.max_tokens, "seed": recipe.seed}
            for document in rehearse(model, **settings, progress=progress):
                writer.write(document)
        os.replace(partial, file)

    def part(held_out: bool) -> Iterator[Document]:
        return (document for number, document in enumerate(read_documents([file])) if (number % 10 == 9) is held_out)

    return lambda: part(False), lambda: part(True), mark
