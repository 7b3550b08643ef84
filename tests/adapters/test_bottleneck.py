"""Bottlenecks against a float64 statement of two layers behind attention and MLP."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from bimo.adapters.bottleneck import BottleneckLinear
from bimo.adapters.kinds import attach
from bimo.errors import UsageError
from bimo.recipe import AdapterRecipe
from tests.adapters.tiny import CONFIGS, make, read, shake

RECIPE = AdapterRecipe(kind="bottleneck", width=5)


@pytest.mark.parametrize("name", CONFIGS)
def test_it_is_nothing_at_first_and_then_learns(name: str) -> None:
    model = make(name)
    with torch.no_grad():
        plain = read(model)
    adapter = attach(model, RECIPE, seed=0)
    with torch.no_grad():
        torch.testing.assert_close(read(model), plain, rtol=1e-5, atol=1e-5)
    shake(model)
    hidden = read(model)
    (model.class_logits(hidden) if name == "bert" else hidden).square().sum().backward()
    assert all(weight.grad is not None and weight.grad.any() for weight in adapter.trained.values())
    places = {each.split("layers.")[1][2:].removesuffix(".up.weight") for each in adapter.trained if ".up." in each}
    expected = {"attention.out_proj", "mlp.down_proj"} | ({"cross_attention.out_proj"} if name == "t5" else set())
    assert {place for place in places if not place.endswith(".bias")} == expected


def test_it_stands_behind_the_matrix() -> None:
    model = make("gpt2")
    attach(model, RECIPE, seed=0)
    shake(model)
    layer = model.layers[0].attention.out_proj
    assert isinstance(layer, BottleneckLinear)
    x = torch.randn(3, 64)
    y = F.linear(x.double(), layer.weight.double(), layer.bias.double())
    inner = F.gelu(F.linear(y, layer.down.weight.double(), layer.down.bias.double()))
    expected = y + F.linear(inner, layer.up.weight.double(), layer.up.bias.double())
    torch.testing.assert_close(layer(x).double(), expected, rtol=1e-5, atol=1e-5)


def test_it_is_no_change_of_a_matrix() -> None:
    adapter = attach(make("llama"), RECIPE, seed=0)
    with pytest.raises(UsageError, match="a bottleneck adapter cannot be merged"):
        adapter.merge()
