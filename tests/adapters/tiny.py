"""Small random models of every kind, and adapters that are no longer at their first values."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bimo.models.config import DecoderConfig, EncoderConfig, Seq2SeqConfig
from bimo.training.build import build_model

SIZES: dict[str, Any] = {"vocab_size": 97, "hidden_size": 64, "num_layers": 2, "num_heads": 4,
                         "intermediate_size": 96, "max_positions": 64}  # fmt: skip
CONFIGS: dict[str, Any] = {
    "llama": DecoderConfig(family="llama", **SIZES, num_kv_heads=2, head_dim=16),
    "gpt2": DecoderConfig(
        family="gpt2", **SIZES, num_kv_heads=4, head_dim=16, norm="layer", position="learned", gated_mlp=False,
        activation="gelu_tanh", qkv_bias=True, attention_out_bias=True, mlp_bias=True,
    ),
    "bert": EncoderConfig(**SIZES, pooler=True, labels=("垃圾", "ham"), dropout=0.0, attention_dropout=0.0),
    "t5": Seq2SeqConfig.of_family(
        "t5", **{name: size for name, size in SIZES.items() if name != "num_layers"}, head_dim=16,
        num_encoder_layers=2, num_decoder_layers=1, decoder_start_token_id=0, pad_token_id=0, eos_token_id=1,
        dropout=0.0, attention_dropout=0.0, activation_dropout=0.0,
    ),
}  # fmt: skip


def make(name: str) -> Any:
    """A model of CONFIGS; the same weights every time, large enough that a change shows."""
    model = build_model(CONFIGS[name], seed=1)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.mul_(4.0)
    return model.eval()


def ids(num_rows: int = 2, num_tokens: int = 12, seed: int = 1) -> Tensor:
    return torch.randint(1, 97, (num_rows, num_tokens), generator=torch.Generator().manual_seed(seed))


def read(model: Any) -> Tensor:
    """What the model makes of `ids`: hidden states."""
    return model(ids(), ids(seed=2)) if hasattr(model, "encode") else model(ids())


def shake(model: Any, spread: float = 0.1) -> None:
    """Move all trained weights from their first values."""
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for weight in model.adapter.trained.values():
            weight.add_(torch.empty(weight.shape).normal_(0, spread, generator=generator))
