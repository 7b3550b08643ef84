"""AdaLoRA's schedule, penalty and beginnings. Its sharing out of ranks: tests/parity/test_peft.py."""

from __future__ import annotations

import pytest
import torch

from bimo.adapters.adalora import ORTHOGONALITY, AdaLoRA, budget_at, schedule
from bimo.adapters.kinds import attach
from bimo.recipe import AdapterRecipe
from tests.adapters.tiny import make, read, shake


def adapted(**recipe: int) -> tuple[AdaLoRA, torch.nn.Module]:
    model = make("llama")
    adapter = attach(model, AdapterRecipe(kind="adalora", **recipe), seed=0)
    assert isinstance(adapter, AdaLoRA)
    return adapter, model


def test_the_budget_goes_down_like_a_cube() -> None:
    budgets = [budget_at(step, 100, 300, 200) for step in range(1, 101)]
    assert schedule(100) == (10, 30, 1) and schedule(1000) == (100, 300, 10) and schedule(1) == (0, 0, 1)
    assert budgets[:10] == [300] * 10 and budgets[69:] == [200] * 31
    assert budgets[39] == 200 + 100 // 8  # halfway
    assert budgets == sorted(budgets, reverse=True)


def test_it_begins_with_half_more_ranks_than_stay() -> None:
    assert {layer.rank for layer in adapted(rank=5)[0].ranked.values()} == {8}
    assert {layer.rank for layer in adapted(rank=5, initial_rank=6)[0].ranked.values()} == {6}


def test_the_penalty_is_the_distance_from_orthogonal_vectors() -> None:
    adapter, model = adapted(rank=2)
    shake(model)
    terms = []
    for layer in adapter.ranked.values():
        for part, a in zip(layer.parts, layer.lora_a.double().split(layer.rank), strict=True):
            b = layer.lora_b[part.rows].double()
            terms += [torch.linalg.norm(products - torch.eye(3)) for products in (a @ a.T, b.T @ b)]
    expected = ORTHOGONALITY * torch.stack(terms).mean()
    torch.testing.assert_close(adapter.penalty().double(), expected, rtol=1e-5, atol=0)
    adapter.penalty().backward()
    layer = next(iter(adapter.ranked.values()))
    assert layer.lora_a.grad is not None and layer.lora_b.grad is not None and layer.lora_e.grad is None


@pytest.mark.parametrize("steps", [1, 2, 3, 7])
def test_few_steps_are_enough(steps: int) -> None:
    adapter, model = adapted(rank=2)
    shake(model)
    for step in range(1, steps + 1):
        model.zero_grad()
        read(model).square().sum().backward()
        adapter.after_backward(step, steps)
    kept = sum(int(layer.kept.sum()) for layer in adapter.ranked.values())
    assert kept == (42 if steps <= 2 else 28)  # the last sharing out would have been before the first gradient


def test_what_is_pruned_is_so_before_anything_reads_it() -> None:
    adapter, model = adapted(rank=2)
    shake(model)
    for step in range(1, 8):
        model.zero_grad()
        read(model).square().sum().backward()
        adapter.after_backward(step, 10)
        with torch.no_grad():  # an optimiser's step
            for weight in adapter.trained.values():
                weight -= 1e-4 * weight.grad
    name, layer = next((name, layer) for name, layer in adapter.ranked.items() if not layer.kept.all())
    assert layer.lora_e[~layer.kept].any()
    with torch.no_grad():
        expected = read(model)
        assert not layer.lora_e[~layer.kept].any()
    tensors = adapter.to_file(adapter.trained)
    parts = [key for key in tensors if key.startswith(f"{name}.") and key.endswith(".lora_E")]
    assert sum(len(tensors[key]) for key in parts) == int(layer.kept.sum())
    whole = adapter.to_file(adapter.trained, final=False)
    assert all(len(whole[key]) == 3 for key in parts)
    adapter.merge()
    with torch.no_grad():
        torch.testing.assert_close(read(model), expected, rtol=1e-4, atol=1e-4)
