"""How a model gets an adapter, and what is refused. Files: tests/formats/test_peft.py."""

from __future__ import annotations

from typing import get_args

import pytest
import torch

from bimo.adapters.kinds import ADAPTERS, adapter_of, attach, num_weights
from bimo.errors import UsageError
from bimo.models.config import LSTMConfig
from bimo.models.recurrent import LSTMLanguageModel
from bimo.recipe import AdapterRecipe
from tests.adapters.tiny import make


def test_every_kind_of_a_recipe_is_there() -> None:
    assert set(ADAPTERS) == set(get_args(AdapterRecipe.model_fields["kind"].annotation))


@pytest.mark.parametrize("kind", ADAPTERS)
def test_a_model_takes_one(kind: str) -> None:
    model = make("llama")
    adapter = attach(model, AdapterRecipe(kind=kind), seed=0, base="smollm2")  # type: ignore[arg-type]
    assert adapter_of(model) is adapter is model.adapter and adapter.base == "smollm2"
    assert 0 < adapter.num_trained == sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    with pytest.raises(UsageError, match="takes one only"):
        attach(model, AdapterRecipe(), seed=0)
    assert adapter_of(make("llama")) is None
    if kind != "adalora":
        assert adapter.penalty() is None
    assert adapter.layers["layers.0.mlp.down_proj"].weight is not None


@pytest.mark.parametrize("kind", ADAPTERS)
@pytest.mark.parametrize("quant", ["int8", "int4"])
def test_any_kind_takes_a_quantised_base(kind: str, quant: str) -> None:
    model = make("llama")
    adapter = attach(model, AdapterRecipe(kind=kind, quant=quant), seed=0, dtype="bfloat16")  # type: ignore[arg-type]
    assert all(layer.weight is None for layer in adapter.layers.values())
    assert len(adapter.layers) == 8
    plain = sum(weight.numel() for weight in make("llama").parameters())
    assert num_weights(model) == plain + sum(weight.numel() for weight in adapter.trained.values())
    model(torch.ones(1, 5, dtype=torch.int64)).sum().backward()
    assert any(weight.grad is not None for weight in adapter.trained.values())


def test_an_lstm_has_no_matrices_to_change() -> None:
    model = LSTMLanguageModel(LSTMConfig(vocab_size=50, hidden_size=16, num_layers=1, max_positions=32))
    with pytest.raises(UsageError, match="this model is an LSTM"):
        attach(model, AdapterRecipe(), seed=0)
    assert all(weight.requires_grad for weight in model.parameters())
