"""search.html of `bimo tune`: how the search went, which settings mattered, and every trial.

    write_search_report(folder, recipe, search.trials(), search.metric, search.importance(), ["..."])

One file without scripts, in Chinese and English. All of it is the validation score, which also chose the best.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any

from bimo.evaluation.svg import picture
from bimo.recipe import RangeRecipe, Recipe, SearchRecipe
from bimo.training.search import Trial

__all__ = ["write_search_report"]

BLUE, GREY, RED = "#2563eb", "#a8a29e", "#dc2626"
METRICS = {
    "bits_per_byte": "bits per byte 每字节比特",
    "nats_per_token": "nats per token 每词元奈特",
    "nats_per_text": "nats per text 每文本奈特",
    "nats_per_query": "nats per query 每查询奈特",
}
STATES = {"complete": "完成", "pruned": "提前停止", "failed": "失败", "running": "运行中", "waiting": "等待"}
METHODS = {"grid": "grid 网格", "random": "random 随机", "tpe": "TPE, Bayesian 贝叶斯"}


def write_search_report(
    folder: Path,
    recipe: Recipe,
    trials: Sequence[Trial],
    metric: str,
    importance: Mapping[str, float],
    notes: Sequence[str] = (),
) -> Path:
    """Write folder/search.html and return its path. recipe: with its [search]."""
    import jinja2
    from markupsafe import Markup

    assert recipe.search is not None
    wish = recipe.search
    complete = [trial for trial in trials if trial.state == "complete"]
    best = min(complete, key=lambda trial: (trial.loss, trial.same_as is not None, trial.number), default=None)
    pictures: list[tuple[str, str, Any]] = []
    slices: list[tuple[str, Any]] = []
    if told := [trial for trial in trials if trial.loss is not None]:
        pictures.append(("history", "历程", Markup(picture(partial(_history, told, metric)))))
        pictures.append(("training of each", "各次训练", Markup(picture(partial(_curves, told, metric)))))
    if importance:
        pictures.append(("importance", "重要性", Markup(picture(partial(_bars, importance)))))
    if len(complete) > 1:
        if len(wish.space) > 1:
            lines = Markup(picture(partial(_parallel, complete, wish)))
            pictures.append(("all settings, blue: best third", "全部设置，蓝：最好三分之一", lines))
        slices = [(key, Markup(picture(partial(_slice, told, wish, key, metric)))) for key in wish.space]
    template = files("bimo.evaluation").joinpath("search_report.html.jinja").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["value"] = _label
    page = environment.from_string(template).render(
        recipe=recipe,
        wish=wish,
        method=METHODS[wish.method],
        metric=METRICS.get(metric, metric),
        trials=trials,
        best=best,
        states=STATES,
        pictures=pictures,
        slices=slices,
        importance=importance,
        notes=notes,
    )
    target = folder / "search.html"
    target.write_text(page, encoding="utf-8", errors="replace")
    return target


def _label(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return ", ".join(map(_label, value)) if isinstance(value, tuple | list) else str(value)


# --- pictures ---------------------------------------------------------------------------------------------------------


def _history(trials: Sequence[Trial], metric: str, axes: Any) -> None:
    complete = [trial for trial in trials if trial.state == "complete"]
    others = [trial for trial in trials if trial.state != "complete"]
    axes.plot([trial.number for trial in others], [trial.loss for trial in others], "x", color=GREY, label="pruned")
    axes.plot([trial.number for trial in complete], [trial.loss for trial in complete], ".", color=BLUE)
    smallest, line = float("inf"), []
    for trial in complete:
        smallest = min(smallest, trial.loss if trial.loss is not None else smallest)
        line.append((trial.number, smallest))
    if line:
        axes.step(*zip(*line, strict=True), where="post", color=RED, linewidth=1.2, label="best so far")
    axes.set_xlabel("trial")
    axes.set_ylabel(metric.replace("_", " "))
    axes.legend(frameon=False)


def _curves(trials: Sequence[Trial], metric: str, axes: Any) -> None:
    for trial in trials:
        if trial.curve:
            colour = BLUE if trial.state == "complete" else GREY
            marker = "." if len(trial.curve) < 30 else ""
            axes.plot(*zip(*trial.curve, strict=True), color=colour, alpha=0.6, linewidth=1, marker=marker)
    axes.set_xlabel("step")
    axes.set_ylabel(metric.replace("_", " "))


def _bars(importance: Mapping[str, float], axes: Any) -> None:
    keys = list(importance)[::-1]
    axes.barh(keys, [importance[key] for key in keys], color=BLUE)
    axes.set_xlim(0, 1)
    axes.set_xlabel("share of the variance explained (fANOVA)")


def _slice(trials: Sequence[Trial], wish: SearchRecipe, key: str, metric: str, axes: Any) -> None:
    for state, colour, marker in (("pruned", GREY, "x"), ("complete", BLUE, ".")):
        points = [trial for trial in trials if trial.state == state and key in trial.settings]
        axes.plot([_place(wish, key, t.settings[key]) for t in points], [t.loss for t in points], marker, color=colour)
    _scale(axes.set_xscale, axes.set_xticks, wish, key)
    axes.set_xlabel(key, parse_math=False)
    axes.set_ylabel(metric.replace("_", " "))


def _parallel(trials: Sequence[Trial], wish: SearchRecipe, axes: Any) -> None:
    """Each trial a line through its settings and its loss; each axis from its smallest to its largest value."""
    columns = []
    for key, values in wish.space.items():
        log = isinstance(values, RangeRecipe) and values.log
        places = [_place(wish, key, trial.settings[key]) for trial in trials]
        columns.append([math.log(place) for place in places] if log else places)
    columns.append([trial.loss or 0.0 for trial in trials])
    order = sorted(range(len(trials)), key=lambda number: -columns[-1][number])
    good = set(order[-max(1, len(order) // 3) :])
    scaled = [[(value - min(column)) / ((max(column) - min(column)) or 1) for value in column] for column in columns]
    for number in order:
        colour, width = (BLUE, 1.4) if number in good else (GREY, 0.7)
        axes.plot(range(len(columns)), [column[number] for column in scaled], color=colour, linewidth=width)
    axes.set_xticks(range(len(columns)), [*(key.rpartition(".")[2] for key in wish.space), "loss"], parse_math=False)
    axes.set_yticks([0, 1], ["least", "most"])


def _place(wish: SearchRecipe, key: str, value: Any) -> float:
    """Where a value stands on its axis; choices stand in their order."""
    values = wish.space[key]
    return float(value) if isinstance(values, RangeRecipe) else float(values.index(value))


def _scale(set_scale: Callable[..., Any], set_ticks: Callable[..., Any], wish: SearchRecipe, key: str) -> None:
    values = wish.space[key]
    if not isinstance(values, RangeRecipe):
        set_ticks(range(len(values)), [_label(value) for value in values], parse_math=False)
    elif values.log:
        set_scale("log")
