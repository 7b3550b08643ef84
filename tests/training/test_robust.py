"""Adversarial training and noise: the moves as a float64 statement has them, wherever the embedding comes from."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bimo.data.loader import Batch, Origin, PackedLoader
from bimo.data.pairs import pair_batch
from bimo.errors import TrainingError
from bimo.models.config import DecoderConfig, EncoderConfig, Seq2SeqConfig
from bimo.models.decoder import Decoder
from bimo.models.encoder import Encoder
from bimo.models.initial import init_weights
from bimo.models.recurrent import LSTMConfig, LSTMLanguageModel
from bimo.models.seq2seq import EncoderDecoder
from bimo.objectives.causal import Loss, causal_loss
from bimo.objectives.r_drop import with_r_drop
from bimo.objectives.seq2seq import seq2seq_loss
from bimo.recipe import RobustRecipe
from bimo.training.loop import StepInfo, TrainingState, train
from bimo.training.optim import make_optimizers
from bimo.training.robust import passes
from bimo.training.session import Evaluation, Job, Texts, train_run
from tests.training.tiny import build, make_recipe, make_texts

ADVERSARIES = {
    "fgm": RobustRecipe(kind="fgm", epsilon=0.2),
    "pgd": RobustRecipe(kind="pgd", epsilon=0.2, steps=3, step_size=0.6),  # reaches the ball's border
    "freelb": RobustRecipe(kind="freelb", epsilon=0.2, steps=3, step_size=0.6),
}


def decoder(**changes: Any) -> Decoder:
    settings: dict[str, Any] = {
        "family": "llama", "vocab_size": 50, "hidden_size": 16, "num_layers": 2, "num_heads": 2, "num_kv_heads": 2,
        "head_dim": 8, "intermediate_size": 32, "max_positions": 16, "tied_embeddings": False, "norm": "layer",
    }  # fmt: skip
    model = Decoder(DecoderConfig(**{**settings, **changes}))
    init_weights(model, 0)
    return model.train()


def batch_of(rows: int = 3, width: int = 8) -> Batch:
    ids = np.random.default_rng(0).integers(0, 50, (rows, width + 1))
    zeros = np.zeros((rows, width), np.int64)
    targets = ids[:, 1:].copy()
    targets[0, -3:] = -100  # nothing depends on the last two inputs of the first row, but the last of them on itself
    positions = np.broadcast_to(np.arange(width), zeros.shape).copy()
    return Batch(ids[:, :-1].copy(), targets, positions, zeros, tuple(Origin(0, row, 0) for row in range(rows)))


def run(robust: RobustRecipe, model: Any, share: Callable[[], Tensor]) -> tuple[list[float], dict[str, Tensor]]:
    """The losses of a part, and the gradients that come of it."""
    model.zero_grad()
    losses = []
    for loss, weight in passes(share, model, robust):
        (loss * weight).backward()
        losses.append(float(loss.detach()))
    gradients = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    return losses, {name: gradient.clone() for name, gradient in gradients.items()}


class Given(nn.Module):
    """An embedding that gives what it was given."""

    def __init__(self, x: Tensor) -> None:
        super().__init__()
        self.x, self.weight = x, nn.Parameter(torch.zeros(1))

    def forward(self, ids: Tensor) -> Tensor:
        return self.x


def stated(robust: RobustRecipe, batch: Batch) -> tuple[list[float], dict[str, Tensor]]:
    """The same in float64, by the formulas; gradients of all but the embedding."""
    model = decoder().double()
    ids, targets = torch.from_numpy(batch.input_ids), torch.from_numpy(batch.targets)
    x = model.embed_tokens(ids).detach()
    inner = {name: weight for name, weight in model.named_parameters() if "embed" not in name}

    def loss_at(d: Tensor) -> Tensor:
        model.embed_tokens = Given(x + d)  # type: ignore[assignment]
        return F.cross_entropy(model.logits(model(ids)).flatten(0, 1), targets.flatten(), reduction="sum")

    size = torch.zeros(len(x), dtype=torch.float64)
    d = torch.zeros_like(x)
    ways = []
    for _ in range(robust.steps):
        ways.append(d)
        d = d.clone().requires_grad_()
        (g,) = torch.autograd.grad(loss_at(d), d)
        seen = (g != 0).any(-1)
        assert not seen[0, -2:].any() and seen[1:].all()
        size = torch.stack([(row[use] ** 2).sum().sqrt() for row, use in zip(x, seen, strict=True)]) * robust.epsilon
        rows = []
        for row, slope, radius in zip(d.detach(), g, size, strict=True):
            row = row + (1.0 if robust.kind == "fgm" else robust.step_size) * radius * slope / (slope**2).sum().sqrt()
            rows.append(row * min(1.0, float(radius / (row**2).sum().sqrt())))
        d = torch.stack(rows)
        if robust.kind == "fgm":
            break
    learned = ways if robust.kind == "freelb" else [ways[0], d]
    losses = [loss_at(way) for way in learned]
    gradients = torch.autograd.grad(sum(losses) / len(losses), list(inner.values()))  # type: ignore[type-var, arg-type]
    return [float(loss.detach()) for loss in losses], dict(zip(inner, gradients, strict=True))


@pytest.mark.parametrize("kind", ADVERSARIES)
def test_as_stated(kind: str) -> None:
    robust, batch, model = ADVERSARIES[kind], batch_of(), decoder()
    losses, gradients = run(robust, model, lambda: causal_loss(model, batch).total)
    expected, expected_gradients = stated(robust, batch)
    assert losses == pytest.approx(expected, rel=1e-5)
    assert losses[0] < losses[-1]
    for name, gradient in expected_gradients.items():
        torch.testing.assert_close(gradients[name].double(), gradient, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("neftune", [0.0, 5.0])
def test_without_an_adversary_there_is_one_pass(neftune: float) -> None:
    model, batch = decoder(), batch_of()
    losses, gradients = run(RobustRecipe(neftune=neftune), model, lambda: causal_loss(model, batch).total)
    model.zero_grad()
    loss = causal_loss(model, batch).total  # no hook is left behind
    loss.backward()
    same = losses == [float(loss.detach())]
    assert same == (neftune == 0)
    for name, weight in model.named_parameters():
        assert torch.equal(gradients[name], weight.grad) == same  # type: ignore[arg-type]


def embedded(model: Any, embedding: nn.Module, robust: RobustRecipe, share: Callable[[], Tensor]) -> list[Tensor]:
    """What went from the embedding into the model, call by call: the hook sees what the hooks before it made."""
    seen: list[Tensor] = []

    def shares() -> Tensor:
        handle = embedding.register_forward_hook(lambda module, inputs, x: seen.append(x.detach().clone()))
        try:
            return share()
        finally:
            handle.remove()

    run(robust, model, shares)
    return seen


def test_noise_is_uniform_and_the_same_in_all_passes() -> None:
    model, batch = decoder(vocab_size=50, hidden_size=64, head_dim=32), batch_of(16, 16)
    plain = model.embed_tokens(torch.from_numpy(batch.input_ids)).detach()
    most = 5 / (16 * 64) ** 0.5
    torch.manual_seed(3)
    (moved,) = embedded(model, model.embed_tokens, RobustRecipe(neftune=5.0), lambda: causal_loss(model, batch).total)
    noise = (moved - plain) / most
    assert float(noise.abs().max()) <= 1 + 1e-5
    assert float(noise.mean()) == pytest.approx(0, abs=0.03)
    assert float(noise.var()) == pytest.approx(1 / 3, rel=0.05)
    both = RobustRecipe(kind="fgm", neftune=5.0, epsilon=1e-9)
    torch.manual_seed(3)
    first, second = embedded(model, model.embed_tokens, both, lambda: causal_loss(model, batch).total)
    torch.testing.assert_close(first, moved)
    torch.testing.assert_close(second, moved)
    (other,) = embedded(model, model.embed_tokens, RobustRecipe(neftune=5.0), lambda: causal_loss(model, batch).total)
    assert not torch.allclose(other, moved)  # the next part has noise of its own


def test_passes_share_their_dropout() -> None:
    model, batch = decoder(dropout=0.5), batch_of()
    still = RobustRecipe(kind="pgd", epsilon=1e-9, steps=2)
    losses, _ = run(still, model, lambda: causal_loss(model, batch).total)
    again, _ = run(still, model, lambda: causal_loss(model, batch).total)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[0] != pytest.approx(again[0], rel=1e-5)


@pytest.mark.parametrize("kind", ADVERSARIES)
def test_frozen_embeddings_and_computing_blocks_again_change_nothing(kind: str) -> None:
    robust, batch = ADVERSARIES[kind], batch_of()
    whole, frozen = decoder(dropout=0.1), decoder(dropout=0.1)
    frozen.embed_tokens.requires_grad_(False)
    for block in frozen.layers:
        forward = block.forward
        block.forward = lambda *inputs, forward=forward: checkpoint(forward, *inputs, use_reentrant=False)  # type: ignore[assignment]
    found = []
    for model in (whole, frozen):
        torch.manual_seed(0)
        found.append(run(robust, model, lambda model=model: causal_loss(model, batch).total))  # type: ignore[misc]
    (losses, gradients), (theirs, their_gradients) = found
    assert losses == pytest.approx(theirs, rel=1e-6)
    assert gradients.keys() - their_gradients.keys() == {"embed_tokens.weight"}
    for name, gradient in their_gradients.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ADVERSARIES)
def test_in_bfloat16(kind: str) -> None:
    model, batch = decoder(), batch_of()

    def share() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return causal_loss(model, batch).total

    losses, gradients = run(ADVERSARIES[kind], model, share)
    expected, _ = run(ADVERSARIES[kind], model, lambda: causal_loss(model, batch).total)
    assert losses == pytest.approx(expected, rel=0.01)
    assert all(bool(gradient.isfinite().all()) for gradient in gradients.values())


def test_padding_is_not_moved() -> None:
    config = EncoderConfig(vocab_size=50, hidden_size=16, num_layers=1, num_heads=2, intermediate_size=32,
                           max_positions=16, dropout=0.0, attention_dropout=0.0, labels=("no", "yes"))  # fmt: skip
    model = Encoder(config)
    init_weights(model, 0)
    ids = torch.randint(1, 50, (2, 8), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 3:] = 0

    def share() -> Tensor:
        return F.cross_entropy(model.class_logits(model(ids, mask)), torch.tensor([0, 1]), reduction="sum")

    plain, moved = embedded(model.train(), model.embed_tokens, ADVERSARIES["fgm"], share)
    distances = (moved - plain).norm(dim=(1, 2)) / (plain * mask[..., None]).norm(dim=(1, 2))
    torch.testing.assert_close(distances, torch.full((2,), 0.2))
    assert torch.equal(moved[1, 3:], plain[1, 3:]) and not torch.equal(moved[1, :3], plain[1, :3])


def test_of_an_encoder_decoder_the_source_is_moved() -> None:
    shape: dict[str, Any] = {"hidden_size": 16, "num_encoder_layers": 1, "num_decoder_layers": 1, "num_heads": 2,
                             "intermediate_size": 32, "max_positions": 16, "dropout": 0.0, "head_dim": 8,
                             "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1}  # fmt: skip
    model = EncoderDecoder(Seq2SeqConfig.of_family("marian", vocab_size=50, **shape))
    init_weights(model, 0)
    sources, targets = [np.array([5, 6, 7]), np.array([8, 9])], [np.array([1, 2]), np.array([3])]
    batch = pair_batch(sources, targets, 0, (Origin(0, 0, 0), Origin(0, 1, 0)), is_text=True)
    loss = with_r_drop(seq2seq_loss, 1.0)  # reads both twice
    seen = embedded(model.train(), model.embed_tokens, ADVERSARIES["fgm"], lambda: loss(model, batch).total)
    assert len(seen) == 8
    for plain, moved, is_source in zip(seen[:4], seen[4:], (True, False, True, False), strict=True):
        assert torch.equal(plain, moved) != is_source


def test_a_recurrent_model_and_nothing_to_learn() -> None:
    model = LSTMLanguageModel(LSTMConfig(vocab_size=50, hidden_size=16, num_layers=1))
    init_weights(model, 0)
    batch = batch_of()
    losses, _ = run(ADVERSARIES["fgm"], model.train(), lambda: causal_loss(model, batch).total)
    assert losses[0] < losses[1]
    batch.targets[:] = -100
    losses, gradients = run(ADVERSARIES["pgd"], model, lambda: causal_loss(model, batch).total)
    assert losses == [0, 0] and all(not gradient.any() for gradient in gradients.values())


def test_who_was_attacked_stands_attacks_better() -> None:
    batch, attack, lost = batch_of(8), RobustRecipe(kind="pgd", epsilon=0.3, steps=4), {}
    for robust in (RobustRecipe(), RobustRecipe(kind="fgm", epsilon=0.3), RobustRecipe(kind="freelb", epsilon=0.3)):
        model = decoder()
        share = partial(mean_loss, model, batch)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for _ in range(100):  # the rows are learned by heart
            run(robust, model, share)
            optimizer.step()
        plain, lost[robust.kind] = run(attack, model, share)[0]
        assert plain < 0.1
    assert lost["none"] > 1
    assert lost["fgm"] < 0.5 * lost["none"] and lost["freelb"] < 0.5 * lost["none"]


def mean_loss(model: Any, batch: Batch) -> Tensor:
    return causal_loss(model, batch).total / batch.num_targets


def test_who_leaves_goes_on_with_the_same_noise(texts: Texts, tmp_path: Path) -> None:
    recipe = make_recipe(steps=6, eval_every=3, checkpoint_minutes=60)
    job = Job("t", 0, recipe.training, robust=RobustRecipe(kind="freelb", steps=2, neftune=5.0))
    whole = list(train_run(job, tmp_path / "a", build(recipe, texts), causal_loss, texts, print))
    generator = train_run(job, tmp_path / "b", build(recipe, texts), causal_loss, texts, print)
    for event in generator:
        if event.step == 4:
            break
    generator.close()
    rest = list(train_run(job, tmp_path / "b", build(recipe, texts), causal_loss, texts, print))
    losses = [[event.loss for event in events if isinstance(event, StepInfo)] for events in (whole, rest)]
    assert losses[1] == losses[0][4:]
    assert isinstance(rest[-1], Evaluation) and rest[-1].scores == whole[-1].scores
    plain = Job("t", 0, recipe.training)
    assert plain.identity(texts) != job.identity(texts)


class Small:
    """As an adapter would: its penalty joins the gradient, and it sees gradients before weights move."""

    def __init__(self, weight: Tensor) -> None:
        self.weight, self.seen = weight, list[tuple[int, int, bool]]()

    def penalty(self) -> Tensor | None:
        return None if len(self.seen) == 1 else 3 * self.weight.sum()

    def after_backward(self, step: int, total_steps: int) -> None:
        assert self.weight.grad is not None
        self.seen.append((step, total_steps, bool((self.weight.grad > 2.9).all())))


def test_a_penalty_joins_the_gradient_once(texts: Texts) -> None:
    recipe = make_recipe(steps=3, clip=0.0, learning_rate=1e-4, micro_batch=2, ema=0.9)  # four parts of two rows
    model = build(recipe, texts)
    model.embed_tokens.requires_grad_(False)
    state = TrainingState(model, make_optimizers(model, recipe.training), PackedLoader([texts.train["zh"]], length=32))
    regulariser = Small(model.final_norm.get_parameter("weight"))
    before = regulariser.weight.detach().clone()
    for info in train(state, causal_loss, recipe.training, regulariser=regulariser):
        assert info.loss < 8  # ln 600 is 6.4: the penalty, 3 * 32, is not told
    assert regulariser.seen == [(1, 3, True), (2, 3, False), (3, 3, True)]
    assert bool((regulariser.weight < before).all())
    assert "embed_tokens.weight" not in state.ema and "final_norm.weight" in state.ema  # what is frozen has no average


def test_a_bad_loss_while_moved_keeps_the_weights(texts: Texts) -> None:
    recipe = make_recipe()
    model = build(recipe, texts)
    calls = 0

    def objective(model: Decoder, batch: Any, **options: Any) -> Loss:
        nonlocal calls
        calls += 1
        loss = causal_loss(model, batch, **options)
        return loss if calls % 2 else Loss(loss.total * float("nan"), loss.num_targets)  # of the moved text

    state = TrainingState(model, make_optimizers(model, recipe.training), PackedLoader([texts.train["zh"]], length=32))
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    with pytest.raises(TrainingError, match="not a number"):
        next(train(state, objective, recipe.training, robust=ADVERSARIES["fgm"]))
    assert all(torch.equal(weight, before[name]) for name, weight in model.named_parameters())


def test_an_adversary_that_never_moves_is_refused() -> None:
    with pytest.raises(ValueError, match="2 or more"):
        RobustRecipe(kind="freelb", steps=1)


# --- several processes ----------------------------------------------------------------------------------------------

SCRIPT = """
import json, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from bimo.data.shards import TokenFile
from bimo.runtime import ranks
from bimo.training.distributed import process_group
from tests.training.test_robust import steps_of
mine, file = ranks(), TokenFile.open(Path(sys.argv[2]))
with process_group(mine):
    found = {f"{way} {kind}": steps_of(kind, way, file, mine) for way in ("ddp", "fsdp") for kind in ("pgd", "freelb")}
if mine.is_main:
    Path(sys.argv[3]).write_text(json.dumps(found))
"""


def steps_of(kind: str, way: Any, file: Any, ranks: Any) -> list[list[float]]:
    """Steps of five rows in parts of two: the second process has nothing in its last part."""
    from bimo.training.distributed import parallelize

    recipe = make_recipe(steps=3, batch_tokens=80, micro_batch=2, learning_rate=5e-3).training
    model = decoder(vocab_size=600)
    objective = parallelize(model, causal_loss, way, ranks)
    loader = PackedLoader([file], length=16)
    state = TrainingState(model, make_optimizers(model, recipe), loader, ranks=ranks)
    return [[info.loss, info.grad_norm] for info in train(state, objective, recipe, robust=ADVERSARIES[kind])]


def test_two_processes_move_as_one_does(tmp_path: Path) -> None:
    from bimo.runtime import Ranks

    file = make_texts(tmp_path).train["en"]
    (tmp_path / "script.py").write_text(SCRIPT, encoding="utf-8")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    root = str(Path(__file__).parents[2])
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(tmp_path / "script.py"), root, str(file.folder), str(tmp_path / "found.json")]
    processes = [
        subprocess.Popen(command, env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}, cwd=root)
        for rank in range(2)
    ]
    assert [process.wait(120) for process in processes] == [0, 0]
    for name, found in json.loads((tmp_path / "found.json").read_text()).items():
        expected = steps_of(name.split()[1], "auto", file, Ranks())
        torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-4, atol=1e-5, msg=name)
