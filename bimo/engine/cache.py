"""Which block of the KV cache belongs to whom: allocation, sharing, reuse of known prefixes. No tensors, no torch.

The cache's memory is `num_blocks` blocks of `block_size` tokens (paged attention, arXiv:2309.06180). A *full* block
whose tokens are computed is named by the hash of all tokens up to its end; a later request whose prompt begins with
the same tokens shares it instead of computing it again. A block nobody uses keeps its name and content until its
memory is needed, oldest first.

    free ──allocate──► owned (references >= 1) ──release──► free, unnamed    (front of the free list: reused first)
                          │  ▲                     └──────► free, still named (back of the list: reused last)
                       name  └──────── share ─────────────── (found by its name)
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from hashlib import blake2b

from bimo.models.config import DecoderConfig, LSTMConfig, Seq2SeqConfig

__all__ = ["NUMBER_BYTES", "BlockPool", "bytes_per_block", "bytes_per_token", "hash_block"]

NUMBER_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1}


def bytes_per_token(config: DecoderConfig | Seq2SeqConfig, dtype: str) -> int:
    """Memory of one token's keys and values over all layers; in int8 with a float32 scale a head."""
    of_a_head = config.head_dim * NUMBER_BYTES[dtype] + (4 if dtype == "int8" else 0)
    num_layers = config.num_decoder_layers if isinstance(config, Seq2SeqConfig) else config.num_layers
    return 2 * num_layers * config.num_kv_heads * of_a_head


def bytes_per_block(config: DecoderConfig | Seq2SeqConfig | LSTMConfig, dtype: str, block_size: int) -> int:
    """Memory of one block: its tokens' keys and values, or a recurrent model's two states at its end."""
    if isinstance(config, DecoderConfig | Seq2SeqConfig):
        return bytes_per_token(config, dtype) * block_size
    return 2 * config.num_layers * config.hidden_size * NUMBER_BYTES[dtype]


def hash_block(parent: bytes, tokens: Sequence[int]) -> bytes:
    """Name of a block: a digest over its tokens and its predecessor's name (so over the whole prefix).

    A cryptographic hash, because a collision would show one user's context to another. About 1 us a block.
    """
    return blake2b(parent + array("q", tokens).tobytes(), digest_size=16).digest()


class BlockPool:
    """Reference-counted blocks, with a table of those whose content is known."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks, self.block_size = num_blocks, block_size
        self.references = [0] * num_blocks
        self._free: OrderedDict[int, None] = OrderedDict((block, None) for block in range(num_blocks))
        self._name_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}

    @property
    def num_free(self) -> int:
        """Blocks that `allocate` can still give (named ones included)."""
        return len(self._free)

    def allocate(self) -> int | None:
        """A block with one reference and no name, or None when all are owned."""
        if not self._free:
            return None
        block, _ = self._free.popitem(last=False)
        if name := self._name_of.pop(block, None):
            del self._block_of[name]
        self.references[block] = 1
        return block

    def share(self, block: int) -> None:
        """One more reference to a block, free or owned."""
        if self.references[block] == 0:
            del self._free[block]
        self.references[block] += 1

    def release(self, blocks: Iterable[int]) -> None:
        """One reference less to each. Pass a sequence's blocks in order: its tail is then reused before its head,
        since the head of a prompt is what others share."""
        for block in reversed(list(blocks)):
            self.references[block] -= 1
            if self.references[block] == 0:
                self._free[block] = None
                if block not in self._name_of:
                    self._free.move_to_end(block, last=False)

    def name(self, block: int, name: bytes) -> None:
        """Make a computed, full block findable. The first block of that name stays the one that is found."""
        if name not in self._block_of and block not in self._name_of:
            self._block_of[name] = block
            self._name_of[block] = name

    def match(self, tokens: Sequence[int], limit: int, root: bytes = b"") -> tuple[list[int], list[bytes]]:
        """The longest chain of known blocks at the start of `tokens`, covering at most `limit` tokens; `root` is what
        the first block's name builds on.

        Returns blocks and names; each block has one reference more, owned by the caller.
        """
        blocks: list[int] = []
        names: list[bytes] = []
        parent = root
        for end in range(self.block_size, limit + 1, self.block_size):
            parent = hash_block(parent, tokens[end - self.block_size : end])
            block = self._block_of.get(parent)
            if block is None:
                break
            self.share(block)
            blocks.append(block)
            names.append(parent)
        return blocks, names

    def check_integrity(self, owners: Iterable[Sequence[int]]) -> None:
        """Assert that references equal what `owners` (their block lists) hold, and that the tables agree."""
        held = [0] * self.num_blocks
        for blocks in owners:
            assert len(set(blocks)) == len(blocks), "a sequence holds a block twice"
            for block in blocks:
                held[block] += 1
        assert held == self.references, "references differ from owners"
        assert set(self._free) == {b for b, count in enumerate(held) if count == 0}, "free list differs"
        assert {name: block for block, name in self._name_of.items()} == self._block_of, "names differ"
