"""Whole examples side by side: nothing lost, nothing cut, each task weighed as the formula says."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bimo.data.example_loader import ExampleLoader, fill_rows
from bimo.data.loader import IGNORED
from bimo.data.shards import TokenFile, write_tokens
from bimo.errors import DataError


def make_file(folder: Path, sizes: list[int], learned: int = 2, first: int = 1) -> TokenFile:
    """Examples of ascending tokens; the last `learned` of each are trained."""
    encoded, token = [], first
    for number, size in enumerate(sizes):
        mask = [0] * (size - learned) + [1] * learned
        encoded.append((f"{folder.name}#{number}", list(range(token, token + size)), mask))
        token += size
    return write_tokens(folder, encoded, vocab_size=5000, mark="m")


@given(st.lists(st.integers(0, 40), max_size=60), st.integers(1, 40))
def test_rows_hold_every_example_once(sizes: list[int], length: int) -> None:
    rows = fill_rows(np.array(sizes, np.int64), length)
    assert sorted(number for row in rows for number in row) == [n for n, size in enumerate(sizes) if 0 < size <= length]
    assert all(sum(sizes[number] for number in row) <= length for row in rows)
    if rows:  # any two rows hold more than one together: at most twice the least number
        least = -(-sum(size for size in sizes if size <= length) // length)
        assert len(rows) <= 2 * least


def test_a_batch_is_its_examples(tmp_path: Path) -> None:
    file = make_file(tmp_path / "a", [5, 9, 3, 4, 7])
    loader = ExampleLoader([file], length=16, shuffle=False)
    batch = loader.next_batch(loader.num_rows[0])
    seen = 0
    for ids, targets, positions, segments in zip(
        batch.input_ids, batch.targets, batch.positions, batch.segments, strict=True
    ):
        for segment in range(segments.max() + 1):
            inside = segments == segment
            if not ids[inside].any():
                continue  # what fills up
            assert positions[inside].tolist() == list(range(inside.sum()))
            wanted = targets[inside]
            learned = wanted != IGNORED
            assert learned.sum() == 2 and (wanted[learned] == ids[inside][learned] + 1).all()
            seen += int(inside.sum())
    assert seen == 5 + 9 + 3 + 4 + 7 - 5
    assert batch.num_targets == 10 and (batch.weights == 1).all()
    assert "a#" in loader.provenance(batch)[0]


def test_tasks_weigh_what_the_formula_says(tmp_path: Path) -> None:
    long, short = make_file(tmp_path / "long", [16] * 6, learned=12), make_file(tmp_path / "short", [8] * 8, learned=1)
    loader = ExampleLoader([long, short], length=15, loss_weights=[1.0, 3.0], seed=3)
    batch = loader.next_batch(6)
    of = np.array([origin.file for origin in batch.origins])
    assert set(of) == {0, 1}
    total = batch.num_targets
    for number, weight in ((0, 1.0), (1, 3.0)):
        learned = int((batch.targets[of == number] != IGNORED).sum())
        assert batch.weights[of == number] == pytest.approx(weight * total / (learned * 4.0))
    parts = [loader_part.weights for loader_part in (batch.rows(slice(0, 2)), batch.rows(slice(2, 6)))]
    assert parts[0][:, 0].tolist() == batch.weights[:2, 0].tolist()
    # the factors of a process's rows are those of the whole step
    twin = ExampleLoader([long, short], length=15, loss_weights=[1.0, 3.0], seed=3)
    half = twin.next_batch(6, rank=1, world_size=2)
    assert half.weights[:, 0].tolist() == batch.weights[1::2, 0].tolist()


def test_it_goes_on_where_it_was(tmp_path: Path) -> None:
    file = make_file(tmp_path / "a", list(range(4, 20)))
    one, two = (ExampleLoader([file], length=24, seed=5) for _ in range(2))
    one.next_batch(3)
    two.restore(one.state())
    assert (one.next_batch(4).input_ids == two.next_batch(4).input_ids).all()


def test_empty_columns_are_left_out(tmp_path: Path) -> None:
    loader = ExampleLoader([make_file(tmp_path / "a", [10, 11])], length=512, shuffle=False)
    batch = loader.next_batch(1)
    assert batch.input_ids.shape == (1, 512) and batch.rows(slice(0, 1)).input_ids.shape == (1, 64)
    assert batch.rows(slice(0, 1)).num_targets == batch.num_targets
    assert batch.idle().num_targets == 0


def test_a_mask_that_was_torn_is_noticed(tmp_path: Path) -> None:
    file = make_file(tmp_path / "a", [5, 6])
    (file.folder / "trained.bin").write_bytes(b"\1")
    with pytest.raises(DataError, match="trained"):
        TokenFile.open(file.folder)
    with pytest.raises(DataError, match="either all do or none"):
        write_tokens(tmp_path / "b", [("x", [1, 2], [0, 1]), ("y", [3, 4])], vocab_size=9, mark="")
