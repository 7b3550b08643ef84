"""Which modules of transformers' models an adapter's file names for the parts of bimo's matrices.

for place in places(config):
    place.matrix, place.part.name      # "layers.0.attention.qkv_proj", "q"
    place.module                       # "model.layers.0.self_attn.q_proj"
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from bimo.formats.encoder_maps import encoder_keys
from bimo.formats.maps import FAMILIES, KeyMap, tensor_plan
from bimo.formats.seq2seq_maps import seq2seq_keys
from bimo.models.config import DecoderConfig, EncoderConfig, TransformerConfig
from bimo.models.parts import Part, parts_of
from bimo.recipe.stages import TARGETS, Target

__all__ = ["Place", "head_names", "key_map", "matches", "places", "shortest_ends", "targets_of"]


@dataclass(frozen=True)
class Place:
    """A part of a matrix, and the module of transformers that it is there. columns: of the matrix. transposed: the
    module holds it so (GPT-2's Conv1D)."""

    matrix: str
    part: Part
    module: str
    columns: int
    transposed: bool

    @property
    def name(self) -> str:
        """What tensors of it begin with, before ".lora_A"."""
        return f"{self.matrix}.{self.part.name}"

    @property
    def kind(self) -> str:
        return f"{'cross ' if 'cross_' in self.matrix else ''}{self.part.name}"


def key_map(config: TransformerConfig) -> KeyMap:
    """bimo's modules to the file's."""
    if isinstance(config, DecoderConfig):
        return FAMILIES[config.family].tensors
    return encoder_keys(config) if isinstance(config, EncoderConfig) else seq2seq_keys(config)


def places(config: TransformerConfig) -> list[Place]:
    """Of all matrices in the blocks."""
    found = []
    for name, entry in tensor_plan(config, key_map(config)).items():
        matrix, _, leaf = name.rpartition(".")
        if leaf == "weight" and (parts := parts_of(config, matrix)):
            for part, piece in zip(parts, entry.pieces, strict=True):
                module = piece.name.removesuffix(".weight")
                found.append(Place(matrix, part, module, entry.shape[1], entry.transposed))
    return found


def head_names(config: TransformerConfig) -> dict[str, str]:
    """Of the heads that an adapter trains in full: bimo's name of each weight, and the file's."""
    plan = tensor_plan(config, key_map(config))
    return {name: plan[name].pieces[0].name for name in plan if name.startswith(("pooler.", "classifier."))}


def targets_of(names: Iterable[str]) -> tuple[Target, ...]:
    """The targets of a recipe that adapts what these tensors change."""
    found = {name.split(".")[-2] for name in names}
    single = {target for name in found for target in (("q", "k", "v") if name == "qkv" else (name,))}
    return tuple(target for target in TARGETS if target in single)


def matches(pattern: str, module: str) -> bool:
    """Whether a key of rank_pattern or alpha_pattern means this module: as PEFT decides, by its end."""
    try:
        return re.match(rf"(.*\.)?({pattern})$", module) is not None
    except re.error:
        return False


def shortest_ends(chosen: set[str], config: TransformerConfig) -> list[str]:
    """The shortest ends of the chosen modules' names that no other module's name has: target_modules."""
    every = {place.module for place in places(config)}
    every |= {module for modules in key_map(config).modules.values() for module in modules if "{i}" not in module}
    ends: dict[str, set[str]] = {}  # end -> modules that have it
    for module in every:
        for end in _ends(module):
            ends.setdefault(end, set()).add(module)
    return sorted({next(end for end in _ends(module) if ends[end] <= chosen) for module in chosen})


def _ends(module: str) -> list[str]:
    words = module.split(".")
    return [".".join(words[-count:]) for count in range(1, len(words) + 1)]
