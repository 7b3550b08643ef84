"""What is asked of a stage, against what its base can do: said before any work begins.

    check_stage(stage, base.config)                       # UsageError names the key and what to do
    for text in without_effect(recipe, stage, config): print(text)

A wish that cannot be fulfilled is refused. One that merely changes nothing here is told: a search or a comparison may
try kinds of adapters in turn, and give each its sizes.
"""

from __future__ import annotations

from bimo.errors import UsageError
from bimo.models.config import ModelConfig
from bimo.recipe import AdapterRecipe, EmbeddingRecipe, Recipe, ReportRecipe, RobustRecipe, StageRecipe
from bimo.recipe.sections import Section
from bimo.training.finetune import objective_kind, row_length

__all__ = ["check_stage", "without_effect"]

LOW_RANK = ("rank", "alpha", "dropout", "targets")
OF_ADAPTERS = {"lora": LOW_RANK, "adalora": LOW_RANK, "bottleneck": ("width",), "prefix": ("tokens",)}


def check_stage(stage: StageRecipe, config: ModelConfig) -> None:
    """Raise UsageError for wishes the base cannot fulfil, before any work begins."""
    kind = objective_kind(stage, config)
    row_length(stage, config)
    if stage.too_long == "cut" and kind not in ("classes", "embeddings"):
        raise UsageError('too_long = "cut" is for texts that an encoder reads, an answer that is cut teaches to break '
                         'off: use "skip", or a larger length', "too_long")  # fmt: skip
    if kind != "answers" and (stage.penalty.repetition or stage.penalty.listed):
        raise UsageError(
            f"penalty is for answers that a decoder writes, {config.family} is none: leave it out", "penalty"
        )
    if stage.r_drop and kind == "embeddings":
        raise UsageError("r_drop compares scores of words or classes, embeddings have none: leave it out", "r_drop")
    if stage.pseudo_labels is not None:
        if kind != "classes":
            raise UsageError(f"pseudo_labels are classes, and this stage learns {kind}: leave them out",
                             "pseudo_labels")  # fmt: skip
        names = [task.name for task in stage.task]
        if stage.pseudo_labels.task not in (names if len(names) > 1 else [*names, None]):
            raise UsageError(f"pseudo_labels.task says whose classes the texts get, one of {', '.join(names)}",
                             "pseudo_labels")  # fmt: skip
    if kind != "answers" and stage.replay.source is not None:
        raise UsageError(f"replay is for decoders that write answers, {config.family} is trained on {kind}: leave "
                         f"replay.source out", "replay")  # fmt: skip
    dropout: float = getattr(config, "dropout", 0.0) if stage.dropout < 0 else stage.dropout
    if stage.r_drop and not dropout:
        raise UsageError(
            "r_drop compares passes with different dropout, and there is none: set dropout = 0.1", "r_drop"
        )


def without_effect(recipe: Recipe, stage: StageRecipe, config: ModelConfig) -> list[str]:
    """A sentence for each wish that changes nothing in this stage."""
    kind = objective_kind(stage, config)
    found = list[tuple[str, str]]()
    for number, task in enumerate(stage.task):
        if kind == "classes" and task.instruction:
            found.append((f"task.{number}.instruction", "texts with classes have no question"))
        if kind != "answers" and task.system:
            found.append((f"task.{number}.system", "only a decoder that answers reads it"))
        if kind in ("pairs", "embeddings") and task.loss_weight != 1:
            found.append((f"task.{number}.loss_weight", f"{kind} share one loss; weight says how often a task is read"))
    if (adapter := stage.adapter) is not None:
        own = OF_ADAPTERS[adapter.kind]
        others = {key for keys in OF_ADAPTERS.values() for key in keys if key not in own}
        found += [(f"adapter.{key}", f"the adapter is of kind {adapter.kind}")
                  for key in _changed(adapter, AdapterRecipe()) if key in others]  # fmt: skip
    if stage.robust.kind == "none":
        found += [(f"robust.{key}", 'robust.kind is "none"')
                  for key in _changed(stage.robust, RobustRecipe()) if key != "neftune"]  # fmt: skip
    if kind != "embeddings":
        found += [
            (f"embedding.{key}", f"the stage learns {kind}") for key in _changed(stage.embedding, EmbeddingRecipe())
        ]
    if kind != "answers":
        untouched = StageRecipe.model_fields["replay"].default
        found += [(f"replay.{key}", "only a decoder that answers is held by replay")
                  for key in _changed(stage.replay, untouched)]  # fmt: skip
        if stage.training.curriculum:
            found.append(("training.curriculum", "lengths grow where rows are filled with tokens, in decoders"))
    told = [f"{key} of stage {stage.name} has no effect: {why}" for key, why in found]
    if not recipe.data.sources and _changed(recipe.data, type(recipe.data)()):
        told.append("[data] has no effect: the recipe has only stages, which have keys of the same names")
    if kind != "classes" and len(recipe.stage) == 1 and recipe.report.noise != ReportRecipe().noise:
        told.append("report.noise has no effect: it is for classes")
    return told


def _changed(section: Section, usual: Section) -> list[str]:
    """Keys whose values are not the usual ones."""
    return [key for key in type(section).model_fields if getattr(section, key) != getattr(usual, key)]
