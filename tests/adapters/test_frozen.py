"""Products with a frozen matrix against float64 statements; what they keep for the way back."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bimo.adapters.frozen import FrozenLinear, LowRankPart, product
from bimo.errors import CorruptModelError
from bimo.quant.weights import round_weight

PARTS = (LowRankPart(0, 40, 0, 0.5), LowRankPart(56, 72, 40, 2.0))  # rows 40 to 56 do not change


def layer(**frozen: object) -> FrozenLinear:
    torch.manual_seed(1)
    return FrozenLinear(nn.Linear(64, 72), **frozen)  # type: ignore[arg-type]


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(2)
    return (
        torch.randn(3, 5, 64, requires_grad=True),
        torch.randn(6, 64).requires_grad_(),
        torch.randn(56, 3).requires_grad_(),
    )


def statement(base: FrozenLinear, x: Tensor, low: Tensor, a: Tensor, b: Tensor) -> Tensor:
    bias = None if base.bias is None else base.bias.double()
    change = torch.zeros(72, 64, dtype=torch.float64)
    for number, part in enumerate(PARTS):
        change[part.start : part.end] = part.scale * (b[part.rows] @ a[number * 3 : number * 3 + 3])
    return F.linear(x, base.matrix(torch.float32).double(), bias) + F.linear(low, change)


@pytest.mark.parametrize("quant", ["none", "int8", "int4"])
@pytest.mark.parametrize("apart", [False, True], ids=["", "dropout"])
def test_results_and_gradients_are_those_of_the_formula(quant: str, apart: bool) -> None:
    base = layer(quant=quant)
    x, a, b = inputs()
    low = (x.detach() * 1.5).requires_grad_() if apart else None
    y = product(base, x, low, a, b, PARTS)
    slope = torch.randn(y.shape)
    given = [each for each in (x, low, a, b) if each is not None]
    found = torch.autograd.grad(y, given, slope)
    doubles = [each.detach().double().requires_grad_() for each in given]
    expected = statement(base, doubles[0], doubles[1] if apart else doubles[0], *doubles[-2:])
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
    for one, other in zip(found, torch.autograd.grad(expected, doubles, slope.double()), strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("quant", ["int8", "int4"])
def test_a_quantised_base_is_its_dequantised_one(quant: str) -> None:
    torch.manual_seed(1)
    plain = nn.Linear(64, 72)
    rounded = round_weight("x.weight", plain.weight.detach(), quant, tied=False)
    same = nn.Linear(64, 72)
    same.weight, same.bias = nn.Parameter(rounded.dequantise()), plain.bias
    base = FrozenLinear(plain, quant=quant)
    x = torch.randn(7, 64, requires_grad=True)
    assert torch.equal(base(x), same(x)) and base.weight is None
    slope = torch.randn(7, 72)
    (one,), (other,) = (torch.autograd.grad(each(x), [x], slope) for each in (base, same))
    assert torch.equal(one, other)
    bits = base.quantised
    assert bits is not None and bits.codes.nbytes + bits.scales.nbytes < plain.weight.nbytes / 2
    before = base.matrix(torch.float32)
    base.bfloat16()  # as whoever moves a whole model to another number type
    assert torch.equal(base.matrix(torch.float32), before) and base.bias.dtype == torch.bfloat16
    assert base.to("meta").quantised.scales.is_meta


@pytest.mark.parametrize("quant", ["none", "int8", "int4"])
def test_nothing_as_large_as_the_matrix_is_kept(quant: str) -> None:
    base = layer(quant=quant)
    x, a, b = inputs()
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t.numel()), t)[1], lambda t: t):
        product(base, x[:1, :2], None, a, b, PARTS)
    assert kept and max(kept) < 72 * 64


def test_in_bfloat16_products_are_of_bfloat16_numbers() -> None:
    base = layer(dtype=torch.bfloat16)
    x, a, b = inputs()
    with torch.autocast("cpu", torch.bfloat16):
        y = product(base, x, None, a, b, PARTS)
    grads = torch.autograd.grad(y.float().square().sum(), [x, a, b])
    assert y.dtype == torch.bfloat16 and [grad.dtype for grad in grads] == [torch.float32] * 3
    doubles = [each.detach().double().requires_grad_() for each in (x, a, b)]
    expected = statement(base, doubles[0], *doubles)
    wanted = torch.autograd.grad(expected.square().sum(), doubles)
    for one, other in zip((y, *grads), (expected, *wanted), strict=True):
        assert (one.double() - other).norm() < 0.01 * other.norm()
    assert product(base, x).dtype == torch.float32  # and outside, in the number type of what is read


def test_gradients_that_are_no_plain_rows_are_read_right() -> None:
    base = layer()
    x, a, b = inputs()
    y = product(base, x, None, a, b, PARTS)
    (whole,) = torch.autograd.grad(y, [x], torch.ones_like(y), retain_graph=True)
    (spread,) = torch.autograd.grad(y.transpose(0, 2).sum(), [x])  # an expanded scalar
    torch.testing.assert_close(spread, whole)
    frozen = torch.randn(4, 64)
    (of_a,) = torch.autograd.grad(product(base, frozen, None, a, b, PARTS).sum(), [a])  # x itself wants none
    assert of_a.abs().sum() > 0


def test_a_weight_that_is_not_a_number_is_named() -> None:
    linear = nn.Linear(64, 72)
    with torch.no_grad():
        linear.weight[3, 3] = float("nan")
    with pytest.raises(CorruptModelError, match=r"layers.7.out_proj.weight"):
        FrozenLinear(linear, quant="int8", name="layers.7.out_proj")
