"""What each choice bought: trainings that differ in one thing, with several seeds each.

    comparison = Comparison({"plain": [measured(figures), ...], "fgm": [...]}, references)
    print("\\n".join(comparison.lines()))
    write_comparison(folder, "spam", comparison)

Every figure is a mean over the seeds and half of its 95 % interval (Student's t). The difference to the first variant
is taken seed by seed, where both learned from the same examples in the same order; "*" marks one whose interval leaves
out 0. Of twenty such differences that are nothing one is marked by chance.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from bimo.evaluation.robustness import Interval, mean_interval
from bimo.evaluation.run_report import Table, render_page
from bimo.evaluation.svg import COLOURS, picture

__all__ = ["Comparison", "costs", "measured", "write_comparison"]

Figures = dict[str, float]  # by the name of what was measured
COSTS = {"trained": "trained weights 训练的权重", "seconds": "seconds of training 训练秒数",
         "peak_memory": "peak memory, MB 峰值内存"}  # fmt: skip


def measured(figures: Mapping[str, Any]) -> dict[str, Figures]:
    """{who: figures} of a stage's report: "after" is the trained model, "before" its base, others are baselines."""
    rows: dict[str, Figures] = {}

    def put(who: str, name: str, value: float) -> None:
        rows.setdefault(who, {})[name] = value

    for task, row in figures.get("loss", {}).items():
        for who in ("before", "after"):
            put(who, f"loss, {task}", row[who])
    for task, row in figures.get("classes", {}).items():
        for who, key in (("after", "model"), ("linear", "linear")):
            put(who, f"accuracy, {task}", row[key]["accuracy"])
            put(who, f"macro F1, {task}", row[key]["macro_f1"])
            for kind, values in row.get("noise", {}).items():
                if kind != "clean":
                    put(who, f"accuracy, {task} with {kind}", values[key])
    for task, row in figures.get("rouge_l", {}).items():
        for who in ("before", "after"):
            put(who, f"ROUGE-L, {task}", row[who])
    for task, row in figures.get("translation", {}).items():
        for who, values in row.items():
            put(who, f"BLEU, {task}", values["bleu"])
            put(who, f"chrF, {task}", values["chrf"])
    for language, row in figures.get("retrieval", {}).items():
        for who in ("before", "after", "bm25"):
            for metric in ("recall@5", "MRR"):
                put(who, f"{metric}, {language}", row[who][metric])
    return rows


def costs(result: Mapping[str, Any]) -> Figures:
    """What a stage's training took, of what `bimo train --json` tells of it."""
    return {name: float(result[name]) for name in COSTS if result.get(name) is not None}


@dataclass(frozen=True)
class Comparison:
    """variants: the figures of each seed. references: of what was not trained here. costs: of each seed."""

    variants: Mapping[str, Sequence[Figures]]
    references: Mapping[str, Figures]
    costs: Mapping[str, Sequence[Figures]]

    @property
    def metrics(self) -> list[str]:
        """What was measured of any variant, in order."""
        return list(dict.fromkeys(name for runs in self.variants.values() for run in runs for name in run))

    @property
    def num_seeds(self) -> int:
        return max(map(len, self.variants.values()))

    def interval(self, variant: str, metric: str) -> Interval | None:
        """None where it was not measured."""
        values = [run[metric] for run in self.variants[variant] if metric in run]
        return mean_interval(values) if values else None

    def difference(self, variant: str, metric: str) -> Interval | None:
        """To the first variant, seed by seed; None for that one, and where it cannot be told."""
        first = next(iter(self.variants))
        pairs = zip(self.variants[variant], self.variants[first], strict=False)
        values = [run[metric] - other[metric] for run, other in pairs if metric in run and metric in other]
        return mean_interval(values) if values and variant != first else None

    def rows(self) -> list[list[str]]:
        """A row for each metric and variant: metric, variant, mean with interval, difference with interval."""
        rows = list[list[str]]()
        for metric in self.metrics:
            rows += [
                [metric, variant, shown(value), _difference(self.difference(variant, metric))]
                for variant in self.variants
                if (value := self.interval(variant, metric)) is not None
            ]
            rows += [
                [metric, f"({name})", shown(Interval(figures[metric], math.nan)), ""]
                for name, figures in self.references.items()
                if metric in figures
            ]
        return rows

    def cost_rows(self) -> list[list[str]]:
        """variant, trained weights, seconds, memory: means over the seeds."""
        rows = []
        for variant, runs in self.costs.items():
            values = {name: [run[name] for run in runs if name in run] for name in COSTS}
            rows.append([variant, *(f"{sum(found) / len(found):,.0f}" if found else "" for found in values.values())])
        return rows

    def lines(self) -> list[str]:
        """For people: the tables of figures and of costs."""
        figures = [["MEASURED", "VARIANT", f"MEAN OF {self.num_seeds}", "DIFFERENCE"], *self.rows()]
        trained = [["VARIANT", "WEIGHTS", "SECONDS", "MB"], *self.cost_rows()]
        return [*_aligned(figures, left=2), "", *_aligned(trained, left=1)]


def shown(value: Interval) -> str:
    return f"{value.mean:.4f}" + ("" if math.isnan(value.half) else f" ±{value.half:.4f}")


def _difference(value: Interval | None) -> str:
    if value is None:
        return ""
    half = "" if math.isnan(value.half) else f" ±{value.half:.4f}"
    return f"{value.mean:+.4f}{half}{' *' if abs(value.mean) > value.half else ''}"


def _aligned(rows: Sequence[Sequence[str]], left: int) -> list[str]:
    """left: so many columns begin at the left. A Chinese character is as wide as two others."""
    from rich.cells import cell_len

    widths = [max(cell_len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        spaces = [" " * (width - cell_len(cell)) for cell, width in zip(row, widths, strict=True)]
        cells = [
            cell + space if column < left else space + cell
            for column, (cell, space) in enumerate(zip(row, spaces, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return lines


def write_comparison(folder: Path, title: str, comparison: Comparison) -> Path:
    """Write folder/compare.html: a picture of each figure, both tables."""
    pictures = [(metric, picture(partial(_points, comparison, metric))) for metric in comparison.metrics]
    note = (
        f"mean of {comparison.num_seeds} seeds ± half of the 95 % interval; the difference to the first variant is "
        f"seed by seed, * where its interval leaves out 0 "
        f"多个随机种子的均值与 95% 区间；差值逐种子计算，* 表示区间不含 0"
    )
    head = ("", "variant 方案", "mean 均值", "difference 差值")
    tables = [
        Table("What each choice bought 各项选择的收益", head, comparison.rows(), note),
        Table("What it cost 代价", ("variant 方案", *COSTS.values()), comparison.cost_rows()),
    ]
    subtitle = "对比报告 · report of a comparison"
    return render_page(folder / "compare.html", title, subtitle, tables=tables, pictures=pictures)


def _points(comparison: Comparison, metric: str, axes: Any) -> None:
    """A line a variant: its seeds as points, mean and interval as a bar; references as dashed lines."""
    names = [name for name in comparison.variants if comparison.interval(name, metric) is not None]
    for place, name in enumerate(names):
        values = [run[metric] for run in comparison.variants[name] if metric in run]
        interval = mean_interval(values)
        axes.plot(values, [place] * len(values), ".", color=COLOURS[0], alpha=0.5)
        half = 0 if math.isnan(interval.half) else interval.half
        axes.errorbar([interval.mean], [place], xerr=[half], fmt="|", color=COLOURS[0], capsize=3)
    for colour, (name, figures) in zip(COLOURS[1:], comparison.references.items(), strict=False):
        if metric in figures:
            axes.axvline(figures[metric], color=colour, linestyle="--", linewidth=1, label=name)
            axes.legend(frameon=False, fontsize="small")
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
