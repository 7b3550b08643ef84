"""The C++ loops against plain torch, and the engine with and without them."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import import_module

import pytest
import torch
import torch.nn.functional as F

from bimo.engine import kernels as choice
from bimo.models.layers import RMSNorm

kernels = choice.load_kernels()
tensors = import_module("bimo_kernels.tensors") if kernels else None
needs_kernels = pytest.mark.skipif(
    kernels is None, reason="bimo-kernels is not built, or BIMO_KERNELS=0: pip install ./kernels"
)
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-2}


@needs_kernels
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("head_dim", [16, 32, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("window", [None, 1, 7, 1000])
def test_decode_attention_equals_sdpa(dtype, head_dim, window) -> None:
    """Scattered blocks, lengths from 1 to several blocks, grouped heads, sliding windows, large scores."""
    generator = torch.Generator().manual_seed(0)
    num_kv, group, block_size, num_blocks = 2, 3, 4, 40
    lengths = torch.tensor([1, 4, 5, 23, 60])
    pools = [torch.randn(num_kv, num_blocks * block_size, head_dim, generator=generator).to(dtype) for _ in range(2)]
    table = torch.stack([torch.randperm(num_blocks, generator=generator)[:15] for _ in lengths])
    q = (torch.randn(len(lengths), num_kv * group, head_dim, generator=generator) * 3).to(dtype)
    found = tensors.decode_attention(
        q, *pools, table, lengths, block_size=block_size, scale=head_dim**-0.5, window=window
    )
    for i, length in enumerate(lengths.tolist()):
        slots = (table[i][:, None] * block_size + torch.arange(block_size)).flatten()[:length]
        slots = slots[max(0, length - window) :] if window else slots
        k, v = (pool[:, slots].float().repeat_interleave(group, 0) for pool in pools)
        expected = F.scaled_dot_product_attention(q[i].float()[:, None], k, v)[:, 0]
        torch.testing.assert_close(found[i].float(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@needs_kernels
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_store_puts_rows_into_their_slots(dtype) -> None:
    """From a slice of a wider row, as keys and values lie beside the queries."""
    pool, slots = torch.zeros(3, 40, 16, dtype=dtype), torch.tensor([7, 0, 39, 20])
    rows = torch.randn(4, 9, 16).to(dtype)[:, 4:7]
    expected = pool.clone()
    expected[:, slots] = rows.transpose(0, 1)
    tensors.store(rows, slots, pool)
    assert torch.equal(pool, expected)


@needs_kernels
@pytest.mark.parametrize("rows", [1, 3, 700])
def test_rms_norm_equals_the_plain_one(rows) -> None:
    torch.manual_seed(0)
    norm = RMSNorm(576, 1e-5).bfloat16()
    norm.weight.data.normal_(1, 0.3)
    x = (torch.randn(1, rows, 576) * 5).bfloat16()
    x[0, 0] = 0
    found = tensors.rms_norm(x, norm.weight.detach(), norm.eps)
    torch.testing.assert_close(found, norm(x).detach(), atol=0, rtol=0.016)  # the last bit of each of two roundings


@needs_kernels
def test_unknown_sizes_and_types_are_left_to_torch() -> None:
    cpu = torch.device("cpu")
    assert choice.attention_kernels(torch.float32, cpu, 64) is not None
    assert choice.attention_kernels(torch.float32, cpu, 48) is None
    assert choice.attention_kernels(torch.float16, cpu, 64) is None


def test_switched_off_by_the_environment() -> None:
    code = "from bimo.engine.kernels import load_kernels; raise SystemExit(load_kernels() is not None)"
    environment = {**os.environ, "BIMO_KERNELS": "0"}
    assert subprocess.run([sys.executable, "-c", code], env=environment).returncode == 0
