"""A GGUF file's own quantised weights, taken over as they are (`quant = "file"`): nothing is rounded a second time.

    Q4_0, Q4_1, Q4_K    -> block4: 16 steps every 32 columns; Q4_K's 6-bit factors are multiplied out (float16)
    Q8_0                -> block8: 255 steps every 32 columns
    everything else     -> plain numbers, for the caller to round to 8 bits (that is finer than Q5 and Q6 are)

The block layouts are ggml's (struct block_q4_0 and so on in its ggml-common.h).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from bimo.errors import CorruptModelError
from bimo.formats.gguf import gguf_family
from bimo.formats.gguf_file import GgufFile
from bimo.formats.maps import Entry, tensor_plan
from bimo.models.config import DecoderConfig
from bimo.quant.weights import QuantisedWeight, join

__all__ = ["load_gguf_weights"]

Weight = torch.Tensor | QuantisedWeight


def load_gguf_weights(file: Path, config: DecoderConfig) -> Iterator[tuple[str, Weight]]:
    """All of the decoder's parameters as (bimo name, weight), matrices as the file quantised them where possible.

    Raises as `GgufFile` does, and CorruptModelError where a tensor is missing, of a wrong shape or not finite.
    """
    gguf = GgufFile(Path(file))
    family = gguf_family(gguf)
    plan = tensor_plan(config, family.tensors)
    for name, entry in plan.items():
        for piece in entry.pieces:
            tensor = gguf.tensors.get(piece.name)
            if tensor is None or tensor.shape != piece.shape:
                found = "is missing" if tensor is None else f"has the shape {tensor.shape}"
                raise CorruptModelError(f"{file}: tensor {piece.name} {found}, {piece.shape} is needed; fetch it again")
        yield name, _weight(gguf, entry)


def _weight(gguf: GgufFile, entry: Entry) -> Weight:
    parts = [_blocks(gguf, piece.name) for piece in entry.pieces]
    kept = [part for part in parts if part is not None and not entry.transposed]
    if len(kept) < len(parts) or len({part.format for part in kept}) > 1:
        return entry.merge([gguf.read(piece.name, torch.float32) for piece in entry.pieces])
    return join(kept, entry.merge)


def _blocks(gguf: GgufFile, name: str) -> QuantisedWeight | None:
    """One tensor's codes and scales, or None when its type is not one that is taken over."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    tensor = gguf.tensors[name]
    kind = GGMLQuantizationType(tensor.type)
    unpack = {"Q4_0": _q4_0, "Q4_1": _q4_1, "Q4_K": _q4_k, "Q8_0": _q8_0}.get(kind.name)
    if unpack is None or len(tensor.shape) != 2:
        return None
    rows, columns = tensor.shape
    size, num_bytes = GGML_QUANT_SIZES[kind]
    raw = gguf.bytes_of(name).reshape(rows, columns // size, num_bytes)
    codes, scales, minima = unpack(raw)
    if not (np.isfinite(scales).all() and (minima is None or np.isfinite(minima).all())):
        raise CorruptModelError(f"{gguf.file}: tensor {name} has scales that are not finite numbers; fetch it again")
    weight = QuantisedWeight(
        "block8" if minima is None else "block4",
        torch.from_numpy(np.ascontiguousarray(codes.reshape(rows, columns))),
        torch.from_numpy(np.ascontiguousarray(scales.reshape(rows, -1))),
        None if minima is None else torch.from_numpy(np.ascontiguousarray(minima.reshape(rows, -1))),
    )
    return weight


Blocks = tuple[np.ndarray, np.ndarray, np.ndarray | None]


def _half(raw: np.ndarray, at: int) -> np.ndarray:
    return np.ascontiguousarray(raw[..., at : at + 2]).view(np.float16)


def _nibbles(raw: np.ndarray) -> np.ndarray:
    """Low halves of all bytes, then high halves."""
    return np.concatenate((raw & 15, raw >> 4), axis=-1)


def _q4_0(raw: np.ndarray) -> Blocks:
    """d (q - 8): 2 bytes d, 16 bytes of codes."""
    scales = _half(raw, 0)
    return _nibbles(raw[..., 2:]), scales, scales * np.float16(-8)


def _q4_1(raw: np.ndarray) -> Blocks:
    """d q + m: 2 bytes d, 2 bytes m, 16 bytes of codes."""
    return _nibbles(raw[..., 4:]), _half(raw, 0), _half(raw, 2)


def _q8_0(raw: np.ndarray) -> Blocks:
    """d q, signed: 2 bytes d, 32 bytes of codes."""
    return raw[..., 2:] ^ 128, _half(raw, 0), None  # -128..127 to 0..255


def _q4_k(raw: np.ndarray) -> Blocks:
    """256 columns: d, dmin, 12 bytes of eight 6-bit scales and minima, 128 bytes of codes; w = d s q - dmin m."""
    packed = raw[..., 4:16]
    low, middle, high = packed[..., :4], packed[..., 4:8], packed[..., 8:]
    scales = np.concatenate((low & 63, (high & 15) | ((low >> 6) << 4)), axis=-1)
    minima = np.concatenate((middle & 63, (high >> 4) | ((middle >> 6) << 4)), axis=-1)
    codes = raw[..., 16:].reshape(*raw.shape[:-1], 4, 32)  # low halves are one group of 32, high halves the next
    codes = np.stack((codes & 15, codes >> 4), axis=-2)
    with np.errstate(over="ignore", invalid="ignore"):
        d, dmin = _half(raw, 0).astype(np.float32), _half(raw, 2).astype(np.float32)
        return codes, (d * scales).astype(np.float16), (-dmin * minima).astype(np.float16)
