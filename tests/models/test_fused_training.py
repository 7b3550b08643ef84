"""The loops of training against the formulas in float64, for every instruction set; a decoder with and without them.

What is compared in bfloat16 may differ by a rounding of the result (2^-8 of it) and by those of what went in between.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from bimo.data.loader import Batch
from bimo.models import fused_training
from bimo.models.config import DecoderConfig
from bimo.models.decoder import Decoder
from bimo.models.initial import init_weights
from bimo.models.layers import RMSNorm, rope_angles, rotate
from bimo.models.packed import PackedRows
from bimo.objectives.causal import causal_loss
from bimo.objectives.cross_entropy import linear_cross_entropy
from bimo.runtime import load_kernels

kernels = load_kernels()
needs_kernels = pytest.mark.skipif(kernels is None, reason="bimo-kernels is not built: pip install ./kernels")
SETS = kernels.instruction_sets() if kernels is not None else []
BF16 = torch.bfloat16
INF, NAN = float("inf"), float("nan")


@pytest.fixture(params=SETS)
def loops(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The loops of one instruction set, which the functions of `fused_training` then use."""
    chosen = import_module("bimo_kernels.training").TrainingLoops(request.param)
    monkeypatch.setattr(fused_training, "_loops", lambda: chosen)
    return chosen


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def near(found: Tensor, exact: Tensor, rounded: float = 1.0) -> None:
    """Within so many roundings to bfloat16, of each number and of the largest's thousandth."""
    assert found.shape == exact.shape
    torch.testing.assert_close(found.double(), exact, rtol=rounded * 2**-8, atol=1e-3 * float(exact.abs().max() + 1e-9))


@needs_kernels
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize(("rows", "words"), [(0, 5), (1, 1), (1, 7), (3, 16), (5, 97), (64, 1000)])
def test_cross_entropy_and_its_slopes(loops: Any, rows: int, words: int, smoothing: float) -> None:
    logits, targets = (torch.randn(rows, words) * 4).to(BF16), torch.randint(0, words, (rows,))
    exact = logits.double().requires_grad_()
    losses = F.cross_entropy(exact, targets, reduction="none", label_smoothing=smoothing)
    (slopes,) = torch.autograd.grad(losses.sum(), exact)
    kept = logits.clone()
    found = loops.cross_entropy(kept, targets, smoothing, False)
    assert torch.equal(kept, logits)
    torch.testing.assert_close(found.double(), losses.detach(), rtol=2e-6, atol=2e-6)
    assert torch.equal(loops.cross_entropy(kept, targets, smoothing, True), found)
    torch.testing.assert_close(kept.double(), slopes, rtol=2**-8, atol=1e-6)


@needs_kernels
def test_a_sure_words_slope_is_not_lost(loops: Any) -> None:
    """p - 1 of p = 0.9997, which bfloat16 rounds to 1."""
    logits = torch.tensor([[8.0] + [0.0] * 20]).to(BF16)
    exact = torch.softmax(logits.double(), 1)[0, 0] - 1
    loops.cross_entropy(logits, torch.tensor([0]), 0.0, True)
    assert logits[0, 0].double() == pytest.approx(float(exact), rel=2**-8)


@needs_kernels
@pytest.mark.parametrize("place", [0, 20])  # in whole vectors, and in what is left
def test_what_is_no_number_stays_in_its_row(loops: Any, place: int) -> None:
    """As torch: NaN and +inf make a row NaN, -inf has no weight, a row of -inf alone is NaN."""
    logits = torch.randn(6, 21).to(BF16)
    for row, value in ((1, NAN), (2, INF), (3, -INF)):
        logits[row, place] = value
    logits[4] = -INF
    targets = torch.full((6,), 5)
    exact = logits.double().requires_grad_()
    losses = F.cross_entropy(exact, targets, reduction="none")
    (slopes,) = torch.autograd.grad(losses.sum(), exact)
    found = loops.cross_entropy(logits, targets, 0.0, True)
    torch.testing.assert_close(found.double(), losses.detach(), rtol=2e-6, atol=2e-6, equal_nan=True)
    torch.testing.assert_close(logits.double(), slopes, rtol=2**-8, atol=1e-6, equal_nan=True)
    gates = torch.tensor([[NAN, INF, -INF, 0.0, -90.0, 90.0, -1e38, 1e38] * 3]).to(BF16)
    plain = F.silu(gates.float())
    torch.testing.assert_close(
        loops.swiglu(torch.cat((gates, torch.ones_like(gates)), 1)).float(),
        plain,
        rtol=2**-8,
        atol=1e-30,
        equal_nan=True,
    )


@needs_kernels
def test_a_target_outside_the_vocabulary_is_refused(loops: Any) -> None:
    for word in (-1, 7, 1 << 40):
        with pytest.raises(ValueError, match="outside the vocabulary"):
            loops.cross_entropy(torch.zeros(2, 7, dtype=BF16), torch.tensor([0, word]), 0.0, True)
    with pytest.raises(ValueError, match="sees itself"):
        loops.softmax(torch.zeros(1, 1, 2, 2, dtype=BF16), torch.tensor([[0, 2]], dtype=torch.int32), 0)
    with pytest.raises(ValueError, match="no instructions"):
        import_module("bimo_kernels.training").TrainingLoops("sse9")


@needs_kernels
@pytest.mark.parametrize("shape", [(0, 16), (1, 1), (1, 7), (2, 3, 16), (5, 50), (300, 130)])
def test_swiglu(loops: Any, shape: tuple[int, ...]) -> None:
    gate_up = (torch.randn(*shape[:-1], 2 * shape[-1]) * 3).to(BF16).requires_grad_()
    d_out = torch.randn(shape).to(BF16)
    exact = gate_up.detach().double().requires_grad_()
    gate, up = exact.chunk(2, -1)
    expected = F.silu(gate) * up
    expected.backward(d_out.double())
    found = fused_training.swiglu(gate_up)
    found.backward(d_out)
    if found.numel():
        near(found, expected.detach())
        near(gate_up.grad, exact.grad)


@needs_kernels
@pytest.mark.parametrize("delta", [False, True])
@pytest.mark.parametrize("shape", [(0, 16), (1, 1), (1, 30), (2, 33, 48), (300, 321)])
def test_sum_and_norm(loops: Any, shape: tuple[int, ...], delta: bool) -> None:
    """Forward, and the gradients of all three, with the sum used after the norm as a residual path does."""
    size = shape[-1]
    norm = RMSNorm(size, 1e-5)
    norm.weight.data.normal_(1, 0.3)
    x, d_total = torch.randn(shape, requires_grad=True), torch.randn(shape)
    change = torch.randn(shape).to(BF16).requires_grad_() if delta else None
    d_normed = torch.randn(shape).to(BF16)
    exact_x = x.detach().double().requires_grad_()
    exact_change = torch.zeros(shape, dtype=torch.float64) if change is None else change.detach().double()
    exact_change.requires_grad_()
    weight = norm.weight.detach().double().requires_grad_()
    total = exact_x + exact_change
    normed = F.rms_norm(total, (size,), weight, 1e-5)
    torch.autograd.backward((total, normed), (d_total.double(), d_normed.double()))
    with torch.autocast("cpu", BF16):
        found_total, found = fused_training.add_norm(x, change, norm)
    assert found.dtype == BF16 and found_total.dtype == torch.float32
    torch.autograd.backward((found_total, found), (d_total, d_normed))
    if not x.numel():
        assert not norm.weight.grad.any()
        return
    torch.testing.assert_close(found_total.detach().double(), total.detach(), rtol=1e-6, atol=1e-6)
    near(found, normed.detach())
    torch.testing.assert_close(x.grad.double(), exact_x.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(norm.weight.grad.double(), weight.grad, rtol=1e-4, atol=1e-4)
    if change is not None:
        near(change.grad, exact_change.grad)


@needs_kernels
def test_a_sum_whose_norm_or_itself_is_not_used(loops: Any) -> None:
    norm = RMSNorm(20, 1e-5)
    for used in (0, 1):
        x, change = torch.randn(3, 20, requires_grad=True), torch.randn(3, 20).to(BF16).requires_grad_()
        with torch.autocast("cpu", BF16):
            out = fused_training.add_norm(x, change, norm)[used]
        out.sum().backward()
        near(change.grad, x.grad.double())
        assert x.grad.any() or used


@needs_kernels
@pytest.mark.parametrize("count", [0, 1, 17, 40_000])
def test_addition_to_the_residual_path(loops: Any, count: int) -> None:
    x, change = torch.randn(count, requires_grad=True), torch.randn(count).to(BF16).requires_grad_()
    d_total = torch.randn(count)
    with torch.autocast("cpu", BF16):
        total = fused_training.add(x, change)
    total.backward(d_total)
    assert torch.equal(total, x + change)
    assert torch.equal(x.grad, d_total) and torch.equal(change.grad, d_total.to(BF16))


@needs_kernels
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("rotary", [True, False])
@pytest.mark.parametrize(
    ("batch", "num_tokens", "heads", "kv", "dim", "block"),
    [(1, 1, 1, 1, 16, 128), (2, 33, 4, 2, 16, 8), (2, 40, 3, 1, 80, 16), (1, 300, 2, 2, 64, 128), (3, 20, 6, 6, 6, 7),
     (2, 16, 2, 1, 128, 16), (0, 9, 2, 1, 32, 4)],
)  # fmt: skip
def test_attention_with_its_rotation(
    loops: Any, batch: int, num_tokens: int, heads: int, kv: int, dim: int, block: int, rotary: bool, window: int | None
) -> None:
    """Against softmax under a whole mask in float64; rows of several documents."""
    segments = (torch.rand(batch, num_tokens) < 0.1).cumsum(1)
    qkv = torch.randn(batch, num_tokens, (heads + 2 * kv) * dim).to(BF16).requires_grad_()
    positions = torch.arange(num_tokens).expand(batch, num_tokens)
    rope = rope_angles(positions, torch.rand(dim // 2), 1.0) if rotary else None
    scale, d_out = 1.5 * dim**-0.5, torch.randn(batch, num_tokens, heads * dim).to(BF16)

    exact = qkv.detach().double().requires_grad_()
    q, k, v = exact.unflatten(-1, (-1, dim)).split_with_sizes((heads, kv, kv), 2)
    if rope is not None:
        q, k = (rotate(x, *(angles.double() for angles in rope)) for x in (q, k))
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    k, v = (x.repeat_interleave(heads // kv, 1) for x in (k, v))
    distance = torch.arange(num_tokens)[:, None] - torch.arange(num_tokens)
    seen = (distance >= 0) & (distance < (window or num_tokens))
    seen = seen & (segments[:, :, None] == segments[:, None])
    scores = (q @ k.transpose(2, 3) * scale).masked_fill(~seen[:, None], -INF)
    expected = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
    expected.backward(d_out.double())

    starts = PackedRows(segments, BF16)._first_seen(window)
    sizes = {"num_heads": heads, "num_kv_heads": kv, "scale": scale, "block": block}
    found = fused_training.packed_attention(qkv, rope, starts, **sizes)
    found.backward(d_out)
    assert found.shape == expected.shape and qkv.grad.shape == exact.grad.shape
    if batch:
        torch.testing.assert_close(found.double(), expected.detach(), rtol=0.02, atol=0.02)
        error = float((qkv.grad.double() - exact.grad).norm() / exact.grad.norm())
        assert error < 0.01, error


@needs_kernels
def test_long_rows_and_hidden_numbers_in_softmax(loops: Any) -> None:
    """Rows longer than what is kept at hand; what a token does not see may be anything."""
    scores = (torch.randn(1, 2, 1, 2500) * 3).to(BF16)
    starts = torch.zeros(1, 2500, dtype=torch.int32)
    starts[0, -1] = 1
    scores[..., 0] = NAN
    exact = scores[..., 1:].double().softmax(-1)
    found = loops.softmax(scores, starts, 2499)
    assert not found[..., 0].any()
    near(found[..., 1:], exact)
    gradient = torch.full_like(found, NAN)
    gradient[..., 1:] = torch.randn(2499).to(BF16)
    plain = gradient[..., 1:].double()
    weights = found[..., 1:].double()
    expected = weights * (plain - (weights * plain).sum(-1, keepdim=True))
    loops.softmax_backward(found, gradient, starts, 2499)
    assert not gradient[..., 0].any()
    near(gradient[..., 1:], expected)


@needs_kernels
def test_neither_threads_nor_other_rows_change_a_bit(loops: Any) -> None:
    threads = torch.get_num_threads()
    x, gate_up, logits = torch.randn(700, 96), torch.randn(700, 192).to(BF16), torch.randn(700, 131).to(BF16)
    targets, weight, d_normed = torch.randint(0, 131, (700,)), torch.randn(96), torch.randn(700, 96).to(BF16)

    def results(rows: slice) -> list[Tensor]:
        scores = logits[rows].clone()
        losses = loops.cross_entropy(scores, targets[rows], 0.1, True)
        total, normed, scales = loops.add_norm(x[rows].clone(), d_normed[rows].clone(), weight, 1e-5)
        d_x, d_delta, d_weight = loops.add_norm_backward(total, weight, scales, None, d_normed[rows].clone(), True)
        inner = loops.swiglu(gate_up[rows].clone())
        return [losses, scores, total, normed, d_x, d_delta, inner, d_weight]

    try:
        torch.set_num_threads(1)
        alone = results(slice(None))
        torch.set_num_threads(2)
        for _ in range(5):
            assert all(torch.equal(*both) for both in zip(alone, results(slice(None)), strict=True))
        part = results(slice(333, 340))[:-1]  # the weight's gradient is a sum over rows
        assert all(torch.equal(whole[333:340], some) for whole, some in zip(alone, part, strict=False))
    finally:
        torch.set_num_threads(threads)


LLAMA: dict[str, Any] = {
    "family": "llama", "vocab_size": 97, "hidden_size": 48, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2,
    "head_dim": 16, "intermediate_size": 100, "max_positions": 64,
}  # fmt: skip
MODELS = {
    "llama": LLAMA,
    "own head": LLAMA | {"tied_embeddings": False},
    "windows": LLAMA | {"qkv_bias": True, "windows": (None, 5)},
    "norms of q and k": LLAMA | {"qk_norm": True},
    "gpt2": LLAMA | {
        "norm": "layer", "position": "learned", "activation": "gelu_tanh", "gated_mlp": False, "qkv_bias": True,
        "attention_out_bias": True, "mlp_bias": True, "num_kv_heads": 4,
    },
}  # fmt: skip


def make_batch(rows: int = 3, num_tokens: int = 40) -> Batch:
    random = np.random.default_rng(0)
    ids = random.integers(0, 97, (rows, num_tokens + 1))
    segments = (np.arange(num_tokens)[None] >= random.integers(5, 30, (rows, 1))).astype(np.int64)
    positions = np.arange(num_tokens) - segments * segments.argmax(1)[:, None]
    targets = ids[:, 1:].copy()
    targets[:, ::11] = -100
    return Batch(ids[:, :-1].copy(), targets, positions, segments, tuple(() for _ in range(rows)))


def gradients(model: Decoder, batch: Batch, *, autocast: bool) -> tuple[float, list[Tensor]]:
    model.zero_grad()
    with torch.autocast("cpu", BF16, enabled=autocast):
        loss = causal_loss(model, batch, label_smoothing=0.1).total
    loss.backward()
    return float(loss.detach()), [weight.grad.clone() for weight in model.parameters()]


@needs_kernels
@pytest.mark.parametrize("name", MODELS)
def test_a_decoders_gradients_are_as_exact_as_without(name: str, loops: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both against float32: what the loops round may not be more than what torch rounds. Twice the same bits."""
    model = Decoder(DecoderConfig(**MODELS[name]))
    init_weights(model, 0)
    for weight in model.parameters():
        weight.data.mul_(2)
    batch = make_batch()
    exact_loss, exact = gradients(model, batch, autocast=False)
    loss, found = gradients(model, batch, autocast=True)
    assert all(torch.equal(*both) for both in zip(found, gradients(model, batch, autocast=True)[1], strict=True))
    monkeypatch.setattr(fused_training, "_loops", lambda: None)
    plain_loss, plain = gradients(model, batch, autocast=True)
    assert loss == pytest.approx(exact_loss, rel=1e-3) and plain_loss == pytest.approx(exact_loss, rel=1e-3)
    assert any(not torch.equal(*both) for both in zip(found, plain, strict=True)), "the loops were not used"
    for (parameter, _), mine, theirs, truth in zip(model.named_parameters(), found, plain, exact, strict=True):
        size = float(truth.norm())
        mine_off, theirs_off = (float((gradient - truth).norm()) / size for gradient in (mine, theirs))
        assert mine_off < max(1.3 * theirs_off, 0.005), (parameter, mine_off, theirs_off)


@needs_kernels
def test_layers_that_are_computed_again(loops: Any) -> None:
    """Activation checkpointing: the same gradients, to the bit."""
    model = Decoder(DecoderConfig(**LLAMA))
    init_weights(model, 0)
    batch = make_batch()
    loss, kept = gradients(model, batch, autocast=True)
    for layer in model.layers:
        forward = layer.forward
        layer.forward = lambda *args, forward=forward: checkpoint(forward, *args, use_reentrant=False)
    again_loss, again = gradients(model, batch, autocast=True)
    assert again_loss == loss and all(torch.equal(*both) for both in zip(kept, again, strict=True))


@needs_kernels
def test_a_compiled_model_goes_without() -> None:
    model = Decoder(DecoderConfig(**LLAMA | {"num_layers": 1}))
    init_weights(model, 0)
    loss, found = gradients(model, make_batch(), autocast=True)
    model.layers[0].compile(backend="eager", fullgraph=True)
    again_loss, again = gradients(model, make_batch(), autocast=True)
    assert again_loss == pytest.approx(loss, rel=1e-3)
    assert any(not torch.equal(*both) for both in zip(found, again, strict=True)), "the loops were used"


@needs_kernels
def test_a_model_learns_alike_with_and_without(monkeypatch: pytest.MonkeyPatch) -> None:
    batch, curves = make_batch(), []
    for loops in (fused_training._loops(), None):
        monkeypatch.setattr(fused_training, "_loops", lambda loops=loops: loops)
        model = Decoder(DecoderConfig(**LLAMA))
        init_weights(model, 0)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        losses = []
        for _ in range(40):
            losses.append(gradients(model, batch, autocast=True)[0])
            optimizer.step()
        curves.append(losses)
    ours, plain = curves
    assert ours[-1] < 0.7 * ours[0]
    assert ours == pytest.approx(plain, rel=0.02)


def test_elsewhere_plain_torch_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without autocast, in float16 and on other devices; and everywhere when the kernels are not there."""
    x = torch.zeros(2, 4)
    assert fused_training.loops_for(x) is None
    with torch.autocast("cpu", torch.float16):
        assert fused_training.loops_for(x) is None
    with torch.autocast("cpu", BF16):
        assert fused_training.loops_for(x, torch.zeros(1, device="meta")) is None
        assert (fused_training.loops_for(x) is None) == (kernels is None)
        monkeypatch.setattr(fused_training, "load_kernels", lambda: None)
        assert fused_training.loops_for(x) is None
        total, normed = fused_training.add_norm(x, x.to(BF16), RMSNorm(4, 1e-5))
        assert total.dtype == normed.dtype == torch.float32


@needs_kernels
def test_documents_out_of_order_are_masked() -> None:
    """Equal segments that are not side by side: the loops know only the first token that is seen."""
    qkv = torch.zeros(1, 3, 48, dtype=BF16)
    settings = {"num_heads": 1, "num_kv_heads": 1, "scale": 1.0, "window": None}
    with torch.autocast("cpu", BF16):
        assert PackedRows(torch.tensor([[0, 0, 1]]), BF16).jointly(qkv, None, **settings) is not None
        assert PackedRows(torch.tensor([[0, 1, 0]]), BF16).jointly(qkv, None, **settings) is None


@needs_kernels
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("count", [0, 1, 50, 700])
def test_the_heads_loss_in_slices(loops: Any, smoothing: float, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bimo.objectives.cross_entropy.SLOPES_AT_ONCE", 97 * 160)
    hidden = torch.randn(count, 16).to(BF16).requires_grad_()
    weight = torch.randn(97, 16).to(BF16).float().requires_grad_()
    targets = torch.randint(0, 97, (count,))
    with torch.autocast("cpu", BF16):
        ours = linear_cross_entropy(hidden, weight, targets, smoothing)
    ours.backward()
    inputs = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    logits = (inputs[0] @ inputs[1].t()).to(BF16).double()
    exact = F.cross_entropy(logits, targets, reduction="sum", label_smoothing=smoothing)
    exact.backward()
    assert float(ours.detach()) == pytest.approx(float(exact.detach()), rel=1e-3)
    for mine, theirs in zip((hidden.grad, weight.grad), inputs, strict=True):
        if count:
            assert float((mine.double() - theirs.grad).norm() / theirs.grad.norm()) < 0.01
