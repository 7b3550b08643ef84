"""Which rows of a batch are scored, in numbers that do not change from step to step.

oneDNN generates code for every size of product it meets, and keeps it: with other lengths and another number of
predicted words in each batch a small translator's training grew from 1.3 to 3.5 GB in 60 steps, and on. With sizes
rounded up it stays at 1.3 GB; the padding costs as much time as the code did (LOG.md).
"""

from __future__ import annotations

import torch
from torch import Tensor

from bimo.data.loader import IGNORED

__all__ = ["ROWS", "chosen_rows", "rounded"]

ROWS = 64


def rounded(count: int, step: int = ROWS) -> int:
    """`count`, rounded up to a multiple of `step`; at least one of them."""
    return max(1, -(-count // step)) * step


def chosen_rows(hidden: Tensor, targets: Tensor, step: int = ROWS) -> tuple[Tensor, Tensor]:
    """The rows of hidden (..., D) that have a target, and the targets (...): (N, D) and (N,), N a multiple of `step`.

    The rows that fill up are copies whose target is IGNORED.
    """
    places = (targets.flatten() != IGNORED).nonzero().squeeze(1)
    count = len(places)
    places = torch.cat((places, places.new_zeros(rounded(count, step) - count)))
    words = targets.flatten()[places]
    words[count:] = IGNORED
    return hidden.flatten(0, -2)[places], words
