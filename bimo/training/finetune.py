"""What a stage makes of a model that exists: which base, which objective, how many steps, from which texts.

    base = open_base("smollm2", resolve("smollm2"))
    kind = stage_kind(stage, base, train_documents, validation_documents, seed=0)         # training.stage_kinds
    texts = Texts(train, validation, base.tokenizer)
    job = stage_job(recipe, stage, base, texts, kind.make_loader)
    model = tunable_model(base, stage, kind.with_heads, seed=0, training=job.training)
    for event in train_run(job, folder, model, kind.loss, texts, print, make_loader=kind.make_loader): ...

Loop, checkpoints, trackers and evaluation are pretraining's (training.session); a stage differs in what is loaded
before it and what is learned from.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bimo.data.loader import RowLoader
from bimo.data.shards import TokenFile, fingerprint
from bimo.errors import UsageError
from bimo.formats.huggingface import load_weights, read_model_config
from bimo.formats.integrity import weights_mark
from bimo.models.config import DecoderConfig, EncoderConfig, ModelConfig, Seq2SeqConfig
from bimo.models.empty import empty_model
from bimo.recipe import Recipe, StageRecipe, TrainingRecipe
from bimo.runtime import dtype_name
from bimo.tokenizer.load import Tokenizer
from bimo.training.replay import NAME as REPLAY
from bimo.training.session import Job, Texts

__all__ = [
    "GENERAL",
    "PSEUDO",
    "Base",
    "longest_row",
    "objective_kind",
    "open_base",
    "pseudo_folder",
    "row_length",
    "stage_job",
    "tunable_model",
]

GENERAL = "general"  # the validation text that shows what was forgotten
PSEUDO = "pseudo"  # training text that a model has labelled
USUAL_LENGTH = 512
RATES = {"lora": 2e-4, "bottleneck": 1e-3, "adalora": 3e-3, "prefix": 1e-2}
RATE = 2e-5  # of all weights; an adapter starts from nothing, AdaLoRA's values even from 0 between small vectors


@dataclass(frozen=True)
class Base:
    """The model a stage begins with. reference: as the user named it. mark: changes with its files."""

    reference: str
    directory: Path
    config: ModelConfig
    tokenizer: Tokenizer
    mark: str


def open_base(reference: str, directory: Path) -> Base:
    """directory: where `reference` was resolved to. Raises ModelError for no model."""
    config, tokenizer = read_model_config(directory), Tokenizer.from_directory(directory)
    return Base(reference, directory, config, tokenizer, weights_mark(directory))


def pseudo_folder(number: int) -> str:
    """Of the token file with a round's labels: by a folder's name its loss is weighted."""
    return f"train-{PSEUDO}-{number}"


def objective_kind(stage: StageRecipe, config: ModelConfig) -> str:
    """A key of `stage_kinds.STAGE_KINDS`. Raises UsageError for what the base cannot learn."""
    kinds = {task.kind for task in stage.task}
    if isinstance(config, EncoderConfig):
        if stage.objective == "answers":
            raise UsageError(f"an encoder ({config.family}) writes no answers: name a decoder as base", "objective")
        if stage.objective != "auto":
            return stage.objective
        return "embeddings" if "pairs" in kinds else "classes"
    if stage.objective in ("classes", "embeddings"):
        raise UsageError(
            f"{stage.objective} are told by an encoder, and {config.family} is none: a decoder answers with the class "
            f'as text, with objective = "answers"',
            "objective",
        )
    return "pairs" if isinstance(config, Seq2SeqConfig) else "answers"


def row_length(stage: StageRecipe, config: ModelConfig) -> int:
    """Tokens of a row. Raises UsageError for more than the base can read."""
    most = longest_row(stage, config)
    if stage.length > most:
        raise UsageError(f"length {stage.length} is more than the base reads, {most} tokens: lower it", "length")
    return stage.length or min(USUAL_LENGTH, most)


def longest_row(stage: StageRecipe, config: ModelConfig) -> int:
    """What the base can read."""
    most = config.max_positions
    if stage.adapter is not None and stage.adapter.kind == "prefix":
        most -= stage.adapter.tokens  # they take places, too
    return most


def tunable_model(
    base: Base,
    stage: StageRecipe,
    with_heads: Callable[[Any], Any],
    *,
    seed: int,
    training: TrainingRecipe,
    device: str = "cpu",
) -> Any:
    """The base in float32, with the stage's dropout, new heads and adapter."""
    config = base.config
    if stage.dropout >= 0:
        rates = ("dropout", "attention_dropout", "activation_dropout")
        known = {field.name for field in dataclasses.fields(config)}
        changes: dict[str, Any] = {name: stage.dropout for name in rates if name in known}
        config = dataclasses.replace(config, **changes)
    if stage.r_drop and not getattr(config, "dropout", 0.0):
        raise UsageError(
            "r_drop compares passes with different dropout, and there is none: set dropout = 0.1", "r_drop"
        )
    model = with_heads(load_trainable(base.directory, config))
    model.to(device)
    if stage.adapter is not None:
        from bimo.adapters.kinds import attach

        attach(model, stage.adapter, seed, base=base.reference, dtype=dtype_name(training.dtype, device))
    return model


def load_trainable(directory: Path, config: ModelConfig) -> Any:
    """Weights of a model directory in float32, as parameters."""
    model: Any = empty_model(config)
    for name, tensor in load_weights(directory, config):
        model.load_state_dict({name: tensor.float()}, strict=False, assign=True)
    if isinstance(config, DecoderConfig):
        model.reset_rope()
    model.requires_grad_(True)
    return model


def stage_job(
    recipe: Recipe, stage: StageRecipe, base: Base, texts: Texts, make_loader: Callable[..., RowLoader]
) -> Job:
    """How long it takes and what is read how often: `epochs` of the tasks, replay beside them."""
    length = row_length(stage, base.config)
    rows = {name: _rows(file, length, make_loader) for name, file in texts.train.items()}
    if not any(rows[task.name][0] for task in stage.task if task.weight):
        raise UsageError(f"stage {stage.name} has no example to learn from: the manifest says where they went, and a "
                         f"task of weight 0 is only scored", "task")  # fmt: skip
    weights = _mixing(stage, {name: count for name, (count, _) in rows.items()})
    training = _training(stage, rows)
    lists = [Path(file) for file in stage.penalty.words]  # by what is in them
    what = [stage.model_dump(mode="json", exclude={"training", "name"}), base.mark, fingerprint(*lists)]
    about = {"recipe": recipe.model_dump(mode="json"), "stage": stage.name, "parent": base.reference,
             "parent_mark": base.mark}  # fmt: skip
    return Job(
        f"{recipe.name}-{stage.name}",
        recipe.seed,
        training,
        weights,
        what,
        about,
        length=length,
        from_start=True,
        beside=(GENERAL,),
        robust=stage.robust,
    )


def _rows(file: TokenFile, length: int, make_loader: Callable[..., RowLoader]) -> tuple[int, int]:
    """How many rows a file has, and the tokens of one on average."""
    try:
        loader = make_loader([file], length=length, shuffle=False)
    except UsageError:
        return 0, length
    return loader.num_rows[0], loader.row_tokens


def _mixing(stage: StageRecipe, rows: Mapping[str, int]) -> dict[str, float]:
    """Weights by which a loader, which multiplies them with the rows, reads tasks in proportion to w n^(1/T), and
    replay for its share of all rows."""
    sizes = {task.name: rows.get(task.name, 0) for task in stage.task}
    weights = {
        task.name: task.weight * sizes[task.name] ** (1 / stage.mixing_temperature - 1) if sizes[task.name] else 0.0
        for task in stage.task
    }
    share = stage.replay.share
    if rows.get(REPLAY):
        if share >= 1:
            raise UsageError("replay.share is of all rows: with 1 nothing is left for the tasks", "replay.share")
        others = sum(weight * sizes[name] for name, weight in weights.items())
        weights[REPLAY] = others * share / (1 - share) / rows[REPLAY]
    return weights


def _training(stage: StageRecipe, rows: Mapping[str, tuple[int, int]]) -> TrainingRecipe:
    """The recipe's, with steps instead of epochs and a learning rate."""
    wish = stage.training
    own = {task.name: rows[task.name] for task in stage.task if task.weight}
    own |= {PSEUDO: rows[PSEUDO]} if PSEUDO in rows else {}
    num_rows = sum(count for count, _ in own.values())
    row_tokens = sum(count * tokens for count, tokens in own.values()) / max(1, num_rows)
    share = stage.replay.share if rows.get(REPLAY, (0, 0))[0] else 0.0
    a_step = max(1, int(wish.batch_tokens // max(1, row_tokens)))
    steps = wish.steps or max(1, math.ceil(wish.epochs * num_rows / (1 - share) / a_step))
    values = wish.model_dump(exclude={"epochs"})
    rate = wish.learning_rate or (RATES[stage.adapter.kind] if stage.adapter else RATE)
    return TrainingRecipe.model_validate({**values, "steps": steps, "learning_rate": rate})
