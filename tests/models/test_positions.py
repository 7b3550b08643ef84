"""Sinusoids and T5's buckets against their formulas, stated again a number at a time in float64."""

from __future__ import annotations

import math

import pytest
import torch

from bimo.models.positions import RelativeBias, relative_buckets, sinusoidal_positions


@pytest.mark.parametrize("size", [2, 8, 30])
def test_sinusoids_are_the_papers(size: int) -> None:
    """PE(pos, 2i) = sin(pos / 10000^(2i/d)), PE(pos, 2i+1) = cos(the same); all sines come first."""
    table = sinusoidal_positions(torch.tensor([[0, 1, 7], [511, 1023, 100_000]]), size)
    assert table.shape == (2, 3, size) and table.dtype == torch.float32
    for place, position in (((0, 0), 0), ((0, 1), 1), ((0, 2), 7), ((1, 0), 511), ((1, 1), 1023), ((1, 2), 100_000)):
        for i in range(size // 2):
            angle = position / 10000 ** (2 * i / size)
            assert abs(table[place][i].item() - math.sin(angle)) < 1e-7
            assert abs(table[place][size // 2 + i].item() - math.cos(angle)) < 1e-7


def bucket(distance: int, num_buckets: int, max_distance: int, bidirectional: bool) -> int:
    """The rule in words of one distance: exact while small, then by logarithm, then the last."""
    first = 0
    if bidirectional:
        num_buckets //= 2
        first = num_buckets if distance > 0 else 0
        steps = abs(distance)
    else:
        steps = max(-distance, 0)
    exact = num_buckets // 2
    if steps < exact:
        return first + steps
    grown = exact + int(math.log(steps / exact) / math.log(max_distance / exact) * (num_buckets - exact) + 1e-9)
    return first + min(grown, num_buckets - 1)


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(("num_buckets", "max_distance"), [(32, 128), (8, 16), (4, 3), (6, 50)])
def test_buckets_are_t5s(num_buckets: int, max_distance: int, bidirectional: bool) -> None:
    # Where a logarithm is a whole number float32, which T5 was trained with, may fall on either side.
    distances = torch.arange(-300, 301)
    buckets = relative_buckets(distances, num_buckets, max_distance, bidirectional=bidirectional)
    assert buckets.min() >= 0 and buckets.max() < num_buckets
    wrong = 0
    for distance, got in zip(distances.tolist(), buckets.tolist(), strict=True):
        expected = bucket(distance, num_buckets, max_distance, bidirectional)
        assert got in (expected, expected - 1)
        wrong += got != expected
    assert wrong <= 4
    if not bidirectional:
        assert (buckets[distances >= 0] == 0).all()


def test_a_bias_of_positions_in_any_order_is_rows_of_the_whole() -> None:
    """What a cache asks for, one query at its own position and any keys, is what a whole sequence has there."""
    torch.manual_seed(0)
    bias = RelativeBias(8, 16, 3, bidirectional=False)
    positions = torch.arange(40)
    whole = bias(positions, positions)
    assert whole.shape == (3, 40, 40)
    queries, keys = torch.tensor([[33], [5]]), torch.tensor([[2, 33, 10], [0, 4, 5]])
    some = bias(queries, keys)
    assert some.shape == (2, 3, 1, 3)
    assert torch.equal(some[0, :, 0], whole[:, 33, [2, 33, 10]])
    assert torch.equal(some[1, :, 0], whole[:, 5, [0, 4, 5]])
