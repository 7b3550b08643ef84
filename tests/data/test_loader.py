"""Packing, mixing and resuming: every token is predicted once an epoch, and nothing across documents."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bimo.data.loader import IGNORED, PackedLoader
from bimo.data.shards import TokenFile, write_tokens
from bimo.errors import UsageError


def token_file(folder: Path, lengths: list[int]) -> TokenFile:
    """Documents of these lengths; every token is different."""
    numbers = iter(range(1, 60_000))
    encoded = [(f"doc{n}", [next(numbers) for _ in range(length)]) for n, length in enumerate(lengths)]
    return write_tokens(folder, encoded, vocab_size=60_000, mark="")


@given(st.lists(st.integers(1, 30), min_size=1, max_size=30), st.integers(2, 16))
@settings(max_examples=60, deadline=None)
def test_each_token_is_predicted_once_and_from_its_own_document(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], length: int
) -> None:
    file = token_file(tmp_path_factory.mktemp("f") / "t", lengths)
    if sum(lengths) <= length:
        return
    loader = PackedLoader([file], length=length, shuffle=False)
    batch = loader.next_batch(loader.num_rows[0])
    document = np.repeat(np.arange(len(lengths)), lengths)
    place = np.concatenate([np.arange(count) for count in lengths])
    predicted = Counter()
    for row in range(len(batch.input_ids)):
        for column in range(length):
            index = int(batch.input_ids[row, column]) - 1  # the token's place in the file
            target = int(batch.targets[row, column])
            if target == IGNORED:
                assert index + 1 == len(document) or document[index] != document[index + 1]
            else:
                assert target == index + 2 and document[index] == document[index + 1]
                predicted[target] += 1
            first = max(0, column - place[index])  # where this document begins in the row
            assert batch.positions[row, column] == column - first
            same = batch.segments[row] == batch.segments[row, column]
            inside = document[batch.input_ids[row] - 1] == document[index]
            assert (same == inside).all()
    assert set(predicted.values()) <= {1}
    covered = loader.num_rows[0] * length
    assert len(predicted) == sum(place[index] > 0 for index in range(1, covered + 1))


def test_an_epoch_shows_every_row_once_in_another_order(tmp_path: Path) -> None:
    loader = PackedLoader([token_file(tmp_path / "t", [100, 20, 81])], length=10, seed=3)
    rounds = [[loader.next_batch(1).origins[0][1] for _ in range(20)] for _ in range(3)]
    assert all(sorted(order) == list(range(20)) for order in rounds)
    assert rounds[0] != rounds[1] != rounds[2]
    assert loader.epochs == 3


def test_resuming_gives_the_very_next_rows(tmp_path: Path) -> None:
    files = [token_file(tmp_path / "a", [300]), token_file(tmp_path / "b", [90] * 3)]
    loader = PackedLoader(files, length=8, seed=1, weights=[1, 3])
    loader.next_batch(37)
    state = loader.state()
    expected = loader.next_batch(50)
    fresh = PackedLoader(files, length=8, seed=1, weights=[1, 3])
    fresh.restore(state)
    assert fresh.next_batch(50).origins == expected.origins


def test_weights_are_kept_at_every_moment(tmp_path: Path) -> None:
    files = [token_file(tmp_path / "a", [401]), token_file(tmp_path / "b", [101])]
    loader = PackedLoader(files, length=10, weights=[1, 4])  # 40 rows once, 10 rows four times as often: half each
    for count in range(1, 200):
        loader.next_batch(1)
        assert abs(loader.taken[0] - count / 2) <= 1


def test_processes_share_out_the_rows(tmp_path: Path) -> None:
    files = [token_file(tmp_path / "a", [500])]
    whole = PackedLoader(files, length=8, seed=5).next_batch(12)
    parts = [PackedLoader(files, length=8, seed=5).next_batch(12, rank=rank, world_size=3) for rank in range(3)]
    assert sorted(origin for part in parts for origin in part.origins) == sorted(whole.origins)


def test_a_row_knows_where_it_came_from(tmp_path: Path) -> None:
    loader = PackedLoader([token_file(tmp_path / "a", [5, 30, 6])], length=10, shuffle=False)
    assert loader.provenance(loader.next_batch(4)) == ["doc0 to doc1", "doc1", "doc1", "doc1 to doc2"]


def test_too_little_text_is_said(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="one row of 64 tokens, the longest has 9"):
        PackedLoader([token_file(tmp_path / "a", [9])], length=64)
    loader = PackedLoader([token_file(tmp_path / "b", [90])], length=8)
    with pytest.raises(UsageError, match="2 sources"):
        loader.restore({"taken": [1, 2]})
