"""What to train in the time, memory and text at hand: size, tokens, batch, expected loss. `bimo plan` shows it.

    speed = measure_throughput(shape, vocab_size=16_384, context_length=512)     # trains tiny models for some seconds
    planner = Planner(shape=shape, speed=speed, vocab_size=16_384, context_length=512, memory=8 << 30)
    planner.in_time(2 * 3600)["advised"]                                         # a Plan
    planner.to_loss(4.0)["advised"]

`shape(model_recipe, vocab_size)` is the configuration that `bimo run` builds (`cli.stages.decoder_config`). The advice
rests on:

cost      C = (6 N + 12 layers T width) D: operations for D tokens in rows of T (arXiv:2001.08361; attention as in
          arXiv:2203.15556, appendix F, masked half included). N: all parameters, a tied embedding once, since it is
          multiplied with once, as the head.
split     about 20 tokens a parameter (Chinchilla, arXiv:2203.15556), so: the largest model that sees as many.
loss      L(N, D) = 1.8172 + 482.01 / N^0.3478 + 2085.43 / D^0.3658 nats a token, the corrected fit of Chinchilla's runs
          (Besiroglu et al. 2024, arXiv:2404.10102): 70M to 16B parameters, another tokenizer, mostly English web text.
epochs    text read again is worth less each time, D' = U + 15.39 U (1 - exp(-(epochs - 1) / 15.39)) of U tokens
          (arXiv:2305.16264); four readings are nearly as good as new text and the most that is advised.
batch     0.2920 C^0.3271 tokens, learning rate 0.3118 C^-0.1250 (AdamW; DeepSeek LLM, arXiv:2401.02954).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bimo.data.loader import PackedLoader
from bimo.data.shards import TokenFile
from bimo.errors import UsageError
from bimo.models import fused_training
from bimo.models.config import DecoderConfig
from bimo.models.decoder import Decoder
from bimo.models.initial import init_weights
from bimo.objectives.causal import causal_loss
from bimo.recipe import ModelRecipe, TrainingRecipe
from bimo.registries.trouble import Progress
from bimo.runtime import dtype_name
from bimo.training.loop import TrainingState, train
from bimo.training.optim import make_optimizers

__all__ = [
    "LADDER",
    "Plan",
    "Planner",
    "Shape",
    "Throughput",
    "effective_tokens",
    "expected_loss",
    "flops_per_token",
    "measure_throughput",
    "optimal_ratio",
    "training_memory",
]

Shape = Callable[[ModelRecipe, int], DecoderConfig]  # (model, vocab_size) -> configuration

TOKENS_PER_PARAMETER = 20
MOST_EPOCHS = 4
IRREDUCIBLE, SIZE_FACTOR, SIZE_POWER, DATA_FACTOR, DATA_POWER = 1.8172, 482.01, 0.3478, 2085.43, 0.3658
REPEATS_WORTH = 15.39  # readings after the first, after which more adds little
LEAST_STEPS = 200  # fewer, larger batches would leave the learning rate no time to rise and fall
HIGHEST_RATE = 3e-3  # the rule was fitted to 1e17 operations and more; below, it goes on rising
MICRO_TOKENS = 4096  # computed at once; more is not faster on a CPU
PROBES = ((128, 2), (256, 4), (512, 4))  # width, layers
PROBE_TOKENS = 1024  # of a step
PROBE_SECONDS = 1.0  # of timed steps each
LEAST_TIMED = 3  # steps; the fastest counts, others may have waited for another program
LONGEST_PROBE = 6.0  # seconds; a larger model than that allows is not measured

LADDER = tuple(
    ModelRecipe(hidden_size=width, num_layers=layers)
    for width, layers in (
        *((64, 2), (128, 2), (128, 4), (192, 4), (256, 4), (256, 6), (320, 6), (384, 6), (384, 8), (448, 8)),
        *((512, 8), (512, 10), (576, 10), (640, 10), (640, 12), (768, 12), (896, 12), (896, 14), (1024, 16)),
        *((1152, 18), (1280, 20), (1536, 20), (1536, 24), (1792, 24), (2048, 24), (2304, 26), (2560, 28)),
        *((2560, 32), (3072, 28), (3072, 32), (3584, 32), (4096, 32)),
    )
)


# --- laws -----------------------------------------------------------------------------------------------------------


def flops_per_token(config: DecoderConfig, length: int) -> float:
    """Operations, forward and backward, for one token in a row of `length`."""
    return 6 * config.num_parameters + 12 * config.num_layers * length * config.num_heads * config.head_dim


def expected_loss(num_parameters: float, tokens: float) -> float:
    """Nats a token after training on `tokens` different ones."""
    return IRREDUCIBLE + SIZE_FACTOR / num_parameters**SIZE_POWER + DATA_FACTOR / tokens**DATA_POWER


def effective_tokens(tokens: float, unique: float | None) -> float:
    """What `tokens` are worth when only `unique` of them differ; None: all do."""
    if unique is None or tokens <= unique:
        return tokens
    repeats = tokens / unique - 1
    return unique * (1 + REPEATS_WORTH * (1 - math.exp(-repeats / REPEATS_WORTH)))


def optimal_ratio(flops: float) -> float:
    """Tokens a parameter that `expected_loss` itself finds best for 6 N D operations: the 20 is a round number."""
    power = SIZE_POWER + DATA_POWER
    balance = (SIZE_POWER * SIZE_FACTOR / (DATA_POWER * DATA_FACTOR)) ** (1 / power)
    num_parameters = balance * (flops / 6) ** (DATA_POWER / power)
    return flops / 6 / num_parameters**2


def _tokens_for(num_parameters: int, loss: float, unique: float | None) -> float | None:
    """Tokens to read until `expected_loss` is `loss`; None where this model, or this text, never comes to it."""
    left = loss - IRREDUCIBLE - SIZE_FACTOR / num_parameters**SIZE_POWER
    if left <= 0:
        return None
    worth = (DATA_FACTOR / left) ** (1 / DATA_POWER)
    if unique is None or worth <= unique:
        return worth
    share = (worth / unique - 1) / REPEATS_WORTH
    tokens = unique * (1 - REPEATS_WORTH * math.log(1 - share)) if share < 1 else math.inf
    return tokens if tokens <= MOST_EPOCHS * unique else None


# --- memory ---------------------------------------------------------------------------------------------------------


def training_memory(config: DecoderConfig, training: TrainingRecipe) -> int:
    """Bytes, about: weights, gradients and AdamW's two averages in float32, and what a micro-batch leaves for the way
    back; a tenth more for the rest.

    A token leaves 12 width + 4 intermediate numbers in each layer (counted from what autograd keeps; a test does it
    again), in bfloat16 where products are; the C++ loops keep less, and what attention keeps is counted with them. The
    loss makes the head's gradient in an array of its own, twice. Compared with what processes took, it was between a
    tenth too little and a quarter too much.
    """
    narrow = dtype_name(training.dtype) == "bfloat16"
    rows = max(1, min(training.micro_batch, training.batch_tokens // config.max_positions))
    tokens = rows * config.max_positions
    width, inner = config.hidden_size, config.intermediate_size
    if narrow and fused_training.available():
        weights = config.num_heads * config.max_positions  # half of them in bfloat16, and the rest of their last block
        of_layer = tokens * (20 * width + 6 * inner + weights)
    else:
        of_layer = tokens * (32 * width + 8 * inner if narrow else 48 * width + 16 * inner)
    activations = of_layer * (config.num_layers + 1)  # and the gradients of one layer's
    if training.activation_checkpointing:
        activations = 2 * of_layer + 4 * tokens * width * config.num_layers
    mask = tokens * config.max_positions * (2 if narrow else 4)
    head = 2 * 4 * config.vocab_size * width + 4 * 4 * min(1 << 23, tokens * config.vocab_size)
    state = config.num_parameters * (18 if narrow else 16)
    return int(1.1 * (state + activations + mask + head))


# --- measuring ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Throughput:
    """Training speed as measured: (parameters, operations a second), by size."""

    points: tuple[tuple[int, float], ...]

    def at(self, num_parameters: int) -> float:
        """Operations a second for this size: between two measured ones by the logarithm, outside as the nearest."""
        sizes, rates = zip(*sorted(self.points), strict=True)
        return float(np.interp(math.log(num_parameters), np.log(sizes), rates))


def measure_throughput(
    shape: Shape,
    *,
    vocab_size: int,
    context_length: int,
    dtype: str = "auto",
    progress: Progress = lambda label, done, total: None,
) -> Throughput:
    """Train a few small decoders on random tokens by the real loop, some seconds in all.

    Steps are short, so the optimiser's share is a little too large: long trainings are rather faster.
    """
    points: list[tuple[int, float]] = []
    tokens = max(PROBE_TOKENS, context_length)
    for number, (width, layers) in enumerate(PROBES, start=1):
        progress(f"measuring how fast this machine trains, model {number} of {len(PROBES)}", 0, 0)
        recipe = ModelRecipe(hidden_size=width, num_layers=layers, context_length=context_length)
        config = shape(recipe, vocab_size)
        flops = flops_per_token(config, context_length) * tokens
        if points and 2 * flops / points[-1][1] > LONGEST_PROBE:
            break
        points.append((config.num_parameters, flops / min(_step_seconds(config, tokens, dtype))))
    return Throughput(tuple(points))


def _step_seconds(config: DecoderConfig, batch_tokens: int, dtype: str) -> Iterator[float]:
    """Seconds of some training steps; the first, which allocates, is left out."""
    length = config.max_positions
    generator = np.random.default_rng(0)
    text = generator.integers(0, config.vocab_size, 4 * batch_tokens + 1).astype(np.uint32)
    ends = np.append(np.arange(300, len(text), 300), len(text))  # documents end within rows, as in real text
    loader = PackedLoader([TokenFile(Path("random"), text, ends)], length=length)
    model = Decoder(config)
    init_weights(model, 0)
    recipe = TrainingRecipe(
        steps=20, batch_tokens=batch_tokens, micro_batch=batch_tokens, learning_rate=1e-4, dtype=dtype  # type: ignore[arg-type]
    )  # fmt: skip
    state = TrainingState(model, make_optimizers(model, recipe), loader)
    begun, timed = 0.0, 0
    for info in train(state, causal_loss, recipe):
        if info.step == 1:
            begun = time.perf_counter()
            continue
        yield info.seconds
        timed, spent = timed + 1, time.perf_counter() - begun
        if spent > LONGEST_PROBE or (timed >= LEAST_TIMED and spent > PROBE_SECONDS):
            return


# --- planning -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One way to spend the time. num_parameters: with embeddings, which are num_embedding of them. epochs: None when
    all text is new. expected_loss: None where the law says less than guessing would reach, so nothing. memory: bytes.
    """

    model: ModelRecipe
    training: TrainingRecipe
    num_parameters: int
    num_embedding: int
    tokens: int
    epochs: float | None
    flops: float
    seconds: float
    expected_loss: float | None
    memory: int
    fits: bool

    def fragment(self) -> str:
        """The two tables of a recipe, as TOML."""
        model, training = self.model, self.training
        given = model.model_dump(exclude_none=True, exclude={"kind", "family"})  # a decoder is what there is advice on
        lines = ["[model]", *(f"{key} = {value}" for key, value in given.items() if value)]
        lines += ["", "[training]", f"steps = {training.steps}", f"batch_tokens = {training.batch_tokens}"]
        lines += [f"micro_batch = {training.micro_batch}", 'optimizer = "adamw"']
        lines += [f"learning_rate = {training.learning_rate:g}"]
        if training.dtype != "auto":
            lines += [f'dtype = "{training.dtype}"']
        if training.activation_checkpointing:
            lines += ["activation_checkpointing = true"]
        return "\n".join(lines) + "\n"


@dataclass(frozen=True, kw_only=True)
class Planner:
    """What is known: the machine (speed, free bytes or None), the rows (vocabulary, length), the text (tokens that
    differ; None: as many as are needed)."""

    shape: Shape
    speed: Throughput
    vocab_size: int
    context_length: int
    memory: int | None = None
    data_tokens: int | None = None
    dtype: str = "auto"

    def in_time(self, seconds: float) -> dict[str, Plan]:
        """Plans "smaller", "advised" and "larger", where there are such: each for as much text as the time allows, at
        most `MOST_EPOCHS` times all of it. Advised is the largest that fits and sees `TOKENS_PER_PARAMETER`; if none
        does, the smallest that fits.

        Raises UsageError when the memory holds none.
        """
        tokens = [self._tokens(model, seconds) for model in LADDER]  # before they are rounded to whole batches
        plans = [self.plan(model, count) for model, count in zip(LADDER, tokens, strict=True)]
        fitting = self._fitting(plans)
        taught = [
            plan
            for plan, count in zip(plans, tokens, strict=True)
            if plan.fits and count >= TOKENS_PER_PARAMETER * plan.num_parameters
        ]
        return _beside(plans, taught[-1] if taught else fitting[0])

    def to_loss(self, loss: float) -> dict[str, Plan]:
        """The same for what reaches a loss: advised is the quickest that fits.

        Raises UsageError when no size comes to it in this memory with this text.
        """
        found = [(model, _tokens_for(self._parameters(model), loss, self.data_tokens)) for model in LADDER]
        plans = [self.plan(model, tokens) for model, tokens in found if tokens is not None]
        fitting = [plan for plan in plans if plan.fits]
        if not fitting:
            raise UsageError(self._unreachable(loss, plans), "loss")
        return _beside(plans, min(fitting, key=lambda plan: plan.seconds))

    def plan(self, model: ModelRecipe, tokens: float, training: TrainingRecipe | None = None) -> Plan:
        """`model` trained on so many tokens. Without `training` the batch is by rule, and shrinks to fit the memory."""
        model = model.model_copy(update={"context_length": self.context_length})
        config = self.shape(model, self.vocab_size)
        cost = flops_per_token(config, self.context_length)
        settings = training or self._settings(config, cost, tokens)
        tokens = settings.steps * settings.batch_tokens
        rate = self.speed.at(config.num_parameters)
        loss = expected_loss(config.num_parameters, effective_tokens(tokens, self.data_tokens))
        memory = training_memory(config, settings)
        return Plan(
            model=model,
            training=settings,
            num_parameters=config.num_parameters,
            num_embedding=config.vocab_size * config.hidden_size * (1 if config.tied_embeddings else 2),
            tokens=int(tokens),
            epochs=None if self.data_tokens is None else tokens / self.data_tokens,
            flops=cost * tokens,
            seconds=cost * tokens / rate,
            expected_loss=loss if loss < math.log(self.vocab_size) else None,
            memory=memory,
            fits=self.memory is None or memory <= self.memory,
        )

    def require(self, plan: Plan) -> None:
        """Refuse a plan that the memory does not hold: UsageError with need, have, and what would help."""
        if plan.fits or self.memory is None:
            return
        helps = [text for text, changes in (
            ("set training.micro_batch=1", {"micro_batch": 1}),
            ("set training.activation_checkpointing=true", {"activation_checkpointing": True}),
            ("set both training.micro_batch=1 and training.activation_checkpointing=true",
             {"micro_batch": 1, "activation_checkpointing": True}),
        ) if self.plan(plan.model, plan.tokens, plan.training.model_copy(update=changes)).fits][:1]  # fmt: skip
        smaller = [rung for rung in (self.plan(model, plan.tokens) for model in LADDER) if rung.fits]
        if smaller:
            largest = smaller[-1].model
            helps.append(
                f"take a smaller model (hidden_size {largest.hidden_size}, num_layers {largest.num_layers} fits)"
            )
        raise UsageError(
            f"training {plan.num_parameters / 1e6:,.0f}M parameters needs about {_gigabytes(plan.memory)}, "
            f"{_gigabytes(self.memory)} are free: {', or '.join(helps) or 'take a machine with more memory'}",
            "model",
        )

    def _parameters(self, model: ModelRecipe) -> int:
        return self.shape(model, self.vocab_size).num_parameters

    def _tokens(self, model: ModelRecipe, seconds: float) -> float:
        """What the time allows, or the text."""
        config = self.shape(model, self.vocab_size)
        tokens = seconds * self.speed.at(config.num_parameters) / flops_per_token(config, self.context_length)
        return tokens if self.data_tokens is None else min(tokens, MOST_EPOCHS * self.data_tokens)

    def _settings(self, config: DecoderConfig, cost: float, tokens: float) -> TrainingRecipe:
        """Steps, batch and learning rate by rule; a batch is a power of two of rows. Less is computed at once, and in
        the end blocks twice, until it fits."""
        length, flops = self.context_length, cost * tokens
        wished = min(0.2920 * flops**0.3271, tokens / LEAST_STEPS)
        rows = 2 ** max(0, round(math.log2(max(1.0, wished / length))))
        rate = float(f"{min(HIGHEST_RATE, 0.3118 * flops**-0.125):.2g}")
        micro = 2 ** int(math.log2(max(1, MICRO_TOKENS // length)))
        raw = {"steps": max(1, int(tokens // (rows * length))), "batch_tokens": rows * length, "learning_rate": rate}
        base = TrainingRecipe.model_validate({**raw, "micro_batch": min(rows, micro), "dtype": self.dtype})
        while self.memory is not None and training_memory(config, base) > self.memory:
            if base.micro_batch > 1:
                base = base.model_copy(update={"micro_batch": base.micro_batch // 2})
            elif not base.activation_checkpointing:
                base = base.model_copy(update={"activation_checkpointing": True})
            else:
                break
        return base

    def _fitting(self, plans: list[Plan]) -> list[Plan]:
        fitting = [plan for plan in plans if plan.fits]
        if not fitting and self.memory is not None:
            raise UsageError(
                f"the smallest model needs about {_gigabytes(plans[0].memory)} to train, {_gigabytes(self.memory)} are "
                "free: end other programs, or shorten context_length or the vocabulary",
                "model",
            )
        return fitting

    def _unreachable(self, loss: float, plans: list[Plan]) -> str:
        if loss <= IRREDUCIBLE:
            return (f"a loss of {loss:g} nats a token is below what the law says any model reaches, {IRREDUCIBLE}: "
                    f"give a larger --loss")  # fmt: skip
        if plans and self.memory is not None:
            needed = min(plan.memory for plan in plans)
            return (f"a loss of {loss:g} takes a model that needs about {_gigabytes(needed)} to train, "
                    f"{_gigabytes(self.memory)} are free: give a larger --loss, or take another machine")  # fmt: skip
        if self.data_tokens is not None:
            worth = effective_tokens(MOST_EPOCHS * self.data_tokens, self.data_tokens)
            best = min(expected_loss(self._parameters(LADDER[-1]), worth), math.log(self.vocab_size))
            return (
                f"{self.data_tokens:,} tokens, read {MOST_EPOCHS} times, bring no size here below {best:.2f} nats a "
                f"token: add text, or give a --loss above that"
            )
        return (
            f"no size up to {self._parameters(LADDER[-1]) / 1e9:.1f}B reaches a loss of {loss:g}: give a larger --loss"
        )


def _beside(plans: list[Plan], advised: Plan) -> dict[str, Plan]:
    """The advised plan between one of about half and one of about twice its size."""
    smaller = [plan for plan in plans if plan.num_parameters * 1.8 <= advised.num_parameters]
    larger = [plan for plan in plans if plan.num_parameters >= advised.num_parameters * 1.8]
    named = {"smaller": smaller[-1:], "advised": [advised], "larger": larger[:1]}
    return {name: found[0] for name, found in named.items() if found}


def _gigabytes(count: float) -> str:
    return f"{count / 1e9:.2f} GB"
