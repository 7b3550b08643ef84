"""A prefix is what a text would be read with behind other words; it stands before every text of a packed row."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bimo.adapters.kinds import attach
from bimo.adapters.prefix import Prefix
from bimo.errors import UsageError
from bimo.models.packed import PackedRows
from bimo.recipe import AdapterRecipe
from tests.adapters.tiny import ids, make, read, shake


def adapted(name: str, tokens: int = 4, seed: int = 0) -> tuple[torch.nn.Module, Prefix]:
    model = make(name)
    adapter = attach(model, AdapterRecipe(kind="prefix", tokens=tokens), seed=seed)
    assert isinstance(adapter, Prefix)
    return model, adapter


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@torch.no_grad()
def test_at_first_it_is_some_words_before_the_text(name: str) -> None:
    model, adapter = adapted(name, seed=7)
    words = torch.randint(97, (1, 4), generator=torch.Generator().manual_seed(7))
    text = ids(1, 9)
    expected = make(name)(torch.cat((words, text), dim=1))[:, 4:]
    torch.testing.assert_close(model(text), expected, rtol=1e-4, atol=1e-4)
    shapes = [tuple(weight.shape) for each, weight in adapter.trained.items() if each.endswith("prefix_keys")]
    assert shapes == [(4, 2 if name == "llama" else 4, 16)] * 2


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_all_of_it_learns_and_nothing_else(name: str) -> None:
    model, adapter = adapted(name)
    shake(model)
    hidden = read(model)
    (model.class_logits(hidden) if name == "bert" else hidden).square().sum().backward()
    got = {each for each, weight in model.named_parameters() if weight.grad is not None and weight.grad.any()}
    assert got == set(adapter.trained)
    assert len([each for each in got if "prefix_" in each]) == 4


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@torch.no_grad()
def test_every_text_of_a_row_sees_it(name: str) -> None:
    model, _ = adapted(name)
    shake(model)
    words = ids(1, 12)
    packed = PackedRows(torch.tensor([[0] * 5 + [1] * 7]), torch.float32)
    found = model(words, torch.tensor([[*range(5), *range(7)]]), packed)
    alone = torch.cat([model(words[:, :5]), model(words[:, 5:])], dim=1)
    torch.testing.assert_close(found, alone, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_padding_is_not_seen_the_prefix_is() -> None:
    model, _ = adapted("bert")
    shake(model)
    text = ids(1, 6)
    mask = torch.tensor([[1] * 6 + [0] * 3])
    found = model(torch.cat((text, ids(1, 3, seed=5)), dim=1), mask)[:, :6]
    torch.testing.assert_close(found, model(text), rtol=1e-4, atol=1e-4)
    assert (found - make("bert")(text)).abs().max() > 0.01


def test_in_bfloat16_it_learns_the_same() -> None:
    slopes = []
    for mixed in (False, True):
        model = make("llama")
        adapter = attach(
            model, AdapterRecipe(kind="prefix", tokens=4), seed=0, dtype="bfloat16" if mixed else "float32"
        )
        shake(model)
        segments = torch.zeros(2, 12, dtype=torch.int64)
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            dtype = torch.bfloat16 if mixed else torch.float32
            hidden = model(ids(), torch.arange(12).expand(2, 12), PackedRows(segments, dtype))
        hidden.float().square().sum().backward()
        slopes.append(torch.cat([weight.grad.flatten() for weight in adapter.trained.values()]))
    assert torch.cosine_similarity(slopes[0], slopes[1], 0) > 0.99


class Cache:
    """An Attend that nobody knows."""

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, scale: float, window: int | None) -> Tensor:
        return q


def test_what_cannot_be_done_is_said() -> None:
    model, adapter = adapted("gpt2")
    with pytest.raises(UsageError, match="a text of 61 tokens behind a prefix of 4 is longer than this model reads"):
        model(ids(1, 61))
    with pytest.raises(UsageError, match="Cache has no place for it"):
        model(ids(), None, Cache())
    with pytest.raises(UsageError, match="a prefix adapter cannot be merged"):
        adapter.merge()
    with pytest.raises(UsageError, match="a prefix is for decoders and encoders"):
        adapted("t5")
    with pytest.raises(UsageError, match="a prefix of 64 tokens leaves no room"):
        adapted("llama", tokens=64)
    bert, _ = adapted("bert")
    with pytest.raises(UsageError, match="has 61 tokens, this encoder reads at most 60"):
        bert(ids(1, 61))
