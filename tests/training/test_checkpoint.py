"""What a checkpoint of one process holds, and what it refuses. Several processes: test_distributed.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from bimo.adapters.adalora import AdaLoRA
from bimo.adapters.kinds import adapter_of, attach, load_adapter
from bimo.data.loader import PackedLoader
from bimo.errors import CorruptModelError, DataError
from bimo.formats.peft import read_adapter
from bimo.objectives.causal import causal_loss
from bimo.recipe import AdapterRecipe
from bimo.training import checkpoint
from bimo.training.checkpoint import (
    checkpoints,
    latest_checkpoint,
    load_checkpoint,
    remove_old,
    save_checkpoint,
    save_model,
)
from bimo.training.loop import TrainingState, train
from bimo.training.optim import make_optimizers
from bimo.training.session import Texts
from tests.training.tiny import build, make_recipe

ABOUT = {"best": 1.25, "名": "检查点"}


def begin(texts: Texts, **training: Any) -> tuple[TrainingState, Any]:
    recipe = make_recipe(ema=0.9, **training)
    model = build(recipe, texts)
    loader = PackedLoader([texts.train["en"], texts.train["zh"]], length=32, seed=1)
    return TrainingState(model, make_optimizers(model, recipe.training), loader), recipe.training


def steps(state: TrainingState, recipe: Any, until: int) -> list[float]:
    return [info.loss for info in train(state, causal_loss, recipe, stop_at=until)]


def saved(texts: Texts, folder: Path, **training: Any) -> tuple[TrainingState, Any, Path]:
    state, recipe = begin(texts, **training)
    steps(state, recipe, 3)
    return state, recipe, save_checkpoint(state, folder, source=texts.tokenizer.directory, about=ABOUT)


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "sgd"])
def test_what_was_read_goes_on_to_the_last_bit(
    texts: Texts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optimizer: str
) -> None:
    monkeypatch.setattr(checkpoint, "FILE_BYTES", 200_000)  # several files
    state, recipe, path = saved(texts, tmp_path, optimizer=optimizer)
    assert len(list(path.glob("optimizer/*.safetensors"))) > 1
    expected = steps(state, recipe, 6)
    again, _ = begin(texts, optimizer=optimizer)
    assert load_checkpoint(path, again) == ABOUT and again.step == 3
    assert steps(again, recipe, 6) == expected  # also its dropout, by the random numbers' state
    for name, value in state.ema.items():
        assert torch.equal(again.ema[name], value)
    for mine, theirs in zip(again.optimizers, state.optimizers, strict=True):
        kept, wanted = mine.state_dict(), theirs.state_dict()
        torch.testing.assert_close(kept["state"], wanted["state"], rtol=0, atol=0)
        assert kept["param_groups"] == wanted["param_groups"]


def test_nothing_is_pickled(texts: Texts, tmp_path: Path) -> None:
    _, _, path = saved(texts, tmp_path)
    for file in path.rglob("*"):
        assert file.is_dir() or file.read_bytes()[:2] not in (b"PK", b"\x80\x02", b"\x80\x04")
        assert file.is_dir() or file.suffix in (".safetensors", ".json", ".jinja")


def test_another_optimizer_is_refused(texts: Texts, tmp_path: Path) -> None:
    _, _, path = saved(texts, tmp_path)
    other, _ = begin(texts, optimizer="sgd")
    before = {name: weight.detach().clone() for name, weight in other.model.named_parameters()}
    with pytest.raises(DataError, match=r"another optimizer than the recipe's \(\['AdamW'\], not \['SGD'\]\)"):
        load_checkpoint(path, other)
    assert all(torch.equal(weight, before[name]) for name, weight in other.model.named_parameters())


@pytest.mark.parametrize("harm", ["missing", "cut", "altered"])
def test_a_damaged_part_gives_way_to_the_one_before(texts: Texts, tmp_path: Path, harm: str) -> None:
    state, recipe, older = saved(texts, tmp_path)
    steps(state, recipe, 5)
    newer = save_checkpoint(state, tmp_path, source=texts.tokenizer.directory, about={})
    (part,) = newer.glob("optimizer/*.safetensors")
    content = part.read_bytes()
    if harm == "missing":
        part.unlink()
    else:
        part.write_bytes(content[:-100] if harm == "cut" else content[:-1] + bytes([content[-1] ^ 1]))
    said: list[str] = []
    assert latest_checkpoint(tmp_path, said.append) == older
    assert len(said) == 1 and part.name in said[0] and "step-00000005 is damaged" in said[0]


def test_what_cannot_be_written_leaves_the_others(texts: Texts, tmp_path: Path) -> None:
    state, recipe, older = saved(texts, tmp_path)
    steps(state, recipe, 4)
    partial = tmp_path / ".step-00000004.partial"
    partial.write_text("in the way")  # a name that is no folder
    with pytest.raises(DataError, match="step-00000004 could not be written"):
        save_checkpoint(state, tmp_path, source=texts.tokenizer.directory, about={})
    assert latest_checkpoint(tmp_path, print) == older and checkpoints(tmp_path) == [older]


def test_old_ones_and_torn_ones_are_removed(texts: Texts, tmp_path: Path) -> None:
    state, recipe, _ = saved(texts, tmp_path)
    for step in (4, 5):
        steps(state, recipe, step)
        save_checkpoint(state, tmp_path, source=texts.tokenizer.directory, about={})
    (tmp_path / ".step-00000009.partial" / "optimizer").mkdir(parents=True)
    (tmp_path / "..step-00000009.partial.x1.partial").mkdir()
    remove_old(tmp_path, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000004", "step-00000005"]
    assert json.loads((tmp_path / "step-00000005" / "training.json").read_text())["step"] == 5


# --- adapters -----------------------------------------------------------------------------------------------------

ADAPTERS = {
    "lora": AdapterRecipe(rank=4, alpha=8, dropout=0.1),
    "dora": AdapterRecipe(rank=4, dora=True, targets=("q", "v", "down")),
    "qlora": AdapterRecipe(rank=4, quant="int4"),
    "adalora": AdapterRecipe(kind="adalora", rank=2),
    "bottleneck": AdapterRecipe(kind="bottleneck", width=8),
    "prefix": AdapterRecipe(kind="prefix", tokens=3),
}


def adapted(texts: Texts, kind: str, base: str = "底座") -> tuple[TrainingState, Any]:
    recipe = make_recipe(ema=0.9, steps=12, learning_rate=0.01)
    model = build(recipe, texts)
    attach(model, ADAPTERS[kind], seed=5, base=base)
    loader = PackedLoader([texts.train["en"], texts.train["zh"]], length=32, seed=1)
    return TrainingState(model, make_optimizers(model, recipe.training), loader), recipe.training


def go_on(state: TrainingState, recipe: Any, until: int) -> list[float]:
    adapter = adapter_of(state.model)
    return [info.loss for info in train(state, causal_loss, recipe, stop_at=until, regulariser=adapter)]


@pytest.mark.parametrize("kind", ADAPTERS)
def test_an_adapter_goes_on_to_the_last_bit(texts: Texts, tmp_path: Path, kind: str) -> None:
    state, recipe = adapted(texts, kind)
    before = {name: weight.detach().clone() for name, weight in state.model.named_parameters()}
    start = {name: before[name] for name in adapter_of(state.model).trained}  # type: ignore[union-attr]
    go_on(state, recipe, 5)
    path = save_checkpoint(state, tmp_path, source=texts.tokenizer.directory, about=ABOUT)
    assert (path / "adapter_config.json").is_file() and not (path / "model.safetensors").exists()
    assert set(state.ema) == set(start)
    expected = go_on(state, recipe, 12)
    assert all(not torch.equal(state.model.get_parameter(name), value) for name, value in start.items())
    again, _ = adapted(texts, kind)
    assert load_checkpoint(path, again) == ABOUT
    assert go_on(again, recipe, 12) == expected
    for name, weight in again.model.named_parameters():
        assert torch.equal(weight, state.model.get_parameter(name)), name
        assert weight.requires_grad or torch.equal(weight, before[name]), name
    for name, value in state.ema.items():
        assert torch.equal(again.ema[name], value)
    one, other = (adapter_of(each.model) for each in (state, again))
    if isinstance(one, AdaLoRA) and isinstance(other, AdaLoRA):
        assert 0 < sum(int(layer.kept.sum()) for layer in one.ranked.values()) == 2 * 14  # of 3 * 14
        for name, layer in one.ranked.items():
            assert torch.equal(layer.kept, other.ranked[name].kept)


@pytest.mark.parametrize("kind", ["lora", "adalora", "bottleneck", "prefix"])
def test_the_result_of_an_adapter_is_its_averaged_weights(texts: Texts, tmp_path: Path, kind: str) -> None:
    state, recipe = adapted(texts, kind)
    go_on(state, recipe, 12)
    save_model(state, tmp_path / "model", source=texts.tokenizer.directory, lineage={"mark": "m", "steps": 12})
    assert (tmp_path / "model" / "tokenizer.json").is_file()
    about = json.loads((tmp_path / "model" / "bimo.json").read_text(encoding="utf-8"))
    assert about["mark"] == "m" and about["base"] == "底座"
    model = build(make_recipe(), texts)
    load_adapter(model, read_adapter(tmp_path / "model"))
    with torch.no_grad():
        for name, value in state.ema.items():
            state.model.get_parameter(name).copy_(value)
        if isinstance(adapter := adapter_of(state.model), AdaLoRA):
            for layer in adapter.ranked.values():
                layer.lora_e.mul_(layer.kept[:, None])  # an average forgets slowly that a rank was pruned, a file not
        ids = torch.arange(20)[None]
        torch.testing.assert_close(model.eval()(ids), state.model.eval()(ids))


def test_a_checkpoint_of_another_adapter_is_refused(texts: Texts, tmp_path: Path) -> None:
    state, recipe = adapted(texts, "lora")
    go_on(state, recipe, 2)
    path = save_checkpoint(state, tmp_path, source=texts.tokenizer.directory, about={})
    _, _, whole = saved(texts, tmp_path / "whole")
    for other in (adapted(texts, "dora")[0], adapted(texts, "lora", base="other")[0], begin(texts)[0]):
        with pytest.raises(DataError, match="of another model than the recipe describes"):
            load_checkpoint(path, other)
    with pytest.raises(DataError, match="of another model than the recipe describes"):
        load_checkpoint(whole, state)
    content = (path / "adapter_model.safetensors").read_bytes()
    (path / "adapter_model.safetensors").write_bytes(content[:-50])
    with pytest.raises(CorruptModelError, match="not a whole safetensors file"):
        load_checkpoint(path, state)
