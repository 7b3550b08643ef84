"""report.html of a run: curves of the training, scores on text it was not trained on, and what the model writes.

    write_report(folder, recipe, [Sample("text", "The moon", "...")])

Everything it shows is read from the run's folder; the page is one file without scripts, in Chinese and English.
"""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from bimo.recipe import Recipe
from bimo.training.session import read_metrics

__all__ = ["Sample", "write_report"]

COLOURS = ("#2563eb", "#dc2626", "#059669", "#9333ea")


@dataclass(frozen=True)
class Sample:
    """kind: "text", which the model went on with, or "chat", a question it answered."""

    kind: str
    prompt: str
    answer: str


def write_report(folder: Path, recipe: Recipe, samples: list[Sample]) -> Path:
    """Write folder/report.html and return its path."""
    import jinja2
    from markupsafe import Markup

    rows = read_metrics(folder / "metrics.jsonl")
    steps = [row for row in rows if "loss" in row]
    scores: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        for key, value in row.items():
            if key.startswith("validation/") and key.endswith("/bits_per_byte"):
                scores.setdefault(key.split("/")[1], []).append((row["step"], value))
    curves = {
        "loss": [("train", [(row["step"], row["loss"]) for row in steps])],
        "bits per byte": list(scores.items()),
        "learning rate": [("rate", [(row["step"], row["learning_rate"]) for row in steps])],
        "gradient norm": [("norm", [(row["step"], row["grad_norm"]) for row in steps])],
    }
    pictures = [(title, Markup(_curve(lines))) for title, lines in curves.items() if any(line for _, line in lines)]
    manifest = json.loads((folder / "data" / "manifest.json").read_text(encoding="utf-8"))
    template = files("bimo.evaluation").joinpath("run_report.html.jinja").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    page = environment.from_string(template).render(
        recipe=recipe,
        lineage=_lineage(folder),
        pictures=pictures,
        scores={name: line[-1][1] for name, line in scores.items()},
        speed=_median([row["tokens_per_second"] for row in steps]),
        parts=manifest["parts"],
        samples=samples,
    )
    target = folder / "report.html"
    target.write_text(page, encoding="utf-8", errors="replace")
    return target


def _lineage(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "model" / "bimo.json").read_text(encoding="utf-8")))


def _median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2] if values else 0.0


def _curve(lines: list[tuple[str, list[tuple[int, float]]]]) -> str:
    """One picture as SVG."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2, 2.7), layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.add_subplot()
    for colour, (name, line) in zip(COLOURS, lines, strict=False):
        axes.plot(
            *zip(*line, strict=True), color=colour, linewidth=1.2, marker="." if len(line) < 30 else "", label=name
        )
    axes.set_xlabel("step")
    axes.grid(alpha=0.25)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    if len(lines) > 1:
        axes.legend(frameon=False)
    target = io.StringIO()
    figure.savefig(target, format="svg", transparent=True, metadata={"Date": None})
    text = target.getvalue()
    return text[text.index("<svg") :]
