"""The LSTM's directory: bimo's own `config.json`, and tensors under the names they have in the model.

    config = lstm_from_raw(json.loads(text), where="config.json")
    raw = lstm_to_raw(config)                                     # {"model_type": "bimo_lstm", ...}

transformers has no LSTM language model, so there is no layout to follow; the files are the same ones, config.json and
safetensors, and whoever reads them needs only torch.nn.LSTM.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from bimo.errors import UnsupportedModelError
from bimo.formats.fields import Fields
from bimo.formats.maps import Entry, Piece
from bimo.models.config import LSTMConfig

__all__ = ["LSTM_TYPE", "lstm_from_raw", "lstm_plan", "lstm_to_raw"]

LSTM_TYPE = "bimo_lstm"
KNOWN = {"model_type", "architectures", "torch_dtype", "dtype", "bos_token_id", "eos_token_id", "pad_token_id"}


def lstm_from_raw(raw: Any, *, where: str = "config.json") -> LSTMConfig:
    """A parsed `config.json` to an LSTMConfig.

    Raises UnsupportedModelError for another model_type or a setting this version does not know, and CorruptModelError
    for missing fields and impossible values.
    """
    fields = Fields(raw, where)
    if (kind := fields.text("model_type")) != LSTM_TYPE:
        raise UnsupportedModelError(f"{where}: model_type is {kind!r}, an LSTM's is {LSTM_TYPE}")
    names = {item.name for item in dataclasses.fields(LSTMConfig)}
    if unknown := sorted(map(str, set(fields.raw) - names - KNOWN)):
        raise UnsupportedModelError(
            f"{where}: an LSTM has no setting {unknown[0][:60]!r}, it has {', '.join(sorted(names))}"
        )
    return LSTMConfig(
        vocab_size=fields.integer("vocab_size"),
        hidden_size=fields.integer("hidden_size"),
        num_layers=fields.integer("num_layers", high=10_000),
        max_positions=fields.integer("max_positions"),
        tied_embeddings=fields.flag("tied_embeddings"),
        dropout=fields.share("dropout"),
    )


def lstm_to_raw(config: LSTMConfig) -> dict[str, Any]:
    """An LSTMConfig to its `config.json`."""
    return {"model_type": LSTM_TYPE, "architectures": ["LSTMLanguageModel"], **config.to_dict()}


def lstm_plan(config: LSTMConfig) -> dict[str, Entry]:
    """Every parameter, which is one tensor of the file under the same name (as `maps.tensor_plan`)."""
    from bimo.models.empty import empty_model

    shapes = {name: tuple(parameter.shape) for name, parameter in empty_model(config).named_parameters()}
    return {name: Entry(shape, (Piece(name, shape),)) for name, shape in shapes.items()}
