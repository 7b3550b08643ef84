"""LoRA and its relatives on every architecture: nothing at first, only new weights learn, merging changes nothing."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from bimo.adapters.kinds import attach
from bimo.adapters.lora import LoRA, LoRALinear
from bimo.errors import UsageError
from bimo.models.block import Block
from bimo.models.packed import PackedRows
from bimo.objectives.cross_entropy import linear_cross_entropy
from bimo.recipe import AdapterRecipe
from tests.adapters.tiny import CONFIGS, ids, make, read, shake

KINDS = {
    "lora": AdapterRecipe(rank=4),
    "rslora": AdapterRecipe(rank=4, rslora=True, targets=("q", "k", "v", "down")),
    "dora": AdapterRecipe(rank=4, dora=True, targets=("o", "up")),
    "int8": AdapterRecipe(rank=4, quant="int8"),
    "int4-dora": AdapterRecipe(rank=4, quant="int4", dora=True),
    "adalora": AdapterRecipe(kind="adalora", rank=2),
}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_it_is_nothing_at_first_and_merging_changes_nothing(name: str, kind: str) -> None:
    model = make(name)
    plain, names = read(model), [each for each, _ in model.named_parameters()]
    adapter = attach(model, KINDS[kind], seed=0)
    if KINDS[kind].quant == "none":
        torch.testing.assert_close(read(model), plain, rtol=1e-5, atol=1e-5)
        assert set(names) < {each for each, _ in model.named_parameters()}
    shake(model)
    changed = read(model)
    assert (changed - plain).abs().max() > 0.01
    adapter.merge()
    torch.testing.assert_close(read(model), changed, rtol=1e-4, atol=1e-4)
    assert [each for each, _ in model.named_parameters()] == names and not hasattr(model, "adapter")


@pytest.mark.parametrize("name", CONFIGS)
def test_only_the_new_weights_learn(name: str) -> None:
    model = make(name)
    adapter = attach(model, AdapterRecipe(rank=3), seed=0)
    shake(model)
    hidden = read(model.train())
    (model.class_logits(hidden) if name == "bert" else hidden).square().sum().backward()
    got = {each for each, weight in model.named_parameters() if weight.grad is not None and weight.grad.any()}
    assert got == set(adapter.trained)
    heads = {each for each in got if "layers." not in each}
    assert heads == (
        {"pooler.weight", "pooler.bias", "classifier.weight", "classifier.bias"} if name == "bert" else set()
    )


def test_its_size_is_that_of_the_thin_matrices() -> None:
    adapter = attach(make("llama"), AdapterRecipe(rank=3), seed=0)
    of_a_layer = (64 + 64) + 2 * (64 + 32) + (64 + 64) + 3 * (64 + 96)  # q, k and v, o, gate up down
    assert adapter.num_trained == 2 * 3 * of_a_layer
    assert attach(make("llama"), AdapterRecipe(rank=3, targets=("v",)), seed=0).num_trained == 2 * 3 * 96


def test_a_seed_says_the_first_values() -> None:
    one, same, other = (attach(make("llama"), AdapterRecipe(rank=3), seed=seed).trained for seed in (1, 1, 2))
    name = "layers.0.mlp.down_proj.lora_a"
    assert torch.equal(one[name], same[name]) and not torch.equal(one[name], other[name])
    assert one[name].abs().max() <= 96**-0.5 and not one["layers.0.mlp.down_proj.lora_b"].any()


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_rows_of_several_documents_are_each_of_them(kind: str) -> None:
    model = make("llama")
    attach(model, KINDS[kind], seed=0)
    shake(model)
    words = ids(1, 12)
    segments = torch.tensor([[0] * 5 + [1] * 7])
    positions = torch.tensor([[*range(5), *range(7)]])
    with torch.no_grad():
        packed = model(words, positions, PackedRows(segments, torch.float32))
        alone = torch.cat([model(words[:, :5]), model(words[:, 5:])], dim=1)
    torch.testing.assert_close(packed, alone, rtol=1e-4, atol=1e-4)


def gradients(model: Any, **settings: Any) -> dict[str, torch.Tensor]:
    model.zero_grad()
    words = ids(2, 16)
    segments, positions = torch.zeros_like(words), torch.arange(16).expand(2, 16)
    with torch.autocast("cpu", torch.bfloat16, enabled=settings.get("mixed", False)):
        dtype = torch.bfloat16 if settings.get("mixed") else torch.float32
        hidden = model(words, positions, PackedRows(segments, dtype)).to(dtype)
        weight = model.embed_tokens.weight
        linear_cross_entropy(hidden.flatten(0, 1), weight, words.roll(-1).flatten()).backward()
    return {name: weight.grad.clone() for name, weight in model.adapter.trained.items()}


@pytest.mark.parametrize("kind", ["lora", "dora", "int8"])
def test_training_in_bfloat16_learns_the_same(kind: str) -> None:
    """With the kernels' loops, where they are built."""
    model, narrow = make("llama"), make("llama")
    for each, dtype in ((model, "float32"), (narrow, "bfloat16")):
        attach(each, KINDS[kind], seed=0, dtype=dtype)
        shake(each)
    if kind != "int8":
        assert narrow.layers[0].mlp.down_proj.weight.dtype == torch.bfloat16
    assert narrow.embed_tokens.weight.dtype == narrow.layers[0].mlp_norm.weight.dtype == torch.float32
    expected, found = gradients(model), gradients(narrow, mixed=True)
    for name, grad in found.items():
        assert grad.dtype == torch.float32
        assert torch.cosine_similarity(grad.flatten(), expected[name].flatten(), 0) > 0.99, name


@pytest.mark.parametrize("kind", ["lora", "dora", "int4-dora"])
def test_activations_may_be_computed_again(kind: str) -> None:
    from torch.utils.checkpoint import checkpoint

    model = make("llama")
    attach(model, KINDS[kind], seed=0)
    shake(model)
    expected = gradients(model)
    for block in [module for module in model.modules() if isinstance(module, Block)]:
        forward = block.forward
        block.forward = lambda *inputs, f=forward: checkpoint(f, *inputs, use_reentrant=False)
    for name, grad in gradients(model).items():
        torch.testing.assert_close(grad, expected[name])


def test_dropout_is_of_the_change_alone_and_in_training_alone() -> None:
    model = make("llama")
    attach(model, AdapterRecipe(rank=4, dropout=0.5), seed=0)
    with torch.no_grad():
        plain = read(model)
        torch.testing.assert_close(read(model.train()), plain)  # the change is 0
        shake(model)
        assert not torch.equal(read(model), read(model))
        assert torch.equal(read(model.eval()), read(model))
    layer = model.layers[0].mlp.down_proj
    assert isinstance(layer, LoRALinear)
    x = torch.randn(4000, 96)
    with torch.no_grad():
        dropped = layer.train()(x) - layer.eval()(x)
        change = layer(x) - torch.nn.functional.linear(x, layer.weight)
    assert dropped.abs().mean() > 0.1 * change.abs().mean() and dropped.mean(0).abs().max() < change.abs().max() / 4


def test_targets_that_cannot_be_had_are_refused() -> None:
    model = make("gpt2")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UsageError, match=r"gpt2 has q, k, v in one matrix: name all of them .* not q, v alone"):
        attach(model, AdapterRecipe(targets=("q", "v")), seed=0)
    with pytest.raises(UsageError, match="none of the matrices gate"):
        attach(model, AdapterRecipe(targets=("gate",)), seed=0)
    assert all(weight.requires_grad for weight in model.parameters())  # nothing was changed
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    assert isinstance(attach(model, AdapterRecipe(targets=("gate", "up")), seed=0), LoRA)
