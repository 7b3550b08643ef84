"""The LSTM's own directory: what is saved is what is read, and damage is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bimo.errors import CorruptModelError, ModelNotFoundError, UnsupportedModelError, UsageError
from bimo.formats.huggingface import load_model, read_model_config, save_directory
from bimo.formats.lstm import lstm_from_raw, lstm_to_raw
from bimo.models.config import LSTMConfig
from bimo.models.initial import init_weights
from bimo.models.recurrent import LSTMLanguageModel

CONFIG = LSTMConfig(vocab_size=30, hidden_size=16, num_layers=2, max_positions=77, dropout=0.25)


def make(config: LSTMConfig = CONFIG) -> LSTMLanguageModel:
    model = LSTMLanguageModel(config)
    init_weights(model, 1)
    return model.eval()


@pytest.mark.parametrize("tied", [True, False])
def test_it_survives_and_says_the_same(tied: bool, tmp_path: Path) -> None:
    model = make(LSTMConfig(vocab_size=30, hidden_size=16, tied_embeddings=tied))
    source = tmp_path / "source"
    source.mkdir()
    (source / "tokenizer.json").write_text('{"笔": 1}', encoding="utf-8")
    (source / "config.json").write_text(json.dumps({"eos_token_id": 2, "bos_token_id": 1}))
    save_directory(tmp_path / "saved", model.config, model.named_parameters(), source=source, max_shard_bytes=5000)
    assert len(list((tmp_path / "saved").glob("*.safetensors"))) > 1
    written = json.loads((tmp_path / "saved/config.json").read_text())
    assert written["model_type"] == "bimo_lstm" and written["eos_token_id"] == 2
    assert (tmp_path / "saved/tokenizer.json").is_file()
    read = load_model(tmp_path / "saved")
    assert isinstance(read, LSTMLanguageModel) and not read.training
    assert read.config == model.config == read_model_config(tmp_path / "saved")
    ids = torch.randint(30, (2, 9))
    assert torch.equal(read.logits(read(ids)), model.logits(model(ids)))
    assert load_model(tmp_path / "saved", torch.bfloat16).embed_tokens.weight.dtype == torch.bfloat16
    assert sum(parameter.numel() for parameter in model.parameters()) == model.config.num_parameters


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"model_type": "lstm"}, UnsupportedModelError, "model_type is 'lstm'"),
        ({"bidirectional": True}, UnsupportedModelError, "has no setting 'bidirectional'"),
        ({"hidden_size": None}, CorruptModelError, "hidden_size is missing"),
        ({"vocab_size": 3.5}, CorruptModelError, "vocab_size should be a whole number"),
        ({"num_layers": 0}, CorruptModelError, "num_layers should be a whole number"),
        ({"tied_embeddings": "是"}, CorruptModelError, "tied_embeddings should be true or false"),
        ({"dropout": 1.5}, CorruptModelError, "dropout should be a share"),
        ({"dropout": float("nan")}, CorruptModelError, "dropout should be"),
    ],
)
def test_hostile_settings(change: dict[str, Any], error: type[Exception], said: str) -> None:
    assert lstm_from_raw(lstm_to_raw(CONFIG)) == CONFIG
    with pytest.raises(error, match=said):
        lstm_from_raw(lstm_to_raw(CONFIG) | change)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda d: (d / "model.safetensors").write_bytes((d / "model.safetensors").read_bytes()[:-1]), "not a whole"),
        (lambda d: (d / "model.safetensors").unlink(), "has no model.safetensors"),
        (lambda d: rewrite(d, num_layers=3), r"lacks 4 of 13 tensors of this lstm model"),
        (lambda d: rewrite(d, num_layers=1), r"has 4 tensors that a lstm model"),
        (lambda d: rewrite(d, hidden_size=17), "config.json asks for"),
        (lambda d: (d / "config.json").write_text("{"), "not readable JSON"),
    ],
)
def test_damaged_directories(damage: Callable[[Path], None], said: str, tmp_path: Path) -> None:
    save_directory(tmp_path, CONFIG, make().named_parameters())
    damage(tmp_path)
    with pytest.raises(CorruptModelError, match=said):
        load_model(tmp_path)


def rewrite(directory: Path, **settings: Any) -> None:
    (directory / "config.json").write_text(json.dumps(lstm_to_raw(CONFIG) | settings))


def test_a_wrong_place_and_foreign_tensors_are_named(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError):
        load_model(tmp_path / "无")
    with pytest.raises(UsageError, match="not one of this model's 9"):
        save_directory(tmp_path / "new", CONFIG, [("lm_head.weight", torch.zeros(30, 16))])
    assert not (tmp_path / "new").exists()
