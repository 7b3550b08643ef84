"""R-Drop: the divergence in float64, what it adds to a loss, and that it is for training only."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.distributions import Categorical, kl_divergence

from bimo.data.loader import Batch, Origin
from bimo.models.config import DecoderConfig
from bimo.models.decoder import Decoder
from bimo.models.initial import init_weights
from bimo.objectives.causal import causal_loss
from bimo.objectives.r_drop import symmetric_divergence, with_r_drop


def make(dropout: float) -> tuple[Decoder, Batch]:
    config = DecoderConfig(
        family="llama", vocab_size=50, hidden_size=16, num_layers=1, num_heads=2, num_kv_heads=2, head_dim=8,
        intermediate_size=32, max_positions=16, dropout=dropout,
    )  # fmt: skip
    model = Decoder(config)
    init_weights(model, 0)
    ids = np.random.default_rng(0).integers(0, 50, (2, 9))
    shape = (2, 8)
    zeros = np.zeros(shape, np.int64)
    positions = np.broadcast_to(np.arange(8), shape).copy()
    return model, Batch(ids[:, :-1].copy(), ids[:, 1:].copy(), positions, zeros, (Origin(0, 0, 0), Origin(0, 1, 0)))


def test_the_divergence_is_that_of_the_distributions() -> None:
    first, second = torch.randn(2, 5, 11, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    p, q = Categorical(logits=first), Categorical(logits=second)
    expected = (kl_divergence(p, q) + kl_divergence(q, p)).tolist()
    assert symmetric_divergence(first, second).tolist() == pytest.approx(expected, rel=1e-5)
    assert not symmetric_divergence(first, first).any()


def test_two_passes_that_differ_cost_more() -> None:
    model, batch = make(dropout=0.3)
    torch.manual_seed(1)
    once, again = (float(causal_loss(model.train(), batch).total) for _ in range(2))
    torch.manual_seed(1)
    loss = with_r_drop(causal_loss, 2.0)(model, batch)
    assert loss.num_targets == batch.num_targets
    assert float(loss.total) > (once + again) / 2
    torch.manual_seed(1)
    small = with_r_drop(causal_loss, 1e-9)(model, batch)
    assert float(small.total) == pytest.approx((once + again) / 2, rel=1e-5)
    loss.total.backward()
    assert all(bool(weight.grad.isfinite().all()) for weight in model.parameters() if weight.grad is not None)


def test_not_while_it_is_evaluated_and_not_for_nothing() -> None:
    model, batch = make(dropout=0.3)
    assert with_r_drop(causal_loss, 0.0) is causal_loss
    plain = float(causal_loss(model.eval(), batch).total)
    assert float(with_r_drop(causal_loss, 2.0)(model, batch).total) == plain
