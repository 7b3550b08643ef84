"""LoRA adapters as the engine takes them, to compute several beside each other on one base (arXiv:2106.09685;
S-LoRA, arXiv:2311.03285): y = W x + B (A x), each row of a step with its own sequence's A and B. No torch.

    change = {"layers.0.attention.qkv_proj": [(0, 576, A, B), (768, 960, A, B)], ...}    # q and v of a fused matrix
    check_change("support", change, config)

A merged adapter costs nothing; several cannot be merged into one base. This way they share its weights, its batch and
its memory, and a step pays for the small products only: of rank 16 on all matrices 4 % more numbers to multiply.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from bimo.errors import UsageError
from bimo.models.config import DecoderConfig

__all__ = ["MAX_RANK", "Change", "Piece", "check_change", "joined", "matrix_shapes"]

Array = NDArray[Any]
Piece = tuple[int, int, Array, Array]  # rows [start, end) of the matrix; A (r, in), B (end - start, r), scale in it
Change = dict[str, list[Piece]]  # by the matrix's parameter name without ".weight"
MAX_RANK = 256  # of a piece: beyond, the two small products cost a third of a merged matrix's and more


def matrix_shapes(config: DecoderConfig) -> dict[str, tuple[int, int]]:
    """The matrices an adapter may change: name -> (rows, columns)."""
    heads, kv_heads = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    hidden, inner = config.hidden_size, config.intermediate_size
    of_a_layer = {
        "attention.qkv_proj": (heads + 2 * kv_heads, hidden),
        "attention.out_proj": (hidden, heads),
        "mlp.gate_up_proj" if config.gated_mlp else "mlp.up_proj": (inner * (2 if config.gated_mlp else 1), hidden),
        "mlp.down_proj": (hidden, inner),
    }
    return {f"layers.{i}.{name}": shape for i in range(config.num_layers) for name, shape in of_a_layer.items()}


def check_change(name: str, change: Change, config: DecoderConfig) -> None:
    """UsageError unless every piece fits into the model's matrices and can be computed beside others."""
    alone = f"merge it instead: serve its folder alone, without --adapter {name}="
    shapes = matrix_shapes(config)
    for matrix, pieces in change.items():
        if matrix not in shapes:
            raise UsageError(
                f"the adapter {name!r} changes {matrix}, and beside others only the matrices of the model's "
                f"{config.num_layers} layers can be: is it for another base? Else {alone}",
                "adapters",
            )
        rows, columns = shapes[matrix]
        for start, end, down, up in pieces:
            rank = len(down)
            if down.shape != (rank, columns) or up.shape != (end - start, rank) or not 0 <= start < end <= rows:
                raise UsageError(
                    f"the adapter {name!r} is for another base: for {matrix} it has A {down.shape} and B {up.shape}, "
                    f"the matrix is {(rows, columns)}: name the model it was trained on",
                    "adapters",
                )
            if rank > MAX_RANK:
                raise UsageError(
                    f"the adapter {name!r} has rank {rank} for {matrix}, beside others {MAX_RANK} at most can be "
                    f"computed: {alone}",
                    "adapters",
                )
            if not (np.isfinite(down).all() and np.isfinite(up).all()):
                raise UsageError(
                    f"the adapter {name!r} has numbers for {matrix} that are infinite or none at all: train it again "
                    "with a smaller learning rate",
                    "adapters",
                )


def joined(pieces: list[Piece], shape: tuple[int, int]) -> tuple[Array, Array]:
    """The pieces of one matrix (rows, columns) as one: A (R, columns), and B (rows, R), zero outside the pieces."""
    down = np.concatenate([piece[2] for piece in pieces]).astype(np.float32)
    up = np.zeros((shape[0], len(down)), np.float32)
    at = 0
    for start, end, of_piece, values in pieces:
        up[start:end, at : at + len(of_piece)] = values
        at += len(of_piece)
    return down, up
