"""Packages of registries as folders of data: fetched once, by their ordinary clients; nothing of them is run.

    folder = fetch_package("npm:chinese-poetry@2.0.1", None, progress)     # .../data/npm-chinese-poetry-2.0.1

    pypi:name==1.0                       pip download: the wheel is unzipped (source packages would run code: refused)
    npm:name@1.0, npm:@scope/name@1.0    npm pack: unpacked without its one outer folder, as npm itself does
    deb:name=1.0, deb:name               apt-get download and dpkg-deb -x; without a version the newest one is kept

A folder appears below $BIMO_HOME/data by one rename, so what is there is whole; of processes that want the same package
one fetches and the others wait. `.bimo-package.json` in it keeps the archive's name and sha256.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import subprocess
import tarfile
import tempfile
import zipfile
import zlib
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from bimo.errors import BimoError, DownloadError, PackageNotFoundError, UsageError
from bimo.registries.trouble import FULL, UNREACHABLE, Progress
from bimo.registries.wheels import fetch_wheel
from bimo.runtime import cache_home

__all__ = ["fetch_package", "is_package"]

RECORD_NAME = ".bimo-package.json"
# Names and versions only: a client would take "git+https://...", "../folder" or "--option" for something else.
REFERENCES = {
    "pypi": (re.compile(r"([A-Za-z0-9][\w.-]*)==([A-Za-z0-9][\w.!+-]*)", re.ASCII), "pypi:name==1.0"),
    "npm": (re.compile(r"((?:@[a-z0-9~-][\w.~-]*/)?[A-Za-z0-9~-][\w.~-]*)@(\d[\w.+-]*)", re.ASCII), "npm:name@1.0"),
    "deb": (re.compile(r"([a-z0-9][a-z0-9+.-]+)(?:=([A-Za-z0-9][\w.+:~-]*))?", re.ASCII), "deb:name=1.0 or deb:name"),
}
MISSING = re.compile(
    r"E404|404 Not Found - GET|ETARGET|No matching version|Unable to locate package|"
    r"Version '.*' for '.*' was not found|No packages found|has no installation candidate|Can't find a source"
)
DAMAGED = (zipfile.BadZipFile, tarfile.TarError, zlib.error, EOFError, NotImplementedError, UnicodeError)


class _Client(NamedTuple):
    command: list[str]
    pattern: str  # of the file it leaves behind
    missing: str  # how to get the client


def is_package(path: str) -> bool:
    """Whether a source's path names a package of a registry."""
    return path.partition(":")[0] in REFERENCES


def fetch_package(reference: str, sha256: str | None, progress: Progress) -> Path:
    """The folder with the package's files, from the cache or fetched into it.

    sha256: of the fetched archive; also compared with the archive that an earlier fetch had. Raises UsageError
    (reference malformed, no such package or version) or DownloadError (client missing, registry not reachable, archive
    damaged or not the pinned one, disk full).
    """
    scheme, _, requirement = reference.partition(":")
    pattern, example = REFERENCES.get(scheme, (None, ""))
    if pattern is None:
        known = ", ".join(example for _, example in REFERENCES.values())
        raise UsageError(f"{reference} names no registry: write {known}", "path")
    match = pattern.fullmatch(requirement)
    if not match:
        raise UsageError(f"{reference} is not a package with its exact version: write {example}", "path")
    name = re.sub(r"[^\w.+@-]+", "-", "-".join([scheme, match[1], match[2] or ""])).strip("-")
    try:
        return _fetch_once(reference, name, sha256, progress)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise _no_space(reference) from None
        raise DownloadError(
            f"{reference} cannot be kept below {cache_home()} ({error.strerror or error}): set BIMO_HOME to a folder "
            f"that can be written to"
        ) from error


def _fetch_once(reference: str, name: str, sha256: str | None, progress: Progress) -> Path:
    from filelock import FileLock

    home = cache_home()
    folder = home / "data" / name
    if not (folder / RECORD_NAME).is_file():
        for parent in (folder.parent, home / "locks"):
            parent.mkdir(parents=True, exist_ok=True)
        with FileLock(home / "locks" / f"data-{name}.lock"):
            if not (folder / RECORD_NAME).is_file():
                _fetch(reference, folder, home / "partial" / f"data-{name}", sha256, progress)
    _check(reference, json.loads((folder / RECORD_NAME).read_text(encoding="utf-8"))["sha256"], sha256, folder)
    return folder


def _fetch(reference: str, folder: Path, partial: Path, sha256: str | None, progress: Progress) -> None:
    shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
    partial.mkdir(parents=True)
    try:
        # A client that outlived its killed parent goes on in its own folder, not in this one.
        work = Path(tempfile.mkdtemp(dir=partial))
        archive = _download(reference, work, progress)
        with archive.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        _check(reference, digest, sha256, None)
        progress(f"unpacking {reference}", 0, 0)
        content = _unpack(reference, archive, work / "content")
        _drop_links_out(content)
        record = {"reference": reference, "archive": archive.name, "sha256": digest}
        (content / RECORD_NAME).write_text(json.dumps(record, indent=1), encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)  # one without a record is not ours
        os.replace(content, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _check(reference: str, got: str, wanted: str | None, folder: Path | None) -> None:
    if wanted is not None and got != wanted:
        again = f"remove {folder} to fetch it again, or correct" if folder else "correct"
        raise DownloadError(
            f"{reference} is not the file that the recipe names: expected sha256 {wanted}, got {got}; {again} sha256 "
            f"in the recipe if the new file is to be trusted"
        )


def _no_space(reference: str) -> BimoError:
    return DownloadError(
        f"no space left on the disk of {cache_home()} for {reference}, nothing half-written was kept: free some, or "
        f"point BIMO_HOME to a folder on a larger disk"
    )


# --- clients ----------------------------------------------------------------------------------------------------------


def _client(reference: str) -> _Client:
    """The command that fetches the package into the working folder."""
    scheme, _, requirement = reference.partition(":")
    if scheme == "npm":
        command = ["npm", "pack", requirement, "--ignore-scripts", "--no-audit", "--no-update-notifier"]
        command += ["--fetch-retries=2", "--fetch-retry-mintimeout=1000", "--fetch-retry-maxtimeout=10000"]
        return _Client(command, "*.tgz", "install Node.js, which brings it")
    command = ["apt-get", "download", "-o", "Acquire::Retries=3", requirement]
    return _Client(command, "*.deb", "it comes with Debian and Ubuntu; elsewhere unpack the package by hand")


def _download(reference: str, work: Path, progress: Progress) -> Path:
    if reference.startswith("pypi:"):
        requirement = reference.removeprefix("pypi:")
        try:  # what has arrived of it stays, when this process dies
            return fetch_wheel(requirement, work, cache_home() / "fetching" / f"data-{requirement}", progress)
        except PackageNotFoundError as error:
            raise UsageError(f"{reference}: {error}", "path") from None
    client = _client(reference)
    tools = [client.command[0], *(["dpkg-deb"] if reference.startswith("deb:") else [])]
    if absent := [tool for tool in tools if shutil.which(tool) is None]:
        raise DownloadError(f"{reference} is fetched with {absent[0]}, which is not installed: {client.missing}")
    label = f"fetching {reference}"
    progress(label, 0, 0)
    done = subprocess.run(
        client.command,
        cwd=work,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    found = sorted(work.glob(client.pattern))
    if done.returncode or not found:
        raise _client_error(reference, done.stdout)
    size = found[0].stat().st_size
    progress(label, size, size)
    return found[0]


def _client_error(reference: str, output: str) -> BimoError:
    """What the client's last words mean, in one sentence."""
    if FULL.search(output):
        return _no_space(reference)
    if UNREACHABLE.search(output):
        return DownloadError(
            f"{reference} could not be fetched, its registry is not reachable: check the network (or the client's "
            f"registry and proxy settings) and run the same command again"
        )
    if MISSING.search(output):
        mend = "`apt-get update` brings the list up to date" if reference.startswith("deb:") else "check both"
        return UsageError(f"{reference}: the registry has no package of that name and version; {mend}", "path")
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"E:|npm error", line)] or lines[-1:]
    said = re.sub(r"^(E:|npm error)\s*", "", errors[0]) if errors else "its client said nothing"
    return DownloadError(f"{reference} could not be fetched: {said}")


# --- archives ---------------------------------------------------------------------------------------------------------


def _unpack(reference: str, archive: Path, into: Path) -> Path:
    """Unpack into the new folder `into`; returns the folder with the package's files."""
    into.mkdir()
    try:
        if archive.suffix == ".whl":
            _unzip(reference, archive, into)
        elif archive.suffix == ".tgz":
            with tarfile.open(archive, "r:gz") as tar:
                tar.extractall(into, filter="data")
        else:
            _unpack_deb(archive, into)
    except tarfile.FilterError as error:
        raise DownloadError(f"{reference} was refused, a file in it leads out of its folder: {error}") from None
    except DAMAGED as error:
        raise DownloadError(f"{reference} arrived damaged ({error}): run the same command again") from None
    inside = list(into.iterdir())
    return inside[0] if archive.suffix == ".tgz" and len(inside) == 1 and inside[0].is_dir() else into


def _unzip(reference: str, archive: Path, into: Path) -> None:
    with zipfile.ZipFile(archive) as wheel:
        for info in wheel.infolist():
            path = PurePosixPath(info.filename.replace("\\", "/"))
            if path.is_absolute() or ".." in path.parts:  # zipfile would put it elsewhere without a word
                raise DownloadError(
                    f"{reference} was refused, a file in it leads out of its folder: {info.filename!r:.200}"
                )
        if sum(info.file_size for info in wheel.infolist()) > shutil.disk_usage(into).free:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        wheel.extractall(into)


def _unpack_deb(archive: Path, into: Path) -> None:
    done = subprocess.run(
        ["dpkg-deb", "-x", str(archive), str(into)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    if FULL.search(done.stdout):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    if done.returncode:
        said = done.stdout.strip().splitlines()
        raise tarfile.ReadError(said[-1].removeprefix("dpkg-deb: error: ") if said else "dpkg-deb failed")


def _drop_links_out(folder: Path) -> None:
    """Remove symbolic links that lead out of the package: a .deb may have them, and readers would follow."""
    root = folder.resolve()
    for parent, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = Path(parent, name)
            if path.is_symlink() and not _within(path, root):
                path.unlink()


def _within(link: Path, root: Path) -> bool:
    try:
        return link.resolve().is_relative_to(root)
    except (OSError, RuntimeError):  # links in a circle
        return False
