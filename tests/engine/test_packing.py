"""Packed layers compute what the plain ones do, for every activation, number type and number of rows."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from bimo.engine.packing import PackedLinear, PackedMLP, can_pack, pack_linear_layers
from bimo.models.config import DecoderConfig
from bimo.models.decoder import Decoder

CONFIG = DecoderConfig(
    family="llama",
    vocab_size=96,
    hidden_size=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=12,
    intermediate_size=80,
    max_positions=64,
)
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 0.03}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "relu"])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("rows", [1, 5, 130])
def test_packed_model_equals_the_plain_one(dtype, activation, gated, rows) -> None:
    if not can_pack(dtype, torch.device("cpu")):
        pytest.skip(f"this processor has no packed {dtype}")
    torch.manual_seed(0)
    config = dataclasses.replace(CONFIG, activation=activation, gated_mlp=gated, mlp_bias=True, qkv_bias=True)
    model = Decoder(config).to(dtype)
    ids = torch.randint(0, 96, (1, min(rows, 64)))
    with torch.inference_mode():
        x = torch.randn(rows, 48).to(dtype)
        plain_mlp, plain = model.layers[0].mlp(x), model.logits(model(ids))
        pack_linear_layers(model)
        kinds = {type(module) for module in model.modules()}
        assert PackedMLP in kinds and PackedLinear in kinds and torch.nn.Linear not in kinds
        scale = plain_mlp.float().abs().max()
        assert (model.layers[0].mlp(x) - plain_mlp).float().abs().max() <= TOLERANCE[dtype] * max(scale, 1)
        packed = model.logits(model(ids))
    assert (packed - plain).float().abs().max() <= TOLERANCE[dtype] * plain.float().abs().max() * 2


def test_types_without_packed_products_stay_plain() -> None:
    assert not can_pack(torch.float16, torch.device("cpu"))
    model = Decoder(CONFIG).half()
    pack_linear_layers(model)
    assert isinstance(model.layers[0].attention.qkv_proj, torch.nn.Linear)
