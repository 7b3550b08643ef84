"""Packed layers compute what the plain ones do, for every activation, number type and number of rows."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bimo.engine import packing
from bimo.engine.packing import PackedLinear, PackedMLP, PairedRMSNorm, can_pack, pack_linear_layers
from bimo.models.config import DecoderConfig
from bimo.models.decoder import Decoder
from bimo.models.layers import RMSNorm

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


class Counted(TorchDispatchMode):
    """How many of torch's operators run."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("shape", [(1, 1, 576), (1, 17, 9, 64), (1, 3, 16)])
def test_the_norm_of_a_pair_is_rms_norm(shape: tuple[int, ...]) -> None:
    """Within bfloat16's rounding of float64's, for rows of any size, zeros too; in fewer calls."""
    torch.manual_seed(1)
    norm = RMSNorm(shape[-1], 1e-5).bfloat16()
    with torch.inference_mode():
        norm.weight.normal_(1.0, 0.5)
        for size in (1.0, 1e-4, 3e4, 0.0):
            x = (torch.randn(shape) * size).bfloat16()
            x[..., 3] *= 40  # an outlier, as hidden states have
            exact = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight.double()
            with Counted() as plain:
                norm(x)
            with Counted() as paired:
                found = PairedRMSNorm(norm)(x)
            assert found.shape == x.shape and found.dtype == x.dtype
            assert ((found.double() - exact).abs() <= 2**-8 * exact.abs() + 1e-3 * exact.abs().max()).all(), size
            assert paired.count < plain.count


def test_without_the_kernels_norms_are_paired(monkeypatch: pytest.MonkeyPatch) -> None:
    if not can_pack(torch.bfloat16, torch.device("cpu")):
        pytest.skip("this processor has no packed bfloat16")
    monkeypatch.setattr(packing, "load_kernels", lambda: None)
    torch.manual_seed(2)
    model = Decoder(dataclasses.replace(CONFIG, qk_norm=True)).bfloat16()
    ids = torch.randint(0, 96, (1, 33))
    with torch.inference_mode():
        plain = model.logits(model(ids))
        pack_linear_layers(model)
        assert RMSNorm not in {type(module) for module in model.modules()}
        found = model.logits(model(ids))
    assert (found - plain).float().abs().max() <= 0.06 * plain.float().abs().max()
