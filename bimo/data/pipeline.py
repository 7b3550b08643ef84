"""From a recipe's sources to prepared documents: streamed, on all cores, resumable.

    prepare(recipe, folder) ──► folder/documents/train-00000.parquet ...     columns as in `COLUMNS`
                                folder/documents/validation-00000.parquet ...
                                folder/manifest.json, folder/manifest.html   what every step dropped and changed

    1  clean     unit by unit: read ─► rewrites ─► personal data ─► language ─► filters ─► Parquet + signatures   | many
    2  compare   signatures of all units: which documents copy an earlier one                                     | one
    3  divide    unit by unit: without copies, cut into passages, into training and validation                    | many
    4  check     does validation text stand in the training data?                                                 | many

A unit is some files of one source, about `UNIT_BYTES` of them. Its result appears by one rename under folder/work,
named by a hash of what it was made from: a run that was killed goes on with the units that are missing, and where a
file changed only its unit is done again. Units are streamed, their signatures stay on disk; what grows with the data is
step 2, by some 100 bytes a document, and step 4, by 16 bytes a word of the validation text.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
import uuid
import zlib
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from bimo.data import executors
from bimo.data.clean import REWRITES, notices
from bimo.data.dedup import exact_key, find_duplicates, signature
from bimo.data.documents import DocumentWriter, read_documents
from bimo.data.filters import base_code, make_filters, untranslated
from bimo.data.language import identify
from bimo.data.manifest import Ledger
from bimo.data.overlap import LeakCheck, tick
from bimo.data.privacy import mask
from bimo.data.readers import read_file
from bimo.data.records import Damage, Document, Message
from bimo.data.segment import passages
from bimo.data.shards import fingerprint
from bimo.data.signatures import SignatureFile
from bimo.data.sources import SourceFile, files_of, kind_of
from bimo.errors import DataError
from bimo.recipe import DataRecipe, SourceRecipe
from bimo.registries.trouble import Progress

__all__ = ["Prepared", "prepare", "source_mark"]

UNIT_BYTES = 16 << 20  # of input; enough to make starting a unit cheap, little enough to share out and to repeat
WAYS = 1 << 32  # the validation split is drawn from a hash of this many values
NOT_FOR_UNITS = {"exact_duplicates", "near_duplicates"}  # settings of later steps
NOT_FOR_TEXT = {"weight", "loss_weight", "augment"}  # settings of a source that training alone reads
SPLITS = ("train", "validation")
PARSED = ("html", "docx", "eml")  # kinds of files whose tags the reader has taken away
KANJI = ("ja", "ko")  # written with characters that are no traditional Chinese, though they look like it
EXACT, NEAR = 1, 2  # what step 2 says of a document; 0: it stays


@dataclass(frozen=True)
class Prepared:
    """What `prepare` made. manifest: as in manifest.json."""

    folder: Path
    manifest: dict[str, Any]

    @classmethod
    def open(cls, folder: Path) -> Prepared:
        """What an earlier `prepare` made of this folder. Raises DataError if it was not finished."""
        try:
            manifest = _load(folder / "manifest.json")
            if all("split" in part and "file" in part for part in manifest["parts"]):
                return cls(folder, manifest)
        except (OSError, ValueError, KeyError, TypeError):
            pass
        raise DataError(f"{folder} is no folder that `bimo data prepare` has finished: run it first")

    def files(self, split: str, source: str | None = None) -> list[Path]:
        """The Parquet files of "train" or "validation", in order."""
        parts = [part for part in self.manifest["parts"] if part["split"] == split]
        return [self.folder / part["file"] for part in parts if source in (None, part["source"])]


@dataclass(frozen=True)
class _Unit:
    """mark: changes with its files and settings. place: its folder below work; changes with the code too, so that half
    of a run is never an older bimo's. What is finished stays finished."""

    number: int
    source: SourceRecipe
    files: tuple[SourceFile, ...]
    num_bytes: int
    mark: str
    place: str


def _stat(path: str | Path) -> tuple[int, int]:
    try:
        stat = os.stat(path)
    except OSError:
        return (0, 0)
    return (stat.st_size, stat.st_mtime_ns)


def prepare(
    recipe: DataRecipe,
    folder: Path,
    *,
    workers: int | None = None,
    executor: str = "local",
    progress: Progress | None = None,
) -> Prepared:
    """Run all steps, or those that are left of an earlier run. Raises DataError or UsageError in one sentence.

    executor: "local" processes or "ray" (an optional package; see data.executors). Both give the same files.
    """
    report: Progress = progress or (lambda label, done, total: None)
    folder = folder.absolute()  # processes of a cluster may stand elsewhere
    try:
        (folder / "work").mkdir(parents=True, exist_ok=True)
        with _alone(folder / "work" / ".lock", report):
            return _prepare(recipe, folder, workers, executors.EXECUTORS[executor], report)
    except OSError as error:
        raise DataError(f"{folder} cannot be written ({error.strerror or error}): free some space, or name another "
                        f"folder; what is done stays done") from error  # fmt: skip


def source_mark(source: SourceRecipe, progress: Progress) -> str:
    """Changes with a source's settings and with its files' names, sizes and times; nothing is read."""
    return fingerprint([unit.mark for unit in _units(DataRecipe(sources=(source,)), progress)])


@contextlib.contextmanager
def _alone(file: Path, report: Progress) -> Iterator[None]:
    """Two runs over one folder would clear away each other's work: the second waits, and finds all done."""
    import filelock

    lock = filelock.FileLock(file)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        report("waiting for another run over the same folder", 0, 0)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _prepare(
    recipe: DataRecipe, folder: Path, workers: int | None, run: executors.Executor, report: Progress
) -> Prepared:
    work = folder / "work"
    units = _units(recipe, report)
    settings = recipe.model_dump(mode="json", exclude={"sources": {"__all__": {"weight"}}})
    mark = fingerprint(settings, [unit.mark for unit in units])
    if (manifest := _finished(folder, mark)) is not None:
        return Prepared(folder, manifest)
    # Before anything is replaced: a manifest of other settings must not vouch for files of these.
    (folder / "manifest.json").unlink(missing_ok=True)
    _clear(work, {unit.place for unit in units})
    total = sum(unit.num_bytes for unit in units)

    def watched(label: str, finished: Iterable[tuple[int, Any]]) -> list[Any]:
        results, done = {}, 0
        report(label, 0, total)
        for number, result in finished:
            results[number] = result
            done += units[number].num_bytes
            report(label, done, total)
        return [results[unit.number] for unit in units]

    counts: list[int] = watched("cleaning", run(_clean_unit, [(u.number, (u, recipe, work)) for u in units], workers))
    report("comparing documents", 0, 0)
    copies = _compare([work / unit.place for unit in units], counts, recipe)
    shutil.rmtree(folder / "documents", ignore_errors=True)
    (folder / "documents").mkdir()
    shares = np.split(copies, np.cumsum(counts)[:-1])
    tasks = [(unit.number, (unit, recipe, work, folder, share)) for unit, share in zip(units, shares, strict=True)]
    parts = [part for made in watched("writing", run(_divide_unit, tasks, workers)) for part in made]
    ledger = Ledger()
    for unit in units:
        for file in ("cleaned.json", "divided.json"):
            ledger.merge(Ledger.from_dict(_load(work / unit.place / file)["ledger"]))
    manifest = {"format": 1, "mark": mark, "parts": parts}
    if recipe.validation:
        report("looking for leaks", 0, 0)
        manifest["leaks"] = _check(folder, parts, recipe, ledger, lambda tasks: run(_tick_part, tasks, workers))
        manifest["parts"] = parts = [part for part in parts if part["documents"]]
    for part in parts:
        part["bytes"] = (folder / part["file"]).stat().st_size
    manifest |= ledger.to_dict()
    ledger.write(folder, manifest)
    return Prepared(folder, manifest)


def _load(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))


def _save(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8", errors="replace")


def _finished(folder: Path, mark: str) -> dict[str, Any] | None:
    """The manifest of an earlier run over the same files with the same settings, if all its files are whole."""
    try:
        manifest = _load(folder / "manifest.json")
        whole = manifest["mark"] == mark and _sizes(folder, manifest["parts"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return dict(manifest) if whole else None


def _sizes(folder: Path, files: list[dict[str, Any]]) -> bool:
    """Whether the files have the sizes that were noted."""
    return all(_stat(folder / file["file"])[0] == file["bytes"] for file in files)


def _clear(work: Path, wanted: set[str]) -> None:
    """Remove what no unit of this run is made from, and what killed runs left half-done."""
    for place in work.iterdir():
        if place.is_dir() and place.name not in wanted:
            shutil.rmtree(place, ignore_errors=True)


def _units(recipe: DataRecipe, report: Progress) -> list[_Unit]:
    """All files of all sources in groups of about UNIT_BYTES, none with two sources.

    From half that size on a group may end after a file whose name's hash says so: where a file comes, goes or grows,
    the groups after the next such name stay what they were.
    """
    units: list[_Unit] = []
    clean = recipe.clean.model_dump(exclude=NOT_FOR_UNITS)
    code = sorted(Path(__file__).parent.glob("*.py"))
    words = [_stat(file) for file in recipe.clean.toxic_words]

    def end(source: SourceRecipe, group: list[SourceFile], size: int) -> None:
        files = [
            (file.name, file.member, file.start, file.end, *_stat(file.path), file.twin and _stat(file.twin.path))
            for file in group
        ]
        mark = fingerprint(source.model_dump(exclude=NOT_FOR_TEXT), clean, words, files)
        units.append(_Unit(len(units), source, tuple(group), size, mark, fingerprint(mark, *code)))

    for source in recipe.sources:
        group: list[SourceFile] = []
        size = 0
        for file in files_of(source, report):
            group.append(file)
            size += file.num_bytes
            if size >= UNIT_BYTES or (size >= UNIT_BYTES // 2 and zlib.crc32(file.name.encode()) % 8 == 0):
                end(source, group, size)
                group, size = [], 0
        if group:
            end(source, group, size)
    return units


# --- 1: cleaning ------------------------------------------------------------------------------------------------------


def _clean_unit(unit: _Unit, recipe: DataRecipe, work: Path) -> int:
    """Work of one process, into work/<the unit's place>. How many documents it kept."""
    final = work / unit.place
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        done = _load(final / "cleaned.json")
        if _sizes(final, done["files"]):
            return int(done["kept"])
    shutil.rmtree(final, ignore_errors=True)
    partial = work / f".{unit.place}.{uuid.uuid4().hex}"  # never one that a process of a killed run still writes to
    partial.mkdir()
    try:
        ledger, keys = Ledger(), array("Q")
        stream = (partial / "signatures.bin").open("wb")
        with stream, DocumentWriter(partial / "documents.parquet") as writer:
            for document in _cleaned(unit, recipe, ledger):
                keys.append(exact_key(document.text))
                stream.write(signature(document.text).tobytes())
                writer.write(document)
        np.array(keys, np.uint64).tofile(partial / "keys.bin")
        files = [{"file": file.name, "bytes": file.stat().st_size} for file in partial.iterdir()]
        _save(partial / "cleaned.json", {"kept": len(keys), "files": files, "ledger": ledger.to_dict()})
        os.replace(partial, final)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return len(keys)


def _cleaned(unit: _Unit, recipe: DataRecipe, ledger: Ledger) -> Iterator[Document]:
    clean = recipe.clean
    wanted = {name: rewrite for name, rewrite in REWRITES.items() if getattr(clean, name)}
    if base_code(unit.source.language or "") in KANJI:
        wanted.pop("simplified", None)
    if clean.personal_data == "mask":
        wanted["personal_data"] = lambda text: mask(text)[0]
    filters = [("empty", _empty), *make_filters(clean)]
    if unit.source.parallel is not None:
        filters.insert(1, ("untranslated", untranslated))
    for file in unit.files:
        rewrites = dict(wanted)
        if clean.markup and kind_of(file, unit.source) in PARSED:
            rewrites["markup"] = notices
        for document in read_file(file, unit.source):
            if isinstance(document, Damage):
                ledger.damaged(document)
                continue
            before = document.text
            changes = []
            for name, rewrite in rewrites.items():
                text = document.text
                _rewrite(document, rewrite)
                if document.text != text:
                    changes.append((name, text, document.text))
            # not sooner: mojibake is no language
            document.language = unit.source.language or document.language or identify(document.text)
            ledger.read(document, before)
            for change in changes:
                ledger.changed(document, *change)
            for name, refuse in filters:
                if reason := refuse(document):
                    ledger.dropped(name, document, reason)
                    break
            else:
                yield document


def _empty(document: Document) -> str | None:
    """A document of zero-width characters only is one, once they are gone."""
    return None if document.text.strip() else "nothing was left of it"


def _rewrite(document: Document, rewrite: Callable[[str], str]) -> None:
    if not document.messages:
        document.text = rewrite(document.text)
        return
    document.messages = tuple(Message(role, rewrite(content)) for role, content in document.messages)
    document.text = "\n".join(content for _, content in document.messages)


# --- 2: copies --------------------------------------------------------------------------------------------------------


def _compare(places: list[Path], counts: list[int], recipe: DataRecipe) -> NDArray[np.uint8]:
    """(N,) for all documents of all units: 0, EXACT or NEAR."""
    clean, total = recipe.clean, sum(counts)
    if not total or not (clean.exact_duplicates or clean.near_duplicates < 1):
        return np.zeros(total, np.uint8)
    keys = np.concatenate([np.fromfile(place / "keys.bin", np.uint64) for place in places])
    if not clean.exact_duplicates:
        keys = np.arange(total, dtype=np.uint64)  # no two are the same
    with tempfile.TemporaryFile(dir=places[0].parent) as columns:
        signatures = SignatureFile([place / "signatures.bin" for place in places], counts, columns)
        copies = find_duplicates(keys, cast(NDArray[Any], signatures), clean.near_duplicates)
    return np.where(copies < 0, 0, np.where(keys == keys[copies], EXACT, NEAR)).astype(np.uint8)


# --- 3: the result ----------------------------------------------------------------------------------------------------


def _divide_unit(
    unit: _Unit, recipe: DataRecipe, work: Path, folder: Path, copies: NDArray[np.uint8]
) -> list[dict[str, Any]]:
    """Work of one process: the unit's documents into folder/documents, less copies, in passages, in two parts."""
    ledger, parts = Ledger(), []
    place = work / unit.place
    keys = np.fromfile(place / "keys.bin", np.uint64).tolist()
    limit = int(recipe.validation * WAYS)
    names = {split: f"documents/{split}-{unit.number:05}.parquet" for split in SPLITS}
    with contextlib.ExitStack() as stack:
        writers = {split: stack.enter_context(DocumentWriter(folder / name)) for split, name in names.items()}
        documents = read_documents([place / "documents.parquet"])
        for document, key, copy in zip(documents, keys, copies.tolist(), strict=True):
            if copy == EXACT:
                ledger.dropped("exact_duplicates", document, "a copy of an earlier document")
                continue
            if copy == NEAR:
                ledger.dropped("near_duplicates", document, "all but a copy of an earlier document")
                continue
            together = document.group or document.prompt
            drawn = exact_key(together) if together else key
            split = "validation" if (drawn * 0x9E3779B97F4A7C15 >> 32) % WAYS < limit else "train"
            pieces = _passages(document, recipe.passage_chars)
            if len(pieces) > 1:
                ledger.cut(document)
            for passage in pieces:
                writers[split].write(passage)
                ledger.kept(split, passage)
    for split, writer in writers.items():
        if writer.num_documents:
            counts = {"documents": writer.num_documents, "characters": writer.num_characters}
            parts.append({"file": names[split], "split": split, "source": unit.source.name, **counts})
        else:
            writer.path.unlink()
    _save(place / "divided.json", {"ledger": ledger.to_dict()})
    return parts


def _passages(document: Document, limit: int) -> list[Document]:
    if not limit or document.messages or len(document.text) <= limit:
        return [document]
    return [
        replace(document, text=text, id=f"{document.id}/{number}", group=document.group or document.id)
        for number, text in enumerate(passages(document.text, limit))
    ]


# --- 4: leaks ---------------------------------------------------------------------------------------------------------


def _check(
    folder: Path,
    parts: list[dict[str, Any]],
    recipe: DataRecipe,
    ledger: Ledger,
    run: Callable[[list[executors.Task]], executors.Results],
) -> dict[str, Any]:
    """Look for validation documents in the training text; with leaks = "drop" they leave the validation files."""
    files = {split: [folder / part["file"] for part in parts if part["split"] == split] for split in SPLITS}
    check = LeakCheck(read_documents(files["validation"]))
    if check.keys:
        known = folder / "work" / "known.npy"  # mapped by all processes
        np.save(known, check.known)
        for _, (ticked, seen) in run([(n, (file, known, check.keys)) for n, file in enumerate(files["train"])]):
            check.add(np.unpackbits(ticked, count=len(check.known)).view(np.bool_), seen)
        known.unlink()
    leaked = dict.fromkeys(check.leaked())
    if leaked and recipe.leaks == "drop":
        for part in parts:
            if part["split"] != "validation":
                continue
            path = folder / part["file"]
            partial = path.with_name(f".{path.name}")
            with DocumentWriter(partial) as writer:
                for document in read_documents([path]):
                    if document.id in leaked:
                        ledger.leaked("validation", document)
                    else:
                        writer.write(document)
            os.replace(partial, path)
            part["documents"], part["characters"] = writer.num_documents, writer.num_characters
            if not writer.num_documents:
                path.unlink()
    return {"num_checked": len(check.documents), "leaked": list(leaked)}


def _tick_part(file: Path, known: Path, keys: frozenset[int]) -> tuple[NDArray[np.uint8], set[int]]:
    """Work of one process: what of the validation text stands in a file of training documents; the ticks as bits."""
    ticked, seen = tick(np.load(known, mmap_mode="r"), keys, read_documents([file]))
    return np.packbits(ticked), seen
