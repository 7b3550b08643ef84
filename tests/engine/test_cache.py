"""Blocks: reference counts, reuse order, prefixes found and evicted, under random histories."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from bimo.engine.cache import BlockPool, hash_block

TOKENS = list(range(100))


def fill(pool: BlockPool, tokens: list[int]) -> list[int]:
    """Allocate and name blocks for full prefixes of `tokens`, as a finished prefill would."""
    blocks, parent = [], b""
    for start in range(0, len(tokens) // pool.block_size * pool.block_size, pool.block_size):
        block = pool.allocate()
        assert block is not None
        parent = hash_block(parent, tokens[start : start + pool.block_size])
        pool.name(block, parent)
        blocks.append(block)
    return blocks


def test_known_prefix_is_found_up_to_the_limit() -> None:
    pool = BlockPool(8, 4)
    blocks = fill(pool, TOKENS[:12])
    assert pool.match(TOKENS, 100)[0] == blocks
    assert pool.match(TOKENS, 11)[0] == blocks[:2]
    assert pool.match([*TOKENS[:4], 99, *TOKENS[5:]], 100)[0] == blocks[:1]
    assert pool.match([99, *TOKENS], 100)[0] == []
    pool.check_integrity([blocks, blocks, blocks[:2], blocks[:1]])


def test_same_tokens_after_another_prefix_are_another_block() -> None:
    pool = BlockPool(8, 2)
    fill(pool, [1, 2, 3, 4])
    assert pool.match([9, 9, 3, 4], 4)[0] == []


def test_released_blocks_stay_known_until_memory_is_needed_tail_first() -> None:
    pool = BlockPool(3, 4)
    blocks = fill(pool, TOKENS[:12])
    pool.release(blocks)
    assert pool.num_free == 3
    assert pool.allocate() == blocks[2]
    found, _ = pool.match(TOKENS, 100)
    assert found == blocks[:2]
    assert pool.allocate() is None


def test_unnamed_blocks_are_reused_before_named_ones() -> None:
    pool = BlockPool(3, 4)
    named = fill(pool, TOKENS[:4])
    plain = [pool.allocate(), pool.allocate()]
    pool.release(named)
    pool.release(plain)
    assert {pool.allocate(), pool.allocate()} == set(plain)
    assert pool.match(TOKENS, 100)[0] == named


@given(
    st.integers(1, 12),
    st.lists(st.tuples(st.sampled_from(["new", "match", "release"]), st.integers(0, 50)), max_size=60),
)
def test_references_and_tables_agree_after_any_history(num_blocks: int, history: list[tuple[str, int]]) -> None:
    pool = BlockPool(num_blocks, 2)
    owned: list[list[int]] = []
    for action, number in history:
        tokens = [number % 3] * (2 + number % 7)
        if action == "new" and pool.num_free >= len(tokens) // 2:
            owned.append(fill(pool, tokens))
        elif action == "match":
            blocks, names = pool.match(tokens, len(tokens))
            assert len(blocks) == len(names)
            owned.append(blocks)
        elif action == "release" and owned:
            pool.release(owned.pop(number % len(owned)))
        pool.check_integrity(owned)
