"""What a stage cannot do is refused, what changes nothing is told, and a plain stage is neither."""

from __future__ import annotations

from typing import Any

import pytest

from bimo.errors import UsageError
from bimo.models.config import ModelConfig
from bimo.recipe import Recipe
from bimo.training.stage_checks import check_stage, without_effect
from tests.adapters.tiny import make


def recipe(task: dict[str, Any] | None = None, more: dict[str, Any] | None = None, **stage: Any) -> Recipe:
    tasks = [{"name": "t", "path": "t.jsonl", **(task or {})}]
    return Recipe.model_validate({"name": "r", "stage": [{"base": "b", "task": tasks, **stage}], **(more or {})})


def config(family: str) -> ModelConfig:
    found: ModelConfig = make(family).config
    return found


@pytest.mark.parametrize("family", ["llama", "bert", "t5"])
def test_a_plain_stage_is_fine(family: str) -> None:
    one = recipe()
    check_stage(one.stage[0], config(family))
    assert without_effect(one, one.stage[0], config(family)) == []


@pytest.mark.parametrize(
    ("family", "wishes", "key"),
    [
        ("llama", {"adapter": {"kind": "prefix", "rank": 4}}, "adapter.rank"),
        ("llama", {"adapter": {"kind": "lora", "tokens": 4}}, "adapter.tokens"),
        ("llama", {"robust": {"epsilon": 0.5}}, "robust.epsilon"),
        ("llama", {"embedding": {"temperature": 0.5}}, "embedding.temperature"),
        ("llama", {"more": {"report": {"noise": 0.1}}}, "report.noise"),
        ("llama", {"more": {"data": {"validation": 0.1}}}, "[data]"),
        ("bert", {"task": {"instruction": "类别：{prompt}"}}, "task.0.instruction"),
        ("bert", {"task": {"system": "你好"}}, "task.0.system"),
        ("bert", {"replay": {"samples": 9}}, "replay.samples"),
        ("bert", {"training": {"curriculum": [[0.5, 8], [0.5, 16]]}}, "training.curriculum"),
        ("t5", {"task": {"loss_weight": 2.0}}, "task.0.loss_weight"),
        ("t5", {"task": {"kind": "pairs", "system": "x"}}, "task.0.system"),
    ],
)
def test_what_changes_nothing_is_told(family: str, wishes: dict[str, Any], key: str) -> None:
    one = recipe(**wishes)
    check_stage(one.stage[0], config(family))
    (told,) = without_effect(one, one.stage[0], config(family))
    assert told.startswith(key) and "has no effect" in told


@pytest.mark.parametrize(
    ("family", "wishes", "told"),
    [
        ("llama", {"length": 100_000}, "more than the base reads"),
        ("llama", {"too_long": "cut"}, "an answer that is cut teaches to break off"),
        ("llama", {"objective": "classes"}, "told by an encoder"),
        ("bert", {"objective": "answers"}, "an encoder"),
        ("bert", {"penalty": {"repetition": 1.0}}, "penalty is for answers"),
        ("bert", {"objective": "embeddings", "r_drop": 1.0}, "embeddings have none"),
    ],
)
def test_what_cannot_be_is_refused(family: str, wishes: dict[str, Any], told: str) -> None:
    with pytest.raises(UsageError, match=told):
        check_stage(recipe(**wishes).stage[0], config(family))
