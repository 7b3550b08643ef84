"""What an adapter's directory holds, and what is refused of one that somebody else wrote or a disk tore.
With PEFT itself: tests/parity/test_peft.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from bimo.adapters.kinds import attach, load_adapter
from bimo.errors import BimoError, CorruptModelError, ModelError, UnsupportedModelError, UsageError
from bimo.formats.merging import lora_matrices, merged_weights
from bimo.formats.peft import is_adapter, read_adapter, write_adapter
from bimo.formats.peft_names import places, shortest_ends
from bimo.models.config import LSTMConfig
from bimo.recipe import AdapterRecipe
from tests.adapters.tiny import CONFIGS, make, read, shake

KINDS = {
    "lora": AdapterRecipe(rank=3, alpha=5.5, dropout=0.25, targets=("q", "v", "o", "down")),
    "rslora": AdapterRecipe(rank=3, rslora=True),
    "dora": AdapterRecipe(rank=3, dora=True),
    "adalora": AdapterRecipe(kind="adalora", rank=2, initial_rank=3),
    "bottleneck": AdapterRecipe(kind="bottleneck", width=6),
    "prefix": AdapterRecipe(kind="prefix", tokens=3),
}


def written(folder: Path, name: str = "llama", kind: str = "lora", **more: Any) -> Any:
    """A model with an adapter that was written to `folder`."""
    model = make(name)
    adapter = attach(model, KINDS[kind], seed=0, base="smollm2")
    shake(model)
    write_adapter(folder, model.config, KINDS[kind], adapter.to_file(adapter.trained), base="smollm2", **more)
    return model


def alter(folder: Path, **settings: Any) -> Path:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))
    return folder


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["llama", "bert"])
@torch.no_grad()
def test_what_is_written_is_read_again(tmp_path: Path, name: str, kind: str) -> None:
    model = written(tmp_path / "适配器", name, kind)
    file = read_adapter(tmp_path / "适配器")
    assert file.base == "smollm2" and file.kind == KINDS[kind].kind
    assert file.labels == (("垃圾", "ham") if name == "bert" else ())
    recipe, _ = file.read(model.config)
    same = {"kind", "rank", "initial_rank", "rslora", "dora", "width", "tokens"} & set(KINDS[kind].model_fields_set)
    assert recipe.model_dump(include=same) == KINDS[kind].model_dump(include=same)
    again = make(name)
    load_adapter(again, file)
    assert torch.equal(read(again), read(model))
    if name == "bert":
        assert torch.equal(again.class_logits(read(again)), model.class_logits(read(model)))


def test_it_appears_at_once_with_all_it_needs_to_speak(tmp_path: Path, tiny_model_dir: Path) -> None:
    folder = tmp_path / "a"
    model = written(folder, source=tiny_model_dir, lineage={"mark": "m", "名": "值", "base": "ignored"})
    assert is_adapter(folder) and not is_adapter(tiny_model_dir)
    names = {path.name for path in folder.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "bimo.json", "tokenizer.json"} <= names
    assert "config.json" not in names and "model.safetensors" not in names
    about = json.loads((folder / "bimo.json").read_text(encoding="utf-8"))
    assert about["mark"] == "m" and about["名"] == "值" and about["base"] == "smollm2"
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    tensors = model.adapter.to_file(model.adapter.trained)
    with pytest.raises(KeyError):  # in the middle of writing
        write_adapter(folder, model.config, KINDS["prefix"], tensors, base="x")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    write_adapter(folder, model.config, KINDS["lora"], tensors, base="other")  # over an older one
    assert read_adapter(folder).base == "other"
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="exists and is not a model directory"):
        write_adapter(tmp_path / "full", model.config, KINDS["lora"], tensors, base="x")
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


REFUSED: list[tuple[dict[str, Any], type[BimoError], str]] = [
    ({"peft_type": "LOHA"}, UnsupportedModelError, "peft_type is LOHA, bimo knows LORA, ADALORA, PREFIX_TUNING"),
    ({"peft_type": 7}, CorruptModelError, "peft_type should be a string"),
    ({"bias": "all"}, UnsupportedModelError, "bias is 'all'"),
    ({"layers_to_transform": [0]}, UnsupportedModelError, r"layers_to_transform is \[0\]"),
    ({"lora_bias": True}, UnsupportedModelError, "lora_bias is True"),
    ({"trainable_token_indices": [5]}, UnsupportedModelError, "trainable_token_indices"),
    ({"来自未来": 1}, UnsupportedModelError, "来自未来 is 1, which bimo does not compute"),
    ({"init_lora_weights": "pissa_niter_4"}, UnsupportedModelError, "changes the base's weights as well"),
    ({"init_lora_weights": ["x"]}, UnsupportedModelError, "changes the base's weights as well"),
    ({"r": 0}, CorruptModelError, "r should be a whole number from 1"),
    ({"r": "8"}, CorruptModelError, "r should be a whole number"),
    ({"lora_alpha": -1}, CorruptModelError, "lora_alpha should be a number above 0"),
    ({"lora_dropout": 3}, CorruptModelError, "lora_dropout should be a share"),
    ({"use_dora": True}, CorruptModelError, "lacks .*q_proj.lora_magnitude_vector: it is incomplete"),
    ({"alpha_pattern": [1]}, CorruptModelError, "alpha_pattern: expected a JSON object"),
    ({"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 3}, CorruptModelError, "is a prefix for smollm2"),
    ({"peft_type": "ADALORA"}, CorruptModelError, "an adapter for smollm2 and changes layers.0|an adapter for smollm2"),
    ({"peft_type": "BIMO_BOTTLENECK"}, CorruptModelError, "width is missing"),
]


@pytest.mark.parametrize(("settings", "kind", "message"), REFUSED, ids=lambda value: str(value)[:40])
def test_settings_that_change_what_is_computed_are_refused(
    tmp_path: Path, settings: dict[str, Any], kind: type[BimoError], message: str
) -> None:
    written(tmp_path)
    alter(tmp_path, **settings)
    with pytest.raises(kind, match=message):
        read_adapter(tmp_path).read(CONFIGS["llama"])


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"\xff\xfe", b'{"peft_type": NaN}', b'{"peft_type": null}', b"[" * 9000]
)
@pytest.mark.parametrize("name", ["adapter_config.json", "bimo.json"])
def test_a_broken_description_is_named(tmp_path: Path, content: bytes, name: str) -> None:
    written(tmp_path)
    (tmp_path / name).write_bytes(content)
    if name == "bimo.json" and content.endswith(b"null}"):
        return  # nothing of it is needed
    with pytest.raises(CorruptModelError, match=name):
        read_adapter(tmp_path)


def test_weights_that_are_not_whole_are_named(tmp_path: Path) -> None:
    written(tmp_path)
    file, config = tmp_path / "adapter_model.safetensors", CONFIGS["llama"]
    content, tensors = file.read_bytes(), load_file(file)
    for cut in (0, 5, 100, len(content) - 1):
        file.write_bytes(content[:cut])
        with pytest.raises(CorruptModelError, match=rf"\({cut} bytes\) is not a whole safetensors file"):
            read_adapter(tmp_path).read(config)
    name = next(name for name in tensors if "q_proj.lora_A" in name)
    for value in (float("nan"), float("inf")):
        save_file({**tensors, name: torch.full_like(tensors[name], value)}, file)
        with pytest.raises(CorruptModelError, match=r"q_proj.lora_A.weight has values that are not numbers"):
            read_adapter(tmp_path).read(config)
    save_file({key: tensor for key, tensor in tensors.items() if key != name}, file)
    with pytest.raises(CorruptModelError, match=r"lacks .*q_proj.lora_A"):
        read_adapter(tmp_path).read(config)
    save_file({key: tensor for key, tensor in tensors.items() if "layers.1.self_attn.q_proj" not in key}, file)
    with pytest.raises(UnsupportedModelError, match=r"changes q in some layers and not in model.layers.1"):
        read_adapter(tmp_path).read(config)
    save_file({**tensors, name: torch.tensor(1.0)}, file)
    with pytest.raises(CorruptModelError, match=r"has the shape \(\), this model needs"):
        read_adapter(tmp_path).read(config)
    save_file({**tensors, "base_model.model.lm_head.weight": torch.ones(2, 2)}, file)
    with pytest.raises(UnsupportedModelError, match=r"1 tensors that bimo has no place for .*lm_head"):
        read_adapter(tmp_path).read(config)
    save_file({name.replace("q_proj", "dense"): tensor for name, tensor in tensors.items()}, file)
    with pytest.raises(CorruptModelError, match=r"an adapter for smollm2 and changes .*dense"):
        read_adapter(tmp_path).read(config)
    file.unlink()
    with pytest.raises(CorruptModelError, match="is missing"):
        read_adapter(tmp_path).read(config)
    (tmp_path / "adapter_model.bin").write_bytes(b"PK")
    with pytest.raises(UnsupportedModelError, match="is a pickle"):
        read_adapter(tmp_path).read(config)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("other", ["gpt2", "bert", "t5", "wider", "deeper"])
def test_an_adapter_for_another_base_says_for_which(tmp_path: Path, kind: str, other: str) -> None:
    import dataclasses

    from bimo.training.build import build_model

    written(tmp_path, "llama", kind)
    changes: dict[str, dict[str, Any]] = {"wider": {"hidden_size": 128, "head_dim": 32}, "deeper": {"num_layers": 3}}
    model = build_model(dataclasses.replace(CONFIGS["llama"], **changes[other]), 0) if other in changes else make(other)
    with pytest.raises(ModelError, match=r"smollm2|encoder-decoder"):
        load_adapter(model, read_adapter(tmp_path))


def test_ranks_that_do_not_belong_to_the_weights_are_refused(tmp_path: Path) -> None:
    written(tmp_path, kind="adalora")
    name = "model.layers.0.self_attn.q_proj.lora_E"
    for pattern in ([True], [True, True, False], "yes", [1, 2, 3], ["x"] * 3, {}):
        alter(tmp_path, rank_pattern={name: pattern})
        with pytest.raises(CorruptModelError, match=r"rank_pattern|do not belong together"):
            read_adapter(tmp_path).read(CONFIGS["llama"])
    alter(tmp_path, rank_pattern={name: [True] * 3})
    read_adapter(tmp_path).read(CONFIGS["llama"])


def test_an_lstm_is_no_base(tmp_path: Path) -> None:
    written(tmp_path)
    config = LSTMConfig(vocab_size=50, hidden_size=16, num_layers=1, max_positions=32)
    with pytest.raises(UnsupportedModelError, match="not an LSTM"):
        list(merged_weights([], config, tmp_path))


# --- names, and a change as matrices -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_ends_mean_the_chosen_modules_and_no_other(name: str) -> None:
    config = CONFIGS[name]
    every = {place.module for place in places(config)}
    kinds = sorted({place.kind for place in places(config)})
    for kind in kinds:
        chosen = {place.module for place in places(config) if place.kind == kind}
        ends = shortest_ends(chosen, config)
        assert {
            module for module in every if any(module == end or module.endswith(f".{end}") for end in ends)
        } == chosen
    everything = shortest_ends(every, config)
    assert len(everything) <= 7 and "dense" not in everything
    if name == "llama":
        assert everything == ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]


@pytest.mark.parametrize("kind", ["lora", "rslora", "adalora"])
@torch.no_grad()
def test_matrices_beside_the_base_are_the_adapter(tmp_path: Path, kind: str) -> None:
    model = written(tmp_path, kind=kind)
    matrices = lora_matrices(tmp_path, model.config)
    plain = make("llama")
    for name, of_matrix in matrices.items():
        weight = plain.get_submodule(name).weight
        for start, end, a, b in of_matrix:
            weight[start:end] += torch.from_numpy(b @ a)
            assert a.dtype == b.dtype == "float32"
    torch.testing.assert_close(read(plain), read(model), rtol=1e-4, atol=1e-4)
    streamed = dict(merged_weights(make("llama").named_parameters(), model.config, tmp_path))
    for name, weight in plain.named_parameters():
        torch.testing.assert_close(streamed[name], weight, rtol=1e-4, atol=1e-5)
    assert "layers.0.attention.qkv_proj" in matrices and ("layers.0.mlp.gate_up_proj" in matrices) == (kind != "lora")


@torch.no_grad()
def test_a_base_in_bits_and_a_head_are_merged_too(tmp_path: Path) -> None:
    from bimo.quant.weights import quantise8

    model = written(tmp_path / "a", kind="dora")
    base = [(name, quantise8(w) if w.ndim == 2 else w) for name, w in make("llama").named_parameters()]
    assert all(w.dtype == torch.float32 for _, w in merged_weights(base, model.config, tmp_path / "a"))
    bert = written(tmp_path / "b", "bert", "lora")
    merged = dict(merged_weights(make("bert").named_parameters(), bert.config, tmp_path / "b"))
    assert torch.equal(merged["classifier.weight"], bert.classifier.weight)
    half = [(name, weight.bfloat16()) for name, weight in make("bert").named_parameters()]
    types = {name: weight.dtype for name, weight in merged_weights(half, bert.config, tmp_path / "b")}
    assert types["layers.0.mlp.down_proj.weight"] == torch.float32
    assert types["embed_tokens.weight"] == types["layers.0.mlp.up_proj.weight"] == torch.bfloat16


def test_what_is_more_than_a_change_of_low_rank_is_refused(tmp_path: Path) -> None:
    for kind in ("prefix", "bottleneck"):
        written(tmp_path / kind, kind=kind)
        for work in (
            lambda path: lora_matrices(path, CONFIGS["llama"]),
            lambda p: merged_weights([], CONFIGS["llama"], p),
        ):
            with pytest.raises(UsageError, match=f"is a {kind} adapter, which is no change of matrices"):
                work(tmp_path / kind)
    written(tmp_path / "dora", kind="dora")
    written(tmp_path / "bert", "bert")
    for name in ("dora", "bert"):
        with pytest.raises(UsageError, match="more than a change of low rank"):
            lora_matrices(tmp_path / name, CONFIGS["llama" if name == "dora" else "bert"])
