"""Rounding to 8 and 4 bits: how far off at most, what comes back exactly, what is refused."""

from __future__ import annotations

import pytest
import torch

from bimo.errors import CorruptModelError
from bimo.quant.weights import (
    HADAMARD,
    MOST_COLUMNS,
    QuantisedWeight,
    hadamard,
    quantise4,
    quantise8,
    quantise_rows8,
    round_weight,
)


@pytest.mark.parametrize("shape", [(5, 64), (16, 100), (1, 1), (3, 33)])
def test_no_weight_is_off_by_more_than_half_a_step(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    weight = torch.randn(shape)
    for quantise, steps in ((quantise8, 254), (quantise4, 15)):
        rounded = quantise(weight)
        assert rounded.codes.shape == shape and rounded.codes.dtype == torch.uint8
        widest = 2 * weight.abs().max() if steps == 254 else weight.max() - weight.min()
        # half a step, and what float16 rounds the scale and minimum by
        rounding = 1e-3 * weight.abs().max() + 2e-3 * widest
        assert (rounded.dequantise() - weight).abs().max() <= widest / steps / 2 + rounding
    before = weight.clone()
    quantise8(weight)
    assert torch.equal(weight, before)


def test_hadamard_is_sylvester_s_matrix_and_its_own_inverse() -> None:
    matrix = torch.ones(1, 1)
    while len(matrix) < HADAMARD:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    weight = torch.randn(3, 2, 192, generator=torch.Generator().manual_seed(7))
    expected = (weight.view(3, 2, 3, HADAMARD) @ (matrix / 8)).flatten(2)
    assert torch.allclose(hadamard(weight), expected, atol=1e-5)
    assert torch.allclose(hadamard(hadamard(weight)), weight, atol=1e-5)


def test_rows_are_rounded_after_the_transform_and_outliers_cost_little() -> None:
    torch.manual_seed(5)
    weight = torch.randn(8, 192)
    weight[:, 70] *= 30  # a column as activations' outliers make it
    rounded = quantise_rows8(weight)
    values = hadamard(weight)
    steps = values.abs().amax(dim=1, keepdim=True) / 127
    assert (hadamard(rounded.dequantise()) - values).abs().le(steps * 0.55).all()
    error = (rounded.dequantise() - weight).norm()
    plain = weight / (weight.abs().amax(dim=1, keepdim=True) / 127)
    assert error < 0.7 * ((plain.round() - plain) * weight.abs().amax(dim=1, keepdim=True) / 127).norm()


def test_weights_on_sixteen_steps_come_back_as_they_were() -> None:
    torch.manual_seed(1)
    codes = torch.randint(16, (8, 64), dtype=torch.uint8)
    codes.view(8, 2, 32)[..., :2] = torch.tensor([0, 15], dtype=torch.uint8)  # every block uses its whole range
    scales, minima = torch.rand(8, 2).half() + 0.01, torch.randn(8, 2).half()
    weight = QuantisedWeight("block4", codes, scales, minima).dequantise()
    again = quantise4(weight)
    assert torch.equal(again.codes, codes)
    assert (again.dequantise() - weight).abs().max() < 5e-3 * weight.abs().max()


def test_zeros_and_constants() -> None:
    for value in (0.0, 1.0, -3.5):
        weight = torch.full((2, 64), value)
        assert torch.allclose(quantise8(weight).dequantise(), weight, rtol=1e-3)
        assert torch.allclose(quantise_rows8(weight).dequantise(), weight, rtol=1e-3, atol=1e-6)
        assert torch.allclose(quantise4(weight).dequantise(), weight, rtol=1e-3)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e8])
def test_what_is_not_a_number_is_refused(bad: float) -> None:
    weight = torch.zeros(2, 64)
    weight[1, 40] = bad
    for quantise in (quantise8, quantise_rows8, quantise4):
        with pytest.raises(ValueError, match="not a number"):
            quantise(weight)


def test_rows_in_another_order() -> None:
    torch.manual_seed(2)
    weight = torch.randn(4, 64)
    index = torch.tensor([2, -1, 0])
    for rounded in (quantise8(weight), quantise_rows8(weight), quantise4(weight)):
        picked = rounded.rows(index).dequantise()
        expected = rounded.dequantise()[[2, 0, 0]]
        expected[1] = 0
        assert torch.equal(picked, expected)


def test_large_matrices_are_rounded_in_slices_to_the_same() -> None:
    torch.manual_seed(3)
    weight = torch.randn(9000, 64)
    for quantise in (quantise8, quantise_rows8, quantise4):
        whole = quantise(weight)
        for first in (0, 4095, 4096, 8999):
            part = quantise(weight[first : first + 1])
            assert torch.equal(whole.codes[first], part.codes[0]) and torch.equal(whole.scales[first], part.scales[0])


def test_what_is_rounded_and_how_far() -> None:
    weight = torch.randn(4, 64)

    def form(name: str, quant: str, tied: bool) -> str | None:
        found = round_weight(name, weight, quant, tied=tied)
        return found.format if isinstance(found, QuantisedWeight) else None

    assert form("layers.0.mlp.down_proj.weight", "int8", True) == "row8"
    assert form("layers.0.mlp.down_proj.weight", "int4", True) == "block4"
    assert form("embed_tokens.weight", "int4", True) == form("lm_head.weight", "int4", False) == "row8"
    assert form("embed_tokens.weight", "int8", False) is None and form("embed_positions.weight", "int8", True) is None
    assert torch.equal(round_weight("final_norm.weight", weight[0], "int8", tied=True), weight[0])
    for odd in (torch.randn(4, 96), torch.zeros(1, MOST_COLUMNS + 64)):
        found = round_weight("layers.0.mlp.down_proj.weight", odd, "int8", tied=True)
        assert isinstance(found, QuantisedWeight) and found.format == "block8"
    weight[:] = hadamard(torch.eye(64)[3]) * 40 + 0.1 * weight  # after the transform one value widens all steps
    assert form("layers.0.mlp.down_proj.weight", "int8", True) == "block8"
    weight[2, 2] = torch.nan
    with pytest.raises(CorruptModelError, match=r"lm_head\.weight: a weight is not a number.*fetch it again"):
        round_weight("lm_head.weight", weight, "int8", tied=False)


def test_the_rounding_error_of_rows_is_what_rounding_changes() -> None:
    torch.manual_seed(4)
    weight = torch.randn(64, 576) * torch.rand(64, 1)
    rounded = quantise_rows8(weight)
    measured = float((rounded.dequantise() - weight).norm() / weight.norm())
    assert rounded.rounding_error == pytest.approx(measured, rel=0.05)
    assert quantise_rows8(torch.zeros(2, 64)).rounding_error == 0.0
