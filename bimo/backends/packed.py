"""Weights as the kernels read them, kept on disk: a start then takes a third of a second, where rounding and packing
them again takes one, and importing torch for it another.

    $BIMO_HOME/packed/<model's folder>/<digest of the path>-<quant>.safetensors

The layout is safetensors' (an 8-byte length, a JSON header, the bytes), so that any tool can look inside. The file is
mapped, not read: what the system still has of it in memory is used where it lies, by all processes; a quiet moment
later each copies it (FusedDecoder.settle). A file is used only if it was made from the very files that are there now,
by this version of rounding and kernels; else it is made again. It is a cache: nothing is lost with it, a disk without
room costs only the time, and what was made from a model that is no longer there is swept up when the next one is
written.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import mmap
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np

from bimo.engine.fused import FusedWeights
from bimo.engine.kernels import INTERFACE, load_kernels
from bimo.runtime import cache_home

__all__ = ["ROUNDING", "PackedFile"]

ROUNDING = 3  # raised when bimo.quant or engine.fusing makes other numbers of the same weights
_TYPES = {"U8": np.uint8, "BF16": np.uint16, "F16": np.float16, "F32": np.float32}
_LONGEST_HEADER = 1 << 26
_NAMES = {np.dtype(number): name for name, number in _TYPES.items()}
_UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error, MemoryError)
log = logging.getLogger(__name__)


class PackedFile:
    """The packed weights of one model and `quant`: to be read, or to be written."""

    def __init__(self, directory: Path, source: Path, quant: str) -> None:
        """directory: the model's. source: where its weights are, the same or a GGUF file."""
        self.source = source.resolve()
        digest = hashlib.sha256(os.fsencode(self.source)).hexdigest()[:12]
        self.path = cache_home() / "packed" / directory.resolve().name / f"{digest}-{quant}.safetensors"
        # looked at before the weights are read: who changes them meanwhile changes this
        files = [source] if source.is_file() else sorted([*source.glob("*.safetensors"), source / "config.json"])
        stats = [(file.name, file.stat()) for file in files]
        self.made_from = [quant, INTERFACE, ROUNDING, [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]]

    def read(self) -> FusedWeights | None:
        """The weights as they were packed, or None where that must be done (again)."""
        try:
            with self.path.open("rb") as stream:
                header, about = _read_header(stream)
                if about["made_from"] != self.made_from:
                    return None
                memory = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
                if hasattr(mmap, "MADV_WILLNEED"):
                    memory.madvise(mmap.MADV_WILLNEED)
                return _read(memory, stream.tell(), header, about)
        except FileNotFoundError:
            return None
        except _UNREADABLE as error:
            log.warning("%s cannot be used (%s): it is made again", self.path, error)
            return None

    def write(self, weights: FusedWeights) -> None:
        """Keep packed weights; where that fails, say so in the log and go on."""
        partial = self.path.with_name(f"{self.path.name}.{os.getpid()}.partial")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._sweep()
            with partial.open("wb") as stream:
                _write(stream, weights, {"source": str(self.source), "made_from": self.made_from})
            partial.replace(self.path)
        except OSError as error:
            log.warning("packed weights are not kept, the next start takes seconds longer: %s", error)
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)

    def _sweep(self) -> None:
        """Delete what processes that were killed have left, and what belongs to models that are gone."""
        for left in self.path.parent.glob(f"{self.path.name}.*.partial"):
            left.unlink(missing_ok=True)
        for file in self.path.parents[1].glob("*/*.safetensors"):
            try:
                with file.open("rb") as stream:
                    gone = not Path(_read_header(stream)[1]["source"]).exists()
            except _UNREADABLE:
                gone = True
            if gone:
                file.unlink(missing_ok=True)
                with contextlib.suppress(OSError):  # others are in it
                    file.parent.rmdir()
        self.path.parent.mkdir(parents=True, exist_ok=True)


def _read_header(stream: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The tensors' entries, and what is said about all of them."""
    (length,) = struct.unpack("<Q", stream.read(8))
    header = json.loads(stream.read(min(length, _LONGEST_HEADER)))
    return header, json.loads(header.pop("__metadata__")["bimo"])


def _write(stream: Any, weights: FusedWeights, about: dict[str, Any]) -> None:
    # codes first: each is a multiple of 256 bytes long, so that all of them begin at the start of a cache line
    arrays = {f"{name}.codes": matrix.codes for name, matrix in weights.matrices.items()}
    for name, matrix in weights.matrices.items():
        arrays[f"{name}.scales"] = np.ascontiguousarray(matrix.scales)
        if matrix.bias is not None:
            arrays[f"{name}.bias"] = matrix.bias
    arrays |= {name: np.ascontiguousarray(array) for name, array in weights.vectors.items()}
    matrices = {name: [matrix.format, matrix.rows, matrix.columns] for name, matrix in weights.matrices.items()}
    about = about | {"matrices": matrices, "rope_factor": weights.rope_factor}
    header: dict[str, Any] = {"__metadata__": {"bimo": json.dumps(about)}}
    offset = 0
    for name, array in arrays.items():
        header[name] = {
            "dtype": _NAMES[array.dtype],
            "shape": list(array.shape),
            "data_offsets": [offset, offset + array.nbytes],
        }
        offset += array.nbytes
    encoded = json.dumps(header).encode()
    encoded += b" " * (-(len(encoded) + 8) % 64)
    stream.write(struct.pack("<Q", len(encoded)) + encoded)
    for array in arrays.values():
        stream.write(array.reshape(-1).view(np.uint8).data)


def _read(memory: mmap.mmap, begin: int, header: dict[str, Any], about: dict[str, Any]) -> FusedWeights:
    """Views into `memory`, which they keep alive; tensors lie from `begin` on."""
    kernels = load_kernels()
    assert kernels is not None
    found = FusedWeights(rope_factor=float(about["rope_factor"]), mapped=True)
    for name, entry in header.items():
        dtype, shape = np.dtype(_TYPES[entry["dtype"]]), tuple(entry["shape"])
        first, end = entry["data_offsets"]
        count = math.prod(shape)
        if end - first != count * dtype.itemsize or min(first, *shape, 0) < 0 or begin + end > len(memory):
            raise ValueError(f"{name} is not where it should be, or the file is cut off")
        found.vectors[name] = np.frombuffer(memory, dtype, count, begin + first).reshape(shape)
    for name, (layout, rows, columns) in about["matrices"].items():
        codes, scales, bias = (
            found.vectors.pop(f"{name}.codes"),
            found.vectors.pop(f"{name}.scales"),
            found.vectors.pop(f"{name}.bias", None),
        )
        found.matrices[name] = kernels.PackedMatrix(layout, rows, columns, codes, scales, bias)
    return found
