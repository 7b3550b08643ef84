"""Advice on what to train: laws at points that are known, memory as autograd keeps it, more time never less model."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import pytest
import torch

import bimo.training.plan as planning
from bimo import runtime
from bimo.data.loader import PackedLoader
from bimo.data.shards import TokenFile
from bimo.errors import UsageError
from bimo.models import fused_training
from bimo.models.catalog import SIZES
from bimo.models.decoder import Decoder
from bimo.models.initial import init_weights
from bimo.objectives.causal import causal_loss
from bimo.recipe import ModelRecipe, TrainingRecipe, load_recipe
from bimo.training.build import decoder_config
from bimo.training.plan import (
    LADDER,
    Plan,
    Planner,
    Throughput,
    effective_tokens,
    expected_loss,
    flops_per_token,
    measure_throughput,
    optimal_ratio,
    training_memory,
)

SPEED = Throughput(((1_000_000, 5e10), (100_000_000, 2e11)))
HOUR = 3600.0


def planner(**known: object) -> Planner:
    facts: dict[str, object] = {"shape": decoder_config, "speed": SPEED, "vocab_size": 8192, "context_length": 256}
    return Planner(**{**facts, **known})  # type: ignore[arg-type]


# --- laws -----------------------------------------------------------------------------------------------------------


def test_operations_of_gpt3() -> None:
    # arXiv:2005.14165, table D.1: 3.14e23 for 300 billion tokens; its attention adds 2 % that the table leaves out
    config = SIZES["gpt3-175b"]
    assert flops_per_token(config, 0) * 300e9 == pytest.approx(3.14e23, rel=0.005)
    assert flops_per_token(config, 2048) / flops_per_token(config, 0) == pytest.approx(1.028, abs=0.001)


def test_attention_grows_with_the_row_and_the_layers() -> None:
    config = decoder_config(ModelRecipe(hidden_size=128, num_layers=3), 1000)
    assert flops_per_token(config, 512) - flops_per_token(config, 0) == 12 * 3 * 512 * 128


def test_chinchilla() -> None:
    # the corrected fit at 70B parameters and 1.4T tokens, by hand: 1.8172 + 0.0815 + 0.0752
    assert expected_loss(70e9, 1.4e12) == pytest.approx(1.9739, abs=0.0002)
    assert expected_loss(math.inf, math.inf) == 1.8172
    assert optimal_ratio(5.76e23) == pytest.approx(20, rel=0.1)  # Chinchilla's cost and ratio


def test_the_optimal_ratio_is_the_laws_minimum() -> None:
    flops = 1e18
    best = (flops / 6 / optimal_ratio(flops)) ** 0.5
    losses = [expected_loss(size, flops / 6 / size) for size in (best * 0.97, best, best * 1.03)]
    assert losses[1] == min(losses)


def test_text_read_again_is_worth_less() -> None:
    assert effective_tokens(50, 100) == 50
    assert effective_tokens(400, None) == 400
    assert 0.9 * 400 < effective_tokens(400, 100) < 400  # four times: nearly as good as new
    assert effective_tokens(10**9, 100) == pytest.approx(16.39 * 100)  # for ever: no more than this


@pytest.mark.parametrize("unique", [None, 2e9, 5e8])
def test_tokens_for_a_loss_give_that_loss(unique: float | None) -> None:
    tokens = planning._tokens_for(300_000_000, 3.5, unique)
    assert tokens is not None
    assert expected_loss(300_000_000, effective_tokens(tokens, unique)) == pytest.approx(3.5)


def test_losses_out_of_reach() -> None:
    assert planning._tokens_for(1_000_000, 3.0, None) is None  # too small a model
    assert planning._tokens_for(300_000_000, 3.5, 1e7) is None  # too little text, however often


# --- memory ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "loops", "numbers"),
    [("float32", False, (48, 16)), ("bfloat16", False, (32, 8)), ("bfloat16", True, (20, 6))],
)
def test_activations_are_what_autograd_keeps(
    dtype: str, loops: bool, numbers: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    length, rows, width = 64, 4, 128
    if loops and not fused_training.available():
        pytest.skip("bimo-kernels is not built: pip install ./kernels")
    if not loops:
        monkeypatch.setattr(fused_training, "_loops", lambda: None)

    def kept(layers: int) -> tuple[int, int]:
        config = decoder_config(ModelRecipe(hidden_size=width, num_layers=layers, context_length=length), 500)
        model = Decoder(config)
        init_weights(model, 0)
        text = torch.arange(rows * length + 1).remainder(500).numpy()
        ends = torch.tensor([40, 90, 150, len(text)]).numpy()
        batch = PackedLoader([TokenFile(Path("x"), text, ends)], length=length).next_batch(rows)
        weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
        arrays = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                arrays[storage.data_ptr()] = tensor, storage.nbytes()
            return tensor

        mixed = torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16")
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), mixed:
            causal_loss(model, batch)
        return sum(size for _, size in arrays.values()), config.num_parameters

    (few, small), (many, large) = kept(1), kept(4)
    casts = 2 * (large - small) if dtype == "bfloat16" else 0  # the layers' weights in bfloat16
    inner = decoder_config(ModelRecipe(hidden_size=width), 500).intermediate_size
    expected = 3 * rows * length * (numbers[0] * width + numbers[1] * inner)
    if loops:
        expected += 3 * rows * length * 2 * length * (width // 64)  # attention's weights: one block of all keys
    assert many - few - casts == pytest.approx(expected, rel=0.05)


def test_memory_of_training() -> None:
    config = decoder_config(ModelRecipe(hidden_size=512, num_layers=8, context_length=512), 16_384)
    small = TrainingRecipe(micro_batch=1, dtype="float32")
    large = TrainingRecipe(micro_batch=16, dtype="float32")
    assert training_memory(config, small) > 16 * config.num_parameters
    again = large.model_copy(update={"activation_checkpointing": True})
    assert training_memory(config, small) < training_memory(config, again) < training_memory(config, large)
    few_rows = large.model_copy(update={"batch_tokens": 512})  # one row is all there is to compute at once
    assert training_memory(config, few_rows) == training_memory(config, small)


# --- measuring ------------------------------------------------------------------------------------------------------


def test_speed_is_measured_by_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "PROBES", ((64, 1), (128, 1)))
    monkeypatch.setattr(planning, "PROBE_SECONDS", 0.05)
    told: list[str] = []
    speed = measure_throughput(
        decoder_config, vocab_size=500, context_length=64, progress=lambda label, done, total: told.append(label)
    )
    sizes, rates = zip(*speed.points, strict=True)
    assert sizes == tuple(
        decoder_config(ModelRecipe(hidden_size=width, num_layers=1), 500).num_parameters for width in (64, 128)
    )
    assert all(1e7 < rate < 1e15 for rate in rates)
    assert ["model 1 of 2" in told[0], "model 2 of 2" in told[1]] == [True, True]


def test_a_model_too_large_to_measure_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "PROBES", ((64, 1), (2048, 8)))
    monkeypatch.setattr(planning, "PROBE_SECONDS", 0.05)
    monkeypatch.setattr(planning, "LONGEST_PROBE", 0.01)
    assert len(measure_throughput(decoder_config, vocab_size=500, context_length=64).points) == 1


def test_speed_between_and_beyond_measured_sizes() -> None:
    assert SPEED.at(1_000_000) == 5e10
    assert SPEED.at(10_000_000) == pytest.approx(1.25e11)  # half-way by the logarithm
    assert SPEED.at(10) == 5e10
    assert SPEED.at(10**12) == 2e11


def test_memory_is_read() -> None:
    assert 1e8 < runtime.measure_read_bandwidth(8 << 20) < 1e13


# --- planning -------------------------------------------------------------------------------------------------------


def test_the_ladder_climbs() -> None:
    configs = [decoder_config(model, 16_384) for model in LADDER]
    sizes = [config.num_parameters for config in configs]
    assert sizes == sorted(sizes)
    assert sizes[0] < 2e6 and sizes[-1] > 5e9
    assert all(large < 2.3 * small for small, large in itertools.pairwise(sizes))
    assert {config.head_dim for config in configs} == {64}


@pytest.mark.parametrize("data_tokens", [None, 10**6, 3 * 10**8])
def test_more_hours_never_a_smaller_model(data_tokens: int | None) -> None:
    asked = planner(data_tokens=data_tokens)
    sizes = [asked.in_time(0.01 * HOUR * 1.13**step)["advised"].num_parameters for step in range(100)]
    assert sizes == sorted(sizes)
    assert data_tokens == 10**6 or sizes[-1] > sizes[0]


def test_the_advised_uses_the_time_and_sees_twenty_tokens_a_parameter() -> None:
    plans = planner().in_time(24 * HOUR)
    advised = plans["advised"]
    assert advised.seconds == pytest.approx(24 * HOUR, rel=0.01)
    assert 19.9 < advised.tokens / advised.num_parameters < 60
    assert plans["smaller"].num_parameters < advised.num_parameters < plans["larger"].num_parameters
    assert plans["larger"].tokens < 20 * plans["larger"].num_parameters
    assert advised.tokens == advised.training.steps * advised.training.batch_tokens
    assert advised.flops == pytest.approx(advised.seconds * SPEED.at(advised.num_parameters))
    assert advised.num_embedding == 8192 * advised.model.hidden_size


def test_text_is_read_four_times_at_most() -> None:
    plans = planner(data_tokens=10**8).in_time(1000 * HOUR)
    assert all(plan.epochs is not None and plan.epochs <= 4.001 for plan in plans.values())
    assert plans["advised"].num_parameters * 20 <= 4.01e8
    assert plans["advised"].seconds < 500 * HOUR  # more time would not help


def test_batch_and_learning_rate_follow_the_cost() -> None:
    small, large = (planner().in_time(hours * HOUR)["advised"] for hours in (10, 10_000))
    assert large.training.batch_tokens > small.training.batch_tokens
    assert large.training.learning_rate < small.training.learning_rate <= 3e-3
    for plan in (small, large):
        assert plan.training.batch_tokens == pytest.approx(0.2920 * plan.flops**0.3271, rel=0.5)  # in powers of two
    assert planner().in_time(1)["advised"].training.steps >= 1


def test_little_memory_computes_less_at_once_then_blocks_twice() -> None:
    model = LADDER[10]
    free = planner().plan(model, 1e8)
    tight = planner(memory=int(free.memory * 0.7)).plan(model, 1e8)
    assert tight.fits and tight.training.micro_batch < free.training.micro_batch
    tightest = planner(memory=training_memory_of(model, micro_batch=1, activation_checkpointing=True)).plan(model, 1e8)
    assert tightest.fits and tightest.training.activation_checkpointing


def training_memory_of(model: ModelRecipe, **settings: object) -> int:
    config = decoder_config(model.model_copy(update={"context_length": 256}), 8192)
    return training_memory(config, TrainingRecipe.model_validate(settings))


def test_less_memory_a_smaller_model() -> None:
    large = planner().in_time(10_000 * HOUR)
    small = planner(memory=10**9).in_time(10_000 * HOUR)
    assert small["advised"].memory <= 10**9 < large["advised"].memory
    assert not small["larger"].fits


def test_no_memory_at_all_is_said() -> None:
    with pytest.raises(UsageError, match=r"needs about 0\.\d+ GB to train, 0\.01 GB are free: end other programs"):
        planner(memory=10**7).in_time(HOUR)


def test_a_recipes_model_that_does_not_fit_is_refused_with_what_helps() -> None:
    tight = planner(memory=10**9)
    rows = TrainingRecipe(micro_batch=64, batch_tokens=16_384)
    plan = tight.plan(ModelRecipe(hidden_size=384, num_layers=6), 1e8, rows)
    with pytest.raises(UsageError, match=r"16M|14M|13M.*GB are free: set training.micro_batch=1, or take a smaller"):
        tight.require(plan)
    huge = tight.plan(ModelRecipe(hidden_size=8192, num_layers=48), 1e8, rows)
    with pytest.raises(UsageError) as caught:
        tight.require(huge)
    assert "micro_batch" not in str(caught.value)  # would not help
    fitting = str(caught.value).split("(hidden_size ")[1].split(" fits")[0].split(", num_layers ")
    small = tight.plan(ModelRecipe(hidden_size=int(fitting[0]), num_layers=int(fitting[1])), 1e8)
    assert small.fits
    tight.require(small)


def test_how_long_to_a_loss() -> None:
    plans = planner().to_loss(3.5)
    assert all(plan.expected_loss == pytest.approx(3.5, abs=0.01) for plan in plans.values())
    assert all(plans["advised"].seconds <= plan.seconds for plan in plans.values())
    assert planner().to_loss(3.0)["advised"].seconds > plans["advised"].seconds


@pytest.mark.parametrize(
    ("loss", "known", "said"),
    [
        (1.8, {}, r"below what the law says any model reaches, 1\.8172"),
        (3.5, {"data_tokens": 10**6}, "1,000,000 tokens, read 4 times, bring no size here below"),
        (2.5, {"memory": 10**9}, r"needs about .* GB to train, 1\.00 GB are free"),
        (1.95, {}, r"no size up to \d\.\dB reaches"),
    ],
)
def test_a_loss_out_of_reach_says_why(loss: float, known: dict[str, object], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        planner(**known).to_loss(loss)


def test_where_the_law_says_less_than_guessing_nothing_is_said() -> None:
    assert planner().in_time(30)["advised"].expected_loss is None


@pytest.mark.parametrize("memory", [None, 2 * 10**8, 10**9])
@pytest.mark.parametrize("hours", [0.001, 2, 3000])
def test_the_fragment_is_a_recipe(tmp_path: Path, hours: float, memory: int | None) -> None:
    advised = planner(memory=memory, dtype="float32").in_time(hours * HOUR)["advised"]
    file = tmp_path / "笔.toml"
    sources = 'name = "x"\n[[data.sources]]\nname = "文"\npath = "texts"\n'
    file.write_text(sources + advised.fragment(), encoding="utf-8")
    recipe = load_recipe(file)
    assert recipe.model == advised.model
    assert recipe.training == advised.training
    assert decoder_config(recipe.model, 8192).num_parameters == advised.num_parameters


def test_the_fragment_keeps_what_the_recipe_set() -> None:
    model = ModelRecipe(hidden_size=128, num_heads=4, num_kv_heads=2, dropout=0.1, context_length=256)
    plan: Plan = planner().plan(model, 1e6)
    assert all(line in plan.fragment() for line in ("num_heads = 4", "num_kv_heads = 2", "dropout = 0.1"))
