"""search.html: whatever came of the trials, the page can be read, and holds nothing that runs."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from bimo.evaluation.search_report import write_search_report
from bimo.recipe import Recipe
from bimo.training.search import Trial

SPACE = {
    "training.learning_rate": {"low": 1e-4, "high": 1e-1, "log": True},
    "stage.0.base": ["模型/甲 🦊", "<b>$x$</b>"],
    "training.betas": [[0.9, 0.95], [0.9, 0.999]],
}


@pytest.fixture
def recipe() -> Recipe:
    raw = {"name": "搜索", "data": {"sources": [{"name": "a", "path": "x"}]}, "search": {"space": SPACE}}
    return Recipe.model_validate(raw)


def trial(number: int, state: str, loss: float | None, rate: float = 1e-3, **more: object) -> Trial:
    choice = SPACE["stage.0.base"][number % 2]  # type: ignore[index]
    settings = {"training.learning_rate": rate, "stage.0.base": choice, "training.betas": (0.9, 0.95)}
    curve = ((4, loss),) if loss is not None else ()
    return Trial(number, state, settings, loss, curve, seconds=1.5, **more)  # type: ignore[arg-type]


def pictures(page: str) -> list[ElementTree.Element]:
    return [ElementTree.fromstring(part.partition("</svg>")[0] + "</svg>") for part in page.split("<figcaption>")[1:]
            for part in ["<svg" + part.partition("<svg")[2]]]  # fmt: skip


def test_all_that_happened_is_shown(recipe: Recipe, tmp_path: Path) -> None:
    trials = [
        trial(0, "complete", 2.0),
        trial(1, "complete", 1.5, 1e-2),
        trial(2, "pruned", 3.0, 1e-4),
        trial(3, "failed", math.nan, reason="the loss <exploded> 爆炸"),
        trial(4, "complete", 1.5, 1e-2, same_as=1),
        Trial(5, "waiting"),
    ]
    shares = {"training.learning_rate": 0.75, "stage.0.base": 0.25, "training.betas": 0.0}
    file = write_search_report(tmp_path, recipe, trials, "bits_per_byte", shares, ["a note 说明"])
    page = file.read_text(encoding="utf-8")
    assert "<script" not in page and "<b>$x$" not in page and "<exploded>" not in page
    assert "&lt;exploded&gt; 爆炸" in page and "a note 说明" in page and "模型/甲 🦊" in page
    assert "<b>1.5000</b> (trial 试验 1)" in page and "同试验 1" in page and "75%" in page
    shown = pictures(page)
    assert len(shown) == 4 + 3  # history, trainings, importance, all settings; and each setting
    texts = {element.text for picture in shown for element in picture.iter("{http://www.w3.org/2000/svg}text")}
    assert {"<b>$x$</b>", "模型/甲 🦊", "best so far"} <= texts  # text, not outlines of missing letters


@pytest.mark.parametrize("trials", [[], [Trial(0, "waiting")], [trial(0, "failed", None, reason="无")]])
def test_nothing_came_of_it(recipe: Recipe, tmp_path: Path, trials: list[Trial]) -> None:
    page = write_search_report(tmp_path, recipe, trials, "loss", {}).read_text(encoding="utf-8")
    assert "<svg" not in page and "全部试验" in page and all(trial.reason in page for trial in trials)
