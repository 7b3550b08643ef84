"""The stages of a recipe, one after the other, each taken up where an earlier run left it.

folder/recipe.toml   the recipe with all its defaults
       data/         prepared documents, manifest            (data.pipeline)
       tokenizer/    learned from them                       (tokenizer.train)
       tokens/       the documents as ids                    (data.shards)
       checkpoints/, metrics.jsonl, tensorboard/             (training.session)
       model/        the model directory
       report.html   what came of it                         (evaluation.run_report)
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from bimo.data.documents import read_documents
from bimo.data.pipeline import Prepared, prepare
from bimo.data.records import Document
from bimo.errors import DataError, UsageError
from bimo.recipe import Recipe
from bimo.registries.trouble import Progress
from bimo.runtime import Ranks

if TYPE_CHECKING:
    from bimo.data.shards import TokenFile
    from bimo.tokenizer.load import Tokenizer
    from bimo.training.session import Texts

__all__ = ["alone_in", "make_tokenizer", "make_tokens", "prepare_data", "run_folder"]

LANGUAGES = ("zh", "en")  # validated apart; all others together


def run_folder(recipe: Recipe, out: Path | None) -> Path:
    """The run's folder, made where it is not there yet."""
    folder = out or Path("runs") / recipe.name
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{folder} cannot be written ({error.strerror}): name another folder with --out") from error
    return folder


@contextmanager
def alone_in(folder: Path, ranks: Ranks) -> Iterator[None]:
    """Nobody else trains in the folder meanwhile. Raises UsageError when somebody does: two would overwrite each
    other's checkpoints. The system lets go of a dead process's lock."""
    from filelock import FileLock, Timeout

    lock = FileLock(folder / ".training.lock")

    def take() -> None:
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise UsageError(f"another process trains in {folder} just now: wait until it is done, or name another "
                             f"folder with --out", "out") from None  # fmt: skip
        except OSError as error:
            raise DataError(f"{folder} cannot be written ({error.strerror}): name another folder with --out") from error

    if ranks.world_size == 1:
        take()
    else:
        from bimo.training.distributed import from_main

        from_main(ranks, take)
    try:
        yield
    finally:
        lock.release()


def prepare_data(recipe: Recipe, folder: Path, *, workers: int | None, executor: str, progress: Progress) -> Prepared:
    """Prepared documents under folder/data. Raises DataError when validation text stands in the training data, unless
    the recipe says otherwise."""
    prepared = prepare(recipe.data, folder / "data", workers=workers, executor=executor, progress=progress)
    leaks = prepared.manifest.get("leaks") or {"leaked": []}
    if leaks["leaked"] and recipe.data.leaks == "stop":
        raise DataError(
            f"{len(leaks['leaked'])} of {leaks['num_checked']} validation documents stand in the training data as well "
            f"({', '.join(leaks['leaked'][:3])}), so scores would be too good: clean the sources, or set data.leaks to "
            f'"drop" (they leave the validation text) or "warn"'
        )
    if leaks["leaked"] and recipe.data.leaks == "warn":
        shown = f"{len(leaks['leaked'])} of {leaks['num_checked']} validation documents"
        typer.echo(f"warning: {shown} stand in the training data as well, scores will be too good", err=True)
    if not prepared.files("train"):
        raise DataError(
            f"no document was left to train on: {folder / 'data' / 'manifest.html'} says which step took them"
        )
    return prepared


def make_tokenizer(recipe: Recipe, folder: Path, prepared: Prepared, progress: Progress) -> Tokenizer:
    """The tokenizer under folder/tokenizer, learned from the training documents."""
    from bimo.data.shards import fingerprint
    from bimo.tokenizer.load import Tokenizer
    from bimo.tokenizer.train import SEQ2SEQ_TOKENS, save_tokenizer, train_tokenizer

    place = folder / "tokenizer"
    extra = SEQ2SEQ_TOKENS if recipe.model.kind == "seq2seq" else ()
    mark = fingerprint(recipe.tokenizer.model_dump(), extra, prepared.manifest["mark"])
    stamp = place / ".made-from"
    if not (stamp.is_file() and stamp.read_text(encoding="utf-8") == mark):
        kind, size = recipe.tokenizer.kind, recipe.tokenizer.vocab_size
        progress("learning the tokenizer", 0, 0)
        backend = train_tokenizer(
            _sample(prepared, recipe.tokenizer.sample_bytes), kind=kind, vocab_size=size, extra=extra
        )
        shutil.rmtree(place, ignore_errors=True)
        save_tokenizer(backend, place, model_max_length=recipe.model.context_length)
        stamp.write_text(mark, encoding="utf-8")
    return Tokenizer.from_directory(place)


def _sample(prepared: Prepared, num_bytes: int) -> Iterator[str]:
    """Training texts, evenly over all of them, about `num_bytes` in UTF-8."""
    parts = [part for part in prepared.manifest["parts"] if part["split"] == "train"]
    total = sum(part["characters"] for part in parts) * 2  # bytes, between one and three a character
    step = max(1, round(total / num_bytes))
    for number, document in enumerate(read_documents(prepared.files("train"))):
        if number % step == 0:
            yield document.text


def make_tokens(recipe: Recipe, folder: Path, prepared: Prepared, tokenizer: Tokenizer, progress: Progress) -> Texts:
    """Token files under folder/tokens: training by source, validation by language."""
    from bimo.data.pairs import encode_pairs
    from bimo.data.shards import EncodedDocument, TokenFile, encode_documents, fingerprint, write_tokens
    from bimo.training.session import Texts

    pairs, longest = recipe.objective_kind == "seq2seq", recipe.model.context_length
    mark = fingerprint(tokenizer.directory / "tokenizer.json", prepared.manifest["mark"], pairs and longest)
    refused: Counter[str] = Counter()
    total = sum(part["characters"] for part in prepared.manifest["parts"])
    done = 0

    def counted(documents: Iterator[Document]) -> Iterator[Document]:
        nonlocal done
        for document in documents:
            yield document
            done += len(document.text)
            progress("tokenising", done, total)

    def tokens(name: str, documents: Iterator[Document]) -> TokenFile:
        place = folder / "tokens" / name
        if TokenFile.is_whole(place, mark):
            return TokenFile.open(place)
        encoded: Iterator[EncodedDocument]
        if pairs:
            encoded = encode_pairs(
                counted(documents), tokenizer, max_tokens=longest, refuse=lambda reason: refused.update([reason])
            )
        else:
            encoded = encode_documents(counted(documents), tokenizer)
        return write_tokens(place, encoded, vocab_size=tokenizer.vocab_size, mark=mark)

    train, validation = {}, {}
    for source in recipe.data.sources:
        if files := prepared.files("train", source.name):
            train[source.name] = tokens(f"train-{source.name}", read_documents(files))
    for language in (*LANGUAGES, "other"):
        documents = (
            document
            for document in read_documents(prepared.files("validation"))
            if (document.language if document.language in LANGUAGES else "other") == language
        )
        file = tokens(f"validation-{language}", documents)
        if len(file.tokens):
            validation[language] = file
    for reason, count in refused.items():
        typer.echo(f"{count} documents are not used: {reason}", err=True)
    return Texts(train, validation, tokenizer)
