"""What a model's weights are known by; the record of its files is tested with the downloads (test_hub)."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from bimo.formats.integrity import weights_mark


@pytest.mark.parametrize("part", ["embed_tokens", "layers.0.self_attn.q_proj", "layers.1.self_attn.v_proj", "norm"])
def test_any_training_changes_it_and_a_copy_does_not(tiny_model_dir: Path, tmp_path: Path, part: str) -> None:
    copy = shutil.copytree(tiny_model_dir, tmp_path / "别处")
    assert weights_mark(copy) == weights_mark(tiny_model_dir) != ""
    file = copy / "model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if part in name)
    tensors[name] = tensors[name] + 0.25
    save_file(tensors, file, metadata={"format": "pt"})
    assert weights_mark(copy) != weights_mark(tiny_model_dir)


def test_without_weights_there_is_none(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert weights_mark(tmp_path) == ""
    (tmp_path / "model.safetensors").touch()
    assert weights_mark(tmp_path) != ""
