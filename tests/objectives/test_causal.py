"""The causal loss: packed as unpacked, equal to transformers', and the fused cross-entropy to torch's in float64."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from bimo.data.loader import Batch, PackedLoader
from bimo.data.shards import write_tokens
from bimo.models.config import DecoderConfig
from bimo.models.decoder import Decoder
from bimo.models.initial import init_weights
from bimo.objectives.causal import causal_loss
from bimo.objectives.cross_entropy import linear_cross_entropy

CONFIG = DecoderConfig(
    family="llama", vocab_size=97, hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8,
    intermediate_size=48, max_positions=64,
)  # fmt: skip


@pytest.fixture
def model() -> Decoder:
    decoder = Decoder(CONFIG)
    init_weights(decoder, 1)
    return decoder


def documents() -> list[list[int]]:
    random = np.random.default_rng(0)
    return [random.integers(0, 97, size).tolist() for size in (7, 12, 3, 20, 22)]


def single(tokens: list[int]) -> Batch:
    row = np.array([tokens])
    shape = row[:, :-1].shape
    zeros = np.zeros(shape, np.int64)
    return Batch(row[:, :-1].copy(), row[:, 1:].copy(), np.arange(shape[1])[None], zeros, ((0, 0),))


def test_packed_is_unpacked(model: Decoder, tmp_path: Path) -> None:
    """Loss and gradients of documents in one row are those of the documents one by one."""
    encoded = [(str(n), tokens) for n, tokens in enumerate(documents())]
    total = sum(map(len, documents()))
    file = write_tokens(tmp_path / "t", [*encoded, ("last", [0, 0])], vocab_size=97, mark="")
    packed = causal_loss(model, PackedLoader([file], length=total, shuffle=False).next_batch(1))
    (packed_gradient,) = torch.autograd.grad(packed.total, [model.embed_tokens.weight])
    losses = [causal_loss(model, single(tokens)) for tokens in documents()]
    apart = sum((loss.total for loss in losses), torch.zeros(()))
    (gradient,) = torch.autograd.grad(apart, [model.embed_tokens.weight])
    assert packed.num_targets == sum(loss.num_targets for loss in losses)
    torch.testing.assert_close(packed.total, apart, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(packed_gradient, gradient, rtol=1e-4, atol=1e-5)


def test_documents_do_not_see_each_other(model: Decoder, tmp_path: Path) -> None:
    """What stands before a document in its row changes nothing in it."""
    first, second = documents()[:2]
    scores = []
    for before in (first, [token ^ 1 for token in first]):
        file = write_tokens(tmp_path / str(sum(before)), [("a", before), ("b", [*second, 5])], vocab_size=97, mark="")
        batch = PackedLoader([file], length=len(before) + len(second), shuffle=False).next_batch(1)
        batch.targets[0, : len(before)] = -100
        scores.append(float(causal_loss(model, batch).total.detach()))
    assert scores[0] == pytest.approx(scores[1], abs=1e-5)


@pytest.mark.parametrize("block", [0, 7, 128])
def test_both_ways_of_attention_agree(
    model: Decoder, tmp_path: Path, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With plain attention over one document at a time; gradients through both."""
    import bimo.models.packed as packed

    monkeypatch.setattr(packed, "BLOCK", max(block, 1))
    monkeypatch.setattr(packed, "LONGEST_IN_BLOCKS", 2048 if block else 0)
    encoded = [(str(n), tokens) for n, tokens in enumerate([*documents(), [0, 0]])]
    file = write_tokens(tmp_path / "t", encoded, vocab_size=97, mark="")
    batch = PackedLoader([file], length=sum(map(len, documents())), shuffle=False).next_batch(1)
    loss = causal_loss(model, batch).total
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    total = torch.zeros(())
    for tokens in documents():
        ids = torch.tensor([tokens])
        logits = model.logits(model(ids))[0, :-1]
        total = total + F.cross_entropy(logits, ids[0, 1:], reduction="sum")
    assert float(loss.detach()) == pytest.approx(float(total.detach()), rel=1e-5)
    for mine, theirs in zip(gradients, torch.autograd.grad(total, list(model.parameters())), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4)


def test_transformers_has_the_same_loss(model: Decoder, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    from bimo.formats.huggingface import save_directory

    save_directory(tmp_path / "m", CONFIG, model.named_parameters())
    reference = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32)
    for tokens in documents():
        ids = torch.tensor([tokens])
        theirs = reference(input_ids=ids, labels=ids).loss
        ours = causal_loss(model, single(tokens))
        assert float((ours.total / ours.num_targets).detach()) == pytest.approx(float(theirs.detach()), rel=1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("count", [1, 50, 700])
def test_cross_entropy_in_slices(smoothing: float, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    import bimo.objectives.cross_entropy as module

    monkeypatch.setattr(module, "LOGITS_AT_ONCE", 97 * 64)  # several slices
    monkeypatch.setattr(module, "SLOPES_AT_ONCE", 97 * 160)
    hidden = torch.randn(count, 16, requires_grad=True)
    weight = torch.randn(97, 16, requires_grad=True)
    targets = torch.randint(0, 97, (count,))
    targets[::7] = -100
    ours = linear_cross_entropy(hidden, weight, targets, smoothing)
    gradients = torch.autograd.grad(ours * 3, [hidden, weight])
    exact = F.cross_entropy(hidden.double() @ weight.double().t(), targets, reduction="sum", label_smoothing=smoothing)
    exact_gradients = torch.autograd.grad(exact * 3, [hidden, weight])
    torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-4)
    for mine, theirs in zip(gradients, exact_gradients, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


def test_nothing_to_predict_is_nothing(model: Decoder) -> None:
    batch = single([1, 2, 3])
    batch.targets[:] = -100
    loss = causal_loss(model, batch)
    assert loss.num_targets == 0 and float(loss.total.detach()) == 0.0
