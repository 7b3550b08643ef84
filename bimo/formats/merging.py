"""A LoRA adapter's change as matrices: worked into its base, or beside it.

weights = merged_weights(load_weights(base, config), config, folder)
for start, end, a, b in lora_matrices(folder, config)["layers.0.attention.qkv_proj"]:
    y[:, start:end] += (x @ a.T) @ b.T
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bimo.errors import UsageError
from bimo.formats.peft import read_adapter
from bimo.formats.peft_names import places
from bimo.models.config import LSTMConfig, ModelConfig
from bimo.models.parts import Part

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

__all__ = ["MERGEABLE", "lora_matrices", "merged_weights"]

MERGEABLE = ("lora", "adalora")  # kinds that are a change of matrices


@dataclass(frozen=True)
class _Change:
    """W[part] + b a, with DoRA by rows of this magnitude. b has the scale in it."""

    part: Part
    a: Tensor
    b: Tensor
    magnitude: Tensor | None


def merged_weights(
    weights: Iterable[tuple[str, Any]], config: ModelConfig, folder: Path
) -> Iterator[tuple[str, Tensor]]:
    """A base's weights as they stream by (`load_weights`; quantised ones are widened), with an adapter of low rank
    worked in: what changes comes in float32. Raises UsageError for a kind that is no change of matrices, the rest as
    `AdapterFile.read`."""
    import torch

    changes, heads = _changes(folder, config)

    def stream() -> Iterator[tuple[str, Tensor]]:
        for name, found in weights:
            weight: Tensor = found.dequantise() if hasattr(found, "dequantise") else found
            if name in heads:
                weight = heads[name]
            elif name in changes:
                weight = weight.to(torch.float32, copy=True)
                for change in changes[name]:
                    rows = weight[change.part.start : change.part.end]
                    rows += change.b @ change.a
                    if change.magnitude is not None:
                        rows *= (change.magnitude / torch.linalg.vector_norm(rows, dim=1))[:, None]
            yield name, weight

    return stream()


def lora_matrices(
    folder: Path, config: ModelConfig
) -> dict[str, list[tuple[int, int, NDArray[np.float32], NDArray[np.float32]]]]:
    """{matrix ("layers.0.attention.qkv_proj"): [(first row, end, A (r, in), B (rows, r) times its scale)]}, for several
    adapters beside one base. Raises UsageError for a kind that is more than that (DoRA, a prefix, a trained head)."""
    changes, heads = _changes(folder, config)
    if heads or any(change.magnitude is not None for of_matrix in changes.values() for change in of_matrix):
        raise UsageError(
            f"{folder} is more than a change of low rank (DoRA, or a head of its own), so it cannot stand beside "
            f"others: use it alone",
            "adapter",
        )
    return {
        name.removesuffix(".weight"): [
            (change.part.start, change.part.end, change.a.numpy(), change.b.numpy())
            for change in of_matrix
            if len(change.a)
        ]
        for name, of_matrix in changes.items()
    }


def _changes(folder: Path, config: ModelConfig) -> tuple[dict[str, list[_Change]], dict[str, Tensor]]:
    """Of each weight, and heads' weights."""
    file = read_adapter(folder)
    if file.kind not in MERGEABLE:
        raise UsageError(
            f"{folder} is a {file.kind} adapter, which is no change of matrices: it cannot be merged, nor stand beside "
            f"others; name its folder alone as the model (bimo chat {folder})",
            "adapter",
        )
    recipe, tensors = file.read(config)
    assert not isinstance(config, LSTMConfig), "`read` refuses them"
    changes: dict[str, list[_Change]] = {}
    for place in places(config):
        if f"{place.name}.lora_A" not in tensors:
            continue
        a, b = (
            tensors.pop(f"{place.name}.lora_A"),
            tensors[f"{place.name}.lora_B"] * float(tensors[f"{place.name}.scale"]),
        )
        if recipe.kind == "adalora":
            a = a * tensors[f"{place.name}.lora_E"]
        change = _Change(place.part, a, b, tensors.get(f"{place.name}.magnitude"))
        changes.setdefault(f"{place.matrix}.weight", []).append(change)
    return changes, {name: tensor for name, tensor in tensors.items() if name.startswith(("pooler.", "classifier."))}
