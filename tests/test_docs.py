"""The documents quote lines of code and list a recipe's keys: each must still be there, in both languages alike."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from bimo.recipe import (
    AdapterRecipe,
    AugmentRecipe,
    CompareRecipe,
    EmbeddingRecipe,
    PenaltyRecipe,
    PseudoLabelRecipe,
    RangeRecipe,
    ReplayRecipe,
    RobustRecipe,
    SearchRecipe,
    StageRecipe,
    StageTrainingRecipe,
    TaskRecipe,
)
from bimo.recipe.sections import SourceRecipe, TrainingRecipe

ROOT = Path(__file__).parent.parent
QUOTE = re.compile(r"`((?:bimo|kernels)/[\w/]+\.\w+)` › `([^`]+)`")


def quotes(document: Path) -> list[tuple[str, str]]:
    return QUOTE.findall(document.read_text(encoding="utf-8"))


@pytest.mark.parametrize("language", ["en", "zh"])
def test_quoted_lines_exist(language: str) -> None:
    found = quotes(ROOT / "docs" / language / "mathematics.md") + quotes(ROOT / "docs" / language / "speed.md")
    assert len(found) > 17
    for file, line in found:
        assert line in (ROOT / file).read_text(encoding="utf-8"), f"{file} no longer has: {line}"


def test_both_languages_quote_the_same_lines() -> None:
    for name in ("mathematics", "speed"):
        assert quotes(ROOT / f"docs/en/{name}.md") == quotes(ROOT / f"docs/zh/{name}.md")


def test_every_document_exists_in_both_languages() -> None:
    names = [{file.name for file in (ROOT / "docs" / language).glob("*.md")} for language in ("en", "zh")]
    assert names[0] == names[1]


SECTIONS = {  # what stands in a heading, or before a table: the keys that are listed below it
    "`[[stage]]`": StageRecipe,
    "`[[stage.task]]`": TaskRecipe,
    "`[stage.task.augment]`": AugmentRecipe,
    "`[stage.adapter]`": AdapterRecipe,
    "`[stage.replay]`": ReplayRecipe,
    "`[stage.robust]`": RobustRecipe,
    "`[stage.penalty]`": PenaltyRecipe,
    "`[stage.pseudo_labels]`": PseudoLabelRecipe,
    "`[stage.embedding]`": EmbeddingRecipe,
    "`[stage.training]`": StageTrainingRecipe,
    "`[search]`": SearchRecipe,
    "`[search.space]`": RangeRecipe,
    "`[compare]`": CompareRecipe,
}
WHOLE = {
    TaskRecipe: SourceRecipe,
    StageTrainingRecipe: TrainingRecipe,
}  # of these only what is new, or other, is listed


@pytest.mark.parametrize("language", ["en", "zh"])
def test_every_key_of_a_stage_is_listed(language: str) -> None:
    listed: dict[Any, dict[str, str]] = {}
    section: Any = None
    for line in (ROOT / "docs" / language / "stages.md").read_text(encoding="utf-8").splitlines():
        for name in (name for name in SECTIONS if name in line and not line.startswith("|")):
            section = SECTIONS[name]
        if line.startswith("| `"):
            keys, default = line.split(" | ")[:2]
            listed.setdefault(section, {}).update(dict.fromkeys(re.findall(r"`(\w+)`", keys), default))
    assert set(listed) == set(SECTIONS.values())
    for section, keys in listed.items():
        base = WHOLE.get(section)
        fields = section.model_fields
        known = base.model_fields if base else {}
        wanted = {name for name in fields if name not in known or fields[name].default != known[name].default}
        assert wanted <= set(keys) <= set(fields), section
        for name, told in keys.items():
            default = fields[name].default
            if isinstance(default, bool | int | float | str) and name not in (
                "initial_rank",
                "length",
            ):  # told in words
                shown = told.strip("`")
                assert json.loads(shown) == default, (section, name)
