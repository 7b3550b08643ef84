"""Which rows of a block's matrices are what: adapters and their files speak of q and gate, a matrix holds them stacked.

    for part in parts_of(config, "layers.0.attention.qkv_proj"):
        print(part.name, weight[part.start : part.end])          # q, k, v

The names are those of `recipe.TARGETS`.
"""

from __future__ import annotations

from dataclasses import dataclass

from bimo.models.config import TransformerConfig

__all__ = ["Part", "parts_of"]

STACKED = {
    "qkv_proj": ("q", "k", "v"),
    "kv_proj": ("k", "v"),
    "q_proj": ("q",),
    "out_proj": ("o",),
    "gate_up_proj": ("gate", "up"),
    "up_proj": ("up",),
    "down_proj": ("down",),
}
# Families whose own files have q, k and v in one matrix too: a change of low rank is of all three at once there.
JOINT_FAMILIES = frozenset({"gpt2"})


@dataclass(frozen=True)
class Part:
    """Rows `start` to `end` of a matrix. targets: what they are; several where they can only be changed together."""

    targets: tuple[str, ...]
    start: int
    end: int

    @property
    def name(self) -> str:
        return "".join(self.targets)

    @property
    def num_rows(self) -> int:
        return self.end - self.start


def parts_of(config: TransformerConfig, matrix: str) -> tuple[Part, ...]:
    """The parts of a matrix by its module's name, in order; none of what is not in a block."""
    leaf = matrix.rpartition(".")[2]
    if leaf not in STACKED or "layers." not in matrix:
        return ()
    kv_rows, inner = config.num_kv_heads * config.head_dim, config.intermediate_size
    rows = {"q": config.num_heads * config.head_dim, "k": kv_rows, "v": kv_rows, "gate": inner, "up": inner}
    parts, start = [], 0
    for target in STACKED[leaf]:
        end = start + rows.get(target, config.hidden_size)
        parts.append(Part((target,), start, end))
        start = end
    if leaf == "qkv_proj" and config.family in JOINT_FAMILIES:
        return (Part(STACKED[leaf], 0, start),)
    return tuple(parts)
