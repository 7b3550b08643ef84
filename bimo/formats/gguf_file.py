"""Reading a GGUF file: its metadata as plain Python values, its tensors one at a time as 16-bit torch tensors.

    gguf = GgufFile(path)
    gguf.metadata["general.architecture"]        # "llama"
    gguf.read("blk.0.attn_q.weight", torch.float16)

The header is parsed here instead of by `gguf.GGUFReader`: that one makes two memory-mapped array objects per token
(3.6 s and 100 MB for a vocabulary of 49k, against 0.1 s), and takes a cut-off string for a short one. The number
formats themselves are the gguf package's (`gguf.quants.dequantize`). Layout: ggml's docs/gguf.md, versions 2 and 3.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bimo.errors import CorruptModelError, ModelNotFoundError, UnsupportedModelError

if TYPE_CHECKING:
    import torch

__all__ = ["GgufFile", "GgufTensor"]

VERSIONS = (2, 3)
ALIGNMENT = 32
CHUNK = 1 << 22  # elements dequantised at once: 16 MB of float32 instead of gigabytes for a large embedding
MAX_NESTING = 4

# Value types 0-12 of the specification; 8 is a string, 9 an array.
_SCALARS: dict[int, struct.Struct] = {
    number: struct.Struct(f"<{code}")
    for number, code in zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True)
}
_FLOAT32, _STRING, _ARRAY = 6, 8, 9
_U32, _U64 = _SCALARS[4], _SCALARS[10]


@dataclass(frozen=True)
class GgufTensor:
    """Where a tensor lies: shape in torch's order (rows first), ggml type number, absolute offset and size in bytes."""

    name: str
    shape: tuple[int, ...]
    type: int
    offset: int
    nbytes: int


class _Cursor:
    """A position in the mapped file that cannot run past its end."""

    def __init__(self, data: mmap.mmap, file: Path) -> None:
        self.data, self.file, self.at = data, file, 0

    def take(self, count: int) -> int:
        """Advance by `count` bytes and return where they begin."""
        start, self.at = self.at, self.at + count
        if self.at > len(self.data):
            raise CorruptModelError(
                f"{self.file} is cut off: its header needs {count} bytes at {start}, the file ends at "
                f"{len(self.data)}; fetch it again"
            )
        return start

    def unpack(self, scalar: struct.Struct) -> Any:
        return scalar.unpack_from(self.data, self.take(scalar.size))[0]

    def text(self) -> str:
        size = self.unpack(_U64)
        start = self.take(size)
        return self.data[start : start + size].decode("utf-8")

    def value(self, kind: int, depth: int = 0) -> Any:
        if kind == _STRING:
            return self.text()
        if kind == _ARRAY and depth < MAX_NESTING:
            item, count = self.unpack(_U32), self.unpack(_U64)
            if (scalar := _SCALARS.get(item)) is not None:
                start = self.take(count * scalar.size)
                return list(struct.unpack_from(f"<{count}{scalar.format[-1]}", self.data, start))
            if count > len(self.data):  # each item takes a byte at least
                self.take(count)
            return [self.value(item, depth + 1) for _ in range(count)]
        if (scalar := _SCALARS.get(kind)) is None:
            raise CorruptModelError(f"{self.file} has a metadata value of the unknown type {kind} at byte {self.at}")
        number = self.unpack(scalar)
        # The shortest decimal of the float32, 1e-05 and not 9.999999747378752e-06, as config.json would have it.
        return float(str(np.float32(number))) if kind == _FLOAT32 else number


class GgufFile:
    """An opened GGUF file; the constructor reads and checks the header, no tensor data.

    Raises ModelNotFoundError (no file), CorruptModelError (empty, cut off, not GGUF, damaged; the file is named) and
    UnsupportedModelError (version 1, big-endian, split files).
    """

    def __init__(self, file: Path) -> None:
        self.file = Path(file)
        if not self.file.is_file():
            raise ModelNotFoundError(str(file), [], "no such GGUF file")
        if self.file.stat().st_size < 24:
            raise CorruptModelError(f"{file} is no GGUF file: it has {self.file.stat().st_size} bytes; fetch it again")
        with self.file.open("rb") as stream:
            self._data = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        try:
            self.metadata, self.tensors = self._parse()
        except (UnicodeDecodeError, struct.error, OverflowError, MemoryError) as error:
            raise CorruptModelError(f"{file} has a damaged header ({error}); fetch it again") from None

    def _parse(self) -> tuple[Mapping[str, Any], Mapping[str, GgufTensor]]:
        cursor = _Cursor(self._data, self.file)
        if self._data[cursor.take(4) : 4] != b"GGUF":
            raise CorruptModelError(f"{self.file} is no GGUF file (it begins with {self._data[:4]!r}); fetch it again")
        version = cursor.unpack(_U32)
        if version not in VERSIONS:
            raise UnsupportedModelError(
                f"{self.file} is GGUF version {version}, bimo reads {VERSIONS} (little-endian); "
                f"convert the model again with a current llama.cpp"
            )
        num_tensors, num_values = cursor.unpack(_U64), cursor.unpack(_U64)
        metadata: dict[str, Any] = {}
        for _ in range(num_values):
            key = cursor.text()
            if key in metadata:
                raise CorruptModelError(f"{self.file} has the metadata key {key!r:.80} twice")
            metadata[key] = cursor.value(cursor.unpack(_U32))
        if metadata.get("split.count", 0) not in (0, 1):
            raise UnsupportedModelError(
                f"{self.file} is one of {metadata['split.count']} parts: join them with llama.cpp's "
                f"`llama-gguf-split --merge` first"
            )
        entries = [self._tensor_entry(cursor) for _ in range(num_tensors)]
        alignment = metadata.get("general.alignment", ALIGNMENT)
        if not isinstance(alignment, int) or alignment <= 0:
            raise CorruptModelError(f"{self.file}: general.alignment is {alignment!r}, a positive number is needed")
        start = -(-cursor.at // alignment) * alignment
        tensors: dict[str, GgufTensor] = {}
        for name, shape, kind, offset in entries:
            if name in tensors:
                raise CorruptModelError(f"{self.file} has the tensor {name!r:.80} twice")
            tensors[name] = self._place(name, shape, kind, start + offset)
        return metadata, tensors

    @staticmethod
    def _tensor_entry(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
        name, num_dims = cursor.text(), cursor.unpack(_U32)
        if num_dims > 4:
            raise CorruptModelError(f"{cursor.file}: tensor {name!r:.80} has {num_dims} dimensions, at most 4 exist")
        dims = [cursor.unpack(_U64) for _ in range(num_dims)]
        return name, tuple(reversed(dims)), cursor.unpack(_U32), cursor.unpack(_U64)

    def _place(self, name: str, shape: tuple[int, ...], kind: int, offset: int) -> GgufTensor:
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        try:
            block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
        except (ValueError, KeyError):
            raise UnsupportedModelError(
                f"{self.file}: tensor {name!r:.80} has the number type {kind}, which the gguf package does not know"
            ) from None
        if not shape or shape[-1] % block:
            raise CorruptModelError(f"{self.file}: tensor {name!r:.80} of shape {shape} is not made of {block}s")
        nbytes = math.prod(shape) // block * block_bytes
        if offset + nbytes > len(self._data):
            raise CorruptModelError(
                f"{self.file} is cut off: tensor {name!r:.80} ends at byte {offset + nbytes}, the file at "
                f"{len(self._data)}; fetch it again"
            )
        return GgufTensor(name, shape, kind, offset, nbytes)

    def bytes_of(self, name: str) -> np.ndarray:
        """A tensor's bytes as the file has them, uint8; a view of the mapping."""
        tensor = self.tensors[name]
        return np.frombuffer(self._data, np.uint8, tensor.nbytes, tensor.offset)

    def read(self, name: str, dtype: torch.dtype, on_bytes: Callable[[int], None] | None = None) -> torch.Tensor:
        """Dequantise a tensor to `dtype`; `on_bytes` hears the size of each chunk of the file that is done.

        Raises UnsupportedModelError for number types the gguf package cannot dequantise, CorruptModelError for values
        that are not finite (damage, or numbers beyond the range of `dtype`).
        """
        import torch
        from gguf import GGMLQuantizationType, dequantize

        tensor = self.tensors[name]
        kind = GGMLQuantizationType(tensor.type)
        row_bytes = tensor.nbytes * tensor.shape[-1] // max(1, math.prod(tensor.shape))
        data = self.bytes_of(name).reshape(-1, row_bytes)
        result = torch.empty(tensor.shape, dtype=dtype)
        rows = result.view(-1, tensor.shape[-1])
        step = max(1, CHUNK // tensor.shape[-1])
        for first in range(0, len(rows), step):
            chunk = data[first : first + step]
            try:
                # A copy: an offset of the file need not be aligned for float32.
                values = dequantize(np.array(chunk), kind)
            except NotImplementedError:
                raise UnsupportedModelError(
                    f"{self.file}: tensor {name} has the number type {kind.name}, which cannot be dequantised"
                ) from None
            rows[first : first + step] = torch.from_numpy(values.reshape(len(chunk), -1))
            if on_bytes is not None:
                on_bytes(chunk.nbytes)
        if not torch.isfinite(result).all():
            raise CorruptModelError(
                f"{self.file}: tensor {name} has values that are not finite numbers in {str(dtype)[6:]}; fetch it again"
            )
        return result
