"""The recipe, as `bimo.recipe.file` reads it: `load_recipe`, and the sections it is made of."""

from bimo.recipe.compare import CompareRecipe
from bimo.recipe.file import Recipe, load_recipe, save_recipe, settings_of
from bimo.recipe.search import RangeRecipe, SearchRecipe
from bimo.recipe.sections import (
    CleanRecipe,
    DataRecipe,
    ModelRecipe,
    ObjectiveRecipe,
    ParallelRecipe,
    ReportRecipe,
    SourceRecipe,
    TokenizerRecipe,
    TrainingRecipe,
)
from bimo.recipe.stages import (
    AdapterRecipe,
    AugmentRecipe,
    EmbeddingRecipe,
    PenaltyRecipe,
    PseudoLabelRecipe,
    ReplayRecipe,
    RobustRecipe,
    StageRecipe,
    StageTrainingRecipe,
    TaskRecipe,
)

__all__ = [
    "AdapterRecipe",
    "AugmentRecipe",
    "CleanRecipe",
    "CompareRecipe",
    "DataRecipe",
    "EmbeddingRecipe",
    "ModelRecipe",
    "ObjectiveRecipe",
    "ParallelRecipe",
    "PenaltyRecipe",
    "PseudoLabelRecipe",
    "RangeRecipe",
    "Recipe",
    "ReplayRecipe",
    "ReportRecipe",
    "RobustRecipe",
    "SearchRecipe",
    "SourceRecipe",
    "StageRecipe",
    "StageTrainingRecipe",
    "TaskRecipe",
    "TokenizerRecipe",
    "TrainingRecipe",
    "load_recipe",
    "save_recipe",
    "settings_of",
]
