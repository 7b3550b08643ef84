"""Schedules, optimisers and what changes how a model computes but not what it learns."""

from __future__ import annotations

from pathlib import Path

import pytest

from bimo.errors import UsageError
from bimo.models.config import LSTMConfig, Seq2SeqConfig
from bimo.models.recurrent import LSTMLanguageModel
from bimo.models.seq2seq import EncoderDecoder
from bimo.objectives.causal import causal_loss
from bimo.recipe import TrainingRecipe
from bimo.training.loop import StepInfo, current_stage
from bimo.training.optim import learning_rate, make_optimizers
from bimo.training.session import Job, Texts, train_run
from tests.training.tiny import build, make_recipe


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant", "wsd"])
def test_schedules(schedule: str) -> None:
    recipe = TrainingRecipe(steps=100, learning_rate=1.0, warmup=0.1, final_learning_rate=0.1, schedule=schedule)  # type: ignore[arg-type]
    rates = [learning_rate(step, recipe) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == pytest.approx(1.0)
    after = rates[10:]
    assert after == sorted(after, reverse=True)
    assert rates[-1] == pytest.approx(1.0 if schedule == "constant" else 0.1, abs=0.06)
    assert rates[70] == pytest.approx({"cosine": 0.325, "linear": 0.4, "constant": 1, "wsd": 1}[schedule])


def test_a_curriculum_goes_from_short_to_long() -> None:
    recipe = TrainingRecipe(steps=10, curriculum=((0.3, 64), (0.3, 128), (0.4, 512)))
    stages = [current_stage(step, recipe, 256) for step in range(10)]
    assert stages == [(64, 3)] * 3 + [(128, 6)] * 3 + [(256, 10)] * 4
    assert current_stage(7, TrainingRecipe(steps=10), 256) == (256, 10)


def test_only_matrices_are_decayed(texts: Texts) -> None:
    recipe = make_recipe(optimizer="muon", weight_decay=0.3)
    model = build(recipe, texts)
    muon, adamw = make_optimizers(model, recipe.training)
    decayed = {id(w) for o in (muon, adamw) for g in o.param_groups if g["weight_decay"] for w in g["params"]}
    assert decayed == {id(weight) for weight in model.parameters() if weight.ndim >= 2}
    inner = {id(weight) for group in muon.param_groups for weight in group["params"]}
    assert inner == {id(w) for name, w in model.named_parameters() if w.ndim >= 2 and name.startswith("layers.")}


def curve(texts: Texts, folder: Path, **training: object) -> list[float]:
    recipe = make_recipe(steps=6, **training)
    events = train_run(Job.of(recipe), folder, build(recipe, texts), causal_loss, texts, print)
    return [event.loss for event in events if isinstance(event, StepInfo)]


def test_ways_of_computing_do_not_change_the_losses(texts: Texts, tmp_path: Path) -> None:
    shape = {"optimizer": "sgd", "learning_rate": 0.1}
    recipe_losses = curve(texts, tmp_path / "plain", **shape)
    again = curve(texts, tmp_path / "remember", activation_checkpointing=True, **shape)
    assert again == pytest.approx(recipe_losses, rel=1e-5)


def test_smoothing_and_bfloat16_train(texts: Texts, tmp_path: Path) -> None:
    for name, settings in (("smooth", {"label_smoothing": 0.1}), ("half", {"dtype": "bfloat16"})):
        losses = curve(texts, tmp_path / name, learning_rate=1e-2, **settings)
        assert losses[-1] < losses[0] - 0.2


def test_muon_takes_the_matrices_of_all_blocks_and_of_blocks_only() -> None:
    recipe = make_recipe(optimizer="muon").training
    shape = {"vocab_size": 100, "hidden_size": 32, "max_positions": 16}
    model = EncoderDecoder(
        Seq2SeqConfig.of_family(
            "t5",
            **shape,
            num_encoder_layers=1,
            num_decoder_layers=2,
            num_heads=2,
            head_dim=16,
            intermediate_size=64,
            decoder_start_token_id=0,
            pad_token_id=0,
            eos_token_id=1,
        )
    )
    muon, _ = make_optimizers(model, recipe)
    inner = {id(weight) for group in muon.param_groups for weight in group["params"]}
    assert inner == {id(weight) for layer in model.layers for weight in layer.parameters() if weight.ndim >= 2}
    with pytest.raises(UsageError, match="this model has none"):
        make_optimizers(LSTMLanguageModel(LSTMConfig(vocab_size=100, hidden_size=32, num_layers=1)), recipe)
