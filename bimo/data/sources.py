"""Which files a source has: of a folder, a pattern, a zip archive or a package; large ones in parts.

    for file in files_of(source, progress):      # sorted by name: the same list in every run
        with open_file(file) as stream: ...

Nothing is left out silently but names that begin with a dot: a file of unknown kind, an editor's backup, a folder that
may not be opened or a broken archive is listed, and `readers.read_file` says of it what is wrong.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import gzip
import io
import itertools
import os
import stat
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import IO, cast

from bimo.errors import UsageError
from bimo.recipe import ParallelRecipe, SourceRecipe
from bimo.registries.packages import fetch_package, is_package
from bimo.registries.trouble import Progress

__all__ = ["SourceFile", "files_of", "is_backup", "kind_of", "line_start", "open_file"]

PART_BYTES = 64 << 20  # a process's share of a large file
MAX_MEMBER_BYTES = 2 << 30  # of one file inside an archive
SPLITTABLE = ("txt", "jsonl")  # csv is not: a quoted field may hold line ends
GZIP = b"\x1f\x8b"
KINDS = {
    **dict.fromkeys([".txt", ".text"], "txt"),
    **dict.fromkeys([".md", ".markdown"], "md"),
    **dict.fromkeys([".jsonl", ".ndjson"], "jsonl"),
    ".json": "json",
    ".csv": "csv",
    **dict.fromkeys([".tsv", ".tab"], "tsv"),
    **dict.fromkeys([".yaml", ".yml"], "yaml"),
    **dict.fromkeys([".parquet", ".pq"], "parquet"),
    **dict.fromkeys([".html", ".htm", ".xhtml"], "html"),
    ".pdf": "pdf",
    ".docx": "docx",
    ".eml": "eml",
}
BACKUPS = ("*~", "*.bak", "*.orig", "*.swp", "*.tmp", "#*#", "~$*")
ALL_FILES = ("**/*",)


@dataclass(frozen=True)
class SourceFile:
    """A file of a source, or a part of one.

    name: relative to the source, "/" between folders: "tang/7.json", "words.zip/a.txt".
    member: the file's name inside `path`, when that is a .zip archive.
    start, end: bytes; the lines that begin in this range are meant. end None: to the end of the file.
    num_bytes: how much it is, when it was listed; 0 if that is not known.
    twin: of a source with `parallel`, the same document in the other language; None if there is none.
    """

    path: Path
    name: str
    member: str | None = None
    start: int = 0
    end: int | None = None
    num_bytes: int = 0
    twin: SourceFile | None = None

    @property
    def is_part(self) -> bool:
        return self.start > 0 or self.end is not None


def kind_of(file: SourceFile, source: SourceRecipe) -> str | None:
    """How to read the file, a key of `readers.READERS`: the source's format, else by its name; None if unknown."""
    if source.format != "auto":
        return source.format
    return KINDS.get(PurePosixPath(file.name.lower().removesuffix(".gz")).suffix)


def is_backup(file: SourceFile) -> bool:
    """Whether the name is that of an editor's or a download's left-over."""
    return any(fnmatchcase(PurePosixPath(file.name).name, pattern) for pattern in BACKUPS)


def files_of(source: SourceRecipe, progress: Progress) -> list[SourceFile]:
    """All files of the source, by name. A package is fetched if the cache has it not.

    Raises UsageError when there are none, or when a setting of the source has no effect; see also `fetch_package`.
    """
    found = _listed(source, progress)
    if source.parallel is not None:
        found = _with_twins(found, source, source.parallel, progress)
    parts = [part for file in found for part in _parts(file, source)]
    return sorted(parts, key=lambda part: (part.name, part.start))


def _listed(source: SourceRecipe, progress: Progress) -> list[SourceFile]:
    if is_package(source.path):
        root = fetch_package(source.path, source.sha256, progress)
        found = list(_inside(root, source.files))
    else:
        if source.sha256:
            raise UsageError(
                f"source {source.name}: sha256 is for packages, {source.path} is none: remove it", "sha256"
            )
        found = list(_local(source))
    if not found:
        patterns = "" if source.files == ALL_FILES else f" that matches {' or '.join(source.files)}"
        raise UsageError(f"source {source.name}: there is no file{patterns} in {source.path}", "path")
    return found


def _with_twins(
    found: list[SourceFile], source: SourceRecipe, parallel: ParallelRecipe, progress: Progress
) -> list[SourceFile]:
    """Each file with its twin, looked up by name; of one without, `readers.read_file` says so."""
    found = sorted(found, key=lambda file: file.name)
    old, new = parallel.replace or ("", "")
    there = SourceRecipe(name=source.name, path=parallel.path, sha256=parallel.sha256)
    twins = {file.name: file for file in _listed(there, progress)}
    if not any(old in file.name for file in found):
        raise UsageError(
            f"source {source.name}: no file's path holds {old!r}, the first is {found[0].name}: replace names what "
            f"differs between a document's path and its twin's",
            "replace",
        )
    names = [file.name.replace(old, new) if old else file.name for file in found]
    if not any(name in twins for name in names):
        raise UsageError(
            f"source {source.name}: none of its files has a twin in {parallel.path}: {names[0]} is looked for, there "
            f"is for example {min(twins)}: write what differs into replace",
            "replace",
        )
    return [replace(file, twin=twins.get(name)) for file, name in zip(found, names, strict=True)]


def _local(source: SourceRecipe) -> Iterator[SourceFile]:
    path = Path(source.path).expanduser()
    if os.path.isdir(path):
        yield from _inside(path, source.files)
        return
    if path.suffix.lower() == ".zip" and os.path.isfile(path):
        yield from _members(path, (), _readable(path.name), [_split(pattern) for pattern in source.files])
        return
    if source.files != ALL_FILES:
        raise UsageError(
            f"source {source.name}: files has no effect, {source.path} is not a folder: put the pattern into path",
            "files",
        )
    if os.path.lexists(path):
        yield SourceFile(path, _readable(path.name))
        return
    fixed = [*path.parts]
    for place, part in enumerate(path.parts):
        if any(sign in part for sign in "*?["):
            fixed = [*path.parts[:place]]
            break
    base = Path(*fixed)
    if len(fixed) == len(path.parts) or not os.path.isdir(base):
        raise UsageError(f"source {source.name}: there is no file or folder {base}", "path")
    yield from _inside(base, ["/".join(path.parts[len(fixed) :])])


def _inside(root: Path, patterns: Sequence[str]) -> Iterator[SourceFile]:
    """Files below a folder whose path there matches a pattern; .zip archives are folders too."""
    split = [_split(pattern) for pattern in patterns]
    closed: list[str] = []
    seen = set()
    for parent, folders, files in os.walk(root, onerror=lambda error: closed.append(error.filename), followlinks=True):
        try:
            status = os.stat(parent)
        except OSError:  # gone meanwhile
            closed.append(parent)
            continue
        if (status.st_dev, status.st_ino) in seen:  # a link to a folder that was read already, maybe to its own parent
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in files:
            path = Path(parent, name)
            parts = path.relative_to(root).parts
            shown = "/".join(map(_readable, parts))
            if name.startswith("."):
                continue
            if path.suffix.lower() == ".zip":
                yield from _members(path, parts, shown, split)
            elif any(_matches(parts, pattern) for pattern in split):
                yield SourceFile(path, shown)
    for folder in closed:
        yield SourceFile(Path(folder), _readable(os.path.relpath(folder, root)))


def _members(path: Path, parts: tuple[str, ...], shown: str, patterns: list[tuple[str, ...]]) -> Iterator[SourceFile]:
    """The archive's files: all of them if a pattern matches the archive itself, else those that match."""
    whole = any(_matches(parts, pattern) for pattern in patterns)
    if not whole and not any(_reaches(parts, pattern) for pattern in patterns):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            infos = archive.infolist()
    except (OSError, zipfile.BadZipFile, NotImplementedError, UnicodeError):
        yield SourceFile(path, shown)  # what is wrong with it is said when it is read
        return
    if not infos:
        yield SourceFile(path, shown)
    for info in {info.filename: info for info in infos}.values():  # of two with one name the last is meant
        inner = _split(_member_name(info))
        if info.is_dir() or any(part.startswith(".") for part in inner):
            continue
        if whole or any(_matches((*parts, *inner), pattern) for pattern in patterns):
            yield SourceFile(path, "/".join([shown, *inner]), info.filename, num_bytes=info.file_size)


def _member_name(info: zipfile.ZipInfo) -> str:
    """The name as it was meant: archives from Chinese Windows write GBK and do not say so."""
    if not info.flag_bits & 0x800:
        with contextlib.suppress(UnicodeError):
            return info.filename.encode("cp437").decode("gb18030")
    return _readable(info.filename)


def _readable(name: str) -> str:
    """A file's name as valid Unicode: on a disk it may have been written in another encoding."""
    raw = os.fsencode(name)
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return raw.decode("gb18030", "backslashreplace")


def _split(pattern: str) -> tuple[str, ...]:
    return tuple(part for part in pattern.split("/") if part not in ("", "."))


def _matches(parts: tuple[str, ...], pattern: tuple[str, ...]) -> bool:
    """Whether the whole path matches; `**` stands for any number of folders, `*` stays within a name."""
    if not pattern:
        return not parts
    if pattern[0] == "**":
        return any(_matches(parts[skipped:], pattern[1:]) for skipped in range(len(parts) + 1))
    return bool(parts) and fnmatchcase(parts[0], pattern[0]) and _matches(parts[1:], pattern[1:])


def _reaches(parts: tuple[str, ...], pattern: tuple[str, ...]) -> bool:
    """Whether something below the path can match."""
    if not parts or not pattern:
        return bool(pattern)
    return pattern[0] == "**" or (fnmatchcase(parts[0], pattern[0]) and _reaches(parts[1:], pattern[1:]))


def _parts(file: SourceFile, source: SourceRecipe) -> list[SourceFile]:
    """The file in parts of 64 MB where lines can be told apart by their bytes; else the file itself."""
    if file.member is not None:
        return [file]
    first = b"\0"
    with contextlib.suppress(OSError):
        file = replace(file, num_bytes=os.stat(file.path).st_size)
        if file.num_bytes > PART_BYTES:
            with open_plain(file.path) as stream:
                first = stream.read(1 << 16)
    wide = source.encoding.lower().replace("_", "-").startswith(("utf-16", "utf-32"))
    wide = wide or first.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in first
    if wide or first.startswith(GZIP) or kind_of(file, source) not in SPLITTABLE:
        return [file]
    edges = [*range(0, file.num_bytes, PART_BYTES), file.num_bytes]
    parts = [replace(file, start=a, end=b, num_bytes=b - a) for a, b in itertools.pairwise(edges)]
    return [*parts[:-1], replace(parts[-1], end=None)]


def open_plain(path: Path) -> IO[bytes]:
    """The file for reading; pipes and devices are refused, they would never end."""
    mode = os.stat(path).st_mode
    if stat.S_ISDIR(mode):
        os.listdir(path)  # says why the folder could not be read
        raise IsADirectoryError(errno.EISDIR, "it is a folder")
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "it is a pipe or a device, not a file")
    return path.open("rb")


@functools.lru_cache(maxsize=2)
def _archive(path: Path, mtime_ns: int, size: int, process: int) -> zipfile.ZipFile:
    """The archive, kept open: its list is read once, not once for each of its files. A forked process opens its own."""
    return zipfile.ZipFile(path)


@contextlib.contextmanager
def open_file(file: SourceFile) -> Iterator[IO[bytes]]:
    """The file's bytes, from the beginning also for a part; out of its archive, and without gzip.

    Raises OSError, zipfile.BadZipFile, KeyError (no such member), RuntimeError (encrypted).
    """
    with contextlib.ExitStack() as stack:
        stream: IO[bytes] = stack.enter_context(open_plain(file.path))
        if file.member is not None:
            status = os.stat(file.path)
            archive = _archive(file.path, status.st_mtime_ns, status.st_size, os.getpid())
            if archive.getinfo(file.member).file_size > MAX_MEMBER_BYTES:
                raise OSError(errno.EFBIG, f"it unpacks to more than {MAX_MEMBER_BYTES >> 30} GB: unpack the archive")
            stream = stack.enter_context(archive.open(file.member))
        head = stream.read(2)
        stream.seek(0)
        if head == GZIP:
            stream = cast(IO[bytes], stack.enter_context(gzip.GzipFile(fileobj=cast(io.BufferedIOBase, stream))))
        yield stream


def line_start(stream: IO[bytes], offset: int, limit: int | None) -> int:
    """Where the first line begins that does so at or after `offset`; at most looked for until `limit`."""
    if offset == 0:
        return 0
    position = offset - 1
    stream.seek(position)
    while block := stream.read(1 << 16):
        if (at := block.find(b"\n")) >= 0:
            return position + at + 1
        position += len(block)
        if limit is not None and position >= limit:
            return limit
    return position
